"""Opens a published file of any kind."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.boundary import opens
from dalle_pytorch.files.downloads import CLIPS, DVAE_ENCODER, PRIORS, RESNET_CLIPS, default_model
from dalle_pytorch.pretrained import PretrainedModel, read_config, resolve_folder
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.priors.min_dalle import PYPI
from dalle_pytorch.published.clip import is_clip, load_clip, open_clip, open_trainable_clip, read_clip_file
from dalle_pytorch.published.clip_config import OPEN_CLIP_CONFIG
from dalle_pytorch.published.common import as_checkpoint, is_file
from dalle_pytorch.published.dalle import (
    AUXILIARY_NAME,
    find_auxiliary,
    is_published_dalle,
    load_dalle,
    open_dalle,
    open_native_prior,
    published_vqgan,
)
from dalle_pytorch.published.priors import find_published_prior, open_published_prior
from dalle_pytorch.published.unpickler import ForeignObject
from dalle_pytorch.published.vaes import load_openai_dvae, load_vqgan, open_discrete_vae, open_vqgan
from dalle_pytorch.vae.base import ImageTokenizer
from dalle_pytorch.vae.vqgan import VQGanVAE

PUBLISHED_CODES = 16384  # of the VQGAN of min-dalle and minDALL-E


class UnknownFormatError(CheckpointError):
    """A readable file of an unknown kind. `entries` are the names in it."""

    def __init__(self, message: str, entries: Collection[Any]):
        super().__init__(message)
        self.entries = entries


@opens
def open_published(
    path: str | os.PathLike, config_path: str | os.PathLike | None = None, vae: ImageTokenizer | None = None,
    clip_config: str | os.PathLike | None = None, **prior_options: Any,
) -> PretrainedModel:  # fmt: skip
    """Opens a prior, VAE or CLIP of any kind: a published file or folder, a native folder, or a hub name.

    A folder may be DeepSpeed's, with its `auxiliary.pt`; hold min-dalle's or minDALL-E's files, a dVAE's two, or a
    VQGAN's; or be Hugging Face's. `config_path` is a VQGAN's model.yaml; `vae` overrides the one that a prior names;
    `clip_config` is that of `load_clip`; `prior_options` are those of `load_prior` for min-dalle and minDALL-E.
    """
    path = Path(path)
    if is_named(path) or find_published_prior(path):
        return load_prior(path, vae, **prior_options)
    if not path.exists() and not is_file(path):
        known = str(path) in (*CLIPS, *RESNET_CLIPS)
        if known or not _is_native(resolve_folder(path, ["config.json", OPEN_CLIP_CONFIG])):
            return load_clip(path, clip_config)
        return PretrainedModel.from_pretrained(path, vae=vae)
    if path.is_dir():
        if (path / AUXILIARY_NAME).is_file():
            return load_dalle(path, vae)
        if (path / DVAE_ENCODER.name).is_file():
            return load_openai_dvae(path / DVAE_ENCODER.name)
        if (path / "last.ckpt").is_file():
            return load_vqgan(path / "last.ckpt", config_path)
        if not _is_native(path):
            return load_clip(path, clip_config)
        return PretrainedModel.from_pretrained(path, vae=vae)
    if path.name == AUXILIARY_NAME:
        return load_dalle(path, vae)
    content = read_clip_file(path)
    if isinstance(content, ForeignObject):
        halves = {"dall_e.encoder.Encoder": (path, None), "dall_e.decoder.Decoder": (None, path)}
        return (
            load_openai_dvae(*halves[content.name]) if content.name in halves else open_clip(path, content, clip_config)
        )
    keys = content.keys() if isinstance(content, dict) else ()
    if "hparams" in keys:
        checkpoint = as_checkpoint(path, content)
        if "to_visual_latent.weight" in checkpoint["weights"]:
            return open_trainable_clip(path, checkpoint)
        if "codebook.weight" in checkpoint["weights"]:
            return open_discrete_vae(path, checkpoint)
        return open_dalle(path, checkpoint, vae)
    if is_clip(content):
        return open_clip(path, content, clip_config)
    if "state_dict" in keys or "encoder.conv_in.weight" in keys:
        return open_vqgan(path, content, config_path)
    if keys and find_auxiliary(path) is not None:
        return load_dalle(path, vae)
    raise UnknownFormatError(f"{path} is not a prior, VAE or CLIP of a known format", keys)


def _is_native(folder: Path) -> bool:
    """Whether this is a native folder, and not one of Hugging Face's or open_clip's."""
    if (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / "config.json").exists():
        return False
    return "class" in read_config(folder)


def is_named(path: str | os.PathLike) -> bool:
    """Whether this is the name of a published prior, and not of a folder here."""
    return str(path) in PRIORS and not Path(path).exists()


@opens
def load_prior(
    path: str | os.PathLike, vae: ImageTokenizer | None = None, taming: bool = False, *,
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu", low_memory: bool = False, **flags: Any,
) -> Prior:  # fmt: skip
    """Opens a prior of any kind: a native folder, a hub name, DALLE-pytorch's files, a folder of min-dalle's or
    minDALL-E's, or "min-dalle", "min-dalle-mega" or "mindall-e", which are downloaded once.

    Args:
        vae, taming: see `load_dalle`.
        dtype: of the weights of min-dalle and minDALL-E: float16 on a GPU, float32 elsewhere by default. Other priors
            are float32.
        device: where it is opened.
        low_memory: see `open_published_prior`.
        flags: `heads` and `start_token`, see `open_published_prior`, as numbers or as text.

    Raises `CheckpointError`, one line that names the file, or `UsageError` for flags that the prior does not have.
    """
    flags = {name: _parse_flag(path, name, value) for name, value in flags.items() if value is not None}
    if is_named(path):
        path = default_model(PRIORS[str(path)])
    half = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    if find_published_prior(path):
        vae = published_vqgan(path, PUBLISHED_CODES) if vae is None and taming else vae
        return open_published_prior(path, vae, dtype or half, device, low_memory, **flags)
    if is_published_dalle(path):
        if flags:
            raise UsageError(f"{path} says all of its settings, and {' and '.join(sorted(flags))} cannot be set")
        return load_dalle(path, vae, taming).to(device)
    return open_native_prior(Prior, path, vae, taming, dtype or half, low_memory, **flags).to(device)


def _parse_flag(path: object, name: str, value: Any) -> int | str:
    if name not in ("heads", "start_token"):
        raise UsageError(f"{path}: the flags of a prior are heads and start_token, not {name}")
    if name == "start_token" and value == PYPI:
        return value
    if not str(value).isdecimal():
        raise UsageError(f"{path}: expected a whole number as {name}, got {str(value)[:40]!r}")
    return int(value)


@opens
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
        if vqgan_config_path is not None and (not isinstance(vae, VQGanVAE) or (Path(path) / "config.json").exists()):
            raise CheckpointError(
                f"{path} is not a checkpoint of a VQGAN: {vqgan_config_path} cannot be its model.yaml"
            )
        if not isinstance(vae, ImageTokenizer):
            raise CheckpointError(f"{path}: expected a VAE, got a {type(vae).__name__}")
        return vae
    if vqgan_path is not None or vqgan_config_path is not None:
        return load_vqgan(vqgan_path, vqgan_config_path)
    try:
        return load_vqgan() if taming else load_openai_dvae()
    except CheckpointError as error:
        raise CheckpointError(f"no VAE was given (--vae_path), and the published one is missing: {error}") from None
