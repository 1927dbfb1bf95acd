"""Learns the byte-pair encoding of captions and writes it as a tokenizer.json."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, number, run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--image_text_folder", default="glyphs",
                        help="a folder with captions in .txt files, one a line; "
                             "'glyphs' takes the captions of the default model's scenes")  # fmt: skip
    parser.add_argument("--count", type=number(int, 1), default=20_000, help="how many captions of 'glyphs' to take")
    parser.add_argument("--vocab_size", type=number(int, 3), default=4096, help="the most tokens there may be")
    parser.add_argument("--output", default="tokenizer.json", help="the file to write")
    return parser.parse_args(argv)


def read_captions(source: str, count: int) -> Iterator[str]:
    """The first `count` captions of `glyphs`, or every line of the .txt files in a folder."""
    from dalle_pytorch.data import glyphs
    from dalle_pytorch.files import FileError

    if source == "glyphs":
        yield from (glyphs.make_scene(i).caption for i in range(count))
        return
    files = sorted(Path(source).rglob("*.txt"))
    if not files:
        raise FileError(f"{source} holds no captions (.txt files)")
    for file in files:
        try:
            yield from filter(None, map(str.strip, file.read_text("utf-8").splitlines()))
        except UnicodeDecodeError:
            raise FileError(f"{file} is not UTF-8 text") from None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from dalle_pytorch.checkpoints import write_text
    from dalle_pytorch.tokenizers import train_bpe

    captions = list(read_captions(arguments.image_text_folder, arguments.count))
    tokenizer = train_bpe(captions, arguments.vocab_size)
    write_text(arguments.output, tokenizer.to_str(pretty=True) + "\n")
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} tokens from {len(captions)} captions")


if __name__ == "__main__":
    run(main)
