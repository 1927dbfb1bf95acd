"""Jobs on a small Ray cluster: their outputs are those of a job on this machine, whatever was killed."""

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from batch_helpers import job_settings, outputs, run_inline, write_list
from faults.models import write_models

from dalle_pytorch.errors import UsageError
from text_to_image.batch.job import run_job
from text_to_image.batch.tasks import STAGES

ray = pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from text_to_image.batch import ray_executor  # noqa: E402
from text_to_image.batch.ray_executor import RayExecutor  # noqa: E402

KILLS = 2  # jobs whose actors, nodes and drivers are killed, each; `python -m faults --only kills` kills more
NODE = {"object_store_memory": 2**27, "include_dashboard": False}
BY_STAGE = [(("sample",), 0.5), (("score",), 0.2), (("diffuse",), 0.2), (("pack",), 0.1)]
forkserver = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def cluster():
    """Of one node with two CPUs, to which this process is connected."""
    folder = tempfile.mkdtemp(prefix="ray")  # short, for the paths of sockets have a limit
    with pytest.MonkeyPatch.context() as patch:
        root = Path(__file__).parents[2]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(root), str(root / "DALLE-pytorch")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)  # below which the cluster's address is noted, in a folder that must be there
        (Path(folder) / "ray").mkdir()
        cluster = Cluster(head_node_args={"num_cpus": 2, "temp_dir": folder, **NODE}, initialize_head=True)
        try:
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_list(tmp_path_factory.mktemp("list") / "prompts.txt")


@pytest.fixture(scope="module")
def undisturbed(models, prompts, tmp_path_factory):
    """What the job comes to without Ray."""
    folder = tmp_path_factory.mktemp("undisturbed") / "job"
    run_inline(job_settings(models, folder, prompts))
    return outputs(folder)


def actor_processes():
    """Those of the actors on all nodes, which are called by what they run."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = process.cmdline()[:1] or [""]
            if title[0].startswith(tuple(f"ray::{name}" for name in ("StageActor", "open", *STAGES))):
                processes.append(process)
    return processes


@pytest.mark.parametrize("actors", [[], pytest.param(BY_STAGE, marks=pytest.mark.slow)], ids=["one actor", "by stage"])
def test_a_job_finishes_on_two_cpus(cluster, models, prompts, undisturbed, tmp_path, actors):
    names = set()

    def watch(totals, drawn):
        names.update(ray.util.list_named_actors())

    settings = job_settings(models, tmp_path / "job", prompts, ray=cluster.address, ray_actors=actors)
    ended = run_job(settings, watch=watch)
    assert ended.finished and not ended.totals.failed
    assert outputs(tmp_path / "job") == undisturbed
    stages = [stages for stages, _ in actors] or [("sample", "score", "diffuse", "pack")]
    assert names == {f"{'+'.join(own)} {worker}" for own in stages for worker in range(2)}
    assert ray.is_initialized()  # as it was before
    wait_until(lambda: ray.available_resources().get("CPU") == 2)


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def jobs_until(hit):
    """The numbers of `KILLS` jobs, and of a few more while `hit` is false: a kill may come just after the task that it
    was to disturb."""
    yield from range(KILLS)
    yield from itertools.takewhile(lambda _: not hit(), range(KILLS, 5 * KILLS))


class Disturbed(RayExecutor):
    """Calls `kill` at `times` random moments at which one of the actors from the number `first` on has tasks.

    Nothing begins before there are `first + 1` workers.
    """

    def __init__(self, config, moments, kill, times, first=0):
        super().__init__(config, "cpu")
        self.moments, self.kill, self.left, self.first, self.errors = moments, kill, times, first, []

    def free(self, stage):
        begun = not self.left or any(actor.opening is None for actor in self.actors[self.first :])
        return super().free(stage) if begun else 0

    def wait(self, seconds):
        outcomes = super().wait(seconds)
        busy = any(actor.tasks for actor in self.actors[self.first :])
        if self.left and busy and self.moments.random() < 0.3:
            self.left -= 1
            time.sleep(self.moments.uniform(0, 0.05))
            self.kill()
        self.errors += [outcome.error for outcome in outcomes if outcome.error is not None]
        return outcomes


@pytest.mark.slow
def test_actors_killed_at_any_moment(cluster, models, prompts, undisturbed, tmp_path):
    moments, executors = random.Random(5), []

    def executor(config):
        executors.append(Disturbed(config, moments, lambda: moments.choice(actor_processes()).kill(), times=2))
        return executors[-1]

    for number in jobs_until(lambda: any(made.errors for made in executors)):
        run_job(job_settings(models, tmp_path / str(number), prompts, ray=cluster.address), executor)
        assert outputs(tmp_path / str(number)) == undisturbed
    assert any(made.errors for made in executors) and not any(made.left for made in executors)
    assert all(error.startswith("the worker ended: ") for made in executors for error in made.errors)


@pytest.mark.slow
def test_nodes_that_join_and_are_lost(cluster, models, prompts, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "SCAN", 0.0)
    moments, executors, nodes = random.Random(7), [], []

    def executor(config):
        executors.append(Disturbed(config, moments, lambda: cluster.remove_node(nodes[-1], allow_graceful=False),
                                   times=1, first=2))  # fmt: skip
        return executors[-1]

    def join(counts, totals, executor):
        nodes.append(cluster.add_node(num_cpus=1, **NODE))

    for number in jobs_until(lambda: any(made.errors for made in executors)):
        run_job(job_settings(models, tmp_path / str(number), prompts, ray=cluster.address), executor, planned=join)
        assert outputs(tmp_path / str(number)) == undisturbed
    assert any(made.errors for made in executors) and not any(made.left for made in executors)


def run_on(address, settings):
    torch.set_num_threads(1)
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    run_job(settings)


@pytest.mark.slow
def test_the_driver_killed_at_any_moment(cluster, models, prompts, undisturbed, tmp_path):
    moments = random.Random(3)
    for number in range(KILLS):
        settings = job_settings(models, tmp_path / str(number), prompts, ray=cluster.address)
        process = forkserver.Process(target=run_on, args=(cluster.address, settings))
        process.start()
        log = settings.outputs_dir / "parts"
        wait_until(lambda log=log: log.exists() and any(log.iterdir()))
        time.sleep(moments.uniform(0, 0.5))
        process.kill()
        process.join()
        wait_until(lambda: ray.available_resources().get("CPU") == 2)  # its actors have ended
        run_job(settings)
        assert outputs(settings.outputs_dir) == undisturbed


def test_no_answer_is_one_line(models, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "ANSWER", 8.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(UsageError, match="no answer within 8 s"):
            ray_executor.connect(f"127.0.0.1:{port}")
    with pytest.raises(UsageError, match=r"no answer .*refused"):
        ray_executor.connect(f"127.0.0.1:{port}")
    for address in ("ray://127.0.0.1:10001", "somewhere", "host:http", ":6379"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            ray_executor.connect(address)


def test_without_ray(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "text_to_image.batch.ray_executor")
    with pytest.raises(UsageError, match=r"pip install 'dalle-diffusion\[ray\]'"):
        import text_to_image.batch.ray_executor  # noqa: F401
