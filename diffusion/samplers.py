"""From noise to pictures: each sampler is a few lines over a `Denoiser` that visits the wanted steps.

All take `x` (b, 3, h, w), standard normal noise, and return pictures of that shape in about [-1, 1]. `evaluate(x, step)`
gives the prediction there, and the gradient that guidance adds to the log-density of x, or None; see `guidance.py`.
`callback(step, x_0)` is told of every step, from the noisiest, `num_steps - 1`, down to 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffusion.denoiser import Denoiser, Prediction, at

Evaluate = Callable[[Tensor, int], tuple[Prediction, Tensor | None]]
Callback = Callable[[int, Tensor], None]

# --------------------------------------------------------------------------------------------------
# Noise that belongs to the picture


def generator(*identity: object) -> torch.Generator:
    """A CPU generator of random numbers whose seed is a hash of what it is for, such as (seed, input, image)."""
    digest = hashlib.blake2b("\0".join(map(str, identity)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """Standard normal noise for a batch, every picture's from a generator of its own.

    So a picture does not depend on which others are drawn beside it. Calls go on where the last one stopped.
    """

    def __init__(self, generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.generators, self.shape, self.device = generators, tuple(shape), device

    def __call__(self) -> Tensor:
        """(b, *shape) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


# --------------------------------------------------------------------------------------------------
# Samplers


def sample_ancestral(
    denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor], evaluate: Evaluate, callback: Callback | None = None
) -> Tensor:
    """DDPM's ancestral sampling (Ho et al. 2020). Guidance shifts the mean by variance × gradient (Dhariwal & Nichol 2021)."""
    for step in reversed(range(denoiser.num_steps)):
        prediction, gradient = evaluate(x, step)
        x = denoiser.posterior_mean(x, step, prediction.x_0)
        if gradient is not None:
            x = x + prediction.log_variance.exp() * gradient
        if step > 0:
            x = x + (0.5 * prediction.log_variance).exp() * noise()
        if callback:
            callback(step, prediction.x_0)
    return x


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    noise: Callable[[], Tensor],
    evaluate: Evaluate,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equation 12); `eta` 0 is deterministic, 1 as noisy as DDPM. Guidance shifts eps."""
    alpha_bar, alpha_bar_prev = denoiser.schedule.alphas_cumprod, denoiser.schedule.alphas_cumprod_prev
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    for step in reversed(range(denoiser.num_steps)):
        prediction = shift_eps(denoiser, x, step, *evaluate(x, step))
        direction = at((1 - alpha_bar_prev - variance).sqrt(), step, x) * prediction.eps
        x = at(alpha_bar_prev.sqrt(), step, x) * prediction.x_0 + direction
        if eta > 0 and step > 0:
            x = x + at(variance.sqrt(), step, x) * noise()
        if callback:
            callback(step, prediction.x_0)
    return x


def shift_eps(denoiser: Denoiser, x: Tensor, step: int, prediction: Prediction, gradient: Tensor | None) -> Prediction:
    """The prediction under guidance, where a sampler has no mean to shift: the score gains the gradient (Song et al. 2021)."""
    if gradient is None:
        return prediction
    eps = prediction.eps - at((1 - denoiser.schedule.alphas_cumprod).sqrt(), step, x) * gradient
    return Prediction(eps, denoiser.x_0_from_eps(x, step, eps), prediction.log_variance)


def sample_solver(
    denoiser: Denoiser,
    x: Tensor,
    noise: Callable[[], Tensor],
    evaluate: Evaluate,
    callback: Callback | None = None,
    solver: str = "DPMSolverMultistepScheduler",
) -> Tensor:
    """DPM-Solver++ (Lu et al. 2022) or UniPC (Zhao et al. 2023) of second order, by the scheduler in diffusers.

    They need no noise. The scheduler is given the betas of the steps visited, so that its steps are exactly ours, and the
    predicted x_0, so that what the network predicts is settled in one place.
    """
    import diffusers

    scheduler = getattr(diffusers, solver)(
        num_train_timesteps=denoiser.num_steps,
        trained_betas=denoiser.schedule.betas.tolist(),
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(denoiser.num_steps, device=x.device)
    for step, timestep in zip(reversed(range(denoiser.num_steps)), scheduler.timesteps, strict=True):
        prediction = shift_eps(denoiser, x, step, *evaluate(x, step))
        x = scheduler.step(prediction.x_0, timestep, x).prev_sample
        if callback:
            callback(step, prediction.x_0)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": sample_ancestral,
    "ddim": sample_ddim,
    "dpm++": sample_solver,
    "unipc": partial(sample_solver, solver="UniPCMultistepScheduler"),
}
