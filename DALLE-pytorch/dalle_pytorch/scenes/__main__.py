"""The command that draws scenes: `python -m dalle_pytorch.scenes FOLDER`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dalle_pytorch.cli import run
from dalle_pytorch.scenes import MIXTURES
from dalle_pytorch.settings import Settings, option


@dataclass
class DrawSettings(Settings):
    """Draws scenes into an image-text folder: name.png, caption in name.txt, facts in name.json."""

    folder: Path = option(help="where to", positional=True)
    count: int = option(1000, "how many scenes", low=1)
    start: int = option(0, "number of the first", low=0)
    split: str = option("train", choices=["train", "validation", "test"])
    of: str = option("glyphs", "glyphs; things in their own colours, recoloured, or made of a material; everything; or "
                               "everything with more of it painted", choices=MIXTURES)  # fmt: skip
    resolution: int = option(256, "side in pixels, a multiple of 16", low=16)


def main(argv: Sequence[str] | None = None) -> None:
    settings = DrawSettings.parse(argv, "python -m dalle_pytorch.scenes")
    from tqdm import tqdm

    from dalle_pytorch.scenes import write_folder

    with tqdm(total=settings.count, unit="scene", dynamic_ncols=True) as bar:
        write_folder(settings.folder, settings.count, settings.split, settings.resolution, settings.start,
                     settings.of, progress=lambda done: bar.update(done - bar.n))  # fmt: skip


if __name__ == "__main__":
    run(main)
