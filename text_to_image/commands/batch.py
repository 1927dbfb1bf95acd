"""The command `batch`: a job, its status and its report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dalle_pytorch.errors import as_message, shorten
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.training.interruption import SignalWatch
from text_to_image.batch.settings import BatchSettings

if TYPE_CHECKING:
    from text_to_image.batch.driver import Totals
    from text_to_image.batch.executor import Executor
    from text_to_image.batch.job import Ended
    from text_to_image.batch.plan import Counts

SET_ASIDE = 3  # exit code
LONGEST_LINE = 300  # characters
SHOWN = 5  # rows and prompts set aside that are printed


@dataclass
class StatusSettings(Settings):
    """How far a job is: prompts, images, failures, and the time that is left."""

    job: Path = option(help="folder of the job", positional=True)


@dataclass
class ReportSettings(Settings):
    """Writes report.html into the folder of a job: scores, best and worst images, failures, throughput."""

    job: Path = option(help="folder of the job", positional=True)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["status"]:
        settings = StatusSettings.parse(argv[1:], "dalle batch status")
        from text_to_image.batch.status import describe

        print(describe(settings.job))
    elif argv[:1] == ["report"]:
        settings = ReportSettings.parse(argv[1:], "dalle batch report")
        from text_to_image.batch.report import write_report

        print(write_report(settings.job))
    else:
        run(BatchSettings.parse(argv))


def run(settings: BatchSettings) -> None:
    """Runs a job under a progress bar. Exits with 3 if rows or prompts were set aside, and after a signal as a shell
    counts it."""
    from text_to_image.batch.job import run_job
    from text_to_image.batch.trackers import Tracker, check_tracker

    check_tracker(settings.report_to)
    started = time.monotonic()
    with SignalWatch() as watch, JobBar() as bar, Tracker(settings) as tracker:

        def planned(counts: Counts, totals: Totals, executor: Executor) -> None:
            bar.close()
            tell_rejected(settings.outputs_dir, counts.rejected)
            if counts.unknown:
                print(f"warning: {counts.unknown} prompts have words that this model has never seen", file=sys.stderr)
            bar.begin(counts, totals, executor)

        def progress(totals: Totals, drawn: int) -> None:
            bar(totals, drawn)
            tracker(totals, drawn)

        ended = run_job(settings, watch=progress, planned=planned, reading=bar.reading, stop=lambda: watch.received)
    tell(settings.outputs_dir, ended, time.monotonic() - started)
    if not ended.finished:
        print(f"stopped: {ended.totals.prompts} of {ended.counts.prompts} prompts are done; the same command goes on",
              file=sys.stderr)  # fmt: skip
        sys.exit(128 + watch.received)
    if ended.totals.failed or ended.counts.rejected:
        sys.exit(SET_ASIDE)


def tell_rejected(folder: Path, rejected: int) -> None:
    """Prints the first rows of the list that were set aside."""
    from text_to_image.batch.folder import REJECTED_NAME, JobFolder

    for number, row in enumerate(JobFolder(folder).rejected() if rejected else ()):
        if number == SHOWN:
            break
        print(as_message(f"set aside: {row['place']}: {row['reason']}", LONGEST_LINE), file=sys.stderr)
    if rejected > SHOWN:
        print(f"set aside: {rejected - SHOWN} more rows, see {folder / REJECTED_NAME}", file=sys.stderr)


def tell(folder: Path, ended: Ended, seconds: float) -> None:
    """Prints what was done, and what was set aside."""
    from text_to_image.batch.folder import FAILED_NAME, REJECTED_NAME, JobFolder

    totals, counts = ended.totals, ended.counts
    if ended.manifest is not None and ended.manifest.suffix == ".jsonl":
        print("manifest.parquet needs pyarrow: pip install 'dalle-diffusion[batch]', and give the same command again; "
              "until then there is manifest.jsonl")  # fmt: skip
    if ended.manifest is not None:
        print(f"{folder}: {totals.images} images of {totals.prompts - totals.failed} prompts in {seconds:.1f} s; see "
              f"{ended.manifest.name}")  # fmt: skip
    if counts.rejected:
        print(f"{counts.rejected} rows of the list were set aside, see {folder / REJECTED_NAME}", file=sys.stderr)
    if totals.failed:
        failures = (failure for done in JobFolder(folder).done() for failure in done["failed"])
        for _, failure in zip(range(SHOWN), failures, strict=False):
            told = f"failed: {failure['place']}: {shorten(failure['prompt'])!r}: {failure['reason']}"
            print(as_message(told, LONGEST_LINE), file=sys.stderr)
        print(f"{totals.failed} prompts failed and were set aside, see {folder / FAILED_NAME}; --retry_failed tries "
              "again", file=sys.stderr)  # fmt: skip


class JobBar:
    """A bar of candidates: images and prompts a second, time left, failures."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self.make, self.bar, self.started = tqdm, None, time.monotonic()

    def reading(self, rows: int) -> None:
        """Shows how many rows of the list are read."""
        if self.bar is None:
            self.bar = self.make(desc="reading the list", unit="row", unit_scale=True, dynamic_ncols=True, leave=False,
                                 delay=2)  # fmt: skip
        self.bar.update(rows - self.bar.n)

    def begin(self, counts: Counts, totals: Totals, executor: Executor) -> None:
        self.started, self.first, self.counts = time.monotonic(), totals.prompts, counts
        self.before = totals.candidates
        self.bar = self.make(desc=f"workers: {executor.workers}", total=counts.candidates, initial=totals.candidates,
                             unit="image", unit_scale=True, dynamic_ncols=True)  # fmt: skip

    def __call__(self, totals: Totals, drawn: int) -> None:
        assert self.bar is not None
        rate = (totals.prompts - self.first) / max(1e-9, time.monotonic() - self.started)
        shown = {"prompts": f"{totals.prompts}/{self.counts.prompts}", "prompts/s": f"{rate:.3g}"}
        self.bar.set_postfix({**shown, "failed": totals.failed} if totals.failed else shown, refresh=False)
        # Units that an earlier run had begun have more candidates than are drawn in this one.
        self.bar.update(max(self.before + drawn, totals.candidates) - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def __enter__(self) -> JobBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
