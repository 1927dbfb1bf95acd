"""The one training loop, on accelerate: every network is trained by it.

What differs between trainings is a `task`: a module that turns a batch into a loss and some figures. The loop does the
rest: order of the data, optimizers, schedule, averaging of the weights, checkpoints and resuming.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from dalle_pytorch.checkpoints import CheckpointError, atomic_write
from dalle_pytorch.data import StepBatches, collate

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"


@dataclass
class TrainingOptions:
    """What every training is told. `output_dir` holds its `metrics.jsonl` and the checkpoint that it resumes from."""

    output_dir: Path
    steps: int
    batch_size: int
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_grad_norm: float = 1.0
    ema_decay: float = 0.0  # 0 keeps no average
    muon: bool = False  # matrices inside transformers by Muon (Jordan et al. 2024), the rest by AdamW
    save_every: int = 500
    log_every: int = 20
    num_workers: int = 1
    mixed_precision: str = "no"
    seed: int = 0


Report = Callable[[int, dict[str, float]], None]


def train(task: nn.Module, dataset: Dataset, options: TrainingOptions, report: Report | None = None) -> nn.Module:
    """Trains `task` for `options.steps` steps, from the checkpoint in `options.output_dir` if there is one.

    `task(batch)` gives the loss, a scalar tensor, and a dict of figures to log. Returns the trained task, its weights
    averaged over the last steps when `ema_decay` is above 0. `report(step, figures)` is called every `log_every` steps.
    """
    from accelerate import Accelerator
    from accelerate.utils import send_to_device, set_seed

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    set_seed(options.seed + accelerator.process_index)
    average = AveragedModel(task, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay)) if options.ema_decay else None
    optimizers = _optimizers(task, options)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _learning_rate_factor(step, options)) for o in optimizers
    ]
    model, *optimizers = accelerator.prepare(task, *optimizers)
    if average is not None:
        average.to(accelerator.device)

    state = _State(model=accelerator.unwrap_model(model), average=average, optimizers=optimizers, schedules=schedules)
    checkpoint = Path(options.output_dir) / CHECKPOINT_NAME
    first_step = state.load(checkpoint) if checkpoint.exists() else 0
    batches = StepBatches(len(dataset), options.batch_size, first_step, options.steps, options.seed,
                          accelerator.process_index, accelerator.num_processes)  # fmt: skip
    # Samples depend on their index alone, and the loader has a generator of its own: starting it anew, as a resumed run
    # does, draws nothing from the one that the task uses.
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=options.num_workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )

    model.train()
    started = time.monotonic()
    for step, batch in enumerate(loader, first_step + 1):
        loss, figures = model(send_to_device(batch, accelerator.device))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; try a lower learning rate")
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), options.clip_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update_parameters(state.model)
        if accelerator.is_main_process:
            if step % options.log_every == 0 or step == options.steps:
                seconds = (time.monotonic() - started) / (step - first_step)
                figures = {
                    "loss": loss,
                    **figures,
                    "grad_norm": norm,
                    "lr": schedules[0].get_last_lr()[0],
                    "seconds": seconds,
                }
                figures = {name: torch.as_tensor(value).detach().item() for name, value in figures.items()}
                _log(Path(options.output_dir), step, figures)
                if report:
                    report(step, figures)
            if step % options.save_every == 0 or step == options.steps:
                state.save(checkpoint, step)
    trained = state.model
    if average is not None:
        # In place, so that the caller's own references to parts of the task hold the averaged weights.
        trained.load_state_dict(average.module.state_dict())
    return trained.eval()


def _optimizers(task: nn.Module, options: TrainingOptions) -> list[torch.optim.Optimizer]:
    matrices, decayed, plain = [], [], []
    embeddings = {id(m.weight) for m in task.modules() if isinstance(m, nn.Embedding)}
    heads = {id(p) for name, p in task.named_parameters() if "logits" in name}
    for parameter in task.parameters():
        if not parameter.requires_grad:
            continue
        if options.muon and parameter.ndim == 2 and id(parameter) not in embeddings | heads:
            matrices.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=options.learning_rate, weight_decay=options.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return optimizers


def _learning_rate_factor(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, then a half cosine down to a hundredth."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass
class _State:
    """All that a resumed run needs to go on as if it had never stopped."""

    model: nn.Module
    average: AveragedModel | None
    optimizers: list[Any]
    schedules: list[Any]

    def save(self, path: Path, step: int) -> None:
        state = {
            "step": step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [{"last_epoch": s.last_epoch, "_step_count": s._step_count} for s in self.schedules],
            "rng": _random_state(),
        }
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> int:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
                schedule.__dict__.update(saved)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} does not continue this training ({reason}); move it away to start anew"
            ) from error
        _set_random_state(state["rng"])
        return state["step"]


def _random_state() -> dict[str, Tensor | list[Tensor]]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _log(folder: Path, step: int, figures: dict[str, float]) -> None:
    with open(folder / METRICS_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **{name: round(value, 6) for name, value in figures.items()}}) + "\n")
