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
from tqdm import tqdm

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.sampling.dtypes import converted
from dalle_pytorch.sampling.loop import evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL

Record = dict[str, Any]


@dataclass
class DtypeSettings(Settings):
    """The same captions and the same random numbers with a prior in float32 and in another dtype: one candidate each,
    decoded in float32 and read by the judge; no diffusion.

    python benchmarks/dtypes.py --count 500        # two hours on one core

    Prints, for each kind of caption, the share of candidates with everything right, and the difference with its
    interval over captions. Writes `dtypes.json` and, as it goes, `records.jsonl`: the same command resumes.
    """

    model: Path = option(DEFAULT_MODEL, "folder of dalle, vae, judge")
    dtype: str = option("int8", "in place of float32", choices=[name for name in DTYPES if name != "auto"])
    count: int = option(150, "captions of each kind", low=1)
    batch_size: int = option(30, "captions at once", low=1)
    split: str = option("test", "captions that training never showed, or others")
    seed: int = option(0, "of candidates")
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    output_dir: Path = option(Path("outputs/dtypes"), "where the records and tables go")


@torch.no_grad()
def measure(settings: DtypeSettings, pipe: TextToImage, priors: Sequence[Any], judge: Judge,
            keys: Sequence[tuple[str, int]]) -> list[Record]:  # fmt: skip
    """Draws one candidate for each caption with each prior; what is right by the judge."""
    scenes = [scene_of(*key, settings.split) for key in keys]
    sampling = pipe.model.sampling
    records: list[Record] = [{"group": group, "index": index, "right": []} for group, index in keys]
    drawn = []
    for prior in priors:
        with evaluation(prior):
            text = prior.tokenize([scene.caption for scene in scenes])
            prefix = prefill(prior, text, None, sampling.cond_scale)
            uniforms = torch.cat([candidate_uniforms(settings.seed, row, [0], prior.image_seq_len) for row in text])
            rows = torch.arange(len(text), device=prior.device)
            drawn.append(sample_image_tokens(prior, prefix, rows, uniforms, sampling))
            images = prior.vae.decode_image(drawn[-1]).float().cpu()
        for record, scene, seen in zip(records, scenes, judge.read(images), strict=True):
            record["right"].append(judge_by_attribute(scene, seen))
    for record, same in zip(records, (drawn[0] == drawn[1]).float().mean(dim=1).tolist(), strict=True):
        record["same_tokens"] = same
    return records


def table(records: Sequence[Record], dtype: str) -> Record:
    """The figures of each kind of caption and of all."""
    figures: Record = {}
    for group in (*GROUPS, "all"):
        chosen = [record for record in records if group in ("all", record["group"])]
        right = np.asarray([[all(one.values()) for one in record["right"]] for record in chosen], float)
        low, high = interval(right[:, 1] - right[:, 0])
        figures[group] = {"captions": len(chosen), "float32": right[:, 0].mean(), dtype: right[:, 1].mean(),
                          "difference": (right[:, 1] - right[:, 0]).mean(), "low": low, "high": high,
                          "same_tokens": float(np.mean([record["same_tokens"] for record in chosen]))}  # fmt: skip
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    settings = DtypeSettings.parse(argv)
    path = settings.output_dir / "records.jsonl"
    head = {name: str(vars(settings)[name]) for name in ("model", "dtype", "split", "seed")}
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

    figures = table([record for record in records if record["index"] < settings.count], settings.dtype)
    print(f"\n| everything right | captions | float32 | {settings.dtype} | difference | equal tokens |")
    print("|---|---|---|---|---|---|")
    for group, row in figures.items():
        print(
            f"| {group} | {row['captions']} | {row['float32']:.1%} | {row[settings.dtype]:.1%} | "
            f"{row['difference']:+.1%} ({row['low']:+.1%} to {row['high']:+.1%}) | {row['same_tokens']:.0%} |"
        )
    write_text(settings.output_dir / "dtypes.json", json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
