"""New rows in a model: all reads what it read, weights move with their rows, and a branch that is shut is nothing."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.structures import Fault
from models.convert import name_rows
from models.graph import Graph, load_graph, resolve
from models.insert import branches_on, insert_after, moved_rows, moved_state
from models.levels import levels
from models.network import Network, build
from models.ops.branch import AttentionBranch
from models.parse import dump, parse, parse_text
from models.spec import LayerSpec, ModelSpec, Scaling, Where, row_text

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "cfg" / "models"
BRANCHED = sorted(
    path.name
    for path in MODELS.glob("*.yaml")
    if "fal" not in path.name and getattr(load_graph(path).nodes[-1].op.module, "task", "detect") != "segment"
)
SMALL = ("tiny.yaml", "tiny-dfl.yaml", "yolov5n.yaml", "yolov8n.yaml", "effb0-ca-ssd.yaml", "resnet18-fpn-cls.yaml")
SIX_ROWS = """
nc: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - {name: deep, from: -1, op: Conv, args: [8]}
  - [-2, 1, Conv, [8]]
head:
  - [[-1, deep, 1], 1, Concat, [1]]
  - [[-1], 1, Classify, [nc]]
"""


def branch(name: str | None = None) -> LayerSpec:
    return LayerSpec(Where("nowhere", 1, 1), (-1,), 1, "AttentionBranch", ("nc",), {}, name)


def written(spec: ModelSpec) -> list[str]:
    return [row_text(layer) for layer in spec]


# ---- one file, by hand


def test_who_read_a_row_reads_the_one_behind_it() -> None:
    spec = insert_after(parse_text(SIX_ROWS), {1: branch(), 2: branch()})
    assert written(spec) == [
        "[-1, 1, Conv, [8, 3, 2]]",
        "[-1, 1, Conv, [8, 3, 2]]",
        "[-1, 1, AttentionBranch, [nc]]",
        "{name: deep, from: -1, number: 1, op: Conv, args: [8]}",
        "[-1, 1, AttentionBranch, [nc]]",
        "[-3, 1, Conv, [8]]",
        "[[-1, 4, 2], 1, Concat, [1]]",
        "[-1, 1, Classify, [nc]]",
    ]
    assert [layer.section for layer in spec] == ["backbone"] * 6 + ["head"] * 2


def test_a_new_row_with_a_name_is_read_by_it_but_from_right_behind_it() -> None:
    spec = insert_after(parse_text(SIX_ROWS), {1: branch("p2"), 2: branch("attended")})
    assert written(spec)[2:7] == [
        "{name: p2, from: -1, number: 1, op: AttentionBranch, args: [nc]}",
        "{name: deep, from: -1, number: 1, op: Conv, args: [8]}",
        "{name: attended, from: -1, number: 1, op: AttentionBranch, args: [nc]}",
        "[p2, 1, Conv, [8]]",
        "[[-1, attended, p2], 1, Concat, [1]]",
    ]


def test_the_image_stays_the_image() -> None:
    spec = insert_after(parse_text(SIX_ROWS), {0: branch()})
    assert resolve(spec).nodes[0].sources == (-1,) and spec.layers[0].sources == (-1,)


def test_without_new_rows_nothing_changes() -> None:
    assert insert_after(parse_text(SIX_ROWS), {}) == parse_text(dump(parse_text(SIX_ROWS)))


@pytest.mark.parametrize("row", [-1, 5, 6])
def test_nothing_stands_behind_the_head_or_behind_no_row(row: int) -> None:
    with pytest.raises(Fault) as told:
        insert_after(parse_text(SIX_ROWS), {row: branch()})
    assert told.value.lines == (f"<text>: a row can be put behind rows 0 to 4; got {row}",)


def test_a_name_that_is_taken_is_a_fault() -> None:
    with pytest.raises(Fault, match="two rows are named 'deep'"):
        insert_after(parse_text(SIX_ROWS), {0: branch("deep")})


def test_choices_are_called_after_their_new_rows() -> None:
    old = parse(MODELS / "tiny-search.yaml")
    new = insert_after(old, {0: branch()})
    assert [choice.name for choice in new.choices] == [choice.name for choice in parse_text(dump(new)).choices]
    assert {choice.options for choice in new.choices} == {choice.options for choice in old.choices}
    resolve(new)


def test_rows_and_weights_move_by_what_is_put_in_before_them() -> None:
    assert moved_rows(5, {3, 1}) == [0, 1, 3, 4, 6]
    state = {"layers.0.conv.weight": torch.ones(1), "layers.2.0.bn.1.bias": torch.zeros(2)}
    assert list(moved_state(state, 5, [1, 3])) == ["layers.0.conv.weight", "layers.3.0.bn.1.bias"]


# ---- any file, any rows


@cache
def graph_of(name: str) -> Graph:
    return load_graph(MODELS / name)


def places(graph: Graph) -> list[int]:
    """The rows that a branch can stand behind."""
    outputs = [node.output for node in graph.nodes[:-1]]
    return [
        row for row, shape in enumerate(outputs) if shape.kind == "map" and not shape.margin and shape.channels % 4 == 0
    ]


def respelled(spec: ModelSpec, rng: random.Random) -> ModelSpec:
    """The same model with each source written in one of its three ways."""
    names = {layer.name: index for index, layer in enumerate(spec) if layer.name}

    def spelled(reader: int, source: int | str) -> int | str:
        row = names[source] if isinstance(source, str) else source if source >= 0 else reader + source
        name = spec.layers[row].name
        return -1 if row < 0 else rng.choice([row, row - reader, name or row])

    return replace(
        spec,
        layers=tuple(
            replace(layer, sources=tuple(spelled(reader, source) for source in layer.sources))
            for reader, layer in enumerate(spec)
        ),
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_row_reads_what_it_read_or_the_branch_behind_it(data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(BRANCHED), label="file")
    spec = parse(MODELS / file)
    if data.draw(st.booleans(), label="names"):
        spec = name_rows(spec)
    spec = respelled(spec, random.Random(data.draw(st.integers(0, 99), label="spelling")))
    rows = data.draw(st.sets(st.sampled_from(places(graph_of(file))), max_size=5), label="rows")
    called = data.draw(st.booleans(), label="called")
    after = insert_after(spec, {row: branch(f"new{row}" if called else None) for row in rows})
    assert parse_text(dump(after), spec.path) == after
    before, behind = resolve(spec), resolve(after)
    place = moved_rows(len(before.nodes), rows)
    for node in before.nodes:
        moved = behind.nodes[place[node.index]]
        assert moved.op is node.op and moved.arguments.keys() == node.arguments.keys()
        assert (moved.inputs, moved.output, moved.layer.section) == (node.inputs, node.output, node.layer.section)
        assert moved.sources == tuple(-1 if row < 0 else place[row] + (row in rows) for row in node.sources)
    assert {node.index for node in behind.nodes} - {*place} == {place[row] + 1 for row in rows}
    assert all(behind.nodes[place[row] + 1].sources == (place[row],) for row in rows)


# ---- what the network answers


@cache
def trained(name: str) -> Network:
    """A narrow network of the file, with statistics in its norms that are not those of the start."""
    torch.manual_seed(0)
    spec = parse(MODELS / name)
    narrow = Scaling(spec.scaling.depth, spec.scaling.width / 2)
    network = build(replace(spec, num_classes=3, scaling=narrow)).train()
    with torch.no_grad():
        network(torch.rand(2, 3, 128, 128))
    return network.eval()


def shut(network: Network) -> None:
    """Makes every attention map 0: far left of the sigmoid, which is exactly 0 in float32."""
    for layer in network.layers:
        if isinstance(layer, AttentionBranch):
            layer.bn_att3.weight.data.zero_()
            layer.bn_att3.bias.data.fill_(-200.0)


def outputs_with_shut_branches(network: Network, spec: ModelSpec, rows: Collection[int], x: torch.Tensor) -> object:
    changed = build(spec).eval()
    moved = moved_state(network.state_dict(), len(network.layers), rows)
    missing, surplus = changed.load_state_dict(moved, strict=False)
    assert not surplus
    new = {place + 1 for row, place in enumerate(moved_rows(len(network.layers), rows)) if row in rows}
    assert {int(name.split(".")[1]) for name in missing} == new
    shut(changed)
    with torch.no_grad():
        return changed(x)[0]


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_shut_branches_change_no_answer(data: st.DataObject) -> None:
    network = trained(data.draw(st.sampled_from(SMALL), label="file"))
    rows = data.draw(st.sets(st.sampled_from(places(network.graph)), min_size=1, max_size=3), label="rows")
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    spec = insert_after(network.spec, {row: branch() for row in rows})
    with torch.no_grad():
        before = network(x)[0]
    assert all(map(torch.equal, outputs_with_shut_branches(network, spec, rows, x), before))


@pytest.mark.parametrize("file", SMALL)
def test_branches_stand_on_any_pyramid_of_ours(file: str) -> None:
    network = trained(file)
    there = {level.name: level.row for level in levels(network.graph)}
    assert len(there) >= 3
    new = branches_on(network.graph, there)
    spec = insert_after(network.spec, new)
    x = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = network(x)[0]
    assert all(map(torch.equal, outputs_with_shut_branches(network, spec, new, x), before))


def test_a_derived_subnet_takes_branches() -> None:
    graph = load_graph(MODELS / "tiny-search.yaml")
    rng = random.Random(3)
    picks = {choice.name: rng.choice(choice.options) for choice in graph.spec.choices}
    plain = parse_text(dump(graph.spec.freeze(picks)))
    new = branches_on(resolve(plain), {level.name: level.row for level in levels(resolve(plain))})
    spec = insert_after(plain, new)
    network = build(plain).eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = network(x)[0]
    assert all(map(torch.equal, outputs_with_shut_branches(network, spec, new, x), before))


# ---- which branches


def asked(new: Mapping[int, LayerSpec]) -> list[str]:
    return [row_text(layer) for layer in new.values()]


def test_a_branch_learns_what_its_network_is_for() -> None:
    detector = branches_on(graph_of("tiny.yaml"), {"P4": 16, "P3": 21})
    assert asked(detector) == [
        "{name: attended_P4, from: -1, number: 1, op: AttentionBranch, args: [nc, {task: presence}]}",
        "{name: attended_P3, from: -1, number: 1, op: AttentionBranch, args: [nc, {task: presence}]}",
    ]
    classifier = branches_on(resolve(parse_text(SIX_ROWS)), {"P2": 4}, blocks="abn")
    assert asked(classifier) == [
        "{name: attended_P2, from: -1, number: 1, op: AttentionBranch, args: [nc, {task: classes, blocks: abn}]}"
    ]


def test_a_level_has_one_branch() -> None:
    once = insert_after(parse(MODELS / "tiny.yaml"), branches_on(graph_of("tiny.yaml"), {"P4": 16}))
    for row in (16, 17):
        with pytest.raises(Fault) as told:
            branches_on(resolve(once), {"P4": row})
        assert str(told.value).endswith(": level P4 has this attention branch already")


def test_a_branch_that_a_search_left_empty_is_none() -> None:
    (row,) = branches_on(graph_of("tiny.yaml"), {"P4": 16}, blocks="none").values()
    empty = resolve(insert_after(parse(MODELS / "tiny.yaml"), {16: row}))
    assert list(branches_on(empty, {"P4": 17})) == [17]


def test_the_rows_of_yolov4_p5_are_those_that_the_specification_names() -> None:
    spec = parse(MODELS / "yolov4-p5.yaml")
    after = insert_after(spec, branches_on(resolve(spec), {"P4": 16, "P3": 21}))
    assert [node.sources for node in resolve(after).nodes[24:34]] == [
        (23,), (23,), (25, 17), (26,), (27,), (27,), (29, 11), (30,), (31,), (24, 28, 32)
    ]  # fmt: skip
