"""Small jobs: settings on tiny models, an executor within this process, and what a job has made."""

import random
from pathlib import Path

from text_to_image.batch.executor import Executor
from text_to_image.batch.job import run_job
from text_to_image.batch.local import LocalExecutor, Place, run_task
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.stages import Stages

PROMPTS = ["a red seven on brick", "a blue star on wood", "a green heart on sand", "a pink two on water", "a blue two"]
UNEQUAL = {"log.jsonl", "report.html", "tensorboard"}  # which say when something was done


def job_settings(models: Path, folder: Path, prompts: Path, **options) -> BatchSettings:
    """A job of two or three blocks a unit, with every stage."""
    defaults = {"num_images": 6, "batch_size": 4, "keep": 3, "diffuse": 1, "diffuse_batch_size": 2, "steps": "1",
                "unit_prompts": 2, "device": "cpu"}  # fmt: skip
    parts = {"dalle_path": f"{models}/dalle", "clip_path": f"{models}/clip", "decoder_path": f"{models}/decoder"}
    return BatchSettings(**{**parts, **defaults, **options}, prompts=str(prompts), outputs_dir=folder)


def write_list(path: Path, prompts=PROMPTS) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def outputs(folder: Path) -> dict[str, bytes]:
    """The files of a job that must be the same however it was run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).parts[0] not in UNEQUAL}  # fmt: skip


class Inline(Executor):
    """Runs tasks in this process, in a random order. `fail(task)` may raise in the place of a worker."""

    def __init__(self, config, seed=0, fail=lambda task: None, workers=3):
        self.stages, self.random, self.fail = Stages(config, "cpu"), random.Random(seed), fail
        self.waiting, self._workers, self.ran = [], workers, []

    @property
    def workers(self):
        return self._workers

    def free(self, stage):
        return self._workers - len(self.waiting)

    def submit(self, task):
        assert self.free(task.stage) > 0
        self.waiting.append(task)

    def wait(self, seconds):
        assert self.waiting, "the driver waits for nothing"
        task = self.waiting.pop(self.random.randrange(len(self.waiting)))
        self.ran.append(task)
        return [run_task(Checked(self.stages, task, self.fail), task, "inline")]

    def close(self):
        self.waiting.clear()


class Checked:
    """The stages, with `fail` before them."""

    def __init__(self, stages, task, fail):
        self.stages, self.task, self.fail = stages, task, fail

    def run(self, stage, items):
        self.fail(self.task)
        return self.stages.run(stage, items)


def run_inline(settings: BatchSettings, seed=0, fail=lambda task: None, **options):
    """Runs a job in this process."""
    return run_job(settings, lambda config: Inline(config, seed, fail), **options)


def processes(count: int):
    """Makes an executor of so many processes."""
    return lambda config: LocalExecutor(config, [Place("cpu", 1)] * count)
