"""How well one ranking of subnets agrees with another: what a supernet says against what training on its own gives.

Values are to be large (AP, accuracy) and come as two sequences of equal length, one value a subnet. No agreement can be
read without its ceiling: the same networks trained with another seed agree only so far (NAS-Bench-Macro: tau .88 over
all networks, .18 within the best tenth), and plain MACs are no bad ranking either.

python -m search.rank runs/search/exp --subnets 12 --seeds 2 --epochs 100
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import groupby

import numpy as np

Values = Sequence[float] | np.ndarray


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


def regret(score: Values, truth: Values, k: int = 1) -> float:
    """What is lost by taking the best of the `k` that `score` puts first: the best `truth` minus theirs, 0 or more."""
    scores, truths = paired(score, truth)
    return float(truths.max() - truths[best(scores, k)].max())


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
