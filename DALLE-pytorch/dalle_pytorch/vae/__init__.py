"""The autoencoders that turn pictures into tokens and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dalle_pytorch.vae.vqgan import VQGanVAE


def load_vqgan(path: str | os.PathLike | None = None, config_path: str | os.PathLike | None = None) -> VQGanVAE:
    """Opens a VQGAN, in evaluation mode on the CPU: a native folder, or taming's checkpoint with its `model.yaml`.

    Left out, both mean the published one. Raises `CheckpointError` with one line that says what is wrong.
    """
    from dalle_pytorch.vae.vqgan import VQGanVAE

    if path is not None and Path(path).is_dir():
        return VQGanVAE.from_pretrained(path)
    return VQGanVAE(path, config_path).eval()
