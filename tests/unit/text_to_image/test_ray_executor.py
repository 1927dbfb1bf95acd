"""The executor on Ray, with what it asks of Ray made up: who gets which task, who is replaced, and when it gives up."""

import itertools
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle_pytorch.errors import UsageError, UserError
from text_to_image.batch.executor import Outcome, WorkerConfig
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import Task

pytest.importorskip("ray", reason="Ray is not installed")
from ray.exceptions import ActorDiedError, RayTaskError

from text_to_image.batch import ray_executor
from text_to_image.batch.ray_executor import RayExecutor


class Cluster:
    """In the place of `ray`: actors do nothing until a test says what has come of their calls, by `done`."""

    def __init__(self):
        self.machines, self.here = {"head": {"CPU": 2.0, "memory": 2.0**40}}, "head"
        self.started, self.calls, self.results, self.killed = [], [], {}, []
        self.numbers = itertools.count()

    def nodes(self):
        return [{"NodeID": name, "Alive": True, "Resources": has} for name, has in self.machines.items()]

    def get_runtime_context(self):
        return SimpleNamespace(get_node_id=lambda: self.here)

    def remote(self, kind):
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=lambda *given: self._start(options)))

    def _start(self, options):
        actor = SimpleNamespace(**options)
        actor.open = actor.run = SimpleNamespace(
            options=lambda name: SimpleNamespace(remote=lambda *given: self._call(actor.name, name)))  # fmt: skip
        self.started.append(actor)
        return actor

    def _call(self, actor, name):
        self.calls.append((actor, name, next(self.numbers)))
        return self.calls[-1]

    def done(self, actor, value, name=None):
        """The first call of an actor that has not come back comes back."""
        call = next(call for call in self.calls if call[0] == actor and call not in self.results
                    and name in (None, call[1]))  # fmt: skip
        self.results[call] = value

    def wait(self, refs, num_returns=1, timeout=None):
        return [ref for ref in refs if ref in self.results], [ref for ref in refs if ref not in self.results]

    def get(self, ref):
        if isinstance(self.results[ref], Exception):
            raise self.results[ref]
        return self.results[ref]

    def kill(self, actor):
        self.killed.append(actor.name)


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    monkeypatch.setattr(ray_executor, "ray", made)
    monkeypatch.setattr(ray_executor, "placement_group", lambda bundles, name: (name, bundles[0]))
    monkeypatch.setattr(ray_executor, "remove_placement_group", lambda group: None)
    monkeypatch.setattr(ray_executor, "PlacementGroupSchedulingStrategy", lambda group, index: group)
    monkeypatch.setattr(ray_executor, "SCAN", 0.0)
    return made


def executor(device="cpu", **options):
    settings = BatchSettings(**{"prompts": "p.txt", "outputs_dir": Path("job"), "ray": "auto", "diffuse": 1, **options})
    return RayExecutor(WorkerConfig(settings, {}, "", weights=2**20), device)


def task(number, stage="sample"):
    return Task(stage, 0, number, ())


def outcome(number, **values):
    return pickle.dumps(Outcome(task(number), **{"results": [], **values}))


ALL = "sample+score+diffuse+pack"
DIED = ActorDiedError()


def test_workers_are_as_many_as_there_is_room_for(cluster):
    made = executor(threads=2)
    assert made.workers == 1 and made.bundle == {"CPU": 2, "memory": 2**30 + 2**21}
    cluster.machines["other"] = {"CPU": 5.0, "memory": 2.0**40}
    cluster.machines["small"] = {"CPU": 8.0, "memory": 2.0**29}
    made.wait(0)
    assert made.workers == 3
    del cluster.machines["other"]
    made.wait(0)
    assert made.workers == 3  # Ray looks for another place
    assert executor(num_workers=7).workers == 7
    cluster.machines = {"head": {}}
    assert executor().workers == 1  # which a cluster that grows makes room for


def test_stages_on_a_gpu_are_actors_with_fractions_of_it(cluster):
    cluster.machines["head"] |= {"GPU": 1.0}
    executor("cuda")
    found = {actor.name: (actor.num_gpus, actor.num_cpus) for actor in cluster.started}
    assert found == {"sample 0": (0.4, 0.4), "score 0": (0.2, 0.2), "diffuse 0": (0.3, 0.3), "pack 0": (0, 0.1)}
    cluster.started.clear()
    executor("cuda", diffuse=0, ray_actors=[(("sample", "diffuse"), 0.33333), (("score", "pack"), 0.5)])
    assert [(actor.name, actor.num_gpus) for actor in cluster.started] == [("sample 0", 0.3333), ("score+pack 0", 0.5)]


def test_tasks_go_to_open_actors_with_the_fewest(cluster):
    made = executor()
    assert not made.free("sample")
    cluster.done(f"{ALL} 1", None)
    made.wait(0)
    assert made.free("sample") == made.free("pack") == 2
    made.submit(task(0))
    cluster.done(f"{ALL} 0", None)
    made.wait(0)
    assert made.free("sample") == 3
    made.submit(task(1))
    assert [(actor, name) for actor, name, _ in cluster.calls[2:]] == [(f"{ALL} 1", "sample"), (f"{ALL} 0", "sample")]
    cluster.done(f"{ALL} 0", outcome(1))
    assert [found.task.block for found in made.wait(0)] == [1] and made.free("score") == 3


def test_of_an_actor_that_dies_the_task_it_ran_is_failed_alone(cluster):
    made = executor(num_workers=1)
    cluster.done(f"{ALL} 0", None)
    made.wait(0)
    made.submit(task(0))
    made.submit(task(1))
    cluster.done(f"{ALL} 0", DIED)
    cluster.done(f"{ALL} 0", DIED)
    (failed,) = made.wait(0)
    assert failed.task.block == 0 and failed.error.startswith("the worker ended: The actor died")
    assert made.wait(0) == [] and not made.free("sample") and cluster.killed == [f"{ALL} 0"]
    cluster.done(f"{ALL} 0 again 1", None)
    made.wait(0)
    assert made.free("sample") == 1  # the task that waited is its
    cluster.done(f"{ALL} 0 again 1", outcome(1))
    assert [found.task.block for found in made.wait(0)] == [1]


def test_after_an_error_of_the_device_the_actor_is_replaced(cluster):
    made = executor("cuda", num_workers=1, ray_actors=[(("sample", "score", "diffuse", "pack"), 1.0)])
    cluster.done(f"{ALL} 0", None)
    made.wait(0)
    made.submit(task(0))
    made.submit(task(1))
    cluster.done(f"{ALL} 0", outcome(0, results=None, error="CUDA error", traceback="…"))
    assert [found.error for found in made.wait(0)] == ["CUDA error"]
    assert cluster.killed == [f"{ALL} 0"] and cluster.started[-1].name == f"{ALL} 0 again 1"
    cluster.done(f"{ALL} 0 again 1", None)
    cluster.done(f"{ALL} 0", DIED)
    assert made.wait(0) == [] and made.free("sample") == 1


def test_actors_that_cannot_begin_end_the_job(cluster):
    made = executor(num_workers=1)
    for name in (f"{ALL} 0", f"{ALL} 0 again 1"):
        cluster.done(name, DIED)
        assert made.wait(0) == []
    cluster.done(f"{ALL} 0 again 2", DIED)
    with pytest.raises(UserError, match="workers end before they have opened the models: The actor died"):
        made.wait(0)
    made = executor(num_workers=1)
    cluster.calls = cluster.calls[-1:]
    cluster.done(f"{ALL} 0", "another prior than the job began with")
    with pytest.raises(UserError, match="another prior"):
        made.wait(0)


@pytest.mark.parametrize("text, kind", [(ray_executor.NOT_INSTALLED, UserError), ("a bug", RayTaskError)])
def test_what_an_actor_raises_at_its_start(cluster, text, kind):
    made = executor(num_workers=1)
    cluster.done(f"{ALL} 0", RayTaskError("open", f"Traceback …\nError: {text}", RuntimeError(text)))
    with pytest.raises(kind, match=text):
        made.wait(0)


def test_without_nodes_the_job_ends(cluster, monkeypatch):
    made = executor(num_workers=1)
    monkeypatch.setattr(ray_executor, "PATIENCE", 0.0)
    with pytest.raises(UserError, match=r"no worker for 0 minutes; one needs 1 CPU, 1.0 GiB of memory"):
        made.wait(0)
    cluster.done(f"{ALL} 0", None)
    monkeypatch.setattr(ray_executor, "PATIENCE", 60.0)
    made.wait(0)
    cluster.here = "lost"
    with pytest.raises(UserError, match="Ray has ended on this machine"):
        made.wait(0)


@pytest.mark.parametrize("options, message", [
    ({"ray": None, "ray_actors": ["sample=1"]}, "goes with --ray"),
    ({"ray_actors": ["sample+score=1"]}, "expected each of diffuse, pack, sample, score once"),
    ({"ray_actors": ["sample+score=1", "diffuse+pack=0.2"]}, "1.2 together"),
])  # fmt: skip
def test_shares_that_do_not_go_together(options, message):
    shares = [ray_executor_share(share) for share in options.pop("ray_actors")]
    with pytest.raises(UsageError, match=message):
        BatchSettings(**{"prompts": "p", "outputs_dir": Path("job"), "ray": "auto", **options}, ray_actors=shares)


def ray_executor_share(text):
    from text_to_image.batch.ray_settings import stages_share

    return stages_share(text)


@pytest.mark.parametrize("share", ["sample", "sample=", "sample=0", "sample=1.5"])
def test_shares_that_are_none(share, capsys):
    with pytest.raises(SystemExit, match="2"):
        BatchSettings.parse(["--prompts", "p", "--outputs_dir", "job", "--ray", "auto", "--ray_actors", share])
    assert "--ray_actors" in capsys.readouterr().err


def test_a_cluster_draws_on_the_device_it_has(cluster, monkeypatch):
    monkeypatch.setattr(cluster, "is_initialized", lambda: True, raising=False)

    def device(name=None):
        with ray_executor.cluster(
            BatchSettings(prompts="p", outputs_dir=Path("job"), ray="auto", device=name)
        ) as found:
            return found[0]

    assert device() == "cpu" and device("cuda") == "cuda"
    cluster.machines["other"] = {"GPU": 4.0}
    assert device() == "cuda" and device("cpu") == "cpu"
    with pytest.raises(UsageError, match="--device cuda:1"):
        device("cuda:1")
