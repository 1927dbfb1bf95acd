"""Processes that share the captions of a benchmark, and the CPU's cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch


class Jobs:
    """`count` processes, each with a state of its own from `make_state()`; a single one is this process.

    Small networks do not keep many threads busy: four processes of one thread each draw about twice as fast as one
    process of four. What the processes are given and give back is pickled, `make_state` too.
    """

    def __init__(self, count: int, make_state: Callable[[], Any]):
        if count == 1:
            self.pool, self.state = None, make_state()
            return
        threads = max(1, torch.get_num_threads() // count)
        spawn = multiprocessing.get_context("spawn")  # a forked child of a process that has used threads may hang
        self.pool = ProcessPoolExecutor(count, spawn, _start, (make_state, threads))

    def __enter__(self) -> Jobs:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, work: Callable[..., Any], keys: Iterable[tuple]) -> Iterator[Any]:
        """`work(state, *key)` for every key, in the order in which they are done."""
        if self.pool is None:
            yield from (work(self.state, *key) for key in keys)
        else:
            for future in as_completed([self.pool.submit(_run, work, *key) for key in keys]):
                yield future.result()


def _start(make_state: Callable[[], Any], threads: int) -> None:
    global _state
    torch.set_num_threads(threads)
    _state = make_state()


def _run(work: Callable[..., Any], *key: Any) -> Any:
    return work(_state, *key)
