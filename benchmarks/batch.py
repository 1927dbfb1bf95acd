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
from text_to_image.batch.executor import Executor, Outcome, WorkerConfig
from text_to_image.batch.folder import JobFolder
from text_to_image.batch.job import prepare, run_job
from text_to_image.batch.local import AHEAD, LocalExecutor, Place
from text_to_image.batch.prompts import list_files
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.stages import Stages

STAGES = ("sample", "score", "diffuse")


@dataclass
class BenchmarkSettings(Settings):
    """The time of a job of test captions, against that of its sampling, scoring and diffusing alone.

    python benchmarks/batch.py --count 200 --num_images 16
    ray start --head --num-cpus 1 && python benchmarks/batch.py --ray auto && ray stop

    Alone means: the same blocks one after the other in this process, of one thread, with nothing written. The job runs
    on one worker, after its models are opened, and writes shards and a manifest. Prints seconds of processor time,
    and of the clock, which say something on an idle machine only; writes them to `batch.json`.
    """

    count: int = option(200, "captions", low=1)
    num_images: int = option(16, "candidates of each", low=1)
    keep: int = option(4, "of them kept", low=1)
    diffuse: int = option(1, "of them redrawn", low=0)
    batch_size: int = option(32, "candidates sampled at once", low=1)
    steps: str | None = option(None, "diffusion steps (default: the model's own)")
    workers: int = option(1, "processes of the job", low=1)
    ray: str | None = option(None, "measure the job on this Ray cluster too, auto or HOST:PORT")
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


class Measured(Executor):
    """Notes the time of an executor, from when its workers have opened their models to its end."""

    took: Times

    def processes(self) -> list[psutil.Process]:
        """Those that the job runs on beside this one."""
        raise NotImplementedError

    def begin(self) -> None:
        self.begun, self.started = self._cpu(), time.monotonic()

    def _cpu(self) -> float:
        times = [process.cpu_times() for process in self.processes()]
        return sum(used.user + used.system for used in times) + time.process_time()

    def close(self) -> None:
        self.took = Times(self._cpu() - self.begun, time.monotonic() - self.started)
        super().close()


class MeasuredLocal(Measured, LocalExecutor):
    def __init__(self, config: WorkerConfig, workers: int):
        super().__init__(config, [Place("cpu", 1)] * workers)
        while not all(worker.ready for worker in self.running):
            self.wait(0.5)
        self.begin()

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(worker.process.pid) for worker in self.running]


def on_ray(config: WorkerConfig) -> Measured:
    """Workers on the Ray cluster that this process is connected to; all of Ray's processes on this machine count."""
    from text_to_image.batch.ray_executor import RayExecutor

    class MeasuredRay(Measured, RayExecutor):
        def __init__(self) -> None:
            super().__init__(config, "cpu")
            while self.free("sample") < AHEAD * self.workers:
                self.wait(0.5)
            self.begin()

        def processes(self) -> list[psutil.Process]:
            parts = ("ray::", "raylet", "gcs_server")
            return [process for process in psutil.process_iter(["cmdline"])
                    if any(part in " ".join(process.info["cmdline"] or ())[:200] for part in parts)]  # fmt: skip

    return MeasuredRay()


def as_a_job(settings: BatchSettings, workers: int) -> Times:
    """The time of a job from the first task to the manifest."""
    made: list[Measured] = []

    def executor(config: WorkerConfig) -> Measured:
        made.append(on_ray(config) if settings.ray else MeasuredLocal(config, workers))
        return made[0]

    run_job(settings, executor)
    return made[0].took


def main(argv: list[str] | None = None) -> None:
    settings = BenchmarkSettings.parse(argv)
    torch.set_num_threads(1)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    captions = [glyphs.make_scene(index, "test").caption for index in range(settings.count)]
    prompts = settings.output_dir / "prompts.jsonl"
    write_text(prompts, "".join(json.dumps({"key": str(n), "prompt": text}) + "\n" for n, text in enumerate(captions)))

    def job(name: str, **options: Any) -> BatchSettings:
        return BatchSettings(
            prompts=str(prompts), outputs_dir=settings.output_dir / name, num_images=settings.num_images,
            keep=settings.keep, diffuse=settings.diffuse, batch_size=settings.batch_size, steps=settings.steps,
            device="cpu", **options,
        )  # fmt: skip

    stages = alone(job(f"alone-{os.getpid()}"))
    whole = as_a_job(job(f"job-{os.getpid()}"), settings.workers)
    ray = {"ray": settings.ray, "num_workers": settings.workers}
    jobs = {"job": whole} | ({"on Ray": as_a_job(job(f"ray-{os.getpid()}", **ray), 0)} if settings.ray else {})
    total = Counter[str]()
    for times in stages.values():
        total.update(asdict(times))
    print(f"{settings.count} captions × {settings.num_images} candidates, {settings.workers} workers")
    for name, times in (*stages.items(), ("alone", Times(**total)), *jobs.items()):
        print(f"{name:<10} {times.cpu:9.1f} s of processor time {times.clock:9.1f} s")
    for name, times in jobs.items():
        print(f"{f'{name} / alone':<16} {times.cpu / total['cpu']:.3f} of processor time, of the clock "
              f"{times.clock / total['clock']:.3f}")  # fmt: skip
    found = {"settings": settings.as_dict(), "stages": {name: asdict(times) for name, times in stages.items()},
             **{name: asdict(times) for name, times in jobs.items()},
             "cpu_ratio": whole.cpu / total["cpu"]}  # fmt: skip
    write_text(settings.output_dir / "batch.json", json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
