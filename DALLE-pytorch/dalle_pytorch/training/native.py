"""The trained networks as native folders, kept up to date beside the checkpoints."""

import copy
import json
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.files.atomic import clear_leftovers, restore
from dalle_pytorch.pretrained import CONFIG_NAME, WEIGHTS_NAME
from dalle_pytorch.training.launch import full_state, is_sharded
from dalle_pytorch.training.settings import check_part_name
from dalle_pytorch.training.tasks.base import TrainingTask


class NativeFolders:
    """Writes the `native_parts` of a task into `output_dir`. To be made before the task is prepared for training.

    Files are replaced one by one, the weights at once, and those of others in the folder stay. Where the parameters
    will be sharded over processes, the main process keeps a copy of the task to gather the weights in.

    Raises `UsageError` for a folder that no training of the same class has written.
    """

    def __init__(self, task: TrainingTask, output_dir: Path, accelerator: Accelerator):
        self.output_dir, self.accelerator = Path(output_dir), accelerator
        self.sharded = is_sharded(accelerator)
        self.task = copy.deepcopy(task) if self.sharded and accelerator.is_main_process else task
        for name, part in task.native_parts().items():
            folder = self.output_dir / check_part_name(name)
            if accelerator.is_main_process:
                restore(folder)
            if not _is_ours(folder, type(part).__name__):
                raise UsageError(f"{folder} is there and is no {type(part).__name__} that a training wrote; move it "
                                 "away, or choose another name or --output_dir")  # fmt: skip
            if accelerator.is_main_process:
                for place in (self.output_dir, folder, *(path for path in folder.glob("*") if path.is_dir())):
                    clear_leftovers(place)

    def write(self, model: nn.Module) -> None:
        """Writes the current weights of `model` into each folder. All processes must call it."""
        if self.sharded and (state := full_state(self.accelerator, model)) is not None:
            self.task.load_state_dict(state)
        if self.accelerator.is_main_process:
            for name, part in self.task.native_parts().items():
                (self.output_dir / name).mkdir(parents=True, exist_ok=True)
                self.task.write_companions(self.output_dir / name)
                part.save_pretrained(self.output_dir / name, dtype=self.task.native_dtype)


def _is_ours(folder: Path, class_name: str) -> bool:
    """Whether it may be written: not there, empty, of that class, or the beginning of one that was killed."""
    if not folder.exists():
        return True
    try:
        return json.loads((folder / CONFIG_NAME).read_text("utf-8"))["class"] == class_name
    except FileNotFoundError:
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        return names <= {WEIGHTS_NAME, "tokenizer.json", "diffusion.json", "vae"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
