"""What is to be seen of a run: metrics, previews, TensorBoard, Weights & Biases, operations."""

import json
import sys
import types

import accelerate.tracking
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from PIL import Image
from training_helpers import Numbers, Task, few_steps, losses, rows

from dalle_pytorch.errors import UsageError
from dalle_pytorch.training import launch, train
from dalle_pytorch.training.reporting import Reporter, mean_metrics


def test_metrics(tmp_path):
    reported = []
    train(Task(), Numbers(), few_steps(tmp_path, log_every=5), lambda step, metrics: reported.append(step))
    assert [row["step"] for row in rows(tmp_path)] == reported == [5, 10, 12]
    assert set(rows(tmp_path)[0]) == {"step", "loss", "noise", "grad_norm", "lr", "seconds", "images_per_second"}
    row = rows(tmp_path)[1]
    assert row["images_per_second"] * row["seconds"] == pytest.approx(8, rel=0.05)


def test_settings_of_a_run_that_is_refused_do_not_replace_those_of_the_run(tmp_path):
    settings = few_steps(tmp_path, 4)
    train(Task(), Numbers(), settings)
    with pytest.raises(UsageError, match="--overwrite"):
        train(Task(), Numbers(), few_steps(tmp_path, 8, resume=False))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == settings.as_dict()


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    Reporter(few_steps(tmp_path), Accelerator(cpu=True), first_step=5).log(6, {"loss": float("inf"), "lr": 0.5})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows(tmp_path)[-1] == {"step": 6, "loss": None, "lr": 0.5}


def test_mean_metrics():
    means = mean_metrics([{"a": 1, "b": torch.tensor(2.0)}, {"a": 3.0, "b": torch.tensor(5.0), "c": 7}])
    assert means == {"a": 2.0, "b": 3.5, "c": 7.0}


def test_previews_leave_the_training_as_it_is(tmp_path):
    class Greedy(Task):
        def preview(self, batch):
            np.random.rand()
            return super().preview(batch)

    train(Task(), Numbers(), few_steps(tmp_path / "without"))
    trained = train(Greedy(), Numbers(), few_steps(tmp_path / "with", sample_every=5, ema_decay=0.9))
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    names = {f"{name}-{step:08}" for step in (5, 10, 12) for name in ("drawn", "said")}
    assert {path.stem for path in (tmp_path / "with/samples").iterdir()} == names
    assert (tmp_path / "with/samples/said-00000005.txt").read_text() == "a red seven\n"
    with Image.open(tmp_path / "with/samples/drawn-00000005.png") as sheet:
        assert sheet.width > 2 * 4
    assert not trained.training


def test_previews_see_the_averaged_weights(tmp_path):
    seen = {}

    class Watched(Task):
        def preview(self, batch):
            seen["preview"] = self.net.layers[0].weight.clone()
            return {}

    def look(step, metrics):
        seen["trained"] = task.net.layers[0].weight.clone()

    task = Watched()
    train(task, Numbers(), few_steps(tmp_path, sample_every=12, ema_decay=0.9), look)
    assert torch.equal(seen["preview"], task.net.layers[0].weight)
    assert not torch.equal(seen["preview"], seen["trained"])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Task(), Numbers(), few_steps(tmp_path, sample_every=6, report_to="tensorboard"))
    train(Task(), Numbers(), few_steps(tmp_path, 16, sample_every=6, report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("loss")}
    assert curve == pytest.approx(losses(tmp_path), abs=1e-5)
    assert {"lr", "grad_norm", "noise", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("drawn")] == [6, 12, 16]


def test_wandb(tmp_path, monkeypatch):
    logged, started = [], []

    class Run:
        def log(self, metrics, step):
            logged.append((step, metrics))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda image: image))
    for module in (launch, accelerate.tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [LoggerType.WANDB])
    settings = {"report_to": "wandb", "wandb_name": "mine", "wandb_entity": "us", "sample_every": 4}
    for steps in (4, 8):
        train(Task(), Numbers(), few_steps(tmp_path, steps, **settings))
    assert [s["project"] for s in started] == ["mine", "mine"]
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["config"]["wandb_entity"] == started[0]["entity"] == "us"
    steps = [entry[0] for entry in logged if "loss" in entry[1]]
    assert steps == list(range(1, 9))
    assert [entry[0] for entry in logged if "drawn" in entry[1]] == [4, 8]
    assert (8, {"said": "a red seven"}) in logged
    assert logged[-1] == "finished"


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train(Task(), Numbers(), few_steps(tmp_path, report_to="wandb"))


def test_flops_profiler(tmp_path, caplog):
    caplog.set_level("INFO", "dalle_pytorch")
    train(Task(noise=0), Numbers(), few_steps(tmp_path, flops_profiler=True))
    (text,) = caplog.messages
    # Two layers of 4·8 weights on 8 samples: forward, gradient of the weights, and of the inputs but the first.
    assert f"8 samples: {2 * 8 * 32 * (2 + 2 + 1) / 1e12:.4g} TFLOP" in text
    assert max(losses(tmp_path)) < 12
    assert not (tmp_path / "checkpoints").joinpath("step-00000012").exists()
