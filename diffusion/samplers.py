"""Samplers: each is a few lines over a `Denoiser` that is respaced to the steps to visit.

A sampler takes `x` (b, 3, h, w), standard normal noise, and yields `(step, x, x_0)` after every step, from the
noisiest, `num_steps - 1`, down to 0: the next sample and the predicted x_0. The last `x` is the result.
`guide(denoiser, x, step)`, if given, makes the predictions, each with the gradient of a log-density to follow, or None.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.errors import SamplingDiverged, UsageError
from diffusion.denoiser import Denoiser, Prediction
from diffusion.schedule import at

Guide = Callable[[Denoiser, Tensor, int], tuple[Prediction, Tensor | None]]
Steps = Iterator[tuple[int, Tensor, Tensor]]

# Noise


def generator(*identity: object) -> torch.Generator:
    """A CPU random number generator, seeded with a hash of its purpose, such as (seed, input, image)."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Noise:
    """Standard normal noise for a batch, each image's from its own generator.

    An image therefore does not depend on the others in its batch. Each call continues the random sequence.
    """

    def __init__(self, generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"):
        self.generators, self.shape, self.device = generators, tuple(shape), device

    def __call__(self) -> Tensor:
        """(b, *shape) float32."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


# Samplers


def sample_ancestral(denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor], guide: Guide | None = None) -> Steps:
    """DDPM (Ho et al. 2020). Guidance shifts the mean by variance × gradient (Dhariwal & Nichol 2021)."""
    for step in reversed(range(denoiser.num_steps)):
        prediction, gradient = guide(denoiser, x, step) if guide else (denoiser(x, step), None)
        x = denoiser.posterior_mean(x, step, prediction.x_0)
        if gradient is not None:
            x = x + prediction.log_variance.exp() * gradient
        if step > 0:
            x = x + (0.5 * prediction.log_variance).exp() * noise()
        yield step, x, prediction.x_0


def sample_ddim(
    denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor], guide: Guide | None = None, eta: float = 0.0
) -> Steps:
    """DDIM (Song et al. 2021, equation 12): no noise after the first with `eta` 0, as much as DDPM with 1."""
    alpha_bar, alpha_bar_prev = denoiser.schedule.alphas_cumprod, denoiser.schedule.alphas_cumprod_prev
    variance = eta**2 * (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    for step in reversed(range(denoiser.num_steps)):
        _, (eps, x_0, _) = _guided(denoiser, x, step, guide)
        x = at(alpha_bar_prev.sqrt(), step, x) * x_0 + at((1 - alpha_bar_prev - variance).sqrt(), step, x) * eps
        if eta > 0 and step > 0:
            x = x + at(variance.sqrt(), step, x) * noise()
        yield step, x, x_0


def sample_dpm(denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor], guide: Guide | None = None) -> Steps:
    """DPM-Solver++ of second order (Lu et al. 2022, arXiv:2211.01095, algorithm 2), which adds no noise: DDIM towards
    an x_0 that is extrapolated, linearly in the logarithm of the noise level, to the middle of the step.
    """
    alpha_bar, alpha_bar_prev = denoiser.schedule.alphas_cumprod, denoiser.schedule.alphas_cumprod_prev
    level = (0.5 * (alpha_bar / (1 - alpha_bar)).log()).tolist()
    previous: Tensor | None = None
    for step in reversed(range(denoiser.num_steps)):
        prediction, guided = _guided(denoiser, x, step, guide)
        middle = guided.x_0
        if previous is not None and step > 0:  # the last step leads to x_0 itself
            share = (level[step - 1] - level[step]) / (level[step] - level[step + 1]) / 2
            # Guidance is not extrapolated: where it ends, that would lead back.
            middle = middle + share * (prediction.x_0 - previous)
        eps, previous = denoiser.eps_from_x_0(x, step, middle), prediction.x_0
        x = at(alpha_bar_prev.sqrt(), step, x) * middle + at((1 - alpha_bar_prev).sqrt(), step, x) * eps
        yield step, x, guided.x_0


def sample_unipc(denoiser: Denoiser, x: Tensor, noise: Callable[[], Tensor], guide: Guide | None = None) -> Steps:
    """UniPC (Zhao et al. 2023), which adds no noise, by its scheduler in diffusers.

    The scheduler takes the betas of the visited steps, so that its steps are exactly ours, and the predicted x_0, so
    that the parametrisation of the network stays in `Denoiser`. It extrapolates the x_0 of guidance too: where that
    ends before the last step, images are led back.
    """
    # Here: it takes seconds, and the other samplers do without.
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=denoiser.num_steps,
        # In the scheduler's single precision a larger beta is 1, and the noise level infinite.
        trained_betas=denoiser.schedule.betas.clamp(max=1 - 1e-6).tolist(),
        prediction_type="sample",
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(denoiser.num_steps, device=x.device)
    for step, timestep in zip(reversed(range(denoiser.num_steps)), scheduler.timesteps, strict=True):
        _, (_, x_0, _) = _guided(denoiser, x, step, guide)
        x = scheduler.step(x_0, timestep, x, return_dict=False)[0]
        yield step, x, x_0


def _guided(denoiser: Denoiser, x: Tensor, step: int, guide: Guide | None) -> tuple[Prediction, Prediction]:
    """The prediction, and what guidance makes of it, for samplers without a mean: the gradient is added to the score,
    -eps / sqrt(1 - alpha-bar)."""
    prediction, gradient = guide(denoiser, x, step) if guide else (denoiser(x, step), None)
    if gradient is None:
        return prediction, prediction
    eps = prediction.eps - at((1 - denoiser.schedule.alphas_cumprod).sqrt(), step, x) * gradient
    return prediction, prediction._replace(eps=eps, x_0=denoiser.x_0_from_eps(x, step, eps))


SAMPLERS: dict[str, Callable[..., Steps]] = {
    "ddpm": sample_ancestral,
    "ddim": sample_ddim,
    "dpm++": sample_dpm,
    "unipc": sample_unipc,
}


def find_sampler(name: str) -> Callable[..., Steps]:
    """The sampler of that name, which raises `SamplingDiverged` at a step that is not finite. Raises `UsageError` if
    there is none."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}: expected one of {', '.join(SAMPLERS)}")
    return partial(_finite_steps, SAMPLERS[name])


def _finite_steps(sampler: Callable[..., Steps], *arguments: Any) -> Steps:
    """The steps of a sampler. Raises `SamplingDiverged` at the first one that is not finite."""
    for step, x, x_0 in sampler(*arguments):
        if not bool(x.isfinite().all() & x_0.isfinite().all()):
            raise SamplingDiverged(f"diffusion step {step} is not finite: a guidance scale is too large, or the "
                                   "model's weights are damaged")  # fmt: skip
        yield step, x, x_0
