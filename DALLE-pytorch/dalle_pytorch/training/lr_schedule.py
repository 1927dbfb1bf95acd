"""The learning rate over a run."""

import math
from typing import Any

import torch
from torch import nn

from dalle_pytorch.training.settings import OptimizationSettings

PLATEAU_INTERVAL = 100  # steps whose mean loss is one observation of a plateau


class LRSchedule:
    """The learning rate of a step: a linear warm-up, then `lr_decay`.

    `cosine` falls along half a cosine to a hundredth at the last step; `exponential` is multiplied by `lr_decay_rate`
    every 100 steps; `plateau` is halved when the mean loss of 100 steps has not fallen ten times in a row. The rate
    depends on the number of the step alone, and skipped steps count.
    """

    def __init__(self, settings: OptimizationSettings, steps: int | None):
        self.settings, self.steps = settings, steps
        # A cosine without an end is flat.
        self.kind = "constant" if settings.lr_decay == "cosine" and steps is None else settings.lr_decay
        self.loss_sum, self.loss_count = 0.0, 0
        # torch's own, on a dummy optimizer whose learning rate is the factor.
        self.factor = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.factor, factor=0.5, patience=10, cooldown=10,
                                                                  min_lr=1e-6 / settings.learning_rate)  # fmt: skip

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / settings.warmup_steps
        since = step - settings.warmup_steps
        if self.kind == "cosine" and self.steps is not None:
            done = since / max(1, self.steps - settings.warmup_steps)
            return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
        if self.kind == "exponential":
            return settings.learning_rate * settings.lr_decay_rate ** (since // 100)
        return settings.learning_rate * self.factor.param_groups[0]["lr"]

    def observe(self, step: int, loss: float) -> None:
        """Records the loss of step `step`, the mean over all processes; a loss that is not finite is ignored."""
        if math.isfinite(loss):
            self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        if step >= self.settings.warmup_steps and (step + 1) % PLATEAU_INTERVAL == 0 and self.loss_count:
            self.plateau.step(self.loss_sum / self.loss_count)
            self.loss_sum, self.loss_count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The state of a plateau; the other schedules have none."""
        return {"factor": self.factor.param_groups[0]["lr"], "loss_sum": self.loss_sum, "loss_count": self.loss_count,
                "plateau": self.plateau.state_dict()}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`."""
        self.factor.param_groups[0]["lr"] = state["factor"]
        self.loss_sum, self.loss_count = state["loss_sum"], state["loss_count"]
        self.plateau.load_state_dict(state["plateau"])
