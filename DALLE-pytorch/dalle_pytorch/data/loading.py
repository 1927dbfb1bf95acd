"""From a data set to batches: what a process of a training reads at each step, and where it stands.

Every random choice about a sample, its place in the order, its crop, which of its captions, is a function of the seed
and of that place. So a batch is the same whatever the number of processes that share it or of workers that read it, and
a broken-off training goes on with the batches that it would have had.
"""

from __future__ import annotations

import itertools
import signal
import sys
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from dalle_pytorch.errors import FileError

TRIES = 100  # samples read before half of them broken, or all, says something about the rest

Batch = dict[str, Any]


class BrokenSample(FileError):
    """A sample that is skipped. `reason` is what it is counted under ("broken picture"), the message names it."""

    def __init__(self, reason: str, name: object, detail: object = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason


class Skipped:
    """What was read and what of it was skipped: counts by reason, and the first example of each."""

    def __init__(self):
        self.read = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, error: BrokenSample) -> None:
        """Counts one sample as skipped."""
        self.reasons[error.reason] += 1
        self.examples.setdefault(error.reason, str(error))

    def update(self, other: Skipped) -> None:
        """Adds the counts of another."""
        self.read += other.read
        self.reasons.update(other.reasons)
        self.examples = {**other.examples, **self.examples}

    def check(self, enough: int = TRIES) -> None:
        """Raises `FileError` if, once `enough` samples were read, over half of them were skipped."""
        if self.read >= enough and 2 * self.reasons.total() > self.read:
            example = self.examples[self.reasons.most_common(1)[0][0]]
            raise FileError(
                f"{self.reasons.total()} of {self.read} samples cannot be used: {describe_skipped(self.reasons)}; "
                f"for example {example}"
            )


def describe_skipped(reasons: Counter[str]) -> str:
    """Counts by reason as a line: `12 × broken picture, 3 × empty caption`."""
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())


class MapData(Protocol):
    """Data of known length, read by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class SampleStream(IterableDataset):
    """Data read in order, by one or more readers."""

    @abstractmethod
    def raw_samples(self, seed: int, epoch: int, reader: int, readers: int) -> Iterator[Any]:
        """What `reader` of `readers` reads in an epoch, not decoded."""

    @abstractmethod
    def decode(self, raw: Any, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The item of a raw sample. Raises `BrokenSample`."""


class BatchLoader:
    """The batches of one process, as dicts of stacked tensors and of lists.

    Args:
        dataset: map-style, or a stream.
        batch_size: samples in a batch of all processes together; this one gets every `world_size`-th of them.
        first_step, last_step: the batches wanted. Without a last step they go on for ever. Map-style data skips the
            batches before the first without reading; a stream goes by `positions`.
        seed: decides order, crops and captions.
        num_workers: processes that read; with 0 this one does.
        positions: of a stream, what `positions` was after the last batch that was used. A stream that was read by
            another number of processes or workers starts the epoch anew in which it was left.

    Samples that raise `BrokenSample` are counted and another takes their place; `FileError` is raised when over half of
    them are broken.

    Attributes:
        skipped: samples skipped so far by this process, by reason. What the data set left out when it was opened (its
            `left_out`) counts once an epoch, on the first process.
        examples: the first message of each reason.
        epoch: how often the data was gone through, of a stream by its slowest worker.
        steps_per_epoch: batches in an epoch, at least 1; None for a stream, whose length is not known.
        positions: where a stream stands, ready for JSON; None for map-style data.
    """

    def __init__(
        self,
        dataset: MapData | SampleStream,
        batch_size: int,
        *,
        first_step: int = 0,
        last_step: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        positions: dict[str, Any] | None = None,
    ):
        if batch_size < world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} processes")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.steps = range(first_step, sys.maxsize if last_step is None else last_step)
        self.steps_per_epoch: int | None = None
        self.positions: dict[str, Any] | None = None
        if isinstance(dataset, SampleStream):
            self.positions = self._start(positions)
            self.epoch = _slowest(self.positions["places"])
        else:
            self.steps_per_epoch = max(1, len(dataset) // batch_size)
            self.epoch = first_step * batch_size // len(dataset)
        self._skipped = Skipped()
        self._left_out: Counter[str] = Counter()

    @property
    def skipped(self) -> Counter[str]:
        return self._skipped.reasons + self._left_out

    @property
    def examples(self) -> dict[str, str]:
        return self._skipped.examples

    def __iter__(self) -> Iterator[Batch]:
        data = self.dataset
        yield from self._stream(data) if isinstance(data, SampleStream) else self._map(data)

    def _loader(self, source: Dataset, **settings: Any) -> DataLoader:
        # A generator of its own: to start it, as a resumed run does, draws nothing from the one that the task uses.
        return DataLoader(source, batch_size=None, num_workers=self.num_workers, collate_fn=as_it_is,
                          generator=torch.Generator(), worker_init_fn=_ignore_signals, **settings)  # fmt: skip

    def _map(self, data: MapData) -> Iterator[Batch]:
        length = len(data)
        order = StepBatches(length, self.batch_size, self.steps.start, self.steps.stop, self.seed, self.rank,
                            self.world_size)  # fmt: skip
        loader = self._loader(_MapBatches(data, self.seed), sampler=order)
        for step, (batch, skipped) in zip(self.steps, loader, strict=True):
            # A batch that TRIES samples for each place could not fill says enough.
            self._count(skipped, 1 if batch is None else min(TRIES, length))
            assert batch is not None
            self._finish_epochs((step + 1) * self.batch_size // length)
            yield batch

    def _stream(self, stream: SampleStream) -> Iterator[Batch]:
        if not self.steps:
            return
        size = len(range(self.rank, self.batch_size, self.world_size))
        positions = self._start(self.positions)
        readers, places = positions["readers"], positions["places"]
        loader = self._loader(_StreamBatches(stream, self.seed, size, readers, places))
        missing = len(self.steps)
        for batch, skipped, place in loader:
            # In the order in which the workers are asked, so that the first is the next one.
            places = [other for other in places if other[0] != place[0]] + [place]
            self.positions = {"readers": readers, "places": places}
            self._count(skipped, TRIES)
            self._finish_epochs(_slowest(places))
            if batch is None:
                continue
            yield batch
            missing -= 1
            if not missing:
                return

    def _count(self, skipped: Skipped, enough: int) -> None:
        self._skipped.update(skipped)
        self._skipped.check(enough)

    def _finish_epochs(self, epoch: int) -> None:
        if self.rank == 0 and epoch > self.epoch:
            for reason, count in getattr(self.dataset, "left_out", Counter()).items():
                self._left_out[reason] += count * (epoch - self.epoch)
        self.epoch = epoch

    def _start(self, positions: dict[str, Any] | None) -> dict[str, Any]:
        """Places of this process's readers: those given, if as many share the stream; else the start of an epoch."""
        workers = max(1, self.num_workers)
        readers = self.world_size * workers
        mine = list(range(self.rank * workers, (self.rank + 1) * workers))
        places = positions["places"] if positions else []
        if positions and positions["readers"] == readers and sorted(reader for reader, _, _ in places) == mine:
            return positions
        epoch = min((epoch for _, epoch, _ in places), default=0)
        return {"readers": readers, "places": [[reader, epoch, 0] for reader in mine]}


def _slowest(places: list[list[int]]) -> int:
    return min(epoch for _, epoch, _ in places)


class StepBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) as a function of (seed, step): permutations of `length` samples, one after the other.

    Step s has the samples s·batch_size to (s + 1)·batch_size of that row, and `rank` of `world_size` processes every
    `world_size`-th of those: one batch of 8, a batch of 8 on two processes and two batches of 4 are the same samples.
    """

    def __init__(self, length: int, batch_size: int, first_step: int, last_step: int, seed: int = 0, rank: int = 0,
                 world_size: int = 1):  # fmt: skip
        self.length, self.batch_size, self.steps = length, batch_size, range(first_step, last_step)
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, ordered = np.empty(0, int), -1
        for step in self.steps:
            batch = []
            for place in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size):
                epoch, row = divmod(place, self.length)
                if epoch != ordered:
                    order, ordered = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
                batch.append((epoch, int(order[row])))
            yield batch


class _MapBatches(Dataset):
    """Batches of a map-style data set by their (epoch, index) pairs; any good sample takes a broken one's place."""

    def __init__(self, dataset: MapData, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, keys: list[tuple[int, int]]) -> tuple[Batch | None, Skipped]:
        skipped = Skipped()
        items = [self._read(epoch, index, skipped) for epoch, index in keys]
        complete = [item for item in items if item is not None]
        return (collate(complete) if len(complete) == len(keys) else None), skipped

    def _read(self, epoch: int, index: int, skipped: Skipped) -> dict[str, Any] | None:
        generator = np.random.default_rng([self.seed, epoch, index])
        skipped.read += 1
        try:
            return self._sample(index, generator)
        except BrokenSample as error:
            skipped.add(error)
        # Not its neighbour: broken files come in rows.
        for other in generator.integers(len(self.dataset), size=TRIES).tolist():
            try:
                return self._sample(other, generator)
            except BrokenSample:
                pass
        return None

    def _sample(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        sample = getattr(self.dataset, "sample", None)
        return sample(index, generator) if sample else self.dataset[index]


class _StreamBatches(IterableDataset):
    """Endless batches of `size` samples of a stream. Worker i plays the reader at `places[i]` and begins there.

    With each goes what was skipped, and the reader's place [reader, epoch, samples drawn in it]. After many samples
    without a whole batch, None is handed out for one, so that they are counted in time.
    """

    def __init__(self, stream: SampleStream, seed: int, size: int, readers: int, places: Sequence[list[int]]):
        self.stream, self.seed, self.size, self.readers, self.places = stream, seed, size, readers, places

    def __iter__(self) -> Iterator[tuple[Batch | None, Skipped, list[int]]]:
        worker = get_worker_info()
        place = self.places[worker.id if worker else 0]
        reader, first_epoch, first = place
        items, skipped = [], Skipped()
        for epoch in itertools.count(first_epoch):
            number = -1
            for number, raw in enumerate(self.stream.raw_samples(self.seed, epoch, reader, self.readers)):
                if epoch == first_epoch and number < first:
                    continue
                skipped.read += 1
                try:
                    items.append(self.stream.decode(raw, np.random.default_rng([self.seed, epoch, reader, number])))
                except BrokenSample as error:
                    skipped.add(error)
                if len(items) == self.size:
                    place = [reader, epoch, number + 1]
                    yield collate(items), skipped, place
                    items, skipped = [], Skipped()
                elif skipped.read >= max(TRIES, 4 * self.size):
                    yield None, skipped, place
                    skipped = Skipped()
            if number < 0:
                skipped.read += 1
                name = f"worker {reader + 1} of {self.readers}"
                skipped.add(BrokenSample("epoch without a sample", name, "fewer workers may do"))
                if skipped.read >= TRIES:
                    yield None, skipped, place
                    skipped = Skipped()


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group of processes asks the training to end, which then still wants its batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """What a reader hands out is whole: a `collate_fn` that leaves it alone, and can be sent to workers."""
    return batch


def collate(items: list[dict[str, Any]]) -> Batch:
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
