"""Opens a published file of any kind."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.files.downloads import CLIPS, DVAE_ENCODER
from dalle_pytorch.pretrained import PretrainedModel, read_config, resolve_folder
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.published.clip import load_clip, open_clip, open_trainable_clip
from dalle_pytorch.published.common import TRAINING_STATE, as_checkpoint, is_file
from dalle_pytorch.published.dalle import (
    AUXILIARY_NAME,
    find_auxiliary,
    is_published_dalle,
    load_dalle,
    open_dalle,
    open_native_prior,
)
from dalle_pytorch.published.unpickler import ForeignObject, read_torch
from dalle_pytorch.published.vaes import load_openai_dvae, load_vqgan, open_discrete_vae, open_vqgan
from dalle_pytorch.vae.base import ImageTokenizer


class UnknownFormatError(CheckpointError):
    """A readable file of an unknown kind. `entries` are the names in it."""

    def __init__(self, message: str, entries: Collection[Any]):
        super().__init__(message)
        self.entries = entries


def open_published(
    path: str | os.PathLike, config_path: str | os.PathLike | None = None, vae: ImageTokenizer | None = None
) -> PretrainedModel:
    """Opens a prior, VAE or CLIP of any kind: a published file or folder, a native folder, or a hub name.

    A folder may be DeepSpeed's, with its `auxiliary.pt`; hold a dVAE's two files, or a VQGAN's; or be Hugging Face's.
    `config_path` is a VQGAN's model.yaml; `vae` overrides the one that a prior names.
    """
    path = Path(path)
    if not path.exists() and not is_file(path):
        if str(path) in CLIPS or "class" not in read_config(resolve_folder(path, ["config.json"])):
            return load_clip(path)
        return PretrainedModel.from_pretrained(path, vae=vae)
    if path.is_dir():
        if (path / AUXILIARY_NAME).is_file():
            return load_dalle(path, vae)
        if (path / DVAE_ENCODER.name).is_file():
            return load_openai_dvae(path / DVAE_ENCODER.name)
        if (path / "last.ckpt").is_file():
            return load_vqgan(path / "last.ckpt", config_path)
        if "class" not in read_config(path):
            return load_clip(path)
        return PretrainedModel.from_pretrained(path, vae=vae)
    if path.name == AUXILIARY_NAME:
        return load_dalle(path, vae)
    content = read_torch(path, TRAINING_STATE)
    if isinstance(content, ForeignObject):
        halves = {"dall_e.encoder.Encoder": (path, None), "dall_e.decoder.Decoder": (None, path)}
        return load_openai_dvae(*halves[content.name]) if content.name in halves else open_clip(path, content)
    keys = content.keys() if isinstance(content, dict) else ()
    if "hparams" in keys:
        checkpoint = as_checkpoint(path, content)
        if "to_visual_latent.weight" in checkpoint["weights"]:
            return open_trainable_clip(path, checkpoint)
        if "codebook.weight" in checkpoint["weights"]:
            return open_discrete_vae(path, checkpoint)
        return open_dalle(path, checkpoint, vae)
    if "token_embedding.weight" in keys:
        return open_clip(path, content)
    if "state_dict" in keys or "encoder.conv_in.weight" in keys:
        return open_vqgan(path, content, config_path)
    if keys and find_auxiliary(path) is not None:
        return load_dalle(path, vae)
    raise UnknownFormatError(f"{path} is not a prior, VAE or CLIP of a known format", keys)


def load_prior(path: str | os.PathLike, vae: ImageTokenizer | None = None, taming: bool = False) -> Prior:
    """Opens a prior of any kind: a native folder, a hub name, or DALLE-pytorch's files. See `load_dalle`."""
    if is_published_dalle(path):
        return load_dalle(path, vae, taming)
    return open_native_prior(Prior, path, vae, taming)


def load_vae(
    path: str | os.PathLike | None = None,
    *,
    vqgan_path: str | os.PathLike | None = None,
    vqgan_config_path: str | os.PathLike | None = None,
    taming: bool = False,
) -> ImageTokenizer:
    """The VAE that DALLE-pytorch's `--vae_path`, `--vqgan_model_path`, `--vqgan_config_path` and `--taming` name.

    `path` may be any: a native folder, DALLE-pytorch's `vae.pt`, a VQGAN's checkpoint, OpenAI's dVAE. Without a path it
    is a published one: taming's VQGAN with `taming`, else OpenAI's dVAE.
    """
    if path is not None:
        vae = open_published(path, vqgan_config_path)
        if not isinstance(vae, ImageTokenizer):
            raise CheckpointError(f"{path}: expected a VAE, got a {type(vae).__name__}")
        return vae
    if vqgan_path is not None or vqgan_config_path is not None:
        return load_vqgan(vqgan_path, vqgan_config_path)
    try:
        return load_vqgan() if taming else load_openai_dvae()
    except CheckpointError as error:
        raise CheckpointError(f"no VAE was given (--vae_path), and the published one is missing: {error}") from None
