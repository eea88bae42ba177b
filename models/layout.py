"""Where a picture of a network puts its boxes and lines: geometry alone, no markup.

A detector is laid out as its papers draw it. From top to bottom lie the pyramid levels, a band for every stride. From
left to right lie the ways through them: the backbone goes down in the first column, a top-down path up in the second,
a bottom-up path down in the third, and the head stands behind the last. Inside a column the rows follow each other in
the order of the file, along the flow.

Boxes stand on a grid of slots. Lines run in the gutters between columns and in the gaps between slots, so no line can
cross a box. A row's output leaves along the flow to the next box of its column, or to the right as one line that
branches. Inputs come from the box before, from the right (same column) or from the left (an earlier column).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from models.graph import Graph

# All lengths are in units of the drawing: pixels at 100 %.
WIDTH = 208  # of a box
GAP = 18  # between two slots without lines
GUTTER = 28  # between two columns without lines
TRACK = 9  # from one line to the next beside it
PORT = 8  # from one line that enters a box to the next; on the right side shifted by half of it, so that lines of
# boxes that stand side by side never lie in one another
LEFT, TOP, RIGHT, BOTTOM = 104, 10, 20, 10  # margins; the left one holds the names of the bands
IMAGE = -1  # the index under which rows read the image


class Point(NamedTuple):
    x: float
    y: float


class Piece(NamedTuple):
    """A piece of a line that runs in a lane (a gap or a gutter) from a place to another. One key is one line."""

    lane: int
    key: Hashable
    low: float
    high: float


@dataclass(frozen=True)
class Box:
    """Where a row stands; index -1 is the image."""

    index: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Line:
    """From a row to one that reads it. The piece between two points is horizontal or vertical."""

    source: int
    target: int
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Band:
    """A pyramid level: the rows at one stride."""

    stride: int
    y: float
    height: float


@dataclass(frozen=True)
class Layout:
    width: float
    height: float
    boxes: Mapping[int, Box]
    lines: tuple[Line, ...]
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Grid:
    """Column and slot (counted from the top) of every row and of the image; first and last slot of every stride."""

    columns: Mapping[int, int]
    slots: Mapping[int, int]
    bands: Mapping[int, tuple[int, int]]

    def next_to(self, source: int, target: int) -> bool:
        """Whether both stand in one column with no box between them."""
        if self.columns[source] != self.columns[target]:
            return False
        first, last = sorted((self.slots[source], self.slots[target]))
        return not any(
            self.columns[index] == self.columns[source] and first < slot < last for index, slot in self.slots.items()
        )

    def free(self, slot: int, columns: range) -> bool:
        """Whether no box of these columns stands in the slot."""
        return not any(self.slots[index] == slot and column in columns for index, column in self.columns.items())


@dataclass(frozen=True)
class Route:
    """How a line gets from row to row: straight along a column (no gutter), or through one gutter, or through two."""

    source: int
    target: int
    gutters: tuple[int, ...] = ()  # gutter n is right of column n; a line runs vertically there
    gap: int | None = None  # where it changes from the first gutter to the second; gap n is above slot n
    loop: bool = False  # back into the column that it came from


def layout(graph: Graph, heights: Mapping[int, float]) -> Layout:
    """Boxes of at least the given heights (by row; -1 is the image), lines and bands."""
    grid = place(graph)
    routes = [route(grid, source, node.index) for node in graph.nodes for source in dict.fromkeys(node.sources)]
    entering = Counter((r.target, r.loop) for r in routes if r.gutters)
    heights = {
        index: max(heights[index], PORT * (1 + entering[index, False]), PORT * (2 + entering[index, True]))
        for index in grid.slots
    }

    # From top to bottom: slots, and between them gaps that are as high as the lines in them need.
    channels = tracks([Piece(r.gap, r.source, min(r.gutters), max(r.gutters)) for r in routes if r.gap is not None])
    side_by_side = _lanes(channels)
    gaps, tops, y = [], [], float(TOP)
    for slot in range(max(grid.slots.values()) + 1):
        gaps.append(y)
        tops.append(y + GAP + TRACK * side_by_side.get(slot, 0))
        y = tops[-1] + max((heights[index] for index, at in grid.slots.items() if at == slot), default=0.0)
    gaps.append(y)
    bottom = y + GAP + TRACK * side_by_side.get(len(tops), 0)

    # Where every line runs horizontally: at the port that it leaves, in a gap if it needs one, at the port it enters.
    leaves, enters = ports(grid, routes, tops, heights)
    levels: dict[Route, list[float]] = {}
    for r in routes:
        if r.gutters:
            turn = [] if r.gap is None else [gaps[r.gap] + GAP / 2 + TRACK * channels[r.gap, r.source]]
            levels[r] = [leaves[r.source], *turn, enters[r.source, r.target]]

    # From left to right: columns, and between them gutters that are as wide as the lines in them need.
    verticals = tracks(
        [
            Piece(gutter, (r.source, r.loop), min(pair), max(pair))
            for r, ys in levels.items()
            for gutter, pair in zip(r.gutters, pairwise(ys), strict=True)
        ]
    )
    side_by_side = _lanes(verticals)
    lefts, x = [], float(LEFT)
    for column in range(max(grid.columns.values()) + 1):
        lefts.append(x)
        x += WIDTH + GUTTER + TRACK * side_by_side.get(column, 0)
    right = x - GUTTER + RIGHT

    boxes = {
        index: Box(index, lefts[grid.columns[index]], tops[slot], WIDTH, heights[index])
        for index, slot in grid.slots.items()
    }
    lines = []
    for r in routes:
        start, end = boxes[r.source], boxes[r.target]
        if r.gutters:
            points = [Point(start.x + WIDTH, levels[r][0])]
            for gutter, pair in zip(r.gutters, pairwise(levels[r]), strict=True):
                x = lefts[gutter] + WIDTH + GUTTER / 2 + TRACK * verticals[gutter, (r.source, r.loop)]
                points += [Point(x, y) for y in pair]
            points.append(Point(end.x + WIDTH if r.loop else end.x, levels[r][-1]))
        elif start.y < end.y:
            points = [Point(start.x + WIDTH / 2, start.y + start.height), Point(end.x + WIDTH / 2, end.y)]
        else:
            points = [Point(start.x + WIDTH / 2, start.y), Point(end.x + WIDTH / 2, end.y + end.height)]
        lines.append(Line(r.source, r.target, tuple(points)))
    bands = tuple(
        Band(stride, gaps[first] + GAP / 2, gaps[last + 1] - gaps[first])
        for stride, (first, last) in grid.bands.items()
    )
    return Layout(right, bottom + BOTTOM, boxes, tuple(lines), bands)


# ---- rows to slots


def place(graph: Graph) -> Grid:
    """A column and a slot for every row and for the image."""
    columns, strides = {IMAGE: 0}, {IMAGE: 1}
    for node in graph.nodes:
        strides[node.index] = node.output.stride
        columns[node.index] = max(
            columns[source] + (not _along(columns[source], strides[source], strides[node.index]))
            for source in node.sources
        )
    *rows, last = graph.nodes
    behind = [last.index] if len(last.sources) > 1 else []  # a head of several levels stands behind all columns
    readers: dict[int, list[int]] = {index: [] for index in columns}
    for node in rows if behind else graph.nodes:
        for source in node.sources:
            readers[source].append(node.index)
    for node in reversed(rows):  # a row of the neck that feeds a later column stands there, beside what it is joined to
        if node.layer.section == "backbone" or not readers[node.index]:
            continue
        column = min(columns[reader] for reader in readers[node.index])
        own = strides[node.index]
        there = [reader for reader in readers[node.index] if columns[reader] == column]
        if any(strides[reader] == own for reader in there) and all(_along(column, own, strides[r]) for r in there):
            columns[node.index] = column

    slots: dict[int, int] = {}
    bands: dict[int, tuple[int, int]] = {}
    start = 0
    placed = [index for index in sorted(columns) if index not in behind]
    for stride in sorted({strides[index] for index in placed}):
        cells: dict[int, list[int]] = {}
        for index in placed:
            if strides[index] == stride:
                cells.setdefault(columns[index], []).append(index)
        size = max(map(len, cells.values()))
        for column, cell in cells.items():
            for position, index in enumerate(cell):
                slots[index] = start + (position if column % 2 == 0 else size - 1 - position)
        bands[stride] = (start, start + size - 1)
        start += size
    for index in behind:
        columns[index] = max(columns[row] for row in placed) + 1
        slots[index] = round(sum(slots[source] for source in last.sources) / len(last.sources))
    return Grid(columns, slots, bands)


def _along(column: int, source: int, target: int) -> bool:
    """Whether going from stride to stride is in a column's direction: down, to larger strides, in the even ones."""
    return source <= target if column % 2 == 0 else source >= target


# ---- lines to gutters and gaps


def route(grid: Grid, source: int, target: int) -> Route:
    """The way from a row to one that reads it, past all boxes."""
    if grid.next_to(source, target):
        return Route(source, target)
    first, last = grid.columns[source], grid.columns[target]
    if first == last:
        return Route(source, target, (first,), loop=True)
    between = range(first + 1, last)
    if grid.free(grid.slots[target], between):
        return Route(source, target, (first,))
    if grid.free(grid.slots[source], between):
        return Route(source, target, (last - 1,))
    above = grid.slots[source] < grid.slots[target]
    return Route(source, target, (first, last - 1), gap=grid.slots[target] + (0 if above else 1))


def ports(
    grid: Grid, routes: Sequence[Route], tops: Sequence[float], heights: Mapping[int, float]
) -> tuple[dict[int, float], dict[tuple[int, int], float]]:
    """The heights at which lines leave a row to the right, and at which a line (source, target) enters its target."""
    leaves: dict[int, float] = {}
    enters: dict[tuple[int, int], float] = {}
    for index, slot in grid.slots.items():
        places = int(heights[index] // PORT)
        coming = sorted((r for r in routes if r.target == index and r.gutters), key=lambda r: grid.slots[r.source])
        from_left = [r.source for r in coming if not r.loop]
        for port, source in enumerate(from_left, start=max((places - len(from_left) + 1) // 2, 1)):
            enters[source, index] = tops[slot] + PORT * port
        # On the right, along the flow: the nearest source enters first, as its line is the innermost; the output last.
        down = grid.columns[index] % 2 == 0
        loops = [r.source for r in coming if r.loop]
        on_right = [*reversed(loops), index] if down else [index, *reversed(loops)]
        for port, source in enumerate(on_right, start=max((places - len(on_right)) // 2, 0)):
            y = tops[slot] + PORT * (port + 0.5)
            if source == index:
                leaves[index] = y
            else:
                enters[source, index] = y
    return leaves, enters


def tracks(pieces: Sequence[Piece]) -> dict[tuple[int, Hashable], int]:
    """The track of every line in every lane, numbered from 0: lines that run side by side get different ones.

    Short lines come first, so they lie inside the long ones.
    """
    reach: dict[tuple[int, Hashable], tuple[float, float]] = {}
    for lane, key, low, high in pieces:
        lowest, highest = reach.get((lane, key), (low, high))
        reach[lane, key] = (min(low, lowest), max(high, highest))
    found: dict[tuple[int, Hashable], int] = {}
    taken: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for (lane, key), (low, high) in sorted(reach.items(), key=lambda item: item[1][1] - item[1][0]):
        track = 0
        while any(low < end + PORT and start < high + PORT for start, end in taken.get((lane, track), [])):
            track += 1
        taken.setdefault((lane, track), []).append((low, high))
        found[lane, key] = track
    return found


def _lanes(numbers: Mapping[tuple[int, Hashable], int]) -> dict[int, int]:
    """How many tracks every lane has."""
    widest: dict[int, int] = {}
    for (lane, _), track in numbers.items():
        widest[lane] = max(widest.get(lane, 0), track + 1)
    return widest
