"""What the training scripts share: their common arguments, and a progress bar around the loop."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from dalle_pytorch.training import TrainingOptions


def add_training_arguments(
    parser: argparse.ArgumentParser, *, steps: int, batch_size: int, learning_rate: float
) -> None:
    """Adds the arguments that every training script takes."""
    group = parser.add_argument_group("training")
    group.add_argument("--image_text_folder", default="glyphs",
                       help="a folder of pictures, each with its caption in a .txt of the same name; "
                            "'glyphs' draws the scenes of the default model on the fly")  # fmt: skip
    group.add_argument("--output_dir", required=True,
                       help="where checkpoint, metrics.jsonl and the trained model go; the same command again goes on "
                            "from its checkpoint")  # fmt: skip
    group.add_argument("--steps", type=int, default=steps)
    group.add_argument("--batch_size", type=int, default=batch_size)
    group.add_argument("--learning_rate", type=float, default=learning_rate)
    group.add_argument("--warmup_steps", type=int, default=100)
    group.add_argument("--weight_decay", type=float, default=0.01)
    group.add_argument("--clip_grad_norm", type=float, default=1.0)
    group.add_argument("--ema_decay", type=float, default=0.0, help="average the weights at this decay; 0 does not")
    group.add_argument("--muon", action="store_true", help="Muon for the matrices of transformers, AdamW for the rest")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    group.add_argument("--save_every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--num_workers", type=int, default=1, help="processes that read or draw pictures")
    group.add_argument("--seed", type=int, default=0)


def training_options(arguments: argparse.Namespace) -> TrainingOptions:
    """The loop's options from the arguments of `add_training_arguments`."""
    from dalle_pytorch.training import TrainingOptions

    names = [field.name for field in dataclasses.fields(TrainingOptions) if hasattr(arguments, field.name)]
    options = TrainingOptions(**{name: getattr(arguments, name) for name in names})
    options.output_dir = Path(options.output_dir)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    return options


def run_training(name: str, task: nn.Module, dataset: Dataset, options: TrainingOptions) -> None:
    """Trains under a progress bar that shows the loss and the figures of the task."""
    from tqdm import tqdm

    from dalle_pytorch.training import train

    with tqdm(total=options.steps, desc=name, unit="step", dynamic_ncols=True, mininterval=5) as bar:

        def report(step: int, figures: dict[str, float]) -> None:
            shown = {key: f"{value:.4g}" for key, value in figures.items() if key not in ("seconds", "grad_norm")}
            bar.set_postfix(shown, refresh=False)
            bar.update(step - bar.n)

        train(task, dataset, options, report)
