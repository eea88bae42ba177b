"""What every option of a search costs in milliseconds on this device: a table, and how far it can be believed.

Two kinds. A ``table`` adds up rows: each fused row with each of its options is timed alone at the size it has in the
network, and ``fixed_ms``, the rest, is the mean of what whole subnets take beyond the sum of their rows. Where that
does not predict whole subnets, a ``regression`` corrects it by a ridge fit to subnets that are timed as a whole. Either
is held against 24 random subnets that were timed end to end, twice, and took no part in the making.

Where the space spreads over less than three times what two measurements differ by, a search says so, loudly, and goes
on: a budget of milliseconds is still kept, by the time that each judged subnet takes itself.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.structures import Fault
from engine.latency import (
    PRECISION,
    check_runtime,
    deployed,
    device_name,
    image_of,
    inputs_of,
    joined,
    onnx_rows,
    onnx_run,
    threads_used,
    torch_row_run,
)
from engine.runs import table as text_table
from engine.runs import write_text
from engine.timing import CPU, Run, Timing, interleaved
from models.cost import count_params
from models.graph import Graph, combinations, resolve
from models.network import Network
from models.spec import Choice
from search.costs import CostTable, format_cost
from search.rank import kendall_tau
from search.space import Architecture, SearchSpace

UNIT = "ms"
TABLE, REGRESSION = "table", "regression"
HELD_OUT = 24  # subnets that a table is held against
WHOLE = 8  # subnets from which the rest of the network is known
PER_ENTRY, MOST_SUBNETS = 4, 100  # timed whole for a regression: so many an entry, and at most
MOST_ROWS = 400  # rows with options picked that are timed alone; a space of more starts with the regression
ALLOWED_ERROR, ALLOWED_TAU = 0.05, 0.9  # or the run-to-run difference; of the run-to-run tau
SEPARABLE = 3.0  # spread of a space over the run-to-run difference, under which latency says nothing
ANOTHER_UNIT = 5.0  # a subnet cannot differ so much from its table on the device where that was made
SANE_MS = (1e-3, 1e6)  # of a whole network: a microsecond to a quarter of an hour
SECONDS = 120.0  # of timing, each time
MOST_HELD, FEWEST_TOGETHER = 400_000_000, 8  # parameters of all subnets that are in onnxruntime at a time; subnets

Rows = tuple[tuple[int, tuple[Choice, ...]], ...]  # the open rows: index and choices
Timed = Callable[[Sequence[tuple[int, Mapping[str, Any]]], Sequence[Architecture]], tuple[list[Timing], list[Timing]]]
"""A device: times open rows alone with their choices picked, and whole subnets, all taking turns with each other."""


@dataclass(frozen=True)
class Key:
    """What a table was measured with. A table of another key says nothing."""

    device: str
    runtime: str
    threads: int
    batch: int
    precision: str
    imgsz: int
    space: str


@dataclass(frozen=True)
class Entry:
    """One row with its choices picked.

    In a table the row alone: its median, the distance between the quartiles, and the number of runs. In a regression
    what it takes longer than the row's fastest options, no quartiles, and the number of subnets that had it.
    """

    row: int
    picks: Mapping[str, Any]
    ms: float
    iqr: float | None
    count: int


@dataclass(frozen=True)
class Check:
    """A held-out subnet: what the table says, and what two measurements of it end to end said."""

    number: int
    predicted_ms: float
    measured_ms: float
    again_ms: float


@dataclass(frozen=True)
class Validation:
    """A prediction of latencies next to the best there can be, a second measurement of the same subnets."""

    subnets: tuple[Check, ...]

    @property
    def error(self) -> float:
        """Mean of ``|predicted / measured - 1|``."""
        return float(np.mean([abs(one.predicted_ms / one.measured_ms - 1) for one in self.subnets]))

    @property
    def repeat_error(self) -> float:
        """The same of the second measurement against the first."""
        return float(np.mean([abs(one.again_ms / one.measured_ms - 1) for one in self.subnets]))

    @property
    def tau(self) -> float:
        """Kendall's tau-b of prediction and measurement; nan where there is nothing to put in order."""
        return self._tau([one.predicted_ms for one in self.subnets])

    @property
    def repeat_tau(self) -> float:
        return self._tau([one.again_ms for one in self.subnets])

    def _tau(self, values: list[float]) -> float:
        measured = [one.measured_ms for one in self.subnets]
        return kendall_tau(values, measured) if len(measured) > 1 else math.nan

    @property
    def noise_ms(self) -> float:
        """How far two measurements of a subnet lie apart, on average."""
        return float(np.mean([abs(one.again_ms - one.measured_ms) for one in self.subnets]))

    @property
    def fits(self) -> bool:
        """Whether the prediction is about as good as measuring: error within 5 % or what a repetition differs by, and
        tau at least .9 of a repetition's.
        """
        tau = 0.0 if math.isnan(self.tau) else self.tau
        ordered = math.isnan(self.repeat_tau) or tau >= ALLOWED_TAU * self.repeat_tau
        return self.error <= max(ALLOWED_ERROR, self.repeat_error) and ordered


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every open row's options, and of all the rest together (`fixed_ms`)."""

    key: Key
    kind: str
    fixed_ms: float
    entries: tuple[Entry, ...]  # of every open row all combinations, in the order of `models.graph.combinations`
    validation: Validation

    @cached_property
    def cost(self) -> CostTable:
        """The same as an additive cost, as MACs are one."""
        rows = []
        for _, group in itertools.groupby(self.entries, key=lambda entry: entry.row):
            of_row = list(group)
            choices = tuple(
                Choice(name, tuple({(type(e.picks[name]), e.picks[name]): e.picks[name] for e in of_row}.values()))
                for name in of_row[0].picks
            )
            shape = [len(choice.options) for choice in choices]
            rows.append((choices, np.array([entry.ms for entry in of_row]).reshape(shape)))
        return CostTable("latency_ms", self.fixed_ms, tuple(rows))

    @property
    def spread_ms(self) -> float:
        """The slowest subnet's latency less the fastest one's."""
        return self.cost.extreme(largest=True)[0] - self.cost.extreme(largest=False)[0]

    @property
    def noise_ms(self) -> float:
        return self.validation.noise_ms

    @property
    def separates(self) -> bool:
        """Whether the subnets differ by more than measurements do."""
        return self.spread_ms >= SEPARABLE * self.noise_ms

    @property
    def usable(self) -> bool:
        """Whether it predicts, and says nothing absurd."""
        return self.validation.fits and self.fixed_ms > 0

    def lines(self) -> list[str]:
        """What a search prints: range, error and order next to a repetition's, and what is wrong with them."""
        check, key = self.validation, self.key
        low, high = (self.cost.extreme(largest)[0] for largest in (False, True))
        how = "the sum of rows timed alone" if self.kind == TABLE else "a regression on subnets timed whole"
        threads = f", {key.threads} threads" if key.threads else ""
        rows = [
            (f"{self.kind} against measurement", f"{check.error:.1%}", check.tau),
            ("measurement against its repetition", f"{check.repeat_error:.1%}", check.repeat_tau),
        ]
        found = [
            f"latency on {key.device}, {key.runtime}{threads}, {key.imgsz} px: "
            f"{format_cost('latency_ms', low)} to {format_cost('latency_ms', high)} ms, {how}",
            *text_table(rows, (f"{len(check.subnets)} random subnets", "error", "tau")).splitlines(),
        ]
        if not self.usable:
            found.append(
                "note: this device's latencies do not add up row by row: the predictions are further off than "
                f"{max(ALLOWED_ERROR, check.repeat_error):.1%}, or in another order; subnets that are judged are timed "
                "themselves"
            )
        if not self.separates:
            found.append(
                f"note: latency cannot separate these: the space spreads over {self.spread_ms:.2g} ms, and two "
                f"measurements of one subnet differ by {self.noise_ms:.2g} ms; --budget macs=... counts what is exact"
            )
        return found


# ---- making one


def latency_table(
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    seed: int = 0,
    progress: bool = True,
    seconds: float = SECONDS,
) -> LatencyTable:
    """Measures a table of an open graph on this device, with weights of its own: for time they do not matter.

    Raises `Fault` where `runtime` is not there.
    """
    check_runtime(runtime, device)
    timed = device_timer(graph, imgsz, device=device, runtime=runtime, progress=progress, seconds=seconds)
    return tabulate(SearchSpace.of(graph.spec), open_rows(graph), timed, key_of(graph, imgsz, device, runtime), seed)


def key_of(graph: Graph, imgsz: int, device: torch.device, runtime: str) -> Key:
    space = SearchSpace.of(graph.spec)
    return Key(device_name(device), runtime, threads_used(device), 1, PRECISION, imgsz, space.hash)


def open_rows(graph: Graph) -> Rows:
    return tuple((node.index, node.choices) for node in graph.nodes if node.choices)


def tabulate(space: SearchSpace, rows: Rows, timed: Timed, key: Key, seed: int = 0) -> LatencyTable:
    """The table of a device: of rows timed alone where that predicts whole subnets, otherwise the regression."""
    held_out, others = split(space, rows, seed)
    if sum(len(combinations(choices)) for _, choices in rows) > MOST_ROWS:
        return of_subnets(space, rows, timed, key, held_out, others)
    table = of_rows(space, rows, timed, key, held_out, others[:WHOLE])
    if table.usable:
        return table
    fitted = of_subnets(space, rows, timed, key, held_out, others, table.cost)
    return fitted if fitted.usable or fitted.validation.error < table.validation.error else table


def split(space: SearchSpace, rows: Rows, seed: int) -> tuple[list[Architecture], list[Architecture]]:
    """Random subnets: those that a table is held against (24, but never more than half), and those it is made of."""
    entries = sum(len(combinations(choices)) for _, choices in rows)
    subnets = drawn(space, HELD_OUT + min(MOST_SUBNETS, PER_ENTRY * entries), random.Random(f"latency {seed}"))
    count = min(HELD_OUT, len(subnets) // 2)
    return subnets[:count], subnets[count:]


def of_rows(
    space: SearchSpace,
    rows: Rows,
    timed: Timed,
    key: Key,
    held_out: Sequence[Architecture],
    whole: Sequence[Architecture],
) -> LatencyTable:
    """A table of every row timed alone; the rest is the mean of what some whole subnets take beyond their rows."""
    alone = [(index, picks) for index, choices in rows for picks in combinations(choices)]
    found, all_whole = timed(alone, [*whole, *held_out, *held_out])
    entries = tuple(Entry(i, picks, t.ms, t.iqr, t.count) for (i, picks), t in zip(alone, found, strict=True))
    table = LatencyTable(key, TABLE, 0.0, entries, Validation(()))
    beyond = [t.ms - table.cost.of(one) for one, t in zip(whole, all_whole[: len(whole)], strict=True)]
    table = replace(table, fixed_ms=float(np.mean(beyond)))
    return replace(table, validation=checked(space, table.cost, held_out, all_whole[len(whole) :]))


def of_subnets(
    space: SearchSpace,
    rows: Rows,
    timed: Timed,
    key: Key,
    held_out: Sequence[Architecture],
    whole: Sequence[Architecture],
    prior: CostTable | None = None,
) -> LatencyTable:
    """A regression on whole subnets, of what a `prior` does not say about them already."""
    _, found = timed([], [*whole, *held_out, *held_out])
    cost = fit_additive([choices for _, choices in rows], whole, [t.ms for t in found[: len(whole)]], prior)
    entries = tuple(
        Entry(index, picks, float(ms), None, sum(picks.items() <= one.picks.items() for one in whole))
        for (index, choices), (_, array) in zip(rows, cost.rows, strict=True)
        for picks, ms in zip(combinations(choices), array.ravel(), strict=True)
    )
    return LatencyTable(key, REGRESSION, cost.fixed, entries, checked(space, cost, held_out, found[len(whole) :]))


def drawn(space: SearchSpace, count: int, rng: random.Random) -> list[Architecture]:
    """Different subnets in random order: so many, or all that there are."""
    if space.size <= 2 * count:
        return [space.at(number) for number in rng.sample(range(space.size), min(count, space.size))]
    found: dict[Architecture, None] = {}
    while len(found) < count:
        found[space.sample(rng)] = None
    return list(found)


def checked(
    space: SearchSpace, cost: CostTable, subnets: Sequence[Architecture], twice: Sequence[Timing]
) -> Validation:
    """Of subnets and their timings: those of all, then those of all again."""
    first, again = twice[: len(subnets)], twice[len(subnets) :]
    rows = zip(subnets, first, again, strict=True)
    return Validation(tuple(Check(space.index(one), cost.of(one), a.ms, b.ms) for one, a, b in rows))


# ---- regression


def fit_additive(
    rows: Sequence[tuple[Choice, ...]],
    subnets: Sequence[Architecture],
    values: Sequence[float],
    prior: CostTable | None = None,
) -> CostTable:
    """The additive table that fits values of whole subnets, a number over 0 each.

    Ridge regression on what a row's picks are: one by one, in pairs, and all together, so that options of which little
    was seen are told by what they have in common with others. The strength of the penalty is the one with the least
    relative error when every subnet is left out in turn (in closed form: Allen, The relationship between variable
    selection and data augmentation and a method for prediction, Technometrics 1974). With a `prior` only the
    difference to it is fitted, and it may be stretched row by row. Every row's cheapest options cost 0 in what returns,
    since only sums can be known.
    """
    y = np.array(values, dtype=np.float64)
    residual = y - np.array([prior.of(one) for one in subnets]) if prior else y
    bases = [_bases(choices, prior.rows[row][1] if prior else None) for row, choices in enumerate(rows)]
    features = []
    for choices, of_row in zip(rows, bases, strict=True):
        places = tuple(np.array([[c.index(one.picks[c.name]) for c in choices] for one in subnets]).T)
        features.append(np.stack([base[places] for base in of_row], axis=1))
    coefficients, constant = _ridge(np.concatenate(features, axis=1), residual, y)
    parts = np.split(coefficients, np.cumsum([feature.shape[1] for feature in features])[:-1])
    fixed = constant + (prior.fixed if prior else 0.0)
    found = []
    for row, (choices, of_row, part) in enumerate(zip(rows, bases, parts, strict=True)):
        array = np.tensordot(part, np.stack(of_row), axes=1) + (prior.rows[row][1] if prior else 0.0)
        fixed += float(array.min())
        found.append((tuple(choices), array - array.min()))
    return CostTable("latency_ms", fixed, tuple(found))


def _bases(choices: Sequence[Choice], prior: np.ndarray | None) -> list[np.ndarray]:
    """What a row's cost is put together of, each as an array over its options: 1 where some of its choices have certain
    options and 0 elsewhere, and what the prior says of the row, so that all of it can be stretched.
    """
    sizes = [len(choice.options) for choice in choices]
    found = [] if prior is None or prior.std() == 0 else [prior / prior.std()]
    for chosen in _subsets(sizes):
        for options in itertools.product(*(range(sizes[place]) for place in chosen)):
            base = np.zeros(sizes)
            at: list[slice | int] = [slice(None)] * len(sizes)
            for place, option in zip(chosen, options, strict=True):
                at[place] = option
            base[tuple(at)] = 1.0
            found.append(base)
    return found


def _subsets(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of choices with so many options each one, each pair, and all where their combinations are few."""
    small = [chosen for size in (1, 2) for chosen in itertools.combinations(range(len(sizes)), size)]
    return [*small, tuple(range(len(sizes)))] if len(sizes) > 2 and math.prod(sizes) <= MOST_ROWS else small


def _ridge(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
    """Coefficients and constant; `scale` is what an error of y is a share of."""
    count = len(y)
    centred = x - x.mean(axis=0)
    offsets = y - y.mean()
    weights, vectors = np.linalg.eigh(centred @ centred.T)
    weights = weights.clip(min=0.0)
    seen = vectors.T @ offsets
    best = (math.inf, 0.0)
    for penalty in weights.mean() * 10.0 ** np.arange(-7.0, 4.0, 0.5) + 1e-12:
        kept = weights / (weights + penalty)
        left = offsets - vectors @ (kept * seen)
        share = (vectors**2 @ kept + 1 / count).clip(max=1 - 1e-9)  # of a subnet's own value in its prediction
        best = min(best, (float(np.mean((left / (1 - share) / scale) ** 2)), float(penalty)))
    coefficients = centred.T @ (vectors @ (seen / (weights + best[1])))
    return coefficients, float(y.mean() - x.mean(axis=0) @ coefficients)


# ---- this device


def device_timer(
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    progress: bool = True,
    seconds: float = SECONDS,
) -> Timed:
    """Times rows and subnets of an open graph here. Subnets share the modules of the rows that they have in common.

    What does not fit into memory together is timed in groups, by lot, of as many as do.
    """
    layers: dict[tuple[int, Architecture], nn.Module] = {}  # fused rows, by row and the picks of its choices
    written: dict[tuple[int, Architecture], Any] = {}  # the same as ONNX models
    frames: list[Network] = []  # one fused network, the rows of which are replaced by those of a subnet
    place = device if runtime == "torch" else CPU
    rng = np.random.default_rng(0)

    def prepare(subnets: Sequence[Architecture]) -> None:
        built = add_layers(graph, subnets, place, layers, progress)
        frames[:] = frames or ([built] if built else [])
        if runtime == "onnxruntime":
            missing = [name for name in layers if name not in written]
            rows = [(graph.nodes[name[0]], layers[name]) for name in missing]
            written.update(zip(missing, onnx_rows(rows, imgsz, progress), strict=True))

    def row_run(name: tuple[int, Architecture]) -> Run:
        node = graph.nodes[name[0]]
        if runtime == "torch":
            return torch_row_run(node, layers[name], imgsz, device)
        return onnx_run(written[name], inputs_of(node, imgsz), device)

    def subnet_run(subnet: Architecture) -> Run:
        names = row_names(graph, subnet)
        if runtime == "onnxruntime":
            return onnx_run(joined(graph, [written[name] for name in names], imgsz), [image_of(imgsz, CPU)], device)
        (frame,) = frames
        modules, image = nn.ModuleList([layers[name] for name in names]), image_of(imgsz, device)

        def run() -> object:
            frame.layers = modules
            return frame.predict(image)

        return run

    def timed(
        rows: Sequence[tuple[int, Mapping[str, Any]]], subnets: Sequence[Architecture]
    ) -> tuple[list[Timing], list[Timing]]:
        prepare([*covering(graph, rows), *subnets])
        makers = [partial(row_run, (index, Architecture(picks))) for index, picks in rows]
        makers += [partial(subnet_run, subnet) for subnet in subnets]
        order = rng.permutation(len(makers))
        # onnxruntime keeps a subnet's weights for itself, as written and packed: not all of a large model fit at once
        together = len(makers) if runtime == "torch" else max(FEWEST_TOGETHER, MOST_HELD // count_params(frames[0]))
        found: dict[int, Timing] = {}
        with tqdm(total=len(makers), desc="loading", unit="run", leave=False, delay=2, disable=not progress) as bar:
            for start in range(0, len(makers), together):
                group = order[start : start + together]
                runs = []
                for index in group:
                    runs.append(makers[index]())
                    bar.update()
                limit = seconds * len(group) / len(makers)
                timings = interleaved(runs, device=device, seconds=limit, progress=progress)
                found.update(zip(group.tolist(), timings, strict=True))
        in_order = [found[index] for index in range(len(makers))]
        return in_order[: len(rows)], in_order[len(rows) :]

    return timed


def row_names(graph: Graph, subnet: Architecture) -> list[tuple[int, Architecture]]:
    """Every row's index with the picks of its choices: equal rows of subnets have equal names."""
    picks = [{choice.name: subnet.picks[choice.name] for choice in node.choices} for node in graph.nodes]
    return [(index, Architecture(of_row)) for index, of_row in enumerate(picks)]


def add_layers(
    graph: Graph,
    subnets: Sequence[Architecture],
    place: torch.device,
    layers: dict[tuple[int, Architecture], nn.Module],
    progress: bool = True,
) -> Network | None:
    """Adds the fused rows of subnets to `layers`, by their `row_names`. A network that was built for it, if any was."""
    frame = None
    for one in tqdm(subnets, "building", unit="subnet", leave=False, delay=2, disable=not progress):
        names = row_names(graph, one)
        if all(name in layers for name in names):
            continue
        network = deployed(Network(resolve(graph.spec.freeze(one.picks))), place)
        frame = frame or network
        for name, layer in zip(names, network.layers, strict=True):
            layers.setdefault(name, layer)
    return frame


def covering(graph: Graph, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Architecture]:
    """A few subnets in which every one of these rows with its picks occurs."""
    first = {choice.name: choice.options[0] for choice in graph.spec.choices}
    queues: dict[int, list[Mapping[str, Any]]] = {}
    for index, picks in rows:
        queues.setdefault(index, []).append(picks)
    count = max(map(len, queues.values()), default=0)
    found = []
    for turn in range(count):
        picks = dict(first)
        for queue in queues.values():
            picks |= queue[turn % len(queue)]
        found.append(Architecture(picks))
    return found


# ---- the file


def write_table(path: Path, table: LatencyTable) -> None:
    """As ``latency.json``: everything, with its unit."""
    check = table.validation
    content = {
        "unit": UNIT,
        "key": asdict(table.key),
        "kind": table.kind,
        "fixed_ms": table.fixed_ms,
        "entries": [asdict(entry) for entry in table.entries],
        "validation": {
            "subnets": [asdict(one) for one in check.subnets],
            **{name: _plain(getattr(check, name)) for name in ("error", "repeat_error", "tau", "repeat_tau")},
        },
        "spread_ms": table.spread_ms,
        "noise_ms": table.noise_ms,
    }
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def read_table(
    path: Path,
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    progress: bool = True,
) -> LatencyTable:
    """The table of a file that `write_table` wrote for this graph, device, runtime and image size.

    Raises `Fault` for a file that is none, was measured with anything else, lacks an entry, or has a number that cannot
    be one of milliseconds; its fastest subnet is timed once more to know.
    """
    check_runtime(runtime, device)
    timed = device_timer(graph, imgsz, device=device, runtime=runtime, progress=progress, seconds=1.0)
    return confirmed(path, open_rows(graph), key_of(graph, imgsz, device, runtime), timed)


def confirmed(path: Path, rows: Rows, wanted: Key, timed: Timed) -> LatencyTable:
    """The file's table, after the device has said how long its fastest subnet takes."""
    table = parsed(path, rows, wanted)
    expected, subnet = table.cost.extreme(largest=False)
    _, (timing,) = timed([], [subnet])
    if not 1 / ANOTHER_UNIT <= timing.ms / expected <= ANOTHER_UNIT:
        raise Fault(
            f"{path}: says ms, but a subnet of {expected:.4g} ms by the table took {timing.ms:.4g} ms here just now; "
            f"it has another unit, or this device was busy when one of the two was measured"
        )
    return table


def parsed(path: Path, rows: Rows, wanted: Key) -> LatencyTable:
    """The file's table as far as it can be checked without a clock."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        unit = content["unit"]
        found = Key(**content["key"])
    except (ValueError, KeyError, TypeError) as problem:
        raise Fault(f"{path}: is no latency table; {_said(problem)}") from None
    faults = [] if unit == UNIT else [f"{path}: its unit is {unit!r}, wanted {UNIT!r}"]
    for name, value in asdict(wanted).items():
        other = getattr(found, name)
        if other != value:
            faults.append(f"{path}: was measured with {name} {other!r}, wanted {value!r}")
    if faults:
        raise Fault(*faults)
    try:
        kind, fixed = content["kind"], float(content["fixed_ms"])
        entries = [
            Entry(**one | {"picks": _tuples(one["picks"]), "ms": float(one["ms"])}) for one in content["entries"]
        ]
        checks = [
            Check(one["number"], float(one["predicted_ms"]), float(one["measured_ms"]), float(one["again_ms"]))
            for one in content["validation"]["subnets"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Fault(f"{path}: is no whole latency table; {_said(problem)}") from None
    if not checks:
        raise Fault(f"{path}: is no whole latency table; it was held against no subnets")
    if kind not in (TABLE, REGRESSION):
        raise Fault(f"{path}: its kind is {kind!r}, wanted {TABLE!r} or {REGRESSION!r}")
    by_name = {(entry.row, Architecture(entry.picks)): entry for entry in entries}
    names = [(index, Architecture(picks)) for index, choices in rows for picks in combinations(choices)]
    missing = [name for name in names if name not in by_name]
    if missing:
        index, picks = missing[0]
        raise Fault(f"{path}: has no entry for row {index} with {picks}, and lacks {len(missing)} of {len(names)}")
    table = LatencyTable(found, kind, fixed, tuple(by_name[name] for name in names), Validation(tuple(checks)))
    told = [("fixed_ms", fixed), *((f"an entry of row {entry.row}", entry.ms) for entry in table.entries)]
    told += [(f"subnet {one.number}", min(one.measured_ms, one.again_ms)) for one in table.validation.subnets]
    for where, ms in told:
        if not (math.isfinite(ms) and ms >= 0):
            raise Fault(f"{path}: {where} is {ms} ms, wanted a number that is not below 0")
    least, most = (table.cost.extreme(largest)[0] for largest in (False, True))
    if least < SANE_MS[0] or most > SANE_MS[1]:
        raise Fault(
            f"{path}: says ms, and has subnets of {least:.3g} to {most:.3g}; "
            f"{SANE_MS[0]:g} to {SANE_MS[1]:g} ms can be believed"
        )
    return table


def _tuples(picks: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(pick) if isinstance(pick, list) else pick for name, pick in picks.items()}


def _said(problem: Exception) -> str:
    return f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
