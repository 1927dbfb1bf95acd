"""One interface for every network: (x, step) → eps, x_0, log-variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_pytorch.errors import UsageError
from diffusion.config import DiffusionConfig
from diffusion.schedule import Schedule, at
from diffusion.unet import UNet, match_size


class Prediction(NamedTuple):
    """One evaluation of the network, each (b, 3, h, w) or, for a fixed variance, broadcastable to it."""

    eps: Tensor
    x_0: Tensor
    log_variance: Tensor


class Residual(NamedTuple):
    """What a network of residuals is combined with: x_0 = low_res + gate · mean + std · network(scaled)."""

    scaled: Tensor  # (b, 3, h, w), the noisy residual at unit variance
    low_res: Tensor  # (b, 3, h, w)
    mean: Tensor  # (b, 3, h, w), the best linear estimate of the residual
    std: Tensor  # of the residual about that estimate; broadcastable


@dataclass(frozen=True)
class Denoiser:
    """A network under a schedule: `denoiser(x, step)` → `Prediction`.

    `network(x, timesteps, **conditioning)` returns eps, or x_0 with `predict_xstart`. With `learn_sigma` it has twice
    the channels, and the second half places the log-variance between its two bounds; otherwise the variance is fixed at
    beta, or with `sigma_small` at the posterior's. With `rescale_timesteps` the network sees timesteps out of 1000,
    whatever their number.

    With `residual_std` the network, conditioned on an image `low_res`, predicts the difference of x_0 from it, which
    has about that standard deviation. Its input is this difference under noise, and its output is added to the best
    linear estimate, both scaled to unit variance as in EDM (Karras et al. 2022). The network then need not reproduce
    `low_res` nor, at little noise, its input, and fine detail weighs as much as large shapes.

    A `gated` network has one more output channel, a logit per pixel that scales the linear estimate. Where the residual
    is zero the input is all noise, which a network of few channels cannot subtract exactly.

    `step` is an int for the whole batch or a (b,) int64 tensor, an index of this (respaced) schedule.
    """

    network: UNet
    schedule: Schedule
    predict_xstart: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False
    residual_std: float | None = None
    gated: bool = False
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gated and self.residual_std is None:
            raise UsageError("a gated network predicts residuals: expected residual_std")

    @classmethod
    def from_config(cls, unet: UNet, config: DiffusionConfig) -> Denoiser:
        """A U-Net under the diffusion of its training. Raises `UsageError` if they do not fit."""
        if config.residual_std is not None and not unet.settings.low_res_condition:
            raise UsageError("residual_std needs a U-Net with low_res_condition: residuals are of that image")
        settings = asdict(config)
        schedule = Schedule.named(settings.pop("noise_schedule"), settings.pop("diffusion_steps"))
        return cls(unet, schedule, learn_sigma=unet.settings.learn_sigma, gated=unet.settings.gated, **settings)

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def predicts_x_0(self) -> bool:
        """Whether eps is computed from x_0, and not the reverse."""
        return self.predict_xstart or self.residual_std is not None

    def conditioned(self, **conditioning: Tensor) -> Denoiser:
        """The same denoiser with these keyword arguments for its network."""
        return replace(self, conditioning={**self.conditioning, **conditioning})

    def respaced(self, spacing: str | int | Iterable[int], skip_steps: str | float = 0) -> Denoiser:
        """The same network with fewer steps; see `Schedule.respaced`."""
        return replace(self, schedule=self.schedule.respaced(spacing, skip_steps))

    def __call__(self, x: Tensor, step: int | Tensor, clip: bool = True) -> Prediction:
        """One evaluation at `x` (b, 3, h, w), through `clip` unless told otherwise."""
        output, log_variance, _ = self._evaluate(x, step)
        if self.predicts_x_0:
            prediction = Prediction(self.eps_from_x_0(x, step, output), output, log_variance)
        else:
            prediction = Prediction(output, self.x_0_from_eps(x, step, output), log_variance)
        return self.clip(x, step, prediction) if clip else prediction

    def clip(self, x: Tensor, step: int | Tensor, prediction: Prediction) -> Prediction:
        """The prediction with x_0 clipped to [-1, 1] and the eps that follows from it."""
        x_0 = prediction.x_0.clamp(-1, 1)
        return Prediction(self.eps_from_x_0(x, step, x_0), x_0, prediction.log_variance)

    def network_timesteps(self, step: int | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """The network's timesteps (batch,) float32: steps of the training's schedule, rescaled if it was trained so."""
        original = self.schedule.timestep_map[torch.as_tensor(step, device="cpu")].double()
        if self.rescale_timesteps:
            original = original * (1000 / self.schedule.num_training_steps)
        return original.float().expand(batch).to(device)

    def _evaluate(self, x: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor, Residual | None]:
        """The prediction (b, 3, h, w), of x_0 or of eps, the log-variance, and the residual if that is predicted."""
        residual, conditioning, gate = self._residual(x, step), self.conditioning, 1
        if residual is not None:
            conditioning = {**conditioning, "low_res": residual.low_res}
        timesteps = self.network_timesteps(step, len(x), x.device)
        output = self.network(x if residual is None else residual.scaled, timesteps, **conditioning)
        if self.gated:
            output, gate = output[:, :-1], output[:, -1:].sigmoid()
        output, position = output.chunk(2, dim=1) if self.learn_sigma else (output, None)
        if residual is not None:
            output = residual.low_res + gate * residual.mean + residual.std * output
        if position is None:
            table = self.schedule.posterior_log_variance if self.sigma_small else self.schedule.large_log_variance
            return output, at(table, step, x), residual
        low = at(self.schedule.posterior_log_variance, step, x)
        high = at(self.schedule.betas.log(), step, x)
        return output, low + (high - low) * (position + 1) / 2, residual

    def _residual(self, x: Tensor, step: int | Tensor) -> Residual | None:
        if self.residual_std is None:
            return None
        low_res = match_size(self.conditioning["low_res"], x)
        alpha_bar, std = self.schedule.alphas_cumprod, self.residual_std
        noisy = x * at(alpha_bar.rsqrt(), step, x) - low_res
        noise = 1 / alpha_bar - 1  # variance of the noise on the residual
        total = (noise + std**2).sqrt()  # standard deviation of the noisy residual
        return Residual(
            noisy * at(1 / total, step, x), low_res, noisy * at((std / total) ** 2, step, x),
            at((noise * std**2 / (noise + std**2)).sqrt(), step, x),
        )  # fmt: skip

    # Conversions

    def x_0_from_eps(self, x: Tensor, step: int | Tensor, eps: Tensor) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod
        return at((1 / alpha_bar).sqrt(), step, x) * x - at((1 / alpha_bar - 1).sqrt(), step, x) * eps

    def eps_from_x_0(self, x: Tensor, step: int | Tensor, x_0: Tensor) -> Tensor:
        alpha_bar = self.schedule.alphas_cumprod
        return (at((1 / alpha_bar).sqrt(), step, x) * x - x_0) / at((1 / alpha_bar - 1).sqrt(), step, x)

    def posterior_mean(self, x: Tensor, step: int | Tensor, x_0: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0), DDPM's equation 7."""
        s = self.schedule
        of_x_0 = s.betas * s.alphas_cumprod_prev.sqrt() / (1 - s.alphas_cumprod)
        of_x = (1 - s.alphas_cumprod_prev) * (1 - s.betas).sqrt() / (1 - s.alphas_cumprod)
        return at(of_x_0, step, x) * x_0 + at(of_x, step, x) * x

    def q_sample(self, x_0: Tensor, step: int | Tensor, noise: Tensor) -> Tensor:
        """A sample of q(x_t | x_0) with that noise."""
        alpha_bar = self.schedule.alphas_cumprod
        return at(alpha_bar.sqrt(), step, x_0) * x_0 + at((1 - alpha_bar).sqrt(), step, x_0) * noise

    def x_0_slope(self, x: Tensor, step: int | Tensor) -> Tensor:
        """The derivative by `x` of the best linear estimate of x_0, for residuals of that standard deviation, or for
        images of unit variance: what the network's own derivative is like, without its cost."""
        variance, alpha_bar = (self.residual_std or 1.0) ** 2, self.schedule.alphas_cumprod
        return at(alpha_bar.rsqrt() * variance / (1 / alpha_bar - 1 + variance), step, x)

    # Training

    def loss(self, x_0: Tensor, step: Tensor, noise: Tensor, use_kl: bool = False) -> Tensor:
        """The training loss of each image, (b,): mean squared error of what the network predicts (eps, x_0, or with
        `residual_std` the scaled residual, which has about unit variance at every step).

        With `learn_sigma` the variational bound is added, with gradients through the variance only: Improved DDPM's
        hybrid loss, scaled as in guided-diffusion (the bound over all steps, divided by 1000). With `use_kl` the loss
        is the bound over all steps alone.
        """
        x = self.q_sample(x_0, step, noise)
        output, log_variance, residual = self._evaluate(x, step)
        if use_kl:
            return self._bound(x, x_0, step, self._mean(x, step, output), log_variance) * self.num_steps
        loss = _mean_square(output - (x_0 if self.predicts_x_0 else noise), residual)
        if self.learn_sigma:
            mean = self._mean(x, step, output.detach())
            loss = loss + self._bound(x, x_0, step, mean, log_variance) * (self.num_steps / 1000)
        return loss

    def imitation_loss(self, x: Tensor, step: int | Tensor, x_0: Tensor) -> Tensor:
        """How far the prediction at `x` is from `x_0`, scaled as `loss` scales it: (b,). The network predicts x_0, or
        residuals."""
        output, _, residual = self._evaluate(x, step)
        return _mean_square(output - x_0, residual)

    def _mean(self, x: Tensor, step: Tensor, output: Tensor) -> Tensor:
        x_0 = output if self.predicts_x_0 else self.x_0_from_eps(x, step, output)
        return self.posterior_mean(x, step, x_0)

    def _bound(self, x: Tensor, x_0: Tensor, step: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """The step's term of the variational bound in bits per dimension, (b,): a KL divergence; at step 0 an NLL."""
        true_mean = self.posterior_mean(x, step, x_0)
        true_log_variance = at(self.schedule.posterior_log_variance, step, x)
        ratio, error = (true_log_variance - log_variance).exp(), (true_mean - mean) ** 2 * (-log_variance).exp()
        kl = 0.5 * (log_variance - true_log_variance - 1 + ratio + error)
        nll = -discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)
        first = (step == 0).to(kl.device)
        return torch.where(first, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def _mean_square(error: Tensor, residual: Residual | None) -> Tensor:
    """The mean square of each image's error, (b,); of a residual that of the network's own, scaled output."""
    loss = error.square().flatten(1).mean(1)
    return loss if residual is None else loss / residual.std.flatten() ** 2


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability of 8-bit values in [-1, 1] under a Gaussian rounded to them (DDPM, equation 13)."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper = torch.special.ndtr(inverse * (centred + 1 / 255))
    lower = torch.special.ndtr(inverse * (centred - 1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
