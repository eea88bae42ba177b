"""Inverted bottlenecks against their equations, EfficientNets against their counts, padding against TensorFlow's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import scramble
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Fault
from models.checkpoint import warm_start
from models.cost import network_costs, totals
from models.fuse import fuse
from models.graph import resolve
from models.network import Network, build
from models.ops.conv import Conv
from models.ops.mbconv import InvertedBottleneck, MBConv
from models.ops.primitives import PaddedConv2d, conv
from models.parse import parse, parse_text
from models.supernet import Supernet

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
# Parameters and tensors of the published networks with 1,000 classes; multiply-adds at 224 px, of which the
# paper tells 0.39 billion.
COUNTS = {
    "efficientnet-b0": (5_288_548, 360, 0.3858),
    "tf-efficientnet-b0": (5_288_548, 360, 0.3858),
    "efficientnet-lite0": (4_652_008, 296, 0.3852),
}


# ---- EfficientNet


@pytest.mark.parametrize("file", COUNTS)
def test_an_efficientnet_has_its_published_counts(file):
    params, tensors, gmacs = COUNTS[file]
    graph = resolve(parse(CFG / f"{file}.yaml"))
    costs = network_costs(graph, 224)
    assert graph.notes == ()
    assert totals(costs)[0] == params
    assert totals(costs)[1] / 1e9 == pytest.approx(gmacs, abs=5e-5)
    with torch.device("meta"):
        assert len(Network(graph).state_dict()) == tensors
    text = (CFG / f"{file}.yaml").read_text()
    assert f"{params:,} parameters and {gmacs} GMACs" in " ".join(text.replace("\n#", " ").split())


def test_the_features_alone_have_their_count():
    costs = network_costs(resolve(parse(CFG / "efficientnet-b0.yaml")), 384)[:13]
    assert sum(cost.params for cost in costs) == 3_595_388
    assert sum(cost.macs for cost in costs) / 1e9 == pytest.approx(1.070, abs=5e-4)
    assert [costs[row].shape for row in (5, 9, 12)] == [(40, 48, 48), (112, 24, 24), (320, 12, 12)]


def test_the_search_file_is_efficientnet_with_open_stages():
    graph, plain = (resolve(parse(CFG / f"efficientnet-b0{name}.yaml")) for name in ("-search", ""))
    choices = graph.spec.choices
    assert [choice.name for choice in choices] == [f"{row}.{a}" for row in range(2, 13) for a in ("kernel", "act")]
    assert math.prod(len(choice.options) for choice in choices) == 31_381_059_609
    picks = {f"{row}.kernel": plain.nodes[row].arguments["kernel"] for row in range(2, 13)}
    chosen = resolve(graph.spec.freeze(picks | {f"{row}.act": "silu" for row in range(2, 13)}))
    for node, other in zip(chosen.nodes, plain.nodes, strict=True):
        assert (node.op, node.sources, node.arguments, node.repeats) == (
            *(other.op, other.sources, other.arguments, other.repeats),
        )


SMALL = """\
nc: 5
backbone:
  - [-1, 1, Conv, [8, 3, 2, {eps: 1e-5}]]
  - [-1, 1, MBConv, [8, 3, 1, 1]]
  - [-1, 3, MBConv, [12, KERNEL, 2, 6, {act: ACT}]]
head:
  - [-1, 1, Conv, [16]]
  - [-1, 1, Classify, [nc]]
"""


def test_weights_of_the_plain_network_start_the_supernet_where_it_was():
    torch.manual_seed(0)
    plain = build(parse_text(SMALL.replace("KERNEL", "3").replace("ACT", "silu"))).eval()
    scramble(plain)
    text = SMALL.replace("KERNEL", "{choice: [3, 5, 7]}").replace("ACT", "{choice: [silu, relu]}")
    supernet = Supernet(parse_text(text), "shared").eval()
    loaded, missing = warm_start(supernet.network, plain.state_dict())
    assert missing == [] and len(loaded) == len(supernet.network.state_dict())
    supernet.activate({"2.kernel": 3, "2.act": "silu"})
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(supernet.network(x)[0][0], plain(x)[0][0], rtol=0, atol=1e-6)


def test_each_block_of_a_stage_may_have_its_own_kernel_and_activation():
    text = SMALL.replace("KERNEL", "[3, {choice: [3, 5]}, 7]").replace("ACT", "[relu, silu, mish]")
    graph = resolve(parse_text(text))
    assert [choice.name for choice in graph.spec.choices] == ["2.kernel.1"]
    stage = Supernet(graph.spec, "shared").derive({"2.kernel.1": 5}).layers[2]
    assert [block.depthwise.conv.kernel_size[0] for block in stage.m] == [3, 5, 7]
    assert [type(block.se.act) for block in stage.m] == [nn.ReLU, nn.SiLU, nn.Mish]


# ---- the block


def normed(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """A batch norm in eval mode, by its equation."""
    mean, var, scale, shift = (
        value[:, None, None] for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return scale * (x - mean) / (var + norm.eps).sqrt() + shift


def by_hand(block: InvertedBottleneck, x: Tensor) -> Tensor:
    """The block's equations on its own weights: SiLU, padding on all sides alike."""

    def silu(value: Tensor) -> Tensor:
        return value / (1 + torch.exp(-value))

    u = x
    if isinstance(block.expand, Conv):
        u = silu(normed(F.conv2d(x, block.expand.conv.weight), block.expand.bn))
    weight = block.depthwise.conv.weight
    size, stride = weight.shape[-1], block.depthwise.conv.stride
    v = silu(normed(F.conv2d(u, weight, stride=stride, padding=size // 2, groups=len(weight)), block.depthwise.bn))
    if not isinstance(block.se, nn.Identity):
        means = v.flatten(2).mean(dim=2)  # [N, channels]
        squeezed = silu(means @ block.se.reduce.weight[:, :, 0, 0].T + block.se.reduce.bias)
        gates = torch.sigmoid(squeezed @ block.se.expand.weight[:, :, 0, 0].T + block.se.expand.bias)
        v = v * gates[:, :, None, None]
    y = normed(F.conv2d(v, block.project.conv.weight), block.project.bn)
    return x + y if y.shape == x.shape else y


@pytest.mark.parametrize(
    ("c_out", "kernel", "stride", "expand", "squeeze"),
    [(4, 3, 1, 6, 0.25), (4, 5, 2, 6, 0.5), (6, 3, 1, 1, 0.25), (4, 3, 1, 1.5, 0), (4, 3, 2, 1, 0)],
)
def test_a_block_is_its_equations(c_out, kernel, stride, expand, squeeze):
    torch.manual_seed(0)
    stage = MBConv(4, c_out, kernel, stride, expand, squeeze, number=2).eval().double()
    scramble(stage)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    first, second = stage.m
    torch.testing.assert_close(stage(x), by_hand(second, by_hand(first, x)))
    assert first.add == (stride == 1 and c_out == 4) and second.add
    if squeeze:
        assert first.se.reduce.out_channels == max(int(4 * squeeze), 1)
        assert second.se.reduce.out_channels == max(int(c_out * squeeze), 1)


def test_a_new_block_is_its_shortcut():
    stage, x = MBConv(4, 4, number=3), torch.randn(2, 4, 6, 6)
    assert torch.equal(stage(x), x)


def test_eps_is_that_of_every_norm():
    for eps in (1e-5, 1e-3):
        norms = [m for m in MBConv(4, 6, number=2, eps=eps).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 6 and {norm.eps for norm in norms} == {eps}
    assert Conv(3, 4).bn.eps == 1e-3 and Conv(3, 4, eps=1e-5).bn.eps == 1e-5


# ---- padding


@given(
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    cells=st.tuples(st.integers(2, 5), st.integers(2, 5)),
)
@settings(max_examples=40, deadline=None)
def test_same_is_the_padding_of_tensorflow(kernel, stride, dilation, cells):
    """As its documentation defines it, for a side of n: (ceil(n / s) - 1) s + reach - n, the smaller half first."""
    torch.manual_seed(0)
    layer = conv(2, 3, kernel, stride, padding="same", dilation=dilation)
    x = torch.randn(1, 2, *(count * stride for count in cells))
    margins = []
    for size in reversed(x.shape[2:]):
        reach = dilation * (kernel - 1) + 1
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        margins += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, margins), layer.weight, stride=stride, dilation=dilation)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x).shape[2:] == cells


def test_same_reads_below_and_to_the_right_where_the_usual_padding_reads_above():
    x = torch.arange(16.0).view(1, 1, 4, 4)  # rows 0 1 2 3, 4 5 6 7, 8 9 10 11, 12 13 14 15
    sums = {}
    for padding in (None, "same"):
        layer = conv(1, 1, 3, 2, padding=padding)
        nn.init.ones_(layer.weight)
        sums[padding] = layer(x).flatten().tolist()
    assert sums["same"] == [0 + 1 + 2 + 4 + 5 + 6 + 8 + 9 + 10, 2 + 3 + 6 + 7 + 10 + 11, 8 + 9 + 10 + 12 + 13 + 14, 50]
    assert sums[None] == [
        0 + 1 + 4 + 5,
        1 + 2 + 3 + 5 + 6 + 7,
        4 + 5 + 8 + 9 + 12 + 13,
        5 + 6 + 7 + 9 + 10 + 11 + 13 + 14 + 15,
    ]
    assert type(conv(1, 1, 3, 1, padding="same")) is nn.Conv2d  # there both are one


@pytest.mark.parametrize("padding", [None, "same", 1])
def test_a_border_is_a_colour_around_the_map(padding):
    """A map of this colour looks the same at its edge as in its middle; no tensor of the state dict tells of it."""
    torch.manual_seed(0)
    block = Conv(2, 3, 3, 2, padding, border=(0.25, -1.0)).eval()
    x = torch.tensor([0.25, -1.0])[:, None, None].expand(1, 2, 8, 8)
    y = block(x)
    torch.testing.assert_close(y, y[..., 2:3, 2:3].expand_as(y))
    assert block.state_dict().keys() == Conv(2, 3, 3, 2).state_dict().keys()
    black = Conv(2, 3, 3, 2, padding, border=(0.0, 0.0)).eval()
    plain = Conv(2, 3, 3, 2, padding).eval()
    black.load_state_dict(plain.state_dict())
    torch.testing.assert_close(black(x), plain(x))
    assert isinstance(block.double().conv, PaddedConv2d) and block(x.double()).dtype == torch.float64


def test_padding_and_border_live_through_fusing():
    torch.manual_seed(0)
    text = SMALL.replace("KERNEL", "5").replace("ACT", "relu6").replace("6, {act", "6, 0, {padding: same, act")
    network = build(parse_text(text.replace("eps: 1e-5", "padding: same, border: [0.5, 0.4, 0.3]"))).eval()
    scramble(network)
    x = torch.rand(2, 3, 32, 32)
    fused = fuse(network)
    assert not any(isinstance(child, nn.BatchNorm2d) for child in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(x)[0][0], network(x)[0][0], rtol=0, atol=1e-5)


# ---- what it cannot do


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("MBConv, [12, 4]", "kernel 4, stride 1 and padding 1 do not keep the map's size"),
        ("MBConv, [12, 3, 1, 0.1]", "expand 0.1 of 8 leaves no channel"),
        ("MBConv, [12, 3, 1, 6, 2]", "squeeze=2 should be less than or equal to 1"),
        ("MBConv, [12, {padding: some}]", "padding=some should be 'same'"),
        ("MBConv, [12, {number: 2}]", "has no argument 'number'"),
        ("Conv, [12, 3, {border: [0.5]}]", "border has 1 values for 8 channels"),
    ],
)
def test_what_a_row_cannot_be_is_told(row, said):
    text = f"nc: 2\nbackbone:\n  - [-1, 1, Conv, [8]]\n  - [-1, 1, {row}]\nhead:\n  - [-1, 1, Classify, [nc]]\n"
    with pytest.raises(Fault, match=re.escape(said)):
        resolve(parse_text(text))


def test_an_open_kernel_cannot_share_weights_over_another_padding():
    text = SMALL.replace("KERNEL", "{choice: [3, 5]}").replace("{act: ACT}", "{padding: same}")
    with pytest.raises(Fault, match=r"kernel is a choice \{3\|5\}, so padding must be left out; got same"):
        build(parse_text(text), "shared")
    assert build(parse_text(text), "independent")


def test_depthwise_weights_start_by_the_fan_out_of_one_channel():
    """By that of all channels together they would be sqrt(672) times smaller, and the norm's eps no longer nothing."""
    torch.manual_seed(0)
    network = build(parse(CFG / "efficientnet-b0.yaml"))
    depthwise = network.layers[10].m[0].depthwise.conv.weight
    assert depthwise.shape == (672, 1, 5, 5)
    assert float(depthwise.detach().std()) == pytest.approx(math.sqrt(2 / 25), rel=0.03)
