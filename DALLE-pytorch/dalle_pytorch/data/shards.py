"""WebDataset shards: tar archives of images and captions, streamed from a disk, the web or a command."""

import functools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from torch import Tensor
from webdataset.shardlists import expand_urls
from webdataset.tariterators import url_opener

from dalle_pytorch.data.loading import BrokenSample, SampleStream
from dalle_pytorch.data.samples import CaptionProblem, load_image, pick_caption, read_captions, usable_captions
from dalle_pytorch.errors import FileError

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")

LARGEST_FILE = 2**28  # bytes of an image or a caption
LARGEST_WAIT = 2**29  # bytes of samples that are not complete yet, of one archive
_FIRST_DOT = re.compile(r"\.[^/]*$")

# The files of a sample by suffix, with its `__key__` and `__url__`; or what is wrong with an archive.
RawSample = dict[str, Any] | BrokenSample


class ShardStream(SampleStream):
    """An endless stream of the samples of WebDataset shards, shuffled in each epoch.

    Samples are dicts of `image` (3, resolution, resolution) uint8 and `caption`. A `BatchLoader` uses several readers
    (processes × workers). Each has its own shards, or with fewer shards than readers its own samples of all.

    Args:
        urls, commands: archives, or a folder of them, as `list_shards` takes them.
        resolution, crop_ratio, transparent, caption_problem: as in `ImageTextFolder`.
        image_suffix: suffix of the images in the archives, or several (`jpg;png`).
        caption_suffix: suffix of the captions, one a line, or of JSON files (`json`); None reads images alone.
        caption_key: the field of a JSON caption, a text or a list of them.
        shuffle_buffer: undecoded samples to draw from at random; 0 keeps their order.
    """

    def __init__(self, urls: str | os.PathLike, resolution: int, *, image_suffix: str = "jpg",
                 caption_suffix: str | None = "txt", caption_key: str = "caption", crop_ratio: float = 1.0,
                 transparent: bool = False, caption_problem: CaptionProblem | None = None,
                 shuffle_buffer: int = 1000, commands: bool = True):  # fmt: skip
        self.urls, self.resolution, self.caption_key = list_shards(urls, commands), resolution, caption_key
        self.image_suffixes = image_suffix.split(";")
        self.caption_suffixes = caption_suffix.split(";") if caption_suffix else []
        # The longest first: of "0001.seg.png" the suffix is "seg.png", if that is one of them.
        self.suffixes = sorted((*self.image_suffixes, *self.caption_suffixes), key=len, reverse=True)
        self.crop_ratio, self.transparent, self.caption_problem = crop_ratio, transparent, caption_problem
        self.shuffle_buffer = shuffle_buffer

    def raw_samples(self, seed: int, epoch: int, reader: int, readers: int) -> Iterator[RawSample]:
        """What `reader` of `readers` reads in an epoch, not decoded. Readers share no sample."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.urls))
        if len(order) >= readers:
            samples = (sample for shard in order[reader::readers] for sample in self.read_shard(self.urls[shard]))
        else:
            everything = (sample for shard in order for sample in self.read_shard(self.urls[shard]))
            samples = (sample for number, sample in enumerate(everything) if number % readers == reader)
        return _shuffle(samples, self.shuffle_buffer, np.random.default_rng([seed, epoch, reader]))

    def read_shard(self, url: str) -> Iterator[RawSample]:
        """The samples of one archive in order, followed by a `BrokenSample` if it is damaged, or has none.

        The files of a sample need not be adjacent: up to `LARGEST_WAIT` bytes of incomplete samples are kept.
        """
        problems: list[BrokenSample] = []
        others: Counter[str] = Counter()
        waiting: dict[str, dict[str, Any]] = {}
        complete: set[str] = set()
        held, last = 0, ""
        for key, suffix, data in self._members(url, problems, others):
            if last in waiting and (key != last or suffix in waiting[last]) and self._is_complete(waiting[last]):
                held -= _size(waiting[last])
                complete.add(last)
                yield waiting.pop(last)
            waiting.setdefault(key, {"__key__": key, "__url__": url})[suffix] = data
            held, last = held + len(data), key
            while held > LARGEST_WAIT and len(waiting) > 1:
                sample = waiting.pop(next(iter(waiting)))
                held -= _size(sample)
                yield BrokenSample("files of one sample far apart", _name(sample), "sort the archive by name")
        if not (waiting or complete or problems):
            found = f"its files are {', '.join(others)}" if others else "it is empty"
            yield BrokenSample(f"no {' or '.join(self.image_suffixes)} in the archive", url, found)
        for key, sample in waiting.items():
            stem = _FIRST_DOT.sub("", key)
            # Without a partner it may only be another file of a complete sample, as `0001.mask.png` is.
            if self._is_complete(sample) or stem == key or stem not in complete:
                yield sample
        yield from problems[:1]

    def _members(
        self, url: str, problems: list[BrokenSample], others: Counter[str]
    ) -> Iterator[tuple[str, str, bytes]]:
        """The key, suffix and content of the files that belong to samples; the suffixes of others are counted."""
        note = functools.partial(_note_problem, problems, url)
        for source in url_opener([{"url": url}], handler=note):
            try:
                with tarfile.open(fileobj=source["stream"], mode="r|*") as archive:
                    for member in filter(tarfile.TarInfo.isreg, archive):
                        if (split := self._split(member.name)) is None:
                            others[os.path.splitext(member.name)[1].lower() or "without a suffix"] += 1
                        elif member.size > LARGEST_FILE:
                            raise ValueError(f"{member.name} has over {LARGEST_FILE >> 20} MiB")
                        else:
                            file = archive.extractfile(member)
                            assert file is not None
                            yield *split, file.read()
                        archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            except Exception as error:
                note(error)

    def _split(self, name: str) -> tuple[str, str] | None:
        """The key and suffix of a file, None for one that is hidden or belongs to no sample. A key may have dots."""
        for suffix in self.suffixes:
            key = name[: -len(suffix) - 1]
            if name.lower().endswith(f".{suffix}") and not os.path.basename(name).startswith("."):
                return key, suffix
        return None

    def _is_complete(self, sample: dict[str, Any]) -> bool:
        groups = (self.image_suffixes, self.caption_suffixes)
        return all(not suffixes or any(suffix in sample for suffix in suffixes) for suffixes in groups)

    def decode(self, raw: RawSample, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The sample of a raw one, its crop and caption drawn from `generator` (without: centre, first caption).

        Raises `BrokenSample` if its image or its caption is missing or cannot be used.
        """
        item = {}
        if self.caption_suffixes:
            item["caption"] = pick_caption(self.all_captions(raw), _name(raw), generator, self.caption_problem)
        return {"image": self.image(raw, generator), **item}

    def image(self, raw: RawSample, generator: np.random.Generator | None = None) -> Tensor:
        """The image of a raw sample, as `load_image` returns it."""
        _, data = _member(raw, self.image_suffixes)
        return load_image(data, _name(raw), self.resolution, self.crop_ratio, generator, self.transparent)

    def all_captions(self, raw: RawSample) -> list[str]:
        """All captions of a raw sample. Raises `BrokenSample` if there is none."""
        suffix, data = _member(raw, self.caption_suffixes)
        if suffix.split(".")[-1] != "json":
            return read_captions(data, _name(raw))
        try:
            found = json.loads(data)[self.caption_key]
        except KeyError:
            raise BrokenSample(f"JSON without {self.caption_key!r}", _name(raw), "--caption_key names it") from None
        except (ValueError, TypeError, RecursionError):
            raise BrokenSample("broken JSON", _name(raw)) from None
        captions = found if isinstance(found, list) else [found]
        return usable_captions([caption for caption in captions if isinstance(caption, str)], _name(raw))

    def identity(self) -> Iterator[str | Path]:
        """What identifies the data: settings, names and, where they are local files, the archives."""
        yield f"shards {self.resolution} {self.transparent} {self.caption_key}"
        yield from (*self.image_suffixes, "", *self.caption_suffixes, "")
        for url in self.urls:
            path = local_path(url)
            if path is not None and os.path.exists(path):
                yield os.path.basename(path)
                yield Path(path)
            else:
                yield url


def list_shards(urls: str | os.PathLike, commands: bool = True) -> list[str]:
    """The archives named by `data-{000000..000554}.tar`, by several such names with `::` between them, or by a folder.

    A name is a path, an address (http, https, or another that webdataset opens) or, with `commands`, `pipe:COMMAND`,
    whose output is an archive. What is found in a folder or on the disk is a path, whatever its name looks like.
    Raises `FileError` if there is no such folder or none of the files, and for a command without `commands`.
    """
    if os.path.isdir(urls):
        folder = Path(urls)
        found = sorted(os.path.abspath(path) for path in folder.rglob("*") if path.name.endswith(ARCHIVE_SUFFIXES))
        if not found:
            raise FileError(f"{folder} holds no archives ({', '.join(ARCHIVE_SUFFIXES)}); without --wds it is read as "
                            "a folder of images")  # fmt: skip
        return found
    if os.path.exists(urls):
        return [os.path.abspath(urls)]
    try:
        names = expand_urls(str(urls))
        paths = [path for path in map(local_path, names) if path is not None]
    except (ValueError, AssertionError) as error:
        raise FileError(f"{urls} does not name archives: {error}") from None
    if not commands and (command := next(filter(_is_command, names), None)):
        raise FileError(f"{command!r} runs a command: it is taken from the command line alone, not from a file")
    if len(paths) == len(names) and not any(os.path.exists(path) for path in paths):
        raise FileError(f"there is no archive {paths[0]}" + (f", nor any of {len(paths)}" if len(paths) > 1 else ""))
    return names


def _is_command(url: str) -> bool:
    return urlparse(url).scheme == "pipe"


def local_path(url: str) -> str | None:
    """The path of a shard that is a local file, else None."""
    parts = urlparse(url)
    return {"": url, "file": parts.path}.get(parts.scheme)


def _note_problem(problems: list[BrokenSample], url: str, error: Exception) -> bool:
    """Notes what a damaged or missing archive raises; a handler for webdataset."""
    detail = error.strerror if isinstance(error, OSError) else None
    detail = detail or str(error.args[0] if error.args else error).split(" @ ")[0]
    if ended := re.search(r": exit (\d+) \(", detail):  # webdataset adds the whole command
        detail = f"the command ended with exit code {ended[1]}"
    problems.append(BrokenSample("damaged archive", url, detail))
    return True


def _size(sample: dict[str, Any]) -> int:
    return sum(len(data) for data in sample.values() if isinstance(data, bytes))


def _name(raw: RawSample) -> str:
    return str(raw) if isinstance(raw, BrokenSample) else f"{raw['__url__']}: {raw['__key__']}"


def _member(raw: RawSample, suffixes: list[str]) -> tuple[str, bytes]:
    if isinstance(raw, BrokenSample):
        raise raw
    for suffix in suffixes:
        if suffix in raw:
            return suffix, raw[suffix]
    raise BrokenSample(f"no {' or '.join(suffixes)}", _name(raw))


def _shuffle(samples: Iterator[RawSample], size: int, generator: np.random.Generator) -> Iterator[RawSample]:
    """Swaps each sample with a random one of `size` that wait."""
    waiting: list[RawSample] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        if size:
            place = int(generator.integers(size))
            sample, waiting[place] = waiting[place], sample
        yield sample
    for place in generator.permutation(len(waiting)):
        yield waiting[place]
