"""The candidates of one prompt: sample, decode, score, keep the best, a batch at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.clip import Scorer
from dalle_pytorch.dalle import DALLE
from dalle_pytorch.sampling import candidate_uniforms, check_sampling, evaluation, prefill, sample_image_tokens


@dataclass(frozen=True)
class Candidate:
    """One picture for a prompt, on the CPU."""

    index: int
    """Its number under the seed: the same candidate whatever the batch size and the number of candidates."""
    tokens: Tensor
    """(image_seq_len,) int64, row by row."""
    image: Tensor
    """(3, h, w) in [0, 1]."""
    score: float | None = None
    """Cosine similarity to the prompt, if it was scored."""


def candidate_batches(
    dalle: DALLE,
    tokenizer: Any,
    prompt: str,
    num_images: int,
    *,
    batch_size: int = 32,
    top_k: float | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    cond_scale: float = 1.0,
    seed: int = 0,
    init_tokens: Tensor | None = None,
    scorer: Scorer | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[list[Candidate]]:
    """Yields the candidates 0 to `num_images - 1` of a prompt in batches. The prompt is run once for all of them.

    Args:
        tokenizer: has `.tokenize(text, context_length, truncate_text)`; a prompt that is too long is cut.
        top_k, top_p, temperature, cond_scale: see `DALLE.generate_images`; all tokens may be drawn where neither of
            the first two is given.
        seed: together with the prompt and a candidate's index, decides the candidate.
        init_tokens: (k,) image tokens that every candidate begins with.
        scorer: gives the candidates their scores.
        progress: called with the candidates that are finished and the tokens drawn for each of the batch at work.

    Raises:
        ValueError: settings out of range, or a tokenizer that is not the prior's.
    """
    check_sampling(top_k, top_p, temperature)
    if num_images < 1:
        raise ValueError(f"the number of images must be at least 1, and it is {num_images}")
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, and it is {batch_size}")
    text = tokenizer.tokenize(prompt, dalle.text_seq_len, truncate_text=True).to(dalle.device)
    dalle.check_text(text)
    given = None if init_tokens is None else init_tokens[None].to(dalle.device)
    with evaluation(dalle):
        prefix = prefill(dalle, text, given, cond_scale)

    for start in range(0, num_images, batch_size):
        indices = range(start, min(start + batch_size, num_images))
        drawn = 0

        def on_token(start: int = start) -> None:
            nonlocal drawn
            drawn += 1
            if progress is not None:
                progress(start, drawn)

        with evaluation(dalle):
            tokens = sample_image_tokens(
                dalle,
                prefix,
                torch.zeros(len(indices), dtype=torch.long, device=dalle.device),
                candidate_uniforms(seed, text[0], indices, dalle.image_seq_len),
                top_k=top_k,
                top_p=top_p,
                temperature=temperature,
                on_token=on_token,
            )
            images = dalle.vae.decode_image(tokens)
            scores = [None] * len(indices) if scorer is None else scorer.score(prompt, images).tolist()
        batch = zip(indices, tokens.cpu(), images.float().cpu(), scores, strict=True)
        # Cloned, so that a candidate that is kept does not keep its whole batch in memory.
        yield [Candidate(index, tokens.clone(), image.clone(), score) for index, tokens, image, score in batch]


def generate_candidates(
    dalle: DALLE,
    tokenizer: Any,
    prompt: str,
    num_images: int,
    *,
    scorer: Scorer | None = None,
    keep: int | None = None,
    **settings: Any,
) -> list[Candidate]:
    """The best `keep` (all unless given) of `num_images` candidates of a prompt, best first.

    Without a `scorer` these are the first ones, in order. Of equal scores the earlier candidate is the better one.
    Memory does not grow with `num_images`, only with `keep`. `settings` are those of `candidate_batches`.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"the number of images to keep must be at least 1, and it is {keep}")
    keep = num_images if keep is None else min(keep, num_images)
    if scorer is None:
        num_images = keep
    best: list[tuple[float, int, Candidate]] = []
    for batch in candidate_batches(dalle, tokenizer, prompt, num_images, scorer=scorer, **settings):
        for candidate in batch:
            entry = (0.0 if candidate.score is None else candidate.score, -candidate.index, candidate)
            if len(best) < keep:
                heapq.heappush(best, entry)
            else:
                heapq.heappushpop(best, entry)
    return [candidate for _, _, candidate in sorted(best, key=lambda entry: entry[:2], reverse=True)]
