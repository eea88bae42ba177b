"""Pictures of a network: an SVG, and a page that holds it and tells what each row reads, gives and costs.

Both stand alone: no script, style or font from elsewhere. Everything that comes from a model file is escaped, and the
page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any
from xml.sax.saxutils import escape

from models.cost import RowCost, totals
from models.graph import Graph, Node
from models.layout import IMAGE, Box, Layout, Line, Point, layout
from models.page import PAGE, SCRIPT
from models.show import subnets, value_text
from models.show import sums as summed
from models.spec import Choice, choices_in, row_text

TEXT_LINE = 15  # from one line of text in a box to the next
PADDING = 9  # between a box's edge and its text
SMALL = 6.1  # width of a character of the small text: 10 px, monospaced
BOLD = 8.3  # width of most characters of the title, 13 px bold, in a wide font
CORNER = 7  # radius of a line's bends
SCREEN = 800  # a band that is higher than this tells its stride again
CAPTION = 74  # height of what stands above the picture in an SVG
NARROWEST = 640  # width that the caption needs

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

LIGHT = {
    "paper": "#ffffff", "band": "#f3f5f8", "ink": "#1b2430", "faint": "#566374", "wire": "#8f9dad",
    "backbone": "#e6effc", "backbone_edge": "#4a7fc9", "neck": "#e2f4e9", "neck_edge": "#2f9160",
    "head": "#fdeadb", "head_edge": "#d2691e", "image": "#eceff3", "choice": "#b3137c",
    "source": "#1a66d6", "reader": "#d9480f",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "band": "#1a2029", "ink": "#e8edf3", "faint": "#a3b1c1", "wire": "#66758a",
    "backbone": "#1b2d47", "backbone_edge": "#6ea3ea", "neck": "#173526", "neck_edge": "#57c08a",
    "head": "#43290f", "head_edge": "#f0934a", "image": "#262d36", "choice": "#ff7ac6",
    "source": "#7ab0ff", "reader": "#ff9d5c",
}  # fmt: skip
STYLE = Template(
    """\
.paper { fill: $paper } .band { fill: $band }
text { fill: $ink; font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
.small { fill: $faint; font: 10px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.level { fill: $faint; font-weight: 600 } .headline { font-size: 18px; font-weight: 700 }
.op { font-weight: 700 } .faint { fill: $faint }
.box { stroke-width: 1.3 } .image .box { fill: $image; stroke: $faint }
.backbone .box { fill: $backbone; stroke: $backbone_edge } .backbone .share { fill: $backbone_edge }
.neck .box { fill: $neck; stroke: $neck_edge } .neck .share { fill: $neck_edge }
.head .box { fill: $head; stroke: $head_edge } .head .share { fill: $head_edge }
.open .box { stroke: $choice; stroke-width: 2; stroke-dasharray: 6 4 } .choice { fill: $choice }
.wire { fill: none; stroke: $wire; stroke-width: 1.5 } .tip { fill: $wire }
"""
)


def svg(graph: Graph, costs: Sequence[RowCost], imgsz: int) -> str:
    """The network as an SVG with its name, sums and legend. `costs` are those of its rows at ``imgsz`` pixels."""
    placed = layout(graph, _heights(graph))
    width, height = max(placed.width, NARROWEST), placed.height + CAPTION
    style = STYLE.substitute(LIGHT) + "@media (prefers-color-scheme: dark) {\n" + STYLE.substitute(DARK) + "}\n"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="group" aria-labelledby="title">',
            f'<title id="title">{_x(headline(graph))}: {_x(sums(graph, costs, imgsz))}</title>',
            f"<style>{style}</style>",
            f'<rect class="paper" width="{width:g}" height="{height:g}"/>',
            _words(16, 28, headline(graph), "headline"),
            _words(16, 48, sums(graph, costs, imgsz), "faint"),
            *_legend(bool(graph.spec.choices)),
            f'<g transform="translate(0 {CAPTION})">',
            *_picture(graph, costs, imgsz, placed),
            "</g>",
            "</svg>\n",
        ]
    )


def html(graph: Graph, costs: Sequence[RowCost], imgsz: int) -> str:
    """A page with the picture to zoom and pan, and a card for the row under the pointer, in focus or in the address."""
    placed = layout(graph, _heights(graph))
    facts = json.dumps(_facts(graph, costs, imgsz)).replace("<", "\\u003c")
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    names = {name: f"var(--{name})" for name in LIGHT}
    parts = {
        "title": _x(headline(graph)),
        "sums": _x(sums(graph, costs, imgsz)),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'",
        "light": "".join(f"--{name}: {colour}; " for name, colour in LIGHT.items()),
        "dark": "".join(f"--{name}: {colour}; " for name, colour in DARK.items()),
        "style": STYLE.substitute(names),
        "legend": "".join(
            f'<li class="{part}"><span></span>{label}</li>' for part, label in _keys(bool(graph.spec.choices))
        ),
        "width": f"{placed.width:g}",
        "height": f"{placed.height:g}",
        "picture": "\n".join(_picture(graph, costs, imgsz, placed)),
        "facts": facts,
        "script": SCRIPT,
    }
    return PAGE.substitute(parts)


def headline(graph: Graph) -> str:
    name, file = graph.spec.name, Path(graph.spec.path).name
    return name if Path(file).stem == name else f"{name} ({file})"


def sums(graph: Graph, costs: Sequence[RowCost], imgsz: int) -> str:
    """``32 rows, 70,834,012 parameters, 83.327 GMACs at 640 px``, and what a search file leaves open."""
    if not graph.spec.choices:
        return summed(costs, imgsz)
    places = len(graph.spec.choices)
    left_open = f"{places} open choice{'s' if places > 1 else ''}"
    return f"{summed(costs, imgsz)} as supernet: {left_open}, {subnets(graph):,} subnets"


def part_of(graph: Graph, node: Node) -> str:
    """``backbone``, ``neck`` (rows of the head section that are not the head itself) or ``head``."""
    if node.op.is_head:
        return "head"
    return "backbone" if node.layer.section == "backbone" else "neck"


# ---- the picture


def _picture(graph: Graph, costs: Sequence[RowCost], imgsz: int, placed: Layout) -> list[str]:
    """Bands, lines and boxes, in this order: what comes later lies above."""
    found = []
    for number, band in enumerate(placed.bands):
        if number % 2 == 0:
            found.append(f'<rect class="band" x="-9999" y="{band.y:g}" width="29999" height="{band.height:g}"/>')
        for again in range(max(1, round(band.height / SCREEN))):
            y = band.y + again * SCREEN
            found.append(_words(16, y + 24, f"stride {band.stride}", "level"))
            found.append(_words(16, y + 40, f"{imgsz // band.stride}×{imgsz // band.stride}", "small"))
    found += [_line(line) for line in placed.lines]
    image = placed.boxes[IMAGE]
    found += [
        '<g class="row image" id="row-image"><title>The image</title>',
        _frame(image),
        _words(image.x + PADDING, image.y + 18, "image", "op"),
        _words(image.x + image.width - PADDING, image.y + 18, f"3×{imgsz}×{imgsz}", "small", end=True),
        "</g>",
    ]
    most = max(cost.macs for cost in costs)
    for node, cost in zip(graph.nodes, costs, strict=True):
        found += _box(graph, node, cost, placed.boxes[node.index], cost.macs / most if most else 0.0)
    return found


def _box(graph: Graph, node: Node, cost: RowCost, box: Box, share: float) -> list[str]:
    """One row: index and name, op, repeats; arguments; output and parameters; open choices; a bar for its MACs."""
    room = box.width - 2 * PADDING
    times = f"×{node.repeats}" if isinstance(node.repeats, int) and node.repeats > 1 else ""
    number = f"{node.index} {node.layer.name}" if node.layer.name else str(node.index)
    number = _cut(number, int(room / 2 / SMALL))
    offset = SMALL * len(number) + 7
    op = _cut(node.op.name, int((room - offset - BOLD * (len(times) + 1)) / BOLD))
    left, right = box.x + PADDING, box.x + box.width - PADDING
    y = box.y + 18
    params = short_count(cost.params)
    lines = [
        f'<g class="row {part_of(graph, node)}{" open" if node.choices else ""}" id="row-{node.index}" role="img">'
        f"<title>{_x(_spoken(graph, node, cost))}</title>",
        _frame(box),
        _words(left, y, number, "small"),
        _words(left + offset, y, op, "op"),
        _words(right, y, times, "op", end=True) if times else "",
        _words(left, y + TEXT_LINE, _cut(_arguments(node), int(room / SMALL)), "small") if _arguments(node) else "",
    ]
    y += TEXT_LINE
    for choice in node.choices:
        y += TEXT_LINE
        text = f"◆ {_argument_name(choice)} {' | '.join(map(value_text, choice.options))}"
        lines.append(_words(left, y, _cut(text, int(room / SMALL)), "small choice"))
    y += TEXT_LINE
    gives = _dimensions(cost.shape) + (" mask" if node.output.kind == "mask" else "")
    lines.append(_words(left, y, gives, "small"))
    lines.append(_words(right, y, params, "small", end=True) if cost.params else "")
    if share > 0.004:  # less cannot be seen
        lines.append(
            f'<rect class="share" x="{left:g}" y="{box.y + box.height - 7:g}" width="{room * share:.1f}" height="3" '
            f'rx="1.5"/>'
        )
    return [*filter(None, lines), "</g>"]


def _heights(graph: Graph) -> dict[int, float]:
    return {IMAGE: 28.0} | {node.index: PADDING + TEXT_LINE * (3 + len(node.choices)) + 7.0 for node in graph.nodes}


def _line(line: Line) -> str:
    """A line with round bends and a tip."""
    *_, before, end = line.points
    across, down = _sign(end.x - before.x), _sign(end.y - before.y)
    tip = " ".join(
        f"{x:g},{y:g}"
        for x, y in (
            (end.x, end.y),
            (end.x - 7 * across - 3.5 * down, end.y - 7 * down - 3.5 * across),
            (end.x - 7 * across + 3.5 * down, end.y - 7 * down + 3.5 * across),
        )
    )
    path = [f"M{line.points[0].x:g} {line.points[0].y:g}"]
    for start, corner, after in zip(line.points, line.points[1:], line.points[2:], strict=False):
        radius = min(CORNER, _length(start, corner) / 2, _length(corner, after) / 2)
        one, two = _towards(corner, start, radius), _towards(corner, after, radius)
        path.append(f"L{one.x:g} {one.y:g}Q{corner.x:g} {corner.y:g} {two.x:g} {two.y:g}")
    stop = Point(end.x - 5 * across, end.y - 5 * down)  # the tip goes on from here
    path.append(f"L{stop.x:g} {stop.y:g}")
    return (
        f'<g class="line" data-from="{line.source}" data-to="{line.target}">'
        f'<path class="wire" d="{"".join(path)}"/><polygon class="tip" points="{tip}"/></g>'
    )


def _sign(length: float) -> int:
    return (length > 0) - (length < 0)


def _length(one: Point, two: Point) -> float:
    return abs(one.x - two.x) + abs(one.y - two.y)


def _towards(start: Point, end: Point, length: float) -> Point:
    return Point(start.x + length * _sign(end.x - start.x), start.y + length * _sign(end.y - start.y))


def _frame(box: Box) -> str:
    return f'<rect class="box" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="7"/>'


def _words(x: float, y: float, text: str, kind: str, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{anchor}>{_x(text)}</text>'


def _keys(open_choices: bool) -> list[tuple[str, str]]:
    keys = [("backbone", "backbone"), ("neck", "neck"), ("head", "head")]
    return [*keys, *([("neck open", "open choice")] if open_choices else []), ("bar", "MACs beside the largest row's")]


def _legend(open_choices: bool) -> list[str]:
    found, x = [], 16.0
    for part, label in _keys(open_choices):
        if part == "bar":
            found.append(f'<g class="neck"><rect class="share" x="{x:g}" y="62" width="22" height="3" rx="1.5"/></g>')
        else:
            found.append(f'<g class="{part}"><rect class="box" x="{x:g}" y="57" width="22" height="12" rx="3"/></g>')
        found.append(_words(x + 28, 67, label, "faint"))
        x += 28 + 7.6 * len(label) + 18
    return found


# ---- what is said about a row


def _facts(graph: Graph, costs: Sequence[RowCost], imgsz: int) -> list[dict[str, Any]]:
    """What the page's card shows, a mapping a row."""
    params, macs = totals(costs)
    readers: dict[int, list[int]] = {}
    for node in graph.nodes:
        for source in dict.fromkeys(node.sources):
            readers.setdefault(source, []).append(node.index)

    def called(index: int) -> str:
        if index == IMAGE:
            return "image"
        name = graph.nodes[index].layer.name
        return f"{index} {name + ' ' if name else ''}{graph.nodes[index].op.name}"

    found = []
    for node, cost in zip(graph.nodes, costs, strict=True):
        sources = [
            (source, called(source), _dimensions(costs[source].shape if source >= 0 else (3, imgsz, imgsz)))
            for source in node.sources
        ]
        found.append(
            {
                "title": called(node.index) + (f" ×{value_text(node.repeats)}" if node.repeats != 1 else ""),
                "part": part_of(graph, node),
                "text": row_text(node.layer),
                "where": f"{node.layer.where.path}:{node.layer.where.line}",
                "sources": sources,
                "readers": [(reader, called(reader)) for reader in readers.get(node.index, [])],
                "output": _dimensions(cost.shape),
                "stride": node.output.stride if node.output.kind in ("map", "mask") else None,
                "arguments": [(name, value_text(value)) for name, value in node.arguments.items()],
                "params": f"{cost.params:,}",
                "params_share": _percent(cost.params, params),
                "macs": f"{cost.macs / 1e6:,.1f} M",
                "macs_share": _percent(cost.macs, macs),
            }
        )
    return found


def _spoken(graph: Graph, node: Node, cost: RowCost) -> str:
    """A row in one line: what a screen reader says, and an SVG viewer shows under the pointer."""
    sources = ", ".join("the image" if source == IMAGE else f"row {source}" for source in node.sources)
    return (
        f"Row {node.index}, {part_of(graph, node)}: {row_text(node.layer)} reads {sources}, gives "
        f"{_dimensions(cost.shape)}; {cost.params:,} parameters, {cost.macs / 1e6:,.1f} M MACs"
    )


def _arguments(node: Node) -> str:
    """What a row says, choices left out: they have lines of their own."""
    given = [value_text(value) for value in node.layer.args if not choices_in(value)]
    given += [f"{name} {value_text(value)}" for name, value in node.layer.kwargs.items() if not choices_in(value)]
    return ", ".join(given)


def _argument_name(choice: Choice) -> str:
    return choice.name.partition(".")[2]  # kernel of 16.kernel, kernel.0 of 16.kernel.0


def _dimensions(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def short_count(count: int) -> str:
    """One decimal and a unit: ``864``, ``2.4 k``, ``15.0 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.99995 * size:  # 999,950 is 1.0 M, not 1000.0 k
            return f"{count / size:.1f} {unit}"
    return str(count)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(length - 1, 0)] + "…"


def _x(text: str) -> str:
    """Text as XML and HTML take it; what no XML may hold becomes a sign for "unknown"."""
    return escape(NOT_XML.sub("\ufffd", text), {'"': "&quot;"})
