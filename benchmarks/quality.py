"""How often the default model draws what it is asked: `python benchmarks/quality.py --help`."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import shared_by
from judge import Judge, judge_by_attribute, likeliest, log_likelihood, share_of_scenes_read
from measures import best_of, frechet_distance, frechet_interval, interval
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, image_to_tensor, read_image, resize, save_image
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from diffusion.guidance import ClipGuidance
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL
from text_to_image.results import ResultImage

# Kinds of caption: the scenes that they are of (glyphs.MIXTURES), and how many subjects they have.
GROUPS = {
    "a glyph": ("glyphs", 1), "a thing": ("things", 1), "recoloured": ("recoloured", 1), "made of": ("made", 1),
    "two glyphs": ("glyphs", 2), "two subjects": ("everything", 2),
}  # fmt: skip
ATTRIBUTES = ("count", "subject", "colour", "background", "size", "place")
FRECHET = {
    "own_diffused": "tokens of the drawn scenes: diffusion decoder",
    "own_enlarged": "tokens of the drawn scenes: VQGAN's picture enlarged",
    "diffused": "best sampled tokens: diffusion decoder",
    "enlarged": "best sampled tokens: VQGAN's picture enlarged",
}
PICTURES_ON_SHEET = 24

Record = dict[str, Any]


@dataclass
class QualitySettings(Settings):
    """How often the default model draws what it is asked: captions whose combinations it never saw, read by the judge.

    python benchmarks/quality.py                        # or `make quality`; hours on a CPU: --count 50 for a first look

    For every caption: candidates ranked by CLIP, the best one redrawn by diffusion, for some with CLIP guidance too. An
    image counts when everything that its caption says is so. Prints a table and writes to --output_dir: `quality.json`,
    `best_of.png` (the best of N, by N and by attribute), and sheets of the first captions and of failures taken at
    random. Finished captions are kept in `records.jsonl`: the same command resumes.
    """

    model: Path = option(DEFAULT_MODEL, "folder of dalle, vae, clip, decoder, judge")
    count: int = option(150, "captions of each kind", low=1)
    num_images: int = option(16, "candidates that CLIP ranks", low=1)
    curve_count: int = option(20, "captions of each kind that get --curve_images candidates", low=0)
    curve_images: int = option(64, "where the curve ends", low=1)
    guided_count: int = option(20, "captions of each kind also diffused with CLIP guidance", low=0)
    top_p: float | None = option(None, "(default: the model's own)", low=0, high=1, above=True)
    temperature: float | None = option(None, "(default: the model's own)", low=0)
    cond_scale: float | None = option(None, "(default: the model's own)", low=0)
    split: str = option("test", "captions that training never showed, or others", choices=glyphs.world.SPLITS)
    steps: str | None = option(None, "diffusion steps (default: the model's own)")
    seed: int = option(0, "of candidates and noise")
    output_dir: Path = option(Path("outputs/quality"), "where the records and tables go")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    jobs: int = option(1, "processes that share captions and cores: on a CPU, as many as it has cores", low=1)


class Models:
    """The pipeline of a model folder, the judge beside it, and how tokens are sampled."""

    @classmethod
    def of(cls, settings: QualitySettings) -> Models:
        sampling = {name: vars(settings)[name] for name in ("top_p", "temperature", "cond_scale")}
        return cls(settings.model, settings.device, **sampling)

    def __init__(self, folder: Path, device: str | None, **sampling: float | None):
        self.pipe = TextToImage.from_pretrained(folder, device)
        self.judge = Judge.from_pretrained(folder / "judge").eval()
        self.sampling = sampling

    def recorded(self) -> Record:
        """How tokens are sampled and images diffused."""
        sampling = {name: value for name, value in asdict(self.pipe.sampling(**self.sampling)).items() if value}
        model = self.pipe.model
        diffusion = {"num_inference_steps": model.num_inference_steps, "sampler": model.sampler}
        return {**sampling, **model.guidance, **diffusion}

    def candidates(self, scene: glyphs.Scene, count: int, seed: int) -> tuple[Record, list[ResultImage]]:
        """What CLIP and the judge say of `count` candidates, in the order of their numbers, and the candidates."""
        result = self.pipe.generate(scene.caption, count, seed=seed, **self.sampling)
        found = sorted(result, key=lambda image: image.index)
        seen = self.judge.read(torch.stack([image.pixels for image in found]))
        right = [judge_by_attribute(scene, answers) for answers in seen]
        return {"scores": [image.score for image in found], "right": right}, found

    def diffuse(self, tokens: Tensor, steps: str | None, seed: int, guidance: ClipGuidance | None = None,
                sampler: str | None = None) -> Tensor:  # fmt: skip
        """The image (1, 3, h, w) of a grid of tokens."""
        result = self.pipe.upscale(tokens, num_inference_steps=steps, sampler=sampler, seed=seed,
                                   clip_guidance=guidance or False)  # fmt: skip
        return result[0].upscaled_pixels[0][None]

    @torch.no_grad()
    def opinion(self, scene: glyphs.Scene, picture: Tensor) -> Record:
        """What the judge says of one picture (1, 3, h, w)."""
        features = self.judge.features(picture)
        logits = self.judge.logits(features)
        return {"right": judge_by_attribute(scene, likeliest(logits)[0]),
                "log_likelihood": round(float(log_likelihood(scene, logits)), 4),
                "features": [round(x, 4) for x in features[0].tolist()]}  # fmt: skip


def scene_of(group: str, index: int, split: str) -> glyphs.Scene:
    """The scene number `index` of a kind of caption."""
    of, num_subjects = GROUPS[group]
    return glyphs.make_scene(index, split, num_subjects, of)


def clip_choice(found: Sequence[ResultImage]) -> ResultImage:
    """The candidate that CLIP scores highest; of equals the first drawn."""
    return max(found, key=lambda candidate: (candidate.score, -candidate.index))


def measure(settings: QualitySettings, models: Models, group: str, index: int) -> Record:
    """Draws one caption in every way, writes its strip of pictures, and returns what was seen."""
    scene = scene_of(group, index, settings.split)
    longest = max(settings.num_images, settings.curve_images)
    count = longest if index < settings.curve_count else settings.num_images
    record, found = models.candidates(scene, count, settings.seed)
    best = clip_choice(found[: settings.num_images])
    diffuse = partial(models.diffuse, steps=settings.steps, seed=settings.seed)
    drawn = images_of([scene], 256)
    strip = {"drawn": drawn, "enlarged": resize(best.pixels[None], 256), "diffused": diffuse(best.tokens)}
    if index < settings.guided_count:
        strip["guided"] = diffuse(best.tokens, guidance=models.pipe.guidance(scene.caption))
    # What both decoders make of the tokens of the drawn scene itself: how they differ with nothing else in the way.
    own_tokens = models.pipe.model.prior.encode_image(drawn.to(models.pipe.model.device))[0].cpu()
    own_enlarged = resize(models.pipe.read(own_tokens)[0].pixels[None], 256)
    own = {"own_enlarged": own_enlarged, "own_diffused": diffuse(own_tokens)}
    record |= {"group": group, "index": index, "caption": scene.caption, "best": best.index}
    record |= {name: models.opinion(scene, picture) for name, picture in (strip | own).items()}
    sheet = contact_sheet([picture[0] for picture in strip.values()], len(strip), gap=0)
    save_image(strip_path(settings.output_dir, record), sheet)
    return record


def strip_path(folder: Path, record: Record) -> Path:
    return folder / "pictures" / f"{record['group'].replace(' ', '_')}-{record['index']:04}.png"


def all_records(settings: QualitySettings, models: Models) -> list[Record]:
    """Draws what is not in `records.jsonl` yet."""
    path = settings.output_dir / "records.jsonl"
    names = ("num_images", "curve_count", "curve_images", "guided_count", "split", "steps", "seed")
    recorded = {name: vars(settings)[name] for name in names}
    recorded |= {"sampling": models.recorded(), "model": str(settings.model)}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        write_text(path, json.dumps(recorded) + "\n")
    elif json.loads(lines[0]) != recorded:
        raise UsageError(f"{path} was made with other settings; move it away or give another --output_dir")
    records = {}
    for line in lines[1:]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was broken off
            continue
        records[record["group"], record["index"]] = record
    wanted = [(group, index) for index in range(settings.count) for group in GROUPS]
    with path.open("a", encoding="utf-8") as file:
        if lines:
            file.write("\n")
        missing = [key for key in wanted if key not in records]
        # A single job is this process, which has its models already.
        make_models = partial(Models.of, settings) if settings.jobs > 1 else lambda: models
        with shared_by(settings.jobs, make_models) as in_jobs:
            done = in_jobs(partial(measure, settings), missing)
            for record in tqdm(done, "captions", len(missing), dynamic_ncols=True):
                records[record["group"], record["index"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
    return [records[key] for key in wanted]


def with_interval(values: Sequence[float]) -> Record:
    low, high = interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values)}


def shares(records: list[Record], num_images: int) -> Record:
    """Each way's share of pictures with everything right, and after diffusion the paired difference to before."""
    one = [np.mean([all(right.values()) for right in r["right"][:num_images]]) for r in records]
    best = [float(all(r["right"][r["best"]].values())) for r in records]
    diffused = [float(all(r["diffused"]["right"].values())) for r in records]
    return {"one candidate": with_interval(one), f"best of {num_images}": with_interval(best),
            "after diffusion": with_interval(diffused),
            "diffusion minus before": with_interval(np.subtract(diffused, best))}  # fmt: skip


def by_attribute(records: list[Record], num_images: int) -> Record:
    """The share of pictures with each attribute right, where the caption says it."""
    ways = {
        "one candidate": lambda r: r["right"][:num_images],
        f"best of {num_images}": lambda r: [r["right"][r["best"]]],
        "after diffusion": lambda r: [r["diffused"]["right"]],
    }
    return {
        way: {
            name: float(np.mean([right[name] for r in records for right in rights(r) if name in right] or [np.nan]))
            for name in ATTRIBUTES
        }
        for way, rights in ways.items()
    }


def curves(records: list[Record], curve_images: int) -> Record:
    """The share right of CLIP's best of N, for N = 1 … `curve_images`, in all and by attribute, where N were drawn."""
    records = [r for r in records if len(r["scores"]) >= curve_images]
    steps = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= curve_images]
    values: Record = {"N": steps, "captions": len(records)}
    for name in ("everything", *ATTRIBUTES):
        scored = [(r["scores"], [{"everything": all(one.values()), **one}[name] for one in r["right"]])
                  for r in records if name == "everything" or name in r["right"][0]]  # fmt: skip
        if scored:
            values[name] = [float(np.mean([best_of(scores, right, n) for scores, right in scored])) for n in steps]
    return values


def guidance_effect(records: list[Record]) -> Record:
    """CLIP guidance on minus off, by the judge: likelihood of the caption in nats, and everything right."""
    records = [r for r in records if "guided" in r]
    if not records:
        return {}
    nats = [r["guided"]["log_likelihood"] - r["diffused"]["log_likelihood"] for r in records]
    right = [float(all(r["guided"]["right"].values())) - all(r["diffused"]["right"].values()) for r in records]
    return {"nats": with_interval(nats), "right": with_interval(right), "captions": len(records)}


def frechet(records: list[Record]) -> Record:
    """Distances to the captions' drawn scenes, on the judge's features: of the decoder's pictures and of the VQGAN's
    enlarged, from sampled tokens and from those of the drawn scenes themselves ("own")."""
    drawn = np.asarray([r["drawn"]["features"] for r in records])
    if len(records) <= drawn.shape[1]:
        return {}  # fewer pictures than features: their covariance says nothing
    pairs = {name: (np.asarray([r[name]["features"] for r in records]), drawn) for name in FRECHET}
    intervals = frechet_interval(list(pairs.values()))
    result: Record = {"pictures": len(records)}
    for (name, pair), (low, high) in zip(pairs.items(), intervals, strict=True):
        result[name] = {"distance": frechet_distance(*pair), "low": low, "high": high}
    return result


def print_tables(figures: Record) -> None:
    """Tables in Markdown."""

    def cell(value: Record) -> str:
        return f"{value['mean']:.0%} ({value['low']:.0%} to {value['high']:.0%})"

    def table(*rows: Sequence[str]) -> None:
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        print("\n" + "\n".join([head, "|---" * len(rows[0]) + "|", *body]))

    groups: Record = figures["groups"]
    ways = [*next(iter(groups.values()))["shares"]]
    table(["everything right", *ways], *([name, *map(cell, g["shares"].values())] for name, g in groups.items()))
    rows = [[f"{name}, {way}", *("–" if np.isnan(values[a]) else f"{values[a]:.1%}" for a in ATTRIBUTES)]
            for name, group in groups.items() for way, values in group["attributes"].items()]  # fmt: skip
    table(["right by attribute", *ATTRIBUTES], *rows)
    if distances := figures["frechet"]:
        rows = [[words, "{distance:.2f} ({low:.2f} to {high:.2f})".format(**distances[name])]
                for name, words in FRECHET.items()]  # fmt: skip
        table([f"Fréchet distance to {distances['pictures']} drawn scenes, on the judge's features", ""], *rows)
    if figures["guidance"]:
        nats, right = figures["guidance"]["nats"], figures["guidance"]["right"]
        print(f"\nCLIP guidance on minus off, {figures['guidance']['captions']} captions: "
              f"{nats['mean']:+.4f} nats ({nats['low']:+.4f} to {nats['high']:+.4f}), everything right "
              f"{right['mean']:+.1%} ({right['low']:+.1%} to {right['high']:+.1%})")  # fmt: skip


def plot_curves(path: Path, groups: Record) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no best_of.png: pip install matplotlib")
        return
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, -(-len(groups) // 2), sharey=True).flatten()
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        curve = group["best_of"]
        for attribute in ("everything", *ATTRIBUTES):
            if attribute in curve:
                thick = attribute == "everything"
                # Its own colour, whichever of the others a group has.
                colour = "black" if thick else f"C{ATTRIBUTES.index(attribute)}"
                axis.plot(curve["N"], [100 * y for y in curve[attribute]], label=attribute, marker="o", markersize=3,
                          linewidth=2.5 if thick else 1, color=colour)  # fmt: skip
        axis.set(title=f"{name} ({curve['captions']} captions)", xlabel="CLIP's best of N", xscale="log")
        axis.set_xticks(curve["N"], curve["N"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:: len(axes) // 2]:
        axis.set_ylabel("right, %")
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write_sheet(path: Path, records: list[Record], folder: Path) -> None:
    """Strips of the drawn scene, the best candidate enlarged, and that one diffused, four captions a row."""
    if not records:
        return
    strips = [image_to_tensor(read_image(strip_path(folder, record)))[0] for record in records]
    parts = [part[None] for strip in strips for part in strip.split(strip.shape[1], dim=2)[:3]]
    save_image(path, contact_sheet([resize(part, 128)[0] for part in parts], columns=12))


def main(argv: Sequence[str] | None = None) -> None:
    settings = QualitySettings.parse(argv)
    models = Models.of(settings)
    read = share_of_scenes_read(models.judge)
    print(f"the judge reads {read:.1%} of 1,000 drawn test scenes without a mistake; sampling with {models.recorded()}")
    records = all_records(settings, models)

    figures: Record = {"judge": read, "sampling": models.recorded(), "groups": {}}
    for name in GROUPS:
        chosen = [r for r in records if r["group"] == name]
        figures["groups"][name] = {
            "shares": shares(chosen, settings.num_images),
            "attributes": by_attribute(chosen, settings.num_images),
            "best_of": curves(chosen, settings.curve_images),
        }
    figures |= {"frechet": frechet(records), "guidance": guidance_effect(records)}
    print_tables(figures)

    folder = settings.output_dir
    write_text(folder / "quality.json", json.dumps(figures, indent=1) + "\n")
    if settings.curve_count:
        plot_curves(folder / "best_of.png", figures["groups"])
    failures = [r for r in records if not all(r["diffused"]["right"].values())]
    random.Random(0).shuffle(failures)
    write_sheet(folder / "first.png", records[:PICTURES_ON_SHEET], folder)
    write_sheet(folder / "failures.png", failures[:PICTURES_ON_SHEET], folder)
    print(f"\n{len(failures)} of {len(records)} captions failed; in {folder}: quality.json, best_of.png, first.png "
          "and failures.png (the drawn scene, the best candidate, that one diffused)")  # fmt: skip


if __name__ == "__main__":
    run(main)
