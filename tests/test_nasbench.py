"""Search algorithms and rankings on tables of finished trainings; where they are not at hand, the tests are skipped.

The whole table, with ten seeds each, comes from ``bench/nasbench.py``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from bench.nasbench import DEVICES, SPACE
from bench.nasbench import macro as table_of_macro
from search.costs import Budget, CostTable
from search.front import hypervolume, non_dominated, ranks
from search.optimise import FOCUS, optimise
from search.propose import excess, fit
from search.rank import kendall_tau
from search.space import Architecture

TABLES = Path(__file__).resolve().parents[2] / "shared" / "nasbench"


@pytest.fixture(scope="module")
def macro():
    """NAS-Bench-Macro by number in the space: FLOPs ``[6561]``, and accuracy of three trainings in % ``[6561, 3]``."""
    path = TABLES / "nas-bench-macro_cifar10.json"
    if not path.is_file():
        pytest.skip("no nas-bench-macro_cifar10.json in ../shared/nasbench")
    return table_of_macro(TABLES)


def searched(macro, seed: int, count: int, budgets: list[Budget], focus: float) -> list[int]:
    """The numbers of the networks that `optimise` evaluates with the product's settings, in order."""
    flops, accuracy = macro
    effects = [np.array([flops[digit * 3 ** (7 - place)] - flops[0] for digit in range(3)]) for place in range(8)]
    rows = tuple(((choice,), effect) for choice, effect in zip(SPACE.choices, effects, strict=True))
    tables = {"macs": CostTable("macs", flops[0], rows)}
    assert [tables["macs"].of(SPACE.at(number)) for number in (0, 1234, 6560)] == flops[[0, 1234, 6560]].tolist()

    def evaluate(new: list[Architecture]) -> list[tuple[float, ...]]:
        return [(-accuracy[n].mean(), flops[n]) for n in map(SPACE.index, new)]

    dearest = fit(SPACE.at(SPACE.size - 1), tables, budgets, np.random.default_rng(seed))
    assert dearest is not None
    found = optimise(
        SPACE,
        evaluate,
        count=count,
        seeds=[SPACE.at(0), dearest],
        violation=lambda one: excess(one, tables, budgets),
        seed=seed,
        focus=focus,
        progress=False,
    )
    return [SPACE.index(one) for one in found]


def test_evolution_finds_the_front_and_random_search_does_not(macro):
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    flops, accuracy = macro
    points = np.stack([flops, -accuracy.mean(axis=1)], axis=1)
    reference = (flops.max(), -85.0)
    whole = hypervolume(points, reference)
    assert len(np.unique(points[non_dominated(points)], axis=0)) == 35  # identity layers make some networks the same
    reached = []
    for seed in range(3):
        numbers = searched(macro, seed, 800, [], focus=0.0)
        drawn = np.random.default_rng(seed).permutation(SPACE.size)
        assert len(set(numbers)) == 800
        reached.append(
            [hypervolume(points[order[:n]], reference) / whole for order in (numbers, drawn) for n in (400, 800)]
        )
    at_400, at_800, random_400, random_800 = np.mean(reached, axis=0)
    assert at_400 >= 0.98 > random_400 and at_800 >= 0.99 > random_800


def test_evolution_finds_the_best_within_a_budget(macro):
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    flops, accuracy = macro
    mean = accuracy.mean(axis=1)
    allowed = np.flatnonzero(flops <= 60e6)
    regrets = []
    for seed in range(4):
        numbers = searched(macro, seed, 200, [Budget("macs", 60e6)], FOCUS)
        assert len(set(numbers)) == 200 and flops[numbers].max() <= 60e6
        drawn = np.random.default_rng(seed).permutation(allowed)[:200]
        regrets.append([mean[allowed].max() - mean[order].max() for order in (numbers, drawn)])
    evolved, random = np.mean(regrets, axis=0)
    assert evolved <= 0.05 < random


def test_two_trainings_agree_over_all_networks_and_hardly_within_the_best_tenth(macro):
    flops, accuracy = macro
    mean = accuracy.mean(axis=1)
    # The 656th of the best shares its accuracy with the four behind it: by which of them counts, tau is .182 to .187.
    best = np.argsort(-mean.round(6), kind="stable")[: SPACE.size // 10]
    assert kendall_tau(accuracy[:, 0], accuracy[:, 1]) == pytest.approx(0.882, abs=5e-4)
    assert kendall_tau(accuracy[best, 0], accuracy[best, 1]) == pytest.approx(0.184, abs=2e-3)
    assert kendall_tau(flops, mean) == pytest.approx(0.556, abs=5e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_fronts_of_trained_yolos_equal_brute_force(device):
    path = TABLES / "yolobench" / "merged_results.csv"
    if not path.is_file():
        pytest.skip("no yolobench/merged_results.csv in ../shared/nasbench")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(float(row[f"{device}_latency"]), -float(row["mAP_0.5:0.95_voc"])) for row in rows]
    beaten = [any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]
    sorted_points = ranks(np.array(points))
    assert (sorted_points == 0).tolist() == [not one for one in beaten]
    assert beaten.count(False) == DEVICES[device]
    # Each rank is the front of what remains without those before it.
    for rank in range(1, sorted_points.max() + 1):
        assert (ranks(np.array(points)[sorted_points >= rank]) == 0).sum() == (sorted_points == rank).sum()
