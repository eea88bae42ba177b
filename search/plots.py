"""The pictures of a search's report: small functions from numbers to SVG text. Colours are classes of the page's style.

Nothing here reads a file. Whatever is text goes through `escaped`, since names come from users' files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from models.draw import NOT_XML
from models.graph import Graph
from models.layout import IMAGE, Layout, layout

COLOURS = 8  # classes c0 to c7 of the page's style; what comes after them is dashed
PICK = 16.0  # width of a bold character of 27 px, in the diagram of a subnet
LETTER = 6.5  # width of most characters of a picture's text, 11 px
LINE = 12.5  # from one label to the next below it

WIDTH, HEIGHT = 400.0, 310.0  # of a scatter
SMALL_WIDTH, SMALL_HEIGHT = 300.0, 170.0  # of a curve
MOST_LETTERS = 22  # of a curve's name
CLOSED, OPEN = 30.0, 88.0  # heights of a row's box in the diagram: without and with picks


@dataclass(frozen=True)
class Frame:
    """A rectangle of the picture (pixels, y down) and the numbers (y up) that its edges stand for."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of numbers lies in the picture."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


@dataclass(frozen=True)
class Mark:
    """A subnet in a scatter. `kind` is words of {judged, front, tied, best, knee}; `error` is half an error bar."""

    subnet: int
    x: float
    y: float
    kind: str
    spoken: str
    error: float = 0.0
    tied_to: int | None = None
    link: bool = False  # whether the page has a card of it


@dataclass(frozen=True)
class Series:
    """A curve: name, points from left to right, and whether it is the one that was taken."""

    name: str
    points: tuple[tuple[float, float], ...]
    taken: bool = False


def escaped(value: object) -> str:
    """Text as HTML and SVG take it; what no XML may hold becomes a sign for "unknown"."""
    return escape(NOT_XML.sub("\ufffd", str(value)), quote=True)


# ---- axes


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`: at most `most`, 3 or more, and at
    least one.
    """
    rough = (high - low) / max(most - 1, 1)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as the step between them needs."""
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    decimals = next((d for d in range(8) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 8)
    return [f"{value:.{decimals}f}" for value in values]


def spanned(values: Sequence[float], room: float = 0.08) -> tuple[float, float]:
    """The range of the values with some room on both sides; never empty."""
    low, high = min(values), max(values)
    gap = (high - low) * room or abs(high) * room or 1.0
    return low - gap, high + gap


def cost_unit(metric: str, largest: float) -> tuple[float, str]:
    """What to divide a cost by for an axis, and the axis's name."""
    if metric == "macs":
        return (1e9, "GMACs") if largest >= 1e9 else (1e6, "MMACs (million multiply-adds)")
    if metric == "params":
        return 1e6, "million parameters"
    return 1.0, "latency, ms, by the table" if "table" in metric else "latency, ms"


def axes(frame: Frame, x_name: str, y_name: str, x_most: int = 6, y_most: int = 6) -> str:
    """Grid, tick labels and names of a plot."""
    found = []
    xs, ys = ticks(*frame.x, x_most), ticks(*frame.y, y_most)
    for value, label in zip(xs, tick_texts(xs), strict=True):
        x = frame.at(value, frame.y[0])[0]
        found.append(f'<path class="grid" d="M{x:.1f} {frame.top:g}V{frame.bottom:g}"/>')
        found.append(words(x, frame.bottom + 15, label, "tick", "middle"))
    for value, label in zip(ys, tick_texts(ys), strict=True):
        y = frame.at(frame.x[0], value)[1]
        found.append(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{frame.right:g}"/>')
        found.append(words(frame.left - 6, y + 4, label, "tick", "end"))
    found.append(words(frame.right, frame.bottom + 31, x_name, "axis", "end"))
    found.append(words(max(frame.left - 34, 2), frame.top - 9, y_name, "axis"))
    return "".join(found)


def words(x: float, y: float, text: str, kind: str, anchor: str = "start", most: float | None = None) -> str:
    """A line of text; with `most` squeezed into so many pixels."""
    placed = "" if anchor == "start" else f' text-anchor="{anchor}"'
    placed += "" if most is None else f' textLength="{most:.0f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{placed}>{escaped(text)}</text>'


def picture(width: float, height: float, label: str, inside: str, kind: str = "plot", more: str = "") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="group" aria-label="{escaped(label)}"{more}>'
        f"{inside}</svg>"
    )


# ---- scatters of subnets


def cost_scatter(
    metric: str,
    marks: Sequence[Mark],
    y_name: str,
    *,
    limits: Sequence[tuple[float, str]] = (),
    joined: bool = False,
    cloud: Sequence[tuple[float, float]] = (),
) -> str:
    """Subnets over one cost, with their error bars; `limits` are budgets with their text, `cloud` is small dots.

    `joined` draws the front as a line, which is right only where this cost alone made the front.
    """
    unit, x_name = cost_unit(metric, max([mark.x for mark in marks] + [x for x, _ in cloud]))
    xs = [mark.x / unit for mark in marks] + [x / unit for x, _ in cloud] + [limit / unit for limit, _ in limits]
    ys = [mark.y + sign * mark.error for mark in marks for sign in (-1, 1)] + [y for _, y in cloud]
    frame = Frame(46, 26, WIDTH - 12, HEIGHT - 42, spanned(xs), spanned(ys))
    found = [axes(frame, x_name, y_name)]
    for limit, text in limits:
        x = frame.at(limit / unit, frame.y[0])[0]
        found.append(f'<path class="budget" d="M{x:.1f} {frame.top:g}V{frame.bottom:g}"/>')
        found.append(words(x - 4, frame.top + 10, text, "budget-name", "end"))
    if cloud:
        dots = dict.fromkeys("M{:.1f} {:.1f}h0".format(*frame.at(x / unit, y)) for x, y in cloud)
        found.append(f'<path class="cloud" d="{"".join(dots)}"/>')
    places = {mark.subnet: frame.at(mark.x / unit, mark.y) for mark in marks}
    front = sorted(places[mark.subnet] for mark in marks if "front" in mark.kind.split())
    if joined and len(front) > 1:
        found.append(f'<path class="front-line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in front)}"/>')
    for mark in marks:
        if mark.tied_to in places:
            found.append(_bow(places[mark.tied_to], places[mark.subnet]))
    scale = (frame.bottom - frame.top) / (frame.y[1] - frame.y[0])
    for mark in sorted(marks, key=_above):
        found.append(_mark(mark, places[mark.subnet], mark.error * scale))
    span = [frame.left, frame.right, frame.top, frame.bottom, *(value * unit for value in frame.x), *frame.y]
    more = (
        f' data-metric="{escaped(metric)}" data-frame="{" ".join(f"{value:.7g}" for value in span)}"' if cloud else ""
    )
    return picture(WIDTH, HEIGHT, f"{y_name} against {x_name}", "".join(found), "plot scatter", more)


def _above(mark: Mark) -> int:
    """What is drawn last lies on top: the best, then the front."""
    kinds = mark.kind.split()
    return 2 if "best" in kinds else int("front" in kinds)


def _bow(start: tuple[float, float], end: tuple[float, float]) -> str:
    """A dotted bow between two points that are tied, bent away from the straight line between them."""
    (x1, y1), (x2, y2) = start, end
    bend = 0.12 * math.hypot(x2 - x1, y2 - y1) + 8
    return (
        f'<path class="tie" d="M{x1:.1f} {y1:.1f}Q{(x1 + x2) / 2:.1f} {(y1 + y2) / 2 + bend:.1f} {x2:.1f} {y2:.1f}"/>'
    )


def _mark(mark: Mark, place: tuple[float, float], error: float) -> str:
    """A point with its error bar; a link to its card where there is one."""
    bar = f'<path class="error" d="M-3 {-error:.1f}h6M0 {-error:.1f}V{error:.1f}M-3 {error:.1f}h6"/>' if error else ""
    group = (
        f'<g class="mark {mark.kind}" data-subnet="{mark.subnet}" transform="translate({place[0]:.1f} {place[1]:.1f})">'
        f"{bar}{symbol(mark.kind)}</g>"
    )
    if not mark.link:
        return group
    return f'<a href="#subnet-{mark.subnet}" aria-label="{escaped(mark.spoken)}">{group}</a>'


def symbol(kind: str) -> str:
    """The shape of a point around 0 0: a star for the best, a diamond for the knee, else a disc; hollow where tied."""
    kinds = kind.split()
    reach = '<circle class="reach" r="12"/>'  # easier to hit than the shape
    if "best" in kinds:
        corners = [(r, math.radians(36 * n - 90)) for n in range(10) for r in [9.5 if n % 2 == 0 else 4.2]]
        points = " ".join(f"{r * math.cos(a):.1f},{r * math.sin(a):.1f}" for r, a in corners)
        return f'{reach}<polygon class="shape" points="{points}"/>'
    if "knee" in kinds:
        return f'{reach}<path class="shape" d="M0 -7.5L7.5 0 0 7.5 -7.5 0Z"/>'
    return f'{reach}<circle class="shape" r="{5 if "front" in kinds else 3.5}"/>'


# ---- curves


def curves(
    series: Sequence[Series],
    label: str,
    x_name: str,
    *,
    y: tuple[float, float],
    shown: str = "{:.3g}",
    start: float | None = None,
    level: float | None = None,
) -> str:
    """Curves with their names and last values at the right end. `start` is a moment to mark, `level` a height."""
    names = [f"{'★ ' if one.taken else ''}{one.name} {shown.format(one.points[-1][1])}" for one in series]
    room = min(max(map(len, names)), MOST_LETTERS) * LETTER
    xs = [x for one in series for x, _ in one.points]
    low, high = min(xs), max(xs)
    right = SMALL_WIDTH - room - 16
    frame = Frame(40, 14, right, SMALL_HEIGHT - 36, (low, high if high > low else low + 1), y)
    found = [axes(frame, x_name, "", x_most=4, y_most=5)]
    if level is not None and y[0] < level < y[1]:
        found.append(f'<path class="level-line" d="M{frame.left:g} {frame.at(low, level)[1]:.1f}H{right:.1f}"/>')
    if start is not None and low < start < high:
        x = frame.at(start, y[0])[0]
        found.append(f'<path class="start" d="M{x:.1f} {frame.top:g}V{frame.bottom:g}"/>')
    ends = [frame.at(*one.points[-1]) for one in series]
    heights = spread([end[1] for end in ends], LINE, frame.top, frame.bottom + 4)
    for number, (one, name, end, height) in enumerate(zip(series, names, ends, heights, strict=True)):
        kind = f"c{number % COLOURS}{' dashed' if number >= COLOURS else ''}{' taken' if one.taken else ''}"
        places = "L".join("{:.1f} {:.1f}".format(*frame.at(*point)) for point in one.points)
        found.append(f'<path class="curve {kind}" d="M{places}{"h0" if len(one.points) == 1 else ""}"/>')
        found.append(f'<path class="pointer {kind}" d="M{end[0]:.1f} {end[1]:.1f}L{right + 8:.1f} {height:.1f}"/>')
        found.append(words(right + 11, height + 4, cut(name, MOST_LETTERS), f"name{' taken' if one.taken else ''}"))
    return picture(SMALL_WIDTH, SMALL_HEIGHT, label, "".join(found), "plot curves")


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights moved apart by at least `gap`, in the same order, as near to where they were as is easy.

    They stay within `low` to `high` where there is room for all of them.
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    below = -math.inf
    for index in order:
        moved[index] = max(heights[index], below + gap, low)
        below = moved[index]
    above = max(high, low + gap * (len(heights) - 1)) + gap
    for index in reversed(order):
        moved[index] = min(moved[index], above - gap)
        above = moved[index]
    return moved


# ---- predicted and measured


def agreement(points: Sequence[tuple[str, float, float, float | None]], unit: str) -> str:
    """Points (name, predicted, measured, measured once more) beside the diagonal on which prediction is right."""
    values = [value for _, *found in points for value in found if value is not None]
    span = spanned(values)
    frame = Frame(46, 26, WIDTH - 12, HEIGHT - 42, span, span)
    (x1, y1), (x2, y2) = frame.at(span[0], span[0]), frame.at(span[1], span[1])
    found = [
        axes(frame, f"predicted, {unit}", f"measured, {unit}"),
        f'<path class="diagonal" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>',
    ]
    for name, predicted, measured, again in points:
        x, y = frame.at(predicted, measured)
        spoken = f"subnet {name}: predicted {predicted:.3g} {unit}, measured {measured:.3g}"
        other = ""
        if again is not None:
            spoken += f" and {again:.3g}"
            height = frame.at(predicted, again)[1] - y
            other = f'<path class="error" d="M0 0V{height:.1f}"/><circle class="again" cy="{height:.1f}" r="3.2"/>'
        found.append(
            f'<g class="mark front" transform="translate({x:.1f} {y:.1f})"><title>{escaped(spoken)}</title>{other}'
            f'<circle class="shape" r="4"/></g>'
        )
    return picture(WIDTH, HEIGHT, "Latency: predicted and measured", "".join(found), "plot scatter")


# ---- values of a subnet side by side


def dot_rows(rows: Sequence[tuple[str, Sequence[float | None]]], names: Sequence[str], x_name: str) -> str:
    """A row a subnet, a dot a value; class c0, c1, ... says which of the `names` it is."""
    values = [value for _, found in rows for value in found if value is not None]
    margin = min(16 + LETTER * max(len(name) for name, _ in rows), 130)
    height = 12 + 26.0 * len(rows) + 40
    frame = Frame(margin, 12, WIDTH - 14, height - 40, spanned(values), (0.0, float(len(rows))))
    found = []
    places = ticks(*frame.x)
    for value, text in zip(places, tick_texts(places), strict=True):
        x = frame.at(value, 0)[0]
        found.append(f'<path class="grid" d="M{x:.1f} {frame.top:g}V{frame.bottom:g}"/>')
        found.append(words(x, frame.bottom + 15, text, "tick", "middle"))
    found.append(words(frame.right, frame.bottom + 31, x_name, "axis", "end"))
    for number, (name, given) in enumerate(rows):
        y = frame.at(frame.x[0], len(rows) - number - 0.5)[1]
        there = [frame.at(value, 0)[0] for value in given if value is not None]
        found.append(words(margin - 8, y + 4, name, "axis", "end"))
        found.append(f'<path class="between" d="M{min(there):.1f} {y:.1f}H{max(there):.1f}"/>' if there else "")
        for place, one in enumerate(given):
            if one is not None:
                spoken = f"{name}, {names[place]}: {one:.3f}"
                found.append(
                    f'<g class="stage s{place}" transform="translate({frame.at(one, 0)[0]:.1f} {y:.1f})">'
                    f"<title>{escaped(spoken)}</title>{stage(place)}</g>"
                )
    return picture(WIDTH, height, x_name, "".join(found), "plot rows")


def stage(place: int) -> str:
    """The shape of the n-th of several values: a ring, a square, a triangle, a disc."""
    return (
        '<circle r="5" class="ring"/>',
        '<path d="M-4.5 -4.5h9v9h-9Z"/>',
        '<path d="M0 -6L5.6 4.4H-5.6Z"/>',
        '<circle r="5.5"/>',
    )[place]


# ---- the network


def detector(graph: Graph) -> tuple[Layout, str]:
    """Where the rows of a search file stand, and the lines and names that all of its subnets have in common."""
    placed = layout(graph, {IMAGE: CLOSED} | {node.index: OPEN if node.choices else CLOSED for node in graph.nodes})
    found = []
    for band in placed.bands[::2]:
        found.append(
            f'<rect class="band" y="{band.y:.0f}" width="{placed.width:.0f}" height="{band.height:.0f}" rx="6"/>'
        )
    for band in placed.bands:
        found.append(words(8, band.y + 26, f"/{band.stride}", "stride"))
    for line in placed.lines:
        found.append(f'<path class="wire" d="M{"L".join(f"{p.x:.0f} {p.y:.0f}" for p in line.points)}"/>')
    for index, box in placed.boxes.items():
        if index == IMAGE or not graph.nodes[index].choices:
            name = "image" if index == IMAGE else graph.nodes[index].op.name.removeprefix("nn.")
            found.append(
                f'<rect class="box" x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{box.height:.0f}" '
                f'rx="6"/>{words(box.x + box.width / 2, box.y + box.height / 2 + 7, name, "op", "middle")}'
            )
    return placed, "".join(found)


def subnet_diagram(graph: Graph, placed: Layout, picks: Mapping[str, str], best: Mapping[str, str], label: str) -> str:
    """One subnet: the common picture (an element ``#detector`` of the page) and its picks in the searched rows."""
    found = ['<use href="#detector"/>']
    for node in graph.nodes:
        if not node.choices:
            continue
        box = placed.boxes[node.index]
        names = [choice.name for choice in node.choices]
        other = any(picks.get(name) != best.get(name) for name in names)
        text = row_picks(names, picks)
        room = box.width - 16 if len(text) * PICK > box.width - 16 else None
        found.append(
            f'<g class="searched{" other" if other else ""}"><rect class="box" x="{box.x:.0f}" y="{box.y:.0f}" '
            f'width="{box.width:.0f}" height="{box.height:.0f}" rx="8"/>'
            + words(box.x + 10, box.y + 24, f"{node.layer.name or node.index} {node.op.name}", "op")
            + words(box.x + box.width / 2, box.y + 62, text, "picks", "middle", room)
            + "</g>"
        )
    return picture(placed.width, placed.height, label, "".join(found), "detector")


def row_picks(names: Sequence[str], picks: Mapping[str, str]) -> str:
    """The picks of a row in few characters: ``5×5 mish ×2``; ``3·5 mish ×2`` with a kernel for each bottleneck."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        argument = name.partition(".")[2].partition(".")[0]  # of "16.kernel" and of "16.kernel.0"
        grouped.setdefault(argument, []).append(picks.get(name, "?"))
    number = grouped.get("number", [""])[0]
    parts = []
    for argument, found in grouped.items():
        if len(found) > 1:  # those behind the last bottleneck decide nothing
            parts.append("·".join(found[: int(number)] if number.isdecimal() else found))
        else:
            parts.append({"kernel": f"{found[0]}×{found[0]}", "number": f"×{found[0]}"}.get(argument, cut(found[0], 9)))
    return cut(" ".join(parts), 17)
