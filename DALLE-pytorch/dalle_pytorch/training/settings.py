"""What every training is told: one table of names, defaults, ranges and help.

The commands in `commands/` derive from these dataclasses, and the loop takes them. torch is not imported here.
"""

import argparse
import os
import re
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UsageError
from dalle_pytorch.settings import Settings, option

# What a run keeps in `output_dir`, besides the trained networks.
KEPT_NAMES = (
    "checkpoints",
    "checkpoint.pt",
    "config.yaml",
    "metrics.jsonl",
    "samples",
    "tensorboard",
    "wandb",
    "wandb-id",
)


def check_part_name(name: str) -> str:
    """The name of a trained network's folder in `output_dir`. Raises `UsageError` for one that cannot be that."""
    if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name) or name.lower() in KEPT_NAMES or len(name.encode()) > 200:
        raise UsageError(f"--dalle_output_file_name is the name of a folder in --output_dir, without slashes and "
                         f"leading dots, and none of {', '.join(KEPT_NAMES)}; got {name[:80]!r}")  # fmt: skip
    return name


@dataclass
class OptimizationSettings(Settings):
    title = "training"

    output_dir: Path = option(help="where checkpoints, metrics and model go; the same command again resumes")
    steps: int | None = option(None, "steps of the optimizer", low=1, flags=["--lr_anneal_steps"])
    epochs: int | None = option(None, "passes over the data, instead of --steps", low=1, instead_of="steps")
    batch_size: int = option(8, "images per process and forward pass", low=1)
    ga_steps: int = option(1, "gradient accumulation: batches of every process that make one step", low=1)
    learning_rate: float = option(3e-4, low=0, above=True, flags=["--lr"])
    warmup_steps: int = option(100, "steps of linear warm-up", low=0, flags=["--lr_warmup_steps"])
    lr_decay: str = option("cosine", "after the warm-up; plateau, or no value: halved when the loss no longer falls",
                           nargs="?", const="plateau",
                           choices=["cosine", "constant", "plateau", "exponential"])  # fmt: skip
    lr_decay_rate: float = option(0.98, "factor of --lr_decay exponential, every 100 steps", low=0, high=1, above=True)
    weight_decay: float = option(0.01, "of matrices; vectors have none", low=0)
    clip_grad_norm: float = option(1.0, "largest norm of the gradient", low=0, above=True)
    ema_decay: float = option(0.0, "decay of the weights' moving average; 0: none", low=0, high=1, flags=["--ema_rate"])
    muon: bool = option(False, "Muon for the matrices of transformers, AdamW for the rest")
    max_bad_steps: int = option(10, "stop after so many steps in a row whose loss or gradient is not finite", low=1)
    num_workers: int = option(1, "processes that load data", low=0)
    seed: int = option(0, low=0)


@dataclass
class PrecisionSettings(Settings):
    title = "precision and memory"

    mixed_precision: str = option("no", "precision of the forward pass; --fp16 (or --amp) and --bf16 are short forms",
                                  choices=["no", "fp16", "bf16"],
                                  flags=["--fp16=fp16", "--amp=fp16", "--bf16=bf16"])  # fmt: skip
    activation_checkpointing: bool = option(False, "recompute layers in the backward pass", flags=["--use_checkpoint"])
    compile: bool = option(False, "compile the network with torch.compile: a minute or two before the first step")


@dataclass
class DistributionSettings(Settings):
    title = "several processes (docs/scale.md)"

    distributed_backend: str | None = option(
        None, "ddp, fsdp or deepspeed (default: ddp); --deepspeed is a short form", metavar="NAME",
        flags=["--distr_backend", "--distributed", "--deepspeed=deepspeed"])  # fmt: skip
    deepspeed_config: str | None = option(None, "JSON file of DeepSpeed settings", metavar="FILE")
    zero_stage: int | None = option(None, "ZeRO stage of DeepSpeed (default: 2)", choices=[0, 1, 2, 3])
    fsdp: bool = option(False, "shard parameters, gradients and optimizer state over processes")
    flops_profiler: bool = option(False, "count the FLOPs of one step after the first few, print them and stop")
    local_rank: int | None = option(None, argparse.SUPPRESS, flags=["--local-rank"])  # passed by launchers; unused


@dataclass
class ReportSettings(Settings):
    title = "checkpoints and reports"

    save_every: int = option(500, "steps between checkpoints", low=1, flags=["--save_every_n_steps", "--save_interval"])
    keep_n_checkpoints: int = option(2, "how many of the newest to keep", low=1)
    resume: bool = option(True, "from the newest checkpoint; --no-resume starts anew", flags=["--no-resume=False"])
    overwrite: bool = option(False, "with --no-resume, delete the checkpoints that are there")
    log_every: int = option(20, "steps between entries in metrics.jsonl", low=1, flags=["--log_interval"])
    sample_every: int = option(0, "steps between previews; 0 makes none", low=0)
    report_to: str | None = option(None, "tracker (default: wandb if named)", choices=["none", "tensorboard", "wandb"])
    wandb_name: str | None = option(None, "Weights & Biases project", kind=str)  # upstream's scripts give an empty one
    wandb_entity: str | None = option(None, "team or user that owns the project")


@dataclass
class TrainingSettings(ReportSettings, DistributionSettings, PrecisionSettings, OptimizationSettings):
    """What the loop is told. The run has `steps` steps or, where that is None, `epochs` passes over the data."""

    takes_config = True

    @property
    def tracker(self) -> str | None:
        """`tensorboard`, `wandb` or None."""
        if self.report_to is None and (self.wandb_name or self.wandb_entity):
            return "wandb"
        return None if self.report_to == "none" else self.report_to


@dataclass
class DataSettings(Settings):
    title = "data"

    image_text_folder: str = option(
        help="folder of images, each with its captions in a .txt of the same name; with --wds, WebDataset shards "
             "(data-{000..099}.tar, a URL, pipe:COMMAND); or a registered data set, NAME or NAME?option=value&...",
        flags=["--image_folder", "--data_dir"])  # fmt: skip
    wds: str = option("", "read shards whose images and captions have these suffixes (jpg,txt)", metavar="IMAGE,TEXT")
    caption_key: str = option("caption", "field of the caption, with --wds jpg,json or in a metadata.jsonl")

    @property
    def commands(self) -> bool:
        """Whether the data may be the output of a command: only as typed, not as a file says."""
        return "image_text_folder" not in self.from_file


@dataclass
class ImageSettings(DataSettings):
    """Data of which the images are used, not only the captions."""

    title = "data"

    random_resize_crop_lower_ratio: float = option(1.0, "cut a random square of at least this share of the image; 1 "
                                                        "cuts the middle", low=0, high=1, above=True)  # fmt: skip

    def dataset_options(self) -> dict[str, Any]:
        """Keyword arguments of `open_dataset`."""
        crop_ratio = self.random_resize_crop_lower_ratio
        return {"wds": self.wds, "caption_key": self.caption_key, "crop_ratio": crop_ratio, "commands": self.commands}


@dataclass
class CaptionSettings(Settings):
    title = "captions"

    bpe_path: str | None = option(None, "a tokenizer.json, or a .model of YouTokenToMe (default: CLIP's tokenizer)",
                                  part="tokenizer")  # fmt: skip
    hug: bool = option(False, "--bpe_path is a tokenizer.json, whatever its name")
    chinese: bool = option(False, "the BERT Chinese tokenizer", part="tokenizer")
    truncate_captions: bool = option(False, "truncate captions of over --text_seq_len tokens instead of skipping them")


def total_steps(settings: TrainingSettings, dataset: object) -> int | None:
    """Steps of the optimizer in the run; None for a stream that is only told its epochs."""
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        raise UsageError("the length of the training is missing: give --steps or --epochs")
    if not isinstance(dataset, Sized):
        return None
    per_step = settings.batch_size * settings.ga_steps * int(os.environ.get("WORLD_SIZE", "1"))
    return -(-settings.epochs * len(dataset) // per_step)
