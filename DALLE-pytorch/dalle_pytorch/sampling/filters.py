"""From logits to a token: top-k and top-p filters, and sampling."""

import math

import torch
from torch import Tensor

from dalle_pytorch.errors import SamplingDiverged
from dalle_pytorch.sampling.settings import SamplingSettings


def filter_logits(
    logits: Tensor, top_k: float | None = None, top_p: float | None = None, num_total: int | None = None
) -> Tensor:
    """Sets the logits (..., n) of removed tokens to -inf. `top_k` takes precedence over `top_p`.

    Args:
        top_k, top_p: see `SamplingSettings`. At least one token is kept.
        num_total: the number of tokens that a fractional `top_k` counts over, n by default. DALLE-pytorch counts text
            and image tokens together.

    Tokens as likely as the last one kept are kept as well, whatever their order.
    """
    SamplingSettings(top_k, top_p)
    size = logits.shape[-1]
    if top_k is not None:
        kept = int(top_k) if top_k >= 1 else max(int((1 - top_k) * (num_total or size)), 1)
        if kept >= size:
            return logits
        least = logits.topk(kept, dim=-1).values[..., -1:]
    elif top_p is not None and top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        least = ordered.masked_fill(before >= top_p, math.inf).amin(dim=-1, keepdim=True)
    else:
        return logits
    return logits.masked_fill(logits < least, -math.inf)


def sample(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token (b,) from each row of filtered logits (b, n), by inverse transform sampling of `uniforms` (b,) in
    [0, 1). A temperature of 0 takes the most likely token, the first among equals."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # MPS has no float64.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = (logits.to(dtype) / temperature).softmax(dim=-1).cumsum(dim=-1)
    targets = uniforms.to(dtype)[:, None] * cumulative[:, -1:]
    # Clamped for rows of NaN, which are told at the end: to look at each step would wait for the device.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def finite_rows(logits: Tensor) -> Tensor:
    """Whether the logits (b, n) have a largest one in each row: a scalar tensor on their device."""
    return logits.amax(dim=-1).isfinite().all()


def require_finite(finite: bool | Tensor, what: str) -> None:
    """Raises `SamplingDiverged` unless `finite`."""
    if not finite:
        raise SamplingDiverged(f"{what} are not finite: the model's weights are damaged, or a setting is too large")
