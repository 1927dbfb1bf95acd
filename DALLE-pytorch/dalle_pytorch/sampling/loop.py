"""The token loop: image tokens are sampled one by one from a prior's key-value cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalle_pytorch.errors import UsageError
from dalle_pytorch.priors.base import Prior, PriorCache
from dalle_pytorch.sampling.filters import draw, finite_rows, require_finite
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.sampling.steps import prepared
from dalle_pytorch.sampling.uniforms import candidate_uniforms

OnToken = Callable[[], object]
#: from the tokens (n, k) of some candidates so far, the rows of those that go on in ascending order, None for all
Select = Callable[[Tensor], Tensor | None]
#: from the tokens so far, and the rows of the last ones that these are, None for all, the logits of the next
NextLogits = Callable[[Tensor, Tensor | None], Tensor]


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and autocast; restores the mode at the end."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        model.train(training)


@dataclass
class Prefix:
    """Prompts after one pass through the prior, to continue any number of times.

    Row i is a prompt. With guidance, the rows from `len(init_image_tokens)` on are the unconditional ones.
    """

    cache: PriorCache
    logits: Tensor  # (rows, num_image_tokens), of the first token to sample
    init_image_tokens: Tensor  # (prompts, k)
    cond_scale: float


def prefill(prior: Prior, text: Tensor, init_image_tokens: Tensor | None = None, cond_scale: float = 1.0) -> Prefix:
    """Runs prompts through the prior.

    Args:
        text: (p, text_seq_len) int64, as `prior.tokenize` returns it.
        init_image_tokens: (p, k) image tokens that the images begin with.
        cond_scale: see `SamplingSettings`.
    """
    if init_image_tokens is None:
        init_image_tokens = text.new_empty(len(text), 0)
    if (count := init_image_tokens.shape[1]) >= prior.image_seq_len:
        raise UsageError(f"expected fewer than {prior.image_seq_len} initial image tokens, got {count}")
    prefix = init_image_tokens
    if cond_scale != 1:
        text, prefix = torch.cat((text, prior.unconditional_text(text))), prefix.repeat(2, 1)
    logits, cache = prior.prefill(text, prefix)
    return Prefix(cache, logits, init_image_tokens, cond_scale)


def sample_image_tokens(
    prior: Prior,
    prefix: Prefix,
    rows: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    on_token: OnToken | None = None,
    select: Select | None = None,
) -> Tensor:
    """Samples the image tokens (n, image_seq_len) of n candidates, including the initial ones.

    Args:
        rows: (n,) the prompt in `prefix` of each candidate.
        uniforms: (n, image_seq_len) in [0, 1), see `candidate_uniforms`.
        settings: filters and temperature; the guidance is that of `prefix`.
        on_token: called after each position.
        select: called before each position but the first. What it leaves out is not drawn any further, and comes back
            as tokens of -1.
    """
    guided = prefix.cond_scale != 1
    cache_rows = torch.cat((rows, rows + len(prefix.init_image_tokens))) if guided else rows
    stepper, cache, count = prepared(prior), None, len(rows)

    def next_logits(tokens: Tensor, kept: Tensor | None) -> Tensor:
        nonlocal cache, count
        if cache is None:
            # 8-bit integers would magnify a difference of rounding, and a candidate depend on the others.
            cache = prefix.cache.gather(cache_rows, prior.max_length, share=not prior.is_int8)
            logits = prefix.logits[cache_rows]
        else:
            if kept is not None:
                both, count = torch.cat((kept, kept + count)) if guided else kept, len(kept)
                cache = cache.gather(both, prior.max_length, share=False)
            last = tokens[:, -1].repeat(2) if guided else tokens[:, -1]
            logits = stepper.step(last, tokens.shape[1] - 1, cache)
        return guide(logits, prefix.cond_scale) if guided else logits

    return _sample(prior, next_logits, prefix.init_image_tokens[rows], uniforms, settings, on_token, select)


def sample_image_tokens_uncached(
    prior: Prior,
    text: Tensor,
    init_image_tokens: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    on_token: OnToken | None = None,
) -> Tensor:
    """`sample_image_tokens` without a cache: a pass over the whole sequence (n rows) for every token."""
    guided = settings.cond_scale != 1
    both = torch.cat((text, prior.unconditional_text(text))) if guided else text

    def next_logits(tokens: Tensor, kept: Tensor | None) -> Tensor:
        logits = prior.next_token_logits(both, tokens.repeat(2, 1) if guided else tokens)[:, -1]
        return guide(logits, settings.cond_scale) if guided else logits

    return _sample(prior, next_logits, init_image_tokens, uniforms, settings, on_token)


def guide(logits: Tensor, cond_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598) on logits (2n, tokens), the unconditional ones in the second half."""
    conditional, unconditional = logits.chunk(2)
    return unconditional + (conditional - unconditional) * cond_scale


def _sample(
    prior: Prior,
    next_logits: NextLogits,
    init_image_tokens: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    on_token: OnToken | None,
    select: Select | None = None,
) -> Tensor:
    """The loop: `next_logits` maps the tokens so far (n, k) to the logits (n, num_image_tokens) of the next."""
    device, first = init_image_tokens.device, init_image_tokens.shape[1]
    uniforms = uniforms.to(device, torch.float32 if device.type == "mps" else torch.float64)
    tokens = init_image_tokens.new_zeros(len(init_image_tokens), prior.image_seq_len)
    tokens[:, :first] = init_image_tokens
    finite = torch.ones((), dtype=torch.bool, device=device)
    everything, drawn = torch.full_like(tokens, -1), torch.arange(len(tokens), device=device)
    for position in range(first, prior.image_seq_len):
        kept = None if select is None or position == first else select(tokens[:, :position])
        if kept is not None:
            tokens, uniforms, drawn = tokens[kept], uniforms[kept], drawn[kept]
        logits = next_logits(tokens[:, :position], kept)
        finite &= finite_rows(logits)
        tokens[:, position] = draw(logits, uniforms[:, position], settings, prior.num_filtered_tokens)
        if on_token is not None:
            on_token()
    require_finite(finite, "logits of the prior")
    everything[drawn] = tokens
    return everything


def sample_text(
    prior: Prior,
    begin: Tensor,
    next_logits: Callable[[Tensor], Tensor],
    settings: SamplingSettings,
    seed: int | None = None,
) -> Tensor:
    """Continues text tokens (1, n) to `text_seq_len` of them. `next_logits` maps tokens (1, k) to logits
    (1, num_text_tokens) of the next, without a cache: texts are short. Where the seed is None, it is drawn."""
    prior.check_text(begin)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    uniforms = candidate_uniforms(seed, begin[0], [0], prior.text_seq_len).to(prior.device)
    tokens = begin[:, : prior.text_seq_len]
    with evaluation(prior):
        for position in range(tokens.shape[1], prior.text_seq_len):
            logits = next_logits(tokens)
            require_finite(finite_rows(logits), "logits of the prior")
            token = draw(logits, uniforms[:, position], settings, prior.num_filtered_tokens)
            tokens = torch.cat((tokens, token[:, None]), dim=1)
    return tokens
