"""What the default model's CLIP tells apart: `python benchmarks/clip_twins.py --help`."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from quality import with_interval
from tqdm import trange

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.clip.base import CLIPModel
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.scenes.captions import FAMILY, states_place
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from text_to_image import Model


@dataclass
class TwinSettings(Settings):
    """What the default model's CLIP tells apart: pairs of scenes that differ in one fact, and their captions.

    python benchmarks/clip_twins.py --count 1500

    For every fact, of scenes with one subject and with two, and of two whose caption says which is where and whose
    caption does not: how often the right one of two captions fits an image best, and the right one of two images a
    caption; half is chance. With `--exchanged` subjects of one family, such as animals, and of two have rows of their
    own. Prints the table in Markdown and writes `clip_twins.json`.
    """

    clip_path: Path | None = option(None, "a CLIP (default: the default model's)")
    count: int = option(1500, "pairs of scenes", low=1)
    of: str = option("everything", "the scenes", choices=glyphs.MIXTURES)
    exchanged: bool = option(False, "two subjects, their colours exchanged where they can be, and captions that do not "
                                    "say which is where")  # fmt: skip
    output_dir: Path = option(Path("outputs/clip_twins"), "where the table goes")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")


@torch.no_grad()
def tell_apart(clip: CLIPModel, scenes: Sequence[glyphs.Scene]) -> tuple[float, float]:
    """1 or 0: whether the first scene's own caption fits its picture best, and its own picture its caption."""
    pictures = images_of(scenes, clip.image_size)
    tokens = clip.tokenize([scene.caption for scene in scenes])
    texts = F.normalize(clip.encode_text(tokens.to(clip.device)), dim=-1)
    fit = texts @ F.normalize(clip.encode_image(pictures.to(clip.device)), dim=-1).T
    return float(fit[0, 0] > fit[1, 0]), float(fit[0, 0] > fit[0, 1])


def main(argv: Sequence[str] | None = None) -> None:
    settings = TwinSettings.parse(argv)
    clip = Model.from_pretrained(device=settings.device, scorer=settings.clip_path).scorer
    told = defaultdict(list)
    for index in trange(settings.count, desc="pairs"):
        scene = glyphs.make_scene(index, "validation", 2 if settings.exchanged else None, settings.of)
        *scenes, fact = glyphs.make_twins(scene, index, exchanged=settings.exchanged)
        subjects = str(len(scenes[0].subjects))
        if scenes[0].relation is not None:
            subjects += ", placed" if states_place(scenes[0]) else ", unplaced"
        if settings.exchanged:
            families = {FAMILY[subject.kind] for subject in scenes[0].subjects}
            subjects += ", of one family" if len(families) == 1 else ", of two families"
        told[subjects, fact].append(tell_apart(clip, scenes))
    print("| subjects | changed | pairs | caption told | picture told |")
    print("|---|---|---|---|---|")
    rows = []
    for (subjects, fact), pairs in sorted(told.items()):
        by_picture, by_caption = (with_interval(column) for column in zip(*pairs, strict=True))
        cells = " | ".join(f"{v['mean']:.1%} ({v['low']:.0%} to {v['high']:.0%})" for v in (by_picture, by_caption))
        print(f"| {subjects} | {fact} | {len(pairs)} | {cells} |")
        rows.append({"subjects": subjects, "fact": fact, "pairs": len(pairs), "caption told": by_picture,
                     "picture told": by_caption})  # fmt: skip
    write_text(settings.output_dir / "clip_twins.json", json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
