"""Data sets of pictures with captions. Every item is a dict of `image` (3, h, w) uint8 and `caption`, and depends on
its index alone, so that a training can be broken off and resumed at any step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dalle_pytorch.data import glyphs
from dalle_pytorch.files import IMAGE_SUFFIXES, FileError, image_to_tensor, read_image


class GlyphsDataset(Dataset):
    """Scenes of the glyphs world, drawn when asked for; `mask` (16, 16) is the share of each cell under a subject."""

    def __init__(self, resolution: int, count: int = 10_000_000, split: str = "train"):
        self.resolution, self.count, self.split = resolution, count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = glyphs.make_scene(index, self.split)
        return {
            "image": torch.from_numpy(glyphs.draw(scene, self.resolution)).permute(2, 0, 1),
            "caption": scene.caption,
            "other_caption": glyphs.change_caption(scene, index),
            "mask": torch.from_numpy(glyphs.subject_mask(scene)),
        }


class ImageTextFolder(Dataset):
    """Pictures in a folder, nested or not, each with its captions in a `.txt` of the same stem, one a line.

    Pictures are cut to their centre square and scaled to `resolution` pixels. `FileError`: the folder holds no pair.
    """

    def __init__(self, folder: str | os.PathLike, resolution: int):
        self.resolution = resolution
        pictures = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.pictures = [path for path in pictures if path.with_suffix(".txt").exists()]
        if not self.pictures:
            raise FileError(f"{folder} holds no pictures with captions (name.png beside name.txt)")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.pictures[index]
        captions = [line.strip() for line in path.with_suffix(".txt").read_text("utf-8").splitlines() if line.strip()]
        pixels = image_to_tensor(read_image(path), self.resolution)[0]
        return {
            "image": pixels.mul(255).round().to(torch.uint8),
            "caption": captions[index % len(captions)] if captions else "",
        }


def open_dataset(name: str, resolution: int) -> Dataset:
    """`glyphs` is the drawn world; anything else an image-text folder."""
    return GlyphsDataset(resolution) if name == "glyphs" else ImageTextFolder(name, resolution)


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of indices as a function of (seed, step): every epoch a new permutation, the last short batch left out.

    `rank` of `world_size` processes gets its own slice of every batch. Starting at `first_step` skips without reading.
    """

    def __init__(self, length: int, batch_size: int, first_step: int, last_step: int, seed: int = 0, rank: int = 0,
                 world_size: int = 1):  # fmt: skip
        if batch_size > length:
            raise ValueError(f"a batch of {batch_size} cannot be drawn from {length} samples")
        self.length, self.batch_size, self.seed, self.rank, self.world_size = length, batch_size, seed, rank, world_size
        self.steps = range(first_step, last_step)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        per_epoch = self.length // self.batch_size
        epoch, order = -1, None
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            batch = order[step % per_epoch * self.batch_size :][: self.batch_size]
            yield batch[self.rank :: self.world_size].tolist()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, and lists everything else."""
    first = items[0]
    columns = {key: [item[key] for item in items] for key in first}
    return {key: torch.stack(values) if torch.is_tensor(first[key]) else values for key, values in columns.items()}


def random_crops(maps: Sequence[Tensor], crop_size: int | None, side: int, full_share: float) -> list[Tensor]:
    """The same random squares of pictures and of what goes with them, each cut along a grid of `side` tokens a side.

    `maps` are (b, c, h, w), the pictures first; their squares have `crop_size` pixels, the others in proportion.
    With the chance `full_share` a part of the batch comes back whole instead, of as many pixels as the crops have.
    """
    pictures = maps[0]
    size = pictures.shape[-1]
    if crop_size is None or crop_size >= size:
        return list(maps)
    if torch.rand(()) < full_share:
        count = max(1, len(pictures) * crop_size**2 // size**2)
        return [batch[:count] for batch in maps]
    cells = crop_size * side // size
    corners = torch.randint(side - cells + 1, (len(pictures), 2)).tolist()

    def cut(batch: Tensor) -> Tensor:
        cell = batch.shape[-1] // side
        window = [(slice(y * cell, (y + cells) * cell), slice(x * cell, (x + cells) * cell)) for y, x in corners]
        return torch.stack([item[:, rows, columns] for item, (rows, columns) in zip(batch, window, strict=True)])

    return [cut(batch) for batch in maps]
