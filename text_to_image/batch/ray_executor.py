"""Tasks on a Ray cluster. Ray places the workers, on nodes that join later too, and finds out which have died.

A worker is a placement group: a GPU, or the CPUs of its threads, and the memory for the models. Its actors are
processes that hold the models of some stages and share it by fractions, so that no stage can take what another needs
to begin. Items and results travel pickled, as through the pipes of `local.py`: what the driver holds is its own memory,
and none of the object store's. Actors belong to the driver's Ray job: they end with the driver, whatever ends it.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from dalle_pytorch.errors import UsageError, UserError, as_message
from text_to_image.batch.executor import Executor, Outcome, WorkerConfig
from text_to_image.batch.local import AHEAD, STARTS, run_task
from text_to_image.batch.ray_settings import ACTORS, DEVICES, Actors
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import Task

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError:
    raise UsageError("--ray needs Ray: pip install 'dalle-diffusion[ray]'") from None

ANSWER = 60.0  # seconds in which a cluster answers; Ray itself asks for a quarter of an hour
SCAN = 10.0  # seconds between looks at the nodes
PATIENCE = 1800.0  # seconds without any worker
ACTOR_BYTES = 2**30  # of memory: the libraries and a batch
NOT_INSTALLED = "failed to import on the worker"  # Ray's words


# The cluster


@contextmanager
def cluster(settings: BatchSettings) -> Iterator[tuple[str, Callable[[WorkerConfig], RayExecutor]]]:
    """Within it, this process is connected to the cluster of the settings. Gives the kind of device to draw on, GPUs if
    it has any now unless the settings say otherwise, and what makes an executor.

    Raises `UsageError` if the cluster does not answer in `ANSWER` seconds.
    """
    if settings.device not in (None, *DEVICES):
        raise UsageError(f"--device {settings.device}: on a cluster it is cpu or cuda, and Ray chooses which")
    connected = ray.is_initialized()  # a notebook may be
    if not connected:
        connect(settings.ray or "auto")
    try:
        device = settings.device or ("cuda" if any("GPU" in resources for resources in nodes().values()) else "cpu")
        yield device, lambda config: RayExecutor(config, device)
    finally:
        if not connected:
            ray.shutdown()


def connect(address: str) -> None:
    """Connects this process to the cluster at an address. Raises `UsageError` if it does not answer."""
    host, colon, port = address.rpartition(":")
    if address != "auto" and not (host and colon and port.isdecimal() and "/" not in host):
        raise UsageError(f"--ray {address}: expected auto or HOST:PORT of the head node, and this machine to be a node "
                         "of the cluster; from elsewhere, ray job submit")  # fmt: skip
    if host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER / 4).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"--ray {address}: no answer ({error})") from None
    # First by another process, which can be ended: where nothing answers, ray.init cannot be.
    code = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)"
    try:
        tried = subprocess.run([sys.executable, "-c", code, address], timeout=ANSWER, text=True, check=False,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise UsageError(f"--ray {address}: no answer within {ANSWER:.0f} s") from None
    if tried.returncode:
        reason = tried.stderr.strip().rpartition("\n")[2]
        raise UsageError(f"--ray {address}: {as_message(reason, 300)}")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():  # where Ray replaces it
        signal.signal(signal.SIGTERM, on_sigterm)


def nodes() -> dict[str, dict[str, float]]:
    """The resources of the nodes that are alive, by their ids."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


# In the driver


@dataclass(eq=False)
class _Actor:
    """A process for some stages of a worker.

    Attributes:
        name: the dashboard shows it.
        group, share: where it is, and how much of that it has.
        opening: until it has opened its models.
        tasks: those it was given, with their results to come; the first one runs.
    """

    name: str
    stages: tuple[str, ...]
    group: PlacementGroup
    share: float
    handle: Any
    opening: ray.ObjectRef | None
    tasks: deque[tuple[Task, ray.ObjectRef]] = field(default_factory=deque)
    starts: int = 1  # of actors in its place
    failed_starts: int = 0  # in a row


class RayExecutor(Executor):
    """As many workers as `--num_workers` says, or as the nodes that there are have room for."""

    def __init__(self, config: WorkerConfig, device: str):
        settings = config.settings
        self.config, self.device, self.asked = config, device, settings.num_workers
        self.actor_class: Any = ray.remote(StageActor)
        self.layout = _layout(settings, device)
        memory = len(self.layout) * ACTOR_BYTES + 2 * config.weights
        self.bundle: dict[str, float] = {"CPU": settings.threads, "memory": memory}
        if device == "cuda":
            self.bundle["GPU"] = 1
        self.groups: list[PlacementGroup] = []
        self.actors: list[_Actor] = []
        self.held: deque[Task] = deque()  # of actors that have died, until another one has begun
        self.scanned, self.seen = -SCAN, time.monotonic()
        self._grow()

    @property
    def workers(self) -> int:
        return len(self.groups)

    def free(self, stage: str) -> int:
        return sum(max(0, AHEAD - len(actor.tasks)) for actor in self._ready(stage))

    def submit(self, task: Task) -> None:
        self._give(min(self._ready(task.stage), key=lambda actor: len(actor.tasks)), task)

    def wait(self, seconds: float) -> list[Outcome]:
        self._grow()
        awaited = {}
        for actor in self.actors:
            if actor.opening is not None:
                awaited[actor.opening] = actor
            elif actor.tasks:
                awaited[actor.tasks[0][1]] = actor
        done, others = ray.wait(list(awaited), timeout=seconds)
        if others:
            done += ray.wait(others, num_returns=len(others), timeout=0)[0]
        outcomes = [outcome for result in done for outcome in self._take(awaited[result], result)]
        for task in [self.held.popleft() for _ in range(len(self.held))]:
            if self._ready(task.stage):
                self.submit(task)
            else:
                self.held.append(task)
        return outcomes

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor.handle)
        for group in self.groups:
            remove_placement_group(group)
        self.actors, self.groups = [], []

    def _ready(self, stage: str) -> list[_Actor]:
        return [actor for actor in self.actors if stage in actor.stages and actor.opening is None]

    def _grow(self) -> None:
        """Adds the workers that there may be: it is for Ray to place them, now or when it can.

        Raises `UserError` where there can be none any more.
        """
        now = time.monotonic()
        if any(actor.opening is None for actor in self.actors):
            self.seen = now
        elif now - self.seen > PATIENCE:
            raise UserError(f"Ray has had no worker for {PATIENCE / 60:.0f} minutes; one needs "
                            f"{_resources(self.bundle)}, and ray status tells what there is")  # fmt: skip
        if now - self.scanned < SCAN:
            return
        self.scanned = now
        alive = nodes()
        if ray.get_runtime_context().get_node_id() not in alive:
            raise UserError("Ray has ended on this machine, or the cluster believes so; start it again, and the same "
                            "command goes on")  # fmt: skip
        room = sum(int(min(node.get(name, 0) // amount for name, amount in self.bundle.items()))
                   for node in alive.values())  # fmt: skip
        while len(self.groups) < (self.asked or max(1, room)):
            number = len(self.groups)
            group = placement_group([self.bundle], name=f"worker {number}")
            self.groups.append(group)
            for stages, share in self.layout:
                self.actors.append(self._start(f"{'+'.join(stages)} {number}", stages, group, share))

    def _start(self, name: str, stages: tuple[str, ...], group: PlacementGroup, share: float) -> _Actor:
        draws = stages != ("pack",)
        handle = self.actor_class.options(
            name=name, max_restarts=0, scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            num_cpus=_whole(share * self.bundle["CPU"]), num_gpus=_whole(share * self.bundle.get("GPU", 0) * draws),
        ).remote(name, stages, self.device if draws else "cpu")  # fmt: skip
        opening = handle.open.options(name=f"open {name}").remote(pickle.dumps(self.config), versions(), os.getcwd())
        return _Actor(name, stages, group, share, handle, opening)

    def _give(self, actor: _Actor, task: Task) -> None:
        result = actor.handle.run.options(name=task.stage).remote(pickle.dumps(task))
        actor.tasks.append((task, result))

    def _take(self, actor: _Actor, result: ray.ObjectRef) -> list[Outcome]:
        """What has come of an actor's start, or of its first task."""
        try:
            value = ray.get(result)
        except RayError as error:
            if actor.opening is not None and isinstance(error, RayTaskError):
                if NOT_INSTALLED not in str(error):
                    raise
                raise UserError(f"a node of the cluster has not what this one has installed: {_why(error)}") from None
            return self._replace(actor, error)
        if actor.opening is not None:
            if value is not None:  # why it cannot begin
                raise UserError(value)
            actor.opening, actor.failed_starts = None, 0
            return []
        outcome = pickle.loads(value)
        actor.tasks.popleft()
        if outcome.traceback is not None and self.device != "cpu":
            self._restart(actor)  # after an error of the device nothing that follows can be trusted
        return [outcome]

    def _replace(self, actor: _Actor, error: RayError) -> list[Outcome]:
        """Starts another actor in the place of one that has ended; what it ran is failed, what waited is not."""
        outcomes = []
        if actor.opening is not None:
            actor.failed_starts += 1
            if actor.failed_starts == STARTS:
                raise UserError(f"workers end before they have opened the models: {_why(error)}")
        else:
            outcomes = [Outcome(actor.tasks.popleft()[0], error=f"the worker ended: {_why(error)}", worker=actor.name)]
        self._restart(actor)
        return outcomes

    def _restart(self, actor: _Actor) -> None:
        ray.kill(actor.handle)  # it may be only out of reach
        name = f"{actor.name.partition(' again ')[0]} again {actor.starts}"  # the old one's may not be free yet
        new = self._start(name, actor.stages, actor.group, actor.share)
        new.starts, new.failed_starts = actor.starts + 1, actor.failed_starts
        self.actors[self.actors.index(actor)] = new
        self.held.extend(task for task, _ in actor.tasks)


def _layout(settings: BatchSettings, device: str) -> Actors:
    """The actors of a worker, for the stages that the job has."""
    needed = {"sample", "score", "pack", *(["diffuse"] if settings.diffuse else [])}
    actors = [(tuple(stage for stage in stages if stage in needed), share)
              for stages, share in settings.ray_actors or ACTORS[device]]  # fmt: skip
    return [(stages, share) for stages, share in actors if stages]


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import torch

    import dalle_pytorch

    return {"torch": torch.__version__, "dalle-diffusion": dalle_pytorch.__version__}


def _whole(amount: float) -> float:
    """In the steps that Ray counts in."""
    return int(amount * 10_000 + 1e-6) / 10_000


def _resources(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount / 2**30:.1f} GiB of memory" if name == "memory" else f"{amount:g} {name}"
                     for name, amount in bundle.items())  # fmt: skip


def _why(error: RayError) -> str:
    """The last line of Ray's message, which says what happened, without its guesses."""
    return as_message(str(error).partition("Some common causes")[0].strip().rpartition("\n")[2], 300)


# In an actor


class StageActor:
    """Runs tasks of some stages."""

    def __init__(self, name: str, stages: tuple[str, ...], device: str):
        self.name, self.names, self.device = f"{name} on {socket.gethostname()}", stages, device

    def open(self, config: bytes, expected: dict[str, str], folder: str) -> str | None:
        """Opens the models, relative paths from `folder` of the driver. Returns why that cannot be, None if it can."""
        import torch

        from text_to_image.batch.stages import Stages

        for library, version in versions().items():
            if version != expected[library]:
                return f"{self.name} has {library} {version}, the driver {expected[library]}: results could differ"
        with suppress(OSError):  # another machine than the driver's, without shared folders
            os.chdir(folder)
        settings: WorkerConfig = pickle.loads(config)
        torch.set_num_threads(settings.settings.threads)
        try:
            self.stages = Stages(settings, self.device, self.names)
        except UserError as error:
            return f"{self.name}: {error}"
        return None

    def run(self, task: bytes) -> bytes:
        """The outcome of a task."""
        return pickle.dumps(run_task(self.stages, pickle.loads(task), self.name))
