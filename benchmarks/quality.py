"""How often the default model draws what it is asked: test captions, read back by the judge.

    python benchmarks/quality.py --judge runs/judge/judge

For every caption: one candidate without ranking, the best of --num_images by CLIP, and that one after diffusion. A
picture counts when everything that its caption says is so. Prints a table, and writes `quality.json` and a sheet of the
first captions, in order, to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from judge import Judge, judge_by_attribute, share_of_scenes_read
from tqdm import tqdm

from dalle_pytorch.checkpoints import write_text
from dalle_pytorch.cli import ArgumentParser, number, pick_device, run
from dalle_pytorch.clip import CLIP
from dalle_pytorch.dalle import DALLE
from dalle_pytorch.data import glyphs
from dalle_pytorch.files import contact_sheet, resize, save_image
from dalle_pytorch.generation import generate_candidates
from dalle_pytorch.tokenizers import load_tokenizer
from diffusion.decoder import DiffusionDecoder

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "models/default"
ON_SHEET = 20  # captions


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="native folder of the judge (benchmarks/judge.py trains it)")
    parser.add_argument("--count", type=number(int, 1), default=200, help="test captions (default 200)")
    parser.add_argument("--num_images", type=number(int, 1), default=16, help="candidates per caption (default 16)")
    parser.add_argument("--top_p", type=number(float, 0, 1, above=True), help="(default: the model's own)")
    parser.add_argument("--temperature", type=number(float, 0), help="likewise")
    parser.add_argument("--cond_scale", type=number(float, 0), help="likewise")
    parser.add_argument("--split", choices=glyphs.SPLITS, default="test", help="train: for choosing settings")
    parser.add_argument("--first", type=number(int, 0), default=0, help="number of the first scene")
    parser.add_argument("--steps", default="quad25", help="diffusion steps (default quad25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_diffusion", action="store_true", help="leave out stage 2")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quality"))
    parser.add_argument("--device")
    return parser.parse_args(argv)


def share(rows: list[dict[str, bool]]) -> str:
    """The share of pictures with everything right, and its 95 % interval (Wilson 1927)."""
    n, p = len(rows), sum(all(row.values()) for row in rows) / len(rows)
    z = 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return f"{p:6.1%} ({middle - half:.0%} to {middle + half:.0%})"


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    device = pick_device(arguments.device)
    dalle = DALLE.from_pretrained(DEFAULT_MODEL / "dalle").to(device)
    tokenizer = load_tokenizer(beside=DEFAULT_MODEL / "dalle")
    clip = CLIP.from_pretrained(DEFAULT_MODEL / "clip").to(device)
    judge = Judge.from_pretrained(arguments.judge)
    decoder = None
    if not arguments.no_diffusion:
        decoder = DiffusionDecoder.from_pretrained(DEFAULT_MODEL / "decoder").to(device)
    print(f"the judge reads {share_of_scenes_read(judge):.1%} of 1,000 drawn test scenes without a mistake")

    sampling = json.loads((DEFAULT_MODEL / "sampling.json").read_text("utf-8"))
    given = {name: getattr(arguments, name) for name in ("top_p", "temperature", "cond_scale")}
    sampling |= {name: value for name, value in given.items() if value is not None}
    print(f"sampling with {sampling}")

    rows: dict[str, list[dict[str, bool]]] = defaultdict(list)
    records, sheet = [], []
    started = time.monotonic()
    for index in tqdm(range(arguments.count), desc="captions", dynamic_ncols=True):
        scene = glyphs.make_scene(arguments.first + index, arguments.split)
        candidates = generate_candidates(
            dalle, tokenizer, scene.caption, arguments.num_images, batch_size=arguments.num_images, scorer=clip,
            seed=arguments.seed, **sampling,
        )  # fmt: skip
        best = candidates[0]
        pictures = {"one candidate": next(c.image for c in candidates if c.index == 0)[None],
                    f"best of {arguments.num_images}": best.image[None]}  # fmt: skip
        if decoder is not None:
            tokens = best.tokens[None].to(device)
            pictures["after diffusion"] = decoder.decode(tokens, arguments.steps, seed=arguments.seed).cpu()
        record = {"caption": scene.caption, "subjects": len(scene.subjects)}
        for name, picture in pictures.items():
            right = judge_by_attribute(scene, judge.read(picture)[0])
            rows[name].append({**right, "_two": len(scene.subjects) == 2})
            record[name] = right
        records.append(record)
        if index < ON_SHEET:
            drawn = torch.from_numpy(glyphs.draw(scene, 256)).permute(2, 0, 1)[None] / 255
            sheet += [resize(picture, 256)[0] for picture in (drawn, *pictures.values())]

    seconds = time.monotonic() - started
    print(f"{arguments.count} {arguments.split} captions in {seconds:.0f} s; all that the caption says is so in:")
    print(f"{'':18}{'all':>24}{'one subject':>24}{'two subjects':>24}")
    for name, results in rows.items():
        two = [result.pop("_two") for result in results]
        groups = (results, *([r for r, t in zip(results, two, strict=True) if t == wanted] for wanted in (False, True)))
        print(f"{name:18}" + "".join(f"{share(group) if group else '–':>24}" for group in groups))
    attributes = ("count", "subject", "colour", "background", "size", "place")
    print(f"\n{'right by attribute':18}" + "".join(f"{attribute:>12}" for attribute in attributes))
    for name, results in rows.items():
        values = [[r[attribute] for r in results if attribute in r] for attribute in attributes]
        print(f"{name:18}" + "".join(f"{sum(v) / max(1, len(v)):12.1%}" for v in values))
    write_text(arguments.output_dir / "quality.json", json.dumps(records, indent=1) + "\n")
    save_image(
        arguments.output_dir / "sheet.png", contact_sheet(sheet, columns=len(sheet) // min(ON_SHEET, len(records)))
    )
    print(f"\n{arguments.output_dir}/sheet.png: drawn scene, {', '.join(rows)}")


if __name__ == "__main__":
    run(main)
