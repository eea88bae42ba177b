"""What a user is told who breaks a good model file: one test a mistake, by exact text.

The mistakes are those that other programs answer with a traceback, or accept and build a wrong network from.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data.structures import Fault
from models.graph import Graph, load_graph
from models.registry import OPS

GOOD = """\
nc: 3
activation: silu
anchors:
  - [10, 13, 16, 30]
  - [30, 61, 62, 45]
  - [116, 90, 156, 198]
backbone:
  - [-1, 1, Conv, [16, 3, 2]]  # 0: stride 2
  - [-1, 1, Conv, [32, 3, 2]]  # 1: stride 4
  - [-1, 1, Conv, [64, 3, 2]]  # 2: stride 8
  - [-1, 1, C3, [64]]  # 3
  - [-1, 1, Conv, [128, 3, 2]]  # 4: stride 16
  - [-1, 1, C3, [128]]  # 5
  - [-1, 1, Conv, [256, 3, 2]]  # 6: stride 32
  - [-1, 1, SPPF, [256]]  # 7
head:
  - [-1, 1, Conv, [128, 1, 1]]  # 8
  - [-1, 1, nn.Upsample, [None, 2, nearest]]  # 9
  - [[-1, 5], 1, Concat, [1]]  # 10
  - [-1, 1, C3, [128]]  # 11
  - [-1, 1, nn.Upsample, [None, 2, nearest]]  # 12
  - [[-1, 3], 1, Concat, [1]]  # 13
  - [-1, 1, C3, [64]]  # 14: stride 8
  - [-1, 1, Conv, [64, 3, 2]]  # 15
  - [[-1, 11], 1, Concat, [1]]  # 16
  - [-1, 1, C3, [128]]  # 17: stride 16
  - [-1, 1, Conv, [128, 3, 2]]  # 18
  - [[-1, 8], 1, Concat, [1]]  # 19
  - [-1, 1, C3, [256]]  # 20: stride 32
  - [[14, 17, 20], 1, Detect, [nc, anchors]]  # 21
"""
LEVELS = "  - [10, 13, 16, 30]\n  - [30, 61, 62, 45]\n  - [116, 90, 156, 198]\n"
BY_STRIDE = (
    "row 14 C3 gives 64 channels at stride 8; row 17 C3 gives 128 channels at stride 16; "
    "row 20 C3 gives 256 channels at stride 32"
)
CONV, C3 = str(OPS["Conv"]), str(OPS["C3"])
NUMBER = "`number` is how often the module is repeated, 1 to 1000; got"
ANCHORS = (
    "anchors is how many a level (1 to 100), or for every level a list w, h, w, h, ... in pixels, the same number on "
    "each;"
)
WIDER = (
    "widens 32 channels to 64 but stays at stride 4, while rows 1, 4, 6 of the backbone widen and halve; the head's "
    "strides are then 4, 8, 16; write stride 2 there if it was forgotten"
)

# what is broken, what it was, what it becomes, and what is told
MISTAKES = {
    "from too large": (
        ("[[-1, 5], 1", "[[-1, 50], 1"),
        ["19:5 layer 10 [[-1, 50], 1, Concat, [1]]: reads from 50, but only rows 0 to 9 come before it"],
    ),
    "from forward": (
        ("[[-1, 5], 1", "[[-1, 14], 1"),
        ["19:5 layer 10 [[-1, 14], 1, Concat, [1]]: reads from 14, but only rows 0 to 9 come before it"],
    ),
    "from a misspelt name": (
        (
            ("[-1, 1, C3, [128]]  # 5", "{name: p4, from: -1, op: C3, args: [128]}"),
            ("[[-1, 5], 1, Concat", "[[-1, p04], 1, Concat"),
        ),
        ["19:5 layer 10 [[-1, p04], 1, Concat, [1]]: no row is named 'p04'; did you mean 'p4'?"],
    ),
    "Concat of two strides": (
        ("[[-1, 5], 1", "[[-1, 3], 1"),
        [
            "19:5 layer 10 [[-1, 3], 1, Concat, [1]]: the sources have different strides [8, 16]; all must be at one "
            "(row 9 nn.Upsample gives 128 channels at stride 16; row 3 C3 gives 64 channels at stride 8); "
            "near row 3, at stride 16, are rows 4, 5"
        ],
    ),
    "every level of the head off by one": (
        ("[[14, 17, 20]", "[[13, 16, 19]"),
        [
            "29:5 layer 20 [-1, 1, C3, [256]]: no row reads this one; layer 21 Detect reads row 19 Concat beside it: "
            "did it mean [14, 17, 20]?"
        ],
    ),
    "the head's levels off by one, forward": (
        ("[[14, 17, 20]", "[[15, 18, 20]"),
        [
            "30:5 layer 21 [[15, 18, 20], 1, Detect, [nc, anchors]]: Detect has a level for each stride, but here they "
            "are 16, 32, 32 (row 15 Conv gives 64 channels at stride 16; row 18 Conv gives 128 channels at stride 32; "
            "row 20 C3 gives 256 channels at stride 32)"
        ],
    ),
    "a row put in that shifts all indices": (
        ("  - [-1, 1, C3, [64]]  # 3\n", "  - [-1, 1, C3, [64]]  # 3\n  - [-1, 1, C3, [64]]\n"),
        [
            "30:5 layer 21 [-1, 1, C3, [256]]: no row reads this one; layer 22 Detect reads row 20 Concat beside it: "
            "did it mean [15, 18, 21]?"
        ],
    ),
    "two of three levels": (
        ("[[14, 17, 20]", "[[14, 17]"),
        [
            "29:5 layer 20 [-1, 1, C3, [256]]: no row reads this one; layer 21 Detect reads strides 8, 16: does its "
            "`from` lack row 20, at stride 32?",
            "30:5 layer 21 [[14, 17], 1, Detect, [nc, anchors]]: anchors are given for 3 levels, but the head reads 2 "
            "(row 14 C3 gives 64 channels at stride 8; row 17 C3 gives 128 channels at stride 16)",
        ],
    ),
    "two of three levels, anchors to be fitted": (
        ((f"anchors:\n{LEVELS}", "anchors: 2\n"), ("[[14, 17, 20]", "[[14, 17]")),
        [
            "26:5 layer 20 [-1, 1, C3, [256]]: no row reads this one; layer 21 Detect reads strides 8, 16: does its "
            "`from` lack row 20, at stride 32?"
        ],
    ),
    "levels in falling order": (
        ("[[14, 17, 20]", "[[20, 17, 14]"),
        [
            "30:5 layer 21 [[20, 17, 14], 1, Detect, [nc, anchors]]: Detect reads from fine to coarse, but here the "
            "strides are 32, 16, 8 (row 20 C3 gives 256 channels at stride 32; row 17 C3 gives 128 channels at stride "
            "16; row 14 C3 gives 64 channels at stride 8); write [14, 17, 20]"
        ],
    ),
    "a level twice": (
        ("[[14, 17, 20]", "[[14, 17, 17, 20]"),
        [
            "30:5 layer 21 [[14, 17, 17, 20], 1, Detect, [nc, anchors]]: anchors are given for 3 levels, but the head "
            "reads 4 (row 14 C3 gives 64 channels at stride 8; row 17 C3 gives 128 channels at stride 16; row 17 C3 "
            "gives 128 channels at stride 16; row 20 C3 gives 256 channels at stride 32)"
        ],
    ),
    "misspelt module": (
        ("[-1, 1, Conv, [16, 3, 2]]", "[-1, 1, Covn, [16, 3, 2]]"),
        ["8:5 layer 0 [-1, 1, Covn, [16, 3, 2]]: unknown module 'Covn'; did you mean 'Conv'?"],
    ),
    "misspelt argument": (
        ("[16, 3, 2]]", "[16, {kernl: 3, stride: 2}]]"),
        [
            f"8:5 layer 0 [-1, 1, Conv, [16, {{kernl: 3, stride: 2}}]]: {CONV} has no argument 'kernl'; "
            "did you mean 'kernel'?"
        ],
    ),
    "misspelt activation": (
        ("activation: silu", "activation: slu"),
        ["2:13: activation 'slu' is unknown; did you mean 'silu'?"],
    ),
    "row without number": (
        ("[-1, 1, C3, [64]]  # 3", "[-1, C3, [64]]"),
        [
            "11:5 layer 3: a row is [from, number, module, args], got [-1, C3, [64]]; "
            "`number` is missing: [-1, 1, C3, [64]]"
        ],
    ),
    "row without args": (
        ("[-1, 1, C3, [64]]  # 3", "[-1, 1, C3]"),
        ["11:5 layer 3: a row is [from, number, module, args], got [-1, 1, C3]; args are missing: [-1, 1, C3, []]"],
    ),
    "args without a list": (
        ("[-1, 1, C3, [64]]  # 3", "[-1, 1, C3, 64]"),
        ["11:17 layer 3 [-1, 1, C3, 64]: args is a list, got 64; write [64]"],
    ),
    "args spread over the row": (
        ("[-1, 1, Conv, [64, 3, 2]]  # 2", "[-1, 1, Conv, 64, 3, 2]  # 2"),
        [
            "10:5 layer 2: a row is [from, number, module, args], got [-1, 1, Conv, 64, 3, 2]; "
            "args are one list: [-1, 1, Conv, [64, 3, 2]]"
        ],
    ),
    "two sources into one that takes one": (
        ("[-1, 1, C3, [128]]  # 11", "[[-1, 5], 1, C3, [128]]"),
        [
            "20:5 layer 11 [[-1, 5], 1, C3, [128]]: C3 takes one source, got 2 (row 10 Concat gives 256 channels at "
            "stride 16; row 5 C3 gives 128 channels at stride 16); Concat joins several"
        ],
    ),
    "nc missing": (("nc: 3\n", ""), ["1:1: key 'nc' is missing; a model file has nc, backbone and head"]),
    "head missing": (
        (GOOD[GOOD.index("head:") :], ""),
        ["1:1: key 'head' is missing; a model file has nc, backbone and head"],
    ),
    "head misspelt": (
        ("head:\n", "heads:\n"),
        [
            "1:1: key 'head' is missing; a model file has nc, backbone and head",
            "16:1: unknown key 'heads'; did you mean 'head'?",
        ],
    ),
    "unknown key": (("nc: 3\n", "nc: 3\nanchorz: 3\n"), ["2:1: unknown key 'anchorz'; did you mean 'anchors'?"]),
    "a row behind the head": (
        ("  # 21\n", "\n  - [-1, 1, Conv, [8]]\n"),
        [
            "30:5 layer 21 [[14, 17, 20], 1, Detect, [nc, anchors]]: a head is a model's last row; "
            "rows behind this one: 1"
        ],
    ),
    "no head at the end": (
        ("  - [[14, 17, 20], 1, Detect, [nc, anchors]]  # 21\n", ""),
        [
            "29:5 layer 20 [-1, 1, C3, [256]]: a model's last row is its head, "
            "Classify, Detect, DFLDetect, DualDDetect, IAuxDetect, "
            "IDetect, SegHead, SSDHead, TripleDDetect, v10Detect or YOLOXHead; here it is C3"
        ],
    ),
    "groups that do not divide": (
        ("[128, 3, 2]]  # 4", "[128, 3, 2, None, 3]]  # 4"),
        [
            "12:5 layer 4 [-1, 1, Conv, [128, 3, 2, None, 3]]: groups 3 does not divide 64 channels; 2 does "
            "(row 3 C3 gives 64 channels at stride 8)"
        ],
    ),
    "number 0": (("[-1, 1, C3, [64]]  # 3", "[-1, 0, C3, [64]]"), [f"11:10 layer 3 [-1, 0, C3, [64]]: {NUMBER} 0"]),
    "number -3": (("[-1, 1, C3, [64]]  # 3", "[-1, -3, C3, [64]]"), [f"11:10 layer 3 [-1, -3, C3, [64]]: {NUMBER} -3"]),
    "channels in quotes": (
        ("[-1, 1, C3, [64]]  # 3", '[-1, 1, C3, ["64"]]'),
        [f"11:5 layer 3 [-1, 1, C3, ['64']]: {C3}: c_out='64' should be a whole number; write 64 without quotes"],
    ),
    "a thousand million channels": (
        ("[-1, 1, C3, [64]]  # 3", "[-1, 1, C3, [1000000000]]"),
        [f"11:5 layer 3 [-1, 1, C3, [1000000000]]: {C3}: c_out=1000000000 should be less than or equal to 65536"],
    ),
    "anchors for two levels of three": (
        ("  - [116, 90, 156, 198]\n", ""),
        [
            "29:5 layer 21 [[14, 17, 20], 1, Detect, [nc, anchors]]: anchors are given for 2 levels, but the head "
            f"reads 3 ({BY_STRIDE})"
        ],
    ),
    "an odd number of anchor sides": (("156, 198]", "156]"), [f"6:5: {ANCHORS} level 2 has 3 numbers"]),
    "fewer anchors on a level": (("116, 90, 156, 198]", "116, 90]"), [f"6:5: {ANCHORS} level 2 has 1, level 0 has 2"]),
    "anchors of two levels exchanged": (
        (LEVELS, "  - [30, 61, 62, 45]\n  - [10, 13, 16, 30]\n  - [116, 90, 156, 198]\n"),
        [
            "4:3: anchors grow from level to level, as the head's strides 8, 16, 32 do; these are 48, 17, 144 pixels a "
            "side on average"
        ],
    ),
    "a dead row": (
        ("[-1, 1, Conv, [64, 3, 2]]  # 15", "[-1, 1, C3, [64]]\n  - [12, 1, Conv, [64, 3, 2]]"),
        [
            "24:5 layer 15 [-1, 1, C3, [64]]: no row reads this one; layer 22 Detect reads row 14 C3 beside it: did it "
            "mean [15, 18, 21]?",
            "30:5 layer 21 [-1, 1, C3, [256]]: no row reads this one; layer 22 Detect reads row 20 Concat beside it: "
            "did it mean [14, 18, 21]?",
        ],
    ),
    "a dead row that nobody can have meant": (
        ("[-1, 1, Conv, [64, 3, 2]]  # 2", "[0, 1, Conv, [64, 3, 4]]  # 2"),
        [
            "9:5 layer 1 [-1, 1, Conv, [32, 3, 2]]: no row reads this one; take it out, or name it in the `from` of "
            "the row that needs it"
        ],
    ),
    "a repeated change of channels": (
        ("[-1, 1, C3, [128]]  # 5", "[-1, 3, Conv, [256, 3, 1]]"),
        [
            "13:5 layer 5 [-1, 3, Conv, [256, 3, 1]]: Conv is repeated 3 times but turns 128 channels at stride 16 "
            "into 256 channels at stride 16; only a module that keeps its shape can be repeated, so write two rows: "
            "one that changes it, one that repeats"
        ],
    ),
    "a repeated change of channels that this depth hides": (
        (("[-1, 1, C3, [128]]  # 5", "[-1, 3, Conv, [256, 3, 1]]"), ("nc: 3", "nc: 3\ndepth_multiple: 0.33")),
        [
            "14:5 layer 5 [-1, 3, Conv, [256, 3, 1]]: Conv is repeated 3 times (once at this depth_multiple) but turns "
            "128 channels at stride 16 into 256 channels at stride 16; only a module that keeps its shape can be "
            "repeated, so write two rows: one that changes it, one that repeats"
        ],
    ),
    "options of two shapes": (
        ("[-1, 1, C3, [128]]  # 5", "[-1, 1, C3, [{choice: [64, 128]}]]"),
        [
            "13:5 layer 5 [-1, 1, C3, [{choice: [64, 128]}]]: options have to give one shape, but {c_out: 64} gives 64 "
            "channels at stride 16 and {c_out: 128} 128 channels at stride 16 (row 4 Conv gives 128 channels at stride "
            "16)"
        ],
    ),
    "padding that nothing takes away": (
        ("[-1, 1, C3, [64]]  # 3", "[-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]]"),
        [
            "12:5 layer 4 [-1, 1, Conv, [128, 3, 2]]: the source has +1 rows and columns too many or too few, which "
            "only nn.MaxPool2d and nn.ZeroPad2d take (row 3 nn.ZeroPad2d gives 64 channels at stride 8, +1 cells a "
            "side)"
        ],
    ),
}
# what is legal and hardly ever meant
ODD = {
    "a forgotten stride": (
        ("[64, 3, 2]]  # 2", "[64, 3]]  # 2"),
        [f"10:5 layer 2 [-1, 1, Conv, [64, 3]]: {WIDER}"],
    ),
    "a stride of 1 where all others are 2": (
        ("[64, 3, 2]]  # 2", "[64, 3, 1]]  # 2"),
        [f"10:5 layer 2 [-1, 1, Conv, [64, 3, 1]]: {WIDER}"],
    ),
    "one level of the head off by one": (
        ("[[14, 17, 20]", "[[13, 17, 20]"),
        [
            "30:5 layer 21 [[13, 17, 20], 1, Detect, [nc, anchors]]: row 13 Concat gives 192 channels at stride 8, and "
            "Detect reads it past row 14 C3; did it mean row 14?"
        ],
    ),
    "anchors from large to small": (
        (LEVELS, "".join(reversed(LEVELS.splitlines(keepends=True)))),
        [
            "4:3: anchors stand from large to small, while the head reads strides 8, 16, 32; they are turned round, as "
            "yolov5 does"
        ],
    ),
}


def read(text: str, folder: Path) -> Graph:
    path = folder / "bad.yaml"
    path.write_text(text)
    return load_graph(path)


def broken(changes: tuple) -> str:
    """The good file with some of its text exchanged."""
    text = GOOD
    for old, new in (changes,) if isinstance(changes[0], str) else changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_its_place_its_sources_and_a_way_out(mistake, tmp_path):
    changes, lines = MISTAKES[mistake]
    with pytest.raises(Fault) as caught:
        read(broken(changes), tmp_path)
    assert [line.removeprefix(f"{tmp_path}/bad.yaml:") for line in caught.value.lines] == lines


@pytest.mark.parametrize("oddity", ODD)
def test_what_is_hardly_ever_meant_is_a_note(oddity, tmp_path):
    changes, lines = ODD[oddity]
    graph = read(broken(changes), tmp_path)
    assert [line.removeprefix(f"{tmp_path}/bad.yaml:") for line in graph.notes] == lines


def test_a_good_file_is_told_nothing(tmp_path):
    assert read(GOOD, tmp_path).notes == ()


def test_anchors_that_were_turned_round_reach_the_head_and_the_file_that_is_saved(tmp_path):
    graph = read(broken(ODD["anchors from large to small"][0]), tmp_path)
    assert graph.spec.anchors == graph.nodes[-1].arguments["anchors"] == read(GOOD, tmp_path).spec.anchors


def test_faults_of_text_and_meaning_are_told_together_and_in_order(tmp_path):
    text = broken(
        (
            ("nc: 3", "nc: three"),
            ("[-1, 1, C3, [64]]  # 3", "[-1, 0, C3, [64]]"),
            ("[-1, 1, C3, [128]]  # 5", "[-1, C3, [128]]"),
            ("[-1, 1, SPPF", "[-1, 1, SPFF"),
            ("[[-1, 11], 1, Concat", "[[-1, 3], 1, Concat"),
            ("[[14, 17, 20]", "[[14, 17, 99]"),
        )
    )
    with pytest.raises(Fault) as caught:
        read(text, tmp_path)
    assert [line.removeprefix(f"{tmp_path}/bad.yaml:").partition(": ")[0] for line in caught.value.lines] == [
        "1:5",  # nc
        "11:10 layer 3 [-1, 0, C3, [64]]",  # its number; what it gives is known all the same
        "13:5 layer 5",  # three fields: what follows from it is not told
        "15:5 layer 7 [-1, 1, SPFF, [256]]",
        "30:5 layer 21 [[14, 17, 99], 1, Detect, [nc, anchors]]",
    ]
