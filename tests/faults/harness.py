"""Runs one case after another, each in a forked process of its own, and says how each ended."""

import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

MEMORY = 2 * 2**30  # bytes that a case may use beyond what was there before it
SECONDS = 20  # of processor time
WALL_SECONDS = 180  # until it is killed, on a machine that does other things too
LONGEST_LINE = 400  # characters of a refusal, with what the command writes before and after the message
CANARY = "ran"  # the file that code inside a hostile file writes
FAULTS = ("traceback", "code run", "memory over bound", "time over bound", "killed", "not one line",
          "wrongly accepted", "file half-written", "work lost or done twice")  # fmt: skip


@dataclass
class Case:
    """A command line, run in an empty folder that `prepare` fills.

    `must_refuse` is for what must not be accepted; other cases may as well succeed.
    """

    name: str
    command: list[str]
    prepare: Callable[[Path], object] = lambda folder: None
    must_refuse: bool = False


@dataclass
class Outcome:
    """How a case ended: `code` is its exit code, negative the signal that ended it."""

    case: str
    code: int
    errors: str  # what it wrote to stderr
    seconds: float = 0.0
    memory: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        if self.faults:
            return self.faults[0]
        return "accepted" if self.code == 0 else "refused in one line" if self.code > 0 else "ended by the signal"


def run_command(command: list[str]) -> int:
    """The exit code of `dalle COMMAND …` in this forked process; a bug's traceback is printed, its exit code is 1."""
    from dalle_pytorch.cli import run
    from text_to_image.__main__ import dispatch

    torch.set_num_threads(1)  # threads are not forked: OpenMP would wait for those that it began before
    tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and one that is killed may hold it
    sys.argv = ["dalle", *command]
    try:
        run(dispatch, command)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(command: list[str], folder: Path, log: Path, fresh: bool = False) -> int:
    """Forks a process that runs the command in `folder`, and returns its id. What it prints goes to `log`.out/.err.
    A `fresh` one is a new interpreter, which has imported nothing yet."""
    for stream, suffix in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        stream.flush()
        log.with_suffix(suffix).write_bytes(b"")
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, suffix in ((1, ".out"), (2, ".err")):
            file = os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", "text_to_image", *command])
        # Beyond this a fault would take the machine with it; some room, so that it is seen as one.
        resource.setrlimit(resource.RLIMIT_AS, (_statm()[0] + 2 * MEMORY, resource.RLIM_INFINITY))
        code = run_command(command)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _statm() -> list[int]:
    """This process's address space, what of it is in memory, and what of that is shared, in bytes (man 5 proc)."""
    pages = Path("/proc/self/statm").read_text().split()[:3]
    return [int(number) * os.sysconf("SC_PAGE_SIZE") for number in pages]


def wait(pid: int, seconds: float = WALL_SECONDS) -> tuple[int, resource.struct_rusage, bool]:
    """Waits for a process, and kills it and its children after `seconds`. Returns its exit code, what it used, and
    whether it was killed so."""
    deadline, late = time.monotonic() + seconds, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage, late
        if time.monotonic() > deadline and not late:
            late = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)


def finish(name: str, folder: Path, pid: int, log: Path, ended: int | None = None) -> Outcome:
    """Waits for a process that `start` began in `folder`, and looks for faults. `ended` is the signal sent to it."""
    _, resident, shared = _statm()  # a forked process begins with what is not shared
    code, usage, late = wait(pid)
    errors = log.with_suffix(".err").read_text("utf-8", "replace")
    seconds, memory = usage.ru_utime + usage.ru_stime, max(0, usage.ru_maxrss * 1024 - (resident - shared))
    outcome = Outcome(name, code, errors, seconds, memory)
    outcome.faults = [name for name, found in (
        ("code run", any(folder.rglob(CANARY))),
        ("time over bound", seconds > SECONDS or late),
        ("memory over bound", memory > MEMORY),
        ("traceback", code == 1 or "Traceback (most recent call last)" in errors),
        ("killed", code < 0 and not late and -code != ended),
        ("not one line", code == 2 and not is_one_line(errors)),
    ) if found]  # fmt: skip
    return outcome


def run_case(case: Case, folder: Path) -> Outcome:
    """Runs a case in `folder`, which is made anew."""
    folder.mkdir(parents=True)
    case.prepare(folder)
    log = folder.parent / f"{folder.name}-log"
    outcome = finish(case.name, folder, start(case.command, folder, log), log)
    if outcome.code == 0 and case.must_refuse:
        outcome.faults.append("wrongly accepted")
    return outcome


def broken_files(folder: Path) -> list[str]:
    """The results in a folder that cannot be read."""
    import numpy as np
    from PIL import Image
    from safetensors.numpy import load_file

    readers: dict[str, Callable[[Path], object]] = {
        ".png": lambda path: Image.open(path).load(), ".npy": lambda path: np.load(path, allow_pickle=False),
        ".safetensors": load_file, ".json": lambda path: json.loads(path.read_text("utf-8")),
    }  # fmt: skip
    broken = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in readers and path.is_file():
            try:
                readers[path.suffix](path)
            except Exception as error:
                broken.append(f"{path.relative_to(folder)}: {error}")
    return broken


def results(folder: Path) -> dict[str, bytes]:
    """What a command has made: the files that must be the same however often it was interrupted."""
    kept = (".png", ".npy", ".txt", ".safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.suffix in kept and path.is_file() and not {"checkpoints", "samples"} & {*path.parts}}  # fmt: skip


def is_one_line(errors: str) -> bool:
    """Whether what a refusal prints is one line, of printable characters and not too long. Warnings may come before."""
    *before, last = errors.rstrip("\n").split("\n")
    before = [line for line in before if not re.search(r"\d+%\||it/s|warning", line, re.IGNORECASE) and line.strip()]
    return not before and 0 < len(last) <= LONGEST_LINE and last.isprintable()


def import_all(models: Path, names: Sequence[str] = ()) -> None:
    """Imports what the commands (`names` of them, or all) import, so that a forked case need not: each is run once,
    and its modules are told."""
    import tempfile
    from importlib import import_module

    from faults.models import commands

    all_commands = commands(models)
    for name in names or all_commands:
        command = all_commands[name]
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "modules.json"
            pid = os.fork()
            if not pid:
                os.chdir(folder)
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                code = run_command(command)
                told.write_text(json.dumps([*sys.modules]))
                os._exit(code)
            if wait(pid)[0]:
                raise RuntimeError(f"a command that should succeed does not: {' '.join(command)}")
            for module in json.loads(told.read_text()):
                if module not in sys.modules and not module.startswith("_"):
                    try:
                        import_module(module)
                    except Exception:  # a module made while running
                        continue
