"""Processes that share the captions of a benchmark, and the CPU's cores."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch


@contextmanager
def shared_by(count: int, make_state: Callable[[], Any]) -> Iterator[Callable[[Callable, Iterable[tuple]], Iterator]]:
    """A `map(work, keys)` that yields `work(state, *key)` for every key, in the order of the keys.

    The work is shared by `count` processes, each with a `state` of its own from `make_state()`; a single one is this
    process. Small networks do not keep many threads busy: four processes of one thread each draw about twice as fast as
    one process of four. What the processes are given and give back is pickled, `make_state` too.
    """
    if count == 1:
        state = make_state()
        yield lambda work, keys: (work(state, *key) for key in keys)
        return
    threads = max(1, torch.get_num_threads() // count)
    spawn = multiprocessing.get_context("spawn")  # a forked child of a process that has used threads may hang
    pool = ProcessPoolExecutor(count, spawn, _start, (make_state, threads))
    try:
        yield lambda work, keys: pool.map(partial(_run, work), keys)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make_state: Callable[[], Any], threads: int) -> None:
    global _state
    torch.set_num_threads(threads)
    _state = make_state()


def _run(work: Callable[..., Any], key: tuple) -> Any:
    return work(_state, *key)
