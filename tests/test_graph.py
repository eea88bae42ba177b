"""The meaning of a model file: counts of known networks, what rows that do not fit are told, scaling and freezing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.structures import Fault
from models.__main__ import main
from models.cost import network_costs, totals
from models.graph import combinations, make_divisible, normalize, resolve, scale_repeats
from models.network import SUPERNETS, Network, build
from models.parse import SHORTHANDS, parse, parse_text
from models.registry import OPS, Shape
from models.spec import Choice, ModelSpec, Scaling

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted((ROOT / "cfg" / "models").glob("*.yaml"))

GOOD = """\
nc: 3
activation: mish
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Conv, [16, 3, 1]]
  - [2, 1, Detect, [nc, anchors]]
"""
ROW_0, ROW_2 = "[-1, 1, Conv, [16, 3, 2]]", "[-1, 1, Conv, [16, 3, 1]]"
DETECT = "[2, 1, Detect, [nc, anchors]]"


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def told(text: str) -> list[str]:
    """All that is told about a file whose text is in order."""
    spec = parse_text(text, "bad.yaml")
    with pytest.raises(Fault) as caught:
        resolve(spec)
    return list(caught.value.lines)


# ---- known networks


def test_yolov4_p5_has_its_published_size():
    costs = network_costs(resolve(parse(ROOT / "cfg/models/yolov4-p5.yaml")), 640)
    params, macs = totals(costs)
    assert params == 70_834_012
    assert round(macs / 1e9, 3) == 83.327


def test_the_search_space_of_yolov4_p5_has_the_size_of_the_seed_row_by_row():
    graph = resolve(parse(ROOT / "cfg/models/yolov4-p5-search.yaml"))
    params = [cost.params for cost in network_costs(graph, 32, "independent")]
    backbone = [928, 18560, 19904, 73984, 161152, 295424, 2614016, 1180672, 10438144, 4720640, 20728832]
    down = [7610368, 131584, 0, 131584, 0, 23230464, 33024, 0, 33024, 0, 5815296, 295424]
    up = [295424, 0, 23230464, 1180672, 1180672, 0, 92860416, 4720640, 610300]
    assert params == backbone + down + up
    assert sum(params) == 201_611_612


@pytest.mark.parametrize(
    "command",
    [
        "yolov4-p5.yaml",
        "yolov4-p5-search.yaml --supernet independent",
        "tiny-search.yaml",
    ],
)
def test_show_prints_the_table_it_always_printed(command, capsys, monkeypatch):
    """After a change that is meant: ``python -m models show cfg/models/COMMAND > tests/golden/NAME.txt``."""
    monkeypatch.chdir(ROOT)
    assert main(["show", *f"cfg/models/{command}".split()]) == 0
    name = command.replace(".yaml", "").replace(" --", "-").replace(" ", "-")
    assert capsys.readouterr().out == (GOLDEN / f"{name}.txt").read_text()


def test_show_wants_whole_cells(capsys):
    path = ROOT / "cfg/models/yolov5n.yaml"
    assert main(["show", str(path), "--imgsz", "100"]) == 2
    assert capsys.readouterr().err == f"--imgsz 100: {path} needs a multiple of its largest stride 32\n"


def test_the_head_reads_three_strides():
    node = resolve(parse(ROOT / "cfg/models/yolov4-p5.yaml")).nodes[-1]
    assert node.inputs == (Shape(256, 8), Shape(512, 16), Shape(1024, 32))
    assert node.sources == (22, 26, 30)


# ---- rows that do not fit

CONV, CSP, POOLS = (str(OPS[name]) for name in ("Conv", "BottleneckCSP", "SPP"))  # names with their arguments
FITS = "an odd kernel with padding left out does"
HERE = "(row 1 Conv gives 16 channels at stride 4)"

# what row 2 is changed into, and what is told about it
MISTAKES = {
    "unknown module": ("[-1, 1, Covn, [16]]", "unknown module 'Covn'; did you mean 'Conv'?"),
    "module in small letters": ("[-1, 1, conv, [16]]", "unknown module 'conv'; did you mean 'Conv'?"),
    "unknown shorthand": (
        "[-1, 1, MBottleneckCSP, [16]]",
        "unknown module 'MBottleneckCSP'; did you mean 'MBottleneckCSP2'?",
    ),
    "unknown argument": (
        "[-1, 1, Conv, [16, {kernl: 3}]]",
        f"{CONV} has no argument 'kernl'; did you mean 'kernel'?",
    ),
    "missing argument": ("[-1, 1, Conv, []]", f"{CONV}: missing a required argument: 'c_out'"),
    "argument too many": ("[-1, 1, Conv, [16, 1, 1, None, 1, mish]]", f"{CONV}: too many positional arguments"),
    "argument twice": ("[-1, 1, Conv, [16, 3, {kernel: 3}]]", f"{CONV}: multiple values for argument 'kernel'"),
    "channels that the graph knows": ("[-1, 1, Conv, [16, {c_in: 8}]]", f"{CONV} has no argument 'c_in'"),
    "forward": ("[3, 1, Conv, [16]]", "reads from 3, but only rows 0 to 1 come before it"),
    "from itself": ("[2, 1, Conv, [16]]", "reads from 2, but only rows 0 to 1 come before it"),
    "too far back": ("[-3, 1, Conv, [16]]", "reads from -3, but only rows 0 to 1 come before it"),
    "from an unknown name": ("[p4, 1, Conv, [16]]", "no row is named 'p4'"),
    "from nowhere": ("[[], 1, Conv, [16]]", "reads from no row"),
    "two sources into Conv": (
        "[[-1, 0], 1, Conv, [16]]",
        "Conv takes one source, got 2 (row 1 Conv gives 16 channels at stride 4; "
        "row 0 Conv gives 16 channels at stride 2); Concat joins several",
    ),
    "Concat of two strides": (
        "[[-1, 0], 1, Concat, [1]]",
        "the sources have different strides [2, 4]; all must be at one "
        "(row 1 Conv gives 16 channels at stride 4; row 0 Conv gives 16 channels at stride 2)",
    ),
    "Concat along rows": ("[[-1, 1], 1, Concat, [2]]", "Concat(dimension=1): dimension=2 should be 1"),
    "repeated Concat": (
        "[-1, 2, Concat, [1]]",
        "Concat reads all its sources at once, so `number` is 1; got 2",
    ),
    "repeated change of channels": (
        "[-1, 2, Conv, [32]]",
        "Conv is repeated 2 times but turns 16 channels at stride 4 into 32 channels at stride 4; "
        "only a module that keeps its shape can be repeated, so write two rows: one that changes it, one that repeats",
    ),
    "perhaps repeated change of stride": (
        "[-1, {choice: [1, 3]}, Conv, [16, 3, 2]]",
        "Conv is repeated 3 times but turns 16 channels at stride 4 into 16 channels at stride 8; "
        "only a module that keeps its shape can be repeated, so write two rows: one that changes it, one that repeats",
    ),
    "kernel as text": ("[-1, 1, Conv, [16, three]]", f"{CONV}: kernel=three should be a whole number"),
    "kernel in quotes": (
        "[-1, 1, Conv, [16, '3']]",
        f"{CONV}: kernel='3' should be a whole number; write 3 without quotes",
    ),
    "kernel as fraction": ("[-1, 1, Conv, [16, 3.0]]", f"{CONV}: kernel=3.0 should be a whole number"),
    "kernel as truth": ("[-1, 1, Conv, [16, True]]", f"{CONV}: kernel=True should be a whole number"),
    "no channels": ("[-1, 1, Conv, [0]]", f"{CONV}: c_out=0 should be greater than or equal to 1"),
    "even kernel": (
        "[-1, 1, Conv, [16, 2]]",
        f"kernel 2, stride 1 and padding 0 do not keep the map's size; {FITS} {HERE}",
    ),
    "even option": (
        "[-1, 1, Conv, [16, {kernel: {choice: [3, 4]}}]]",
        f"kernel 4, stride 1 and padding 1 do not keep the map's size; {FITS} {HERE}",
    ),
    "even kernel inside a block": (
        "[-1, 1, BottleneckCSP, [16, {kernel: 4}]]",
        f"kernel 4, stride 1 and padding 1 do not keep the map's size; {FITS} {HERE}",
    ),
    "padding too small": (
        "[-1, 1, Conv, [16, 5, 2, 0]]",
        f"kernel 5, stride 2 and padding 0 do not divide the map's size by 2; {FITS} {HERE}",
    ),
    "option as text": ("[-1, 1, Conv, [16, {choice: [3, five]}]]", f"{CONV}: kernel=five should be a whole number"),
    "option as word for a number": (
        "[-1, 1, Conv, [{choice: [16, nc]}]]",
        f"{CONV}: c_out=nc should be a whole number",
    ),
    "options of two widths": (
        "[-1, 1, Conv, [{choice: [16, 32]}]]",
        "options have to give one shape, but {c_out: 16} gives 16 channels at stride 4 and {c_out: 32} 32 channels "
        f"at stride 4 {HERE}",
    ),
    "options of two strides": (
        "[-1, 1, nn.Upsample, [None, {choice: [1, 2]}]]",
        "options have to give one shape, but {scale_factor: 1} gives 16 channels at stride 4 and {scale_factor: 2} "
        f"16 channels at stride 2 {HERE}",
    ),
    "groups of the source": (
        "[-1, 1, Conv, [18, 3, 1, None, 3]]",
        f"groups 3 does not divide 16 channels; 2 does {HERE}",
    ),
    "groups of the output": (
        "[-1, 1, Conv, [18, 3, 1, None, 8]]",
        f"groups 8 does not divide 18 channels; 2 does {HERE}",
    ),
    "one option of groups": (
        "[-1, 1, Conv, [16, 3, 1, None, {choice: [2, 3]}]]",
        f"groups 3 does not divide 16 channels; 2 does {HERE}",
    ),
    "groups of the hidden channels": (
        "[-1, 1, BottleneckCSP, [24, True, 8]]",
        f"groups 8 does not divide 12 channels; 6 does {HERE}",
    ),
    "no hidden channel": ("[-1, 1, Bottleneck, [1]]", f"expansion 0.5 of 1 leaves no channel {HERE}"),
    "no hidden channel in a pyramid": ("[-1, 1, SPPCSP, [16, 0.01]]", f"expansion 0.01 of 32 leaves no channel {HERE}"),
    "unknown activation": ("[-1, 1, Conv, [16, {act: mihs}]]", f"{CONV}: act=mihs is unknown; did you mean 'mish'?"),
    "activation like none": (
        "[-1, 1, Conv, [16, {act: xyz}]]",
        f"{CONV}: act=xyz is unknown; known are relu, relu6, leaky, mish, silu, hardswish, sigmoid, identity",
    ),
    "activation as number": ("[-1, 1, Conv, [16, {act: 3}]]", f"{CONV}: act=3 should be a word"),
    "truth as word": ("[-1, 1, BottleneckCSP, [16, yes]]", f"{CSP}: shortcut=yes should be True or False"),
    "pools as number": (
        "[-1, 1, SPP, [16, 5]]",
        f"{POOLS}: pools=5 should be a list",
    ),
    "even pool": (
        "[-1, 1, SPP, [16, [5, 8]]]",
        f"{POOLS}: pools=[5, 8] should be a list of odd numbers",
    ),
    "unknown interpolation": (
        "[-1, 1, nn.Upsample, [None, 2, linear]]",
        "nn.Upsample(size=None, scale_factor=2, mode=nearest): mode=linear should be 'nearest' or 'bilinear'",
    ),
    "finer than the image": (
        "[-1, 1, nn.Upsample, [None, 8]]",
        f"enlarging 8 times does not divide the source's stride 4 {HERE}",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_row_that_does_not_fit_is_told_with_its_place_and_a_way_out(mistake):
    row, problem = MISTAKES[mistake]
    assert told(changed(ROW_2, row)) == [f"bad.yaml:8:5 layer 2 {row}: {problem}"]


def test_a_row_has_a_limit_of_combinations_and_a_message_of_its_own_length():
    row = f"[-1, 1, Conv, [16, {{choice: {list(range(1, 64))}}}, 1, None, {{choice: {list(range(1, 201))}}}]]"
    problem = f"its choices have more than 10,000 combinations {HERE}"
    assert told(changed(ROW_2, row)) == [f"bad.yaml:8:5 layer 2 {row[:300]}...: {problem}"]


def test_an_unknown_module_with_nothing_near_gets_the_list():
    (line,) = told(changed(ROW_2, "[-1, 1, Xyz, [16]]"))
    ops = ", ".join([*OPS, *SHORTHANDS])
    said = f"unknown module 'Xyz'; known are {ops}; --ops FILE brings your own"
    assert line == f"bad.yaml:8:5 layer 2 [-1, 1, Xyz, [16]]: {said}"


def test_a_name_is_known_before_its_row_comes_but_cannot_be_read():
    text = changed(ROW_0, "[p3, 1, Conv, [16, 3, 2]]").replace(
        ROW_2, "{name: p3, from: p30, number: 1, op: Conv, args: [16]}"
    )
    assert told(text) == [
        "bad.yaml:5:5 layer 0 [p3, 1, Conv, [16, 3, 2]]: reads from p3, but only -1, the image, comes before it",
        "bad.yaml:8:5 layer 2 {name: p3, from: p30, number: 1, op: Conv, args: [16]}: no row is named 'p30'",
    ]


def test_an_unknown_default_activation_is_told_once_where_it_stands():
    assert told(changed("mish", "mihs")) == ["bad.yaml:2:13: activation 'mihs' is unknown; did you mean 'mish'?"]


def test_a_model_ends_in_its_head():
    assert told(changed(DETECT, "[-1, 1, Conv, [8]]")) == [
        "bad.yaml:9:5 layer 3 [-1, 1, Conv, [8]]: a model's last row is its head, "
        "Classify, Detect, DFLDetect, DualDDetect, IAuxDetect, "
        "IDetect, SegHead, SSDHead, TripleDDetect, v10Detect or YOLOXHead; here it is Conv"
    ]
    early = [f"bad.yaml:9:5 layer 3 {DETECT}: a head is a model's last row; rows behind this one: 1"]
    assert told(GOOD + "  - [-1, 1, Conv, [8]]\n") == early  # and no word about what the row reads
    assert told(GOOD + "  - [0, 1, Conv, [8]]\n") == told(GOOD + f"  - {DETECT}\n") == early
    assert told(changed(DETECT, DETECT.replace("1, Detect", "2, Detect"))) == [
        f"bad.yaml:9:5 layer 3 {DETECT.replace('1, Detect', '2, Detect')}: "
        "Detect reads all its sources at once, so `number` is 1; got 2"
    ]


def test_the_head_takes_classes_and_anchors_from_the_top_of_the_file():
    for wrong in ("20, anchors", "-6, anchors", "{choice: [2, 3]}, anchors"):
        row = f"[2, 1, Detect, [{wrong}]]"
        number = wrong.removesuffix(", anchors")
        assert told(changed(DETECT, row)) == [
            f"bad.yaml:9:5 layer 3 {row}: num_classes stands at the top of the file; write nc here, not {number}"
        ]
    for wrong in ("3", "anchor", "[[1, 2, 3]]", "{choice: [2, 3]}"):
        row = f"[2, 1, Detect, [nc, {wrong}]]"
        assert told(changed(DETECT, row)) == [
            f"bad.yaml:9:5 layer 3 {row}: anchors stands at the top of the file; write anchors here, not {wrong}"
        ]
    assert resolve(parse_text(changed("[nc, anchors]", "[3, 2]")))  # the file's own numbers are no mistake


def test_anchors_fit_the_levels_that_the_head_reads():
    text = changed("anchors: 2", "anchors: [[1, 2], [3, 4], [5, 6]]")
    assert told(text) == [
        f"bad.yaml:9:5 layer 3 {DETECT}: anchors are given for 3 levels, but the head reads 1 "
        "(row 2 Conv gives 16 channels at stride 4)"
    ]


def test_all_rows_that_do_not_fit_are_told_but_not_what_follows_from_them():
    text = (
        GOOD.replace(ROW_0, "[-1, 1, Covn, [16]]", 1)  # the rows after it have sources of unknown shape
        .replace(ROW_2, "[0, 1, Conv, [16, {kernl: 3, act: mihs}]]\n  - [9, 1, Conv, [true, 0]]")
        .replace("activation: mish", "activation: mihs")
    )
    assert told(text) == [
        "bad.yaml:2:13: activation 'mihs' is unknown; did you mean 'mish'?",
        "bad.yaml:5:5 layer 0 [-1, 1, Covn, [16]]: unknown module 'Covn'; did you mean 'Conv'?",
        "bad.yaml:8:5 layer 2 [0, 1, Conv, [16, {kernl: 3, act: mihs}]]: "
        f"{CONV} has no argument 'kernl'; did you mean 'kernel'?",
        f"bad.yaml:9:5 layer 3 [9, 1, Conv, [True, 0]]: {CONV}: c_out=True should be a whole number",
        f"bad.yaml:9:5 layer 3 [9, 1, Conv, [True, 0]]: {CONV}: kernel=0 should be greater than or equal to 1",
        "bad.yaml:9:5 layer 3 [9, 1, Conv, [True, 0]]: reads from 9, but only rows 0 to 2 come before it",
    ]


# ---- what a supernet cannot hold


def built(row: str, supernet: str | None) -> str:
    """What is told when a model with this row is built."""
    with pytest.raises(Fault) as caught:
        Network(resolve(parse_text(changed(ROW_2, row), "bad.yaml")), supernet)
    return str(caught.value)


def test_an_open_choice_cannot_be_trained():
    assert built("[-1, 1, Conv, [16, {choice: [3, 5]}]]", None) == (
        "bad.yaml:8:5 layer 2: open choices 2.kernel {3|5}; search.py picks them, a network to train has none"
    )


def test_what_cannot_share_weights_is_told():
    assert built("[-1, 1, Conv, [16, 3, 1, None, {choice: [1, 2]}]]", "shared") == (
        "bad.yaml:8:5 layer 2: Conv cannot share its weights over a choice in groups; "
        "--supernet independent can hold it"
    )
    assert built("[-1, 1, Conv, [16, {choice: [3, 4]}, 2, 1]]", "shared") == (
        "bad.yaml:8:5 layer 2: kernel is a choice {3|4}, so padding must be left out; got 1"
    )
    assert built("[-1, 1, Conv, [16, {choice: [2, 4]}, 2]]", "shared") == (
        "bad.yaml:8:5 layer 2: kernel sizes that share one centre are odd, got [2, 4]"
    )


def test_too_many_blocks_in_a_row_are_told():
    row = "[-1, {choice: [1, 2, 3]}, MBottleneckCSP2, [16]]"
    assert built(row, "independent") == (
        "bad.yaml:8:5 layer 2: 2.kernel {3|5}, 2.act {relu|leaky|mish}, 2.number {1|2|3} make 18 whole blocks, "
        "an independent supernet holds at most 12 in a row; --supernet shared holds any number"
    )


# ---- scaling and freezing


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(64 * 0.25, 16), (100 * 0.25, 32), (1, 8), (8, 8), (8.1, 16), (255, 256), (1024 * 0.75, 768), (80 * 1.25, 104)],
)
def test_widths_are_rounded_up_to_eights(channels, expected):
    assert make_divisible(channels) == expected


@pytest.mark.parametrize(
    ("number", "depth", "expected"),
    [
        (9, 0.5, 4),
        (3, 0.5, 2),
        (5, 0.5, 2),
        (7, 0.5, 4),
        (15, 0.33, 5),
        (7, 0.33, 2),
        (2, 0.1, 1),
        (1, 3.0, 1),
        (3, 1.33, 4),
    ],
)
def test_halves_of_repeats_go_to_the_even_number(number, depth, expected):
    """As in every YOLO: Python's round, so 4.5 is 4 and 1.5 is 2."""
    assert scale_repeats(number, depth) == expected


def scaled(row: str, depth: float = 0.5, width: float = 0.25) -> ModelSpec:
    top = f"nc: 3\ndepth_multiple: {depth}\nwidth_multiple: {width}"
    return normalize(parse_text(changed(ROW_2, row).replace("nc: 3", top)))


def test_scaling_goes_by_name_and_leaves_the_rest():
    layer = scaled("[-1, 9, BottleneckCSP, [100, True, 16, 2.0, {kernel: 5}]]").layers[2]
    assert (layer.repeats, layer.args, layer.kwargs) == (4, (32, True, 16, 2.0), {"kernel": 5})
    assert scaled("[-1, 1, Conv, [nc, 32, 32, 1]]").layers[2].args == ("nc", 32, 32, 1)  # words stand for final values
    assert scaled("[-1, 1, Conv, [100]]", width=1.0).layers[2].args == (100,)  # not even rounded


def test_options_are_never_scaled():
    row = "[-1, {choice: [3, 9]}, Conv, [{choice: [64, 100]}, {kernel: {choice: [3, 5]}}]]"
    spec = scaled(row)
    assert [(choice.name, choice.options) for choice in spec.choices] == [
        ("2.c_out", (64, 100)),
        ("2.kernel", (3, 5)),
        ("2.number", (3, 9)),
    ]
    frozen = spec.freeze({"2.c_out": 100, "2.kernel": 5, "2.number": 9}).layers[2]
    assert (frozen.repeats, frozen.args, dict(frozen.kwargs)) == (9, (), {"c_out": 100, "kernel": 5})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_normalized_file_means_the_same_at_depth_and_width_1(path):
    spec = parse(path)
    normal = normalize(spec)
    assert normal.scaling == Scaling(1.0, 1.0)
    assert normalize(normal) == normal
    written, final = resolve(spec), resolve(normal)
    assert [(n.op.name, n.arguments, n.repeats, n.inputs, n.output) for n in written.nodes] == [
        (n.op.name, n.arguments, n.repeats, n.inputs, n.output) for n in final.nodes
    ]


@settings(max_examples=25)
@given(st.data())
def test_freezing_replaces_choices_and_nothing_else(data):
    normal = normalize(parse(ROOT / "cfg/models/tiny-search.yaml"))
    picks = {choice.name: data.draw(st.sampled_from(choice.options)) for choice in normal.choices}
    frozen = normal.freeze(picks)
    assert frozen.choices == () and frozen.scaling == Scaling()
    for node, layer in zip(resolve(frozen).nodes, normal.layers, strict=True):
        for name, value in node.arguments.items():
            assert value == picks.get(f"{node.index}.{name}", value)
        assert node.repeats == picks.get(f"{node.index}.number", layer.repeats)


def test_a_file_that_is_still_to_be_scaled_is_not_frozen():
    spec = parse(ROOT / "cfg/models/tiny-search.yaml")
    with pytest.raises(AssertionError, match="normalize"):
        spec.freeze({choice.name: choice.options[0] for choice in spec.choices})


def test_combinations_are_all_different_and_the_last_choice_moves_fastest():
    found = combinations([Choice("a", (1, 2)), Choice("b", ("x", "y"))])
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y")]
    assert combinations([]) == [{}]


# ---- the forward loop


def test_a_row_is_freed_after_its_last_use():
    network = build(parse_text(GOOD)).eval()
    held, _ = network.run(range(2), {-1: torch.zeros(1, 3, 32, 32)})
    assert set(held) == {1}
    held, _ = network.run(range(2, 4), held)
    assert set(held) == {3}


def test_a_supernet_is_costed_as_it_is_active():
    graph = resolve(parse_text(changed(ROW_2, "[-1, 1, MBottleneckCSP2, [16]]")))
    for kind in SUPERNETS:
        params, macs = totals(network_costs(graph, 32, kind))
        plain = [
            totals(network_costs(resolve(graph.spec.freeze(picks)), 32)) for picks in combinations(graph.spec.choices)
        ]
        assert macs in [macs for _, macs in plain]
        assert params > max(params for params, _ in plain)
