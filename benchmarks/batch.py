"""What a job costs beyond its sampling, scoring and diffusing: `python benchmarks/batch.py --help`."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from dalle_pytorch import scenes as glyphs
from dalle_pytorch.cli import run
from dalle_pytorch.files.atomic import write_text
from dalle_pytorch.settings import Settings, option
from text_to_image.batch.driver import UnitRun
from text_to_image.batch.executor import Outcome, WorkerConfig
from text_to_image.batch.folder import JobFolder
from text_to_image.batch.job import prepare, run_job
from text_to_image.batch.local import LocalExecutor, Place
from text_to_image.batch.prompts import list_files
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.stages import Stages

STAGES = ("sample", "score", "diffuse")


@dataclass
class BenchmarkSettings(Settings):
    """The time of a job of test captions, against that of its sampling, scoring and diffusing alone.

    python benchmarks/batch.py --count 200 --num_images 16

    Alone means: the same blocks one after the other in this process, of one thread, with nothing written. The job runs
    on one worker, after its models are opened, and writes shards and a manifest. Prints seconds of processor time,
    and of the clock, which say something on an idle machine only; writes them to `batch.json`.
    """

    count: int = option(200, "captions", low=1)
    num_images: int = option(16, "candidates of each", low=1)
    keep: int = option(4, "of them kept", low=1)
    diffuse: int = option(1, "of them redrawn", low=0)
    batch_size: int = option(32, "candidates sampled at once", low=1)
    steps: str = option("quad25", "diffusion steps")
    workers: int = option(1, "processes of the job", low=1)
    output_dir: Path = option(Path("outputs/batch_benchmark"), "where the job's folders go, which must be new")


@dataclass
class Times:
    """Seconds of processor time and of the clock."""

    cpu: float
    clock: float


def measured(work: Callable[[], Any]) -> Times:
    """The time that some work takes in this process."""
    cpu, clock = time.process_time(), time.monotonic()
    work()
    return Times(time.process_time() - cpu, time.monotonic() - clock)


def alone(settings: BatchSettings) -> dict[str, Times]:
    """The time of each stage of all units, run here."""
    folder = JobFolder(settings.outputs_dir)
    folder.path.mkdir(parents=True)
    job, config = prepare(folder, settings, list_files(settings.prompts))
    stages, spent = Stages(config, "cpu"), {name: Times(0, 0) for name in STAGES}
    for unit in folder.units(job):
        unit_run = UnitRun(unit, settings, folder)
        waiting = unit_run.begin()
        while waiting:
            task = waiting.pop()
            if task.stage == "pack":
                break
            results: list[Any] = []
            took = measured(lambda task=task, results=results: results.extend(stages.run(task.stage, task.items)))
            total = spent[task.stage]
            spent[task.stage] = Times(total.cpu + took.cpu, total.clock + took.clock)
            waiting += unit_run.take(Outcome(task, results))
    return spent


class Measured(LocalExecutor):
    """Notes the processor time of its workers once their models are open, and at the end."""

    def __init__(self, config: WorkerConfig, workers: int):
        super().__init__(config, [Place("cpu", 1)] * workers)
        while not all(worker.ready for worker in self.running):
            self.wait(0.5)
        self.begun, self.cpu = self._cpu(), 0.0
        self.driver, self.clock = time.process_time(), time.monotonic()

    def _cpu(self) -> float:
        times = [psutil.Process(worker.process.pid).cpu_times() for worker in self.running]
        return sum(used.user + used.system for used in times)

    def close(self) -> None:
        self.cpu = self._cpu() - self.begun
        super().close()


def as_a_job(settings: BatchSettings, workers: int) -> Times:
    """The time of a job from the first task to the manifest."""
    made: list[Measured] = []

    def executor(config: WorkerConfig) -> Measured:
        made.append(Measured(config, workers))
        return made[0]

    run_job(settings, executor)
    driver = time.process_time() - made[0].driver
    return Times(made[0].cpu + driver, time.monotonic() - made[0].clock)


def main(argv: list[str] | None = None) -> None:
    settings = BenchmarkSettings.parse(argv)
    torch.set_num_threads(1)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    captions = [glyphs.make_scene(index, "test").caption for index in range(settings.count)]
    prompts = settings.output_dir / "prompts.jsonl"
    write_text(prompts, "".join(json.dumps({"key": str(n), "prompt": text}) + "\n" for n, text in enumerate(captions)))

    def job(name: str) -> BatchSettings:
        return BatchSettings(
            prompts=str(prompts), outputs_dir=settings.output_dir / name, num_images=settings.num_images,
            keep=settings.keep, diffuse=settings.diffuse, batch_size=settings.batch_size, steps=settings.steps,
            device="cpu",
        )  # fmt: skip

    stages = alone(job(f"alone-{os.getpid()}"))
    whole = as_a_job(job(f"job-{os.getpid()}"), settings.workers)
    total = Counter[str]()
    for times in stages.values():
        total.update(asdict(times))
    print(f"{settings.count} captions × {settings.num_images} candidates, {settings.workers} workers")
    for name, times in (*stages.items(), ("alone", Times(**total)), ("job", whole)):
        print(f"{name:<10} {times.cpu:9.1f} s of processor time {times.clock:9.1f} s")
    print(f"{'ratio':<10} {whole.cpu / total['cpu']:9.3f}   {'':17} {whole.clock / total['clock']:9.3f}")
    found = {"settings": settings.as_dict(), "stages": {name: asdict(times) for name, times in stages.items()},
             "job": asdict(whole), "cpu_ratio": whole.cpu / total["cpu"]}  # fmt: skip
    write_text(settings.output_dir / "batch.json", json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
