"""From logits to a token: top-k and top-p filters, and sampling."""

import math

import torch
from torch import Tensor

from dalle_pytorch.errors import SamplingDiverged
from dalle_pytorch.sampling.settings import SamplingSettings

NUM_LIKELIEST = 127  # tokens that may decide a draw: a trained prior's top 90 % are rarely more


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
        kept = _count_kept(top_k, num_total or size)
        return logits if kept >= size else _remove_below(logits, logits.topk(kept, dim=-1).values[..., -1:])
    if top_p is None or top_p == 1:
        return logits
    return _remove_below(logits, _least_of_top_p(logits.sort(dim=-1, descending=True).values, top_p))


def _count_kept(top_k: float, num_total: int) -> int:
    return int(top_k) if top_k >= 1 else max(int((1 - top_k) * num_total), 1)


def _least_of_top_p(ordered: Tensor, top_p: float, total: Tensor | None = None) -> Tensor:
    """The least logit (..., 1) that is kept, of logits in descending order (..., k), the most likely ones; `total`
    (..., 1) is the logarithm of the sum of all exponentials, of those given by default."""
    probabilities = ordered.softmax(dim=-1) if total is None else (ordered - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    return ordered.masked_fill(before >= top_p, math.inf).amin(dim=-1, keepdim=True)


def _remove_below(logits: Tensor, least: Tensor) -> Tensor:
    return logits.masked_fill(logits < least, -math.inf)


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings, num_total: int | None = None) -> Tensor:
    """One token (b,) from each row of logits (b, n), filtered by `filter_logits` and sampled by `sample`.

    On a CPU, where sorting takes longer than the network's step, only the rows for which the most likely tokens do not
    decide are sorted.
    """
    size, top_k, top_p = logits.shape[-1], settings.top_k, settings.top_p
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    kept = size if top_p is None else NUM_LIKELIEST
    if top_k is not None:
        kept = _count_kept(top_k, num_total or size)
    if logits.device.type != "cpu" or kept >= size // 4:
        return sample(filter_logits(logits, top_k, top_p, num_total), uniforms, settings.temperature)

    values, tokens = logits.topk(kept + 1, dim=-1)
    least = values[:, kept - 1 : kept]
    if top_k is None and top_p is not None:
        least = _least_of_top_p(values, top_p, logits.logsumexp(dim=-1, keepdim=True))
    tokens, order = tokens.sort(dim=-1)
    positions = sample(_remove_below(values.gather(-1, order), least), uniforms, settings.temperature)
    drawn = tokens.gather(-1, positions[:, None])[:, 0]
    # More tokens may be kept where the least of those looked at is. A NaN is not above it either.
    rest = (~(least > values[:, -1:])).nonzero()[:, 0]
    if len(rest):
        drawn[rest] = sample(filter_logits(logits[rest], top_k, top_p, num_total), uniforms[rest], settings.temperature)
    return drawn


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
