"""The training loop: a broken-off run goes on exactly where it was."""

import json

import pytest
import torch
from torch import nn

from dalle_pytorch.checkpoints import CheckpointError
from dalle_pytorch.training import TrainingOptions, train


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 64)}


class Task(nn.Module):
    """A task whose loss draws random numbers, as dropout or noise would."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, batch):
        noise = torch.randn_like(batch["x"])
        loss = (self.net(batch["x"] + noise) - noise).square().mean()
        return loss, {"noise": noise.mean()}


def options(folder, steps=12, **settings):
    folder.mkdir(exist_ok=True)
    return TrainingOptions(folder, steps, 8, warmup_steps=2, save_every=4, log_every=1, num_workers=0, **settings)


def losses(folder):
    return {row["step"]: row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"muon": True}])
def test_resumed_run_equals_unbroken_run(tmp_path, settings):
    whole = train(Task(), Numbers(), options(tmp_path / "whole", **settings))

    class Interrupted(Exception):
        pass

    def stop(step, figures):
        if step == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(Task(), Numbers(), options(tmp_path / "broken", **settings), stop)
    resumed = train(Task(), Numbers(), options(tmp_path / "broken", **settings))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finished_run_is_not_run_again(tmp_path):
    whole = train(Task(), Numbers(), options(tmp_path / "run"))
    again = train(Task(), Numbers(), options(tmp_path / "run"), lambda *_: pytest.fail("a step was made"))
    assert torch.equal(whole.net[0].weight, again.net[0].weight)


def test_average_differs_from_the_last_weights(tmp_path):
    last = train(Task(), Numbers(), options(tmp_path / "a"))
    mean = train(Task(), Numbers(), options(tmp_path / "b", ema_decay=0.9))
    assert not torch.equal(last.net[0].weight, mean.net[0].weight)


def test_checkpoint_of_another_task_is_refused(tmp_path):
    train(Task(), Numbers(), options(tmp_path / "run"))
    other = Task()
    other.net[0] = nn.Linear(4, 9)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt does not continue this training"):
        train(other, Numbers(), options(tmp_path / "run"))


def test_loss_that_is_no_number_stops_the_run(tmp_path):
    class Broken(Task):
        def forward(self, batch):
            loss, figures = super().forward(batch)
            return loss * float("nan"), figures

    with pytest.raises(FloatingPointError, match="learning rate"):
        train(Broken(), Numbers(), options(tmp_path / "run"))
