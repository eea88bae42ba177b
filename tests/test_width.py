"""Widths inside blocks as choices: what is sliced, that a derived network is the subnet, gradients, costs, a search."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_derive import largest_difference
from test_gradients import assert_slopes_are_differences, one_hot, smooth_loss
from test_tree import calibration, images, one_by_one, walked
from torch import Tensor, nn
from torch.nn import functional as F

from data.shapes import draw_shapes
from data.structures import Fault, Targets
from engine.calibrate import calibrate
from engine.latency import measure_ms
from models.__main__ import main as models_main
from models.checkpoint import load_checkpoint, restore, warm_start
from models.cost import count_params, network_costs, row_cost, totals
from models.elastic import Channels, Cut, SlicedBatchNorm2d, SlicedConv2d, elastic_leaves, plain_state, wide
from models.graph import load_graph, normalize, resolve
from models.network import build, head_maximum
from models.ops.primitives import batch_norm, conv, scaled
from models.parse import dump, parse, parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.costs import Budget, cost_tables
from search.objective import Prices, architecture_step
from search.run import main
from search.sampling import fair_options
from search.space import SearchSpace

__all__ = ["calibration", "images"]  # fixtures

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
FILE = """
nc: 5
activation: silu
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - {row}
head:
  - [-1, 1, Conv, [8, 3, 2]]
  - [[1, 2], 1, Detect, [nc, anchors]]
"""
MORE = "kernel: {choice: [3, 5]}, act: {choice: [silu, mish]}"
WIDTH = "expansion: {choice: [0.5, 0.25, 0.75]}"
NUMBER = "{choice: [1, 2]}"
ROWS = {
    "Bottleneck": f"[-1, 1, Bottleneck, [16, {{{WIDTH}, {MORE}}}]]",
    "BottleneckCSP": f"[-1, {NUMBER}, BottleneckCSP, [16, {{{WIDTH}, {MORE}}}]]",
    "BottleneckCSP2": f"[-1, {NUMBER}, BottleneckCSP2, [16, {{{WIDTH}, {MORE}}}]]",
    "MBottleneckCSP2": f"[-1, 2, MBottleneckCSP2, [16, {{{WIDTH}, per_bottleneck: true}}]]",
    "C3": f"[-1, {NUMBER}, C3, [16, {{{WIDTH}, {MORE}}}]]",
    "C3Separable": f"[-1, {NUMBER}, C3Separable, [16, {{{WIDTH}, {MORE}}}]]",
    "C2": f"[-1, {NUMBER}, C2, [16, {{{WIDTH}, {MORE}}}]]",
    "C2f": f"[-1, {NUMBER}, C2f, [16, True, {{{WIDTH}, {MORE}}}]]",
    "C2f alone": f"[-1, 2, C2f, [16, {{{WIDTH}}}]]",
    "C3k2": f"[-1, {NUMBER}, C3k2, [16, True, {{{WIDTH}, {MORE}}}]]",
    "MBConv": f"[-1, {NUMBER}, MBConv, [16, {{expand: {{choice: [2, 1.5, 3]}}, {MORE}}}]]",
    "MBConv each": "[-1, 2, MBConv, [16, {expand: {choice: [2, 3, 4]}, squeeze: 0, per_bottleneck: true}]]",
}


@cache
def supernet(name: str, kind: str = "shared", norms: str = "act") -> Supernet:
    """With norms as some steps of training leave them. It comes as the test before left it, so no test trains it."""
    torch.manual_seed(0)
    net = Supernet(parse_text(FILE.format(row=ROWS[name])), kind, norms)
    for module in net.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return net


def fresh(name: str, kind: str = "shared", norms: str = "act") -> Supernet:
    """One to train."""
    return deepcopy(supernet(name, kind, norms)).train()


def images_of(size: int = 32, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def drawn(net: Supernet, count: int, seed: int = 3) -> list[dict[str, Any]]:
    space, rng = SearchSpace.of(net.spec), random.Random(seed)
    return [dict(space.sample(rng).picks) for _ in range(count)]


# ---- what is in use


def test_a_width_times_a_choice_is_rounded_down_option_by_option() -> None:
    choice = Choice("1.expansion", (0.5, 0.25, 0.7))
    channels = scaled(10, choice)
    assert isinstance(channels, Channels)
    assert channels.widths == (5, 2, 7) and int(channels) == 7 and int(2 * channels) == 14
    half = scaled(3 * channels, 0.5)
    assert isinstance(half, Channels) and half.widths == (2, 1, 3) and half.segments == 3
    assert scaled(10, 0.7) == 7 and 2 * channels == channels * 2


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=4, unique=True), st.integers(1, 3), st.integers(1, 3), st.data()
)
@settings(max_examples=12)
def test_a_sliced_convolution_and_norm_are_those_of_the_channels_in_use(
    widths: list[int], inputs: int, outputs: int, data: st.DataObject
) -> None:
    """Against index lists: channel j of segment s is number ``s * widest + j``."""
    choice = Choice("1.expansion", tuple(range(len(widths))))
    channels = Channels(choice, tuple(widths))
    option = data.draw(st.sampled_from(choice.options))
    width, widest = widths[option], max(widths)
    taken, given_ = ([s * widest + j for s in range(n) for j in range(width)] for n in (inputs, outputs))
    layer, norm = conv(inputs * channels, outputs * channels, 3, bias=True), batch_norm(outputs * channels)
    assert isinstance(layer, SlicedConv2d) and isinstance(norm, SlicedBatchNorm2d)
    nn.init.uniform_(norm.weight)
    for _, leaf in elastic_leaves(nn.Sequential(layer, norm)):
        leaf.active = option
    before = deepcopy(norm)
    x = torch.randn(2, len(taken), 4, 5)
    y = F.conv2d(x, layer.weight[given_][:, taken], layer.bias[given_], padding=1)
    torch.testing.assert_close(layer(x), y)
    plain = nn.BatchNorm2d(len(given_), eps=norm.eps, momentum=norm.momentum)
    plain.load_state_dict(plain_state(norm))
    torch.testing.assert_close(norm(y), plain(y))
    rest = [c for c in range(outputs * widest) if c not in given_]
    for buffer in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(norm, buffer)[given_], getattr(plain, buffer))
        assert torch.equal(getattr(norm, buffer)[rest], getattr(before, buffer)[rest])
    torch.testing.assert_close(norm.eval()(y), plain.eval()(y))
    torch.testing.assert_close(layer.plain()(x), layer(x))


def test_two_widths_may_run_before_a_backward_pass() -> None:
    """The statistics that the second writes are not what the first remembers."""
    channels = 2 * Channels(Choice("1.expansion", (0, 1)), (2, 4))
    norm, total = batch_norm(channels), torch.zeros(())
    for option, width in ((1, 8), (0, 4), (1, 8)):
        for _, leaf in elastic_leaves(norm):
            leaf.active = option
        total = total + norm(torch.randn(2, width, 3, 3)).square().sum()
    total.backward()
    assert norm.weight.grad is not None and norm.weight.grad.all()


# ---- a derived network is the subnet


@pytest.mark.parametrize("name", ROWS)
@given(st.data())
@settings(max_examples=3)
def test_a_derived_network_gives_what_the_subnet_gave(name: str, data: st.DataObject) -> None:
    """For any architecture, after calibration; built anew from its own text, counted by the tables."""
    net = supernet(name)
    space = SearchSpace.of(net.spec)
    architecture = space.at(data.draw(st.integers(0, space.size - 1)))
    x = images_of()
    net.activate(architecture.picks)
    calibrate(net.network, [x])
    net.eval()
    with torch.no_grad():
        expected, derived = net.network(x)[0], net.derive(architecture.picks)
        with wide([leaf for _, leaf in elastic_leaves(net.network)]):
            full = net.network(x)[0]
        rebuilt = build(parse_text(dump(derived.spec)))
        rebuilt.load_state_dict(derived.state_dict())
        found = rebuilt.eval()(x)[0]
    limit = 1e-5 * head_maximum(expected)
    assert largest_difference(expected, found) <= limit and largest_difference(expected, full) <= limit
    costs = network_costs(rebuilt.graph, 32)
    params, macs = totals(costs)
    assert params == count_params(rebuilt) <= count_params(net.network)
    counted = row_cost(net.network.graph.nodes[1], dict(architecture.picks), 32)  # which the tables are made of
    assert totals([costs[0], counted, *costs[2:]]) == (params, macs)


@pytest.mark.parametrize("norms", ["shared", "k_act"])
def test_norms_may_be_kept_apart_for_kernels_and_activations_as_well(norms: str) -> None:
    net, x = supernet("BottleneckCSP", norms=norms), images_of()
    for picks in drawn(net, 6):
        net.activate(picks)
        net.eval()
        with torch.no_grad():
            expected, found = net.network(x)[0], net.derive(picks)(x)[0]
        assert largest_difference(expected, found) <= 1e-5 * head_maximum(expected)


def test_the_tree_of_subnets_gives_what_each_gives_alone(images, calibration) -> None:
    net = supernet("BottleneckCSP")
    numbers = sorted(random.Random(0).sample(range(SearchSpace.of(net.spec).size), 10))
    found = walked(net, images, calibration, numbers)
    assert len({round(loss, 6) for loss in found}) > 5
    for number, loss in zip(numbers, found, strict=True):
        assert loss == pytest.approx(one_by_one(net, images, calibration, number), rel=1e-5)


# ---- gradients


@pytest.mark.parametrize("name", ["BottleneckCSP", "BottleneckCSP2", "C3", "C3Separable", "C2f", "C3k2", "MBConv"])
def test_every_channel_gets_a_gradient_within_the_fair_windows_of_its_options(name: str) -> None:
    """Each weight of a channel, not only each tensor; and a step of a width moves nothing beyond it."""
    net, x = fresh(name), images_of()
    missing = {key: torch.ones(len(parameter), dtype=torch.bool) for key, parameter in net.network.named_parameters()}
    for step in range(36):
        net.zero_grad(set_to_none=True)
        net.activate(net.picks(fair_options(net.decisions, seed=0, step=step)))
        sum(y.square().mean() for y in net.network(x)[0]).backward()
        for key, parameter in net.network.named_parameters():
            if key in missing and parameter.grad is not None:
                missing[key] &= ~parameter.grad.flatten(1).any(1) if parameter.dim() > 1 else parameter.grad == 0
        missing = {key: channels for key, channels in missing.items() if channels.any()}
        if not missing:
            break
    assert not missing


def test_a_step_of_a_narrow_subnet_moves_its_own_channels_only() -> None:
    net = fresh("C2f alone")
    net.activate({"1.expansion": 0.25})
    before = deepcopy(net.network.state_dict())
    sum(y.square().mean() for y in net.network(images_of())[0]).backward()
    block: Any = net.network.layers[1]
    weight = block.cv1.conv.weight  # two halves of 12, of each of which the first 4 channels are in use
    assert [row for row in range(24) if weight.grad[row].any()] == [0, 1, 2, 3, 12, 13, 14, 15]
    moved = [c for c in range(24) if block.cv1.bn.running_mean[c] != before["layers.1.cv1.bn.running_mean"][c]]
    assert moved == [0, 1, 2, 3, 12, 13, 14, 15]
    reader = block.cv2.conv.weight.grad.flatten(1).abs().sum(0)  # four maps side by side
    assert reader.nonzero().flatten().tolist() == [s * 12 + j for s in range(4) for j in range(4)]


@pytest.mark.parametrize("name", ["BottleneckCSP", "C2f", "MBConv"])
def test_alpha_gradients_equal_central_differences_in_float64(name: str) -> None:
    net = fresh(name, norms="k_act").double()
    loss = smooth_loss(net, images_of(32, 2, torch.float64))
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.normal_(generator=torch.Generator().manual_seed(4))
    picks = drawn(net, 1)[0] | {c.name: c.options[0] for c in net.spec.choices if "expan" in c.name}  # the middle one
    value, gradients = net.gate_gradients(picks, loss)
    net.activate(picks)
    assert float(value) == pytest.approx(float(loss(net.network).detach()), rel=1e-12)
    net.zero_grad()
    net.set_alpha_gradients(gradients)
    assert_slopes_are_differences(net, picks, loss, least=1e-7)


@pytest.mark.parametrize("name", ["BottleneckCSP", "C3", "C3Separable", "MBConv each"])
def test_a_mixture_that_is_certain_is_the_subnet(name: str) -> None:
    net = fresh(name, "merge").double()
    x = images_of(32, 2, torch.float64)
    for picks in drawn(net, 4):
        net.activate(picks)
        expected = net.network(x)[0]
        with net.mixed(one_hot(net, picks)):
            found = net.network(x)[0]
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b)


def test_an_architecture_step_leaves_maps_weights_and_statistics_as_they_were() -> None:
    net = fresh("C3")
    before = deepcopy(net.network.state_dict())
    targets = Targets(torch.tensor([[5.0, 6, 20, 30]]), torch.tensor([0]), torch.tensor([0]))
    optimizer = torch.optim.Adam(net.alphas, lr=0.01, betas=(0.0, 0.999))
    decided = {d.name: d.options[1] for d in net.decisions}
    architecture_step(net, optimizer, images_of(), targets, decided, Prices())
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.network.state_dict().items())
    assert not any(module.wide for module in net.network.modules() if isinstance(module, Cut))
    assert all(alpha.abs().sum() > 0 for alpha in net.alphas)


def test_a_budget_of_parameters_is_met_by_narrower_blocks() -> None:
    net = fresh("C2f alone")
    table = cost_tables(resolve(net.spec), 32)
    least, narrow = table["params"].extreme(largest=False)
    targets = Targets(torch.tensor([[5.0, 6, 20, 30]]), torch.tensor([0]), torch.tensor([0]))
    optimizer, prices = torch.optim.Adam(net.alphas, lr=0.1, betas=(0.0, 0.999)), Prices(lambdas=(1e4,))
    for step in range(20):
        decided = fair_options(net.decisions, 0, step)
        how: dict[str, Any] = {"budgets": [Budget("params", least)], "tables": table, "progress": step / 20}
        _, prices = architecture_step(net, optimizer, images_of(), targets, decided, prices, **how)
    best = {d.name: d.options[int(a.argmax())] for d, a in zip(net.decisions, net.alphas, strict=True)}
    assert best == narrow.picks == {"1.expansion": 0.25}


# ---- what cannot share its weights

REFUSED = {
    "[-1, 1, C3, [16, True, 2, {expansion: {choice: [0.5, 0.25]}}]]": (
        "expansion is a choice {0.5|0.25}, so groups must be 1; got 2; --supernet independent can hold it"
    ),
    "[-1, 1, MBConv, [8, 3, 1, {expand: {choice: [1, 6]}}]]": (
        "expand is a choice {1|6}, and 1 leaves a convolution out that the others have; --supernet independent can "
        "hold it"
    ),
    "[-1, 1, MBConv, [8, 3, 2, {expand: {choice: [2, 6]}, padding: same}]]": (
        "expand is a choice {2|6}, so padding must be left out; got same; --supernet independent can hold it"
    ),
    "[-1, 1, C3k2, [16, False, {expansion: {choice: [0.5, 1.0]}, attention: True}]]": (
        "expansion is a choice {0.5|1.0}, so attention must be False; --supernet independent can hold it"
    ),
    "[-1, 1, C3Ghost, [16, {expansion: {choice: [0.5, 0.25]}}]]": (
        "C3Ghost cannot share its weights over a choice in expansion; --supernet independent can hold it"
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_share_its_weights_is_told_and_held_by_whole_blocks(row: str) -> None:
    text = FILE.format(row=row)
    for kind in ("shared", "merge"):
        with pytest.raises(Fault) as fault:
            Supernet(parse_text(text), kind)
        assert str(fault.value) == f"<text>:7:5 layer 1: {REFUSED[row]}"
    net, x = Supernet(parse_text(text), "independent").eval(), images_of(64)
    for number in range(2):
        picks = SearchSpace.of(net.spec).at(number).picks
        net.activate(picks)
        with torch.no_grad():
            assert largest_difference(net.network(x)[0], net.derive(picks)(x)[0]) == 0


def test_a_width_that_leaves_no_channel_is_told_by_its_option() -> None:
    with pytest.raises(Fault, match=r"C3, .*: expansion 0.01 of 16 leaves no channel"):
        normalize(parse_text(FILE.format(row="[-1, 1, C3, [16, {expansion: {choice: [0.5, 0.01]}}]]")))
        resolve(parse_text(FILE.format(row="[-1, 1, C3, [16, {expansion: {choice: [0.5, 0.01]}}]]")))


# ---- the files

FILES = {  # subnets; the plain file whose network the first options are
    "yolov5n-search": (24**3 * 36 * 12**4, "yolov5n"),
    "yolov5s-search": (24**3 * 36 * 12**4, "yolov5s"),
    "yolov8n-search": (24**2 * 36**2 * 12**4, "yolov8n"),
    "yolox-nano-search": (4**8 * 3**2 * 2**4, "yolox-nano"),
    "tiny-wide-search": (107_495_424, None),  # 72^4 * 2^2
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_spans_as_many_subnets_as_it_says_and_starts_as_its_plain_one(name: str) -> None:
    size, plain = FILES[name]
    graph = load_graph(CFG / f"{name}.yaml")
    space = SearchSpace.of(graph.spec)
    assert space.size == size and f"= {size:,} subnets" in (CFG / f"{name}.yaml").read_text()
    assert any(choice.name.endswith(".expansion") for choice in space.choices)
    if plain:
        first = graph.spec.freeze({choice.name: choice.options[0] for choice in space.choices})
        here, there = (network_costs(one, 640) for one in (resolve(first), load_graph(CFG / f"{plain}.yaml")))
        assert [(row.params, row.macs, row.shape) for row in here] == [(r.params, r.macs, r.shape) for r in there]


def test_the_command_prints_the_size_of_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert models_main(["show", str(CFG / "tiny-wide-search.yaml"), "--imgsz", "64"]) == 0
    assert "107,495,424 subnets" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolox-nano"])
def test_weights_of_the_plain_network_are_a_start_whatever_is_wider_or_deeper(name: str) -> None:
    """The first options give what the plain network gives. Wider blocks do as well: what is added is not read yet."""
    torch.manual_seed(0)
    plain = build(parse(CFG / f"{name}.yaml")).eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    net = Supernet(parse(CFG / f"{name}-search.yaml"), "shared").eval()
    _, missing = warm_start(net.network, plain.state_dict())
    depths = {2: 1, 4: 2, 6: 2 if name == "yolov8n" else 3, 8: 1}
    for key in missing:  # bottlenecks that the plain network does not have
        _, row, m, index, *_ = key.split(".")
        assert m == "m" and int(index) >= depths[int(row)], key
    x = images_of(64, 1)
    first = {choice.name: choice.options[0] for choice in net.spec.choices}
    wider = {choice.name: max(choice.options) for choice in net.spec.choices if choice.name.endswith("expansion")}
    larger = {choice.name: 5 for choice in net.spec.choices if choice.name.endswith("kernel")}
    with torch.no_grad():
        expected = plain(x)[0]
        for picks in (first, first | wider, first | wider | larger):
            net.activate(picks)
            found = net.network(x)[0]
            assert largest_difference(expected, found) <= 1e-5 * head_maximum(expected)


# ---- a search


def test_a_search_through_ten_to_the_eighth_ends_in_a_plain_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the file's own space, with fewer repeats of what is not open."""
    monkeypatch.setattr("search.propose.DRAWS", 400)
    monkeypatch.setattr("search.find.measure_ms", partial(measure_ms, rounds=3, warmup=1))
    text = (CFG / "tiny-wide-search.yaml").read_text()
    assert "depth_multiple: 0.33" in text
    (tmp_path / "wide.yaml").write_text(text.replace("depth_multiple: 0.33", "depth_multiple: 0.05"))
    data = draw_shapes(tmp_path / "shapes", train=24, val=2, size=64, seconds=0)
    options = ["--cfg", tmp_path / "wide.yaml", "--data", data, "--epochs", "2", "--batch-size", "4"]
    options += ["--imgsz", "64", "--candidates", "2", "--calibration", "4", "--arch-every", "2", "--device", "cpu"]
    options += ["--project", tmp_path / "runs", "--budget", "params=1.8M"]
    assert main(list(map(str, options))) == 0
    assert "107,495,424" in capsys.readouterr().out
    folder = tmp_path / "runs" / "exp"
    spec, network = parse(folder / "best.yaml"), restore(load_checkpoint(folder / "best.pt"))
    rows = [[(row.op, row.args, row.kwargs, row.repeats) for row in normalize(one)] for one in (spec, network.spec)]
    assert not spec.choices and rows[0] == rows[1]
    widths = [layer.kwargs["expansion"] for layer in spec if "expansion" in layer.kwargs]
    assert len(widths) == 6 and set(widths) <= {0.25, 0.5, 0.75, 1.0}
    assert count_params(network) <= 1.8e6 and not list(elastic_leaves(network))
