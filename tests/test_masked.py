"""Ops under a mask: the equations of selective down-sampling, what the mask learns from, and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import scramble
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Fault, Targets
from models.cost import count_params, network_costs, row_cost
from models.graph import load_graph, resolve
from models.network import Network, build
from models.ops.mask import decided, sampled
from models.ops.masked import PatchPool, filled
from models.parse import parse_text
from models.registry import OPS, Shape
from models.show import table

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
ODD = (13, 11)  # no multiple of 2, 3 or 4
HEAD = "  - [-1, 1, Classify, [nc, {dropout: 0.0}]]\n"
NET = """\
nc: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, MaskPredictor, [[8, 8, 8]]]
  - [[1, 2], 2, SelStage, [16, {block: bottleneck, act: relu}]]
  - [[3, 2], 1, SelStage, [16, {act: relu, dilation: 4, pool: keep}]]
  - [[-1, 2], 1, SelLoss, [0.5]]
head:
  - [-1, 1, Classify, [nc, {dropout: 0.0}]]
"""
TARGETS = Targets(torch.zeros(2, 4), torch.tensor([0, 2]), torch.tensor([0, 1]))


def op(name: str, d: int, channels: int = 6, **arguments: object) -> nn.Module:
    """An op under a mask of patches of d x d cells, in float64, with norms that do something."""
    torch.manual_seed(0)
    module = OPS[name].module(inputs=(Shape(channels, 8), Shape(1, 8 * d, "mask")), **arguments).double().eval()
    scramble(module)
    return module


def spread(values: Tensor, d: int, size: tuple[int, int]) -> Tensor:
    """Each value in d x d cells, as many as `size` has room for."""
    return values.repeat_interleave(d, 2).repeat_interleave(d, 3)[:, :, : size[0], : size[1]]


def random_mask(size: tuple[int, int], d: int, images: int = 2) -> Tensor:
    torch.manual_seed(1)
    return (torch.rand(images, 1, -(-size[0] // d), -(-size[1] // d)) < 0.5).double()


# ---- T1 to T6: one convolution


@pytest.mark.parametrize("backend", ["dense", "packed"])
@pytest.mark.parametrize(("kernel", "d", "groups"), [(3, 2, 1), (5, 2, 2), (3, 3, 3), (5, 4, 1)])
def test_a_masked_convolution_is_the_dilated_one_or_the_one_of_the_small_map(kernel, d, groups, backend):
    conv = op("SelConv", d, c_out=12, kernel=kernel, groups=groups, act="relu", backend=backend)
    x = torch.randn(2, 6, *ODD, dtype=torch.float64)

    def plain(y: Tensor, stride: int, dilation: int) -> Tensor:
        y = F.conv2d(y, conv.conv.weight, None, stride, dilation * (kernel // 2), dilation, groups)
        return conv.bn(y).relu()

    with torch.no_grad():
        mask = random_mask(ODD, d)
        dilated, small = plain(x, 1, d), plain(x[:, :, ::d, ::d], 1, 1)
        torch.testing.assert_close(conv([x, mask * 0]), dilated, rtol=0, atol=1e-12)  # T1
        low = conv([x, mask * 0 + 1])
        torch.testing.assert_close(low, spread(small, d, ODD), rtol=0, atol=1e-12)  # T2
        torch.testing.assert_close(low, spread(plain(x, d, d), d, ODD), rtol=0, atol=1e-12)
        y = conv([x, mask])
        torch.testing.assert_close(y[:, :, ::d, ::d], small, rtol=0, atol=1e-12)  # T3: whatever the mask is
        torch.testing.assert_close(filled(y, mask), y, rtol=0, atol=0)
        high = (spread(mask, d, ODD) == 0).expand_as(y)
        others = high.clone()
        others[:, :, ::d, ::d] = False
        assert (y - dilated)[others].abs().gt(1e-9).double().mean() > 0.3  # T4: where not even the neighbours are low


@pytest.mark.parametrize("backend", ["dense", "packed"])
@pytest.mark.parametrize("pool", ["avg", "max", "softmax"])
def test_with_all_patches_low_a_pooled_convolution_is_that_of_the_pooled_map(pool, backend):
    """T6. A patch that the edge cuts is pooled over the cells that it has."""
    conv = op("SelConv", 2, c_out=5, kernel=3, act="relu", pool=pool, backend=backend)
    x = torch.randn(1, 6, *ODD, dtype=torch.float64)
    pooled = torch.empty(1, 6, 7, 6, dtype=torch.float64)
    for row in range(7):
        for column in range(6):
            patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(2)
            if pool == "softmax":
                nn.init.normal_(conv.pool.weigh.weight, generator=torch.Generator().manual_seed(2))
                weights = torch.einsum("c,ncp->np", conv.pool.weigh.weight[0, :, 0, 0], patch).softmax(1)
                value = (patch * weights[:, None]).sum(2)
            else:
                value = patch.mean(2) if pool == "avg" else patch.amax(2)
            pooled[:, :, row, column] = value
    with torch.no_grad():
        expected = conv.bn(F.conv2d(pooled, conv.conv.weight, padding=1)).relu()
        y = conv([x, torch.ones(1, 1, 7, 6, dtype=torch.float64)])
        torch.testing.assert_close(y, spread(expected, 2, ODD), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["dense", "packed"])
def test_a_transition_is_the_strided_convolution_in_low_patches_and_the_full_one_in_high_ones(backend):
    conv = op("SelConv", 2, c_out=5, kernel=3, mode="transition", act="identity", backend=backend)
    x, mask = torch.randn(2, 6, *ODD, dtype=torch.float64), random_mask(ODD, 2)
    with torch.no_grad():
        full = conv.bn(F.conv2d(x, conv.conv.weight, padding=1))
        strided = conv.bn(F.conv2d(x, conv.conv.weight, padding=1, stride=2))
        expected = torch.where(spread(mask, 2, ODD) == 1, spread(strided, 2, ODD), full)
        torch.testing.assert_close(conv([x, mask]), expected, rtol=0, atol=1e-12)


def test_a_softmax_pool_begins_as_the_mean():
    x = torch.randn(1, 6, 8, 4)
    torch.testing.assert_close(PatchPool(6, 2, "softmax")(x), F.avg_pool2d(x, 2))


def test_a_masked_map_has_one_value_in_a_low_patch():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    values = {"pick": (2.0, 8.0), "avg": (4.5, 10.5), "max": (7.0, 13.0)}
    for pool, (right, left) in values.items():
        module = OPS["MaskedDownsample"].module(inputs=(Shape(1, 8), Shape(1, 16, "mask")), pool=pool)
        expected = torch.tensor(
            [[0, 1, right, right], [4, 5, right, right], [left, left, 10, 11], [left, left, 14, 15.0]]
        )
        assert torch.equal(module([x, mask])[0, 0], expected)


# ---- T1 to T5: a stage


@pytest.mark.parametrize("backend", ["dense", "packed"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize(("dilation", "pool"), [(2, "pick"), (4, "keep")])
def test_a_stage_is_the_dilated_stage_and_the_strided_one(block, backend, dilation, pool):
    """One set of weights under one set of names: without low patches, without high ones, and at first cells always."""
    stage = op("SelStage", 2, 8, c_out=16, number=3, block=block, dilation=dilation, pool=pool, act="relu")
    stage.backend = backend
    res = OPS["ResStage"].module
    fine = res(8, 16, 1, 3, block=block, dilation=dilation, act="relu").double().eval()
    stride, within = (2, None) if pool == "pick" else (1, dilation // 4)
    coarse = res(8, 16, stride, 3, block=block, dilation=dilation // 2, first_dilation=within, act="relu")
    coarse = coarse.double().eval()
    fine.load_state_dict(stage.state_dict())
    coarse.load_state_dict(stage.state_dict())
    torch.manual_seed(2)
    x, mask = torch.randn(2, 8, 12, 16, dtype=torch.float64), random_mask((12, 16), 2)
    if pool == "keep":
        x = filled(x, mask)
    with torch.no_grad():
        small = coarse(x if pool == "pick" else x[:, :, ::2, ::2])
        torch.testing.assert_close(stage([x, mask])[:, :, ::2, ::2], small, rtol=0, atol=1e-10)
        torch.testing.assert_close(stage([x, mask * 0]), fine(x), rtol=0, atol=1e-10)
        if pool == "pick":
            torch.testing.assert_close(stage([x, mask * 0 + 1]), spread(small, 2, (12, 16)), rtol=0, atol=1e-10)


def test_a_stage_in_training_computes_what_it_computes_in_use():
    """Norms see the filled map, so their statistics are weighted by area."""
    stage = op("SelStage", 2, 8, c_out=8, number=2, act="relu")
    for norm in stage.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    x, mask = torch.randn(4, 8, 8, 8, dtype=torch.float64), random_mask((8, 8), 2, images=4)
    trained = stage.train()([x, mask])
    with torch.no_grad():
        used = stage.eval()([x, mask])
    count = 4 * 8 * 8
    assert (trained - used).abs().max() / used.abs().max() < 3 / count  # running variances are unbiased, count - 1


# ---- the mask


def test_predictors_cost_what_is_known_of_them():
    """701,826 parameters and 673,056 multiply-adds a position are those of the code of Hesse et al."""
    text = "nc: 3\nbackbone:\n  - [-1, 1, Conv, [512, 3, 8]]\n  - [-1, 1, MaskPredictor, [{arguments}]]\n"
    text += "  - [[0, 1], 1, SelLoss, []]\nhead:\n  - [-1, 1, Classify, [nc, {dropout: 0.0}]]\n"

    def cost(arguments: str) -> tuple[int, int]:
        found = network_costs(resolve(parse_text(text.replace("{arguments}", arguments))), 256)[1]
        assert found.shape == (1, 16, 16)
        return found.params, found.macs

    assert cost("[128, 64, 64], 2, False") == (701_826, 673_056 * 32 * 32)  # 689.2 M
    assert cost("") == (85_892, 82_771_968)  # -88.0 %
    assert cost("[192, 96, 64]")[1] == 128_000_000  # -81.4 %


def test_a_sample_is_exact_and_follows_its_probability():
    torch.manual_seed(0)
    z = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 200, 200).clone().requires_grad_()
    mask = sampled(z)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert float(mask.detach().mean()) == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.01)
    mask.sum().backward()
    assert (z.grad[:, 1] > 0).all() and torch.allclose(z.grad[:, 0], -z.grad[:, 1], atol=1e-6)


def test_a_predictor_draws_in_training_and_decides_in_use():
    torch.manual_seed(0)
    predictor, x = OPS["MaskPredictor"].module(c_in=8, widths=(4, 4, 4)), torch.randn(2, 8, 16, 16)
    torch.manual_seed(1)
    one, other = predictor(x).output, predictor(x).output
    torch.manual_seed(1)
    assert torch.equal(predictor(x).output, one) and not torch.equal(one, other)
    said = predictor.eval()(x)
    assert torch.equal(said.output, decided(said.aux)) and torch.equal(predictor(x).output, said.output)
    assert float(predictor.aux_parts(said.aux)["S_in_use"]) == float(said.output.mean())
    predictor.argmax = True
    assert torch.equal(predictor(x).output[:, 0], (said.aux[:, 1] > said.aux[:, 0]).float())


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.01, 3.0, 50.0]), st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_as_many_patches_are_low_in_use_as_in_samples(seed, spread, middle):
    """And those that are low most often. Of an undecided predictor the arg-max would be all low or all high."""
    generator = torch.Generator().manual_seed(seed)
    z = spread * torch.randn(2, 2, 6, 7, generator=generator, dtype=torch.float64)
    z[:, 1] += middle
    mask, p = decided(z), z.softmax(dim=1)[:, 1:]
    for image, expected in zip(mask, p, strict=True):
        assert abs(float(image.sum()) - float(expected.sum())) <= 0.5 + 1e-4
        low, high = expected[image == 1], expected[image == 0]
        assert not len(low) or not len(high) or float(low.min()) >= float(high.max())
    if spread == 50:
        sure = (p - 0.5).abs().flatten(1).min(dim=1).values > 0.4999
        assert torch.equal(mask[sure], (p > 0.5).double()[sure])


def test_a_predictor_starts_from_the_share_that_it_was_given():
    """Also in a network, whose own start would make its logits large."""
    torch.manual_seed(0)
    for low in (0.2, 0.5):
        text = NET.replace("[[8, 8, 8]]", f"[[8, 8, 8], {{low: {low}}}]")
        network = build(parse_text(text)).train()
        _, aux = network(torch.rand(8, 3, 64, 64))
        z = aux[2].detach()
        assert float((z[:, 1] - z[:, 0]).std()) < 1.2
        assert float(z.softmax(1)[:, 1].mean()) == pytest.approx(low, abs=0.12)


@pytest.mark.parametrize("light", [True, False])
def test_the_pace_is_how_far_a_step_takes_the_logits(light):
    """Of a light predictor those of its norm: they say how many patches are low, and how sure it is."""
    moved, x = {}, torch.rand(2, 8, 16, 16, dtype=torch.float64)
    for pace in (1.0, 0.1, 10.0):
        torch.manual_seed(0)
        arguments = {"c_in": 8, "widths": (4, 4, 4), "light": light, "low": 0.2, "pace": pace}
        predictor = OPS["MaskPredictor"].module(**arguments).double().eval()
        optimizer = torch.optim.Adam((predictor.bn if light else predictor).parameters(), lr=1e-4)
        before = predictor(x).aux
        assert float(before.detach().softmax(1)[:, 1].mean()) == pytest.approx(0.2, abs=0.12)
        before[:, 1].sum().backward()
        optimizer.step()
        moved[pace] = predictor(x).aux.detach() - before.detach()
    for pace in (0.1, 10.0):
        assert torch.allclose(moved[pace], pace * moved[1.0], rtol=1e-2, atol=1e-7)
    assert float(moved[1.0].abs().max()) > 5e-5


def test_a_light_predictor_starts_with_different_patches_and_a_price_moves_them_together():
    """A price says the same of every patch. Behind a norm it can change how many are low, not which."""
    torch.manual_seed(0)
    predictor, x = OPS["MaskPredictor"].module(c_in=32, low=0.5), torch.randn(4, 32, 32, 32)
    z = predictor(x).aux
    margins = (z[:, 1] - z[:, 0]).detach()
    assert 0.3 < float(margins.std()) < 1.1 and abs(float(margins.mean())) < 1e-5
    z[:, 1].sum().backward()
    ranks = [p.grad.abs().max() for part in (predictor.features, predictor.logits) for p in part.parameters()]
    assert float(max(ranks)) < 1e-3 * float(predictor.bn.bias.grad.abs().max())


def test_the_loss_and_the_stages_have_one_sample():
    torch.manual_seed(0)
    network = build(parse_text(NET)).train()
    held, aux = network.run(range(4), {-1: torch.rand(2, 3, 64, 64)})
    mask = held[2]
    rest, later = network.run(range(4, 7), held)
    assert later[5] is mask


def test_both_losses_reach_the_predictor():
    """M9: the task alone, and the price alone."""
    for price in (0.0, 0.5):
        torch.manual_seed(0)
        network = build(parse_text(NET)).train()
        scramble(network)
        network.layers[5].price = price
        outputs, aux = network(torch.rand(2, 3, 64, 64))
        loss = network.loss_from(outputs, TARGETS, aux)[0] if not price else network.layers[5].aux_loss(aux[5], TARGETS)
        loss.backward()
        assert all(float(parameter.grad.norm()) > 0 for parameter in network.layers[2].parameters())


def test_the_price_of_resolution_rises_from_nothing():
    loss = OPS["SelLoss"].module(price=2.0, start=2, ramp=4)
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
    paid = [float(loss.aux_loss(mask, TARGETS)) for _ in range(8)]
    assert paid == pytest.approx([2 * 0.75 * share for share in (0, 0, 0, 0.25, 0.5, 0.75, 1, 1)])
    later = OPS["SelLoss"].module(price=2.0, start=2, ramp=4)
    later.load_state_dict(loss.state_dict())
    assert float(later.eval().aux_loss(mask, TARGETS)) == float(later.aux_loss(mask, TARGETS)) == 1.5
    assert int(later.batches) == 8
    assert float(OPS["SelLoss"].module(price=3.0, target=0.75).aux_loss(mask, TARGETS)) == pytest.approx(0.75)


def test_parts_of_the_loss_tell_a_collapse():
    torch.manual_seed(0)
    network = build(parse_text(NET)).train()
    loss, parts = network.loss(torch.rand(2, 3, 64, 64), TARGETS)
    assert set(parts) == {"cls", "mask", "S", "S_least", "S_most", "S_in_use"}
    assert parts["S_least"] <= parts["S"] <= parts["S_most"]
    torch.testing.assert_close(parts["mask"], 0.5 * (1 - parts["S"]))
    torch.testing.assert_close(loss.detach(), parts["cls"] + parts["mask"])


# ---- costs and shapes


def test_multiply_adds_of_a_stage_fall_with_its_low_share():
    graph = resolve(parse_text(NET))
    full, half, none = (network_costs(graph, 64, low=low) for low in (0.0, 0.5, 1.0))
    assert full[4].macs == 16 * 16 * 9 * 16 * 16 * 2
    assert (half[4].macs, none[4].macs) == (round(full[4].macs * 0.625), full[4].macs // 4)
    always = 16 * 16 * 16 * 4  # the 1x1 convolution before the transition
    assert none[3].macs == always + (full[3].macs - always) // 4
    assert [cost.macs for cost in full[:3]] == [cost.macs for cost in none[:3]]
    assert row_cost(graph.nodes[4], {}, 64).macs == full[4].macs
    assert count_params(Network(graph).layers[4]) == full[4].params


def test_a_mask_is_shown_as_one():
    graph = resolve(parse_text(NET))
    lines = table(graph, network_costs(graph, 64), 64).splitlines()
    assert "1x8x8 mask" in lines[3] and "mask" not in lines[4].split("SelStage")[0]
    assert str(graph.nodes[2].output) == "a mask at stride 8"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "[[1, 2], 1, Concat, []]",
            "row 2 gives a mask at stride 8, which Concat does not take; a mask is for SelLoss, MaskedDownsample, "
            "SelConv, SelStage, SelCSP",
        ),
        (
            "[2, 1, Conv, [8]]",
            "row 2 gives a mask at stride 8, which Conv does not take; a mask is for SelLoss, MaskedDownsample, "
            "SelConv, SelStage, SelCSP",
        ),
        (
            "[[1, 0], 1, SelConv, [8]]",
            "SelConv takes map, mask in this order, and row 0 gives a map of 8 channels at stride 2 where it takes a "
            "mask",
        ),
        (
            "[[2, 1], 1, SelConv, [8]]",
            "SelConv takes map, mask in this order, and row 2 gives a mask at stride 8 where it takes a map",
        ),
        ("[1, 1, SelConv, [8]]", "SelConv takes map, mask in this order, got 1 sources"),
        (
            "[[0, 2], 1, SelConv, [8, 4]]",
            "kernel 4, stride 1 and padding 1 do not keep the map's size; an odd kernel with padding left out does",
        ),
        ("[[1, 2], 1, SelConv, [8, 3, transition, {pool: max}]]", "a transition reads the map as it is, so pool is"),
        ("[[1, 2], 1, SelStage, [8, {dilation: 3}]]", "dilation 3 is no multiple of 2, the side of the mask's patches"),
        (
            "[[1, 2], 1, SelStage, [8, {first_dilation: 1, pool: avg}]]",
            "first_dilation 1 is no multiple of 2, the side of the mask's patches: it reads the map as it is",
        ),
    ],
)
def test_a_mask_and_a_map_are_not_mistaken(row, message):
    text = NET.split("  - [[1, 2], 2")[0] + f"  - {row}\n  - [[-1, 2], 1, SelLoss, []]\nhead:\n"
    with pytest.raises(Fault) as fault:
        resolve(parse_text(f"{text}{HEAD}"))
    (line,) = fault.value.lines
    assert line.startswith(f"<text>:6:5 layer 3 {row}: {message}"), line
    assert "\n" not in line and line.endswith(")")


def test_a_mask_of_another_map_is_a_fault():
    text = NET.replace("[[1, 2], 2, SelStage", "[[0, 2], 2, SelStage").replace("[-1, 1, MaskP", "[0, 1, MaskP")
    with pytest.raises(Fault, match="a mask at stride 4 has no whole patches of a map at stride 4; a MaskPredictor"):
        resolve(parse_text(text.replace("[[0, 2], 2, SelStage", "[[1, 2], 2, SelStage")))


@pytest.mark.parametrize(
    ("name", "dense", "params"),
    [("r50-mds-seg", "resnet50-deeplab", 39_724_247), ("resnet18-mds-seg", "resnet18-deeplab", 15_936_985)],
)
def test_the_segmenters_are_the_dense_ones_and_a_predictor(name, dense, params):
    """Rows under the mask have the tensors of the dense network under the same names, a row further on."""
    graph, plain = (load_graph(CFG / f"{file}.yaml") for file in (name, dense))
    with torch.device("meta"):
        ours, theirs = Network(graph), Network(plain)
    assert count_params(ours) == params
    for row in (4, 5):
        mine, wanted = ours.layers[row + 1].state_dict(), theirs.layers[row].state_dict()
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in wanted.items()}
