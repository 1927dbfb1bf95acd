"""CLIP's training task: what the pictures go through, and its loss with hard negatives."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from factories import Letters, make_clip
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.training.tasks.clip import ClipTask


@pytest.fixture
def clip():
    clip = make_clip()
    clip.tokenizer = Letters()
    return clip


def to_bytes(image):
    return (image * 255).round().to(torch.uint8)


def shown(clip, image, times, **settings):
    """What CLIP is shown (times, 3, 16, 16) in place of one picture (3, 16, 16), in as many batches of one."""
    seen, encode = [], clip.encode_image
    clip.encode_image = lambda images: seen.append(images) or encode(images)
    task = ClipTask(clip, **settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(times):
            task({"image": to_bytes(image)[None], "caption": ["abc"]})
    return torch.cat(seen)


def test_images_are_noisy_by_up_to_the_noise(clip):
    grey = torch.full((3, 16, 16), 0.5)
    deviations = shown(clip, grey, 200, smallest_crop=1.0, noise=0.06).std((1, 2, 3))
    # Uniform in [0, 0.06], up to a sample's own deviation of 3 %.
    assert deviations.max() < 0.06 * 1.1 and deviations.min() < 0.005
    assert deviations.mean().item() == pytest.approx(0.03, abs=0.004)


def test_images_are_scaled_and_shifted(clip):
    ramp = (torch.arange(16) / 15).expand(3, 16, 16)
    rows = shown(clip, ramp, 200, smallest_crop=0.5, noise=0.0)[:, 0, 0]
    widths = rows[:, -1] - rows[:, 0]
    # Crops of 8 to 15 columns.
    assert widths.min() < 0.55 and 0.8 < widths.max() < 1
    assert rows[:, 0].min() < 0.05 and rows[:, -1].max() > 0.95


def test_half_of_the_images_are_blurred(clip):
    torch.manual_seed(0)
    image = to_bytes(torch.rand(3, 16, 16)).float() / 255
    seen = shown(clip, image, 200, smallest_crop=1.0, noise=0.0)
    sharp = (seen == image).all((1, 2, 3))
    assert sharp.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert seen[~sharp].std() < 0.8 * image.std()


def test_images_are_changed_unless_told_otherwise(clip):
    torch.manual_seed(0)
    image = to_bytes(torch.rand(3, 16, 16)).float() / 255
    seen = shown(clip, image, 20)
    assert not (seen == image).all((1, 2, 3)).any()
    assert seen.min() >= 0 and seen.max() <= 1


def test_loss_counts_every_caption_of_the_batch_and_every_negative_once(clip):
    colours = torch.tensor([[1.0, 0, 0], [0, 0.6, 0], [0, 0, 1]])  # which no blur or crop changes
    images = colours[:, :, None, None].expand(3, 3, 16, 16)
    captions, others = ["ab", "cd", "ef"], [["gh", "ij"], ["kl", "mn"], ["op", "qr"]]
    batch = {"image": to_bytes(images), "caption": captions, "negative_captions": others}
    loss, found = ClipTask(clip, noise=0.0)(batch)

    def features(texts):
        return F.normalize(clip.encode_text(clip.tokenize(texts)), dim=-1)

    seen = F.normalize(clip.encode_image(images), dim=-1)
    texts, scale = features(captions), torch.e  # exp(1), the scale at first
    losses, hits = [], []
    for i in range(3):
        of_texts = torch.cat((texts, features(others[i]))) @ seen[i] * scale  # the picture's choice of 3 + 2 texts
        of_images = seen @ texts[i] * scale  # the text's choice of 3 pictures
        losses += [of_texts.logsumexp(0) - of_texts[i], of_images.logsumexp(0) - of_images[i]]
        hits.append(of_texts.argmax() == i)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)
    assert found["accuracy"] == torch.stack(hits).float().mean()
    assert found["scale"].item() == pytest.approx(torch.e)


def test_attributes_are_read_from_images_and_captions_by_one_map(clip):
    images, captions = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ["ab", "cd"]
    wanted = torch.tensor([[1, -100], [0, 4]])  # -100 is unknown
    batch = {"image": to_bytes(images), "caption": captions, "attributes": wanted}
    task = ClipTask(clip, attributes=(2, 5)).requires_grad_(False)
    task._augment = lambda images: images
    assert task.read is not None and task.read.out_features == 7
    loss, found = task(batch)
    latents = [clip.encode_text(clip.tokenize(captions)), clip.encode_image(to_bytes(images) / 255)]
    losses = []
    for logits in (task.read(F.normalize(each, dim=-1) * 4) for each in latents):  # 16 dimensions: of length 4
        log_p, other = logits[:, :2].log_softmax(-1), logits[:, 2:].log_softmax(-1)
        losses += [-log_p[0, 1], -log_p[1, 0], -other[1, 4]]
    assert found["loss_attributes"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    task.read = None
    assert loss.item() == pytest.approx(task(batch)[0].item() + found["loss_attributes"].item(), rel=1e-4)


BLACK = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)


@pytest.fixture
def sure(clip):
    """Reads the second of two classes from everything: the loss of the first is 50."""
    task = ClipTask(clip, attributes=(2,), noise=0.0)
    assert task.read is not None
    task.read.weight.data.zero_()
    task.read.bias.data.copy_(torch.tensor([0.0, 50.0]))
    return task


def test_captions_are_asked_for_what_they_tell(sure):
    batch = {"image": BLACK, "caption": ["ab", "cd"], "attributes": torch.tensor([[0], [1]])}
    assert sure(batch)[1]["loss_attributes"].item() == pytest.approx(25)
    told = {"caption_attributes": torch.tensor([[-100], [1]])}
    assert sure(batch | told)[1]["loss_attributes"].item() == pytest.approx(50 / 3)


def test_attributes_of_the_second_pair_count_too(sure):
    pair = {"image": BLACK, "caption": ["ab", "cd"], "attributes": torch.tensor([[0], [0]])}
    second = {"second_image": BLACK, "second_caption": ["ef", "gh"], "second_attributes": torch.tensor([[1], [1]])}
    assert sure(pair)[1]["loss_attributes"].item() == pytest.approx(50)
    assert sure(pair | second)[1]["loss_attributes"].item() == pytest.approx(25)


def test_attributes_that_are_all_unknown_cost_nothing(clip):
    batch = {"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "caption": ["ab"],
             "attributes": torch.tensor([[-100]])}  # fmt: skip
    assert ClipTask(clip, attributes=(3,))(batch)[1]["loss_attributes"] == 0


class Mirror(nn.Module):
    """Stands in for a prior and its VAE, of one pixel a token and 8 grey values: what it draws in place of an image is
    sure to be the image mirrored, if it is told the letters of its caption and its tokens."""

    image_fmap_size, text_seq_len = 16, 4

    def __init__(self):
        super().__init__()
        self.vae = SimpleNamespace(channels=3, decode_image=self.decode_image)
        self.weight = nn.Parameter(torch.ones(()))

    def tokenize(self, captions):
        return Letters().tokenize(captions, self.text_seq_len)

    def encode_image(self, images):
        return (F.avg_pool2d(images, images.shape[-1] // 16)[:, 0] * 7).round().long().flatten(1)

    def decode_image(self, tokens):
        return (tokens.view(-1, 1, 16, 16) / 7).expand(-1, 3, -1, -1)

    def next_token_logits(self, text, tokens):
        assert not torch.is_grad_enabled() and not self.training
        mirrored = tokens.view(-1, 16, 16).flip(2).flatten(1)
        wanted = torch.where((text[:, 0] % 8 == tokens[:, 0])[:, None], mirrored, 0)
        return 100.0 * F.one_hot(wanted, 64)

    def fingerprint(self):
        return "mirror"


@pytest.mark.parametrize("side", [16, 32])
def test_half_of_the_images_are_redrawn_by_the_prior(clip, side):
    seen, encode = [], clip.encode_image
    clip.encode_image = lambda images: seen.append(images) or encode(images)
    task = ClipTask(clip, prior=Mirror()).train()
    task._augment = lambda images: images
    rows = (torch.arange(16) // 8 + 1).expand(128, 3, 16, 16).clone()  # of 1 and 2, 128 times
    rows[64:] += 4  # 5 and 6
    images = F.interpolate(rows * 255 / 7, scale_factor=side // 16).round().to(torch.uint8)
    batch = {"image": images[:64], "caption": ["ab"] * 64, "second_image": images[64:], "second_caption": ["ef"] * 64}
    torch.manual_seed(0)
    loss, _ = task(batch)
    assert seen[0].shape == (128, 3, 16, 16) and loss.requires_grad
    found = (seen[0] * 7).round().long()
    redrawn = (found == rows.flip(3)).flatten(1).all(1)
    assert torch.equal(redrawn, ~(found == rows).flatten(1).all(1))
    assert redrawn[:64].float().mean().item() == pytest.approx(0.5, abs=0.2)
    assert redrawn[64:].float().mean().item() == pytest.approx(0.5, abs=0.2)


def test_an_image_is_redrawn_hotter_or_colder_from_step_to_step(clip):
    prior = Mirror()
    odds = torch.tensor([0.0, -2.0])  # at a temperature of 1: 12 % of black
    prior.next_token_logits = lambda text, tokens: F.pad(odds, (0, 40), value=-1e4).expand(*tokens.shape, 42)
    prior.vae.decode_image = lambda tokens: (1.0 - tokens.view(-1, 1, 16, 16)).expand(-1, 3, -1, -1)
    task = ClipTask(clip, prior=prior)
    white = torch.ones(32, 3, 16, 16)
    torch.manual_seed(0)
    shares = []
    for _ in range(60):
        black = 1 - task._redrawn(white, ["ab"] * 32)[:, 0]
        shares.append(black.sum() / black.flatten(1).any(1).sum() / 256)
    # Temperatures of 0.5 to 1.5: e^-4 to e^-1.33 to 1.
    assert 0.015 < min(shares) < 0.03 and 0.18 < max(shares) < 0.23


def test_the_prior_is_fixed_and_of_opaque_images(clip):
    clip.tokenizer, prior = None, Mirror()
    task = ClipTask(clip, prior=prior)
    assert task.fixed_parts() == {"prior": "mirror"} and not prior.weight.requires_grad
    assert {*task.native_parts()} == {"clip"}
    prior.vae.channels = 4
    with pytest.raises(UsageError, match="opacity"):
        ClipTask(clip, prior=prior)
