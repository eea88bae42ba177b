"""The CA-block, the two fusions and the detector made of them: equations against a second, plain computation."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import KINDS
from torch import Tensor, nn
from torch.nn import functional as F

from bench.necks import NECKS, neck
from data.structures import Fault
from models.cost import count_params, network_costs, totals
from models.elastic import elastic_leaves
from models.fuse import fuse
from models.graph import normalize, resolve
from models.network import build, head_maximum
from models.ops.attention import ChannelGate, SpatialGate
from models.parse import dump, parse, parse_text
from models.registry import OPS, Shape
from models.spec import Choice, ModelSpec
from models.supernet import Supernet
from search.space import SearchSpace

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
GATES = ("full", "channel", "spatial", "none")


def block(c_in: int, c_out: int, **arguments: Any) -> nn.Module:
    """A CA-block in double precision with drawn weights, norms that do something, and running statistics of its own."""
    torch.manual_seed(0)
    return scrambled(OPS["CABlock"].module(c_in=c_in, c_out=c_out, **arguments))


def scrambled(module: nn.Module) -> nn.Module:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.3)
    return module.double().eval()


# ---- the equations once more, from the state dict alone

State = Mapping[str, Tensor]


def normed(state: State, name: str, x: Tensor) -> Tensor:
    of = {key: state[f"{name}.{key}"][:, None, None] for key in ("weight", "bias", "running_mean", "running_var")}
    return of["weight"] * (x - of["running_mean"]) / (of["running_var"] + 1e-3).sqrt() + of["bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def across(weight: Tensor, x: Tensor) -> Tensor:
    """A 1x1 convolution: a matrix product in every cell."""
    return torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x)


def deep(weight: Tensor, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """A depth-wise convolution: the map shifted for each of the kernel's cells, times what stands there."""
    reach, (height, width) = dilation * (weight.shape[-1] // 2), x.shape[2:]
    padded, total = F.pad(x, (reach, reach, reach, reach)), torch.zeros_like(x)
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            top, left = dilation * row, dilation * column
            shifted = padded[:, :, top : top + height, left : left + width]
            total = total + weight[None, :, 0, row, column, None, None] * shifted
    return total[:, :, ::stride, ::stride]


def ca_block(state: State, x: Tensor, dilations: tuple[int, ...], stride: int = 1, squeeze: str = "both") -> Tensor:
    """What the state dict of one block gives for `x`; a gate without weights is none."""
    u = x
    if "expand.conv.weight" in state:
        u = silu(normed(state, "expand.bn", across(state["expand.conv.weight"], x)))
    v = silu(normed(state, "depthwise.bn", deep(state["depthwise.conv.weight"], u, stride)))
    if "channel.dense.weight" in state:
        g = v.mean(dim=(2, 3)) @ state["channel.dense.weight"].T + state["channel.dense.bias"]
        v = v * sigmoid(g)[:, :, None, None]
    elif "channel.dense.0.weight" in state:
        middle = silu(v.mean(dim=(2, 3)) @ state["channel.dense.0.weight"].T + state["channel.dense.0.bias"])
        g = middle @ state["channel.dense.2.weight"].T + state["channel.dense.2.bias"]
        v = v * sigmoid(g)[:, :, None, None]
    y = normed(state, "project.bn", across(state["project.conv.weight"], v))
    if "spatial.weight" in state:
        logits = state["spatial.bias"] + torch.zeros_like(y[:, :1])
        for place, rate in enumerate(dilations):
            name = f"spatial.dilated.{place}"
            z = silu(normed(state, f"{name}.bn", deep(state[f"{name}.conv.weight"], y, dilation=rate)))
            mean, most = z.sum(dim=1, keepdim=True) / z.shape[1], z.max(dim=1, keepdim=True).values
            maps = {"mean": [mean], "max": [most], "both": [mean, most]}[squeeze]
            for weight, a in zip(state["spatial.weight"][place], maps, strict=True):
                logits = logits + deep(weight[None, None], a)
        y = y * sigmoid(logits)
    return x + y if x.shape == y.shape else y


def of_block(module: nn.Module, prefix: str = "m.0.") -> State:
    return {k.removeprefix(prefix): v for k, v in module.state_dict().items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    "arguments",
    [
        *({"attention": gates} for gates in GATES),
        {"kernel": 5, "stride": 2, "expand": 2},
        {"stride": 2, "dilations": (4, 1)},
        {"reduction": None, "squeeze": "mean"},
        {"reduction": 16, "squeeze": "max", "spatial_kernel": 3, "dilations": (2,)},
        {"attention": "none", "expand": 1},
        {"expand": 1, "spatial_kernel": 7},
    ],
    ids=str,
)
def test_a_block_is_its_equation(arguments: dict[str, Any]) -> None:
    module = block(6, 6, **arguments)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    how = {key: arguments[key] for key in ("stride", "squeeze") if key in arguments}
    expected = ca_block(of_block(module), x, arguments.get("dilations", (1, 2, 3)), **how)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_blocks_in_a_row_are_one_after_the_other_and_only_the_first_has_the_stride() -> None:
    module = block(4, 6, number=2, stride=2, kernel=5)
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    first = ca_block(of_block(module), x, (1, 2, 3), stride=2)
    torch.testing.assert_close(module(x), ca_block(of_block(module, "m.1."), first, (1, 2, 3)), rtol=0, atol=1e-12)


def test_the_input_is_added_only_where_it_has_the_same_shape_and_is_asked_for() -> None:
    assert [
        block(c_in, 6, stride=stride, residual=residual).m[0].add
        for c_in, stride, residual in ((6, 1, True), (6, 1, False), (6, 2, True), (4, 1, True))
    ] == [True, False, False, False]


def test_a_new_block_that_adds_its_input_is_the_identity() -> None:
    module, x = OPS["CABlock"].module(c_in=4, c_out=4).eval(), torch.randn(1, 4, 5, 5)
    assert torch.equal(module(x), x)


@settings(max_examples=25)
@given(
    c_in=st.integers(1, 40),
    c_out=st.integers(1, 40),
    kernel=st.sampled_from([1, 3, 5]),
    expand=st.integers(1, 6),
    rates=st.integers(1, 4),
    reduction=st.sampled_from([None, 1, 4, 64]),
    gate=st.sampled_from([1, 3]),
    attention=st.sampled_from(GATES),
)
def test_parameters_are_those_counted_by_hand(c_in, c_out, kernel, expand, rates, reduction, gate, attention) -> None:
    h = expand * c_in
    count = kernel * kernel * h + 2 * h + h * c_out + 2 * c_out + (c_in * h + 2 * h if expand > 1 else 0)
    if attention in ("full", "channel"):
        r = 0 if reduction is None else max(1, c_in // reduction)
        count += h * r + r + r * h + h if r else h * h + h
    if attention in ("full", "spatial"):
        count += rates * (9 * c_out + 2 * c_out) + 2 * rates * gate * gate + 1
    arguments = {"dilations": tuple(range(1, rates + 1)), "reduction": reduction, "spatial_kernel": gate}
    with torch.device("meta"):
        module = OPS["CABlock"].module(
            c_in=c_in, c_out=c_out, kernel=kernel, expand=expand, attention=attention, **arguments
        )
    assert count_params(module) == count


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 175_527),
        ({"reduction": None}, 404_871),  # one dense layer from 512 to 512 numbers
        ({"attention": "channel"}, 171_296),
        ({"attention": "spatial"}, 142_215),
        ({"attention": "none"}, 137_984),
        ({"attention": "none", "expand": 1}, 18_048),  # a depth-wise separable convolution
    ],
)
def test_a_block_of_128_channels_has_these_parameters(arguments: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert count_params(OPS["CABlock"].module(c_in=128, c_out=128, **arguments)) == count


# ---- gates


def test_a_gate_of_channels_is_one_number_for_a_whole_map_and_one_of_places_for_all_channels() -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 6, 5, 4, dtype=torch.float64) + 0.5
    of_channels = scrambled(ChannelGate(6, 2, "silu"))(x) / x
    of_places = scrambled(SpatialGate(6, (1, 2), "both", 1, "silu"))(x) / x
    for gate, dimensions in ((of_channels, (2, 3)), (of_places, (1,))):
        assert (gate > 0).all() and (gate < 1).all()
        torch.testing.assert_close(gate, gate.mean(dim=dimensions, keepdim=True).expand_as(gate))
    assert of_channels.std(dim=1).min() > 1e-3 and of_places.std(dim=(2, 3)).min() > 1e-3


def test_a_gate_over_places_sees_as_far_as_its_largest_dilation() -> None:
    """A bright cell changes the gate at the corners of 3x3 cells that lie so far from each other, and nowhere else."""
    gate = scrambled(SpatialGate(2, (1, 3), "mean", 1, "identity"))
    dark = torch.ones(1, 2, 11, 11, dtype=torch.float64)
    bright = dark.clone()
    bright[..., 5, 5] = 2
    changed = ((gate(bright) / bright)[0, 0] - (gate(dark) / dark)[0, 0]).abs() > 1e-9
    near = {(5 + rate * row, 5 + rate * column) for rate in (1, 3) for row in (-1, 0, 1) for column in (-1, 0, 1)}
    assert {tuple(place) for place in changed.nonzero().tolist()} == near


SMALL = """
nc: 3
activation: {act}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [12, 3, 2]]
  - [-1, 1, CABlock, [8, {kernel}, 2, 2{named}]]
head:
  - [[2, 1], 1, UpFusion, [8, 2{named}]]
  - [[3, 2], 1, DownFusion, [8, 2{named}]]
  - [[3, 4], 1, DFLDetect, [nc, 4]]
"""


def small(act: str = "silu", kernel: str = "3", named: str = "") -> ModelSpec:
    return parse_text(SMALL.format(act=act, kernel=kernel, named=named))


def test_gates_of_a_new_network_are_not_saturated() -> None:
    """Its convolutions are started by their fan-out, by which the logits of a single map would be far from 0."""
    torch.manual_seed(0)
    network, seen = build(small()), []
    for module in network.modules():
        if isinstance(module, ChannelGate | SpatialGate):
            module.register_forward_hook(lambda _, x, y: seen.append((y / x[0])[x[0].abs() > 1e-3]))
    network.train()(torch.rand(8, 3, 64, 64))
    gates = torch.cat(seen)
    assert len(seen) == 6  # one of them of a block that begins as the identity: all 0, so nothing of it is looked at
    assert gates.quantile(0.01) > 0.05 and gates.quantile(0.99) < 0.95


def test_every_norm_is_folded_into_the_convolution_before_it() -> None:
    torch.manual_seed(0)
    network = scrambled(build(small()))
    fused = fuse(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    for one, other in zip(network(images)[0], fused(images)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# ---- fusions


def fusion(name: str, *channels: int, c_out: int, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    strides = {"UpFusion": (16, 8), "DownFusion": (8, 16)}[name]
    inputs = tuple(Shape(*level) for level in zip(channels, strides, strict=True))
    return scrambled(OPS[name].module(inputs=inputs, c_out=c_out, **arguments))


def joining(state: State, x: Tensor) -> Tensor:
    return silu(normed(state, "fuse.bn", across(state["fuse.conv.weight"], x)))


def enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, centres of cells on centres of cells, cell by cell."""

    def places(cells: int, wanted: int) -> list[tuple[int, int, float]]:
        found = []
        for cell in range(wanted):
            at = max((cell + 0.5) * cells / wanted - 0.5, 0)
            low = min(int(at), cells - 1)
            found.append((low, min(low + 1, cells - 1), at - low))
        return found

    y = x.new_empty(*x.shape[:2], height, width)
    for row, (top, bottom, down) in enumerate(places(x.shape[2], height)):
        for column, (left, right, along) in enumerate(places(x.shape[3], width)):
            upper = (1 - along) * x[:, :, top, left] + along * x[:, :, top, right]
            lower = (1 - along) * x[:, :, bottom, left] + along * x[:, :, bottom, right]
            y[:, :, row, column] = (1 - down) * upper + down * lower
    return y


sizes = st.integers(1, 9)


@settings(max_examples=15)
@given(h=sizes, w=sizes, height=sizes, width=sizes, mode=st.sampled_from(["cat", "add"]))
def test_upwards_it_is_equation_1_whatever_the_sizes(h: int, w: int, height: int, width: int, mode: str) -> None:
    module = fusion("UpFusion", 4, 4, c_out=6, mode=mode, expand=2)
    high = torch.randn(1, 4, h, w, dtype=torch.float64)
    low = torch.randn(1, 4, height, width, dtype=torch.float64)
    up = enlarged(high, height, width)
    x = joining(module.state_dict(), torch.cat((low, up), dim=1) if mode == "cat" else low + up)
    torch.testing.assert_close(module([high, low]), ca_block(of_block(module, "ca."), x, (1, 2, 3)), rtol=0, atol=1e-10)


@settings(max_examples=15)
@given(height=st.integers(1, 13), width=st.integers(1, 13), mode=st.sampled_from(["cat", "add"]))
def test_downwards_it_is_equation_2_whatever_the_sizes(height: int, width: int, mode: str) -> None:
    module = fusion("DownFusion", 4, 6, c_out=6, mode=mode, expand=2)
    fine = torch.randn(1, 4, height, width, dtype=torch.float64)
    coarse = torch.randn(1, 6, -(-height // 2), -(-width // 2), dtype=torch.float64)
    halved = ca_block(of_block(module, "ca."), fine, (1, 2, 3), stride=2)
    x = torch.cat((halved, coarse), dim=1) if mode == "cat" else halved + coarse
    torch.testing.assert_close(module([fine, coarse]), joining(module.state_dict(), x), rtol=0, atol=1e-10)


def test_enlarging_repeats_cells_where_that_is_asked_for() -> None:
    module = fusion("UpFusion", 2, 2, c_out=2, up="nearest")
    high, low = torch.randn(1, 2, 2, 3, dtype=torch.float64), torch.randn(1, 2, 4, 6, dtype=torch.float64)
    repeated = high.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(module([high, low]), module([repeated, low]))


def test_a_fusion_has_the_parameters_of_a_convolution_and_a_block() -> None:
    for name in ("UpFusion", "DownFusion"):
        assert count_params(fusion(name, 128, 128, c_out=128)) == 256 * 128 + 2 * 128 + 175_527 == 208_551


# ---- choices

OPEN = ", {act: {choice: [silu, relu]}, dilations: {choice: [[1, 2, 3], [2], [3, 1]]}}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_derived_network_is_the_subnet_also_behind_yaml(kind: str) -> None:
    torch.manual_seed(0)
    net = Supernet(small("relu6", "{choice: [3, 5]}", OPEN), kind)
    scrambled(net).float()
    space, images = SearchSpace.of(net.spec), torch.rand(2, 3, 32, 32)
    assert space.size == 12 * 6 * 6
    rng, picked = random.Random(0), set()
    for _ in range(4):
        architecture = space.sample(rng)
        picks = dict(architecture.picks)
        picked.add(picks["2.dilations"])
        plain = net.derive(picks).eval()
        with torch.no_grad():
            expected, found = net.network(images)[0], plain(images)[0]
        for one, other in zip(expected, found, strict=True):
            assert (one - other).abs().max() <= 1e-5 * head_maximum(expected)
        again = parse_text(dump(plain.spec))
        assert count_params(build(again)) == count_params(plain)
        assert again.layers[2].args[4] == picks["2.dilations"]
        assert not list(elastic_leaves(plain))
    assert len(picked) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_a_search_have_the_gradients_of_their_mixture(kind: str) -> None:
    """Also of blocks inside a block, and of a row that reads two others."""
    torch.manual_seed(0)
    net = Supernet(small("silu", "{choice: [3, 5]}", OPEN.replace("relu", "mish")), kind)
    scrambled(net)
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    goals = [torch.randn_like(y) for y in net.network(images)[0]]

    def loss(network: nn.Module) -> Tensor:
        return torch.stack([(y - g).square().mean() for y, g in zip(network(images)[0], goals, strict=True)]).sum()

    picks = dict(SearchSpace.of(net.spec).sample(random.Random(1)).picks)
    _, found = net.gate_gradients(picks, loss)
    decided = net.decide(picks)
    gates = {
        d.name: torch.tensor([float(o == decided[d.name]) for o in d.options], dtype=torch.float64).requires_grad_()
        for d in net.decisions
    }

    def mixed(leaf: Any, inputs: Any, _: Any) -> Tensor:
        return sum(
            gate * leaf.option(option, *inputs)
            for gate, option in zip(gates[leaf.choice.name], leaf.choice.options, strict=True)
        )

    for _, leaf in elastic_leaves(net.network):
        leaf.register_forward_hook(mixed)
    loss(net.network).backward()
    for name, gate in gates.items():
        assert gate.grad is not None and found[name].abs().max() > 0
        torch.testing.assert_close(found[name], gate.grad, rtol=1e-9, atol=1e-12)


def test_dilations_share_their_convolutions_and_what_is_not_looked_at_gets_no_gradient() -> None:
    torch.manual_seed(0)
    options = ((1, 2), (3,), (1, 3))
    module = OPS["CABlock"].module(c_in=4, c_out=6, dilations=Choice("d", options))
    gate = module.m[0].spatial
    assert gate.every.dilations == (1, 2, 3) and gate.active == (1, 2)
    for option in options:
        module.zero_grad(set_to_none=True)
        gate.active = option
        module(torch.randn(2, 4, 6, 6)).square().sum().backward()
        moved = {
            rate for rate, one in zip((1, 2, 3), gate.every.dilated, strict=True) if one.conv.weight.grad is not None
        }
        assert moved == set(option)
        weighed = gate.every.weight.grad.abs().sum(dim=(1, 2, 3)) > 0
        assert {rate for rate, is_so in zip((1, 2, 3), weighed.tolist(), strict=True) if is_so} == set(option)
    kept = gate.plain()
    assert kept.dilations == (1, 3) and torch.equal(kept.weight, gate.every.weight[[0, 2]])


# ---- faults

FRONT = "nc: 3\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\n  - [-1, 1, Conv, [16, 3, 2]]\n  - [-1, 1, Conv, [16, 3, 2]]\n"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[-1, 1, CABlock, [8, {dilations: [2, 2]}]]", "dilations=[2, 2] should be a list of different whole numbers"),
        ("[-1, 1, CABlock, [8, {dilations: []}]]", "dilations=[] should be a list of different whole numbers"),
        ("[-1, 1, CABlock, [8, {spatial_kernel: 2}]]", "spatial_kernel=2 should be 1, 3, 5 or 7"),
        ("[-1, 1, CABlock, [8, {attention: both}]]", "attention=both should be 'full', 'channel', 'spatial' or 'none'"),
        ("[-1, 1, CABlock, [8, 4]]", "kernel 4, stride 1 and padding 1 do not keep the map's size"),
        ("[-1, 1, CABlock, [8, {dilation: [1]}]]", "has no argument 'dilation'; did you mean 'dilations'?"),
        ("[[1, 2], 1, UpFusion, [8]]", "reads [high, low], the coarse level first, but the strides are 4 and 8"),
        ("[[2, 1, 0], 1, UpFusion, [8]]", "takes two sources, [high, low]: the coarse level first; got 3"),
        ("[[1, 0], 1, UpFusion, [8, 4, add]]", "mode add takes maps of one width, not of 16 and 8 channels; cat does"),
        (
            "[[0, 2], 1, DownFusion, [8]]",
            "reads [fine, coarse], the second at twice the first one's stride, but the strides are 2 and 8",
        ),
        ("[[2], 1, DownFusion, [8]]", "takes two sources, [fine, coarse]: the fine level first; got 1"),
        (
            "[[0, 1], 1, DownFusion, [8, 4, add]]",
            "mode add takes maps of one width, not of 8 and 16 channels; cat does",
        ),
    ],
)
def test_what_cannot_be_is_told(row: str, said: str) -> None:
    text = f"{FRONT}  - {row}\nhead:\n  - [[0, 1, 2, 3], 1, Concat, [1]]\n  - [-1, 1, Detect, [nc, anchors]]\n"
    with pytest.raises(Fault, match=re.escape(said)):
        resolve(parse_text(text))


# ---- the detectors


@pytest.mark.parametrize(
    ("name", "backbone", "params"),
    [("effb0-ca-ssd", "efficientnet-b0", 5_773_964), ("effl0-ca-ssd", "efficientnet-lite0", 5_137_424)],
)
def test_a_detector_has_its_counts_and_the_backbone_of_the_classifier(name: str, backbone: str, params: int) -> None:
    spec, classifier = parse(CFG / f"{name}.yaml"), parse(CFG / f"{backbone}.yaml")
    for row in range(13):
        kwargs = {name: value for name, value in spec.layers[row].kwargs.items() if name != "border"}  # of weights
        assert replace(spec.layers[row], where=None, written="", kwargs=kwargs) == replace(
            classifier.layers[row], where=None, written=""
        )
    assert spec.activation == classifier.activation
    costs = network_costs(resolve(spec), 384)
    assert totals(costs)[0] == params and totals(costs)[1] / 1e9 == pytest.approx(1.970, abs=5e-4)
    assert costs[-1].shape == (13_788, 25)
    text = (CFG / f"{name}.yaml").read_text()
    said = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"{params:,} parameters and 1.970 GMACs at 384 px, 13,788 priors" in said
    assert [shape.stride for shape in resolve(spec).nodes[-1].inputs] == [8, 16, 32, 64, 128]


def test_the_search_file_holds_the_detector() -> None:
    search, plain = normalize(parse(CFG / "effb0-ca-ssd-search.yaml")), normalize(parse(CFG / "effb0-ca-ssd.yaml"))
    assert SearchSpace.of(search).size == 12**10
    assert f"12^10 = {12**10:,} subnets" in (CFG / "effb0-ca-ssd-search.yaml").read_text()
    usual = {"kernel": 3, "act": "silu", "dilations": (1, 2, 3)}
    frozen = resolve(search.freeze({choice.name: usual[choice.name.split(".")[1]] for choice in search.choices}))
    for one, other in zip(frozen.nodes, resolve(plain).nodes, strict=True):
        assert (one.op, one.sources, dict(one.arguments)) == (other.op, other.sources, dict(other.arguments))


def cost(spec: ModelSpec) -> tuple[int, float]:
    params, macs = totals(network_costs(resolve(spec), 384))
    return params, macs / 1e9


def test_a_neck_of_separable_convolutions_has_its_counts_and_a_wide_one_costs_as_much_as_the_gates() -> None:
    plain = parse(CFG / "effb0-ca-ssd.yaml")
    params, gmacs = cost(neck(plain, "separable"))
    assert params == 4_199_174 and gmacs == pytest.approx(1.340, abs=5e-4)
    assert cost(neck(plain, "wide-separable"))[1] == pytest.approx(1.970, rel=0.01)


@pytest.mark.parametrize("name", NECKS)
def test_every_neck_is_a_model_file_with_the_same_backbone(name: str) -> None:
    plain = normalize(parse(CFG / "effl0-ca-ssd.yaml"))
    derived = neck(plain, name)
    again = resolve(parse_text(dump(derived)))
    assert again.spec.layers == resolve(derived).spec.layers or dump(again.spec) == dump(derived)
    assert [node.sources for node in again.nodes[:13]] == [node.sources for node in resolve(plain).nodes[:13]]
    assert [dict(node.arguments) for node in again.nodes[:13]] == [
        dict(node.arguments) for node in resolve(plain).nodes[:13]
    ]
    assert [shape.stride for shape in again.nodes[-1].inputs] == [8, 16, 32, 64, 128]


def test_a_fusion_that_is_left_out_leaves_the_level_that_it_refined() -> None:
    plain = parse(CFG / "effl0-ca-ssd.yaml")
    up, off = resolve(neck(plain, "fusion-up")), resolve(neck(plain, "fusion-off"))
    assert [node.op.name for node in up.nodes[18:]] == ["UpFusion"] * 4 + ["SSDHead"]
    assert up.nodes[-1].sources == (21, 20, 19, 18, 17)
    assert [node.op.name for node in off.nodes[13:]] == ["Conv"] * 3 + ["CABlock"] * 2 + ["SSDHead"]
    assert off.nodes[-1].sources == (13, 14, 15, 16, 17)


def test_a_neck_changes_what_its_name_says_and_nothing_else() -> None:
    plain = resolve(parse(CFG / "effl0-ca-ssd.yaml"))
    for name, changes in NECKS.items():
        if "leave_out" in changes:
            continue
        derived = resolve(neck(plain.spec, name))
        for before, after in zip(plain.nodes[13:-1], derived.nodes[13:-1], strict=True):
            wanted = dict(before.arguments)
            if before.op.name != "Conv":
                wanted |= {key: value for key, value in changes.items() if key in wanted}
            if "width" in changes:
                wanted["c_out"] = changes["width"]
            assert (after.op, after.sources, dict(after.arguments)) == (before.op, before.sources, wanted)
        assert derived.nodes[-1].op.name == changes.get("head", "SSDHead")
