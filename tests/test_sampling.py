"""Which subnet a step runs: strictly fair, independent between decisions, and a function of seed and step alone."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.spec import Choice
from search.sampling import drawn_options, drawn_pairs, fair_options

SIZES = st.lists(st.integers(2, 6), min_size=1, max_size=4)


def decisions(sizes: list[int]) -> list[Choice]:
    return [Choice(f"{row}.kernel", tuple(range(1, 2 * size, 2))) for row, size in enumerate(sizes)]


@given(sizes=SIZES, seed=st.integers(0, 10_000), window=st.integers(0, 1_000))
def test_every_option_comes_equally_often_in_every_window_of_the_least_common_multiple(sizes, seed, window):
    open_ = decisions(sizes)
    length = math.lcm(*sizes)
    drawn = [fair_options(open_, seed, step) for step in range(window * length, (window + 1) * length)]
    for decision in open_:
        count = Counter(options[decision.name] for options in drawn)
        assert count == {option: length // len(decision.options) for option in decision.options}


@given(seed=st.integers(0, 10_000), size=st.integers(2, 6))
def test_nothing_waits_longer_than_two_windows(seed, size):
    (decision,) = open_ = decisions([size])
    drawn = [fair_options(open_, seed, step)[decision.name] for step in range(8 * size)]
    for option in decision.options:
        places = [place for place, found in enumerate(drawn) if found == option]
        assert max(b - a for a, b in itertools.pairwise(places)) <= 2 * size - 1


def test_two_decisions_are_independent():
    """Over 600 windows every combination comes as often as the others, equal sizes or not."""
    for sizes in ([2, 3], [3, 3], [6, 6]):
        open_, steps = decisions(sizes), 3_600
        drawn = Counter(tuple(fair_options(open_, 7, step).values()) for step in range(steps))
        expected = steps / math.prod(sizes)
        assert len(drawn) == math.prod(sizes)
        assert max(abs(count - expected) for count in drawn.values()) < 5 * math.sqrt(expected)


@given(sizes=SIZES, seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
def test_a_step_draws_the_same_on_every_rank_and_after_a_resume(sizes, seed, order: random.Random):
    """Nothing is remembered: in whatever order steps are asked for, from whichever list of decisions."""
    open_ = decisions(sizes)
    steps = list(range(20))
    straight = [fair_options(open_, seed, step) for step in steps]
    order.shuffle(steps)
    shuffled = {step: fair_options(open_, seed, step) for step in steps}
    assert [shuffled[step] for step in range(20)] == straight
    alone = [fair_options(open_[-1:], seed, step) for step in range(20)]
    assert [options[open_[-1].name] for options in straight] == [options[open_[-1].name] for options in alone]


def test_seeds_differ():
    open_ = decisions([6, 6])
    runs = {tuple(tuple(fair_options(open_, seed, step).values()) for step in range(12)) for seed in range(50)}
    assert len(runs) == 50


def test_options_are_drawn_by_their_probabilities():
    a, b = Choice("a", (3, 5)), Choice("b", ("relu", "mish", "leaky"))
    p = {"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.0, 1.0, 0.0])}
    rng = np.random.default_rng(0)
    drawn = [drawn_options([a, b], p, rng) for _ in range(2_000)]
    assert abs(np.mean([d["a"] == 3 for d in drawn]) - 0.9) < 0.03
    assert all(d["b"] == "mish" for d in drawn)


def test_a_pair_is_drawn_without_replacement_and_one_of_it_runs_by_its_share():
    """P(i, then j) = p_i p_j / (1 - p_i); of the pair, i runs with p_i / (p_i + p_j)."""
    p = np.array([0.35, 0.05, 0.2, 0.1, 0.25, 0.05])
    (decision,) = open_ = decisions([6])
    probabilities = {decision.name: torch.from_numpy(p)}
    rng, count = np.random.default_rng(0), 20_000
    pairs, runs = np.zeros((6, 6)), np.zeros((6, 6))
    for _ in range(count):
        first = drawn_options(open_, probabilities, rng)
        running, pair = drawn_pairs(open_, probabilities, first, rng)
        i, j = (decision.index(option) for option in pair[decision.name])
        assert pair[decision.name][0] == first[decision.name] and i != j
        pairs[i, j] += 1
        runs[i, j] += running[decision.name] == pair[decision.name][0]
    expected = np.outer(p, p) / (1 - p[:, None])
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(pairs / count, expected, atol=4 * 0.5 / np.sqrt(count))
    often = pairs > 300
    share = p[:, None] / (p[:, None] + p)
    np.testing.assert_allclose(runs[often] / pairs[often], share[often], atol=0.1)
