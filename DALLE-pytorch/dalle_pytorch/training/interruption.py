"""A training that is asked to end (SIGTERM, Ctrl-C) finishes its step and saves first."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A run was asked to end and has saved its state. The message is one line for the user."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped and saved after step {step}; the same command goes on from there")
        self.exit_code = 128 + number  # as a shell counts it


class SignalWatch:
    """Within it, the first signal only sets `received`; the next one ends the process as it always does."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> SignalWatch:
        # Only the main thread may ask for signals.
        watched = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._receive) for number in watched}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()
