"""Every op of the table: its declared Shape is the real one, and what it leaves open is the plain op it stands for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import models.ops.primitives as primitives
from data.structures import Fault
from models.elastic import plain_state
from models.fuse import fuse
from models.graph import Graph, combinations, normalize, resolve
from models.network import SUPERNETS, Network, build
from models.parse import parse_text
from models.registry import OPS
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
# The same for ops under a mask: 0 gives 16 channels at stride 4, 1 a mask of patches of 2 x 2 of its cells.
MASKED_FRONT = """\
nc: 3
anchors: 2
backbone:
  - [-1, 1, Conv, [16, 3, 4]]
  - [-1, 1, MaskPredictor, [[8, 8, 8]]]
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
        "[-1, 1, Conv, [12, 3, 2, {dilation: 3}]]",
        "[-1, 1, Conv, [12, 3, 1, 2, {dilation: 2}]]",
        "[-1, 1, Conv, [12, 5, 2, same, {eps: 1e-5}]]",
        "[-1, 1, Conv, [12, 2, 1, same]]",
    ],
    "Focus": ["[-1, 1, Focus, [12, 3]]", "[-1, 1, Focus, [16, 2, 2, 0, 4]]"],
    "Bottleneck": ["[-1, 1, Bottleneck, [16]]", "[-1, 1, Bottleneck, [12, False, 2]]", "[-1, 2, Bottleneck, [16]]"],
    "BottleneckCSP": [
        "[-1, 1, BottleneckCSP, [12]]",
        "[-1, 2, BottleneckCSP, [16, False, 4, 0.75]]",
        "[-1, 1, BottleneckCSP, [16, {concat_act: leaky}]]",
    ],
    "BottleneckCSP2": ["[-1, 1, BottleneckCSP2, [12]]", "[-1, 3, BottleneckCSP2, [8, True, 2]]"],
    "C2f": ["[-1, 1, C2f, [12]]", "[-1, 2, C2f, [16, True, 4, 0.75]]"],
    "C3": ["[-1, 1, C3, [12]]", "[-1, 2, C3, [16, False, 4, 0.75]]"],
    "C3Ghost": ["[-1, 1, C3Ghost, [8]]", "[-1, 2, C3Ghost, [16, 0.25]]"],
    "C3TR": ["[-1, 1, C3TR, [8]]", "[-1, 2, C3TR, [16, 0.25]]"],
    "GhostConv": ["[-1, 1, GhostConv, [12]]", "[-1, 1, GhostConv, [16, 3, 2, 4, {cheap: 3}]]"],
    "CABlock": [
        "[-1, 1, CABlock, [12]]",
        "[-1, 2, CABlock, [16, 5, 2, 2, [1, 2]]]",
        "[-1, 1, CABlock, [16, 3, 1, 1, {attention: none}]]",
        "[-1, 1, CABlock, [12, {attention: channel, reduction: None}]]",
        "[-1, 1, CABlock, [16, {attention: spatial, dilations: [2], squeeze: max, spatial_kernel: 3}]]",
    ],
    "UpFusion": ["[[1, 0], 1, UpFusion, [12]]", "[[1, 0], 1, UpFusion, [8, 2, cat, nearest, {dilations: [2]}]]"],
    "DownFusion": ["[[0, 1], 1, DownFusion, [12]]", "[[0, 1], 1, DownFusion, [16, 2, add, {dilations: [2]}]]"],
    "MBConv": [
        "[-1, 1, MBConv, [12]]",
        "[-1, 2, MBConv, [16, 5, 2, 1]]",
        "[-1, 2, MBConv, [16, 3, 1, 1.5, 0, {eps: 1e-3}]]",
        "[-1, 1, MBConv, [12, 3, 1, 2, 0.5, {padding: same}]]",
    ],
    "VoVCSP": ["[-1, 1, VoVCSP, [12]]", "[-1, 2, VoVCSP, [16]]"],
    "SPP": ["[-1, 1, SPP, [12]]", "[-1, 1, SPP, [16, [3]]]"],
    "SPPF": [
        "[-1, 1, SPPF, [12]]",
        "[-1, 1, SPPF, [16, {shortcut: True, first_act: identity}]]",
        "[-1, 1, SPPF, [16, 3]]",
    ],
    "SPPCSP": ["[-1, 1, SPPCSP, [12]]", "[-1, 1, SPPCSP, [16, 0.25, [3, 7]]]"],
    "ASPP": ["[-1, 1, ASPP, [16]]", "[-1, 1, ASPP, [12, [2, 3], {dropout: 0, eps: 1e-3}]]"],
    "ResStage": [
        "[-1, 1, ResStage, [12]]",
        "[-1, 2, ResStage, [16, 2, {block: bottleneck}]]",
        "[-1, 2, ResStage, [16, 1, {dilation: 2, eps: 1e-3}]]",
    ],
    "AttentionBranch": [
        "[-1, 1, AttentionBranch, [nc]]",
        "[-1, 1, AttentionBranch, [nc, 1, 2, {blocks: abn, task: classes}]]",
        "[-1, 1, AttentionBranch, [nc, {blocks: none}]]",
    ],
    "FAL": ["[-1, 1, FAL, [nc, 1]]"],
    "Add": ["[[-1, 1], 1, Add, []]"],
    "Concat": ["[[-1, 1], 1, Concat, [1]]", "[[-1], 1, Concat, []]"],
    "nn.Upsample": [
        "[-1, 1, nn.Upsample, []]",
        "[-1, 1, nn.Upsample, [None, 4, bilinear]]",
        "[-1, 2, nn.Upsample, [None, 1]]",
    ],
    "nn.MaxPool2d": [
        "[-1, 1, nn.MaxPool2d, [2]]",
        "[-1, 1, nn.MaxPool2d, [2, 2, 0]]",
        "[-1, 1, nn.MaxPool2d, [3, 2, 1]]",
        "[-1, 2, nn.MaxPool2d, [5, 1, 2]]",
        "[-1, 1, nn.MaxPool2d, [2, 1]]",
    ],
    "nn.ZeroPad2d": ["[-1, 1, nn.ZeroPad2d, [[1, 0, 0, 1]]]", "[-1, 1, nn.ZeroPad2d, [[1, 2, 2, 1]]]"],
    "Detect": ["[[0, 1], 1, Detect, [nc, anchors]]"],
    "A2C2f": [
        "[-1, 2, A2C2f, [12, False]]",
        "[-1, 1, A2C2f, [64, True, 4]]",
        "[-1, 1, A2C2f, [16, True, 1, True, 1.2, 2.0]]",
    ],
    "AConv": ["[-1, 1, AConv, [12]]"],
    "ADown": ["[-1, 1, ADown, [12]]"],
    "BottleneckCSPB": ["[-1, 1, BottleneckCSPB, [12, {block: residual, groups: 2, shortcut: True}]]"],
    "BottleneckCSPC": [
        "[-1, 1, BottleneckCSPC, [12]]",
        "[-1, 2, BottleneckCSPC, [16, True, 4, {block: residual, squeeze: 1.0}]]",
    ],
    "BottleneckCSPF": ["[-1, 2, BottleneckCSPF, [12]]"],
    "C2": ["[-1, 2, C2, [12]]"],
    "C2PSA": ["[-1, 2, C2PSA, [16]]"],
    "C2fCIB": ["[-1, 1, C2fCIB, [12]]", "[-1, 2, C2fCIB, [12, True, True]]"],
    "C3k2": [
        "[-1, 1, C3k2, [12]]",
        "[-1, 2, C3k2, [12, True, 0.75]]",
        "[-1, 1, C3k2, [16, False, 0.5, True, 2, False]]",
    ],
    "CBFuse": ["[[1, 0], 1, CBFuse, [[4]]]"],
    "CBLinear": ["[-1, 1, CBLinear, [[8, 12]]]"],
    "DWT": ["[-1, 1, DWT, []]"],
    "DownC": ["[-1, 1, DownC, [12]]"],
    "DualDDetect": ["[[0, 1, 0, 1], 1, DualDDetect, [nc]]"],
    "ELAN1": ["[-1, 1, ELAN1, [12, 8, 5]]"],
    "IAuxDetect": ["[[0, 1, 0, 1], 1, IAuxDetect, [nc, anchors]]"],
    "IDetect": ["[[0, 1], 1, IDetect, [nc, anchors]]"],
    "PSA": ["[-1, 1, PSA, [16]]"],
    "ReOrg": ["[-1, 1, ReOrg, []]"],
    "RepC3": ["[-1, 2, RepC3, [12, 0.5]]", "[-1, 1, RepC3, [12]]"],
    "RepConv": [
        "[-1, 1, RepConv, [16]]",
        "[-1, 1, RepConv, [12, 3, 2, 4]]",
        "[-1, 1, RepConv, [16, 5, 1, 16, {beside: 3, identity: False}]]",
    ],
    "RepNCSPELAN4": ["[-1, 1, RepNCSPELAN4, [12, 8, 6, 2]]"],
    "SCDown": ["[-1, 1, SCDown, [12]]", "[-1, 1, SCDown, [16, 5, 1]]"],
    "SPPCSPC": ["[-1, 1, SPPCSPC, [12, 0.25, [3, 7]]]"],
    "SPPELAN": ["[-1, 1, SPPELAN, [12, 6]]"],
    "Stem": ["[-1, 1, Stem, [12]]"],
    "TripleDDetect": ["[[0, 1, 0, 1, 0, 1], 1, TripleDDetect, [nc, 4]]"],
    "nn.ConvTranspose2d": ["[-1, 1, nn.ConvTranspose2d, [12]]", "[-1, 1, nn.ConvTranspose2d, [12, 6, 4, 1]]"],
    "nn.Identity": ["[-1, 2, nn.Identity, []]"],
    "v10Detect": ["[[0, 1], 1, v10Detect, [nc]]", "[[0, 1], 1, v10Detect, [nc, 1]]"],
    "DFLDetect": [
        "[[0, 1], 1, DFLDetect, [nc]]",
        "[[0, 1], 1, DFLDetect, [nc, 4, {widths: v9, light: True, groups: 2}]]",
        "[[0, 1], 1, DFLDetect, [nc, 4, {act: relu}]]",
    ],
    "Classify": [
        "[-1, 1, Classify, [nc]]",
        "[-1, 1, Classify, [nc, {dropout: 0.5}]]",
        "[[0, 1], 1, Classify, [nc]]",
    ],
    "SeparableConv": ["[-1, 1, SeparableConv, [12]]", "[-1, 1, SeparableConv, [16, 5, 2]]"],
    "C3Separable": ["[-1, 1, C3Separable, [12]]", "[-1, 2, C3Separable, [16, False, 0.75]]"],
    "YOLOXHead": ["[[0, 1], 1, YOLOXHead, [nc]]", "[[0, 1], 1, YOLOXHead, [nc, True, {act: relu}]]"],
    "MaskPredictor": ["[-1, 1, MaskPredictor, []]", "[-1, 1, MaskPredictor, [[8, 4, 4], 4, False, {low: 0.2}]]"],
    "MaskedDownsample": ["[[0, 1], 1, MaskedDownsample, []]", "[[0, 1], 1, MaskedDownsample, [softmax]]"],
    "SelConv": [
        "[[0, 1], 1, SelConv, [12]]",
        "[[0, 1], 1, SelConv, [8, 5, {pool: max, groups: 4}]]",
        "[[0, 1], 1, SelConv, [8, 3, transition]]",
        "[[0, 1], 1, SelConv, [12, 3, {resolution: low, pool: max}]]",
    ],
    "SelStage": [
        "[[0, 1], 1, SelStage, [12]]",
        "[[0, 1], 2, SelStage, [16, {block: bottleneck, pool: avg}]]",
        "[[0, 1], 2, SelStage, [16, {dilation: 4, pool: keep}]]",
        "[[0, 1], 2, SelStage, [16, {resolution: low, expected: 0.5}]]",
    ],
    "SelCSP": ["[[0, 1], 2, SelCSP, [12, False, 2]]", "[[0, 1], 1, SelCSP, [16, {resolution: low}]]"],
    "SelLoss": ["[[0, 1], 1, SelLoss, []]", "[[0, 1], 1, SelLoss, [0.5, {target: 0.3, ramp: 100}]]"],
    "SegHead": ["[-1, 1, SegHead, [nc]]"],
    "AuxSegHead": ["[-1, 1, AuxSegHead, [nc]]", "[-1, 1, AuxSegHead, [nc, 0.2, {dropout: 0.0}]]"],
    "SSDHead": ["[[0, 1], 1, SSDHead, [nc]]", "[[0, 1], 1, SSDHead, [nc, anchors, {match: 0.4}]]"],
}
HEADS = {  # what a head gives for the images before rows and columns, and for a cell; None: classes of an image
    "[-1, 1, SegHead, [nc]]": ((3,), ()),
    "[-1, 1, Classify, [nc]]": None,
    "[-1, 1, Classify, [nc, {dropout: 0.5}]]": None,
    "[[0, 1], 1, Classify, [nc]]": None,
    "[[0, 1], 1, Detect, [nc, anchors]]": ((2,), 5 + 3),
    "[[0, 1], 1, DFLDetect, [nc]]": ((), 4 * 16 + 3),
    "[[0, 1], 1, DFLDetect, [nc, 4, {act: relu}]]": ((), 4 * 4 + 3),
    "[[0, 1], 1, DFLDetect, [nc, 4, {widths: v9, light: True, groups: 2}]]": ((), 4 * 4 + 3),
    "[[0, 1, 0, 1], 1, DualDDetect, [nc]]": ((), 4 * 16 + 3),
    "[[0, 1, 0, 1, 0, 1], 1, TripleDDetect, [nc, 4]]": ((), 4 * 4 + 3),
    "[[0, 1], 1, v10Detect, [nc]]": ((), 4 * 16 + 3),
    "[[0, 1], 1, v10Detect, [nc, 1]]": ((), 4 + 3),
    "[[0, 1], 1, IDetect, [nc, anchors]]": ((2,), 5 + 3),
    "[[0, 1, 0, 1], 1, IAuxDetect, [nc, anchors]]": ((2,), 5 + 3),
    "[[0, 1], 1, YOLOXHead, [nc]]": ((), 5 + 3),
    "[[0, 1], 1, YOLOXHead, [nc, True, {act: relu}]]": ((), 5 + 3),
    "[[0, 1], 1, SSDHead, [nc]]": ((4,), 4 + 1 + 3),
    "[[0, 1], 1, SSDHead, [nc, anchors, {match: 0.4}]]": ((2,), 4 + 1 + 3),
}
# What leads back to size // stride where a row gives more or less: only pooling and padding know such a map.
EVENED = {
    "[-1, 1, nn.MaxPool2d, [2, 1]]": "  - [-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]]\n",
    "[-1, 1, nn.ZeroPad2d, [[1, 0, 0, 1]]]": "  - [-1, 1, nn.MaxPool2d, [2, 1]]\n",
    "[-1, 1, nn.ZeroPad2d, [[1, 2, 2, 1]]]": "  - [-1, 1, nn.MaxPool2d, [4, 1]]\n",
}
# What reads the output of a row that no head can read.
READERS = {row: "  - [[1, 2], 1, SelLoss, []]\n" for row in EXAMPLES["MaskPredictor"]}
UNDER_MASK = [row for name, rows in EXAMPLES.items() if "mask" in (OPS[name].takes or ()) for row in rows]
ROWS = [row for rows in EXAMPLES.values() for row in rows]
# What a test leaves open where an op may choose.
OPTIONS = {
    "kernel": (3, 5),
    "cheap": (3, 5),
    "act": ("relu", "leaky", "mish"),
    "concat_act": ("relu", "leaky", "mish"),
    "dilations": ((1, 2), (1, 3, 2)),
    "resolution": ("low", "high", "mask"),
    "number": (1, 2),
    "repeats": (1, 2),
}


def spec_with(row: str) -> ModelSpec:
    """A model whose row 2 is `row`."""
    rest = "" if row in HEADS else f"{EVENED.get(row, '')}{READERS.get(row, '')}  - [-1, 1, Detect, [nc, anchors]]\n"
    return parse_text(f"{MASKED_FRONT if row in UNDER_MASK else FRONT}  - {row}\n{rest}")


def opened(row: str) -> ModelSpec | None:
    """The same with everything left open that the op may leave open; None where that is nothing.

    An independent supernet holds 12 blocks a row, so a row that names its `concat_act`, `dilations` or `resolution` has
    that open instead of `act`.
    """
    spec = spec_with(row)
    node = resolve(spec).nodes[ROW]
    given = dict(node.op.signature.bind(*node.layer.args, **node.layer.kwargs).arguments)
    instead = {"concat_act", "dilations", "resolution"}
    closed = {"act"} if instead & given.keys() else instead
    for name in node.op.signature.parameters:
        if node.op.may_choose(name) and name in OPTIONS and name not in closed:  # widths: test_width.py
            given[name] = Choice(f"{ROW}.{name}", OPTIONS[name])
    if "kernel" in given:
        given.pop("padding", None)
    repeats: int | Choice = 1
    repeated = "c_in" in node.op.parameters and node.output == node.inputs[0]
    if "number" in node.op.parameters or (repeated and not hasattr(node.op.module, "aux_loss")):
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


def half_low(network: Network, images: Tensor) -> None:
    """Moves the logits of a predictor that never learned, so that half of its patches are low and half are high."""
    with torch.no_grad():
        _, aux = network.run(range(ROW), {-1: images})
        network.layers[1].bn.bias[1] -= (aux[1][:, 1] - aux[1][:, 0]).median()


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
        if HEADS[row] is None:
            assert [x.shape for x in y] == [(2, 3)]
            return
        before, last = HEADS[row]
        behind = (last,) if isinstance(last, int) else last
        each = [(2, *before, 64 // s.stride, 96 // s.stride, *behind) for s in node.inputs]
        assert [x.shape for x in y] == each * (2 if node.op.name == "v10Detect" else 1)  # which answers twice
    else:
        shape = node.output
        assert y.shape == (2, shape.channels, *(size // shape.stride + shape.margin for size in (64, 96)))
        assert (shape.margin == 0) == (row not in EVENED)


WITH_KERNEL = [row for name, rows in EXAMPLES.items() if "kernel" in OPS[name].signature.parameters for row in rows]


@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("row", WITH_KERNEL)
def test_an_even_kernel_has_the_declared_shape_and_folds_or_is_told(row, kernel):
    spec = spec_with(row)
    node = resolve(spec).nodes[ROW]
    given = dict(node.op.signature.bind(*node.layer.args, **node.layer.kwargs).arguments) | {"kernel": kernel}
    for stride in (1, 2) if "stride" in node.op.signature.parameters else (None,):
        kwargs = given if stride is None else given | {"stride": stride}
        layer = replace(node.layer, repeats=2 if "number" in node.op.parameters else 1, args=(), kwargs=kwargs)
        try:
            graph = resolve(replace(spec, layers=(*spec.layers[:ROW], layer, *spec.layers[ROW + 1 :])))
        except Fault:
            continue
        torch.manual_seed(0)
        network, images = Network(graph).eval(), torch.rand(1, 3, 64, 96)
        scramble(network)
        with torch.no_grad():
            y = network.run(range(ROW + 1), {-1: images})[0][ROW]
            folded = fuse(network).run(range(ROW + 1), {-1: images})[0][ROW]
        shape = graph.nodes[ROW].output
        assert y.shape[2:] == (64 // shape.stride + shape.margin, 96 // shape.stride + shape.margin)
        assert torch.allclose(folded, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize("supernet", SUPERNETS)
@pytest.mark.parametrize("row", OPEN)
def test_every_option_is_the_plain_op_with_the_same_weights(row, supernet):
    torch.manual_seed(0)
    spec = opened(row)
    assert spec is not None
    net = Supernet(spec, supernet).eval()
    scramble(net)
    images = torch.rand(2, 3, 32, 32)
    if row in UNDER_MASK:
        half_low(net.network, images)
    seen = []
    for picks in combinations(net.spec.choices):
        net.activate(picks)
        plain = build(normalize(spec).freeze(picks)).eval()
        state = plain_state(net.network)
        assert set(state) == set(plain.state_dict())
        plain.load_state_dict(state)
        active, derived = outputs(net.network, images), outputs(plain, images)
        for ours, theirs in zip(active, derived, strict=True):
            within = 1e-6 * max(1.0, float(theirs.abs().max()))  # a rounding of its largest value
            torch.testing.assert_close(ours, theirs, rtol=0, atol=within)
        assert all(not torch.equal(active[0], other) for other in seen), "two options do the same"
        seen.append(active[0])


def test_each_op_that_has_a_kernel_or_an_activation_may_leave_it_open():
    blocks = {name: op for name, op in OPS.items() if not op.is_head}
    for name, op in blocks.items():
        for argument in OPTIONS.keys() & op.parameters.keys() - ({"dilations"} if name == "ASPP" else set()):
            assert op.may_choose(argument), f"{name}: {argument} is not written as Kernel, Act or Count"
    assert {spec_with(row).layers[ROW].op for row in OPEN} >= {n for n, op in blocks.items() if "act" in op.parameters}


def test_a_head_has_no_choices():
    for argument in ("act: {choice: [relu, silu]}", "bins: {choice: [8, 16]}"):
        row = f"[[0, 1], 1, DFLDetect, [nc, {{{argument}}}]]"
        with pytest.raises(Fault) as fault:
            resolve(parse_text(f"{FRONT}  - {row}\n"))
        value = argument.replace(": ", "=", 1)
        assert str(fault.value) == (
            f"<text>:7:5 layer 2 {row}: DFLDetect(num_classes, bins=16, *, widths=v8, light=False, groups=1, act=silu)"
            f": a head has no choices, the rows before it may; got {value}"
        )


def test_an_option_is_the_same_whichever_is_active():
    """The other options of a mixture are computed while one is active."""
    torch.manual_seed(0)
    x = torch.rand(1, 2, 6, 6)
    kernel, act, number = (Choice(name, OPTIONS[name]) for name in ("kernel", "act", "number"))
    leaves = [
        primitives.conv(2, 2, kernel),
        primitives.activation(act),
        primitives.norm(2, feeds=act),
        primitives.repeat(number, lambda _: nn.Conv2d(2, 2, 1)),
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


def test_pooling_what_was_pooled_is_the_pyramid():
    """SPPF with pools of 5 is SPP with 5, 9 and 13, weight by weight."""
    torch.manual_seed(0)
    fast, wide = (OPS[name].module(c_in=4, c_out=6).eval() for name in ("SPPF", "SPP"))
    wide.load_state_dict(fast.state_dict())
    x = torch.randn(1, 4, 17, 15)
    torch.testing.assert_close(fast(x), wide(x), rtol=0, atol=1e-6)


def test_focus_puts_each_pixel_of_a_square_into_a_channel_of_its_own():
    focus = OPS["Focus"].module(c_in=1, c_out=4, act="identity").eval()
    torch.nn.init.dirac_(focus.conv.conv.weight)
    focus.conv.bn = nn.Identity()
    x = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    assert focus(x).flatten().tolist() == [0, 2, 1, 3]  # upper left, lower left, upper right, lower right


def test_a_dilated_convolution_sees_farther_and_keeps_its_size():
    block = OPS["Conv"].module(c_in=1, c_out=1, kernel=3, dilation=4)
    assert block.conv.padding == (4, 4) and block.conv.dilation == (4, 4)
    assert block(torch.zeros(2, 1, 16, 16)).shape == (2, 1, 16, 16)


def test_a_ghost_convolution_keeps_its_maps_and_adds_one_of_each():
    torch.manual_seed(0)
    block, x = OPS["GhostConv"].module(c_in=3, c_out=8, kernel=3).eval(), torch.rand(1, 3, 6, 6)
    first = block.cv1(x)
    torch.testing.assert_close(block(x), torch.cat((first, block.cv2(first)), dim=1))
    assert block.cv2.conv.groups == 4


def test_a_transformer_does_not_care_where_a_cell_lies():
    """Attention and linear layers alone: cells in another order give the same values in that order."""
    torch.manual_seed(0)
    block, x = OPS["C3TR"].module(c_in=8, c_out=8, number=2).eval(), torch.rand(2, 8, 3, 4)
    turned = torch.rot90(x, 1, (2, 3))
    torch.testing.assert_close(block(turned), torch.rot90(block(x), 1, (2, 3)), rtol=0, atol=1e-5)


def test_the_activation_after_a_concatenation_may_be_another():
    block = OPS["BottleneckCSP"].module(c_in=4, c_out=8, act="silu", concat_act="leaky")
    assert isinstance(block.act, nn.LeakyReLU) and isinstance(block.cv4.act, nn.SiLU)
    assert isinstance(OPS["BottleneckCSP"].module(c_in=4, c_out=8, act="mish").act, nn.Mish)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[-1, 1, GhostConv, [9]]", "half of 9 channels is no whole number"),
        ("[-1, 1, C3Ghost, [12]]", "its ghost bottlenecks have 6 channels, which is no multiple of 4"),
        ("[-1, 1, C3TR, [12]]", "4 attention heads do not divide its 6 inner channels"),
        ("[-1, 1, VoVCSP, [9]]", "half of 9 channels is no whole number"),
        ("[-1, 1, nn.MaxPool2d, [2, 2, 2]]", "padding 2 is more than half of the pool's size 2"),
        ("[-1, 1, nn.ZeroPad2d, [[1, 1, 0, 1]]]", "adds 2 columns but 1 rows; both have to be the same"),
        ("[-1, 1, SPPF, [8, 4]]", "pool=4 should be an odd number"),
        ("[-1, 1, A2C2f, [64, True, 1, False, 0.01]]", "mlp_ratio 0.01 of 32 leaves no channel"),
        ("[-1, 2, CABlock, [16, 4, 2]]", "kernel 4, stride 1 and padding 1 do not keep"),
        ("[-1, 1, AConv, [16, {kernel: 4}]]", "kernel 4, stride 1 and padding 1 do not keep"),
        ("[-1, 1, RepConv, [16, 4, 2]]", "kernel 4, stride 1 and padding 1 do not keep"),
        ("[-1, 1, Conv, [8, 2, 1, None, 1, {dilation: 3}]]", "kernel 4, stride 1 and padding 1 do not keep"),
    ],
)
def test_what_an_op_cannot_do_is_told(row, said):
    with pytest.raises(Fault, match=re.escape(said)):
        resolve(spec_with(row))


@pytest.mark.parametrize(
    "behind", ["Conv, [8]", "C3, [8]", "Bottleneck, [8]", "nn.Upsample, []", "Concat, []", "SPP, [8]"]
)
def test_only_pooling_and_padding_take_a_map_that_was_padded(behind):
    row = f"[-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]]]\n  - [-1, 1, {behind}]"
    with pytest.raises(Fault, match="rows and columns too many or too few"):
        resolve(spec_with(row))
    with pytest.raises(Fault, match="rows and columns too many or too few"):
        resolve(spec_with("[-1, 1, nn.ZeroPad2d, [[0, 1, 0, 1]] ]"))  # in front of Detect


def test_upsampling_repeats_cells():
    x = torch.tensor([[[[1.0, 2.0]]]])
    assert OPS["nn.Upsample"].module()(x).tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


@pytest.mark.parametrize("name", primitives.ACTIVATIONS)
def test_an_activation_is_the_function_of_its_name(name):
    formulas = {
        "relu": lambda x: x.clamp(min=0),
        "relu6": lambda x: x.clamp(min=0, max=6),
        "leaky": lambda x: torch.where(x < 0, 0.1 * x, x),
        "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "identity": lambda x: x,
    }
    x = torch.linspace(-8, 8, 41)
    torch.testing.assert_close(primitives.activation(name)(x), formulas[name](x))


def test_norms_are_those_of_scaled_yolov4():
    norm = primitives.norm(8)
    assert isinstance(norm, nn.BatchNorm2d) and (norm.eps, norm.momentum) == (1e-3, 0.03)
