"""Which subnets are worth judging, by what alphas and costs say: where only a few can be (`propose`), and where an
evolution goes on from there (`seeds`, for `search.optimise`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from models.supernet import Supernet
from search.costs import Budget, CostTable, within
from search.objective import undecided
from search.sampling import drawn_options
from search.space import Architecture, SearchSpace

DRAWS = 4_000
TOGETHER = 4  # undecided decisions that are varied jointly, 2^4 subnets; further ones are varied one at a time
STEPS = 8  # of the greedy way up that become seeds


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
    it lies above); for up to a quarter of `count`, the preferred one's variants where alpha is undecided. The others
    are drawn, half by alpha and half evenly, and sorted into as many levels of cost; from each level comes the one
    that alpha rates highest.
    """
    counted, axis = priced(tables, budgets)
    cheapest, dearest = axis.extreme(largest=False)[1], axis.extreme(largest=True)[1]
    always = (cheapest, dearest, *variants(supernet)[: 1 + count // 4])
    chosen = all_fitted(always, space, tables, counted, rng)
    probabilities = {name: p.detach() for name, p in supernet.probabilities().items()}
    even = {name: p.new_full(p.shape, 1 / len(p)) for name, p in probabilities.items()}
    if space.size <= DRAWS:
        drawn = [space.at(number) for number in range(space.size)]
    else:
        halves = [probabilities, even] * (DRAWS // 2)
        drawn = [Architecture(supernet.picks(drawn_options(supernet.decisions, p, rng))) for p in halves]
    pool = all_fitted(drawn, space, tables, counted, rng)
    rest = sorted((a for a in pool if a not in chosen), key=axis.of)
    levels = min(max(count - len(chosen), 0), len(rest))
    for level in range(levels):
        part = rest[level * len(rest) // levels : (level + 1) * len(rest) // levels]
        chosen[max(part, key=lambda a: log_probability(supernet, probabilities, a))] = None
    return sorted(list(chosen)[:count], key=axis.of)


def seeds(
    supernet: Supernet,
    space: SearchSpace,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    rng: np.random.Generator,
) -> list[Architecture]:
    """Where an evolution starts: the cheapest subnet, the dearest, the one that alpha prefers with its variants where
    alpha is undecided, and steps of the greedy way up; each brought under the budgets that can be counted.
    """
    counted, axis = priced(tables, budgets)
    cheapest, dearest = axis.extreme(largest=False)[1], axis.extreme(largest=True)[1]
    way = greedy(supernet, tables, budgets)
    places = np.linspace(0, len(way) - 1, min(STEPS, len(way))).round().astype(int)
    found = [cheapest, dearest, *variants(supernet), *(way[place] for place in places)]
    return list(all_fitted(found, space, tables, counted, rng))


def variants(supernet: Supernet) -> list[Architecture]:
    """The subnet that alpha prefers, then those that it likes all but as much, the likeliest first: the runner-up in
    place of the winner wherever the two most probable options of a decision are close (`undecided`).

    The least decided decisions are varied jointly, further ones each alone.
    """
    probabilities = {name: p.detach() for name, p in supernet.probabilities().items()}
    decided = supernet.decide(argmax(supernet).picks)
    runners_up = {}
    gaps = {}
    for decision in supernet.decisions:
        first, second = probabilities[decision.name].topk(2).indices.tolist()
        runners_up[decision.name] = decision.options[second]
        gaps[decision.name] = float(probabilities[decision.name][first] - probabilities[decision.name][second])
    loose = sorted(undecided(supernet), key=lambda name: gaps[name])
    joint, alone = loose[:TOGETHER], loose[TOGETHER:]
    swaps = [
        [n for n, on in zip(joint, mask, strict=True) if on] for mask in itertools.product((0, 1), repeat=len(joint))
    ]
    changed = [{**decided, **{name: runners_up[name] for name in names}} for names in [*swaps, *([n] for n in alone)]]
    found = [Architecture(supernet.picks(each)) for each in changed]
    return sorted(found, key=lambda one: -log_probability(supernet, probabilities, one))


def greedy(supernet: Supernet, tables: Mapping[str, CostTable], budgets: Sequence[Budget]) -> list[Architecture]:
    """The way from the cheapest subnet up to the one that alpha prefers, as far as the budgets allow: one decision at a
    time, always the option with the most log-probability won per cost.
    """
    counted, axis = priced(tables, budgets)
    gains = {name: p.detach().clamp(min=1e-12).log().tolist() for name, p in supernet.probabilities().items()}
    decided = supernet.decide(axis.extreme(largest=False)[1].picks)
    way = [Architecture(supernet.picks(decided))]
    while True:
        steps: list[tuple[float, float, int, Architecture]] = []
        for decision in supernet.decisions:
            here = gains[decision.name][decision.index(decided[decision.name])]
            for option, there in zip(decision.options, gains[decision.name], strict=True):
                if there <= here:
                    continue
                one = Architecture(supernet.picks({**decided, decision.name: option}))
                if within({budget.metric: tables[budget.metric].of(one) for budget in counted}, counted):
                    extra = axis.of(one) - axis.of(way[-1])
                    rate = (there - here) / extra if extra > 0 else math.inf
                    steps.append((rate, there - here, len(steps), one))
        if not steps:
            return way
        way.append(max(steps)[-1])
        decided = supernet.decide(way[-1].picks)


def priced(tables: Mapping[str, CostTable], budgets: Sequence[Budget]) -> tuple[list[Budget], CostTable]:
    """The budgets that tables can count, and the table by which subnets are cheap or dear: the first such budget's,
    multiply-adds where there is none.
    """
    counted = [budget for budget in budgets if budget.metric in tables]
    return counted, tables[counted[0].metric if counted else "macs"]


def excess(architecture: Architecture, tables: Mapping[str, CostTable], budgets: Sequence[Budget]) -> float:
    """How far a subnet lies over the budgets that can be counted: the sum of the relative excesses, 0 within all."""
    counted, _ = priced(tables, budgets)
    return sum(max(0.0, tables[budget.metric].of(architecture) / budget.limit - 1) for budget in counted)


def log_probability(supernet: Supernet, probabilities: Mapping[str, Tensor], architecture: Architecture) -> float:
    """How much alpha likes an architecture: the log of the chance of drawing it."""
    decided = supernet.decide(architecture.picks)
    return sum(math.log(max(float(probabilities[d.name][d.index(decided[d.name])]), 1e-12)) for d in supernet.decisions)


def fit(
    architecture: Architecture, tables: Mapping[str, CostTable], budgets: Sequence[Budget], rng: np.random.Generator
) -> Architecture | None:
    """The architecture itself if it meets the budgets; otherwise with rows, in random order, set to their cheapest
    options until it does. None where even that is too dear, or dearer by another of the budgets.
    """
    picks = dict(architecture.picks)
    for budget in budgets:
        table = tables[budget.metric]
        order = rng.permutation(len(table.rows))
        if table.of(Architecture(picks)) <= budget.limit:
            continue  # the cheapest subnet takes long to find in a large space
        cheapest = table.extreme(largest=False)[1]
        for row in order:
            if table.of(Architecture(picks)) <= budget.limit:
                break
            picks.update({choice.name: cheapest.picks[choice.name] for choice in table.rows[row][0]})
    fitted = Architecture(picks)
    return fitted if within({b.metric: tables[b.metric].of(fitted) for b in budgets}, budgets) else None


def all_fitted(
    found: Iterable[Architecture],
    space: SearchSpace,
    tables: Mapping[str, CostTable],
    budgets: Sequence[Budget],
    rng: np.random.Generator,
) -> dict[Architecture, None]:
    """Each network once, brought under the budgets, in the order in which it was found; without what cannot be."""
    fitted = (fit(one, tables, budgets, rng) for one in found)
    return {space.canonical(one): None for one in fitted if one is not None}
