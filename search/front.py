"""The front of subnets: those that no other beats in accuracy and in every cost at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.runs import atomically, table, write_csv
from search.costs import Budget, format_cost
from search.space import Architecture, SearchSpace


@dataclass(frozen=True)
class Judged:
    """A subnet that was calibrated and measured on the judging images."""

    number: int  # its index in the space
    architecture: Architecture
    ap: float
    ap50: float
    costs: Mapping[str, float]  # macs, params, latency_ms


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which of the points ``[N, D]`` (all to be small) are on the front, ``[N]`` bool: no other is as good in every
    column and better in one. Equal points are on it together.
    """
    as_good = (points[:, None] <= points[None]).all(axis=-1)
    better = (points[:, None] < points[None]).any(axis=-1)
    return np.asarray(~(as_good & better).any(axis=0))


def on_front(judged: Sequence[Judged], metrics: Sequence[str]) -> list[bool]:
    if not judged:
        return []
    points = np.array([[-one.ap, *(one.costs[metric] for metric in metrics)] for one in judged])
    return non_dominated(points).tolist()


def write_front(path: Path, space: SearchSpace, judged: Sequence[Judged], front: Sequence[bool]) -> None:
    """``front.csv``: every judged subnet, the front marked."""
    rows: list[dict[str, Any]] = []
    for one, shown in zip(judged, front, strict=True):
        costs = {metric: round(value, 3) for metric, value in one.costs.items()}
        picks = {choice.name: one.architecture.picks[choice.name] for choice in space.choices}
        rows.append({"subnet": one.number, "front": int(shown), "ap": one.ap, "ap50": one.ap50, **costs, **picks})
    write_csv(path, rows)


def front_table(judged: Sequence[Judged], front: Sequence[bool]) -> str:
    """The front as text, cheapest first."""
    shown = sorted((one for one, on in zip(judged, front, strict=True) if on), key=lambda one: one.costs["macs"])
    return table(
        [(str(one.number), one.ap, one.ap50, *(format_cost(m, v) for m, v in one.costs.items())) for one in shown],
        ("subnet", "AP", "AP50", *(shown[0].costs if shown else ())),
    )


def draw_front(
    path: Path,
    judged: Sequence[Judged],
    front: Sequence[bool],
    metrics: Sequence[str],
    best: int,
    budgets: Sequence[Budget],
) -> None:
    """``front.png``: AP against every cost, the front, the best subnet as a star, budgets as limits.

    The front of one metric is a line against it; against the other costs, and of several metrics, it is marked only.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    units = {"macs": ("GMACs", 1e9), "params": ("million parameters", 1e6), "latency_ms": ("ms on this device", 1.0)}
    shown = list(judged[0].costs)
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4.6), squeeze=False, sharey=True)
    ap = [one.ap for one in judged]
    for axis, metric in zip(axes[0], shown, strict=True):
        name, unit = units[metric]
        cost = [one.costs[metric] / unit for one in judged]
        line = sorted((c, a) for c, a, on in zip(cost, ap, front, strict=True) if on)
        style = "o-" if list(metrics) == [metric] else "o"
        axis.scatter(cost, ap, s=28, color="#9aa5b1", label="judged")
        axis.plot([c for c, _ in line], [a for _, a in line], style, color="#1f6feb", ms=6, lw=1.6, label="front")
        axis.scatter([cost[best]], [ap[best]], marker="*", s=240, color="#e8590c", zorder=3, label="best")
        for budget in budgets:
            if budget.metric == metric:
                axis.axvline(budget.limit / unit, color="#c92a2a", ls="--", lw=1.2, label="budget")
        axis.set_xlabel(name)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("AP on the judging images")
    labels = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{len(judged)} subnets judged, {sum(front)} on the front of AP and {', '.join(metrics)}")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=130)
    plt.close(figure)
