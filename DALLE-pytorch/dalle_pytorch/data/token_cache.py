"""Image tokens computed once, so that a prior is trained without running its VAE at every step.

A cache is a folder of `tokens.npy` (n, tokens per image), `captions.jsonl` with all captions of each image,
`starts.npy` with the byte offset of each line of that, `key.json` with fingerprints of the VAE and of the data,
and `index.json`, which is written last. While it is being made, `parts/` holds what is finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import BrokenSample, Data, SampleDataset, Skipped, as_it_is
from dalle_pytorch.data.samples import CaptionProblem, pick_caption
from dalle_pytorch.data.shards import ShardStream
from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import atomic_write, write_bytes, write_text
from dalle_pytorch.vae.base import ImageTokenizer

PART_SIZE = 4096  # samples per file in parts/, the most that each worker loses when interrupted

Progress = Callable[[int, int | None], None]


class TokenCache(SampleDataset):
    """A finished cache. Samples are dicts of `tokens` (tokens per image,) int64 and `caption`, one of the image's.

    `left_out` counts what was skipped when the cache was made. `caption_problem` is as in `ImageTextFolder`.
    Raises `FileError` if the cache is not finished, or damaged.
    """

    def __init__(self, folder: str | os.PathLike, caption_problem: CaptionProblem | None = None):
        self.folder, self.caption_problem = Path(folder), caption_problem
        try:
            index = json.loads((self.folder / "index.json").read_text("utf-8"))
            self.left_out = Counter(index["skipped"])
            self.tokens = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self.starts = np.load(self.folder / "starts.npy", mmap_mode="r", allow_pickle=False)
            self.captions = np.memmap(self.folder / "captions.jsonl", np.uint8, "r")
            whole = len(self.tokens) == len(self.starts) - 1 and self.starts[-1] == len(self.captions)
        except FileNotFoundError as error:
            raise FileError(f"{folder} is not a finished token cache: {error.filename} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"{folder} cannot be read as a token cache ({error})") from None
        if not whole:
            raise FileError(f"the token cache {folder} is damaged; delete it to make it again")

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The sample at `index`, its caption drawn from `generator` (the first without one)."""
        captions = json.loads(self.captions[self.starts[index] : self.starts[index + 1]].tobytes())
        caption = pick_caption(captions, f"{self.folder}: {index}", generator, self.caption_problem)
        return {"tokens": torch.from_numpy(self.tokens[index].astype(np.int64)), "caption": caption}


def cache_tokens(
    folder: str | os.PathLike,
    dataset: Data,
    vae: ImageTokenizer,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress | None = None,
) -> TokenCache:
    """Opens the cache of a data set's tokens in `folder`, which is made first if it is not finished.

    Images are cropped to their centre square, whatever the data set's crops, and encoded on the device of `vae`.
    Several processes share the work, archive by archive, through a folder that all of them can see.

    `progress(done, total)` is called with the samples that this process has read and, where known, will read.
    Raises `FileError` if `folder` holds the tokens of another VAE or of other data, or if over half of the samples
    cannot be used.
    """
    if not isinstance(dataset, ImageTextFolder | ShardStream):
        raise FileError("--cache_tokens is for folders and archives, not for registered data sets")
    folder = Path(folder)
    _claim(folder, {"version": 1, "vae": vae_fingerprint(vae), "data": data_fingerprint(dataset)})
    if not (folder / "index.json").exists():
        _make_parts(folder / "parts", dataset, vae, batch_size, num_workers, rank, world_size, progress)
        if rank == 0:
            _wait(lambda: len(_finished(folder / "parts")[1]) == _unit_count(dataset))
            _join_parts(folder, dataset.left_out)
        _wait((folder / "index.json").exists)
    return TokenCache(folder, dataset.caption_problem)


def vae_fingerprint(vae: ImageTokenizer) -> str:
    """A hash of the configuration and weights of a VAE."""
    digest = hashlib.sha256(json.dumps([type(vae).__name__, vae.config], default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_fingerprint(dataset: ImageTextFolder | ShardStream) -> str:
    """A hash of a data set's settings, and of the names and sizes of its files."""
    digest = hashlib.sha256()
    for part in dataset.identity():
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Writes the key, or compares it with that of the cache already there."""
    path = folder / "key.json"
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        write_text(path, json.dumps(key, indent=2) + "\n")
        return
    except ValueError:
        found = None
    if found != key:
        other = "another VAE" if isinstance(found, dict) and found.get("vae") != key["vae"] else "other data"
        raise FileError(f"{folder} holds the image tokens of {other}; choose another folder, or delete it")


def _wait(done: Callable[[], bool]) -> None:
    # Polls for files: a barrier of torch.distributed times out after minutes, and this may take hours.
    while not done():
        time.sleep(0.2)


# --------------------------------------------------------------------------------------------------
# Parts: units are archives, or ranges of a folder's images; each has one part for every PART_SIZE samples


def _unit_count(dataset: ImageTextFolder | ShardStream) -> int:
    return len(dataset.urls) if isinstance(dataset, ShardStream) else -(-len(dataset) // PART_SIZE)


def _unit(dataset: ImageTextFolder | ShardStream, unit: int) -> Iterator[Any]:
    """What there is to decode in a unit: raw samples of a stream, or indices."""
    if isinstance(dataset, ShardStream):
        return dataset.read_shard(dataset.urls[unit])
    return iter(range(unit * PART_SIZE, min(len(dataset), (unit + 1) * PART_SIZE)))


def _finished(parts: Path) -> tuple[Counter[int], set[int]]:
    """How many parts each unit has, from the first without a gap, and the units that have all of theirs."""
    counts: Counter[int] = Counter()
    complete = set()
    for name in sorted(path.name for path in parts.glob("*.npz")):
        if match := re.fullmatch(r"(\d+)-(\d+)(-last)?\.npz", name):
            unit = int(match[1])
            counts[unit] += 1
            if match[3]:
                complete.add(unit)
    return counts, complete


class _Piece(NamedTuple):
    """Some samples of one part; `end` says what they complete: nothing, the `part`, or the `unit` with it."""

    unit: int
    part: int
    images: Tensor | None  # (n, c, h, w) uint8
    captions: list[list[str]]
    skipped: Skipped
    end: str | None


class _Pieces(IterableDataset):
    """What is left to read of some units, in pieces of at most `batch_size` samples. Workers share the units."""

    def __init__(self, dataset: Any, units: list[int], finished: Counter[int], batch_size: int):
        self.dataset, self.units, self.finished, self.batch_size = dataset, units, finished, batch_size

    def __iter__(self) -> Iterator[_Piece]:
        worker = get_worker_info()
        for unit in self.units[worker.id :: worker.num_workers] if worker else self.units:
            yield from self._read(unit)

    def _read(self, unit: int) -> Iterator[_Piece]:
        part = self.finished[unit]
        images, captions, skipped = [], [], Skipped()

        def piece(end: str | None = None) -> _Piece:
            nonlocal images, captions, skipped
            made = _Piece(unit, part, torch.stack(images) if images else None, captions, skipped, end)
            images, captions, skipped = [], [], Skipped()
            return made

        for number, raw in enumerate(islice(_unit(self.dataset, unit), part * PART_SIZE, None)):
            if number and number % PART_SIZE == 0:
                yield piece("part")
                part += 1
            skipped.read += 1
            try:
                found = self.dataset.all_captions(raw)
                images.append(self.dataset.image(raw))
                captions.append(found)
            except BrokenSample as error:
                skipped.add(error)
            if len(images) == self.batch_size:
                yield piece()
        yield piece("unit")


class _Part:
    """The samples of one part so far."""

    def __init__(self):
        self.tokens: list[np.ndarray] = []
        self.lines: list[bytes] = []
        self.skipped = Skipped()

    def add(self, piece: _Piece, tokens: np.ndarray | None) -> None:
        self.skipped.update(piece.skipped)
        self.lines += [json.dumps(captions, ensure_ascii=False).encode() + b"\n" for captions in piece.captions]
        if tokens is not None:
            self.tokens.append(tokens)

    def write(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            tokens=np.concatenate(self.tokens) if self.tokens else np.zeros((0, 0), np.uint16),
            lines=np.frombuffer(b"".join(self.lines), np.uint8),
            lengths=np.array([len(line) for line in self.lines], np.int64),
            skipped=np.frombuffer(json.dumps([self.skipped.reasons, self.skipped.examples]).encode(), np.uint8),
            read=self.skipped.read,
        )
        write_bytes(path, buffer.getvalue())


def _make_parts(
    folder: Path,
    dataset: ImageTextFolder | ShardStream,
    vae: ImageTokenizer,
    batch_size: int,
    num_workers: int,
    rank: int,
    world_size: int,
    progress: Progress | None,
) -> None:
    """Writes this process's share of the parts that are missing."""
    counts, complete = _finished(folder)
    mine = range(rank, _unit_count(dataset), world_size)
    pieces = _Pieces(dataset, [unit for unit in mine if unit not in complete], counts, batch_size)
    loader = DataLoader(pieces, batch_size=None, num_workers=num_workers, collate_fn=as_it_is,
                        generator=torch.Generator())  # fmt: skip
    total, done = None, 0
    if isinstance(dataset, ImageTextFolder):
        share = [min(len(dataset), (unit + 1) * PART_SIZE) - unit * PART_SIZE for unit in mine]
        total = sum(share)
        done = sum(size for unit, size in zip(mine, share, strict=True) if unit in complete)
    device = vae.device
    kind = np.uint16 if vae.num_tokens <= 2**16 else np.int32
    everything, parts = Skipped(), {}
    for piece in loader:
        tokens = None
        if piece.images is not None:
            with torch.no_grad():
                tokens = vae.get_codebook_indices(piece.images.to(device).float() / 255).cpu().numpy().astype(kind)
        part = parts.setdefault(piece.unit, _Part())
        part.add(piece, tokens)
        if piece.end is not None:
            last = "-last" if piece.end == "unit" else ""
            parts.pop(piece.unit).write(folder / f"{piece.unit:06}-{piece.part:06}{last}.npz")
        everything.update(piece.skipped)
        everything.check()
        done += piece.skipped.read
        if progress is not None:
            progress(done, total)


def _join_parts(folder: Path, left_out: Counter[str]) -> None:
    """Joins the finished parts to the cache's files, and removes them."""
    paths = sorted((folder / "parts").glob("*.npz"))
    skipped, counts, kinds = Skipped(), [], set()
    for path in paths:
        with np.load(path, allow_pickle=False) as part:
            skipped.read += int(part["read"])
            reasons, examples = json.loads(part["skipped"].tobytes())
            skipped.reasons.update(reasons)
            skipped.examples = {**examples, **skipped.examples}
            counts.append(len(part["tokens"]))
            if counts[-1]:
                kinds.add((part["tokens"].dtype, part["tokens"].shape[1]))
    skipped.check(enough=1)
    if not kinds:
        raise FileError("the data have no usable sample")
    ((kind, seq_len),) = kinds
    with (
        atomic_write(folder / "tokens.npy") as tokens_path,
        atomic_write(folder / "captions.jsonl") as captions_path,
        atomic_write(folder / "starts.npy") as starts_path,
    ):
        tokens = np.lib.format.open_memmap(tokens_path, "w+", kind, (sum(counts), seq_len))
        first, lengths = 0, [np.zeros(1, np.int64)]
        with open(captions_path, "wb") as captions:
            for path, count in zip(paths, counts, strict=True):
                if count:
                    with np.load(path, allow_pickle=False) as part:
                        tokens[first : first + count] = part["tokens"]
                        captions.write(part["lines"].tobytes())
                        lengths.append(part["lengths"])
                    first += count
        tokens.flush()
        with open(starts_path, "wb") as starts:
            np.save(starts, np.cumsum(np.concatenate(lengths)), allow_pickle=False)
    index = {"samples": sum(counts), "tokens_per_sample": seq_len, "skipped": skipped.reasons + left_out}
    write_text(folder / "index.json", json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder / "parts")
