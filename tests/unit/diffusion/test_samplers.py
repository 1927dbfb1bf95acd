"""Steps of the samplers by hand."""

import math

import pytest
import torch

from diffusion.denoiser import Denoiser
from diffusion.samplers import sample_ancestral, sample_ddim
from diffusion.schedule import Schedule


def make_denoiser(**settings):
    """Its network sees half of every picture as noise."""
    return Denoiser(lambda x, timesteps: x / 2, Schedule.named("linear", 100), **settings)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_adds_eta_times_the_posteriors_deviation(eta):
    """Song et al. 2021, equations 12 and 16, at the first step, 99."""
    torch.manual_seed(0)
    x, noise = 0.1 * torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    denoiser = make_denoiser()
    bar, before = (denoiser.schedule.alphas_cumprod[step].item() for step in (99, 98))
    x_0 = ((x - math.sqrt(1 - bar) * x / 2) / math.sqrt(bar)).clamp(-1, 1)
    eps = (x - math.sqrt(bar) * x_0) / math.sqrt(1 - bar)
    sigma = eta * math.sqrt((1 - before) / (1 - bar)) * math.sqrt(1 - bar / before)
    expected = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * eps + sigma * noise
    step, after, _ = next(sample_ddim(denoiser, x, lambda: noise, eta=eta))
    assert step == 99
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("sample", [sample_ancestral, lambda *given: sample_ddim(*given, eta=1.0)])
def test_last_step_has_no_noise(sample):
    torch.manual_seed(0)
    draws = []

    def noise():
        draws.append(torch.randn(1, 3, 4, 4))
        return draws[-1]

    *_, (step, x, x_0) = sample(make_denoiser(), torch.randn(1, 3, 4, 4), noise)
    # The posterior of step 0 has no variance, and its mean is the prediction.
    assert step == 0 and len(draws) == 99
    torch.testing.assert_close(x, x_0)
