"""The number of threads that sampling takes. Times are simulated."""

import pytest
import torch

from dalle_pytorch.sampling import threads as module
from dalle_pytorch.sampling.threads import StepThreads


class Machine:
    """Steps whose seconds depend on the number of threads."""

    def __init__(self, monkeypatch, cores, seconds):
        self.count, self.seconds, self.now, self.taken = cores, seconds, 0.0, []
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.count)
        monkeypatch.setattr(torch, "set_num_threads", self.set)

    def set(self, count):
        self.count = count

    def run(self, threads, steps):
        """A batch; returns its seconds."""
        started = self.now
        with threads.batch():
            for _ in range(steps):
                self.now += self.seconds[self.count]
                self.taken.append(self.count)
                threads.step()
        return self.now - started


def test_all_of_them_where_nothing_else_runs(monkeypatch):
    machine = Machine(monkeypatch, 4, {4: 1, 2: 2, 1: 4})
    threads = StepThreads("cpu", lambda: machine.now)
    assert machine.run(threads, 1024) <= 1024 * 1.03
    assert machine.count == 4 and set(machine.taken) == {4, 2}


def test_one_beside_a_busy_core_and_all_again(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 10, 1: 2})
    threads = StepThreads("cpu", lambda: machine.now)
    assert machine.run(threads, 256) <= 256 * 2 * 1.3
    assert machine.count == 2 and machine.taken[-1] == 1  # the others of the process have what they had
    machine.seconds = {2: 1, 1: 2}
    machine.run(threads, 256)
    assert machine.taken[-1] == 2
    assert machine.run(threads, 256) <= 256 * 1.05
    machine.seconds = {2: 10, 1: 2}  # noticed at once
    assert machine.run(threads, 256) <= 256 * 2 * 1.3


def test_as_many_as_are_of_use(monkeypatch):
    machine = Machine(monkeypatch, 16, {16: 5, 8: 4, 4: 3, 2: 3.5, 1: 6})
    threads = StepThreads("cpu", lambda: machine.now)
    machine.run(threads, 256)
    assert machine.taken[-1] == 4 and {8, 2} < set(machine.taken)


def test_what_lies_between_batches_is_no_step(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 1, 1: 2})
    threads = StepThreads("cpu", lambda: machine.now)
    for _ in range(40):
        machine.run(threads, 5)
        machine.now += 1000
    assert threads.threads == 2


def test_a_batch_that_fails_gives_the_threads_back(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 10, 1: 2})
    threads = StepThreads("cpu", lambda: machine.now)
    machine.run(threads, 30)
    assert threads.threads == 1
    with pytest.raises(ValueError, match="no"), threads.batch():
        assert machine.count == 1
        raise ValueError("no")
    assert machine.count == 2


@pytest.mark.parametrize(("device", "cores"), [("cpu", 1), ("cuda", 2)])
def test_nothing_to_choose(monkeypatch, device, cores):
    machine = Machine(monkeypatch, cores, {1: 1, 2: 1})
    machine.set = None  # is not called
    monkeypatch.setattr(torch, "set_num_threads", None)
    machine.run(StepThreads(device, lambda: machine.now), 3 * module.FIRST_WAIT)
