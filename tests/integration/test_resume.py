"""Broken-off runs go on exactly where they were: killed, asked to end, or with a damaged checkpoint."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
import zlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from training_helpers import Net, Numbers, Task, checkpoints, few_steps, losses

from dalle_pytorch.data.loading import SampleStream
from dalle_pytorch.errors import CheckpointError, UsageError
from dalle_pytorch.files import lock
from dalle_pytorch.training import interruption, train
from dalle_pytorch.training import state as training_state
from dalle_pytorch.training.commands.progress import run_training
from dalle_pytorch.training.launch import save_file
from dalle_pytorch.training.loop import Interrupted
from dalle_pytorch.training.native import NativeFolders
from dalle_pytorch.training.settings import check_part_name

STEPS = 40
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["accelerate", "torch._dynamo", "dalle_pytorch.training.loop", "training_helpers"])


class Stopped(Exception):
    pass


def stop_at(number):
    def report(step, metrics):
        if step == number:
            raise Stopped

    return report


def state(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:08}" / "state.pt", weights_only=True)


def assert_same_end(a, b, step=12):
    """Checkpoints of the last step hold the same numbers."""
    flat = [torch.utils._pytree.tree_leaves(state(folder, step)) for folder in (a, b)]
    assert len(flat[0]) == len(flat[1])
    for x, y in zip(*flat, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_decay": 0.9}, {"muon": True}, {"ga_steps": 2, "num_workers": 1}, {"lr_decay": "plateau"}],
)
def test_resumed_run_equals_unbroken_run(tmp_path, settings):
    whole = train(Task(), Numbers(), few_steps(tmp_path / "whole", **settings))
    with pytest.raises(Stopped):
        train(Task(), Numbers(), few_steps(tmp_path / "broken", **settings), stop_at(7))
    resumed = train(Task(), Numbers(), few_steps(tmp_path / "broken", **settings))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_finished_run_is_not_run_again(tmp_path):
    whole = train(Task(), Numbers(), few_steps(tmp_path))
    shutil.rmtree(tmp_path / "net")
    again = train(Task(), Numbers(), few_steps(tmp_path), lambda *_: pytest.fail("a step was made"))
    assert torch.equal(whole.net.layers[0].weight, again.net.layers[0].weight)
    assert (tmp_path / "net" / "config.json").exists()


# Killed


def run_slowly(folder):
    # Some checkpoints of 8 MB, so that there is time to be killed in.
    train(Task(pause=0.004, ballast=2_000_000), Numbers(), few_steps(folder, STEPS, save_every=3, ema_decay=0.9))


def start(folder):
    process = processes.Process(target=run_slowly, args=(folder,))
    process.start()
    return process


def wait_for(condition, process, seconds=300):
    """Whether it came about before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
        if not process.is_alive():
            return False
    raise TimeoutError


def noted(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return folder


def finish_and_compare(folder, unbroken):
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    assert losses(folder) == losses(unbroken)
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert_same_end(folder, unbroken, STEPS)
    names = [path.name for path in [*folder.iterdir(), *(folder / "checkpoints").iterdir()]]
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, unbroken):
    moments = random.Random(7)
    for _ in range(6):
        process = start(tmp_path)
        before = noted(tmp_path)
        wait_for(lambda before=before: noted(tmp_path) != before, process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
    finish_and_compare(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["checkpoints/.step-*.tmp", "net/.model.safetensors.*.tmp"])
def test_killed_while_it_writes(tmp_path, unbroken, pattern):
    moments = random.Random(11)
    hits = 0
    for _ in range(20):
        process = start(tmp_path)
        if not wait_for(lambda: any(tmp_path.glob(pattern)), process):
            break
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.join()
        hits += any(tmp_path.glob(pattern))
        if hits == 2:
            break
    assert hits
    finish_and_compare(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(tmp_path, number):
    train(Task(), Numbers(), few_steps(tmp_path / "whole"))

    def ask(step, metrics):
        if step == 6:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"{number.name}: stopped and saved after step 7") as caught:
        train(Task(), Numbers(), few_steps(tmp_path / "broken"), ask)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    assert checkpoints(tmp_path / "broken")[-1] == "step-00000007"
    train(Task(), Numbers(), few_steps(tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_signal_to_the_whole_group_with_workers(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path / "whole", num_workers=1))
    process = processes.Process(target=run_in_its_own_group, args=(tmp_path / "broken",))
    process.start()
    wait_for(lambda: noted(tmp_path / "broken") > 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 143
    train(Task(), Numbers(), few_steps(tmp_path / "broken", num_workers=1))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def run_in_its_own_group(folder):
    os.setpgid(0, 0)
    try:
        train(Task(pause=0.1), Numbers(), few_steps(folder, num_workers=1))
    except Interrupted as interruption:
        raise SystemExit(interruption.exit_code) from None


# Checkpoints


def test_newest_are_kept(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, save_every=2, keep_n_checkpoints=3))
    assert checkpoints(tmp_path) == ["step-00000008", "step-00000010", "step-00000012"]


def damage_bytes(folder):
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.pt").write_bytes(data)


def damage_length(folder):
    os.truncate(folder / "process-00000.pt", 100)


def damage_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_file(folder):
    (folder / "state.pt").unlink()


@pytest.mark.parametrize("damage", [damage_bytes, damage_length, damage_manifest, damage_file])
def test_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    train(Task(), Numbers(), few_steps(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(Task(), Numbers(), few_steps(tmp_path / "broken"), stop_at(10))
    damage(tmp_path / "broken" / "checkpoints" / "step-00000008")
    train(Task(), Numbers(), few_steps(tmp_path / "broken"))
    (message,) = caplog.messages
    assert "step-00000008 is damaged" in message
    assert "resuming from step 4" in message
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for name in checkpoints(tmp_path / "broken"):
        damage(tmp_path / "broken" / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=r"step-00000012 is damaged.*no older one"):
        train(Task(), Numbers(), few_steps(tmp_path / "broken"))


def test_checkpoint_of_another_training_is_refused(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, ema_decay=0.9))
    with pytest.raises(CheckpointError, match=r"step-00000012 does not continue this training .*size mismatch"):
        train(Task(hidden=9), Numbers(), few_steps(tmp_path, ema_decay=0.9))
    with pytest.raises(CheckpointError, match="made with --ema_decay"):
        train(Task(), Numbers(), few_steps(tmp_path))
    with pytest.raises(CheckpointError, match="does not continue this training"):
        train(Task(), Numbers(), few_steps(tmp_path, ema_decay=0.9, muon=True))


def test_file_of_an_earlier_version_is_refused(tmp_path):
    torch.save({"step": 4}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is a checkpoint of an earlier version"):
        train(Task(), Numbers(), few_steps(tmp_path))


def test_starting_anew(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, 4))
    with pytest.raises(UsageError, match=r"up to step 4.*--overwrite"):
        train(Task(), Numbers(), few_steps(tmp_path, 8, resume=False))
    train(Task(), Numbers(), few_steps(tmp_path, 3, resume=False, overwrite=True))
    assert list(losses(tmp_path)) == [1, 2, 3]
    assert checkpoints(tmp_path) == ["step-00000003"]


class Using(Task):
    """A task with parts that are used and not trained."""

    def __init__(self, **parts):
        super().__init__()
        self.parts = parts

    def fixed_parts(self):
        return self.parts


def test_other_parts_are_refused_on_resuming(tmp_path):
    train(Using(VAE="a" * 64), Numbers(), few_steps(tmp_path, 4))
    with pytest.raises(CheckpointError, match="another VAE: aaaaaaaa of the default, not bbbbbbbb of the default"):
        train(Using(VAE="b" * 64), Numbers(), few_steps(tmp_path, 8))
    train(Using(VAE="a" * 64), Numbers(), few_steps(tmp_path, 8))
    assert checkpoints(tmp_path)[-1] == "step-00000008"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_full_disk_is_what_the_system_says(size):
    with pytest.raises(OSError, match="No space left"):
        save_file({"weights": torch.zeros(size)}, Path("/dev/full"))


def test_checkpoint_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    train(Task(), Numbers(), few_steps(tmp_path, 4))
    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(Task(), Numbers(), few_steps(tmp_path, 8))
    assert checkpoints(tmp_path) == ["step-00000004"]


# Whose a folder is


def test_folder_of_another_is_refused(tmp_path):
    for number, content in enumerate(
        ({"notes.txt": "mine"}, {"config.json": '{"class": "VAE"}'}, {"config.json": "?"})
    ):
        (tmp_path / f"{number}/net").mkdir(parents=True)
        for name, text in content.items():
            (tmp_path / f"{number}/net" / name).write_text(text)
        with pytest.raises(UsageError, match="is no Net that a training wrote"):
            train(Task(), Numbers(), few_steps(tmp_path / str(number), 4))
        assert {path.name: path.read_text() for path in (tmp_path / f"{number}/net").iterdir()} == content


def test_files_of_others_stay(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, 4))
    for name in ("net/notes.txt", "net/mine/a.txt", "checkpoints/mine.txt", "checkpoints/.mine.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "net/.model.safetensors.12345678.tmp").write_text("half")  # of a write that was killed
    train(Task(hidden=9), Numbers(), few_steps(tmp_path, 4, resume=False, overwrite=True))
    assert Net.from_pretrained(tmp_path / "net").config["hidden"] == 9
    for name in ("net/notes.txt", "net/mine/a.txt", "checkpoints/mine.txt", "checkpoints/.mine.tmp"):
        assert (tmp_path / name).read_text() == "mine"
    assert {path.name for path in (tmp_path / "net").iterdir()} == {
        "config.json", "model.safetensors", "notes.txt", "mine"}  # fmt: skip


def test_folder_that_was_moved_aside_is_put_back(tmp_path):
    train(Task(), Numbers(), few_steps(tmp_path, 4))
    (tmp_path / "net").rename(tmp_path / ".net.abcd1234.old")  # as a killed write of an earlier version left it
    NativeFolders(Task(), tmp_path, Accelerator(cpu=True))
    assert Net.from_pretrained(tmp_path / "net").config["hidden"] == 8


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "checkpoints", "Samples", "config.yaml", ".x", "x" * 300, "a\0"]
)
def test_names_that_a_network_cannot_have(name):
    with pytest.raises(UsageError, match="is the name of a folder"):
        check_part_name(name)


def test_two_trainings_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_WAIT", 0.2)

    def second(step, metrics):
        with pytest.raises(UsageError, match="another process has a training in it"):
            train(Task(), Numbers(), few_steps(tmp_path))

    train(Task(), Numbers(), few_steps(tmp_path, 1), second)
    assert not list(tmp_path.glob(".*"))
    train(Task(), Numbers(), few_steps(tmp_path, 2))  # the lock is free again


class Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("name", ["state.pt", "process-00000.pt"])
def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    train(Task(), Numbers(), few_steps(tmp_path, 4))
    folder = tmp_path / "checkpoints" / "step-00000004"
    torch.save({**torch.load(folder / name), "harm": Harm()}, folder / name)
    data = (folder / name).read_bytes()
    assert pickle.dumps(Harm())  # it can be pickled, and so would have been run
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[name] = [len(data), zlib.crc32(data)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not continue"):
        train(Task(), Numbers(), few_steps(tmp_path, 4))
    assert not (tmp_path / "harmed").exists()


def test_another_batch_size_goes_on_with_the_samples_that_are_left(tmp_path):
    seen = []

    class Watched(Task):
        def forward(self, batch):
            seen.extend(batch["x"][:, 0].tolist())
            return super().forward(batch)

    train(Watched(), Numbers(), few_steps(tmp_path, 4, 8))
    train(Watched(), Numbers(), few_steps(tmp_path, 12, 4))
    assert len(set(seen)) == len(seen) == 64


class Stream(SampleStream):
    """Numbers in an order that only the stream knows."""

    def raw_samples(self, seed, epoch, reader, readers):
        return iter(random.Random(epoch).sample(range(50), 50)[reader::readers])

    def decode(self, raw, generator):
        return {"x": torch.full((4,), raw / 50)}


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_goes_on_in_the_same_place(tmp_path, workers):
    train(Task(), Stream(), few_steps(tmp_path / "whole", num_workers=workers))
    with pytest.raises(Stopped):
        train(Task(), Stream(), few_steps(tmp_path / "broken", num_workers=workers), stop_at(7))
    train(Task(), Stream(), few_steps(tmp_path / "broken", num_workers=workers))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_random_numbers_of_every_kind_go_on(tmp_path):
    class Mixed(Task):
        def forward(self, batch):
            import numpy as np

            loss, metrics = super().forward(batch)
            return loss * (1 + random.random() + float(np.random.rand())), metrics

    train(Mixed(), Numbers(), few_steps(tmp_path / "whole"))
    with pytest.raises(Stopped):
        train(Mixed(), Numbers(), few_steps(tmp_path / "broken"), stop_at(7))
    train(Mixed(), Numbers(), few_steps(tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_frozen_parts_are_neither_trained_nor_averaged(tmp_path):
    class Partly(Task):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    task = Partly()
    before = task.frozen.weight.clone()
    train(task, Numbers(), few_steps(tmp_path, ema_decay=0.9))
    assert torch.equal(task.frozen.weight, before)
    assert len(state(tmp_path, 12)["average"]["tensors"]) == 4


# Signals while it waits


class Stuck(Numbers):
    """Data of which the eighth batch does not come."""

    def __getitem__(self, index):
        if self.read == 56:
            time.sleep(600)
        self.read += 1
        return super().__getitem__(index)

    read = 0


def run_stuck(folder, workers):
    interruption.GRACE = 0.3
    run_training("stuck", Task(), Stuck(), few_steps(folder, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_signal_while_data_do_not_come(tmp_path, workers):
    train(Task(), Numbers(), few_steps(tmp_path / "whole"))
    process = processes.Process(target=run_stuck, args=(tmp_path / "broken", workers))
    process.start()
    wait_for(lambda: noted(tmp_path / "broken") == 7, process)
    started = time.monotonic()
    process.terminate()
    process.join(300)
    assert process.exitcode == 143 and time.monotonic() - started < 10
    assert checkpoints(tmp_path / "broken")[-1] == "step-00000007"
    train(Task(), Numbers(), few_steps(tmp_path / "broken"))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_step_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "GRACE", 0.05)
    monkeypatch.setattr(interruption, "LAST_WAIT", 0.05)
    left = []

    class Slow(Task):
        def forward(self, batch):
            if not left and (tmp_path / "checkpoints").exists():
                os.kill(os.getpid(), signal.SIGTERM)
                while not left:
                    time.sleep(0.01)
            return super().forward(batch)

    with pytest.raises(Interrupted):
        train(Slow(), Numbers(), few_steps(tmp_path), leave=left.append)
    assert str(left[0]).startswith("SIGTERM: stopped after step 4 without saving; the same command goes on")
    assert left[0].exit_code == 143
