"""Jobs: outputs are the same bytes on any number of workers, in any order, whatever was killed; and nothing is lost."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from batch_helpers import PROMPTS, Inline, job_settings, outputs, processes, run_inline, write_list
from faults.models import write_models
from faults.surroundings import disk
from PIL import Image

from dalle_pytorch.cli import run
from dalle_pytorch.data.datasets import open_dataset
from dalle_pytorch.errors import UsageError, UserError
from dalle_pytorch.files import lock
from dalle_pytorch.files.tokens import load_tokens
from dalle_pytorch.nn.linear import has_int8
from diffusion import DiffusionDecoder
from text_to_image import TextToImage
from text_to_image.batch import driver, job, local, stages
from text_to_image.batch.folder import JobFolder
from text_to_image.batch.job import run_job
from text_to_image.batch.local import LocalExecutor, Place
from text_to_image.batch.tasks import Task
from text_to_image.commands import batch
from text_to_image.inputs import find_inputs, read_caption

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this build of PyTorch has no FBGEMM for this processor")

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload([*local.PRELOAD, "batch_helpers"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_list(tmp_path_factory.mktemp("list") / "prompts.txt")


@pytest.fixture(scope="module")
def undisturbed(models, prompts, tmp_path_factory):
    """What the job of `job_settings` comes to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "job"
    ended = run_inline(job_settings(models, folder, prompts))
    assert ended.finished and ended.totals.prompts == 5 and not ended.totals.failed
    return outputs(folder)


def members(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def manifest(folder):
    return list(JobFolder(folder).rows())


# What is made


def test_a_job_draws_what_the_pipeline_draws(models, prompts, undisturbed, tmp_path):
    """Candidates are fixed by seed, prompt and number, whatever batch they are in."""
    run_inline(job_settings(models, tmp_path / "job", prompts))
    pipe = TextToImage.from_pretrained(prior=models / "dalle", scorer=models / "clip", decoder=models / "decoder",
                                       device="cpu")  # fmt: skip
    rows = [row for row in manifest(tmp_path / "job") if not row["upscaled"]]
    for number, prompt in enumerate(PROMPTS):
        expected = pipe(prompt, 6, keep=3, upscale=True, num_inference_steps="1")
        own = [row for row in rows if row["number"] == number]
        assert [row["candidate"] for row in own] == [image.index for image in expected]
        assert [row["score"] for row in own] == pytest.approx([image.score for image in expected], abs=1e-5)
        files = members(tmp_path / "job" / own[0]["shard"])
        for row, image in zip(own, expected, strict=True):
            key = row["file"].removesuffix(".png")
            (tmp_path / "tokens.npy").write_bytes(files[f"{key}.npy"])
            assert torch.equal(load_tokens(tmp_path / "tokens.npy", 16), image.tokens)
            facts = json.loads(files[f"{key}.json"])
            assert facts["prompt"] == prompt and facts["candidate"] == image.index and facts["seed"] == 0
            assert facts["models"] == pipe.model.fingerprints("prior", "tokenizer", "scorer", "decoder")
        upscaled = members(tmp_path / "job/upscaled" / own[0]["shard"].partition("/")[2])
        (tmp_path / "redrawn.png").write_bytes(upscaled[f"{number:09}-0.png"])
        redrawn, wanted = (np.asarray(image).astype(int) for image in
                           (Image.open(tmp_path / "redrawn.png"), expected[0].upscaled))  # fmt: skip
        assert np.abs(redrawn - wanted).max() <= 1


@needs_int8
def test_a_job_in_int8(models, tmp_path):
    """The driver, which opens float32, and its workers agree on models; candidates are those of the pipeline."""
    prompts = write_list(tmp_path / "prompts.txt", PROMPTS[:1])
    run_inline(job_settings(models, tmp_path / "job", prompts, diffuse=0, dtype="int8"))
    pipe = TextToImage.from_pretrained(prior=models / "dalle", scorer=models / "clip", device="cpu", dtype="int8")
    expected, rows = pipe(PROMPTS[0], 6, keep=3, batch_size=1), manifest(tmp_path / "job")
    assert pipe.model.prior.is_int8 and [row["candidate"] for row in rows] == [image.index for image in expected]
    files = members(tmp_path / "job" / rows[0]["shard"])
    facts = json.loads(files[rows[0]["file"].replace(".png", ".json")])
    assert facts["models"] == pipe.model.provenance("prior", "tokenizer", "scorer")
    assert facts["models"]["dtype"] == "int8"


def test_int8_on_a_gpu_is_refused_before_any_work(models, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UsageError, match="dtype int8 is for CPUs"):
        run_inline(job_settings(models, tmp_path / "job", prompts, dtype="int8"))
    assert not (tmp_path / "job/job.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_on_any_number_of_processes(models, prompts, undisturbed, tmp_path, workers):
    run_job(job_settings(models, tmp_path / "job", prompts), processes(workers))
    assert outputs(tmp_path / "job") == undisturbed


@pytest.mark.parametrize("seed", range(4))
def test_the_same_bytes_in_any_order(models, prompts, undisturbed, tmp_path, seed):
    run_inline(job_settings(models, tmp_path / "job", prompts), seed=seed + 1)
    assert outputs(tmp_path / "job") == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_candidates_dropped_early(models, prompts, tmp_path, workers):
    """Half of a prompt's in a batch go on after a quarter of the rows, and a quarter after half, but never fewer than
    are kept; those are drawn as they would be with all others."""
    options = {"num_images": 8, "batch_size": 8, "keep": 1, "diffuse": 0}
    run_inline(job_settings(models, tmp_path / "whole", prompts, **options | {"keep": None}))
    whole = {row["candidate"]: row["score"] for row in manifest(tmp_path / "whole") if row["number"] == 1}
    settings = job_settings(models, tmp_path / "pruned", prompts, **options, prune=True)
    run_inline(settings)
    pruned = manifest(tmp_path / "pruned")
    assert [row["number"] for row in pruned] == [0, 1, 2, 3, 4]
    assert whole[pruned[1]["candidate"]] == pytest.approx(pruned[1]["score"], abs=1e-5)
    scored = [json.loads(path.read_text().partition("\n")[0])["histogram"] for path in
              sorted((tmp_path / "pruned/parts").glob("*.jsonl"))]  # fmt: skip
    assert [sum(counts.values()) for counts in scored] == [4, 4, 2]  # two of eight for each prompt
    run_job(replace(settings, outputs_dir=tmp_path / "again"), processes(workers))
    assert outputs(tmp_path / "again") == outputs(tmp_path / "pruned")


def test_dropping_is_for_what_is_ranked(models, prompts, tmp_path):
    for options in ({"keep": None, "diffuse": 0}, {"clip_sort": False}):
        with pytest.raises(UsageError, match="--prune goes with --keep"):
            job_settings(models, tmp_path / "job", prompts, prune=True, **options)


def test_trainings_read_the_shards(models, prompts, tmp_path):
    run_inline(job_settings(models, tmp_path / "job", prompts))
    for folder, wds, count, side in (("shards", "png,txt", 15, 32), ("upscaled", "png,json", 5, 64)):
        stream = open_dataset(tmp_path / "job" / folder, side, wds=wds, caption_key="prompt")
        samples = [stream.decode(raw) for url in stream.urls for raw in stream.read_shard(url)]
        assert len(samples) == count and {sample["caption"] for sample in samples} == set(PROMPTS)
        assert all(sample["image"].shape == (3, side, side) for sample in samples)


def test_folders_are_those_of_generate(models, prompts, tmp_path):
    run_inline(job_settings(models, tmp_path / "job", prompts, output_format="folders"))
    folder = tmp_path / "job/images/000000/000000000-a_red_seven_on_brick"
    assert read_caption(folder) == PROMPTS[0] and len(find_inputs(folder)) == 3
    rows = [row for row in manifest(tmp_path / "job") if row["number"] == 0]
    assert [row["upscaled"] for row in rows] == [False, True, False, False]
    for row in rows:
        assert Image.open(tmp_path / "job" / row["file"]).size == (row["width"], row["height"])
    assert not list((tmp_path / "job").rglob(".*"))


def test_webp_and_no_ranking(models, prompts, tmp_path):
    ended = run_inline(job_settings(models, tmp_path / "job", prompts, image_format="webp", clip_sort=False, diffuse=0))
    rows = manifest(tmp_path / "job")
    assert [row["candidate"] for row in rows] == [0, 1, 2] * 5 and ended.totals.candidates == 15
    assert all(row["score"] is None and row["file"].endswith(".webp") for row in rows)
    files = members(tmp_path / "job" / rows[0]["shard"])
    (tmp_path / "image.webp").write_bytes(files[rows[0]["file"]])
    assert Image.open(tmp_path / "image.webp").format == "WEBP"


def test_settings_by_prompt(models, tmp_path):
    lines = [{"key": "x", "prompt": "A red  seven", "seed": 7}, {"key": "y", "prompt": "a red seven", "temperature": 0},
             {"key": "z", "prompt": "a red seven", "num_images": 2, "cond_scale": 2, "seed": 7}]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_inline(job_settings(models, tmp_path / "job", tmp_path / "p.jsonl", diffuse=2))
    rows = [row for row in manifest(tmp_path / "job") if not row["upscaled"]]
    assert [(row["key"], row["seed"], row["cond_scale"]) for row in rows] == \
        [("x", 7, 1.0)] * 3 + [("y", 0, 1.0)] * 3 + [("z", 7, 2.0)] * 2  # fmt: skip
    pipe = TextToImage.from_pretrained(prior=models / "dalle", scorer=models / "clip", device="cpu")
    for key, options in (("x", {"seed": 7}), ("y", {"temperature": 0.0}), ("z", {"seed": 7, "cond_scale": 2.0})):
        expected = pipe.generate("a red seven", 2 if key == "z" else 6, keep=3, **options)
        assert [row["candidate"] for row in rows if row["key"] == key] == [image.index for image in expected]
        assert [row["score"] for row in rows if row["key"] == key] == \
            pytest.approx([image.score for image in expected], abs=1e-5)  # fmt: skip


def test_images_to_complete(models, tmp_path):
    (tmp_path / "cats").mkdir()
    Image.open(models / "picture.png").save(tmp_path / "cats/1.png")
    (tmp_path / "p.csv").write_text("prompt,image\na red seven,cats/1.png\na blue star,\n")
    settings = job_settings(models, tmp_path / "job", tmp_path / "p.csv", num_init_img_tokens=8, num_images=2, keep=2)
    run_inline(settings)
    pipe = TextToImage.from_pretrained(prior=models / "dalle", device="cpu")
    begin = pipe.encode_init_image(models / "picture.png", 8).numpy()
    files = members(tmp_path / "job/shards/000000.tar")
    for name in ("000000000-0.npy", "000000000-1.npy"):
        (tmp_path / "t.npy").write_bytes(files[name])
        assert np.array_equal(np.load(tmp_path / "t.npy")[:8], begin)
    # An image that changes meanwhile is not another one's.
    (tmp_path / "job/parts/000000.jsonl").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "cats/1.png")
    ended = run_inline(settings)
    assert ended.totals.failed == 1
    (failure,) = (failure for done in JobFolder(tmp_path / "job").done() for failure in done["failed"])
    assert failure["reason"] == "image cats/1.png has changed since the job began"


# Killed, interrupted, full


def test_what_is_done_is_not_done_again(models, prompts, undisturbed, tmp_path):
    settings = job_settings(models, tmp_path / "job", prompts)
    made = []

    def executor(config):
        made.append(Inline(config))
        return made[-1]

    def stop():
        return made and sum(task.stage == "pack" for task in made[-1].ran) == 2

    ended = run_job(settings, executor, stop=stop)
    assert not ended.finished and 0 < ended.totals.prompts < 5 and ended.manifest is None
    first = list(made[-1].ran)
    assert run_job(settings, executor).finished
    # Blocks of tokens that were sampled are not sampled again, nor are units drawn again that are finished.
    twice = {(task.stage, task.unit, task.block) for task in first} & {
        (task.stage, task.unit, task.block) for task in made[-1].ran}  # fmt: skip
    assert not any(stage == "sample" for stage, *_ in twice) and len(twice) < len(first)
    assert outputs(tmp_path / "job") == undisturbed
    assert run_job(settings, lambda config: pytest.fail("there is nothing to do")).finished


class Killed(LocalExecutor):
    """Kills one of its workers after some outcomes, at most twice: not even a block that both hit is given up."""

    def __init__(self, config, moments):
        super().__init__(config, [Place("cpu", 1)] * 2)
        self.moments, self.left, self.deaths = moments, 2, 0

    def wait(self, seconds):
        outcomes = super().wait(seconds)
        busy = [worker for worker in self.running if worker.ready and worker.tasks]
        if self.left and busy and self.moments.random() < 0.15:
            self.left -= 1
            time.sleep(self.moments.uniform(0, 0.02))
            self.moments.choice(busy).process.kill()
        self.deaths += sum("SIGKILL" in (outcome.error or "") for outcome in outcomes)
        return outcomes


def test_workers_killed_at_any_moment(models, prompts, undisturbed, tmp_path):
    moments, deaths = random.Random(5), 0
    for number in range(6):
        executors = []

        def executor(config, executors=executors):
            executors.append(Killed(config, moments))
            return executors[-1]

        folder = tmp_path / str(number)
        run_job(job_settings(models, folder, prompts), executor)
        deaths += executors[0].deaths
        assert outputs(folder) == undisturbed
    assert deaths


class Restarting(Inline):
    """One worker, which dies with every task once; nothing has room until the next one has begun."""

    def __init__(self, config):
        super().__init__(config, fail=self.die, workers=1)
        self.tried, self.begins = set(), False

    def die(self, task):
        if (place := (task.stage, task.unit, task.block)) not in self.tried:
            self.tried.add(place)
            raise RuntimeError("the worker ended")

    def free(self, stage):
        return 0 if self.begins else super().free(stage)

    def wait(self, seconds):
        if self.begins:
            self.begins = False
            return []
        outcomes = super().wait(seconds)
        self.begins = any(outcome.error for outcome in outcomes)
        return outcomes


def test_the_last_task_waits_for_a_worker_to_begin(models, prompts, undisturbed, tmp_path):
    assert run_job(job_settings(models, tmp_path / "job", prompts), Restarting).finished
    assert outputs(tmp_path / "job") == undisturbed


def run_in_process(settings, workers):
    torch.set_num_threads(1)
    run_job(settings, processes(workers) if workers else Inline)


def start(settings, workers):
    process = forkserver.Process(target=run_in_process, args=(settings, workers))
    process.start()
    return process


def files_in(folder):
    return sum(len(files) for _, _, files in os.walk(folder))


def kill_at(process, folder, count):
    """Kills a process once there are so many files in a folder, unless it ends before."""
    while process.is_alive() and files_in(folder) < count:
        time.sleep(0.0005)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(("workers", "kills", "jobs"), [(0, 6, 3), (2, 2, 1)])
def test_the_driver_killed_at_any_moment(models, prompts, undisturbed, tmp_path, workers, kills, jobs):
    """One job after another is killed several times, each time after it has gone on for a while."""
    moments, killed = random.Random(3), 0
    for number in range(jobs):
        settings = job_settings(models, tmp_path / str(number), prompts)
        for _ in range(kills):
            process = start(settings, workers)
            done = files_in(settings.outputs_dir)
            code = kill_at(process, settings.outputs_dir, done + moments.randrange(8))
            killed += code == -signal.SIGKILL
        if workers:
            run_job(settings, processes(1))
        else:
            run_inline(settings)
        assert outputs(settings.outputs_dir) == undisturbed
    assert killed > kills * jobs // 2


def test_a_driver_killed_between_finishing_a_unit_and_clearing_it(models, prompts, undisturbed, tmp_path):
    settings = job_settings(models, tmp_path / "job", prompts)
    run_inline(settings)
    for name in ("000002.npy", ".000003.npy.dvtxos_5.tmp"):
        path = settings.outputs_dir / "work/000000" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    run_inline(settings)
    assert outputs(settings.outputs_dir) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_job_that_goes_on(models, prompts, undisturbed, tmp_path, number, monkeypatch, capsys):
    settings = job_settings(models, tmp_path / "job", prompts)
    handler = signal.getsignal(number)

    def executor(config):
        os.kill(os.getpid(), number)
        return Inline(config)

    monkeypatch.setattr("text_to_image.batch.job.local_executor", executor)
    with pytest.raises(SystemExit) as ended:
        batch.run(settings)
    assert ended.value.code == 128 + number and signal.getsignal(number) is handler
    assert "stopped: 0 of 5 prompts are done; the same command goes on" in capsys.readouterr().err
    run_inline(settings)
    assert outputs(tmp_path / "job") == undisturbed


@pytest.mark.parametrize("size", ["16k", "40k"])
def test_a_full_disk(models, prompts, undisturbed, tmp_path, size, capsys):
    with disk(tmp_path / "small", f"size={size}") as mounted:
        if not mounted:
            pytest.skip("no disk can be mounted here")
        settings = job_settings(models, tmp_path / "small/job", prompts)
        with pytest.raises(SystemExit) as ended:
            run(lambda _: run_inline(settings), [])
        told = capsys.readouterr().err
        assert ended.value.code == 2 and told.startswith("error: the disk is full") and told.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,size=4m", tmp_path / "small"], check=True)
        run_inline(settings)
        assert outputs(settings.outputs_dir) == undisturbed


def test_two_drivers_of_one_job(models, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_WAIT", 0.1)
    settings = job_settings(models, tmp_path / "job", prompts)

    def executor(config):
        with pytest.raises(UsageError, match="another process has a job in it"):
            run_inline(settings)
        return Inline(config)

    assert run_job(settings, executor).finished


class Echo:
    """Stages whose results are their items."""

    def __init__(self, *arguments):
        pass

    def run(self, stage, items):
        return [*items]


def echoing_work(connection, config, place, name):
    stages.Stages = Echo
    local.work(connection, config, place, name)


class Echoing(LocalExecutor):
    target = staticmethod(echoing_work)

    def _replace(self, worker):
        raise AssertionError("a worker has ended")


def test_tasks_and_results_larger_than_a_pipe_cross_each_other():
    """The driver and a worker would wait for each other for ever if neither read while it sends."""
    executor = Echoing(None, [Place("cpu", 1)])
    tasks = [Task("score", 0, number, (np.full(2**22, number, np.uint8),)) for number in range(2 * local.AHEAD)]
    received = []

    def work():
        waiting = [*tasks]
        while len(received) < len(tasks):
            while waiting and executor.free("score"):
                executor.submit(waiting.pop(0))
            received.extend(executor.wait(0.5))

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        thread.join(300)
        assert [outcome.task.block for outcome in received] == [0, 1, 2, 3]
        assert all(np.array_equal(outcome.results, outcome.task.items) for outcome in received)
    finally:
        executor.close()


# Settings


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"keep": 2}, "--keep 3, not 2"), ({"num_images": 7}, "--num_images 6, not 7"),
     ({"batch_size": 5}, "--batch_size 4, not 5"), ({"temperature": 0.5}, "--temperature left out, not 0.5"),
     ({"decoder_path": "default"}, "another decoder: "), ({"threads": 2}, "--threads 1, not 2"),
     ({"dtype": "bfloat16"}, "--dtype float32, not bfloat16")],
)  # fmt: skip
def test_another_setting_is_refused_by_name(models, prompts, undisturbed, tmp_path, changed, message):
    run_inline(job_settings(models, tmp_path / "job", prompts), stop=lambda: True)
    if "decoder_path" in changed:
        changed = {"decoder_path": other_decoder(models, tmp_path / "other")}
    with pytest.raises(UsageError, match=message):
        run_inline(job_settings(models, tmp_path / "job", prompts, **changed))
    # What does not decide the outputs may change.
    run_inline(job_settings(models, tmp_path / "job", prompts, num_workers=7, retry_failed=True))
    assert outputs(tmp_path / "job") == undisturbed


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"steps": "many"}, "expected steps as in"), ({"steps": "5000"}, "cannot visit 5000"),
     ({"num_init_img_tokens": 999}, "initial image tokens, got 999")],
)  # fmt: skip
def test_what_the_models_cannot_follow_is_refused_at_the_beginning(models, prompts, tmp_path, wrong, message):
    with pytest.raises(UsageError, match=message):
        run_inline(job_settings(models, tmp_path / "job", prompts, **wrong))
    run_inline(job_settings(models, tmp_path / "job", prompts), stop=lambda: True)  # the folder is as it was


def other_decoder(models, folder):
    decoder = DiffusionDecoder.from_pretrained(models / "decoder")
    next(decoder.unet.parameters()).data += 1
    decoder.save_pretrained(folder)
    decoder.vae.save_pretrained(folder / "vae")
    return str(folder)


def test_another_list_and_another_folder_are_refused(models, prompts, tmp_path):
    run_inline(job_settings(models, tmp_path / "job", prompts), stop=lambda: True)
    other = write_list(tmp_path / "other.txt", ["a blue two"])
    with pytest.raises(UsageError, match="was begun with another list of prompts, as its content has changed"):
        run_inline(job_settings(models, tmp_path / "job", other))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"has other files in it \(thesis\.txt\)"):
        run_inline(job_settings(models, tmp_path / "mine", prompts))


def test_workers_refuse_other_models(models, prompts, tmp_path):
    settings = job_settings(models, tmp_path / "job", prompts, decoder_path=other_decoder(models, tmp_path / "other"))

    def executor(config):
        (tmp_path / "other/model.safetensors").write_bytes((models / "decoder/model.safetensors").read_bytes())
        return processes(1)(config)

    with pytest.raises(UserError, match="a worker opens another decoder than the job began with"):
        run_job(settings, executor)


# Poison


def poison(*names):
    """Fails tasks of some stages that have the prompt "a blue star on wood"."""

    def fail(task):
        if task.stage in names and any("blue star" in item.prompt.text for item in task.items):
            raise RuntimeError("poison")

    return fail


@pytest.mark.parametrize("stage", ["sample", "score", "diffuse", "pack"])
def test_a_poisonous_prompt_is_set_aside(models, prompts, undisturbed, tmp_path, stage):
    settings = job_settings(models, tmp_path / "job", prompts)
    ended = run_inline(settings, fail=poison(stage))
    assert ended.finished and ended.totals.failed == 1 and ended.totals.prompts == 5
    (failure,) = (json.loads(line) for line in (tmp_path / "job/failed.jsonl").read_text().splitlines())
    assert (failure["place"], failure["stage"], failure["reason"]) == ("line 2", stage, "RuntimeError: poison")
    assert {row["number"] for row in manifest(tmp_path / "job")} == {0, 2, 3, 4}
    tries = [entry for entry in JobFolder(tmp_path / "job").read_log() if entry["event"] == "failure"]
    assert "RuntimeError: poison" in tries[0]["traceback"] and len(tries) >= 3
    # Other units are those of an undisturbed run; in any order the bytes are the same.
    assert outputs(tmp_path / "job")["shards/000001.tar"] == undisturbed["shards/000001.tar"]
    run_inline(job_settings(models, tmp_path / "again", prompts), seed=9, fail=poison(stage))
    assert outputs(tmp_path / "again") == outputs(tmp_path / "job")
    # And again without the poison.
    assert run_inline(settings, fail=lambda task: pytest.fail("it is done")).totals.failed == 1
    settings.retry_failed = True
    assert run_inline(settings).totals.failed == 0
    assert outputs(tmp_path / "job") == undisturbed


def test_failures_that_pass_leave_no_trace(models, prompts, undisturbed, tmp_path):
    """A block that failed three times, though no prompt of it does alone, is computed whole again."""
    failed = {}

    def fail(task):
        if len({item.prompt.number for item in task.items}) > 1:
            key = task.stage, task.unit, task.block
            failed[key] = failed.get(key, 0) + 1
            if failed[key] <= driver.TRIES:
                raise RuntimeError("passing")

    ended = run_inline(job_settings(models, tmp_path / "job", prompts), fail=fail)
    assert {stage for stage, _, _ in failed} == {"sample", "score", "diffuse"} and not ended.totals.failed
    assert outputs(tmp_path / "job") == undisturbed


def test_a_block_that_fails_only_as_a_whole(models, prompts, tmp_path):
    """As for want of memory: its prompts alone are taken."""

    def fail(task):
        if len({item.prompt.number for item in task.items}) > 1:
            raise MemoryError

    ended = run_inline(job_settings(models, tmp_path / "job", prompts), fail=fail)
    assert ended.totals.failed == 0 and len(manifest(tmp_path / "job")) == 20


def deadly_work(connection, config, place, name):
    """A worker that dies of a prompt."""
    sample = stages.Stages.sample

    def deadly(self, items):
        if any("blue star" in item.prompt.text for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        return sample(self, items)

    stages.Stages.sample = deadly
    local.work(connection, config, place, name)


class Deadly(LocalExecutor):
    target = staticmethod(deadly_work)


def test_a_prompt_that_kills_its_worker(models, prompts, tmp_path):
    settings = job_settings(models, tmp_path / "job", prompts, diffuse=0)
    ended = run_job(settings, lambda config: Deadly(config, [Place("cpu", 1)] * 2))
    assert ended.totals.failed == 1
    (failure,) = (json.loads(line) for line in (tmp_path / "job/failed.jsonl").read_text().splitlines())
    assert "blue star" in failure["prompt"] and failure["reason"] == \
        "the worker ended: SIGKILL, which the system sends where memory is short"  # fmt: skip
    run_inline(job_settings(models, tmp_path / "raised", prompts, diffuse=0), fail=poison("sample"))
    differ = {name for name, data in outputs(tmp_path / "raised").items() if outputs(tmp_path / "job")[name] != data}
    assert differ == {"failed.jsonl", "parts/000000.jsonl"}  # which have the reason


def test_a_job_in_which_everything_fails_stops(models, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "HOPELESS", 3)

    def fail(task):
        raise RuntimeError("no luck")

    prompts = write_list(tmp_path / "p.txt", [f"a red {word}" for word in ("seven", "star", "heart", "two", "on", "x")])
    with pytest.raises(UserError, match="3 prompts failed and none was drawn, so the job stops: RuntimeError: no luck"):
        run_inline(job_settings(models, tmp_path / "job", prompts, diffuse=0), fail=fail)


# The command, and what is seen of a job


@pytest.fixture
def command(models, tmp_path, monkeypatch):
    """Runs `dalle batch` in this process; returns the exit code."""
    monkeypatch.setattr("text_to_image.batch.job.local_executor", Inline)

    def call(*options, prompts=PROMPTS):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        parts = [f"--{name}_path={models}/{folder}" for name, folder in
                 (("dalle", "dalle"), ("clip", "clip"), ("decoder", "decoder"))]  # fmt: skip
        arguments = ["--prompts", tmp_path / "p.jsonl", *parts, "--num_images", 4, "--keep", 2, "--unit_prompts", 2,
                     "--device", "cpu", "--steps", 1, "--outputs_dir", tmp_path / "job", *options]  # fmt: skip
        try:
            run(batch.main, [*map(str, arguments)])
        except SystemExit as ended:
            return ended.code
        return 0

    return call


def test_the_command(command, tmp_path, capsys):
    import pyarrow.parquet

    assert command("--diffuse", 1, "--report_to", "tensorboard") == 0
    told = capsys.readouterr()
    assert f"{tmp_path}/job: 15 images of 5 prompts in " in told.out and "see manifest.parquet" in told.out
    table = pyarrow.parquet.read_table(tmp_path / "job/manifest.parquet").to_pylist()
    assert table == manifest(tmp_path / "job")
    best = {row["prompt"]: row["score"] for row in table if row["rank"] == 0}
    assert [*best] == PROMPTS
    assert list((tmp_path / "job/tensorboard").glob("events*"))
    assert command("--diffuse", 1) == 0 and command("--diffuse", 2) == 2
    assert "was begun with --diffuse 1, not 2; go on with that" in capsys.readouterr().err


def test_rows_that_are_set_aside_are_told(command, tmp_path, capsys):
    assert command(prompts=[*PROMPTS, "", "a blue two", 7]) == 3
    told = capsys.readouterr().err
    assert "set aside: line 6: empty\n" in told and "set aside: line 7: duplicate of line 5\n" in told
    assert "3 rows of the list were set aside, see " in told and "rejected.jsonl" in told
    assert [row["place"] for row in JobFolder(tmp_path / "job").rejected()] == ["line 6", "line 7", "line 8"]


def test_a_list_without_a_usable_row(command, tmp_path, capsys):
    assert command(prompts=["", 7]) == 2
    assert "has no prompt that can be used: line 1: empty" in capsys.readouterr().err
    assert command() == 0  # with another list the same folder


def test_failures_are_told(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("text_to_image.batch.job.local_executor", lambda config: Inline(config, fail=poison("sample")))
    assert command() == 3
    told = capsys.readouterr().err
    assert "failed: line 2: 'a blue star on wood': RuntimeError: poison" in told
    assert "1 prompts failed and were set aside, see " in told and "--retry_failed tries again" in told
    monkeypatch.setattr("text_to_image.batch.job.local_executor", Inline)
    assert command() == 3 and command("--retry_failed") == 0


def test_without_pyarrow_there_is_a_manifest_too(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert command() == 0
    assert "manifest.parquet needs pyarrow: pip install" in capsys.readouterr().out
    lines = (tmp_path / "job/manifest.jsonl").read_text().splitlines()
    assert [*map(json.loads, lines)] == manifest(tmp_path / "job")
    assert command() == 0 and not (tmp_path / "job/manifest.jsonl").exists()
    assert (tmp_path / "job/manifest.parquet").exists()


def test_status_and_report(command, models, tmp_path, capsys, monkeypatch):
    fail = poison("score")
    monkeypatch.setattr("text_to_image.batch.job.local_executor", lambda config: Inline(config, fail=fail))
    assert command(prompts=[*PROMPTS, "<b>red</b>", ""]) == 3
    (tmp_path / "job/parts/000002.jsonl").unlink()
    capsys.readouterr()
    batch.main(["status", str(tmp_path / "job")])
    table = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert table["state"].startswith("interrupted") and table["prompts"] == "4 of 6" and table["units"] == "2 of 3"
    assert table["candidates"] == "16 of 24" and table["images"] == "6"
    assert command(prompts=[*PROMPTS, "<b>red</b>", ""]) == 3
    batch.main(["report", str(tmp_path / "job")])
    page = (tmp_path / "job/report.html").read_text()
    assert page.count("<rect") > 2 and page.count("data:image/png;base64,") == 2 * 5 and "<polyline" in page
    assert "RuntimeError: poison" in page and "a blue star on wood" in page and "line 7" in page
    assert "&lt;b&gt;red" in page and "<b>" not in page and "http" not in page
    for name in ("status", "report"):
        with pytest.raises(UsageError, match=r"is no job's folder: there is no job\.json"):
            batch.main([name, str(models)])
