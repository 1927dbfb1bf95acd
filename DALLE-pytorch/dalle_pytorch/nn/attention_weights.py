"""Scaled dot-product attention, and its weights where someone wants to look at them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DotProductAttention(nn.Module):
    """The base class of attention layers, whose weights `record_attention` records."""

    recorded: list[Tensor] | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False,
        prompts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`F.scaled_dot_product_attention` of queries (b, heads, n, dim_head) to m keys and values; and where they are
        given to those of `prompts`, see `KVCache`, before these: then n is 1."""
        if self.recorded is not None:
            before = k[:, :, :0] if prompts is None else prompts[0].repeat_interleave(len(k) // prompts.shape[1], dim=0)
            self.recorded.append(attention_weights(q, torch.cat((before, k), dim=2), mask, is_causal))
        if prompts is not None:
            return attend_in_parts(q, k, v, mask, prompts)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, prompts: Tensor) -> Tensor:
    """Attention of one query (b, heads, 1, dim_head) each to the keys of `prompts`, read once for all queries of a
    prompt, and to its own, merged by the logarithms of the sums in both softmaxes (arXiv:2402.05099)."""
    _, count, heads, length, dim_head = prompts.shape
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    first, second = (None, None) if bias is None else (bias[..., :length], bias[..., length:])
    together = q.view(count, -1, heads, dim_head).transpose(1, 2)
    of_prompt, sum_of_prompt = _attend(together, prompts[0], prompts[1], attn_mask=first)
    own, sum_of_own = _attend(q, k, v, attn_mask=second)
    share = (sum_of_prompt.transpose(1, 2).reshape(sum_of_own.shape) - sum_of_own).sigmoid()
    return own.lerp(of_prompt.transpose(1, 2).reshape(own.shape), share[..., None].to(own.dtype))


# `F.scaled_dot_product_attention` on CPUs, with the logarithm of each query's sum of exponentials: (b, heads, n).
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


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
