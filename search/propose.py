"""Which subnets are worth judging: spread over the costs that the budgets leave, the best by alpha at each cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from models.supernet import Supernet
from search.costs import Budget, CostTable, within
from search.sampling import drawn_options
from search.space import Architecture, SearchSpace

DRAWS = 4_000


def argmax(supernet: Supernet) -> Architecture:
    """The option of largest alpha for every decision."""
    best = {d.name: d.options[int(a.argmax())] for d, a in zip(supernet.decisions, supernet.alphas, strict=True)}
    return Architecture(supernet.picks(best))


def propose(
    supernet: Supernet,
    space: SearchSpace,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    count: int,
    rng: np.random.Generator,
) -> list[Architecture]:
    """At most `count` subnets within the budgets that can be counted, cheapest first.

    Always among them: the cheapest, the dearest, and the one that alpha prefers (each brought under the budgets where
    it lies above). The others are drawn, half by alpha and half evenly, and sorted into as many levels of cost;
    from each level comes the one that alpha rates highest.
    """
    counted = [budget for budget in budgets if budget.metric in tables]
    axis = tables[counted[0].metric if counted else "macs"]
    cheapest, dearest = axis.extreme(largest=False)[1], axis.extreme(largest=True)[1]
    always = (cheapest, dearest, argmax(supernet))
    chosen = {fitted: None for a in always if (fitted := fit(a, tables, counted, rng)) is not None}
    probabilities = {name: p.detach() for name, p in supernet.probabilities().items()}
    even = {name: p.new_full(p.shape, 1 / len(p)) for name, p in probabilities.items()}
    if space.size <= DRAWS:
        drawn = [space.at(number) for number in range(space.size)]
    else:
        halves = [probabilities, even] * (DRAWS // 2)
        drawn = [Architecture(supernet.picks(drawn_options(supernet.decisions, p, rng))) for p in halves]
    pool = {fitted: None for a in drawn if (fitted := fit(a, tables, counted, rng)) is not None}
    rest = sorted((a for a in pool if a not in chosen), key=axis.of)
    levels = min(max(count - len(chosen), 0), len(rest))
    for level in range(levels):
        part = rest[level * len(rest) // levels : (level + 1) * len(rest) // levels]
        chosen[max(part, key=lambda a: log_probability(supernet, probabilities, a))] = None
    return sorted(list(chosen)[:count], key=axis.of)


def log_probability(supernet: Supernet, probabilities: Mapping[str, Tensor], architecture: Architecture) -> float:
    """How much alpha likes an architecture: the log of the chance of drawing it."""
    decided = supernet.decide(architecture.picks)
    return sum(
        math.log(max(float(probabilities[d.name][d.options.index(decided[d.name])]), 1e-12)) for d in supernet.decisions
    )


def fit(
    architecture: Architecture, tables: Mapping[str, CostTable], budgets: Sequence[Budget], rng: np.random.Generator
) -> Architecture | None:
    """The architecture itself if it meets the budgets; otherwise with rows, in random order, set to their cheapest
    options until it does. None where even that is too dear.
    """
    picks = dict(architecture.picks)
    for budget in budgets:
        table = tables[budget.metric]
        cheapest = table.extreme(largest=False)[1]
        for row in rng.permutation(len(table.rows)):
            if table.of(Architecture(picks)) <= budget.limit:
                break
            picks.update({choice.name: cheapest.picks[choice.name] for choice in table.rows[row][0]})
    fitted = Architecture(picks)
    return fitted if within({b.metric: tables[b.metric].of(fitted) for b in budgets}, budgets) else None
