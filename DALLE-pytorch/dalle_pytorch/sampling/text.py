"""Sampling of text tokens, without a cache: texts are short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dalle_pytorch.sampling.filters import filter_logits, sample
from dalle_pytorch.sampling.settings import SamplingSettings


def sample_text_tokens(
    next_logits: Callable[[Tensor], Tensor],
    text: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    num_filtered_tokens: int | None = None,
) -> Tensor:
    """Continues texts (b, k) up to the length of `uniforms` (b, length): (b, length) int64.

    `next_logits` maps the tokens so far (b, n) to the logits (b, tokens) of the next. `num_filtered_tokens` is the
    number of tokens that a fractional top_k counts over.
    """
    length = uniforms.shape[1]
    uniforms, tokens = uniforms.to(text.device), text[:, :length]
    for position in range(tokens.shape[1], length):
        logits = filter_logits(next_logits(tokens), settings.top_k, settings.top_p, num_filtered_tokens)
        token = sample(logits, uniforms[:, position], settings.temperature)
        tokens = torch.cat((tokens, token[:, None]), dim=1)
    return tokens
