"""Optimizers, and what their learning rate does over a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.training.options import TrainingOptions

PLATEAU_INTERVAL = 100  # steps whose mean loss is one observation of a plateau


def make_optimizers(task: nn.Module, options: TrainingOptions) -> list[torch.optim.Optimizer]:
    """AdamW for what `task` trains, without weight decay for vectors; with `muon` it leaves the matrices to Muon."""
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


class Schedule:
    """The learning rate of a step: a linear warm-up, and then what `lr_decay` says.

    cosine falls along half a cosine to a hundredth at the last step; exponential is multiplied by `lr_decay_rate` every
    hundred steps; plateau is halved when the mean loss of a hundred steps has not fallen ten times in a row. It goes by
    the step's number alone, which a skipped step has too: so a run ends where it was meant to.
    """

    def __init__(self, options: TrainingOptions, steps: int | None):
        if options.lr_decay not in ("cosine", "constant", "plateau", "exponential"):
            raise UsageError(f"--lr_decay is cosine, constant, plateau or exponential, not {options.lr_decay!r}")
        self.options, self.steps = options, steps
        # A cosine without an end is flat.
        self.kind = "constant" if options.lr_decay == "cosine" and steps is None else options.lr_decay
        self.loss_sum, self.loss_count = 0.0, 0
        # torch's own, on an optimizer of nothing, whose learning rate is the factor.
        self.factor = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.factor, factor=0.5, patience=10, cooldown=10, min_lr=1e-6 / options.learning_rate
        )

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        options = self.options
        if step < options.warmup_steps:
            return options.learning_rate * (step + 1) / options.warmup_steps
        since = step - options.warmup_steps
        if self.kind == "cosine":
            done = since / max(1, self.steps - options.warmup_steps)
            return options.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        if self.kind == "exponential":
            return options.learning_rate * options.lr_decay_rate ** (since // 100)
        return options.learning_rate * self.factor.param_groups[0]["lr"]

    @property
    def wants_losses(self) -> bool:
        """Whether `observe` is to be called with the loss of each step."""
        return self.kind == "plateau"

    def observe(self, step: int, loss: float) -> None:
        """Takes note of the loss of step `step`, over all processes; one that is not finite is left out."""
        if math.isfinite(loss):
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        if step >= self.options.warmup_steps and (step + 1) % PLATEAU_INTERVAL == 0 and self.loss_count:
            self.plateau.step(self.loss_sum / self.loss_count)
            self.loss_sum, self.loss_count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Where a plateau stands; the other schedules have no memory."""
        names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
        return {
            "factor": self.factor.param_groups[0]["lr"],
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "plateau": {name: getattr(self.plateau, name) for name in names},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.factor.param_groups[0]["lr"] = state["factor"]
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
        self.plateau.__dict__.update(state["plateau"])
