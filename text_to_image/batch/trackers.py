"""What a job tells a tracker while it runs: TensorBoard."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dalle_pytorch.errors import UsageError
from text_to_image.batch.driver import Totals
from text_to_image.batch.settings import BatchSettings

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVERY = 5.0  # seconds between two entries


def check_tracker(name: str | None) -> None:
    """Raises `UsageError`, which says what to install, if a package is missing."""
    if name == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError("tensorboard is missing: pip install 'dalle-diffusion[train]'")


class Tracker:
    """Writes rates, failures and what is done into `tensorboard/` of the job, by the number of candidates done."""

    def __init__(self, settings: BatchSettings):
        self.wanted, self.folder = settings.report_to == "tensorboard", settings.outputs_dir / "tensorboard"
        self.writer: SummaryWriter | None = None
        self.last: tuple[float, Totals, int] | None = None  # of the last entry
        self.now: tuple[Totals, int] | None = None

    def __call__(self, totals: Totals, drawn: int) -> None:
        """Takes how far the job is, and notes it if the last time was some seconds ago."""
        if not self.wanted:
            return
        self.now = replace(totals), drawn
        if self.last is None:
            self.last = time.monotonic(), *self.now
        elif time.monotonic() - self.last[0] >= EVERY:
            self._note()

    def _note(self) -> None:
        if self.now is None or self.last is None:
            return
        if self.writer is None:  # only now the folder is known to be this job's
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))
        (totals, drawn), (then, before, drawn_before) = self.now, self.last
        seconds = max(1e-9, time.monotonic() - then)
        values = {"images": totals.images, "prompts": totals.prompts, "failed": totals.failed,
                  "candidates_per_second": (drawn - drawn_before) / seconds,
                  "prompts_per_second": (totals.prompts - before.prompts) / seconds}  # fmt: skip
        for name, value in values.items():
            self.writer.add_scalar(f"job/{name}", value, totals.candidates)
        self.last = time.monotonic(), *self.now

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self._note()
        if self.writer is not None:
            self.writer.close()
