"""Statistics of evaluations: shares with their intervals, pass@k, correlation. On the host, in double precision."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Num


def wilson_interval(right: int | float, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Computes the score interval of a share of independent trials, which stays inside [0, 1].

    Args:
        right: Trials that succeeded; a tie may count as a half.
        total: All trials, at least 1.
        confidence: In (0, 1).

    Raises:
        ValueError: If `right` is not between 0 and `total`, or there are no trials.

    References:
        Wilson, 1927. "Probable inference, the law of succession, and statistical inference".

    Example:
        >>> [round(end, 4) for end in wilson_interval(8, 10)]
        [0.4902, 0.9433]
    """
    if not (total > 0 and 0 <= right <= total):
        raise ValueError(f"right must be between 0 and total, and total above 0, got {right} of {total}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, squared = right / total, z**2 / total
    center = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return max(0.0, center - half), min(1.0, center + half)


def pass_at_k(num_right: Sequence[int], num_samples: int, k: int) -> float:
    r"""Estimates how often at least one of k samples is right: the mean over problems of $1 - \binom{n-c}{k}/\binom{n}{k}$.

    The estimate is unbiased; $1 - (1 - c/n)^k$ is not.

    Args:
        num_right: c, for each problem the samples that are right.
        num_samples: n, samples of each problem.
        k: At most n.

    Raises:
        ValueError: If there is no problem, k is not between 1 and n, or a c not between 0 and n.

    References:
        Chen et al., 2021, eq. 1. https://arxiv.org/abs/2107.03374

    Example:
        >>> [round(pass_at_k([0, 2], num_samples=4, k=k), 4) for k in (1, 2, 3)]
        [0.25, 0.4167, 0.5]
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be between 1 and num_samples={num_samples}, got {k}.")
    if not len(num_right) or not all(0 <= right <= num_samples for right in num_right):
        raise ValueError(f"num_right must be at least one number between 0 and {num_samples}, got {list(num_right)}.")
    failed = [math.comb(num_samples - int(right), k) / math.comb(num_samples, k) for right in num_right]
    return 1 - sum(failed) / len(failed)


def pearson_correlation(x: Num[np.ndarray, " rows"], y: Num[np.ndarray, " rows"]) -> float:
    """Computes Pearson's correlation; NaN where one of the two does not vary.

    Example:
        >>> round(pearson_correlation(np.array([1, 2, 3]), np.array([2.0, 4.0, 7.0])), 4)
        0.9934
    """
    x, y = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64) for values in (x, y))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else math.nan
