"""The drawn world as a data set, registered as `glyphs`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.data.registry import RegisteredDataset
from dalle_pytorch.errors import UsageError
from dalle_pytorch.scenes.drawing import check_resolution
from dalle_pytorch.scenes.facts import ALL_QUESTIONS, attributes


def image_of(scene: glyphs.Scene, resolution: int) -> Tensor:
    """The picture of a scene: (3, resolution, resolution) uint8."""
    return torch.from_numpy(glyphs.draw(scene, resolution)).permute(2, 0, 1)


def images_of(scenes: Sequence[glyphs.Scene], resolution: int) -> Tensor:
    """The pictures of scenes: (n, 3, resolution, resolution) float in [0, 1]."""
    return torch.stack([image_of(scene, resolution) for scene in scenes]).float() / 255


class GlyphsDataset(RegisteredDataset):
    """Scenes drawn when asked for: those of the default model, or, with `of`, of another of `glyphs.MIXTURES`.

    `mask` (16, 16) is the share of each cell under a subject. Every `terse_every`-th caption, if that is given, says
    little, often nothing but what the subject is: single words are learned from these. With `wrong_captions`,
    `negative_captions` are so many, each with one fact made wrong. With `twins` every item holds a second scene as
    well, under the same keys after `second_`, that differs in one fact and is captioned accordingly. Of every
    `exchanged_every`-th pair, if that is given, the two subjects have their colours exchanged. With `facts`,
    `attributes` are the answers to `facts.ALL_QUESTIONS`, and `caption_attributes` those that the caption tells.
    """

    def __init__(self, resolution: int, count: int = 10_000_000, split: str = "train", of: str = "glyphs",
                 terse_every: int | None = None, wrong_captions: int = 0, twins: bool = False,
                 exchanged_every: int | None = None, facts: bool = False):  # fmt: skip
        check_resolution(resolution)
        if count < 1:
            raise UsageError(f"count must be at least 1, not {count}")
        glyphs.make_scene(0, split, of=of)  # raises for a split or a mixture that there is not
        self.resolution, self.count, self.split, self.of = resolution, count, split, of
        self.terse_every, self.wrong_captions, self.twins = terse_every, wrong_captions, twins
        self.exchanged_every = exchanged_every
        if facts:
            self.attributes = tuple(map(len, ALL_QUESTIONS.values()))

    def __len__(self) -> int:
        return self.count

    def captions(self) -> Iterator[str]:
        return (glyphs.make_scene(index, self.split, of=self.of).caption for index in range(self.count))

    def __getitem__(self, index: int) -> dict[str, Any]:
        terse = bool(self.terse_every) and index % self.terse_every == 0
        exchanged = self.twins and bool(self.exchanged_every) and index % self.exchanged_every == 0
        scene = glyphs.make_scene(index, self.split, 2 if exchanged else None, self.of)
        if self.twins:
            scene, twin, _ = glyphs.make_twins(scene, index, terse, exchanged)
            second = self._sample(twin, self.count + index)
            return self._sample(scene, index) | {f"second_{key}": value for key, value in second.items()}
        return self._sample(glyphs.with_terse_caption(scene, index) if terse else scene, index)

    def _sample(self, scene: glyphs.Scene, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {
            "image": image_of(scene, self.resolution),
            "caption": scene.caption,
            "mask": torch.from_numpy(glyphs.subject_mask(scene)),
        }
        if self.attributes:
            item |= {name: torch.tensor(values) for name, values in attributes(scene).items()}
        if wrong := self.wrong_captions:
            item["negative_captions"] = [glyphs.change_caption(scene, wrong * index + i) for i in range(wrong)]
        return item
