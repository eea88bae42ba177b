"""Nothing in a model file runs, whatever it holds is a model or a fault, and none keeps a machine busy or fills it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.structures import Fault
from models.graph import load_graph, resolve
from models.parse import parse_text
from models.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.name: path.read_text() for path in sorted((ROOT / "cfg" / "models").glob("*.yaml"))}

# ---- nothing in a file runs

TARGET = """\
name: target
nc: 3
activation: mish
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - {name: p2, from: -1, number: 1, op: Conv, args: [16, 3, 1, {act: mish}]}
  - [[-1, 0], 1, Concat, [1]]
head:
  - [-1, 1, SPP, [16, [5, 9]]]
  - [-1, 1, Detect, [nc, anchors]]
"""
ATTACKS = (
    "__import__('pathlib').Path({marker!r}).touch()",
    "__import__('os').getpid() and 1",
    "[print('EXECUTED'), __import__('pathlib').Path({marker!r}).touch()][1]",
    "[print('EXECUTED'), torch.nn.SiLU()][1]",
    "nn.Sequential(*[print('EXECUTED')])",
    "(lambda: open({marker!r}, 'w'))()",
    "nc.__class__.__base__.__subclasses__()",
    "nn.LeakyReLU(__import__('pathlib').Path({marker!r}).touch())",
    "na * (nc + 5) or open({marker!r}, 'w')",
    "{{}}.__class__",
    "$(touch {marker})",
    "`touch {marker}`",
    "%s%s%n",
)
TAGGED = (
    '!!python/object/apply:os.system ["touch {marker}"]',
    "!!python/object/apply:builtins.open [{marker!r}, w]",
    "!!python/object/new:pathlib.Path [{marker!r}]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
)
PLACES = {
    "argument": ("[16, 3, 2]", "[{attack}, 3, 2]"),
    "argument in a list": ("[5, 9]", "[{attack}, 9]"),
    "named argument": ("act: mish", "act: {attack}"),
    "name of an argument": ("act: mish", "? {attack}\n: 1"),
    "option": ("{act: mish}", "{{kernel: {{choice: [3, {attack}]}}}}"),
    "module": ("1, SPP", "1, {attack}"),
    "from": ("[[-1, 0]", "[{attack}"),
    "one of several sources": ("[-1, 0]", "[-1, {attack}]"),
    "number": ("number: 1", "number: {attack}"),
    "name of a row": ("name: p2", "name: {attack}"),
    "row": ("[-1, 1, SPP, [16, [5, 9]]]", "{attack}"),
    "rows": ("head:\n", "head: {attack}\nrest:\n"),
    "activation": ("activation: mish", "activation: {attack}"),
    "nc": ("nc: 3", "nc: {attack}"),
    "depth": ("nc: 3", "nc: 3\ndepth_multiple: {attack}"),
    "anchors": ("anchors: 2", "anchors: {attack}"),
    "one anchor": ("anchors: 2", "anchors: [[10, {attack}]]"),
    "classes of the head": ("[nc, anchors]", "[{attack}, anchors]"),
    "dialect": ("nc: 3", "nc: 3\ndialect: {attack}"),
    "ops": ("nc: 3", "nc: 3\nops: {attack}"),
    "key": ("nc: 3", "nc: 3\n{attack}: 3"),
}


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_file_is_a_fault_and_never_runs(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "executed"
    for attack in (*ATTACKS, *TAGGED):
        text = attack.format(marker=str(marker))
        if attack in ATTACKS:
            text = '"' + text + '"'
        old, new = PLACES[place]
        assert TARGET.count(old) == 1
        with pytest.raises(Fault) as caught:
            resolve(parse_text(TARGET.replace(old, new.format(attack=text)), "bad.yaml"))
        assert all(line.startswith("bad.yaml:") for line in caught.value.lines), attack
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr() == ("", "")


def test_code_for_a_name_is_a_name(tmp_path, capsys):
    for attack in ATTACKS:
        name = attack.format(marker=str(tmp_path / "executed"))
        assert parse_text(TARGET.replace("target", json.dumps(name))).name == name
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr() == ("", "")


def test_the_python_file_that_a_model_names_is_not_opened(tmp_path):
    (tmp_path / "my_ops.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    (tmp_path / "model.yaml").write_text(TARGET.replace("nc: 3", "nc: 3\nops: my_ops.py"))
    with pytest.raises(Fault) as caught:
        load_graph(tmp_path / "model.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/model.yaml:3:6: ops: my_ops.py is Python code that would run; --trust-ops allows it, "
        "or --ops FILE names it"
    )
    assert sorted(os.listdir(tmp_path)) == ["model.yaml", "my_ops.py"]


# ---- whatever a file holds


def survives(text: str) -> None:
    """A model or a Fault, whose lines say where and are one line each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.yaml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        try:
            load_graph(path)
        except Fault as fault:
            assert fault.lines
            for line in fault.lines:
                assert line.startswith(str(path)) and "\n" not in line


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**9, 10**17, 10**30, -(10**9), 1e300, 0.5, float("inf"), float("nan")]),
    st.sampled_from(["nc", "anchors", "nearest", "None", "mish", "", "p3", "nn.LeakyReLU(0.1)", "na * (nc + 5)", "é"]),
    st.sampled_from(["yolov5", "oneshot", "choice", "true", "1e9", "my_ops.py", "../x", "\0", "a\nb", "\ud800"]),
    st.sampled_from(sorted(OPS)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["kernel", "act", "choice", "c_out", "stride", "x"]), inner, max_size=3),
        st.fixed_dictionaries({"choice": st.lists(inner, max_size=4)}),
    ),
    max_leaves=8,
)
SOURCES = st.one_of(st.integers(-3, 8), st.lists(st.integers(-3, 8), max_size=4), VALUES)
NUMBERS = st.one_of(st.sampled_from([1, 2, 3, 0, -1, 1000]), VALUES)
MODULES = st.one_of(st.sampled_from(sorted(OPS)), VALUES)
ROWS = st.one_of(
    st.tuples(SOURCES, NUMBERS, MODULES, st.lists(VALUES, max_size=5)).map(list),
    st.fixed_dictionaries(
        {"from": SOURCES, "op": MODULES},
        optional={"name": st.sampled_from(["p3", "p4", 3]), "number": NUMBERS, "args": st.lists(VALUES, max_size=5)},
    ),
    VALUES,
)
TOPS = st.fixed_dictionaries(
    {"nc": st.one_of(st.just(3), VALUES), "backbone": st.lists(ROWS, max_size=5), "head": st.lists(ROWS, max_size=4)},
    optional={
        "anchors": st.one_of(st.integers(0, 4), st.lists(st.lists(st.integers(-1, 50), max_size=6), max_size=3)),
        "depth_multiple": st.one_of(st.just(0.33), VALUES),
        "width_multiple": st.one_of(st.just(0.25), VALUES),
        **dict.fromkeys(("activation", "dialect", "name", "ops", "extra"), VALUES),
    },
)


@settings(max_examples=100)
@given(TOPS, st.sampled_from([None, True]))
def test_whatever_is_built_like_a_model_is_one_or_a_fault(top, style):
    survives(yaml.dump(top, default_flow_style=style, allow_unicode=True, sort_keys=False))


TOKENS = st.sampled_from(
    [
        *("[", "]", "{", "}", ",", ":", "", " ", "#", "'", "-1", "0", "1", "31", "99", "-5", "0.5", "1e999", "True"),
        *("None", "nc", "anchors", "Conv", "Concat", "Detect", "nn.Upsample", "C3", "mish", "{choice: [1, 3]}"),
        *("{kernel: {choice: [3, 5]}}", "[]", "[[-1, 4]]", "{name: x, from: -1, op: Conv, args: [8]}", "\n  - ", "x"),
        *("1000000000", "nn.ZeroPad2d", "nn.MaxPool2d", "Focus", "nn.Conv2d", "BottleneckCSP", "dialect: yolov5-v3\n"),
    ]
)
EDITS = st.tuples(
    st.sampled_from(["drop", "repeat", "swap", "token", "insert"]), st.integers(0, 999), st.integers(0, 999), TOKENS
)


def edited(text: str, edits: list[tuple[str, int, int, str]]) -> str:
    """A file with lines dropped, repeated and swapped, and words replaced and put in."""
    lines = text.splitlines()
    for kind, at, other, token in edits:
        at, other = at % len(lines), other % len(lines)
        words = lines[at].replace(",", " , ").replace("[", "[ ").replace("]", " ]").split(" ")
        if kind == "drop" and len(lines) > 1:
            lines.pop(at)
        elif kind == "repeat":
            lines.insert(other, lines[at])
        elif kind == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == "token":
            words[other % len(words)] = token
            lines[at] = " ".join(words)
        else:
            words.insert(other % len(words), token)
            lines[at] = " ".join(words)
    return "\n".join(lines)


@settings(max_examples=100)
@given(st.sampled_from(sorted(FILES)), st.lists(EDITS, min_size=1, max_size=4))
@example("tiny.yaml", [("drop", 0, 0, "")])
def test_a_real_file_with_random_edits_is_a_model_or_a_fault(name, edits):
    survives(edited(FILES[name], edits))


# ---- limits


def model(*rows: str, top: str = "") -> str:
    listed = "".join(f"  - {row}\n" for row in rows)
    return f"{top}nc: 3\nbackbone:\n{listed}head:\n  - [-1, 1, Detect, [nc, anchors]]\n"


CONV = "[-1, 1, Conv, [8]]"
ODD_SIZES = ", ".join(map(str, range(1, 63, 2)))
ACTS = "relu, leaky, mish, silu, hardswish, sigmoid, identity"
LONG_NAME = "ab" * 13
DEEP = "nested deeper than 40 levels"
TREE = "more than 20,000 values"
BYTES = "bytes; a model file has at most 100,000"

# a file, and what the first line about it holds; None where it is a good model
BOMBS = {
    "aliases": (
        "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 10)}]\n" for c in "bcdefghi"),
        TREE,
    ),
    "a thousand million repeats": (model("[-1, 1000000000, C3, [8]]"), "1 to 1000; got 1000000000"),
    "a thousand repeats in each of 300 rows": (
        model(*["[-1, 1000, Bottleneck, [8]]"] * 300),
        "its rows repeat 300,001 blocks; a model has at most 1,000",
    ),
    "repeats that depth_multiple makes": (
        model("[-1, 1000, Bottleneck, [8]]", top="depth_multiple: 100\n"),
        "its rows repeat 100,001 blocks; a model has at most 1,000",
    ),
    "a thousand million channels": (
        model("[-1, 1, Conv, [1000000000]]"),
        "c_out=1000000000 should be less than or equal to 65536",
    ),
    "channels that width_multiple makes": (
        model("[-1, 1, Conv, [65536]]", top="width_multiple: 100\n"),
        "c_out=6553600 should be less than or equal to 65536",
    ),
    "channels doubled eighty times": (
        model(CONV, *["[[-1, -1], 1, Concat, [1]]"] * 80),
        "would give 1,048,576 channels; a map has 1 to 1,000,000",
    ),
    "strides": (
        model(*["[-1, 1, Conv, [8, 63, 64]]"] * 20),
        "would give stride 262,144; a map has 1 to 4,096",
    ),
    "sources of a whole row": (
        model(f"[[{', '.join(['-1'] * 3000)}], 1, Concat, [1]]"),
        "a row reads at most 64 others, this one 3,000",
    ),
    "lists in lists": ("[" * 70_000, DEEP),
    "mappings in mappings": ("{a: " * 20_000, DEEP),
    "blocks in blocks": ("".join("  " * level + "a:\n" for level in range(300)), DEEP),
    "deep arguments": (model(f"[-1, 1, Conv, [{'[' * 400}{']' * 400}]]"), DEEP),
    "rows": (model(*[CONV] * 1500), "1,501 rows; a model has at most 1,000"),
    "rows, as many as there may be": (model(*[CONV] * 999), None),
    "values": ("a: [" + "a," * 45_000 + "]", TREE),
    "combinations of a row": (
        model(f"[-1, 1, Conv, [{{choice: [{ODD_SIZES}]}}, {{choice: [{ODD_SIZES}]}}, {{choice: [{ODD_SIZES}]}}]]"),
        "its choices have more than 10,000 combinations",
    ),
    "combinations of all rows": (
        model(*[f"[-1, 1, Conv, [8, {{choice: [{ODD_SIZES}]}}, {{act: {{choice: [{ACTS}]}}}}]]"] * 280),
        "the choices of its rows have 60,760 combinations",
    ),
    "wrong options": (
        model(f"[-1, 1, Conv, [8, {{choice: [{', '.join(f'x{i}' for i in range(5_000))}]}}]]"),
        "kernel=x0 should be a whole number",
    ),
    "wrong activations": (
        model(f"[-1, 1, Conv, [8, {{act: {{choice: [{', '.join(f'mihs{i}' for i in range(4_000))}]}}}}]]"),
        "act=mihs0 is unknown",
    ),
    "keys": ("".join(f"anchor{i}: 1\n" for i in range(3_000)) + model(CONV), "unknown key 'anchor0'"),
    "names that are nearly right": (
        model(
            *[f"{{name: {LONG_NAME}{i:03}, from: -1, op: Conv, args: [8]}}" for i in range(500)],
            *[f"[[{', '.join(f'{LONG_NAME}x{i}' for i in range(30))}], 1, Concat, [1]]"] * 30,
        ),
        "no row is named 'abababababababababababababx0'; did you mean 'ababababababababababababab",
    ),
    "rows of one name": (model(*["{name: a, from: -1, op: Conv, args: [8]}"] * 900), "two rows are named 'a'"),
    "rows that nobody reads": (model(CONV, *["[0, 1, Conv, [8]]"] * 900), "no row reads this one"),
    "anchors": (f"anchors: [{', '.join(['[1, 1]'] * 3_000)}]\n" + model(CONV), "but the head reads 1"),
    "pools": (model(f"[-1, 1, SPP, [8, [{', '.join(['63'] * 5_000)}]]]"), None),
    "a million characters": ("name: " + "x" * 1_000_000, BYTES),
    "a long word": ("name: " + "x" * 90_000 + "\n" + model(CONV), None),
    "a long text": ("name: '" + "x " * 45_000 + "'\n" + model(CONV), None),
    "a long module": (model(f"[-1, 1, {'Conv' * 20_000}, [8]]"), "unknown module 'ConvConv"),
    "a long activation": (model(f"[-1, 1, Conv, [8, {{act: {'mish' * 20_000}}}]]"), "is unknown"),
    "a long source": (model(f"[{'p' * 90_000}, 1, Conv, [8]]"), "no row is named 'pppp"),
    "a long number": ("nc: " + "9" * 90_000, "is too large a number"),
    "a large number": ("nc: 1e999999", "1e999999 is too large a number"),
    "margins": (model(*["[-1, 1, nn.ZeroPad2d, [[64, 64, 64, 64]]]"] * 700), "rows and columns too many"),
    "NUL": ("nc: 3\0\n", "unacceptable character #x0000"),
    "byte order mark": ("\ufeff" + model(CONV), None),
    "comments": ("#\n" * 50_000, "the file is empty"),
    "documents": ("---\n" * 25_000, "a second document begins here"),
    "nothing": ("", "the file is empty"),
}
RUN = """
import json, resource, sys, time
from pathlib import Path
from data.structures import Fault
from models.graph import load_graph
def most():
    # KiB at the peak of this program: getrusage also counts what the process was before its exec, so /proc goes first
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    start = time.process_time()
    try:
        lines = [load_graph(path).spec.path]
    except Fault as fault:
        lines = list(fault.lines)
    took = time.process_time() - start
    print(json.dumps({"file": path.name, "lines": lines, "seconds": took, "KiB": most()}))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every bomb read in one process of its own: what was told, how long it took, the most memory up to then."""
    folder = tmp_path_factory.mktemp("bombs")
    names = {f"{index:02}.yaml": name for index, name in enumerate(BOMBS)}
    for file, name in names.items():
        (folder / file).write_text(BOMBS[name][0])
    program = [sys.executable, "-c", RUN, str(folder)]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(line) for line in ran.stdout.splitlines()]
    return {names[result["file"]]: result for result in results}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_by_a_limit_that_has_a_name(bomb, told):
    wanted, result = BOMBS[bomb][1], told[bomb]
    assert result["seconds"] < 5
    assert result["KiB"] < 1024 * 1024
    assert len(result["lines"]) <= 51 and sum(map(len, result["lines"])) < 50_000
    if wanted is None:
        assert result["lines"][0].endswith(result["file"])
    else:
        assert wanted in result["lines"][0]


def test_what_is_no_text_is_a_fault(tmp_path):
    def said(path: Path) -> str:
        with pytest.raises(Fault) as caught:
            load_graph(path)
        return str(caught.value).removeprefix(str(path))

    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    (tmp_path / "wide.yaml").write_bytes("nc: 3".encode("utf-16"))
    (tmp_path / "folder.yaml").mkdir()
    assert said(tmp_path / "latin.yaml") == ": not UTF-8 text (unexpected end of data at byte 9)"
    assert said(tmp_path / "wide.yaml") == ": not UTF-8 text (invalid start byte at byte 0)"
    assert said(tmp_path / "folder.yaml") == ": is a folder, not a model file"
    assert said(tmp_path / "nowhere.yaml") == ": no such model file"
    assert said(Path("/dev/zero")) == ": no such model file"
