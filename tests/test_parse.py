"""Model text to `ModelSpec` and back: what a file means, what is told about a wrong one, and that nothing runs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.structures import Fault
from models.__main__ import main
from models.graph import normalize, resolve
from models.network import SUPERNETS, Network
from models.parse import dump, parse, parse_text
from models.registry import OPS
from models.spec import Choice, LayerSpec, ModelSpec, Where

ROOT = Path(__file__).resolve().parents[1]
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
HEAD = GOOD[GOOD.index("head:") :]


def told(text: str) -> list[str]:
    """All that is told about a file."""
    with pytest.raises(Fault) as caught:
        resolve(parse_text(text, "bad.yaml"))
    return list(caught.value.lines)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def row(text: str) -> LayerSpec:
    return parse_text(changed(ROW_2, text)).layers[2]


def without_places(spec: ModelSpec) -> ModelSpec:
    nowhere = Where("", 0, 0)
    return replace(spec, path="", layers=tuple(replace(layer, where=nowhere) for layer in spec.layers))


# ---- what the grammar means


def test_a_row_says_sources_number_module_and_arguments():
    assert row("[[-1, 0], 3, Bottleneck, [8, True, {kernel: 5}]]") == LayerSpec(
        Where("<text>", 8, 5), (-1, 0), 3, "Bottleneck", (8, True), {"kernel": 5}, None, "head"
    )
    assert row("{name: p4, from: 1, op: Conv}") == LayerSpec(
        Where("<text>", 8, 5), (1,), 1, "Conv", (), {}, "p4", "head"
    )


def test_values_are_read_without_the_surprises_of_yaml():
    read = {
        "1e-3": 0.001,
        "1E3": 1000.0,
        ".5": 0.5,
        "-2": -2,
        "007": 7,
        "no": "no",
        "off": "off",
        "yes": "yes",
        "on": "on",
        "None": None,
        "null": None,
        "~": None,
        "'None'": "None",
        "True": True,
        "false": False,
        "TRUE": "TRUE",
        "'3'": "3",
        '"3"': "3",
        "0x10": "0x10",
        "1_000": "1_000",
        "12:30": "12:30",
        "2001-01-01": "2001-01-01",
        ".inf": ".inf",
        "nan": "nan",
        "=": "=",
        "[1, [no]]": (1, ("no",)),
        "'a\"b'": 'a"b',
    }
    args = row(f"[-1, 1, Conv, [{', '.join(read)}]]").args
    assert [(type(value), value) for value in args] == [(type(value), value) for value in read.values()]


def test_the_shorthand_is_the_pair_of_choices_that_it_stands_for():
    short = row("[-1, 3, MBottleneckCSP2, [256]]")
    options = "{kernel: {choice: [3, 5]}, act: {choice: [relu, leaky, mish]}}"
    assert short == row(f"[-1, 3, BottleneckCSP2, [256, {options}]]")
    assert short.choices == (Choice("2.kernel", (3, 5)), Choice("2.act", ("relu", "leaky", "mish")))
    assert row("[-1, 3, MBottleneckCSP2, [256, {kernel: 3}]]").choices == (Choice("2.act", ("relu", "leaky", "mish")),)


def test_a_choice_is_called_after_its_row_and_argument():
    numbered = row("[-1, {choice: [1, 2]}, Conv, [8, {kernel: {choice: [3, 5]}}]]")
    assert [choice.name for choice in numbered.choices] == ["2.kernel", "2.number"]
    named = row("{name: p4, from: -1, number: {choice: [1, 2]}, op: Conv, args: [8, {kernel: {choice: [3, 5]}}]}")
    assert [choice.name for choice in named.choices] == ["p4.kernel", "p4.number"]


def test_what_a_file_leaves_out_has_a_default():
    spec = parse_text("nc: 1\nbackbone: [[-1, 1, Conv, [8]]]\nhead: [[-1, 1, Detect, [nc, anchors]]]", name="mine")
    assert (spec.name, spec.anchors, spec.activation) == ("mine", 3, "silu")
    assert (spec.scaling.depth, spec.scaling.width) == (1.0, 1.0)


# ---- what is told about a wrong file

ANCHORS = (
    "anchors is how many a level (1 to 100), or for every level a list w, h, w, h, ... in pixels, "
    "the same number on each;"
)
TAGS = "is not allowed; values are plain words, numbers, lists and mappings"
KEYS = "name, dialect, ops, nc, depth_multiple, width_multiple, activation, anchors, backbone, head"
NUMBER = "`number` is how often the module is repeated, 1 to 1000; got"
FIELDS = "a row is [from, number, module, args], got"
NEEDS = "is missing; a model file has nc, backbone and head"

MISTAKES = {
    "nc missing": ("nc: 3\n", "", f"1:1: key 'nc' {NEEDS}"),
    "head missing": (HEAD, "", f"1:1: key 'head' {NEEDS}"),
    "nc as text": ("nc: 3", "nc: three", "1:5: nc is the number of classes, 1 to 100000; got 'three'"),
    "nc as truth": ("nc: 3", "nc: true", "1:5: nc is the number of classes, 1 to 100000; got True"),
    "no class": ("nc: 3", "nc: 0", "1:5: nc is the number of classes, 1 to 100000; got 0"),
    "no depth": ("nc: 3", "nc: 3\ndepth_multiple: 0", "2:17: depth_multiple is a number over 0, at most 100; got 0"),
    "width as text": (
        "nc: 3",
        "nc: 3\nwidth_multiple: wide",
        "2:17: width_multiple is a number over 0, at most 100; got 'wide'",
    ),
    "name as list": ("nc: 3", "nc: 3\nname: [a]", "2:7: name is a word or a text in quotes; got [a]"),
    "activation as number": ("mish", "3", "2:13: activation is a name such as mish; got 3"),
    "key twice": ("nc: 3", "nc: 3\nnc: 4", "2:1: key 'nc' stands twice, first at bad.yaml:1:1"),
    "unknown top key": ("nc: 3", "nc: 3\nanchorz: 3", "2:1: unknown key 'anchorz'; did you mean 'anchors'?"),
    "unknown top key, nothing near": ("nc: 3", "nc: 3\nxyz: 3", f"2:1: unknown key 'xyz'; known are {KEYS}"),
    "merge key": ("nc: 3", "nc: 3\n<<: {name: a}", f"2:1: unknown key '<<'; known are {KEYS}"),
    "five numbers a level": ("anchors: 2", "anchors: [[1, 2, 3, 4, 5]]", f"3:11: {ANCHORS} level 0 has 5 numbers"),
    "more anchors on one level": (
        "anchors: 2",
        "anchors: [[1, 2], [1, 2, 3, 4]]",
        f"3:19: {ANCHORS} level 1 has 2, level 0 has 1",
    ),
    "negative anchor": ("anchors: 2", "anchors: [[-1, 2]]", f"3:11: {ANCHORS} level 0 is [-1, 2]"),
    "empty anchors": ("anchors: 2", "anchors: []", f"3:10: {ANCHORS} got []"),
    "anchors as text": ("anchors: 2", "anchors: auto", f"3:10: {ANCHORS} got auto"),
    "row with three fields": (
        ROW_2,
        "[-1, Conv, [16]]",
        f"8:5 layer 2: {FIELDS} [-1, Conv, [16]]; `number` is missing: [-1, 1, Conv, [16]]",
    ),
    "row as text": (ROW_2, "Conv", f"8:5 layer 2: {FIELDS} Conv"),
    "arguments as number": (
        ROW_2,
        "[-1, 1, Conv, 16]",
        "8:19 layer 2 [-1, 1, Conv, 16]: args is a list, got 16; write [16]",
    ),
    "module as list": (
        ROW_2,
        "[-1, 1, [Conv], [16]]",
        "8:13 layer 2 [-1, 1, [Conv], [16]]: the module is a name, got [Conv]",
    ),
    "number 0": (ROW_2, "[-1, 0, Conv, [16]]", f"8:10 layer 2 [-1, 0, Conv, [16]]: {NUMBER} 0"),
    "negative number": (ROW_2, "[-1, -3, Conv, [16]]", f"8:10 layer 2 [-1, -3, Conv, [16]]: {NUMBER} -3"),
    "number as text": (ROW_2, "[-1, two, Conv, [16]]", f"8:10 layer 2 [-1, two, Conv, [16]]: {NUMBER} two"),
    "number as fraction": (ROW_2, "[-1, 1.0, Conv, [16]]", f"8:10 layer 2 [-1, 1.0, Conv, [16]]: {NUMBER} 1.0"),
    "choice with number 0": (
        ROW_2,
        "[-1, {choice: [0, 1]}, Conv, [8]]",
        f"8:10 layer 2 [-1, {{choice: [0, 1]}}, Conv, [8]]: {NUMBER} {{choice: [0, 1]}}",
    ),
    "from as fraction": (
        ROW_2,
        "[1.5, 1, Conv, [16]]",
        "8:6 layer 2 [1.5, 1, Conv, [16]]: `from` is a row's index or name, or a list of them; got 1.5",
    ),
    "choice with one option": (
        ROW_2,
        "[-1, 1, Conv, [16, {choice: [3]}]]",
        "8:24: choice '2.1' needs two or more different options, got [3]",
    ),
    "choice with an option twice": (
        ROW_2,
        "[-1, 1, Conv, [16, {kernel: {choice: [3, 3]}}]]",
        "8:33: choice '2.kernel' needs two or more different options, got [3, 3]",
    ),
    "choice with a mapping": (
        ROW_2,
        "[-1, 1, Conv, [16, {choice: [{a: 1}, 3]}]]",
        "8:24: a choice needs a list of plain options, got [{a: 1}, 3]",
    ),
    "choice with a mapping in a list": (
        ROW_2,
        "[-1, 1, Conv, [16, {choice: [[{a: 1}], 3]}]]",
        "8:24: a choice needs a list of plain options, got [[{a: 1}], 3]",
    ),
    "choice without a list": (
        ROW_2,
        "[-1, 1, Conv, [16, {choice: 3}]]",
        "8:24: a choice needs a list of plain options, got 3",
    ),
    "choices for choice": (
        ROW_2,
        "[-1, 1, Conv, [16, {kernel: {choices: [3, 5]}}]]",
        "8:33: a mapping here is a choice, {choice: [3, 5]}; got {choices: [3, 5]}",
    ),
    "unknown key in a named row": (
        ROW_2,
        "{name: a, from: -1, op: Conv, arg: [16]}",
        "8:35: unknown key 'arg' in a row; did you mean 'args'?",
    ),
    "named row without from": (ROW_2, "{name: a, op: Conv, args: [16]}", "8:5: a row needs the key 'from'"),
    "row named by a number": (
        ROW_2,
        "{name: 4, from: -1, op: Conv, args: [16]}",
        "8:12 layer 2 {name: 4, from: -1, op: Conv, args: [16]}: a row's name is a letter, then up to 31 letters, "
        "digits and _; got 4",
    ),
    "two rows of one name": (
        f"{ROW_0}\n  - {ROW_0}",
        "{name: a, from: -1, op: Conv, args: [8]}\n  - {name: a, from: -1, op: Conv, args: [8]}",
        "5:5: two rows are named 'a'",
        "6:5: two rows are named 'a'",
    ),
    "rows as mapping": (HEAD, "head: {a: 1}", "7:7: head is a list of rows [from, number, module, args]"),
    "YAML syntax": (
        "nc: 3",
        "nc: [3",
        "2:11: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
    ),
    "tab": (
        "nc: 3",
        "nc:\t3",
        "1:4: not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token",
    ),
    "two documents": (
        "anchors: 2",
        "anchors: 2\n---",
        "4:1: a second document begins here; a model file has one",
    ),
    "endless number": ("nc: 3", f"nc: {'9' * 30}", "1:5: 99999999999999999999... is too large a number"),
    "infinite number": (ROW_2, "[-1, 1, Conv, [1e999]]", "8:20: 1e999 is too large a number"),
    "tag": ("nc: 3", "nc: !number 3", f"1:5: tag '!number' {TAGS}"),
    "tag that changes nothing": (ROW_2, "[-1, 1, Conv, [!!str 16]]", f"8:20: tag '!!str' {TAGS}"),
    "tag on a list": (ROW_2, "!row [-1, 1, Conv, [16]]", f"8:5: tag '!row' {TAGS}"),
    "list as key": ("nc: 3", "nc: 3\n? [a]\n: b", "2:3: a key is a plain word"),
    "value that holds itself": ("nc: 3", "nc: &a {b: *a}", "1:12: no value before this one is marked &a"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place_and_a_way_out(mistake):
    old, new, *lines = MISTAKES[mistake]
    assert told(changed(old, new)) == [f"bad.yaml:{line}" for line in lines]


def test_a_file_that_is_no_mapping_is_told_what_one_is():
    wanted = f"bad.yaml:1:1: a model file is a mapping with the keys {KEYS}"
    assert told("just words") == told("- 1") == [wanted]
    assert told("") == told("# a comment\n") == ["bad.yaml: the file is empty"]


def test_numbers_that_pyyaml_stumbles_over_are_faults():
    wanted = "bad.yaml: not valid YAML: it holds a number that is out of range"
    assert told('nc: "\\UFFFFFFFF"') == told(f"%YAML 1.{'9' * 5000}\n---\nnc: 3") == [wanted]


def test_all_mistakes_of_a_file_are_told_at_once():
    text = GOOD.replace("nc: 3", "nc: three\nanchorz: 3").replace(ROW_2, "[-1, Conv, [16]]\n  - [-1, 0, 3, 16]")
    assert told(text) == [
        "bad.yaml:1:5: nc is the number of classes, 1 to 100000; got 'three'",
        "bad.yaml:2:1: unknown key 'anchorz'; did you mean 'anchors'?",
        f"bad.yaml:9:5 layer 2: {FIELDS} [-1, Conv, [16]]; `number` is missing: [-1, 1, Conv, [16]]",
        f"bad.yaml:10:10 layer 3 [-1, 0, 3, 16]: {NUMBER} 0",
        "bad.yaml:10:13 layer 3 [-1, 0, 3, 16]: the module is a name, got 3",
        "bad.yaml:10:16 layer 3 [-1, 0, 3, 16]: args is a list, got 16; write [16]",
    ]


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path):
    with pytest.raises(Fault, match=r"nowhere\.yaml: no such model file$"):
        parse(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    with pytest.raises(Fault, match=r"latin\.yaml: not UTF-8 text \(unexpected end of data at byte 9\)$"):
        parse(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(Fault, match=r"large\.yaml: 1,000,001 bytes; a model file has at most 100,000$"):
        parse(tmp_path / "large.yaml")


def test_check_prints_faults_without_a_traceback_and_exits_with_2(tmp_path):
    text = changed(ROW_2, "[-1, 1, Covn, [16]]").replace("[2, 1, Detect", "[[1, 7], 1, Detect")
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text(GOOD)
    program = [sys.executable, "-m", "models", "check", "bad.yaml", "good.yaml"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr.splitlines() == [
        "bad.yaml:8:5 layer 2 [-1, 1, Covn, [16]]: unknown module 'Covn'; did you mean 'Conv'?",
        "bad.yaml:9:5 layer 3 [[1, 7], 1, Detect, [nc, anchors]]: reads from 7, but only rows 0 to 2 come before it",
    ]
    assert ran.stdout == "good.yaml: good, 4 rows, 0 open choices\n"


def test_check_finds_all_of_our_files_good(capsys):
    assert main(["check", *map(str, FILES)]) == 0
    assert capsys.readouterr().err == ""


# ---- text and back


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dump_reads_back_as_the_same_model(path):
    spec = parse(path)
    normal = normalize(spec)
    frozen = [normal.freeze({c.name: c.options[end] for c in normal.choices}) for end in (0, -1)]
    for model in (spec, normal, *frozen):
        again = parse_text(dump(model, comment="found by a search\nwith care"))
        assert without_places(again) == without_places(model)
    assert not any(model.choices for model in frozen)


def test_dump_keeps_names_anchors_and_hard_words():
    spec = parse_text(changed(ROW_2, "{name: p3, from: 1, op: Conv, args: [16, {kernel: {choice: [3, 5]}}]}"))
    hard = [
        "None",
        "true",
        "3",
        "1e-3",
        " a",
        "a ",
        "it's",
        'say "hi"',
        "a: b",
        "#",
        "[x]",
        "a\nb",
        "\t",
        "é",
        "名",
        "",
    ]
    for name in [*hard, "\x7f", "\u2028", "\ufeff", "\ud83d", "\U0001f600", "back\\slash"]:
        named = replace(spec, name=name, activation=name, anchors=((10.5, 13.0), (1e-3, 1e5)))
        assert without_places(parse_text(dump(named))) == without_places(named)


def test_a_normalized_choice_by_position_keeps_its_name_after_a_second_reading():
    normal = normalize(parse_text(changed(ROW_2, "[-1, 1, Conv, [16, {choice: [3, 5]}]]")))
    assert [choice.name for choice in normal.choices] == ["2.kernel"]
    assert without_places(normalize(parse_text(dump(normal)))) == without_places(normal)


# ---- any text at all


def survives(text: str) -> None:
    """Either the text is a model, and its dump is the same model, or every line of the fault says where."""
    try:
        spec = parse_text(text, "any.yaml")
        assert without_places(parse_text(dump(spec))) == without_places(spec)
        resolve(spec)
    except Fault as fault:
        for line in fault.lines:
            assert line.startswith("any.yaml") and "\n" not in line


WORDS = st.sampled_from(
    [
        *"[]{}()-:,?&*!|>%@#'\"~=.\\ \n\t",
        *("- ", ": ", ", ", "\n  - ", "\n", "&a ", "*a", "!!str ", "!x ", "---\n", "...\n", "%YAML 1.1\n", "<<: "),
        *("nc: 3\n", "anchors: ", "backbone:\n", "head:\n", "[-1, 1, Conv, [8]]", "Detect", "{choice: [", "]}", "name"),
        *("0", "-1", "1e999", "9" * 25, "None", "no", "\\U00110000", "\\x", "\0", "\ufeff", "\u2028", "é", "\ud7ff"),
    ]
)


@settings(max_examples=150)
@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=40).map("".join)))
@example('"\\UFFFFFFFF"')
@example("nc: &a [*a]")
def test_any_text_is_a_model_or_a_fault(text):
    survives(text)


LIKELY = {
    "c_out": [8, 16, 24, 1],
    "kernel": [1, 3, 5, 2],
    "stride": [1, 2, 3],
    "padding": [None, 0, 1],
    "groups": [1, 2, 8, 3],
    "act": ["mish", "relu", "leaky"],
    "expansion": [0.5, 1.0, 0.01],
    "pools": [(5,), (3, 5)],
    "shortcut": [True, False],
    "scale_factor": [1, 2, 4],
    "kernel_size": [1, 2, 3],
    "dilation": [1, 2],
    "mode": ["nearest", "bilinear"],
    "num_classes": ["nc", 3],
    "anchors": ["anchors"],
}
ODD = st.sampled_from([0, -1, 1.0, 1e-3, None, True, "nc", "anchors", "x", (), (1, (2,)), 10**17])


@st.composite
def rows(draw: st.DrawFn) -> LayerSpec:
    """A row of a real op, mostly with values that may fit, open places among them."""

    def value(name: str) -> object:
        likely = LIKELY.get(name, [1, None])
        if draw(st.integers(0, 19)) == 7:
            return draw(ODD)
        if len(likely) > 1 and draw(st.integers(0, 4)) == 3:
            count = draw(st.integers(2, len(likely)))
            return Choice(name, tuple(draw(st.permutations(likely))[:count]))
        return draw(st.sampled_from(likely))

    name = draw(st.sampled_from(list(OPS)))
    parameters = OPS[name].signature.parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty or draw(st.booleans())]
    number = draw(st.sampled_from([1, 1, 2, Choice("x", (1, 2))]))
    sources = [(1,), (-1,), (1, 1), (0, 1)] if OPS[name].many else [(1,), (-1,), (-1,), (0, 1)]
    kwargs = {argument: value(argument) for argument in wanted}
    return LayerSpec(Where("", 0, 0), draw(st.sampled_from(sources)), number, name, (), kwargs)


@settings(max_examples=150)
@given(rows())
def test_what_resolves_can_be_built(drawn):
    """Behind the gate there are no surprises: a row that resolves is a module, plain and in both supernets."""
    spec = parse_text(GOOD)
    text = dump(replace(spec, layers=(*spec.layers[:2], replace(drawn, section="head"), spec.layers[3])))
    survives(text)
    try:
        spec = normalize(parse_text(text))
        graph = resolve(spec)
    except Fault:
        return
    with torch.device("meta"):
        for end in (0, -1):
            Network(resolve(spec.freeze({choice.name: choice.options[end] for choice in spec.choices})))
        for kind in SUPERNETS:
            try:
                Network(graph, kind)
            except Fault as fault:  # too many blocks side by side, or weights that cannot be shared
                assert "--supernet" in str(fault) or "padding" in str(fault)
