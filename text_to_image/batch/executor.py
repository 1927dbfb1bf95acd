"""Where the tasks of a job run: the interface between the driver and workers.

The driver (`driver.py`) decides what is done, in which order, what is tried again and what is written; an executor only
runs tasks on workers that hold the models. It must provide:

- `free(stage)`: how many more tasks of a stage it takes now. The driver opens as many units as keep this at 0, so this
  is the back-pressure: a stage that is slow has no room, and nothing is prepared for it beyond that.
- `submit(task)`: starts a task of a stage that has room. A worker calls `Stages(config, device, stages).run(task.stage,
  task.items)`, see `stages.py`: a pure function of the items, whose results are the same on every worker. Workers may
  hold the models of some stages only.
- `wait(seconds)`: the outcomes there are, as soon as there is one. Every task that was submitted has exactly one
  outcome: its results; or `error`, why it failed, if the worker raised or died while it ran that task. A task that a
  worker had not begun when it died is not failed by that: the executor gives it to another worker. Replacing workers is
  the executor's business too.
- `close()`: ends the workers at once, whatever they do. What they had not finished is done by the next run.

An executor raises `UserError` where workers cannot begin, such as for want of memory or for other models than the
driver's. It writes nothing into the job's folder: outputs come back as results, and the driver commits them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import Task


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is given to begin with, as plain data.

    Attributes:
        settings: of the job; its paths of models are opened by every worker.
        fingerprints: hashes of the models as the driver found them, by part. A worker that finds others refuses.
        images: the folder or address that images of prompts are below.
        weights: bytes of the models in memory.
    """

    settings: BatchSettings
    fingerprints: dict[str, str]
    images: str
    weights: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `results`, one for each item, or `error`, one line that says why there are none.

    Attributes:
        worker: a name of the worker for the log.
        seconds: that the task took on it.
        traceback: of an exception that is not a `UserError`, for the log.
    """

    task: Task
    results: list[Any] | None = None
    error: str | None = None
    worker: str = ""
    seconds: float = 0.0
    traceback: str | None = None


class Executor(ABC):
    """Runs tasks on workers, see this module's docstring."""

    @abstractmethod
    def free(self, stage: str) -> int:
        """How many more tasks of that stage are taken now."""

    @abstractmethod
    def submit(self, task: Task) -> None:
        """Starts a task."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Outcome]:
        """The outcomes there are, after at most that many seconds. Raises `UserError` if workers cannot begin."""

    @abstractmethod
    def close(self) -> None:
        """Ends the workers at once."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many workers draw, for what is shown."""
