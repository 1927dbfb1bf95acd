"""A page about a job: scores, the best and the worst images, failures, throughput."""

from __future__ import annotations

import base64
import heapq
import html
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import shorten
from dalle_pytorch.files.atomic import write_text
from text_to_image.batch.driver import Totals
from text_to_image.batch.folder import BIN, JobFolder, counts_of
from text_to_image.batch.status import Moment, describe, moments, open_job

REPORT_NAME = "report.html"
SHOWN = 12  # images, and lines of a table
WIDTH, HEIGHT = 640, 200  # of a plot, in pixels
STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
h2{margin-top:2em}table{border-collapse:collapse}td,th{padding:.2em .8em .2em 0;text-align:left;vertical-align:top}
figure{display:inline-block;width:10em;margin:0 .8em .8em 0;vertical-align:top;font-size:13px}
img{width:100%;image-rendering:pixelated}svg{overflow:visible}svg text{font-size:11px;fill:#555}"""


def write_report(path: Path) -> Path:
    """Writes `report.html` into the folder of a job, finished or not, and returns its path.

    Nothing of it is loaded from elsewhere. Raises `UsageError` if there is no job.
    """
    folder, job = open_job(path)
    totals, every, kept = Totals(), Counter[str](), Counter[str]()
    failures: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for done in folder.done():
        totals.add(done)
        every.update(done["histogram"])
        kept.update(done["histogram_kept"])
        failures += done["failed"][: max(0, SHOWN - len(failures))]
        reasons.update(failure["reason"] for failure in done["failed"])
    rejected: Counter[str] = Counter()
    examples: list[dict[str, Any]] = []
    for row in folder.rejected():
        rejected[row["reason"].partition(":")[0]] += 1
        if len(examples) < SHOWN:
            examples.append(row)
    best, worst = extremes(folder.rows())
    log = list(folder.read_log())
    retries = Counter(f"{entry['stage']}: {entry['reason']}" for entry in log if entry["event"] == "failure")
    body = [
        f"<h1>{html.escape(path.resolve().name)}</h1><pre>{html.escape(describe(path))}</pre>",
        _section("Scores of all candidates", _bars(every)), _section("Scores of those kept", _bars(kept)),
        _section("Best images", _figures(folder, best)),
        _section("Worst of the best images of each prompt", _figures(folder, worst)),
        _section("Throughput, candidates by time of work", _line(moments(log))),
        _section("Prompts that failed", _counts(reasons) + _table(failures, ("place", "prompt", "stage", "reason"))),
        _section("Rows that were set aside", _counts(rejected) + _table(examples, ("place", "reason", "text"))),
        _section("Tasks that were tried again", _counts(retries)),
        _section("Made with", _table([*_flat(job.settings), *_flat(job.sampling), *_flat(job.models),
                                      *_flat(job.versions), {"name": "prompts", "value": counts_of(job).prompts}],
                                     ("name", "value"))),
    ]  # fmt: skip
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(path.resolve().name)}</title>' \
           f"<style>{STYLE}</style>{''.join(body)}</html>\n"  # fmt: skip
    write_text(path / REPORT_NAME, page)
    return path / REPORT_NAME


def extremes(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The rows of the highest scores, and of the lowest among the first of each prompt. A pass over all, in little
    memory."""
    best: list[tuple[float, int, Mapping[str, Any]]] = []
    worst: list[tuple[float, int, Mapping[str, Any]]] = []
    for number, row in enumerate(rows):
        if row["score"] is None or row["upscaled"] or row["rank"]:
            continue
        for heap, value in ((best, row["score"]), (worst, -row["score"])):
            entry = (value, -number, row)
            if len(heap) < SHOWN:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    return [row for *_, row in sorted(best, reverse=True)], [row for *_, row in sorted(worst, reverse=True)]


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}" if content else ""


def _figures(folder: JobFolder, rows: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for row in rows:
        data, suffix = _read(folder.path, row), row["file"].rpartition(".")[2]
        source = f'src="data:image/{suffix};base64,{base64.b64encode(data).decode()}"' if data else ""
        caption = html.escape(f"{row['score']:.4f} {shorten(row['prompt'], 120)}")
        figures.append(f'<figure><img alt="" {source}><figcaption>{caption}</figcaption></figure>')
    return "".join(figures)


def _read(folder: Path, row: Mapping[str, Any]) -> bytes | None:
    """The file of an image; None if it was moved away."""
    try:
        if row["shard"] is None:
            return (folder / row["file"]).read_bytes()
        with tarfile.open(folder / row["shard"]) as archive:
            file = archive.extractfile(row["file"])
            return file and file.read()
    except (OSError, KeyError, tarfile.TarError):
        return None


def _bars(counts: Mapping[str, int]) -> str:
    """A histogram of scores as SVG."""
    if not counts:
        return ""
    bins = sorted((int(bin), count) for bin, count in counts.items())
    first, last, most = bins[0][0], bins[-1][0] + 1, max(counts.values())
    width = WIDTH / (last - first)
    bars = "".join(
        f'<rect x="{(bin - first) * width:.1f}" y="{HEIGHT - HEIGHT * count / most:.1f}" width="{width * 0.95:.1f}" '
        f'height="{HEIGHT * count / most:.1f}" fill="#4477aa"><title>{bin * BIN:.2f} to {(bin + 1) * BIN:.2f}: {count}'
        f"</title></rect>" for bin, count in bins
    )  # fmt: skip
    ticks = "".join(f'<text x="{x * WIDTH:.0f}" y="{HEIGHT + 16}">{(first + x * (last - first)) * BIN:.2f}</text>'
                    for x in (0, 0.25, 0.5, 0.75, 1))  # fmt: skip
    return f'<svg width="{WIDTH}" height="{HEIGHT + 24}">{bars}{ticks}</svg>'


def _line(course: Sequence[Moment]) -> str:
    """What was done by time, as SVG."""
    last = course[-1]
    if not last.candidates or not last.seconds:
        return ""
    points = " ".join(f"{WIDTH * moment.seconds / last.seconds:.1f},"
                      f"{HEIGHT - HEIGHT * moment.candidates / last.candidates:.1f}" for moment in course)  # fmt: skip
    rate = f"{last.candidates} candidates in {last.seconds:.0f} s: {last.candidates / last.seconds:.3g} a second, " \
           f"{last.prompts / last.seconds:.3g} prompts"  # fmt: skip
    return f'<p>{rate}</p><svg width="{WIDTH}" height="{HEIGHT + 8}"><polyline points="{points}" fill="none" ' \
           'stroke="#4477aa" stroke-width="2"/></svg>'  # fmt: skip


def _counts(counts: Counter[str]) -> str:
    return _table([{"count": count, "reason": reason} for reason, count in counts.most_common(SHOWN)],
                  ("count", "reason"))  # fmt: skip


def _flat(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items() if value is not None]


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{html.escape(shorten(row[column], 200))}</td>" for column in columns) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
