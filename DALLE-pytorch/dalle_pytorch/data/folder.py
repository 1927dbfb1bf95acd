"""A folder of images, each with its captions in a text file of the same stem, or in the folder's metadata file."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dalle_pytorch.data.loading import BrokenSample, SampleDataset, describe_skipped
from dalle_pytorch.data.samples import CaptionProblem, load_image, pick_caption, read_captions, usable_captions
from dalle_pytorch.errors import FileError, shorten
from dalle_pytorch.files.images import FORMATS
from dalle_pytorch.files.text import read_text

CAPTION_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")


class ImageTextFolder(SampleDataset):
    """Images in a folder, nested or not, each with its captions in a `.txt` or `.caption` of the same stem, one a line.

    The text is beside its image, or in a file of the folder as Hugging Face has them (`metadata.jsonl`,
    `metadata.csv`), or anywhere in the folder if its stem occurs once among texts and images. Samples are dicts of
    `image` (3, resolution, resolution) uint8 and `caption`.

    Args:
        folder: of files in the formats of `dalle_pytorch.files.images`; hidden ones are ignored.
        resolution: side of the squares, in pixels.
        captions: False includes images without texts; samples then have no caption.
        caption_key: the field of captions in a metadata file; `text` and `caption` are found without it.
        crop_ratio: the least share of the centre square that a random crop keeps; 1 keeps all of it.
        transparent: images have a fourth channel, the opacity, and are not composited over white.
        caption_problem: returns the reason to skip a caption, or None.

    `left_out` counts images and texts without a partner. Raises `FileError` if there is no sample, or if over half of
    the images have no text.
    """

    def __init__(self, folder: str | os.PathLike, resolution: int, *, captions: bool = True,
                 caption_key: str = "caption", crop_ratio: float = 1.0, transparent: bool = False,
                 caption_problem: CaptionProblem | None = None):  # fmt: skip
        self.folder, self.resolution, self.captions = Path(folder), resolution, captions
        self.crop_ratio, self.transparent, self.caption_problem = crop_ratio, transparent, caption_problem
        self.left_out: Counter[str] = Counter()
        images, texts, others = list_files(folder)
        self.metadata: dict[str, list[str]] = {}
        self.images, self.texts = self._pair(images, texts, caption_key) if captions else (images, [])
        if not self.images:
            kind = "images with captions (name.png beside name.txt, or a metadata.jsonl)" if captions else "images"
            found = ", ".join(f"{count} × {suffix}" for suffix, count in others.most_common(5))
            raise FileError(f"{folder} holds no {kind}; archives (.tar) are read with --wds jpg,txt"
                            + (f"; there are {found}" if found else ""))  # fmt: skip
        if self.left_out["image without caption"] > len(self.images):
            raise FileError(
                f"over half of the {len(images)} images in {folder} have no caption beside them "
                f"({describe_skipped(self.left_out)})"
            )

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The sample at `index`, its crop and caption drawn from `generator` (without one: centre, first caption).

        Raises `BrokenSample` for an image that cannot be read or a caption that cannot be used.
        """
        item = {}
        if self.captions:
            # Before the image, because it costs less to find it unusable.
            name = self.texts[index]
            item["caption"] = pick_caption(self.all_captions(index), name, generator, self.caption_problem)
        return {"image": self.image(index, generator), **item}

    def image(self, index: int, generator: np.random.Generator | None = None) -> Tensor:
        """The image at `index`, as `load_image` returns it."""
        path = self.folder / self.images[index]
        return load_image(path, path, self.resolution, self.crop_ratio, generator, self.transparent)

    def all_captions(self, index: int) -> list[str]:
        """All captions of the image at `index`. Raises `BrokenSample` if there is none."""
        path = self.folder / self.texts[index]
        if path.name in METADATA_NAMES:
            return usable_captions(self.metadata[self.images[index]], f"{path}: {self.images[index]}")
        try:
            return read_captions(path.read_bytes(), path)
        except OSError as error:
            raise BrokenSample("caption that cannot be read", path, error.strerror) from None

    def identity(self) -> Iterator[str | Path]:
        """What identifies the data: settings, names and files."""
        yield f"folder {self.resolution} {self.transparent}"
        for name in dict.fromkeys([*self.images, *self.texts]):
            yield name
            yield self.folder / name

    def _pair(self, images: list[str], texts: list[str], caption_key: str) -> tuple[list[str], list[str]]:
        in_metadata: dict[str, str] = {}
        for text in [text for text in texts if os.path.basename(text) in METADATA_NAMES]:
            texts.remove(text)
            place = os.path.dirname(text)
            for name, captions in read_metadata(self.folder / text, caption_key):
                image = os.path.normpath(os.path.join(place, name))
                self.metadata.setdefault(image, []).extend(captions)
                in_metadata[image] = text
        beside = {os.path.splitext(text)[0]: text for text in texts}  # .txt, which is later, before .caption
        text_stems, image_stems = (_by_stem(names) for names in (texts, images))
        pairs = []
        for image in images:
            name = os.path.splitext(image)[0]
            stem = os.path.basename(name)
            text = beside.get(name) or in_metadata.get(image)
            if text is None and image_stems[stem] is not None:
                text = text_stems.get(stem)
            if text is not None:
                pairs.append((image, text))
        self.left_out["image without caption"] = len(images) - len(pairs)
        used = {image if text in in_metadata.values() else text for image, text in pairs}
        self.left_out["caption without image"] = len(texts) + len(self.metadata) - len(used)
        self.left_out = +self.left_out
        return [image for image, _ in pairs], [text for _, text in pairs]


def read_metadata(path: Path, caption_key: str) -> Iterator[tuple[str, list[str]]]:
    """The name and captions of each image in a `metadata.jsonl` or `metadata.csv`. Raises `FileError`."""
    text = read_text(path)
    rows = csv.DictReader(io.StringIO(text)) if path.suffix == ".csv" else filter(str.strip, text.splitlines())
    try:
        for row in rows:
            row = json.loads(row) if isinstance(row, str) else row
            key = next((key for key in (caption_key, "text", "caption") if key in row), None)
            if key is None or not isinstance(row["file_name"], str):
                raise FileError(f"{path} has no captions as {caption_key!r}, 'text' or 'caption', but "
                                f"{shorten(', '.join(map(str, row)))}; --caption_key names them")  # fmt: skip
            captions = row[key] if isinstance(row[key], list) else [row[key]]
            yield row["file_name"], [caption for caption in captions if isinstance(caption, str)]
    except KeyError:
        raise FileError(f"{path} has no 'file_name' for each caption") from None
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} cannot be read: {error}") from None


def list_files(folder: str | os.PathLike) -> tuple[list[str], list[str], Counter[str]]:
    """Images and texts below `folder`, sorted, as paths from there; and the suffixes of other files."""
    images, texts, others = [], [], Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(place, folder)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            is_text = suffix in CAPTION_SUFFIXES or name in METADATA_NAMES
            if not name.startswith(".") and (is_text or suffix in FORMATS):
                (texts if is_text else images).append(os.path.normpath(os.path.join(below, name)))
            else:
                others[suffix or "without a suffix"] += 1
    return sorted(images), sorted(texts), others


def _by_stem(names: list[str]) -> dict[str, str | None]:
    """Names by stem; None for a stem that several have."""
    stems: dict[str, str | None] = {}
    for name in names:
        stem = os.path.splitext(os.path.basename(name))[0]
        stems[stem] = None if stem in stems else name
    return stems
