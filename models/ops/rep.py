"""Blocks that train as several branches and run as one convolution (RepVGG, Ding et al., arXiv 2101.03697).

A sum of convolutions is a convolution by the sum of their kernels, the smaller ones padded with zeros; in eval mode a
batch norm is a factor and an addend a channel. `models.fuse` folds what has a method `fold`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.conv import Conv
from models.ops.csp import csp_shape
from models.ops.primitives import (
    DEFAULT,
    Act,
    Acts,
    Count,
    Fraction,
    Kernel,
    Kernels,
    PlainKernel,
    Step,
    Width,
    activation,
    each,
    norm,
    repeat,
)
from models.registry import Shape, one_to_one, register_op


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError("should be an odd number")
    return size


Beside = Annotated[PlainKernel, AfterValidator(_odd)]


def rep_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if args["beside"] > args["kernel"]:
        raise ValueError(f"the kernel beside, {args['beside']}, is larger than the kernel {args['kernel']}")
    one_to_one(inputs, {"kernel": args["kernel"]})  # an even one has no middle for those beside it
    return one_to_one(inputs, args)


@register_op(infer=rep_shape)
class RepConv(nn.Module):
    """Two convolutions, `kernel` and `beside`, and the map itself where shapes allow: each with a norm, then added up.

    With ``identity=False`` the map itself is left out, as YOLOv9 does (arXiv 2402.13616).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernel = 3,
        stride: Step = 1,
        groups: Width = 1,
        *,
        beside: Beside = 1,
        identity: bool = True,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        self.conv1 = Conv(c_in, c_out, kernel, stride, groups=groups, act="identity")
        self.conv2 = Conv(c_in, c_out, beside, stride, groups=groups, act="identity")
        self.conv1.bn, self.conv2.bn = norm(c_out, feeds=act, after=kernel), norm(c_out, feeds=act)
        self.bn = norm(c_in, feeds=act) if identity and c_in == c_out and stride == 1 else None
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x) + self.conv2(x)
        return self.act(y if self.bn is None else y + self.bn(x))

    def fold(self) -> nn.Module:
        """One convolution and the activation: the same outputs. The norms behind its convolutions are folded before."""
        large, small = self.conv1.conv, self.conv2.conv
        assert isinstance(large, nn.Conv2d) and isinstance(small, nn.Conv2d)
        assert large.bias is not None and small.bias is not None, "fold the norms first"
        size, stride = large.kernel_size[0], large.stride[0]
        new = nn.Conv2d(large.in_channels, large.out_channels, size, stride, size // 2, groups=large.groups).to(
            device=large.weight.device, dtype=large.weight.dtype
        )
        assert new.bias is not None
        margin = (size - small.kernel_size[0]) // 2
        with torch.no_grad():
            weight = large.weight + F.pad(small.weight, (margin,) * 4)
            bias = large.bias + small.bias
            if isinstance(self.bn, nn.BatchNorm2d):
                assert self.bn.running_mean is not None and self.bn.running_var is not None
                scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
                channel = torch.arange(len(scale), device=scale.device)
                middle = torch.zeros_like(weight)
                middle[channel, channel % weight.shape[1], size // 2, size // 2] = scale
                weight, bias = weight + middle, bias + self.bn.bias - self.bn.running_mean * scale
            new.weight.copy_(weight)
            new.bias.copy_(bias)
        return nn.Sequential(new, self.act)


@register_op(infer=csp_shape)
class RepC3(nn.Module):
    """`number` `RepConv` blocks, added to a 1x1 beside them, of RT-DETR's neck (Zhao et al., arXiv 2304.08069).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        expansion: Fraction = 1.0,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = Conv(c_in, hidden, 1, act=first)
        self.cv3 = Conv(hidden, c_out, 1, act=first) if hidden != c_out else nn.Identity()
        self.m = repeat(
            number, lambda index: RepConv(hidden, hidden, each(kernel, index), identity=False, act=each(act, index))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))


def halved(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    """Of a block whose stride is always 2, and whose other maps have the size that an odd kernel gives."""
    one_to_one(inputs, {"kernel": args.get("kernel", 3)})
    return one_to_one(inputs, {**args, "kernel": args.get("kernel", 3), "stride": 2})


def half_of(shape: Shape) -> Shape:
    """The first half of a map's channels. Raises ValueError where that is no whole number."""
    if shape.channels % 2:
        raise ValueError(f"half of {shape.channels} channels is no whole number")
    return replace(shape, channels=shape.channels // 2)
