"""A job on clusters of several sizes, on paper: `python benchmarks/cluster.py --help`."""

import heapq
import json
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dalle_pytorch.cli import run
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.settings import Settings, option
from text_to_image.batch.driver import Driver, Totals
from text_to_image.batch.executor import Executor, Outcome
from text_to_image.batch.folder import JobFolder
from text_to_image.batch.local import AHEAD
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import Candidate, Packed, Prompt, Scored, Task, unit_size, units

TOKENS = 256
FILES = {"png": 20_000, "npy": 2_176, "json": 700, "txt": 40}  # bytes of a kept image


@dataclass
class BenchmarkSettings(Settings):
    """The time of a job on several numbers of workers, by the times of stages that benchmarks/batch.py measured.

    python benchmarks/batch.py --count 20
    python benchmarks/cluster.py --measured outputs/batch_benchmark/batch.json

    The driver is the real one, and its processor time counts; workers are on paper. A task takes the time of its items;
    what the measured job cost beyond its stages is the time of `pack`.
    """

    measured: Path = option(Path("outputs/batch_benchmark/batch.json"), "what benchmarks/batch.py wrote")
    count: int = option(2000, "prompts of the job", low=1)
    workers: list = option([1, 2, 4, 8, 16], "numbers of workers", kind=int, nargs="+")
    begin: float = option(15.0, "seconds until a worker has opened its models", low=0)
    overhead: float = option(0.005, "seconds of the driver for a task's way through Ray and back", low=0)


class OnPaper(Executor):
    """Workers that take the given seconds for an item of a stage, by a clock of their own."""

    def __init__(self, workers: int, seconds: dict[str, float], begin: float, overhead: float):
        self.seconds, self.overhead, self.clock = seconds, overhead, 0.0
        self.queues: list[deque[tuple[Task, float]]] = [deque() for _ in range(workers)]  # with when they were given
        self.idle_since = [begin] * workers
        self.ends: list[tuple[float, int]] = []  # of the tasks that run, by worker
        self.returned = time.process_time()

    @property
    def workers(self) -> int:
        return len(self.queues)

    def free(self, stage: str) -> int:
        return sum(AHEAD - len(queue) for queue in self.queues)

    def submit(self, task: Task) -> None:
        self.clock += self.overhead
        number = min(range(self.workers), key=lambda number: len(self.queues[number]))
        self.queues[number].append((task, self.clock))
        if len(self.queues[number]) == 1:
            self._start(number)

    def _start(self, number: int) -> None:
        task, given = self.queues[number][0]
        sizes = {"sample": lambda item: item.count, "score": lambda item: len(item.tokens)}
        amount = sum(sizes.get(task.stage, lambda item: 1)(item) for item in task.items)
        end = max(given, self.idle_since[number]) + amount * self.seconds[task.stage]
        heapq.heappush(self.ends, (end, number))

    def wait(self, seconds: float) -> list[Outcome]:
        self.clock += time.process_time() - self.returned
        end, number = heapq.heappop(self.ends)
        task, _ = self.queues[number].popleft()
        self.clock, self.idle_since[number] = max(self.clock, end), end
        if self.queues[number]:
            self._start(number)
        outcome = Outcome(task, [made_up(task.stage, item) for item in task.items])
        self.returned = time.process_time()
        return [outcome]

    def close(self) -> None:
        self.clock += time.process_time() - self.returned


def made_up(stage: str, item: Any) -> Any:
    """A result of the right kind and size."""
    if stage == "sample":
        return np.zeros((item.count, TOKENS), np.int64)
    if stage == "score":
        scores = [hash((item.prompt.number, item.first + i)) % 1000 / 1000 for i in range(len(item.tokens))]
        pixels = np.zeros((1, 1, 3), np.uint8)
        best = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        return Scored([Candidate(item.first + i, item.tokens[i], pixels, scores[i]) for i in best], scores)
    if stage == "diffuse":
        return np.zeros((1, 1, 3), np.uint8)
    files = {f"shards/{item.prompt.name}-{rank}.{suffix}": bytes(size)
             for rank in range(len(item.kept) + len(item.redrawn)) for suffix, size in FILES.items()}  # fmt: skip
    return Packed(files, [{"score": candidate.score, "upscaled": False, "shard": "shards"} for candidate in item.kept])


def main(argv: list[str] | None = None) -> None:
    settings = BenchmarkSettings.parse(argv)
    found = json.loads(settings.measured.read_text())
    of, stages = found["settings"], {name: times["cpu"] for name, times in found["stages"].items()}
    candidates, redrawn = of["count"] * of["num_images"], max(1, of["count"] * of["diffuse"])
    seconds = {"sample": stages["sample"] / candidates, "score": stages["score"] / candidates,
               "diffuse": stages["diffuse"] / redrawn,
               "pack": max(0.0, found["job"]["cpu"] - sum(stages.values())) / of["count"]}  # fmt: skip
    for stage, unit in (("sample", "candidate"), ("score", "candidate"), ("diffuse", "image"), ("pack", "prompt")):
        print(f"{stage:<8}{1000 * seconds[stage]:8.1f} ms per {unit}")
    prompts = [Prompt(number, str(number), "", f"prompt {number}", 0, of["num_images"], SamplingSettings())
               for number in range(settings.count)]  # fmt: skip
    size = unit_size(None, settings.count, of["num_images"], of["batch_size"], of["keep"] + of["diffuse"])
    alone = settings.count * (of["num_images"] * (seconds["sample"] + seconds["score"])
                              + of["diffuse"] * seconds["diffuse"] + seconds["pack"])  # fmt: skip
    print(f"{settings.count} prompts × {of['num_images']} candidates: {alone:.0f} s of work")
    print("workers       time  speed-up  efficiency")
    for workers in settings.workers:
        with tempfile.TemporaryDirectory() as folder:
            job = BatchSettings(prompts="", outputs_dir=Path(folder), num_images=of["num_images"], keep=of["keep"],
                                diffuse=of["diffuse"], batch_size=of["batch_size"])  # fmt: skip
            executor = OnPaper(workers, seconds, settings.begin, settings.overhead)
            Driver(JobFolder(job.outputs_dir), job, executor, Totals()).run(units(prompts, size))
            executor.close()
        speed_up = alone / executor.clock
        print(f"{workers:<7}{executor.clock:9.0f} s{speed_up:10.2f}{speed_up / workers:12.1%}")


if __name__ == "__main__":
    run(main)
