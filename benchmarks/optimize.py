"""Images by CLIP alone, measured: `python benchmarks/optimize.py --help`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jobs import shared_by
from measures import interval
from quality import Models, Record
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, image_to_tensor, read_image, save_image
from dalle_pytorch.settings import Settings, option
from text_to_image.latents import Optimization
from text_to_image.model import DEFAULT_MODEL
from text_to_image.settings import OptimizationSettings

SCHEMES = ("ours", "plain")
SUBJECTS = (1, 2)  # in a caption
SHOWN = 8  # captions on the sheet


@dataclass
class BenchmarkSettings(Settings):
    """Two measurements of `dalle optimize` on test captions, half of them of one subject, half of two.

    python benchmarks/optimize.py --count 40

    Whether the likelihood that the judge gives to what the caption says rises from the first image to the last; and
    when our scheme reaches the CLIP score with which the plain one ends (Adam at a constant rate, cutouts of one size,
    no average), from the same start and with as many iterations. Time is the processor's, and on a GPU the clock's.
    Prints both, writes `optimize.json` and the images, and goes on with the captions that are missing.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(40, "captions", low=2)
    iterations: int = option(200, "of either scheme", low=10)
    cutn: int = option(2, "cutouts of our scheme", low=1)
    plain_cutn: int = option(4, "cutouts of the plain scheme", low=1)
    split: str = option("test", "captions that training never showed, or others", choices=glyphs.world.SPLITS)
    seed: int = option(0, "of the start and the cutouts")
    output_dir: Path = option(Path("outputs/optimize_benchmark"), "where the records and images go")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


def follow(models: Models, scene: glyphs.Scene, folder: Path, name: str, **options: Any) -> Record:
    """The judge's likelihood at the start and at the end of a run, and the seconds and best score at every score."""
    optimization = models.pipe.optimization(scene.caption, **options)
    clock = time.perf_counter if models.pipe.model.device.type == "cuda" else time.process_time
    first, curve, started = optimization.preview(), [], clock()

    def each(run: Optimization) -> None:
        if run.state.history and run.state.history[-1][2] == run.state.history[-1][2]:  # not NaN
            score = run.state.finished_scores[-1] if run.done else run.state.best_score
            curve.append([round(clock() - started, 3), round(score, 5)])

    last = optimization.run(each)[0].pixels
    save_image(folder / "start.png", first)
    save_image(folder / f"{name}.png", last)
    start, end = (models.opinion(scene, image[None])["log_likelihood"] for image in (first, last))
    return {"start": start, "end": end, "curve": curve}


def measure(models: Models, num_subjects: int, index: int, *, settings: BenchmarkSettings) -> Record:
    """Both schemes on one caption."""
    scene = glyphs.make_scene(index, settings.split, num_subjects=num_subjects)
    folder = settings.output_dir / f"{num_subjects}-{index:03}"
    options = {"iterations": settings.iterations, "seed": settings.seed}
    schemes = {"ours": OptimizationSettings(cutn=settings.cutn, **options),
               "plain": OptimizationSettings(cutn=settings.plain_cutn, plain=True, **options)}  # fmt: skip
    made_with = {"caption": scene.caption, "models": models.pipe.model.fingerprints("generator", "scorer"),
                 **{name: asdict(scheme) for name, scheme in schemes.items()}}  # fmt: skip
    path = folder / "record.json"
    if path.exists() and (record := json.loads(path.read_text()))["made_with"] == made_with:
        return record
    found = {name: follow(models, scene, folder, name, **asdict(scheme)) for name, scheme in schemes.items()}
    record = {"made_with": made_with, **found}
    write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def summarise(records: Sequence[Record]) -> Record:
    """Shares of captions, and times in those of the plain scheme's whole run; an infinite one never got there."""
    nats = [record["ours"]["end"] - record["ours"]["start"] for record in records]
    shares = []
    for record in records:
        whole, final = record["plain"]["curve"][-1]
        shares.append(next((at / whole for at, score in record["ours"]["curve"] if score >= final), float("inf")))
    final = {name: float(np.mean([record[name]["curve"][-1][1] for record in records])) for name in SCHEMES}
    return {"captions": len(records), "rises": float(np.mean(np.asarray(nats) > 0)),
            "nats": [float(np.mean(nats)), *interval(nats)], "final_score": final,
            "reached": float(np.mean(np.isfinite(shares))), "in_half": float(np.mean(np.asarray(shares) <= 0.5)),
            "median_time": float(np.median(shares)), "mean_curves_time": mean_curves_time(records)}  # fmt: skip


def mean_curves_time(records: Sequence[Record]) -> float:
    """When the mean score of our scheme reaches the final mean score of the plain one, in the time of that."""
    ours, plain = (np.asarray([record[name]["curve"] for record in records]).mean(0) for name in SCHEMES)
    return float(next((at / plain[-1, 0] for at, score in ours if score >= plain[-1, 1]), float("inf")))


def main(argv: Sequence[str] | None = None) -> None:
    settings = BenchmarkSettings.parse(argv)
    captions = [*product(SUBJECTS, range(-(-settings.count // len(SUBJECTS))))][: settings.count]
    with shared_by(settings.jobs, partial(Models, settings.model, settings.device)) as in_jobs:
        records = [*tqdm(in_jobs(partial(measure, settings=settings), captions), "captions", len(captions))]
    summary = summarise(records)
    low, high = summary["nats"][1:]
    print(f"{summary['captions']} captions: the judge's likelihood rises for {summary['rises']:.1%}, by "
          f"{summary['nats'][0]:.2f} nats on average ({low:.2f} to {high:.2f})")  # fmt: skip
    final = summary["final_score"]
    print(f"final score {final['ours']:.4f}, of the plain scheme {final['plain']:.4f}")
    print(f"ours reaches the plain scheme's final score in {summary['median_time']:.2f} of its time (median), for "
          f"{summary['in_half']:.1%} in at most half and for {summary['reached']:.1%} at all; the mean score in "
          f"{summary['mean_curves_time']:.2f}")  # fmt: skip
    write_text(settings.output_dir / "optimize.json", json.dumps(summary | {"records": records}, indent=1) + "\n")
    names = [settings.output_dir / f"{n}-{i:03}" / f"{name}.png" for n, i in captions[:: max(1, len(captions) // SHOWN)]
             for name in ("start", "plain", "ours")]  # fmt: skip
    save_image(settings.output_dir / "sheet.png",
               contact_sheet([image_to_tensor(read_image(name))[0] for name in names], columns=6))  # fmt: skip


if __name__ == "__main__":
    run(main)
