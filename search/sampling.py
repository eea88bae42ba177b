"""Which subnet a training step runs. All of it follows from (seed, step): a resume or another rank draws the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.spec import Choice

WARMEST, COLDEST = 5.0, 0.1  # temperatures of a mixture (FBNet, arXiv 1812.03443, begins at 5)


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


def gumbel_noise(decisions: Sequence[Choice], rng: np.random.Generator) -> dict[str, Tensor]:
    """``-log(-log u)`` with u uniform in (0, 1), for every option ``[options]``, float64."""
    return {d.name: torch.from_numpy(rng.gumbel(size=len(d.options))) for d in decisions}


def relaxed(
    decisions: Sequence[Choice], alphas: Iterable[Tensor], noise: Mapping[str, Tensor], temperature: float
) -> dict[str, Tensor]:
    """The gates ``softmax((alpha + noise) / temperature)`` of every decision ``[options]``; differentiable.

    With Gumbel noise, their largest is a draw by ``softmax(alpha)``, and the colder they are the more of the mixture it
    is (Jang et al., arXiv 1611.01144, equation 2).
    """
    return {
        decision.name: ((alpha + noise[decision.name].to(alpha)) / temperature).softmax(dim=0)
        for decision, alpha in zip(decisions, alphas, strict=True)
    }


def temperature(progress: float) -> float:
    """From `WARMEST` to `COLDEST`, by the same factor every step; `progress` is 0 to 1 over the steps with mixtures."""
    return WARMEST * (COLDEST / WARMEST) ** min(progress, 1.0)


def mixing_epochs(epochs: int) -> int:
    """How many epochs of a merging supernet have mixtures: all but the last fifth, which is rounded up."""
    return 4 * epochs // 5


def sandwich_options(
    decisions: Sequence[Choice], largest: Mapping[str, Any], smallest: Mapping[str, Any], seed: int, step: int
) -> list[dict[str, Any]]:
    """Three options for every decision: of the largest subnet, a random one, and the smallest (BigNAS, arXiv
    2003.11142, section 3.1).

    `largest` and `smallest` name the options of what makes subnets larger. The others, such as activations, are the
    same in all three, so that these have more in common to run once. All that is drawn is strictly fair over steps.
    """
    drawn = fair_options(decisions, seed, step)
    return [{**drawn, **largest}, drawn, {**drawn, **smallest}]
