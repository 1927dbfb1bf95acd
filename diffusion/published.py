"""Loads guided-diffusion's checkpoints, those of its DALL-3 fork included.

A file is a state dict without its architecture, which guided-diffusion takes from command-line flags. Here it is read
from the weights where possible, and flags of the same names fill in the rest.
"""

import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from torch import Tensor

from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.nn.upstream import count_parts
from dalle_pytorch.pretrained import load_state, read_config, sized_by
from dalle_pytorch.published.unpickler import read_torch, tensor_dict
from dalle_pytorch.vae.base import ImageTokenizer
from diffusion.config import DiffusionConfig, UNetConfig
from diffusion.decoder import DiffusionDecoder
from diffusion.denoiser import Denoiser
from diffusion.super_resolution import SuperResolution
from diffusion.unet import UNet

# guided-diffusion's default widths by image size.
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
DEFAULT_IMAGE_SIZE = 64

_HEADS = ("num_heads", "num_head_channels", "use_new_attention_order")
DIFFUSION_NAME = "diffusion.json"  # a `DiffusionConfig` beside a native U-Net
# Flags of training and of the GPU, which do not change the result. They are accepted and ignored.
IGNORED_FLAGS = {"use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "small_size"}

# The flags of the models published by guided-diffusion and by its DALL-3 fork, by image size.
_PUBLISHED_FLAGS = {"attention_resolutions": "32,16,8", "rescale_timesteps": True, "learn_sigma": True}
MODEL_SIZES: dict[int, dict[str, Any]] = {
    64: {**_PUBLISHED_FLAGS, "image_size": 64, "num_head_channels": 64, "use_new_attention_order": True,
         "noise_schedule": "cosine"},
    128: {**_PUBLISHED_FLAGS, "image_size": 128, "num_heads": 4},
    256: {**_PUBLISHED_FLAGS, "image_size": 256, "num_head_channels": 64},
    512: {**_PUBLISHED_FLAGS, "image_size": 512, "num_head_channels": 64},
}  # fmt: skip
PUBLISHED_CHANNELS = {64: 192, 128: 256, 256: 256, 512: 256}  # num_channels of those that know no tokens


def load_unet(path: str | os.PathLike, **flags: Any) -> UNet:
    """Opens a guided-diffusion `.pt` (plain, token-conditioned or super-resolution), float32, in evaluation mode.

    `flags` have guided-diffusion's names, and values of their types or as on its command line ("True", "32,16,8").
    Flags that the weights imply may be left out. (`image_size` is implied only by the widths of a published model; the
    network takes any.) A whole set of flags may be given: those of the diffusion are for `load_denoiser`.
    Raises `CheckpointError` for a file that cannot be used and for flags that contradict the weights, `UsageError` for
    unknown flags and values.
    """
    flags = _parse_flags(flags)
    with opening(path):
        state = tensor_dict(read_torch(path), path)
        settings = _settings(path, _read_architecture(path, state), flags)
        with opening(path, "does not fit the flags"), sized_by(state):
            unet = UNet(**settings)
        load_state(unet, state, source=path)
        return unet.eval()


def load_denoiser(path: str | os.PathLike, **flags: Any) -> Denoiser:
    """A U-Net under the diffusion that the flags describe, respaced by `timestep_respacing`.

    `path` is a file as for `load_unet`, or a native folder, which may have a `diffusion.json` with defaults for flags.
    """
    unet, flags = _open(path, flags)
    return make_denoiser(unet, **flags)


def _open(path: str | os.PathLike, flags: Mapping[str, Any]) -> tuple[UNet, dict[str, Any]]:
    """The U-Net in a file or a native folder, and the flags with what the folder has for those not given."""
    if not Path(path).is_dir():
        unet = load_unet(path, **flags)
        return unet, _published_flags(unet.config) | _parse_flags(flags)
    if known := sorted(_parse_flags(flags).keys() - _DIFFUSION_FLAGS):
        raise UsageError(f"{path} is a native folder, whose config.json sets {', '.join(known)}")
    return UNet.from_pretrained(path), {**read_diffusion(path), **flags}


def read_diffusion(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of `diffusion.json` in the native folder of a U-Net; empty without that file."""
    path = Path(folder) / DIFFUSION_NAME
    if not path.exists():
        return {}
    with opening(path, "does not hold settings of a diffusion"):
        flags = diffusion_flags(read_config(path.parent, path.name))
        DiffusionConfig(**flags)
    return flags


def diffusion_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the flags that are settings of the diffusion, but for `timestep_respacing`, chosen for each run."""
    names = _DIFFUSION_FLAGS - {"timestep_respacing"}
    return {name: value for name, value in _parse_flags(flags).items() if name in names}


def make_denoiser(unet: UNet, **flags: Any) -> Denoiser:
    """A U-Net under the diffusion that the flags describe, in guided-diffusion's names and with its defaults.

    Flags of the network are ignored. Raises `UsageError` for unknown flags and values.
    """
    settings = {name: value for name, value in _parse_flags(flags).items() if name in _DIFFUSION_FLAGS}
    spacing = settings.pop("timestep_respacing", None)
    denoiser = Denoiser.from_config(unet, DiffusionConfig(**settings))
    return denoiser.respaced(spacing) if spacing else denoiser


def load_decoder(
    path: str | os.PathLike, vae: ImageTokenizer, class_label: int | None = None, **flags: Any
) -> DiffusionDecoder:
    """`load_denoiser`'s U-Net, as the decoder of this VAE's tokens, of an ImageNet class if it is conditioned on one.

    Raises `CheckpointError` if they do not fit.
    """
    unet, flags = _open(path, flags)
    with opening(path, "does not fit its VAE"):
        return DiffusionDecoder(unet, vae, class_label, **diffusion_flags(flags)).eval()


def load_super_resolution(path: str | os.PathLike, class_label: int | None = None, **flags: Any) -> SuperResolution:
    """Opens a super-resolution U-Net: a guided-diffusion `.pt`, or a native folder of a `UNet`.

    The defaults of the flags that the weights do not imply are guided-diffusion's. They fit its 64 → 256 model; its
    128 → 512 model needs num_head_channels=64.
    """
    denoiser = load_denoiser(path, **flags)
    with opening(path, "cannot be used"):
        return SuperResolution(denoiser, class_label).eval()


# Architecture from weights and flags


def _published_flags(known: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of guided-diffusion's model that is as wide as `known`, fields of `UNetConfig`, and knows no tokens."""
    if not (known["emb_condition"] or known["low_res_condition"]) and known["learn_sigma"]:
        for size, mult in CHANNEL_MULT.items():
            if (known["num_channels"], known["channel_mult"]) == (PUBLISHED_CHANNELS[size], mult):
                return _parse_flags(MODEL_SIZES[size])
    return {}


# Every level but the finest ends in a block that doubles the side, by a convolution or a second ResBlock.
_DOUBLING = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.bias")


def _read_architecture(path: str | os.PathLike, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`UNetConfig`'s fields that keys and shapes imply, with `attention_levels` in place of `attention_resolutions`."""
    with opening(path, "is not a guided-diffusion U-Net, or its layers have other names"):
        num_channels = state["time_embed.0.weight"].shape[1]
        count = count_parts(state, r"input_blocks\.(\d+)\.")
        doublings = [match[1] for key in state if (match := _DOUBLING.fullmatch(key))]
        levels = 1 + len(doublings)
        if count % levels or not all(f"output_blocks.{i}.0.in_layers.0.weight" in state for i in range(count)):
            raise KeyError("output_blocks")
        firsts = [f"input_blocks.{1 + level * (count // levels)}" for level in range(levels)]
        widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
        time_outputs = state[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0]
        known = {
            "num_channels": num_channels, "num_res_blocks": count // levels - 1,
            "channel_mult": tuple(width / num_channels for width in widths),
            "attention_levels": tuple(i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
            "learn_sigma": state["out.2.weight"].shape[0] == 6, "class_cond": "label_emb.weight" in state,
            "use_scale_shift_norm": time_outputs == 2 * widths[0],
            "low_res_condition": state["input_blocks.0.0.weight"].shape[1] == 6,
            "emb_condition": "external_block.op.weight" in state,
        }  # fmt: skip
        if levels > 1:
            known["resblock_updown"] = "conv" not in doublings
        if known["emb_condition"]:
            known["emb_output_dims"], known["emb_input_dims"] = state["external_block.op.weight"].shape[:2]
    return known


def _settings(path: str | os.PathLike, known: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """`UNetConfig`'s fields from what the weights imply and the flags say."""
    mult, levels = known["channel_mult"], known.pop("attention_levels")
    by_widths = (size for size, widths in CHANNEL_MULT.items() if widths == mult)
    image_size = flags.pop("image_size", None) or next(by_widths, DEFAULT_IMAGE_SIZE)
    if "attention_resolutions" in flags:
        factors = {image_size // side for side in flags.pop("attention_resolutions") if side > 0}
        flagged = tuple(level for level in range(len(mult)) if 2**level in factors)
        if flagged != levels:
            _contradiction(path, "attention_resolutions", _sides(image_size, flagged), _sides(image_size, levels))
    for name, value in known.items():
        # The fork's defaults include emb_input_dims and emb_output_dims without emb_condition; these are not compared.
        if name in flags and value != flags[name]:
            _contradiction(path, name, flags[name], value)
    others = _DIFFUSION_FLAGS | {"emb_input_dims", "emb_output_dims"}
    if not flags.keys() & {"num_heads", "num_head_channels"}:
        flags = {name: value for name, value in _published_flags(known).items() if name in _HEADS} | flags
    network = {name: value for name, value in flags.items() if name not in others}
    attention = [image_size // 2**level for level in levels]
    # The newer attention order is our default, the older one guided-diffusion's.
    return {"use_new_attention_order": False, "image_size": image_size, "attention_resolutions": attention, **network,
            **known}  # fmt: skip


def _sides(image_size: int, levels: tuple[int, ...]) -> str:
    return ",".join(str(image_size // 2**level) for level in levels) or "none"


def _contradiction(path: str | os.PathLike, name: str, flag: Any, known: Any) -> None:
    flag, known = (",".join(f"{x:g}" for x in v) if isinstance(v, tuple) else v for v in (flag, known))
    raise CheckpointError(f"the flag {name}={flag} contradicts the weights of {path}, which have {name}={known}")


def _parse_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags in their own types, without empty ones. Raises `UsageError` for unknown flags and values."""
    parsed = {}
    for name, value in flags.items():
        if name in IGNORED_FLAGS or value is None or value == "":
            continue
        name = "image_size" if name == "large_size" else name
        if name not in _FLAG_TYPES:
            raise UsageError(f"unknown flag {name}: expected one of {', '.join(sorted(_FLAG_TYPES))}")
        try:
            parsed[name] = _FLAG_TYPES[name](value)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"invalid value of the flag {name}: {reprlib.repr(value)}") from None
    return parsed


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text in ("true", "yes", "1")


def _listed(kind: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    return lambda value: tuple(kind(part) for part in (value.split(",") if isinstance(value, str) else value))


_KINDS = {bool: _boolean, Sequence[int]: _listed(int), Sequence[float]: _listed(float), float | None: float}
_FLAG_TYPES: dict[str, Callable[[Any], Any]] = {
    name: _KINDS.get(kind, kind)
    for config in (UNetConfig, DiffusionConfig)
    for name, kind in get_type_hints(config).items()
    if name not in ("low_res_condition", "patch_size", "gated")  # implied by the weights, or ours alone
} | {"timestep_respacing": str}
_DIFFUSION_FLAGS = {field.name for field in fields(DiffusionConfig)} | {"timestep_respacing"}
