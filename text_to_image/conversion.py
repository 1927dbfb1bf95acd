"""Published files into native folders: what `convert` does."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_pytorch.clip.published import PublishedCLIP
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.published.load import UnknownFormatError, load_vae, open_published
from dalle_pytorch.tokenizers.base import Tokenizer
from dalle_pytorch.tokenizers.hug import HugTokenizer
from dalle_pytorch.tokenizers.simple import SimpleTokenizer
from diffusion.decoder import DiffusionDecoder
from diffusion.published import DIFFUSION_NAME, diffusion_flags, load_decoder, load_unet
from diffusion.unet import UNet


def open_any(
    path: str,
    vqgan_config_path: str | None = None,
    vae_path: str | None = None,
    unet_flags: Mapping[str, Any] | None = None,
    clip_config: str | None = None,
    **prior_options: Any,
) -> PretrainedModel:
    """Whatever model the file, folder or hub name holds; a U-Net with its VAE is a `DiffusionDecoder`.

    `clip_config` is that of `load_clip`; `prior_options` are those of `load_prior` for min-dalle and minDALL-E.
    """
    vae = load_vae(vae_path, vqgan_config_path=vqgan_config_path) if vae_path else None
    try:
        model = open_published(path, vqgan_config_path, vae, clip_config, **prior_options)
        if clip_config is not None and not isinstance(model, PublishedCLIP):
            raise UsageError(f"--clip_config goes with a CLIP, and {path} is a {type(model).__name__}")
        return model
    except UnknownFormatError as error:
        if "time_embed.0.weight" not in error.entries:
            raise
    flags = unet_flags or {}
    return load_unet(path, **flags) if vae is None else load_decoder(path, vae, **flags)


def write_native(
    model: PretrainedModel, folder: Path, dtype: torch.dtype | None = None, unet_flags: Mapping[str, Any] | None = None
) -> None:
    """Writes a model of `open_any` as a native folder, with all that it needs to be opened again.

    The diffusion of a U-Net without its VAE is in `unet_flags` alone: its part of them is written too.
    """
    if isinstance(model, DiffusionDecoder):
        model.vae.save_pretrained(folder / "vae", dtype)
    elif isinstance(model, UNet) and (diffusion := diffusion_flags(unet_flags or {})):
        write_text(folder / DIFFUSION_NAME, json.dumps(diffusion) + "\n")
    model.save_pretrained(folder, dtype)


def describe(model: PretrainedModel, indent: str = "") -> Iterator[str]:
    """Lines that say what a model is."""
    tensors = model.own_state_dict().values()
    yield f"{indent}{type(model).__name__}, {sum(tensor.numel() for tensor in tensors):,} parameters"
    for name, value in model.config.items():
        if name != "vae":
            yield f"{indent}  {name}: {value}"
    if isinstance(model, (Prior, DiffusionDecoder)):
        yield f"{indent}  vae:"
        yield from describe(model.vae, indent + "    ")


def write_tokenizer(tokenizer: Tokenizer, source: Path, folder: Path) -> Path:
    """Writes the `tokenizer.json` of a native folder, and returns its path."""
    path = folder / "tokenizer.json"
    if isinstance(tokenizer, SimpleTokenizer):
        raise UsageError(f"{source} is CLIP's vocabulary, which is used as it is: --bpe_path {source}")
    if isinstance(tokenizer, HugTokenizer):
        write_text(path, source.read_text("utf-8"))
    else:
        tokenizer.save(path)
    return path
