"""The one training loop, on accelerate: every network is trained by it.

What differs between trainings is a task (task.py): a module that turns a batch into a loss and some figures. The loop
does the rest: order of the data, optimizers, schedule, averaging of the weights, checkpoints and resuming, reports.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dalle_pytorch.data.loading import BatchLoader, describe_skipped
from dalle_pytorch.training.checkpoint import Checkpoints
from dalle_pytorch.training.ema import Average
from dalle_pytorch.training.interruption import Interrupted, SignalWatch
from dalle_pytorch.training.launch import make_accelerator
from dalle_pytorch.training.native import NativeFolders
from dalle_pytorch.training.optimizers import Schedule, make_optimizers
from dalle_pytorch.training.options import TrainingOptions, total_steps
from dalle_pytorch.training.profile import counting_operations
from dalle_pytorch.training.reporting import Rate, Reporter, mean_figures
from dalle_pytorch.training.state import RunState, random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator

PROFILED_STEP = 4  # after a start; the first ones set things up

Report = Callable[[int, dict[str, float]], None]


def train(task: nn.Module, dataset: Dataset, options: TrainingOptions, report: Report | None = None) -> nn.Module:
    """Trains `task` on `dataset`, from the newest checkpoint in `options.output_dir` if there is one.

    Returns the trained task, its weights averaged over the last steps when `ema_decay` is above 0; its native folders
    are in `output_dir` then. `report(step, figures)` is called in the main process every `log_every` steps.

    A step whose loss or gradient is not finite is skipped in all processes alike, and counts as one of the run's: the
    weights, their average and the optimizer stay as they were. (Under DeepSpeed, what the good batches of such a step
    had gathered goes into the next one.) Raises `FloatingPointError` after `max_bad_steps` of them in a row,
    `Interrupted` when a signal has ended the run, `CheckpointError` or `UsageError` when it cannot begin.
    """
    from accelerate.utils import send_to_device, set_seed

    # Everything in its place.
    options.steps = steps = total_steps(options, dataset)
    schedule = Schedule(options, steps)
    accelerator = make_accelerator(options, task)
    main = accelerator.is_main_process
    notice = options.notice if main and options.notice else lambda line: None
    if schedule.kind != options.lr_decay:
        notice("shards do not tell how many steps an epoch has: the learning rate stays flat; a cosine needs --steps")
    set_seed(options.seed + accelerator.process_index)
    native = NativeFolders(task, options.output_dir, accelerator)
    model, *optimizers = accelerator.prepare(task, *make_optimizers(task, options))
    model.train()
    average = Average(model, options.ema_decay) if options.ema_decay else None
    state = RunState(accelerator, task, model, optimizers, schedule, average)

    # The newest checkpoint.
    checkpoints = Checkpoints(options.output_dir, options.keep_n_checkpoints, accelerator)
    if not options.resume:
        checkpoints.start_anew(options.overwrite)
    elif (newest := checkpoints.newest(notice)) and (changed := state.load(newest)):
        notice(changed)
    progress = state.progress
    reporter = Reporter(options, progress.step) if main else None

    # The data, from where it was left.
    batch_size = options.batch_size * accelerator.num_processes
    first_batch = progress.samples // batch_size
    loader = BatchLoader(
        dataset,
        batch_size,
        first_step=first_batch,
        last_step=None if steps is None else first_batch + max(0, steps - progress.step) * options.ga_steps,
        seed=options.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=options.num_workers,
        positions=state.positions,
    )
    batches = iter(loader)

    def finished() -> bool:
        return progress.epoch >= options.epochs if steps is None else progress.step >= steps

    if finished():
        notice(f"this run is finished: step {progress.step} was its last; more --steps or --epochs go on from there")
    started_at, rate = progress.step, Rate(progress)
    previewing = options.sample_every > 0 and hasattr(task, "preview")
    closing = contextlib.closing(reporter) if reporter else contextlib.nullcontext()
    with SignalWatch() as signals, contextlib.closing(batches), closing:
        while not finished():
            # One step: forward and backward over its batches, unless some process finds one of them bad.
            rows, bad, lr = [], False, schedule.rate(progress.step)
            _set_learning_rate(optimizers, lr)
            with counting_operations(options.flops_profiler and progress.step == started_at + PROFILED_STEP) as counted:
                for _ in range(options.ga_steps):
                    batch = send_to_device(next(batches), accelerator.device)
                    with accelerator.accumulate(model):
                        loss, figures = model(batch)
                        rows.append({"loss": loss.detach(), **figures})
                        bad = bad or not torch.isfinite(loss)
                        bad, signal, epoch = _agree(bad, signals.received, loader.epoch, accelerator)
                        if not bad:
                            accelerator.backward(loss)
            if counted:
                notice(counted.describe(options.batch_size * options.ga_steps))
                return task.eval()
            norm = math.nan if bad else _gradient_norm(accelerator, model, options.clip_grad_norm)
            applied = norm is None or math.isfinite(norm)
            _update(accelerator, optimizers, applied, overflown=not applied and not bad)
            if applied and average is not None:
                average.update()
            # A float16 scale that is too high is found out this way; no fault, unless it cannot be lower.
            bad = bad or (not applied and (accelerator.scaler is None or accelerator.scaler.get_scale() < 1))
            new_epoch = epoch > progress.epoch
            progress.count(samples=batch_size * options.ga_steps, epoch=epoch, bad=bad)
            state.positions = loader.positions
            step, last = progress.step, finished()

            # What is to be seen of it.
            logging = step % options.log_every == 0 or last or bad
            if logging or schedule.wants_losses:
                figures = mean_figures(rows, accelerator.num_processes)
                schedule.observe(step - 1, figures["loss"])
            if logging and reporter:
                figures |= {} if norm is None else {"grad_norm": norm}
                figures |= {"lr": lr, **rate.since_last(progress)}
                reporter.figures(step, figures)
                if report:
                    report(step, figures)
            if bad:
                notice(f"step {step} is skipped: its loss or gradient is no finite number (loss {figures['loss']:g})")
                if progress.bad_steps >= options.max_bad_steps:
                    raise FloatingPointError(
                        f"the loss or gradient was no finite number in {progress.bad_steps} steps in a row, up to step "
                        f"{step}; go on with a lower --learning_rate, a longer --warmup_steps or, after --fp16, --bf16"
                    )
            if (new_epoch or last) and (line := _skipped(loader, accelerator)):
                notice(f"epoch {epoch}: {line}" if new_epoch else line)
            if reporter and previewing and (step % options.sample_every == 0 or last):
                _preview(task, batch, average, options, accelerator.device, reporter, step)

            # What is kept of it.
            if step % options.save_every == 0 or last or signal:
                checkpoints.save(state)
                if not last:
                    with average.applied() if average else contextlib.nullcontext():
                        native.write(model)
            if signal and not last:
                raise Interrupted(signal, step)

    if average is not None:
        average.apply()
    native.write(model)
    return task.eval()


def _agree(bad: bool | Tensor, signal: int, epoch: int, accelerator: Accelerator) -> tuple[bool, int, int]:
    """What all processes go by: whether any loss is bad, the signal any has received, and the epochs all have done."""
    if accelerator.num_processes == 1:
        return bool(bad), signal, epoch
    facts = torch.tensor([int(bad), signal, -epoch], device=accelerator.device)
    torch.distributed.all_reduce(facts, torch.distributed.ReduceOp.MAX)
    bad, signal, epoch = facts.tolist()
    return bool(bad), signal, -epoch


def _set_learning_rate(optimizers: Sequence[Any], rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def _gradient_norm(accelerator: Accelerator, model: nn.Module, limit: float) -> float | None:
    """The norm of the whole gradient, which is then cut down to `limit`; None where DeepSpeed does not tell."""
    norm = accelerator.clip_grad_norm_(model.parameters(), limit)
    return None if norm is None else float(norm)


def _update(accelerator: Accelerator, optimizers: Sequence[Any], applied: bool, overflown: bool) -> None:
    """Steps the optimizers if the gradient is to be `applied`, and forgets it.

    A float16 scale follows once for all optimizers, also where they were not stepped because it was too high. (Under
    DeepSpeed the steps are made in `accelerator.backward`, and these do nothing.)
    """
    scaler = accelerator.scaler
    for optimizer in optimizers:
        if applied:
            optimizer.step() if scaler is None else scaler.step(optimizer.optimizer)
    if scaler is not None and (applied or overflown):
        scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _skipped(loader: BatchLoader, accelerator: Accelerator) -> str:
    """A line about the samples that were skipped since the start, in all processes; empty if there were none."""
    counts = [loader.skipped]
    if accelerator.num_processes > 1:
        counts = [Counter()] * accelerator.num_processes
        torch.distributed.all_gather_object(counts, loader.skipped)
    total = sum(counts, Counter())
    example = next(iter(loader.examples.values()), None)
    return f"skipped so far: {describe_skipped(total)}" + (f"; {example}" if example else "") if total else ""


def _preview(task: nn.Module, batch: Any, average: Average | None, options: TrainingOptions, device: torch.device,
             reporter: Reporter, step: int) -> None:  # fmt: skip
    """Writes the task's pictures. The training goes on as if there had been none."""
    before = random_state(device)
    task.eval()
    torch.manual_seed(options.seed)
    with torch.no_grad(), average.applied() if average else contextlib.nullcontext():
        reporter.previews(step, task.preview(batch))
    task.train()
    set_random_state(before, device)
