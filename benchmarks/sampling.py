"""How fast image tokens are sampled: `python benchmarks/sampling.py --help`."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import dalle_pytorch_166
import torch
from torch import nn

from dalle_pytorch import DALLE, DiscreteVAE
from dalle_pytorch.cli import run
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.nn.linear import Int8Linear
from dalle_pytorch.sampling.dtypes import converted
from dalle_pytorch.sampling.loop import evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import DTYPES, SamplingSettings
from dalle_pytorch.sampling.threads import StepThreads
from dalle_pytorch.sampling.uniforms import candidate_uniforms
from dalle_pytorch.settings import Settings, option
from text_to_image import TextToImage
from text_to_image.model import DEFAULT_MODEL

REFERENCE = {"dim": 512, "depth": 8, "heads": 8, "dim_head": 64, "num_text_tokens": 4000, "text_seq_len": 64}
MODELS = ("default", "reference")
MEASURES = ("batches", "upstream", "candidates", "guidance", "load")
PROMPT = "a red seven on brick"

Record = dict[str, Any]


@dataclass
class SamplingBenchmark(Settings):
    """Images and tokens a second of the default model's prior and of a reference prior (512 wide, 8 layers, 64 + 256
    tokens), on a CPU, medians.

    python benchmarks/sampling.py                                      # or `make bench`: an hour on two quiet cores
    python benchmarks/sampling.py --models reference --batch_sizes 8 --threads 0

    Each number is measured in a process of its own. Measures: `batches`, a batch of candidates; `upstream`,
    DALLE-pytorch 1.6.6 with the same weights by its default path and with its cache forced, in turns with ours;
    `candidates`, 1024 against 64; `guidance`, cond_scale 3 against 1; `load`, beside a busy core. The limit is the time
    of the step's multiply-adds at the rate of a matrix product, or of its bytes at the memory's bandwidth, whichever is
    longer, summed over linear layers and attention. Writes tables in Markdown, and `sampling.json`.
    """

    measures: list[str] = option([*MEASURES], "which of " + ", ".join(MEASURES), nargs="+")
    models: list[str] = option([*MODELS], "which of " + ", ".join(MODELS), nargs="+")
    batch_sizes: list[int] = option([1, 8, 64, 256], "candidates at once", nargs="+", low=1)
    dtypes: list[str] = option(["float32", "int8"], "what the prior computes with, for `batches`", nargs="+")
    threads: list[int] = option([1, 0], "threads; 0 for as many as make the steps fastest", nargs="+", low=0)
    repeats: int = option(3, "of which the median counts", low=1)
    positions: int = option(
        8, "where the default path of DALLE-pytorch is measured, to be scaled to 256", low=1, high=256
    )
    cpu_time: bool = option(False, "the processor's time in place of the clock's, for one thread on a busy machine")
    output_dir: Path = option(Path("outputs/sampling"), "where the table, the JSON and DALLE-pytorch go")


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    model: str
    rows: int
    threads: int
    clock: str
    repeats: int
    weights: str  # of the reference prior, or "" for random ones
    dtype: str = "float32"
    cond_scale: float | None = None  # the model's own by default
    total: int | None = None  # candidates ranked and decoded by the pipeline, in batches of `rows`


def open_prior(cell: Cell) -> tuple[DALLE, SamplingSettings]:
    """The prior to measure, and how it is sampled: as the folder says, or by DALLE-pytorch's own settings."""
    if cell.model == "default":
        model = TextToImage.from_pretrained(DEFAULT_MODEL, "cpu", dtype="float32").model
        assert isinstance(model.prior, DALLE)
        return converted(model.prior, cell.dtype), model.sampling
    torch.manual_seed(0)
    vae = DiscreteVAE(image_size=256, num_layers=4, num_tokens=1024, codebook_dim=8, hidden_dim=8)
    prior = DALLE(vae=vae, **REFERENCE).eval()
    if cell.weights:
        prior.load_state_dict(torch.load(cell.weights), strict=True)
    return converted(prior, cell.dtype), SamplingSettings(top_k=0.5)


def seconds_of(work: Callable[[], object], clock: Callable[[], float], repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = clock()
        work()
        seconds.append(clock() - started)
    return seconds


def machine_rates(clock: Callable[[], float]) -> tuple[float, float]:
    """Multiply-adds a second of a large matrix product, and bytes a second read from memory: the best of some."""
    matrix, memory = torch.randn(1024, 1024), torch.ones(2**26)
    multiply_adds = 1024**3 / min(seconds_of(lambda: matrix @ matrix, clock, 9))
    return multiply_adds, memory.nbytes / min(seconds_of(memory.sum, clock, 5))


def least_seconds(prior: DALLE, rows: int, multiply_adds: float, bandwidth: float) -> float:
    """The limit of sampling whole grids of `rows` sequences in float32."""
    linears = [module for module in prior.transformer.modules() if isinstance(module, nn.Linear | Int8Linear)]
    weights = sum(linear.weight.numel() for linear in linears) + prior.num_image_tokens * prior.to_logits.in_features
    channels = sum(layer.attn.fn.to_out.in_features for layer in prior.transformer.layers)
    seconds = prior.image_seq_len * max(rows * weights / multiply_adds, 4 * weights / bandwidth)
    for position in range(prior.image_seq_len):
        numbers = rows * 2 * channels * (prior.text_seq_len + 1 + position)  # of keys and values
        seconds += max(numbers / multiply_adds, 4 * numbers / bandwidth)
    return seconds


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def measure(cell: Cell) -> Record:
    """Seconds, limit and peak memory of a batch."""
    if cell.threads:
        torch.set_num_threads(cell.threads)
    clock = getattr(time, cell.clock)
    if cell.total is not None:
        pipe = TextToImage.from_pretrained(DEFAULT_MODEL, "cpu")
        pipe.model.open("prior", "scorer")
        work = partial(pipe.generate, PROMPT, cell.total, keep=4, batch_size=cell.rows)
        return {"seconds": median(seconds_of(work, clock, cell.repeats)), "peak_mib": peak_mib()}
    prior, settings = open_prior(cell)
    if cell.cond_scale is not None:
        settings = replace(settings, cond_scale=cell.cond_scale)
    text = torch.ones(1, prior.text_seq_len, dtype=torch.long)
    uniforms = candidate_uniforms(0, text[0], range(cell.rows), prior.image_seq_len)

    def sample() -> None:
        threads = StepThreads(prior.device)
        with evaluation(prior):
            prefix = prefill(prior, text, None, settings.cond_scale)
            with threads.batch() if cell.threads == 0 else nullcontext():
                sample_image_tokens(prior, prefix, torch.zeros(cell.rows, dtype=torch.long), uniforms, settings,
                                    threads.step if cell.threads == 0 else None)  # fmt: skip

    seconds, peak = median(seconds_of(sample, clock, cell.repeats)), peak_mib()
    rates = machine_rates(clock)
    rows = cell.rows * (1 if settings.cond_scale == 1 else 2)
    return {"seconds": seconds, "peak_mib": peak, "limit": least_seconds(prior, rows, *rates),
            "gflops": 2 * rates[0] / 1e9, "gb_per_second": rates[1] / 1e9}  # fmt: skip


def in_new_process(cell: Cell) -> Record:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (cell,))


def upstream(settings: SamplingBenchmark, folder: Path, weights: Path, **options: Any) -> Record:
    """What `dalle_pytorch_166.py` prints, or writes to `weights`."""
    given = {"sizes": REFERENCE, "weights": str(weights), "positions": settings.positions, "rows": 1, "threads": 1,
             "cached": True, "clock": "perf_counter", "repeats": 1, **options}  # fmt: skip
    command = [sys.executable, dalle_pytorch_166.__file__, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output or "{}")


@contextmanager
def busy_core() -> Iterator[None]:
    """Beside a process that keeps the first of the cores busy."""
    core = min(os.sched_getaffinity(0))
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(core,), daemon=True)
    process.start()
    time.sleep(2)
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin(core: int) -> None:
    os.sched_setaffinity(0, {core})
    while True:
        pass


def print_table(*rows: Sequence[str]) -> None:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    print("\n" + "\n".join([head, "|---" * len(rows[0]) + "|", *body]), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    settings = SamplingBenchmark.parse(argv)
    for name, known in (("measures", MEASURES), ("models", MODELS), ("dtypes", DTYPES[1:])):
        if unknown := set(getattr(settings, name)) - set(known):
            raise UsageError(f"{name}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    folder, weights = settings.output_dir / "dalle_pytorch_1.6.6", settings.output_dir / "reference.pt"
    with_upstream = "upstream" in settings.measures and "reference" in settings.models
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if with_upstream:
        dalle_pytorch_166.install(folder)
        weights.unlink(missing_ok=True)
        upstream(settings, folder, weights)
    clock = "process_time" if settings.cpu_time else "perf_counter"
    plain = Cell("reference", 8, settings.threads[-1], clock, settings.repeats, str(weights) if with_upstream else "")
    records: list[Record] = []

    def record(name: str, cell: Cell, result: Record) -> Record:
        records.append({"measure": name, **asdict(cell), "weights": "", **result})
        return records[-1]

    cells = [replace(plain, model=model, threads=threads, rows=rows) for model in settings.models
             for threads in settings.threads for rows in settings.batch_sizes]  # fmt: skip
    if {"batches", "upstream"} & set(settings.measures):
        lines = [["prior", "dtype", "threads", "batch", "images/s", "tokens/s", "of float32's limit", "peak MiB",
                  "against the forced cache", "against the default path"]]  # fmt: skip
        for cell in cells:
            ours, theirs = [replace(cell, dtype=dtype) for dtype in settings.dtypes], []
            ours = [record("batches", one, in_new_process(one)) for one in ours]
            if with_upstream and cell.model == "reference":
                threads = cell.threads or torch.get_num_threads()
                for i, (name, repeats) in enumerate((("forced cache", cell.repeats), ("default path", 1))):
                    theirs.append(upstream(settings, folder, weights, rows=cell.rows, threads=threads, clock=clock,
                                           cached=i == 0, repeats=repeats))  # fmt: skip
                    record(name, cell, theirs[i])
            for one in ours:
                ratios = [f"{other['seconds'] / one['seconds']:.2f} ×" for other in theirs] or ["–", "–"]
                per_second = cell.rows / one["seconds"]
                lines.append([cell.model, one["dtype"], str(cell.threads or torch.get_num_threads()), str(cell.rows),
                              f"{per_second:.2f}", f"{256 * per_second:.0f}", f"{one['limit'] / one['seconds']:.0%}",
                              f"{one['peak_mib']:.0f}", *ratios])  # fmt: skip
        print_table(*lines)

    ratios = [["ratio", "time", "peak memory"]]

    def compare(name: str, first: Record, second: Record) -> None:
        ratios.append([name, *(f"{first[key] / second[key]:.2f} ×" for key in ("seconds", "peak_mib"))])

    if "candidates" in settings.measures:
        many, few = (record("candidates", cell, in_new_process(cell)) for cell in (
            replace(plain, model="default", rows=32, total=total, repeats=1) for total in (1024, 64)))  # fmt: skip
        compare("1024 candidates to 64", many, few)
    for model in settings.models if "guidance" in settings.measures else ():
        guided, free = (record("guidance", cell, in_new_process(cell)) for cell in (
            replace(plain, model=model, cond_scale=scale) for scale in (3.0, 1.0)))  # fmt: skip
        compare(f"{model}: cond_scale 3 to 1", guided, free)
    for rows in settings.batch_sizes if "load" in settings.measures else ():
        cell = replace(plain, rows=rows, threads=0)
        free = record("load", cell, in_new_process(cell))
        with busy_core():
            busy = record("load, one core busy", cell, in_new_process(cell))
        compare(f"batch {rows}: beside a busy core", busy, free)
    if len(ratios) > 1:
        print_table(*ratios)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "clock": clock,
               "capability": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    path = settings.output_dir / "sampling.json"
    write_text(path, json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    run(main)
