"""Look at model files: ``python -m models show cfg/models/tiny.yaml`` or ``python -m models check FILE...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data.structures import Fault
from models.cost import RowCost, network_costs, totals
from models.graph import Graph, resolve
from models.network import SUPERNETS
from models.parse import parse
from models.spec import Choice


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="the table of rows: parameters, MACs, shapes")
    show.add_argument("file")
    show.add_argument("--imgsz", type=int, default=640, help="input size in pixels")
    show.add_argument("--supernet", choices=SUPERNETS, help="show a search file as this supernet")
    check = commands.add_parser("check", help="one line for every fault of a file")
    check.add_argument("files", nargs="+")
    options = parser.parse_args(argv)
    try:
        if options.command == "show":
            print(shown(resolve(parse(options.file)), options.imgsz, options.supernet))
            return 0
        return checked(options.files)
    except (Fault, OSError) as fault:
        print(fault, file=sys.stderr)
        return 2


def checked(files: Sequence[str]) -> int:
    """Prints every fault of every file; 0 where there is none, 2 otherwise."""
    worst = 0
    for file in files:
        try:
            graph = resolve(parse(file))
        except Fault as fault:
            print(fault, file=sys.stderr)
            worst = 2
        else:
            print(f"{file}: good, {len(graph.nodes)} rows, {len(graph.spec.choices)} open choices")
    return worst


def shown(graph: Graph, imgsz: int, supernet: str | None = None) -> str:
    """The table that every YOLO user knows: row, from, n, params, MACs, output, module, arguments, and the sums."""
    if imgsz < 1 or imgsz % graph.max_stride:
        raise Fault(f"--imgsz {imgsz}: {graph.spec.path} needs a multiple of its largest stride {graph.max_stride}")
    if graph.spec.choices and supernet is None:
        supernet = "shared"
    costs = network_costs(graph, imgsz, supernet)
    rows = [("row", "from", "n", "params", "MACs", "output", "module", "arguments")]
    for node, cost in zip(graph.nodes, costs, strict=True):
        source = ", ".join(str(source) for source in node.layer.sources)
        arguments = [_text(value) for value in node.layer.args]
        arguments += [f"{name}={_text(value)}" for name, value in node.layer.kwargs.items()]
        rows.append(
            (
                f"{node.index} {node.layer.name}" if node.layer.name else str(node.index),
                source,
                _text(node.repeats),
                f"{cost.params:,}",
                f"{cost.macs / 1e6:,.1f} M",
                "x".join(map(str, cost.shape)),
                node.op.name,
                ", ".join(arguments),
            )
        )
    params, macs = totals(costs)
    left = {0, 6, 7}
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.append(summary(graph, costs, params, macs, imgsz, supernet))
    return "\n".join(lines)


def summary(graph: Graph, costs: Sequence[RowCost], params: int, macs: int, imgsz: int, supernet: str | None) -> str:
    line = f"{graph.spec.path}: {len(costs)} rows, {params:,} parameters, {macs / 1e9:.3f} GMACs at {imgsz} px"
    if not graph.spec.choices:
        return line
    size = 1
    for choice in graph.spec.choices:
        size *= len(choice.options)
    return f"{line} as {supernet} supernet (MACs of the network that is active), {size:,} subnets"


def _text(value: object) -> str:
    if isinstance(value, Choice):
        return str(value)
    return str(list(value)) if isinstance(value, tuple) else str(value)


if __name__ == "__main__":
    sys.exit(main())
