"""The trained networks as native folders, kept up to date beside the checkpoints."""

import copy
import shutil
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dalle_pytorch.files.atomic import atomic_write
from dalle_pytorch.training.launch import full_state, is_sharded
from dalle_pytorch.training.tasks.base import TrainingTask


class NativeFolders:
    """Writes the `native_parts` of a task into `output_dir`. To be made before the task is prepared for training.

    Where its parameters will be sharded over processes, the main process keeps a copy to gather the weights in.
    """

    def __init__(self, task: TrainingTask, output_dir: Path, accelerator: Accelerator):
        self.output_dir, self.accelerator = Path(output_dir), accelerator
        self.sharded = is_sharded(accelerator)
        self.task = copy.deepcopy(task) if self.sharded and accelerator.is_main_process else task
        if accelerator.is_main_process:
            for name in self.task.native_parts():
                for leftover in self.output_dir.glob(f".{name}.*"):  # of a write that was killed
                    shutil.rmtree(leftover, ignore_errors=True)

    def write(self, model: nn.Module) -> None:
        """Writes each folder, whole or not at all, with the current weights of `model`. All processes must call it."""
        if self.sharded and (state := full_state(self.accelerator, model)) is not None:
            self.task.load_state_dict(state)
        if self.accelerator.is_main_process:
            for name, part in self.task.native_parts().items():
                with atomic_write(self.output_dir / name) as folder:
                    part.save_pretrained(folder, dtype=self.task.native_dtype)
                    self.task.write_companions(folder)
