"""Evolution: what it may evaluate, when it ends, and that it finds what was planted."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

pytest.importorskip("optuna", reason="the extra `search` is not installed")

from data.structures import Fault
from models.spec import Choice
from search.front import non_dominated
from search.optimise import main_effects, optimise
from search.space import Architecture, SearchSpace

SPACE = SearchSpace(tuple(Choice(f"{row}.kernel", (1, 3, 5)) for row in range(5)))
WEIGHTS = {"0.kernel": 4, "1.kernel": -3, "2.kernel": 2, "3.kernel": -1, "4.kernel": 5}


def cost(one: Architecture) -> float:
    return float(sum(one.picks.values()))


def values(one: Architecture) -> tuple[float, float]:
    """Minus a made-up AP, and the cost."""
    return -float(sum(WEIGHTS[name] * kernel for name, kernel in one.picks.items())), cost(one)


def run(evaluate=lambda new: [values(one) for one in new], *, count=60, limit=25.0, space=SPACE, seed=0, **options):
    options = {"seeds": [space.at(0)], "violation": lambda one: cost(one) / limit - 1, **options}
    return optimise(space, evaluate, count=count, seed=seed, progress=False, **options)


@pytest.mark.parametrize("focus", [0.0, 0.5])
def test_only_what_meets_the_budgets_is_evaluated_once_and_in_generations(focus):
    calls, seen = [], []

    def evaluate(new):
        calls.append(list(new))
        return [values(one) for one in new]

    found = run(
        evaluate, limit=13.0, focus=focus, population=8, on_generation=lambda results: seen.append(len(results))
    )
    evaluated = [one for new in calls for one in new]
    assert list(found) == evaluated and len(found) == len(set(found)) == 60
    assert all(found[one] == values(one) and cost(one) <= 13 for one in found)
    assert all(1 <= len(new) <= 8 for new in calls) and seen == np.cumsum([len(new) for new in calls]).tolist()
    assert calls[0][0] == SPACE.at(0)


def test_the_best_under_a_budget_and_the_front_are_found():
    every = [SPACE.at(number) for number in range(SPACE.size)]
    best = min(values(one)[0] for one in every if cost(one) <= 13)
    assert min(found[0] for found in run(limit=13.0, focus=0.5).values()) == best
    points = np.array([values(one) for one in every])
    front = {tuple(point) for point in points[non_dominated(points)]}
    assert front <= set(run(count=120).values())


def test_the_same_seed_finds_the_same_and_says_nothing(capfd):
    assert list(run(seed=3)) == list(run(seed=3)) != list(run(seed=4))
    assert capfd.readouterr() == ("", "")


def test_a_space_is_exhausted_where_count_is_larger():
    small = SearchSpace(SPACE.choices[:2])
    found = run(lambda new: [(cost(one), -cost(one)) for one in new], count=50, limit=7.0, space=small)
    assert {small.index(one) for one in found} == {n for n in range(9) if cost(small.at(n)) <= 7}


def test_nothing_is_evaluated_where_nothing_meets_the_budgets():
    assert run(limit=4.0, focus=0.5) == {}


def test_one_network_of_many_numbers_is_evaluated_once():
    names = ("0.number", "0.kernel.0", "0.kernel.1", "0.kernel.2")
    space = SearchSpace((Choice(names[0], (1, 2, 3)), *(Choice(name, (3, 5)) for name in names[1:])))
    found = run(lambda new: [(cost(one), -cost(one)) for one in new], count=99, limit=99.0, space=space)
    assert len(found) == 2 + 4 + 8 < space.size == 24
    assert set(found) == {space.canonical(space.at(number)) for number in range(24)}


def test_an_interrupted_search_has_told_what_it_reached():
    reached = {}
    calls = itertools.count()

    def evaluate(new):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return [values(one) for one in new]

    with pytest.raises(KeyboardInterrupt):
        run(evaluate, population=10, on_generation=reached.update)
    assert 11 <= len(reached) <= 20 and all(reached[one] == values(one) for one in reached)


def test_main_effects_rank_as_a_sum_over_choices_does():
    every = [SPACE.at(number) for number in range(SPACE.size)]
    estimate = main_effects(SPACE, {one: values(one) for one in every[::2]})
    order = np.argsort([values(one)[0] for one in every], kind="stable")
    sorted_by_it = np.array([values(every[n])[0] for n in np.argsort([estimate(one) for one in every], kind="stable")])
    assert np.abs(sorted_by_it - [values(every[n])[0] for n in order]).max() <= 2  # neighbours may change places


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Fault) as problem:
        run()
    assert problem.value.lines == (
        "to search a large space Optuna is needed, not installed here: pip install -e '.[search]'",
    )
