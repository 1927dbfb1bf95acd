"""The denoiser's losses by hand: the hybrid loss and the variational bound, term by term."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion.denoiser import Denoiser
from diffusion.schedule import Schedule


def made_up_network(x, timesteps):
    """An eps that is a third of x, and variances at a fraction of the way between the bounds that varies by pixel."""
    position = torch.linspace(-0.8, 0.9, x[0].numel()).view_as(x[0]).expand_as(x)
    return torch.cat((x / 3, position), dim=1)


def bound_in_bits(schedule, x_0, step, noise):
    """KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) in bits per dimension, by the formulas of Ho et al. 2020."""
    bar, beta = schedule.alphas_cumprod[step].item(), schedule.betas[step].item()
    before = schedule.alphas_cumprod[step - 1].item()
    x = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * noise
    predicted = (x - math.sqrt(1 - bar) * (x / 3)) / math.sqrt(bar)
    variance = beta * (1 - before) / (1 - bar)

    def mean(start):
        return math.sqrt(before) * beta / (1 - bar) * start + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x

    share = (torch.linspace(-0.8, 0.9, x_0.numel()).view_as(x_0) + 1) / 2
    log_variance = share * math.log(beta) + (1 - share) * math.log(variance)
    true, ours = Normal(mean(x_0), math.sqrt(variance)), Normal(mean(predicted), (log_variance / 2).exp())
    return kl_divergence(true, ours).mean() / math.log(2), ((x / 3 - noise) ** 2).mean()


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_hybrid_loss_is_the_error_and_the_bound_over_all_steps_by_a_thousandth(num_steps):
    """Improved DDPM's L_simple + 0.001 · L_vlb, where L_vlb is the sum over the steps: num_steps times their mean."""
    torch.manual_seed(0)
    schedule = Schedule.named("linear", num_steps)
    denoiser = Denoiser(made_up_network, schedule, learn_sigma=True)
    x_0, noise, step = torch.rand(2, 3, 4, 4) * 2 - 1, torch.randn(2, 3, 4, 4), torch.tensor([20, 37])
    loss = denoiser.loss(x_0, step, noise)
    for i in range(2):
        bound, error = bound_in_bits(schedule, x_0[i], int(step[i]), noise[i])
        torch.testing.assert_close(loss[i], error + 0.001 * num_steps * bound, rtol=1e-3, atol=1e-4)


def test_bound_alone_is_that_over_all_steps():
    torch.manual_seed(0)
    schedule = Schedule.named("linear", 50)
    denoiser = Denoiser(made_up_network, schedule, learn_sigma=True)
    x_0, noise, step = torch.rand(1, 3, 4, 4) * 2 - 1, torch.randn(1, 3, 4, 4), torch.tensor([20])
    bound, _ = bound_in_bits(schedule, x_0[0], 20, noise[0])
    torch.testing.assert_close(denoiser.loss(x_0, step, noise, use_kl=True)[0], 50 * bound, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_loss_of_residuals_is_in_units_of_their_spread(std):
    """A network that answers 0 leaves the residual about its best linear guess, whose variance is
    noise · std² / (noise + std²) with noise = 1 / alpha-bar - 1: the loss divides by that."""
    torch.manual_seed(0)
    schedule = Schedule.named("cosine", 100)
    low_res, x_0, noise = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
    denoiser = Denoiser(lambda x, t, low_res: torch.zeros_like(x), schedule, residual_std=std,
                        conditioning={"low_res": low_res})  # fmt: skip
    bar = schedule.alphas_cumprod[40].item()
    noise_variance = 1 / bar - 1
    noisy = x_0 + math.sqrt(noise_variance) * noise - low_res
    left = x_0 - low_res - noisy * std**2 / (std**2 + noise_variance)
    expected = (left**2).mean() / (noise_variance * std**2 / (noise_variance + std**2))
    torch.testing.assert_close(denoiser.loss(x_0, torch.tensor([40]), noise)[0], expected, rtol=1e-4, atol=1e-5)


def test_timesteps_are_told_in_thousandths_where_asked():
    schedule = Schedule.named("linear", 200).respaced([10])  # 0, 22, 44 … 199
    for rescale, told in ((False, 22.0), (True, 110.0)):
        denoiser = Denoiser(None, schedule, rescale_timesteps=rescale)
        assert denoiser.network_timesteps(1, 2).tolist() == [told, told]
