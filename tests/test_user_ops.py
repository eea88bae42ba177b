"""Users' own ops: a Python file beside the model file, held to the same rules as ours, and told the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.structures import Fault
from models.cost import network_costs, totals
from models.graph import load_graph
from models.network import SUPERNETS, Network
from models.registry import OPS
from models.user_ops import load_ops

HEAD = """\
from torch import Tensor, nn

from models.ops.primitives import DEFAULT, Act, Kernel, Width, activation, conv, norm
from models.registry import Shape, register_op

"""
SQUEEZE = """
@register_op()
class Squeeze(nn.Module):
    def __init__(self, c_in: int, c_out: Width, kernel: Kernel = 3, stride: int = 1, *, act: Act = DEFAULT) -> None:
        super().__init__()
        self.conv = conv(c_in, c_out, kernel, stride)
        self.bn = norm(c_out, feeds=act, after=kernel)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))
"""
MODEL = """\
nc: 3
activation: mish
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Squeeze, [24, 3, 2]]
  - [-1, 1, Detect, [nc, anchors]]
"""
PLACE = "7:5 layer 1 [-1, 1, Squeeze, [24, 3, 2]]"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where we stand, so that messages have short paths."""
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(MODEL)
    return tmp_path


def told(code: str) -> list[str]:
    """What is told when a file with this code is loaded."""
    Path("my_ops.py").write_text(code)
    before = dict(OPS)
    with pytest.raises(Fault) as caught:
        load_ops(Path("my_ops.py"))
    assert dict(OPS) == before, "nothing is left of a file that failed"
    return list(caught.value.lines)


def told_of_the_row(code: str) -> list[str]:
    """What is told about the model when this code has been loaded."""
    Path("my_ops.py").write_text(HEAD + code)
    load_ops(Path("my_ops.py"))
    with pytest.raises(Fault) as caught:
        load_graph("model.yaml")
    return [line.removeprefix("model.yaml:") for line in caught.value.lines]


def test_an_op_of_a_users_file_is_an_op_like_any_other(folder):
    Path("my_ops.py").write_text(HEAD + SQUEEZE)
    assert load_ops(Path("my_ops.py")) == ("Squeeze",)
    assert OPS["Squeeze"].file == "my_ops.py:7"
    graph = load_graph("model.yaml")
    Path("conv.yaml").write_text(MODEL.replace("Squeeze", "Conv"))
    assert totals(network_costs(graph, 64)) == totals(network_costs(load_graph("conv.yaml"), 64))
    assert graph.nodes[1].arguments["act"] == "mish"
    assert Network(graph).eval()(torch.zeros(1, 3, 64, 64))[0][0].shape == (1, 2, 16, 16, 8)


def test_an_op_of_a_users_file_can_be_searched(folder):
    Path("my_ops.py").write_text(HEAD + SQUEEZE)
    load_ops(Path("my_ops.py"))
    options = "{kernel: {choice: [3, 5]}, stride: 2, act: {choice: [relu, mish]}}"
    Path("model.yaml").write_text(MODEL.replace("[24, 3, 2]", f"[24, {options}]"))
    graph = load_graph("model.yaml")
    for kind in SUPERNETS:
        assert Network(graph, kind).eval()(torch.zeros(1, 3, 64, 64))[0][0].shape == (1, 2, 16, 16, 8)


def test_a_file_is_loaded_anew_and_only_its_own_ops_are_replaced(folder):
    Path("my_ops.py").write_text(HEAD + SQUEEZE + SQUEEZE.replace("Squeeze", "Other"))
    assert load_ops(Path("my_ops.py")) == ("Squeeze", "Other")
    Path("my_ops.py").write_text(HEAD + SQUEEZE.replace("c_out: Width,", "c_out: int, groups: int,"))
    before = {name for name in OPS if name not in ("Squeeze", "Other")}
    assert load_ops(folder / "my_ops.py") == ("Squeeze",)
    assert set(OPS) == before | {"Squeeze"}
    assert OPS["Squeeze"].check("groups", "x") == "should be a whole number"


def test_an_op_without_arguments_and_a_merge_with_a_rule_of_its_own(folder):
    code = """
@register_op()
class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


def add_shape(inputs, args) -> Shape:
    if len(set(inputs)) > 1:
        raise ValueError("the sources differ; Plus takes maps of one shape")
    return inputs[0]


@register_op("Plus", infer=add_shape, many=True)
class Sum(nn.Module):
    def forward(self, maps):
        return sum(maps)
"""
    Path("my_ops.py").write_text(HEAD + code)
    assert load_ops(Path("my_ops.py")) == ("Twice", "Plus")
    rows = "[-1, 1, Twice, []]\n  - [[-1, 0], 1, Plus, []]"
    Path("model.yaml").write_text(MODEL.replace("[-1, 1, Squeeze, [24, 3, 2]]", rows))
    network = Network(load_graph("model.yaml"))
    held, _ = network.run(range(2), {-1: torch.ones(1, 3, 8, 8)})
    held, _ = network.run([2], dict(held))
    first = network.run([0], {-1: torch.ones(1, 3, 8, 8)})[0][0]
    torch.testing.assert_close(held[2], 3 * first)
    Path("model.yaml").write_text(MODEL.replace("[-1, 1, Squeeze, [24, 3, 2]]", rows).replace("Twice, []", "Conv, [8]"))
    with pytest.raises(Fault) as caught:
        load_graph("model.yaml")
    assert str(caught.value) == (
        "model.yaml:8:5 layer 2 [[-1, 0], 1, Plus, []]: the sources differ; Plus takes maps of one shape "
        "(row 1 Conv gives 8 channels at stride 2; row 0 Conv gives 16 channels at stride 2)"
    )


# ---- a model file that names its ops


def test_a_model_names_the_file_of_its_ops_and_the_user_trusts_it(folder):
    Path("nets").mkdir()
    Path("nets/my_ops.py").write_text(HEAD + SQUEEZE)
    Path("nets/model.yaml").write_text(MODEL.replace("nc: 3", "nc: 3\nops: my_ops.py"))
    with pytest.raises(Fault) as caught:
        load_graph("nets/model.yaml")
    assert str(caught.value) == (
        "nets/model.yaml:2:6: ops: my_ops.py is Python code that would run; --trust-ops allows it, "
        "or --ops FILE names it"
    )
    assert load_graph("nets/model.yaml", trust_ops=True).nodes[1].op.file == "nets/my_ops.py:7"


def test_a_file_that_the_user_names_himself_needs_no_more_trust(folder):
    Path("my_ops.py").write_text(HEAD + SQUEEZE)
    Path("model.yaml").write_text(MODEL.replace("nc: 3", "nc: 3\nops: ./my_ops.py"))
    load_ops(Path("my_ops.py"))
    assert load_graph("model.yaml").nodes[1].op.file == "my_ops.py:7"


def test_faults_of_the_named_file_come_with_those_of_the_model(folder):
    Path("model.yaml").write_text(MODEL.replace("nc: 3", "nc: 3\nops: my_ops.py").replace("mish", "mihs"))
    with pytest.raises(Fault) as caught:
        load_graph("model.yaml", trust_ops=True)
    assert list(caught.value.lines) == [
        "my_ops.py: no such file with ops",
        "model.yaml:3:13: activation 'mihs' is unknown; did you mean 'mish'?",
    ]


# ---- what is told about a wrong file

FILES = {
    "no Python": ("def (:\n", "my_ops.py:1:5: not Python: invalid syntax"),
    "NUL": ("\0", "my_ops.py: not Python: source code string cannot contain null bytes"),
    "raises": ("x = 1\nx.y\n", "my_ops.py:2: AttributeError: 'int' object has no attribute 'y'"),
    "raises inside a function": (
        "def f():\n    return 1 / 0\nf()\n",
        "my_ops.py:2: ZeroDivisionError: division by zero",
    ),
    "imports what is not there": (
        "import nowhere_9\n",
        "my_ops.py:1: ModuleNotFoundError: No module named 'nowhere_9'",
    ),
    "leaves": ("raise SystemExit(3)\n", "my_ops.py:1: SystemExit: 3"),
    "registers nothing": ("x = 1\n", "my_ops.py: registers no op; write @register_op() above an nn.Module"),
    "takes the name of one of ours": (
        HEAD + SQUEEZE.replace("Squeeze", "Conv"),
        "my_ops.py:7: op 'Conv' is already there, in models.ops.conv.Conv; give this one another name",
    ),
    "takes a name twice": (
        HEAD + SQUEEZE + SQUEEZE,
        "my_ops.py:18: op 'Squeeze' is already there, in user_ops_my_ops.Squeeze; give this one another name",
    ),
    "an argument without a type": (
        HEAD + SQUEEZE.replace("stride: int", "stride"),
        "my_ops.py:7: argument 'stride' of op 'Squeeze' has no type; write stride: int, or whatever it is",
    ),
    "a type that is not there": (
        HEAD + SQUEEZE.replace("stride: int", "stride: 'Strid'"),
        "my_ops.py:7: NameError: name 'Strid' is not defined",
    ),
    "a type that cannot be checked": (
        HEAD + SQUEEZE.replace("stride: int", "stride: 3"),
        "my_ops.py:7: the type of argument 'stride' of op 'Squeeze' cannot be checked; take int, float, bool, str, a "
        "tuple of them, or a type of models.ops.primitives",
    ),
    "arguments without names": (
        HEAD + SQUEEZE.replace("stride: int = 1, *,", "*strides: int,"),
        "my_ops.py:7: op 'Squeeze' takes *strides: int; a row can only give arguments that have names",
    ),
    "no nn.Module": (
        HEAD + "@register_op()\nclass Plain:\n    def __init__(self, c_in: int) -> None:\n        pass\n",
        "my_ops.py: op 'Plain' is no nn.Module",
    ),
}


@pytest.mark.parametrize("mistake", FILES)
def test_a_wrong_file_is_told_with_its_line_and_leaves_nothing_behind(mistake, folder):
    code, line = FILES[mistake]
    (said,) = told(code)
    assert said == line


def test_a_file_that_is_not_there_is_a_fault(folder):
    for path in ("nowhere.py", "."):
        with pytest.raises(Fault) as caught:
            load_ops(Path(path))
        assert str(caught.value) == f"{path}: no such file with ops"
    Path("notes.txt").write_text("x = 1")
    with pytest.raises(Fault) as caught:
        load_ops(Path("notes.txt"))
    assert str(caught.value) == "notes.txt: a file with ops is Python, its name ends in .py"


def test_two_files_cannot_have_ops_of_one_name(folder):
    Path("my_ops.py").write_text(HEAD + SQUEEZE)
    Path("more.py").write_text(HEAD + SQUEEZE)
    load_ops(Path("my_ops.py"))
    with pytest.raises(Fault) as caught:
        load_ops(Path("more.py"))
    assert str(caught.value) == "more.py:7: op 'Squeeze' is already there, in my_ops.py:7; give this one another name"
    assert OPS["Squeeze"].file == "my_ops.py:7"


# ---- what is told about a row of an op that goes wrong

WITH_RULE = "\n\ndef rule(inputs, args):\n    {}\n" + SQUEEZE.replace("register_op()", "register_op(infer=rule)")
READS = "(row 0 Conv gives 16 channels at stride 2)"
OPS_THAT_FAIL = {
    "the rule raises": (
        WITH_RULE.format("return args['chanels']"),
        f"{PLACE}: my_ops.py:11: infer of Squeeze raised KeyError: 'chanels' {READS}",
    ),
    "the rule gives no Shape": (
        WITH_RULE.format("return inputs[0].channels, 4"),
        f"{PLACE}: my_ops.py:11: infer of Squeeze raised TypeError: it gave (16, 4), not a Shape of whole numbers "
        f"{READS}",
    ),
    "the rule gives half a channel": (
        WITH_RULE.format("return Shape(args['c_out'] / 2, 4)"),
        f"{PLACE}: my_ops.py:11: infer of Squeeze raised TypeError: it gave Shape(channels=12.0, stride=4, kind='map', "
        f"margin=0), not a Shape of whole numbers {READS}",
    ),
    "the rule gives no channel": (
        WITH_RULE.format("return Shape(0, 4)"),
        f"{PLACE}: would give 0 channels; a map has 1 to 1,000,000 {READS}",
    ),
    "the rule refuses": (WITH_RULE.format("raise ValueError('not today')"), f"{PLACE}: not today {READS}"),
    "the rule says another shape than is given": (
        WITH_RULE.format("return Shape(args['c_out'], inputs[0].stride)"),
        f"{PLACE}: my_ops.py:11: Squeeze is declared to give 24 channels at stride 2, [1, 24, 4, 4] from "
        f"[1, 16, 4, 4], but gives [1, 24, 2, 2]",
    ),
    "the constructor raises": (
        SQUEEZE.replace("super().__init__()\n", "super().__init__()\n        assert stride == 1, 'only stride 1'\n"),
        f"{PLACE}: my_ops.py:7: Squeeze raised AssertionError: only stride 1",
    ),
    "forward raises": (
        SQUEEZE.replace("self.act(self.bn(", "self.act(self.norm("),
        f"{PLACE}: my_ops.py:7: Squeeze raised AttributeError: 'Squeeze' object has no attribute 'norm'",
    ),
    "forward gives a list": (
        SQUEEZE.replace("return self.act", "return [x] or self.act"),
        f"{PLACE}: my_ops.py:7: Squeeze is declared to give 24 channels at stride 4, but gives list",
    ),
    "a wrong argument": (
        SQUEEZE.replace("kernel: Kernel", "kernel: str"),
        f"{PLACE}: Squeeze(c_out, kernel=3, stride=1, *, act=silu): kernel=3 should be a word",
    ),
}


@pytest.mark.parametrize("mistake", OPS_THAT_FAIL)
def test_an_op_that_goes_wrong_is_told_with_its_row_and_its_file(mistake, folder):
    code, line = OPS_THAT_FAIL[mistake]
    assert told_of_the_row(code) == [line]
