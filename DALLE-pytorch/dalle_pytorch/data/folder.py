"""A folder of pictures, each with its captions in a text file of the same stem."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dalle_pytorch.data.loading import BrokenSample, describe_skipped
from dalle_pytorch.data.samples import CaptionProblem, pick_caption, picture_formats, read_captions, read_picture
from dalle_pytorch.errors import FileError


class ImageTextFolder(Dataset):
    """Pictures in a folder, nested or not, each with its captions in a `.txt` of the same stem, one a line.

    The text is beside its picture, or anywhere in the folder if its stem occurs once among texts and pictures. Items
    are dicts of `image` (3, resolution, resolution) uint8 and `caption`.

    Args:
        folder: any format that Pillow reads counts, hidden files do not.
        resolution: side of the squares, in pixels.
        captions: False takes pictures without texts too; items have no caption then.
        crop_ratio: the least share of the centre square that a random crop keeps; 1 keeps all of it.
        transparent: pictures have a fourth channel, the opacity, and are not laid over white.
        caption_problem: gives the reason to skip a sample for its caption, or None.

    Attributes:
        left_out: what has no partner, by reason.

    Raises `FileError` if there is nothing to learn from, or over half of the pictures have no text.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        resolution: int,
        *,
        captions: bool = True,
        crop_ratio: float = 1.0,
        transparent: bool = False,
        caption_problem: CaptionProblem | None = None,
    ):
        self.folder, self.resolution, self.captions = Path(folder), resolution, captions
        self.crop_ratio, self.transparent, self.caption_problem = crop_ratio, transparent, caption_problem
        self.left_out: Counter[str] = Counter()
        pictures, texts = _list_files(folder)
        self.pictures, self.texts = (pictures, []) if not captions else self._pair(pictures, texts)
        if not self.pictures:
            wanted = "pictures with captions (name.png beside name.txt)" if captions else "pictures"
            raise FileError(f"{folder} holds no {wanted}; archives (.tar) are read with --wds jpg,txt")
        if self.left_out["picture without caption"] > len(self.pictures):
            raise FileError(
                f"over half of the {len(pictures)} pictures in {folder} have no caption beside them "
                f"({describe_skipped(self.left_out)})"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index)

    def sample(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The item at `index`, its crop and its caption drawn from `generator` (without one: centre, first caption).

        Raises `BrokenSample` for a picture that cannot be read or a caption that cannot be used.
        """
        item = {}
        if self.captions:
            # First, since it costs less to find that it is of no use.
            name = self.texts[index]
            item["caption"] = pick_caption(self.all_captions(index), name, generator, self.caption_problem)
        return {"image": self.picture(index, generator), **item}

    def picture(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """The picture at `index`, as `read_picture` gives it."""
        path = self.folder / self.pictures[index]
        return read_picture(path, path, self.resolution, self.crop_ratio, generator, self.transparent)

    def all_captions(self, index: int) -> list[str]:
        """All captions of the picture at `index`. Raises `BrokenSample` if there is none."""
        path = self.folder / self.texts[index]
        try:
            return read_captions(path.read_bytes(), path)
        except OSError as error:
            raise BrokenSample("caption that cannot be read", path, error.strerror) from None

    def identity(self) -> Iterator[str]:
        """What tells these data from others: settings, names and sizes of the files."""
        yield f"folder {self.resolution} {self.transparent}"
        for name in [*self.pictures, *self.texts]:
            yield f"{name} {os.path.getsize(self.folder / name)}"

    def _pair(self, pictures: list[str], texts: list[str]) -> tuple[list[str], list[str]]:
        beside = {os.path.splitext(text)[0]: text for text in texts}
        text_stems, picture_stems = (_by_stem(names) for names in (texts, pictures))
        pairs = []
        for picture in pictures:
            name = os.path.splitext(picture)[0]
            stem = os.path.basename(name)
            text = beside.get(name)
            if text is None and picture_stems[stem] is not None:
                text = text_stems.get(stem)
            if text is not None:
                pairs.append((picture, text))
        self.left_out["picture without caption"] = len(pictures) - len(pairs)
        self.left_out["caption without picture"] = len(texts) - len({text for _, text in pairs})
        self.left_out = +self.left_out
        return [picture for picture, _ in pairs], [text for _, text in pairs]


def _list_files(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Pictures and texts below `folder`, sorted, as paths from there."""
    pictures, texts = [], []
    suffixes = picture_formats()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith(".") or not (suffix == ".txt" or suffix in suffixes):
                continue
            (texts if suffix == ".txt" else pictures).append(os.path.normpath(os.path.join(below, name)))
    return sorted(pictures), sorted(texts)


def _by_stem(names: list[str]) -> dict[str, str | None]:
    """Names by stem; None for a stem that several have."""
    stems: dict[str, str | None] = {}
    for name in names:
        stem = os.path.splitext(os.path.basename(name))[0]
        stems[stem] = None if stem in stems else name
    return stems
