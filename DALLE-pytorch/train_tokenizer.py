"""Learns the byte-pair encoding of captions and writes it as a tokenizer.json.

python DALLE-pytorch/train_tokenizer.py --image_text_folder pictures --output tokenizer.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dalle_pytorch.cli import ArgumentParser, HelpFormatter, number, run


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of options (`vocab_size: 8192`)")
    parser.add_argument("--image_text_folder", default="glyphs",
                        help="where the captions are: a folder with .txt files, one a line; a text file of them; with "
                             "--wds, WebDataset shards; 'glyphs', the scenes of the default model")  # fmt: skip
    parser.add_argument("--wds", default="", metavar="IMAGE,TEXT",
                        help="read shards, with pictures and captions under these endings, as in jpg,txt")  # fmt: skip
    parser.add_argument("--caption_key", default="caption", help="the field of the caption, with --wds jpg,json")
    parser.add_argument("--count", type=number(int, 1), help="take so many captions at most (of 'glyphs' 20000)")
    parser.add_argument("--vocab_size", type=number(int, 3), default=4096, help="the most tokens there may be")
    parser.add_argument("--output", default="tokenizer.json", help="the file to write")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from dalle_pytorch.data.captions import all_captions
    from dalle_pytorch.data.loading import Skipped, describe_skipped
    from dalle_pytorch.errors import FileError
    from dalle_pytorch.files.atomic import write_text
    from dalle_pytorch.tokenizers.hug import train_bpe

    skipped, taken = Skipped(), 0

    def captions():
        nonlocal taken
        for caption in all_captions(arguments.image_text_folder, skipped, wds=arguments.wds,
                                    caption_key=arguments.caption_key, count=arguments.count):  # fmt: skip
            taken += 1
            yield caption

    tokenizer = train_bpe(captions(), arguments.vocab_size)
    if not taken:
        raise FileError(f"{arguments.image_text_folder} holds no captions")
    write_text(arguments.output, tokenizer.to_str(pretty=True) + "\n")
    if skipped.reasons:
        print(f"skipped {describe_skipped(skipped.reasons)}", file=sys.stderr)
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} tokens from {taken} captions")


if __name__ == "__main__":
    run(main)
