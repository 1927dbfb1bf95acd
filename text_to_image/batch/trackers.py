"""What a job tells a tracker while it runs: TensorBoard."""

from __future__ import annotations

import time
from importlib.util import find_spec

from dalle_pytorch.errors import UsageError
from text_to_image.batch.driver import Totals
from text_to_image.batch.settings import BatchSettings

EVERY = 5.0  # seconds between two entries


def check_tracker(name: str | None) -> None:
    """Raises `UsageError`, which says what to install, if a package is missing."""
    if name == "tensorboard" and find_spec("tensorboard") is None:
        raise UsageError("tensorboard is missing: pip install 'dalle-diffusion[train]'")


class Tracker:
    """Writes rates, failures and what is done into `tensorboard/` of the job, by the number of candidates done."""

    def __init__(self, settings: BatchSettings):
        self.writer, self.last = None, (time.monotonic(), 0, 0)
        if settings.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(settings.outputs_dir / "tensorboard"))

    def __call__(self, totals: Totals, drawn: int, *, now: bool = False) -> None:
        """Notes how far the job is, if the last time was some seconds ago, or `now`."""
        then, drawn_then, prompts_then = self.last
        seconds = time.monotonic() - then
        if self.writer is None or (seconds < EVERY and not now):
            return
        self.last = time.monotonic(), drawn, totals.prompts
        values = {"images": totals.images, "prompts": totals.prompts, "failed": totals.failed,
                  "candidates_per_second": (drawn - drawn_then) / seconds,
                  "prompts_per_second": (totals.prompts - prompts_then) / seconds if prompts_then else 0.0}  # fmt: skip
        for name, value in values.items():
            self.writer.add_scalar(f"job/{name}", value, totals.candidates)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer is not None:
            self.writer.close()
