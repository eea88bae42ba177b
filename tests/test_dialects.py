"""Files of other programs: which one a file is for, what its rows mean there, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.structures import Fault
from models.dialects import DIALECTS
from models.graph import resolve
from models.parse import dump, parse, parse_text
from models.spec import LayerSpec, ModelSpec

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
YOLOV5 = ("yolov5-v2", "yolov5-v3", "yolov5-v4", "yolov5")


def file(
    *rows: str, top: str = "", width: float = 1.0, nc: int = 80, anchors: str = "3", head: str | None = None
) -> str:
    """A file with the keys that every other program needs. Two rows come first, the last is Detect."""
    listed = [
        "[-1, 1, Conv, [16, 3, 2]]",
        "[-1, 1, Conv, [32, 3, 2]]",
        *rows,
        head or "[[-1], 1, Detect, [nc, anchors]]",
    ]
    text = "".join(f"  - {row}\n" for row in listed)
    keys = f"nc: {nc}\ndepth_multiple: 1.0\nwidth_multiple: {width}\nanchors: {anchors}\n{top}"
    return f"{keys}backbone:\n{text}".replace("  - " + listed[-1], "head:\n  - " + listed[-1])


def read(text: str, dialect: str | None = None) -> ModelSpec:
    return parse_text(text, "x.yaml", dialect=dialect)


def row(text: str, dialect: str | None = None, **other) -> LayerSpec:
    """Row 2 of a file as it is understood."""
    return read(file(text, **other), dialect).layers[2]


def told(text: str, dialect: str | None = None) -> list[str]:
    with pytest.raises(Fault) as caught:
        resolve(read(text, dialect))
    return list(caught.value.lines)


def names(text: str) -> set[str]:
    """The dialects that give the reading which the file gets by itself."""
    spec = read(text)
    same = set()
    for name in DIALECTS:
        try:
            same |= {name} if read(text, name) == spec else set()
        except Fault:
            pass
    return same


# ---- which program a file is for

RECOGNISED = {
    "BottleneckCSP2": (file("[-1, 1, BottleneckCSP2, [32]]"), "mish"),
    "SPPCSP": (file("[-1, 1, SPPCSP, [32]]"), "mish"),
    "VoVCSP": (file("[-1, 1, VoVCSP, [32]]"), "mish"),
    "BottleneckCSP and SPPCSP": (file("[-1, 3, BottleneckCSP, [32]]", "[-1, 1, SPPCSP, [32]]"), "mish"),
    "an output row": (
        file(
            "[-1, 1, BottleneckCSP, [32]]",
            "[-1, 1, nn.Conv2d, [na * (nc + 5), 1, 1]]",
            head="[[], 1, Detect, [nc, anchors]]",
        ),
        "leaky",
    ),
    "Focus and C3": (file("[-1, 1, Focus, [32, 3]]", "[-1, 1, C3, [32]]"), "silu"),
    "C3": (file("[-1, 1, C3, [32]]"), "silu"),
    "a Conv with six values": (file("[-1, 1, Conv, [32, 3, 1, None, 1, 2]]", "[-1, 1, C3, [32]]"), "silu"),
    "nothing but common modules": (file("[-1, 1, Bottleneck, [32]]"), "silu"),
    "an activation as code": (file("[-1, 1, C3, [32]]", top="activation: nn.LeakyReLU(0.1)\n"), "leaky"),
    "an activation by its name": (file("[-1, 1, BottleneckCSP2, [32]]", top="activation: relu\n"), "relu"),
    "a name": (file("[-1, 1, BottleneckCSP2, [32]]", top="name: mine\n"), "silu"),
    "a named argument": (file("[-1, 1, BottleneckCSP2, [32, {kernel: 5}]]"), "silu"),
    "a choice": (file("[-1, {choice: [1, 2]}, BottleneckCSP2, [32]]"), "silu"),
    "a named row": (file("{name: p, from: -1, op: BottleneckCSP2, args: [32]}"), "silu"),
    "no depth_multiple": (file("[-1, 1, BottleneckCSP2, [32]]").replace("depth_multiple: 1.0\n", ""), "silu"),
    "no width_multiple": (file("[-1, 1, BottleneckCSP, [32]]").replace("width_multiple: 1.0\n", ""), "silu"),
    "no anchors": (file("[-1, 1, Focus, [32]]").replace("anchors: 3\n", ""), "silu"),
}


@pytest.mark.parametrize("case", RECOGNISED)
def test_a_file_is_recognised_by_what_only_one_program_knows(case):
    text, activation = RECOGNISED[case]
    assert read(text).activation == activation


def test_which_dialects_a_recognised_file_is_in():
    assert names(RECOGNISED["BottleneckCSP2"][0]) == {"scaledyolov4"}
    newer = {"yolor", "yolov7", "yolov9"}  # which have another activation, or none of these modules
    assert names(RECOGNISED["Focus and C3"][0]) - newer == {"oneshot", "yolov5-v4", "yolov5"}
    assert names(RECOGNISED["C3"][0]) - newer == {"oneshot", "yolov5-v4", "yolov5"}
    assert names(RECOGNISED["a Conv with six values"][0]) - newer == {"yolov5"}
    assert names(RECOGNISED["a named argument"][0]) >= {"oneshot"}


@pytest.mark.parametrize("path", sorted(CFG.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_are_ours(path):
    spec = parse(path)
    assert spec == parse(path, dialect="oneshot") and spec.notes == ()
    assert read(dump(spec)).layers == parse_text(dump(spec), "x.yaml", dialect="oneshot").layers


def test_several_dialects_that_differ_are_told_with_what_they_differ_in():
    text = file("[-1, 3, BottleneckCSP, [32]]")
    assert told(text) == [
        "x.yaml: dialects yolov5-v2, yolov5-v3, yolov5-v4, yolov5 fit this file and differ on it; write "
        "`dialect: NAME` into the file, or give --dialect NAME:",
        "x.yaml: yolov5-v2 (yolov5 v2.0 and v3.0): activation leaky, layer 2 is [-1, 3, BottleneckCSP, [32]]",
        "x.yaml: yolov5-v3 (yolov5 v3.1): activation hardswish, "
        "layer 2 is [-1, 3, BottleneckCSP, [32, {concat_act: leaky}]]",
        "x.yaml: yolov5-v4 (yolov5 v4.0 to v6.0): activation silu, "
        "layer 2 is [-1, 3, BottleneckCSP, [32, {concat_act: leaky}]]",
        "x.yaml: yolov5 (yolov5 v6.1 and later): activation silu, layer 2 is [-1, 3, BottleneckCSP, [32]]",
    ]
    for name in YOLOV5:
        assert read(text, name).layers == read(f"{text}dialect: {name}\n").layers


def test_a_file_and_a_command_that_disagree_are_told():
    text = "dialect: yolov5-v3\n" + file("[-1, 1, BottleneckCSP, [32]]")
    assert read(text, "yolov5-v3").activation == "hardswish"
    assert told(text, "yolov5") == [
        "x.yaml:1:10: the file says dialect: yolov5-v3, the command --dialect yolov5; leave one of them out"
    ]


def test_an_unknown_dialect_is_told():
    known = (
        "; known are oneshot, scaledyolov4, yolor, yolov7, yolov9, ultralytics, yolov4-preview, yolov5-v1, yolov5-v2, "
        "yolov5-v3, yolov5-v4, yolov5"
    )
    assert told("dialect: yolo5\n" + file()) == ["x.yaml:1:10: unknown dialect 'yolo5'; did you mean 'yolov5'?"]
    assert told("dialect: [a]\n" + file()) == [f"x.yaml:1:10: unknown dialect ('a',){known}"]
    assert told("dialect: {a: 1}\n" + file()) == [f"x.yaml:1:10: unknown dialect {{'a': 1}}{known}"]
    assert told(file(), "darknet") == [f"--dialect darknet is unknown{known}"]


def test_a_silu_that_nobody_wrote_is_told_where_older_programs_had_another():
    settled = "`activation: NAME` in the file settles it"
    others = "mish to ScaledYOLOv4, leaky to yolov5 v2.0 and v3.0, hardswish to yolov5 v3.1"
    assert read(file("[-1, 1, Bottleneck, [32]]")).notes == (
        f"x.yaml: no `activation:`, so silu; such rows meant {others}. {settled}",
    )
    opened = file("[-1, 1, BottleneckCSP2, [32, {kernel: {choice: [3, 5]}}]]")  # by a user, in a file of ScaledYOLOv4
    assert read(opened).notes == (
        f"x.yaml: no `activation:`, so silu; such rows meant mish to ScaledYOLOv4. {settled}",
    )
    assert read(file("[-1, 1, C3, [32]]")).notes == ()
    assert read(file("[-1, 1, Bottleneck, [32]]", top="activation: silu\n")).notes == ()
    assert read(file("[-1, 1, Bottleneck, [32]]"), "oneshot").notes == ()


# ---- what the rows mean

CONV = {  # six values of a Conv, and what each dialect makes of them
    ("yolov5-v1", "[32, 3, 1, 2, False]"): ((32, 3, 1), {"groups": 2, "act": "identity"}),
    ("yolov5-v1", "[32, 3, 1, 2]"): ((32, 3, 1), {"groups": 2}),
    ("yolov5-v2", "[32, 3, 1, 1]"): ((32, 3, 1, 1), {}),
    ("yolov5-v2", "[32, 3, 1, None, 2, False]"): ((32, 3, 1, None, 2), {"act": "identity"}),
    ("yolov5-v3", "[32, 3, 1, None, 2, True]"): ((32, 3, 1, None, 2), {}),
    ("yolov5-v4", "[32, 3, 1, None, 1, nn.ReLU()]"): ((32, 3, 1, None, 1), {"act": "relu"}),
    ("yolov5", "[32, 3, 1, None, 1, nn.LeakyReLU(0.1)]"): ((32, 3, 1, None, 1), {"act": "leaky"}),
    ("yolov5", "[32, 3, 1, None, 1, 2]"): ((32, 3, 1, None, 1), {"dilation": 2}),
    ("yolov5", "[32, 3, 1, None, 1, 2, False]"): ((32, 3, 1, None, 1), {"dilation": 2, "act": "identity"}),
    ("yolov5", "[32, 3, 1, None, 1, 1, nn.Hardswish()]"): ((32, 3, 1, None, 1), {"dilation": 1, "act": "hardswish"}),
    ("yolov5", "[32, 3, 1, None, 1, False]"): ((32, 3, 1, None, 1), {"act": "identity"}),
    ("yolov5", "[32, [3, 3]]"): ((32, 3), {}),
    ("scaledyolov4", "[32, 3, 1, None, 2, False]"): ((32, 3, 1, None, 2), {"act": "identity"}),
    ("oneshot", "[32, 3, 1, None, 2, {dilation: 2}]"): ((32, 3, 1, None, 2), {"dilation": 2}),
}


@pytest.mark.parametrize(("dialect", "args"), CONV)
def test_a_conv_has_its_arguments_in_the_order_of_its_program(dialect, args):
    understood = row(f"[-1, 1, Conv, {args}]", dialect)
    assert (understood.args, dict(understood.kwargs)) == CONV[dialect, args]
    resolve(read(file(f"[-1, 1, Conv, {args}]"), dialect))


@pytest.mark.parametrize(
    ("dialect", "text", "args", "kwargs"),
    [
        ("yolov5-v1", "Focus, [32, 3]", (32, 3), {}),
        ("yolov5-v2", "Focus, [32, 3, 1, None, 1, False]", (32, 3, 1, None, 1), {"act": "identity"}),
        ("yolov5", "GhostConv, [32, 3, 2, 1, nn.SiLU()]", (32, 3, 2, 1), {"act": "silu"}),
        ("yolov5", "C3Ghost, [32, True, 1, 0.25]", (32, 0.25), {}),
        ("yolov5", "C3TR, [32]", (32,), {}),
        ("yolov5", "SPPF, [32, 5]", (32, 5), {}),
        ("yolov5", "C3, [32, False, 2, 0.25]", (32, False, 2, 0.25), {}),
        ("scaledyolov4", "BottleneckCSP2, [32, False, 2, 0.5]", (32, False, 2), {}),
        ("scaledyolov4", "BottleneckCSP2, [32, {expansion: 0.5}]", (32,), {"expansion": 0.5}),  # by name it is ours
        ("scaledyolov4", "SPPCSP, [32, False, 1, 0.25, [3, 7]]", (32, 0.25, (3, 7)), {}),
        ("scaledyolov4", "SPPCSP, [32]", (32,), {}),
        ("scaledyolov4", "VoVCSP, [32, True]", (32,), {}),
    ],
)
def test_other_modules_have_theirs(dialect, text, args, kwargs):
    understood = row(f"[-1, 1, {text}]", dialect)
    assert (understood.args, dict(understood.kwargs)) == (args, kwargs)
    resolve(read(file(f"[-1, 1, {text}]"), dialect))


def test_a_bottleneck_csp_has_the_activation_of_its_program_behind_its_concatenation():
    """yolov5 wrote LeakyReLU there until v6.0 and SiLU since, whatever a Conv has; ScaledYOLOv4 has Mish in both."""
    text, leaky = "[-1, 1, BottleneckCSP, [32]]", "activation: nn.LeakyReLU(0.1)\n"
    found = {name: dict(row(text, name).kwargs) for name in DIALECTS if name != "ultralytics"}  # has no such Detect
    assert {name for name, kwargs in found.items() if kwargs == {"concat_act": "leaky"}} == {"yolov5-v3", "yolov5-v4"}
    assert all(kwargs == {} for name, kwargs in found.items() if name not in ("yolov5-v3", "yolov5-v4"))
    assert dict(row(text, top=leaky).kwargs) == {"concat_act": "silu"}
    block = resolve(read(file(text), "yolov5-v3")).nodes[2]
    assert (block.arguments["act"], block.arguments["concat_act"]) == ("hardswish", "leaky")


def test_what_a_module_never_reads_is_told():
    ghost = file("[-1, 1, C3Ghost, [32]]", "[-1, 1, C3Ghost, [32, False]]", "[-1, 1, C3Ghost, [32, False]]")
    never = "never reads its"
    assert read(ghost).notes == (
        f"x.yaml layers 3, 4: C3Ghost {never} shortcut, neither in yolov5 v6.1 and later nor here",
    )
    pyramid = read(file("[-1, 3, SPPCSP, [32]]"))
    assert pyramid.notes == (f"x.yaml layer 2: SPPCSP {never} number, neither in ScaledYOLOv4 nor here",)
    assert pyramid.layers[2].repeats == 1


def test_an_activation_that_only_says_yes_is_told():
    text = file("[-1, 1, Conv, [32, 3, 1, None, 1, nn.ReLU()]]", "[-1, 1, SPPCSP, [32]]")
    spec = read(text)
    assert dict(spec.layers[2].kwargs) == {}
    assert spec.notes == (
        "x.yaml:8:5 layer 2 [-1, 1, Conv, [32, 3, 1, None, 1, 'nn.ReLU()']]: for ScaledYOLOv4 any activation here "
        "means its own, so this one is mish",
    )


def test_a_width_that_is_also_the_heads_is_scaled_by_name_and_told():
    """yolov5 knows the output convolution by its width, so an equal one is left unscaled there: 3 * (59 + 5) = 192."""
    text = file("[-1, 1, C3, [192]]", width=0.5, nc=59)
    graph = resolve(read(text))
    assert graph.nodes[2].output.channels == 96
    assert read(text).notes == (
        "x.yaml:8:5 layer 2 [-1, 1, C3, [192]]: c_out 192 is scaled to 96 like any other; yolov5 v6.1 and later would "
        "leave it at 192, because a head for 59 classes has as many outputs (na * (nc + 5))",
    )
    assert read(file("[-1, 1, C3, [192]]", width=1.0, nc=59)).notes == ()  # no scale, no difference
    assert read(file("[-1, 1, C3, [192]]", width=0.5, nc=60)).notes == ()
    assert read(text, "oneshot").notes == ()


def test_a_width_is_a_multiple_of_8_as_in_other_programs():
    spec = read(file("[-1, 1, C3, [30]]"))
    assert spec.layers[2].args == (32,)
    assert spec.notes == (
        "x.yaml:8:5 layer 2 [-1, 1, C3, [30]]: c_out 30 is rounded up to 32, a multiple of 8, as in yolov5 "
        "v6.1 and later",
    )
    assert resolve(read(file("[-1, 1, C3, [30]]", width=2.0))).nodes[2].output.channels == 64
    assert read(file("[-1, 1, C3, [255]]")).layers[2].args == (255,)  # the head's: left alone there as well
    assert row("[-1, 1, C3, [30]]", "oneshot").args == (30,)


PADS = "pads the even kernel 2 by 1, which adds a row and a column to the map"
CONV_OF_V1 = "c_out, kernel, stride, groups, act"
OUTPUT = "[na * (nc + 5), 1, 1]"


@pytest.mark.parametrize(
    ("dialect", "text", "said"),
    [
        ("yolov5", "Conv, [32, 2, 2]", f"yolov5 v6.1 and later {PADS}; write its padding"),
        ("yolov5", "GhostConv, [32, 2]", f"yolov5 v6.1 and later {PADS}"),
        ("yolov5-v4", "Conv, [32, 3, 1, None, 1, 2]", "act is True, False or an activation; got 2"),
        ("yolov5-v1", "Conv, [32, 3, 1, 1, True, 1]", f"Conv of yolov5 v1.0 takes {CONV_OF_V1}; got 6 values"),
        ("yolov5", "Conv, [32, 3, {kernel: 3}]", "kernel is given by its position and by name"),
        ("yolov5", "nn.Conv2d, [64, 1, 1]", f"nn.Conv2d is read as an output row before Detect only, {OUTPUT}"),
    ],
)
def test_what_a_dialect_cannot_mean_is_told(dialect, text, said):
    assert f"x.yaml:8:5 layer 2 [-1, 1, {text}]: {said}" in told(file(f"[-1, 1, {text}]"), dialect)


# ---- text in the place of values


def test_the_grammar_of_text_is_closed():
    act = {"nn.ReLU()": "relu", "nn.LeakyReLU(0.1)": "leaky", "nn.Mish()": "mish", "nn.SiLU()": "silu"}
    act |= {"nn.Hardswish()": "hardswish", "nn.Sigmoid()": "sigmoid", "nn.Identity()": "identity"}
    act |= {"'nn.LeakyReLU(0.1, inplace=True)'": "leaky", "nn.ReLU(inplace=True)": "relu", "'nn.SiLU( )'": "silu"}
    for text, name in act.items():
        assert read(file("[-1, 1, C3, [32]]", top=f"activation: {text}\n")).activation == name
        assert row(f"[-1, 1, Conv, [32, 3, 1, None, 1, {text}]]", "yolov5").kwargs["act"] == name
    upsample = "[-1, 1, nn.Upsample, ['None', 2, 'nearest']]"
    assert row(upsample, "yolov5").args == (None, 2, "nearest")
    assert row("[-1, 1, C3, [32, 'False']]", "yolov5").args == (32, False)


CODE = [
    "__import__('os').system('touch {marker}')",
    "open('{marker}', 'w')",
    "[open('{marker}', 'w'), nn.SiLU()][1]",
    "nn.LeakyReLU(open('{marker}', 'w').write('1') * 0.1)",
    "exec('import pathlib; pathlib.Path(\"{marker}\").touch()')",
]


@pytest.mark.parametrize("dialect", [None, *DIALECTS])
@pytest.mark.parametrize("code", CODE)
def test_text_is_never_run(code, dialect, tmp_path):
    marker = tmp_path / "ran"
    quoted = '"' + code.format(marker=marker).replace('"', '\\"') + '"'
    rows = [f"[-1, 1, Conv, [{quoted}]]", f"[-1, 1, Conv, [32, 3, 1, None, 1, {quoted}]]", f"[-1, 1, {quoted}, [32]]"]
    for text in [*(file(line) for line in rows), file("[-1, 1, C3, [32]]", top=f"activation: {quoted}\n")]:
        assert told(text, dialect)
    assert not marker.exists()


# ---- output convolutions as rows

OUT = "[-1, 1, nn.Conv2d, [na * (nc + 5), 1, 1]]"
OLD_HEAD = f"""\
nc: 4
depth_multiple: 1.0
width_multiple: 0.5
anchors:
  - [90, 90, 95, 95]
  - [10, 10, 15, 15]
backbone:
  - [-1, 1, Focus, [16, 3]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [-1, 1, Conv, [32, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 1], 1, Concat, [1]]
  - [-1, 1, BottleneckCSP, [32, False]]
  - {OUT}
  - [-2, 1, Conv, [32, 3, 2]]
  - [[-1, 3], 1, Concat, [1]]
  - [-1, 2, BottleneckCSP, [64, False]]
  - {OUT}
  - [[], 1, Detect, [nc, anchors]]
"""
SAME = """\
nc: 4
activation: leaky
width_multiple: 0.5
anchors:
  - [10, 10, 15, 15]
  - [90, 90, 95, 95]
backbone:
  - [-1, 1, Focus, [16, 3]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [-1, 1, Conv, [32, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 1], 1, Concat, [1]]
  - [-1, 1, BottleneckCSP, [32, False]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [[-1, 3], 1, Concat, [1]]
  - [-1, 2, BottleneckCSP, [64, False]]
  - [[6, 9], 1, Detect, [nc, anchors]]
"""


def rows_of(text: str) -> tuple:
    graph = resolve(read(text))
    rows = tuple((node.op.name, node.sources, dict(node.arguments), node.output) for node in graph.nodes)
    return rows, graph.spec.anchors, graph.spec.activation


def test_output_rows_become_part_of_the_head():
    assert rows_of(OLD_HEAD) == rows_of(SAME)
    assert read(OLD_HEAD).notes == (
        "x.yaml: the nn.Conv2d rows 7, 11 went into Detect, which has such convolutions itself; the rows behind them "
        "moved up, and the levels of head and anchors go by ascending stride",
    )


def test_the_number_of_outputs_may_be_written_as_a_number():
    assert rows_of(OLD_HEAD.replace("na * (nc + 5)", "18")) == rows_of(SAME)


def test_a_head_may_name_its_output_rows_in_its_own_order():
    swapped = OLD_HEAD.replace("[[], 1", "[[7, 11], 1")
    lines = swapped.splitlines()
    lines[4], lines[5] = lines[5], lines[4]  # anchors stand in the order of the head's sources
    assert rows_of("\n".join(lines)) == rows_of(SAME)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[-2, 1, Conv", "[-1, 1, Conv", "reads row 7, an output row, which only Detect may read"),
        ("[[], 1, Detect", "[[7], 1, Detect", "behind nn.Conv2d rows the last row is a Detect that reads them all"),
        ("[[-1, 3], 1, Concat", "[[-1, 30], 1, Concat", "reads from 30, which is no row before it"),
    ],
)
def test_output_rows_that_cannot_move_are_told(old, new, said):
    assert old in OLD_HEAD
    assert any(line.endswith(said) for line in told(OLD_HEAD.replace(old, new)))


def test_every_output_row_needs_its_anchors():
    fewer = OLD_HEAD.replace("  - [90, 90, 95, 95]\n", "")
    assert told(fewer) == ["x.yaml: anchors are given for 1 levels, output rows are 2"]


# ---- any file at all

WORDS = sorted(set().union(*(dialect.words for dialect in DIALECTS.values())) | {"BottleneckCSP2", "Covn"})
VALUES = st.one_of(
    st.integers(-3, 600),
    st.sampled_from(
        ["None", "True", "False", "nc", "anchors", "na * (nc + 5)", "nn.ReLU()", "nearest", "[1, 1]", "0.5"]
    ),
    st.sampled_from(["[]", "[0, 1, 0, 1]", "'text'", "{choice: [1, 3]}", "nn.Conv2d", "[[1]]", "10000000000000000"]),
).map(str)
ARGS = st.lists(VALUES, max_size=7).map(lambda values: f"[{', '.join(values)}]")
SOURCES = st.one_of(st.integers(-4, 8).map(str), st.lists(st.integers(-4, 8), max_size=3).map(str), st.just("p3"))
ROWS = st.tuples(SOURCES, st.integers(1, 3), st.sampled_from(WORDS), ARGS).map(
    lambda r: f"[{r[0]}, {r[1]}, {r[2]}, {r[3]}]"
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ROWS, max_size=4), ROWS, st.sampled_from([None, *DIALECTS]), st.sampled_from([0.5, 1.0]))
def test_whatever_stands_in_a_file_is_read_or_told(rows, head, dialect, width):
    try:
        resolve(read(file(*rows, head=head, width=width), dialect))
    except Fault as fault:
        assert all(line.startswith(("x.yaml", "--dialect")) for line in fault.lines)
