"""Rows of a list of prompts, as a stream: text, CSV, JSON lines, Parquet, WebDataset shards, local or fsspec's.

A list from elsewhere is data. Addresses are honoured where the user typed them, never in a row.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

from webdataset.shardlists import expand_urls

from dalle_pytorch.data.shards import ARCHIVE_SUFFIXES
from dalle_pytorch.errors import FileError, UsageError, as_message, shorten
from dalle_pytorch.files.boundary import opening, reason
from text_to_image.batch.settings import COLUMNS

SUFFIXES = (".txt", ".csv", ".jsonl", ".ndjson", ".parquet", *ARCHIVE_SUFFIXES)
PROMPT_NAMES = ("prompt", "caption", "text", "txt")  # of the column, unless told
LONGEST_LINE = 2**20  # characters
LARGEST_MEMBER = 2**20  # bytes of a caption in an archive
INSTALL = "pip install 'dalle-diffusion[batch]'"
LONGEST_PLACE = 200  # characters
CHUNK = 2**20


@dataclass(frozen=True)
class Row:
    """A row: where it is, and its values by name of column, those without a value left out."""

    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why; with the beginning of what it holds."""

    place: str
    reason: str
    text: str = ""


def is_address(name: str) -> bool:
    return "://" in name


def open_address(address: str) -> Any:
    """A binary file, seekable, at a path or an fsspec address. Raises `UsageError` without the package it needs."""
    if not is_address(address):
        return open(address, "rb")
    return _fsspec().open(address, "rb").open()


def _fsspec() -> Any:
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"addresses are opened by fsspec, which is missing: {INSTALL}") from None
    return fsspec


def list_files(source: str) -> list[str]:
    """The files of a list: a path, an address, a folder, or several with `*` or `{000..099}`.

    Raises `FileError` if there is none, and for kinds that are not read.
    """
    if os.path.isfile(source):
        files = [source]
    elif os.path.isdir(source):
        files = sorted(os.path.join(source, name) for name in os.listdir(source) if name.endswith(SUFFIXES))
        if not files:
            raise FileError(f"{source} holds no list of prompts ({', '.join(SUFFIXES)})")
    else:
        with opening(source, "does not name files", FileError):
            files = [file for name in expand_urls(source) for file in _glob(name)]
        if missing := [file for file in files if not is_address(file) and not os.path.exists(file)]:
            raise FileError(f"there is no list of prompts {missing[0]}")
        if not files:
            raise FileError(f"there is no list of prompts {source}")
    for file in files:
        if not file.lower().endswith(SUFFIXES):
            raise FileError(f"{file} is no list of prompts; expected one of {', '.join(SUFFIXES)}")
        if file.lower().endswith(".parquet"):
            _parquet()
    return files


def _glob(name: str) -> list[str]:
    if "*" not in name:
        return [name]
    if not is_address(name):
        return sorted(glob.glob(name))
    system, path = _fsspec().core.url_to_fs(name)
    return sorted(map(system.unstrip_protocol, system.glob(path)))


def digest(files: Iterable[str]) -> str:
    """A hash of the content of files, one after the other."""
    total = hashlib.sha256()
    for name in files:
        with opening(name, "cannot be read", FileError), open_address(name) as file:
            while data := file.read(CHUNK):
                total.update(data)
    return total.hexdigest()


def read_rows(files: list[str], columns: Mapping[str, str]) -> Iterator[Row | BadRow]:
    """The rows of a list, in order, a few at a time.

    `columns` has the names that columns of `COLUMNS` have in it, where they are others. Raises `FileError` for a file
    that cannot be read, and `UsageError` for one without a column of prompts.
    """
    readers = {".txt": _text, ".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet_rows}
    for name in files:
        before = f"{os.path.basename(name)}, " if len(files) > 1 else ""
        read = readers.get(os.path.splitext(name.lower())[1], _archive)
        wanted = {*COLUMNS, *PROMPT_NAMES, *columns.values()}
        for place, values in _opened(name, read, wanted):
            place = as_message(before + place, LONGEST_PLACE)
            yield BadRow(place, values) if isinstance(values, str) else _named(name, place, values, columns)


Raw = tuple[str, dict[str, Any] | str]  # a place; and values by column, or what is wrong with it


def _opened(name: str, read: Callable[..., Iterator[Raw]], wanted: set[str]) -> Iterator[Raw]:
    """What `read` reads; whatever fails meanwhile is a refusal of the file. `wanted` are the columns to read."""
    with opening(name, "cannot be read", FileError), open_address(name) as file:
        try:
            yield from read(file, wanted) if read is _parquet_rows else read(file)
        except UsageError as error:
            raise FileError(f"{name}: {error}") from None


def _named(file: str, place: str, values: Mapping[str, Any], columns: Mapping[str, str]) -> Row | BadRow:
    """A row by our names of its columns. Raises `UsageError` if there is no prompt column."""
    wanted = {name: columns.get(name, name) for name in COLUMNS}
    if "prompt" not in columns:
        wanted["prompt"] = next((name for name in PROMPT_NAMES if name in values), "prompt")
    if missing := [name for name in ("prompt", *columns) if wanted[name] not in values]:
        if file.lower().endswith((".csv", ".parquet")):  # all rows have the same columns
            found = shorten(", ".join(map(str, values)), 200)
            raise UsageError(f"{file} has no column {wanted[missing[0]]}, only {found}; --columns {missing[0]}=NAME "
                             "names it")  # fmt: skip
        return BadRow(place, f"no {wanted[missing[0]]}", shorten(values, 100))
    found = {name: values[column] for name, column in wanted.items() if column in values}
    if broken := next((name for name, value in found.items() if isinstance(value, str) and not _is_utf8(value)), None):
        return BadRow(place, f"{broken} is not UTF-8", shorten(repr(found[broken]), 100))
    return Row(place, {name: value for name, value in found.items() if value is not None and value != ""})


def _is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes that are not UTF-8 were read as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# Formats


def _decoded(file: BinaryIO) -> io.TextIOWrapper:
    """UTF-8, or UTF-16 and UTF-32 with a byte order mark. Bytes that are neither become surrogates."""
    mark = file.read(4)
    file.seek(0)
    wide = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32"}.get(mark)
    encoding = wide or ("utf-16" if mark[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    return io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")


def _lines(file: BinaryIO) -> Iterator[str | None]:
    """The lines of a text, None for one that is longer than any prompt."""
    text = _decoded(file)
    while line := text.readline(LONGEST_LINE):
        if len(line) < LONGEST_LINE or line.endswith("\n"):
            yield line
            continue
        while line and not line.endswith("\n"):
            line = text.readline(LONGEST_LINE)
        yield None


def _text(file: BinaryIO) -> Iterator[Raw]:
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield f"line {number}", "too long"
        elif line.strip("\ufeff \t\r\n"):
            yield f"line {number}", {"prompt": line}


def _csv(file: BinaryIO) -> Iterator[Raw]:
    def lines() -> Iterator[str]:
        for line in _lines(file):
            if line is None:
                raise FileError(f"line {reader.line_num + 1} is longer than {LONGEST_LINE} characters")
            yield line

    reader = csv.reader(lines())
    names = [name.strip() for name in next(reader, [])]
    if len(set(names)) < len(names):
        raise UsageError(f"its first line names a column twice: {shorten(', '.join(names), 200)}")
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"line {first}", f"broken CSV ({reason(error)})"
            continue
        if len(cells) > len(names):
            yield f"line {first}", f"{len(cells)} values, and there are {len(names)} columns"
        elif cells:
            yield f"line {first}", dict.fromkeys(names, "") | dict(zip(names, cells, strict=False))


def _jsonl(file: BinaryIO) -> Iterator[Raw]:
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            yield f"line {number}", "too long"
        elif line.strip("\ufeff \t\r\n"):
            yield f"line {number}", _json(line)


def _json(text: str) -> dict[str, Any] | str:
    """A JSON object, or a JSON text, which is a prompt; or what is wrong with it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"broken JSON ({reason(error)})"
    if isinstance(value, str):
        return {"prompt": value}
    return value if isinstance(value, dict) else "expected a JSON object"


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"lists in .parquet are read by pyarrow, which is missing: {INSTALL}") from None
    return pyarrow.parquet


def _parquet_rows(file: BinaryIO, wanted: set[str]) -> Iterator[Raw]:
    number, table = 0, _parquet().ParquetFile(file)
    names = dict.fromkeys(table.schema_arrow.names)
    for batch in table.iter_batches(batch_size=1024, columns=[name for name in names if name in wanted]):
        for values in batch.to_pylist():
            number += 1
            yield f"row {number}", {**names, **values}


def _archive(file: BinaryIO) -> Iterator[Raw]:
    """The samples of a WebDataset shard: a caption, KEY.txt, or columns, KEY.json."""

    def members() -> Iterator[tuple[str, str, bytes | None]]:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        # tarfile's own way to unpack a stream takes the square of its time, and memory, where little stands for much.
        plain = gzip.GzipFile(fileobj=file) if compressed else file
        with tarfile.open(fileobj=plain, mode="r|") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if member.isreg() and stem and suffix.lower() in ("txt", "json"):
                    content = archive.extractfile(member)
                    small = content is not None and member.size <= LARGEST_MEMBER
                    yield f"{folder}/{stem}".lstrip("/"), suffix.lower(), content.read() if content and small else None
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  they would be kept

    for key, files in groupby(members(), key=lambda member: member[0]):
        values: dict[str, Any] | str = {"key": key}
        for _, suffix, data in files:
            text = "" if data is None else data.decode("utf-8-sig", "surrogateescape")
            found = "too long" if data is None else {"txt": text} if suffix == "txt" else _json(text)
            if isinstance(found, str) or isinstance(values, str):
                values = found if isinstance(found, str) else values
            else:
                values |= found
        yield key, values
