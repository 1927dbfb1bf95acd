"""The one training loop, on accelerate: every network is trained by it.

Names are imported when they are first used: the commands read their arguments without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"train": "loop", "TrainingTask": "tasks.base", "TrainingSettings": "settings"}
__all__ = ["TrainingSettings", "TrainingTask", "train"]

if TYPE_CHECKING:
    from dalle_pytorch.training.loop import train
    from dalle_pytorch.training.settings import TrainingSettings
    from dalle_pytorch.training.tasks.base import TrainingTask


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
