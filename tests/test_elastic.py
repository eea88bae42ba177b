"""The leaves that the primitives make: convolutions against torch's own, kernels of several sizes, keyed norms."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.optim import parameter_groups
from models.elastic import ElasticConv2d, PointwiseConv2d, SwitchableNorm, elastic_leaves, plain_state
from models.network import build
from models.ops.primitives import NORMS, conv, each, keyed_norms, norm, repeat
from models.parse import parse_text
from models.spec import Choice, PerBottleneck

STRIDED = """
import torch
from models.ops.primitives import conv
torch.set_num_threads(1)
for c_in in (3, 8, 15):
    layer = conv(c_in, 16, 1, 2).to(memory_format=torch.channels_last)
    x = torch.randn(8, c_in, 224, 224).contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(4):
        layer(x).sum().backward()
print("whole")
"""


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_strided_pointwise_convolution_is_the_usual_one(size: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = conv(4, 6, 1, 3, groups=groups, bias=True)
    assert isinstance(layer, PointwiseConv2d) and layer.bias is not None
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    layer.double()
    usual = F.conv2d(x, layer.weight, layer.bias, stride=3, groups=groups)
    torch.testing.assert_close(layer(x), usual)
    choice = ElasticConv2d(4, 6, Choice("k", (1, 3)), stride=3, groups=groups).double()
    choice.active = 1
    expected = F.conv2d(x, choice.kernel(1), choice.bias, stride=3, groups=groups)
    torch.testing.assert_close(choice(x), expected)
    assert isinstance(choice.plain(), PointwiseConv2d)
    torch.testing.assert_close(choice.plain()(x), expected)


def test_other_convolutions_are_torch_s_own() -> None:
    assert all(type(conv(4, 8, k, s)) is nn.Conv2d for k, s in ((1, 1), (3, 2), (3, 1)))
    assert type(conv(4, 8, 1, 2, padding=1)) is nn.Conv2d


def test_its_backward_pass_leaves_memory_whole() -> None:
    """Fails by a crash of the interpreter where torch's own strided 1x1 kernel is used; hence the process."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", STRIDED], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "whole\n", done.stderr[-500:]


# ---- kernels of several sizes


def elastic(sizes: tuple[int, ...] = (3, 7, 5), groups: int = 1, dilation: int = 1) -> ElasticConv2d:
    """With matrices that are no longer the identity, in float64."""
    torch.manual_seed(0)
    layer = ElasticConv2d(4, 6, Choice("k", sizes), groups=groups, dilation=dilation).double()
    with torch.no_grad():
        for transform in layer.transforms.values():
            transform += 0.3 * torch.randn_like(transform)
    return layer


def by_hand(weight: Tensor, transform: Tensor, size: int) -> Tensor:
    """``unvec(T vec(centre))`` a pair of channels at a time, with loops over cells."""
    margin = (weight.shape[-1] - size) // 2
    new = torch.zeros(*weight.shape[:2], size, size, dtype=weight.dtype)
    for row in range(size):
        for column in range(size):
            for i in range(size):
                for j in range(size):
                    entry = transform[row * size + column, i * size + j]
                    new[:, :, row, column] += entry * weight[:, :, margin + i, margin + j]
    return new


@pytest.mark.parametrize("groups", [1, 2])
def test_a_smaller_kernel_is_the_centre_of_the_next_larger_one_through_its_matrix(groups: int) -> None:
    layer = elastic(groups=groups)
    five = by_hand(layer.weight, layer.transforms["5"], 5)
    three = by_hand(five, layer.transforms["3"], 3)
    for size, expected in ((7, layer.weight), (5, five), (3, three)):
        torch.testing.assert_close(layer.kernel(size), expected)
    assert {name: tuple(t.shape) for name, t in layer.transforms.items()} == {"5": (25, 25), "3": (9, 9)}


def test_at_the_start_every_kernel_is_the_plain_centre_bit_for_bit() -> None:
    layer = ElasticConv2d(3, 4, Choice("k", (1, 3, 5, 11)))
    for size in (1, 3, 5, 11):
        margin = (11 - size) // 2
        assert torch.equal(layer.kernel(size), layer.weight[:, :, margin : 11 - margin, margin : 11 - margin])


def test_a_pointwise_kernel_is_the_middle_cell_and_has_no_matrix() -> None:
    layer = elastic((1, 3, 5))
    assert list(layer.transforms) == ["3"]
    assert torch.equal(layer.kernel(1), layer.weight[:, :, 2:3, 2:3])
    assert list(ElasticConv2d(1, 1, Choice("k", (1, 3))).transforms) == []


@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_plain_convolution_has_the_transformed_kernel(size: int, dilation: int) -> None:
    layer = elastic((1, 3, 5, 7), groups=2, dilation=dilation)
    layer.active = size
    plain = layer.plain()
    assert type(plain) is nn.Conv2d and plain.kernel_size == (size, size)
    assert sorted(plain.state_dict()) == ["bias", "weight"]
    x = torch.randn(2, 4, 17, 17, dtype=torch.float64)
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.option(size, x), layer(x))


def test_only_what_a_kernel_is_made_of_gets_a_gradient() -> None:
    layer = elastic()
    moved = {}
    for size in (7, 5, 3):
        layer.zero_grad(set_to_none=True)
        layer.active = size
        layer(torch.randn(1, 4, 9, 9, dtype=torch.float64)).square().sum().backward()
        moved[size] = sorted(name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any())
    assert moved[7] == ["bias", "weight"]
    assert moved[5] == ["bias", "transforms.5", "weight"]
    assert moved[3] == ["bias", "transforms.3", "transforms.5", "weight"]


def test_matrices_do_not_decay_also_in_a_copy_and_after_a_move() -> None:
    for layer in (elastic(), copy.deepcopy(elastic()), elastic().float().to(memory_format=torch.channels_last)):
        decaying, still = parameter_groups(layer, 0.1)
        assert decaying["weight_decay"] == 0.1 and still["weight_decay"] == 0.0
        assert decaying["params"] == [layer.weight]
        assert {id(p) for p in still["params"]} == {id(p) for p in (layer.bias, *layer.transforms.values())}


def test_a_matrix_stays_the_identity_under_weight_decay() -> None:
    layer = ElasticConv2d(2, 2, Choice("k", (3, 5)))
    optimizer = torch.optim.SGD(parameter_groups(layer, 0.5), lr=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.transforms["3"], torch.eye(9)) and not torch.equal(layer.weight, before)


# ---- norms that follow choices

KERNEL, ACT = Choice("k", (3, 5)), Choice("a", ("relu", "leaky", "mish"))


def keys(module: nn.Module) -> tuple[str, ...]:
    """The choices that a norm follows, the outer one first."""
    return (module.choice.name, *keys(module.norms[0])) if isinstance(module, SwitchableNorm) else ()


@pytest.mark.parametrize(("policy", "expected"), [("shared", ()), ("act", ("a",)), ("k_act", ("k", "a"))])
def test_a_norm_follows_what_the_policy_says(policy: str, expected: tuple[str, ...]) -> None:
    with keyed_norms(policy):
        both = norm(4, feeds=ACT, after=KERNEL)
        assert keys(both) == expected
        assert keys(norm(4, feeds=ACT)) == tuple(key for key in expected if key == "a")
        assert keys(norm(4, after=KERNEL)) == tuple(key for key in expected if key == "k")
        assert type(norm(4, feeds="mish", after=5)) is nn.BatchNorm2d
    count = 2 if "k" in expected else 1
    assert len([n for n in both.modules() if isinstance(n, nn.BatchNorm2d)]) == count * (3 if "a" in expected else 1)
    assert keys(norm(4, feeds=ACT, after=KERNEL)) == ("a",)  # outside it is as it was


def test_a_norm_of_kernel_and_activation_uses_the_one_of_both() -> None:
    with keyed_norms("k_act"):
        both = norm(3, feeds=ACT, after=KERNEL).eval()
    for i, outer in enumerate(both.norms):
        for j, inner in enumerate(outer.norms):
            nn.init.constant_(inner.bias, 10 * i + j)
    x = torch.zeros(1, 3, 2, 2)
    for i, kernel in enumerate(KERNEL.options):
        for j, act in enumerate(ACT.options):
            for _, leaf in elastic_leaves(both):
                leaf.active = kernel if leaf.choice.name == "k" else act
            assert (both(x) == 10 * i + j).all()
            state = plain_state(both, "bn.")
            assert set(state) == {f"bn.{name}" for name in nn.BatchNorm2d(3).state_dict()}
            assert (state["bn.bias"] == 10 * i + j).all()
            assert (both.option(5, x) == 10 + j).all()  # an option of the kernel, under the activation in use


ROW = """
nc: 2
anchors: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 2, BottleneckCSP2, [8, {kernel: {choice: [3, 5]}, act: {choice: [relu, mish]}}]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""


@pytest.mark.parametrize("policy", NORMS)
def test_the_policy_of_a_network_reaches_all_its_norms(policy: str) -> None:
    found = {name: keys(module) for name, module in build(parse_text(ROW), "shared", policy).layers[1].named_modules()}
    act = () if policy == "shared" else ("1.act",)
    assert found["cv1.bn"] == found["bn"] == found["m.0.cv1.bn"] == act
    assert found["m.0.cv2.bn"] == (("1.kernel", "1.act") if policy == "k_act" else act)
    independent = build(parse_text(ROW), "independent", policy)
    assert not any(isinstance(module, SwitchableNorm) for module in independent.modules())


def test_a_policy_costs_as_many_parameters_as_it_has_norms() -> None:
    """2 numbers a channel: six norms of 8 channels, two of them behind an elastic kernel, and one of 16."""
    counts = {p: sum(t.numel() for t in build(parse_text(ROW), "shared", p).parameters()) for p in NORMS}
    one = 2 * (6 * 8 + 16)
    assert counts["act"] - counts["shared"] == one
    assert counts["k_act"] - counts["act"] == 2 * 2 * (2 * 8)


# ---- values of their own


def test_a_repeated_block_is_told_its_place() -> None:
    own = PerBottleneck((3, 5, 7))
    row = repeat(3, lambda index: conv(2, 2, each(own, index)))
    assert [layer.kernel_size for layer in row] == [(3, 3), (5, 5), (7, 7)]
    longest = repeat(Choice("n", (1, 3)), lambda index: conv(2, 2, each(own, index)))
    assert [layer.kernel_size for layer in longest.blocks()] == [(3, 3), (5, 5), (7, 7)]
    assert each(5, 2) == 5 and each(KERNEL, 2) is KERNEL
