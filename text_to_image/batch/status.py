"""How far a job is, as a short table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.lock import LOCK_NAME
from text_to_image.batch.driver import Totals
from text_to_image.batch.folder import JOB_NAME, Job, JobFolder, counts_of

RECENT = 600.0  # seconds that the present rate is taken from
TIMES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Moment:
    """What was done by a time: candidates and prompts since the first start, in `seconds` of work."""

    seconds: float
    candidates: int
    prompts: int


def open_job(path: Path) -> tuple[JobFolder, Job]:
    """The job in a folder. Raises `UsageError` if there is none."""
    folder = JobFolder(path)
    job = folder.read_job()
    if job is None:
        raise UsageError(f"{path} is no job's folder: there is no {JOB_NAME} in it")
    return folder, job


def moments(log: Sequence[dict[str, Any]]) -> list[Moment]:
    """The course of a job by its log, the time between its runs left out."""
    found, seconds, candidates, prompts, last = [Moment(0, 0, 0)], 0.0, 0, 0, None
    for entry in log:
        if entry["event"] != "start" and last is not None:
            seconds += max(0.0, entry["time"] - last)
        last = entry["time"]
        if entry["event"] == "unit":
            candidates, prompts = candidates + entry["candidates"], prompts + entry["prompts"]
            found.append(Moment(seconds, candidates, prompts))
    return found


def rates(course: Sequence[Moment]) -> tuple[float, float] | None:
    """Candidates and prompts a second of late, None if that is not known yet."""
    last = course[-1]
    first = next(moment for moment in course if last.seconds - moment.seconds <= RECENT)
    seconds = last.seconds - first.seconds
    return (
        ((last.candidates - first.candidates) / seconds, (last.prompts - first.prompts) / seconds) if seconds else None
    )


def duration(seconds: float) -> str:
    """A time in its two largest units: `2 h 5 min`."""
    parts, left = [], max(0, round(seconds))
    for size, unit in TIMES:
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size} {unit}")
            left %= size
    return " ".join(parts[:2])


def describe(path: Path) -> str:
    """A table of what is done, set aside and left of the job in a folder. Raises `UsageError` if there is no job."""
    folder, job = open_job(path)
    counts, totals = counts_of(job), Totals()
    for done in folder.done():
        totals.add(done)
    rate = rates(moments(list(folder.read_log())))
    units = -(-counts.prompts // job.unit_prompts)
    left = counts.prompts - totals.prompts
    state = "finished" if not left else "running" if _is_running(path) else "interrupted: the same command goes on"
    rows = [("state", state), ("prompts", f"{totals.prompts} of {counts.prompts}"),
            ("candidates", f"{totals.candidates} of {counts.candidates}"), ("images", str(totals.images)),
            ("units", f"{totals.units} of {units}"), ("failed prompts", str(totals.failed)),
            ("rows set aside", str(counts.rejected))]  # fmt: skip
    if rate is not None:
        rows.append(("rate", f"{rate[0]:.3g} candidates/s, {rate[1]:.3g} prompts/s"))
        if left:
            rows.append(("time left", duration((counts.candidates - totals.candidates) / rate[0])))
    return "\n".join(f"{name:<15}  {value}" for name, value in rows)


def _is_running(path: Path) -> bool:
    """Whether a process has the job's lock."""
    if not (path / LOCK_NAME).exists():
        return False
    try:
        with FileLock(path / LOCK_NAME, timeout=0):
            return False
    except OSError:  # a Timeout too; or another user's
        return True
