"""Fronts, sorted and measured by brute force; ties and knees worked out by hand; the files they leave."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.jackknife import jackknife_error
from engine.tasks import DETECT
from models.spec import Choice
from search.costs import Budget
from search.front import (
    Judged,
    draw_front,
    front_table,
    hypervolume,
    knee,
    non_dominated,
    numbered,
    on_front,
    ranks,
    score_error,
    tie,
    ties,
    write_front,
)
from search.space import SearchSpace

SPACE = SearchSpace((Choice("a", (3, 5)), Choice("b", ("relu", "mish", "leaky"))))
POINTS = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.tuples(*[st.integers(0, 4)] * width), min_size=1, max_size=20)
)


def judged(number: int, ap: float, macs: float, without: tuple[float, ...] = (), **costs: float) -> Judged:
    costs = {"macs": macs, "params": 10.0, **costs}
    return Judged(number, SPACE.at(number), ap, 2 * ap, costs, without)


# ---- sorting


def beaten(one, others):
    return any(all(b <= a for a, b in zip(one, other, strict=True)) and other != one for other in others)


@given(POINTS)
def test_the_front_equals_brute_force(points):
    assert non_dominated(np.array(points, float)).tolist() == [not beaten(one, points) for one in points]


@given(POINTS)
def test_ranks_equal_peeling_front_after_front(points):
    left, rank, expected = list(range(len(points))), 0, [0] * len(points)
    while left:
        front = [n for n in left if not beaten(points[n], [points[m] for m in left])]
        for n in front:
            expected[n] = rank
        left, rank = [n for n in left if n not in front], rank + 1
    assert ranks(np.array(points, float)).tolist() == expected


@given(POINTS)
def test_the_hypervolume_is_the_number_of_unit_cells_behind_the_points(points):
    cells = itertools.product(range(4), repeat=len(points[0]))
    behind = sum(any(all(p <= c for p, c in zip(one, cell, strict=True)) for one in points) for cell in cells)
    assert hypervolume(np.array(points, float), [4] * len(points[0])) == behind


def test_nothing_has_no_front_and_no_volume():
    assert on_front([], ["macs"]) == [] and ranks(np.zeros((0, 2))).tolist() == []
    assert hypervolume(np.zeros((0, 2)), [1, 1]) == 0 == hypervolume(np.array([[2.0, 0.0]]), [1, 1])


def test_the_metrics_decide_who_is_on_the_front():
    both = [judged(0, 0.3, 5, params=1), judged(1, 0.2, 5, params=9), judged(2, 0.2, 4, params=9)]
    assert on_front(both, ["macs"]) == [True, False, True]
    assert on_front(both, ["params"]) == [True, False, False]


# ---- noise


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_the_jackknife_of_a_mean_is_its_ordinary_standard_error(values):
    groups = len(values)
    without = [(sum(values) - value) / (groups - 1) for value in values]
    assert jackknife_error(without) == pytest.approx(np.std(values, ddof=1) / math.sqrt(groups), abs=1e-9)


def test_a_tie_is_judged_by_the_difference_on_the_same_images():
    # Groups differ widely in AP, but alike for all: differences of 1 to 0 are exactly .01, of 2 to 1 they waver.
    easy = np.array([0.20, 0.30, 0.25, 0.35])
    cheap, middle = judged(0, 0.275, 1, tuple(easy)), judged(1, 0.285, 2, tuple(easy + 0.01))
    # d - mean d = -.02 .02 -.02 .02: se^2 = 3/4 * .0016, se = .0346, 1.96 se = .068 > .005
    dear = judged(2, 0.290, 3, tuple(easy + 0.01 + np.array([-0.02, 0.02, -0.02, 0.02])))
    assert jackknife_error(np.subtract(dear.without, middle.without)) == pytest.approx(math.sqrt(0.0012))
    assert score_error(cheap) == pytest.approx(score_error(middle)) == pytest.approx(math.sqrt(0.75 * 0.0125))
    assert ties([cheap, middle, dear], [True, True, True]) == [(), (), (0, 1)]
    assert ties([cheap, middle, dear], [True, False, True]) == [(), (), (0,)], "a tie is between points of the front"


def test_a_tie_is_with_what_costs_less_and_unmeasured_ones_are_in_none():
    same = [judged(0, 0.3, 1, (0.3, 0.3)), judged(1, 0.3, 1, (0.3, 0.3)), judged(2, 0.3, 2, (0.3, 0.3))]
    assert ties(same, [True, True, True]) == [(), (), (0, 1)]
    assert tie(same[0], same[1])
    assert ties([judged(0, 0.3, 1), judged(1, 0.3, 1)], [True, True]) == [(), ()]
    assert math.isnan(score_error(judged(0, 0.3, 1)))


def test_groups_without_a_score_tell_nothing_apart():
    """A group of images that has all boxes: without it there is no AP."""
    one, other = judged(0, 0.3, 1, (math.nan, 0.3)), judged(1, 0.9, 2, (math.nan, 0.9))
    assert tie(one, other) and tie(other, one)


def test_the_knee_is_farthest_above_the_chord():
    line = [judged(0, 0.10, 10), judged(1, 0.28, 12), judged(2, 0.29, 15), judged(3, 0.30, 20), judged(4, 0.05, 30)]
    front = on_front(line, ["macs"])
    assert front == [True, True, True, True, False]
    assert knee(line, front, "macs") == 1  # .9 - .2 above the chord; the next one .95 - .5
    assert knee(line[:2], [True, True], "macs") is None
    straight = [judged(n, 0.1 + 0.1 * n, 10 + n) for n in range(3)]
    assert knee(straight, [True] * 3, "macs") is None


# ---- file, table, picture


def test_the_file_holds_every_judged_subnet_with_ties_errors_and_picks(tmp_path):
    rows = [
        judged(1, 0.3, 1e6, (0.3, 0.31), latency_ms=2.34567, latency_table_ms=2.0),
        judged(4, 0.305, 2e6, (0.32, 0.29), latency_ms=3.0, latency_table_ms=3.0),
        judged(5, 0.2, 3e6, (0.2, 0.2), latency_ms=4.0, latency_table_ms=4.0),
    ]
    write_front(tmp_path / "front.csv", DETECT, SPACE, rows, on_front(rows, ["macs"]))
    with open(tmp_path / "front.csv", newline="") as file:
        found = list(csv.reader(file))
    assert found == [
        "subnet front ties ap ap_error ap50 loss macs params latency_ms latency_table_ms a b".split(),
        ["1", "1", "", "0.3", "0.005", "0.6", "", "1000000.0", "10.0", "2.346", "2.0", "3", "mish"],
        ["4", "1", "1", "0.305", "0.015", "0.61", "", "2000000.0", "10.0", "3.0", "3.0", "5", "mish"],
        ["5", "0", "", "0.2", "0.0", "0.4", "", "3000000.0", "10.0", "4.0", "4.0", "5", "leaky"],
    ]


def test_the_table_shows_ties_and_errors_lowest_ap_first():
    rows = [judged(4, 0.305, 2e6, (0.32, 0.29)), judged(1, 0.3, 1e6, (0.3, 0.31)), judged(5, 0.2, 3e6)]
    assert front_table(DETECT, rows, on_front(rows, ["macs"])).splitlines() == [
        "subnet     AP     +-   AP50  tie with  macs    params",
        "------  -----  -----  -----  --------  ------  ------",
        "1       0.300  0.005  0.600  -         1.000M  0.000M",
        "4       0.305  0.015  0.610  1         2.000M  0.000M",
    ]
    assert numbered([]) == "-" and numbered([1, 2, 3, 4]) == "1, 2, 3, 4"
    assert numbered([1, 2, 3, 4, 5]) == "1, 2, 3 and 2 more"


@pytest.mark.parametrize("metrics", [["macs"], ["macs", "latency_ms"]])
def test_a_front_is_drawn_with_and_without_errors(tmp_path, metrics):
    rng = np.random.default_rng(0)
    rows = []
    for number in range(6):
        ap = 0.3 + 0.01 * number
        without = tuple(ap + rng.normal(0, 0.01, 10)) if number % 2 else ()
        rows.append(judged(number, ap, 1e9 + 1e8 * number, without, latency_ms=5.0 + number))
    draw_front(tmp_path / "front.png", DETECT, rows, on_front(rows, metrics), metrics, 5, [Budget("latency_ms", 20.0)])
    draw_front(tmp_path / "one.png", DETECT, rows[:1], [True], metrics, 0, [])
    for name in ("front.png", "one.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
