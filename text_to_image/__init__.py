"""Text to image: the pipeline and the ways to run it.

Names are imported when they are first used, so that a command line can print its help without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from text_to_image.model import Model
    from text_to_image.pipeline import TextToImage
    from text_to_image.results import Result

_HOME = {"Model": "model", "Result": "results", "TextToImage": "pipeline"}
__all__ = ["Model", "Result", "TextToImage"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
