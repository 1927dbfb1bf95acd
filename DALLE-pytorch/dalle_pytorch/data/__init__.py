"""Data sets of pictures with captions, behind one door: the drawn world, a folder, or WebDataset shards.

Every item is a dict of `image` (3, h, w) uint8 and `caption`, a function of the seed and of its place in the data, so
that a training can be broken off and resumed at any step.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import Dataset

from dalle_pytorch.data import glyphs
from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import (
    BatchLoader,
    BrokenSample,
    StepBatches,
    collate,
    describe_skipped,
    random_crops,
)
from dalle_pytorch.data.pictures import CaptionProblem
from dalle_pytorch.data.shards import ARCHIVE_SUFFIXES, ShardStream, local_path
from dalle_pytorch.data.token_cache import TokenCache, cache_tokens
from dalle_pytorch.files import FileError

__all__ = [
    "BatchLoader",
    "BrokenSample",
    "GlyphsDataset",
    "ImageTextFolder",
    "ShardStream",
    "StepBatches",
    "TokenCache",
    "cache_tokens",
    "collate",
    "describe_skipped",
    "open_dataset",
    "random_crops",
]


class GlyphsDataset(Dataset):
    """Scenes of the glyphs world, drawn when asked for.

    `mask` (16, 16) is the share of each cell under a subject. Every `terse_every`-th caption, if that is given, says
    little, often nothing but what the subject is: single words are learned from these. If `wrong_captions` are wanted,
    `other_captions` are so many, each with one fact made wrong. With `twins` every item holds a second scene as well,
    under the same keys after `twin_`, that differs in one fact and is captioned accordingly.
    """

    def __init__(
        self,
        resolution: int,
        count: int = 10_000_000,
        split: str = "train",
        terse_every: int | None = None,
        wrong_captions: int = 0,
        twins: bool = False,
    ):
        self.resolution, self.count, self.split = resolution, count, split
        self.terse_every, self.wrong_captions, self.twins = terse_every, wrong_captions, twins

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = glyphs.make_scene(index, self.split)
        terse = bool(self.terse_every) and index % self.terse_every == 0
        if self.twins:
            scene, twin, _ = glyphs.make_twins(scene, index, terse)
            other = self._sample(twin, self.count + index)
            return self._sample(scene, index) | {f"twin_{key}": value for key, value in other.items()}
        return self._sample(glyphs.with_terse_caption(scene, index) if terse else scene, index)

    def _sample(self, scene: glyphs.Scene, index: int) -> dict[str, Any]:
        item = {
            "image": torch.from_numpy(glyphs.draw(scene, self.resolution)).permute(2, 0, 1),
            "caption": scene.caption,
            "mask": torch.from_numpy(glyphs.subject_mask(scene)),
        }
        if wrong := self.wrong_captions:
            item["other_captions"] = [glyphs.change_caption(scene, wrong * index + i) for i in range(wrong)]
        return item


def open_dataset(
    name: str | os.PathLike,
    resolution: int,
    *,
    wds: str | None = None,
    caption_key: str = "caption",
    captions: bool = True,
    crop_ratio: float = 1.0,
    transparent: bool = False,
    caption_problem: CaptionProblem | None = None,
    terse_every: int | None = None,
    wrong_captions: int = 0,
    twins: bool = False,
) -> Dataset:
    """Opens the data that a training names: `glyphs`, the drawn world; WebDataset shards; or a folder of pictures.

    Args:
        name: what `--image_text_folder` says: `glyphs`, a folder, or with `wds` archives as `list_shards` takes them.
        resolution: side of the pictures, in pixels.
        wds: suffixes of pictures and captions in the shards, `jpg,txt` or `jpg,json`; empty for a folder.
        caption_key: the field of JSON captions.
        captions: False if pictures alone will do.
        crop_ratio, transparent, caption_problem: as in `ImageTextFolder`; the drawn world does without.
        terse_every, wrong_captions, twins: of the drawn world alone, as in `GlyphsDataset`.

    Raises `FileError` for what is not there, or is not what `wds` says.
    """
    if str(name) == "glyphs":
        if wds or transparent:
            raise FileError("glyphs are drawn, opaque and not from archives: they go without --wds and --transparent")
        return GlyphsDataset(resolution, terse_every=terse_every, wrong_captions=wrong_captions, twins=twins)
    settings = {"crop_ratio": crop_ratio, "transparent": transparent, "caption_problem": caption_problem}
    if wds:
        image, *rest = [suffix.strip().lower().lstrip(".") for suffix in wds.split(",")]
        if not image or len(rest) > 1 or (captions and not any(rest)):
            raise FileError(f"--wds names the suffixes of pictures and captions, as in jpg,txt, and not {wds!r}")
        caption = rest[0] if captions else None
        return ShardStream(name, resolution, image_suffix=image, caption_suffix=caption, caption_key=caption_key,
                           **settings)  # fmt: skip
    if not os.path.isdir(name):
        shards = str(name).endswith(ARCHIVE_SUFFIXES) or local_path(str(name)) is None
        raise FileError(
            f"{name} is read with --wds jpg,txt, which names the suffixes in its archives"
            if shards
            else f"there is no folder {name}"
        )
    return ImageTextFolder(name, resolution, captions=captions, **settings)
