"""Files of ultralytics, yolov7, yolov9 and yolor mean what their programs make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.config import DataSpec
from data.structures import Fault
from engine.config import TrainConfig, checked, train_config
from engine.prepare import describe
from models.convert import convert
from models.dialects import DIALECTS, REFUSED
from models.graph import load_graph, resolve
from models.parse import parse, parse_text
from models.spec import ModelSpec, Scaling, flow
from search.config import SearchConfig

SCALES = "scales:\n  n: [0.5, 0.25, 1024]\n  m: [0.5, 1.0, 48]\n  l: [1.0, 1.0, 48]\n"


def text(*rows: str, head: str = "[[0, 1], 1, Detect, [nc]]", top: str = SCALES) -> str:
    stem = ["[-1, 1, Conv, [32, 3, 2]]", "[-1, 1, Conv, [64, 3, 2]]"]
    listed = "".join(f"  - {row}\n" for row in [*stem, *rows])
    return f"nc: 5\n{top}backbone:\n{listed}head:\n  - {head}\n"


def multiples(rows: str, head: str) -> str:
    """As the files of yolov7, yolov9 and yolor begin."""
    top = "depth_multiple: 1.0\nwidth_multiple: 1.0\nanchors: 3\n"
    return text(*([rows] if rows else []), head=head, top=top)


def row(spec: ModelSpec, index: int = 2) -> str:
    """A row without where it reads from and how often it stands there."""
    layer = spec.layers[index]
    return flow([layer.op, [*layer.args, dict(layer.kwargs)] if layer.kwargs else list(layer.args)])


def told(source: str, **given: str) -> str:
    with pytest.raises(Fault) as fault:
        parse_text(source, "x.yaml", **given)
    return "\n".join(fault.value.lines)


# ---- ultralytics: scales


def test_a_scale_is_asked_for_or_stands_in_the_file_or_its_name(tmp_path: Path):
    source = text()
    assert parse_text(source, "x.yaml", "yolov8", scale="n").scaling == Scaling(0.5, 0.25)
    assert parse_text(source, "x.yaml", "yolov8", scale="n").name == "yolov8n"
    assert parse_text(f"scale: l\n{source}", "x.yaml").scaling == Scaling(1.0, 1.0)
    for name in ("yolov8m.yaml", "yolo11m.yaml", "yolov8m-p6.yaml"):
        (tmp_path / name).write_text(source)
        spec = parse(tmp_path / name)
        assert spec.scaling == Scaling(0.5, 1.0) and spec.name == Path(name).stem
    assert parse(tmp_path / "yolov8m.yaml", scale="n").scaling == Scaling(0.5, 0.25)
    only = text(top="scales:\n  s: [0.33, 0.5, 1024]\n")
    assert parse_text(only, "x.yaml").scaling == Scaling(0.33, 0.5)


def test_a_scale_that_is_not_known_is_told(tmp_path: Path):
    assert told(text()) == (
        "x.yaml:2:1: the file has the scales n, m, l; say which one: `scale: n` in the file, a copy of it that is "
        "named so, or --scale n"
    )
    assert told(text(), scale="q") == "--scale q is none of this file's scales: n, m, l"
    assert told(f"scale: q\n{text()}") == "x.yaml:1:1: scale q is none of this file's scales: n, m, l"
    assert told(text(top="scales: [1]\n")) == (
        "x.yaml:2:1: scales is a mapping, a name and [depth, width, most channels] each, {n: [0.33, 0.25, 1024]}; "
        "got [1]"
    )
    assert told(text(top=""), scale="n") == "--scale n: x.yaml has no `scales:`"
    (tmp_path / "yolov8.yaml").write_text(text())
    with pytest.raises(Fault, match=r"yolov8s\.yaml: no such model file; .*yolov8\.yaml with --scale s\?"):
        parse(tmp_path / "yolov8s.yaml")


@pytest.mark.parametrize("model", [TrainConfig, SearchConfig])
def test_a_run_takes_a_scale_by_its_name_and_an_augmentation_by_its_number(model, tmp_path: Path):
    (tmp_path / "yolov8.yaml").write_text(text())
    (tmp_path / "yolov8m.yaml").write_text(text())
    data = DataSpec(tmp_path / "data.yaml", tuple("abcde"), "yolo", tmp_path)

    def described(name: str, **given: str) -> ModelSpec:
        config = checked(model, {"cfg": tmp_path / name, **given}, "--")
        assert config.scale == float(given["scale"] if given.get("scale", "s").startswith("0") else 0.5)
        return describe(config, data, None, [], lambda line: None)

    for name, given, scale in (
        ("yolov8.yaml", {"scale": "n"}, "n"),
        ("yolov8.yaml", {"cfg_scale": "l", "scale": "0.3"}, "l"),
        ("yolov8m.yaml", {"scale": "0.2"}, "m"),
        ("yolov8m.yaml", {"scale": "n"}, "n"),
    ):
        assert described(name, **given) == load_graph(tmp_path / name, scale=scale).spec
    widths = {described("yolov8.yaml", scale=scale).layers[0].args[0] for scale in "nl"}
    assert widths == {8, 32}
    for given, line in (
        ({"scale": "q"}, "--scale q is none of this file's scales: n, m, l"),
        ({}, f"{tmp_path}/yolov8.yaml:2:1: the file has the scales n, m, l; say which one: `scale: n` in the file, "),
        ({"scale": "1.5"}, "--scale: input should be less than or equal to 0.9, got '1.5'"),
        ({"scale": "nan"}, "--scale: input should be a finite number, got 'nan'"),
    ):
        with pytest.raises(Fault) as fault:
            described("yolov8.yaml", **given)
        assert str(fault.value).startswith(line)


def test_a_scale_without_a_file_is_told(tmp_path: Path):
    config = train_config({"weights": "a.pt", "scale": "s"})
    with pytest.raises(Fault, match="--scale s: says which size of a model YAML; give that as --cfg, or a number"):
        describe(config, DataSpec(tmp_path, ("a",), "yolo", tmp_path), object(), [], lambda line: None)


def test_scales_are_a_key_of_ultralytics_alone():
    assert told(text(), dialect="oneshot") == (
        "x.yaml:2:1: scales is a key of dialect ultralytics; dialect oneshot, this program's own, has no such key"
    )
    assert told("kpt_shape: [17, 3]\nname: mine\n" + text(top="")) == (
        "x.yaml:1:1: unknown key 'kpt_shape'; dialect oneshot has no such key"
    )


def test_channels_are_cut_before_they_are_scaled():
    rows = ("[-1, 1, Conv, [1024, 3, 1]]", "[-1, 1, CBLinear, [[64, 128]]]")
    spec = parse_text(text(*rows), "x.yaml", scale="m")
    assert [layer.args[0] for layer in spec.layers[:4]] == [32, 48, 48, (64, 128)]  # 64 and 1,024 of the file
    assert [node.output.channels for node in resolve(parse_text(text(head="[1, 1, Detect, [nc]]"), scale="n")).nodes][
        :2
    ] == [8, 16]


@pytest.mark.parametrize(
    ("scale", "rows"),
    [
        ("n", ["C3k2, [256, False, 0.25]", "A2C2f, [512, True, 4]"]),
        ("m", ["C3k2, [48, True, 0.25]", "A2C2f, [48, True, 4]"]),
        ("l", ["C3k2, [48, True, 0.25]", "A2C2f, [48, True, 4, True, 1.2]"]),
    ],
)
def test_rows_change_with_the_scale_though_the_file_does_not_say_it(scale: str, rows: list[str]):
    source = text("[-1, 2, C3k2, [256, False, 0.25]]", "[-1, 4, A2C2f, [512, True, 4]]")
    spec = parse_text(source, "x.yaml", scale=scale)
    assert [row(spec, 2), row(spec, 3)] == [f"[{said}]" for said in rows]
    changed = {"n": [], "m": ["C3k2 [True]"], "l": ["C3k2 [True]", "A2C2f [True, 1.2]"]}[scale]
    assert [note.split("gives ")[1].split(" from")[0] for note in spec.notes] == changed


# ---- ultralytics: modules


def test_its_head_depends_on_the_other_rows_and_keys():
    assert row(parse_text(text(), "x.yaml", scale="n")) == "[DFLDetect, [nc]]"
    for module in ("C3k2", "A2C2f", "C2fCIB"):
        spec = parse_text(text(f"[-1, 1, {module}, [64]]", head="[[0, 2], 1, Detect, [nc]]"), "x.yaml", scale="n")
        assert row(spec, 3) == "[DFLDetect, [nc, {light: True}]]"
    late = f"reg_max: 1\nend2end: True\n{text('[-1, 1, C3k2, [64]]', head='[[0, 2], 1, Detect, [nc]]')}"
    assert row(parse_text(late, "x.yaml", scale="n"), 3) == "[v10Detect, [nc, 1]]"
    assert "not depth-wise" in told(f"end2end: True\n{text()}", scale="n")
    assert "it has no anchors" in told(text(head="[[0, 1], 1, Detect, [nc, anchors]]"), scale="n")


def test_files_without_scales_are_known_by_their_head():
    assert row(parse_text(text(top=""), "x.yaml")) == "[DFLDetect, [nc]]"
    assert row(parse_text(text(top="", head="[[0, 1], 1, v10Detect, [nc]]"), "x.yaml")) == "[v10Detect, [nc]]"
    relu = parse_text(text(top="activation: torch.nn.ReLU()\n"), "x.yaml")
    assert relu.activation == "relu" and row(relu) == "[DFLDetect, [nc]]"
    with pytest.raises(Fault, match="missing a required argument: 'anchors'"):
        resolve(parse_text(text(top="activation: relu\n"), "x.yaml"))  # a file of ours


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Bottleneck, [64, False]", "Bottleneck, [64, False, {wide: True}]"),
        ("SPPF, [64, 5]", "SPPF, [64, 5]"),
        ("SPPF, [64, 5, 3, True]", "SPPF, [64, 5, {shortcut: True, first_act: identity}]"),
        ("C2fCIB, [64, True, True]", "C2fCIB, [64, True, True]"),
        ("C2fCIB, [64, True, True, 1, 0.75]", "C2fCIB, [64, True, True, 0.75]"),
        ("Conv, [64, 3, 1, None, 1, 2]", "Conv, [64, 3, 1, None, 1, {dilation: 2}]"),
        ("SCDown, [64, 3, 2]", "SCDown, [64, 3, 2]"),
        ("nn.ConvTranspose2d, [64, 2, 2, 0]", "nn.ConvTranspose2d, [64, 2, 2, 0]"),
    ],
)
def test_modules_of_ultralytics(written: str, meant: str):
    head = "[[0, 1], 1, Detect, [nc]]"
    assert row(parse_text(text(f"[-1, 1, {written}]", head=head), "x.yaml", scale="n")) == f"[{meant}]"


# ---- yolov7, yolov9, yolor


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("MP, []", "nn.MaxPool2d, [2]"),
        ("MP, [3]", "nn.MaxPool2d, [3]"),
        ("SP, [5]", "nn.MaxPool2d, [5, 1, 2]"),
        ("RepConv, [64, 3, 1]", "RepConv, [64, 3, 1]"),
        ("RepConv, [64, 3, 1, None, 2]", "RepConv, [64, 3, 1, 2]"),
        ("DownC, [64]", "DownC, [64]"),
        ("SPPCSPC, [64, False, 1, 0.25]", "SPPCSPC, [64, 0.25]"),
        ("BottleneckCSPA, [64, False]", "C3, [64, False]"),
        ("BottleneckCSPB, [64]", "BottleneckCSPB, [64]"),
        ("ResCSPB, [64]", "BottleneckCSPB, [64, True, {block: residual}]"),
        ("ResXCSPC, [64]", "BottleneckCSPC, [64, True, 32, {block: residual, squeeze: 1.0}]"),
        ("Conv, [64, 1, 1, None, 1, nn.LeakyReLU(0.1)]", "Conv, [64, 1, 1, None, 1, {act: leaky}]"),
    ],
)
def test_modules_of_yolov7(written: str, meant: str):
    spec = parse_text(
        multiples(f"[-1, 1, {written}]", "[[0, 1], 1, IDetect, [nc, anchors]]"), "x.yaml", dialect="yolov7"
    )
    assert row(spec) == f"[{meant}]"
    assert spec.activation == "silu" and row(spec, 3) == "[IDetect, [nc, anchors]]"


def test_what_yolov7_cannot_mean_here_is_told():
    assert "it halves the map here" in told(multiples("[-1, 1, DownC, [64, 3]]", "[[0], 1, IDetect, [nc, anchors]]"))
    assert "does not keep the map's size" in told(
        multiples("[-1, 1, RepConv, [64, 3, 1, 0]]", "[[0], 1, IDetect, [nc, anchors]]")
    )


def test_a_sum_of_yolov7_is_a_sum():
    head = "[[0, 3], 1, IDetect, [nc, anchors]]"
    source = multiples("[-1, 1, RepConv, [64, 3, 1]]\n  - [[-1, -2], 1, Shortcut, [1]]", head)
    assert row(parse_text(source, "x.yaml"), 3) == "[Add, []]"


@pytest.mark.parametrize(
    ("head", "meant"),
    [
        ("DDetect, [nc]", "DFLDetect, [nc, {widths: v9, groups: 4}]"),
        ("Detect, [nc]", "DFLDetect, [nc, {widths: v9}]"),
        ("DualDDetect, [nc]", "DualDDetect, [nc]"),
    ],
)
def test_heads_of_yolov9(head: str, meant: str):
    sources = "[0, 1, 0, 1]" if "Dual" in head else "[0, 1]"
    spec = parse_text(multiples("", f"[{sources}, 1, {head}]"), "x.yaml")
    assert row(spec) == f"[{meant}]"
    resolve(spec)


def test_pieces_are_told_by_their_first_channel():
    rows = "[-1, 1, CBLinear, [[32, 64]]]\n  - [[-1, 0], 1, CBFuse, [[0]]]\n  - [[-2, 1], 1, CBFuse, [[1]]]"
    source = multiples(rows, "[[3, 4], 1, DDetect, [nc]]")
    spec = parse_text(source, "x.yaml")
    assert [row(spec, index) for index in (3, 4)] == ["[CBFuse, [[0]]]", "[CBFuse, [[32]]]"]
    assert [node.output.channels for node in resolve(spec).nodes[2:5]] == [96, 32, 64]
    assert "row 2 is no CBLinear with a piece 2" in told(source.replace("CBFuse, [[1]]", "CBFuse, [[2]]"))
    assert "which piece it takes, [[0, 1]]" in told(source.replace("CBFuse, [[1]]", "CBFuse, [[0, 1]]"))


def test_yolor_is_scaledyolov4_with_another_activation():
    source = multiples("[-1, 3, BottleneckCSP2, [64]]", "[[0, 2], 1, IDetect, [nc, anchors]]")
    spec = parse_text(source, "x.yaml")
    assert spec.activation == "silu" and row(spec) == "[BottleneckCSP2, [64]]"
    assert parse_text(source.replace("IDetect", "Detect"), "x.yaml").activation == "mish"


def test_pools_of_the_preview_of_yolov4_count_for_its_levels():
    output = "nn.Conv2d, [30, 1, 1]]"
    rows = f"[-1, 1, VoVCSP, [64]]\n  - [-1, 1, MP, [2]]\n  - [-1, 1, {output}\n  - [2, 1, {output}"
    source = multiples(rows, "[[], 1, Detect, [nc, anchors]]")
    spec = parse_text(source, "x.yaml")
    assert spec.activation == "leaky" and [layer.op for layer in spec][2:] == ["VoVCSP", "nn.MaxPool2d", "Detect"]
    assert spec.layers[-1].sources == (2, 3) and resolve(spec).nodes[-1].inputs[1].stride == 8


# ---- all of them


@pytest.mark.parametrize("head", ["Segment", "Pose", "OBB", "RTDETRDecoder", "WorldDetect", "Classify"])
def test_heads_for_something_else_are_named(head: str):
    said = told(text(head=f"[[0, 1], 1, {head}, [nc]]"), scale="n")
    assert said == (
        f"x.yaml:10:5 layer 2 [[0, 1], 1, {head}, [nc]]: {head} of ultralytics 8 is {REFUSED[head]}, which is not "
        f"supported here"
    )


def test_a_head_for_something_else_is_named_before_a_scale_is_asked_for():
    said = told(text(head="[[0, 1], 1, Segment, [nc]]"))
    assert said == (
        f"x.yaml:10:5 layer 2 [[0, 1], 1, Segment, [nc]]: Segment of ultralytics 8 is {REFUSED['Segment']}, which is "
        f"not supported here"
    )
    assert "say which one" in told(text(head="[[0, 1], 1, Detect, [nc]]"))


def test_heads_for_masks_are_named_in_other_programs_too():
    for rows, head in (("", "DSegment"), ("[-1, 1, ADown, [64]]", "Segment"), ("[-1, 1, C3, [64]]", "Segment")):
        assert "is a head for instance masks" in told(multiples(rows, f"[[0, 1], 1, {head}, [nc, 32, 256]]"))


def test_a_file_in_our_form_says_the_same():
    """Also at a scale: multiples, channels and hidden rules are in what `convert` writes."""
    sources = [
        (text("[-1, 2, C3k2, [256, False]]", "[-1, 1, C2PSA, [256]]", head="[[0, 3], 1, Detect, [nc]]"), "m"),
        (multiples("[-1, 1, SP, [5]]", "[[0, 2], 1, IDetect, [nc, anchors]]"), None),
        (
            multiples("[-1, 1, CBLinear, [[32, 64]]]\n  - [[-1, 1], 1, CBFuse, [[1]]]", "[[0, 3], 1, DDetect, [nc]]"),
            None,
        ),
    ]
    for source, scale in sources:
        spec = parse_text(source, "x.yaml", scale=scale)
        again = parse_text(convert(spec), "x.yaml")
        assert [row(resolve(again).spec, i) for i in range(len(spec.layers))] == [
            row(resolve(spec).spec, i) for i in range(len(spec.layers))
        ]
        assert [node.sources for node in resolve(again).nodes] == [node.sources for node in resolve(spec).nodes]


def test_every_dialect_has_a_file_that_only_it_reads():
    for dialect in DIALECTS.values():
        assert dialect.name == "oneshot" or dialect.words >= dialect.marks - {"Detect [nc]"}
