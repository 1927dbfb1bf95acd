"""What is trained on: losses, the batch of all processes, companions, previews."""

from types import SimpleNamespace

import pytest
import torch
from factories import clip_batch, make_clip
from helpers import leave_group
from torch import nn

from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.errors import UsageError
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.tokenizers.hug import HugTokenizer, train_bpe
from dalle_pytorch.tokenizers.load import load_tokenizer
from dalle_pytorch.tokenizers.simple import SimpleTokenizer
from dalle_pytorch.training.tasks.base import LongCaption
from dalle_pytorch.training.tasks.clip import ClipTask
from dalle_pytorch.training.tasks.prior import DalleTask
from diffusion.decoder import DiffusionDecoder
from diffusion.published import load_super_resolution, make_denoiser
from diffusion.schedule import spaced_steps
from diffusion.tasks import DecoderTask, LossSecondMomentSteps, QuadraticSteps, SuperResolutionTask
from diffusion.unet import UNet

CAPTIONS = ["a red seven on brick", "a blue star on wood"]


@pytest.fixture
def tokenizer(tmp_path):
    train_bpe(CAPTIONS * 4, 64).save(str(tmp_path / "tokenizer.json"))
    return HugTokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def dalle(tiny_vae, tokenizer):
    torch.manual_seed(0)
    return DALLE(vae=tiny_vae, dim=32, depth=1, heads=2, dim_head=16, num_text_tokens=tokenizer.vocab_size,
                 text_seq_len=12)  # fmt: skip


def pictures(count=2, side=64):
    return torch.randint(256, (count, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


# --------------------------------------------------------------------------------------------------
# The prior


def test_tokens_in_the_batch_stand_for_pictures(dalle, tokenizer):
    task = DalleTask(dalle, tokenizer, null_cond_prob=0)
    images = pictures()
    tokens = dalle.vae.get_codebook_indices(images / 255)
    with_pictures, _ = task({"image": images, "caption": CAPTIONS})
    with_tokens, _ = task({"tokens": tokens, "caption": CAPTIONS})
    assert torch.equal(with_pictures, with_tokens)
    other, _ = task({"tokens": tokens.flip(1), "caption": CAPTIONS})
    assert not torch.equal(other, with_tokens)


def test_subject_weighs_more(dalle, tokenizer):
    batch = {"image": pictures(), "caption": CAPTIONS, "mask": torch.zeros(2, 16, 16)}
    plain, _ = DalleTask(dalle, tokenizer, 0)(batch)
    weighted = DalleTask(dalle, tokenizer, 0, subject_weight=5)
    torch.testing.assert_close(weighted(batch)[0], plain)  # all tokens alike
    batch["mask"][:, :4] = 0.5
    assert not torch.allclose(weighted(batch)[0], plain)


def test_prior_is_written_whole(dalle, tokenizer, tmp_path):
    task = DalleTask(dalle, tokenizer, name="mine")
    (part,) = task.native_parts().items()
    assert part == ("mine", dalle)
    dalle.save_pretrained(tmp_path / "mine")
    task.write_companions(tmp_path / "mine")
    again = DALLE.from_pretrained(tmp_path / "mine")
    beside = load_tokenizer(beside=tmp_path / "mine")
    assert beside.encode(CAPTIONS[0]) == tokenizer.encode(CAPTIONS[0])
    assert torch.equal(again.vae.codebook_weight, dalle.vae.codebook_weight)


def test_preview_draws_captions(dalle, tokenizer):
    task = DalleTask(dalle, tokenizer).eval()
    shown = task.preview({"image": pictures(5), "caption": CAPTIONS * 2 + ["a seven"]})
    assert shown["drawn"].shape == (4, 3, 64, 64) and shown["captions"].splitlines() == CAPTIONS * 2
    assert shown["drawn"].min() >= 0 and shown["drawn"].max() <= 1


def test_foreign_tokenizer_is_refused(dalle):
    class Larger:
        vocab_size = 1000

    with pytest.raises(UsageError, match="expected a tokenizer of at most 45 tokens, got 1000"):
        DalleTask(dalle, Larger())


def test_long_captions_have_a_reason_to_be_skipped(tokenizer):
    length = len(tokenizer.encode(CAPTIONS[0]))
    assert LongCaption(tokenizer, length)(CAPTIONS[0]) is None
    assert LongCaption(tokenizer, length - 1)(CAPTIONS[0]) == f"caption of more than {length - 1} tokens"
    # What is longer than any tokens are is not encoded: a text of megabytes would take seconds for every sample.
    unused = SimpleNamespace(encode=None)
    assert LongCaption(unused, 3)("x" * 3001) == "caption of more than 3 tokens"


# --------------------------------------------------------------------------------------------------
# CLIP


def contrastive_loss(clip: CLIP, text, image, negatives, all_processes):
    return clip.contrast(text, image, text != 0, negatives, all_processes).loss()


def two_batches():
    text, image = clip_batch()
    text, image = torch.cat([text, text.roll(1, 1)])[:4], torch.cat([image, 1 - image])[:4]
    return text, image, text.roll(1, 0)[:, None]


def gradients_of_a_share(rank: int, address: str, folder: str):
    """A process's loss and gradients of its half of the batch, written to a file."""
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    clip = make_clip()
    loss = contrastive_loss(clip, *(part[2 * rank :][:2] for part in two_batches()), all_processes=True)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in clip.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients}, f"{folder}/{rank}.pt")
    leave_group()


def test_clip_sees_the_batch_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(gradients_of_a_share, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    mean = {name: (shares[0][name] + shares[1][name]) / 2 for name in shares[0]}
    clip = make_clip()
    loss = contrastive_loss(clip, *two_batches(), all_processes=True)
    loss.backward()
    torch.testing.assert_close(mean.pop("loss"), loss.detach())
    for name, parameter in clip.named_parameters():
        torch.testing.assert_close(mean[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_clip_task_counts_what_it_finds(tokenizer, tmp_path):
    torch.manual_seed(0)
    clip = make_clip(num_text_tokens=tokenizer.vocab_size, text_seq_len=12)
    clip.tokenizer = tokenizer
    task = ClipTask(clip)
    batch = {
        "image": pictures(2, 16),
        "caption": CAPTIONS,
        "negative_captions": [[caption] for caption in CAPTIONS[::-1]],
    }
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    for _ in range(60):
        loss, metrics = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1 and loss < 0.5
    clip.save_pretrained(tmp_path / "clip")
    task.write_companions(tmp_path / "clip")
    again = CLIP.from_pretrained(tmp_path / "clip")
    assert again.tokenize(CAPTIONS).equal(clip.tokenize(CAPTIONS))


def test_twins_are_pairs_of_the_batch_like_others(tokenizer):
    clip = make_clip(num_text_tokens=tokenizer.vocab_size, text_seq_len=12)
    clip.tokenizer = tokenizer
    images, wrong = pictures(4, 16), [[caption] for caption in (CAPTIONS * 2)[::-1]]
    plain = {"image": images, "caption": CAPTIONS * 2, "negative_captions": wrong}
    halves = {"image": images[:2], "caption": CAPTIONS, "negative_captions": wrong[:2], "second_image": images[2:],
              "second_caption": CAPTIONS, "second_negative_captions": wrong[2:]}  # fmt: skip
    losses = []
    for batch in (plain, halves):
        torch.manual_seed(0)
        losses.append(ClipTask(clip)(batch)[0])
    assert losses[0] == losses[1]


def test_clip_of_openais_vocabulary_needs_no_file(tmp_path):
    clip = make_clip(num_text_tokens=49408)
    clip.tokenizer = SimpleTokenizer()
    clip.save_pretrained(tmp_path / "clip")
    ClipTask(clip).write_companions(tmp_path / "clip")
    assert not (tmp_path / "clip/tokenizer.json").exists()
    again = CLIP.from_pretrained(tmp_path / "clip")
    assert again.tokenize(CAPTIONS).equal(clip.tokenize(CAPTIONS))


# --------------------------------------------------------------------------------------------------
# Diffusions


def small_unet(**settings) -> UNet:
    torch.manual_seed(0)
    return UNet(**{"image_size": 64, "num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1),
                   "num_heads": 1, "patch_size": 4, "low_res_condition": True, **settings})  # fmt: skip


def test_decoder_takes_any_vae_whose_grid_fits(tiny_vae):
    decoder = DiffusionDecoder(small_unet(emb_condition=True, emb_input_dims=8, emb_output_dims=32), tiny_vae)
    task = DecoderTask(decoder, crop_size=32).train()
    loss, metrics = task({"image": pictures()})
    loss.backward()
    assert loss.isfinite() and metrics
    assert not task.decoder.vae.training and all(p.grad is None for p in decoder.vae.parameters())
    with pytest.raises(ValueError, match=r"from a grid of 8 × 8 tokens, and the VAE makes 16 × 16"):
        DecoderTask(DiffusionDecoder(small_unet(emb_condition=True, emb_input_dims=8, emb_stride=1), tiny_vae))


def test_previews_of_diffusions(tiny_vae):
    batch = {"image": pictures(5)}
    decoder = DiffusionDecoder(small_unet(), tiny_vae)
    shown = DecoderTask(decoder).eval().preview(batch)["decoded"]
    assert shown.shape == (9, 3, 64, 64) and torch.equal(shown[3], batch["image"][1] / 255)
    shown = SuperResolutionTask(small_unet(), 16, {}).eval().preview(batch)["enlarged"]
    assert shown.shape == (9, 3, 64, 64) and torch.equal(shown[6], batch["image"][2] / 255)


def test_super_resolution_says_how_it_was_trained(tmp_path):
    diffusion = {"noise_schedule": "cosine", "residual_std": 0.2, "diffusion_steps": 20}
    task = SuperResolutionTask(small_unet(), 16, diffusion, crop_size=32)
    task({"image": pictures()})[0].backward()
    (unet,) = task.native_parts().values()
    unet.save_pretrained(tmp_path / "unet")
    task.write_companions(tmp_path / "unet")
    denoiser = load_super_resolution(tmp_path / "unet").denoiser
    assert denoiser.residual_std == 0.2 and torch.equal(denoiser.schedule.betas, task.denoiser.schedule.betas)
    assert load_super_resolution(tmp_path / "unet", diffusion_steps=10).denoiser.num_steps == 10


def test_checkpointed_activations_give_the_same_gradient():
    unet, x = small_unet(dropout=0.1, attention_resolutions=(16,)), torch.randn(2, 3, 64, 64)
    for parameter in unet.parameters():  # many begin as zeros
        torch.nn.init.normal_(parameter, std=0.05)
    gradients = []
    for keep in (True, False):
        for stage in unet.modules():
            if hasattr(stage, "activation_checkpointing"):
                stage.activation_checkpointing = not keep
        torch.manual_seed(0)
        unet.zero_grad()
        unet(x, torch.tensor([3, 500]), low_res=x).square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
    assert gradients[0][0].abs().sum() > 0


def test_steps_by_their_losses():
    torch.manual_seed(0)
    steps = LossSecondMomentSteps(4, history=2)
    assert torch.equal(steps.draw(3, torch.device("cpu"))[1], torch.ones(3))
    for _ in range(2):
        steps.learn(torch.arange(4), torch.tensor([1.0, 1.0, 1.0, 7.0]))
    drawn, weights = steps.draw(4000, torch.device("cpu"))
    assert abs((drawn == 3).float().mean() - 0.7) < 0.03
    # The weights make up for it: the mean stays that of uniform steps.
    assert abs((weights * (drawn == 3)).mean() - 0.25) < 0.01


def test_quadratic_steps_are_those_that_a_drawing_visits():
    torch.manual_seed(0)
    drawn, weights = QuadraticSteps(1000).draw(4000, torch.device("cpu"))
    visited = torch.tensor(spaced_steps(1000, "quad200"))
    assert abs(drawn.float().quantile(0.5) - visited.float().quantile(0.5)) < 25 and weights.eq(1).all()
    assert drawn.min() >= 0 and drawn.max() < 1000


def test_variational_bound_as_the_loss():
    class Exact(nn.Module):
        """Predicts the picture that it was given."""

        def forward(self, x, timesteps):
            return torch.cat([x_0, torch.full_like(x_0, -1.0)], 1)

    unet = small_unet(learn_sigma=True)
    denoiser = make_denoiser(unet, noise_schedule="cosine", diffusion_steps=10, predict_xstart=True)
    x_0 = pictures(2, 8) / 127.5 - 1
    noise, step = torch.randn(2, 3, 8, 8), torch.tensor([3, 7])
    exact = type(denoiser)(Exact(), denoiser.schedule, predict_xstart=True, learn_sigma=True)
    # The true mean with the true variance: no divergence.
    torch.testing.assert_close(exact.loss(x_0, step, noise, use_kl=True), torch.zeros(2), atol=1e-4, rtol=0)
    wrong = type(denoiser)(lambda x, t: torch.cat([x, x], 1), denoiser.schedule, predict_xstart=True, learn_sigma=True)
    assert (wrong.loss(x_0, step, noise, use_kl=True) > 0.1).all()
