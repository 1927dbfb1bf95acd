"""What the training scripts share: their common arguments, and a progress bar around the loop.

torch is imported only when a training begins, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_pytorch.cli import number

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from dalle_pytorch.training.options import TrainingOptions

NOT_SHOWN = ("seconds", "grad_norm")  # figures that the bar has no room for


class _Length(argparse.Action):
    """`--steps` and `--epochs`: of the two, the one that is given last counts."""

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.steps = namespace.epochs = None
        setattr(namespace, self.dest, values)


def add_training_arguments(
    parser: argparse.ArgumentParser,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    output_dir: str | None = None,
) -> None:
    """Adds the arguments that every training script takes. Without an `output_dir` that must be given."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, one a line (batch_size: 8)")

    group = parser.add_argument_group("data")
    group.add_argument("--image_text_folder", default="glyphs",
                       help="a folder of pictures, each with its captions in a .txt of the same name; with --wds, "
                            "WebDataset shards (data-{000..099}.tar, a URL, pipe:COMMAND); 'glyphs' draws the scenes "
                            "of the default model on the fly")  # fmt: skip
    group.add_argument("--wds", default="", metavar="IMAGE,TEXT",
                       help="read shards, with pictures and captions under these endings, such as jpg,txt")  # fmt: skip
    group.add_argument("--caption_key", default="caption", help="the field of the caption, with --wds jpg,json")
    group.add_argument("--random_resize_crop_lower_ratio", type=number(float, 0, 1, above=True), default=1.0,
                       help="cut a random square of at least this share of the picture; 1: the middle")  # fmt: skip
    group.add_argument("--num_workers", type=number(int, 0), default=1, help="processes that read or draw pictures")

    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", default=output_dir, required=output_dir is None,
                       help="where checkpoints, metrics.jsonl and the trained model go; the same command again goes on "
                            "from the last checkpoint")  # fmt: skip
    group.add_argument("--steps", type=number(int, 1), default=steps, action=_Length, help="steps of the optimizer")
    group.add_argument("--epochs", type=number(int, 1), action=_Length, help="passes over the data, instead of --steps")
    group.add_argument("--batch_size", type=number(int, 1), default=batch_size, help="pictures a process takes at once")
    group.add_argument("--ga_steps", type=number(int, 1), default=1,
                       help="batches of every process that make one step of the optimizer")  # fmt: skip
    group.add_argument("--learning_rate", type=number(float, 0, above=True), default=learning_rate)
    group.add_argument("--warmup_steps", type=number(int, 0), default=100)
    group.add_argument("--lr_decay", nargs="?", const="plateau", default="cosine",
                       choices=["cosine", "constant", "plateau", "exponential"],
                       help="what the learning rate does after the warm-up; alone it means plateau: halved when the "
                            "loss no longer falls")  # fmt: skip
    group.add_argument("--weight_decay", type=number(float, 0), default=0.01)
    group.add_argument("--clip_grad_norm", type=number(float, 0, above=True), default=1.0)
    group.add_argument("--ema_decay", type=number(float, 0, 1), default=0.0,
                       help="average the weights at this decay; 0 does not")  # fmt: skip
    group.add_argument("--muon", action="store_true", help="Muon for the matrices of transformers, AdamW for the rest")
    group.add_argument("--max_bad_steps", type=number(int, 1), default=10,
                       help="stop after so many steps in a row whose loss is no number")  # fmt: skip
    group.add_argument("--seed", type=int, default=0)

    group = parser.add_argument_group("precision and memory")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    for flag, precision in (("--fp16", "fp16"), ("--amp", "fp16"), ("--bf16", "bf16")):
        group.add_argument(flag, dest="mixed_precision", action="store_const", const=precision,
                           default=argparse.SUPPRESS, help=f"the same as --mixed_precision {precision}")  # fmt: skip
    group.add_argument("--activation_checkpointing", action="store_true",
                       help="keep only the input of each transformer layer, and compute the rest again for the "
                            "gradient: less memory, a third more computation")  # fmt: skip

    group = parser.add_argument_group("several processes (docs/scale.md)")
    group.add_argument("--distributed_backend", "--distr_backend", dest="distributed", metavar="NAME",
                       help="deepspeed or fsdp; without, each process holds the whole model (DDP)")  # fmt: skip
    group.add_argument("--deepspeed", dest="distributed", action="store_const", const="deepspeed",
                       default=argparse.SUPPRESS, help="the same as --distributed_backend deepspeed")  # fmt: skip
    group.add_argument("--deepspeed_config", metavar="FILE", help="JSON file of DeepSpeed's settings")
    group.add_argument("--zero_stage", type=int, choices=[0, 1, 2, 3], help="DeepSpeed's ZeRO stage; 2 unless told")
    group.add_argument("--fsdp", action="store_true", help="split parameters, gradients and optimizer over processes")
    group.add_argument("--flops_profiler", action="store_true",
                       help="print how many FLOPs one step takes, after the first few, and end")  # fmt: skip
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from launchers; unused

    group = parser.add_argument_group("checkpoints and reports")
    group.add_argument("--save_every", "--save_every_n_steps", type=number(int, 1), default=500,
                       help="steps between checkpoints")  # fmt: skip
    group.add_argument("--keep_n_checkpoints", type=number(int, 1), default=2, help="keep this many of the newest")
    group.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                       help="go on from the newest checkpoint in --output_dir, if there is one")  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="with --no-resume, delete the checkpoints there")
    group.add_argument("--log_every", type=number(int, 1), default=20, help="steps between entries in metrics.jsonl")
    group.add_argument("--sample_every", type=number(int, 0), default=0, help="steps between pictures; 0 makes none")
    group.add_argument("--report_to", choices=["none", "tensorboard", "wandb"],
                       help="show losses and pictures there too (none, or wandb if it is given a name)")  # fmt: skip
    group.add_argument("--wandb_name", help="the project's name at Weights & Biases")
    group.add_argument("--wandb_entity", help="the team or user whose project it is")


def add_caption_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the arguments that trainings on captions share; returns their group."""
    group = parser.add_argument_group("captions")
    group.add_argument("--bpe_path", help="the tokenizer: a tokenizer.json (train_tokenizer.py writes one) or a .model "
                                          "of YouTokenToMe (default: CLIP's)")  # fmt: skip
    group.add_argument("--hug", action="store_true", help="--bpe_path is a tokenizer.json, whatever its name")
    group.add_argument("--chinese", action="store_true", help="the BERT Chinese tokenizer")
    group.add_argument("--truncate_captions", action="store_true",
                       help="cut captions of more than --text_seq_len tokens, which are skipped otherwise")  # fmt: skip
    return group


def dataset_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of `add_training_arguments` say to `open_dataset`, besides the name of the data."""
    return {
        "wds": arguments.wds,
        "caption_key": arguments.caption_key,
        "crop_ratio": arguments.random_resize_crop_lower_ratio,
    }


def training_options(arguments: argparse.Namespace) -> TrainingOptions:
    """The loop's options from the arguments of `add_training_arguments`.

    All arguments go along as its `settings`: the run's `config.yaml`, which can be given to `--config` again.
    """
    from dalle_pytorch.training.options import TrainingOptions

    names = [field.name for field in dataclasses.fields(TrainingOptions) if hasattr(arguments, field.name)]
    options = TrainingOptions(**{name: getattr(arguments, name) for name in names})
    options.output_dir = Path(options.output_dir)
    options.report_to = arguments.report_to or ("wandb" if arguments.wandb_name or arguments.wandb_entity else "none")
    own = ("config", "local_rank")
    given = {key: value for key, value in vars(arguments).items() if value is not None and key not in own}
    options.settings = {key: _plain(value) for key, value in given.items()}
    return options


def _plain(value: Any) -> Any:
    """A value as YAML can hold it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun, accelerate or deepspeed started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_training(name: str, task: nn.Module, dataset: Dataset, options: TrainingOptions) -> None:
    """Trains under a progress bar that shows the loss and the figures of the task, in the main process.

    A training that a signal asked to end has saved its state; that is said in one line, and the exit code is a shell's
    for that signal.
    """
    from tqdm import tqdm

    from dalle_pytorch.training.interruption import Interrupted
    from dalle_pytorch.training.loop import train

    # Nothing stays of the bar of a training that could not begin, but the error.
    bar = tqdm(total=options.steps, desc=name, unit="step", dynamic_ncols=True, mininterval=5, leave=False,
               disable=not is_main_process())  # fmt: skip
    resumed = True

    def report(step: int, figures: dict[str, float]) -> None:
        nonlocal resumed
        if resumed:
            # Steps of an earlier run, and the first ones of this, say nothing of the rate.
            bar.initial = bar.n = bar.last_print_n = step
            bar.start_t = bar.last_print_t = time.time()
            bar.leave, resumed = True, False
        shown = {key: f"{value:.4g}" for key, value in figures.items() if key not in NOT_SHOWN and math.isfinite(value)}
        bar.total = options.steps
        bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    options.notice = bar.write
    with bar:
        try:
            train(task, dataset, options, report)
        except Interrupted as interruption:
            bar.close()
            if is_main_process():
                print(interruption, file=sys.stderr)
            sys.exit(interruption.exit_code)
