"""What the training tasks share."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dalle_pytorch.pretrained import PretrainedModel
from dalle_pytorch.tokenizers.base import Tokenizer

Batch = dict[str, Any]
Loss = tuple[Tensor, dict[str, Tensor]]
TOKENIZER_NAME = "tokenizer.json"


class LongCaption:
    """Why a caption is not learned from: it has more than `length` tokens. None for one that has not."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, caption: str) -> str | None:
        too_long = len(self.tokenizer.encode(caption)) > self.length
        return f"caption of more than {self.length} tokens" if too_long else None


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` into a model's folder, so that it travels with the weights.

    An encoding that such a file cannot hold is left out: CLIP's, which is taken where there is no file.
    """
    with suppress(ValueError):
        tokenizer.save(folder / TOKENIZER_NAME)


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
