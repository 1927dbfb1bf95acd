"""The VQGAN's training task: the terms of its loss, the straight-through gradient, and the codebook's running means."""

import pytest
import torch
import torch.nn.functional as F

from dalle_pytorch.training.codebook import unused_codes
from dalle_pytorch.training.tasks.vqgan import VQGanTask, _pick
from dalle_pytorch.vae.vqgan import VQGanVAE

STEPS = 100


def make_task(step, **settings):
    """A task at `step` of 100, with a codebook of 8 random codes that were each chosen equally often."""
    torch.manual_seed(0)
    vae = VQGanVAE(image_size=16, num_tokens=8, embed_dim=4, z_channels=4, ch=4, ch_mult=(1,), num_res_blocks=1,
                   patch_size=4, mid_attention=False)  # fmt: skip
    task = VQGanTask(vae, steps=STEPS, **{"warmup_steps": 0, **settings})
    codes = vae.encode(images()).detach().transpose(0, 1).flatten(1).T[::9][:8] + 0.05 * torch.randn(8, 4)
    vae.quantize.set_codebook(codes)
    task.counts.fill_(1.0)
    task.sums.copy_(codes)
    task.step.fill_(step)
    return task


def batch():
    return {"image": torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)}


def images():
    return batch()["image"].float() / 255


def encodings(task):
    """(n, 4), in the order of the pictures and their places."""
    return task.vae.encode(images()).detach().permute(0, 2, 3, 1).reshape(-1, 4)


def reconstruction(output, gradient_weight):
    """|error| + 4 error² + the weighted error of the differences between neighbouring pixels."""
    error = output - images()
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    gradient = across.abs().mean() + down.abs().mean()
    return error.abs().mean() + 4 * (error**2).mean() + gradient_weight * gradient


@pytest.mark.parametrize("gradient_weight", [0.0, 1.0, 3.0])
def test_warm_up_trains_a_plain_autoencoder(gradient_weight):
    task = make_task(3, warmup_steps=4, gradient_weight=gradient_weight)
    expected = reconstruction(task.vae.decode_embeddings(task.vae.encode(images())), gradient_weight)
    torch.testing.assert_close(task(batch())[0], expected)


@pytest.mark.parametrize(("commitment_weight", "gradient_weight"), [(0.25, 1.0), (2.0, 0.0), (0.0, 3.0)])
def test_loss_is_the_reconstruction_and_the_commitment_by_their_weights(commitment_weight, gradient_weight):
    # The last 30 % of the steps have no temperature: each encoding has its nearest code.
    task = make_task(75, commitment_weight=commitment_weight, gradient_weight=gradient_weight)
    z, codes = encodings(task), task.vae.codebook_weight.clone()
    nearest = codes[torch.cdist(z, codes).argmin(1)]
    rows = nearest.view(5, 4, 4, 4).permute(0, 3, 1, 2)
    expected = reconstruction(task.vae.decode_embeddings(rows), gradient_weight)
    expected = expected + commitment_weight * ((z - nearest) ** 2).mean()
    loss, found = task(batch())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found["commitment"], ((z - nearest) ** 2).mean())


def test_gradient_goes_straight_through_the_codes(monkeypatch):
    task = make_task(75, commitment_weight=0.5)
    z = task.vae.encode(images()).detach().requires_grad_()
    codes = task.vae.codebook_weight.clone()
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    rows = codes[torch.cdist(flat, codes).argmin(1)].view(5, 4, 4, 4).permute(0, 3, 1, 2).requires_grad_()
    (at_codes,) = torch.autograd.grad(reconstruction(task.vae.decode_embeddings(rows), 1.0), rows)
    monkeypatch.setattr(task.vae, "encode", lambda image: z)
    task(batch())[0].backward()
    commitment = 0.5 * 2 * (z - rows).detach() / z.numel()
    torch.testing.assert_close(z.grad, at_codes + commitment)


def test_codebook_is_the_running_mean_of_the_encodings_that_chose_each_code():
    task = make_task(75, codebook_decay=0.75)
    z, before = encodings(task), task.vae.codebook_weight.clone()
    chosen = F.one_hot(torch.cdist(z, before).argmin(1), 8).float()
    counts = 0.75 * torch.ones(8) + 0.25 * chosen.sum(0)
    sums = 0.75 * before + 0.25 * chosen.T @ z
    task(batch())
    torch.testing.assert_close(task.counts, counts)
    torch.testing.assert_close(task.vae.codebook_weight, sums / counts[:, None])


@pytest.mark.parametrize(("step", "revived"), [(19, False), (20, True), (60, True), (80, False)])
def test_code_that_nobody_chooses_is_moved_to_an_encoding_every_20_steps(step, revived):
    """Not in the last fifth of the steps, in which there is no time to learn what a new code means."""
    task = make_task(step)
    far = torch.full((4,), 1000.0)
    task.counts[3], task.sums[3] = 0.01, 0.01 * far
    codes = task.vae.codebook_weight.clone()
    codes[3] = far
    task.vae.quantize.set_codebook(codes)
    z = encodings(task)
    task(batch())
    distance = torch.cdist(task.vae.codebook_weight[3:4], z).min()
    assert (distance < 1e-4) == revived
    assert (task.counts[3] > 0.1) == revived
    # Codes that are in use stay near where they were.
    assert (task.vae.codebook_weight - codes)[torch.arange(8) != 3].norm(dim=1).max() < 1


def test_codes_are_moved_to_encodings_that_are_far_from_theirs():
    points = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(_pick(points, 3, torch.tensor([0.0, 0, 0, 2, 0, 0])), points[3:4].expand(3, 2))
    several = _pick(points, 100, torch.tensor([1.0, 0, 0, 0, 0, 1]))
    assert torch.equal(several.unique(dim=0), points[[0, 5]])
    assert len(_pick(points, 200, torch.zeros(6)).unique(dim=0)) == 6  # all are on their codes: any of them


def test_equal_codes_of_the_start_count_as_unused_but_one():
    task = make_task(0)
    task._start_codebook(torch.tensor([[0.0, 0, 0, 0], [1, 1, 1, 1]]).repeat(10, 1))
    assert sorted(task.counts.tolist())[-2:] == [10, 10] and unused_codes(task.counts).sum() == 6


def test_temperature_falls_to_zero_over_70_percent_of_the_steps():
    drawn = [make_task(step, starting_temp=0.5)(batch())[1]["temperature"] for step in (0, 35, 70, 99)]
    assert drawn == pytest.approx([0.5, 0.25, 0, 0])
