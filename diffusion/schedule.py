"""Noise schedules, and the steps that a shorter run visits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def named_betas(name: str, num_steps: int) -> Tensor:
    """The betas of the "linear" or "cosine" schedule over `num_steps` steps, (num_steps,) float64.

    Raises `ValueError` for an unknown schedule, and for a linear one so short that its last step would leave nothing of
    the picture to predict it from.
    """
    if name == "linear":
        if num_steps <= 20:
            raise ValueError(f"a linear schedule has more than 20 steps, and {num_steps} are not")
        # DDPM's 1e-4 to 0.02 over 1000 steps, scaled so that the end is as noisy at any number.
        scale = 1000 / num_steps
        return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)
    if name == "cosine":
        edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"noise schedule {name!r} is unknown: linear and cosine are there")


def spaced_steps(num_steps: int, spacing: str | int | Iterable[int]) -> list[int]:
    """Which of `num_steps` steps a shorter run visits, ascending.

    `spacing` as in guided-diffusion: "ddimN" takes N steps at a fixed stride from 0; "N" takes N steps spread evenly,
    the first and the last among them; "a,b,c" divides the steps into equal sections and takes a, b and c of them so.
    "quadN" takes N steps that grow like squares (Song et al. 2021): most of them where fine detail is decided.
    Raises `ValueError` where there are not enough steps.
    """
    if isinstance(spacing, str) and spacing.startswith("ddim"):
        wanted = _count(spacing.removeprefix("ddim"), spacing)
        for stride in range(1, num_steps):
            if len(range(0, num_steps, stride)) == wanted:
                return list(range(0, num_steps, stride))
        raise ValueError(f"no whole stride takes {wanted} of {num_steps} steps; '{wanted}' spaces them without one")
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
        # Added up, not multiplied: rounding then falls where guided-diffusion's does.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += size
    return steps


def _quadratic_steps(num_steps: int, count: int) -> list[int]:
    _check_count(count, num_steps)
    steps = [0]
    for i in range(1, count):
        # Where squares grow by less than one, the next step.
        steps.append(max(steps[-1] + 1, round((num_steps - 1) * (i / (count - 1)) ** 2)))
    return steps


def _check_count(count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise ValueError(f"cannot take {count} of {available} diffusion steps: 1 to {available} is possible")


def _count(text: str, spacing: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"steps {spacing!r} are not understood; '25', 'quad25', 'ddim25' and '10,10,5' are") from None


@dataclass(frozen=True)
class Schedule:
    """The steps of a diffusion: their betas, and which steps of the training's schedule they are.

    Every table is (num_steps,) float64, on the CPU, indexed by step; step 0 is the least noisy.
    """

    betas: Tensor
    timestep_map: Tensor  # (num_steps,) int64
    num_training_steps: int

    @classmethod
    def named(cls, name: str = "linear", num_steps: int = 1000) -> Schedule:
        return cls(named_betas(name, num_steps), torch.arange(num_steps), num_steps)

    def respaced(self, spacing: str | int | Iterable[int]) -> Schedule:
        """The schedule that visits only some steps (see `spaced_steps`), with betas that make up for the others."""
        steps = torch.tensor(spaced_steps(self.num_steps, spacing))
        visited = self.alphas_cumprod[steps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), visited[:-1]])
        return Schedule(1 - visited / before, self.timestep_map[steps], self.num_training_steps)

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """Share of the picture's variance left after each step (alpha-bar)."""
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
        """Its logarithm, with that of step 1 standing in for the minus infinity of step 0."""
        if self.num_steps == 1:
            return self.betas.log()
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def large_log_variance(self) -> Tensor:
        """Logarithm of the larger fixed variance, beta, with the posterior's at step 0 (a better likelihood there)."""
        return torch.cat([self.posterior_log_variance[:1], self.betas[1:].log()])


def at(table: Tensor, step: int | Tensor, x: Tensor) -> Tensor:
    """A float64 table's values at `step` in `x`'s type: (b, 1, 1, 1) beside `x` for a (b,) tensor.

    For an int it is a number, (), which stays on the CPU: it goes with tensors on any device, without being sent there.
    """
    if isinstance(step, int):
        return table[step].to(x.dtype)
    return table[step.cpu()].to(x.dtype).to(x.device)[:, None, None, None]
