"""guided-diffusion's checkpoints, its DALL-3 fork's among them, into our classes.

A file is a state dict with no word on its architecture, which guided-diffusion is told by command-line flags. Here the
weights tell what they can, and flags of the same names fill in the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.pretrained import load_state, read_config
from dalle_pytorch.published.unpickler import read_torch, tensor_dict
from diffusion.decoder import DiffusionDecoder
from diffusion.denoiser import Denoiser
from diffusion.schedule import Schedule
from diffusion.super_resolution import SuperResolution
from diffusion.unet import UNet

# guided-diffusion chooses the widths by the image size unless told.
CHANNEL_MULT = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
DEFAULT_IMAGE_SIZE = 64

# What weights do not tell, with guided-diffusion's own defaults.
NETWORK_DEFAULTS = {
    "num_heads": 4,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "dropout": 0.0,
}
DIFFUSION_DEFAULTS = {
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "sigma_small": False,
    "rescale_timesteps": False,
    "residual_std": None,  # of our own trainings alone
}
DIFFUSION_NAME = "diffusion.json"  # such settings beside a native U-Net
# Flags that change how a training or a GPU computes, and not what; they are taken and need nothing done.
WITHOUT_EFFECT = {"use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "small_size"}

# The flags of the DALL-3 fork's published models, by their size in pixels.
_DALL3_FLAGS = {
    "attention_resolutions": "32,16,8",
    "rescale_timesteps": True,
    "learn_sigma": True,
    "emb_condition": True,
}
MODEL_SIZES: dict[int, dict[str, Any]] = {
    64: {**_DALL3_FLAGS, "image_size": 64, "num_head_channels": 64, "use_new_attention_order": True,
         "noise_schedule": "cosine"},
    128: {**_DALL3_FLAGS, "image_size": 128, "num_heads": 4},
    256: {**_DALL3_FLAGS, "image_size": 256, "num_head_channels": 64},
}  # fmt: skip


def load_unet(path: str | os.PathLike, **flags: Any) -> UNet:
    """Opens a guided-diffusion `.pt` (plain, token-conditioned or super-resolution), float32, in evaluation mode.

    `flags` go by guided-diffusion's names, with values of their types or as on its command line ("True", "32,16,8").
    What the weights tell need not be given. (Their `image_size` they tell only as far as the widths are those of a
    published model; the network takes any.) A whole set of flags may be given: those of the diffusion are for
    `load_denoiser`. Raises `CheckpointError` for a file that is none, and for a flag that contradicts the weights.
    """
    state = tensor_dict(read_torch(path), path)
    settings = _settings(path, _read_architecture(path, state), _parse_flags(flags))
    try:
        with torch.device("meta"):
            unet = UNet(**settings)
    except ValueError as error:
        raise CheckpointError(f"{path} and the flags given do not go together: {error}") from error
    load_state(unet, state, source=path)
    return unet.eval()


def load_denoiser(path: str | os.PathLike, **flags: Any) -> Denoiser:
    """`load_unet`, or a native folder of a `UNet`, under the diffusion that the flags describe, respaced if
    `timestep_respacing` says so. A folder may say in a `diffusion.json` what the flags leave out.
    """
    if not Path(path).is_dir():
        return make_denoiser(load_unet(path, **flags), **flags)
    unet = UNet.from_pretrained(path)
    if told := sorted(set(_parse_flags(flags)) - DIFFUSION_DEFAULTS.keys()):
        raise CheckpointError(f"{path} is a native folder, which tells its {', '.join(told)} itself")
    return make_denoiser(unet, **{**read_diffusion(path), **flags})


def read_diffusion(folder: str | os.PathLike) -> dict[str, Any]:
    """How the U-Net in a native folder was trained, as far as a `diffusion.json` there says it."""
    return read_config(Path(folder), DIFFUSION_NAME) if (Path(folder) / DIFFUSION_NAME).exists() else {}


def make_denoiser(unet: UNet, **flags: Any) -> Denoiser:
    """A U-Net under the diffusion that the flags describe, in guided-diffusion's names and with its defaults.

    Flags that describe the network have no effect. Raises `ValueError` for an unknown or meaningless one.
    """
    flags = DIFFUSION_DEFAULTS | _parse_flags(flags)
    schedule = Schedule.named(flags["noise_schedule"], flags["diffusion_steps"])
    if flags["timestep_respacing"]:
        schedule = schedule.respaced(flags["timestep_respacing"])
    return Denoiser(
        unet,
        schedule,
        predict_xstart=flags["predict_xstart"],
        learn_sigma=unet.learn_sigma,
        sigma_small=flags["sigma_small"],
        rescale_timesteps=flags["rescale_timesteps"],
        residual_std=flags["residual_std"],
        gated=unet.gated,
    )


def load_decoder(path: str | os.PathLike, vae: nn.Module, **flags: Any) -> DiffusionDecoder:
    """`load_unet`, as the decoder of this VAE's tokens. Raises `CheckpointError` if the two do not fit."""
    unet = load_unet(path, **flags)
    names = DIFFUSION_DEFAULTS.keys() - {"timestep_respacing"}  # a matter of each run
    settings = {name: value for name, value in _parse_flags(flags).items() if name in names}
    try:
        return DiffusionDecoder(unet, vae, **settings).eval()
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit its VAE: {error}") from error


def load_super_resolution(path: str | os.PathLike, class_label: int | None = None, **flags: Any) -> SuperResolution:
    """Opens a super-resolution U-Net for `SuperResolution`: a guided-diffusion `.pt`, or a native folder of a `UNet`.

    What the weights do not tell are the flags of the diffusion and the number of heads: guided-diffusion's defaults,
    four heads among them, are those of its 64 → 256 model; its 128 → 512 model wants num_head_channels=64.
    """
    denoiser = load_denoiser(path, **flags)
    try:
        return SuperResolution(denoiser, class_label).eval()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


# --------------------------------------------------------------------------------------------------
# What the weights tell


# Every level but the finest ends in a block that also doubles the side, by a convolution or a second ResBlock.
_DOUBLING = re.compile(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.0)\.bias")


def _read_architecture(path: str | os.PathLike, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`UNet`'s settings as far as keys and shapes tell them, with levels in place of attention's sides."""
    try:
        num_channels = state["time_embed.0.weight"].shape[1]
        count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))
        doublings = [match[1] for key in state if (match := _DOUBLING.fullmatch(key))]
        levels = 1 + len(doublings)
        if count % levels or not all(f"output_blocks.{i}.0.in_layers.0.weight" in state for i in range(count)):
            raise KeyError("output_blocks")
        firsts = [f"input_blocks.{1 + level * (count // levels)}" for level in range(levels)]
        widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
        time_outputs = state[f"{firsts[0]}.0.emb_layers.1.weight"].shape[0]
        told = {
            "num_channels": num_channels,
            "num_res_blocks": count // levels - 1,
            "channel_mult": tuple(width / num_channels for width in widths),
            "attention_levels": tuple(i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
            "learn_sigma": state["out.2.weight"].shape[0] == 6,
            "class_cond": "label_emb.weight" in state,
            "use_scale_shift_norm": time_outputs == 2 * widths[0],
            "low_res_condition": state["input_blocks.0.0.weight"].shape[1] == 6,
            "emb_condition": "external_block.op.weight" in state,
        }
        if levels > 1:
            told["resblock_updown"] = "conv" not in doublings
        if told["emb_condition"]:
            told["emb_output_dims"], told["emb_input_dims"] = state["external_block.op.weight"].shape[:2]
    except (KeyError, IndexError, ValueError):
        raise CheckpointError(f"{path} holds no U-Net of guided-diffusion: its layers have other names") from None
    return told


def _settings(path: str | os.PathLike, told: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """`UNet`'s arguments from what the weights tell and the flags say."""
    mult, levels = told["channel_mult"], told.pop("attention_levels")
    by_widths = (size for size, widths in CHANNEL_MULT.items() if widths == mult)
    image_size = flags.pop("image_size", None) or next(by_widths, DEFAULT_IMAGE_SIZE)
    if "attention_resolutions" in flags:
        wanted = {image_size // side for side in flags.pop("attention_resolutions")}
        given = tuple(level for level in range(len(mult)) if 2**level in wanted)
        if given != levels:
            _contradiction(path, "attention_resolutions", _sides(image_size, given), _sides(image_size, levels))
    for name, value in told.items():
        # Widths of a token condition that is not there, which the fork's defaults include, are not compared.
        if name in flags and value != flags[name]:
            _contradiction(path, name, flags[name], value)
    network = {name: flags.get(name, default) for name, default in NETWORK_DEFAULTS.items()}
    rest = {name: flags[name] for name in ("resblock_updown", "emb_stride") if name in flags}
    attention = [image_size // 2**level for level in levels]
    return {"image_size": image_size, "attention_resolutions": attention, **network, **rest, **told}


def _sides(image_size: int, levels: tuple[int, ...]) -> str:
    return ",".join(str(image_size // 2**level) for level in levels) or "none"


def _contradiction(path: str | os.PathLike, name: str, given: Any, told: Any) -> None:
    raise CheckpointError(f"{name}={_shown(given)} was given, and the weights of {path} have {name}={_shown(told)}")


def _shown(value: Any) -> str:
    return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def _parse_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags in their own types, without those left empty. Raises `ValueError` for an unknown or meaningless one."""
    parsed = {}
    for name, value in flags.items():
        if name in WITHOUT_EFFECT or value is None or value == "":
            continue
        name = "image_size" if name == "large_size" else name
        if name not in _FLAG_TYPES:
            raise ValueError(f"the flag {name} is not one of guided-diffusion's: {', '.join(sorted(_FLAG_TYPES))}")
        try:
            parsed[name] = _FLAG_TYPES[name](value)
        except (TypeError, ValueError):
            raise ValueError(f"the flag {name}={value!r} makes no sense") from None
    return parsed


def _boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text in ("true", "yes", "1")


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in (value.split(",") if isinstance(value, str) else value))


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)


_FLAG_TYPES: dict[str, Callable[[Any], Any]] = {
    "image_size": int,
    "num_channels": int,
    "num_res_blocks": int,
    "num_heads": int,
    "num_head_channels": int,
    "num_heads_upsample": int,
    "emb_input_dims": int,
    "emb_output_dims": int,
    "emb_stride": int,
    "diffusion_steps": int,
    "class_cond": _boolean,
    "learn_sigma": _boolean,
    "use_scale_shift_norm": _boolean,
    "resblock_updown": _boolean,
    "emb_condition": _boolean,
    "use_new_attention_order": _boolean,
    "predict_xstart": _boolean,
    "sigma_small": _boolean,
    "rescale_timesteps": _boolean,
    "channel_mult": _floats,
    "attention_resolutions": _integers,
    "dropout": float,
    "residual_std": _optional_float,
    "noise_schedule": str,
    "timestep_respacing": str,
}
