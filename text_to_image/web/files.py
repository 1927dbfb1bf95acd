"""Files that visitors give, and those that they get. The latter have names of our own: no text of theirs is in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import decode_image, save_image
from dalle_pytorch.files.tokens import load_tokens, save_tokens
from text_to_image.results import Result
from text_to_image.web.forms import Saved

SIDE = 512  # of a given picture, in pixels: no prior draws larger ones


@dataclass(frozen=True)
class Folders:
    """The private folders of a page: gradio's, of what is uploaded and served, and one for files being written."""

    served: Path
    written: Path

    @classmethod
    def inside(cls, folder: Path) -> Folders:
        """Makes them in a folder."""
        folders = cls(folder / "served", folder / "written")
        folders.served.mkdir()
        folders.written.mkdir()
        return folders

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder for files that gradio copies into its own, within the block, before it serves them."""
        with tempfile.TemporaryDirectory(dir=self.written) as folder:
            yield Path(folder)


def read_picture(path: str | Path) -> Image.Image:
    """The centre square of an image file, `SIDE` pixels wide. Raises `FileError`."""
    try:
        picture = decode_image(path, min_side=SIDE)
    except FileError as error:
        raise FileError(f"the picture cannot be used: {error}") from None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def read_tokens(path: str | Path, num_tokens: int, image_seq_len: int) -> Tensor:
    """The tokens of an image in an uploaded `.npy`, (image_seq_len,) int64 below `num_tokens`. Raises `FileError`."""
    try:
        return load_tokens(path, num_tokens, image_seq_len)
    except FileError as error:
        raise FileError(str(error).replace(str(path), "the file")) from None


def preview(picture: Image.Image, share: float) -> Image.Image:
    """A picture of which all below the upper `share` is faint: the rows that are drawn anew."""
    top = round(picture.height * share)
    below = (0, top, picture.width, picture.height)
    faint = Image.blend(picture.crop(below), Image.new("RGB", (picture.width, picture.height - top), "#808080"), 0.75)
    picture = picture.copy()
    picture.paste(faint, below)
    return picture


def write_files(folder: Path, picked: Result, diffused: Result | None, saved: Saved) -> Sequence[Path]:
    """Writes the PNG and the tokens of each image, the diffused ones too, and the settings; returns the paths."""
    paths = []
    after = {image.index: image.upscaled_pixels[0] for image in diffused or () if image.upscaled_pixels}
    for image in picked:
        name = f"candidate-{image.index}"
        save_image(folder / f"{name}.png", image.pixels)
        save_tokens(folder / f"{name}.npy", image.tokens)
        paths += [folder / f"{name}.png", folder / f"{name}.npy"]
        if image.index in after:
            save_image(folder / f"{name}-diffused.png", after[image.index])
            paths.append(folder / f"{name}-diffused.png")
    write_text(folder / "settings.json", saved.to_json())
    return [*paths, folder / "settings.json"]
