"""How strongly CLIP guidance is best led: `python benchmarks/sweep_guidance.py --help`."""

import json
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


@dataclass
class GuidanceSettings(Settings):
    """How strong CLIP guidance is best, on captions for validation: the judge's likelihood of what the caption says.

    python benchmarks/sweep_guidance.py --count 20

    CLIP's best candidate of every caption is diffused without guidance and with every setting, from the same noise.
    Prints the table in Markdown and writes `sweep_guidance.json`.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(20, "captions of each kind", low=1)
    num_images: int = option(4, "candidates that CLIP ranks", low=1)
    clip_guidance_scale: list[float] = option([1e4, 3e4, 1e5], "strengths", low=0, above=True, nargs="+")
    cut_pow: list[float] = option([1.0], "small for cutouts of almost the whole image", low=0, nargs="+")
    steps: str = option("quad25", "diffusion steps")
    output_dir: Path = option(Path("outputs/sweep"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


def guide_caption(models: Models, group: str, index: int, *, num_images: int, steps: str,
                  settings: Sequence[dict | None]) -> list[Record]:  # fmt: skip
    """The judge's opinion of a caption's image with every setting; None is without guidance."""
    scene = scene_of(group, index, "validation")
    _, found = models.candidates(scene, num_images, seed=0)
    opinions = []
    for scales in settings:
        guidance = None if scales is None else models.pipe.guidance(scene.caption, **scales)
        image = models.diffuse(clip_choice(found).tokens, steps, seed=0, guidance=guidance)
        opinions.append(models.opinion(scene, image))
    return opinions


def main(argv: Sequence[str] | None = None) -> None:
    arguments = GuidanceSettings.parse(argv)
    grid = product(arguments.clip_guidance_scale, arguments.cut_pow)
    settings = [{"clip_guidance_scale": scale, "cut_pow": cut_pow} for scale, cut_pow in grid]
    guide = partial(guide_caption, num_images=arguments.num_images, steps=arguments.steps, settings=[None, *settings])
    captions = [*product(GROUPS, range(arguments.count))]
    with shared_by(arguments.jobs, partial(Models, arguments.model, arguments.device)) as in_jobs:
        opinions = [*tqdm(in_jobs(guide, captions), "captions", len(captions))]
    nats = np.asarray([[one["log_likelihood"] for one in row] for row in opinions])
    right = np.asarray([[float(all(one["right"].values())) for one in row] for row in opinions])
    print(f"without guidance: {nats[:, 0].mean():.4f} nats, {right[:, 0].mean():.1%} of {len(captions)} right")
    print("| clip_guidance_scale | cut_pow | nats, on minus off | everything right, on minus off |")
    print("|---|---|---|---|")
    rows = []
    for i, setting in enumerate(settings, start=1):
        n, r = with_interval(nats[:, i] - nats[:, 0]), with_interval(right[:, i] - right[:, 0])
        cells = " | ".join(f"{value:g}" for value in setting.values())
        print(f"| {cells} | {n['mean']:+.4f} ({n['low']:+.4f} to {n['high']:+.4f}) "
              f"| {r['mean']:+.1%} ({r['low']:+.1%} to {r['high']:+.1%}) |")  # fmt: skip
        rows.append(setting | {"nats": n, "right": r})
    write_text(arguments.output_dir / "sweep_guidance.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
