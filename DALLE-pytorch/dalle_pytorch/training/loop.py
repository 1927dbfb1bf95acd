"""The one training loop, on accelerate: every network is trained by it.

What differs between trainings is a task (tasks/base.py): a module that turns a batch into a loss and metrics. The loop
does the rest: order of the data, optimizers, learning rate, EMA, checkpoints and resuming, reports.
"""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dalle_pytorch.data.loading import BatchLoader, Data, describe_skipped
from dalle_pytorch.errors import TrainingDiverged
from dalle_pytorch.training.checkpoint import Checkpoints
from dalle_pytorch.training.ema import EMA
from dalle_pytorch.training.interruption import Interrupted, SignalWatch
from dalle_pytorch.training.launch import make_accelerator
from dalle_pytorch.training.lr_schedule import LRSchedule
from dalle_pytorch.training.native import NativeFolders
from dalle_pytorch.training.optimizers import make_optimizers
from dalle_pytorch.training.profile import describe_operations
from dalle_pytorch.training.reporting import Reporter, mean_metrics
from dalle_pytorch.training.settings import TrainingSettings, total_steps
from dalle_pytorch.training.state import Progress, RunState, random_state, set_random_state
from dalle_pytorch.training.tasks.base import TrainingTask

PROFILED_STEP = 4  # after a start; the first ones set things up

Report = Callable[[int, dict[str, float]], None]
logger = logging.getLogger(__name__)


def train(task: TrainingTask, dataset: Data, settings: TrainingSettings, report: Report | None = None,
          leave: Callable[[Interrupted], object] | None = None) -> TrainingTask:  # fmt: skip
    """Trains `task` on `dataset`, from the newest checkpoint in `settings.output_dir` if there is one.

    Returns the trained task, with the EMA of its weights if `ema_decay` is above 0; its native folders are in
    `output_dir` then. `report(step, metrics)` is called in the main process every `log_every` steps. `leave`, called
    in a thread, is to end the process: a few seconds after a signal while data do not come, or a step does not end.

    A step whose loss or gradient is not finite is skipped in all processes alike, and counts as one of the run's:
    weights, EMA and optimizer stay as they were. (Under DeepSpeed, what the good batches of such a step accumulated
    goes into the next one.) Raises `TrainingDiverged` after `max_bad_steps` of them in a row, `Interrupted` after a
    signal, `CheckpointError` or `UsageError` when it cannot begin.
    """
    with contextlib.ExitStack() as held:
        return _Run(task, dataset, settings, report, held, leave).train()


@dataclass
class _Step:
    """What a step of the optimizer came to."""

    lr: float
    rows: list[dict[str, Tensor | float]] = field(default_factory=list)  # loss and metrics of each batch
    batch: Any = None  # the last one
    bad: bool = False  # the loss or the gradient is not finite
    norm: float | None = math.nan  # of the gradient; None where DeepSpeed does not tell
    signal: int = 0
    epoch: int = 0
    new_epoch: bool = False

    @property
    def applied(self) -> bool:
        return self.norm is None or math.isfinite(self.norm)


class _Run:
    """A training: set up, resumed and carried out."""

    def __init__(self, task: TrainingTask, dataset: Data, settings: TrainingSettings, report: Report | None,
                 held: contextlib.ExitStack, leave: Callable[[Interrupted], object] | None):  # fmt: skip
        self.task, self.settings, self.report = task, settings, report
        self.steps = total_steps(settings, dataset)
        self.lr_schedule = LRSchedule(settings, self.steps)
        self.accelerator = accelerator = make_accelerator(settings, task)
        if self.lr_schedule.kind != settings.lr_decay:
            logger.warning("the length of an epoch of shards is unknown: the learning rate stays constant; "
                           "a cosine needs --steps")  # fmt: skip
        set_seed(settings.seed + accelerator.process_index)
        self.checkpoints = Checkpoints(settings.output_dir, settings.keep_n_checkpoints, accelerator)
        self.checkpoints.lock(held)
        parts = {name: (digest, settings.named(name)) for name, digest in task.fixed_parts().items()}
        self.native = NativeFolders(task, settings.output_dir, accelerator)
        self.model, *self.optimizers = accelerator.prepare(task, *make_optimizers(task, settings, task.shared_rows()))
        self.model.train()
        self.ema = EMA(self.model, settings.ema_decay) if settings.ema_decay else None
        self.state = RunState(accelerator, task, self.model, self.optimizers, self.lr_schedule, self.ema, parts)
        if not settings.resume:
            self.checkpoints.start_anew(settings.overwrite)
        elif newest := self.checkpoints.newest():
            self.state.load(newest)
        self.loader = self._remaining(dataset)
        self.reporter = Reporter(settings, accelerator, self.progress.step) if accelerator.is_main_process else None
        self.last_logged = (self.progress.step, self.progress.samples, time.monotonic())
        self.leave, self.between_steps = leave, True
        self.signals = SignalWatch(self._leave_late if leave else None)

    def _remaining(self, dataset: Data) -> BatchLoader:
        """The batches that are left."""
        accelerator, settings = self.accelerator, self.settings
        batch_size = settings.batch_size * accelerator.num_processes
        first, last = self.progress.samples // batch_size, None
        if self.steps is not None:
            last = first + max(0, self.steps - self.progress.step) * settings.ga_steps
        return BatchLoader(
            dataset, batch_size, first_step=first, last_step=last, seed=settings.seed, rank=accelerator.process_index,
            world_size=accelerator.num_processes, num_workers=settings.num_workers, positions=self.state.positions,
        )  # fmt: skip

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def finished(self) -> bool:
        if self.steps is not None:
            return self.progress.step >= self.steps
        assert self.settings.epochs is not None
        return self.progress.epoch >= self.settings.epochs

    def train(self) -> TrainingTask:
        if self.finished:
            logger.info("this run is finished at step %d; raise --steps or --epochs to continue", self.progress.step)
        profiled_step = self.progress.step + PROFILED_STEP if self.settings.flops_profiler else None
        with self.signals, contextlib.ExitStack() as closing:
            batches = closing.enter_context(contextlib.closing(iter(self.loader)))
            if self.reporter:
                closing.enter_context(contextlib.closing(self.reporter))
            while not self.finished:
                profiled, started = self.progress.step == profiled_step, time.monotonic()
                with FlopCounterMode(display=False) if profiled else contextlib.nullcontext() as counter:
                    step = self._forward_backward(batches)
                if counter:
                    samples = self.settings.batch_size * self.settings.ga_steps
                    logger.info(describe_operations(counter, time.monotonic() - started, samples))
                    return self.task.eval()
                self._update(step)
                self._log(step)
                self._preview(step)
                self._save(step)
        if self.ema:
            self.ema.apply()
        self.native.write(self.model)
        return self.task.eval()

    def _forward_backward(self, batches: Iterator[Any]) -> _Step:
        """Accumulates the gradients of a step, unless the loss of some batch is not finite in some process."""
        accelerator, step = self.accelerator, _Step(self.lr_schedule.rate(self.progress.step))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = step.lr
        for _ in range(self.settings.ga_steps):
            self.between_steps = not step.rows
            with self.signals.waiting():
                batch = next(batches)
            step.batch = send_to_device(batch, accelerator.device)
            with accelerator.accumulate(self.model):
                loss, metrics = self.model(step.batch)
                step.rows.append({"loss": loss.detach(), **metrics})
                step.bad, step.signal, step.epoch = self._agree(step.bad or not torch.isfinite(loss))
                if not step.bad:
                    accelerator.backward(loss)
        return step

    def _agree(self, bad: bool | Tensor) -> tuple[bool, int, int]:
        """Of all processes: whether any loss is bad, the signal that any received, the epochs that all have done."""
        signal, epoch = self.signals.received, self.loader.epoch
        if self.accelerator.num_processes == 1:
            return bool(bad), signal, epoch
        facts = torch.tensor([int(bad), signal, -epoch], device=self.accelerator.device)
        torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
        bad, signal, epoch = facts.tolist()
        return bool(bad), signal, -epoch

    def _update(self, step: _Step) -> None:
        """Clips the gradient and steps the optimizers, if loss and gradient are finite; counts the step.

        A float16 scale is updated once for all optimizers, also where they were not stepped because it was too high.
        (Under DeepSpeed `accelerator.backward` makes the steps, and these do nothing.)
        """
        accelerator, scaler = self.accelerator, self.accelerator.scaler
        if not step.bad:
            norm = accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
            step.norm = None if norm is None else float(norm)
        for optimizer in self.optimizers:
            if step.applied:
                optimizer.step() if scaler is None else scaler.step(optimizer.optimizer)
        if scaler is not None and not step.bad:
            scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.ema and step.applied:
            self.ema.update()
        # A float16 scale that is too high is found out this way; no fault, unless it cannot be lower.
        step.bad |= not step.applied and (scaler is None or scaler.get_scale() < 1)
        step.new_epoch = step.epoch > self.progress.epoch
        samples = self.settings.batch_size * accelerator.num_processes * self.settings.ga_steps
        self.progress.count(samples=samples, epoch=step.epoch, bad=step.bad)
        self.state.positions = self.loader.positions

    def _log(self, step: _Step) -> None:
        settings, number = self.settings, self.progress.step
        logged = number % settings.log_every == 0 or self.finished or step.bad
        metrics: dict[str, float] = {}
        if logged or self.lr_schedule.kind == "plateau":
            metrics = mean_metrics(step.rows, self.accelerator.num_processes)
            self.lr_schedule.observe(number - 1, metrics["loss"])
        if logged and self.reporter:
            metrics |= {} if step.norm is None else {"grad_norm": step.norm}
            metrics |= {"lr": step.lr, **self._speed()}
            self.reporter.log(number, metrics)
            if self.report:
                self.report(number, metrics)
        if step.bad:
            logger.warning("step %d is skipped: its loss or gradient is not finite (loss %g)", number, metrics["loss"])
            if self.progress.bad_steps >= settings.max_bad_steps:
                raise TrainingDiverged(
                    f"the loss or gradient was not finite in {self.progress.bad_steps} steps in a row, up to step "
                    f"{number}; resume with a lower --learning_rate, a longer --warmup_steps or, after --fp16, --bf16"
                )
        if (step.new_epoch or self.finished) and (line := self._skipped()):
            logger.info(f"epoch {step.epoch}: {line}" if step.new_epoch else line)

    def _speed(self) -> dict[str, float]:
        """Seconds per step since the last call, and images per second in all processes together."""
        last, self.last_logged = self.last_logged, (self.progress.step, self.progress.samples, time.monotonic())
        steps, images, seconds = (after - before for after, before in zip(self.last_logged, last, strict=True))
        return {"seconds": seconds / steps, "images_per_second": images / max(seconds, 1e-9)}

    def _skipped(self) -> str:
        """A line about the samples that were skipped since the start, in all processes; empty if there were none."""
        counts = [self.loader.skipped]
        if self.accelerator.num_processes > 1:
            counts = [Counter()] * self.accelerator.num_processes
            torch.distributed.all_gather_object(counts, self.loader.skipped)
        total = sum(counts, Counter())
        example = next(iter(self.loader.examples.values()), None)
        return f"skipped so far: {describe_skipped(total)}" + (f"; {example}" if example else "") if total else ""

    def _preview(self, step: _Step) -> None:
        """Writes the previews of the task. The training goes on as if there had been none."""
        settings, number = self.settings, self.progress.step
        if not self.reporter or not settings.sample_every or (number % settings.sample_every and not self.finished):
            return
        device = self.accelerator.device
        before = random_state(device)
        self.task.eval()
        torch.manual_seed(settings.seed)
        with torch.no_grad(), self._averaged():
            self.reporter.log_previews(number, self.task.preview(step.batch))
        self.task.train()
        set_random_state(before, device)

    def _save(self, step: _Step) -> None:
        """Writes a checkpoint and the native folders when it is time. Raises `Interrupted` after a signal."""
        if step.signal:
            self.signals.ending()
        if self.progress.step % self.settings.save_every == 0 or self.finished or step.signal:
            self.checkpoints.save(self.state)
            if not self.finished:
                with self._averaged():
                    self.native.write(self.model)
        if step.signal and not self.finished:
            raise Interrupted(step.signal, self.progress.step)

    def _leave_late(self, number: int, waiting: bool) -> None:
        """Saves, where the state is that after a step and no other process is needed for it, and leaves."""
        saved = False
        if waiting and self.between_steps and self.progress.step and self.accelerator.num_processes == 1:
            with contextlib.suppress(OSError):  # a full disk; the last checkpoint is still there
                self.checkpoints.save(self.state)
                saved = True
        assert self.leave is not None
        self.leave(Interrupted(number, self.progress.step, saved))

    def _averaged(self) -> contextlib.AbstractContextManager:
        return self.ema.applied() if self.ema else contextlib.nullcontext()
