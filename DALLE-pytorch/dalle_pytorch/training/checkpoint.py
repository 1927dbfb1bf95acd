"""The checkpoints of a run: folders that are whole or not there, of which the newest few are kept.

A checkpoint is built under a temporary name and gets its own when everything is on the disk, with a manifest of sizes
and checksums by which a damaged checkpoint is told from one of something else.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.lock import locked
from dalle_pytorch.training.state import RunState

FOLDER_NAME = "checkpoints"
MANIFEST_NAME = "manifest.json"
EARLIER_NAME = "checkpoint.pt"  # what earlier versions wrote

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in `output_dir`, of which the newest `keep` stay. All processes call the methods together."""

    def __init__(self, output_dir: Path, keep: int, accelerator: Accelerator):
        self.output_dir, self.folder = Path(output_dir), Path(output_dir) / FOLDER_NAME
        self.keep, self.accelerator = keep, accelerator

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole, or None if there has been none; warns of damaged ones.

        Raises `CheckpointError` if all are damaged, or there is only the file of an earlier version.
        """
        return self._decide(self._newest)

    def start_anew(self, overwrite: bool) -> None:
        """Deletes all checkpoints if `overwrite`; otherwise raises `UsageError` if there are any."""

        def clear() -> None:
            steps = self._steps()
            if steps and not overwrite:
                raise UsageError(f"{self.folder} holds checkpoints up to step {max(steps)}: leave out --no-resume to "
                                 "resume from there, or add --overwrite to delete them")  # fmt: skip
            self._clear_leftovers()
            for step in steps:
                shutil.rmtree(self.folder / f"step-{step:08}", ignore_errors=True)

        self._decide(clear)

    def lock(self, held: contextlib.ExitStack) -> None:
        """Keeps other trainings out of `output_dir` until `held` is closed. Raises `UsageError` if there is one."""
        self._decide(lambda: held.enter_context(locked(self.output_dir, "a training")))

    def save(self, state: RunState) -> None:
        """Writes `state` as the checkpoint of its step, and then deletes the oldest."""
        path = self.folder / f"step-{state.progress.step:08}"
        building = path.with_name(f".{path.name}.tmp")
        if self.accelerator.is_main_process:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            state.save(building)
            self.accelerator.wait_for_everyone()
            self._finish(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _finish(self, building: Path, path: Path) -> None:
        if self.accelerator.is_main_process:
            files = sorted(file for file in building.rglob("*") if file.is_file())
            manifest = {str(file.relative_to(building)): _measure(file) for file in files}
            (building / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1), "utf-8")
            for file in (*files, building / MANIFEST_NAME):
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            shutil.rmtree(path, ignore_errors=True)  # one that was found damaged
            building.rename(path)
            for step in sorted(self._steps())[: -self.keep]:
                # One that is half deleted no longer has the name of a checkpoint.
                name = f"step-{step:08}"
                shutil.rmtree((self.folder / name).rename(self.folder / f".{name}.tmp"), ignore_errors=True)

    def _clear_leftovers(self) -> None:
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _steps(self) -> list[int]:
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return [int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name))]

    def _newest(self) -> Path | None:
        self._clear_leftovers()
        damaged = []
        for step in sorted(self._steps(), reverse=True):
            path = self.folder / f"step-{step:08}"
            problem = _problem(path)
            if problem is None:
                for line in damaged:
                    logger.warning("%s; resuming from step %d", line, step)
                return path
            damaged.append(f"{path} is damaged ({problem})")
        if damaged:
            raise CheckpointError(f"{damaged[0]}, and there is no older one; move {self.folder} away to start anew")
        if (self.output_dir / EARLIER_NAME).exists():
            raise CheckpointError(f"{self.output_dir / EARLIER_NAME} is a checkpoint of an earlier version, which "
                                  "cannot be resumed from; move it away to start anew, or choose another "
                                  "--output_dir")  # fmt: skip
        return None

    def _decide(self, decide: Callable[[], T]) -> T:
        """What `decide` returns or raises in the main process, the only one to look, in all of them."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [decide()]
            except (CheckpointError, UsageError, OSError) as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def _measure(path: Path) -> list[int]:
    """The size of a file, and its checksum."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything is."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text("utf-8"))
        for name, measure in manifest.items():
            if _measure(folder / name) != measure:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return str(error).splitlines()[0]
    return None
