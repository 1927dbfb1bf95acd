"""The numbers that a prior computes with: float32, 8-bit integers on CPUs, or bfloat16."""

import torch
from torch import nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.nn.linear import Int8Linear, has_int8
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.settings import DTYPES
from dalle_pytorch.sampling.steps import AnyPrior, linears_of_step, shared_copy

MEAN_WEIGHTS = 2**19  # of the linear layers: int8 gains little with smaller ones, see docs/dtypes.md


def check_dtype(name: str, device: torch.device) -> None:
    """Raises `UsageError` for a name that is none of `DTYPES`, or that means nothing on this device."""
    if name not in DTYPES:
        raise UsageError(f"expected dtype as one of {', '.join(DTYPES)}, got {name!r}")
    if name == "int8" and device.type != "cpu":
        raise UsageError(f"dtype int8 is for CPUs; on {device.type} it is float32 or bfloat16")
    if name == "int8" and not has_int8():
        raise UsageError("dtype int8 needs FBGEMM, which PyTorch does not have for this processor; use float32")


def choose_dtype(prior: Prior, device_type: str) -> str:
    """What "auto" means for a prior on a kind of device: "int8" on CPUs where it takes less time, else "float32"."""
    linears = linears_of_step(prior)
    weights = sum(linear.weight.numel() for linear in linears)
    large = weights >= MEAN_WEIGHTS * len(linears)
    return "int8" if device_type == "cpu" and large and has_int8() else "float32"


def converted(prior: AnyPrior, name: str) -> AnyPrior:
    """The prior itself for "float32"; otherwise a copy that shares what stays as it is, its image tokenizer too.

    "int8": the linear layers of a step, see `Int8Linear`; all else, and the cache, stays in float32. "bfloat16": all
    weights, and so the cache. Logits are float32 in any case.
    """
    check_dtype(name, prior.device)
    if name == "int8":
        return shared_copy(prior, {id(linear): Int8Linear(linear) for linear in linears_of_step(prior)})
    if name == "bfloat16":
        own = (module for child, module in prior.named_children() if child != "vae")
        weights = (weight for module in own for weight in module.parameters())
        return shared_copy(prior, {id(weight): _as_bfloat16(weight) for weight in weights})
    return prior


def _as_bfloat16(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.to(torch.bfloat16), requires_grad=weight.requires_grad)


def dtype_of(prior: Prior) -> str:
    """What a prior computes with: "int8", or the name of its weights' type."""
    weight = next(weight for part in prior.step_parts() for weight in part.parameters())
    return "int8" if prior.is_int8 else str(weight.dtype).removeprefix("torch.")
