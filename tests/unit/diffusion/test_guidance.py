"""CLIP guidance: prompts, cutouts, losses, and a gradient that belongs to one picture."""

import math
from dataclasses import replace

import pytest
import torch
from factories import gaussian_denoiser, small_unet

from dalle_pytorch.errors import UsageError
from diffusion.denoiser import Denoiser
from diffusion.guidance import ClipGuidance, make_cutouts, parse_prompts, range_loss, spherical_distance, tv_loss
from diffusion.samplers import SAMPLERS, Noise, generator
from diffusion.schedule import Schedule


class ColourClip:
    """Features are the mean colour of a picture; texts name colours. Remembers what it was asked."""

    image_size = 8
    device = torch.device("cpu")

    def __init__(self):
        self.texts = []

    def tokenize(self, texts):
        self.texts += texts
        return torch.tensor([("red", "green", "blue").index(text) for text in texts])

    def encode_text(self, tokens):
        return torch.eye(3)[tokens]

    def encode_image(self, image):
        assert image.shape[-2:] == (8, 8)
        return image.mean((2, 3))


def small_denoiser():
    return Denoiser(small_unet(), Schedule.named("linear", 1000)).respaced("10")


def test_prompts_and_their_weights():
    assert parse_prompts("a red seven:2|brick") == [("a red seven", 2.0), ("brick", 1.0)]
    assert parse_prompts(" a :-.5 | b ") == [("a", -0.5), ("b", 1.0)]
    assert parse_prompts("note: a clock|at 3:x") == [("note: a clock", 1.0), ("at 3:x", 1.0)]
    assert parse_prompts("|  |") == []
    assert parse_prompts(":2") == [(":2", 1.0)]


def test_weights_are_normalised_and_not_sent_to_clip():
    clip = ColourClip()
    guidance = ClipGuidance(clip, parse_prompts("red:3|blue:-1"))
    assert clip.texts == ["red", "blue"]
    assert guidance.weights.tolist() == pytest.approx([1.5, -0.5])
    guidance = ClipGuidance(clip, [("red", 1.0)], [(torch.ones(3, 16, 16), 3.0)], cutn=4)
    assert guidance.weights.tolist() == pytest.approx([0.25] + [0.75 / 4] * 4)
    with pytest.raises(ValueError, match="cancel"):
        ClipGuidance(clip, parse_prompts("red:1|blue:-1"))
    with pytest.raises(ValueError, match="needs a prompt"):
        ClipGuidance(clip)
    for weight in ("nan", "inf", "-inf", "1e30"):
        with pytest.raises(UsageError, match="weights of prompts of at most 1e"):
            ClipGuidance(clip, parse_prompts(f"red:{weight}"))


def test_cutouts_are_averaged_squares_of_the_picture():
    picture = torch.rand(3, 24, 24)
    cutouts = make_cutouts(picture, 8, 32, 1.0, generator(0))
    assert cutouts.shape == (32, 3, 8, 8)
    assert torch.equal(cutouts, make_cutouts(picture, 8, 32, 1.0, generator(0)))
    assert not torch.equal(cutouts, make_cutouts(picture, 8, 32, 1.0, generator(1)))
    whole = make_cutouts(picture, 8, 3, 0.0, generator(0))
    assert torch.allclose(whole, torch.nn.functional.avg_pool2d(picture[None], 3).expand(3, -1, -1, -1))
    # A power above 1 favours small ones, whose sharper pixels vary more.
    spread = [make_cutouts(picture, 8, 200, power, generator(0)).std().item() for power in (0.2, 1.0, 8.0)]
    assert spread == sorted(spread)


def test_losses_are_what_their_names_say():
    x = torch.tensor([[1.0, 0.0]])
    for angle in (0.0, 0.4, math.pi / 2, 3.0):
        y = 7 * torch.tensor([[math.cos(angle), math.sin(angle)]])
        assert spherical_distance(x, y).item() == pytest.approx(angle**2 / 2, abs=1e-3)
    ramp = torch.arange(4.0).expand(2, 3, 4, 4)
    assert tv_loss(ramp).tolist() == pytest.approx([12 / 16] * 2)
    assert tv_loss(torch.ones(1, 3, 4, 4)).item() == 0
    assert range_loss(torch.tensor([0.5, -1.0, 3.0]).view(3, 1, 1, 1)).tolist() == [0, 0, 4]


def test_gradient_is_that_of_the_loss_through_the_network():
    denoiser, x, step = small_denoiser(), torch.randn(1, 3, 32, 32), 5
    guidance = ClipGuidance(ColourClip(), [("red", 1.0)], tv_scale=100.0, range_scale=10.0, cutn=4)
    prediction, gradient = guidance.guide([(0,)])(denoiser, x, step)

    def loss(x):
        with torch.no_grad():
            x_0 = denoiser(x, step, clip=False).x_0
        share = (1 - denoiser.schedule.alphas_cumprod[step]).sqrt().float()
        blended = share * x_0 + (1 - share) * x
        clip_loss = guidance.clip_loss(blended, [generator(0, "cutouts", step)])
        return (1000 * clip_loss + 100 * tv_loss(blended) + 10 * range_loss(x_0)).double().item()

    direction = gradient / gradient.norm()
    slope = (loss(x + 0.01 * direction) - loss(x - 0.01 * direction)) / 0.02
    assert slope == pytest.approx(-gradient.norm().item(), rel=0.02)
    assert not prediction.x_0.requires_grad and prediction.x_0.abs().max() <= 1
    assert torch.allclose(prediction.x_0, denoiser(x, step).x_0, atol=1e-6)


def test_gradient_of_a_picture_does_not_depend_on_the_batch():
    denoiser, x = small_denoiser(), torch.randn(3, 3, 32, 32)
    guidance = ClipGuidance(ColourClip(), [("green", 1.0)], tv_scale=10.0, range_scale=1.0, cutn=4)
    identities = [(0, "a"), (0, "b"), (0, "c")]
    _, together = guidance.guide(identities)(denoiser, x, 4)
    for i in range(3):
        _, alone = guidance.guide(identities[i : i + 1])(denoiser, x[i : i + 1], 4)
        assert torch.allclose(alone[0], together[i], atol=1e-5 * together.abs().max())
    _, other = guidance.guide(identities[::-1])(denoiser, x, 4)
    assert not torch.allclose(other[0], together[0], atol=1e-3 * together.abs().max())


def test_cutouts_are_new_at_every_step_and_an_images_own():
    denoiser, x = small_denoiser(), torch.randn(2, 3, 32, 32)
    guidance, seeds = ClipGuidance(ColourClip(), [("red", 1.0)], cutn=4), []

    def clip_loss(images, generators):
        seeds.append([generator.initial_seed() for generator in generators])
        return images.mean((1, 2, 3))

    guidance.clip_loss = clip_loss
    guide = guidance.guide([(0, "a"), (0, "b")])
    for step in (5, 4, 5):
        guide(denoiser, x, step)
    assert seeds[0] == seeds[2]
    assert len({*seeds[0], *seeds[1]}) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_turn_to_the_prompt(sampler):
    denoiser = gaussian_denoiser(mean=0.0, steps="25")
    shares = {}
    for colour in ("red", "blue"):
        guidance = ClipGuidance(ColourClip(), [(colour, 1.0)], cutn=4)
        noise = Noise([generator(0)], (3, 32, 32))
        *_, (_, pictures, _) = SAMPLERS[sampler](denoiser, noise(), noise, guidance.guide([(0,)]))
        mean = ((pictures + 1) / 2).mean((0, 2, 3))
        shares[colour] = mean / mean.sum()
    assert shares["red"][0] > shares["blue"][0] + 0.01
    assert shares["blue"][2] > shares["red"][2] + 0.01


class Counted(ColourClip):
    """Counts the batches of pictures that it encodes."""

    passes = 0

    def encode_image(self, image):
        self.passes += 1
        return super().encode_image(image)


def run(denoiser, guidance, sampler="ddim"):
    """The steps of one run, and the passes of the network: all of them, and those that a gradient goes back through."""
    network, passes, backward = denoiser.network, [], []

    def counted(x, timesteps):
        passes.append(1)
        output = network(x, timesteps)
        if output.requires_grad:
            output.register_hook(lambda _: backward.append(1))
        return output

    noise = Noise([generator(0)], (3, 32, 32))
    with torch.no_grad():
        steps = SAMPLERS[sampler](replace(denoiser, network=counted), noise(), noise, guidance.guide([(0,)]))
        return list(steps), len(passes), len(backward)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("schedule", "guided"), [("cosine", 9), ("linear", 10)])
def test_pure_noise_is_not_guided(sampler, schedule, guided):
    denoiser, clip = gaussian_denoiser(schedule=schedule, steps="10"), Counted()
    assert run(denoiser, ClipGuidance(clip, [("red", 1.0)], cutn=2), sampler)[1:] == (10, guided)
    assert clip.passes == guided


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_passes_of_clip_and_of_the_network(sampler):
    denoiser = gaussian_denoiser(steps="10")
    sigma = (1 / denoiser.schedule.alphas_cumprod - 1).sqrt().tolist()
    cases = {(1, 0.0): 10, (2, 0.0): 5, (3, 0.0): 4, (100, 0.0): 1, (1, sigma[4] + 1e-6): 5, (2, sigma[4] + 1e-6): 3,
             (1, sigma[9] + 1e-6): 0}  # fmt: skip
    for (every, least), count in cases.items():
        for through in (True, False):
            clip = Counted()
            guidance = ClipGuidance(clip, [("red", 1.0)], cutn=2, guidance_every=every, guidance_min_sigma=least,
                                    guidance_through_unet=through)  # fmt: skip
            assert run(denoiser, guidance, sampler)[1:] == (10, count if through else 0)
            assert clip.passes == count


def test_between_gradients_the_prediction_moves_as_it_did():
    denoiser = gaussian_denoiser(steps="10")
    guidance = ClipGuidance(ColourClip(), [("red", 1.0)], cutn=2, guidance_every=2)
    guide, x = guidance.guide([(0,)]), torch.randn(1, 3, 32, 32)
    shifts = []
    for step in (7, 6, 5):
        _, gradient = guide(denoiser, x, step)
        alpha_bar = denoiser.schedule.alphas_cumprod[step].item()
        shifts.append(gradient * (1 - alpha_bar) / math.sqrt(alpha_bar))
    torch.testing.assert_close(shifts[1], shifts[0])
    assert (shifts[2] - shifts[0]).abs().max() > 1e-2 * shifts[0].abs().max()


@pytest.mark.parametrize("residual_std", [None, 0.3])
def test_without_the_network_the_gradient_is_that_of_a_linear_one(residual_std):
    """A network that is linear itself: of pictures of unit variance, or of residuals, of which it adds nothing."""
    if residual_std is None:
        denoiser = gaussian_denoiser(mean=0.0, deviation=1.0, steps="10")
    else:
        denoiser = Denoiser(lambda x, timesteps, low_res: 0 * x, Schedule.named("cosine"), residual_std=residual_std)
        denoiser = denoiser.respaced("10").conditioned(low_res=torch.rand(1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32)
    for step in (8, 4, 1):
        through, linear = (
            ClipGuidance(ColourClip(), [("red", 1.0)], tv_scale=10.0, range_scale=1.0, cutn=2,
                         guidance_through_unet=through).guide([(0,)])(denoiser, x, step)
            for through in (True, False)
        )  # fmt: skip
        torch.testing.assert_close(linear[1], through[1], rtol=1e-3, atol=1e-5 * through[1].abs().max().item())
        torch.testing.assert_close(linear[0].x_0, through[0].x_0)
