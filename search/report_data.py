"""What a search's report is made of: the files of a run's folder, read and checked, and its numbers as words.

Only the folder is read. Every file may be missing, but not every one of them, and of a file every column that not all
searches write.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.structures import Fault
from engine.config import RunConfig, option_name
from engine.runs import read_csv
from engine.tasks import DETECT, TASKS, Task, task_of
from models.graph import Graph, load_graph
from search.config import SEARCHED, SearchConfig
from search.costs import Budget, format_cost, parse_budget
from search.front import COSTS, Judged, knee
from search.space import Architecture

TITLES = {
    "macs": "MACs",
    "params": "parameters",
    "latency_ms": "latency",
    "latency_table_ms": "latency by table",
}
SCORES = tuple(name for task in TASKS.values() for name in (*task.columns[:2], f"{task.columns[0]}_error"))
MEASURED = ("subnet", "front", "ties", *SCORES, "loss", *COSTS)  # the rest of front.csv are choices
STATES = {"inherited": "inherited", "calibrated": "calibrated", "fine_tuned": "fine-tuned", "retrained": "retrained"}
ONLY_SEARCHED = (*SEARCHED, "device")  # not in the command that trains a subnet, on whatever machine


@dataclass(frozen=True)
class Subnet:
    """A row of front.csv. What its search did not write is None."""

    number: int
    front: bool
    ties: tuple[int, ...]  # subnets of the front that cost less and whose score cannot be told from this one's
    score: float  # AP, or top-1
    error: float | None  # its standard error over the judging images
    second: float | None  # AP50, or top-5
    loss: float | None
    costs: Mapping[str, float]
    picks: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """What the folder of a search holds; what is not there is empty."""

    folder: Path
    task: Task  # which says what the scores are called
    config: Mapping[str, Any]
    choices: Mapping[str, tuple[str, ...]]  # name to options, as text
    size: int | None  # subnets of the space
    images: Mapping[str, int]  # how many train the weights, judge and report, where that was kept
    subnets: tuple[Subnet, ...]
    best: int | None
    alphas: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]  # decision, option: (step, probability)
    results: Mapping[str, Sequence[tuple[float, float]]]  # column: (epoch, value)
    losses: Mapping[str, np.ndarray]  # column: a value a subnet
    retrained: Sequence[tuple[int, Mapping[str, float]]]  # subnet: what of it was measured
    importances: Sequence[Mapping[str, str]]  # rows of importances.csv
    latency: Mapping[str, Any]
    graph: Graph | None  # of search.yaml

    @property
    def score(self) -> str:
        """What subnets are compared by: AP, top-1."""
        return self.task.titles[0]

    @cached_property
    def front(self) -> tuple[Subnet, ...]:
        """The front, cheapest first."""
        return tuple(sorted((one for one in self.subnets if one.front), key=self.cheapest_first))

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        return tuple(parse_budget(text) for text in self.config.get("budget") or ())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The costs that the front is made of."""
        return tuple(dict.fromkeys(budget.metric for budget in self.budgets)) or ("macs",)

    @property
    def costs(self) -> tuple[str, ...]:
        """The costs that any subnet has."""
        return tuple(cost for cost in COSTS if any(cost in one.costs for one in self.subnets))

    @property
    def chosen(self) -> Subnet | None:
        """The best."""
        return next((one for one in self.subnets if one.number == self.best), None)

    @cached_property
    def knees(self) -> Mapping[str, int]:
        """For each cost of the front, the subnet behind which the score gets dearer."""
        judged = [Judged(one.number, Architecture(one.picks), one.score, 0.0, one.costs) for one in self.front]
        there = [metric for metric in self.metrics if all(metric in one.costs for one in self.front)]
        places = {metric: knee(judged, [True] * len(judged), metric) for metric in there}
        return {metric: judged[place].number for metric, place in places.items() if place is not None}

    @cached_property
    def rows(self) -> Mapping[str, tuple[str, ...]]:
        """The searched rows of the model, by index or name, and the names of their choices."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.choices:
            row = name.partition(".")[0]
            found[row] = (*found.get(row, ()), name)
        return found

    @property
    def name(self) -> str:
        return self.graph.spec.name if self.graph else Path(str(self.config.get("cfg") or "model")).stem

    def cheapest_first(self, one: Subnet) -> tuple[float, int]:
        """The order of subnets: by the first cost of the front."""
        return one.costs.get(self.metrics[0], 0.0), one.number

    def has_card(self, one: Subnet) -> bool:
        return one.front or one.number == self.best


# ---- reading


def read_run(folder: Path) -> Run:
    """Raises a Fault for a folder that is not a search's, and for a file in it that is not what its name says."""
    if not (folder / "config.yaml").is_file() and not (folder / "front.csv").is_file():
        raise Fault(
            f"{folder}: no folder of a search, it has neither config.yaml nor front.csv; runs/search/exp is one"
        )
    space = read_mapping(folder / "space.json")
    graph = read_graph(folder / "search.yaml")
    judged = read_csv(folder / "front.csv")
    choices: dict[str, tuple[str, ...]] = {}
    if space.get("choices"):
        choices = {str(choice["name"]): tuple(map(option_text, choice["options"])) for choice in space["choices"]}
    elif graph:
        choices = {choice.name: tuple(map(option_text, choice.options)) for choice in graph.spec.choices}
    size = math.prod(map(len, choices.values())) if choices else None
    if judged and not choices:  # the options that no subnet has are not known then, nor is the size
        choices = {name: tuple(sorted({row[name] for row in judged})) for name in judged[0] if name not in MEASURED}
    task = task_measured(judged, graph)
    subnets = tuple(
        subnet(row, task, choices, f"{folder}/front.csv:{line}") for line, row in enumerate(judged, start=2)
    )
    return Run(
        folder=folder,
        task=task,
        config=read_mapping(folder / "config.yaml"),
        choices=choices,
        size=size,
        images={str(name): int(count) for name, count in (space.get("images") or {}).items()},
        subnets=subnets,
        best=best_number(folder, subnets),
        alphas=read_alphas(folder / "alphas.csv"),
        results=read_results(folder / "results.csv"),
        losses=read_losses(folder / "losses.csv"),
        retrained=read_retrained(folder / "retrain.csv"),
        importances=read_csv(folder / "importances.csv"),
        latency=read_mapping(folder / "latency.json"),
        graph=graph,
    )


def task_measured(judged: Sequence[Mapping[str, str]], graph: Graph | None) -> Task:
    """The task whose score is a column of front.csv; before there is one, that of the model's head."""
    there = [task for task in TASKS.values() if judged and task.columns[0] in judged[0]]
    return there[0] if there else task_of(graph.spec) if graph else DETECT


def subnet(row: Mapping[str, str], task: Task, choices: Mapping[str, Sequence[str]], where: str) -> Subnet:
    """A row of front.csv."""
    name, second = task.columns[:2]
    number, score = cell(row, "subnet", where), cell(row, name, where)
    if number is None or score is None:
        raise Fault(f"{where}: a row of front.csv has a subnet and its {name}")
    return Subnet(
        number=int(number),
        front=bool(cell(row, "front", where)),
        ties=tuple(int(other) for other in re.findall(r"\d+", row.get("ties") or "")),
        score=score,
        error=cell(row, f"{name}_error", where),
        second=cell(row, second, where),
        loss=cell(row, "loss", where),
        costs={name: value for name in COSTS if (value := cell(row, name, where)) is not None},
        picks={name: row[name] for name in choices if name in row},
    )


def read_alphas(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line, row in enumerate(read_csv(path), start=2):
        step, probability = (cell(row, name, f"{path}:{line}") for name in ("step", "probability"))
        if step is not None and probability is not None:
            options = found.setdefault(row.get("choice", "?"), {})
            options.setdefault(row.get("option", "?"), []).append((step, probability))
    return found


def read_results(path: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for line, row in enumerate(read_csv(path), start=2):
        epoch = cell(row, "epoch", f"{path}:{line}")
        for name in row:
            value = cell(row, name, f"{path}:{line}")
            if epoch is not None and value is not None:
                found.setdefault(name, []).append((epoch, value))
    return found


def read_losses(path: Path) -> dict[str, np.ndarray]:
    rows = read_csv(path)
    names = [name for name in ("subnet", "loss", *COSTS) if rows and name in rows[0]]
    cells = [[cell(row, name, f"{path}:{line}") for name in names] for line, row in enumerate(rows, start=2)]
    table = np.array([found for found in cells if None not in found], dtype=float).reshape(-1, max(len(names), 1))
    whole = len(table) and names[:2] == ["subnet", "loss"]
    return {name: table[:, place] for place, name in enumerate(names)} if whole else {}


def read_retrained(path: Path) -> list[tuple[int, dict[str, float]]]:
    found = []
    for line, row in enumerate(read_csv(path), start=2):
        values = {name: cell(row, name, f"{path}:{line}") for name in row}
        if (number := values.pop("subnet", None)) is not None:
            found.append((int(number), {name: value for name, value in values.items() if value is not None}))
    return found


def cell(row: Mapping[str, str], name: str, where: str) -> float | None:
    """A number of a table; None where the column or the number is missing. Raises a Fault for another text."""
    text = row.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise Fault(f"{where}: {name} is a number, got {text!r}") from None
    return value if math.isfinite(value) else None


def option_text(option: Any) -> str:
    """An option as alphas.csv and front.csv write it: lists as tuples."""
    return str(tuple(option) if isinstance(option, list) else option)


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file that is a mapping; empty where there is none."""
    if not path.is_file():
        return {}
    kind = {".json": "JSON", ".yaml": "YAML"}[path.suffix]
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, IndexError, yaml.YAMLError) as problem:  # PyYAML has no word for !!int '' and 0b_
        raise Fault(f"{path}: not {kind}: {' '.join(str(problem).split())}") from None
    if not isinstance(found, dict):
        raise Fault(f"{path}: a mapping is expected here, got {type(found).__name__}")
    return found


def read_graph(path: Path) -> Graph | None:
    """The graph of search.yaml; None where there is none, and where it uses ops that are not loaded: the report then
    lists the searched rows instead of drawing them.
    """
    try:
        return load_graph(path) if path.is_file() else None
    except Fault:
        return None


def best_number(folder: Path, subnets: Sequence[Subnet]) -> int | None:
    """The subnet that best.yaml holds, by its first line; else that of the best score, of equal ones the cheapest."""
    if (folder / "best.yaml").is_file():
        found = re.match(r"# subnet (\d+):", (folder / "best.yaml").read_text(encoding="utf-8"))
        if found and any(one.number == int(found[1]) for one in subnets):
            return int(found[1])
    shown = [one for one in subnets if one.front] or list(subnets)
    return max(shown, key=lambda one: (one.score, -one.costs.get("macs", 0.0))).number if shown else None


# ---- words and numbers


def cost_number(metric: str, value: float) -> str:
    """``812.400M`` or ``11.3``: as the search prints it."""
    return format_cost("latency_ms" if metric.startswith("latency") else metric, value)


def cost_text(metric: str, value: float) -> str:
    """``812.400M MACs``, ``2.500M parameters``, ``11.3 ms``"""
    unit = "ms" if metric == "latency_ms" else "ms by the table" if metric.startswith("latency") else TITLES[metric]
    return f"{cost_number(metric, value)} {unit}"


def costs_text(one: Subnet) -> str:
    return ", ".join(cost_text(metric, value) for metric, value in one.costs.items() if metric != "latency_table_ms")


def score_text(one: Subnet) -> str:
    """``0.430 ± 0.021``"""
    return f"{one.score:.3f}" + ("" if one.error is None else f" ± {one.error:.3f}")


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(parts: Sequence[object], word: str = "and") -> str:
    """``a``, ``a and b``, ``a, b and c``"""
    *most, last = map(str, parts) if parts else [""]
    return f"{', '.join(most)} {word} {last}" if most else last


def decision_text(option: str) -> str:
    """``(3, 'relu')``, an option of a row's choices together, as ``3 relu``; any other as it is."""
    if not (option.startswith("(") and option.endswith(")")):
        return option
    return " ".join(part.strip(" '\"") for part in option[1:-1].split(",") if part.strip())


def taken_option(decision: str, one: Subnet, run: Run) -> str:
    """A subnet's option of a decision: its pick of that choice, or its picks of that row together."""
    names = (decision,) if decision in one.picks else run.rows.get(decision, ())
    return " ".join(decision_text(one.picks.get(name, "?")) for name in names)


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


# ---- commands


def search_command(run: Run) -> str:
    """The command that does this search once more: every option that is not at its default."""
    return shlex.join(["python", "search.py", *changed(run.config, SearchConfig.model_fields, ("exist_ok", "resume"))])


def training_command(run: Run, file: str, name: str) -> str:
    """The command that trains a subnet on with the options of its search, as ``--retrain`` does.

    `file` is its checkpoint, in the folder; its YAML is in there.
    """
    epochs = run.config.get("retrain_epochs") or run.config.get("epochs") or RunConfig.model_fields["epochs"].default
    words = ["python", "train.py", "--weights", str(run.folder / file), "--epochs", str(epochs), "--name", name]
    return shlex.join([*words, *changed(run.config, RunConfig.model_fields, ONLY_SEARCHED)])


def changed(config: Mapping[str, Any], fields: Mapping[str, Any], left_out: Sequence[str]) -> list[str]:
    """The words of a command line that set every option of `config` that is not at its default."""
    found: list[str] = []
    for name, field in fields.items():
        value = config.get(name, plain(field.default))
        if name in left_out or value is None or value == plain(field.default):
            continue
        if field.annotation is bool:
            found.append(option_name(name) if value else option_name(name).replace("--", "--no-", 1))
        else:
            for one in value if isinstance(value, list) else [value]:
                found += [option_name(name), str(one)]
    return found


def plain(value: Any) -> Any:
    """A default as config.yaml writes it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
