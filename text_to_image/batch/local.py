"""Tasks on processes of this machine: one a GPU, or one a core that there is memory for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess, parent_process
from queue import SimpleQueue
from typing import TYPE_CHECKING

from dalle_pytorch.errors import UserError, as_message
from text_to_image.batch.executor import Executor, Outcome, WorkerConfig
from text_to_image.batch.tasks import STAGES, Task

if TYPE_CHECKING:
    from text_to_image.batch.stages import Stages

AHEAD = 2  # tasks of a worker: one that runs and one that waits, so that it need not wait for the driver
STARTS = 3  # of a worker in a row that end before it is ready
#: what a worker imports; torch._dynamo, which takes a second, is imported by the first network
PRELOAD = ["text_to_image.batch.stages", "text_to_image.batch.local", "torch._dynamo"]
DRAWING = ("sample", "score", "diffuse")


@dataclass(frozen=True)
class Place:
    """Where a worker runs, and which stages it runs there."""

    device: str
    threads: int
    stages: tuple[str, ...] = STAGES


@dataclass
class _Worker:
    number: int
    place: Place
    process: BaseProcess
    connection: Connection
    tasks: deque[Task] = field(default_factory=deque)  # the first one runs
    ready: bool = False
    failed_starts: int = 0


class LocalExecutor(Executor):
    """One process for each of `places`; one that ends is replaced."""

    @staticmethod
    def target(connection: Connection, config: WorkerConfig, place: Place, name: str) -> None:
        """What a process runs."""
        work(connection, config, place, name)

    def __init__(self, config: WorkerConfig, places: Sequence[Place]):
        self.config = config
        # A new interpreter for each, or a fork of one that has only imported: never of this one, which has threads.
        self.context = _context()
        self.running = [self._start(number, place) for number, place in enumerate(places)]

    @property
    def workers(self) -> int:
        return sum("sample" in worker.place.stages for worker in self.running)

    def free(self, stage: str) -> int:
        return sum(AHEAD - len(worker.tasks) for worker in self.running if stage in worker.place.stages)

    def submit(self, task: Task) -> None:
        able = [worker for worker in self.running if task.stage in worker.place.stages]
        self._give(min(able, key=lambda worker: len(worker.tasks)), task)

    def wait(self, seconds: float) -> list[Outcome]:
        outcomes = []
        for connection in wait([worker.connection for worker in self.running], seconds):
            worker = next(worker for worker in self.running if worker.connection is connection)
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                outcomes += self._replace(worker)
                continue
            if isinstance(message, Outcome):
                worker.tasks.popleft()
                outcomes.append(message)
            elif message is None:
                worker.ready, worker.failed_starts = True, 0
            else:  # why it cannot begin
                raise UserError(message)
        return outcomes

    def close(self) -> None:
        for worker in self.running:
            worker.process.kill()
        for worker in self.running:
            worker.process.join()
            worker.connection.close()

    def _start(self, number: int, place: Place) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=self.target, args=(theirs, self.config, place, f"worker {number}"),
                                       name=f"dalle batch worker {number}")  # fmt: skip
        process.start()
        theirs.close()
        return _Worker(number, place, process, ours)

    def _give(self, worker: _Worker, task: Task) -> None:
        worker.tasks.append(task)
        with contextlib.suppress(OSError):  # it has ended, which `wait` will find
            worker.connection.send(task)

    def _replace(self, worker: _Worker) -> list[Outcome]:
        """Starts another worker in the place of one that has ended; what it ran is failed, what waited is not."""
        worker.process.join()
        worker.connection.close()
        reason, outcomes = _why(worker.process.exitcode), []
        if not worker.ready:
            worker.failed_starts += 1
            if worker.failed_starts == STARTS:
                raise UserError(f"workers end before they have opened the models ({reason}); fewer --num_workers need "
                                "less memory")  # fmt: skip
        elif worker.tasks:
            outcomes = [Outcome(worker.tasks.popleft(), error=f"the worker ended: {reason}",
                                worker=f"worker {worker.number}")]  # fmt: skip
        new = self._start(worker.number, worker.place)
        new.failed_starts = worker.failed_starts
        self.running[self.running.index(worker)] = new
        for task in worker.tasks:
            self._give(new, task)
        return outcomes


def _context() -> SpawnContext | ForkServerContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _why(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, which the system sends where memory is short" if -code == signal.SIGKILL else name
    return f"exit code {code}"


# In the worker


def work(connection: Connection, config: WorkerConfig, place: Place, name: str) -> None:
    """A worker's process: opens the models, and runs tasks until the driver ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the driver decides what then
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    # Tasks are taken out of the pipe at once, also while a model opens, a task runs or an outcome is sent: otherwise
    # this process and the driver would wait for ever for each other to read, where both send more than a pipe holds.
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()

    import torch

    from text_to_image.batch.stages import Stages

    torch.set_num_threads(place.threads)
    try:
        stages = Stages(config, place.device, place.stages)
    except UserError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while task := tasks.get():
        outcome = run_task(stages, task, name)
        try:
            connection.send(outcome)
        except OSError:  # the driver has ended
            return
        if outcome.traceback is not None and place.device != "cpu":
            return  # after an error of the device nothing that follows can be trusted


def _receive(connection: Connection, tasks: SimpleQueue[Task | None]) -> None:
    """Puts what the driver sends into a queue, and None when the driver has ended."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.put(connection.recv())
    tasks.put(None)


def run_task(stages: Stages, task: Task, name: str) -> Outcome:
    """Runs a task; whatever it raises is why it failed."""
    started = time.monotonic()
    try:
        results = stages.run(task.stage, task.items)
    except UserError as error:
        return Outcome(task, error=str(error), worker=name, seconds=time.monotonic() - started)
    except BaseException as error:  # a panic of Rust is no Exception; a bug is the prompt's failure, and is told
        told = as_message(f"{type(error).__name__}: {error}", 300)
        return Outcome(task, error=told, worker=name, traceback=traceback.format_exc())
    return Outcome(task, results, worker=name, seconds=round(time.monotonic() - started, 3))


def _end_with_the_driver() -> None:
    """Ends this process when the driver has ended, whatever it does."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
