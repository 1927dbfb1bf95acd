"""The training loop: steps, skipped steps, schedules, averages and native folders."""

import json

import pytest
import torch
from training_helpers import Net, Numbers, Task, few_steps, losses, rows

from dalle_pytorch.data.loading import SampleStream
from dalle_pytorch.errors import TrainingDiverged, UsageError
from dalle_pytorch.training import TrainingSettings, train
from dalle_pytorch.training.lr_schedule import PLATEAU_INTERVAL, LRSchedule
from dalle_pytorch.training.settings import total_steps


def weights(task):
    return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])


def test_it_learns(tmp_path):
    train(Task(noise=0), Numbers(), few_steps(tmp_path, 60, learning_rate=0.03))
    curve = losses(tmp_path)
    assert curve[60] < 0.1 * curve[1]


def test_average_differs_from_the_last_weights(tmp_path):
    last = train(Task(), Numbers(), few_steps(tmp_path / "a"))
    mean = train(Task(), Numbers(), few_steps(tmp_path / "b", ema_decay=0.9))
    assert not torch.equal(weights(last), weights(mean))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_average_is_the_exponential_one(tmp_path):
    seen = []

    class Watched(Task):
        def forward(self, batch):
            seen.append(weights(self).clone())  # of the step before
            return super().forward(batch)

    last = train(Watched(), Numbers(), few_steps(tmp_path / "a", 5))
    mean = train(Task(), Numbers(), few_steps(tmp_path / "b", 5, ema_decay=0.75))
    after = [*seen[1:], weights(last)]
    expected = after[0]
    for value in after[1:]:
        expected = 0.75 * expected + 0.25 * value
    torch.testing.assert_close(weights(mean), expected)


def test_accumulated_batches_are_one_big_batch(tmp_path):
    one = train(Task(noise=0), Numbers(), few_steps(tmp_path / "one", 10, 8))
    two = train(Task(noise=0), Numbers(), few_steps(tmp_path / "two", 10, 4, ga_steps=2))
    assert list(losses(tmp_path / "one").values()) == pytest.approx(list(losses(tmp_path / "two").values()), abs=2e-6)
    torch.testing.assert_close(weights(one), weights(two))


def test_compiled_parts_compute_the_same(tmp_path, monkeypatch):
    class Compiled(Task):
        def compiled_parts(self):
            return [self.net]

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_(module, backend=backend))
    plain = train(Task(), Numbers(), few_steps(tmp_path / "plain"))
    assert not graphs
    compiled = train(Compiled(), Numbers(), few_steps(tmp_path / "compiled", compile=True))
    assert graphs and torch.equal(weights(plain), weights(compiled))
    with pytest.raises(UsageError, match="--compile does nothing"):
        train(Task(), Numbers(), few_steps(tmp_path / "none", compile=True))


def test_native_folder_holds_the_averaged_weights(tmp_path):
    class Exact(Task):
        native_dtype = torch.float32

        def write_companions(self, folder):
            (folder / "words.txt").write_text("red")

    trained = train(Exact(), Numbers(), few_steps(tmp_path, ema_decay=0.9))
    torch.testing.assert_close(weights(Net.from_pretrained(tmp_path / "net")), weights(trained), rtol=0, atol=0)
    assert (tmp_path / "net" / "words.txt").read_text() == "red"


def test_native_folder_is_there_at_every_checkpoint_in_half_precision(tmp_path):
    def look(step, metrics):
        if step == 5:
            from safetensors.torch import load_file

            assert load_file(tmp_path / "net" / "model.safetensors")["layers.0.weight"].dtype == torch.float16

    train(Task(), Numbers(), few_steps(tmp_path), look)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.yaml", "metrics.jsonl", "net"}


def test_epochs(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, None, epochs=3))
    assert len(losses(tmp_path)) == 24
    assert total_steps(few_steps(tmp_path, None, 5, epochs=2, ga_steps=2), Numbers()) == 13  # 128 samples, 10 a step


class Stream(SampleStream):
    """Eight samples an epoch, of which nobody says so."""

    def raw_samples(self, seed, epoch, reader, readers):
        return iter(range(8))

    def decode(self, raw, generator):
        return {"x": torch.full((4,), raw / 8)}


def test_epochs_of_a_stream(tmp_path):
    train(Task(), Stream(), few_steps(tmp_path, None, 4, epochs=3, lr_decay="constant"))
    assert len(losses(tmp_path)) in (6, 7)  # that an epoch is over is known with the batch after it


def test_finished_run_says_so(tmp_path, caplog):
    caplog.set_level("INFO", "dalle_pytorch")
    for _ in range(2):
        train(Task(), Numbers(), few_steps(tmp_path, 4))
    assert caplog.messages == ["this run is finished at step 4; raise --steps or --epochs to continue"]


def test_cosine_of_a_stream_is_flat_and_says_so(tmp_path, caplog):
    train(Task(), Stream(), few_steps(tmp_path, None, 4, epochs=3))
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert len({row["lr"] for row in rows if row["step"] > 2}) == 1
    assert "a cosine needs --steps" in caplog.messages[0]


# Steps that are skipped


class Flawed(Task):
    """Its loss, or only its gradient, is no number in the forward passes of `flaws`."""

    def __init__(self, flaws, in_gradient=False):
        super().__init__(noise=0)
        self.flaws, self.in_gradient, self.passes = flaws, in_gradient, 0

    def forward(self, batch):
        loss, metrics = super().forward(batch)
        self.passes += 1
        if self.passes in self.flaws:
            zero = self.net.layers[0].weight[0, 0] * 0
            loss = loss + zero.sqrt() * 0 if self.in_gradient else loss * float("nan")
        return loss, metrics


@pytest.mark.parametrize("in_gradient", [False, True])
def test_bad_step_changes_nothing(tmp_path, in_gradient, caplog):
    before = {}

    class Watched(Flawed):
        def forward(self, batch):
            before[self.passes + 1] = weights(self).clone()
            return super().forward(batch)

    settings = few_steps(tmp_path, 8, ema_decay=0.5, weight_decay=0.1, muon=True)
    train(Watched({4}, in_gradient), Numbers(), settings)
    assert torch.equal(before[4], before[5])
    assert not torch.equal(before[3], before[4])
    assert not torch.equal(before[5], before[6])
    (message,) = caplog.messages
    assert "step 4 is skipped" in message
    bad = rows(tmp_path)[3]
    assert bad["grad_norm"] is None
    assert (bad["loss"] is None) != in_gradient


def test_bad_batch_of_an_accumulated_step_drops_the_whole_step(tmp_path):
    train(Flawed({3}), Numbers(), few_steps(tmp_path / "bad", 4, 4, ga_steps=2, lr_decay="constant", warmup_steps=0))
    assert [row["loss"] is None for row in rows(tmp_path / "bad")] == [False, True, False, False]


def test_average_leaves_bad_steps_out(tmp_path):
    a = train(Flawed({3, 4}), Numbers(), few_steps(tmp_path / "a", 4, ema_decay=0.5))
    b = train(Flawed({}), Numbers(), few_steps(tmp_path / "b", 2, ema_decay=0.5, lr_decay="constant"))
    torch.testing.assert_close(weights(a), weights(b))


@pytest.mark.parametrize("in_gradient", [False, True])
def test_too_many_bad_steps_end_the_run(tmp_path, in_gradient):
    task = Flawed({2, *range(4, 99)}, in_gradient)
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row, up to step 6.*learning_rate"):
        train(task, Numbers(), few_steps(tmp_path, max_bad_steps=3))
    # Bad steps before a checkpoint count after it.
    with pytest.raises(TrainingDiverged, match=r"up to step 6"):
        train(Flawed({2, *range(1, 99)}), Numbers(), few_steps(tmp_path, max_bad_steps=3))


def gradients_of_steps(monkeypatch):
    """The length of the whole gradient in every step that an optimizer makes."""
    lengths, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        lengths.append(float(torch.cat(gradients).norm()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return lengths


def test_long_gradients_are_clipped(tmp_path, monkeypatch):
    lengths = gradients_of_steps(monkeypatch)
    train(Task(), Numbers(), few_steps(tmp_path, 6, clip_grad_norm=1.2))
    before = [row["grad_norm"] for row in rows(tmp_path)]
    assert lengths == pytest.approx([min(length, 1.2) for length in before], rel=1e-4)
    assert min(before) < 1.2 < max(before)


def test_each_step_has_the_schedules_learning_rate(tmp_path):
    """Adam's first step moves every weight by its learning rate, here half of the full one."""

    class Watched(Task):
        def forward(self, batch):
            seen.append(weights(self).clone())
            return super().forward(batch)

    seen = []
    train(Watched(), Numbers(), few_steps(tmp_path, 2, learning_rate=0.01, weight_decay=0.0, warmup_steps=2))
    assert (seen[1] - seen[0]).abs().max().item() == pytest.approx(0.005, rel=1e-3)
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx([0.005, 0.01])


# Schedules


def lr_schedule(steps=1000, **settings):
    return LRSchedule(few_steps("unused", steps, learning_rate=1.0, **{"warmup_steps": 10, **settings}), steps)


def test_cosine():
    rates = [lr_schedule().rate(step) for step in (0, 4, 9, 10, 505, 1000)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.505, 0.01], abs=2e-3)


def test_constant_and_exponential():
    assert lr_schedule(lr_decay="constant").rate(999) == 1
    rates = [lr_schedule(lr_decay="exponential", lr_decay_rate=0.5).rate(step) for step in (5, 109, 110, 310)]
    assert rates == pytest.approx([0.6, 1, 0.5, 0.125])


def test_plateau_halves_when_the_loss_no_longer_falls():
    falling, still = lr_schedule(lr_decay="plateau"), lr_schedule(lr_decay="plateau")
    for step in range(14 * PLATEAU_INTERVAL):
        falling.observe(step, 10 - step / 1000)
        still.observe(step, float("nan") if step == 500 else 1.0)
    assert falling.rate(9999) == 1
    assert still.rate(9999) == 0.5
    again = lr_schedule(lr_decay="plateau")
    again.load_state_dict(still.state_dict())
    for step in range(14 * PLATEAU_INTERVAL, 40 * PLATEAU_INTERVAL):
        still.observe(step, 1.0)
        again.observe(step, 1.0)
    assert again.rate(9999) == still.rate(9999) == 0.25


def test_unknown_words_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"lr_decay: expected one of cosine.*, got 'square'"):
        few_steps(tmp_path, lr_decay="square")
    with pytest.raises(UsageError, match="report_to"):
        few_steps(tmp_path, report_to="paper")
    with pytest.raises(UsageError, match="--steps or --epochs"):
        train(Task(), Numbers(), TrainingSettings(output_dir=tmp_path))


# float16


@pytest.fixture
def float16(monkeypatch):
    """Training in float16 as on a GPU, here on the CPU, with a scale that is too high at first."""
    from dalle_pytorch.training import loop

    made = []

    def restore():
        # What accelerate remembers of the one before.
        for accelerator in made:
            accelerator.state._mixed_precision = "no"

    def make(settings, task):
        restore()
        accelerator = make_accelerator(settings, task)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        made.append(accelerator)
        return accelerator

    make_accelerator = loop.make_accelerator
    monkeypatch.setattr(loop, "make_accelerator", make)
    yield made
    restore()


def test_scale_of_float16_is_found_without_complaint(tmp_path, float16, caplog):
    before = {}

    class Watched(Task):
        def forward(self, batch):
            before[len(before) + 1] = weights(self).clone()
            return super().forward(batch)

    train(Watched(noise=0), Numbers(), few_steps(tmp_path, 40, learning_rate=0.03, muon=True, ema_decay=0.5,
                                               max_bad_steps=2))  # fmt: skip
    assert caplog.messages == []
    overflown = [row["step"] for row in rows(tmp_path) if row["grad_norm"] is None]
    assert 3 <= len(overflown) < 20
    assert all(torch.equal(before[step], before[step + 1]) for step in overflown)
    assert float16[0].scaler.get_scale() == 2.0 ** (24 - len(overflown))  # halved once a step, not once an optimizer
    assert losses(tmp_path)[40] < 0.3 * losses(tmp_path)[1]


def test_scale_of_float16_is_resumed(tmp_path, float16):
    train(Task(), Numbers(), few_steps(tmp_path / "whole", 30, lr_decay="constant"))
    train(Task(), Numbers(), few_steps(tmp_path / "broken", 15, lr_decay="constant"))
    train(Task(), Numbers(), few_steps(tmp_path / "broken", 30, lr_decay="constant"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_float16_that_no_scale_helps_ends_the_run(tmp_path, float16):
    with pytest.raises(TrainingDiverged, match="3 steps in a row"):
        train(Flawed(range(99), in_gradient=True), Numbers(), few_steps(tmp_path, 99, max_bad_steps=3))
