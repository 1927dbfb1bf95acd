"""Image tokens computed once, so that a prior is trained without running its VAE at every step.

A cache is a folder of `tokens.npy` (n, tokens per image), `captions.jsonl` with all captions of each image,
`starts.npy` with the byte offset of each line of that, `key.json` with fingerprints of the VAE and of the data
(of contents, and of sizes and times, so that contents are read only where those have changed),
and `index.json`, which is written last. While it is being made, `parts/` holds what is finished.
"""

import hashlib
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dalle_pytorch.data.folder import ImageTextFolder
from dalle_pytorch.data.loading import BrokenSample, Data, SampleDataset, Skipped, as_it_is
from dalle_pytorch.data.samples import CaptionProblem, pick_caption
from dalle_pytorch.data.shards import ShardStream
from dalle_pytorch.errors import FileError
from dalle_pytorch.files.atomic import atomic_write, clear_leftovers, write_bytes, write_text
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import read_json
from dalle_pytorch.files.lock import LOCK_NAME, locked
from dalle_pytorch.vae.base import ImageTokenizer

VERSION = 2  # of key.json
WAIT = 1800.0  # seconds without progress after which other processes are no longer waited for
PART_SIZE = 4096  # samples per file in parts/, the most that each worker loses when interrupted

Progress = Callable[[int, int | None], None]


class TokenCache(SampleDataset):
    """A finished cache. Samples are dicts of `tokens` (tokens per image,) int64 and `caption`, one of the image's.

    `left_out` counts what was skipped when the cache was made. `caption_problem` is as in `ImageTextFolder`.
    Raises `FileError` if the cache is not finished, or damaged.
    """

    def __init__(self, folder: str | os.PathLike, caption_problem: CaptionProblem | None = None):
        self.folder, self.caption_problem = Path(folder), caption_problem
        if not (self.folder / "index.json").exists():
            raise FileError(f"{folder} is not a finished token cache: {self.folder / 'index.json'} is missing")
        with opening(f"the token cache {folder}", "is damaged; delete it to make it again", FileError):
            index = read_json(self.folder / "index.json")
            self.left_out = Counter(index["skipped"])
            self.tokens = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self.starts = np.load(self.folder / "starts.npy", mmap_mode="r", allow_pickle=False)
            self.captions = np.memmap(self.folder / "captions.jsonl", np.uint8, "r")
            kinds = [(array.ndim, array.dtype.kind) for array in (self.tokens, self.starts)]
            if kinds not in ([(2, "u"), (1, "i")], [(2, "i"), (1, "i")]):
                raise ValueError("expected whole numbers in tables of two axes and of one")
            if len(self.tokens) != len(self.starts) - 1 or self.starts[-1] != len(self.captions):
                raise ValueError("its files do not belong together")

    def __len__(self) -> int:
        return len(self.tokens)

    def sample(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The sample at `index`, its caption drawn from `generator` (the first without one)."""
        with opening(f"the token cache {self.folder}", "is damaged; delete it to make it again", FileError):
            captions = json.loads(self.captions[self.starts[index] : self.starts[index + 1]].tobytes())
            caption = pick_caption(captions, f"{self.folder}: {index}", generator, self.caption_problem)
        return {"tokens": torch.from_numpy(self.tokens[index].astype(np.int64)), "caption": caption}


def cache_tokens(folder: str | os.PathLike, dataset: Data, vae: ImageTokenizer, *, batch_size: int = 32,
                 num_workers: int = 0, rank: int = 0, world_size: int = 1,
                 progress: Progress | None = None) -> TokenCache:  # fmt: skip
    """Opens the cache of a data set's tokens in `folder`, which is made first if it is not finished.

    Images are cropped to their centre square, whatever the data set's crops, and encoded on the device of `vae`.
    Several processes share the work, archive by archive, through a folder that all of them can see.

    `progress(done, total)` is called with the samples that this process has read and, where known, will read.
    Raises `FileError` if `folder` holds the tokens of another VAE or of other data or something else, or if over half
    of the samples cannot be used, and `UsageError` if another run is making the cache and has not finished in time.
    """
    if not isinstance(dataset, ImageTextFolder | ShardStream):
        raise FileError("--cache_tokens is for folders and archives, not for registered data sets")
    folder, parts = Path(folder), Path(folder) / "parts"
    vae_hash, state = vae.fingerprint(), data_fingerprint(dataset, contents=False)

    def make() -> None:
        _make_parts(parts, dataset, vae, batch_size, num_workers, rank, world_size, progress)

    if rank == 0:
        with locked(folder, "a token cache in the making", wait=WAIT):
            clear_leftovers(folder)
            clear_leftovers(parts)
            _claim(folder, vae_hash, state, dataset)
            if not (folder / "index.json").exists():
                make()
                _wait(parts, lambda: len(_finished(parts)[1]) == _unit_count(dataset))
                _join_parts(folder, dataset.left_out)
    else:  # the first process compares, and its answer is in the key
        _wait(parts, lambda: _read_key(folder).items() >= {"vae": vae_hash, "state": state}.items())
        if not (folder / "index.json").exists():
            make()
        _wait(parts, (folder / "index.json").exists)
    return TokenCache(folder, dataset.caption_problem)


def data_fingerprint(dataset: ImageTextFolder | ShardStream, contents: bool = True) -> str:
    """A hash of a data set's settings and of the names and contents of its files; without `contents`, of what tells in
    no time that they may have changed: sizes and times."""
    digest = hashlib.sha256()
    for part in dataset.identity():
        if isinstance(part, str):
            digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
        elif contents:
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            status = os.stat(part)
            digest.update(f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}".encode())
    return digest.hexdigest()


def _read_key(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "key.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _claim(folder: Path, vae_hash: str, state: str, dataset: ImageTextFolder | ShardStream) -> None:
    """Writes the key, or compares it with that of the cache already there.

    The data are only read where sizes or times of files are not those in the key.
    """
    found = _read_key(folder)
    if not found and any(path.name != LOCK_NAME for path in folder.iterdir()):
        raise FileError(f"{folder} is not empty and holds no token cache; choose another folder")
    if found and found.get("vae") != vae_hash:
        raise FileError(f"{folder} holds the image tokens of another VAE; choose another folder, or delete it")
    if found and found.get("version") != VERSION:
        raise FileError(f"{folder} was made by an earlier version, which did not look at contents; delete it to make "
                        "it again")  # fmt: skip
    if found.get("state") != state:
        data_hash = data_fingerprint(dataset)
        if found and found.get("data") != data_hash:
            raise FileError(f"{folder} holds the image tokens of other data; choose another folder, or delete it")
        key = {"version": VERSION, "vae": vae_hash, "data": data_hash, "state": state}
        write_text(folder / "key.json", json.dumps(key, indent=2) + "\n")


def _wait(parts: Path, done: Callable[[], bool]) -> None:
    """Polls: a barrier of torch.distributed times out after minutes, and this may take hours. Raises `FileError` when
    for `WAIT` seconds no process has finished another part."""
    seen, until = -1, 0.0
    while not done():
        count = len(list(parts.glob("*.npz")))
        if count != seen:
            seen, until = count, time.monotonic() + WAIT
        if time.monotonic() > until:
            raise FileError(f"{parts} has had no new image tokens for {WAIT / 60:.0f} minutes: the process that makes "
                            "them has ended or does not go on")  # fmt: skip
        time.sleep(0.2)


# Parts: units are archives, or ranges of a folder's images; each has one part for every PART_SIZE samples


def _unit_count(dataset: ImageTextFolder | ShardStream) -> int:
    return len(dataset.urls) if isinstance(dataset, ShardStream) else -(-len(dataset) // PART_SIZE)


def _unit(dataset: ImageTextFolder | ShardStream, unit: int) -> Iterator[Any]:
    """What there is to decode in a unit: raw samples of a stream, or indices."""
    if isinstance(dataset, ShardStream):
        return dataset.read_shard(dataset.urls[unit])
    return iter(range(len(dataset))[unit * PART_SIZE : (unit + 1) * PART_SIZE])


def _finished(parts: Path) -> tuple[Counter[int], set[int]]:
    """How many parts each unit has, and the units that have all of theirs."""
    found = [match for path in parts.glob("*.npz") if (match := re.fullmatch(r"(\d+)-\d+(-last)?\.npz", path.name))]
    return Counter(int(match[1]) for match in found), {int(match[1]) for match in found if match[2]}


class _Pieces(IterableDataset):
    """What is left to read of some units, each from its given part on. Workers share the units.

    Yields (unit, images (n, c, h, w) uint8, all captions of each, counts of samples, whether the unit ends) for up to
    `batch_size` samples of one part.
    """

    def __init__(self, dataset: Any, first_parts: dict[int, int], batch_size: int):
        self.dataset, self.first_parts, self.batch_size = dataset, first_parts, batch_size

    def __iter__(self) -> Iterator[tuple[int, Tensor, list[list[str]], Skipped, bool]]:
        worker, units = get_worker_info(), list(self.first_parts)
        for unit in units[worker.id :: worker.num_workers] if worker else units:
            position, ends = self.first_parts[unit] * PART_SIZE, False
            samples = islice(_unit(self.dataset, unit), position, None)
            sample = next(samples, None)
            while not ends:
                images, captions, skipped = [], [], Skipped()
                while sample is not None and skipped.read < min(self.batch_size, PART_SIZE - position % PART_SIZE):
                    skipped.read += 1
                    try:
                        found = self.dataset.all_captions(sample)
                        images.append(self.dataset.image(sample))
                        captions.append(found)
                    except BrokenSample as error:
                        skipped.add(error)
                    sample = next(samples, None)
                position, ends = position + skipped.read, sample is None
                yield unit, torch.stack(images) if images else torch.empty(0), captions, skipped, ends


def _make_parts(folder: Path, dataset: ImageTextFolder | ShardStream, vae: ImageTokenizer, batch_size: int,
                num_workers: int, rank: int, world_size: int, progress: Progress | None) -> None:  # fmt: skip
    """Writes this process's share of the parts that are missing."""
    counts, complete = _finished(folder)
    mine = range(rank, _unit_count(dataset), world_size)
    missing = {unit: counts[unit] for unit in mine if unit not in complete}
    loader = DataLoader(_Pieces(dataset, missing, batch_size), batch_size=None, num_workers=num_workers,
                        collate_fn=as_it_is, generator=torch.Generator())  # fmt: skip
    total, done = None, 0
    if isinstance(dataset, ImageTextFolder):
        sizes = {unit: min(PART_SIZE, len(dataset) - unit * PART_SIZE) for unit in mine}
        total = sum(sizes.values())
        done = total - sum(sizes[unit] for unit in missing)
    dtype = np.uint16 if vae.num_tokens <= 2**16 else np.int32
    everything, parts = Skipped(), {unit: ([], [], Skipped()) for unit in missing}
    for unit, images, captions, skipped, ends in loader:
        tokens, lines, skipped_in_part = parts[unit]
        if captions:
            with torch.no_grad():
                indices = vae.get_codebook_indices(images.to(vae.device).float() / 255)
            tokens.append(indices.cpu().numpy().astype(dtype))
        lines += [json.dumps(each, ensure_ascii=False) + "\n" for each in captions]
        skipped_in_part.update(skipped)
        if ends or skipped_in_part.read == PART_SIZE:
            _write_part(folder / f"{unit:06}-{counts[unit]:06}{'-last' if ends else ''}.npz", *parts[unit])
            counts[unit] += 1
            parts[unit] = [], [], Skipped()
        everything.update(skipped)
        everything.check()
        done += skipped.read
        if progress is not None:
            progress(done, total)


def _write_part(path: Path, tokens: list[np.ndarray], lines: list[str], skipped: Skipped) -> None:
    buffer = io.BytesIO()
    np.savez(
        buffer, tokens=np.concatenate(tokens) if tokens else np.zeros((0, 0), np.uint16),
        lines=np.frombuffer("".join(lines).encode(), np.uint8),
        skipped=np.frombuffer(json.dumps([skipped.reasons, skipped.examples]).encode(), np.uint8), read=skipped.read,
    )  # fmt: skip
    write_bytes(path, buffer.getvalue())


def _join_parts(folder: Path, left_out: Counter[str]) -> None:
    """Joins the finished parts to the cache's files, and removes them."""
    skipped, counts, dtype, seq_len = Skipped(), {}, np.dtype(np.uint16), 0
    for path in sorted((folder / "parts").glob("*.npz")):
        with np.load(path, allow_pickle=False) as part:
            skipped.update(Skipped(int(part["read"]), *json.loads(part["skipped"].tobytes())))
            if count := len(part["tokens"]):
                counts[path], dtype, seq_len = count, part["tokens"].dtype, part["tokens"].shape[1]
    skipped.check(enough=1)
    if not counts:
        raise FileError("the data have no usable sample")
    with (
        atomic_write(folder / "tokens.npy") as tokens_path,
        atomic_write(folder / "captions.jsonl") as captions_path,
        atomic_write(folder / "starts.npy") as starts_path,
    ):
        total, starts = sum(counts.values()), [np.zeros(1, np.int64)]
        with (
            open(tokens_path, "wb") as tokens,
            open(captions_path, "wb") as captions,
            open(starts_path, "wb") as starts_file,
        ):
            # Not memory-mapped, where a full disk ends the process.
            layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total, seq_len)}
            np.lib.format.write_array_header_1_0(tokens, layout)
            for path in counts:
                with np.load(path, allow_pickle=False) as part:
                    tokens.write(part["tokens"].tobytes())
                    lines = part["lines"]
                starts.append(captions.tell() + 1 + np.flatnonzero(lines == ord("\n")))
                captions.write(lines.tobytes())
            np.save(starts_file, np.concatenate(starts), allow_pickle=False)
    index = {"samples": total, "tokens_per_sample": seq_len, "skipped": skipped.reasons + left_out}
    write_text(folder / "index.json", json.dumps(index, indent=2) + "\n")
    for path in (folder / "parts").glob("*.npz"):
        path.unlink()
    with suppress(OSError):  # something else is in it
        (folder / "parts").rmdir()
