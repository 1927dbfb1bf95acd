"""Which guidance, temperature and top-p the default model is best sampled with, on captions for validation.

    python benchmarks/sweep.py --count 60

Settings are tried one after the other from a starting point: first guidance with temperature, then top-p at the best
of these. The settings are chosen here, and the test captions of quality.py see only the choice. Prints the table in
Markdown and writes `sweep.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jobs import Jobs
from measures import best_of
from quality import DEFAULT_MODEL, GROUPS, Models, all_right, with_interval
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import ArgumentParser, number, run
from dalle_pytorch.devices import pick_device
from dalle_pytorch.files.atomic import write_text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--count", type=number(int, 1), default=60, help="captions of each kind (default 60)")
    parser.add_argument("--num_images", type=number(int, 1), default=8, help="candidates a caption (default 8)")
    parser.add_argument("--cond_scale", type=number(float, 0), nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--temperature", type=number(float, 0), nargs="+", default=[0.6, 0.8, 1.0])
    parser.add_argument("--top_p", type=number(float, 0, 1, above=True), nargs="+", default=[0.8, 0.9, 0.95, 1.0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/sweep"))
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="as in quality.py (default 1)")
    return parser.parse_args(argv)


def draw_caption(
    models: Models, num_subjects: int, index: int, *, num_images: int, **sampling: float
) -> tuple[tuple[int, int], float, float]:
    """Which caption it is, its share of candidates with everything right, and whether CLIP's best has."""
    models.sampling = sampling
    scene = glyphs.make_scene(index, "validation", num_subjects=num_subjects)
    record, _ = models.candidates(scene, num_images, seed=0)
    right = [all_right(r) for r in record["right"]]
    return (num_subjects, index), float(np.mean(right)), best_of(record["scores"], right, num_images)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    device = pick_device(arguments.device)
    with Jobs(arguments.jobs, partial(Models, arguments.model, device)) as jobs:
        sweep(arguments, jobs)


def sweep(arguments: argparse.Namespace, jobs: Jobs) -> None:
    """Tries the settings, prints the table and writes it."""
    tried: dict[tuple[float, float, float], dict] = {}

    def share(top_p: float, temperature: float, cond_scale: float) -> float:
        """The share of single candidates with everything right: the measure that settings are chosen by."""
        key = (top_p, temperature, cond_scale)
        if key not in tried:
            draw = partial(draw_caption, num_images=arguments.num_images, top_p=top_p, temperature=temperature,
                           cond_scale=cond_scale)  # fmt: skip
            captions = [*itertools.product(GROUPS.values(), range(arguments.count))]
            # In the captions' order, for intervals that do not depend on which is done first.
            shares = sorted(tqdm(jobs.map(draw, captions), str(key), len(captions)))
            _, one, best = zip(*shares, strict=True)
            tried[key] = {"one": with_interval(one), "best": with_interval(best)}
        return tried[key]["one"]["mean"]

    grid = itertools.product(arguments.temperature, arguments.cond_scale)
    temperature, cond_scale = max(grid, key=lambda pair: share(0.9, *pair))
    top_p = max(arguments.top_p, key=lambda top_p: share(top_p, temperature, cond_scale))

    print(f"| top_p | temperature | cond_scale | one candidate | best of {arguments.num_images} |")
    print("|---|---|---|---|---|")
    for key, result in tried.items():
        cells = [f"{r['mean']:.1%} ({r['low']:.0%} to {r['high']:.0%})" for r in result.values()]
        mark = "**" if key == (top_p, temperature, cond_scale) else ""
        print("| " + " | ".join(f"{mark}{value}{mark}" for value in [*key, *cells]) + " |")
    rows = [dict(zip(("top_p", "temperature", "cond_scale"), key, strict=True)) | r for key, r in tried.items()]
    write_text(arguments.output_dir / "sweep.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
