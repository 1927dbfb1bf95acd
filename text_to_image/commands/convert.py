"""The command `convert`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, name_value, option

VOCABULARY_SUFFIXES = (".model", ".json", ".txt", ".gz")


@dataclass
class ConvertSettings(Settings):
    """Opens a published file or folder, says what it is, its sizes and options, and writes it as a native folder.

    python convert.py dalle.pt                       says what it is
    python convert.py last.ckpt models/vqgan         writes the native folder too
    python convert.py encoder.pkl models/dvae        decoder.pkl is taken from beside it
    python convert.py min-dalle models/mini          downloads DALL·E mini; so do min-dalle-mega and mindall-e
    python convert.py bpe.model models/mine          writes tokenizer.json
    """

    title: ClassVar[str] = "models"
    file: str = option(help="a prior, VAE, CLIP, U-Net or tokenizer: a file, a folder of them, or a hub name",
                       positional=True)  # fmt: skip
    folder: Path | None = option(None, "the native folder to write", positional=True, nargs="?")
    vqgan_config_path: str | None = option(None, "a VQGAN's model.yaml, if it is not beside it", metavar="FILE")
    vae_path: str | None = option(None, "the VAE of a prior or a U-Net: a native folder or a published file",
                                  metavar="PATH")  # fmt: skip
    prior_flags: list = option([], "heads=16 for min-dalle and minDALL-E of unpublished sizes", kind=name_value,
                               nargs="+", metavar="NAME=VALUE")  # fmt: skip
    model_size: int | None = option(None, "which published settings a U-Net has", choices=(64, 128, 256, 512))
    unet_flags: list = option([], "guided-diffusion's flags for a U-Net, such as num_head_channels=64",
                              kind=name_value, nargs="+", metavar="NAME=VALUE")  # fmt: skip
    clip_config: str | None = option(None, "open_clip's architecture of a CLIP that does not tell it, such as "
                                           "ViT-H-14, or its JSON file", metavar="NAME|FILE")  # fmt: skip
    dtype: str = option("float32", "of the weights that are written", choices=("float32", "float16", "bfloat16"))

    def __post_init__(self) -> None:
        if self.folder is not None and (self.folder / "config.json").exists():
            raise UsageError(f"{self.folder} holds a model already; give a folder that is not there yet")


def main(argv: Sequence[str] | None = None) -> None:
    settings = ConvertSettings.parse(argv)

    import torch

    from dalle_pytorch.tokenizers.load import load_tokenizer
    from diffusion.published import MODEL_SIZES
    from text_to_image.conversion import describe, open_any, write_native, write_tokenizer

    path = Path(settings.file)
    if path.is_file() and path.suffix in VOCABULARY_SUFFIXES:
        tokenizer = load_tokenizer(path)
        print(f"{path}: {type(tokenizer).__name__}, {tokenizer.vocab_size:,} tokens")
        if settings.folder is not None:
            print(f"written to {write_tokenizer(tokenizer, path, settings.folder)}")
        return
    dtype = getattr(torch, settings.dtype)
    flags = {**(MODEL_SIZES[settings.model_size] if settings.model_size else {}), **dict(settings.unet_flags)}
    model = open_any(settings.file, settings.vqgan_config_path, settings.vae_path, flags, settings.clip_config,
                     dtype=dtype, **dict(settings.prior_flags))  # fmt: skip
    print(f"{settings.file}:", *describe(model, "  "), sep="\n")
    if settings.folder is not None:
        write_native(model, settings.folder, dtype, flags)
        print(f"written to {settings.folder}")
