"""One process at a time in a folder."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dalle_pytorch.errors import UsageError

LOCK_NAME = ".dalle.lock"
SILENT_WAIT = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: str | os.PathLike, work: str, wait: float | None = None) -> Iterator[None]:
    """Holds the lock of `folder`, which is made if it is not there; a killed process loses its locks.

    Raises `UsageError`, which names the `work` that the lock is for, if another holds it for `wait` (5) more seconds.
    """
    wait = SILENT_WAIT if wait is None else wait
    path = Path(folder) / LOCK_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=min(wait, SILENT_WAIT), poll_interval=0.1)
        except Timeout:
            if wait > SILENT_WAIT:
                logger.warning("waiting: another process has %s in %s", work, folder)
            lock.acquire(timeout=max(0, wait - SILENT_WAIT), poll_interval=0.1)
    except Timeout:
        raise UsageError(f"{folder} is in use: another process has {work} in it; wait for that to end, or choose "
                         "another folder") from None  # fmt: skip
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is released: who waits for it then makes a new one
        lock.release()
