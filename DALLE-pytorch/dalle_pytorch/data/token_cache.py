"""Image tokens computed once, so that a prior is trained without running its VAE at every step.

A cache is a folder of `tokens.npy` (n, tokens per image), `captions.jsonl` with all captions of each image,
`starts.npy` with the byte offset of each line of that, `key.json` with fingerprints of the VAE and of the data,
and `index.json`, which is written last. While it is being made, `parts/` holds what is finished.
"""

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


def cache_tokens(folder: str | os.PathLike, dataset: Data, vae: ImageTokenizer, *, batch_size: int = 32,
                 num_workers: int = 0, rank: int = 0, world_size: int = 1,
                 progress: Progress | None = None) -> TokenCache:  # fmt: skip
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
    skipped, counts, dtype, seq_len = Skipped(), {}, None, 0
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
        tokens = np.lib.format.open_memmap(tokens_path, "w+", dtype, (sum(counts.values()), seq_len))
        first, starts = 0, [np.zeros(1, np.int64)]
        with open(captions_path, "wb") as captions, open(starts_path, "wb") as starts_file:
            for path, count in counts.items():
                with np.load(path, allow_pickle=False) as part:
                    tokens[first : first + count], lines = part["tokens"], part["lines"]
                first += count
                starts.append(captions.tell() + 1 + np.flatnonzero(lines == ord("\n")))
                captions.write(lines.tobytes())
            np.save(starts_file, np.concatenate(starts), allow_pickle=False)
        tokens.flush()
    index = {"samples": first, "tokens_per_sample": seq_len, "skipped": skipped.reasons + left_out}
    write_text(folder / "index.json", json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder / "parts")
