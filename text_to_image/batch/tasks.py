"""The work of a job: prompts in units, units cut into blocks, blocks as the tasks of stages.

How work is cut depends on the prompts and the settings alone, never on workers: the numbers of a block are rounded in
one way however many processes there are. Everything here is plain data that can be pickled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from dalle_pytorch.sampling.settings import SamplingSettings

FULL_BATCHES = 4  # sampling batches of a unit, at least
MOST_UNITS = 4096  # unless their images are too many
MOST_IMAGES = 1024  # kept and redrawn, of a unit
STAGES = ("sample", "score", "diffuse", "pack")  # in order; each takes what the one before it gives


@dataclass(frozen=True)
class Prompt:
    """A row of the list that can be used.

    Attributes:
        number: among the usable rows, from 0.
        key: the user's name of it, its number unless the list has one.
        place: where it is in the list: "line 12", "row 12", or a member of an archive.
        image, image_hash: the file to complete, relative to the list or `--images_dir`, and the SHA-256 of its content.
    """

    number: int
    key: str
    place: str
    text: str
    seed: int
    num_images: int
    sampling: SamplingSettings
    image: str | None = None
    image_hash: str | None = None

    @property
    def name(self) -> str:
        """What its files begin with."""
        return f"{self.number:09}"


@dataclass(frozen=True)
class Unit:
    """Consecutive prompts whose outputs are committed together, as one shard and one part of the manifest."""

    number: int
    prompts: tuple[Prompt, ...]

    @property
    def name(self) -> str:
        return f"{self.number:06}"

    @property
    def candidates(self) -> int:
        return sum(prompt.num_images for prompt in self.prompts)


# Items of the stages: each is of one prompt, and gives one result.


@dataclass(frozen=True)
class Draw:
    """sample: the candidates `first` to `first + count - 1` of a prompt → tokens (count, image_seq_len) int64, -1 those
    of candidates that were dropped."""

    prompt: Prompt
    first: int
    count: int


@dataclass(frozen=True)
class Drawn:
    """score: candidates `first` … with tokens (count, image_seq_len), of which those of -1 are left out → `Scored`."""

    prompt: Prompt
    first: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Candidate:
    """A candidate that may be kept: tokens (image_seq_len,) int64, pixels (h, w, channels) uint8, CLIP's cosine."""

    index: int
    tokens: np.ndarray
    pixels: np.ndarray
    score: float | None


@dataclass(frozen=True)
class Scored:
    """The best candidates of some, best first, the earlier of equals first, and the scores of all of them."""

    best: list[Candidate]
    scores: list[float]


@dataclass(frozen=True)
class Chosen:
    """diffuse: a kept candidate → pixels (h, w, 3) uint8."""

    prompt: Prompt
    rank: int
    candidate: Candidate


@dataclass(frozen=True)
class Finished:
    """pack: the kept candidates of a prompt, best first, and the first of them redrawn → `Packed`."""

    prompt: Prompt
    kept: list[Candidate]
    redrawn: list[np.ndarray]


@dataclass(frozen=True)
class Packed:
    """A prompt's files by name, and its rows of the manifest."""

    files: dict[str, bytes]
    rows: list[dict[str, Any]]


Item = Draw | Drawn | Chosen | Finished


@dataclass(frozen=True)
class Task:
    """A block, or the items of one prompt of it, for a worker.

    Attributes:
        stage: one of `STAGES`.
        unit, block: the number of the unit, and of the block among those of its stage.
        items: what a worker's `Stages.run` takes; it gives a list of as many results.
        probe: the number of the prompt that is tried alone, None for a whole block.
    """

    stage: str
    unit: int
    block: int
    items: tuple[Item, ...]
    probe: int | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """Later stages go first, so that few units are open; then the earlier units."""
        return -STAGES.index(self.stage), self.unit, self.block


def sample_blocks(prompts: Iterable[Prompt], batch_size: int) -> list[tuple[Draw, ...]]:
    """The candidates of some prompts in blocks of `batch_size`, those of equal sampling settings together."""
    blocks = []
    for _, alike in groupby(sorted(prompts, key=_sampling_key), key=_sampling_key):
        block: list[Draw] = []
        room = batch_size
        for prompt in alike:
            first = 0
            while first < prompt.num_images:
                count = min(room, prompt.num_images - first)
                block.append(Draw(prompt, first, count))
                first, room = first + count, room - count
                if not room:
                    blocks.append(tuple(block))
                    block, room = [], batch_size
        if block:
            blocks.append(tuple(block))
    return blocks


def _sampling_key(prompt: Prompt) -> tuple[str, bool]:
    """Prompts with the same one can be in one sampling batch."""
    return repr(prompt.sampling), prompt.image is not None


def diffuse_blocks(chosen: Sequence[Chosen], batch_size: int, by_prompt: bool) -> list[tuple[Chosen, ...]]:
    """Kept candidates in blocks of `batch_size`; with `by_prompt`, for guidance, each of one prompt."""
    groups = [list(group) for _, group in groupby(chosen, key=lambda item: item.prompt.number * by_prompt)]
    return [tuple(group[i : i + batch_size]) for group in groups for i in range(0, len(group), batch_size)]


def unit_size(settings_size: int | None, prompts: int, num_images: int, batch_size: int, kept: int) -> int:
    """How many prompts a unit has: as told; or enough to fill some batches, but few enough that a small job is in many
    units, and that the images of one fit in memory."""
    if settings_size is not None:
        return settings_size
    fills = -(-FULL_BATCHES * batch_size // num_images)
    return max(1, min(max(fills, -(-prompts // MOST_UNITS)), max(1, MOST_IMAGES // kept)))


def units(prompts: Iterable[Prompt], size: int) -> Iterator[Unit]:
    """Prompts in units of `size`."""
    number, waiting = 0, []
    for prompt in prompts:
        waiting.append(prompt)
        if len(waiting) == size:
            yield Unit(number, tuple(waiting))
            number, waiting = number + 1, []
    if waiting:
        yield Unit(number, tuple(waiting))
