"""What a big prior needs, worked out on paper: `python benchmarks/scale_table.py --help`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dalle_pytorch.cli import run
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.settings import Settings, option
from dalle_pytorch.vae.discrete import DiscreteVAE

GPU_MEMORY = 80e9
OVERHEAD = 3e9  # CUDA, NCCL's buffers, what the allocator cannot use
PEAKS = {"A100": 312e12, "H100": 989e12}  # dense bf16 FLOP/s, SXM
DAY = 86_400

# Bytes for each parameter, of which the first stay whole and the second are divided by the number of processes.
# Weights and gradients are float32, and so are AdamW's two moments; DeepSpeed keeps a float32 copy of its own share.
STATES = {
    "DDP": (4 + 4 + 8, 0), "ZeRO-1": (4 + 4, 4 + 8), "ZeRO-2": (4, 4 + 4 + 8), "ZeRO-3": (0, 4 + 4 + 4 + 8),
    "FSDP": (0, 4 + 4 + 8),
}  # fmt: skip
BUCKETS = {"ZeRO-1": 4e9, "ZeRO-2": 4e9, "ZeRO-3": 2e9}  # DeepSpeed's, at its default sizes
RECOMPUTE = ("nothing", "checkpointing", "reversible")


@dataclass
class PriorSizes(Settings):
    dim: int = option(2048, "width", low=1)
    depth: int = option(20, "layers", low=1)
    heads: int = option(16, "heads", low=1)
    dim_head: int = option(64, "width of a head", low=1)
    text_tokens: int = option(256, "text tokens of a sequence", low=1)
    vocabulary: int = option(16384, "text tokens that there are", low=1)
    codebook: int = option(8192, "image tokens that there are", low=1)


@dataclass
class Sizes(PriorSizes):
    """What a big prior needs, worked out on paper: memory per GPU and steps per day. Nothing here is measured.

    python benchmarks/scale_table.py --depth 20 --image_tokens 1024

    prints the tables of docs/scale.md, which explains the formulas.
    """

    gpus: int = option(8, "GPUs of 80 GB", low=1)
    batch_size: int = option(512, "sequences a step, of all GPUs", low=1)
    image_tokens: list[int] = option([1024, 256], "image tokens of a sequence", low=1, nargs="+")
    mfu: float = option(0.4, "assumed share of the peak FLOP/s that is reached", low=0, high=1, above=True)


class Prior:
    """The sizes of a prior that memory and time follow from; `parameters` are counted on the model itself."""

    def __init__(self, *, dim: int, depth: int, heads: int, dim_head: int, text_tokens: int, image_tokens: int,
                 vocabulary: int, codebook: int):  # fmt: skip
        self.dim, self.depth, self.inner = dim, depth, heads * dim_head
        with torch.device("meta"):
            vae = DiscreteVAE(image_size=8 * math.isqrt(image_tokens), num_layers=3, num_tokens=codebook)
            model = DALLE(dim=dim, depth=depth, heads=heads, dim_head=dim_head, vae=vae, num_text_tokens=vocabulary,
                          text_seq_len=text_tokens, qk_norm=True)  # fmt: skip
        self.parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.layer_parameters = sum(parameter.numel() for parameter in model.transformer.layers[0].parameters())
        self.tokens = text_tokens + image_tokens
        self.logits = text_tokens * (vocabulary + text_tokens) + image_tokens * codebook

    def states(self, kind: str, processes: int, recompute: str) -> float:
        """Bytes of weights, gradients and optimizer in one process."""
        whole, split = STATES[kind]
        per_parameter = whole + split / processes
        # Autocast's 16-bit copies live through a pass; where layers are gathered, two of them do.
        copies = 2 * self.parameters
        if kind in ("FSDP", "ZeRO-3"):
            copies = 2 * 2 * self.layer_parameters + 2 * (self.parameters - self.depth * self.layer_parameters)
        gradients = 4 * self.parameters if recompute == "reversible" else 0  # what a pass brings, before it is added
        return per_parameter * self.parameters + copies + gradients + BUCKETS.get(kind, 0)

    def layer_activations(self) -> float:
        """Bytes that one layer keeps for the gradient of one sequence, under bf16 autocast.

        Float32 are the inputs of both norms. In 16 bits: inputs of the linear layers and outputs of the branches, four
        of width `dim`; gate, value, activated gate and product, each of width 4 · `dim`; of width heads · dim_head q
        and k before their norm, q, k and v, and the attention's output twice.
        """
        return self.tokens * (2 * 4 * self.dim + 2 * (4 * self.dim + 4 * 4 * self.dim + 7 * self.inner))

    def activations(self, recompute: str) -> float:
        """Bytes of activations for one sequence; of the logits in 16 bits, in float32 twice, and their gradient."""
        one, stream = self.layer_activations(), 4 * self.dim * self.tokens
        kept = {"nothing": self.depth * one, "checkpointing": self.depth * stream + one, "reversible": 4 * stream + one}
        return kept[recompute] + self.logits * (2 + 4 + 4 + 4)

    def flops(self, recompute: str) -> float:
        """Operations for one sequence: two for each weight and token forward, twice that backward."""
        # Causal attention looks at half of the pairs.
        layers = self.depth * self.tokens * (2 * self.layer_parameters + 2 * self.inner * self.tokens)
        passes = 3 if recompute == "nothing" else 4
        return passes * layers + 3 * 2 * self.dim * self.logits


def table(prior: Prior, gpus: int, batch: int, mfu: float) -> list[str]:
    lines = [
        f"| kind | recomputed | states, GB | activations, GB a sequence | largest micro-batch "
        f"| {' | '.join(f'steps a day, {name}' for name in PEAKS)} |",
        "|---|---|---:|---:|---:|" + "---:|" * len(PEAKS),
    ]
    for kind in STATES:
        for recompute in RECOMPUTE:
            if recompute == "reversible" and kind in ("ZeRO-3", "FSDP"):
                continue  # refused: reversible layers want whole parameters
            states, activations = prior.states(kind, gpus, recompute), prior.activations(recompute)
            largest = int((GPU_MEMORY - OVERHEAD - states) // activations)
            row = [kind, recompute, f"{states / 1e9:.1f}", f"{activations / 1e9:.2f}"]
            row.append(str(largest) if largest > 0 else "does not fit")
            for peak in PEAKS.values():
                seconds = batch * prior.flops(recompute) / (gpus * mfu * peak)
                row.append(f"{round(DAY / seconds, -2):,.0f}" if largest > 0 else "–")
            lines.append(f"| {' | '.join(row)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    settings = Sizes.parse(argv)
    for image_tokens in settings.image_tokens:
        prior = Prior(**settings.values(PriorSizes), image_tokens=image_tokens)
        print(
            f"\n{prior.parameters / 1e9:.2f} B parameters, {settings.text_tokens} text and {image_tokens} image "
            f"tokens, {settings.gpus} GPUs, {settings.batch_size} sequences a step, MFU {settings.mfu:.0%}:\n"
        )
        print("\n".join(table(prior, settings.gpus, settings.batch_size, settings.mfu)))


if __name__ == "__main__":
    run(main)
