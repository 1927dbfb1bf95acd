"""Priors made ready for sampling: on a CPU a step's time goes into linear layers of few rows."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dalle_pytorch.nn.linear import PackedLinear
from dalle_pytorch.priors.base import Prior

AnyPrior = TypeVar("AnyPrior", bound=Prior)

MAX_PACKED = 2**28  # weights: the packed ones take 1 GiB beside the plain ones

_prepared: WeakKeyDictionary[Prior, tuple[object, Prior]] = WeakKeyDictionary()


def prepared(prior: AnyPrior) -> AnyPrior:
    """The prior, or a copy that shares its tensors and takes the same steps in less time.

    The copy is kept for the next call, and made anew where weights have changed since.
    """
    linears = linears_of_step(prior)
    if not linears or not _can_be_packed(linears):
        return prior
    weights = [(weight.data_ptr(), _version(weight)) for weight in prior.parameters()]
    kept: Any = _prepared.get(prior)
    if kept is None or kept[0] != weights:
        packed = {id(linear): PackedLinear(linear) for linear in linears}
        kept = _prepared[prior] = weights, shared_copy(prior, packed).eval()
    return kept[1]


def linears_of_step(prior: Prior) -> list[nn.Linear]:
    """The linear layers that a step runs, each once."""
    return list({module: None for part in prior.step_parts() for module in part.modules()
                 if isinstance(module, nn.Linear)})  # fmt: skip


def shared_copy(prior: AnyPrior, replaced: Mapping[int, Any]) -> AnyPrior:
    """A copy of the prior with other modules and tensors in place of those with some ids; it shares the other tensors,
    the image tokenizer and the text tokenizer."""
    shared = *prior.parameters(), *prior.buffers(), prior.vae, prior.tokenizer
    return copy.deepcopy(prior, {**{id(value): value for value in shared}, **replaced})


def _can_be_packed(linears: list[nn.Linear]) -> bool:
    weights = [linear.weight for linear in linears]
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    small = sum(weight.numel() for weight in weights) <= MAX_PACKED
    return plain and small and torch.backends.mkl.is_available()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version
