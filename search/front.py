"""The front of subnets: those that no other beats in accuracy and in every cost at once; which of its points the
judging images cannot tell apart; and its table, file and picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.jackknife import jackknife_error
from engine.runs import atomically, table, write_csv
from engine.tasks import Task
from search.costs import Budget, format_cost
from search.space import Architecture, SearchSpace

SURE = 1.96  # standard errors to either side that hold 95 % of a normal distribution
COSTS = ("macs", "params", "latency_ms", "latency_table_ms")  # in this order in files, tables and pictures
AXES = {  # of the picture: name and unit
    "macs": ("GMACs", 1e9),
    "params": ("million parameters", 1e6),
    "latency_ms": ("ms", 1.0),
    "latency_table_ms": ("ms by the table", 1.0),
}
GREY, BLUE, PALE, ORANGE, GREEN, RED = "#9aa5b1", "#1f6feb", "#a9c7f7", "#e8590c", "#2b8a3e", "#c92a2a"
MOST_NUMBERED = 12  # points of a front that get their numbers in the picture


@dataclass(frozen=True)
class Judged:
    """A subnet that was calibrated and measured on the judging images.

    Its score is what subnets are compared by, the first of its task's `engine.tasks.Task.columns`: AP of a detector,
    top-1 of a classifier, mIoU of a segmenter. The second stands beside it, AP50 and so on; nan where it says nothing.
    """

    number: int  # its index in the space
    architecture: Architecture
    score: float
    second: float
    costs: Mapping[str, float]  # macs, params, latency_ms, latency_table_ms
    without: tuple[float, ...] = ()  # the score with each group of judging images left out in turn
    loss: float | None = None  # mean loss of the head on the judging images


# ---- sorting


def dominance(points: np.ndarray) -> np.ndarray:
    """``[N, N]`` bool of points ``[N, D]`` (all to be small): the first is as good as the second in every column and
    better in one.
    """
    as_good = np.ones((len(points), len(points)), bool)
    better = np.zeros_like(as_good)
    for column in points.T:  # one by one: [N, N, D] would be large
        as_good &= column[:, None] <= column[None]
        better |= column[:, None] < column[None]
    return as_good & better


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of the points ``[N, D]`` (all to be small) are on the front, ``[N]`` bool: no other is as good in every
    column and better in one. Equal points are on it together.
    """
    return np.asarray(~dominance(points).any(axis=0))


def ranks(points: np.ndarray) -> np.ndarray:
    """Non-dominated sort of the points ``[N, D]`` (all to be small), ``[N]`` int: 0 on the front, 1 on the front of
    what remains without it, and so on (Deb et al., NSGA-II, 2002).
    """
    dominates = dominance(points)
    above = dominates.sum(axis=0)  # how many of the points not yet taken away dominate each
    found = np.full(len(points), -1)
    rank = 0
    while (front := (above == 0) & (found < 0)).any():
        found[front] = rank
        above = above - dominates[front].sum(axis=0)
        rank += 1
    return found


def hypervolume(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """The volume between the points ``[N, D]`` (all to be small) and the `reference` ``[D]``, exact: what at least one
    of the points is better than. Points that are not below the reference in every column add nothing.
    """
    limit = np.asarray(reference, float)
    inside = np.asarray(points, float).reshape(-1, len(limit))
    inside = inside[(inside < limit).all(axis=1)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    heights = np.diff(inside[:, -1], append=limit[-1])
    if len(limit) == 1:
        return float(heights.sum())
    if len(limit) == 2:  # the widths only grow, so each slab is as wide as its widest point
        return float(heights @ np.maximum.accumulate(limit[0] - inside[:, 0])) if len(inside) else 0.0
    # More columns: slabs along the last one, each with the hypervolume of the points below it in the others.
    slabs = [hypervolume(inside[: n + 1, :-1], limit[:-1]) for n in np.flatnonzero(heights)]
    return float(heights[heights > 0] @ np.array(slabs)) if slabs else 0.0


def on_front(judged: Sequence[Judged], metrics: Sequence[str]) -> list[bool]:
    """Which of the judged are on the front of the score and the costs named by `metrics`."""
    if not judged:
        return []
    points = np.array([[-one.score, *(one.costs[metric] for metric in metrics)] for one in judged])
    return non_dominated(points).tolist()


# ---- noise


def score_error(one: Judged) -> float:
    """The standard error of its score over the choice of judging images; nan where it was not measured by groups.

    To compare two subnets it is too large by far: both see the same images, hard and easy ones alike. See `ties`.
    """
    return jackknife_error(one.without)


def tie(one: Judged, other: Judged) -> bool:
    """Whether the judging images cannot tell the score of two subnets apart: the difference lies within 1.96 of its own
    standard errors, by the jackknife over the same groups of images left out for both.
    """
    if not one.without or len(one.without) != len(other.without):
        return False
    error = jackknife_error(np.subtract(one.without, other.without))
    return not abs(one.score - other.score) > SURE * error  # an error that is nan tells nothing apart


def ties(judged: Sequence[Judged], front: Sequence[bool]) -> list[tuple[int, ...]]:
    """For each of the judged, the numbers of the cheaper points of the front that it cannot be told apart from; empty
    off the front, and where scores were not measured by groups of images.

    Cheaper is a point of the front with no higher score that costs less in something; of equal score and costs, none is
    the other's.
    This is the noise of the judging images alone. Another seed of training would also move scores, often by more, and
    no number of images shows that: of two points told apart here, the better may be the worse after retraining.
    """
    shown = [one for one, on in zip(judged, front, strict=True) if on]

    def cheaper(other: Judged, one: Judged) -> bool:
        return other.score <= one.score and any(other.costs[metric] < cost for metric, cost in one.costs.items())

    return [
        tuple(other.number for other in shown if cheaper(other, one) and tie(one, other)) if on else ()
        for one, on in zip(judged, front, strict=True)
    ]


def knee(judged: Sequence[Judged], front: Sequence[bool], metric: str) -> int | None:
    """Where the front of score and one cost bends most, as a place in `judged`: from there on, the score gets dearer.

    The point with the largest distance above the chord from the cheapest point to the one of the highest score, both
    axes scaled to 0..1 between these two (Das, On characterizing the knee of the Pareto curve, Structural Optimization
    1999). None where no point lies above the chord.
    """
    shown = [place for place, on in enumerate(front) if on]
    if len(shown) < 3:
        return None
    cost = np.array([judged[place].costs[metric] for place in shown])
    score = np.array([judged[place].score for place in shown])
    first, last = np.lexsort((-score, cost))[0], np.lexsort((cost, -score))[0]
    if not (cost[first] < cost[last] and score[first] < score[last]):
        return None
    above = (score - score[first]) / (score[last] - score[first]) - (cost - cost[first]) / (cost[last] - cost[first])
    highest = int(above.argmax())
    return shown[highest] if above[highest] > 1e-9 else None


# ---- file, table, picture


def write_front(path: Path, task: Task, space: SearchSpace, judged: Sequence[Judged], front: Sequence[bool]) -> None:
    """``front.csv``: every judged subnet, the front marked; `ties` as numbers of subnets with blanks between them."""
    rows: list[dict[str, Any]] = []
    metrics = shown_costs(judged)
    score, second = task.columns[:2]
    for one, shown, tied in zip(judged, front, ties(judged, front), strict=True):
        error = score_error(one)
        rows.append(
            {
                "subnet": one.number,
                "front": int(shown),
                "ties": " ".join(map(str, tied)),
                score: one.score,
                f"{score}_error": None if math.isnan(error) else round(error, 6),
                second: None if math.isnan(one.second) else one.second,
                "loss": one.loss,
                **{metric: round(one.costs[metric], 3) for metric in metrics},
                **{choice.name: one.architecture.picks[choice.name] for choice in space.choices},
            }
        )
    write_csv(path, rows)


def front_table(task: Task, judged: Sequence[Judged], front: Sequence[bool]) -> str:
    """The front as text, lowest score first, which is the cheapest; after ``+-`` stands the standard error of the score
    over the judging images.
    """
    metrics = shown_costs(judged)
    tied = ties(judged, front)
    shown = sorted((place for place, on in enumerate(front) if on), key=lambda place: judged[place].score)
    title, second = task.titles[:2]
    beside = [second] if any(not math.isnan(judged[place].second) for place in shown) else []
    rows: list[tuple[Any, ...]] = []
    for place in shown:
        one = judged[place]
        costs = (format_cost(metric, one.costs[metric]) for metric in metrics)
        numbers = one.score, score_error(one), *([one.second] if beside else [])
        rows.append((str(one.number), *numbers, numbered(tied[place]), *costs))
    return table(rows, ("subnet", title, "+-", *beside, "tie with", *metrics))


def numbered(numbers: Sequence[int], most: int = 3) -> str:
    """``17, 23 and 5 more``"""
    if len(numbers) <= most + 1:
        return ", ".join(map(str, numbers)) or "-"
    return ", ".join(map(str, numbers[:most])) + f" and {len(numbers) - most} more"


def shown_costs(judged: Sequence[Judged]) -> list[str]:
    """The costs that all of the judged have."""
    return [metric for metric in COSTS if judged and all(metric in one.costs for one in judged)]


def draw_front(
    path: Path,
    task: Task,
    judged: Sequence[Judged],
    front: Sequence[bool],
    metrics: Sequence[str],
    best: int,
    budgets: Sequence[Budget],
) -> None:
    """``front.png``: the score against every cost. `best` is a place in `judged`.

    The front of one metric is a line against it; against the other costs, and of several metrics, it is marked only.
    Bars are standard errors of the score over the judging images. A hollow point ties with a cheaper one of the front,
    to which a dotted line leads; so is the star of the best. What a budget forbids is shaded.
    """
    from matplotlib.figure import Figure  # here because it is slow to import; it needs no screen

    shown = shown_costs(judged)
    figure = Figure(figsize=(5.2 * len(shown), 5.2), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, shown, strict=True):
        name, unit = AXES[metric]
        drawn = [budget.limit / unit for budget in budgets if budget.metric == metric]
        bend = knee(judged, front, metric) if metric in metrics else None
        draw_panel(axes, task, judged, front, metric, unit, best, bend)
        if list(metrics) == [metric]:
            line = sorted((one.costs[metric] / unit, one.score) for one, on in zip(judged, front, strict=True) if on)
            axes.plot(*zip(*line, strict=True), color=BLUE, lw=1.4, zorder=2)
        if drawn:
            left, right = axes.get_xlim()
            right = max(right, min(drawn) + 0.04 * (right - left))
            axes.axvspan(min(drawn), right, color=RED, alpha=0.08, lw=0)
            axes.axvline(min(drawn), color=RED, ls="--", lw=1.3, label="budget")
            axes.set_xlim(left, right)
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"{task.titles[0]} on the judging images")
    labels = {text: handle for axes in panels for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, frameon=False)
    tied = sum(map(bool, ties(judged, front)))
    figure.suptitle(
        f"{len(judged)} subnets judged, {sum(front)} on the front of {task.titles[0]} and {', '.join(metrics)}"
        + (f", {tied} of them in a tie with a cheaper one" if tied else "")
    )
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=130)


def draw_panel(
    axes: Any,
    task: Task,
    judged: Sequence[Judged],
    front: Sequence[bool],
    metric: str,
    unit: float,
    best: int,
    bend: int | None,
) -> None:
    """One cost of `draw_front`: the judged, the front with its errors and ties, the best and the knee."""
    tied = dict(zip((one.number for one in judged), ties(judged, front), strict=True))
    at = {one.number: (one.costs[metric] / unit, one.score) for one in judged}
    shown = [one for one, on in zip(judged, front, strict=True) if on]
    others = [one for one, on in zip(judged, front, strict=True) if not on]
    if others:
        axes.scatter(
            *zip(*(at[one.number] for one in others), strict=True), s=22, color=GREY, alpha=0.7, label="judged"
        )
    for one in shown:
        x, y = at[one.number]
        if tied[one.number]:
            cheapest = min(tied[one.number], key=lambda number: at[number][0])
            link = {"arrowstyle": "-", "connectionstyle": "arc3,rad=0.3", "color": ORANGE, "ls": ":", "lw": 1.4}
            axes.annotate("", at[cheapest], (x, y), arrowprops=link)
        if not math.isnan(score_error(one)):
            bar = {"fmt": "none", "ecolor": PALE, "elinewidth": 1.2, "capsize": 2.5, "zorder": 1}
            axes.errorbar(x, y, score_error(one), **bar, label=f"standard error of {task.titles[0]}")
        fill, label = ("white", "front, ties with a cheaper point") if tied[one.number] else (BLUE, "front")
        axes.scatter(x, y, s=46, fc=fill, ec=BLUE, lw=1.4, zorder=3, label=label)
        if len(shown) <= MOST_NUMBERED:
            axes.annotate(str(one.number), (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8, color=BLUE)
    if any(tied.values()):
        axes.plot([], [], color=ORANGE, ls=":", lw=1.4, label="cannot be told apart")
    star = "white" if tied[judged[best].number] else ORANGE
    axes.scatter(*at[judged[best].number], marker="*", s=260, fc=star, ec=ORANGE, lw=1.4, zorder=4, label="best")
    if bend is not None:
        axes.scatter(*at[judged[bend].number], marker="D", s=150, fc="none", ec=GREEN, lw=1.8, zorder=4, label="knee")
