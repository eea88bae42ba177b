"""What differs between two networks, row by row: which rows came, went or changed, and what that costs.

Rows are aligned by what they are (Needleman and Wunsch, J. Mol. Biol. 48, 1970), not by their index: a row that only
moved because another was put in before it is no difference. Sources are compared by the rows that they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from models.cost import RowCost, totals
from models.graph import Graph, Node
from models.show import value_text
from models.spec import settled

NOTHING = "-"  # what the other network lacks
FOLD = 3  # so many rows that came or went together are told in one line


@dataclass(frozen=True)
class Change:
    """One thing about a row, in both networks."""

    what: str  # module, from, number, an argument's name, output
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.what} {self.before} -> {self.after}"


@dataclass(frozen=True)
class RowDiff:
    """A row of either network or of both. `before` and `after` are its indices, None where it is not there."""

    before: int | None
    after: int | None
    module: str
    changes: tuple[Change, ...]
    params: tuple[int, int]
    macs: tuple[int, int]

    @property
    def kind(self) -> str:
        """``added``, ``removed``, ``changed`` or ``same``."""
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        return "changed" if self.changes or self.params[0] != self.params[1] or self.macs[0] != self.macs[1] else "same"


@dataclass(frozen=True)
class NetworkDiff:
    """All rows of two networks, in order, and their sums."""

    paths: tuple[str, str]
    rows: tuple[RowDiff, ...]
    params: tuple[int, int]
    macs: tuple[int, int]

    @property
    def same(self) -> bool:
        return all(row.kind == "same" for row in self.rows)


def diff(graph_a: Graph, graph_b: Graph, costs_a: Sequence[RowCost], costs_b: Sequence[RowCost]) -> NetworkDiff:
    """The differences from `graph_a` to `graph_b`, whose rows cost `costs_a` and `costs_b` at one input size."""
    pairs = align(graph_a.nodes, graph_b.nodes)
    partner = {a: b for a, b in pairs if a is not None and b is not None} | {-1: -1}
    rows = []
    for a, b in pairs:
        node_a, cost_a = (graph_a.nodes[a], costs_a[a]) if a is not None else (None, RowCost(0, 0, ()))
        node_b, cost_b = (graph_b.nodes[b], costs_b[b]) if b is not None else (None, RowCost(0, 0, ()))
        changes: tuple[Change, ...] = ()
        if node_a is not None and node_b is not None:
            changes = _changes(node_a, node_b, cost_a, cost_b, partner)
        one = node_b or node_a
        assert one is not None
        rows.append(RowDiff(a, b, one.op.name, changes, (cost_a.params, cost_b.params), (cost_a.macs, cost_b.macs)))
    (params_a, macs_a), (params_b, macs_b) = totals(costs_a), totals(costs_b)
    return NetworkDiff((graph_a.spec.path, graph_b.spec.path), tuple(rows), (params_a, params_b), (macs_a, macs_b))


def align(rows_a: Sequence[Node], rows_b: Sequence[Node]) -> list[tuple[int | None, int | None]]:
    """Pairs of row indices, in order; None where a row has no partner. The sum of `likeness` is as large as can be."""
    best = [[0.0] * (len(rows_b) + 1) for _ in range(len(rows_a) + 1)]  # of the rows from here to the end
    for a in reversed(range(len(rows_a))):
        for b in reversed(range(len(rows_b))):
            best[a][b] = max(likeness(rows_a[a], rows_b[b]) + best[a + 1][b + 1], best[a + 1][b], best[a][b + 1])
    pairs: list[tuple[int | None, int | None]] = []
    a = b = 0
    while a < len(rows_a) and b < len(rows_b):
        alike = likeness(rows_a[a], rows_b[b])
        if alike and best[a][b] == alike + best[a + 1][b + 1]:
            pairs.append((a, b))
            a, b = a + 1, b + 1
        elif best[a][b] == best[a + 1][b]:
            pairs.append((a, None))
            a += 1
        else:
            pairs.append((None, b))
            b += 1
    return [*pairs, *((row, None) for row in range(a, len(rows_a))), *((None, row) for row in range(b, len(rows_b)))]


def likeness(a: Node, b: Node) -> int:
    """How much two rows are one row, 0 (not at all) to 14."""
    if a.op.name != b.op.name and (a.output != b.output or len(a.sources) != len(b.sources) or a.op.many != b.op.many):
        return 0
    back_a, back_b = ([row.index - source for source in row.sources] for row in (a, b))
    name = a.layer.name is not None and a.layer.name == b.layer.name
    return (
        1
        + 4 * (a.op.name == b.op.name)
        + 2 * (_plain(a.arguments) == _plain(b.arguments))
        + 2 * (a.output == b.output)
        + (_plain(a.repeats) == _plain(b.repeats))
        + (back_a == back_b)
        + (a.layer.section == b.layer.section)
        + 2 * name
    )


def table(found: NetworkDiff) -> str:
    """The rows that differ and the sums, as text. ``+`` came, ``-`` went, ``~`` changed; numbers are of the second."""
    if found.same:
        params, macs = found.params[0], found.macs[0]
        return f"the same network: {len(found.rows)} rows, {params:,} parameters, {macs / 1e9:.3f} GMACs"
    lines: list[tuple[str, ...]] = [("", "row", "module", "params", "MACs", "what differs")]
    for kind, group in groupby(found.rows, key=lambda row: row.kind):
        rows = list(group)
        if kind in ("added", "removed") and len(rows) >= FOLD:
            lines.append(_line(kind, rows))
        elif kind != "same":
            lines += [_line(kind, [row]) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.rjust(width) if column in (3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    kinds = [row.kind for row in found.rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("added", "removed", "changed", "same"))
    return "\n".join(
        [
            f"- {found.paths[0]}",
            f"+ {found.paths[1]}",
            *text,
            f"rows: {counted}",
            f"parameters: {_sum(found.params)}",
            f"GMACs: {_sum(found.macs, 1e9, 3)}",
        ]
    )


def _line(kind: str, rows: Sequence[RowDiff]) -> tuple[str, ...]:
    """The cells of one row, or of rows that came or went together."""
    old, new = _span([row.before for row in rows]), _span([row.after for row in rows])
    before, after = (sum(row.params[side] for row in rows) for side in (0, 1))
    macs_before, macs_after = (sum(row.macs[side] for row in rows) for side in (0, 1))
    module, told = rows[0].module, ", ".join(map(str, rows[0].changes))
    if len(rows) > 1:
        alike = [(name, len(list(group))) for name, group in groupby(row.module for row in rows)]
        module, told = f"{len(rows)} rows", ", ".join(f"{times} {name}" if times > 1 else name for name, times in alike)
    return (
        {"added": "+", "removed": "-", "changed": "~"}[kind],
        old if old == new else f"{old} -> {new}",
        module,
        _step((before, after)),
        _step((macs_before, macs_after), 1e6, " M"),
        told,
    )


def _span(indices: Sequence[int | None]) -> str:
    """``13``, ``13 to 23``, or `NOTHING`: rows that came or went together follow each other."""
    first, last = indices[0], indices[-1]
    return NOTHING if first is None else str(first) if first == last else f"{first} to {last}"


def _changes(a: Node, b: Node, cost_a: RowCost, cost_b: RowCost, partner: Mapping[int, int]) -> tuple[Change, ...]:
    found = []
    if a.op.name != b.op.name:
        found.append(Change("module", a.op.name, b.op.name))
    if [partner.get(source) for source in a.sources] != list(b.sources):
        found.append(Change("from", _source_text(a.sources), _source_text(b.sources)))
    if _plain(a.repeats) != _plain(b.repeats):
        found.append(Change("number", value_text(a.repeats), value_text(b.repeats)))
    for name in dict.fromkeys((*a.arguments, *b.arguments)):
        before, after = a.arguments.get(name, NOTHING), b.arguments.get(name, NOTHING)
        if _plain(before) != _plain(after):
            found.append(Change(name, value_text(before), value_text(after)))
    if cost_a.shape != cost_b.shape:
        found.append(Change("output", "x".join(map(str, cost_a.shape)), "x".join(map(str, cost_b.shape))))
    if not found and (cost_a.params, cost_a.macs) != (cost_b.params, cost_b.macs):  # it follows from an earlier row
        before, after = (", ".join(str(shape.channels) for shape in row.inputs) for row in (a, b))
        found += [Change("channels in", before, after)] if before != after else []
    return tuple(found)


def _plain(value: Any) -> Any:
    """A value without the name of its choice, which holds the row's index."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return settled(value, lambda choice: ("choice", choice.options))


def _source_text(sources: Sequence[int]) -> str:
    texts = ["the image" if source < 0 else str(source) for source in sources]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _step(pair: tuple[int, int], unit: float = 1, name: str = "") -> str:
    """``+1,024`` with what it becomes, nothing where both are equal."""
    before, after = pair
    if before == after:
        return ""
    decimals = 1 if unit > 1 else 0
    return f"{after / unit:,.{decimals}f}{name} ({(after - before) / unit:+,.{decimals}f})"


def _sum(pair: tuple[int, int], unit: float = 1, decimals: int = 0) -> str:
    before, after = pair
    text = f"{before / unit:,.{decimals}f} -> {after / unit:,.{decimals}f}"
    if before == after:
        return f"{text} (equal)"
    percent = f", {100 * (after - before) / before:+.1f} %" if before else ""
    return f"{text} ({(after - before) / unit:+,.{decimals}f}{percent})"
