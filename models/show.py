"""A network as a table: row, from, n, params, MACs, output, module, arguments, and the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from models.cost import RowCost, totals
from models.graph import Graph
from models.spec import Choice, PerBottleneck, flow


def table(graph: Graph, costs: Sequence[RowCost], imgsz: int, supernet: str | None = None) -> str:
    """The table that every YOLO user knows. `costs` are those of the rows at ``imgsz`` pixels, as this supernet."""
    rows = [("row", "from", "n", "params", "MACs", "output", "module", "arguments")]
    for node, cost in zip(graph.nodes, costs, strict=True):
        arguments = [value_text(value) for value in node.layer.args]
        arguments += [f"{name}={value_text(value)}" for name, value in node.layer.kwargs.items()]
        rows.append(
            (
                f"{node.index} {node.layer.name}" if node.layer.name else str(node.index),
                ", ".join(str(source) for source in node.layer.sources),
                value_text(node.repeats),
                f"{cost.params:,}",
                f"{cost.macs / 1e6:,.1f} M",
                "x".join(map(str, cost.shape)) + (" mask" if node.output.kind == "mask" else ""),
                node.op.name,
                ", ".join(arguments),
            )
        )
    left = {0, 6, 7}
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    line = f"{graph.spec.path}: {sums(costs, imgsz)}"
    if graph.spec.choices:
        line += f" as {supernet} supernet (MACs of the network that is active), {subnets(graph):,} subnets"
    return "\n".join([*lines, line])


def sums(costs: Sequence[RowCost], imgsz: int) -> str:
    """``32 rows, 70,834,012 parameters, 83.327 GMACs at 640 px``"""
    params, macs = totals(costs)
    return f"{len(costs)} rows, {params:,} parameters, {macs / 1e9:.3f} GMACs at {imgsz} px"


def subnets(graph: Graph) -> int:
    """How many networks a file with choices holds."""
    return math.prod(len(choice.options) for choice in graph.spec.choices)


def value_text(value: Any) -> str:
    """An argument in few characters: ``{3|5}`` for a choice, ``13`` for 13.0, a word without quotes."""
    if isinstance(value, Choice):
        return str(value)
    if isinstance(value, PerBottleneck):
        return value_text(value.values)
    if isinstance(value, tuple):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) and value.isprintable() else flow(value)
