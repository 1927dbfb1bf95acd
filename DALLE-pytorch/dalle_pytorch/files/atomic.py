"""Atomic writes: a file or folder is replaced as a whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block ends without an error.

    The block may create a file or a folder there. On an error that is removed, and `path` stays unchanged. The rename
    of a file is atomic; a folder is replaced by moving the old one aside, see `restore`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    restore(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:64]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    temporary.unlink()
    try:
        yield temporary
        if temporary.is_dir():
            _sync(*temporary.rglob("*"))
            if path.exists():
                aside = temporary.with_suffix(".old")
                path.rename(aside)
                temporary.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
                return
        else:
            _sync(temporary)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def restore(path: str | os.PathLike) -> None:
    """Puts back the folder that an `atomic_write`, killed between its two renames, had moved aside."""
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        name = re.compile(re.escape(f".{path.name[:64]}.") + r"\w{8}\.old")
        for aside in filter(lambda other: name.fullmatch(other.name), path.parent.iterdir()):
            aside.rename(path)
            return


def clear_leftovers(folder: str | os.PathLike) -> None:
    """Deletes the files that killed writes left half written in `folder`, where no other process is writing."""
    for path in Path(folder).iterdir() if os.path.isdir(folder) else ():
        if re.fullmatch(r"\..+\.\w{8}\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _sync(*paths: Path) -> None:
    """Flushes files to disk, so that a full disk raises here."""
    for path in paths:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    write_bytes(path, text.encode("utf-8"))
