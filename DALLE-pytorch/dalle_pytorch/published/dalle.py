"""DALLE-pytorch's priors, of releases 0.11 to 1.6 and of the DALL-3 fork, as one file or as DeepSpeed leaves them."""

import math
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import torch

from dalle_pytorch.checks import check_values
from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.boundary import opening, opens
from dalle_pytorch.files.downloads import VQGANS, default_file
from dalle_pytorch.nn.upstream import State, count_parts, strip_prefix
from dalle_pytorch.pretrained import WEIGHTS_NAME, construct, load_state, read_config, read_tensors, resolve_folder
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.priors.min_dalle import DalleBart
from dalle_pytorch.priors.mindalle import MinDALLE
from dalle_pytorch.published.common import TRAINING_STATE, as_checkpoint, build, check_agreement, is_file
from dalle_pytorch.published.unpickler import read_torch
from dalle_pytorch.published.vaes import build_openai_dvae, build_vqgan, load_openai_dvae, load_vqgan
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.vqgan import VQGanVAE

PriorType = TypeVar("PriorType", bound=Prior)

AUXILIARY_NAME = "auxiliary.pt"  # DALLE-pytorch's settings beside DeepSpeed's weights
CONSOLIDATED_NAME = "pytorch_model.bin"  # output of DeepSpeed's zero_to_fp32.py

# Recorded by some releases without an effect on the weights; 1.x accepted sparse_attn and ignored it.
_DALLE_IGNORED = {"vae", "sparse_attn", "optimize_for_inference"}


@opens
def load_dalle(path: str | os.PathLike, vae: ImageTokenizer | None = None, taming: bool = False) -> DALLE:
    """Opens a prior: a native folder; a `dalle.pt` of DALLE-pytorch or its DALL-3 fork; DeepSpeed's consolidated
    weights beside their `auxiliary.pt`, or the folder of the two.

    `vae` overrides the one that the checkpoint names; `taming` does so with the published VQGAN of as many codes.
    """
    if not is_published_dalle(path):
        return open_native_prior(DALLE, path, vae, taming)
    return open_dalle(path, _prior_checkpoint(Path(path)), vae, taming)


def is_published_dalle(path: str | os.PathLike) -> bool:
    """Whether this means a file of DALLE-pytorch, or a folder that DeepSpeed wrote for it."""
    return is_file(path) or (Path(path) / AUXILIARY_NAME).is_file()


def open_native_prior(
    kind: type[PriorType], path: str | os.PathLike, vae: ImageTokenizer | None = None, taming: bool = False,
    large_dtype: torch.dtype = torch.float32, low_memory: bool = False, **flags: Any,
) -> PriorType:  # fmt: skip
    """A prior of this class in a native folder or under a hub name.

    Args:
        vae, taming: as in `load_dalle`.
        large_dtype: of the weights of published priors, in place of float32.
        low_memory: as in `open_published_prior`.
        flags: constructor arguments in place of the recorded ones.
    """
    folder = resolve_folder(path)
    config = read_config(folder)
    if vae is None and taming:
        vae = published_vqgan(path, config.get("num_image_tokens"))
    dtype = large_dtype if config.get("class") in (DalleBart.__name__, MinDALLE.__name__) else torch.float32
    prior = kind.from_pretrained(folder, dtype, vae=vae, **flags)
    if low_memory and isinstance(prior, DalleBart):
        prior.reopen_encoder = lambda: strip_prefix(read_tensors(folder / WEIGHTS_NAME), "encoder.")
    return prior


def _prior_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, assembled from its parts if DeepSpeed wrote it."""
    if path.name == AUXILIARY_NAME:
        path = path.parent
    if path.is_dir():
        if not (path / CONSOLIDATED_NAME).is_file():
            raise CheckpointError(
                f"{path} has no {CONSOLIDATED_NAME}; run DeepSpeed's zero_to_fp32.py in it to create that file"
            )
        path = path / CONSOLIDATED_NAME
    content = read_torch(path, TRAINING_STATE)
    auxiliary = find_auxiliary(path)
    if auxiliary is None or not isinstance(content, dict) or "hparams" in content:
        return as_checkpoint(path, content)
    settings = read_torch(auxiliary, TRAINING_STATE)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{auxiliary}: expected settings of DALLE-pytorch, got a {type(settings).__name__}")
    # DeepSpeed's own files have the weights in `module`.
    return as_checkpoint(path, {**settings, "weights": content.get("module", content)})


def find_auxiliary(path: Path) -> Path | None:
    """The `auxiliary.pt` that belongs to DeepSpeed's weights: beside them, or beside their folder."""
    places = (path.parent, path.parent.parent)
    return next((place / AUXILIARY_NAME for place in places if (place / AUXILIARY_NAME).is_file()), None)


def open_dalle(
    path: str | os.PathLike, checkpoint: dict[str, Any], vae: ImageTokenizer | None, taming: bool = False
) -> DALLE:
    """`load_dalle` of the content of a file."""
    weights = checkpoint["weights"]
    if all(key.startswith("module.") for key in weights):
        weights = strip_prefix(weights, "module.")
    # A VAE's own names can look like the prior's.
    own = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}
    arguments = _dalle_arguments(path, checkpoint["hparams"], own)
    image_tokens = arguments["num_image_tokens"]
    if vae is None and taming:
        vae = published_vqgan(path, image_tokens)
    elif vae is None:
        vae = _checkpoint_vae(path, checkpoint, weights, image_tokens)
    if vae.num_tokens != image_tokens:
        raise CheckpointError(f"{path}: expected a VAE of {image_tokens} image tokens, got {vae.num_tokens}")
    dalle = construct(path, DALLE, {**arguments, "vae": vae}, own)
    with opening(path, "is not a prior of DALLE-pytorch"):
        state = dalle.from_upstream(own)
    load_state(dalle, state, path)
    return dalle.eval()


def _checkpoint_vae(
    path: str | os.PathLike, checkpoint: dict[str, Any], weights: State, image_tokens: int
) -> ImageTokenizer:
    """The VAE of the prior's training: the checkpoint's if its weights are there, else the published one."""
    state = strip_prefix(weights, "vae.")
    if checkpoint.get("vae_params"):
        return build(path, DiscreteVAE, checkpoint["vae_params"], state)
    if "model.encoder.conv_in.weight" in state:
        return build_vqgan(path, strip_prefix(state, "model."))
    if "enc.blocks.input.w" in state:
        return build_openai_dvae(path, strip_prefix(state, "enc."), strip_prefix(state, "dec."))
    name = checkpoint.get("vae_class_name") or "OpenAIDiscreteVAE"
    if name == "OpenAIDiscreteVAE":
        return load_openai_dvae()
    if name == "VQGanVAE" and image_tokens in VQGANS:
        return published_vqgan(path, image_tokens)
    raise CheckpointError(f"{path} does not include its VAE, a {name} of {image_tokens} tokens; pass it as `vae`")


def published_vqgan(path: str | os.PathLike, image_tokens: int | None) -> VQGanVAE:
    """The one of taming's VQGANs with as many codes as the prior has image tokens."""
    if not isinstance(image_tokens, int) or image_tokens not in VQGANS:
        sizes = ", ".join(map(str, VQGANS))
        raise CheckpointError(f"{path} has {image_tokens} image tokens, taming's published VQGANs have {sizes}")
    return load_vqgan(*map(default_file, VQGANS[image_tokens]))


def _dalle_arguments(path: str | os.PathLike, hparams: dict[str, Any], weights: State) -> dict[str, Any]:
    """The constructor's arguments: inferred from the weights where possible, the rest as recorded."""
    arguments = {key: value for key, value in hparams.items() if key not in _DALLE_IGNORED}
    with opening(path, "is not a prior of DALLE-pytorch"):
        check_values(hparams)
        types = hparams.get("attn_types") or ()
        if "mlp" in ((types,) if isinstance(types, str) else types):
            raise CheckpointError(f"{path} has gMLP layers (attn_types mlp), which are not supported")
        text_seq_len = hparams.get("text_seq_len", 256)
        rotary_emb = "text_pos_emb.weight" not in weights
        share_emb = "text_emb.linear.weight" in weights
        reversible = any(".layers.blocks." in key for key in weights)
        feed_forwards = [key for key in weights if key.endswith("fn.net.0.weight")]
        if not feed_forwards:
            raise ValueError("no transformer layers")
        total_tokens, dim = weights["to_logits.1.weight"].shape
        inferred = {
            "dim": dim,
            "depth": count_parts(weights, r"transformer\.layers\.(?:layers|blocks)\.(\d+)\."),
            "rotary_emb": rotary_emb,
            "share_input_output_emb": share_emb,
            "reversible": reversible,
            "sandwich_norm": any(key.endswith("norm_out.weight") for key in weights),
            # Without token shift, layer scale and norm are the only wrappers of a feed-forward.
            "shift_tokens": feed_forwards[0].count("fn.") > 2,
        }
        if not rotary_emb:
            inferred["text_seq_len"] = text_seq_len = len(weights["text_pos_emb.weight"]) - 1
        if not share_emb:
            inferred["num_text_tokens"] = len(weights["text_emb.weight"]) - text_seq_len
        check_agreement(path, arguments, inferred)
        arguments |= inferred
        inner = next(value for key, value in weights.items() if key.endswith("to_qkv.weight")).shape[0] // 3
        heads, dim_head = hparams.get("heads", 8), hparams.get("dim_head", 64)
        if heads * dim_head != inner:
            raise CheckpointError(
                f"{path}: hparams have {heads} heads of {dim_head}, the weights {inner} channels in all"
            )
        image_tokens = total_tokens - text_seq_len - arguments.get("num_text_tokens", 10000)
        if rotary_emb:
            # One position per token; some releases omit the last.
            side = math.isqrt(weights["transformer.pos_emb"].shape[-2] - text_seq_len)
        else:
            side = next(w for key, w in weights.items() if re.match(r"image_pos_emb\.weights[._]0$", key)).shape[1]
    return {**arguments, "image_fmap_size": side, "num_image_tokens": image_tokens}
