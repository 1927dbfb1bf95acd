"""Several processes learn what one does: DDP, FSDP and ZeRO on two CPU processes, their checkpoints, what is refused.

The trainings are `train_dalle.py` itself, tiny, on drawn scenes; processes are started by torchrun.
"""

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contrast_gradients import contrast_gradients
from helpers import ROOT
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.transformer import Transformer
from dalle_pytorch.priors.dalle import DALLE
from dalle_pytorch.training import TrainingSettings, TrainingTask
from dalle_pytorch.training.launch import make_accelerator
from dalle_pytorch.training.tasks.base import SharedRows

STEPS = 4
ZERO = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
    reason="deepspeed, and g++ for a part that it builds when it is first used, are not installed",
)


def launch(script, *argv):
    """Runs a script in two processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [Path(__file__).with_name("fsdp_on_cpu.py"), script] if "--fsdp" in argv else [script]
    path = os.pathsep.join([str(ROOT / "DALLE-pytorch"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [*map(str, command), *map(str, argv)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]


def call(script, *argv):
    """Runs a script in this process."""
    runpy.run_path(str(script))["main"]([str(argument) for argument in argv])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A VAE and a tokenizer to train priors with."""
    from dalle_pytorch.tokenizers.hug import train_bpe
    from dalle_pytorch.vae.vqgan import VQGanVAE

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    VQGanVAE(image_size=32, num_tokens=32, embed_dim=8, z_channels=8, ch=8, ch_mult=(1,), num_res_blocks=1,
             patch_size=4, mid_attention=False).save_pretrained(folder / "vae")  # fmt: skip
    train_bpe(["a red seven on brick", "a blue star on wood"] * 4, 64).save(str(folder / "tokenizer.json"))
    return folder


def train_prior(parts, output, *argv, start=launch, steps=STEPS):
    """Trains a tiny prior without any randomness but its first weights; its loss at every step."""
    settings = {
        "image_text_folder": "glyphs", "vae_path": parts / "vae", "bpe_path": parts / "tokenizer.json",
        "output_dir": output, "steps": steps,
        "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "text_seq_len": 8, "null_cond_prob": 0,
        "lr_decay": "constant", "warmup_steps": 1, "learning_rate": 1e-2, "log_every": 1, "num_workers": 0,
        "save_every": STEPS,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in settings.items()]
    start(ROOT / "DALLE-pytorch/train_dalle.py", "--truncate_captions", *given, *argv)
    rows = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def alone(parts, tmp_path_factory):
    """What one process with batches of 8 learns: the losses of 2 × STEPS steps, and the folder."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return train_prior(parts, folder, "--batch_size=8", start=call, steps=2 * STEPS), folder


# --------------------------------------------------------------------------------------------------
# The same learning, however it is spread


def test_accumulated_batches_learn_what_whole_ones_do(parts, alone, tmp_path):
    losses = train_prior(parts, tmp_path, "--batch_size=4", "--ga_steps=2", start=call)
    assert losses == pytest.approx({step: alone[0][step] for step in losses}, abs=2e-5)
    assert len(losses) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv",
    [
        pytest.param([], id="ddp"),
        pytest.param(["--fsdp", "--activation_checkpointing"], id="fsdp"),
        pytest.param(["--deepspeed", "--zero_stage=2"], id="zero2", marks=ZERO),
        pytest.param(["--deepspeed", "--zero_stage=3"], id="zero3", marks=ZERO),
    ],
)
def test_two_processes_learn_what_one_does_and_go_on_from_their_checkpoint(parts, alone, tmp_path, argv):
    """Two processes with batches of 4 have the losses of one with 8, also after a stop; the trained prior opens."""
    run = tmp_path / "run"
    first = train_prior(parts, run, "--batch_size=4", *argv)
    assert sorted(first) == list(range(1, STEPS + 1))
    assert (run / "dalle/config.json").exists()
    whole = train_prior(parts, run, "--batch_size=4", *argv, steps=2 * STEPS)
    losses, folder = alone
    assert whole == pytest.approx(losses, abs=2e-5)
    assert losses[2 * STEPS] < losses[1] - 0.1  # it did learn something
    # The checkpoint holds float16, whose steps are 5e-4 of a value.
    theirs, ours = (DALLE.from_pretrained(path / "dalle").state_dict() for path in (run, folder))
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], atol=2e-3, rtol=2e-3, msg=name)
    if "--zero_stage=2" in argv:
        pictures = tmp_path / "pictures"
        call(ROOT / "generate.py", "--dalle_path", run / "dalle", "--text", "a red seven on brick", "--num_images=1",
             "--outputs_dir", pictures)  # fmt: skip
        assert list(pictures.rglob("*.png"))


@pytest.mark.slow
def test_contrastive_loss_sees_the_batch_of_all_processes(tmp_path):
    """Loss and gradients of 2 × 4 pairs are those of 1 × 8."""
    path = tmp_path / "gradients.pt"
    launch(Path(__file__).parent / "contrast_gradients.py", path)
    loss, gradients = torch.load(path, weights_only=True)
    expected_loss, expected = contrast_gradients(rank=0, processes=1)
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


# --------------------------------------------------------------------------------------------------
# Activation checkpointing


def test_checkpointed_layers_compute_the_same_again():
    torch.manual_seed(0)
    transformer = Transformer(dim=16, depth=2, heads=2, dim_head=8, ff_dropout=0.3)
    x = torch.randn(2, 5, 16)
    calls = []
    transformer.layers[0].ff.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        torch.manual_seed(1)
        transformer.zero_grad()
        transformer(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in transformer.parameters()]

    kept = gradients()
    assert len(calls) == 1
    for layer in transformer.layers:
        layer.activation_checkpointing = True
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 3  # forward once more, and again for the gradient


# --------------------------------------------------------------------------------------------------
# What cannot work


class TransformerTask(TrainingTask):
    def __init__(self, **settings):
        super().__init__()
        self.transformer = Transformer(dim=8, depth=2, heads=1, dim_head=8, **settings)

    def forward(self, batch):
        raise NotImplementedError


class LinearTask(TransformerTask):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Linear(2, 2)


PLAIN, REVERSIBLE = {}, {"reversible": True}
SHARED = {"shared_attn_ids": (0, 0), "shared_ff_ids": (0, 1)}


@pytest.mark.parametrize(
    ("layers", "settings", "processes", "says"),
    [
        (REVERSIBLE | SHARED, {}, 2, "reversible layers that share weights"),
        (REVERSIBLE, {"fsdp": True}, 2, "reversible layers need whole parameters"),
        (REVERSIBLE, {"zero_stage": 3}, 2, "reversible layers need whole parameters"),
        (REVERSIBLE, {"activation_checkpointing": True}, 1, "leave out --activation_checkpointing"),
        (SHARED, {"fsdp": True}, 2, "FSDP cannot shard layers that share weights"),
        (PLAIN, {"muon": True, "fsdp": True}, 2, "leave out --muon"),
        (PLAIN, {"muon": True, "distributed_backend": "deepspeed"}, 2, "leave out --muon"),
        (PLAIN, {"sample_every": 5, "zero_stage": 3}, 2, "--sample_every 0"),
        (PLAIN, {"fsdp": True}, 1, "start the command with torchrun"),
        (PLAIN, {"fsdp": True, "zero_stage": 2}, 2, "choose one of them"),
        (PLAIN, {"distributed_backend": "horovod"}, 2, "torchrun"),
        (PLAIN, {"distributed_backend": "smoke-signals"}, 2, "expected ddp, fsdp or deepspeed"),
        (PLAIN, {"deepspeed_config": "nowhere.json"}, 2, "nowhere.json cannot be read"),
        pytest.param(PLAIN, {"mixed_precision": "fp16"}, 1, "fp16 needs a GPU",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, layers, settings, processes, says):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    settings = TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, **settings)
    with pytest.raises(UsageError, match=says) as error:
        make_accelerator(settings, TransformerTask(**layers))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold DeepSpeed's settings"),
        ('{"optimizer": {"type": "Adam"}}', "has a section 'optimizer'"),
    ],
)
def test_deepspeed_file_that_cannot_be_used(tmp_path, text, says):
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    settings = TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, deepspeed_config=str(path))
    with pytest.raises(UsageError, match=says):
        make_accelerator(settings, TransformerTask())


def test_rows_that_learn_together_are_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = TransformerTask()
    weight = next(task.parameters())
    monkeypatch.setattr(task, "shared_rows", lambda: [SharedRows(weight, torch.eye(len(weight)))])
    with pytest.raises(UsageError, match="leave out --share_codes"):
        make_accelerator(TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, fsdp=True), task)


def test_scalars_are_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = TransformerTask()
    task.temperature = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UsageError, match="scalar parameters such as temperature"):
        make_accelerator(TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, zero_stage=1), task)


def test_network_that_must_stay_whole_is_not_split(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    task = TransformerTask()
    task.replicated = True
    with pytest.raises(UsageError, match="whole in every process"):
        make_accelerator(TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, fsdp=True), task)


def test_checkpointing_of_a_network_without_transformer_layers_is_refused(tmp_path):
    settings = TrainingSettings(output_dir=tmp_path, steps=1, batch_size=1, activation_checkpointing=True)
    with pytest.raises(UsageError, match="has none"):
        make_accelerator(settings, LinearTask())


@pytest.mark.slow
def test_fsdp_on_cpus_is_refused_in_one_line(parts, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(AssertionError, match="error: FSDP needs GPUs"):
        train_prior(parts, tmp_path, "--batch_size=4", "--distributed_backend=fsdp")
