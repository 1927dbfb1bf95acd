"""Noise schedules, and the steps that sampling visits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dalle_pytorch.errors import UsageError


def named_betas(name: str, num_steps: int) -> Tensor:
    """The betas of the "linear" or "cosine" schedule over `num_steps` steps, (num_steps,) float64.

    Raises `UsageError` for an unknown schedule, and for a linear one so short that its last beta would reach 1.
    """
    if name == "linear":
        if num_steps <= 20:
            raise UsageError(f"a linear schedule needs more than 20 steps, got {num_steps}")
        # DDPM's 1e-4 to 0.02 over 1000 steps, scaled so that the end is as noisy for any number of steps.
        scale = 1000 / num_steps
        return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64, device="cpu")
    if name == "cosine":
        edges = torch.arange(num_steps + 1, dtype=torch.float64, device="cpu") / num_steps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise UsageError(f"unknown noise schedule {name!r}: expected linear or cosine")


def spaced_steps(num_steps: int, spacing: str | int | Iterable[int]) -> list[int]:
    """The steps out of `num_steps` that a shorter run visits, ascending.

    `spacing` as in guided-diffusion: "ddimN" is N steps at a fixed stride from 0; N or "N" is N evenly spaced steps,
    the first and the last included; "a,b,c" divides the steps into equal sections with a, b and c such steps. "quadN"
    is N steps that grow quadratically (Song et al. 2021), most of them where fine detail is decided; one is the last.
    Raises `UsageError` if there are not enough steps.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        count = _count(spacing.removeprefix("ddim"), spacing)
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == count:
                return list(range(0, num_steps, stride))
        raise UsageError(f"no integer stride visits {count} of {num_steps} steps; '{count}' spaces them evenly")
    if isinstance(spacing, str) and spacing.startswith("quad"):
        return _quadratic_steps(num_steps, _count(spacing.removeprefix("quad"), spacing))
    if isinstance(spacing, str):
        counts = [_count(part, spacing) for part in spacing.split(",")]
    else:
        counts = [spacing] if isinstance(spacing, int) else list(spacing)

    steps, start = [], 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        _check_count(count, size)
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Summed, not multiplied, to round as guided-diffusion does.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return steps


def skipped_steps(num_steps: int, skip_steps: str | float) -> int:
    """How many of `num_steps` visited steps, the noisiest, are skipped: a number, "10", or a fraction of them, "0.4".

    A fraction is rounded, and leaves at least one step. Raises `UsageError` if there is none left, and for what is
    neither.
    """
    try:
        number = float(skip_steps)
    except ValueError:
        number = math.nan
    if 0 < number < 1:
        return min(round(number * num_steps), num_steps - 1)
    if not 0 <= number < num_steps or number % 1:
        raise UsageError(f"cannot skip {skip_steps} of {num_steps} steps: expected 0 to {num_steps - 1}, or a fraction "
                         "below 1")  # fmt: skip
    return int(number)


def _quadratic_steps(num_steps: int, count: int) -> list[int]:
    _check_count(count, num_steps)
    steps = [0] if count > 1 else [num_steps - 1]
    for i in range(1, count):
        # The next step where the squares grow by less than one.
        steps.append(max(steps[-1] + 1, round((num_steps - 1) * (i / (count - 1)) ** 2)))
    return steps


def _check_count(count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise UsageError(f"cannot visit {count} of {available} diffusion steps: expected 1 to {available}")


def _count(text: str, spacing: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"expected steps as in '25', 'quad25', 'ddim25' or '10,10,5', got {spacing!r}") from None


@dataclass(frozen=True)
class Schedule:
    """The steps of a diffusion: their betas, and their indices in the training's schedule.

    Every table is (num_steps,) float64 on the CPU; step 0 is the least noisy.
    """

    betas: Tensor
    timestep_map: Tensor  # (num_steps,) int64
    num_training_steps: int

    @classmethod
    def named(cls, name: str = "linear", num_steps: int = 1000) -> Schedule:
        return cls(named_betas(name, num_steps), torch.arange(num_steps, device="cpu"), num_steps)

    def respaced(self, spacing: str | int | Iterable[int], skip_steps: str | float = 0) -> Schedule:
        """The schedule of only some steps, see `spaced_steps`, without the noisiest of them, see `skipped_steps`.

        It has the same alphas_cumprod at each.
        """
        steps = spaced_steps(self.num_steps, spacing)
        return self.visiting(steps[: len(steps) - skipped_steps(len(steps), skip_steps)])

    def visiting(self, steps: Sequence[int]) -> Schedule:
        """The schedule of these steps alone, ascending, with the same alphas_cumprod at each."""
        visited = self.alphas_cumprod[list(steps)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), visited[:-1]])
        return Schedule(1 - visited / before, self.timestep_map[list(steps)], self.num_training_steps)

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Share of the image's variance left after each step (alpha-bar)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0); zero at step 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm, with the value of step 1 at step 0 in place of minus infinity."""
        if self.num_steps == 1:
            return self.betas.log()
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def large_log_variance(self) -> Tensor:
        """Logarithm of the larger fixed variance, beta, with the posterior's at step 0 for a better likelihood."""
        return torch.cat([self.posterior_log_variance[:1], self.betas[1:].log()])


def at(table: Tensor, step: int | Tensor, x: Tensor) -> Tensor:
    """Values of a float64 table at `step`, in the dtype of `x`: (b, 1, 1, 1) on its device for a (b,) `step`.

    For an int it is a scalar on the CPU, which combines with tensors on any device without a copy.
    """
    if isinstance(step, int):
        return table[step].to(x.dtype)
    return table[step.cpu()].to(x.dtype).to(x.device)[:, None, None, None]
