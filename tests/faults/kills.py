"""Jobs of `dalle batch` whose processes are killed at random moments: drivers, workers, Ray's actors and Ray nodes."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
from batch_helpers import outputs
from tqdm import tqdm

from faults.harness import Outcome, start, wait
from faults.models import CAPTIONS
from text_to_image.batch import local
from text_to_image.batch.folder import JobFolder
from text_to_image.batch.tasks import STAGES

ROOT = Path(__file__).resolve().parents[2]
#: kinds of kills: how many a job has, and their share of all in percent
KINDS = {"driver": (4, 30), "worker": (6, 30), "Ray driver": (4, 10), "Ray actor": (4, 20), "Ray node": (1, 10)}
EARLY = 0.2  # of the kills are in the first START seconds, the others when some more is drawn
START = 5.0
FRESH = 5  # every so many jobs one is of new interpreters; the others are forked, workers too, and import nothing
LOOKS = 0.01  # seconds between two
BLOCKS = 3  # of candidates in a unit, of which there are UNITS
UNITS = 8
SECONDS = 1800.0  # that a job may take on a machine that does other things too


#: `ray start`, which otherwise gives up after half a minute
START_RAY = """
import time, ray._private.services as services
from ray.scripts.scripts import main
once = services.get_node
def get_node(*arguments):
    for _ in range(600):
        try:
            return once(*arguments)
        except RuntimeError:
            time.sleep(1)
    return once(*arguments)
services.get_node = get_node
main()
"""
#: Ray waits for ports that it chooses a quarter of a minute, and not for those that are told
PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port")
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_agent_register_timeout_ms": "600000",
    "RAY_worker_register_timeout_seconds": "600", "RAY_health_check_failure_threshold": "20",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "DALLE-pytorch")]),
}  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class RayCluster:
    """Two nodes of one CPU each on this machine, of which the second is lost again and again."""

    def __init__(self, folder: str):
        self.folder = folder
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
        self.nodes = [self._start(head)]

    def _start(self, options: list[str]) -> psutil.Process:
        ports = [f"--{name}={free_port()}" for name in PORTS]
        command = [sys.executable, "-c", START_RAY, "start", "--block", "--num-cpus=1",
                   f"--object-store-memory={2**27}", *ports, *options]  # fmt: skip
        path = Path(self.folder) / "start.log"
        with open(path, "wb") as log:
            started = subprocess.Popen(command, env={**os.environ, **RAY_ENVIRONMENT}, stdout=log, stderr=log)
        process = psutil.Process(started.pid)
        while STARTED not in path.read_text("utf-8", "replace"):
            if not runs(process):
                raise RuntimeError(f"Ray does not start: {path.read_text('utf-8', 'replace')}")
            time.sleep(LOOKS)
        return process

    def join(self) -> None:
        """Adds the second node unless it is there."""
        if len(self.nodes) == 1:
            self.nodes.append(self._start([f"--address={self.address}"]))

    def kill_node(self) -> None:
        """Kills the second node's raylet, and what Ray leaves of it."""
        node = self.nodes.pop()
        processes = node.children(recursive=True)
        for process in sorted(processes, key=lambda process: process.name() != "raylet"):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill()
        node.wait()

    def actors(self, nodes: Sequence[psutil.Process]) -> list[psutil.Process]:
        """The processes of actors that have opened their models."""
        return [process for node in nodes for process in node.children(recursive=True)
                if _title(process).startswith(ACTORS) and not _title(process).endswith("__init__")]  # fmt: skip

    def close(self) -> None:
        for node in self.nodes:
            for process in [node, *node.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


STARTED = "Ray runtime started"  # what Ray prints
ACTORS = tuple(f"ray::{name}" for name in ("StageActor", *STAGES))  # titles of processes; `open` is another


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return (process.cmdline() or [""])[0]
    return ""


def workers(driver: psutil.Process) -> list[psutil.Process]:
    """Those of a job on this machine: what it has forked, or its fork server has."""
    found = []
    for child in driver.children():
        command = " ".join(child.cmdline())
        found += child.children() if "forkserver" in command else [] if "resource_tracker" in command else [child]
    return found


def victims(kind: str, driver: psutil.Process, ray: RayCluster | None) -> list[Callable[[], object]]:
    """What kills each of the processes that there are of a kind."""
    if kind.endswith("driver"):
        return [driver.kill]
    if ray is None:
        return [worker.kill for worker in workers(driver)]
    if kind == "Ray node":
        return [ray.kill_node] if ray.actors(ray.nodes[1:]) else []
    return [actor.kill for actor in ray.actors(ray.nodes)]


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def drawn(job: Path) -> int:
    """How many blocks are kept or finished."""
    done = {part.stem for part in job.glob("parts/[0-9]*.jsonl")}
    return BLOCKS * len(done) + sum(block.parent.name not in done for block in job.glob("work/*/[0-9]*.npy"))


@dataclass
class Job:
    """A job in a folder, and what an undisturbed one came to. A `fresh` one is run by a new interpreter."""

    command: list[str]
    folder: Path
    whole: dict[str, bytes] | None
    fresh: bool = False

    def start(self) -> psutil.Process:
        self.folder.mkdir(exist_ok=True)
        return psutil.Process(start(self.command, self.folder, self.folder.with_suffix(".log"), self.fresh))

    def finish(self, name: str, driver: psutil.Process) -> Outcome:
        """Waits for the end of a job, and compares what it has made."""
        code, usage, _ = wait(driver.pid, SECONDS)
        errors = self.folder.with_suffix(".err").read_text("utf-8", "replace")
        outcome = Outcome(name, code, errors, usage.ru_utime + usage.ru_stime)
        if code == 1 or code < 0:
            outcome.faults.append("traceback" if code == 1 else "killed")
        made = outputs(self.folder / "job")
        self.whole = self.whole or made
        differing = sorted(path for path in {*made, *self.whole} if made.get(path) != self.whole.get(path))
        units = [entry["unit"] for entry in JobFolder(self.folder / "job").read_log() if entry["event"] == "unit"]
        if code or differing or len(units) > len({*units}):
            outcome.faults.append("work lost or done twice")
            outcome.errors += f"\nunits finished: {units}; files that differ: {differing[:5]}"
        return outcome

    def disturbed(self, kind: str, times: int, rng: np.random.Generator, ray: RayCluster | None) -> list[Outcome]:
        """Kills what is of a kind so many times, fewer if the job ends before. Returns an outcome for each of the
        kills, the last one with what the job came to in the end."""
        driver, moments = self.start(), []
        for _ in range(times):
            goal = drawn(self.folder / "job") + rng.integers(1, 2 * BLOCKS * UNITS // (times + 1))
            pause = rng.uniform(0, START if rng.random() < EARLY else 0.1)
            while runs(driver) and pause < 0.1 and drawn(self.folder / "job") < goal:
                time.sleep(LOOKS)
            time.sleep(pause)
            while runs(driver) and not (found := victims(kind, driver, ray)):
                time.sleep(LOOKS)
            if not runs(driver):
                break
            with suppress(psutil.NoSuchProcess):
                found[rng.integers(len(found))]()
                moments.append(drawn(self.folder / "job"))
            if kind.endswith("driver"):
                wait(driver.pid)
                driver = self.start()
        end = self.finish(f"{kind} after blocks {', '.join(map(str, moments))}", driver)
        return [*(Outcome(kind, -signal.SIGKILL, "") for _ in moments[1:]), end][: max(len(moments), bool(end.faults))]


def run(models: Path, folder: Path, count: int, rng: np.random.Generator) -> list[Outcome]:
    """Each outcome is a kill. Without Ray there are none of Ray's kinds."""
    folder.mkdir(parents=True)
    prompts = [f"{first} {second}" for first in CAPTIONS for second in CAPTIONS]
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    command = ["batch", "--prompts", f"{folder}/prompts.txt", "--num_images", "12", "--batch_size", "8", "--keep", "3",
               "--diffuse", "2", "--steps", "8", "--unit_prompts", str(len(prompts) // UNITS),
               "--dalle_path", f"{models}/dalle",
               "--clip_path", f"{models}/clip", "--decoder_path", f"{models}/decoder", "--device", "cpu",
               "--num_workers", "2", "--outputs_dir", "job"]  # fmt: skip
    if has_ray := find_spec("ray") is not None:
        import_module("text_to_image.batch.ray_executor")  # here, so that drivers, which are forked, need not
    kinds = {kind: planned for kind, planned in KINDS.items() if has_ray or not kind.startswith("Ray")}
    ray, all_shares = None, sum(share for _, share in kinds.values())
    with ExitStack() as stack, tqdm(total=count, desc="kills", dynamic_ncols=True, disable=None) as bar:
        # Where drivers are not fresh.
        stack.enter_context(patch.object(local, "_context", partial(multiprocessing.get_context, "fork")))
        undisturbed = Job(command, folder / "undisturbed", None)
        outcome = undisturbed.finish("undisturbed", undisturbed.start())
        outcomes = [outcome] if outcome.faults else []
        for kind, (per_job, share) in kinds.items():
            if kind.startswith("Ray") and ray is None:
                ray = RayCluster(tempfile.mkdtemp(prefix="ray"))  # short, for the paths of sockets have a limit
                stack.callback(ray.close)
                command = [*command, "--ray", ray.address]
            left, trial = -(-count * share // all_shares), 0
            while left > 0:
                if kind == "Ray node":
                    ray.join()
                job = Job(command, folder / f"{kind} {trial}", undisturbed.whole, trial % FRESH == FRESH - 1)
                found = job.disturbed(kind, min(left, per_job), rng, ray)
                outcomes += found
                left, trial = left - len(found), trial + 1
                bar.update(len(found))
                if not any(outcome.faults for outcome in found):
                    shutil.rmtree(job.folder)
    return outcomes
