"""Candidates that are dropped while they are drawn, by CLIP's score of the picture so far."""

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHARES = {1 / 4: 1 / 2, 1 / 2: 1 / 4}  # after this share of the rows, this share of a prompt's candidates goes on
Score = Callable[[Tensor, Sequence[int]], Sequence[float]]


class Pruning:
    """The `select` of `sample_image_tokens` for candidates of several prompts, `counts` of each in a row.

    Each is compared with those of its prompt in the same batch. At least `least` of a prompt go on, and the earlier of
    equals first. `score` gives CLIP's scores of grids (n, side²) of tokens, so many of each prompt.
    """

    def __init__(self, side: int, counts: Sequence[int], least: int, score: Score):
        self.side, self.counts, self.left, self.least, self.score = side, counts, list(counts), least, score
        self.shares = {max(1, int(rows * side)) * side: share for rows, share in SHARES.items()}

    def __call__(self, tokens: Tensor) -> Tensor | None:
        if (share := self.shares.get(tokens.shape[1])) is None:
            return None
        scores, kept, first = self.score(repeat_last_row(tokens, self.side), self.left), list[int](), 0
        for i, (left, count) in enumerate(zip(self.left, self.counts, strict=True)):
            rows = range(first, first + left)
            best = heapq.nlargest(max(math.ceil(share * count), self.least), rows, key=scores.__getitem__)
            kept += sorted(best)
            self.left[i], first = len(best), rows.stop
        return torch.tensor(kept, device=tokens.device)


def repeat_last_row(tokens: Tensor, side: int) -> Tensor:
    """Grids (n, side²) of the first rows (n, k) of tokens, the last of which is repeated to the bottom."""
    rows = tokens.unflatten(1, (-1, side))
    return torch.cat((rows, rows[:, -1:].expand(-1, side - rows.shape[1], -1)), dim=1).flatten(1)
