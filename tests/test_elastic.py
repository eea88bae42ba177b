"""Convolutions as the primitives make them, against torch's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.elastic import ElasticConv2d, PointwiseConv2d
from models.ops.primitives import conv
from models.spec import Choice

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
