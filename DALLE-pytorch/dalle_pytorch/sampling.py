"""Drawing tokens: filters, reproducible draws, and the loop that gives each new image token one token's work.

Randomness belongs to the image: a draw is a uniform number fixed by seed, prompt, candidate and place in the grid, put
through the inverse of the filtered distribution. Batch size and number of candidates do not change what a candidate is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dalle_pytorch.dalle import DALLE
    from dalle_pytorch.transformer import TransformerCache

# --------------------------------------------------------------------------------------------------
# From logits to a token


def check_sampling(top_k: float | None = None, top_p: float | None = None, temperature: float = 1.0) -> None:
    """Raises `ValueError`, one line that names the setting, if one of them makes no sense."""
    if top_k is not None and not (0 <= top_k < 1 or (top_k >= 1 and top_k % 1 == 0)):
        raise ValueError(f"top_k is a fraction from 0 to below 1, or a whole number of tokens; {top_k} is neither")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, and it is {top_p}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"the temperature must be 0 (always the likeliest token) or above, and it is {temperature}")


def filter_logits(
    logits: Tensor, top_k: float | None = None, top_p: float | None = None, num_total: int | None = None
) -> Tensor:
    """Sets the logits (..., n) of tokens that are not to be drawn to -inf; `top_k` wins over `top_p`.

    Args:
        top_k: the number of tokens kept; below 1 the fraction of `num_total` cut away, with at least one token kept.
        top_p: keeps the likeliest tokens whose probabilities first reach this sum (arXiv:1904.09751).
        num_total: the tokens that a fraction counts over. DALLE-pytorch counts text and image tokens; n unless given.

    Tokens as likely as the last one kept are kept as well, so that no order among equals matters.
    """
    check_sampling(top_k, top_p)
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


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """One token (b,) from each row of filtered logits (b, n): where the cumulative distribution passes `uniforms` (b,).

    Tokens stand in the order of their ids. A temperature of 0 takes the likeliest one, the first among equals.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # MPS has no float64.
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = (logits.to(dtype) / temperature).softmax(dim=-1).cumsum(dim=-1)
    targets = uniforms.to(dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


def candidate_uniforms(seed: int, prompt: Tensor, candidates: Sequence[int], length: int) -> Tensor:
    """The uniform numbers in [0, 1) of some candidates of a prompt: (len(candidates), length) float64, on the CPU.

    They come from the counter-based generator Philox (Salmon et al., 2011), keyed by a hash of `seed` and the
    `prompt`'s tokens (n,) up to its padding and started at the candidate's number: the same on every machine.
    """
    tokens = prompt.detach().cpu().numpy().astype("<i8")
    tokens = np.trim_zeros(tokens, "b")
    digest = hashlib.blake2b(f"{seed}:".encode() + tokens.tobytes(), digest_size=16).digest()
    key = int.from_bytes(digest, "little")
    rows = [np.random.Philox(key=key, counter=int(candidate) << 64).random_raw(length) for candidate in candidates]
    # 32 bits: no product with a sum near 1 can round up to the sum itself.
    return torch.from_numpy((np.stack(rows) >> np.uint64(32)).astype(np.float64) / 2**32)


# --------------------------------------------------------------------------------------------------
# The image


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no autocast inside; the model's own mode again after it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.train(training)


@dataclass
class Prefix:
    """Prompts that have gone through the transformer once, ready to be gone on from any number of times.

    Row i is a prompt; under guidance, rows from `len(tokens)` on are the same without their text.
    """

    cache: TransformerCache
    logits: Tensor  # (rows, num_image_tokens), of the first token to draw
    tokens: Tensor  # (prompts, k), the image tokens that are given
    cond_scale: float


@torch.no_grad()
def prefill(dalle: DALLE, text: Tensor, init_tokens: Tensor | None = None, cond_scale: float = 1.0) -> Prefix:
    """Runs prompts through the transformer.

    Args:
        text: (p, text_seq_len) int64, 0 for padding.
        init_tokens: (p, k) image tokens that the pictures begin with.
        cond_scale: weight of the prompt (classifier-free guidance); 1 follows it as trained, more exaggerates it.
    """
    if not math.isfinite(cond_scale):
        raise ValueError(f"cond_scale must be a number, and it is {cond_scale}")
    tokens = text.new_empty(len(text), 0) if init_tokens is None else init_tokens
    if tokens.shape[1] >= dalle.image_seq_len:
        raise ValueError(f"{tokens.shape[1]} of {dalle.image_seq_len} image tokens are given: none is left to draw")
    given = tokens
    if cond_scale != 1:
        text, given = torch.cat((text, torch.zeros_like(text))), torch.cat((tokens, tokens))
    emb = torch.cat((dalle.embed_text(dalle.prepare_text(text)), dalle.embed_image(given)), dim=1)
    cache = dalle.transformer.make_cache(len(text), emb.shape[1], emb.device, emb.dtype)
    hidden = dalle.hidden(emb, cache)
    return Prefix(cache, dalle.image_logits(hidden[:, -1]), tokens, cond_scale)


@torch.no_grad()
def sample_image_tokens(
    dalle: DALLE,
    prefix: Prefix,
    rows: Tensor,
    uniforms: Tensor,
    *,
    top_k: float | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    on_token: Callable[[], object] | None = None,
) -> Tensor:
    """Draws the image tokens (n, image_seq_len) of n candidates, those given in `prefix` included.

    Args:
        rows: (n,) the prompt in `prefix` of each candidate.
        uniforms: (n, image_seq_len) in [0, 1), as `candidate_uniforms` makes them.
        top_k, top_p, temperature: as in `filter_logits` (a fraction counts over text and image tokens) and `draw`.
        on_token: called after each token drawn.
    """
    guided = prefix.cond_scale != 1
    cache_rows = torch.cat((rows, rows + len(prefix.tokens))) if guided else rows
    cache = None

    def next_logits(tokens: Tensor) -> Tensor:
        nonlocal cache
        if cache is None:
            cache = prefix.cache.gather(cache_rows, dalle.total_seq_len)
            logits = prefix.logits[cache_rows]
        else:
            last = tokens[:, -1:].repeat(2, 1) if guided else tokens[:, -1:]
            hidden = dalle.hidden(dalle.embed_image(last, start=tokens.shape[1] - 1), cache)
            logits = dalle.image_logits(hidden[:, 0])
        return _guide(logits, prefix.cond_scale) if guided else logits

    return _sample(dalle, next_logits, prefix.tokens[rows], uniforms, top_k, top_p, temperature, on_token)


@torch.no_grad()
def sample_image_tokens_uncached(
    dalle: DALLE,
    text: Tensor,
    init_tokens: Tensor,
    uniforms: Tensor,
    *,
    cond_scale: float = 1.0,
    top_k: float | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    on_token: Callable[[], object] | None = None,
) -> Tensor:
    """What `sample_image_tokens` draws, with a plain forward pass over the whole sequence (n rows) for every token."""

    def next_logits(tokens: Tensor) -> Tensor:
        if cond_scale == 1:
            return dalle(text, tokens)[:, -1, dalle.num_text_tokens :]
        both = torch.cat((text, torch.zeros_like(text)))
        return _guide(dalle(both, tokens.repeat(2, 1))[:, -1, dalle.num_text_tokens :], cond_scale)

    return _sample(dalle, next_logits, init_tokens, uniforms, top_k, top_p, temperature, on_token)


def _guide(logits: Tensor, cond_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598) on logits (2n, tokens), those without a prompt in the second half."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * cond_scale


def _sample(
    dalle: DALLE,
    next_logits: Callable[[Tensor], Tensor],
    given: Tensor,
    uniforms: Tensor,
    top_k: float | None,
    top_p: float | None,
    temperature: float,
    on_token: Callable[[], object] | None,
) -> Tensor:
    """The loop: `next_logits` maps the tokens so far (n, k) to the logits (n, num_image_tokens) of the next."""
    check_sampling(top_k, top_p, temperature)
    uniforms = uniforms.to(given.device, torch.float32 if given.device.type == "mps" else torch.float64)
    tokens = given.new_zeros(len(given), dalle.image_seq_len)
    tokens[:, : given.shape[1]] = given
    for position in range(given.shape[1], dalle.image_seq_len):
        logits = filter_logits(next_logits(tokens[:, :position]), top_k, top_p, dalle.total_tokens)
        tokens[:, position] = draw(logits, uniforms[:, position], temperature)
        if on_token is not None:
            on_token()
    return tokens


# --------------------------------------------------------------------------------------------------
# The text


@torch.no_grad()
def sample_text_tokens(
    dalle: DALLE,
    begin: Tensor,
    uniforms: Tensor,
    *,
    top_k: float | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Goes on from the first words of a text, tokens (b, k): (b, text_seq_len), 0 for padding.

    `uniforms` is (b, text_seq_len). Texts are short, so every token runs the whole of it.
    """
    check_sampling(top_k, top_p, temperature)
    uniforms = uniforms.to(begin.device)
    tokens = torch.cat((begin.new_zeros(len(begin), 1), begin[:, : dalle.text_seq_len]), dim=1)
    for position in range(tokens.shape[1] - 1, dalle.text_seq_len):
        logits = dalle.text_logits(dalle.hidden(dalle.embed_text(tokens))[:, -1])
        logits = filter_logits(logits, top_k, top_p, dalle.total_tokens)
        tokens = torch.cat((tokens, draw(logits, uniforms[:, position], temperature)[:, None]), dim=1)
    first_padding = dalle.num_text_tokens - dalle.text_seq_len
    return tokens[:, 1:].masked_fill(tokens[:, 1:] >= first_padding, 0)
