"""The settings that the default model is best sampled with: `python benchmarks/sweep.py --help`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from jobs import shared_by
from measures import best_of
from quality import GROUPS, Models, scene_of, with_interval
from tqdm import tqdm

from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.settings import Settings, option
from text_to_image.model import DEFAULT_MODEL


@dataclass
class SweepSettings(Settings):
    """Which guidance, temperature and top-p the default model is best sampled with, on captions for validation.

    python benchmarks/sweep.py --count 60

    Settings are tried one after the other from a starting point: first guidance with temperature, then top-p at the
    best of these. The settings are chosen here, and the test captions of quality.py see only the choice. Prints the
    table in Markdown and writes `sweep.json`.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(60, "captions of each kind", low=1)
    num_images: int = option(8, "candidates a caption", low=1)
    cond_scale: list[float] = option([1.0, 1.5, 2.0, 3.0], "guidance", low=0, nargs="+")
    temperature: list[float] = option([0.6, 0.8, 1.0], "temperatures", low=0, nargs="+")
    top_p: list[float] = option([0.8, 0.9, 0.95, 1.0], "shares", low=0, high=1, above=True, nargs="+")
    output_dir: Path = option(Path("outputs/sweep"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


def draw_caption(models: Models, group: str, index: int, *, num_images: int,
                 **sampling: float) -> tuple[float, float]:  # fmt: skip
    """The share of a caption's candidates with everything right, and how often CLIP's best has."""
    models.sampling = sampling
    scene = scene_of(group, index, "validation")
    record, _ = models.candidates(scene, num_images, seed=0)
    right = [all(r.values()) for r in record["right"]]
    return float(np.mean(right)), best_of(record["scores"], right, num_images)


def main(argv: Sequence[str] | None = None) -> None:
    settings = SweepSettings.parse(argv)
    captions = [*product(GROUPS, range(settings.count))]
    tried: dict[tuple[float, float, float], dict] = {}

    def share(top_p: float, temperature: float, cond_scale: float) -> float:
        """The share of single candidates with everything right: the measure that settings are chosen by."""
        key = (top_p, temperature, cond_scale)
        if key not in tried:
            draw = partial(draw_caption, num_images=settings.num_images, top_p=top_p, temperature=temperature,
                           cond_scale=cond_scale)  # fmt: skip
            one, best = zip(*tqdm(in_jobs(draw, captions), str(key), len(captions)), strict=True)
            tried[key] = {"one": with_interval(one), "best": with_interval(best)}
        return tried[key]["one"]["mean"]

    with shared_by(settings.jobs, partial(Models, settings.model, settings.device)) as in_jobs:
        grid = product(settings.temperature, settings.cond_scale)
        temperature, cond_scale = max(grid, key=lambda pair: share(0.9, *pair))
        top_p = max(settings.top_p, key=lambda top_p: share(top_p, temperature, cond_scale))

    print(f"| top_p | temperature | cond_scale | one candidate | best of {settings.num_images} |")
    print("|---|---|---|---|---|")
    for key, result in tried.items():
        cells = [f"{r['mean']:.1%} ({r['low']:.0%} to {r['high']:.0%})" for r in result.values()]
        mark = "**" if key == (top_p, temperature, cond_scale) else ""
        print("| " + " | ".join(f"{mark}{value}{mark}" for value in [*key, *cells]) + " |")
    rows = [dict(zip(("top_p", "temperature", "cond_scale"), key, strict=True)) | r for key, r in tried.items()]
    write_text(settings.output_dir / "sweep.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
