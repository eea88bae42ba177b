"""The packed form of ops under a mask: the numbers of the dense one for any mask, and the work that it saves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masked import NET, op
from torch.utils.flop_counter import FlopCounterMode

import models.ops.packed as packed_module
from models.cost import masked_macs
from models.fuse import fuse
from models.graph import resolve
from models.network import build
from models.ops.masked import PACKED_FROM, best_form, filled
from models.ops.packed import pack, packing, unpack
from models.parse import parse_text
from models.registry import OPS, Shape


def masks(images: int, h: int, w: int) -> st.SearchStrategy[torch.Tensor]:
    cells = st.lists(st.sampled_from([0.0, 1.0]), min_size=images * h * w, max_size=images * h * w)
    return cells.map(lambda values: torch.tensor(values, dtype=torch.float64).view(images, 1, h, w))


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_packed_convolution_is_the_dense_one(data):
    d, kernel = data.draw(st.sampled_from([(2, 3), (2, 5), (3, 3), (4, 3), (2, 1)]))
    images, h, w = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    cut = [data.draw(st.integers(0, d - 1)) for _ in range(2)]  # odd sizes: the last patches are not whole
    mask = data.draw(masks(images, h, w))
    mode = data.draw(st.sampled_from(["dilated", "transition"]))
    pool = data.draw(st.sampled_from(["pick", "avg", "max", "softmax"])) if mode == "dilated" else "pick"
    conv = op(
        "SelConv", d, 4, c_out=4, kernel=kernel, mode=mode, pool=pool, groups=data.draw(st.sampled_from([1, 2, 4]))
    )
    x = torch.randn(images, 4, h * d - cut[0], w * d - cut[1], dtype=torch.float64)
    found = {}
    with torch.no_grad():
        for backend in ("dense", "packed"):
            conv.backend = backend
            assert best_form(conv, mask) in ((backend,) if backend == "packed" or mask.any() else ("plain",))
            found[backend] = conv([x, mask])
    torch.testing.assert_close(found["packed"], found["dense"], rtol=0, atol=1e-10)


@given(st.data())
@settings(max_examples=8, deadline=None)
def test_packed_stages_are_the_dense_ones(data):
    """Two stages behind each other, as they are and with folded norms, plain and channels_last."""
    d, block = data.draw(st.sampled_from([2, 3, 4])), data.draw(st.sampled_from(["basic", "bottleneck"]))
    pool, mask = data.draw(st.sampled_from(["pick", "avg", "max", "softmax"])), data.draw(masks(2, 3, 4))
    number = data.draw(st.integers(1, 3))
    one = op("SelStage", d, 8, c_out=12, number=number, block=block, pool=pool, act="relu")
    two = op("SelStage", d, 12, c_out=12, number=2, block=block, pool="keep", dilation=2 * d, act="silu")
    x = torch.randn(2, 8, 3 * d, 4 * d, dtype=torch.float64)
    with torch.no_grad():
        one.backend = two.backend = "dense"
        expected = two([one([x, mask]), mask])
        one.backend = two.backend = "packed"
        torch.testing.assert_close(two([one([x, mask]), mask]), expected, rtol=0, atol=1e-10)
        x = x.contiguous(memory_format=torch.channels_last)
        one, two = (stage.to(memory_format=torch.channels_last) for stage in (one, two))
        torch.testing.assert_close(two([one([x, mask]), mask]), expected, rtol=0, atol=1e-10)


@given(masks(2, 3, 5), st.sampled_from([2, 3]))
@settings(max_examples=20, deadline=None)
def test_packing_and_unpacking_fills_low_patches(mask, d):
    x = torch.randn(2, 3, 3 * d, 5 * d, dtype=torch.float64)
    packed, values = packing(mask, d), torch.randn(2, 3, 3, 5, dtype=torch.float64)
    rows = pack(x, packed)
    assert len(rows) == 30 + int((mask == 0).sum()) * (d * d - 1)
    assert torch.equal(unpack(rows, packed), filled(x, mask))
    assert torch.equal(unpack(pack(x, packed, values), packed), filled(x, mask, values))


def test_many_rows_are_gathered_a_part_at_a_time(monkeypatch):
    conv = op("SelConv", 2, 4, c_out=4, kernel=3, backend="packed")
    x, mask = torch.randn(1, 4, 12, 12, dtype=torch.float64), torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    mask[..., 2:4] = 1
    with torch.no_grad():
        whole = conv([x, mask])
        monkeypatch.setattr(packed_module, "GATHERED", 7 * 9 * 4)  # seven rows
        torch.testing.assert_close(conv([x, mask]), whole, rtol=0, atol=1e-12)


def test_packed_stages_do_as_many_multiply_adds_as_the_table_says():
    """Counted where they happen, against the formula of the low share."""
    graph = resolve(parse_text(NET))
    network = build(parse_text(NET)).eval()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :5] = 1
    with torch.no_grad():
        x = torch.randn(1, 16, 16, 16)
        for row in (3, 4):
            layer, counted = network.layers[row], {}
            for backend in ("dense", "packed"):
                layer.backend = backend
                with FlopCounterMode(display=False) as counter:
                    layer([x, mask])
                counted[backend] = counter.get_total_flops() // 2
            assert counted["packed"] == masked_macs(counted["dense"], layer, graph.nodes[row], 64, 5 / 8)


def test_a_network_with_folded_norms_is_the_same():
    torch.manual_seed(0)
    network = build(parse_text(NET)).double().eval()
    for norm in network.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.running_mean.normal_(0, 0.3)
    network.layers[2].bn.bias.data.fill_(0)
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    fused = fuse(network).to(memory_format=torch.channels_last)
    with torch.no_grad():
        held, _ = network.run(range(3), {-1: images})
        for row in (3, 4):
            network.layers[row].backend = "dense"
            fused.layers[row].backend = "packed"
            assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in fused.layers[row].modules())
        held[2] = (torch.rand(2, 1, 8, 12) < 0.5).double()
        expected, _ = network.run(range(3, 7), held)
        got, _ = fused.run(range(3, 7), held)
    torch.testing.assert_close(got[6][0], expected[6][0], rtol=0, atol=1e-10)


def test_the_form_follows_the_mask_and_the_use():
    stage = OPS["SelStage"].module(inputs=(Shape(8, 8), Shape(1, 16, "mask")), c_out=8)
    mask = torch.zeros(1, 1, 10, 10)
    few, many = mask.clone(), mask.clone()
    few[0, 0, 0, : int(100 * PACKED_FROM) // 2] = 1
    many[..., :5] = 1
    assert best_form(stage, many) == "dense"  # in training
    stage.eval()
    assert best_form(stage, many) == "dense"  # with gradients
    with torch.no_grad():
        assert [best_form(stage, each) for each in (mask, few, many)] == ["plain", "dense", "packed"]


def test_an_exported_network_is_dense_and_takes_any_mask():
    torch.manual_seed(0)
    stage = OPS["SelStage"].module(inputs=(Shape(4, 8), Shape(1, 16, "mask")), c_out=8, act="relu").eval()

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = stage

        def forward(self, x, mask):
            return self.stage([x, mask])

    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        program = torch.export.export(Both(), (x, torch.ones(1, 1, 4, 4))).module()
        for low in (0.0, 0.5, 1.0):
            mask = (torch.rand(1, 1, 4, 4) < low).float()
            torch.testing.assert_close(program(x, mask), stage([x, mask]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mask_may_be_all_high_or_all_low(share):
    stage = op("SelStage", 2, 8, c_out=8, number=2, block="bottleneck", backend="packed")
    x, mask = torch.randn(1, 8, 4, 6, dtype=torch.float64), torch.full((1, 1, 2, 3), share, dtype=torch.float64)
    with torch.no_grad():
        y = stage([x, mask])
        stage.backend = "dense"
        torch.testing.assert_close(y, stage([x, mask]), rtol=0, atol=1e-10)
