"""What a training of one network has to say for itself; the rest is the loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_pytorch.checkpoints import PretrainedModel


class Task(Protocol):
    """An `nn.Module` that turns batches into a loss. `forward` is all that it must have.

    Optional, besides the methods below: `native_dtype`, in which the native folders are written (float16 unless said).
    """

    native_dtype: torch.dtype

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, a scalar, and figures to log, under the same names in every process. Whatever needs gradients
        happens in here."""

    def native_parts(self) -> dict[str, PretrainedModel]:
        """The trained networks, by the names of the folders in `output_dir` that they are kept in."""

    def write_companions(self, folder: Path) -> None:
        """Writes into a native folder what belongs beside the weights, such as a tokenizer."""

    def preview(self, batch: dict[str, Any]) -> dict[str, Tensor | str]:
        """Pictures (n, 3, h, w) in [0, 1] or texts that show how far the training is. Runs in one process alone."""
