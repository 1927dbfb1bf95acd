"""A training, and what comes before it, under a progress bar."""

import contextlib
import logging
import math
import os
import sys
import time

import psutil
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dalle_pytorch.data.loading import Data
from dalle_pytorch.data.token_cache import TokenCache, cache_tokens
from dalle_pytorch.devices import pick_device
from dalle_pytorch.training import loop
from dalle_pytorch.training.interruption import Interrupted
from dalle_pytorch.training.settings import TrainingSettings, total_steps
from dalle_pytorch.training.tasks.base import TrainingTask
from dalle_pytorch.vae.base import ImageTokenizer

NOT_SHOWN = ("seconds", "grad_norm")  # metrics that the bar has no room for


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun, accelerate or deepspeed started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def run_training(name: str, task: TrainingTask, dataset: Data, settings: TrainingSettings) -> None:
    """Trains under a progress bar that shows loss and metrics, and log messages above it, in the main process.

    After a signal the state is saved; one line says so, and the exit code is a shell's for that signal.
    """
    steps = total_steps(settings, dataset)
    # A training that cannot begin leaves no bar behind, only the error.
    bar = tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=5, leave=False,
               disable=not is_main_process())  # fmt: skip
    resumed = True

    def report(step: int, metrics: dict[str, float]) -> None:
        nonlocal resumed
        if resumed:
            # Steps of an earlier run, and the first ones of this, say nothing of the rate.
            bar.initial = bar.n = bar.last_print_n = step
            bar.start_t = bar.last_print_t = time.time()
            bar.leave, resumed = True, False
        shown = {key: f"{value:.4g}" for key, value in metrics.items() if key not in NOT_SHOWN and math.isfinite(value)}
        bar.set_postfix(shown, refresh=False)
        bar.update(step - bar.n)

    def leave(interruption: Interrupted) -> None:
        bar.close()
        if is_main_process():
            print(interruption, file=sys.stderr, flush=True)
        # Workers and commands that read may be in a read that does not end, and would be waited for.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        os._exit(interruption.exit_code)

    logger = logging.getLogger("dalle_pytorch")
    level = logger.level
    logger.setLevel(logging.INFO if is_main_process() else logging.CRITICAL)
    with bar, logging_redirect_tqdm([logger]):
        try:
            loop.train(task, dataset, settings, report, leave)
        except Interrupted as interruption:
            bar.close()
            if is_main_process():
                print(interruption, file=sys.stderr)
            sys.exit(interruption.exit_code)
        finally:
            logger.setLevel(level)


def token_cache(folder: str, dataset: Data, vae: ImageTokenizer, settings: TrainingSettings) -> TokenCache:
    """The image tokens of `dataset` kept in `folder`, computed first where they are missing."""
    rank, local_rank, processes = (int(os.environ.get(name, default)) for name, default in
                                   (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))  # fmt: skip
    vae.to(pick_device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"))
    with tqdm(desc="image tokens", unit="image", dynamic_ncols=True, disable=rank != 0) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return cache_tokens(folder, dataset, vae, batch_size=settings.batch_size, num_workers=settings.num_workers,
                            rank=rank, world_size=processes, progress=progress)  # fmt: skip
