"""A derived network is the subnet that was active in its supernet, whatever the file leaves open and wherever."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.structures import Fault
from engine.calibrate import calibrate
from engine.export import write_file
from engine.exported import read_file
from models.__main__ import main
from models.checkpoint import warm_start
from models.cost import count_params
from models.elastic import ElasticConv2d, elastic_leaves
from models.graph import normalize, resolve
from models.network import MOST_CANDIDATES, Network, build, head_maximum
from models.ops.primitives import NORMS
from models.parse import dump, parse_text
from models.registry import OPS
from models.show import value_text
from models.spec import flow
from models.supernet import Supernet
from models.user_ops import load_ops
from search.space import SearchSpace

FILE = """
nc: 3
activation: mish
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - {body}
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - {neck}
  - [[2, 4], 1, Detect, [nc, anchors]]
"""
BLOCKS = {  # rows that every kind of supernet can hold: 12 candidates each
    "body": "[-1, {choice: [1, 2]}, BottleneckCSP, [16, {kernel: {choice: [3, 5]}, "
    "act: {choice: [relu, leaky, mish]}}]]",
    "neck": "[-1, 2, MBottleneckCSP2, [16]]",
}
EACH = {  # a choice a bottleneck
    "body": "[-1, {choice: [1, 3, 2]}, BottleneckCSP2, [16, {kernel: {choice: [1, 3, 5]}, act: {choice: [relu, mish]}, "
    "per_bottleneck: true}]]",
    "neck": "[-1, 2, C3, [16, {kernel: [{choice: [3, 5, 7]}, 3], act: {choice: [mish, silu]}}]]",
}
EACH_FEW = {  # the same, few enough for whole blocks
    "body": "[-1, {choice: [1, 2]}, C3Ghost, [16, {kernel: {choice: [3, 5]}, per_bottleneck: true}]]",
    "neck": "[-1, 2, BottleneckCSP, [16, {act: {choice: [leaky, silu, mish]}, per_bottleneck: true}]]",
}
FEW = {"body": "[-1, 1, MBottleneckCSP2, [16]]", "neck": "[-1, 1, Conv, [16]]"}
SUPERNETS = [
    *(("shared", norms, BLOCKS) for norms in NORMS),
    ("shared", "k_act", EACH),
    ("independent", "act", BLOCKS),
    ("independent", "act", EACH_FEW),
]
IDS = [f"{kind} {norms} {'blocks' if rows is BLOCKS else 'bottlenecks'}" for kind, norms, rows in SUPERNETS]

# what a test leaves open where an op may choose
OPTIONS: dict[str, tuple[Any, ...]] = {
    "kernel": (3, 5),
    "act": ("relu", "mish"),
    "concat_act": ("leaky", "silu"),
    "cheap": (3, 5),
    "dilations": ((1, 2, 3), (2,)),
    "repeats": (1, 2),
    "expansion": (0.25, 0.5),
    "expand": (2, 3),
}


def supernet(kind: str, norms: str, rows: dict[str, str]) -> Supernet:
    """With weights, norms and kernel matrices that all differ from how they start."""
    torch.manual_seed(0)
    net = Supernet(parse_text(FILE.format(**rows)), kind, norms)
    with torch.no_grad():
        for module in net.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, ElasticConv2d):
                for transform in module.transforms.values():
                    transform += 0.2 * torch.randn_like(transform)
    return net


def subnets(space: SearchSpace, count: int) -> Iterator[dict[str, Any]]:
    """Every architecture with one pick for all choices of a name, at the least and largest number; some at random."""
    kinds = {choice.name.split(".")[1]: choice.options for choice in space.choices}
    for picks in itertools.product(*kinds.values()):
        wanted = dict(zip(kinds, picks, strict=True))
        found = {c.name: wanted[c.name.split(".")[1]] for c in space.choices}
        if all(found[choice.name] in choice.options for choice in space.choices):
            yield found
    rng = random.Random(3)
    for _ in range(count):
        yield dict(space.sample(rng).picks)


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("kind", "norms", "rows"), SUPERNETS, ids=IDS)
def test_a_derived_network_is_the_active_subnet(kind, norms, rows):
    net = supernet(kind, norms, rows)
    space = SearchSpace.of(net.spec)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    counts = set()
    for picks in subnets(space, 20):
        net.activate(picks)
        calibrate(net.network, [images])
        net.eval()
        with torch.no_grad():
            expected, _ = net.network(images)
            plain = net.derive(picks).eval()
            found, _ = plain(images)
        assert largest_difference(expected, found) <= 1e-5 * head_maximum(expected)
        assert not list(elastic_leaves(plain)) and not plain.spec.choices
        counts.add(count_params(plain))
    assert len(counts) > 1 and max(counts) < count_params(net.network)
    assert count_params(plain) == count_params(
        build(parse_text(dump(plain.spec)))
    )  # nothing in it is left of the search


# ---- any op, anywhere


ONE_SOURCE = {name: op for name, op in OPS.items() if not op.file and not op.is_head and not op.many}
SEARCHED = [name for name, op in ONE_SOURCE.items() if {"kernel", "act", "number"} & set(op.parameters)]


# What an op asks for behind its channels.
REST = {"A2C2f": "False, ", "ELAN1": "8, 8, ", "RepNCSPELAN4": "8, 8, ", "SPPELAN": "8, "}


def halves(name: str) -> bool:
    """Whether an op halves its map where its row says nothing about it, so that it may be there only once."""
    row = f"[-1, 1, {name}, [16, {REST.get(name, '')}]]"
    node = resolve(parse_text(FILE.format(body=row, neck="[-1, 1, Conv, [16]]"))).nodes[2]
    return node.output.stride != node.inputs[0].stride


def open_row(name: str, most: int) -> str:
    """A row with all open that the op may leave open, as far as that makes at most `most` combinations."""
    given = {
        argument: OPTIONS[argument] for argument in OPS[name].signature.parameters if OPS[name].may_choose(argument)
    }
    while 2 * math.prod(map(len, given.values())) > most:
        given.popitem()
    number = "1" if halves(name) else "{choice: [1, 2]}"
    arguments = flow({argument: {"choice": options} for argument, options in given.items()})
    return f"[-1, {number}, {name}, [16, {REST.get(name, '')}{arguments}]]"


def test_the_searched_ops_are_those_written_with_the_primitives():
    assert set(SEARCHED) >= {"Conv", "Focus", "Bottleneck", "C3", "C3TR", "GhostConv", "SPP", "SPPCSP", "VoVCSP"}
    chosen = {name for name, op in ONE_SOURCE.items() if any(map(op.may_choose, op.signature.parameters))}
    assert chosen <= set(SEARCHED)


@pytest.mark.parametrize("place", ["body", "neck"])
@pytest.mark.parametrize("name", SEARCHED)
def test_any_op_can_be_searched_in_the_backbone_and_in_the_head(name, place):
    for kind, most in (("shared", 16), ("independent", MOST_CANDIDATES)):
        rows = {"body": "[-1, 1, Conv, [16]]", "neck": "[-1, 1, Conv, [16]]", place: open_row(name, most)}
        net = supernet(kind, "k_act", rows).eval()
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        space = SearchSpace.of(net.spec)
        seen: list[list[Tensor]] = []
        for number in random.Random(0).sample(range(space.size), min(space.size, 6)):
            picks = dict(space.at(number).picks)
            net.activate(picks)
            with torch.no_grad():
                expected, found = net.network(images)[0], net.derive(picks)(images)[0]
            assert largest_difference(expected, found) <= 1e-5 * head_maximum(expected)
            assert all(largest_difference(expected, other) > 0 for other in seen), "two options do the same"
            seen.append(expected)


# ---- one value a bottleneck


def test_the_rest_of_a_block_has_the_activation_of_its_first_bottleneck():
    text = FILE.format(
        body="[-1, 3, BottleneckCSP, [16, {act: [relu, leaky, silu], kernel: [3, 5, 1]}]]", neck="[-1, 1, Conv, [16]]"
    )
    block = build(parse_text(text)).layers[2]
    assert [type(b.cv2.act) for b in block.m] == [type(b.cv1.act) for b in block.m] == [nn.ReLU, nn.LeakyReLU, nn.SiLU]
    assert [b.cv2.conv.kernel_size[0] for b in block.m] == [3, 5, 1]
    assert all(type(act) is nn.ReLU for act in (block.cv1.act, block.act, block.cv4.act))


@pytest.mark.parametrize("op", ["BottleneckCSP", "BottleneckCSP2", "C2f", "C3", "C3Ghost"])
def test_equal_values_everywhere_are_the_plain_block(op):
    def network(arguments: str) -> Network:
        torch.manual_seed(0)
        return build(parse_text(FILE.format(body=f"[-1, 2, {op}, [16, {{{arguments}}}]]", neck="[-1, 1, Conv, [16]]")))

    one, each = network("kernel: 5, act: leaky"), network("kernel: [5, 5], act: [leaky, leaky]")
    assert str(one) == str(each)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), each.state_dict().values(), strict=True))


def test_the_shorthand_is_a_list_of_choices_up_to_the_largest_number():
    spec = normalize(parse_text(FILE.format(**EACH)))
    assert [choice.name for choice in spec.choices] == [
        *("2.kernel.0", "2.kernel.1", "2.kernel.2", "2.act.0", "2.act.1", "2.act.2", "2.number"),
        *("4.kernel.0", "4.act"),
    ]
    written = (
        "[-1, {choice: [1, 3, 2]}, BottleneckCSP2, [16, {kernel: [{choice: [1, 3, 5]}, {choice: [1, 3, 5]}, "
        "{choice: [1, 3, 5]}], act: [{choice: [relu, mish]}, {choice: [relu, mish]}, {choice: [relu, mish]}]}]]"
    )
    assert f"  - {written}  # 2\n" in dump(spec)
    again = normalize(parse_text(dump(spec)))
    assert again.choices == spec.choices and dump(again) == dump(spec) == dump(normalize(spec))


def test_the_shorthand_counts_after_the_depth_multiple():
    text = "depth_multiple: 0.33" + FILE.format(
        body="[-1, 6, C3, [16, {kernel: {choice: [3, 5]}, per_bottleneck: true}]]", neck="[-1, 1, Conv, [16]]"
    )
    assert [choice.name for choice in normalize(parse_text(text)).choices] == ["2.kernel.0", "2.kernel.1"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_frozen_file_writes_a_value_for_each_bottleneck_that_is_there(number):
    spec = normalize(parse_text(FILE.format(**EACH)))
    picks = {choice.name: choice.options[0] for choice in spec.choices}
    picks |= {"2.number": number, "2.kernel.0": 3, "2.kernel.1": 5, "2.kernel.2": 3, "2.act.1": "mish"}
    frozen = spec.freeze(picks)
    kernels, acts = [3, 5, 3][:number], ["relu", "mish", "relu"][:number]
    line = f"[-1, {number}, BottleneckCSP2, [16, {{kernel: {flow(kernels)}, act: {flow(acts)}}}]]"
    assert f"  - {line}  # 2\n" in dump(frozen)
    resolve(parse_text(dump(frozen)))


def test_a_list_is_shown_in_few_characters():
    node = resolve(parse_text(FILE.format(**EACH))).nodes[4]
    assert [value_text(value) for value in node.layer.kwargs.values()] == ["[{3|5|7}, 3]", "{mish|silu}"]


def test_lists_of_choices_are_compared_by_their_options(tmp_path, capsys):
    """Not by the names of the choices, which hold the row's."""
    one = FILE.format(body="[-1, 1, Conv, [16]]", neck=EACH["neck"])
    args = EACH["neck"].removeprefix("[-1, 2, C3, ").removesuffix("]")
    other = one.replace(EACH["neck"], f"{{name: neck, from: -1, number: 2, op: C3, args: {args}}}")
    assert one != other
    files = [tmp_path / "one.yaml", tmp_path / "other.yaml"]
    for file, text in zip(files, (one, other), strict=True):
        file.write_text(text)
    assert main(["diff", *map(str, files), "--imgsz", "32"]) == 0
    files[1].write_text(one.replace("choice: [3, 5, 7]", "choice: [3, 5]"))
    assert main(["diff", *map(str, files), "--imgsz", "32"]) == 1
    assert "kernel [{3|5|7}, 3] -> [{3|5}, 3]" in capsys.readouterr().out


WRONG = {
    "kernel: [3, 5, 3]": "{op}: a list has one value a bottleneck, here 2; kernel=[3, 5, 3] has 3",
    "kernel: []": "{op}: a list has one value a bottleneck, here 2; kernel=[] has 0",
    "kernel: [3, x]": "{op}: kernel=x should be a whole number",
    "kernel: [3, True]": "{op}: kernel=True should be a whole number",
    "act: [relu, mosh]": "{op}: act=mosh is unknown; did you mean 'mish'?",
    "shortcut: [{choice: [True, False]}]": "{op}: shortcut=[{choice: [True, False]}]: this argument takes no list with "
    "a choice in it",
    "per_bottleneck: true": "per_bottleneck is for a choice in kernel, act, but none of them is one here",
    "kernel: {choice: [3, 5]}, per_bottleneck: 2": "per_bottleneck is True or False; got 2",
    "per_botleneck: true": "{op} has no argument 'per_botleneck'; did you mean 'per_bottleneck'?",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_no_list_for_the_bottlenecks_is_told_with_its_row(arguments):
    row = f"[-1, 2, C3, [16, {{{arguments}}}]]"
    with pytest.raises(Fault) as problem:
        resolve(parse_text(FILE.format(body=row, neck="[-1, 1, Conv, [16]]")))
    assert len(problem.value.lines) == 1
    place, _, said = problem.value.lines[0].partition("]]: ")
    assert place.startswith("<text>:8:5 layer 2 [-1, 2, C3, [16, ")
    assert said == WRONG[arguments].replace("{op}", str(OPS["C3"]))


def test_an_op_without_bottlenecks_has_nothing_to_spread():
    row = "[-1, 2, Conv, [16, {act: {choice: [relu, mish]}, per_bottleneck: true}]]"
    with pytest.raises(Fault, match="Conv repeats no bottlenecks, so per_bottleneck means nothing here; known are"):
        resolve(parse_text(FILE.format(body=row, neck="[-1, 1, Conv, [16]]")))


def test_false_leaves_one_choice_for_all():
    row = "[-1, 2, C3, [16, {kernel: {choice: [3, 5]}, per_bottleneck: false}]]"
    spec = normalize(parse_text(FILE.format(body=row, neck="[-1, 1, Conv, [16]]")))
    assert [choice.name for choice in spec.choices] == ["2.kernel"]


USERS = """
from torch import nn
from models.ops.primitives import Count, Kernels, Width, conv, each, repeat
from models.registry import register_op

@register_op()
class Row(nn.Module):
    def __init__(self, c_in: int, c_out: Width, number: Count = 1, *, kernel: Kernels = 3) -> None:
        super().__init__()
        self.first = conv(c_in, c_out)
        self.m = repeat(number, lambda index: conv(c_out, c_out, each(kernel, index)))

    def forward(self, x):
        return self.m(self.first(x))
"""


def test_an_op_of_a_user_may_have_bottlenecks_of_its_own(tmp_path):
    (tmp_path / "row.py").write_text(USERS)
    before = dict(OPS)
    try:
        load_ops(tmp_path / "row.py")
        row = "[-1, {choice: [1, 2]}, Row, [16, {kernel: {choice: [3, 5]}, per_bottleneck: true}]]"
        net = supernet("shared", "act", {"body": row, "neck": "[-1, 1, Conv, [16]]"})
        assert [choice.name for choice in net.spec.choices] == ["2.kernel.0", "2.kernel.1", "2.number"]
        plain = net.derive({"2.kernel.0": 5, "2.kernel.1": 3, "2.number": 2})
        assert [layer.kernel_size for layer in plain.layers[2].m] == [(5, 5), (3, 3)]
    finally:
        OPS.clear()
        OPS.update(before)


# ---- from a plain checkpoint


def test_a_supernet_started_from_a_plain_network_computes_it_with_any_larger_kernel():
    """Also one that was trained before: its matrices become the identity, its rings zero."""
    rows = {name: row.replace("choice: [1, 3, 5]", "choice: [3, 5, 7]") for name, row in EACH.items()}
    net = supernet("shared", "k_act", rows).eval()
    space = SearchSpace.of(net.spec)
    images = torch.rand(2, 3, 32, 32)
    picks = {c.name: 3 if ".kernel" in c.name else c.options[-1] for c in space.choices} | {"2.number": 3}
    plain = net.derive(picks)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loaded, missing = warm_start(net.network, plain.state_dict())
    assert missing == [] and len(loaded) == len(net.network.state_dict())
    with torch.no_grad():
        expected, _ = plain(images)
        for kernels in itertools.product((3, 5, 7), repeat=4):
            names = [choice.name for choice in space.choices if ".kernel" in choice.name]
            net.activate(picks | dict(zip(names, kernels, strict=True)))
            found, _ = net.network(images)
            assert largest_difference(expected, found) <= 1e-5 * head_maximum(expected)


def test_a_supernet_started_from_a_supernet_keeps_its_matrices():
    net, other = supernet("shared", "act", EACH), supernet("shared", "act", EACH)
    for tensor in net.network.state_dict().values():
        tensor.zero_()
    assert warm_start(net.network, other.network.state_dict())[1] == []
    for one, two in zip(net.network.state_dict().values(), other.network.state_dict().values(), strict=True):
        assert torch.equal(one, two)


# ---- as ONNX


@pytest.mark.parametrize(("kind", "norms", "rows"), [("shared", "k_act", EACH), ("independent", "act", FEW)])
def test_an_exported_subnet_is_the_active_one_and_as_small_as_it_is(kind, norms, rows, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from bench.derived import Logits

    net = supernet(kind, norms, rows)
    picks = dict(SearchSpace.of(net.spec).sample(random.Random(1)).picks)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net.activate(picks)
    calibrate(net.network, [images])
    net.eval()
    with torch.no_grad():
        expected, _ = Logits(net.network)(images)
    plain = net.derive(picks).eval()
    file = tmp_path / "subnet.onnx"
    write_file(file, "onnx", Logits(plain), images, {})
    found = read_file(file, "onnx")(images)[0]
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    weights = [tuple(t.dims) for t in onnx.load(file).graph.initializer if len(t.dims) == 4]
    kernels = [tuple(p.shape) for p in plain.parameters() if p.ndim == 4]
    assert sorted(weights) == sorted(kernels)
    assert sum(map(math.prod, weights)) < sum(p.numel() for p in net.network.parameters() if p.ndim == 4)
