"""How many passes of the diffusion decoder an image needs: `python benchmarks/decoding.py --help`."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jobs import shared_by
from measures import frechet_distance, frechet_ratio
from quality import GROUPS, Models, Record, scene_of, with_interval
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import atomic_write, write_text
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from diffusion.samplers import SAMPLERS
from diffusion.schedule import spaced_steps
from text_to_image.model import DEFAULT_MODEL


@dataclass
class DecodingSettings(Settings):
    """What the decoder draws from the tokens of drawn scenes, by sampler, number of passes and guidance: the attributes
    that the judge reads as the caption says, the Fréchet distance to the drawn scenes on the first principal components
    of the judge's features, the distance to a converged image from the same noise, and the time of an image.

    python benchmarks/decoding.py --count 30
    python benchmarks/decoding.py --count 1 --kinds 'a thing' 'two subjects' --steps 250 --guided_steps

    What is drawn is kept in `records.jsonl`: the same command resumes, and another one with other ways adds to the
    table, which is of all that is there. Each way is compared with `--reference` on the captions that both have. Prints
    the table in Markdown and writes `decoding.md`, `decoding.json` and `decoding.png`. Seconds are the processor's,
    and on a GPU the clock's.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    count: int = option(30, "captions of each kind", low=1)
    kinds: list[str] = option([*GROUPS], "kinds of caption, of " + ", ".join(GROUPS), nargs="+")
    samplers: list[str] = option([*SAMPLERS], "which of " + ", ".join(SAMPLERS), nargs="+")
    steps: list[str] = option(["quad4", "quad6", "quad10", "10", "quad25", "25"], "diffusion steps", nargs="*")
    guided_steps: list[str] = option(["quad25"], "those taken with CLIP guidance", nargs="*")
    reference: str = option("dpm++ quad25", "the way that the others are compared with")
    components: int = option(32, "principal components for the Fréchet distance, fewer than captions", low=1)
    converged: str = option("dpm++ quad100", "sampler and steps of the converged image")
    converged_count: int = option(1, "captions of each kind that get one", low=0)
    split: str = option("test", "captions that training never showed, or others", choices=glyphs.world.SPLITS)
    seed: int = option(0, "of the noise")
    output_dir: Path = option(Path("outputs/decoding"), "where the records and the table go")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "as in quality.py", low=1)


class Way(NamedTuple):
    """How an image is drawn."""

    sampler: str
    steps: str
    guided: bool = False

    @classmethod
    def of(cls, name: str) -> Way:
        sampler, steps, *guided = name.split(" ")
        return cls(sampler, steps, guided == ["guided"])

    def __str__(self) -> str:
        return f"{self.sampler} {self.steps}{' guided' if self.guided else ''}"


Key = tuple[str, int]  # kind and number of a caption


def decode_scene(models: Models, key: Key, ways: Sequence[Way], settings: DecodingSettings) -> dict[str, Record]:
    """The judge's opinion of a scene's tokens decoded in each way, with seconds and the distance to the converged
    image, if it has one; under "drawn" that of the drawn scene."""
    scene = scene_of(*key, settings.split)
    drawn = images_of([scene], 256)
    prior = models.pipe.model.prior
    clock = time.process_time if models.pipe.model.device.type == "cpu" else time.perf_counter
    tokens = prior.encode_image(drawn.to(prior.device))[0].cpu()

    def decode(way: Way) -> tuple[torch.Tensor, float]:
        started = clock()
        guidance = models.pipe.guidance(scene.caption) if way.guided else False
        result = models.pipe.upscale(tokens, num_inference_steps=way.steps, sampler=way.sampler, seed=settings.seed,
                                     clip_guidance=guidance)  # fmt: skip
        return result[0].upscaled_pixels[0][None], clock() - started

    def converged() -> torch.Tensor:
        path = settings.output_dir / "converged" / f"{key[0].replace(' ', '_')}-{key[1]}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        image, _ = decode(Way.of(settings.converged))
        with atomic_write(path) as temporary:
            torch.save(image, temporary)
        return image

    limit = converged() if key[1] < settings.converged_count else None
    records = {"drawn": models.opinion(scene, drawn)}
    for way in ways:
        image, seconds = decode(way)
        distance = None if limit is None else float((image - limit).square().mean().sqrt())
        records[str(way)] = models.opinion(scene, image) | {"seconds": seconds, "distance": distance}
    return records


def all_records(settings: DecodingSettings, ways: Sequence[Way]) -> dict[str, dict[Key, Record]]:
    """Draws what is not in `records.jsonl` yet; returns all that is, by the name of the way."""
    path = settings.output_dir / "records.jsonl"
    recorded = {name: str(vars(settings)[name]) for name in ("model", "converged", "split", "seed")}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        write_text(path, json.dumps(recorded) + "\n")
    elif json.loads(lines[0]) != recorded:
        raise UsageError(f"{path} was made with other settings; move it away or give another --output_dir")
    records: dict[str, dict[Key, Record]] = defaultdict(dict)

    def add(key: Key, found: dict[str, Record]) -> None:
        for way, record in found.items():
            records[way][key] = record

    for line in filter(None, lines[1:]):
        try:
            group, index, found = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was broken off
            continue
        add((group, index), found)
    work: list[tuple[Key, list[Way]]] = []
    for index, group in product(range(settings.count), settings.kinds):
        if missing := [way for way in ways if (group, index) not in records[str(way)]]:
            work.append(((group, index), missing))
    with (
        path.open("a", encoding="utf-8") as file,
        shared_by(settings.jobs, partial(Models, settings.model, settings.device)) as in_jobs,
    ):
        file.write("\n" if lines else "")
        decoded = in_jobs(partial(decode_scene, settings=settings), work)
        for (key, _), found in tqdm(zip(work, decoded, strict=True), "captions", len(work)):
            add(key, found)
            file.write(json.dumps([*key, found]) + "\n")
            file.flush()
    return {way: found for way, found in records.items() if found}


def summarize(records: dict[str, dict[Key, Record]], reference: str, num_steps: int,
              components: int) -> list[Record]:  # fmt: skip
    """Of each way: captions, passes, attributes and images right, distances, seconds; and against the reference."""
    drawn = np.asarray([record["features"] for record in records["drawn"].values()])
    axes = np.linalg.svd(drawn - drawn.mean(0), full_matrices=False)[2][:components]

    def features(way: str, keys: Sequence[Key]) -> np.ndarray:
        return np.asarray([records[way][key]["features"] for key in keys]) @ axes.T

    def attributes(way: str, keys: Sequence[Key]) -> np.ndarray:
        return np.asarray([np.mean([*records[way][key]["right"].values()]) for key in keys])

    rows = []
    for name, found in records.items():
        if name == "drawn":
            continue
        keys, way = [*found], Way.of(name)
        distances = [one["distance"] for one in found.values() if one["distance"] is not None]
        row: Record = {
            "way": name, "captions": len(keys), "passes": len(spaced_steps(num_steps, way.steps)),
            "attributes": with_interval(attributes(name, keys).tolist()),
            "everything": with_interval([float(all(one["right"].values())) for one in found.values()]),
            "distance": float(np.mean(distances)) if distances else None,
            "seconds": float(np.median([one["seconds"] for one in found.values()])),
            "frechet": None, "frechet_ratio": None, "attributes_difference": None,
        }  # fmt: skip
        # Of no more images than components the covariance says nothing.
        if len(keys) > components:
            row["frechet"] = frechet_distance(features(name, keys), features("drawn", keys))
        shared = [key for key in keys if key in records.get(reference, ())]
        if name != reference and shared:
            difference = attributes(name, shared) - attributes(reference, shared)
            row["attributes_difference"] = with_interval(difference.tolist())
            if len(shared) > components:
                sets = (features(each, shared) for each in (name, reference, "drawn"))
                row["frechet_ratio"] = dict(zip(("mean", "low", "high"), frechet_ratio(*sets), strict=True))
        rows.append(row)
    return sorted(rows, key=lambda row: (Way.of(row["way"]).guided, Way.of(row["way"]).sampler, row["passes"]))


def table(rows: Sequence[Record], reference: str) -> str:
    """The rows in Markdown."""

    def cell(value: Record | float | None, form: str) -> str:
        if value is None:
            return "–"
        if not isinstance(value, dict):
            return format(value, form)
        return "{} ({} to {})".format(*(format(value[name], form) for name in ("mean", "low", "high")))

    heads = ["sampler, steps", "passes", "captions", "attributes right", f"minus {reference}", "everything right",
             "Fréchet", f"of {reference}", "to converged", "seconds"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["way"], row["passes"], row["captions"], cell(row["attributes"], ".1%"),
                 cell(row["attributes_difference"], "+.1%"), cell(row["everything"], ".0%"),
                 cell(row["frechet"], ".2f"), cell(row["frechet_ratio"], ".2f"), cell(row["distance"], ".4f"),
                 cell(row["seconds"], ".2f")]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: Sequence[Record]) -> None:
    """Distance to the converged image by passes, a line for each sampler and spacing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no decoding.png: pip install matplotlib")
        return
    lines: dict[str, list[Record]] = defaultdict(list)
    for row in rows:
        way = Way.of(row["way"])
        if row["distance"] is not None and not way.guided:
            lines[f"{way.sampler}, {'quadratic' if way.steps.startswith('quad') else 'even'}"].append(row)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, found in lines.items():
        axis.plot([row["passes"] for row in found], [row["distance"] for row in found], label=name, marker="o",
                  linestyle="-" if name.endswith("quadratic") else "--")  # fmt: skip
    axis.set(xlabel="passes", ylabel="distance to the converged image", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    settings = DecodingSettings.parse(argv)
    if unknown := {*settings.kinds} - {*GROUPS}:
        raise UsageError(f"kinds: expected some of {', '.join(GROUPS)}, got {', '.join(sorted(unknown))}")
    ways = [Way(*each) for each in product(settings.samplers, settings.steps)]
    ways += [Way(*each, True) for each in product(settings.samplers, settings.guided_steps)]
    decoder = json.loads((settings.model / "decoder/config.json").read_text("utf-8"))
    for way in (*ways, Way.of(settings.reference), Way.of(settings.converged)):
        spaced_steps(decoder["diffusion_steps"], way.steps)  # a mistake is told at once
    records = all_records(settings, ways)
    if not records:
        raise UsageError("nothing to draw, and nothing was drawn before: give --steps or --guided_steps")
    rows = summarize(records, settings.reference, decoder["diffusion_steps"], settings.components)
    text = table(rows, settings.reference)
    print(text)
    write_text(settings.output_dir / "decoding.md", text)
    write_text(settings.output_dir / "decoding.json", json.dumps(rows, indent=1) + "\n")
    plot(settings.output_dir / "decoding.png", rows)


if __name__ == "__main__":
    run(main)
