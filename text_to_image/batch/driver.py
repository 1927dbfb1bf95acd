"""The driver of a job: which task is next, what is tried again, what is narrowed to a prompt or set aside, what is
committed. Workers are an executor's, see `executor.py`; files are the folder's, see `folder.py`."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dalle_pytorch.errors import UserError
from text_to_image.batch.executor import Executor, Outcome
from text_to_image.batch.folder import Failure, JobFolder, failed_prompt
from text_to_image.batch.settings import BatchSettings
from text_to_image.batch.tasks import (
    Candidate,
    Chosen,
    Draw,
    Drawn,
    Finished,
    Item,
    Prompt,
    Scored,
    Task,
    Unit,
    diffuse_blocks,
    sample_blocks,
)

TRIES = 3  # of a block, then of each of its prompts alone
HOPELESS = 50  # prompts that failed, and none that did not: something else is wrong


class Block:
    """A block of a stage until every item of it has its result, or its prompt is set aside.

    A block that fails `TRIES` times is narrowed: each of its prompts is tried alone. Those that fail are set aside, and
    the block is done without them; if none fails, whole again. So the batch in which an item is computed, and how its
    numbers are rounded, depends on which prompts fail and on nothing else. Only where the whole fails again, though
    each prompt alone does not, as for want of memory, the results of the prompts alone are taken.
    """

    def __init__(self, stage: str, unit: int, number: int, items: Sequence[Item]):
        self.stage, self.unit, self.number, self.items = stage, unit, number, tuple(items)
        self.failures: list[tuple[Prompt, str]] = []
        self.results: list[Any] | None = None
        self.narrowed = self.probed = False  # the results are not those of the whole; prompts were tried alone
        self._tries = 0
        self._alone: dict[int, list[Any] | str | None] = {}  # by number of prompt: results, or why there are none
        self._alone_tries: dict[int, int] = {}

    @property
    def finished(self) -> bool:
        return self.results is not None

    def begin(self) -> list[Task]:
        """The tasks to begin with."""
        self._tries = 0
        return [Task(self.stage, self.unit, self.number, self.items)]

    def succeeded(self, task: Task, results: list[Any]) -> list[Task]:
        """Takes the results of a task; returns what is to do next."""
        if task.probe is None:
            self.results = results
            return []
        self._alone[task.probe] = results
        return self._after_probes()

    def failed(self, task: Task, reason: str) -> list[Task]:
        """Takes note that a task failed; returns what is to do next."""
        if task.probe is None:
            self._tries += 1
            if self._tries < TRIES:
                return [task]
            prompts = {item.prompt.number: item.prompt for item in self.items}
            if len(prompts) == 1:
                return self._without({next(iter(prompts)): reason})
            if self.probed:
                self.narrowed = True
                alone = {number: list(found) for number, found in self._alone.items() if isinstance(found, list)}
                self.results = [alone[item.prompt.number].pop(0) for item in self.items]
                return []
            self._alone = dict.fromkeys(prompts)
            return [self._probe(number) for number in prompts]
        assert task.probe is not None
        self._alone_tries[task.probe] = self._alone_tries.get(task.probe, 0) + 1
        if self._alone_tries[task.probe] < TRIES:
            return [task]
        self._alone[task.probe] = reason
        return self._after_probes()

    def _probe(self, number: int) -> Task:
        items = tuple(item for item in self.items if item.prompt.number == number)
        return Task(self.stage, self.unit, self.number, items, probe=number)

    def _after_probes(self) -> list[Task]:
        if None in self._alone.values():
            return []
        self.probed = True
        return self._without({number: found for number, found in self._alone.items() if isinstance(found, str)})

    def _without(self, reasons: dict[int, str]) -> list[Task]:
        """Sets prompts aside, and begins again with the others."""
        for number, reason in reasons.items():
            prompt = next(item.prompt for item in self.items if item.prompt.number == number)
            self.failures.append((prompt, reason))
        self.narrowed = self.narrowed or bool(reasons)
        self.items = tuple(item for item in self.items if item.prompt.number not in reasons)
        if not self.items:
            self.results = []
            return []
        return self.begin()


@dataclass
class UnitRun:
    """A unit on its way through the stages: sample and score by blocks; then, of what is kept, diffuse and pack."""

    unit: Unit
    settings: BatchSettings
    folder: JobFolder
    blocks: dict[tuple[str, int], Block] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)
    kept: dict[int, list[Candidate]] = field(default_factory=dict)  # the best so far, by number of prompt
    scores: dict[int, list[float]] = field(default_factory=dict)  # of all candidates, likewise
    complete: bool = False

    def begin(self) -> list[Task]:
        """Cuts the unit into blocks. Tokens that an earlier run kept are not sampled again."""
        blocks = sample_blocks(self.unit.prompts, self.settings.batch_size)
        tasks = []
        for block in [self._add("sample", number, items) for number, items in enumerate(blocks)]:
            block.results = self.folder.kept_tokens(self.unit, block.number, block.items)
            tasks += self._after(block) if block.finished else block.begin()
        return tasks

    def take(self, outcome: Outcome) -> list[Task]:
        """Takes the outcome of a task; returns the tasks that are ready then."""
        task = outcome.task
        block = self.blocks[task.stage, task.block]
        if outcome.results is not None:
            tasks = block.succeeded(task, outcome.results)
        else:
            tasks = block.failed(task, outcome.error or "")
        for prompt, reason in block.failures:
            self.failures.setdefault(prompt.number, failed_prompt(prompt, task.stage, reason))
        if not block.finished:
            return tasks
        if task.stage == "sample" and not block.narrowed and block.results:
            self.folder.keep_tokens(self.unit, task.block, block.results)
        return self._after(block)

    def hopeless(self, task: Task) -> bool:
        """Whether all prompts of a task have failed elsewhere meanwhile, so that it need not be run."""
        return all(item.prompt.number in self.failures for item in task.items)

    def drop(self, task: Task) -> list[Task]:
        """Ends a block that is hopeless; returns the tasks that are ready then."""
        block = self.blocks[task.stage, task.block]
        block.items, block.results = (), []
        return self._after(block)

    def packed(self) -> list[Any]:
        """The outputs of its prompts, in order, when it is complete."""
        packs = [block for (stage, _), block in sorted(self.blocks.items()) if stage == "pack"]
        return [result for block in packs for result in block.results or []]

    def all_scores(self) -> list[float]:
        """The scores of all candidates of the prompts that did not fail."""
        return [score for number, scores in self.scores.items() if number not in self.failures for score in scores]

    def _add(self, stage: str, number: int, items: Sequence[Item]) -> Block:
        block = self.blocks[stage, number] = Block(stage, self.unit.number, number, items)
        return block

    def _stage_finished(self, stage: str) -> bool:
        return all(block.finished for (name, _), block in self.blocks.items() if name == stage)

    def _after(self, block: Block) -> list[Task]:
        """The tasks that are ready once a block is finished."""
        if block.stage == "sample":
            pairs = zip(block.items, block.results or [], strict=True)
            items = [Drawn(item.prompt, item.first, tokens) for item, tokens in pairs if isinstance(item, Draw)]
            block.results = []  # they are not needed twice
            return self._begin("score", block.number, items)
        if block.stage == "score":
            for item, scored in zip(block.items, block.results or [], strict=True):
                self._rank(item.prompt, scored)
            block.items, block.results = (), []
            expected = sum(stage == "sample" for stage, _ in self.blocks)
            begun = sum(stage == "score" for stage, _ in self.blocks)
            if begun < expected or not self._stage_finished("score"):
                return []
            return self._choose()
        if block.stage == "diffuse":
            return self._pack() if self._stage_finished("diffuse") else []
        self.complete = self._stage_finished("pack")
        return []

    def _begin(self, stage: str, number: int, items: Sequence[Item]) -> list[Task]:
        block = self._add(stage, number, items)
        if items:
            return block.begin()
        block.results = []
        return self._after(block)

    def _rank(self, prompt: Prompt, scored: Scored) -> None:
        """Adds some candidates to those of a prompt, of which the best are kept, the earlier of equals first."""
        found = [*self.kept.get(prompt.number, []), *scored.best]
        found.sort(key=lambda candidate: (-(candidate.score or 0.0), candidate.index))
        self.kept[prompt.number] = found[: self.settings.keep]
        self.scores.setdefault(prompt.number, []).extend(scored.scores)

    def _choose(self) -> list[Task]:
        """Begins to redraw the best of each prompt."""
        chosen = [Chosen(prompt, rank, candidate) for prompt in self._living()
                  for rank, candidate in enumerate(self.kept[prompt.number][: self.settings.diffuse])]  # fmt: skip
        blocks = diffuse_blocks(chosen, self.settings.diffuse_batch_size, self.settings.clip_guidance)
        added = [self._add("diffuse", number, items) for number, items in enumerate(blocks)]
        return [task for block in added for task in block.begin()] if added else self._pack()

    def _pack(self) -> list[Task]:
        redrawn: dict[int, list[Any]] = {}
        for (stage, _), block in sorted(self.blocks.items()):
            if stage == "diffuse":
                for item, pixels in zip(block.items, block.results or [], strict=True):
                    redrawn.setdefault(item.prompt.number, []).append(pixels)
        tasks = []
        for number, prompt in enumerate(self._living()):
            item = Finished(prompt, self.kept[prompt.number], redrawn.get(prompt.number, []))
            tasks += self._add("pack", number, [item]).begin()
        self.complete = not tasks
        return tasks

    def _living(self) -> list[Prompt]:
        return [prompt for prompt in self.unit.prompts if prompt.number not in self.failures]


@dataclass
class Totals:
    """How far a job is."""

    prompts: int = 0
    candidates: int = 0
    images: int = 0
    failed: int = 0
    units: int = 0

    def add(self, totals: dict[str, Any]) -> None:
        """Adds a finished unit."""
        self.prompts += totals["prompts"]
        self.candidates += totals["candidates"]
        self.images += totals["images"]
        self.failed += len(totals["failed"])
        self.units += 1


Watch = Callable[[Totals, int], object]  # called with what is done, and with the candidates drawn in this run


class Driver:
    """Runs the units of a job that are missing on an executor, and commits them one by one.

    Raises `UserError` where everything fails.
    """

    def __init__(self, folder: JobFolder, settings: BatchSettings, executor: Executor, totals: Totals,
                 watch: Watch | None = None, stop: Callable[[], object] = lambda: False):  # fmt: skip
        self.folder, self.settings, self.executor, self.totals = folder, settings, executor, totals
        self.watch, self.stop = watch, stop
        self.open: dict[int, UnitRun] = {}
        self.ready: list[tuple[tuple[int, int, int], int, Task]] = []  # a heap; the second orders equals
        self.drawn = self.count = self.succeeded = self.failed = 0

    def run(self, units: Iterator[Unit]) -> bool:
        """Whether all is done; False if it was to stop."""
        more = True
        while not self.stop():
            self._submit()  # also what had no room when it came: a worker may have begun since
            more = more and self._fill(units)
            if self.watch is not None:
                self.watch(self.totals, self.drawn)
            if not more and not self.open:
                return True
            for outcome in self.executor.wait(0.5):
                self._take(outcome)
        return False

    def _fill(self, units: Iterator[Unit]) -> bool:
        """Opens units while the executor has room. Whether there may be others."""
        while self.executor.free("sample") > 0 and len(self.open) < 2 * self.executor.workers + 2:
            unit = next(units, None)
            if unit is None:
                return False
            run = self.open[unit.number] = UnitRun(unit, self.settings, self.folder)
            self._add(run, run.begin())
            self._submit()
        return True

    def _add(self, run: UnitRun, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.count += 1
            heapq.heappush(self.ready, (task.order, self.count, task))
        if run.complete:
            self._commit(run)

    def _submit(self) -> None:
        """Starts tasks in order, each stage while it has room."""
        without_room = []
        while self.ready:
            entry = heapq.heappop(self.ready)
            task = entry[2]
            run = self.open[task.unit]
            if task.probe is None and run.hopeless(task):
                self._add(run, run.drop(task))
            elif self.executor.free(task.stage) > 0:
                self.executor.submit(task)
            else:
                without_room.append(entry)
        for entry in without_room:
            heapq.heappush(self.ready, entry)

    def _take(self, outcome: Outcome) -> None:
        task = outcome.task
        run = self.open[task.unit]
        if outcome.error is not None:
            self.folder.log("failure", stage=task.stage, unit=task.unit, block=task.block, reason=outcome.error,
                            worker=outcome.worker, traceback=outcome.traceback)  # fmt: skip
        elif task.stage == "score" and task.probe is None:
            self.drawn += sum(len(item.tokens) for item in task.items if isinstance(item, Drawn))
        before = len(run.failures)
        tasks = run.take(outcome)
        if outcome.results is not None:
            self.succeeded += 1
        self.failed += len(run.failures) - before
        if self.failed >= HOPELESS and not self.succeeded:
            raise UserError(f"{self.failed} prompts failed and none was drawn, so the job stops: {outcome.error}")
        self._add(run, tasks)
        self._submit()

    def _commit(self, run: UnitRun) -> None:
        failures = [run.failures[number] for number in sorted(run.failures)]
        totals = self.folder.commit(run.unit, run.packed(), run.all_scores(), failures)
        del self.open[run.unit.number]
        self.totals.add(totals)
        self.folder.log("unit", **{name: totals[name] for name in ("unit", "prompts", "candidates", "images")},
                        failed=len(failures))  # fmt: skip
