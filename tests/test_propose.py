"""Which subnets alphas and costs propose: within the budgets, spread over costs, all variants of the undecided."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from small import TWO_ROWS

from models.graph import normalize, resolve
from models.parse import parse_text
from models.supernet import Supernet
from search.costs import Budget, cost_tables, within
from search.propose import argmax, excess, fit, greedy, log_probability, propose, seeds, variants
from search.space import SearchSpace


@pytest.fixture(scope="module")
def tables():
    return cost_tables(resolve(normalize(parse_text(TWO_ROWS))), 64)


def two_rows(kind: str = "shared", **alphas: dict) -> Supernet:
    """The supernet with alphas set: ``two_rows(**{"1.act": {"mish": 5.0}})``."""
    text = TWO_ROWS if kind == "shared" else TWO_ROWS.replace("{choice: [1, 2, 3]}", "2")
    net = Supernet(parse_text(text), kind)
    with torch.no_grad():
        for decision, alpha in zip(net.decisions, net.alphas, strict=True):
            for option, value in alphas.get(decision.name, {}).items():
                alpha[decision.options.index(option)] = value
    return net


def test_proposals_keep_the_budget_and_hold_the_extremes(tables):
    net = two_rows()
    space = SearchSpace.of(net.spec)
    least, most = (tables["macs"].extreme(largest=large)[0] for large in (False, True))
    found = propose(net, space, tables, [], 10, np.random.default_rng(0))
    costs = [tables["macs"].of(one) for one in found]
    assert len(found) == len(set(found)) == 10 and costs == sorted(costs)
    assert costs[0] == least and costs[-1] == most and argmax(net) in found
    limit = (least + most) / 2
    found = propose(net, space, tables, [Budget("macs", limit)], 10, np.random.default_rng(0))
    assert len(found) == 10 and all(tables["macs"].of(one) <= limit for one in found)
    only = propose(net, space, tables, [Budget("macs", least)], 10, np.random.default_rng(0))
    assert only and all(tables["macs"].of(one) == least for one in only)


def test_alpha_decides_between_subnets_of_one_cost(tables):
    net = two_rows(**{"1.act": {"mish": 5.0}, "2.act": {"mish": 5.0}})
    found = propose(net, SearchSpace.of(net.spec), tables, [], 12, np.random.default_rng(0))
    mish = [one for one in found if one.picks["1.act"] == one.picks["2.act"] == "mish"]
    assert len(mish) >= 8


def test_fitting_changes_nothing_that_already_fits(tables):
    space = SearchSpace.of(two_rows().spec)
    rng = np.random.default_rng(0)
    for number in range(0, space.size, 7):
        assert fit(space.at(number), tables, [Budget("macs", 1e12)], rng) == space.at(number)


def test_undecided_choices_are_varied_and_decided_ones_stay():
    net = two_rows(
        **{
            "1.number": {2: 4.0},
            "1.kernel": {5: 0.05},  # .512 to .488: undecided
            "1.act": {"mish": 1.0, "leaky": 0.99},  # undecided, and relu is out of it
            "2.kernel": {3: 1.0},
            "2.act": {"relu": 2.0},
        }
    )
    found = variants(net)
    assert found[0] == argmax(net) and len(found) == 4
    assert {(one.picks["1.kernel"], one.picks["1.act"]) for one in found} == {
        *itertools.product((3, 5), ("mish", "leaky"))
    }
    assert all((one.picks["1.number"], one.picks["2.kernel"], one.picks["2.act"]) == (2, 3, "relu") for one in found)
    probabilities = {name: p.detach() for name, p in net.probabilities().items()}
    likely = [log_probability(net, probabilities, one) for one in found]
    assert likely == sorted(likely, reverse=True)


def test_many_undecided_choices_stay_few_variants():
    net = two_rows()  # all five are undecided: 2^4 jointly, the fifth alone
    assert len(variants(net)) == 17 == len(set(variants(net)))
    decided = two_rows(**{d.name: {d.options[0]: 3.0} for d in net.decisions})
    assert variants(decided) == [argmax(decided)]


@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_the_greedy_way_leads_from_the_cheapest_to_argmax_by_the_best_rate(kind, tables):
    net = two_rows(kind)
    counted = tables if kind == "shared" else cost_tables(resolve(net.spec), 64)
    with torch.no_grad():
        for number, alpha in enumerate(net.alphas):
            alpha.normal_(generator=torch.Generator().manual_seed(number + 10))
    table = counted["macs"]
    way = greedy(net, counted, [])
    assert table.of(way[0]) == table.extreme(largest=False)[0] and way[-1] == argmax(net)
    probabilities = {name: p.detach() for name, p in net.probabilities().items()}
    chances = [log_probability(net, probabilities, one) for one in way]
    assert chances == sorted(chances)
    # The first step against all subnets that differ from the cheapest in one decision.
    start, first = net.decide(way[0].picks), way[1]
    rates = {}
    for decision in net.decisions:
        for option in decision.options:
            one = type(first)(net.picks({**start, decision.name: option}))
            gain = log_probability(net, probabilities, one) - chances[0]
            if gain > 1e-9:
                extra = table.of(one) - table.of(way[0])
                rates[one] = gain / extra if extra > 0 else math.inf
    assert rates[first] == max(rates.values())


@pytest.mark.parametrize("part", [0.0, 0.4, 1.0])
def test_seeds_keep_every_budget_that_is_counted(part, tables):
    net = two_rows(**{"1.act": {"mish": 2.0}, "2.kernel": {5: 2.0}})
    space = SearchSpace.of(net.spec)
    budgets = []
    for metric in ("macs", "params"):
        least, most = (tables[metric].extreme(largest=large)[0] for large in (False, True))
        budgets.append(Budget(metric, least + part * (most - least)))
    found = seeds(net, space, tables, [*budgets, Budget("latency_ms", 1.0)], np.random.default_rng(0))
    assert found and len(found) == len(set(found))
    for one in found:
        space.check(one)
        assert within({metric: table.of(one) for metric, table in tables.items()}, budgets)
        assert excess(one, tables, budgets) == 0
    cheapest, dearest = (tables["macs"].extreme(largest=large)[1] for large in (False, True))
    assert cheapest in found
    if part == 1.0:
        assert dearest in found and set(variants(net)) <= set(found) and greedy(net, tables, budgets)[-1] in found
    over = excess(dearest, tables, budgets)
    assert over == pytest.approx(sum(tables[b.metric].of(dearest) / b.limit - 1 for b in budgets))
