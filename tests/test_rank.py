"""Agreement of two rankings, against the definitions written out pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.rank import kendall_tau, mean_ranks, regret, spearman

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 2)), min_size=1, max_size=12)


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


@given(PAIRS)
def test_tau_b_is_its_definition_over_all_pairs(points):
    x, y = zip(*points, strict=True)
    every = [(i, j) for i in range(len(x)) for j in range(i)]
    agreeing = sum(sign(x[i] - x[j]) * sign(y[i] - y[j]) for i, j in every)
    untied = [sum(values[i] != values[j] for i, j in every) for values in (x, y)]
    found = kendall_tau(x, y)
    if 0 in untied:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(agreeing / math.sqrt(untied[0] * untied[1]))
        assert kendall_tau(y, x) == pytest.approx(found)
        assert kendall_tau(x, [-value for value in y]) == pytest.approx(-found)


@given(PAIRS)
def test_rho_is_the_correlation_of_places_with_ties_shared(points):
    x, y = zip(*points, strict=True)

    def place(value, values):
        return sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2

    a, b = ([place(value, values) for value in values] for values in (x, y))
    assert mean_ranks(x).tolist() == a
    found = spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_worked_out_by_hand():
    # of 6 pairs 5 agree and 1 does not: (5 - 1) / 6
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # rho = 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 6 * 2 / 60
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)


def test_what_is_found_at_the_top():
    score, truth = [0.9, 0.8, 0.7, 0.1], [0.30, 0.50, 0.40, 0.45]
    assert regret(score, truth) == pytest.approx(0.2)
    assert regret(score, truth, k=2) == 0.0
