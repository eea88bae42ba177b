"""The commands on model files: what they print and write, when they refuse, and that a conversion changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.__main__ import main
from models.checkpoint import load_checkpoint
from models.convert import convert, heading, name_rows
from models.cost import RowCost, network_costs, totals
from models.diff import align, diff, table
from models.graph import Graph, resolve
from models.network import Network
from models.parse import parse, parse_text
from models.spec import Choice, LayerSpec, ModelSpec

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cfg" / "models").glob("*.yaml"))

SMALL = """\
# A small detector.
# Two levels.

nc: 3
width_multiple: 0.5
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]  # 0
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 2, BottleneckCSP, [32]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 0], 1, Concat, [1]]
  - [-1, 1, Conv, [16, 3]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [[-1, -5], 1, Concat, [1]]
  - [[5, 7], 1, Detect, [nc, anchors]]
"""
NAMED = """\
# A small detector.
# Two levels.
name: small
dialect: oneshot
nc: 3
depth_multiple: 1.0
width_multiple: 0.5
activation: silu
anchors: 2

backbone:
  - {name: c1, from: -1, number: 1, op: Conv, args: [16, 3, 2]}  # 0
  - [-1, 1, Conv, [32, 3, 2]]  # 1
  - {name: c2, from: -1, number: 2, op: BottleneckCSP, args: [32]}  # 2

head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]  # 3
  - [[-1, c1], 1, Concat, [1]]  # 4
  - {name: p1, from: -1, number: 1, op: Conv, args: [16, 3]}  # 5
  - [-1, 1, Conv, [32, 3, 2]]  # 6
  - {name: p2, from: [-1, c2], number: 1, op: Concat, args: [1]}  # 7
  - [[p1, p2], 1, Detect, [nc, anchors]]  # 8
"""


SMALL_ROWS = resolve(parse_text(SMALL)).nodes


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


# ---- show, check, draw


def test_check_tells_all_faults_of_all_files(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(SMALL.replace("Conv, [16, 3, 2]", "Cnv, [16, 3, 2]").replace("[16, 3]]", "[16, 3, {ac: mish}]]"))
    code, out, err = run(capsys, "check", bad, tmp_path / "none.yaml", small)
    assert code == 2
    assert out == f"{small}: good, 9 rows, 0 open choices\n"
    first, second, third = err.splitlines()
    assert first.startswith(f"{bad}:8:5 layer 0") and "'Cnv'" in first
    assert second.startswith(f"{bad}:14:") and "'ac'" in second
    assert third == f"{tmp_path}/none.yaml: no such model file"
    assert run(capsys, "check", small)[0] == 0


def test_an_input_size_has_to_fit_the_strides(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = f"--imgsz 66: {small} needs a multiple of its largest stride 4\n"
    for command in (["show", small], ["draw", small, "-o", small.with_suffix(".svg")], ["diff", small, small]):
        assert run(capsys, *command, "--imgsz", "66") == (2, "", said)
    assert sorted(path.name for path in small.parent.iterdir()) == ["small.yaml"]


def test_notes_go_to_stderr(small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = replace(resolve(parse(small)), notes=("row 3 is odd",))
    monkeypatch.setattr("models.__main__.load_graph", lambda *_: graph)
    code, out, err = run(capsys, "show", small, "--imgsz", "64")
    assert code == 0 and err == "note: row 3 is odd\n" and out.startswith("row")


def test_draw_writes_an_svg_or_a_page(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = small.with_name("p.svg")
    assert run(capsys, "draw", small, "-o", picture, "--imgsz", "64") == (0, f"{picture}: written\n", "")
    assert ElementTree.fromstring(picture.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
    monkeypatch.chdir(small.parent)
    assert run(capsys, "draw", small, "--imgsz", "64") == (0, "small.html: written\n", "")
    assert Path("small.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in Path().iterdir()) == ["p.svg", "small.html", "small.yaml"]


def test_draw_refuses_other_endings(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "draw", small, "-o", "p.png") == (2, "", "-o p.png: a picture is .svg or .html\n")


def test_dialect_and_ops_reach_the_reader(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", small, "--dialect", "yolov9000")
    assert code == 2 and "--dialect yolov9000 is unknown" in err
    ops = small.with_name("my_ops.py")
    code, _, err = run(capsys, "check", small, "--ops", ops)
    assert code == 2 and err == f"{ops}: no such file with ops\n"
    small.write_text(SMALL.replace("nc: 3", "nc: 3\nops: my_ops.py"))
    code, _, err = run(capsys, "check", small)
    assert code == 2 and "--trust-ops" in err
    code, _, err = run(capsys, "check", small, "--trust-ops")
    assert code == 2 and err.endswith(f"{ops}: no such file with ops\n")


# ---- diff


def read(text: str) -> Graph:
    return resolve(parse_text(text, "x.yaml"))


def counted(graph: Graph) -> list[RowCost]:
    """Costs that a difference can be seen by, without making a network."""
    return [
        RowCost(node.output.channels * 10, node.output.channels * 10**6, (node.output.channels, 8, 8))
        for node in graph.nodes
    ]


def compared(text: str):
    one, two = read(SMALL), read(text)
    return diff(one, two, counted(one), counted(two))


def test_the_same_network_is_said_to_be(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", small, small, "--imgsz", "64")
    params, macs = totals(network_costs(resolve(parse(small)), 64))
    assert (code, out) == (0, f"the same network: 9 rows, {params:,} parameters, {macs / 1e9:.3f} GMACs\n")


def test_a_row_put_in_shifts_no_other() -> None:
    text = SMALL.replace("  - [-1, 2, Bottle", "  - [-1, 1, Conv, [32, 1]]\n  - [-1, 2, Bottle")
    found = compared(text.replace("[-1, -5]", "[-1, -5]").replace("[5, 7]", "[6, 8]"))
    assert [(row.before, row.after, row.kind) for row in found.rows] == [
        (0, 0, "same"),
        (1, 1, "same"),
        (None, 2, "added"),
        (2, 3, "changed"),
        *((index, index + 1, "same") for index in range(3, 9)),
    ]
    assert [str(change) for change in found.rows[3].changes] == ["from 1 -> 2"]


def test_a_table_of_differences() -> None:
    text = SMALL.replace("- [-1, 1, Conv, [16, 3]]", "- [-1, 1, Conv, [32, 5]]").replace("-1, 2, Bott", "-1, 3, Bott")
    joint = "  - [-1, 1, Conv, [32, 3, 2]]\n  - [[-1, -5]"
    assert joint in text
    text = text.replace(joint, f"  - [-1, 1, SPP, [32]]\n{joint}".replace("-5", "-6")).replace("[5, 7]", "[5, 8]")
    assert table(compared(text)) == (
        "- x.yaml\n"
        "+ x.yaml\n"
        "   row     module             params            MACs  what differs\n"
        "~  2       BottleneckCSP                              number 2 -> 3\n"
        "~  5       Conv            160 (+80)   16.0 M (+8.0)  c_out 8 -> 16, kernel 3 -> 5, output 8x8x8 -> 16x8x8\n"
        "+  - -> 6  SPP            160 (+160)  16.0 M (+16.0)\n"
        "~  6 -> 7  Conv                                       from 5 -> 6\n"
        "rows: 1 added, 0 removed, 3 changed, 6 same\n"
        "parameters: 1,360 -> 1,600 (+240, +17.6 %)\n"
        "GMACs: 0.136 -> 0.160 (+0.024, +17.6 %)"
    )


def test_rows_that_came_or_went_together_are_told_in_one_line() -> None:
    rows = "  - [-1, 1, Conv, [16, 3]]\n"
    more = "  - [-1, 1, SPP, [16]]\n  - [-1, 1, SPP, [16]]\n  - [-1, 1, C3, [16]]\n  - [-1, 2, C3, [16]]\n"
    with_more = SMALL.replace(rows, rows + more).replace("[-1, -5]", "[-1, -9]").replace("[5, 7]", "[9, 11]")
    assert table(compared(with_more)).splitlines()[3:6] == [
        "+  - -> 6 to 9  4 rows  320 (+320)  32.0 M (+32.0)  2 SPP, 2 C3",
        "~  6 -> 10      Conv                                from 5 -> 9",
        "~  8 -> 12      Detect                              from [5, 7] -> [9, 11]",
    ]
    one, two = read(with_more), read(SMALL)
    found = table(diff(one, two, counted(one), counted(two)))
    assert "-  6 to 9 -> -  4 rows  0 (-320)  0.0 M (-32.0)  2 SPP, 2 C3\n" in found
    assert "rows: 0 added, 4 removed, 2 changed, 7 same\n" in found


def test_a_row_that_costs_more_because_of_its_source_says_so() -> None:
    one, two = read(SMALL), read(SMALL.replace("Conv, [16, 3]]", "Conv, [32, 3]]"))
    found = diff(one, two, network_costs(one, 64), network_costs(two, 64))
    told = [[str(change) for change in row.changes] for row in found.rows if row.kind != "same"]
    assert told == [
        ["c_out 8 -> 16", "output 8x32x32 -> 16x32x32"],
        ["channels in 8 -> 16"],
        ["channels in 8, 32 -> 16, 32"],
    ]


def test_a_choice_is_no_difference_because_its_row_has_moved() -> None:
    open_one = SMALL.replace("[32]]", "[32, {kernel: {choice: [3, 5]}}]]")
    moved = open_one.replace("  - [-1, 2, Bottle", "  - [-1, 1, Conv, [32, 1]]\n  - [-1, 2, Bottle")
    one, two = read(open_one), read(moved.replace("[5, 7]", "[6, 8]"))
    found = diff(one, two, counted(one), counted(two))
    assert [(row.kind, [change.what for change in row.changes]) for row in found.rows if row.kind != "same"] == [
        ("added", []),
        ("changed", ["from"]),
    ]


@given(st.sets(st.integers(0, 8)), st.sets(st.integers(0, 8)))
@settings(max_examples=60)
def test_an_alignment_keeps_every_row_once_and_in_order(without: set[int], twice: set[int]) -> None:
    one = SMALL_ROWS
    two = [node for node in one if node.index not in without for _ in range(1 + (node.index in twice))]
    two = [replace(node, index=index) for index, node in enumerate(two)]
    pairs = align(one, two)
    assert [a for a, _ in pairs if a is not None] == [*range(len(one))]
    assert [b for _, b in pairs if b is not None] == [*range(len(two))]
    if not without:  # then every row has a partner
        assert {a for a, b in pairs if b is not None} - {None} == {*range(len(one))}


def test_a_difference_is_exit_code_1_with_real_costs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = small.with_name("other.yaml")
    other.write_text(SMALL.replace("nc: 3", "nc: 4"))
    code, out, _ = run(capsys, "diff", small, other, "--imgsz", "64")
    params = [totals(network_costs(resolve(parse(path)), 64))[0] for path in (small, other)]
    assert code == 1
    assert "~  8    Detect" in out and "num_classes 3 -> 4, output 2560x8 -> 2560x9" in out
    assert f"parameters: {params[0]:,} -> {params[1]:,} (+{params[1] - params[0]}" in out


# ---- convert


def test_convert_named_writes_this(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "convert", small, "--named") == (0, NAMED, "")
    output = small.with_name("named.yaml")
    assert run(capsys, "convert", small, "--named", "-o", output) == (0, f"{output}: written\n", "")
    assert output.read_text() == NAMED
    assert run(capsys, "convert", output, "--named", "-o", output)[0] == 2
    assert output.read_text() == NAMED
    assert run(capsys, "convert", output)[1] == NAMED  # a second time changes nothing


def test_a_file_is_never_written_over_itself(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = small.with_name("link.yaml")
    link.symlink_to(small)
    said = f"-o {link}: is the file that is read; give another name\n"
    assert run(capsys, "convert", small, "-o", link) == (2, "", said)
    assert small.read_text() == SMALL


def test_a_heading_is_the_comment_that_a_file_begins_with() -> None:
    assert heading(SMALL) == "# A small detector.\n# Two levels."
    assert heading("nc: 3  # classes\n# more") == "" == heading("")


@pytest.mark.parametrize("named", [False, True], ids=["counted", "named"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_conversion_changes_nothing_but_names(path: Path, named: bool) -> None:
    spec = parse(path)
    text = convert(spec, named, heading(path.read_text()))
    again = parse_text(text, str(path))
    assert convert(again, named, heading(text)) == text
    assert again.scaling == spec.scaling and heading(text) == heading(path.read_text())
    for before, after in zip(resolve(spec).nodes, resolve(again).nodes, strict=True):
        assert (after.op, after.sources, after.inputs, after.output) == (
            *(before.op, before.sources, before.inputs, before.output),
        )
        assert unnamed(after.arguments) == unnamed(before.arguments)
        assert unnamed({"": after.repeats}) == unnamed({"": before.repeats})
    if named:
        assert all(isinstance(source, str) or source == -1 for layer in again for source in layer.sources)


def unnamed(arguments) -> dict:
    """A choice without its name, which follows the row's."""
    return {name: value.options if isinstance(value, Choice) else value for name, value in arguments.items()}


def test_a_converted_network_takes_the_same_weights(small: Path) -> None:
    one, two = (Network(resolve(spec)) for spec in (parse(small), parse_text(NAMED)))
    two.load_state_dict(one.state_dict())
    x = torch.randn(1, 3, 32, 32)
    for ours, theirs in zip(one.eval()(x)[0], two.eval()(x)[0], strict=True):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("path", [ROOT / "cfg/models/tiny.yaml", ROOT / "cfg/models/yolov5n.yaml"], ids=str)
def test_a_row_put_into_a_named_file_shifts_nobody(path: Path) -> None:
    spec = name_rows(parse(path))
    nodes = resolve(spec).nodes
    for index in range(len(spec.layers) - 1):
        if -1 not in spec.layers[index + 1].sources:
            continue  # nobody would read the new row, which is a fault of its own
        shape = nodes[index].output
        new = LayerSpec(spec.layers[index].where, (-1,), 1, "Conv", (8, 1), {}, None, spec.layers[index].section)
        new = replace(new, args=(unscaled(spec, shape.channels), 3))
        layers = (*spec.layers[: index + 1], new, *spec.layers[index + 1 :])
        more = resolve(replace(spec, layers=layers)).nodes
        assert more[index + 1].output == shape
        rest = [node for node in more if node.index != index + 1]
        for before, after in zip(nodes, rest, strict=True):
            assert (after.op, after.inputs, after.output) == (before.op, before.inputs, before.output)
            assert after.arguments == before.arguments
            moved = [source + (source > index) for source in before.sources]
            read_new = [index + 1 if source == index else source for source in moved]
            assert list(after.sources) in (moved, read_new)


def unscaled(spec: ModelSpec, channels: int) -> int:
    """What a row says for so many channels, as `width_multiple` multiplies it."""
    return round(channels / spec.scaling.width)


def test_names_tell_the_level_and_are_never_taken_twice() -> None:
    spec = name_rows(parse(ROOT / "cfg/models/yolov4-p5.yaml"))
    assert {layer.name: index for index, layer in enumerate(spec) if layer.name} == {
        **{"c3": 6, "c4": 8, "p5_1": 11, "p4_1": 13, "p4_2": 16, "p3_1": 18, "p3_2": 21},
        **{"p3": 22, "p4_3": 25, "p4": 26, "p5": 30},
    }
    taken = SMALL.replace("- [-1, 1, Conv, [32, 3, 2]]", "- {name: c1, from: -1, op: Conv, args: [32, 3, 2]}", 1)
    names = [layer.name for layer in name_rows(parse_text(taken))]
    assert names == ["c1_1", "c1", "c2", None, None, "p1", None, "p2", None]


def test_another_programs_file_becomes_ours(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text(SMALL.replace("nc: 3", "nc: 3\ndepth_multiple: 0.5").replace("BottleneckCSP, [32]", "C3, [32]"))
    code, text, _ = run(capsys, "convert", small, "--dialect", "yolov5-v4")
    assert code == 0 and "dialect: oneshot\n" in text and "depth_multiple: 0.5\n" in text
    one, two = resolve(parse(small, "yolov5-v4")), resolve(parse_text(text))
    for before, after in zip(one.nodes, two.nodes, strict=True):
        assert (after.op, after.arguments, after.output) == (before.op, before.arguments, before.output)


def test_ops_of_a_users_own_are_named_in_a_note(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ops = small.with_name("my_ops.py")
    ops.write_text(
        "from torch import nn\n"
        "from models.registry import register_op\n\n\n"
        "@register_op()\n"
        "class Doubled(nn.Module):\n"
        "    def __init__(self, c_in: int, times: int = 2) -> None:\n"
        "        super().__init__()\n"
        "        self.times = times\n\n"
        "    def forward(self, x):\n"
        "        return x * self.times\n"
    )
    small.write_text(SMALL.replace("[-1, 2, BottleneckCSP, [32]]", "[-1, 2, Doubled, [3]]"))
    code, out, err = run(capsys, "convert", small, "--ops", ops)
    assert code == 0 and "[-1, 2, Doubled, [3]]" in out
    assert err == f"note: Doubled is an op of {ops}, which the converted file does not name; read it with --ops {ops}\n"


# ---- import


def test_import_writes_a_checkpoint(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Network(resolve(parse(small)))
    state = {f"model.{name.removeprefix('layers.')}": value for name, value in network.state_dict().items()}
    weights, names, output = small.with_suffix(".pth"), small.with_name("names.yaml"), small.with_suffix(".pt")
    torch.save(state, weights)
    names.write_text("names: {0: cat, 1: dog, 2: cow}\n")
    command = ["import", weights, "--cfg", small, "-o", output, "--imgsz", "64"]
    assert run(capsys, *command, "--names", names) == (0, f"{output}: written\n", "")
    checkpoint = load_checkpoint(output)
    assert checkpoint.names == ("cat", "dog", "cow") and checkpoint.imgsz == 64
    for name, tensor in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(checkpoint.state[name], tensor)
    assert run(capsys, *command) == (
        *(0, f"{output}: written\n", "note: classes are called 0 to 2; --names FILE names them\n"),
    )
    assert load_checkpoint(output).names == ("0", "1", "2")
    names = small.with_name("names.txt")
    names.write_text("cat\ndog\n\n")
    code, _, err = run(capsys, *command, "--names", names)
    assert code == 2 and "3 classes, but 2 names" in err
    assert run(capsys, "import", weights, "--cfg", small, "-o", weights)[0] == 2
    names = small.with_name("no.yaml")
    names.write_text("classes: 3\n")
    said = f"{names}: has no list of classes under the key 'names'\n"
    assert run(capsys, *command, "--names", names) == (2, "", said)
    names.write_text("names: [no, 0b_, !!int '']\n")
    assert run(capsys, *command, "--names", names) == (2, "", said)


def test_names_are_what_is_written(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not True, a number, or what PyYAML fails to make a number of."""
    weights, names, output = small.with_suffix(".pth"), small.with_name("names.yaml"), small.with_suffix(".pt")
    state = Network(resolve(parse(small))).state_dict()
    torch.save({f"model.{name.removeprefix('layers.')}": value for name, value in state.items()}, weights)
    names.write_text("train: elsewhere\nnames: [no, 0b_, 1]\n")
    assert run(capsys, "import", weights, "--cfg", small, "-o", output, "--imgsz", "64", "--names", names)[0] == 0
    assert load_checkpoint(output).names == ("no", "0b_", "1")
