"""From a trained supernet to judged subnets: which are judged, what they cost here, and how they are saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.dataset import ImageSet
from data.structures import Fault
from engine.calibrate import calibrate
from engine.latency import measure_ms
from engine.runs import write_csv, write_text
from engine.tasks import Task, task_of
from models.checkpoint import save_checkpoint
from models.network import Network
from models.parse import dump
from models.supernet import Supernet
from search.config import SearchConfig
from search.costs import Budget, CostTable, format_cost, within
from search.front import Judged, ranks
from search.judge import Verdict, first_choice, judge
from search.optimise import FOCUS, optimise
from search.propose import argmax, excess, propose, seeds
from search.space import Architecture, SearchSpace
from search.tree import losses

PROPOSAL = 12  # purpose of a random stream
EXHAUSTIVE = 2_000  # subnets; in a space up to this size the loss of every one of them is measured
EVOLUTION = 40  # candidates; fewer are spread over the costs, not evolved


@dataclass(frozen=True)
class Trial:
    """What judging needs: the trained supernet, what subnets cost, the limits, and the images to measure on."""

    supernet: Supernet
    space: SearchSpace
    tables: Mapping[str, CostTable]
    budgets: Sequence[Budget]
    config: SearchConfig
    calibration: Sequence[Tensor]
    images: ImageSet
    names: Sequence[str]
    device: torch.device
    progress: bool

    @property
    def task(self) -> Task:
        """What the networks are for, which says what they are measured by."""
        return task_of(self.supernet.spec)

    @property
    def metrics(self) -> list[str]:
        """The costs that a front is over: those with a budget, multiply-adds where there is none."""
        return [*dict.fromkeys(budget.metric for budget in self.budgets)] or ["macs"]

    def counted(self, one: Architecture) -> dict[str, float]:
        """What the tables say of a subnet."""
        return {metric: table.of(one) for metric, table in self.tables.items()}


def find(trial: Trial, judged: dict[Architecture, Judged], folder: Path) -> None:
    """Judges at most ``candidates`` subnets within the budgets, into `judged` as they are done.

    In a small space the loss of every subnet is measured first, and those with the best losses at their cost are
    judged. In a larger one a few candidates are spread over the costs, and many are evolved.
    Raises a Fault where no subnet is found that meets all budgets.
    """
    config, space = trial.config, trial.space
    rng = np.random.default_rng((config.seed, PROPOSAL))
    if space.size <= EXHAUSTIVE:
        judge_subnets(trial, by_loss(trial, folder), judged)
    elif config.candidates <= EVOLUTION:
        proposed = propose(trial.supernet, space, trial.tables, trial.budgets, config.candidates, rng)
        judge_subnets(trial, dict.fromkeys(map(space.canonical, proposed)), judged)
    else:

        def evaluated(subnets: list[Architecture]) -> list[tuple[float, ...]]:
            networks = [space.canonical(one) for one in subnets]
            judge_subnets(trial, {one: None for one in networks if one not in judged}, judged)
            return [values_of(trial, one, judged.get(one)) for one in networks]

        optimise(
            space,
            evaluated,
            count=config.candidates,
            seeds=seeds(trial.supernet, space, trial.tables, trial.budgets, rng),
            violation=lambda one: excess(one, trial.tables, trial.budgets),
            seed=config.seed,
            objectives=1 + len(trial.metrics),
            focus=FOCUS if trial.budgets else 0.0,
            progress=trial.progress,
        )
    if not judged:
        shown = ", ".join(map(str, trial.budgets))
        raise Fault(f"--budget: none of the subnets that were measured meets {shown}, though tables say that one may")


def by_loss(trial: Trial, folder: Path) -> dict[Architecture, float | None]:
    """The loss of every subnet, in ``losses.csv``, and those to judge: within the budgets, the fronts of loss and costs
    one after the other until there are ``candidates``; first of all the subnet that alpha prefers.
    """
    space = trial.space
    found = losses(
        trial.supernet,
        space,
        trial.calibration,
        trial.images,
        batch_size=trial.config.batch_size,
        device=trial.device,
        progress=trial.progress,
    )
    subnets = [space.at(number) for number in range(space.size)]
    costs = [trial.counted(one) for one in subnets]
    named = [{("latency_table_ms" if m == "latency_ms" else m): v for m, v in each.items()} for each in costs]
    rows = [{"subnet": number, "loss": float(found[number]), **each} for number, each in enumerate(named)]
    write_csv(folder / "losses.csv", rows)
    allowed = [
        number
        for number, each in enumerate(costs)
        if within(each, trial.budgets) and space.canonical(subnets[number]) == subnets[number]
    ]
    if not allowed:
        shown = ", ".join(map(str, trial.budgets))
        raise Fault(f"--budget: no subnet meets {shown} together; one of them alone can be met")
    points = np.array([[found[number], *(costs[number][metric] for metric in trial.metrics)] for number in allowed])
    order = np.lexsort((found[allowed], ranks(points)))
    preferred = space.index(space.canonical(argmax(trial.supernet)))
    first = [preferred] if preferred in allowed else []
    chosen = [*first, *(allowed[place] for place in order if allowed[place] != preferred)][: trial.config.candidates]
    return {subnets[number]: float(found[number]) for number in chosen}


def judge_subnets(
    trial: Trial, subnets: Mapping[Architecture, float | None], judged: dict[Architecture, Judged]
) -> None:
    """Times the subnets on this device and judges those within every budget, each into `judged` once it is done.

    What a subnet maps to is its loss, None where that was not measured.
    """
    if not subnets:
        return
    networks = {one: trial.supernet.derive(one.picks).eval() for one in subnets}
    timed = measure_ms(
        list(networks.values()),
        trial.config.imgsz,
        device=trial.device,
        runtime=trial.config.runtime,
        progress=trial.progress,
    )
    costs = {}
    for one, latency in zip(networks, timed, strict=True):
        counted = trial.counted(one)
        predicted = {"latency_table_ms": counted["latency_ms"]} if "latency_ms" in counted else {}
        costs[one] = {**counted, "latency_ms": latency, **predicted}
    kept = [one for one in networks if within(costs[one], trial.budgets)]

    def done(place: int, verdict: Verdict) -> None:
        one = kept[place]
        score, second = (float(getattr(verdict.metrics, name)) for name in trial.task.columns[:2])
        judged[one] = Judged(trial.space.index(one), one, score, second, costs[one], verdict.without, subnets[one])

    judge(
        [networks[one] for one in kept],
        first_choice(trial.supernet.network, [choice.name for choice in trial.space.choices]),
        trial.calibration,
        trial.images,
        names=trial.names,
        batch_size=trial.config.batch_size,
        device=trial.device,
        progress=trial.progress,
        done=done,
    )


def values_of(trial: Trial, one: Architecture, found: Judged | None) -> tuple[float, ...]:
    """What evolution compares, all to be small. A subnet whose measured latency is over the budget has no score."""
    costs = found.costs if found else trial.counted(one)
    return (-found.score if found else 0.0, *(costs[metric] for metric in trial.metrics))


def calibrated(trial: Trial, one: Judged) -> Network:
    """The subnet as it was judged."""
    network = trial.supernet.derive(one.architecture.picks).eval()
    calibrate(network, trial.calibration)
    return network


def save_subnet(path: Path, network: Network, judged: Judged, names: Sequence[str], imgsz: int) -> None:
    """``path.yaml`` and ``path.pt``: a plain model file and checkpoint, for train.py, val.py and detect.py alike."""
    costs = ", ".join(f"{metric} {format_cost(metric, value)}" for metric, value in judged.costs.items())
    title = task_of(network.spec).titles[0]
    comment = f"subnet {judged.number}: {judged.architecture}\njudged {title} {judged.score:.4f}, {costs} at {imgsz} px"
    write_text(path.with_suffix(".yaml"), dump(network.spec, comment))
    picks = {name: list(pick) if isinstance(pick, tuple) else pick for name, pick in judged.architecture.picks.items()}
    save_checkpoint(path.with_suffix(".pt"), network, names, imgsz=imgsz, subnet=judged.number, picks=picks)
