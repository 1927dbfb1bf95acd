"""From a data set to the batches of a process.

Every random choice, the order of the samples, their crops, their captions, is a function of the seed and of the place
in the order. A batch is therefore the same for any number of processes and workers, and a resumed training continues
with the batches that it would have had.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dalle_pytorch.errors import FileError, UsageError, shorten

WORKER_SECONDS = 12  # after SIGTERM in which a worker goes on; the training ends in less
TRIES = 100  # samples read before the share of broken ones is checked

Sample = dict[str, Any]
Batch = dict[str, Any]


class BrokenSample(FileError):
    """A sample to skip. `reason` ("broken image") is what it is counted under; the message also has its name."""

    def __init__(self, reason: str, name: object, detail: object = ""):
        # Names in an archive and captions may have any length.
        super().__init__(f"{shorten(name, 300)}: {reason}" + (f" ({shorten(detail, 100)})" if detail else ""))
        self.reason = reason


@dataclass
class Skipped:
    """Counts of samples read and skipped, the latter by reason, with the first example of each."""

    read: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

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
    """Counts by reason in one line: `12 × broken image, 3 × empty caption`."""
    return ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())


class SampleDataset(Dataset[Sample], ABC):
    """A data set of known length. Subclasses define `__len__`, and `sample` or, without random choices, `__getitem__`.

    `left_out` counts by reason what was left out when the data set was opened.
    """

    left_out: Counter[str] = Counter()  # noqa: RUF012  assigned, never changed in place

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, index: int, generator: np.random.Generator | None = None) -> Sample:
        """The sample at `index`, its random choices drawn from `generator`. Raises `BrokenSample`."""
        return self[index]


class SampleStream(IterableDataset[Sample], ABC):
    """A data set that is read in order, by one or more readers, for any number of epochs."""

    left_out: Counter[str] = Counter()  # noqa: RUF012  assigned, never changed in place

    @abstractmethod
    def raw_samples(self, seed: int, epoch: int, reader: int, readers: int) -> Iterator[Any]:
        """What `reader` of `readers` reads in an epoch, not decoded."""

    @abstractmethod
    def decode(self, raw: Any, generator: np.random.Generator | None = None) -> Sample:
        """The sample of a raw one. Raises `BrokenSample`."""

    def __iter__(self) -> Iterator[Sample]:
        """The samples of a single reader with seed 0, without broken ones."""
        for epoch in itertools.count():
            for number, raw in enumerate(self.raw_samples(0, epoch, 0, 1)):
                with contextlib.suppress(BrokenSample):
                    yield self.decode(raw, np.random.default_rng([0, epoch, 0, number]))


Data = SampleDataset | SampleStream


class BatchLoader:
    """The batches of one process, as dicts of stacked tensors and of lists.

    Args:
        dataset: of known length, or a stream.
        batch_size: samples in a batch of all processes together; this one gets every `world_size`-th of them.
        first_step, last_step: the range of batches, endless without a last step. A stream ignores the first step and
            starts at `positions`.
        seed: of order, crops and captions.
        num_workers: processes that read; 0 reads in this one.
        positions: for a stream, `positions` after the last batch that was used. With another number of processes or
            workers than then, the stream restarts the epoch.

    Samples that raise `BrokenSample` are counted and replaced by others. Raises `FileError` when over half of them are
    broken.

    Attributes:
        skipped: samples skipped so far by this process, by reason. The data set's `left_out` counts once per epoch, on
            the first process.
        examples: the first message of each reason.
        epoch: completed epochs, of the slowest worker of a stream.
        steps_per_epoch: batches in an epoch, at least 1; None for a stream, whose length is not known.
        positions: the position in a stream, ready for JSON; None for data of known length.
    """

    def __init__(self, dataset: Data, batch_size: int, *, first_step: int = 0, last_step: int | None = None,
                 seed: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0,
                 positions: dict[str, Any] | None = None):  # fmt: skip
        if batch_size < world_size:
            raise UsageError(f"cannot share a batch of {batch_size} among {world_size} processes")
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

    def __iter__(self) -> Generator[Batch, None, None]:
        data = self.dataset
        yield from self._stream(data) if isinstance(data, SampleStream) else self._map(data)

    def _loader(self, source: Dataset, **settings: Any) -> DataLoader:
        # With its own generator, a restart of the loader draws nothing from the global one.
        return DataLoader(source, batch_size=None, num_workers=self.num_workers, collate_fn=as_it_is,
                          generator=torch.Generator(), worker_init_fn=_ignore_signals, **settings)  # fmt: skip

    def _map(self, data: SampleDataset) -> Iterator[Batch]:
        length = len(data)
        loader = self._loader(_MapBatches(data, self.seed), sampler=self._order(length))
        for step, (batch, skipped) in zip(self.steps, loader, strict=True):
            # A batch that could not be filled with TRIES samples per place is enough to decide.
            self._count(skipped, 1 if batch is None else min(TRIES, length))
            assert batch is not None
            self._finish_epochs((step + 1) * self.batch_size // length)
            yield batch

    def _order(self, length: int) -> Iterator[list[tuple[int, int]]]:
        """Batches of (epoch, index) as a function of (seed, step), from a sequence of permutations of `length` samples.

        Step s has the samples s·batch_size to (s + 1)·batch_size of the sequence, and process `rank` every
        `world_size`-th of those: a batch of 8, a batch of 8 on two processes and two batches of 4 are the same samples.
        """
        order, ordered = np.empty(0, int), -1
        for step in self.steps:
            batch = []
            for place in range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world_size):
                epoch, row = divmod(place, length)
                if epoch != ordered:
                    order, ordered = np.random.default_rng([self.seed, epoch]).permutation(length), epoch
                batch.append((epoch, int(order[row])))
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
            # In the order in which the workers are read: the first is the next one.
            places = [other for other in places if other[0] != place[0]] + [place]
            self.positions = {"readers": readers, "places": places}
            self._count(skipped, TRIES)
            self._finish_epochs(_slowest(places))
            if batch is not None:
                yield batch
                missing -= 1
            if not missing:
                return

    def _count(self, skipped: Skipped, enough: int) -> None:
        self._skipped.update(skipped)
        self._skipped.check(enough)

    def _finish_epochs(self, epoch: int) -> None:
        if self.rank == 0 and epoch > self.epoch:
            for reason, count in self.dataset.left_out.items():
                self._left_out[reason] += count * (epoch - self.epoch)
        self.epoch = epoch

    def _start(self, positions: dict[str, Any] | None) -> dict[str, Any]:
        """The positions of this process's readers; the start of their epoch if another number shared the stream."""
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


class _MapBatches(Dataset):
    """Batches by their (epoch, index) pairs, with random other samples in place of broken ones."""

    def __init__(self, dataset: SampleDataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, keys: list[tuple[int, int]]) -> tuple[Batch | None, Skipped]:
        skipped = Skipped()
        items = [self._read(epoch, index, skipped) for epoch, index in keys]
        complete = [item for item in items if item is not None]
        return (collate(complete) if len(complete) == len(keys) else None), skipped

    def _read(self, epoch: int, index: int, skipped: Skipped) -> Sample | None:
        generator = np.random.default_rng([self.seed, epoch, index])
        skipped.read += 1
        try:
            return self.dataset.sample(index, generator)
        except BrokenSample as error:
            skipped.add(error)
        # Not the next one: broken files are often adjacent.
        for other in generator.integers(len(self.dataset), size=TRIES).tolist():
            try:
                return self.dataset.sample(other, generator)
            except BrokenSample:
                pass
        return None


class _StreamBatches(IterableDataset):
    """Endless batches of `size` samples of a stream. Worker i is the reader at `places[i]` and starts there.

    Each comes with the samples skipped and the reader's place [reader, epoch, samples read in it]. After many samples
    without a complete batch None is yielded in place of one, so that they are counted in time.
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
    """A signal to the process group asks the training to end, which still reads batches until then.

    A worker that is in a read that does not end goes some time after it; without an error, which would reach the
    training while it saves.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


def as_it_is(batch: Any) -> Any:
    """A `collate_fn` for batches that are complete; unlike a lambda it can be sent to workers."""
    return batch


def collate(items: Sequence[Sample]) -> Batch:
    """Stacks tensors, and lists everything else."""
    first = items[0]
    columns = {key: [item[key] for item in items] for key in first}
    return {key: torch.stack(values) if torch.is_tensor(first[key]) else values for key, values in columns.items()}


def random_crops(maps: Sequence[Tensor], crop_size: int | None, side: int, full_share: float) -> list[Tensor]:
    """The same random squares of images and of maps that belong to them, aligned to a grid of `side` cells a side.

    `maps` are (b, c, h, w), the images first; their squares have `crop_size` pixels, the others in proportion. With
    probability `full_share` fewer whole maps are returned instead, with as many pixels as the crops.
    """
    images = maps[0]
    size = images.shape[-1]
    if crop_size is None or crop_size >= size:
        return list(maps)
    if torch.rand(()) < full_share:
        count = max(1, len(images) * crop_size**2 // size**2)
        return [batch[:count] for batch in maps]
    cells = crop_size * side // size
    corners = torch.randint(side - cells + 1, (len(images), 2)).tolist()

    def cut(batch: Tensor) -> Tensor:
        cell = batch.shape[-1] // side
        window = [(slice(y * cell, (y + cells) * cell), slice(x * cell, (x + cells) * cell)) for y, x in corners]
        return torch.stack([item[:, rows, columns] for item, (rows, columns) in zip(batch, window, strict=True)])

    return [cut(batch) for batch in maps]
