"""Memory of reversible layers: `python benchmarks/reversible_memory.py --help`."""

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_pytorch import DALLE
from dalle_pytorch.cli import run
from dalle_pytorch.devices import pick_device
from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.vae.discrete import DiscreteVAE

MIB = 2**20


@dataclass
class MemorySettings(Settings):
    """Peak memory of one training step by depth, with reversible layers and without.

    python benchmarks/reversible_memory.py --output outputs/reversible_memory.json

    Every case runs in a process of its own. On a CPU the peak is that of the process's resident memory, on a GPU that
    of PyTorch's allocations, both counted from before the step. Weights and their gradients, which grow with depth
    whatever the layers are, have a column of their own. Prints a table; with --output it is written as JSON too.
    """

    depths: list[int] = option([8, 16, 32], "layers", low=1, nargs="+")
    dim: int = option(64, "width, of heads of 16", low=16)
    batch_size: int = option(8, "sequences", low=1)
    image_fmap_size: int = option(16, "side of the token grid", low=1)
    device: str | None = option(None, "cpu, cuda … (default: a GPU if there is one)")
    output: Path | None = option(None, "write the table as JSON", metavar="FILE")


def measure(settings: MemorySettings, depth: int, reversible: bool) -> dict[str, float]:
    """One training step, in this process: MiB and seconds."""
    torch.manual_seed(0)
    device, side, text_seq_len = pick_device(settings.device), settings.image_fmap_size, 64
    vae = DiscreteVAE(image_size=8 * side, num_tokens=256, codebook_dim=8, hidden_dim=8)
    dalle = DALLE(
        dim=settings.dim, vae=vae, num_text_tokens=256, text_seq_len=text_seq_len, depth=depth,
        heads=max(settings.dim // 16, 1), dim_head=16, reversible=reversible,
    ).to(device)  # fmt: skip
    text = torch.randint(1, 256, (settings.batch_size, text_seq_len), device=device)
    image = torch.randint(256, (settings.batch_size, side * side), device=device)

    def step(size: slice) -> None:
        dalle(text[size], image[size], return_loss=True).backward()

    step(slice(1))  # loads what the first step loads, and makes the gradients
    before = peak(device, reset=True)
    started = time.perf_counter()
    step(slice(None))
    used = peak(device) - before
    weights = 2 * sum(parameter.numel() * parameter.element_size() for parameter in dalle.transformer.parameters())
    return {"activations_mib": round(used / MIB, 1), "weights_and_gradients_mib": round(weights / MIB, 1),
            "seconds": round(time.perf_counter() - started, 2)}  # fmt: skip


def peak(device: torch.device, reset: bool = False) -> int:
    """Bytes of the most memory held so far; with `reset`, of what is held now, from which a GPU's peak counts anew."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_apart(settings: MemorySettings, depth: int, layers: str) -> dict[str, float]:
    """`measure` in a fresh process, whose peak is its own."""
    # Large blocks go back to the system when they are freed, and so are not counted as held.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, settings, depth, layers == "reversible").result()
        except BrokenProcessPool:
            raise UsageError(f"depth {depth}, {layers}: the process was killed, out of memory perhaps") from None


def main(argv: Sequence[str] | None = None) -> None:
    settings = MemorySettings.parse(argv)
    print("| depth | layers | activations, MiB | weights and gradients, MiB | step, s |")
    print("|---:|---|---:|---:|---:|")
    rows = []
    for depth in settings.depths:
        for layers in ("plain", "reversible"):
            rows.append({"depth": depth, "layers": layers, **measure_apart(settings, depth, layers)})
            print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    if settings.output is not None:
        sizes = {name: vars(settings)[name] for name in ("dim", "batch_size", "image_fmap_size")}
        write_text(settings.output, json.dumps({**sizes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
