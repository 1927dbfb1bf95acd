"""Schedules, the denoiser and samplers, against recorded outputs and against mathematics; the decoder."""

import itertools
from dataclasses import replace

import pytest
import torch
from factories import gaussian_denoiser, small_decoder, small_unet
from helpers import assert_same_weights

from dalle_pytorch.data.loading import random_crops
from dalle_pytorch.errors import CheckpointError
from diffusion import DiffusionDecoder
from diffusion.denoiser import Denoiser, discretized_gaussian_log_likelihood
from diffusion.samplers import SAMPLERS, Noise, generator, sample_ddim
from diffusion.schedule import Schedule, named_betas, spaced_steps
from diffusion.tasks import DecoderTask
from diffusion.unet import UNet


def last(steps):
    return list(steps)[-1][1]


# --------------------------------------------------------------------------------------------------
# Schedules


def test_spacing_follows_guided_diffusion():
    assert spaced_steps(1000, "10") == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert spaced_steps(1000, "6") == [0, 200, 400, 599, 799, 999]
    assert spaced_steps(4000, "8") == [0, 571, 1143, 1714, 2285, 2856, 3428, 3999]
    assert spaced_steps(1000, "ddim10") == list(range(0, 1000, 100))
    assert spaced_steps(300, "10,15,20") == spaced_steps(300, [10, 15, 20])
    assert spaced_steps(300, "2,1") == [0, 149, 150]
    assert spaced_steps(7, 7) == list(range(7))


def test_quadratic_spacing_keeps_both_ends_and_repeats_nothing():
    assert spaced_steps(1000, "quad5") == [0, 62, 250, 562, 999]
    for count in (1, 2, 25, 60, 99, 100):
        steps = spaced_steps(100, f"quad{count}")
        assert len(set(steps)) == count and steps == sorted(steps) and steps[-1] == 99


@pytest.mark.parametrize("spacing", ["0", "1001", "ddim999", "ddim", "quad0", "quad1001", "x", "-5", "", "600,600", 0])
def test_spacing_that_cannot_be_is_one_clear_line(spacing):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        spaced_steps(1000, spacing)


def test_linear_schedule_is_as_noisy_at_the_end_for_any_number_of_steps():
    assert named_betas("linear", 1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    ends = [Schedule.named("linear", n).alphas_cumprod[-1].item() for n in (1000, 4000)]
    assert ends[0] == pytest.approx(ends[1], rel=0.2)
    with pytest.raises(ValueError, match="sigmoid"):
        named_betas("sigmoid", 10)
    with pytest.raises(ValueError, match="needs more than 20 steps"):
        named_betas("linear", 20)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_respacing_keeps_the_noise_at_the_steps_it_visits(name):
    full = Schedule.named(name, 1000)
    short = full.respaced("17").respaced("5")
    assert torch.allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map])
    assert short.num_training_steps == 1000 and short.alphas_cumprod.dtype == torch.float64


def test_posterior_is_bayes_rule():
    schedule = Schedule.named("linear", 50)
    denoiser = Denoiser(None, schedule)
    x_0, x, step = torch.tensor(0.3).double(), torch.tensor(-0.8).double(), 20
    # q(x_{t-1} | x_0) · q(x_t | x_{t-1}), both Gaussians in x_{t-1}.
    prior_mean = schedule.alphas_cumprod[step - 1].sqrt() * x_0
    prior_precision = 1 / (1 - schedule.alphas_cumprod[step - 1])
    beta = schedule.betas[step]
    precision = prior_precision + (1 - beta) / beta
    mean = (prior_mean * prior_precision + (1 - beta).sqrt() * x / beta) / precision
    assert denoiser.posterior_mean(x, step, x_0).item() == pytest.approx(mean.item(), rel=1e-12)
    assert schedule.posterior_log_variance[step].exp().item() == pytest.approx(1 / precision.item(), rel=1e-12)
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


# --------------------------------------------------------------------------------------------------
# Samplers, on data whose perfect network is known: independent normal pixels


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", "200"), ("ddpm", "200"), ("dpm++", "quad25"), ("unipc", "quad25")]
)
def test_samplers_draw_from_the_distribution(sampler, steps, schedule):
    denoiser = gaussian_denoiser(steps=steps, schedule=schedule, sigma_small=True)
    noise = Noise([generator(i) for i in range(4)], (3, 32, 32))
    seen = list(SAMPLERS[sampler](denoiser, noise(), noise))
    assert [step for step, _, _ in seen] == list(reversed(range(denoiser.num_steps)))
    pixels = seen[-1][1]
    assert pixels.mean().item() == pytest.approx(0.3, abs=0.02)
    assert pixels.std().item() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_last_step_of_pure_noise_is_survived(sampler):
    """There 1 - beta is below the resolution of single precision."""
    denoiser = gaussian_denoiser(steps="18,3,2,2", schedule="cosine")
    assert 1 - denoiser.schedule.betas[-1] < 2e-8
    noise = Noise([generator(0)], (3, 8, 8))
    assert last(SAMPLERS[sampler](denoiser, noise(), noise)).isfinite().all()


def test_ddim_with_eta_1_is_as_noisy_as_the_posterior():
    denoiser = gaussian_denoiser(steps="200")
    noise = Noise([generator(i) for i in range(4)], (3, 32, 32))
    pixels = last(sample_ddim(denoiser, noise(), noise, eta=1.0))
    assert pixels.mean().item() == pytest.approx(0.3, abs=0.02)
    assert pixels.std().item() == pytest.approx(0.2, abs=0.02)


def test_eps_and_x_0_networks_mean_the_same():
    by_eps = gaussian_denoiser()
    schedule = by_eps.schedule

    def network(x, timesteps):
        step = schedule.timestep_map.tolist().index(int(timesteps[0]))
        return by_eps(x, step, clip=False).x_0

    by_x_0 = replace(by_eps, network=network, predict_xstart=True)
    x = torch.randn(2, 3, 8, 8)
    for step, clip in itertools.product((0, 7, 19), (True, False)):
        for a, b in zip(by_eps(x, step, clip), by_x_0(x, step, clip), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_guidance_moves_samples_where_the_gradient_points():
    """Data times exp(c·x) is normal with its mean moved by c · variance: exact guidance must end there."""
    push = 2.0
    denoiser = gaussian_denoiser(steps="200", sigma_small=True)
    alpha_bar = denoiser.schedule.alphas_cumprod.float()

    def guide(denoiser, x, step):
        # The gradient of log E[exp(c·x_0) | x]: c times the slope of E[x_0 | x].
        a = alpha_bar[step]
        return denoiser(x, step), torch.full_like(x, push * (a.sqrt() * 0.04 / (a * 0.04 + 1 - a)).item())

    for sampler in SAMPLERS:
        noise = Noise([generator(i) for i in range(4)], (3, 32, 32))
        pixels = last(SAMPLERS[sampler](denoiser, noise(), noise, guide))
        assert pixels.mean().item() == pytest.approx(0.3 + push * 0.04, abs=0.02), sampler


# --------------------------------------------------------------------------------------------------
# Training


def test_loss_of_the_perfect_network_is_the_variance_left():
    denoiser = gaussian_denoiser()
    torch.manual_seed(0)
    x_0, noise = 0.3 + 0.2 * torch.randn(4, 3, 64, 64), torch.randn(4, 3, 64, 64)
    step = torch.tensor([0, 5, 10, 19])
    a = denoiser.schedule.alphas_cumprod[step]
    expected = a * 0.04 / (a * 0.04 + 1 - a)
    assert denoiser.loss(x_0, step, noise).tolist() == pytest.approx(expected.tolist(), rel=0.05)


def test_variance_is_learned_by_the_bound_and_not_by_way_of_the_mean():
    denoiser = Denoiser(small_unet(learn_sigma=True), Schedule.named("linear", 100), learn_sigma=True)
    x_0, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, 3, 32, 32)
    step = torch.tensor([0, 1, 50, 99])
    bias = denoiser.network.out[2].bias
    gradient = torch.autograd.grad(denoiser.loss(x_0, step, noise).sum(), bias)[0]
    output = denoiser.network(denoiser.q_sample(x_0, step, noise), denoiser.network_timesteps(step, 4))
    simple = torch.autograd.grad((output[:, :3] - noise).square().flatten(1).mean(1).sum(), bias)[0]
    assert torch.allclose(gradient[:3], simple[:3], rtol=1e-4)
    assert gradient[3:].abs().min() > 0


def test_bound_is_the_divergence_of_two_gaussians():
    denoiser = Denoiser(None, Schedule.named("linear", 100), learn_sigma=True)
    x_0, x, step = torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.tensor([30])
    mean, log_variance = torch.randn(1, 3, 4, 4) * 0.1, torch.full((1, 3, 4, 4), -4.0)
    true = torch.distributions.Normal(
        denoiser.posterior_mean(x, step, x_0), denoiser.schedule.posterior_log_variance[30].mul(0.5).exp().float()
    )
    ours = torch.distributions.Normal(mean, log_variance.mul(0.5).exp())
    expected = torch.distributions.kl_divergence(true, ours).mean() / torch.tensor(2.0).log()
    assert denoiser._bound(x, x_0, step, mean, log_variance).item() == pytest.approx(expected.item(), rel=1e-4)


def test_likelihoods_of_all_values_sum_to_one():
    values = torch.linspace(-1, 1, 256)
    log = discretized_gaussian_log_likelihood(values, torch.full((256,), 0.2), torch.full((256,), -1.0))
    assert log.exp().sum().item() == pytest.approx(1, abs=1e-3)


def test_network_of_residuals_has_the_best_linear_guess_before_it_has_learned():
    """Of residuals that are white noise the best guess is linear: a network of zeros loses nothing against it, and one
    that knows the residual finds the picture."""
    torch.manual_seed(0)
    low_res, std = torch.rand(1, 3, 32, 32) * 2 - 1, 0.2
    x_0 = torch.nn.functional.interpolate(low_res, (64, 64), mode="bilinear") + std * torch.randn(1, 3, 64, 64)

    def denoiser(network, gated=False):
        return Denoiser(network, Schedule.named("cosine", 100), residual_std=std, gated=gated,
                        conditioning={"low_res": low_res})  # fmt: skip

    def open_gate(x, t, low_res):
        return torch.cat([torch.zeros_like(x), torch.full_like(x[:, :1], 200)], dim=1)

    zeros = denoiser(lambda x, t, low_res: torch.zeros_like(x))
    for step in (0, 10, 50, 99):
        noise, steps = torch.randn_like(x_0), torch.tensor([step])
        x = zeros.q_sample(x_0, steps, noise)
        assert abs(zeros._residual(x, step).scaled.std() - 1) < 0.05
        prediction = zeros(x, step, clip=False)
        noise_std = (1 / zeros.schedule.alphas_cumprod[step] - 1).sqrt()
        best = 1 / (1 / std**2 + 1 / noise_std**2)
        assert abs((prediction.x_0 - x_0).square().mean() / best - 1) < 0.1
        # The scaled target has unit variance at every step.
        assert abs(zeros.loss(x_0, steps, noise) - 1) < 0.1
        known = zeros._residual(x, step)
        assert torch.equal(denoiser(open_gate, gated=True)(x, step).x_0, zeros(x, step).x_0)
        # Where the gate is shut nothing is left of the noise.
        shut = denoiser(lambda x, t, low_res: -open_gate(x, t, low_res), gated=True)(x, step, clip=False)
        assert torch.equal(shut.x_0, known.low_res)
        answer = (x_0 - known.low_res - known.mean) / known.std
        knowing = denoiser(lambda x, t, low_res, answer=answer: answer)
        assert torch.allclose(knowing(x, step, clip=False).x_0, x_0, atol=1e-4)
        assert knowing.loss(x_0, steps, noise) < 1e-4


def test_gate_is_for_residuals():
    with pytest.raises(ValueError, match="residual_std"):
        Denoiser(None, Schedule.named("linear", 100), gated=True)


def test_residuals_want_a_picture_to_differ_from(tiny_vae):
    with pytest.raises(ValueError, match="low_res_condition"):
        DiffusionDecoder(UNet(image_size=64, num_channels=32, emb_condition=True,
                              emb_input_dims=tiny_vae.codebook_dim), tiny_vae, residual_std=0.1)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_the_others_of_its_batch(tiny_vae, sampler):
    decoder = small_decoder(tiny_vae).double()  # random weights magnify rounding, which differs with the batch
    tokens = torch.randint(32, (3, 256), generator=generator("tokens"))
    together = decoder.decode(tokens, num_inference_steps=3, sampler=sampler, seed=5, image_indices=[0, 1, 0])
    assert together.shape == (3, 3, 128, 128)
    assert together.min() >= 0 and together.max() <= 1
    for i, image in enumerate([0, 1, 0]):
        alone = decoder.decode(tokens[i : i + 1], num_inference_steps=3, sampler=sampler, seed=5, image_indices=[image])
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    for seed, images in ((6, [0, 1, 0]), (5, None)):
        other = decoder.decode(tokens, num_inference_steps=3, sampler=sampler, seed=seed, image_indices=images)
        assert not torch.allclose(together[1], other[1], atol=0.01)


def test_images_of_equal_tokens_share_their_conditioning(tiny_vae, monkeypatch):
    decoder, decoded = small_decoder(tiny_vae), []
    decode_image = tiny_vae.decode_image
    monkeypatch.setattr(tiny_vae, "decode_image", lambda tokens: [decoded.append(len(tokens)), decode_image(tokens)][1])
    tokens = torch.randint(32, (2, 256), generator=generator("tokens"))
    shared = decoder.conditioning(tokens[[1, 0, 1, 1]])
    assert decoded == [2]
    for name, alone in decoder.conditioning(tokens).items():
        torch.testing.assert_close(shared[name], alone[[1, 0, 1, 1]])


def test_stopping_early_gives_what_was_predicted_by_then(tiny_vae):
    decoder = small_decoder(tiny_vae)
    tokens, seen = torch.zeros(1, 256, dtype=torch.long), []
    decoder.decode(tokens, num_inference_steps=4, callback=lambda done, pictures: seen.append((done, pictures)))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(decoder.decode(tokens, num_inference_steps=4, stop_at=2), seen[1][1])
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"step {bad} of 4"):
            decoder.decode(tokens, num_inference_steps=4, stop_at=bad)
    with pytest.raises(ValueError, match="plms"):
        decoder.decode(tokens, sampler="plms")


def test_native_folder_finds_the_vae_inside_or_beside(tiny_vae, tmp_path):
    decoder = small_decoder(tiny_vae, noise_schedule="cosine", diffusion_steps=500)
    decoder.save_pretrained(tmp_path / "bundle/decoder")
    with pytest.raises(CheckpointError, match="no VAE"):
        DiffusionDecoder.from_pretrained(tmp_path / "bundle/decoder")
    for place in ("bundle/vae", "bundle/decoder/vae"):
        tiny_vae.save_pretrained(tmp_path / place)
        opened = DiffusionDecoder.from_pretrained(tmp_path / "bundle/decoder")
        assert opened.config == decoder.config and opened.denoiser.num_steps == 500
        assert torch.equal(opened.denoiser.schedule.betas, decoder.denoiser.schedule.betas)
        assert_same_weights(opened, decoder)
    assert not any(name.startswith("vae") for name in decoder.own_state_dict())


def test_a_vae_of_other_codes_is_refused(tiny_vae):
    with pytest.raises(ValueError, match="rows of 9 channels, got a VAE with 8"):
        DiffusionDecoder(small_unet(emb_condition=True, emb_input_dims=9, emb_output_dims=32), tiny_vae)


def test_training_crops_cut_pictures_and_conditions_alike():
    # Every pixel holds its token's number, so that a crop shows where it is from.
    torch.manual_seed(0)
    cells = torch.arange(256.0).view(1, 1, 16, 16)
    maps = {"image_embeds": cells.repeat(4, 1, 1, 1), "low_res": cells.repeat(4, 1, 1, 1)}
    whole = cells.repeat(4, 1, 1, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pictures, *cut = random_crops([whole, *maps.values()], 64, 16, full_share=0.0)
    cut = dict(zip(maps, cut, strict=True))
    assert pictures.shape == (4, 1, 64, 64) and cut["image_embeds"].shape == (4, 1, 8, 8)
    assert torch.equal(pictures[:, :, ::8, ::8], cut["image_embeds"])
    rows, columns = zip(*(divmod(int(crop[0, 0, 0]), 16) for crop in pictures), strict=True)
    assert len(set(rows)) > 1 and len(set(columns)) > 1


def test_training_learns(tiny_vae):
    torch.manual_seed(0)
    decoder = small_decoder(tiny_vae)
    task = DecoderTask(decoder, crop_size=64).train()
    assert not tiny_vae.training and not any(parameter.requires_grad for parameter in tiny_vae.parameters())
    batch = {"image": torch.full((4, 3, 128, 128), 200, dtype=torch.uint8)}
    optimizer = torch.optim.AdamW(decoder.unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss, figures = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert all(value.ndim == 0 and not value.requires_grad for value in figures.values())
