"""What subnets cost: additive tables of MACs, parameters and milliseconds, and budgets."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from small import TWO_ROWS

from data.structures import Fault
from models.cost import network_costs, row_cost, totals
from models.graph import combinations, normalize, resolve
from models.parse import parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.costs import (
    Budget,
    CostTable,
    check_budgets,
    check_together,
    cost_tables,
    format_cost,
    parse_budget,
    row_costs,
    within,
)
from search.space import Architecture, SearchSpace

# 10 ms, and 1 ms more for 5x5 and 2 ms more for Mish, but both together only 2.5 ms
KERNEL, ACT = Choice("1.kernel", (3, 5)), Choice("1.act", ("relu", "mish"))
LATENCY = CostTable("latency_ms", 10.0, (((KERNEL, ACT), np.array([[0.0, 2.0], [1.0, 2.5]])),))


@pytest.fixture(scope="module")
def two_rows():
    return resolve(normalize(parse_text(TWO_ROWS)))


@pytest.fixture(scope="module")
def tables(two_rows):
    return cost_tables(two_rows, 64)


def test_the_additive_table_equals_counting_the_frozen_network(two_rows, tables):
    space = SearchSpace.of(two_rows.spec)
    for number in random.Random(0).sample(range(space.size), 12):
        architecture = space.at(number)
        params, macs = totals(network_costs(resolve(two_rows.spec.freeze(architecture.picks)), 64))
        assert tables["params"].of(architecture) == params
        assert tables["macs"].of(architecture) == macs


def test_extremes_are_those_of_all_subnets(two_rows, tables):
    space = SearchSpace.of(two_rows.spec)
    for table in tables.values():
        every = [table.of(space.at(number)) for number in range(space.size)]
        assert table.extreme(largest=False)[0] == min(every)
        assert table.extreme(largest=True)[0] == max(every)


@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_the_expected_cost_is_the_mean_over_all_architectures(kind):
    text = TWO_ROWS if kind == "shared" else TWO_ROWS.replace("{choice: [1, 2, 3]}", "2")
    net = Supernet(parse_text(text), kind)
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.normal_(generator=torch.Generator().manual_seed(len(alpha)))
    table = cost_tables(resolve(net.spec), 64)["macs"]
    p = net.probabilities()
    mean = 0.0
    for options in itertools.product(*(decision.options for decision in net.decisions)):
        decided = dict(zip((d.name for d in net.decisions), options, strict=True))
        chance = 1.0
        for decision in net.decisions:
            chance *= float(p[decision.name].detach()[decision.options.index(decided[decision.name])])
        mean += chance * table.of(Architecture(net.picks(decided)))
    expected = table.expected(p)
    assert float(expected.detach()) == pytest.approx(mean, rel=1e-6)
    expected.backward()
    assert any(alpha.grad is not None and alpha.grad.abs().sum() > 0 for alpha in net.alphas)


def test_latencies_add_up_as_macs_do():
    assert LATENCY.of(Architecture({"1.kernel": 5, "1.act": "mish"})) == 12.5
    assert LATENCY.extreme(largest=False) == (10.0, Architecture({"1.kernel": 3, "1.act": "relu"}))
    p = {"1.kernel": torch.tensor([0.25, 0.75]), "1.act": torch.tensor([0.5, 0.5])}
    # 10 + .25 (.5 * 0 + .5 * 2) + .75 (.5 * 1 + .5 * 2.5) = 11.5625
    assert float(LATENCY.expected(p)) == pytest.approx(11.5625)
    joint = {"1": torch.tensor([0.125, 0.125, 0.375, 0.375])}
    assert float(LATENCY.expected(joint)) == pytest.approx(11.5625)


def test_an_option_is_found_by_its_value_and_kind():
    flag = CostTable("macs", 0.0, (((Choice("0.shortcut", (1, True)),), np.array([3.0, 7.0])),))
    assert flag.of(Architecture({"0.shortcut": 1})) == 3.0
    assert flag.of(Architecture({"0.shortcut": True})) == 7.0


def test_budgets_are_read_and_told_apart():
    assert parse_budget("macs=900M") == Budget("macs", 900e6)
    assert parse_budget("params=2.5m") == Budget("params", 2.5e6)
    assert parse_budget("latency_ms=12") == Budget("latency_ms", 12.0)
    for wrong in (
        "macs",
        "flops=3G",
        "latency_ms=12M",
        "latency_ms=12ms",
        "macs=0",
        "macs=-3",
        "macs=1.2.3",
        "macs=nan",
    ):
        with pytest.raises(Fault, match=r"--budget"):
            parse_budget(wrong)
    assert within({"macs": 5, "params": 2}, [Budget("macs", 5)])
    assert not within({"macs": 5, "params": 2}, [Budget("macs", 5), Budget("params", 1)])


def test_numbers_are_shown_with_their_units():
    assert format_cost("macs", 83_327_385_600) == "83.327G" and format_cost("latency_ms", 12.345) == "12.3"
    assert str(Budget("latency_ms", 12.0)) == "latency_ms=12" and str(Budget("macs", 9e8)) == "macs=900.000M"


def test_a_row_is_counted_once_for_all_activations_and_as_if_it_were_not(monkeypatch):
    row = "[-1, {choice: [1, 2]}, C3, [8, {kernel: {choice: [1, 3]}, act: {choice: [relu, mish]}}]]"
    text = f"nc: 2\nanchors: [[9, 9]]\nbackbone:\n  - {row}\nhead:\n  - [-1, 1, Detect, [nc, anchors]]\n"
    node = resolve(normalize(parse_text(text))).nodes[0]
    each = [row_cost(node, options, 32) for options in combinations(node.choices)]
    counted = []
    monkeypatch.setattr("search.costs.row_cost", lambda *given: counted.append(given) or row_cost(*given))
    assert row_costs(node, 32) == each and len(each) == 8 and len(counted) == 4 == len(set(each))


def test_a_budget_that_nothing_meets_names_the_smallest_value(tables):
    smallest = tables["params"].extreme(largest=False)[0]
    with pytest.raises(Fault, match=f"no subnet can meet it; the smallest has params={smallest:.0f}"):
        check_budgets([Budget("params", smallest - 1)], tables)
    check_budgets([Budget("params", smallest)], tables)


def test_budgets_that_can_only_be_met_apart_are_told():
    costs = {"macs": [1.0, 5.0], "params": [9.0, 2.0]}
    tables = {name: CostTable(name, 0.0, (((KERNEL,), np.array(values)),)) for name, values in costs.items()}
    subnets = [Architecture({"1.kernel": size}) for size in (3, 5)]
    check_together([Budget("macs", 1.0), Budget("params", 9.0)], tables, subnets)
    check_together([Budget("macs", 1.0), Budget("latency_ms", 1.0)], tables, subnets)  # which no table counts
    with pytest.raises(Fault, match="no subnet meets macs=0.000M, params=0.000M together; each of them alone can be"):
        check_together([Budget("macs", 1.0), Budget("params", 2.0)], tables, subnets)


def test_a_latency_that_nothing_reaches_is_told_before_anything_is_trained():
    with pytest.raises(Fault) as problem:
        check_budgets([Budget("latency_ms", 9.0)], {"latency_ms": LATENCY})
    assert str(problem.value) == (
        "--budget latency_ms=9: no subnet can meet it on this device; "
        "the smallest latency is latency_ms=10.000 (1.kernel=3 1.act=relu)"
    )
    check_budgets([Budget("latency_ms", 10.0)], {"latency_ms": LATENCY})
