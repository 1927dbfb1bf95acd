"""Scaled dot-product attention, and its weights where someone wants to look at them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DotProductAttention(nn.Module):
    """The base class of attention layers, whose weights `record_attention` records."""

    recorded: list[Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`F.scaled_dot_product_attention` of queries (b, heads, n, dim_head) to m keys and values."""
        if self.recorded is not None:
            self.recorded.append(attention_weights(q, k, mask, is_causal))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


@torch.no_grad()
def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The weights (b, heads, n, m) float32 of queries (b, heads, n, dim_head) on keys (b, heads, m, dim_head): the
    softmax of q · k / √dim_head (arXiv:1706.03762). `mask` is false at keys to ignore."""
    scores = q.float() @ k.float().mT / q.shape[-1] ** 0.5
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, the attention layers in a model append their weights to the list, in the order of their calls.

    with record_attention(prior.transformer) as layers:
        prior.next_token_logits(text, image_tokens)
    layers[-1]  # (b, heads, n, n): what each position of the sequence takes from each one before it

    The weights are computed beside the fused attention, which does not give them: results stay the same.
    """
    recorded: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, DotProductAttention)]
    for layer in layers:
        layer.recorded = recorded
    try:
        yield recorded
    finally:
        for layer in layers:
            layer.recorded = None
