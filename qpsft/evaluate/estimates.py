"""Numbers with their uncertainty: pass@k without bias, means with bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
TWO_SIDED_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are None where an interval makes no sense."""

    value: float
    low: float | None = None
    high: float | None = None


def pass_at_k(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, for each row, without bias (arXiv 2107.03374, Eq. 1).

    1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1}^{n} (1 - k / i)

    Args:
        right: (rows,) c, how many of a row's samples are right.
        samples: n, how many samples each row has.
        k: 1 to n.

    Returns:
        (rows,) float64.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be from 1 to the number of samples ({samples}), not {k}")
    factors = 1.0 - k / np.arange(1, samples + 1).clip(min=k)
    # The product over the last c of the n factors; a factor of i <= k is 0.
    products = np.cumprod(np.concatenate([[1.0], factors[::-1]]))
    return 1.0 - products[np.asarray(right, dtype=int)]


def bootstrap_weights(rows: int, seed: int) -> np.ndarray:
    """(RESAMPLES, rows): how often each row is drawn in each of the resamples of all rows with replacement."""
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1.0 / rows), size=RESAMPLES).astype(float)


def ratio(numerators: np.ndarray, denominators: np.ndarray, weights: np.ndarray) -> Estimate:
    """Σ numerators / Σ denominators with its percentile bootstrap interval over rows.

    A mean over rows has 1 as every denominator; a mean over tokens has each row's number of tokens.

    Args:
        numerators, denominators: (rows,) sums of each row.
        weights: `bootstrap_weights` for as many rows.
    """
    drawn = weights @ denominators
    means = (weights @ numerators)[drawn > 0] / drawn[drawn > 0]
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(float(numerators.sum() / denominators.sum()), float(low), float(high))


def paired_difference(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Mean of after - before over rows that both answered, with its 95 % interval by Bonett and Price (2012).

    For the interval two rows are added, one that got worse by 1 and one that got better by 1: a bootstrap or a t
    interval of rows none of which differ has no width, however few they are.

    Args:
        before, after: (rows,) scores in [0, 1].
    """
    differences = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    widened = np.append(differences, [1.0, -1.0])
    half_width = TWO_SIDED_95 * widened.std() / np.sqrt(len(widened))
    low, high = np.clip([widened.mean() - half_width, widened.mean() + half_width], -1.0, 1.0)
    return Estimate(float(differences.mean()), float(low), float(high))
