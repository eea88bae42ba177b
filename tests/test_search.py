"""The space, its costs, what is proposed and judged, and the front."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.structures import Fault, Sample
from models.cost import network_costs, totals
from models.graph import normalize, resolve
from models.parse import parse, parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.costs import Budget, check_budgets, cost_tables, format_cost, parse_budget, within
from search.front import non_dominated
from search.propose import argmax, fit, propose
from search.run import split_train
from search.sampling import drawn_options, fair_options
from search.space import Architecture, SearchSpace

TWO_ROWS = """
nc: 2
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, {choice: [1, 2, 3]}, MBottleneckCSP2, [8]]
head:
  - [-1, 2, MBottleneckCSP2, [8]]
  - [-1, 1, Detect, [nc, anchors]]
"""
SPACE = SearchSpace((Choice("a", (3, 5)), Choice("b", ("relu", "mish", "leaky")), Choice("c", (1, 2, 3, 4))))


@pytest.fixture(scope="module")
def two_rows():
    return resolve(normalize(parse_text(TWO_ROWS)))


@pytest.fixture(scope="module")
def tables(two_rows):
    return cost_tables(two_rows, 64)


# ---- space


def test_the_tiny_spaces_have_the_sizes_that_their_files_say():
    assert SearchSpace.of(normalize(parse("cfg/models/tiny-seed-search.yaml"))).size == 1_296
    assert SearchSpace.of(normalize(parse("cfg/models/tiny-search.yaml"))).size == 104_976


def test_index_is_a_bijection_and_json_comes_back():
    seen = set()
    for number in range(SPACE.size):
        architecture = SPACE.at(number)
        assert SPACE.index(architecture) == number
        assert SPACE.from_json(SPACE.to_json(architecture)) == architecture
        seen.add(architecture)
    assert len(seen) == SPACE.size == 24


def test_an_architecture_of_another_space_is_refused():
    other = SearchSpace((Choice("a", (3, 7)), *SPACE.choices[1:]))
    text = other.to_json(other.at(0))
    with pytest.raises(Fault, match="belongs to space"):
        SPACE.from_json(text)
    with pytest.raises(Fault) as problem:
        SPACE.check(Architecture({"a": 7, "b": "relu", "d": 1}))
    assert problem.value.lines == (
        "choice 'a' has no option 7; options are [3, 5]",
        "architecture has no pick for choice 'c'",
        "architecture picks for unknown choice 'd'",
    )


def test_a_file_without_choices_has_nothing_to_search():
    with pytest.raises(Fault, match="nothing to search"):
        SearchSpace.of(normalize(parse("cfg/models/tiny.yaml")))


# ---- sampling


@given(seed=st.integers(0, 1000), window=st.integers(0, 50))
def test_each_option_comes_exactly_once_in_each_of_its_windows(seed, window):
    for choice in SPACE.choices:
        steps = range(window * len(choice.options), (window + 1) * len(choice.options))
        drawn = [fair_options(SPACE.choices, seed, step)[choice.name] for step in steps]
        assert sorted(map(str, drawn)) == sorted(map(str, choice.options))


def test_options_are_drawn_by_their_probabilities():
    p = {"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.0, 1.0, 0.0]), "c": torch.full((4,), 0.25)}
    rng = np.random.default_rng(0)
    drawn = [drawn_options(SPACE.choices, p, rng) for _ in range(2000)]
    assert np.mean([d["a"] == 3 for d in drawn]) == pytest.approx(0.9, abs=0.03)
    assert all(d["b"] == "mish" for d in drawn)


# ---- costs


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


def test_budgets_are_read_and_told_apart():
    assert parse_budget("macs=900M") == Budget("macs", 900e6)
    assert parse_budget("params=2.5m") == Budget("params", 2.5e6)
    assert parse_budget("latency_ms=12") == Budget("latency_ms", 12.0)
    for wrong in ("macs", "flops=3G", "latency_ms=12M", "macs=0", "macs=-3", "macs=1.2.3", "macs=nan"):
        with pytest.raises(Fault, match=r"--budget"):
            parse_budget(wrong)
    assert within({"macs": 5, "params": 2}, [Budget("macs", 5)])
    assert not within({"macs": 5, "params": 2}, [Budget("macs", 5), Budget("params", 1)])
    assert format_cost("macs", 83_327_385_600) == "83.327G" and format_cost("latency_ms", 12.345) == "12.3"


def test_a_budget_that_nothing_meets_names_the_smallest_value(tables):
    smallest = tables["params"].extreme(largest=False)[0]
    with pytest.raises(Fault, match=f"no subnet can meet it; the smallest has params={smallest:.0f}"):
        check_budgets([Budget("params", smallest - 1)], tables)
    check_budgets([Budget("params", smallest)], tables)


# ---- proposal and front


def test_proposals_keep_the_budget_and_hold_the_extremes(two_rows, tables):
    net = Supernet(parse_text(TWO_ROWS), "shared")
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


def test_alpha_decides_between_subnets_of_one_cost(two_rows, tables):
    net = Supernet(parse_text(TWO_ROWS), "shared")
    with torch.no_grad():
        for decision, alpha in zip(net.decisions, net.alphas, strict=True):
            if decision.name.endswith("act"):
                alpha[decision.options.index("mish")] = 5.0
    found = propose(net, SearchSpace.of(net.spec), tables, [], 12, np.random.default_rng(0))
    mish = [one for one in found if one.picks["1.act"] == one.picks["2.act"] == "mish"]
    assert len(mish) >= 9


def test_fitting_changes_nothing_that_already_fits(two_rows, tables):
    space = SearchSpace.of(two_rows.spec)
    rng = np.random.default_rng(0)
    for number in range(0, space.size, 7):
        assert fit(space.at(number), tables, [Budget("macs", 1e12)], rng) == space.at(number)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_the_front_equals_brute_force(points):
    array = np.array(points, dtype=float)
    expected = []
    for one in points:
        beaten = any(all(b <= a for a, b in zip(one, other, strict=True)) and other != one for other in points)
        expected.append(not beaten)
    assert non_dominated(array).tolist() == expected


def test_weights_and_alphas_never_see_the_same_image(tmp_path):
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    samples = [Sample(tmp_path / f"{number}.jpg", *empty) for number in range(400)]
    weights, judging = split_train(samples)
    assert len(judging) == 80 and len(weights) == 320
    assert not {s.path for s in weights} & {s.path for s in judging}
    shuffled = random.Random(0).sample(samples, len(samples))
    assert {s.path for s in split_train(shuffled)[1]} == {s.path for s in judging}
    assert len(split_train(samples[:100])[1]) == 32 and len(split_train(samples[:20])[1]) == 10
    with pytest.raises(Fault, match="two or more training images"):
        split_train(samples[:1])
