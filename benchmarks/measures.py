"""The statistics of the benchmarks: intervals by bootstrap, the best of N without drawing again, Fréchet distance."""

from collections.abc import Sequence
from math import comb

import numpy as np


def interval(values: Sequence[float], share: float = 0.95, rounds: int = 4000, seed: int = 0) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean (Efron 1979), one value per caption.

    For a paired comparison the values are the differences.
    """
    values = np.asarray(values, np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(rounds, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def best_of(scores: Sequence[float], right: Sequence[float], n: int) -> float:
    """The chance that the highest score of `n` of these candidates, taken at random, belongs to a right one; or the
    mean of other values of the one with the highest score.

    Of m candidates the one of rank r (0 the best) is the best of n with chance C(m - 1 - r, n - 1) / C(m, n).
    """
    m = len(scores)
    if not 1 <= n <= m:
        raise ValueError(f"the best of {n} cannot be told from {m} candidates")
    order = sorted(range(m), key=lambda i: (-scores[i], i))
    return sum(comb(m - 1 - rank, n - 1) * float(right[i]) for rank, i in enumerate(order[: m - n + 1])) / comb(m, n)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of two sets of features (n, d) (Heusel et al. 2017, arXiv:1706.08500)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    # (Σa Σb)^½ has the trace of (Σa^½ Σb Σa^½)^½, which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def frechet_interval(pairs: Sequence[tuple[np.ndarray, np.ndarray]], rounds: int = 200,
                     seed: int = 0) -> list[tuple[float, float]]:  # fmt: skip
    """95 % intervals, over captions, of the distances of several pairs of feature sets whose rows are captions.

    By the spread of the bootstrap, about the distance itself: the distances of resampled sets are all too large, since
    fewer different pictures are in them, and their quantiles would not hold it.
    """
    distances = np.asarray([frechet_distance(a, b) for a, b in pairs])
    reach = 1.96 * _resampled_distances(pairs, rounds, seed).std(axis=1)
    return [(float(max(d - r, 0)), float(d + r)) for d, r in zip(distances, reach, strict=True)]


def frechet_ratio(a: np.ndarray, b: np.ndarray, to: np.ndarray, rounds: int = 200,
                  seed: int = 0) -> tuple[float, float, float]:  # fmt: skip
    """How many times as far as `b` the features `a` are from `to`, rows being captions, and its 95 % interval: by the
    spread of the ratio's logarithm over the bootstrap, about the ratio itself."""
    ratio = frechet_distance(a, to) / frechet_distance(b, to)
    over, under = _resampled_distances([(a, to), (b, to)], rounds, seed)
    reach = np.exp(1.96 * np.log(over / under).std())
    return float(ratio), float(ratio / reach), float(ratio * reach)


def _resampled_distances(pairs: Sequence[tuple[np.ndarray, np.ndarray]], rounds: int, seed: int) -> np.ndarray:
    """Distances of every pair (pairs, rounds), of the same captions in each round."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(len(pairs[0][0]), size=len(pairs[0][0])) for _ in range(rounds)]
    return np.asarray([[frechet_distance(a[drawn], b[drawn]) for drawn in rows] for a, b in pairs])
