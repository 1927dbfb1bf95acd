"""How strongly CLIP guidance is best led: `python benchmarks/sweep_guidance.py --help`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from jobs import shared_by
from quality import GROUPS, Models, Record, clip_choice, scene_of, with_interval
from tqdm import tqdm

from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.settings import Settings, option
from text_to_image.model import DEFAULT_MODEL

SWEPT = ("clip_guidance_scale", "cut_pow", "cutn", "guidance_every", "guidance_min_sigma", "guidance_through_unet")


@dataclass
class GuidanceSettings(Settings):
    """How CLIP guidance is best led, on captions for validation: the judge's likelihood of what the caption says, and
    the time.

    python benchmarks/sweep_guidance.py --count 20
    python benchmarks/sweep_guidance.py --clip_guidance_scale 1e4 --guidance_every 1 2 --guidance_min_sigma 0 0.6

    CLIP's best candidate of every caption, or its worst, is diffused without guidance and with every setting, from the
    same noise. Prints the table in Markdown and writes `sweep_guidance.json`. Times are the processor's, in units of
    that without guidance; on a GPU the clock's.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(20, "captions of each kind", low=1)
    num_images: int = option(4, "candidates that CLIP ranks", low=1)
    clip_guidance_scale: list[float] = option([1e4, 3e4, 1e5], "strengths", low=0, above=True, nargs="+")
    cut_pow: list[float] = option([1.0], "small for cutouts of almost the whole image", low=0, nargs="+")
    cutn: list[int] = option([16], "cutouts", low=1, nargs="+")
    guidance_every: list[int] = option([1], "steps from one gradient to the next", low=1, nargs="+")
    guidance_min_sigma: list[float] = option([0.0], "noise below which there is no guidance", low=0, nargs="+")
    guidance_through_unet: list[bool] = option([True], "gradients through the network, or not", nargs="+")
    worst: bool = option(False, "the candidate that CLIP ranks last, which guidance has more to change in")
    steps: str | None = option(None, "diffusion steps (default: the model's own)")
    sampler: str | None = option(None, "(default: the model's own)")
    output_dir: Path = option(Path("outputs/sweep"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


def guide_caption(models: Models, group: str, index: int, *, settings: GuidanceSettings,
                  ways: Sequence[dict | None]) -> list[Record]:  # fmt: skip
    """The judge's opinion of a caption's image with every setting, and the seconds; None is without guidance."""
    scene = scene_of(group, index, "validation")
    _, found = models.candidates(scene, settings.num_images, seed=0)
    chosen = min(found, key=lambda candidate: candidate.score) if settings.worst else clip_choice(found)
    clock = time.process_time if models.pipe.model.device.type == "cpu" else time.perf_counter
    opinions = []
    for way in ways:
        started = clock()
        guidance = None if way is None else models.pipe.guidance(scene.caption, **way)
        image = models.diffuse(chosen.tokens, settings.steps, 0, guidance, settings.sampler)
        opinions.append({"seconds": clock() - started, **models.opinion(scene, image)})
    return opinions


def main(argv: Sequence[str] | None = None) -> None:
    settings = GuidanceSettings.parse(argv)
    ways = [dict(zip(SWEPT, values, strict=True)) for values in product(*(vars(settings)[name] for name in SWEPT))]
    guide = partial(guide_caption, settings=settings, ways=[None, *ways])
    captions = [*product(GROUPS, range(settings.count))]
    with shared_by(settings.jobs, partial(Models, settings.model, settings.device)) as in_jobs:
        opinions = [*tqdm(in_jobs(guide, captions), "captions", len(captions))]
    nats, seconds = (np.asarray([[one[name] for one in row] for row in opinions])
                     for name in ("log_likelihood", "seconds"))  # fmt: skip
    right = np.asarray([[float(all(one["right"].values())) for one in row] for row in opinions])
    print(f"without guidance: {nats[:, 0].mean():.4f} nats, {right[:, 0].mean():.1%} of {len(captions)} right, "
          f"{np.median(seconds[:, 0]):.2f} s")  # fmt: skip
    heads = [*SWEPT, "nats, on minus off", "everything right, on minus off", "time"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    rows = []
    for i, way in enumerate(ways, start=1):
        n, r = with_interval(nats[:, i] - nats[:, 0]), with_interval(right[:, i] - right[:, 0])
        times = float(np.median(seconds[:, i] / seconds[:, 0]))
        print(f"| {' | '.join(f'{value:g}' for value in way.values())} "
              f"| {n['mean']:+.4f} ({n['low']:+.4f} to {n['high']:+.4f}) "
              f"| {r['mean']:+.1%} ({r['low']:+.1%} to {r['high']:+.1%}) | {times:.2f} × |")  # fmt: skip
        rows.append({**way, "nats": n, "right": r, "time": times})
    write_text(settings.output_dir / "sweep_guidance.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
