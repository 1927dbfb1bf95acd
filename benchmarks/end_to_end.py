"""How long a prompt takes from its words to redrawn images: `python benchmarks/end_to_end.py --help`."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sampling import print_table

from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.sampling.loop import evaluation
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL

MEASURES = ("whole", "start", "demo")
SEEDS_STEPS, UNGUIDED = 1000, 4  # of the steps, and the first of them, of which most are pure noise and not guided
ROOT = Path(__file__).resolve().parents[1]
FIRST_TOKEN = """
import os
from text_to_image import TextToImage
TextToImage.from_pretrained(device="cpu").generate("a red seven on brick", 1, progress=lambda *_: os._exit(0))
"""

Record = dict[str, Any]


@dataclass
class EndToEndSettings(Settings):
    """The best of 64 candidates, the best 4 of them redrawn with CLIP guidance, against the same done as in the systems
    that this one follows: the whole sequence for every token, 1000 ancestral steps with guidance through the U-Net.

    python benchmarks/end_to_end.py      # or `make bench-e2e`

    Their way runs on the same networks, in the same run. A part of it is measured and scaled: for tokens, some rows at
    some positions of the grid; for diffusion, some of the steps. Then start-up: processor time of `generate.py --help`
    and from the process's start to the first token; and the peak memory of `make demo`. Prints tables in Markdown and
    writes `end_to_end.json`.
    """

    model: Path = option(DEFAULT_MODEL, "folder of the model")
    measures: list[str] = option([*MEASURES], "which of " + ", ".join(MEASURES), nargs="+")
    text: str = option("an avocado to the left of a chair on wood", "what to draw")
    num_images: int = option(64, "candidates", low=1)
    diffuse: int = option(4, "of them redrawn", low=1)
    rows: int = option(8, "candidates that their way is measured on", low=1)
    positions: int = option(8, "positions of the grid that it is measured at", low=1, high=256)
    steps: int = option(2, "diffusion steps that it is measured on", low=1, high=500)
    repeats: int = option(3, "of start-up, of which the median counts", low=1)
    threads: int = option(0, "threads; 0 for those that PyTorch takes by itself", low=0)
    cpu_time: bool = option(False, "the processor's time in place of the clock's, for one thread on a busy machine")
    output_dir: Path = option(Path("outputs/end_to_end"), "where the JSON goes")


def measure_whole(settings: EndToEndSettings) -> Record:
    """Seconds of both stages, ours and theirs, and our peak memory, in this process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    clock = time.process_time if settings.cpu_time else time.perf_counter
    pipe = TextToImage.from_pretrained(settings.model, "cpu")
    pipe.model.open("prior", "scorer", "decoder")

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        started = clock()
        result = work()
        return clock() - started, result

    ours_1, result = seconds(lambda: pipe.generate(settings.text, settings.num_images, keep=settings.diffuse))
    ours_2, _ = seconds(lambda: pipe.upscale(result, clip_guidance=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pixels = torch.stack([image.pixels for image in result])
    ranking, _ = seconds(lambda: pipe.model.scorer.score(settings.text, pixels))
    guidance = pipe.guidance(settings.text, cutn=16, guidance_every=1, guidance_min_sigma=0, guidance_through_unet=True)
    theirs_2 = [
        seconds(lambda count=count: pipe.upscale(result, num_inference_steps=SEEDS_STEPS, sampler="ddpm",
                                                 clip_guidance=guidance, stop_at=count))[0]
        for count in (UNGUIDED, UNGUIDED + settings.steps)
    ]  # fmt: skip
    return {
        "ours": {"tokens": ours_1, "diffusion": ours_2},
        "theirs": {
            "tokens": whole_sequences(pipe, settings, clock) + ranking * settings.num_images / len(result),
            # The steps' share alone: what comes before them is done once.
            "diffusion": (theirs_2[1] - theirs_2[0]) / settings.steps * SEEDS_STEPS,
        },
        "peak_mib": peak,
    }


def whole_sequences(pipe: TextToImage, settings: EndToEndSettings, clock: Callable[[], float]) -> float:
    """Seconds of sampling all candidates' tokens with the whole sequence, twice with guidance, for each token."""
    prior, cond_scale = pipe.model.prior, pipe.sampling().cond_scale
    text = prior.tokenize([settings.text]).repeat(settings.rows, 1)
    texts = [text] if cond_scale == 1 else [text, prior.unconditional_text(text)]
    spent = 0.0
    with evaluation(prior):
        for i in range(settings.positions):
            position = int((i + 0.5) * prior.image_seq_len / settings.positions)
            tokens = torch.zeros(settings.rows, position, dtype=torch.long)
            started = clock()
            for text in texts:
                prior.next_token_logits(text, tokens)
            spent += clock() - started
    return spent / settings.positions * prior.image_seq_len * settings.num_images / settings.rows


def in_new_process(settings: EndToEndSettings) -> Record:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_whole, (settings,))


def run_command(*arguments: str) -> tuple[float, float]:
    """Processor time of a Python process in seconds, and its peak memory in MiB."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"python {' '.join(arguments)} ended with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> None:
    settings = EndToEndSettings.parse(argv)
    if unknown := {*settings.measures} - {*MEASURES}:
        raise UsageError(f"measures: expected {', '.join(MEASURES)}, got {', '.join(sorted(unknown))}")
    found: Record = {"settings": settings.as_dict(), "torch": torch.__version__, "cores": os.cpu_count(),
                     "processor": platform.processor() or platform.machine()}  # fmt: skip
    if "whole" in settings.measures:
        whole = in_new_process(settings)
        lines = [[f"best of {settings.num_images}, {settings.diffuse} diffused", "ours, s", "theirs, s (scaled)", "×"]]
        sides = [whole["ours"], whole["theirs"]]
        for name in ("tokens", "diffusion", "whole"):
            ours, theirs = (sum(side.values()) if name == "whole" else side[name] for side in sides)
            lines.append([name, f"{ours:.1f}", f"{theirs:.0f}", f"{theirs / ours:.0f}"])
        print_table(*lines)
        print(f"\npeak memory {whole['peak_mib']:.0f} MiB")
        found["whole"] = {**whole, "ratio": sum(sides[1].values()) / sum(sides[0].values())}
    if "start" in settings.measures:
        commands = {"generate.py --help": ("generate.py", "--help"), "to the first token": ("-c", FIRST_TOKEN)}
        found["start"] = {
            name: median(run_command(*command)[0] for _ in range(settings.repeats))
            for name, command in commands.items()
        }
        print_table(["start", "processor time, s"], *([name, f"{s:.2f}"] for name, s in found["start"].items()))
    if "demo" in settings.measures:
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = run_command("demo.py", "--outputs_dir", folder)
        found["demo"] = {"seconds": seconds, "peak_mib": peak}
        print(f"\nmake demo: {seconds:.0f} s of processor time, peak memory {peak:.0f} MiB")
    path = settings.output_dir / "end_to_end.json"
    write_text(path, json.dumps(found, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    run(main)
