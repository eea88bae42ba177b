"""What a subnet costs: MACs, parameters, milliseconds.

All are sums over rows. For parameters and MACs that is exact; how nearly it is so for the latency on a device, the
validation of its table tells (`search.latency`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from data.structures import Fault
from models.cost import RowCost, network_costs, row_cost
from models.graph import Graph, Node, combinations, resolve
from models.ops.primitives import PlainAct
from models.spec import Choice, choices_in
from search.space import Architecture

METRICS = ("macs", "params", "latency_ms")
SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Budget:
    """A limit that the user set: no subnet above it is shown, and it is never moved."""

    metric: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}={format_cost(self.metric, self.limit)}"


@dataclass(frozen=True)
class CostTable:
    """An additive cost: what the closed rows cost, and for every open row an array over the options of its choices.

    In units of `metric`: multiply-adds, parameters, or milliseconds of one image on the device that was measured.
    """

    metric: str
    fixed: float
    rows: tuple[tuple[tuple[Choice, ...], np.ndarray], ...]

    def of(self, architecture: Architecture) -> float:
        total = self.fixed
        for choices, table in self.rows:
            total += float(table[tuple(c.index(architecture.picks[c.name]) for c in choices)])
        return total

    def expected(self, probabilities: Mapping[str, Tensor]) -> Tensor:
        """The mean cost when every decision is drawn by its probabilities; differentiable, and exact.

        A row's choices are independent of each other, or one joint decision (named by none of its choices).
        """
        total = torch.tensor(self.fixed, dtype=torch.float64)
        for choices, table in self.rows:
            values = torch.from_numpy(table)
            if choices[0].name in probabilities:
                for choice in reversed(choices):
                    values = values @ probabilities[choice.name].double().cpu()
            else:
                row = next(name for name in probabilities if choices[0].name.startswith(f"{name}."))
                values = values.reshape(-1) @ probabilities[row].double().cpu()
            total = total + values
        return total

    def extreme(self, largest: bool) -> tuple[float, Architecture]:
        """The cheapest (or dearest) subnet there is, and its cost: each row's own extreme, since costs add up."""
        picks = {}
        for choices, table in self.rows:
            place = np.unravel_index(int(table.argmax() if largest else table.argmin()), table.shape)
            picks.update({c.name: c.options[int(i)] for c, i in zip(choices, place, strict=True)})
        architecture = Architecture(picks)
        return self.of(architecture), architecture


def cost_tables(graph: Graph, imgsz: int) -> dict[str, CostTable]:
    """Exact tables of MACs at ``imgsz x imgsz`` and of parameters, counted on the meta device."""
    picks = {choice.name: choice.options[0] for choice in graph.spec.choices}
    plain = network_costs(resolve(graph.spec.freeze(picks)), imgsz)
    fixed = {"macs": 0.0, "params": 0.0}
    rows: dict[str, list[tuple[tuple[Choice, ...], np.ndarray]]] = {"macs": [], "params": []}
    for node, cost in zip(graph.nodes, plain, strict=True):
        if not node.choices:
            fixed["macs"] += cost.macs
            fixed["params"] += cost.params
            continue
        counted = row_costs(node, imgsz)
        shape = [len(choice.options) for choice in node.choices]
        rows["macs"].append((node.choices, np.array([float(c.macs) for c in counted]).reshape(shape)))
        rows["params"].append((node.choices, np.array([float(c.params) for c in counted]).reshape(shape)))
    return {metric: CostTable(metric, fixed[metric], tuple(rows[metric])) for metric in fixed}


def row_costs(node: Node, imgsz: int) -> list[RowCost]:
    """The costs of an open row with each of `combinations` of its options, in their order.

    Activations are not counted, so options that differ in an argument which the op declares as one are counted once.
    """
    free = {
        choice.name
        for name, value in node.arguments.items()
        if PlainAct in get_args(node.op.hints.get(name))
        for choice in choices_in(value)
    }
    known: dict[tuple[int, ...], RowCost] = {}
    found = []
    for options in combinations(node.choices):
        key = tuple(choice.index(options[choice.name]) for choice in node.choices if choice.name not in free)
        if key not in known:
            known[key] = row_cost(node, options, imgsz)
        found.append(known[key])
    return found


def parse_budget(text: str) -> Budget:
    """``macs=900M``, ``params=2.5M`` or ``latency_ms=12``. Raises `Fault` for anything else."""
    match = re.fullmatch(r"(\w+)=([0-9.]+(?:e[0-9]+)?)([kKmMgG]?)", text.strip())
    if not match or match[1] not in METRICS or (match[3] and match[1] == "latency_ms"):
        raise Fault(f"--budget {text}: write macs=900M, params=2.5M or latency_ms=12")
    try:
        limit = float(match[2]) * SUFFIXES[match[3].lower()]
    except ValueError:
        raise Fault(f"--budget {text}: {match[2]!r} is not a number") from None
    if limit <= 0:
        raise Fault(f"--budget {text}: a budget is over 0")
    return Budget(match[1], limit)


def check_budgets(budgets: Sequence[Budget], tables: Mapping[str, CostTable]) -> None:
    """Raises `Fault` for a budget that no subnet can meet, naming the smallest value that one can."""
    for budget in budgets:
        if budget.metric not in tables:
            continue
        smallest, architecture = tables[budget.metric].extreme(largest=False)
        if smallest > budget.limit:
            least = f"{budget.metric}={format_cost(budget.metric, smallest, exact=True)} ({architecture})"
            here = " on this device; the smallest latency is" if budget.metric == "latency_ms" else "; the smallest has"
            raise Fault(f"--budget {budget}: no subnet can meet it{here} {least}")


def check_together(budgets: Sequence[Budget], tables: Mapping[str, CostTable], subnets: Iterable[Architecture]) -> None:
    """Raises `Fault` where none of the subnets meets all the budgets that tables count."""
    known = [budget for budget in budgets if budget.metric in tables]
    costs = ({b.metric: tables[b.metric].of(one) for b in known} for one in subnets)
    if len(known) > 1 and not any(within(each, known) for each in costs):
        raise Fault(f"--budget: no subnet meets {', '.join(map(str, known))} together; each of them alone can be met")


def within(costs: Mapping[str, float], budgets: Sequence[Budget]) -> bool:
    return all(costs[budget.metric] <= budget.limit for budget in budgets)


def format_cost(metric: str, value: float, exact: bool = False) -> str:
    """``812.400M``, or ``11.3`` of milliseconds; `exact` writes counts to the last digit, milliseconds to the third."""
    if metric.endswith("_ms"):
        return f"{value:.3g}" if not exact else f"{value:.3f}"
    if exact:
        return f"{value:.0f}"
    return f"{value / 1e9:.3f}G" if value >= 1e9 else f"{value / 1e6:.3f}M"
