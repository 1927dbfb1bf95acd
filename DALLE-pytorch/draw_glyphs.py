"""Draws scenes of the glyphs world into an image-text folder: name.png, caption in name.txt, facts in name.json."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dalle_pytorch.cli import ArgumentParser, number, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=number(int, 1), default=1000, help="how many scenes")
    parser.add_argument("--start", type=number(int, 0), default=0, help="number of the first")
    parser.add_argument("--split", choices=["train", "validation", "test"], default="train")
    parser.add_argument("--resolution", type=number(int, 16), default=256, help="side in pixels, a multiple of 16")
    arguments = parser.parse_args(argv)

    from tqdm import tqdm

    from dalle_pytorch import scenes as glyphs

    with tqdm(total=arguments.count, unit="scene", dynamic_ncols=True) as bar:
        glyphs.write_folder(
            arguments.folder, arguments.count, arguments.split, arguments.resolution, arguments.start,
            progress=lambda _: bar.update(),
        )  # fmt: skip


if __name__ == "__main__":
    run(main)
