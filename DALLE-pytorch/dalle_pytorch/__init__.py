"""The prior of a two-stage text-to-image system, and what both its stages share.

Names are imported when they are first used, so that importing the package, as every command line does, costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "DALLE": "dalle",
    "CLIP": "clip",
    "PublishedCLIP": "clip_published",
    "DiscreteVAE": "vae.discrete",
    "VQGanVAE": "vae.vqgan",
    "OpenAIDiscreteVAE": "vae.openai",
    "load_dalle": "published",
    "load_clip": "published",
    "SimpleTokenizer": "tokenizers",
    "YttmTokenizer": "tokenizers",
    "HugTokenizer": "tokenizers",
    "ChineseTokenizer": "tokenizers",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from dalle_pytorch.clip import CLIP
    from dalle_pytorch.clip_published import PublishedCLIP
    from dalle_pytorch.dalle import DALLE
    from dalle_pytorch.published import load_clip, load_dalle
    from dalle_pytorch.tokenizers import ChineseTokenizer, HugTokenizer, SimpleTokenizer, YttmTokenizer
    from dalle_pytorch.vae.discrete import DiscreteVAE
    from dalle_pytorch.vae.openai import OpenAIDiscreteVAE
    from dalle_pytorch.vae.vqgan import VQGanVAE


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
