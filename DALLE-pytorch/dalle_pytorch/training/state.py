"""All that a resumed run needs to continue as if it had never stopped, in and out of a checkpoint's folder.

Whole models are kept in one file by the main process; FSDP and DeepSpeed write theirs themselves (launch.py). Each
process keeps its random state and its place in the data in a file of its own. Reading never runs anything that a file
holds, which is why accelerate's `load_state` is not used: it unpickles what is registered with it.
"""

import logging
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.training.ema import EMA
from dalle_pytorch.training.launch import is_apart, is_sharded, load_sharded, save_file, save_sharded
from dalle_pytorch.training.lr_schedule import LRSchedule

STATE_NAME = "state.pt"

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps of the optimizer done, skipped ones among them
    samples: int = 0  # taken by them, in all processes together
    epoch: int = 0  # times the data was gone through
    bad_steps: int = 0  # how many of the last steps, in a row, were skipped

    def count(self, samples: int, epoch: int, bad: bool) -> None:
        """Counts one more step."""
        self.step, self.samples, self.epoch = self.step + 1, self.samples + samples, epoch
        self.bad_steps = self.bad_steps + 1 if bad else 0


@dataclass
class RunState:
    """The parts of a run that have a state. `model` is `task` as accelerate prepared it; `positions` is the place of
    this process in the data, if they are a stream. `parts` are fingerprints of what is used and not trained, each with
    the options that named it."""

    accelerator: Accelerator
    task: nn.Module
    model: nn.Module
    optimizers: list[Any]
    lr_schedule: LRSchedule
    ema: EMA | None
    parts: dict[str, tuple[str, str]] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    positions: dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Writes all of it into `folder`, which every process sees. All processes must call it."""
        accelerator, ema = self.accelerator, self.ema.state_dict() if self.ema else None
        apart = is_apart(accelerator)
        if apart:
            save_sharded(accelerator, self.model, self.optimizers, folder)
        if accelerator.is_main_process:
            state = {"progress": asdict(self.progress), "processes": accelerator.num_processes,
                     "schedule": self.lr_schedule.state_dict(), "averaged": ema is not None, "parts": self.parts,
                     "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None}  # fmt: skip
            if not apart:
                state["model"] = self.task.state_dict()
                state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            if not is_sharded(accelerator):
                state["average"] = ema
            save_file(state, folder / STATE_NAME)
        own = {"random": random_state(accelerator.device), "positions": self.positions}
        if is_sharded(accelerator):
            own["average"] = ema
        save_file(own, folder / _process_name(accelerator.process_index))

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote; all processes must call it.

        Raises `CheckpointError` if it is of another training.
        """
        try:
            self._load(folder)
        except Exception as error:  # torch, accelerate and DeepSpeed raise a dozen kinds
            # torch begins with a heading, and tells what does not fit below it.
            lines = [line.strip() for line in str(error).splitlines() if not line.endswith(":")]
            reason = next(filter(None, lines), type(error).__name__)
            message = f"{folder} does not continue this training ({reason}); move it away to start anew"
            raise CheckpointError(message) from error

    def _load(self, folder: Path) -> None:
        accelerator = self.accelerator
        state = _read(folder / STATE_NAME)
        for name, (recorded, options) in state.get("parts", {}).items():  # earlier versions recorded none
            given, named = self.parts.get(name, (recorded, ""))
            if given != recorded:
                options, named = options or "the default", named or "the default"
                raise CheckpointError(f"it was trained with another {name}: {recorded[:8]} of {options}, not "
                                      f"{given[:8]} of {named}")  # fmt: skip
        if state["averaged"] != (self.ema is not None):
            raise CheckpointError(f"it was made {'with' if state['averaged'] else 'without'} --ema_decay")
        if (state["scaler"] is not None) != (accelerator.scaler is not None):
            raise CheckpointError("it was made in another --mixed_precision")
        if ("model" not in state) != is_apart(accelerator):
            raise CheckpointError("its weights were sharded over processes in another way")
        if is_apart(accelerator):
            load_sharded(accelerator, self.model, self.optimizers, folder)
        else:
            self.task.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        self.lr_schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])

        same = state["processes"] == accelerator.num_processes
        own = _read(folder / _process_name(accelerator.process_index if same else 0))
        self.positions = own["positions"]
        if self.ema is not None:
            self.ema.load_state_dict(own["average"] if is_sharded(accelerator) else state["average"])
        if same:
            set_random_state(own["random"], accelerator.device)
            return
        # The seeds of this start, moved on: those of step 0 have been used.
        torch.manual_seed(torch.initial_seed() + self.progress.step)
        logger.info("resuming in %d processes what %d began: new random numbers", accelerator.num_processes,
                    state["processes"])  # fmt: skip


def _process_name(index: int) -> str:
    return f"process-{index:05}.pt"


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every source of random numbers in this process."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)
    name, keys, *rest = numpy_state
    return {"torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}  # fmt: skip


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores a `random_state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
