"""Pictures of networks: nothing overlaps, no line misleads, all is there, and nothing of a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cost import RowCost, network_costs
from models.draw import SMALL, html, short_count, svg
from models.graph import Graph, Node, resolve
from models.layout import IMAGE, Layout, Piece, layout, place, tracks
from models.parse import parse, parse_text
from models.registry import OPS, Shape
from models.spec import LayerSpec, ModelSpec, Where

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"
FILES = sorted((ROOT / "cfg" / "models").glob("*.yaml"))

SMALL_NET = """\
name: small
nc: 3
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 2, BottleneckCSP, [16]]
head:
  - [-1, 1, nn.Upsample, []]
  - [[-1, 0], 1, Concat, [1]]
  - {name: p1, from: -1, op: Conv, args: [8, {kernel: {choice: [1, 3]}}]}
  - [-1, 1, Conv, [16, 3, 2]]
  - [[-1, 2], 1, Concat, [1]]
  - [[5, 7], 1, Detect, [nc, anchors]]
"""


def elan(rows: list[str], channels: int, depth: int) -> int:
    """Appends a block whose Concat joins every second of `depth` convolutions and both branches; its last row."""
    rows += [f"[-1, 1, Conv, [{channels}, 1]]", f"[-2, 1, Conv, [{channels}, 1]]"]
    rows += [f"[-1, 1, Conv, [{channels}, 3]]"] * depth
    rows += [f"[{[-1, *range(-3, -depth - 1, -2), -depth - 1, -depth - 2]}, 1, Concat, [1]]"]
    rows += [f"[-1, 1, Conv, [{4 * channels}, 1]]"]
    return len(rows) - 1


def large_net() -> ModelSpec:
    """160 rows in the manner of YOLOv7: blocks of many branches, a top-down and a bottom-up path, three levels."""
    rows = ["[-1, 1, Conv, [8, 3, 2]]", *["[-1, 1, Conv, [8, 3]]"] * 5, "[-1, 1, Conv, [8, 3, 2]]"]
    levels = []
    for stage in range(4):
        levels.append(elan(rows, 8, 12))
        if stage < 3:
            rows += ["[-1, 1, Conv, [8, 3, 2]]", "[-2, 1, Conv, [8, 1, 2]]", "[[-1, -2], 1, Concat, [1]]"]
    split = len(rows)
    rows.append("[-1, 1, SPPCSP, [16]]")
    ways = [len(rows) - 1]
    for level in (2, 1):
        rows += ["[-1, 1, Conv, [8, 1]]", "[-1, 1, nn.Upsample, []]", f"[{levels[level]}, 1, Conv, [8, 1]]"]
        rows.append("[[-1, -2], 1, Concat, [1]]")
        ways.append(elan(rows, 4, 12))
    heads = [ways[2]]
    for way in (ways[1], ways[0]):
        rows += ["[-1, 1, Conv, [8, 1, 2]]", "[-2, 1, Conv, [8, 3, 2]]", f"[[-1, -2, {way}], 1, Concat, [1]]"]
        heads.append(elan(rows, 4, 12))
    rows.append(f"[{heads}, 1, Detect, [nc, anchors]]")
    lines = [f"  - {row}" for row in rows]
    return parse_text("\n".join(["nc: 3", "backbone:", *lines[:split], "head:", *lines[split:]]))


def without_weights(graph: Graph) -> list[RowCost]:
    """Costs that need no network: a drawing only prints them."""
    return [RowCost(n.index * 1000, n.index * 10**6, (n.output.channels, 640, 640)) for n in graph.nodes]


def heights(graph: Graph) -> dict[int, float]:
    return {IMAGE: 28.0} | {node.index: 61.0 + 15 * len(node.choices) for node in graph.nodes}


@pytest.fixture(scope="module")
def small() -> Graph:
    return resolve(parse_text(SMALL_NET, "cfg/small.yaml"))


# ---- where things stand


def test_a_detector_goes_down_up_down_and_its_head_stands_behind(small: Graph) -> None:
    grid = place(small)
    assert grid.columns == {-1: 0, 0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 8: 3}
    # Stride 1 is slot 0; stride 2 slots 1 to 3, the way up from the bottom; stride 4 slots 4 and 5.
    assert grid.slots == {-1: 0, 0: 1, 3: 3, 4: 2, 5: 1, 1: 4, 2: 5, 6: 4, 7: 5, 8: 3}
    assert grid.bands == {1: (0, 0), 2: (1, 3), 4: (4, 5)}


def test_rows_of_the_neck_stand_in_the_column_that_reads_them() -> None:
    graph = resolve(parse(ROOT / "cfg/models/yolov4-p5.yaml"))
    columns = place(graph).columns
    assert [index for index, column in columns.items() if column == 1] == [*range(13, 23)]
    assert columns[14] == columns[19] == 1  # convolutions of the backbone's rows 8 and 6


def test_lines_side_by_side_take_the_innermost_free_track() -> None:
    pieces = [Piece(0, "long", 0, 100), Piece(0, "short", 40, 60), Piece(0, "far", 200, 300), Piece(1, "other", 0, 9)]
    assert tracks(pieces) == {(0, "short"): 0, (0, "long"): 1, (0, "far"): 0, (1, "other"): 0}


def test_a_high_band_tells_its_stride_again() -> None:
    graph = resolve(large_net())
    bands = layout(graph, heights(graph)).bands
    picture = svg(graph, without_weights(graph), 640)
    for band in bands:
        assert picture.count(f">stride {band.stride}</text>") == max(1, round(band.height / 800))
    assert max(band.height for band in bands) > 1200  # one of them does


def hold(graph: Graph, found: Layout) -> None:
    """What every layout has to keep."""
    boxes = list(found.boxes.values())
    assert [box.index for box in sorted(boxes, key=lambda box: box.index)] == [*range(-1, len(graph.nodes))]
    for a, b in itertools.combinations(boxes, 2):
        apart = a.x + a.width + 8 <= b.x or b.x + b.width + 8 <= a.x
        assert apart or a.y + a.height + 8 <= b.y or b.y + b.height + 8 <= a.y, (a, b)
    for box in boxes:
        assert 0 <= box.x and box.x + box.width <= found.width and 0 <= box.y and box.y + box.height <= found.height
    wanted = [(source, node.index) for node in graph.nodes for source in dict.fromkeys(node.sources)]
    assert sorted((line.source, line.target) for line in found.lines) == sorted(wanted)
    runs = defaultdict(set)  # where lines lie in one another: (direction, place) -> who lies there, from, to
    for line in found.lines:
        assert touches(found.boxes[line.source], line.points[0]) and touches(found.boxes[line.target], line.points[-1])
        for one, two in itertools.pairwise(line.points):
            assert one.x == two.x or one.y == two.y, line
            assert 0 <= min(one.x, two.x) and max(one.x, two.x) <= found.width
            assert 0 <= min(one.y, two.y) and max(one.y, two.y) <= found.height
            crossed = [box.index for box in boxes if inside(box, one, two)]
            assert not crossed, (line, crossed)
            if one.x == two.x and one.y != two.y:
                runs["down", one.x].add((line.source, min(one.y, two.y), max(one.y, two.y)))
            elif one.x != two.x:
                runs["across", one.y].add((line.source, min(one.x, two.x), max(one.x, two.x)))
    for place_, lying in runs.items():
        for (source, low, high), (other, start, end) in itertools.combinations(lying, 2):
            assert source == other or high <= start or end <= low, (place_, source, other)
    for above, below in itertools.pairwise(found.bands):
        assert above.y + above.height == pytest.approx(below.y) or above.y + above.height < below.y


def touches(box, point) -> bool:
    on_side = point.x in (box.x, box.x + box.width) and box.y < point.y < box.y + box.height
    on_end = point.y in (box.y, box.y + box.height) and box.x < point.x < box.x + box.width
    return on_side or on_end


def inside(box, one, two) -> bool:
    """Whether a piece runs through the inside of a box."""
    across = min(one.x, two.x) < box.x + box.width and max(one.x, two.x) > box.x
    return across and min(one.y, two.y) < box.y + box.height and max(one.y, two.y) > box.y


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_boxes_do_not_overlap_and_no_line_crosses_a_box_or_lies_in_another(path: Path) -> None:
    graph = resolve(parse(path))
    hold(graph, layout(graph, heights(graph)))


def test_the_same_for_160_rows_of_many_branches() -> None:
    graph = resolve(large_net())
    assert len(graph.nodes) == 160
    found = layout(graph, heights(graph))
    hold(graph, found)
    assert found.width < 1400 and found.height < 160 * 61


@st.composite
def any_graph(draw: st.DrawFn) -> Graph:
    """Rows at any strides that read any rows before them: worse than any file may be."""
    nodes: list[Node] = []
    for index in range(draw(st.integers(1, 14))):
        earlier = st.integers(0, index - 1) if index else st.just(-1)
        sources = tuple(draw(st.lists(earlier, min_size=1, max_size=5)))
        stride = 2 ** draw(st.integers(0, 4))
        section = draw(st.sampled_from(["backbone", "head"]))
        row = LayerSpec(Where("x", 1, 1), sources, 1, "Concat", section=section)
        nodes.append(Node(index, row, OPS["Concat"], sources, {}, 1, (), Shape(8, stride)))
    return Graph(ModelSpec("x", 1, 3, tuple(node.layer for node in nodes)), tuple(nodes))


@given(any_graph())
@settings(max_examples=150)
def test_the_same_for_any_graph(graph: Graph) -> None:
    hold(graph, layout(graph, heights(graph)))


# ---- the SVG


def texts(element: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def rows_of(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {
        group.attrib["id"]: group for group in root.iter(f"{SVG}g") if group.get("class", "").split(" ")[0] == "row"
    }


def test_an_svg_says_what_every_row_is(small: Graph) -> None:
    rows = rows_of(ElementTree.fromstring(svg(small, network_costs(small, 64, "shared"), 64)))
    assert [*rows] == ["row-image", *(f"row-{index}" for index in range(9))]
    assert [texts(rows[f"row-{index}"]) for index in (0, 2, 4, 5, 8)] == [
        ["0", "Conv", "16, 3, 2", "16×32×32", "464"],
        ["2", "BottleneckCSP", "×2", "16", "16×16×16", "2.0 k"],
        ["4", "Concat", "1", "32×32×32"],
        ["5 p1", "Conv", "8", "◆ kernel 1 | 3", "8×32×32", "2.3 k"],
        ["8", "Detect", "nc, anchors", "2560×8", "672"],
    ]
    kinds = [rows[f"row-{index}"].attrib["class"] for index in (2, 3, 5, 8)]
    assert kinds == ["row backbone", "row neck", "row neck open", "row head"]
    assert rows["row-2"].find(f"{SVG}title").text == (
        "Row 2, backbone: [-1, 2, BottleneckCSP, [16]] reads row 1, gives 16×16×16; 2,000 parameters, 0.5 M MACs"
    )


def test_an_svg_has_name_sums_and_a_legend(small: Graph) -> None:
    costs = [RowCost(1000, 2_000_000, (1, 2, 3))] * 9
    first = texts(ElementTree.fromstring(svg(small, costs, 64)))[:7]
    assert first == [
        "small",
        "9 rows, 9,000 parameters, 0.018 GMACs at 64 px as supernet: 1 open choice, 2 subnets",
        *("backbone", "neck", "head", "open choice", "MACs beside the largest row's"),
    ]
    plain = resolve(parse_text(SMALL_NET.replace("{choice: [1, 3]}", "3"), "other.yaml"))
    assert texts(ElementTree.fromstring(svg(plain, costs, 64)))[:6] == [
        "small (other.yaml)",
        "9 rows, 9,000 parameters, 0.018 GMACs at 64 px",
        *("backbone", "neck", "head", "MACs beside the largest row's"),
    ]


@pytest.mark.parametrize("spec", [large_net(), *map(parse, FILES)], ids=lambda spec: spec.name)
def test_text_stays_in_its_box_and_beside_other_text(spec: ModelSpec) -> None:
    graph = resolve(spec)
    root = ElementTree.fromstring(svg(graph, without_weights(graph), 1280))
    rows = rows_of(root)
    assert len(rows) == len(graph.nodes) + 1
    for row in rows.values():
        box = row.find(f"{SVG}rect[@class='box']").attrib
        left, right = float(box["x"]), float(box["x"]) + float(box["width"])
        lines = defaultdict(list)
        for text in row.iter(f"{SVG}text"):
            width = len(text.text) * (SMALL if "small" in text.get("class") else 8.0)
            x = float(text.attrib["x"]) - (width if text.get("text-anchor") == "end" else 0)
            assert left < x and x + width < right, text.text
            assert float(box["y"]) < float(text.attrib["y"]) < float(box["y"]) + float(box["height"]) - 8
            lines[text.attrib["y"]].append((x, x + width))
        for spans in lines.values():
            for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
                assert end < start, [text.text for text in row.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (54_321, "54.3 k"), (999_949, "999.9 k"), (999_950, "1.0 M")],
)
def test_counts_are_short(count: int, text: str) -> None:
    assert short_count(count) == text


# ---- the page


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def test_a_page_knows_all_about_a_row(small: Graph) -> None:
    page = Page(html(small, network_costs(small, 64, "shared"), 64))
    rows = json.loads(page.scripts[0])
    assert rows[4] == {
        "title": "4 Concat",
        "part": "neck",
        "text": "[[-1, 0], 1, Concat, [1]]",
        "where": "cfg/small.yaml:10",
        "sources": [[3, "3 nn.Upsample", "16×32×32"], [0, "0 Conv", "16×32×32"]],
        "readers": [[5, "5 p1 Conv"]],
        "output": "32×32×32",
        "stride": 2,
        "arguments": [["dimension", "1"]],
        "params": "0",
        "params_share": "0.0 %",
        "macs": "0.0 M",
        "macs_share": "0.0 %",
    }
    assert rows[0]["sources"] == [[-1, "image", "3×64×64"]]
    assert rows[2]["title"] == "2 BottleneckCSP ×2" and rows[5]["title"] == "5 p1 Conv"
    assert ["kernel", "{1|3}"] in rows[5]["arguments"]
    assert sum(float(row["macs_share"][:-2]) for row in rows) == pytest.approx(100, abs=0.5)
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id", "").startswith("row-")]
    assert ids == ["row-image", *(f"row-{index}" for index in range(9))]


def test_a_page_stands_alone_and_runs_no_script_but_its_own(small: Graph) -> None:
    text = html(small, without_weights(small), 64)
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if attrs.keys() & {"src", "href", "xlink:href"}]
    assert text.count("http") - text.count("http-equiv") == text.count("http://www.w3.org/2000/svg")
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x07\ud800"


def test_nothing_of_a_file_becomes_markup(small: Graph) -> None:
    nodes = []
    for node in small.nodes:
        where = replace(node.layer.where, path=EVIL)
        layer = replace(node.layer, where=where, name=EVIL, kwargs={**node.layer.kwargs, EVIL: EVIL})
        nodes.append(replace(node, op=replace(node.op, name=EVIL), layer=layer, arguments={EVIL: EVIL}))
    evil = Graph(replace(small.spec, name=EVIL, path=EVIL), tuple(nodes))
    good = svg(small, without_weights(small), 64)
    picture = svg(evil, without_weights(evil), 64)
    root = ElementTree.fromstring(picture.encode())  # neither the control character nor the lone surrogate is left
    assert {element.tag for element in root.iter()} == {element.tag for element in ElementTree.fromstring(good).iter()}
    text = html(evil, without_weights(evil), 64)
    text.encode()
    page, plain = Page(text), Page(html(small, without_weights(small), 64))
    tags = [tag for tag, _ in page.tags]
    assert set(tags) == {tag for tag, _ in plain.tags} and tags.count("script") == len(page.scripts) == 2
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    facts = json.loads(page.scripts[0])
    assert facts[4]["arguments"][0][0] == EVIL and facts[4]["where"] == f"{EVIL}:10"  # the card shows it as text
