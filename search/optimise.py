"""Evolution in spaces that are too large to judge every subnet: NSGA-II by Optuna's ask and tell, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from engine.doors import import_optuna
from search.space import Architecture, SearchSpace

POPULATION = 20  # small, so that a few hundred subnets make many generations
CROSSOVER = 0.9  # of two parents, uniform; each choice then mutates with one over the number of choices
NEEDED = "to search a large space Optuna is needed, not installed here:"
FOCUS = 0.5  # part of the judging that is for the best subnet where budgets are set, the other being for the front
SPARE = 3  # children to each one that is judged then, chosen by what their options are estimated to bring
PATIENCE = 10  # generations, and populations' worth of proposals, without a new subnet, before a search is at its end

Values = tuple[float, ...]


def optimise(
    space: SearchSpace,
    evaluate: Callable[[list[Architecture]], Sequence[Values]],
    *,
    count: int,
    seeds: Sequence[Architecture],
    violation: Callable[[Architecture], float],
    seed: int,
    objectives: int = 2,
    population: int = POPULATION,
    focus: float = 0.0,
    progress: bool = True,
    on_generation: Callable[[Mapping[Architecture, Values]], None] | None = None,
) -> dict[Architecture, Values]:
    """At most `count` subnets and what `evaluate` says of each, `objectives` values, all to be small. They are evolved
    towards their front (NSGA-II: Deb et al., IEEE Transactions on Evolutionary Computation 2002) and come in the order
    of their evaluation.

    The first population is `seeds` and random subnets. `violation` is by how much a subnet lies over the budgets, 0 or
    less where it meets them all: the others are never evaluated and never returned. They rank behind all that meet
    them, by their violation, so that evolution finds the way back.

    A front spreads over all costs, and so finds the best subnet within a budget late. The part `focus` of `count` goes
    at the end to the first value alone: the best so far are evolved on, and of several children those are judged whose
    options did best in what was judged before. Give `FOCUS` where a budget is set.

    `evaluate` is called once a generation with at most `population` subnets, no subnet twice; then `on_generation` with
    all results so far, which is what stays of a search that is interrupted. Ends early where nothing new turns up.
    Raises a Fault where Optuna is not installed.
    """
    results: dict[Architecture, Values] = {}
    bar = tqdm(total=count, desc="evolving", unit="subnet", disable=not progress, leave=False)

    def judged(new: list[Architecture]) -> None:
        results.update(zip(new, evaluate(new), strict=True))
        bar.update(len(new))
        if on_generation:
            on_generation(results)

    with bar:
        for_front = count - round(focus * count)
        evolve(space, judged, results, for_front, seeds, violation, new_study(seed, population, objectives))
        if results and for_front < count:
            half = max(2, population // 2)
            best = sorted(results, key=lambda one: results[one][0])[:half]
            evolve(space, judged, results, count, best, violation, new_study(seed, half, 1), spare=SPARE)
    return results


def evolve(
    space: SearchSpace,
    judged: Callable[[list[Architecture]], None],
    results: Mapping[Architecture, Values],
    count: int,
    first: Sequence[Architecture],
    violation: Callable[[Architecture], float],
    study: Any,
    spare: int = 1,
) -> None:
    """Generations of an Optuna study until `results`, which `judged` adds to, are `count` or nothing new turns up.

    What is in `results` already is told to the study without being judged again. `spare` children are asked for to
    each one that a generation has room for; the best by `main_effects` stay.
    """
    from optuna.trial import TrialState

    for one in first:
        study.enqueue_trial({choice.name: choice.index(one.picks[choice.name]) for choice in space.choices})
    population, objectives = study.sampler.population_size, len(study.directions)
    told: set[Architecture] = set()
    idle = 0
    while len(results) < count and idle < PATIENCE and len(told) < space.size:
        trials = ask(study, space, told, spare * population)
        if not trials:
            break
        over = {one: violation(one) for one in trials}
        known = [one for one in trials if one in results]
        within = [one for one in trials if one not in results and over[one] <= 0]
        beyond = sorted((one for one in trials if over[one] > 0), key=lambda one: over[one])
        if spare > 1:
            within.sort(key=main_effects(space, results))
        generation = [*known, *within, *beyond][:population]
        new = [one for one in generation if over[one] <= 0 and one not in results][: count - len(results)]
        if new:
            judged(new)
        idle = 0 if new else idle + 1
        for one, trial in trials.items():
            if one in generation and (over[one] > 0 or one in results):
                # Optuna ranks what violates a constraint by that alone, but it wants values all the same.
                values = (math.inf,) * objectives if over[one] > 0 else results[one][:objectives]
                trial.set_constraint("budget", over[one])
                study.tell(trial, values)
                told.add(one)
            else:
                study.tell(trial, state=TrialState.FAIL)


def ask(study: Any, space: SearchSpace, told: set[Architecture], wanted: int) -> dict[Architecture, Any]:
    """At most `wanted` subnets that the study was not told of before, with its trials. A repeated proposal is a failed
    trial, which has no children: otherwise the copies of a few subnets would fill the population.
    """
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import TrialState

    options = {choice.name: CategoricalDistribution(range(len(choice.options))) for choice in space.choices}
    trials: dict[Architecture, Any] = {}
    for _ in range(PATIENCE * wanted):
        trial = study.ask(options)
        picked = trial.params
        one = Architecture({choice.name: choice.options[picked[choice.name]] for choice in space.choices})
        one = space.canonical(one)
        if one in told or one in trials:
            study.tell(trial, state=TrialState.FAIL)
            continue
        trials[one] = trial
        if len(trials) == min(wanted, space.size - len(told)):
            break
    return trials


def main_effects(space: SearchSpace, results: Mapping[Architecture, Values]) -> Callable[[Architecture], float]:
    """An estimate of the first value: a sum over choices of what each option adds, fitted to `results` (ridge
    regression with a unit penalty, so that few results say little).
    """
    effects, _ = fitted(space, {one: values[0] for one, values in results.items()})
    return lambda one: float(one_hot(space, one) @ effects)


def fitted(space: SearchSpace, values: Mapping[Architecture, float]) -> tuple[np.ndarray, float]:
    """What every option adds to a value, ``[options of all choices]``, and the part of the values' variance that this
    predicts when each subnet is left out in turn: 1 at best, 0 and below where it predicts nothing.
    """
    x = np.array([one_hot(space, one) for one in values])
    y = np.array(list(values.values()))
    gram = x.T @ x + np.eye(x.shape[1])
    effects = np.linalg.solve(gram, x.T @ (y - y.mean()))
    share = np.einsum("ij,ji->i", x, np.linalg.solve(gram, x.T)) + 1 / len(
        y
    )  # of a subnet's own value in its prediction
    left_out = (y - y.mean() - x @ effects) / (1 - share).clip(min=1e-9)
    spread = float(((y - y.mean()) ** 2).sum())
    return effects, 1 - float((left_out**2).sum()) / spread if spread else 0.0


def one_hot(space: SearchSpace, one: Architecture) -> np.ndarray:
    return np.concatenate([np.eye(len(c.options))[c.index(one.picks[c.name])] for c in space.choices])


def importances(space: SearchSpace, scores: Mapping[Architecture, float]) -> list[dict[str, Any]]:
    """How much each choice matters to the score, the most important first: rows of ``importances.csv``.

    The importance is the choice's share of the variance that options' effects add up to (`fitted`), 0 to 1; `explained`
    is how well these effects predict a score at all. Beside it the options that add most and least, and by how much
    they differ. Nothing where under three subnets are known, or no option moves the score.
    """
    if len(scores) < 3 or len(set(scores.values())) == 1:
        return []
    effects, explained = fitted(space, scores)
    parts = np.split(effects, np.cumsum([len(choice.options) for choice in space.choices])[:-1])
    variances = [float(part.var()) for part in parts]
    if not sum(variances):  # no option alone moves a score: it is pairs of them that do
        return []
    rows = [
        {
            "choice": choice.name,
            "importance": variance / sum(variances),
            "best": choice.options[int(part.argmax())],
            "worst": choice.options[int(part.argmin())],
            "difference": float(part.max() - part.min()),
            "explained": explained,
        }
        for choice, part, variance in zip(space.choices, parts, variances, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["importance"])


def new_study(seed: int, population: int, objectives: int) -> Any:
    """An Optuna study in memory. Raises a Fault where Optuna is not installed."""
    optuna = import_optuna(NEEDED)
    sampler = optuna.samplers.NSGAIISampler(population_size=population, crossover_prob=CROSSOVER, seed=seed)
    return optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
