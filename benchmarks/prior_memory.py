"""Memory of a min-dalle prior with random weights: `python benchmarks/prior_memory.py --help`."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dalle_pytorch import load_prior
from dalle_pytorch.cli import run
from dalle_pytorch.devices import pick_device
from dalle_pytorch.priors.min_dalle import ImageDecoder, TextEncoder
from dalle_pytorch.sampling.loop import prefill
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.vae.vqgan import VQGanVAE

SIZES = {  # width, layers, gated units, text and image vocabulary
    "tiny": (64, 2, 96, 200, 16384), "mini": (1024, 12, 2730, 50264, 16384), "mega": (2048, 24, 4096, 50272, 16415),
}  # fmt: skip
VQGAN = {"image_size": 256, "num_tokens": 16384, "ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,), "gumbel": False,
         "decoder_only": True, "unit_range": True}  # fmt: skip


@dataclass
class PriorMemorySettings(Settings):
    """Writes a min-dalle of random float16 weights, opens it, and takes the first tokens of a batch; GiB at each stage.

    python benchmarks/prior_memory.py --size mega --low_memory

    On a CPU this is the process's resident memory, on a GPU PyTorch's allocations. --device meta opens only, each file
    moved on at once: what opening for a GPU takes of the host's memory.
    """

    size: str = option("mini", "of the published sizes", choices=tuple(SIZES))
    dtype: str = option("float32", "of the weights", choices=("float32", "float16"))
    device: str = option("cpu", "cpu, cuda … or meta")
    batch_size: int = option(8, "candidates, with guidance", low=1)
    low_memory: bool = option(False, "release the text encoder after the prompt")
    folder: Path | None = option(None, "where the files are kept, 5 GiB for mega (default: a temporary folder)")


def write_random(folder: Path, size: str) -> None:
    """The files of min-dalle, one after another, without those that are there."""
    dim, depth, ff_dim, text_vocabulary, image_vocabulary = SIZES[size]
    heads = max(dim // 64, 1)
    made = {
        "encoder": lambda: TextEncoder(text_vocabulary, 64, dim, depth, heads, ff_dim),
        "decoder": lambda: ImageDecoder(image_vocabulary + 1, 256, dim, depth, heads, ff_dim),
        "detoker": lambda: VQGanVAE(**VQGAN),
    }
    for name, make in made.items():
        if not (folder / f"{name}.pt").exists():
            with torch.device("meta"):
                shapes = {key: tensor.shape for key, tensor in make().state_dict().items()}
            dtype = torch.float32 if name == "detoker" else torch.float16
            state = {key: (torch.rand(shape) * 0.1 - 0.05).to(dtype) for key, shape in shapes.items()}
            state = {key.replace("quantize.embedding", "embedding"): tensor for key, tensor in state.items()}
            torch.save(state, folder / f"{name}.pt")
    tokens = ("<s>", "<pad>", "</s>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")


class Gauge:
    """Prints GiB now, and at the peak since the last stage."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def __call__(self, stage: str) -> None:
        if self.device.type == "cuda":
            now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        else:
            status = Path("/proc/self/status").read_text("ascii")
            now, peak = (1024 * int(re.findall(rf"{name}:\s*(\d+)", status)[0]) for name in ("VmRSS", "VmHWM"))
        print(f"{stage:<44} {now / 2**30:6.2f} {peak / 2**30:6.2f}", flush=True)
        self.reset()


@torch.no_grad()
def measure(folder: Path, settings: PriorMemorySettings) -> None:
    device = torch.device("meta") if settings.device == "meta" else pick_device(settings.device)
    gauge = Gauge(device)
    print(f"{'GiB':<44} {'now':>6} {'peak':>6}")
    gauge("before")
    flags = {"heads": 1} if settings.size == "tiny" else {}
    prior = load_prior(folder, device=device, dtype=getattr(torch, settings.dtype), low_memory=settings.low_memory,
                       **flags)  # fmt: skip
    gauge("opened")
    if device.type == "meta":
        return
    prefix = prefill(prior, prior.tokenize("an armchair"), cond_scale=prior.sampling.cond_scale)
    gauge("after the prompt")
    rows = torch.arange(2, device=device).repeat_interleave(settings.batch_size)
    cache = prefix.cache.gather(rows, prior.max_length)
    tokens = torch.zeros(settings.batch_size, prior.image_seq_len, dtype=torch.long, device=device)
    for position in range(2):
        prior.step(tokens[:, 0].repeat(2), position, cache)
    for layer in cache.image.layers:  # pages of a CPU are taken when they are written
        layer.kv.keys.fill_(0), layer.kv.values.fill_(0)
    gauge(f"sampling {settings.batch_size} candidates, cond_scale 16")
    del cache
    gauge("sampled")
    prior.vae.decode_image(tokens[:1])
    gauge("decoded one image")


def main(argv: Sequence[str] | None = None) -> None:
    settings = PriorMemorySettings.parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_random(folder, settings.size)
        measure(folder, settings)


if __name__ == "__main__":
    run(main)
