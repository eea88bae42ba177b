"""What every option of a search costs in milliseconds on a device: a table, how far it can be believed, and its file.

Two kinds. A ``table`` adds up rows: each fused row with each of its options is timed alone at the size it has in the
network, and ``fixed_ms``, the rest, is the mean of what whole subnets take beyond the sum of their rows. Where that
does not predict whole subnets, a ``regression`` corrects it by a ridge fit to subnets that are timed as a whole. Either
is held against 24 random subnets that were timed end to end, twice, and took no part in the making
(`search.tabulate`).

Where the space spreads over less than three times what two measurements differ by, a search says so, loudly, and goes
on: a budget of milliseconds is still kept, by the time that each judged subnet takes itself.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.structures import Fault
from engine.runs import table as text_table
from engine.runs import write_text
from models.graph import combinations
from models.spec import Choice
from search.costs import CostTable, format_cost
from search.rank import kendall_tau
from search.space import Architecture

UNIT = "ms"
TABLE, REGRESSION = "table", "regression"
ALLOWED_ERROR, ALLOWED_TAU = 0.05, 0.9  # or the run-to-run difference; of the run-to-run tau
SEPARABLE = 3.0  # spread of a space over the run-to-run difference, under which latency says nothing
SANE_MS = (1e-3, 1e6)  # of a whole network: a microsecond to a quarter of an hour

Rows = tuple[tuple[int, tuple[Choice, ...]], ...]  # the open rows: index and choices


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
                f"{max(ALLOWED_ERROR, check.repeat_error):.1%}, or in another order; what counts is the time that a "
                "judged subnet takes itself, where it runs on this device"
            )
        if not self.separates:
            found.append(
                f"note: latency cannot separate these: the space spreads over {self.spread_ms:.2g} ms, and two "
                f"measurements of one subnet differ by {self.noise_ms:.2g} ms; --budget macs=... counts what is exact"
            )
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
    if not math.isfinite(fixed):
        raise Fault(f"{path}: fixed_ms is {fixed} ms, wanted a number")
    told = [*((f"an entry of row {entry.row}", entry.ms) for entry in table.entries)]
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
