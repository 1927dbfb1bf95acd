"""One meaning for every network: (x, step) → eps, x_0, log-variance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.schedule import Schedule, at


class Prediction(NamedTuple):
    """What one evaluation of the network says, each (b, 3, h, w) or, for a fixed variance, broadcastable to it."""

    eps: Tensor
    x_0: Tensor
    log_variance: Tensor


class Residual(NamedTuple):
    """What surrounds a network of residuals: x_0 is `low_res + gate · guess + spread · network(scaled)`."""

    scaled: Tensor  # (b, 3, h, w), the noisy residual at unit variance
    low_res: Tensor  # (b, 3, h, w)
    guess: Tensor  # (b, 3, h, w), the best linear guess of the residual
    spread: Tensor  # of the residual about it; broadcastable


@dataclass(frozen=True)
class Denoiser:
    """A network under a schedule: `denoiser(x, step)` → `Prediction`.

    `network(x, timesteps, **conditioning)` returns eps, or x_0 with `predict_xstart`; with `learn_sigma` twice the
    channels, the second half saying where between its two bounds the log-variance lies. Without, the variance is fixed:
    beta, or with `sigma_small` the posterior's. `rescale_timesteps` tells the network steps of a thousand whatever
    their number.

    With `residual_std` the network, which is told a picture `low_res`, deals with what that one lacks: how x_0 differs
    from it, about so large (in pictures of [-1, 1]). It sees this difference under noise, and its answer is added to
    the best linear guess, both scaled to unit variance as in EDM. So it neither has to learn the picture that it is
    told nor to pass on, at little noise, what it sees; and fine grain counts for as much as large shapes.

    A `gated` network says by one more channel, the last, how far each pixel's guess is to be believed (a logit). Where
    nothing lacks, all that is seen is noise, and little noise is the hardest to answer by a network of few channels.

    `step` is an int for the whole batch or a (b,) int64 tensor, an index of this (respaced) schedule.
    """

    network: nn.Module
    schedule: Schedule
    predict_xstart: bool = False
    learn_sigma: bool = False
    sigma_small: bool = False
    rescale_timesteps: bool = False
    residual_std: float | None = None
    gated: bool = False
    conditioning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gated and self.residual_std is None:
            raise ValueError("a gated network is one of residuals: it wants residual_std")

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    @property
    def predicts_x_0(self) -> bool:
        """Whether x_0 comes first, and eps follows from it."""
        return self.predict_xstart or self.residual_std is not None

    def conditioned(self, **conditioning: Any) -> Denoiser:
        """The same denoiser with these keyword arguments for its network."""
        return replace(self, conditioning={**self.conditioning, **conditioning})

    def respaced(self, spacing: str | int | Iterable[int]) -> Denoiser:
        """The same network visiting fewer steps; see `spaced_steps`."""
        return replace(self, schedule=self.schedule.respaced(spacing))

    def __call__(self, x: Tensor, step: int | Tensor, clip: bool = True) -> Prediction:
        """One evaluation at (b, 3, h, w) `x`; `clip` as in the method of that name."""
        output, log_variance = self._evaluate(x, step)
        if self.predicts_x_0:
            prediction = Prediction(self.eps_from_x_0(x, step, output), output, log_variance)
        else:
            prediction = Prediction(output, self.x_0_from_eps(x, step, output), log_variance)
        return self.clip(x, step, prediction) if clip else prediction

    def clip(self, x: Tensor, step: int | Tensor, prediction: Prediction) -> Prediction:
        """The prediction with x_0 kept within [-1, 1], and eps in keeping with it."""
        x_0 = prediction.x_0.clamp(-1, 1)
        return Prediction(self.eps_from_x_0(x, step, x_0), x_0, prediction.log_variance)

    def network_timesteps(self, step: int | Tensor, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """What the network is told: (batch,) float32 original steps, rescaled to a thousand if it was trained so."""
        original = self.schedule.timestep_map[torch.as_tensor(step, device="cpu")].double()
        if self.rescale_timesteps:
            original = original * (1000 / self.schedule.num_training_steps)
        return original.float().expand(batch).to(device)

    def _evaluate(self, x: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The prediction (b, 3, h, w), of x_0 or of eps, and the log-variance."""
        residual = None if self.residual_std is None else self._residual(x, step)
        output = self.network(
            x if residual is None else residual.scaled,
            self.network_timesteps(step, len(x), x.device),
            **self.conditioning,
        )
        output, gate = (output[:, :-1], output[:, -1:].sigmoid()) if self.gated else (output, 1)
        output, position = output.chunk(2, dim=1) if self.learn_sigma else (output, None)
        if residual is not None:
            output = residual.low_res + gate * residual.guess + residual.spread * output
        if position is None:
            table = self.schedule.posterior_log_variance if self.sigma_small else self.schedule.large_log_variance
            return output, at(table, step, x)
        low = at(self.schedule.posterior_log_variance, step, x)
        high = at(self.schedule.betas.log(), step, x)
        return output, low + (high - low) * (position + 1) / 2

    def _residual(self, x: Tensor, step: int | Tensor) -> Residual:
        low_res = F.interpolate(self.conditioning["low_res"], x.shape[-2:], mode="bilinear")
        alpha_bar, std = self.schedule.alphas_cumprod, self.residual_std
        noisy = x * at(alpha_bar.rsqrt(), step, x) - low_res
        total = (1 / alpha_bar - 1 + std**2).sqrt()  # deviation of the noisy residual
        return Residual(
            noisy * at(1 / total, step, x),
            low_res,
            noisy * at((std / total) ** 2, step, x),
            self._residual_spread(x, step),
        )

    def _residual_spread(self, x: Tensor, step: int | Tensor) -> Tensor:
        variance, noise = self.residual_std**2, 1 / self.schedule.alphas_cumprod - 1
        return at((noise * variance / (noise + variance)).sqrt(), step, x)

    # ----------------------------------------------------------------------------------------------
    # The same quantities in terms of one another

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
        """`x_0` after `step` steps of noise."""
        alpha_bar = self.schedule.alphas_cumprod
        return at(alpha_bar.sqrt(), step, x_0) * x_0 + at((1 - alpha_bar).sqrt(), step, x_0) * noise

    # ----------------------------------------------------------------------------------------------
    # Training

    def loss(self, x_0: Tensor, step: Tensor, noise: Tensor, use_kl: bool = False) -> Tensor:
        """Each picture's training loss, (b,): mean squared error of what the network predicts (eps, x_0, or with
        `residual_std` the scaled residual, which has about unit variance at every step).

        With a learned variance the variational bound's term is added, through the variance alone: Improved DDPM's
        hybrid loss, as guided-diffusion scales it (the bound over all steps, divided by a thousand). With `use_kl` the
        loss is the bound and nothing else, over all steps.
        """
        x = self.q_sample(x_0, step, noise)
        output, log_variance = self._evaluate(x, step)
        if use_kl:
            predicted = output if self.predicts_x_0 else self.x_0_from_eps(x, step, output)
            mean = self.posterior_mean(x, step, predicted)
            return self._bound(x, x_0, step, mean, log_variance) * self.num_steps
        loss = F.mse_loss(output, x_0 if self.predicts_x_0 else noise, reduction="none").flatten(1).mean(1)
        if self.residual_std is not None:
            loss = loss / self._residual_spread(x, step).flatten() ** 2
        if self.learn_sigma:
            fixed = output.detach()
            predicted = fixed if self.predicts_x_0 else self.x_0_from_eps(x, step, fixed)
            mean = self.posterior_mean(x, step, predicted)
            loss = loss + self._bound(x, x_0, step, mean, log_variance) * (self.num_steps / 1000)
        return loss

    def _bound(self, x: Tensor, x_0: Tensor, step: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """A step's term of the variational bound, in bits per dimension, (b,): a KL divergence, or a likelihood."""
        true_mean = self.posterior_mean(x, step, x_0)
        true_log_variance = at(self.schedule.posterior_log_variance, step, x)
        kl = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean) ** 2 * (-log_variance).exp()
        )
        nll = -discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance)
        first = (step == 0).to(kl.device)
        return torch.where(first, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Elementwise log-probability of 8-bit values in [-1, 1] under a Gaussian rounded to them (DDPM, equation 13)."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper = torch.special.ndtr(inverse * (centred + 1 / 255))
    lower = torch.special.ndtr(inverse * (centred - 1 / 255))
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()
