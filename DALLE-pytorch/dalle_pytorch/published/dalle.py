"""DALLE-pytorch's priors, of releases 0.11 to 1.6 and of the DALL-3 fork, as one file or as DeepSpeed leaves them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.downloads import VQGANS, default_file
from dalle_pytorch.nn.upstream import State, below
from dalle_pytorch.pretrained import read_config, resolve_folder
from dalle_pytorch.priors.dalle import DALLE, from_upstream
from dalle_pytorch.published.common import TRAINING_STATE, agree, as_checkpoint, build, is_file
from dalle_pytorch.published.unpickler import read_torch
from dalle_pytorch.published.vaes import openai_dvae, vqgan
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.openai import OpenAIDiscreteVAE
from dalle_pytorch.vae.vqgan import VQGanVAE

AUXILIARY_NAME = "auxiliary.pt"  # what DALLE-pytorch writes beside DeepSpeed's weights
CONSOLIDATED_NAME = "pytorch_model.bin"  # what DeepSpeed's zero_to_fp32.py makes of them

# Recorded by some releases and without a meaning for the weights; 1.x took sparse_attn and ignored it.
_DALLE_IGNORED = {"vae", "sparse_attn", "optimize_for_inference"}


def load_dalle(path: str | os.PathLike, vae: nn.Module | None = None, taming: bool = False) -> DALLE:
    """Opens a prior, in evaluation mode on the CPU: a native folder; a `dalle.pt` of DALLE-pytorch or its DALL-3 fork;
    DeepSpeed's consolidated weights beside their `auxiliary.pt`, or the folder of the two.

    `vae` overrides the one that the checkpoint names; `taming` does so with the published VQGAN of as many codes.
    """
    if not is_file(path) and not (Path(path) / AUXILIARY_NAME).is_file():
        if vae is None and taming:
            vae = _published_vqgan(path, read_config(resolve_folder(path)).get("num_image_tokens"))
        return DALLE.from_pretrained(path, **({} if vae is None else {"vae": vae}))
    return open_dalle(path, _prior_checkpoint(Path(path)), vae, taming)


def _prior_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, put together from its parts if DeepSpeed wrote it."""
    if path.name == AUXILIARY_NAME:
        path = path.parent
    if path.is_dir():
        if not (path / CONSOLIDATED_NAME).is_file():
            raise CheckpointError(
                f"{path} has no {CONSOLIDATED_NAME}; run DeepSpeed's zero_to_fp32.py in it, which makes that"
            )
        path = path / CONSOLIDATED_NAME
    content = read_torch(path, TRAINING_STATE)
    auxiliary = find_auxiliary(path)
    if auxiliary is None or not isinstance(content, dict) or "hparams" in content:
        return as_checkpoint(path, content)
    # `module` is where DeepSpeed's own files have the weights.
    return as_checkpoint(path, {**_settings(auxiliary), "weights": content.get("module", content)})


def _settings(path: Path) -> dict[str, Any]:
    content = read_torch(path, TRAINING_STATE)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint of DALLE-pytorch: it holds a {type(content).__name__}")
    return content


def find_auxiliary(path: Path) -> Path | None:
    """The `auxiliary.pt` that belongs to DeepSpeed's weights: beside them, or beside their folder."""
    places = (path.parent, path.parent.parent)
    return next((place / AUXILIARY_NAME for place in places if (place / AUXILIARY_NAME).is_file()), None)


def open_dalle(
    path: str | os.PathLike, checkpoint: dict[str, Any], vae: nn.Module | None, taming: bool = False
) -> DALLE:
    """`load_dalle` of a checkpoint that has been read."""
    weights = checkpoint["weights"]
    if all(key.startswith("module.") for key in weights):
        weights = below(weights, "module.")
    # A VAE has names of its own that sound like the prior's.
    own = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}
    arguments = _dalle_arguments(path, checkpoint["hparams"], own)
    image_tokens = arguments["num_image_tokens"]
    if vae is None and taming:
        vae = _published_vqgan(path, image_tokens)
    elif vae is None:
        vae = _checkpoint_vae(path, checkpoint, weights, image_tokens)
    if vae.num_tokens != image_tokens:
        raise CheckpointError(f"{path}: {image_tokens} image tokens wanted, this VAE has {vae.num_tokens}")
    # Upstream draws the random blocks of `sparse` layers anew at each start, and does not save them.
    dalle = build(path, DALLE, {**arguments, "vae": vae}, from_upstream(own), computed="pattern.layout")
    _check_rotary(path, dalle, own)
    return dalle


def _check_rotary(path: str | os.PathLike, dalle: DALLE, weights: State) -> None:
    """Refuses a prior whose recorded angles are other than those that are computed here, as they are in 1.x."""
    if dalle.transformer.rotary is None:
        return
    # Each angle stands there twice, for the two channels that it turns.
    angles = weights["transformer.pos_emb"].float().flatten(0, -2)[:, ::2]
    length, pairs = angles.shape
    recorded = torch.stack((angles.cos(), angles.sin()), dim=-1)
    computed = dalle.transformer.rotary[:length, :pairs]
    if recorded.shape != computed.shape or (recorded - computed).abs().max() > 0.01:
        raise CheckpointError(f"{path} has rotary positions of a kind that is not supported")


def _checkpoint_vae(
    path: str | os.PathLike, checkpoint: dict[str, Any], weights: State, image_tokens: int
) -> nn.Module:
    """The VAE that was trained with: from the checkpoint itself if its weights are there, else the published one."""
    if checkpoint.get("vae_params"):
        return build(path, DiscreteVAE, checkpoint["vae_params"], below(weights, "vae."))
    if "vae.model.encoder.conv_in.weight" in weights:
        return build(path, VQGanVAE, *vqgan(path, below(weights, "vae.model.")))
    if "vae.enc.blocks.input.w" in weights:
        return build(
            path, OpenAIDiscreteVAE, *openai_dvae(path, below(weights, "vae.enc."), below(weights, "vae.dec."))
        )
    name = checkpoint.get("vae_class_name") or "OpenAIDiscreteVAE"
    if name == "OpenAIDiscreteVAE":
        return OpenAIDiscreteVAE()
    if name == "VQGanVAE" and image_tokens in VQGANS:
        return _published_vqgan(path, image_tokens)
    raise CheckpointError(
        f"{path} was trained with a {name} of {image_tokens} tokens, which is not in it; give that one"
    )


def _published_vqgan(path: str | os.PathLike, image_tokens: int | None) -> VQGanVAE:
    """The one of taming's VQGANs that has as many codes as a prior draws from."""
    if image_tokens not in VQGANS:
        sizes = ", ".join(map(str, VQGANS))
        raise CheckpointError(f"{path}: {image_tokens} image tokens wanted, taming's published VQGANs have {sizes}")
    return VQGanVAE(*map(default_file, VQGANS[image_tokens]))


def _dalle_arguments(path: str | os.PathLike, hparams: dict[str, Any], weights: State) -> dict[str, Any]:
    """The constructor's arguments: sizes and options from the weights where they tell, the rest as recorded."""
    types = hparams.get("attn_types") or ()
    if "mlp" in ((types,) if isinstance(types, str) else types):
        raise CheckpointError(f"{path} has gMLP layers (attn_types mlp), which are not supported")
    arguments = {key: value for key, value in hparams.items() if key not in _DALLE_IGNORED}
    try:
        text_seq_len = hparams.get("text_seq_len", 256)
        rotary_emb = "text_pos_emb.weight" not in weights
        share_emb = "text_emb.linear.weight" in weights
        reversible = any(".layers.blocks." in key for key in weights)
        feed_forwards = [key for key in weights if key.endswith("fn.net.0.weight")]
        if not feed_forwards:
            raise KeyError("layers")
        total_tokens, dim = weights["to_logits.1.weight"].shape
        told = {
            "dim": dim,
            "depth": 1 + max(int(re.search(r"\.(?:layers|blocks)\.(\d+)\.", key)[1]) for key in feed_forwards),
            "rotary_emb": rotary_emb,
            "share_input_output_emb": share_emb,
            "reversible": reversible,
            "sandwich_norm": any(key.endswith("norm_out.weight") for key in weights),
            # Without token shift the feed-forward stands in layer scale and norm alone.
            "shift_tokens": feed_forwards[0].count("fn.") > 2,
        }
        if not rotary_emb:
            told["text_seq_len"] = text_seq_len = len(weights["text_pos_emb.weight"]) - 1
        if not share_emb:
            told["num_text_tokens"] = len(weights["text_emb.weight"]) - text_seq_len
        agree(path, arguments, told)
        arguments |= told
        inner = next(value for key, value in weights.items() if key.endswith("to_qkv.weight")).shape[0] // 3
        heads, dim_head = hparams.get("heads", 8), hparams.get("dim_head", 64)
        if heads * dim_head != inner:
            raise CheckpointError(
                f"{path}: {heads} heads of {dim_head} are recorded, and the weights' add up to {inner}"
            )
        image_tokens = total_tokens - text_seq_len - arguments.get("num_text_tokens", 10000)
        if rotary_emb:
            # One position per token; some releases leave out the last.
            side = math.isqrt(weights["transformer.pos_emb"].shape[-2] - text_seq_len)
        else:
            side = next(w for key, w in weights.items() if re.match(r"image_pos_emb\.weights[._]0$", key)).shape[1]
    except (KeyError, StopIteration, TypeError) as error:
        missing = f" {error}" if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{path} is no prior of DALLE-pytorch: its weights lack{missing or ' layers'}") from None
    return {**arguments, "image_fmap_size": side, "num_image_tokens": image_tokens}
