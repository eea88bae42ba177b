"""Any model file in our normal form, and rows that are called by name instead of being counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from models.graph import Graph, resolve
from models.parse import dump
from models.spec import ModelSpec


def convert(spec: ModelSpec, named: bool = False, comment: str = "") -> str:
    """`spec` as a file in our dialect, which it names. Depth and width multiples stay as they are.

    ``named`` gives every row that others read by counting a name (`name_rows`); ``comment`` comes first, as it is.
    """
    return "".join(f"{line}\n" for line in comment.splitlines()) + dump(name_rows(spec) if named else spec)


def name_rows(spec: ModelSpec) -> ModelSpec:
    """The same model with a name for every row that another reads by its index or from further back than -1.

    A row put in between then shifts no source. Names are short: ``c3`` is the last row of the backbone at stride
    2^3 = 8 that is read so, ``p3`` the last behind the backbone; those before it are ``p3_1``, ``p3_2``, ... in order.
    Names that are there stay. A row's choices are called after its name from then on.
    """
    graph = resolve(spec)
    targets: dict[tuple[int, int], int] = {}  # (row, which of its sources) that is counted: the row that it means
    for index, layer in enumerate(spec):
        for position, source in enumerate(layer.sources):
            if isinstance(source, int) and source != -1:
                targets[index, position] = source if source >= 0 else index + source
    names = {index: layer.name for index, layer in enumerate(spec) if layer.name}
    groups: dict[str, list[int]] = {}
    for row in sorted(set(targets.values()) - names.keys()):
        groups.setdefault(_level(graph, row), []).append(row)
    taken = set(names.values())
    for level, rows in groups.items():
        free = (name for name in _numbered(level) if name not in taken)
        for row in rows[:-1]:
            names[row] = next(free)
        names[rows[-1]] = level if level not in taken else next(free)
    return replace(
        spec,
        layers=tuple(
            replace(
                layer,
                name=names.get(index),
                sources=tuple(
                    names[targets[index, position]] if (index, position) in targets else source
                    for position, source in enumerate(layer.sources)
                ),
            )
            for index, layer in enumerate(spec)
        ),
    )


def _level(graph: Graph, row: int) -> str:
    """``c4`` for the backbone at stride 16, ``p4`` behind it; ``c_stride12`` where the stride is no power of two."""
    node = graph.nodes[row]
    stride = node.output.stride
    letter = "c" if node.layer.section == "backbone" else "p"
    return f"{letter}{stride.bit_length() - 1}" if stride.bit_count() == 1 else f"{letter}_stride{stride}"


def _numbered(level: str) -> Iterator[str]:
    return (f"{level}_{number}" for number in count(1))


def heading(text: str) -> str:
    """The comment that a file begins with, without what follows its first empty line or value."""
    lines = []
    for line in text.removeprefix("\ufeff").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.rstrip())
    return "\n".join(lines)
