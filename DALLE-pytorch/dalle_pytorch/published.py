"""Published formats of the prior, its VAE and the trainable CLIP into our classes, all by renaming tensors.

Files are read with `torch.load(weights_only=True)`: nothing in them is run.
"""

from __future__ import annotations

import inspect
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_pytorch.checkpoints import CheckpointError, load_state
from dalle_pytorch.clip import CLIP
from dalle_pytorch.dalle import DALLE
from dalle_pytorch.vae.discrete import DiscreteVAE

# --------------------------------------------------------------------------------------------------
# Names

_TRANSFORMER_NAMES = (
    # A wrapper per option (layer scale, norm, cache, token shift): how many depends on release and options.
    (r"transformer\.layers\.layers\.(\d+)\.0\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.layers\.(\d+)\.1\.", r"transformer.layers.\1.ff."),
    (r"transformer\.layers\.blocks\.(\d+)\.f\.net\.", r"transformer.layers.\1.attn."),
    (r"transformer\.layers\.blocks\.(\d+)\.g\.net\.", r"transformer.layers.\1.ff."),
    (r"\.(fn\.)+(norm|norm_out)\.", r".\2."),
    (r"\.(fn\.)+to_qkv\.", r".fn.to_qkv."),
    (r"\.(fn\.)+to_out\.0\.", r".fn.to_out."),
    (r"\.(fn\.)+net\.0\.", r".fn.proj_in."),
    (r"\.(fn\.)+net\.3\.", r".fn.proj_out."),
)
_DALLE_NAMES = (
    *_TRANSFORMER_NAMES,
    (r"^to_logits\.0\.", "norm."),
    (r"^to_logits\.1\.", "to_logits."),
    (r"^image_pos_emb\.weights[._]0$", "image_pos_emb.rows"),
    (r"^image_pos_emb\.weights[._]1$", "image_pos_emb.columns"),
)
_CLIP_NAMES = (
    *_TRANSFORMER_NAMES,
    (r"^to_visual_embedding\.", "patch_emb."),
    (r"^visual_pos_emb\.", "patch_pos_emb."),
)
# Tables that are computed here, and second names of the output layer under share_input_output_emb.
_DALLE_DROPPED = re.compile(r"vae\.|logits_mask$|transformer\.pos_emb$|(text|image)_emb\.linear\.|.*\.static_mask$")
# Recorded by some releases and without a meaning for the weights; 1.x took sparse_attn and ignored it.
_DALLE_IGNORED = {"vae", "sparse_attn", "optimize_for_inference"}


def _rename(state: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


# --------------------------------------------------------------------------------------------------
# Opening


def load_dalle(path: str | os.PathLike, vae: nn.Module | None = None) -> DALLE:
    """Opens a prior, in evaluation mode on the CPU: a native folder, or a `dalle.pt` of DALLE-pytorch or a fork of it.

    `vae` overrides the one that the checkpoint names. Raises `CheckpointError` with one line that says what is wrong.
    """
    if not _is_file(path):
        return DALLE.from_pretrained(path, **({} if vae is None else {"vae": vae}))
    checkpoint = _read_checkpoint(path, "hparams", "weights")
    weights = checkpoint["weights"]
    arguments = _dalle_arguments(path, checkpoint["hparams"], weights)
    if vae is None:
        vae = _checkpoint_vae(path, checkpoint)
    image_tokens = arguments["num_image_tokens"]
    if vae.num_tokens != image_tokens:
        raise CheckpointError(f"{path}: {image_tokens} image tokens wanted, this VAE has {vae.num_tokens}")
    model = _build(path, DALLE, {**arguments, "vae": vae})
    state = _rename({key: value for key, value in weights.items() if not _DALLE_DROPPED.match(key)}, _DALLE_NAMES)
    for key in ("image_pos_emb.rows", "image_pos_emb.columns"):
        if key in state:
            state[key] = state[key].squeeze(0)
    load_state(model, state, source=path)
    return model.eval()


def load_discrete_vae(path: str | os.PathLike) -> DiscreteVAE:
    """Opens a DiscreteVAE, in evaluation mode on the CPU: a native folder or a `vae.pt` of DALLE-pytorch."""
    if not _is_file(path):
        return DiscreteVAE.from_pretrained(path)
    checkpoint = _read_checkpoint(path, "hparams", "weights")
    return _discrete_vae(path, checkpoint["hparams"], checkpoint["weights"])


def load_trainable_clip(path: str | os.PathLike) -> CLIP:
    """Opens a trainable CLIP, in evaluation mode on the CPU: a native folder or weights with their `hparams`."""
    if not _is_file(path):
        return CLIP.from_pretrained(path)
    checkpoint = _read_checkpoint(path, "hparams", "weights")
    model = _build(path, CLIP, checkpoint["hparams"])
    load_state(model, _rename(checkpoint["weights"], _CLIP_NAMES), source=path)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Parts


def _is_file(path: str | os.PathLike) -> bool:
    """Whether this means a single file, present or not, and no folder or hub name."""
    return Path(path).is_file() or Path(path).suffix in (".pt", ".pth")


def _read_checkpoint(path: str | os.PathLike, *wanted: str) -> dict[str, Any]:
    """A `torch.save` dictionary that has the dictionaries `wanted`."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"the weights file {path} is missing") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is damaged or holds more than tensors and settings, and is not opened") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged or no PyTorch file: {reason}") from None
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(key), dict) for key in wanted):
        raise CheckpointError(f"{path} is no checkpoint of DALLE-pytorch: it lacks {' or '.join(wanted)}")
    return checkpoint


def _build(path: str | os.PathLike, model_class: type[nn.Module], arguments: dict[str, Any]) -> Any:
    known = inspect.signature(model_class.__init__).parameters
    if unknown := sorted(set(arguments) - set(known)):
        raise CheckpointError(f"{path} has settings that {model_class.__name__} does not know: {', '.join(unknown)}")
    try:
        return model_class(**arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a {model_class.__name__}: {error}") from error


def _discrete_vae(path: str | os.PathLike, hparams: dict[str, Any], weights: dict[str, Tensor]) -> DiscreteVAE:
    model = _build(path, DiscreteVAE, hparams)
    load_state(model, weights, source=path)
    return model.eval()


def _checkpoint_vae(path: str | os.PathLike, checkpoint: dict[str, Any]) -> nn.Module:
    name = checkpoint.get("vae_class_name") or ("DiscreteVAE" if checkpoint.get("vae_params") else "a published VAE")
    if name != "DiscreteVAE" or not checkpoint.get("vae_params"):
        raise CheckpointError(f"{path} was trained with {name}, which is not in it; give that one with vae=")
    weights = {key[4:]: value for key, value in checkpoint["weights"].items() if key.startswith("vae.")}
    return _discrete_vae(path, checkpoint["vae_params"], weights)


def _dalle_arguments(path: str | os.PathLike, hparams: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor's arguments: sizes and options from the weights where they tell, the rest as recorded."""
    if "mlp" in (hparams.get("attn_types") or ()):
        raise CheckpointError(f"{path} has gMLP layers (attn_types mlp), which are not supported")
    arguments = {key: value for key, value in hparams.items() if key not in _DALLE_IGNORED}
    try:
        text_seq_len = hparams.get("text_seq_len", 256)
        arguments["rotary_emb"] = "text_pos_emb.weight" not in weights
        arguments["share_input_output_emb"] = "text_emb.linear.weight" in weights
        arguments["reversible"] = any(".layers.blocks." in key for key in weights)
        arguments["sandwich_norm"] = any(key.endswith("norm_out.weight") for key in weights)
        # Without token shift the feed-forward stands in layer scale and norm alone.
        feed_forward = next(key for key in weights if key.endswith("fn.net.0.weight"))
        arguments["shift_tokens"] = feed_forward.count("fn.") > 2
        total_tokens = len(weights["to_logits.1.weight"])
        arguments["num_image_tokens"] = total_tokens - text_seq_len - hparams.get("num_text_tokens", 10000)
        if arguments["rotary_emb"]:
            # One position per token; some releases leave out the last.
            positions = weights["transformer.pos_emb"].shape[-2] - text_seq_len
            arguments["image_fmap_size"] = math.isqrt(positions)
        else:
            rows = next(key for key in weights if re.match(r"image_pos_emb\.weights[._]0$", key))
            arguments["image_fmap_size"] = weights[rows].shape[1]
    except (KeyError, StopIteration) as error:
        missing = f" {error}" if isinstance(error, KeyError) else ""
        raise CheckpointError(f"{path} is no prior of DALLE-pytorch: its weights lack{missing or ' layers'}") from None
    return arguments
