"""The space, its costs, what is proposed and judged, and the front."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data.structures import Fault, Sample
from models.graph import normalize, resolve
from models.parse import parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.costs import Budget, cost_tables
from search.propose import argmax, fit, propose
from search.run import split_train
from search.space import SearchSpace

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
    assert len(mish) >= 8


def test_fitting_changes_nothing_that_already_fits(two_rows, tables):
    space = SearchSpace.of(two_rows.spec)
    rng = np.random.default_rng(0)
    for number in range(0, space.size, 7):
        assert fit(space.at(number), tables, [Budget("macs", 1e12)], rng) == space.at(number)


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
