"""A full disk, one that is read-only, no home, a plain terminal, and two processes on one folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from faults.harness import Outcome, broken_files, finish, is_one_line, results, start
from faults.models import commands

SIZES = ("16k", "64k", "128k", "256k", "1m", "4m")  # of a disk


@contextmanager
def disk(folder: Path, options: str) -> Iterator[bool]:
    """A disk of its own mounted at `folder`; false where that is not allowed."""
    folder.mkdir(parents=True)
    mounted = os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def on_disks(models: Path, folder: Path) -> Iterator[Outcome]:
    for name, command in commands(models).items():
        for options in (*(f"size={size}" for size in SIZES), "ro"):
            work, log = folder / f"{name}-{options}", folder / "log"
            with disk(work, options) as mounted:
                if not mounted:
                    return
                outcome = finish(f"{name} on a disk of {options}", work, start(command, work, log), log)
                if outcome.code == 0 and options == "ro" and command[0] != "upscale":
                    outcome.faults.append("wrongly accepted")
                if broken_files(work):
                    outcome.faults.append("file half-written")
                yield outcome


def in_environments(models: Path, folder: Path) -> Iterator[Outcome]:
    environments = {"no HOME": {"HOME": None}, "HOME that cannot be": {"HOME": "/dev/null/x"},
                    "LC_ALL=C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                    "ASCII": {"PYTHONIOENCODING": "ascii:strict"}}  # fmt: skip
    command = [*commands(models)["generate"], "--text", "a réd seven|ein Stern ★"]
    for name, changes in environments.items():
        work = folder / name.replace(" ", "-").replace("=", "-")
        work.mkdir()
        environment = {key: value for key, value in (os.environ | changes).items() if value is not None}
        done = subprocess.run([sys.executable, "-m", "text_to_image", *command], cwd=work, env=environment,
                              capture_output=True)  # fmt: skip
        errors = done.stderr.decode("utf-8", "replace")
        outcome = Outcome(f"generate with {name}", done.returncode, errors)
        if done.returncode == 1:
            outcome.faults.append("traceback")
        elif done.returncode == 2 and not is_one_line(errors):
            outcome.faults.append("not one line")
        elif done.returncode == 0 and len(list(work.rglob("caption.txt"))) != 2:
            outcome.faults.append("work lost or done twice")
        yield outcome


def side_by_side(models: Path, folder: Path) -> Iterator[Outcome]:
    """The same command twice at once in one folder: one may be refused, and together they make what one makes."""
    for name, command in commands(models).items():
        alone, work = folder / f"{name}-alone", folder / f"{name}-two"
        for each in (alone, work):
            each.mkdir(parents=True)
        finish(name, alone, start(command, alone, folder / "log"), folder / "log")
        logs = [folder / f"log-{number}" for number in range(2)]
        pids = [start(command, work, log) for log in logs]
        outcomes = [finish(f"two of {name}", work, pid, log) for pid, log in zip(pids, logs, strict=True)]
        if all(outcome.code for outcome in outcomes) or results(work) != results(alone):
            outcomes[0].faults.append("work lost or done twice")
        if broken_files(work):
            outcomes[0].faults.append("file half-written")
        yield from outcomes


def run(models: Path, folder: Path, count: int, rng: np.random.Generator) -> list[Outcome]:
    folder.mkdir(parents=True)
    outcomes = [*on_disks(models, folder / "disks"), *side_by_side(models, folder / "pairs")]
    outcomes += in_environments(models, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return outcomes
