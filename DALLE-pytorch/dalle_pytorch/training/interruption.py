"""A training that is asked to end (SIGTERM, Ctrl-C) finishes its step and saves first, if that does not take long."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds after a signal in which a step may end, or the data for the next one come
LAST_WAIT = 2.0  # more seconds for a step


class Interrupted(Exception):
    """A run was asked to end. The message is one line for the user."""

    def __init__(self, number: int, step: int, saved: bool = True):
        name = signal.Signals(number).name
        done = f"stopped and saved after step {step}" if saved else f"stopped after step {step} without saving"
        goes_on = "goes on from there" if saved else "goes on from the last checkpoint"
        super().__init__(f"{name}: {done}; the same command {goes_on}")
        self.exit_code = 128 + number  # as a shell counts it


class SignalWatch:
    """Within it, the first signal only sets `received`; the next one ends the process as it always does.

    `late(number, waiting)`, if given, is called in another thread when the loop has not come to `ending` some seconds
    after a signal. It is to end the process. `waiting` says that the loop was in `waiting`, where it now stays.
    """

    def __init__(self, late: Callable[[int, bool], object] | None = None):
        self.received, self.late = 0, late
        self.busy, self.ended = threading.Lock(), threading.Event()

    def __enter__(self) -> SignalWatch:
        # Only the main thread may ask for signals.
        watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.busy.acquire()
        self.before = {number: signal.signal(number, self._receive) for number in watched}
        return self

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, nothing of the run's state changes."""
        self.busy.release()
        try:
            yield
        finally:
            self.busy.acquire()

    def ending(self) -> None:
        """Says that the loop is about to save and end."""
        self.ended.set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self.late is not None:
            threading.Thread(target=self._end_late, args=(self.late, number), daemon=True).start()

    def _end_late(self, late: Callable[[int, bool], object], number: int) -> None:
        if not self.ended.wait(GRACE):
            waiting = self.busy.acquire(timeout=LAST_WAIT)
            if not self.ended.is_set():
                late(number, waiting)

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self.ended.set()
        self._restore()
        if self.busy.locked():
            self.busy.release()
