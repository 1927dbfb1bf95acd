"""A tiny training for the tests of the loop."""

import json
import time

import torch
from torch import nn

from dalle_pytorch.data.loading import SampleDataset
from dalle_pytorch.pretrained import PretrainedModel, records_config
from dalle_pytorch.training import TrainingSettings, TrainingTask


class Numbers(SampleDataset):
    """64 vectors of 4 equal numbers."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"x": torch.full((4,), index / 64)}


class Net(PretrainedModel):
    """4 numbers to 4 numbers. `ballast` makes its checkpoints take a while."""

    @records_config
    def __init__(self, hidden: int = 8, ballast: int = 1):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, hidden), nn.GELU(), nn.Linear(hidden, 4))
        self.register_buffer("ballast", torch.zeros(ballast))

    def forward(self, x):
        return self.layers(x)


class Task(TrainingTask):
    """A task whose loss draws random numbers, as dropout or noise would. `pause` seconds make it slow."""

    def __init__(self, noise=1.0, pause=0.0, **sizes):
        super().__init__()
        torch.manual_seed(3)
        self.net, self.noise, self.pause = Net(**sizes), noise, pause

    def forward(self, batch):
        time.sleep(self.pause)
        noise = self.noise * torch.randn_like(batch["x"])
        loss = (self.net(batch["x"] + noise) - noise - 1).square().mean()
        return loss, {"noise": noise.mean()}

    def native_parts(self):
        return {"net": self.net}

    def preview(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        return {"drawn": torch.rand(3, 3, 6, 4), "said": "a red seven"}


def few_steps(folder, steps=12, batch_size=8, **settings):
    """Settings of a few steps, each of them logged."""
    settings = {"warmup_steps": 2, "save_every": 4, "log_every": 1, "num_workers": 0, **settings}
    return TrainingSettings(output_dir=folder, steps=steps, batch_size=batch_size, **settings)


def rows(folder):
    """The entries of the run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    """The loss of every step; each is noted once, and in order."""
    steps = [row["step"] for row in rows(folder)]
    assert steps == sorted(set(steps))
    return {row["step"]: row["loss"] for row in rows(folder)}


def checkpoints(folder):
    """The names of its checkpoints, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())
