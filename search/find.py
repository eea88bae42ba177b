"""From a trained supernet to judged subnets: which are judged, by whom, what they cost here, and how they are saved.

This process times subnets, so that all latencies are of one device, and knows which are wanted. The judging itself may
be done by any process that has the supernet, the images and the queue (`search.storage`): see `evaluate_tickets`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ImageSet
from data.structures import Fault
from engine.calibrate import calibrate
from engine.latency import measure_ms
from engine.prepare import images_hash
from engine.runs import write_csv, write_text
from engine.tasks import Task, task_of
from models.checkpoint import save_checkpoint
from models.network import Network
from models.parse import dump
from models.supernet import Supernet
from search.config import SearchConfig
from search.costs import Budget, CostTable, format_cost, within
from search.front import Judged, non_dominated, ranks, tie
from search.judge import Verdict, first_choice, judge
from search.optimise import FOCUS, optimise
from search.propose import argmax, excess, propose, seeds
from search.space import Architecture, SearchSpace
from search.storage import HANDFUL, Limits, Outcome, Queue, Tell, Ticket, finished, gather
from search.tree import losses

PROPOSAL = 12  # purpose of a random stream
EXHAUSTIVE = 2_000  # subnets; in a space up to this size the loss of every one of them is measured
LOSS_FLOATS = 2**27  # of images by which these losses are measured: they stay in memory, and maps of them as well
EVOLUTION = 40  # candidates; fewer are spread over the costs, not evolved
FEWEST_FIRST = 16  # judging images by which a subnet may be given up


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
    queue: Queue | None = None  # None: this process judges alone, and nothing is kept
    limits: Limits = field(default_factory=Limits)
    weight_images: str = ""  # `images_hash` of those that calibration draws from
    timed_here: bool = True  # otherwise latencies are those of another device's table

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


@dataclass(frozen=True)
class Found:
    """What is known of subnets until now.

    Attributes:
        judged: those that were measured on all judging images.
        given_up: those that others beat surely on the first of the images; their scores are of these alone.
        first: what those of `judged` reached on the first images.
    """

    judged: dict[Architecture, Judged] = field(default_factory=dict)
    given_up: dict[Architecture, Judged] = field(default_factory=dict)
    first: dict[Architecture, Judged] = field(default_factory=dict)


def find(trial: Trial, found: Found, folder: Path) -> None:
    """Judges at most ``candidates`` subnets within the budgets, into `found` as they are done.

    In a small space the loss of every subnet is measured first, and those with the best losses at their cost are
    judged. In a larger one a few candidates are spread over the costs, and many are evolved.
    Raises a Fault where no subnet is found that meets all budgets, and TimeoutError at the trial's limits.
    """
    config, space = trial.config, trial.space
    rng = np.random.default_rng((config.seed, PROPOSAL))
    if space.size <= EXHAUSTIVE:
        judge_subnets(trial, by_loss(trial, folder), found)
    elif config.candidates <= EVOLUTION:
        proposed = propose(trial.supernet, space, trial.tables, trial.budgets, config.candidates, rng)
        judge_subnets(trial, dict.fromkeys(map(space.canonical, proposed)), found)
    else:

        def evaluated(subnets: list[Architecture]) -> list[tuple[float, ...]]:
            networks = [space.canonical(one) for one in subnets]
            new = [one for one in networks if one not in found.judged and one not in found.given_up]
            judge_subnets(trial, dict.fromkeys(new), found)
            return [values_of(trial, one, found.judged.get(one) or found.given_up.get(one)) for one in networks]

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
    if not found.judged:
        shown = ", ".join(map(str, trial.budgets))
        raise Fault(f"--budget: none of the subnets that were measured meets {shown}, though tables say that one may")


def some_images(images: ImageSet) -> ImageSet:
    """The images themselves, or as many, evenly taken, as have `LOSS_FLOATS` numbers together."""
    most = max(1, LOSS_FLOATS // (3 * images.imgsz**2))
    if len(images) <= most:
        return images
    samples = [images.samples[place * len(images) // most] for place in range(most)]
    return ImageSet(samples, images.imgsz, None, images.seed, images.cache, crop=images.crop)


def by_loss(trial: Trial, folder: Path) -> dict[Architecture, float | None]:
    """The loss of every subnet, in ``losses.csv``, and those to judge: within the budgets, the fronts of loss and costs
    one after the other until there are ``candidates``; first of all the subnet that alpha prefers.
    """
    space = trial.space
    images = some_images(trial.images)
    if trial.progress and images is not trial.images:
        tqdm.write(f"losses are of {len(images)} of the {len(trial.images)} judging images: no more fit into memory")
    found = losses(
        trial.supernet,
        space,
        trial.calibration,
        images,
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


def judge_subnets(trial: Trial, subnets: Mapping[Architecture, float | None], found: Found) -> None:
    """Times the subnets on this device and has those within every budget judged, each into `found` once it is done.

    What a subnet maps to is its loss, None where that was not measured. Of a subnet that the queue holds already, cost
    and result are taken from there.
    """
    before = finished(trial.queue) if trial.queue else {}
    known = {one: before[one][0] for one in subnets if one in before}
    costs = costs_of(trial, [one for one in subnets if one not in known])
    about = {
        one: known.get(one) or {"costs": costs[one], "loss": subnets[one]}
        for one in subnets
        if one in known or within(costs[one], trial.budgets)
    }

    def done(one: Architecture, outcome: Outcome) -> None:
        said, facts = about[one], outcome.facts
        where = found.given_up if outcome.pruned else found.judged
        where[one] = judged_by(trial, one, said, facts)
        if "first" in facts:
            found.first[one] = judged_by(trial, one, said, facts["first"])

    wanted = iter(about.items())
    while portion := dict(islice(wanted, HANDFUL if trial.config.prune else len(about))):
        bar = bar_of(trial, found)
        evaluate = partial(evaluate_tickets, trial)
        asked = {one: {**said, "bar": bar} for one, said in portion.items()}
        if trial.queue:
            gather(trial.queue, asked, evaluate, done, trial.limits)
            continue
        tickets = [Ticket(place, one, said) for place, (one, said) in enumerate(asked.items())]
        while tickets:
            count = min(HANDFUL, trial.limits.left(len(found.judged) + len(found.given_up)))
            evaluate(tickets[:count], lambda ticket, outcome: done(ticket.architecture, outcome))
            tickets = tickets[count:]


def costs_of(trial: Trial, subnets: Sequence[Architecture]) -> dict[Architecture, dict[str, float]]:
    """What each costs: counted, and timed here, or by the table of the device that they are for."""
    counted = {one: trial.counted(one) for one in subnets}
    if not trial.timed_here or not subnets:
        return counted
    timed = measure_ms(
        [trial.supernet.derive(one.picks).eval() for one in subnets],
        trial.config.imgsz,
        device=trial.device,
        runtime=trial.config.runtime,
        progress=trial.progress,
    )
    costs = {}
    for one, latency in zip(subnets, timed, strict=True):
        predicted = {"latency_table_ms": counted[one]["latency_ms"]} if "latency_ms" in counted[one] else {}
        costs[one] = {**counted[one], "latency_ms": latency, **predicted}
    return costs


def evaluate_tickets(trial: Trial, tickets: Sequence[Ticket], tell: Tell) -> None:
    """Judges subnets in this process, each calibrated on its own, and tells of each.

    With ``prune`` a part of the images comes first, and a subnet ends there that another of the parent's ``bar`` beats
    surely on the same part: no costlier in anything, with a higher score that is no tie (`search.front.tie`).
    """
    networks = [trial.supernet.derive(ticket.architecture.picks).eval() for ticket in tickets]
    first = first_places(len(trial.images), trial.config.prune)
    early: dict[int, Verdict] = {}

    def told(place: int, verdict: Verdict, pruned: bool = False) -> None:
        facts = facts_of(trial, verdict)
        if place in early:
            facts["first"] = facts_of(trial, early[place])
        costs = tickets[place].known["costs"]
        values = (facts["score"], *(costs[metric] for metric in trial.metrics))
        tell(tickets[place], Outcome(values, facts, pruned))

    def keep(place: int, verdict: Verdict) -> bool:
        ticket = tickets[place]
        one = judged_by(trial, ticket.architecture, ticket.known, facts_of(trial, verdict))
        others = [judged_by(trial, ticket.architecture, other, other) for other in ticket.known.get("bar", ())]
        early[place] = verdict
        if not any(beats(other, one, trial.metrics) for other in others):
            return True
        told(place, verdict, pruned=True)
        return False

    judge(
        networks,
        first_choice(trial.supernet.network, [choice.name for choice in trial.space.choices]),
        trial.calibration,
        trial.images,
        names=trial.names,
        batch_size=trial.config.batch_size,
        device=trial.device,
        progress=trial.progress,
        done=told,
        first=first,
        keep=keep if first else None,
    )


def first_places(count: int, part: float) -> list[int]:
    """The places of the images that are judged first: evenly spread, 16 or more; none where those are all of them."""
    wanted = max(round(part * count), FEWEST_FIRST) if part else 0
    return [place * count // wanted for place in range(wanted)] if wanted < count else []


def bar_of(trial: Trial, found: Found) -> list[dict[str, Any]]:
    """What a subnet is held against after the first images: the front of those judged before, on these images."""
    there = list(found.first.values())
    if not there:
        return []
    points = np.array([[-one.score, *(one.costs[metric] for metric in trial.metrics)] for one in there])
    on = non_dominated(points)
    front = [one for one, is_on in zip(there, on, strict=True) if is_on and one.architecture in found.judged]
    return [{"score": one.score, "without": list(one.without), "costs": dict(one.costs)} for one in front]


def beats(other: Judged, one: Judged, metrics: Sequence[str]) -> bool:
    """Whether the other is no costlier in any metric and scores higher by more than images explain."""
    cheaper = all(other.costs[metric] <= one.costs[metric] for metric in metrics)
    return cheaper and other.score > one.score and bool(one.without) and not tie(other, one)


def facts_of(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON can hold it."""
    score, second = (float(getattr(verdict.metrics, name)) for name in trial.task.columns[:2])
    return {"score": score, "second": None if math.isnan(second) else second, "without": list(verdict.without)}


def judged_by(trial: Trial, one: Architecture, known: Mapping[str, Any], facts: Mapping[str, Any]) -> Judged:
    """What the parent says of a subnet and what was found of it, as one."""
    second = facts.get("second")
    return Judged(
        trial.space.index(one),
        one,
        facts["score"],
        math.nan if second is None else second,
        known["costs"],
        tuple(facts["without"]),
        known.get("loss"),
    )


def study_name(trial: Trial, folder: Path) -> str:
    """The folder's name, and a hash of all that a subnet's score depends on. Results of one name belong together."""
    config = trial.config
    found = hashlib.sha256()
    for name, tensor in sorted(trial.supernet.network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    how = (config.imgsz, config.batch_size, config.calibration, config.prune, config.seed, config.budget)
    found.update(f"{trial.space.hash} {images_hash(trial.images.samples)} {trial.weight_images} {how}".encode())
    return f"{folder.resolve().name} {found.hexdigest()[:12]}"


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
