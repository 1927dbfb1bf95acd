"""What the training tasks share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.tokenizers.base import Tokenizer

Batch = dict[str, Any]
Loss = tuple[Tensor, Mapping[str, Tensor | float]]
Preview = Mapping[str, Tensor | str]
TOKENIZER_NAME = "tokenizer.json"


class SharedRows(NamedTuple):
    """The last n rows of a trained matrix, and features (n, k) of these rows: those of like features learn together."""

    weight: Tensor
    features: Tensor


class TrainingTask(nn.Module, ABC):
    """Turns batches into a loss. `forward` is all that a task must have."""

    native_dtype: torch.dtype = torch.float16  # in which the native folders are written
    replicated: bool = False  # whether every process needs the whole network, unsharded
    find_unused_parameters: bool = False  # whether some steps leave parameters without a gradient (DDP)

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """The loss, a scalar, and metrics to log, under the same names in every process. Whatever needs gradients
        happens in here."""

    def native_parts(self) -> dict[str, PretrainedModel]:
        """The trained networks, by the names of their folders in `output_dir`."""
        return {}

    def fixed_parts(self) -> dict[str, str]:
        """Fingerprints of what the training uses and does not train, by name; it is resumed with the same only."""
        return {}

    def frozen_parts(self) -> list[nn.Module]:
        """The networks within the task that are not trained, and stay in evaluation mode."""
        return []

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def compiled_parts(self) -> list[nn.Module]:
        """The networks whose calls `torch.compile` is worth its time for."""
        return []

    def shared_rows(self) -> list[SharedRows]:
        """What the optimizer moves together."""
        return []

    def write_companions(self, folder: Path) -> None:
        """Writes into a native folder what belongs beside the weights, such as a tokenizer."""

    def preview(self, batch: Batch) -> Preview:
        """Images (n, 3, h, w) in [0, 1] or texts that show the state of the training. Runs in one process alone."""
        return {}


class LongCaption:
    """Why a caption is skipped: it has more than `length` tokens. None for one that has not."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, caption: str) -> str | None:
        # No token has a thousand characters; encoding a text of megabytes takes seconds.
        too_long = len(caption) > 1000 * self.length or len(self.tokenizer.encode(caption)) > self.length
        return f"caption of more than {self.length} tokens" if too_long else None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` into a model's folder, so that it travels with the weights.

    An encoding that such a file cannot hold is left out: CLIP's, which is the default where there is no file.
    """
    try:
        tokenizer.save(folder / TOKENIZER_NAME)
    except ValueError:
        (folder / TOKENIZER_NAME).unlink(missing_ok=True)  # of an earlier training
