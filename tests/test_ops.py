"""Every op of the table: its declared Shape is the real one, and what it leaves open is the plain op it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import models.ops.primitives as primitives
from models.elastic import plain_state
from models.graph import Graph, combinations, normalize, resolve
from models.network import SUPERNETS, Network, build
from models.parse import parse_text
from models.registry import OPS, Shape
from models.spec import Choice, ModelSpec
from models.supernet import Supernet

# Rows that follow these two: 0 gives 8 channels at stride 2, 1 gives 16 at stride 4.
FRONT = """\
nc: 3
anchors: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
"""
ROW = 2  # the index of the row that is looked at
# At least one row for every op; the corners of its Shape rule are worth one each.
EXAMPLES = {
    "Conv": [
        "[-1, 1, Conv, [12]]",
        "[-1, 1, Conv, [16, 5, 1]]",
        "[-1, 1, Conv, [12, 3, 2]]",
        "[-1, 1, Conv, [8, 1, 2]]",
        "[-1, 1, Conv, [8, 6, 2, 2, 4]]",
        "[-1, 1, Conv, [8, 2, 2, 0]]",
        "[-1, 1, Conv, [8, 3, 4]]",
        "[-1, 3, Conv, [16, 3, 1, None, 16]]",
    ],
    "Bottleneck": ["[-1, 1, Bottleneck, [16]]", "[-1, 1, Bottleneck, [12, False, 2]]", "[-1, 2, Bottleneck, [16]]"],
    "BottleneckCSP": ["[-1, 1, BottleneckCSP, [12]]", "[-1, 2, BottleneckCSP, [16, False, 4, 0.75]]"],
    "BottleneckCSP2": ["[-1, 1, BottleneckCSP2, [12]]", "[-1, 3, BottleneckCSP2, [8, True, 2]]"],
    "SPP": ["[-1, 1, SPP, [12]]", "[-1, 1, SPP, [16, [3]]]"],
    "SPPCSP": ["[-1, 1, SPPCSP, [12]]", "[-1, 1, SPPCSP, [16, 0.25, [3, 7]]]"],
    "Concat": ["[[-1, 1], 1, Concat, [1]]", "[[-1], 1, Concat, []]"],
    "nn.Upsample": [
        "[-1, 1, nn.Upsample, []]",
        "[-1, 1, nn.Upsample, [None, 4, bilinear]]",
        "[-1, 2, nn.Upsample, [None, 1]]",
    ],
    "Detect": ["[[0, 1], 1, Detect, [nc, anchors]]"],
}
ROWS = [row for rows in EXAMPLES.values() for row in rows]
# What a test leaves open where an op may choose.
OPTIONS = {"kernel": (3, 5), "act": ("relu", "leaky", "mish"), "number": (1, 2)}


def spec_with(row: str) -> ModelSpec:
    """A model whose row 2 is `row`."""
    is_head = row.split(", ")[-1].startswith("anchors")
    rest = "" if is_head else "  - [-1, 1, Detect, [nc, anchors]]\n"
    return parse_text(f"{FRONT}  - {row}\n{rest}")


def opened(row: str) -> ModelSpec | None:
    """The same with everything left open that the op may leave open; None where that is nothing."""
    spec = spec_with(row)
    node = resolve(spec).nodes[ROW]
    given = dict(node.op.signature.bind(*node.layer.args, **node.layer.kwargs).arguments)
    for name in node.op.signature.parameters:
        if node.op.may_choose(name):
            given[name] = Choice(f"{ROW}.{name}", OPTIONS[name])
    if "kernel" in given:
        given.pop("padding", None)
    repeats: int | Choice = 1
    if "number" in node.op.parameters or ("c_in" in node.op.parameters and node.output == node.inputs[0]):
        repeats = Choice(f"{ROW}.number", OPTIONS["number"])
    layer = replace(spec.layers[ROW], repeats=repeats, args=(), kwargs=given)
    return replace(spec, layers=(*spec.layers[:ROW], layer, *spec.layers[ROW + 1 :])) if layer.choices else None


OPEN = [row for row in ROWS if opened(row)]


def scramble(module: nn.Module) -> None:
    """Statistics and scales that differ from norm to norm, as after training."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.3)


def outputs(network: Network, images: Tensor) -> list[Tensor]:
    """What the row that is looked at gives, and the head."""
    with torch.no_grad():
        held, _ = network.run(range(ROW + 1), {-1: images})
        return [held[ROW], *network(images)[0]]


def test_every_op_has_an_example():
    assert set(EXAMPLES) == set(OPS), "give each op a row in EXAMPLES"
    assert all(spec_with(row).layers[ROW].op == name for name, rows in EXAMPLES.items() for row in rows)


@pytest.mark.parametrize("row", ROWS)
def test_declared_shape_is_the_real_shape(row):
    graph: Graph = resolve(spec_with(row))
    node = graph.nodes[ROW]
    with torch.device("meta"):
        held, _ = Network(graph).run(range(ROW + 1), {-1: torch.empty(2, 3, 64, 96)})
    y = held[ROW]
    if node.op.is_head:
        assert node.output.kind == "maps"
        assert [level.shape for level in y] == [(2, 2, 64 // s.stride, 96 // s.stride, 8) for s in node.inputs]
    else:
        assert y.shape == (2, node.output.channels, 64 // node.output.stride, 96 // node.output.stride)
        assert node.output == Shape(y.shape[1], 64 // y.shape[2])


@pytest.mark.parametrize("supernet", SUPERNETS)
@pytest.mark.parametrize("row", OPEN)
def test_every_option_is_the_plain_op_with_the_same_weights(row, supernet):
    torch.manual_seed(0)
    spec = opened(row)
    assert spec is not None
    net = Supernet(spec, supernet).eval()
    scramble(net)
    images = torch.rand(2, 3, 32, 32)
    seen = []
    for picks in combinations(net.spec.choices):
        net.activate(picks)
        plain = build(normalize(spec).freeze(picks)).eval()
        state = plain_state(net.network)
        assert set(state) == set(plain.state_dict())
        plain.load_state_dict(state)
        active, derived = outputs(net.network, images), outputs(plain, images)
        for ours, theirs in zip(active, derived, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert all(not torch.equal(active[0], other) for other in seen), "two options do the same"
        seen.append(active[0])


def test_each_op_that_has_a_kernel_or_an_activation_may_leave_it_open():
    for name, op in OPS.items():
        for argument in OPTIONS.keys() & op.parameters.keys():
            assert op.may_choose(argument), f"{name}: {argument} is not written as Kernel, Act or Count"
    assert {spec_with(row).layers[ROW].op for row in OPEN} >= {n for n, op in OPS.items() if "act" in op.parameters}


def test_an_option_is_the_same_whichever_is_active():
    """The other options of a mixture are computed while one is active."""
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 6)
    kernel, act, number = (Choice(name, options) for name, options in OPTIONS.items())
    leaves = [
        primitives.conv(2, 2, kernel),
        primitives.activation(act),
        primitives.norm(2, feeds=act),
        primitives.repeat(number, lambda: nn.Conv2d(2, 2, 1)),
    ]
    for leaf in leaves:
        scramble(leaf.eval())
        for active in leaf.choice.options:
            leaf.active = active
            mixed = [leaf.option(option, x) for option in leaf.choice.options]
            for option, y in zip(leaf.choice.options, mixed, strict=True):
                leaf.active = option
                assert torch.equal(y, leaf(x))


def test_a_residual_is_added_only_where_channels_agree():
    torch.manual_seed(0)
    x = torch.rand(1, 8, 4, 4)
    for c_out, shortcut in ((8, True), (8, False), (6, True)):
        block = OPS["Bottleneck"].module(c_in=8, c_out=c_out, shortcut=shortcut).eval()
        inner = block.cv2(block.cv1(x))
        torch.testing.assert_close(block(x), x + inner if shortcut and c_out == 8 else inner)


def test_a_convolution_has_the_padding_that_was_written():
    assert OPS["Conv"].module(c_in=3, c_out=8, kernel=6, stride=2, padding=2).conv.padding == (2, 2)
    assert OPS["Conv"].module(c_in=3, c_out=8, kernel=7).conv.padding == (3, 3)


def test_the_pyramid_pools_beside_the_map():
    """A single bright cell fills the square of each pool size."""
    pyramid = OPS["SPP"].module(c_in=2, c_out=4, pools=(3, 5))
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    assert [int(pool(x).sum()) for pool in pyramid.m] == [9, 25]


def test_upsampling_repeats_cells():
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert OPS["nn.Upsample"].module()(x).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@pytest.mark.parametrize("name", primitives.ACTIVATIONS)
def test_an_activation_is_the_function_of_its_name(name):
    formulas = {
        "relu": lambda x: x.clamp(min=0),
        "leaky": lambda x: torch.where(x < 0, 0.1 * x, x),
        "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "identity": lambda x: x,
    }
    x = torch.linspace(-5, 5, 41)
    torch.testing.assert_close(primitives.activation(name)(x), formulas[name](x))


def test_norms_are_those_of_scaled_yolov4():
    norm = primitives.norm(8)
    assert isinstance(norm, nn.BatchNorm2d) and (norm.eps, norm.momentum) == (1e-3, 0.03)
