"""Which subnet a training step runs. All of it follows from (seed, step): a resume or another rank draws the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from models.spec import Choice


def fair_options(decisions: Sequence[Choice], seed: int, step: int) -> dict[str, Any]:
    """An option for every decision, strictly fair (FairNAS, arXiv 1907.01845): each comes exactly once in every window
    of as many steps as the decision has options, in a fresh random order.
    """
    decided = {}
    for decision in decisions:
        window, place = divmod(step, len(decision.options))
        rng = np.random.default_rng((seed, zlib.crc32(decision.name.encode()), window))
        decided[decision.name] = decision.options[rng.permutation(len(decision.options))[place]]
    return decided


def drawn_options(
    decisions: Sequence[Choice], probabilities: Mapping[str, Tensor], rng: np.random.Generator
) -> dict[str, Any]:
    """An option for every decision, by its probabilities ``[options]``."""
    decided = {}
    for decision in decisions:
        weights = probabilities[decision.name].detach().double().cpu().numpy()
        decided[decision.name] = decision.options[rng.choice(len(weights), p=weights / weights.sum())]
    return decided


def drawn_pairs(
    decisions: Sequence[Choice],
    probabilities: Mapping[str, Tensor],
    decided: Mapping[str, Any],
    rng: np.random.Generator,
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """A second option beside the one that was drawn for every decision, by the probabilities of those that are left;
    and which of the two runs, by their probabilities alone. Returns what runs, and the pairs.
    """
    pairs, running = {}, {}
    for decision in decisions:
        weights = probabilities[decision.name].detach().double().cpu().numpy()
        first = decision.index(decided[decision.name])
        left = np.where(np.arange(len(weights)) == first, 0, weights)
        second = int(rng.choice(len(weights), p=left / left.sum()))
        runs = first if rng.random() * (weights[first] + weights[second]) < weights[first] else second
        pairs[decision.name] = (decision.options[first], decision.options[second])
        running[decision.name] = decision.options[runs]
    return running, pairs
