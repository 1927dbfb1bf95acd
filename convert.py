"""Opens a published file or folder, says what it is, its sizes and options, and writes it as a native folder.

python convert.py dalle.pt                       says what it is
python convert.py last.ckpt models/vqgan         writes the native folder too
python convert.py encoder.pkl models/dvae        decoder.pkl is taken from beside it
python convert.py bpe.model models/mine          writes tokenizer.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_pytorch.cli import ArgumentParser, run, setting
from dalle_pytorch.errors import UsageError

if TYPE_CHECKING:
    from dalle_pytorch.pretrained import PretrainedModel

VOCABULARY_SUFFIXES = (".model", ".json", ".txt", ".gz")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="a prior, VAE, CLIP, U-Net or tokenizer: a file, a folder of them, or a hub name")
    parser.add_argument("folder", nargs="?", type=Path, help="the native folder to write")
    parser.add_argument("--vqgan_config_path", metavar="FILE", help="a VQGAN's model.yaml, if it is not beside it")
    parser.add_argument("--vae_path", metavar="PATH",
                        help="the VAE of a prior or a U-Net: a native folder or a published file")  # fmt: skip
    parser.add_argument("--model_size", type=int, choices=(64, 128, 256), help="which published settings a U-Net has")
    parser.add_argument("--unet_flags", nargs="+", type=setting, default=[], metavar="NAME=VALUE",
                        help="guided-diffusion's flags for a U-Net, such as num_head_channels=64")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                        help="of the weights that are written (default float32)")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.folder is not None and (arguments.folder / "config.json").exists():
        parser.error(f"{arguments.folder} holds a model already; give a folder that is not there yet")
    return arguments


def open_model(arguments: argparse.Namespace) -> PretrainedModel:
    """Whatever model the file is."""
    import diffusion.decoder  # noqa: F401  a native folder may hold its models
    from dalle_pytorch.published.load import UnknownFormatError, open_published

    config_path = arguments.vqgan_config_path
    vae = open_published(arguments.vae_path, config_path) if arguments.vae_path else None
    try:
        return open_published(arguments.file, config_path, vae)
    except UnknownFormatError as error:
        if "time_embed.0.weight" not in error.entries:
            raise
    from diffusion.published import MODEL_SIZES, load_decoder, load_unet

    flags = {**MODEL_SIZES.get(arguments.model_size, {}), **dict(arguments.unet_flags)}
    # With its VAE it is a decoder, whose folder upscale.py takes.
    return load_unet(arguments.file, **flags) if vae is None else load_decoder(arguments.file, vae, **flags)


def describe(model: PretrainedModel, indent: str = "") -> Iterator[str]:
    """Lines that say what a model is."""
    tensors = model.own_state_dict().values()
    yield f"{indent}{type(model).__name__}, {sum(tensor.numel() for tensor in tensors):,} parameters"
    for name, value in model.config.items():
        if name != "vae":
            yield f"{indent}  {name}: {value}"
    if getattr(model, "vae", None) is not None:
        yield f"{indent}  vae:"
        yield from describe(model.vae, indent + "    ")


def convert_tokenizer(path: Path, folder: Path | None) -> None:
    """Says how large a vocabulary is, and writes it as the `tokenizer.json` of a native folder."""
    from dalle_pytorch.files.atomic import write_text
    from dalle_pytorch.tokenizers.hug import HugTokenizer
    from dalle_pytorch.tokenizers.load import load_tokenizer
    from dalle_pytorch.tokenizers.yttm import YttmTokenizer

    tokenizer = load_tokenizer(path)
    print(f"{path}: {type(tokenizer).__name__}, {tokenizer.vocab_size:,} tokens")
    if folder is None:
        return
    if isinstance(tokenizer, YttmTokenizer):
        text = tokenizer.to_hugging_face().to_str(pretty=True)
    elif isinstance(tokenizer, HugTokenizer):
        text = path.read_text("utf-8")
    else:
        raise UsageError(f"{path} is CLIP's vocabulary, which is used as it is: --bpe_path {path}")
    write_text(folder / "tokenizer.json", text)
    print(f"written to {folder / 'tokenizer.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    path = Path(arguments.file)
    if path.is_file() and path.suffix in VOCABULARY_SUFFIXES:
        return convert_tokenizer(path, arguments.folder)
    import torch

    model = open_model(arguments)
    print(f"{arguments.file}:", *describe(model, "  "), sep="\n")
    if arguments.folder is not None:
        model.save_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
        print(f"written to {arguments.folder}")


if __name__ == "__main__":
    run(main)
