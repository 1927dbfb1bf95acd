"""Sampling that begins with an image: where it starts, every sampler from there, and the distance to it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from factories import gaussian_denoiser, make_clip, small_decoder, small_unet

import diffusion.published
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files.images import resize
from diffusion.decoder import DiffusionDecoder
from diffusion.guidance import ClipGuidance, _lpips, init_loss
from diffusion.published import load_decoder
from diffusion.samplers import SAMPLERS, Noise, generator
from diffusion.schedule import Schedule, skipped_steps
from diffusion.tasks import DecoderTask

SPACINGS = ("200", "quad200", "ddim200", "60,70,70")


@pytest.fixture
def unconditional(tiny_vae):
    return DiffusionDecoder(small_unet(image_size=64), tiny_vae, noise_schedule="cosine").eval()


def draw_tokens(*seeds):
    return torch.stack([torch.randint(32, (256,), generator=torch.Generator().manual_seed(s)) for s in seeds])


def test_skipped_steps():
    cases = {0: 0, "0": 0, 24: 24, "7": 7, 0.4: 10, "0.4": 10, "0.25": 6, 0.999: 24, 1: 1}
    assert {given: skipped_steps(25, given) for given in cases} == cases
    for wrong in (25, -1, "2.5", -0.1, "a", "nan", "inf", ""):
        with pytest.raises(UsageError, match="cannot skip"):
            skipped_steps(25, wrong)
    whole, rest = (Schedule.named("cosine").respaced("quad25", skip) for skip in (0, 10))
    assert rest.num_steps == 15 and torch.equal(rest.timestep_map, whole.timestep_map[:15])
    assert torch.equal(rest.alphas_cumprod, whole.alphas_cumprod[:15])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_goes_on_from_the_middle(sampler, spacing):
    """Pixels are Gaussian: the probability flow scales their deviation, and DDPM draws from what x leaves open."""
    mean, deviation = 0.1, 0.2
    denoiser = gaussian_denoiser(mean, deviation, steps="1000").respaced(spacing, 0.4)
    assert denoiser.num_steps == 120
    alpha_bar = denoiser.schedule.alphas_cumprod[-1].item()
    noise = Noise([generator(0)], (3, 64, 64))
    x_0 = torch.full((1, 3, 64, 64), 0.4)
    x = denoiser.q_sample(x_0, denoiser.num_steps - 1, noise())
    *_, (step, result, _) = SAMPLERS[sampler](denoiser, x, noise)
    total = (alpha_bar * deviation**2 + 1 - alpha_bar) ** 0.5
    assert step == 0
    if sampler == "ddpm":
        expected = mean + alpha_bar * deviation**2 / total**2 * (0.4 - mean)
        assert result.mean().item() == pytest.approx(expected, abs=0.02)
    else:
        flow = mean + deviation * (x - alpha_bar**0.5 * mean) / total
        assert (result - flow).abs().mean() < 0.02


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_left(unconditional, sampler):
    tokens = draw_tokens(0)
    images = unconditional.decode(tokens, 4, sampler, skip_steps=3)
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


def test_the_first_step_is_the_vaes_image_under_its_noise(unconditional, tiny_vae):
    seen = []
    unconditional.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    tokens = draw_tokens(1, 2)
    unconditional.decode(tokens, "quad25", seed=3, image_indices=[0, 5])
    assert len(seen) == 15  # 25, less two fifths of them
    x, timesteps = seen[0]
    schedule = Schedule.named("cosine").respaced("quad25")
    assert timesteps.tolist() == [schedule.timestep_map[14].item()] * 2
    noise = Noise([generator(3, tuple(row), i) for row, i in zip(tokens.tolist(), (0, 5), strict=True)], (3, 64, 64))
    alpha_bar = schedule.alphas_cumprod[14].item()
    expected = alpha_bar**0.5 * (2 * tiny_vae.decode_image(tokens) - 1) + (1 - alpha_bar) ** 0.5 * noise()
    torch.testing.assert_close(x, expected.detach())


def test_it_is_trained_as_a_decoder_is(unconditional):
    task = DecoderTask(unconditional, crop_size=32, full_share=0.0).train()
    shapes = []
    unconditional.unet.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    loss, _ = task({"image": torch.full((2, 3, 64, 64), 200, dtype=torch.uint8)})
    loss.backward()
    assert shapes == [(2, 3, 32, 32)] and loss.isfinite()


def test_a_decoder_of_tokens_begins_with_an_image_too(tiny_vae):
    decoder, seen = small_decoder(tiny_vae), []
    decoder.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens, start = draw_tokens(1), torch.rand(1, 3, 64, 64)
    decoder.decode(tokens, 4)
    plain = seen[0]
    decoder.decode(tokens, 4, init_image=start, skip_steps=2)
    assert len(seen) == 6
    alpha_bar = decoder.denoiser.respaced(4).schedule.alphas_cumprod[1].item()
    expected = alpha_bar**0.5 * (2 * resize(start, 128) - 1) + (1 - alpha_bar) ** 0.5 * plain
    torch.testing.assert_close(seen[4], expected)
    for wrong in ({"skip_steps": 2}, {"init_scale": 1.0}, {"init_image": start, "init_scale": 1.0}):
        with pytest.raises(UsageError, match="image to begin with"):
            decoder.decode(tokens, 4, **wrong)


def test_init_loss_is_zero_at_the_start_and_an_images_own():
    torch.manual_seed(0)
    clip, start, images = make_clip().eval(), torch.rand(2, 3, 32, 32), 2 * torch.rand(2, 3, 32, 32) - 1
    with torch.no_grad():
        assert init_loss(start, clip)(2 * start - 1).tolist() == [0, 0]
        both = init_loss(start, clip)(images)
        layers = [clip.visual_features(torch.nn.functional.avg_pool2d(x, 2)) for x in (start, (images + 1) / 2)]
        expected = torch.stack([1 - (a * b).sum(-1).mean(-1) for a, b in zip(*layers, strict=True)]).mean(0) * 2
        torch.testing.assert_close(both, expected)
        torch.testing.assert_close(init_loss(start[1:], clip)(images[1:]), both[1:])


def test_init_scale_weighs_the_loss():
    torch.manual_seed(0)
    clip, start, x = make_clip().eval().requires_grad_(False), torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    denoiser = gaussian_denoiser()
    guidance = ClipGuidance(clip, image_prompts=[(torch.rand(3, 32, 32), 1.0)], clip_guidance_scale=0, cutn=1)
    gradients = {scale: guidance.guide([(0,)], start, scale)(denoiser, x, 5)[1] for scale in (0.0, 1.0, 100.0)}
    assert not gradients[0].any()
    assert gradients[1].any()
    torch.testing.assert_close(gradients[100], 100 * gradients[1])
    direction = gradients[1] / gradients[1].norm()
    share = (1 - denoiser.schedule.alphas_cumprod[5]).sqrt().float()

    def loss(x):
        return init_loss(start, clip)(denoiser(x, 5, clip=False).x_0 * share + x * (1 - share)).item()

    slope = (loss(x + 0.05 * direction) - loss(x - 0.05 * direction)) / 0.1
    assert slope == pytest.approx(-gradients[1].norm().item(), rel=0.05)


def test_lpips_is_used_where_it_is_installed(monkeypatch):
    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"

        def forward(self, a, b):
            return (a - b).mean((1, 2, 3), keepdim=True)

    _lpips.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    try:
        distance = init_loss(torch.full((2, 3, 8, 8), 0.5), make_clip())(torch.full((2, 3, 8, 8), 0.25))
    finally:
        _lpips.cache_clear()
    assert distance.tolist() == [0.25, 0.25]


def test_classes(tiny_vae, tmp_path):
    unet = small_unet(image_size=64, class_cond=True, use_new_attention_order=False)
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    one, other = (load_decoder(tmp_path / "model.pt", tiny_vae, label, image_size=64) for label in (0, 999))
    tokens = draw_tokens(0)
    assert not torch.equal(one.decode(tokens, 2), other.decode(tokens, 2))
    other.save_pretrained(tmp_path / "decoder")
    again = DiffusionDecoder.from_pretrained(tmp_path / "decoder", vae=tiny_vae)
    torch.testing.assert_close(again.decode(tokens, 2), other.decode(tokens, 2))
    with pytest.raises(CheckpointError, match="class from 0 to 999"):
        load_decoder(tmp_path / "model.pt", tiny_vae, 1000)
    with pytest.raises(UsageError, match="needs an ImageNet class"):
        load_decoder(tmp_path / "model.pt", tiny_vae).decode(tokens, 2)
    torch.save(small_unet(image_size=64).state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="takes no class"):
        load_decoder(tmp_path / "plain.pt", tiny_vae, 3)


def test_published_unets_without_tokens_are_known_by_their_widths(tiny_vae, tmp_path, monkeypatch):
    """Here with fewer channels; num_heads, 4 by default, would be another network."""
    monkeypatch.setattr(diffusion.published, "PUBLISHED_CHANNELS", {64: 32, 128: 0, 256: 0, 512: 0})
    unet = small_unet(image_size=64, channel_mult=(1, 2, 3, 4), attention_resolutions=(32, 16, 8), learn_sigma=True,
                      num_head_channels=64)  # fmt: skip
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    decoder = load_decoder(tmp_path / "model.pt", tiny_vae)
    assert decoder.unet.config == unet.config
    assert decoder.config["noise_schedule"] == "cosine" and decoder.config["rescale_timesteps"]
    decoder = load_decoder(tmp_path / "model.pt", tiny_vae, num_heads=2, noise_schedule="linear")
    assert (decoder.unet.config["num_heads"], decoder.unet.config["num_head_channels"]) == (2, -1)
    assert decoder.config["noise_schedule"] == "linear"
