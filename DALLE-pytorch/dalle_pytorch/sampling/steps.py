"""Priors made ready for sampling: on a CPU a step's time goes into linear layers of few rows."""

import copy
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
    linears = [module for module in prior.modules() if isinstance(module, nn.Linear) and not module.weight.is_meta]
    if not linears or not _can_be_packed(linears):
        return prior
    weights = [(weight.data_ptr(), _version(weight)) for weight in prior.parameters()]
    kept: Any = _prepared.get(prior)
    if kept is None or kept[0] != weights:
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*prior.parameters(), *prior.buffers())}
        memo |= {id(part): part for part in (prior.vae, prior.tokenizer)}
        memo |= {id(module): PackedLinear(module) for module in linears}
        kept = _prepared[prior] = weights, copy.deepcopy(prior, memo).eval()
    return kept[1]


def _can_be_packed(linears: list[nn.Linear]) -> bool:
    weights = [linear.weight for linear in linears]
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    small = sum(weight.numel() for weight in weights) <= MAX_PACKED
    return plain and small and torch.backends.mkl.is_available()


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version
