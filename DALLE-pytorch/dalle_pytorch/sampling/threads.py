"""How many threads sampling takes: by the time of its steps, not by the number of cores."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

STEPS = 4  # that a mean is taken of
GAIN = 0.95  # another number of threads is kept if a step takes at most this of the time
SLOWER = 1.5  # a step that takes so many times as long as before calls for a trial at once
FIRST_WAIT, LAST_WAIT = 32, 256  # steps between trials; doubled by each that fails


class StepThreads:
    """Halves and doubles PyTorch's number of threads, up to what it was, where that makes steps faster.

    A step has hundreds of short kernels, each of which waits for its slowest thread: beside another process that uses
    a core, two threads were several times slower than one; and steps of few rows gain little from a second thread.
    Rounding does not depend on the number of threads in any case that was tried; `OMP_NUM_THREADS=1` keeps it at one.

    Use `batch` around the steps of a batch, and call `step` after each.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter):
        self.most = self.threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
        self._clock = clock
        self._before: int | None = None  # number of threads before the trial that is on
        self._fewer = True  # in the next trial
        self._usual = math.inf  # seconds of a step
        self._times: list[float] = []
        self._started: float | None = None  # of the step; None for one that is not measured
        self._left, self._wait = 0, FIRST_WAIT

    @contextmanager
    def batch(self) -> Iterator[None]:
        """The chosen number of threads inside, the former one after it."""
        if self.most == 1:
            yield
            return
        self._started = None  # the first step waits for what is not a step
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(self.most)

    def step(self) -> None:
        """Tells that a step has ended."""
        if self.most == 1:
            return
        now, started = self._clock(), self._started
        self._started = now
        if started is None:
            return
        self._times.append(now - started)
        # A trial ends as soon as it cannot succeed any more.
        failed = self._before is not None and sum(self._times) > STEPS * GAIN * self._usual
        if len(self._times) < STEPS and not failed:
            return
        mean = sum(self._times) / len(self._times)
        self._times.clear()
        if self._before is None:
            slower = mean > SLOWER * self._usual
            self._usual = mean
            self._left -= STEPS
            if slower or self._left <= 0:
                self._begin_trial()
            return
        if failed:
            self._set(self._before)
            self._fewer = not self._fewer
            self._left, self._wait = self._wait, min(2 * self._wait, LAST_WAIT)
        else:
            further = 1 < self.threads < self.most  # perhaps more of the same is better still
            self._usual, self._left, self._wait = mean, 0 if further else FIRST_WAIT, FIRST_WAIT
        self._before = None

    def _begin_trial(self) -> None:
        self._before = self.threads
        self._fewer = self.threads == self.most or (self._fewer and self.threads > 1)
        self._set(self.threads // 2 if self._fewer else min(self.most, self.threads * 2))

    def _set(self, threads: int) -> None:
        self.threads = threads
        self._started = None  # the first step with another number of threads starts or ends some
        torch.set_num_threads(threads)
