"""The additive table that fits values of whole subnets: ridge regression on the options of every row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from models.spec import Choice
from search.costs import CostTable
from search.space import Architecture

MOST_TOGETHER = 400  # combinations of a row's choices, each of which is a feature of its own


def fit_additive(
    rows: Sequence[tuple[Choice, ...]],
    subnets: Sequence[Architecture],
    values: Sequence[float],
    prior: CostTable | None = None,
) -> CostTable:
    """The additive table that fits values of whole subnets, a number over 0 each.

    Ridge regression on what a row's picks are: one by one, in pairs, and all together, so that options of which little
    was seen are told by what they have in common with others. The strength of the penalty is the one with the least
    relative error when every subnet is left out in turn (in closed form: Allen, The relationship between variable
    selection and data augmentation and a method for prediction, Technometrics 1974). With a `prior` only the
    difference to it is fitted, and it may be stretched row by row. Every row's cheapest options cost 0 in what returns,
    since only sums can be known.
    """
    y = np.array(values, dtype=np.float64)
    residual = y - np.array([prior.of(one) for one in subnets]) if prior else y
    bases = [_bases(choices, prior.rows[row][1] if prior else None) for row, choices in enumerate(rows)]
    features = []
    for choices, of_row in zip(rows, bases, strict=True):
        places = tuple(np.array([[c.index(one.picks[c.name]) for c in choices] for one in subnets]).T)
        features.append(np.stack([base[places] for base in of_row], axis=1))
    coefficients, constant = _ridge(np.concatenate(features, axis=1), residual, y)
    parts = np.split(coefficients, np.cumsum([feature.shape[1] for feature in features])[:-1])
    fixed = constant + (prior.fixed if prior else 0.0)
    found = []
    for row, (choices, of_row, part) in enumerate(zip(rows, bases, parts, strict=True)):
        array = np.tensordot(part, np.stack(of_row), axes=1) + (prior.rows[row][1] if prior else 0.0)
        fixed += float(array.min())
        found.append((tuple(choices), array - array.min()))
    return CostTable("latency_ms", fixed, tuple(found))


def _bases(choices: Sequence[Choice], prior: np.ndarray | None) -> list[np.ndarray]:
    """What a row's cost is put together of, each as an array over its options: 1 where some of its choices have certain
    options and 0 elsewhere, and what the prior says of the row, so that all of it can be stretched.
    """
    sizes = [len(choice.options) for choice in choices]
    found = [] if prior is None or prior.std() == 0 else [prior / prior.std()]
    for chosen in _subsets(sizes):
        for options in itertools.product(*(range(sizes[place]) for place in chosen)):
            base = np.zeros(sizes)
            at: list[slice | int] = [slice(None)] * len(sizes)
            for place, option in zip(chosen, options, strict=True):
                at[place] = option
            base[tuple(at)] = 1.0
            found.append(base)
    return found


def _subsets(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of choices with so many options each one, each pair, and all where their combinations are few."""
    small = [chosen for size in (1, 2) for chosen in itertools.combinations(range(len(sizes)), size)]
    return [*small, tuple(range(len(sizes)))] if len(sizes) > 2 and math.prod(sizes) <= MOST_TOGETHER else small


def _ridge(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients and constant; `scale` is what an error of y is a share of."""
    count = len(y)
    centred = x - x.mean(axis=0)
    offsets = y - y.mean()
    weights, vectors = np.linalg.eigh(centred @ centred.T)
    weights = weights.clip(min=0.0)
    seen = vectors.T @ offsets
    best = (math.inf, 0.0)
    for penalty in weights.mean() * 10.0 ** np.arange(-7.0, 4.0, 0.5) + 1e-12:
        kept = weights / (weights + penalty)
        left = offsets - vectors @ (kept * seen)
        share = (vectors**2 @ kept + 1 / count).clip(max=1 - 1e-9)  # of a subnet's own value in its prediction
        best = min(best, (float(np.mean((left / (1 - share) / scale) ** 2)), float(penalty)))
    coefficients = centred.T @ (vectors @ (seen / (weights + best[1])))
    return coefficients, float(y.mean() - x.mean(axis=0) @ coefficients)
