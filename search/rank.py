"""How well one ranking of subnets agrees with another: what a supernet says against what training on its own gives.

Values are to be large (AP, accuracy) and come as two sequences of equal length, one value a subnet. No agreement can be
read without its ceiling: the same networks trained with another seed agree only so far (NAS-Bench-Macro: tau .88 over
all networks, .18 within the best tenth), and plain MACs are no bad ranking either.

python -m search.rank runs/search/exp --subnets 12 --seeds 2 --epochs 100
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

Values = Sequence[float] | np.ndarray
TENTH_OF_A_POINT = 0.001  # of AP, which lies in [0, 1]


def kendall_tau(x: Values, y: Values) -> float:
    """Kendall's tau-b, -1 to 1: pairs in the same order minus pairs in the opposite one, over those that are not tied
    (Kendall, The treatment of ties in ranking problems, Biometrika 1945). nan where all of `x` or all of `y` are equal.
    """
    a, b = paired(x, y)
    below: list[float] = []  # of all subnets with a smaller x, their y, sorted
    agreeing = 0
    for _, group in groupby(sorted(zip(a.tolist(), b.tolist(), strict=True)), key=lambda pair: pair[0]):
        level = [value for _, value in group]
        for value in level:
            agreeing += bisect_left(below, value) - (len(below) - bisect_right(below, value))
        for value in level:
            insort(below, value)
    untied = untied_pairs(a) * untied_pairs(b)
    return agreeing / math.sqrt(untied) if untied else math.nan


def tau_within(x: Values, y: Values, strata: Values) -> float:
    """Kendall's tau-b over those pairs alone that share a stratum, as one of subnets with equal MACs: what a ranking
    knows beyond them. nan where there is no pair that is tied in neither.
    """
    a, b = paired(x, y)
    same = np.triu(np.equal.outer(np.asarray(strata), np.asarray(strata)), k=1)
    of_a, of_b = (np.sign(np.subtract.outer(values, values))[same] for values in (a, b))
    untied = float((of_a**2).sum() * (of_b**2).sum())
    return float((of_a * of_b).sum()) / math.sqrt(untied) if untied else math.nan


def untied_pairs(values: np.ndarray) -> int:
    _, counts = np.unique(values, return_counts=True)
    return math.comb(len(values), 2) - sum(math.comb(int(count), 2) for count in counts)


def sparse_tau(x: Values, y: Values, step: float = TENTH_OF_A_POINT) -> float:
    """Kendall's tau-b of values rounded to multiples of `step`: what lies closer together than that counts as a tie
    (Yu et al., How to train your super-net, arXiv 2003.04276).
    """
    a, b = paired(x, y)
    return kendall_tau(np.round(a / step), np.round(b / step))


def spearman(x: Values, y: Values) -> float:
    """Spearman's rho, -1 to 1: the correlation of the ranks. nan where all of `x` or all of `y` are equal."""
    a, b = (mean_ranks(values) for values in paired(x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b) / scale if scale else math.nan


def mean_ranks(values: Values) -> np.ndarray:
    """The place of every value in ascending order, from 0; equal ones share the mean of their places."""
    _, group, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count + 1) / 2)[group])


def precision_at_top(score: Values, truth: Values, k: int) -> float:
    """P@top-k, 0 to 1: how many of the `k` best by `score` are among the `k` best by `truth`.

    What equals the k-th best truth counts as among them; of equal scores the earlier is taken.
    """
    scores, truths = paired(score, truth)
    assert 1 <= k <= len(scores), f"of {len(scores)} values there are no {k} best"
    return float(np.mean(truths[best(scores, k)] >= np.sort(truths)[-k]))


def regret(score: Values, truth: Values, k: int = 1) -> float:
    """What is lost by taking the best of the `k` that `score` puts first: the best `truth` minus theirs, 0 or more."""
    scores, truths = paired(score, truth)
    return float(truths.max() - truths[best(scores, k)].max())


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    x: Values,
    y: Values,
    rng: np.random.Generator,
    resamples: int = 1_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of ``statistic(x, y)`` over subnets drawn again with replacement (Efron 1979).

    Resamples in which the statistic is nan are left out; nan, nan if it is in all.
    """
    a, b = paired(x, y)
    drawn = rng.integers(len(a), size=(resamples, len(a)))
    values = np.array([statistic(a[chosen], b[chosen]) for chosen in drawn])
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def paired(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, float), np.asarray(y, float)
    assert a.ndim == 1 and a.shape == b.shape and len(a), f"one value a subnet in each, got {a.shape} and {b.shape}"
    return a, b


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The numbers of the `k` largest, of equal ones the earlier."""
    return np.argsort(-scores, kind="stable")[:k]


if __name__ == "__main__":
    import sys

    from search.rank_study import main

    sys.exit(main())
