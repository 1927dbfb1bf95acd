"""How many passes of the diffusion decoder an image needs: `python benchmarks/decoding.py --help`."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jobs import shared_by
from measures import frechet_distance
from quality import GROUPS, Models, Record, scene_of, with_interval
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.settings import Settings, option
from diffusion.samplers import SAMPLERS
from diffusion.schedule import spaced_steps
from text_to_image.model import DEFAULT_MODEL


@dataclass
class DecodingSettings(Settings):
    """What the decoder draws from the tokens of drawn scenes, by sampler, number of passes and guidance: the attributes
    that the judge reads as the caption says, the Fréchet distance to the drawn scenes on the judge's features, the
    distance to a converged image (DDIM from the same noise), and the time.

    python benchmarks/decoding.py --count 30

    Prints the table in Markdown and writes `decoding.json` and `decoding.png`. Seconds are the processor's, and on a
    GPU the clock's.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(30, "captions of each kind", low=1)
    samplers: list[str] = option([*SAMPLERS], "which of " + ", ".join(SAMPLERS), nargs="+")
    steps: list[str] = option(["4", "10", "quad10", "25", "quad25", "50", "250"], "diffusion steps", nargs="+")
    guided_steps: list[str] = option(["quad25"], "those also taken with CLIP guidance", nargs="*")
    converged: str = option("1000", "steps of the converged image")
    split: str = option("test", "captions that training never showed, or others", choices=glyphs.world.SPLITS)
    seed: int = option(0, "of the noise")
    output_dir: Path = option(Path("outputs/decoding"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


class Way(NamedTuple):
    """How an image is drawn."""

    sampler: str
    steps: str
    guided: bool

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}{', guided' if self.guided else ''}"


def decode_scene(models: Models, group: str, index: int, *, ways: Sequence[Way], settings: DecodingSettings) -> Record:
    """The judge's opinion of a drawn scene, under "drawn", and of its tokens decoded in each way."""
    scene = scene_of(group, index, settings.split)
    drawn = torch.from_numpy(glyphs.draw(scene, 256)).permute(2, 0, 1)[None].float() / 255
    prior, clock = models.pipe.model.prior, time.perf_counter
    if models.pipe.model.device.type == "cpu":
        clock = time.process_time
    tokens = prior.encode_image(drawn.to(prior.device))[0].cpu()

    def decode(way: Way) -> tuple[torch.Tensor, float]:
        started = clock()
        guidance = models.pipe.guidance(scene.caption) if way.guided else False
        result = models.pipe.upscale(tokens, num_inference_steps=way.steps, sampler=way.sampler, seed=settings.seed,
                                     clip_guidance=guidance)  # fmt: skip
        return result[0].upscaled_pixels[0][None], clock() - started

    converged, _ = decode(Way("ddim", settings.converged, False))
    record = {"drawn": models.opinion(scene, drawn)}
    for way in ways:
        image, seconds = decode(way)
        distance = float((image - converged).square().mean().sqrt())
        record[str(way)] = models.opinion(scene, image) | {"seconds": seconds, "distance": distance}
    return record


def summarize(records: Sequence[Record], ways: Sequence[Way], num_steps: int) -> list[Record]:
    """Of each way: passes, attributes and images right, distances, seconds."""
    drawn = np.asarray([record["drawn"]["features"] for record in records])
    rows = []
    for way in ways:
        found = [record[str(way)] for record in records]
        features = np.asarray([one["features"] for one in found])
        rows.append({
            "way": str(way), "passes": len(spaced_steps(num_steps, way.steps)),
            "attributes": with_interval([float(np.mean([*one["right"].values()])) for one in found]),
            "everything": with_interval([float(all(one["right"].values())) for one in found]),
            # Of no more images than features the covariance says nothing.
            "frechet": frechet_distance(features, drawn) if len(found) > features.shape[1] else None,
            "distance": float(np.mean([one["distance"] for one in found])),
            "seconds": float(np.median([one["seconds"] for one in found])),
        })  # fmt: skip
    return rows


def plot(path: Path, rows: Sequence[Record], ways: Sequence[Way]) -> None:
    """Distance to the converged image by passes, a line for each sampler."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no decoding.png: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for sampler in dict.fromkeys(way.sampler for way in ways):
        even = [row for row, way in zip(rows, ways, strict=True)
                if way.sampler == sampler and way.steps.isdecimal() and not way.guided]  # fmt: skip
        axis.plot([row["passes"] for row in even], [row["distance"] for row in even], marker="o", label=sampler)
    axis.set(xlabel="passes, evenly spaced", ylabel="distance to the converged image", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    settings = DecodingSettings.parse(argv)
    ways = [Way(*each, False) for each in product(settings.samplers, settings.steps)]
    ways += [Way(*each, True) for each in product(settings.samplers, settings.guided_steps)]
    make_models = partial(Models, settings.model, settings.device)
    num_steps = make_models().pipe.model.decoder.denoiser.num_steps
    captions = [*product(GROUPS, range(settings.count))]
    with shared_by(settings.jobs, make_models) as in_jobs:
        decoded = in_jobs(partial(decode_scene, ways=ways, settings=settings), captions)
        records = [*tqdm(decoded, "captions", len(captions))]
    rows = summarize(records, ways, num_steps)
    print(f"{len(captions)} drawn scenes, from their tokens")
    print("| sampler, steps | passes | attributes right | everything right | Fréchet | to converged | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shares = (
            f"{s['mean']:.1%} ({s['low']:.0%} to {s['high']:.0%})" for s in (row["attributes"], row["everything"])
        )
        frechet = "–" if row["frechet"] is None else format(row["frechet"], ".2f")
        print(f"| {row['way']} | {row['passes']} | {' | '.join(shares)} | {frechet} | {row['distance']:.4f} "
              f"| {row['seconds']:.2f} |")  # fmt: skip
    write_text(settings.output_dir / "decoding.json", json.dumps(rows, indent=1) + "\n")
    plot(settings.output_dir / "decoding.png", rows, ways)


if __name__ == "__main__":
    run(main)
