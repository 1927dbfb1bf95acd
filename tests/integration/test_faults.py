"""A few cases of the fault harness (`make faults` tries all), and that the harness sees each kind of fault."""

import mmap
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import commands, files, harness, kills, pickles
from faults.harness import CANARY, Case, run_case
from faults.models import write_models

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the harness forks and reads /proc")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    harness.import_all(folder, ["generate", "convert"])
    return folder


@pytest.mark.parametrize("group, count", [("pickles", 12), ("weights", 8), ("folders", 8), ("configurations", 6),
                                          ("tokens", 4), ("tokenizers", 1), ("images", 4), ("data", 2), ("lists", 8),
                                          ("commands", 6)])  # fmt: skip
def test_hostile_inputs_are_refused_in_one_line_or_accepted(models, tmp_path, capfd, group, count):
    rng = np.random.default_rng(0)
    groups = {"pickles": pickles.cases, **files.cases(models, rng), "commands": lambda: commands.cases(models)}
    cases = [*groups[group]()]
    with capfd.disabled():  # a forked case writes to the true streams
        outcomes = [run_case(cases[number], tmp_path / str(number)) for number in rng.permutation(len(cases))[:count]]
    assert [(outcome.case, outcome.faults, outcome.errors) for outcome in outcomes if outcome.faults] == []


@pytest.mark.slow
def test_jobs_whose_processes_are_killed(models, tmp_path, monkeypatch):
    monkeypatch.setattr(kills, "KINDS", {kind: kills.KINDS[kind] for kind in ("driver", "worker")})
    outcomes = kills.run(models, tmp_path / "kills", 4, np.random.default_rng(0))
    assert [outcome.case.split(" ")[0] for outcome in outcomes] == ["driver"] * 2 + ["worker"] * 2
    assert [(outcome.case, outcome.errors) for outcome in outcomes if outcome.faults] == []


@pytest.mark.parametrize("made, units, seen", [(b"whole", [0], False), (b"other", [0], True), (b"whole", [0, 0], True)])
def test_a_job_that_lost_work_or_did_it_twice_is_seen(models, tmp_path, monkeypatch, made, units, seen):
    def run(command):
        Path("job").mkdir()
        Path("job/image").write_bytes(made)
        Path("job/log.jsonl").write_text("".join(f'{{"event": "unit", "time": 1, "unit": {unit}}}\n' for unit in units))
        return 0

    monkeypatch.setattr(harness, "run_command", run)
    job = kills.Job([], tmp_path / "a job", {"image": b"whole"})
    assert job.finish("a job", job.start()).faults == ["work lost or done twice"] * seen


def raises(error: BaseException) -> int:
    raise error


def touch(size: int) -> int:
    # Memory of its own: an allocator may reuse what was free in the process that was forked, which counts as shared.
    with mmap.mmap(-1, size) as memory:
        memory[::4096] = bytes(size // 4096)
    return 0


def refuses(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


@pytest.mark.parametrize("fault, command", [
    ("traceback", lambda command: raises(KeyError("a bug"))),
    ("not one line", lambda command: refuses("dalle: error: no such file\nnor folder")),
    ("not one line", lambda command: refuses("dalle: error: \x1b[2J")),
    ("memory over bound", lambda command: touch(30 << 20)),
    ("time over bound", lambda command: int(sum(range(20_000_000)) == 0)),
    ("killed", lambda command: os.kill(os.getpid(), signal.SIGKILL)),
    ("code run", lambda command: Path(CANARY).write_text("")),
    ("wrongly accepted", lambda command: 0),
    ("refused in one line", lambda command: refuses("dalle: error: no such file")),
])  # fmt: skip
def test_the_harness_sees_every_kind_of_fault(tmp_path, capfd, monkeypatch, fault, command):
    monkeypatch.setattr(harness, "run_command", command)
    monkeypatch.setattr(harness, "MEMORY", (20 if fault == "memory over bound" else 2000) << 20)
    monkeypatch.setattr(harness, "SECONDS", 0.1 if fault == "time over bound" else 20)
    with capfd.disabled():
        outcome = run_case(Case("", [], must_refuse=True), tmp_path / "case")
    assert outcome.kind == fault
