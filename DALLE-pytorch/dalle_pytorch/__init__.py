"""The prior of a two-stage text-to-image system, and what both its stages share.

Names are imported when they are first used, so that importing the package, as every command line does, costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "DALLE": "priors.dalle", "CLIP": "clip.trainable", "PublishedCLIP": "clip.published",
    "DiscreteVAE": "published.vaes", "VQGanVAE": "published.vaes", "OpenAIDiscreteVAE": "published.vaes",
    "load_dalle": "published.dalle", "load_prior": "published.load", "load_clip": "published.clip",
    "SimpleTokenizer": "tokenizers.simple", "YttmTokenizer": "tokenizers.yttm", "HugTokenizer": "tokenizers.hug",
    "ChineseTokenizer": "tokenizers.chinese",
}  # fmt: skip
__all__ = ["CLIP", "DALLE", "ChineseTokenizer", "DiscreteVAE", "HugTokenizer", "OpenAIDiscreteVAE", "PublishedCLIP",
           "SimpleTokenizer", "VQGanVAE", "YttmTokenizer", "load_clip", "load_dalle", "load_prior"]  # fmt: skip

if TYPE_CHECKING:
    from dalle_pytorch.clip.published import PublishedCLIP
    from dalle_pytorch.clip.trainable import CLIP
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.published.clip import load_clip
    from dalle_pytorch.published.dalle import load_dalle
    from dalle_pytorch.published.load import load_prior
    from dalle_pytorch.published.vaes import DiscreteVAE, OpenAIDiscreteVAE, VQGanVAE
    from dalle_pytorch.tokenizers.chinese import ChineseTokenizer
    from dalle_pytorch.tokenizers.hug import HugTokenizer
    from dalle_pytorch.tokenizers.simple import SimpleTokenizer
    from dalle_pytorch.tokenizers.yttm import YttmTokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
