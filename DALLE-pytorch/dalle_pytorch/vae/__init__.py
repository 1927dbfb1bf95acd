"""The autoencoders that turn pictures into tokens and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_pytorch.checkpoints import CheckpointError

if TYPE_CHECKING:
    from dalle_pytorch.checkpoints import PretrainedModel
    from dalle_pytorch.vae.vqgan import VQGanVAE


def load_vqgan(path: str | os.PathLike | None = None, config_path: str | os.PathLike | None = None) -> VQGanVAE:
    """Opens a VQGAN, in evaluation mode on the CPU: a native folder, or taming's checkpoint with its `model.yaml`.

    Left out, both mean the published one. Raises `CheckpointError` with one line that says what is wrong.
    """
    from dalle_pytorch.vae.vqgan import VQGanVAE

    if path is not None and Path(path).is_dir():
        return VQGanVAE.from_pretrained(path)
    return VQGanVAE(path, config_path).eval()


def load_vae(
    path: str | os.PathLike | None = None,
    *,
    vqgan_path: str | os.PathLike | None = None,
    vqgan_config_path: str | os.PathLike | None = None,
    taming: bool = False,
) -> PretrainedModel:
    """The VAE that DALLE-pytorch's `--vae_path`, `--vqgan_model_path`, `--vqgan_config_path` and `--taming` name.

    `path` may be any: a native folder, DALLE-pytorch's `vae.pt`, a VQGAN's checkpoint, OpenAI's dVAE. Without a path it
    is a published one: taming's VQGAN with `taming`, else OpenAI's dVAE. Raises `CheckpointError` with one line.
    """
    if path is not None:
        from dalle_pytorch.published import open_published

        vae = open_published(path)
        if not hasattr(vae, "get_codebook_indices"):
            raise CheckpointError(f"{path} holds a {type(vae).__name__}, and a VAE is wanted")
        return vae
    if vqgan_path is not None:
        return load_vqgan(vqgan_path, vqgan_config_path)
    if vqgan_config_path is not None:
        raise CheckpointError(f"{vqgan_config_path} is given without the VQGAN's weights that go with it")
    try:
        if taming:
            return load_vqgan()
        from dalle_pytorch.vae.openai import OpenAIDiscreteVAE

        return OpenAIDiscreteVAE().eval()
    except CheckpointError as error:
        raise CheckpointError(f"no VAE is given (--vae_path), and the published one is not here: {error}") from None
