"""Steps of the samplers by hand."""

import math

import pytest
import torch
from factories import gaussian_denoiser

from diffusion.denoiser import Denoiser
from diffusion.samplers import SAMPLERS, Noise, generator, sample_ancestral, sample_ddim, sample_dpm
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


@pytest.mark.parametrize("spacing", ["1", "2", "quad4", "quad7", "20"])
def test_dpm_solver_steps_as_the_scheduler_of_diffusers_does(spacing):
    from diffusers import DPMSolverMultistepScheduler

    torch.manual_seed(0)
    denoiser = make_denoiser().respaced(spacing)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=denoiser.num_steps, trained_betas=denoiser.schedule.betas.tolist(),
        prediction_type="sample", timestep_spacing="trailing", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(denoiser.num_steps)
    start = x = 0.1 * torch.randn(1, 3, 4, 4)
    steps = sample_dpm(denoiser, start, lambda: pytest.fail("it adds no noise"))
    for (step, ours, x_0), timestep in zip(steps, scheduler.timesteps, strict=True):
        torch.testing.assert_close(x_0, denoiser(x, step).x_0, atol=1e-4, rtol=1e-4)
        x = scheduler.step(denoiser(x, step).x_0, timestep, x).prev_sample
        torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])  # UniPC does
def test_guidance_that_ends_is_not_led_back(sampler):
    """A solver that extrapolates x_0 must not take the end of guidance for the image's own way."""
    denoiser = gaussian_denoiser(mean=0.0, deviation=0.2, schedule="cosine", steps="quad6")

    def guide(denoiser, x, step):
        return denoiser(x, step), torch.full_like(x, 0.2) if step == 3 else None

    def last(guide):
        noise = Noise([generator(0)], (3, 8, 8))
        *_, (_, x, _) = SAMPLERS[sampler](denoiser, noise(), noise, guide)
        return x

    moved = last(guide) - last(None)
    assert moved.mean() > 0.001 and (moved >= 0).all()
