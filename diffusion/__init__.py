"""Stage 2: image tokens to images by a diffusion decoder, optionally guided by CLIP."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dalle_pytorch.registry import MODEL_MODULES

MODEL_MODULES.update(UNet="diffusion.unet", DiffusionDecoder="diffusion.decoder")
_HOMES = {"UNet": "unet", "DiffusionDecoder": "decoder", "load_unet": "published"}
__all__ = ["DiffusionDecoder", "UNet", "load_unet"]

if TYPE_CHECKING:
    from diffusion.decoder import DiffusionDecoder
    from diffusion.published import load_unet
    from diffusion.unet import UNet


def __getattr__(name: str) -> Any:
    # On demand: a script that only prints its help should not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"diffusion.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
