"""The CSP stage under a mask, and the resolution of a row under a mask as a choice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked import NET, TARGETS, op, random_mask, spread
from test_ops import scramble
from torch import Tensor, nn

from data.shapes import draw_image
from data.structures import Fault
from engine.export import main as export
from engine.infer import load
from engine.latency import inputs_of
from models.checkpoint import save_checkpoint
from models.cost import network_costs, row_cost
from models.fuse import fuse
from models.graph import combinations, load_graph, normalize, resolve
from models.network import Network, build, head_maximum
from models.ops.masked import best_form, low_share
from models.parse import dump, parse, parse_text
from models.registry import OPS
from models.spec import ModelSpec
from models.supernet import Supernet
from search.costs import cost_tables

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
SIZE = (12, 8)
OPEN = """\
nc: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, MaskPredictor, [[8, 8, 8]]]
  - [[1, 2], 2, SelStage, [16, {act: relu, expected: 0.25, resolution: {choice: [low, high, mask]}}]]
  - [[3, 2], 1, SelStage, [16, {act: relu, dilation: 4, resolution: {choice: [low, high, mask]}}]]
  - [[-1, 2], 1, SelLoss, [0.5, {target: 0.25}]]
head:
  - [-1, 1, Classify, [nc, {dropout: 0.0}]]
"""


def stage(d: int = 2, **arguments: Any) -> nn.Module:
    return op("SelCSP", d, 6, c_out=8, number=2, act="relu", **arguments)


def plain_stage(of: nn.Module, kernel: int, step: int, dilation: int) -> nn.Sequential:
    """A convolution of this stride and a CSP block of this dilation, with the weights of a stage under a mask."""
    down = OPS["Conv"].module(6, 8, 3, step, act="relu").double()
    csp = OPS["BottleneckCSP"].module(8, 8, 2, kernel=kernel, act="relu").double()
    down.load_state_dict(of.down.state_dict())
    csp.load_state_dict({name: value for name, value in of.state_dict().items() if not name.startswith("down.")})
    for block in csp.m:
        block.cv2.conv.dilation, block.cv2.conv.padding = (dilation, dilation), (dilation * (kernel // 2),) * 2
    return nn.Sequential(down, csp).eval()


@pytest.mark.parametrize("backend", ["dense", "packed"])
@pytest.mark.parametrize(("d", "kernel"), [(2, 3), (2, 5), (4, 3)])
def test_a_stage_is_the_plain_one_at_either_stride_and_at_first_cells_always(d, kernel, backend):
    """T1 to T3 and T5 of a whole stage: one set of weights under one set of names."""
    selective = stage(d, kernel=kernel, backend=backend)
    torch.manual_seed(2)
    x, mask = torch.randn(2, 6, *SIZE, dtype=torch.float64), random_mask(SIZE, d)
    assert 0 < mask.mean() < 1
    with torch.no_grad():
        small, fine = plain_stage(selective, kernel, d, 1)(x), plain_stage(selective, kernel, 1, d)(x)
        torch.testing.assert_close(selective([x, mask * 0]), fine, rtol=0, atol=1e-10)
        torch.testing.assert_close(selective([x, mask * 0 + 1]), spread(small, d, SIZE), rtol=0, atol=1e-10)
        y = selective([x, mask])
        torch.testing.assert_close(y[:, :, ::d, ::d], small, rtol=0, atol=1e-10)
        high = (spread(mask, d, SIZE) == 0).expand_as(y)
        assert (y - spread(small, d, SIZE))[high].abs().max() > 1e-3  # there is something between first cells


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_a_packed_stage_is_the_dense_one(data):
    """For any mask, as it is and with folded norms."""
    d, kernel = data.draw(st.sampled_from([(2, 3), (3, 3), (2, 5), (2, 1)]))
    cells = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=24, max_size=24))
    mask = torch.tensor(cells, dtype=torch.float64).view(2, 1, 3, 4)
    selective = stage(d, kernel=kernel, shortcut=data.draw(st.booleans()), groups=data.draw(st.sampled_from([1, 2])))
    x = torch.randn(2, 6, 3 * d, 4 * d, dtype=torch.float64)
    with torch.no_grad():
        selective.backend = "dense"
        expected = selective([x, mask])
        selective.backend = "packed"
        assert best_form(selective, mask) == "packed"
        torch.testing.assert_close(selective([x, mask]), expected, rtol=0, atol=1e-10)
        lined = selective.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            lined([x.contiguous(memory_format=torch.channels_last), mask]), expected, rtol=0, atol=1e-10
        )


# ---- low, high, or by the mask


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SelConv", {"c_out": 8, "kernel": 3, "act": "relu", "pool": "max"}),
        ("SelConv", {"c_out": 8, "kernel": 3, "act": "relu", "mode": "transition"}),
        ("SelConv", {"c_out": 8, "kernel": 1, "act": "relu", "mode": "transition"}),
        ("SelStage", {"c_out": 8, "number": 2, "act": "relu"}),
        ("SelStage", {"c_out": 8, "number": 2, "act": "relu", "block": "bottleneck", "pool": "avg"}),
        ("SelStage", {"c_out": 8, "number": 2, "act": "relu", "dilation": 4, "pool": "keep"}),
        ("SelCSP", {"c_out": 8, "number": 2, "act": "relu"}),
    ],
)
def test_a_row_that_is_always_low_or_high_is_that_row_under_such_a_mask(name, arguments):
    """Whatever the mask says, in use and in training."""
    rows = {one: op(name, 2, 6, resolution=one, **arguments) for one in ("mask", "low", "high")}
    x, mask = torch.randn(2, 6, *SIZE, dtype=torch.float64), random_mask(SIZE, 2)
    for one, value in (("low", 1.0), ("high", 0.0)):
        rows[one].load_state_dict(rows["mask"].state_dict())
        for training in (False, True):
            expected = rows["mask"].train(training)([x, torch.full_like(mask, value)])
            found = rows[one].train(training)([x, mask])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert set(rows[one].state_dict()) == set(rows["mask"].state_dict())
        assert low_share(rows[one]) == 0.0
    assert (low_share(rows["mask"]), low_share(rows["mask"], 0.3)) == (0.0, 0.3)


def test_costs_of_a_choice_are_those_of_what_it_becomes():
    """High counts all, low as the strided network, by the mask the expected share; the supernet as what is active."""
    graph = resolve(parse_text(OPEN))
    row, table = graph.nodes[3], cost_tables(graph, 64)["macs"]
    high = 16 * 16 * 9 * 16 * 16 * 4  # two blocks of two convolutions at stride 4
    assert row_cost(row, {"3.resolution": "high"}, 64).macs == high
    assert row_cost(row, {"3.resolution": "low"}, 64).macs == high // 4
    assert row_cost(row, {"3.resolution": "mask"}, 64).macs == high - 3 * high // 16  # a quarter is low: 13 / 16
    assert table.rows[0][1].tolist() == [high // 4, high, high - 3 * high // 16]
    assert table.rows[1][1].tolist() == [high // 8, high // 2, high // 2]  # which names no share
    assert cost_tables(graph, 64)["params"].extreme(True)[0] == cost_tables(graph, 64)["params"].extreme(False)[0]
    for supernet in ("shared", None):
        for one, other in (("low", "mask"), ("mask", "high")):
            picks = {"3.resolution": one, "4.resolution": other}
            spec = normalize(graph.spec).freeze(picks)
            found = network_costs(resolve(spec), 64)[3].macs
            if supernet:
                net = Supernet(graph.spec, supernet)
                net.activate(picks)
                assert low_share(net.network.layers[3]) == {"low": 1.0, "mask": 0.25}[picks["3.resolution"]]
            else:
                assert found == row_cost(row, picks, 64).macs


def searched(kind: str, act: str = "relu") -> Supernet:
    torch.manual_seed(0)
    net = Supernet(parse_text(OPEN.replace("relu", act)), kind).double()
    scramble(net)
    with torch.no_grad():
        _, aux = net.network.run(range(3), {-1: torch.rand(2, 3, 64, 64, dtype=torch.float64)})
        net.network.layers[2].bn.bias[1] -= (aux[2][:, 1] - aux[2][:, 0]).median()
    return net


@pytest.mark.parametrize("kind", ["shared", "independent"])
def test_a_derived_network_is_the_subnet_of_every_resolution(kind):
    """One of two stages that is low everywhere leaves nothing of what the other has between first cells."""
    net, x = searched(kind).eval(), torch.rand(2, 3, 64, 64, dtype=torch.float64)
    seen = []
    with torch.no_grad():
        for picks in combinations(net.spec.choices):
            net.activate(picks)
            (y,), _ = net.network(x)
            derived = net.derive(picks)
            again = build(parse_text(dump(derived.spec))).double().eval()
            again.load_state_dict(derived.state_dict())
            for plain in (derived, again, fuse(derived)):
                torch.testing.assert_close(plain(x)[0][0], y, rtol=0, atol=1e-5)  # it is made in float32
            seen += [] if any(torch.allclose(y, other) for other in seen) else [y]
    assert len(seen) == {"shared": 5, "independent": 9}[kind]


def test_resolutions_share_all_weights():
    with torch.device("meta"):
        plain = Network(resolve(parse_text(NET.replace("{block: bottleneck, ", "{"))))
        shared = Supernet(parse_text(OPEN), "shared").network
    own = {name: value.shape for name, value in plain.state_dict().items()}
    assert {name: value.shape for name, value in shared.state_dict().items()} == own


def test_gates_of_resolutions_have_the_gradient_of_their_mixture():
    """A mixture of resolutions is a mask between 0 and 1. At a corner its gradient is what one subnet's run tells."""
    net, targets = searched("merge", "silu").train(), TARGETS  # smooth
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)

    def loss(network: Network) -> Tensor:
        torch.manual_seed(3)  # of the mask
        outputs, _ = network(images)
        return network.loss_from(outputs, targets)[0]

    picks = {"3.resolution": "mask", "4.resolution": "low"}
    gates = {
        d.name: torch.tensor([float(option == picks[d.name]) for option in d.options], dtype=torch.float64)
        for d in net.decisions
    }
    value, corner = net.gate_gradients(picks, loss)
    mixed, found = net.mixture_gradients(gates, loss)
    torch.testing.assert_close(value, mixed)
    for name in gates:
        torch.testing.assert_close(found[name], corner[name], rtol=1e-6, atol=1e-9)
        assert found[name].abs().max() > 0
    step = 1e-3  # masks are float32
    for at in range(3):  # and it is the slope of the loss
        moved = []
        for sign in (1, -1):
            there = gates["3.resolution"].clone()
            there[at] += sign * step
            with net.mixed({**gates, "3.resolution": there}):
                moved.append(float(loss(net.network).detach()))
        slope = (moved[0] - moved[1]) / (2 * step)
        assert slope == pytest.approx(float(found["3.resolution"][at]), rel=5e-3, abs=1e-5)


# ---- the model files


@pytest.mark.parametrize(
    ("name", "size", "choices"), [("tiny-mds-search", 11_664, 10), ("resnet18-mds-seg-search", 9, 2)]
)
def test_search_files_hold_what_they_say(name, size, choices):
    graph = load_graph(CFG / f"{name}.yaml")
    assert graph.notes == () and len(graph.spec.choices) == choices
    assert len(combinations([c for c in graph.spec.choices if c.name.endswith("resolution")])) == 9
    found = 1
    for choice in graph.spec.choices:
        found *= len(choice.options)
    assert found == size
    with torch.device("meta"):
        net = Supernet(graph.spec, "shared")
    assert sum(parameter.numel() for parameter in net.network.parameters()) > 0


def with_resolution(resolution: str) -> ModelSpec:
    text = (CFG / "tiny-mds.yaml").read_text().replace("args: [1024]}", f"args: [1024, {{resolution: {resolution}}}]}}")
    return parse_text(text)


def test_the_detector_has_the_coarse_maps_of_the_plain_one():
    """Its weights up to the neck are those of tiny.yaml, and so is what the neck reads at stride 32, for any mask."""
    torch.manual_seed(0)
    ours, theirs = (build(parse(CFG / f"{name}.yaml")).double().eval() for name in ("tiny-mds", "tiny"))
    for network in (ours, theirs):
        scramble(network)
    deep = ours.layers[10].state_dict()
    for row in range(9):
        theirs.layers[row].load_state_dict(ours.layers[row].state_dict())
    theirs.layers[9].load_state_dict({k.removeprefix("down."): v for k, v in deep.items() if k.startswith("down.")})
    theirs.layers[10].load_state_dict({k: v for k, v in deep.items() if not k.startswith("down.")})
    theirs.layers[11].load_state_dict(ours.layers[13].state_dict())
    images = torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.run(range(12), {-1: images})[0][11]
        held, _ = ours.run(range(10), {-1: images})
        for backend in ("dense", "packed"):
            ours.layers[10].backend = backend
            found, _ = ours.run(range(10, 14), {**held, 9: torch.tensor([[[[0.0, 1, 0], [1, 1, 0]]]])})
            torch.testing.assert_close(found[13], expected, rtol=1e-9, atol=1e-9)


def test_the_detector_is_fused_and_lighter_where_it_is_low():
    torch.manual_seed(0)
    network = build(parse(CFG / "tiny-mds.yaml")).eval()
    scramble(network)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, fused = network(images)[0], fuse(network)
        for found, wanted in zip(fused(images)[0], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * head_maximum(expected))
        assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.layers[10].m.modules())
    macs = {
        one: sum(cost.macs for cost in network_costs(resolve(with_resolution(one)), 256)) / 1e6
        for one in ("low", "high", "mask")
    }
    assert macs["mask"] == macs["high"] and macs["high"] - macs["low"] == pytest.approx(197.1 * 3 / 4, abs=0.1)


def test_a_resolution_that_is_none_is_a_fault():
    with pytest.raises(Fault, match="resolution=fine should be 'mask', 'low' or 'high'"):
        resolve(with_resolution("fine"))


def test_a_row_is_timed_with_a_mask_of_the_share_that_it_expects():
    graph = resolve(normalize(parse_text(OPEN)))
    x, mask = inputs_of(graph.nodes[3], 64)
    assert mask.shape == (1, 1, 8, 8) and x.shape == (1, 16, 16, 16)
    assert mask.unique().tolist() == [0, 1] and mask.mean().item() == 0.25
    assert inputs_of(graph.nodes[4], 64)[1].sum() == 0  # it names none: all of it at high resolution, the dearest


DETECTOR = """\
nc: 3
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, MaskPredictor, [[8, 8, 8]]]
  - [[0, 1], 1, SelCSP, [16]]
  - [[2, 1], 1, SelLoss, [0.1]]
  - [-1, 1, nn.MaxPool2d, [1, 2]]
head:
  - [[3, 4], 1, Detect, [nc, anchors]]
"""


def test_an_exported_detector_decides_its_masks_as_the_network_does(tmp_path, capsys):
    """By ranks of margins, an image at a time, also at a size that it was not checked at."""
    torch.manual_seed(0)
    network = build(parse_text(DETECTOR)).eval()
    scramble(network)
    for layer in network.head.m:
        layer.weight.data.normal_(0, 0.05)
        layer.bias.data.normal_(0, 0.7)
    weights, picture = tmp_path / "best.pt", draw_image(96, np.random.default_rng(1))[0]
    with torch.no_grad():  # half of its patches are low
        _, aux = network.run(range(2), {-1: torch.from_numpy(picture).permute(2, 0, 1)[None] / 255})
        network.layers[1].bn.bias[1] -= (aux[1][:, 1] - aux[1][:, 0]).median()
        held, _ = network.run(range(2), {-1: torch.from_numpy(picture).permute(2, 0, 1)[None] / 255})
        assert 0.3 < float(held[1].mean()) < 0.7
    save_checkpoint(weights, network, ["red", "green", "blue"], imgsz=64)
    assert export(["--weights", str(weights), "--format", "onnx"]) == 0
    parity = re.search(r"parity: boxes (\S+), scores (\S+) of their largest; (\d+) detections", capsys.readouterr().out)
    assert parity and float(parity[1]) < 1e-4 and float(parity[2]) < 1e-4 and int(parity[3]) > 5
    asked = {"conf": 0.3, "max_det": 30}
    mine, other = (load(path, imgsz=96)(picture, **asked) for path in (weights, weights.with_suffix(".onnx")))
    assert mine.labels.tolist() == other.labels.tolist() and len(mine) > 5
    np.testing.assert_allclose(other.boxes, mine.boxes, rtol=0, atol=1e-3)
