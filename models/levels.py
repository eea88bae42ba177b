"""The levels of a network: one map for each stride, which all its answers depend on. Where to look, and where to add.

Of a pyramid that merges from coarse to fine and back (PAN) these are the maps in the middle, where it turns; of one
that only merges from coarse to fine, in front of a classifier, the maps that the head reads; of a classifier without a
pyramid the last map of each stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.graph import Graph, Node

BRANCHES = ("AttentionBranch", "FAL")  # one op under two names
FINEST = 4  # stride of the first stage of a network without a pyramid; maps before it are edges and colours


@dataclass(frozen=True)
class Level:
    """A map of a network: `row` gives it, a cell of it stands for `stride` pixels of the input a side.

    `name` is P and the logarithm of the stride, as in Lin et al. (arXiv 1612.03144): P3 has stride 8.
    """

    name: str
    row: int
    stride: int

    def __str__(self) -> str:
        return f"{self.name} (stride {self.stride}, row {self.row})"


def levels(graph: Graph) -> tuple[Level, ...]:
    """For each stride of the head the last row that all its answers depend on, fine first.

    A head that detects answers on each of its maps by itself, so a map that only one of them reads says nothing of the
    others; a classifier gives one answer from all its maps. Where no row of a stride reaches all answers, the last one
    of those that reach most is the level. A row that only carries a map to another stride, while others read that map
    itself, is not counted. A head with one map has no pyramid: then there is a level for each stride from 4 on. An
    attention branch on a level is the level: what stands behind it reads it.
    """
    *rows, head = graph.nodes
    detects = getattr(head.op.module, "task", "detect") == "detect"
    reached: dict[int, set[int]] = {row.index: set() for row in rows}
    for place, source in enumerate(head.sources):
        if source >= 0:
            reached[source].add(place if detects else 0)
    for row in reversed(rows):
        for source in row.sources:
            if source >= 0:
                reached[source] |= reached[row.index]

    asked = {shape.stride for shape in head.inputs}
    best: dict[int, int] = {}
    for row in rows:
        stride = row.output.stride
        pyramid = stride in asked if len(head.sources) > 1 else stride >= FINEST or stride in asked
        if row.output.kind != "map" or not pyramid or _only_carries(graph, row):
            continue
        if stride not in best or len(reached[row.index]) >= len(reached[best[stride]]):
            best[stride] = row.index
    return tuple(Level(_name(stride), row, stride) for stride, row in sorted(best.items()))


def _only_carries(graph: Graph, row: Node) -> bool:
    """Whether a row stands between a map of its own stride that others read as well and rows of other strides."""
    head = graph.nodes[-1]
    readers = [node for node in graph.nodes if row.index in node.sources]
    source = row.sources[0]
    beside = [node for node in graph.nodes if source in node.sources and node is not row]
    return (
        len(row.sources) == 1
        and row.inputs[0].stride == row.output.stride
        and bool(beside)
        and all(node is not head and node.output.stride != row.output.stride for node in readers)
    )


def branches(graph: Graph) -> tuple[Level, ...]:
    """The attention branches of a network, fine first; of several at one stride the second is ``P3b``, and so on.

    Branches without blocks, as a search may leave them, have no map and are not among them.
    """
    rows = [node for node in graph.nodes if node.op.name in BRANCHES and node.arguments["blocks"] != "none"]
    found: list[Level] = []
    for node in sorted(rows, key=lambda node: (node.output.stride, node.index)):
        stride = node.output.stride
        before = sum(level.stride == stride for level in found)
        found.append(Level(_name(stride) + ("" if not before else chr(ord("a") + before)), node.index, stride))
    return tuple(found)


def _name(stride: int) -> str:
    power = stride.bit_length() - 1
    return f"P{power}" if stride == 1 << power else f"S{stride}"
