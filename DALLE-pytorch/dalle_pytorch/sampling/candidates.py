"""The candidates of one prompt: sample, decode, score, keep the best, one batch at a time."""

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.clip.base import Scorer
from dalle_pytorch.errors import UsageError
from dalle_pytorch.priors.base import Prior
from dalle_pytorch.sampling.filters import require_finite
from dalle_pytorch.sampling.loop import evaluation, prefill, sample_image_tokens
from dalle_pytorch.sampling.settings import SamplingSettings
from dalle_pytorch.sampling.threads import StepThreads
from dalle_pytorch.sampling.uniforms import candidate_uniforms


@dataclass(frozen=True)
class Candidate:
    """One image for a prompt, on the CPU."""

    index: int  # under the seed: the same candidate for every batch size and number of candidates
    tokens: Tensor  # (image_seq_len,) int64, row by row
    image: Tensor  # (3, h, w) in [0, 1]
    score: float | None = None  # cosine similarity to the prompt, None without a scorer


def candidate_batches(
    prior: Prior,
    prompt: str,
    num_images: int,
    *,
    settings: SamplingSettings | None = None,
    batch_size: int = 32,
    seed: int = 0,
    init_image_tokens: Tensor | None = None,
    scorer: Scorer | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[list[Candidate]]:
    """Yields the candidates 0 to `num_images - 1` of a prompt in batches, after one pass over the prompt.

    Args:
        prompt: truncated to the prior's `text_seq_len`.
        settings: the prior's own by default.
        seed: determines the candidates, together with the prompt and their indices.
        init_image_tokens: (k,) image tokens that every candidate begins with.
        progress: called with the number of finished candidates and of tokens sampled for each of the current batch.

    Raises `UsageError` for settings out of range, or a tokenizer that is not the prior's, and `SamplingDiverged`.
    """
    settings = prior.sampling if settings is None else settings
    for name, value in (("num_images", num_images), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    text = prior.tokenize(prompt)
    if init_image_tokens is not None:
        init_image_tokens = init_image_tokens[None].to(prior.device)
    with evaluation(prior):
        prefix = prefill(prior, text, init_image_tokens, settings.cond_scale)

    threads = StepThreads(prior.device)
    for start in range(0, num_images, batch_size):
        indices = range(start, min(start + batch_size, num_images))
        sampled = 0

        def on_token(start: int = start) -> None:
            nonlocal sampled
            sampled += 1
            threads.step()
            if progress is not None:
                progress(start, sampled)

        with evaluation(prior):
            rows = torch.zeros(len(indices), dtype=torch.long, device=prior.device)
            uniforms = candidate_uniforms(seed, text[0], indices, prior.image_seq_len)
            with threads.batch():
                tokens = sample_image_tokens(prior, prefix, rows, uniforms, settings, on_token)
            images = prior.vae.decode_image(tokens)
            require_finite(images.isfinite().all(), "pixels of the image tokenizer")
            scores = [None] * len(indices) if scorer is None else scorer.score(prompt, images).tolist()
            require_finite(all(score is None or math.isfinite(score) for score in scores), "scores")
        batch = zip(indices, tokens.cpu(), images.float().cpu(), scores, strict=True)
        # Cloned: a view would keep the whole batch in memory.
        yield [Candidate(index, tokens.clone(), image.clone(), score) for index, tokens, image, score in batch]


def ranked_candidates(
    prior: Prior,
    prompt: str,
    num_images: int,
    *,
    scorer: Scorer | None = None,
    keep: int | None = None,
    **options: Any,
) -> Iterator[list[Candidate]]:
    """Yields, after each batch, the best `keep` (all by default) of the candidates so far, best first, the earlier of
    equals first. The last value is that of all `num_images`.

    Without a `scorer` these are the first ones, in order. Memory grows with `keep`, not with `num_images`. `options`
    are those of `candidate_batches`.
    """
    keep = num_images if keep is None else keep
    if min(num_images, keep) < 1:
        raise UsageError(f"num_images and keep must be at least 1, got {num_images} and {keep}")
    keep, best = min(num_images, keep), list[Candidate]()
    if scorer is None:
        num_images = keep
    for batch in candidate_batches(prior, prompt, num_images, scorer=scorer, **options):
        best = heapq.nlargest(keep, best + batch, key=lambda candidate: candidate.score or 0.0)
        yield best


def generate_candidates(prior: Prior, prompt: str, num_images: int, **options: Any) -> list[Candidate]:
    """The last value of `ranked_candidates`, with its options."""
    *_, candidates = ranked_candidates(prior, prompt, num_images, **options)
    return candidates
