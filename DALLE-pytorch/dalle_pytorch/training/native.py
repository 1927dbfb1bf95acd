"""The trained networks as native folders, kept up to date beside the checkpoints."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from dalle_pytorch.files.atomic import atomic_write
from dalle_pytorch.training.launch import full_state, is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator


class NativeFolders:
    """Writes the `native_parts` of a task into `output_dir`. To be made before the task is prepared for training.

    Where its parameters will be split over processes, the main process keeps a copy to gather the weights in.
    """

    def __init__(self, task: nn.Module, output_dir: Path, accelerator: Accelerator):
        self.output_dir, self.accelerator = Path(output_dir), accelerator
        self.sharded = is_sharded(accelerator)
        self.task = copy.deepcopy(task) if self.sharded and accelerator.is_main_process else task
        if accelerator.is_main_process:
            for name in self._parts():
                for leftover in self.output_dir.glob(f".{name}.*"):  # of a write that was killed
                    shutil.rmtree(leftover, ignore_errors=True)

    def write(self, model: nn.Module) -> None:
        """Writes each folder, whole or not at all, with the weights that `model` has now. All processes must call it.

        Weights are float16 unless the task has a `native_dtype`.
        """
        if not hasattr(self.task, "native_parts"):
            return
        if self.sharded:
            state = full_state(self.accelerator, model)
            if state is not None:
                self.task.load_state_dict(state)
        if self.accelerator.is_main_process:
            for name, part in self._parts().items():
                with atomic_write(self.output_dir / name) as folder:
                    part.save_pretrained(folder, dtype=getattr(self.task, "native_dtype", torch.float16))
                    if hasattr(self.task, "write_companions"):
                        self.task.write_companions(folder)

    def _parts(self) -> dict:
        return self.task.native_parts() if hasattr(self.task, "native_parts") else {}
