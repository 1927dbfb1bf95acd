"""What every training is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class TrainingOptions:
    """What every training is told, under the names of the command line. `output_dir` holds all that a run writes.

    A run has `steps` steps of the optimizer or, where that is None, goes `epochs` times through the data. Each takes
    `batch_size` samples in every process, `ga_steps` times.
    """

    output_dir: Path
    steps: int | None
    batch_size: int
    epochs: int | None = None
    ga_steps: int = 1

    learning_rate: float = 3e-4
    warmup_steps: int = 100
    lr_decay: str = "cosine"  # cosine, constant, plateau or exponential
    lr_decay_rate: float = 0.98  # of exponential, every hundred steps
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.0  # 0 keeps no average
    muon: bool = False  # matrices inside transformers by Muon (Jordan et al. 2024), the rest by AdamW
    max_bad_steps: int = 10  # steps in a row whose loss is no finite number, before the run is given up

    save_every: int = 500
    keep_n_checkpoints: int = 2
    resume: bool = True
    overwrite: bool = False  # without resume: delete the checkpoints that are there, instead of refusing

    log_every: int = 20
    sample_every: int = 0  # 0 draws no pictures
    report_to: str = "none"  # none, tensorboard or wandb
    wandb_name: str | None = None
    wandb_entity: str | None = None
    notice: Callable[[str], None] | None = None  # called with a line for the user, in the main process
    settings: dict[str, Any] | None = None  # all that the script was told, which the run's folder keeps
    flops_profiler: bool = False  # count the operations of one step, and end

    mixed_precision: str = "no"  # no, fp16 or bf16
    distributed: str | None = None  # a backend's name; see launch.py for this and the next four
    deepspeed_config: str | None = None
    zero_stage: int | None = None
    fsdp: bool = False
    activation_checkpointing: bool = False

    num_workers: int = 1
    seed: int = 0


def total_steps(options: TrainingOptions, dataset: Sized) -> int | None:
    """How many steps of the optimizer the run has; None for a stream that is only told its epochs."""
    if options.steps is not None:
        return options.steps
    if options.epochs is None:
        raise ValueError("a training is told its length in steps or in epochs")
    if not hasattr(dataset, "__len__"):
        return None
    per_step = options.batch_size * options.ga_steps * int(os.environ.get("WORLD_SIZE", "1"))
    return -(-options.epochs * len(dataset) // per_step)
