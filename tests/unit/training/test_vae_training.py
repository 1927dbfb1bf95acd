"""What the VAEs are trained on: codebooks that do not collapse, the adversary, perception, and the two scripts."""

import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, leave_group
from PIL import Image
from torch import nn

from dalle_pytorch.clip.published import PublishedCLIP
from dalle_pytorch.clip.trainable import CLIP
from dalle_pytorch.data.loading import collate
from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.scenes.dataset import GlyphsDataset
from dalle_pytorch.training import TrainingSettings, train
from dalle_pytorch.training.codebook import codebook_use
from dalle_pytorch.training.losses import Adversary, PatchDiscriminator, PerceptualLoss
from dalle_pytorch.training.tasks.discrete import DiscreteVAETask
from dalle_pytorch.training.tasks.vqgan import VQGanTask
from dalle_pytorch.vae.discrete import DiscreteVAE
from dalle_pytorch.vae.vqgan import VQGanVAE


def glyphs(count, size=64, split="train"):
    data = GlyphsDataset(size, split=split)
    return collate([data[i] for i in range(count)])


def fit(task, batch, steps, learning_rate=4e-3):
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(steps):
        loss, metrics = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach()), {name: float(value) for name, value in metrics.items()}


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def small_clip(size=16):
    torch.manual_seed(1)
    return CLIP(
        dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=10, text_enc_depth=1, text_seq_len=4, text_heads=1,
        visual_enc_depth=2, visual_heads=1, visual_image_size=size, visual_patch_size=8,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# VQGAN


def test_vqgan_lowers_the_error_and_uses_the_codebook(tiny_vae):
    torch.manual_seed(0)
    task = VQGanTask(tiny_vae.train(), steps=200, crop_size=32, warmup_steps=80)
    metrics = [metrics for _, metrics in fit(task, glyphs(16), 200)]
    first = sum(f["psnr"] for f in metrics[:5]) / 5
    assert sum(f["psnr"] for f in metrics[-5:]) / 5 > first + 3
    assert metrics[-1]["codes_used"] > 0.5 and metrics[-1]["temperature"] == 0 < metrics[100]["temperature"]
    # What was trained is what is used: on scenes never seen, most codes occur, and they decode to the picture.
    images = glyphs(16, split="test")["image"].float() / 255
    tokens = tiny_vae.eval().get_codebook_indices(images)
    assert len(tokens.unique()) > tiny_vae.num_tokens / 2
    assert -10 * torch.log10((tiny_vae.decode_image(tokens) - images).square().mean()) > first + 2


def test_vqgan_with_adversary_and_perception(tiny_vae):
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(ch=8, num_layers=2))
    task = VQGanTask(tiny_vae.train(), steps=60, warmup_steps=20, adversary=adversary,
                     perceptual=PerceptualLoss(small_clip()), adversary_start=30)  # fmt: skip
    before = adversary.discriminator[0].weight.clone()
    ran = [metrics for _, metrics in fit(task, glyphs(4), 60)]
    assert "deceit" not in ran[30] and ran[31]["adversary_weight"] < ran[-1]["adversary_weight"]
    assert not torch.equal(before, adversary.discriminator[0].weight)
    assert ran[-1]["psnr"] > ran[0]["psnr"] + 2 and ran[-1]["codes_used"] > 0.5
    assert ran[-1]["perceptual"] < ran[0]["perceptual"]
    assert not any("clip" in name for name in task.state_dict())
    assert task.native_parts() == {"vae": tiny_vae}


def test_preview_has_pictures_over_reconstructions(tiny_vae):
    batch = glyphs(3)
    task = VQGanTask(tiny_vae, steps=10, warmup_steps=0)
    task(batch)
    with torch.no_grad():
        sheet = task.eval().preview(batch)["reconstructions"]
    assert sheet.shape == (3, 3, 128, 64) and sheet.min() >= 0 and sheet.max() <= 1
    images = batch["image"].float() / 255
    assert torch.equal(sheet[:, :, :64], images)
    assert torch.equal(sheet[:, :, 64:], tiny_vae.decode_image(tiny_vae.get_codebook_indices(images)))


def test_codebook_larger_than_the_first_batch():
    torch.manual_seed(0)
    vae = VQGanVAE(image_size=32, num_tokens=256, embed_dim=8, z_channels=8, ch=8, ch_mult=(1,), num_res_blocks=1,
                   patch_size=4, mid_attention=False)  # fmt: skip
    task = VQGanTask(vae, steps=10, warmup_steps=0)
    loss, _ = task({"image": glyphs(1, 32)["image"]})  # 64 encodings
    assert torch.isfinite(loss) and torch.isfinite(vae.codebook_weight).all()


def test_encodings_that_are_no_numbers_do_not_reach_the_codebook(tiny_vae):
    batch = glyphs(4)
    task = VQGanTask(tiny_vae.train(), steps=100, warmup_steps=0)
    weight = tiny_vae.encoder.conv_in.weight
    good = weight.detach().clone()
    for started in (False, True):
        weight.data.fill_(float("nan"))
        loss, _ = task(batch)
        assert not torch.isfinite(loss) and torch.isfinite(tiny_vae.codebook_weight).all()
        assert bool(task.counts.any()) == started
        weight.data.copy_(good)
        assert torch.isfinite(task(batch)[0])


def test_resumed_vqgan_equals_an_unbroken_one(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, metrics):
        if step == 13:
            raise Stopped

    def run(name, report=None):
        torch.manual_seed(0)
        vae = VQGanVAE(image_size=32, num_tokens=24, embed_dim=4, z_channels=4, ch=8, ch_mult=(1,), num_res_blocks=1,
                       patch_size=4, mid_attention=False)  # fmt: skip
        task = VQGanTask(vae, steps=16, crop_size=16, perceptual=PerceptualLoss(small_clip()),
                         adversary=Adversary(PatchDiscriminator(ch=8, num_layers=1)))  # fmt: skip
        options = TrainingSettings(output_dir=tmp_path / name, steps=16, batch_size=4, warmup_steps=2, save_every=5,
                                   log_every=1, num_workers=0)  # fmt: skip
        return train(task, GlyphsDataset(32, count=16), options, report)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("broken", stop)
    resumed = run("broken")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("whole", "broken")]
    assert losses[0] == losses[1] and len(losses[0]) == 16


def test_codebook_use_counts():
    use = codebook_use(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    assert float(use["perplexity"]) == pytest.approx(2) and float(use["codes_used"]) == 0.5


def _train_in_a_process(rank, store, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    vae = VQGanVAE(image_size=32, num_tokens=24, embed_dim=4, z_channels=4, ch=8, ch_mult=(1,), num_res_blocks=1,
                   patch_size=4, mid_attention=False)  # fmt: skip
    task = VQGanTask(vae, steps=12, warmup_steps=2, codebook_decay=0.5, adversary_start=8,
                     adversary=Adversary(PatchDiscriminator(ch=8, num_layers=1)))  # fmt: skip
    # Buffers are left alone: it is the counting that has to keep them equal.
    model = nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    torch.manual_seed(rank)
    # What one process sees, the other does not: black to grey here, grey to white there.
    batch = {"image": torch.randint(128 * rank, 128 * rank + 128, (4, 3, 32, 32), dtype=torch.uint8)}
    for _ in fit(model, batch, 12, 1e-3):
        pass
    torch.save({"codes": vae.codebook_weight.data, "counts": task.counts, "sums": task.sums,
                "weight": task.adversary.discriminator[0].weight.data}, f"{folder}/{rank}.pt")  # fmt: skip
    leave_group()


@pytest.mark.slow
def test_codebooks_of_two_processes_stay_equal(tmp_path):
    torch.multiprocessing.spawn(_train_in_a_process, (tmp_path / "store", tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
    # Counted over both: 2 × 4 pictures of 64 tokens, after ten steps that forget half each time.
    assert float(first["counts"].sum()) == pytest.approx(512, rel=0.05)


# --------------------------------------------------------------------------------------------------
# Adversary and perception


@pytest.mark.parametrize(("num_layers", "side"), [(2, 34), (3, 70), (4, 142)])
def test_discriminator_sees_patches(num_layers, side):
    discriminator = PatchDiscriminator(ch=4, num_layers=num_layers)
    for i, layer in enumerate(discriminator):
        if isinstance(layer, nn.GroupNorm):  # which sees everything
            discriminator[i] = nn.Identity()
    x = torch.randn(1, 3, 256, 256, requires_grad=True)
    score = discriminator(x)
    middle = score.shape[-1] // 2
    score[0, 0, middle, middle].backward()
    assert (x.grad.abs().sum((0, 1, 2)) > 0).sum() == side


def test_adversary_trains_both_sides_in_one_pass():
    torch.manual_seed(0)
    adversary = Adversary(PatchDiscriminator(ch=8, num_layers=1), weight=0.5)
    images, output = torch.rand(2, 2, 3, 16, 16)
    output.requires_grad_()
    reconstruction = (output - images).square().mean()
    loss, metrics = adversary(images, output, reconstruction)
    loss.backward()
    (wanted,) = torch.autograd.grad((output - images).square().mean(), output)
    # The autoencoder's side: towards a higher score, half as long as the reconstruction's gradient.
    assert torch.allclose(output.grad.norm(), 0.5 * wanted.norm(), rtol=1e-4)
    with torch.no_grad():
        before = adversary.discriminator(output * 2 - 1).mean()
        assert adversary.discriminator((output - 0.05 * output.grad / output.grad.norm()) * 2 - 1).mean() > before
    # The discriminator's side: the hinge loss, and nothing of the autoencoder's.
    gradients = [parameter.grad.clone() for parameter in adversary.parameters()]
    real, drawn = adversary.discriminator(images * 2 - 1), adversary.discriminator(output.detach() * 2 - 1)
    hinge = ((1 - real).relu().mean() + (1 + drawn).relu().mean()) / 2
    assert metrics["discriminator"] == pytest.approx(hinge.item(), rel=1e-5)
    for gradient, alone in zip(gradients, torch.autograd.grad(hinge, list(adversary.parameters())), strict=True):
        assert torch.allclose(gradient, alone, atol=1e-6)


@pytest.mark.parametrize("published", [False, True])
def test_perceptual_loss(published):
    if published:
        text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        clip = PublishedCLIP(text=text, vision={**text, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
                             projection_dim=8)  # fmt: skip
    else:
        clip = small_clip()
    loss = PerceptualLoss(clip)
    images = torch.rand(2, 3, 24, 24)
    assert float(loss(images, images)) == 0
    output = torch.rand(2, 3, 24, 24, requires_grad=True)
    value = loss(images, output)
    value.backward()
    assert 0 < value.item() <= 4
    # A window of the CLIP's own size, and nothing of the CLIP is trained.
    assert (output.grad.abs().sum((0, 1)) > 0).sum() == 16 * 16
    assert all(parameter.grad is None for parameter in clip.parameters())
    assert float(loss(images[..., :8, :8], images[..., :8, :8] * 0.5)) > 0  # smaller ones are enlarged


# --------------------------------------------------------------------------------------------------
# DiscreteVAE


def small_discrete(**settings):
    torch.manual_seed(0)
    return DiscreteVAE(**{"image_size": 32, "num_tokens": 32, "codebook_dim": 16, "num_layers": 2, "hidden_dim": 16,
                          "num_resnet_blocks": 1, **settings})  # fmt: skip


def test_temperature_falls_as_upstream():
    task = DiscreteVAETask(small_discrete(), starting_temp=1.0, temp_min=0.5, anneal_rate=1e-6)
    temperature, halved = 1.0, None
    for step in range(12_000):
        task.step.fill_(step)
        assert task.temperature == pytest.approx(temperature)
        halved = step if halved is None and task.temperature == 0.5 else halved
        if (step + 1) % 100 == 0:
            temperature = max(temperature * math.exp(-1e-6 * (step + 1)), 0.5)
    assert halved == 11_800


@pytest.mark.parametrize("settings", [{}, {"straight_through": True, "smooth_l1_loss": True}])
def test_discrete_vae_learns(settings):
    task = DiscreteVAETask(small_discrete(**settings).train(), anneal_rate=1e-4)
    ran = [metrics for _, metrics in fit(task, glyphs(8, 32), 150, 3e-3)]
    assert ran[-1]["psnr"] > ran[0]["psnr"] + 3
    assert ran[-1]["perplexity"] > 4 and ran[-1]["temperature"] < 1


def test_discrete_vae_of_transparent_pictures():
    vae = small_discrete(channels=4, normalization=((0.5, 0.5, 0.5, 0), (0.5, 0.5, 0.5, 1)))
    task = DiscreteVAETask(vae, num_images_save=2)
    batch = {"image": torch.randint(256, (3, 4, 32, 32), dtype=torch.uint8)}
    batch["image"][:, 3] = 0
    loss, _ = task(batch)
    assert torch.isfinite(loss)
    with torch.no_grad():
        sheet = task.eval().preview(batch)["reconstructions"]
    assert sheet.shape == (2, 3, 96, 32)
    assert torch.equal(sheet[:, :, :32], torch.ones(2, 3, 32, 32))  # nothing of them is to be seen


# --------------------------------------------------------------------------------------------------
# Scripts


def run_script(script, folder, output, *arguments):
    command = [sys.executable, f"DALLE-pytorch/{script}", "--image_folder", str(folder), "--output_dir", str(output),
               "--num_workers", "0", "--log_every", "1", *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures without captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(glyphs(8, 32)["image"]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def test_train_vae_writes_a_vae_for_a_prior(pictures, tmp_path):
    from dalle_pytorch.priors.dalle import DALLE
    from dalle_pytorch.published.load import load_vae

    output = tmp_path / "run"
    run_script("train_vae.py", pictures, output, "--image_size", "32", "--num_layers", "2", "--num_tokens", "16",
          "--hidden_dim", "8", "--emb_dim", "8", "--num_resnet_blocks", "1", "--batch_size", "4", "--epochs", "2",
          "--sample_every", "2")  # fmt: skip
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4] and "perplexity" in rows(output)[-1]
    assert list((output / "samples").glob("*.png"))
    vae = load_vae(output / "vae")
    assert isinstance(vae, DiscreteVAE) and vae.config["codebook_dim"] == 8
    dalle = DALLE(vae=vae, dim=16, depth=1, heads=1, dim_head=16, num_text_tokens=10, text_seq_len=4)
    picture = dalle.generate_images(torch.ones(1, 4, dtype=torch.long), top_p=0.9, seed=0)
    assert picture.shape == (1, 3, 32, 32)


def test_train_vqgan_says_its_losses_and_writes_a_vae(pictures, tmp_path, tiny_bundle):
    output = tmp_path / "run"
    sizes = ("--image_size", "32", "--num_tokens", "16", "--embed_dim", "4", "--ch", "8", "--ch_mult", "1",
             "--crop_size", "32", "--batch_size", "4", "--disc_num_layers", "1", "--disc_ch", "8",
             "--perceptual_clip", str(tiny_bundle / "clip"))  # fmt: skip
    said = run_script("train_vqgan.py", pictures, output, *sizes, "--epochs", "4", "--local_encoder")
    assert f"features of {tiny_bundle / 'clip'}" in said
    metrics = rows(output)[-1]
    assert metrics["step"] == 8 and {"perplexity", "codes_used", "perceptual", "discriminator"} <= metrics.keys()
    vae = PretrainedModel.from_pretrained(output / "vae")
    assert isinstance(vae, VQGanVAE) and vae.config["local_encoder"]
