"""Whether a prior in fewer bits draws what it is asked as often: `python benchmarks/dtypes.py --help`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import Judge, judge_by_attribute
from measures import interval
from quality import GROUPS, scene_of
from torch.nn import functional as F
from tqdm import tqdm

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.dtypes import converted
from dalle_pytorch.sampling.loop import evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.scenes.dataset import images_of
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL

Record = dict[str, Any]


@dataclass
class DtypeSettings(Settings):
    """The same captions with a prior in float32 and in another dtype: the loss in nats of an image token of the drawn
    scenes; and one candidate each, of the same random numbers, decoded in float32 and read by the judge, undiffused.

    python benchmarks/dtypes.py --count 500                     # two hours on one core
    python benchmarks/dtypes.py --count 50 --candidates False   # the loss alone: minutes

    Prints both for each kind of caption: the share of candidates with everything right, and the differences with their
    intervals over captions. Writes `dtypes.json` and, as it goes, `records.jsonl`: the same command resumes.
    """

    model: Path = option(DEFAULT_MODEL, "folder of dalle, vae, judge")
    dtype: str = option("int8", "in place of float32", choices=[name for name in DTYPES if name != "auto"])
    count: int = option(150, "captions of each kind", low=1)
    candidates: bool = option(True, "draw candidates for the judge")
    batch_size: int = option(30, "captions at once", low=1)
    split: str = option("test", "captions that training never showed, or others")
    seed: int = option(0, "of candidates")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    output_dir: Path = option(Path("outputs/dtypes"), "where the records and tables go")


@torch.no_grad()
def measure(settings: DtypeSettings, pipe: TextToImage, priors: Sequence[Prior], judge: Judge,
            keys: Sequence[tuple[str, int]]) -> list[Record]:  # fmt: skip
    """What each prior makes of each caption: its loss, its candidate's attributes and share of equal tokens."""
    scenes = [scene_of(*key, settings.split) for key in keys]
    sampling, device = pipe.model.sampling, pipe.model.device
    records: list[Record] = [{"group": group, "index": index, "loss": [], "right": []} for group, index in keys]
    targets = priors[0].encode_image(images_of(scenes, priors[0].vae.image_size).to(device))
    drawn = []
    for prior in priors:
        with evaluation(prior):
            text = prior.tokenize([scene.caption for scene in scenes])
            logits = prior.next_token_logits(text, targets)
            losses = F.cross_entropy(logits.mT, targets, reduction="none").mean(dim=1).tolist()
            for record, loss in zip(records, losses, strict=True):
                record["loss"].append(loss)
            if not settings.candidates:
                continue
            prefix = prefill(prior, text, None, sampling.cond_scale)
            uniforms = torch.cat([candidate_uniforms(settings.seed, row, [0], prior.image_seq_len) for row in text])
            rows = torch.arange(len(text), device=device)
            drawn.append(sample_image_tokens(prior, prefix, rows, uniforms, sampling))
            images = prior.vae.decode_image(drawn[-1]).float().cpu()
        for record, scene, seen in zip(records, scenes, judge.read(images), strict=True):
            record["right"].append(all(judge_by_attribute(scene, seen).values()))
    if drawn:
        for record, same in zip(records, (drawn[0] == drawn[1]).float().mean(dim=1).tolist(), strict=True):
            record["same_tokens"] = same
    return records


def compared(pairs: Sequence[tuple[float, float]]) -> Record:
    """Means of a measure in float32 and in the other dtype, and the difference with its interval."""
    first, second = np.asarray(pairs, float).T
    low, high = interval(second - first)
    return {"float32": first.mean(), "other": second.mean(), "difference": (second - first).mean(),
            "low": low, "high": high}  # fmt: skip


def table(records: Sequence[Record], candidates: bool) -> Record:
    """The figures of each kind of caption and of all."""
    figures: Record = {}
    for group in (*GROUPS, "all"):
        chosen = [record for record in records if group in ("all", record["group"])]
        figures[group] = {"captions": len(chosen), "loss": compared([record["loss"] for record in chosen])}
        if candidates:
            figures[group]["right"] = compared([record["right"] for record in chosen])
            figures[group]["same_tokens"] = float(np.mean([record["same_tokens"] for record in chosen]))
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    settings = DtypeSettings.parse(argv)
    path = settings.output_dir / "records.jsonl"
    head = {name: str(vars(settings)[name]) for name in ("model", "dtype", "split", "seed", "candidates")}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    if not lines:
        write_text(path, json.dumps(head) + "\n")
    elif json.loads(lines[0]) != head:
        raise UsageError(f"{path} was made with other settings; move it away or give another --output_dir")
    records = [json.loads(line) for line in lines[1:]]
    finished = {(record["group"], record["index"]) for record in records}
    missing = [key for index in range(settings.count) for key in ((group, index) for group in GROUPS)
               if key not in finished]  # fmt: skip

    pipe = TextToImage.from_pretrained(settings.model, settings.device, dtype="float32")
    priors = [pipe.model.prior, converted(pipe.model.prior, settings.dtype)]
    judge = Judge.from_pretrained(settings.model / "judge").eval()
    with path.open("a", encoding="utf-8") as file:
        for start in tqdm(range(0, len(missing), settings.batch_size), "batches"):
            new = measure(settings, pipe, priors, judge, missing[start : start + settings.batch_size])
            file.writelines(json.dumps(record) + "\n" for record in new)
            file.flush()
            records += new

    figures = table([record for record in records if record["index"] < settings.count], settings.candidates)
    measures = {"loss": ("nats a token", "{:.4f}", "{:+.4f}"), "right": ("everything right", "{:.1%}", "{:+.1%}")}
    for measure_name, (words, plain, signed) in measures.items():
        if measure_name not in figures["all"]:
            continue
        print(f"\n| {words} | captions | float32 | {settings.dtype} | difference |\n|---|---|---|---|---|")
        for group, row in figures.items():
            found = row[measure_name]
            means, differences = (plain.format(found[name]) for name in ("float32", "other")), [
                signed.format(found[name]) for name in ("difference", "low", "high")]  # fmt: skip
            print(f"| {group} | {row['captions']} | {' | '.join(means)} | {differences[0]} ({differences[1]} to "
                  f"{differences[2]}) |")  # fmt: skip
    write_text(settings.output_dir / "dtypes.json", json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
