"""The diffusions' training task: which steps are drawn, and how much each counts."""

import pytest
import torch
from factories import gaussian_denoiser, small_decoder

from dalle_pytorch.errors import UsageError
from diffusion.tasks import DiffusionTask, DistillationTask, LossSecondMomentSteps


class PlainTask(DiffusionTask):
    """Of a network that is told nothing."""

    def conditioning(self, *_):
        return {}


def make_batch(count):
    return {"image": torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)}


def test_loss_is_the_mean_weighted_by_how_seldom_each_step_is_drawn(monkeypatch):
    task = PlainTask(gaussian_denoiser(), 8)
    step, weights = torch.tensor([1, 7, 12, 19]), torch.tensor([0.5, 2.0, 0.0, 3.0])
    learned = []
    monkeypatch.setattr(task.steps, "draw", lambda count, device: (step, weights))
    monkeypatch.setattr(task.steps, "learn", lambda *seen: learned.append(seen))
    torch.manual_seed(0)
    loss, found = task(make_batch(4))
    torch.manual_seed(0)
    images = make_batch(4)["image"].float() / 127.5 - 1
    losses = task.denoiser.loss(images, step, torch.randn(4, 3, 8, 8))
    torch.testing.assert_close(loss, (weights * losses).sum() / 4)
    # What is learned of the steps, and shown, has no weights.
    assert torch.equal(learned[0][0], step)
    torch.testing.assert_close(learned[0][1], losses)
    torch.testing.assert_close(found["loss_clear"], losses[:2].mean())
    torch.testing.assert_close(found["loss_noisy"], losses[2:].mean())


def test_importance_weights_are_inverse_to_the_probabilities():
    """So that the expected loss is that of uniform steps: the sum of probability · weight · loss is the mean loss."""
    steps = LossSecondMomentSteps(4, history=2, uniform_share=0.2)
    for losses in ([1.0, 2.0, 3.0, 3.0], [1.0, 2.0, 3.0, 5.0]):
        steps.learn(torch.arange(4), torch.tensor(losses))
    roots = torch.tensor([1.0, 2.0, 3.0, 17**0.5])  # of the mean squares
    probabilities = 0.8 * roots / roots.sum() + 0.2 / 4
    torch.manual_seed(0)
    drawn, weights = steps.draw(20_000, torch.device("cpu"))
    torch.testing.assert_close(weights, 1 / (4 * probabilities[drawn]))
    assert (drawn.bincount() / 20_000).tolist() == pytest.approx(probabilities.tolist(), abs=0.015)
    assert weights.mean().item() == pytest.approx(1, abs=0.02)


def test_loss_second_moment_forgets_all_but_the_last_losses():
    steps = LossSecondMomentSteps(2, history=2, uniform_share=0.0)
    for losses in ([9.0, 9.0], [1.0, 3.0], [1.0, 3.0]):
        steps.learn(torch.arange(2), torch.tensor(losses))
    drawn, weights = steps.draw(100, torch.device("cpu"))
    torch.testing.assert_close(weights, torch.tensor([2.0, 2 / 3])[drawn])  # 1 / (2 · 1/4) and 1 / (2 · 3/4)


def test_students_target_leads_where_the_teacher_ends(tiny_vae):
    """Pixels are Gaussian, and the teacher exact: it ends where the probability flow scales their deviation to."""
    mean, deviation = 0.1, 0.2
    teacher = gaussian_denoiser(mean, deviation, steps="1000", schedule="cosine")
    task = DistillationTask(small_decoder(tiny_vae), 3, substeps=200)
    alpha_bar = teacher.schedule.alphas_cumprod
    for number, start in enumerate(task.visited):
        before = alpha_bar[start].item()
        after = alpha_bar[task.visited[number - 1]].item() if number else 1.0
        x = before**0.5 * mean + (before * deviation**2 + 1 - before) ** 0.5 * torch.randn(1, 3, 8, 8).clamp(-2, 2)
        x_0 = task.target(teacher, x, number)
        eps = (x - before**0.5 * x_0) / (1 - before) ** 0.5
        ends = after**0.5 * x_0 + (1 - after) ** 0.5 * eps  # DDIM's step
        there = (after * deviation**2 + 1 - after) ** 0.5 / (before * deviation**2 + 1 - before) ** 0.5
        flow = after**0.5 * mean + there * (x - before**0.5 * mean)
        assert (ends - flow).abs().max() < 0.02
    assert task.visited == [0, 250, 999]


def test_a_student_of_few_passes_learns_what_its_teacher_draws_in_many(tiny_vae, tmp_path):
    torch.manual_seed(0)
    decoder = small_decoder(tiny_vae, noise_schedule="cosine")
    task = DistillationTask(decoder, 1, crop_size=32)
    tokens = torch.randint(32, (2, 256))
    batch = {"image": (tiny_vae.decode_image(tokens) * 255).to(torch.uint8), "tokens": tokens}
    batch["image"] = torch.nn.functional.interpolate(batch["image"], 128)
    wanted = decoder.decode(tokens, "quad4", "dpm++")
    before = (decoder.decode(tokens, "quad1") - wanted).square().mean()
    teacher = task.teacher.fingerprint()
    optimizer = torch.optim.Adam((p for p in task.parameters() if p.requires_grad), lr=1e-3)
    task.train()
    assert not task.teacher.training and not tiny_vae.training and decoder.unet.training
    for _ in range(30):
        loss, found = task(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found["loss_0"] == loss and task.teacher.fingerprint() == teacher == task.fixed_parts()["teacher"]
    after = (task.eval().decoder.decode(tokens, "quad1") - wanted).square().mean()
    assert after < 0.85 * before


def test_only_what_predicts_an_image_is_distilled(tiny_vae):
    with pytest.raises(UsageError, match="this one predicts noise"):
        DistillationTask(small_decoder(tiny_vae, predict_xstart=False), 2)
