"""The folder of a job: what it was made with, its prompts, what is done, and how more is committed.

    job.json            settings, models by hashes, the list by a hash; written when the plan is complete
    prompts.jsonl       the prompts; rejected.jsonl, the rows that were set aside
    shards/, upscaled/  the outputs of units as archives, or images/, as folders, see outputs.py
    parts/000012.jsonl  of a finished unit: a line of totals, then a line for each image
    work/000012/        tokens of a unit that is not finished
    log.jsonl           what happened when; nothing depends on it
    manifest.parquet, failed.jsonl, report.html

A unit is finished when its part is there: outputs are renamed into place first, the part last.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_pytorch.errors import UsageError, shorten
from dalle_pytorch.files.atomic import clear_leftovers, write_bytes, write_text
from dalle_pytorch.files.boundary import opening
from dalle_pytorch.files.documents import read_json
from dalle_pytorch.sampling.settings import SamplingSettings
from text_to_image.batch.outputs import FOLDERS, SHARDS, UPSCALED, write_outputs
from text_to_image.batch.plan import Counts, read_plan
from text_to_image.batch.tasks import Draw, Item, Packed, Prompt, Unit, units

JOB_NAME, PROMPTS_NAME, REJECTED_NAME, FAILED_NAME = "job.json", "prompts.jsonl", "rejected.jsonl", "failed.jsonl"
PARTS, WORK, LOG_NAME = "parts", "work", "log.jsonl"
BIN = 0.02  # of a histogram of scores


@dataclass(frozen=True)
class Failure:
    """A prompt that was set aside, in which stage and why."""

    number: int
    key: str
    place: str
    prompt: str
    stage: str
    reason: str


@dataclass
class Job:
    """What `job.json` holds.

    Attributes:
        settings: what decides the outputs, models aside.
        sampling: of prompts whose rows say nothing else.
        models: hashes by part; `device`, the kind of device that numbers are rounded on.
        list_digest, counts: of the list of prompts; `unit_prompts`, how many of them are a unit.
        versions: of the libraries it was begun with, for people.
    """

    settings: dict[str, Any]
    sampling: dict[str, Any]
    models: dict[str, str]
    device: str
    list_digest: str
    versions: dict[str, str]
    unit_prompts: int = 0
    counts: dict[str, int] | None = None

    def difference(self, asked: Job) -> str | None:
        """What is other than it is asked for, in one line; None if nothing is."""
        for name in sorted(self.settings.keys() | asked.settings.keys()):
            mine, other = self.settings.get(name), asked.settings.get(name)
            if mine != other:
                return f"--{name} {_shown(mine)}, not {_shown(other)}"
        for name in self.sampling:
            if self.sampling[name] != asked.sampling.get(name):
                return f"the model's {name} {self.sampling[name]}, not {asked.sampling.get(name)}"
        for name in sorted(self.models.keys() | asked.models.keys()):
            mine, other = self.models.get(name, "no"), asked.models.get(name, "no")
            if mine != other:
                return f"another {name}: {mine[:8]}, not {other[:8]}"
        if self.device != asked.device:
            return f"--device {self.device}, not {asked.device}"
        if self.list_digest != asked.list_digest:
            return f"another list of prompts, as its content has changed (hash {self.list_digest[:8]}, not " \
                   f"{asked.list_digest[:8]})"  # fmt: skip
        return None


def _shown(value: Any) -> str:
    return "left out" if value is None else shorten(value)


class JobFolder:
    """A job's folder. All writing is the driver's, which holds its lock."""

    def __init__(self, path: Path):
        self.path = path

    # The job

    def read_job(self) -> Job | None:
        """The job of this folder, None if it has none yet. Raises `UsageError` for a file that is no job's."""
        path = self.path / JOB_NAME
        if not path.exists():
            return None
        with opening(path, "is not what a job wrote", UsageError):
            return Job(**read_json(path))

    def write_job(self, job: Job) -> None:
        write_text(self.path / JOB_NAME, json.dumps(asdict(job), indent=2, ensure_ascii=False) + "\n")

    def check_unused(self) -> None:
        """Raises `UsageError` if there are files in it that a job did not write."""
        ours = {PROMPTS_NAME, REJECTED_NAME, LOG_NAME}
        found = [path.name for path in self.path.iterdir() if not path.name.startswith(".") and path.name not in ours]
        if found:
            raise UsageError(f"{self.path} has other files in it ({shorten(found[0])}) and no {JOB_NAME}; choose a "
                             "folder of its own for the job")  # fmt: skip

    def clear(self) -> None:
        """Deletes what killed writes left."""
        for name in ("", PARTS, SHARDS, UPSCALED):
            clear_leftovers(self.path / name)
        for path in (self.path / FOLDERS).glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.path / WORK).glob("*"):
            clear_leftovers(path)
            if (self.path / PARTS / f"{path.name}.jsonl").exists():  # the unit was finished, and not yet cleared
                shutil.rmtree(path, ignore_errors=True)

    def rejected(self) -> Iterator[dict[str, Any]]:
        """The rows of the list that were set aside."""
        path = self.path / REJECTED_NAME
        if path.exists():
            with open(path, encoding="utf-8") as file:
                yield from map(json.loads, file)

    # Units

    def units(self, job: Job) -> Iterator[Unit]:
        """All units of a job, in order."""
        return units(read_plan(self.path / PROMPTS_NAME, SamplingSettings(**job.sampling)), job.unit_prompts)

    def part(self, number: int) -> Path:
        return self.path / PARTS / f"{number:06}.jsonl"

    def is_done(self, unit: Unit) -> bool:
        return self.part(unit.number).exists()

    def done(self) -> Iterator[dict[str, Any]]:
        """The totals of the finished units."""
        for path in sorted((self.path / PARTS).glob("[0-9]*.jsonl")):
            with open(path, encoding="utf-8") as file:
                yield json.loads(file.readline())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The images of the finished units."""
        for path in sorted((self.path / PARTS).glob("[0-9]*.jsonl")):
            with open(path, encoding="utf-8") as file:
                file.readline()
                yield from map(json.loads, file)

    def forget(self, unit_numbers: Sequence[int]) -> None:
        """Makes these units unfinished."""
        for number in unit_numbers:
            self.part(number).unlink(missing_ok=True)

    def commit(self, unit: Unit, packed: Sequence[Packed], scores: Sequence[float],
               failures: Sequence[Failure]) -> dict[str, Any]:  # fmt: skip
        """Writes the outputs of a unit, then its part, which makes it finished. Returns its totals.

        `scores` are those of all candidates, for the histogram.
        """
        rows = write_outputs(self.path, unit, packed)
        totals = {
            "unit": unit.number, "prompts": len(unit.prompts), "candidates": unit.candidates, "images": len(rows),
            "histogram": histogram(scores), "histogram_kept": histogram(_kept_scores(rows)),
            "failed": [asdict(failure) for failure in failures],
        }  # fmt: skip
        lines = [json.dumps(line, ensure_ascii=False) for line in (totals, *rows)]
        write_text(self.part(unit.number), "\n".join(lines) + "\n")
        shutil.rmtree(self.path / WORK / unit.name, ignore_errors=True)
        return totals

    # Tokens of unfinished units

    def keep_tokens(self, unit: Unit, block: int, tokens: Sequence[np.ndarray]) -> None:
        """Keeps the tokens of a block of candidates, so that another run need not sample them again."""
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(tokens), allow_pickle=False)
        write_bytes(self.path / WORK / unit.name / f"{block:06}.npy", buffer.getvalue())

    def kept_tokens(self, unit: Unit, block: int, items: Sequence[Item]) -> list[np.ndarray] | None:
        """The tokens of a block that were kept, None if there are none that fit it."""
        path = self.path / WORK / unit.name / f"{block:06}.npy"
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        counts = [item.count for item in items if isinstance(item, Draw)]
        if tokens.ndim != 2 or len(tokens) != sum(counts) or tokens.dtype != np.int64:
            return None
        return np.split(tokens, np.cumsum(counts)[:-1])

    # Log

    def log(self, event: str, **facts: Any) -> None:
        """Notes what happened."""
        with open(self.path / LOG_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": event, **facts}, ensure_ascii=False) + "\n")

    def read_log(self) -> Iterator[dict[str, Any]]:
        """What was noted, without lines that a killed run left half written."""
        path = self.path / LOG_NAME
        if not path.exists():
            return
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and "event" in row and "time" in row:
                    yield row


def histogram(scores: Sequence[float]) -> dict[str, int]:
    """How many scores there are in each interval of `BIN`, by its number; those that occur."""
    counts = Counter(int(np.floor(score / BIN)) for score in scores)
    return {str(bin): counts[bin] for bin in sorted(counts)}


def _kept_scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["score"] for row in rows if row["score"] is not None and not row["upscaled"]]


def counts_of(job: Job) -> Counts:
    return Counts(**(job.counts or {}))


def failed_prompt(prompt: Prompt, stage: str, reason: str) -> Failure:
    return Failure(prompt.number, prompt.key, prompt.place, prompt.text, stage, reason)
