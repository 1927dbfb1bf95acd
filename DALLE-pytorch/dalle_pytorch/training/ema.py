"""The exponential moving average of the weights, which samples better than the last weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dalle_pytorch.errors import CheckpointError
from dalle_pytorch.training.launch import local_tensors


class EMA:
    """An exponential moving average, in float32, of what this process holds of each trained parameter of `model`.

    It works element by element, so a process that holds a shard of a parameter averages that shard.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.updates = model, 0
        self.update_fn = get_ema_multi_avg_fn(decay)
        self.tensors = [tensor.float().clone() for tensor in local_tensors(model)]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step; those after the first step are the initial average."""
        current = [tensor.float() for tensor in local_tensors(self.model)]
        if self.updates == 0:
            torch._foreach_copy_(self.tensors, current)  # pyright: ignore[reportPrivateImportUsage]
        else:
            self.update_fn(self.tensors, current, self.updates)
        self.updates += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights by the average."""
        for tensor, average in zip(local_tensors(self.model), self.tensors, strict=True):
            tensor.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        held = [tensor.clone() for tensor in local_tensors(self.model)]
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in zip(local_tensors(self.model), held, strict=True):
                    tensor.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """The averages, as tensors in the order of the parameters."""
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` for the averages of another model, or of another number of processes."""
        if [tensor.shape for tensor in state["tensors"]] != [tensor.shape for tensor in self.tensors]:
            raise CheckpointError("its averaged weights have other shapes")
        torch._foreach_copy_(self.tensors, state["tensors"])  # pyright: ignore[reportPrivateImportUsage]
        self.updates = state["updates"]
