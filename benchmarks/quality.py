"""How often the default model draws what it is asked: captions whose combinations it never saw, read back by the judge.

    python benchmarks/quality.py                        # or `make quality`; hours on a CPU: --count 50 for a first look

For every caption: candidates ranked by CLIP, the best one redrawn by diffusion, for some with CLIP guidance too. A
picture counts when everything that its caption says is so. Prints a table and writes to --output_dir: `quality.json`,
`best_of.png` (the best of N, by N and by attribute), and sheets of the first captions and of failures taken at random.
Captions that are done are kept in `records.jsonl`: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import Jobs
from judge import Judge, judge_by_attribute, likeliest, log_likelihood, share_of_scenes_read
from measures import best_of, frechet_distance, frechet_interval, interval
from tqdm import tqdm

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import ArgumentParser, number, run
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.devices import pick_device
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.files.images import contact_sheet, image_to_tensor, read_image, resize, save_image
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.sampling.candidates import Candidate, generate_candidates
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.tokenizers.load import load_tokenizer
from diffusion.decoder import DiffusionDecoder
from diffusion.guidance import ClipGuidance

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "models/default"
GROUPS = {"one subject": 1, "two subjects": 2}
ATTRIBUTES = ("count", "subject", "colour", "background", "size", "place")
FRECHET = {
    "own_diffused": "tokens of the drawn scenes: diffusion decoder",
    "own_enlarged": "tokens of the drawn scenes: VQGAN's picture enlarged",
    "diffused": "best sampled tokens: diffusion decoder",
    "enlarged": "best sampled tokens: VQGAN's picture enlarged",
}
PICTURES_ON_SHEET = 12

Record = dict[str, Any]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder of dalle, vae, clip, decoder, judge")
    parser.add_argument("--count", type=number(int, 1), default=500, help="captions with one subject, and as many with "
                                                                          "two (default 500)")  # fmt: skip
    parser.add_argument("--num_images", type=number(int, 1), default=16, help="candidates that CLIP ranks (default 16)")
    parser.add_argument("--curve_count", type=number(int, 0), default=50,
                        help="captions of each group that get --curve_images candidates (default 50)")  # fmt: skip
    parser.add_argument("--curve_images", type=number(int, 1), default=64, help="where the curve ends (default 64)")
    parser.add_argument("--guided_count", type=number(int, 0), default=50,
                        help="captions of each group also diffused with CLIP guidance (default 50)")  # fmt: skip
    for name, kind in (("top_p", number(float, 0, 1, above=True)), ("temperature", number(float, 0)),
                       ("cond_scale", number(float, 0))):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help="(default: the model's own)")
    parser.add_argument("--split", choices=glyphs.SPLITS, default="test")
    parser.add_argument("--steps", default="quad25", help="diffusion steps (default quad25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--device")
    parser.add_argument(
        "--jobs",
        type=number(int, 1),
        default=1,
        help="processes that share captions and cores: on a CPU, as many as it has cores (default 1)",
    )
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------
# Drawing


class Models:
    """The parts of one model folder, on a device, with the settings its tokens are drawn by."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Models:
        sampling = {name: getattr(arguments, name) for name in ("top_p", "temperature", "cond_scale")}
        return cls(arguments.model, pick_device(arguments.device), **sampling)

    def __init__(self, folder: Path, device: torch.device, **sampling: float | None):
        self.dalle = DALLE.from_pretrained(folder / "dalle").to(device).eval()
        self.dalle.tokenizer = load_tokenizer(beside=folder / "dalle")
        self.clip = CLIP.from_pretrained(folder / "clip").to(device).eval().requires_grad_(False)
        self.decoder = DiffusionDecoder.from_pretrained(folder / "decoder").to(device).eval().requires_grad_(False)
        self.judge = Judge.from_pretrained(folder / "judge").eval()
        own = json.loads((folder / "sampling.json").read_text("utf-8"))
        self.guidance = {name: own.pop(name) for name in ("clip_guidance_scale",) if name in own}
        self.sampling = own | {name: value for name, value in sampling.items() if value is not None}
        self.device = device

    def candidates(self, scene: glyphs.Scene, count: int, seed: int) -> tuple[Record, list[Candidate]]:
        """What CLIP and the judge say of `count` candidates, in the order of their numbers, and the candidates."""
        found = generate_candidates(self.dalle, scene.caption, count, batch_size=min(count, 32),
                                    scorer=self.clip, seed=seed,
                                    settings=SamplingSettings(**self.sampling))  # fmt: skip
        found.sort(key=lambda candidate: candidate.index)
        seen = self.judge.read(torch.stack([candidate.image for candidate in found]))
        right = [judge_by_attribute(scene, answers) for answers in seen]
        return {"scores": [candidate.score for candidate in found], "right": right}, found

    def diffuse(
        self, scene: glyphs.Scene, tokens: torch.Tensor, steps: str, seed: int, guidance: dict | None = None
    ) -> torch.Tensor:
        """The picture (1, 3, h, w) of one grid of tokens; `guidance` holds the settings of CLIP's, if it guides."""
        guide = None if guidance is None else ClipGuidance(self.clip, [(scene.caption, 1.0)], **guidance)
        return self.decoder.decode(tokens[None].to(self.device), steps, seed=seed, guidance=guide).cpu()

    @torch.no_grad()
    def opinion(self, scene: glyphs.Scene, picture: torch.Tensor) -> Record:
        """What the judge says of one picture (1, 3, h, w)."""
        features = self.judge.features(picture)
        logits = self.judge.logits(features)
        return {
            "right": judge_by_attribute(scene, likeliest(logits)[0]),
            "log_likelihood": round(float(log_likelihood(scene, logits)), 4),
            "features": [round(x, 4) for x in features[0].tolist()],
        }


def clip_choice(found: Sequence[Candidate]) -> Candidate:
    """The candidate that CLIP scores highest; of equals the first drawn."""
    return max(found, key=lambda candidate: (candidate.score, -candidate.index))


def measure(arguments: argparse.Namespace, models: Models, group: str, index: int) -> Record:
    """Draws one caption in every way, writes its strip of pictures, and returns what was seen."""
    scene = glyphs.make_scene(index, arguments.split, num_subjects=GROUPS[group])
    longest = max(arguments.num_images, arguments.curve_images)
    count = longest if index < arguments.curve_count else arguments.num_images
    record, found = models.candidates(scene, count, arguments.seed)
    best = clip_choice(found[: arguments.num_images])
    drawn = torch.from_numpy(glyphs.draw(scene, 256)).permute(2, 0, 1)[None].float() / 255
    enlarged = resize(best.image[None], 256)
    diffused = models.diffuse(scene, best.tokens, arguments.steps, arguments.seed)
    # What both decoders make of the tokens of the drawn scene itself: how they differ with nothing else in the way.
    vae = models.dalle.vae
    own_tokens = vae.get_codebook_indices(resize(drawn, vae.image_size).to(models.device))
    own_enlarged = resize(vae.decode_image(own_tokens).cpu(), 256)
    own_diffused = models.diffuse(scene, own_tokens[0], arguments.steps, arguments.seed)
    record |= {
        "group": group, "index": index, "caption": scene.caption, "best": best.index,
        "drawn": models.opinion(scene, drawn),
        "enlarged": models.opinion(scene, enlarged),
        "diffused": models.opinion(scene, diffused),
        "own_enlarged": models.opinion(scene, own_enlarged),
        "own_diffused": models.opinion(scene, own_diffused),
    }  # fmt: skip
    strip = [drawn, enlarged, diffused]
    if index < arguments.guided_count:
        guided = models.diffuse(scene, best.tokens, arguments.steps, arguments.seed, models.guidance)
        record["guided"] = models.opinion(scene, guided)
        strip.append(guided)
    sheet = contact_sheet([picture[0] for picture in strip], len(strip), gap=0)
    save_image(strip_path(arguments.output_dir, record), sheet)
    return record


def strip_path(folder: Path, record: Record) -> Path:
    return folder / "pictures" / f"{record['group'].replace(' ', '_')}-{record['index']:04}.png"


def all_records(arguments: argparse.Namespace, models: Models) -> list[Record]:
    """Draws what is not in `records.jsonl` yet."""
    path = arguments.output_dir / "records.jsonl"
    settings = {name: getattr(arguments, name) for name in ("num_images", "curve_count", "curve_images", "guided_count",
                                                            "split", "steps", "seed")}  # fmt: skip
    settings |= {"sampling": models.sampling | models.guidance, "model": str(arguments.model)}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        write_text(path, json.dumps(settings) + "\n")
    elif json.loads(lines[0]) != settings:
        raise UsageError(f"{path} was made with other settings; move it away or give another --output_dir")
    records = {}
    for line in lines[1:]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was broken off
            continue
        records[record["group"], record["index"]] = record
    wanted = [(group, index) for index in range(arguments.count) for group in GROUPS]
    with path.open("a", encoding="utf-8") as file:
        if lines:
            file.write("\n")
        missing = [key for key in wanted if key not in records]
        # A single job is this process, which has its models already.
        make_models = partial(Models.of, arguments) if arguments.jobs > 1 else lambda: models
        with Jobs(arguments.jobs, make_models) as jobs:
            done = jobs.map(partial(measure, arguments), missing)
            for record in tqdm(done, "captions", len(missing), dynamic_ncols=True):
                records[record["group"], record["index"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
    return [records[key] for key in wanted]


# --------------------------------------------------------------------------------------------------
# Figures


def all_right(right: dict[str, bool]) -> bool:
    return all(right.values())


def with_interval(values: Sequence[float]) -> Record:
    low, high = interval(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "count": len(values)}


def shares(records: list[Record], num_images: int) -> Record:
    """Each way's share of pictures with everything right, and after diffusion the paired difference to before."""
    one = [np.mean([all_right(right) for right in r["right"][:num_images]]) for r in records]
    best = [float(all_right(r["right"][r["best"]])) for r in records]
    diffused = [float(all_right(r["diffused"]["right"])) for r in records]
    return {
        "one candidate": with_interval(one),
        f"best of {num_images}": with_interval(best),
        "after diffusion": with_interval(diffused),
        "diffusion minus before": with_interval(np.subtract(diffused, best)),
    }


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
    tests = {"everything": all_right} | {name: lambda right, name=name: right[name] for name in ATTRIBUTES}
    for name, test in tests.items():
        chosen = [r for r in records if name == "everything" or name in r["right"][0]]
        if chosen:
            right = [[test(one) for one in r["right"]] for r in chosen]
            values[name] = [float(np.mean([best_of(r["scores"], x, n) for r, x in zip(chosen, right, strict=True)]))
                            for n in steps]  # fmt: skip
    return values


def guidance_effect(records: list[Record]) -> Record:
    """CLIP guidance on minus off, by the judge: likelihood of the caption in nats, and everything right."""
    records = [r for r in records if "guided" in r]
    if not records:
        return {}
    nats = [r["guided"]["log_likelihood"] - r["diffused"]["log_likelihood"] for r in records]
    right = [float(all_right(r["guided"]["right"])) - all_right(r["diffused"]["right"]) for r in records]
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


# --------------------------------------------------------------------------------------------------
# Output


def print_tables(figures: Record) -> None:
    def cell(value: Record) -> str:
        return f"{value['mean']:6.1%} ({value['low']:.1%} to {value['high']:.1%})"

    groups = figures["groups"]
    print(f"\n{'everything right':24}" + "".join(f"{name:>30}" for name in groups))
    for way in next(iter(groups.values()))["shares"]:
        print(f"{way:24}" + "".join(f"{cell(group['shares'][way]):>30}" for group in groups.values()))
    for name, group in groups.items():
        print(f"\n{name:24}" + "".join(f"{attribute:>12}" for attribute in ATTRIBUTES))
        for way, values in group["attributes"].items():
            texts = ("–" if np.isnan(values[a]) else f"{values[a]:.1%}" for a in ATTRIBUTES)
            print(f"{way:24}" + "".join(f"{text:>12}" for text in texts))
    if distances := figures["frechet"]:
        print(f"\nFréchet distance to {distances['pictures']} drawn scenes, on the judge's features")
        for name, words in FRECHET.items():
            values = distances[name]
            print(f"{words:56}{values['distance']:10.2f}  ({values['low']:.2f} to {values['high']:.2f})")
    if figures["guidance"]:
        nats, right = figures["guidance"]["nats"], figures["guidance"]["right"]
        print(f"\nCLIP guidance on minus off, {figures['guidance']['captions']} captions: "
              f"{nats['mean']:+.4f} nats ({nats['low']:+.4f} to {nats['high']:+.4f}), everything right "
              f"{right['mean']:+.1%} ({right['low']:+.1%} to {right['high']:+.1%})")  # fmt: skip


def plot_curves(path: Path, groups: Record) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no best_of.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(groups), figsize=(5.2 * len(groups), 3.6), sharey=True, layout="constrained")
    for axis, (name, group) in zip(axes, groups.items(), strict=True):
        curve = group["best_of"]
        for attribute in ("everything", *ATTRIBUTES):
            if attribute in curve:
                thick = attribute == "everything"
                # Its own colour, whichever of the others a group has.
                colour = "black" if thick else f"C{ATTRIBUTES.index(attribute)}"
                axis.plot(curve["N"], [100 * y for y in curve[attribute]], label=attribute, marker="o", markersize=3,
                          linewidth=2.5 if thick else 1, color=colour)  # fmt: skip
        axis.set(title=f"{name} ({curve['captions']} captions)", xlabel="N: CLIP's best of N", xscale="log")
        axis.set_xticks(curve["N"], curve["N"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right, %")
    lines = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines, loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_sheet(path: Path, records: list[Record], folder: Path) -> None:
    """Strips of the drawn scene, the best candidate enlarged, and that one diffused, two captions a row."""
    if not records:
        return
    strips = [image_to_tensor(read_image(strip_path(folder, record)))[0] for record in records]
    parts = [part[None] for strip in strips for part in strip.split(strip.shape[1], dim=2)[:3]]
    save_image(path, contact_sheet([resize(part, 128)[0] for part in parts], columns=6))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    models = Models.of(arguments)
    read = share_of_scenes_read(models.judge)
    print(f"the judge reads {read:.1%} of 1,000 drawn test scenes without a mistake; sampling with {models.sampling}")
    records = all_records(arguments, models)

    figures: Record = {"judge": read, "sampling": models.sampling, "groups": {}}
    for name in GROUPS:
        chosen = [r for r in records if r["group"] == name]
        figures["groups"][name] = {
            "shares": shares(chosen, arguments.num_images),
            "attributes": by_attribute(chosen, arguments.num_images),
            "best_of": curves(chosen, arguments.curve_images),
        }
    figures |= {"frechet": frechet(records), "guidance": guidance_effect(records)}
    print_tables(figures)

    folder = arguments.output_dir
    write_text(folder / "quality.json", json.dumps(figures, indent=1) + "\n")
    if arguments.curve_count:
        plot_curves(folder / "best_of.png", figures["groups"])
    failures = [r for r in records if not all_right(r["diffused"]["right"])]
    random.Random(0).shuffle(failures)
    write_sheet(folder / "first.png", records[:PICTURES_ON_SHEET], folder)
    write_sheet(folder / "failures.png", failures[:PICTURES_ON_SHEET], folder)
    print(f"\n{len(failures)} of {len(records)} captions failed; in {folder}: quality.json, best_of.png, first.png "
          "and failures.png (the drawn scene, the best candidate, that one diffused)")  # fmt: skip


if __name__ == "__main__":
    run(main)
