"""Blocks of YOLOR (Wang et al., arXiv 2105.04206) and YOLOv7 (Wang et al., arXiv 2207.02696).

Cross-stage-partial blocks (CSPNet, arXiv 1911.11929) of three layouts: half of the channels past the bottlenecks and
one norm over both halves (`BottleneckCSPF`), one 1x1 before both branches (`BottleneckCSPB`), and a 1x1 behind the
bottlenecks (`BottleneckCSPC`). What YOLOv7 calls BottleneckCSPA is `C3`, its ResCSP and ResXCSP are these with
residual blocks of ResNet (arXiv 1512.03385) and ResNeXt (arXiv 1611.05431).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.conv import Conv
from models.ops.csp import bottleneck, csp_shape, hidden_channels, start_as_nothing
from models.ops.primitives import (
    DEFAULT,
    Act,
    Acts,
    Count,
    Fraction,
    Kernel,
    Kernels,
    Width,
    activation,
    conv,
    each,
    norm,
    repeat,
)
from models.ops.rep import half_of, halved
from models.ops.spp import Pools, sppcsp_shape
from models.registry import Shape, one_to_one, register_op

Blocks = Literal["bottleneck", "residual"]


class Residual(nn.Module):
    """1x1, `kernel` x `kernel`, 1x1, added to the input. Shape: ``[N, channels, H, W]``, unchanged."""

    def __init__(self, channels: int, shortcut: bool, groups: int, squeeze: float, kernel: Kernel, act: Act) -> None:
        super().__init__()
        hidden = int(channels * squeeze)
        self.cv1 = Conv(channels, hidden, 1, act=act)
        self.cv2 = Conv(hidden, hidden, kernel, groups=groups, act=act)
        self.cv3 = Conv(hidden, channels, 1, act=act)
        self.add = shortcut
        if self.add:
            start_as_nothing(self.cv3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv3(self.cv2(self.cv1(x)))
        return x + y if self.add else y


def _blocks(
    kind: Blocks, channels: int, shortcut: bool, groups: int, squeeze: float, kernel: Kernels, act: Acts
) -> Callable[[int], nn.Module]:
    """Makes the block of an index."""
    if kind == "bottleneck":
        return bottleneck(channels, shortcut, groups, kernel, act)
    return lambda index: Residual(channels, shortcut, groups, squeeze, each(kernel, index), each(act, index))


def _check_squeeze(hidden: int, args: Mapping[str, Any]) -> None:
    if args["block"] != "residual":
        return
    inner = int(hidden * args["squeeze"])
    if inner < 1 or inner % args["groups"]:
        raise ValueError(f"groups {args['groups']} does not divide the {inner} inner channels of its residual blocks")


def cspb_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    _check_squeeze(args["c_out"], args)
    return csp_shape(inputs, args)


def cspc_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    _check_squeeze(hidden_channels(args, args["c_out"]), args)
    return csp_shape(inputs, args)


@register_op(infer=cspb_shape)
class BottleneckCSPB(nn.Module):
    """One 1x1 first, both branches from it, no halving; every convolution has its norm.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = False,
        groups: Width = 1,
        *,
        block: Blocks = "bottleneck",
        squeeze: Fraction = 0.5,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        self.cv1 = Conv(c_in, c_out, 1, act=first)
        self.cv2 = Conv(c_out, c_out, 1, act=first)
        self.cv3 = Conv(2 * c_out, c_out, 1, act=first)
        self.m = repeat(number, _blocks(block, c_out, shortcut, groups, squeeze, kernel, act))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv3(torch.cat((self.m(x), self.cv2(x)), dim=1))


@register_op(infer=cspc_shape)
class BottleneckCSPC(nn.Module):
    """`C3` with a 1x1 behind the bottlenecks. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Fraction = 0.5,
        *,
        block: Blocks = "bottleneck",
        squeeze: Fraction = 0.5,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = Conv(c_in, hidden, 1, act=first)
        self.cv3 = Conv(hidden, hidden, 1, act=first)
        self.cv4 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = repeat(number, _blocks(block, hidden, shortcut, groups, squeeze, kernel, act))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), dim=1))


@register_op(infer=csp_shape)
class BottleneckCSPF(nn.Module):
    """`BottleneckCSP` without the convolution behind its bottlenecks. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Fraction = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = conv(c_in, hidden, 1)
        self.cv4 = Conv(2 * hidden, c_out, 1, act=first)
        self.bn = norm(2 * hidden, feeds=first)
        self.act = activation(first)
        self.m = repeat(number, bottleneck(hidden, shortcut, groups, kernel, act))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv4(self.act(self.bn(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))))


@register_op(infer=sppcsp_shape)
class SPPCSPC(nn.Module):
    """`SPPCSP` where both branches have their norm. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        expansion: Fraction = 0.5,
        pools: Pools = (5, 9, 13),
        *,
        kernel: Kernel = 3,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        hidden = int(2 * c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=act)
        self.cv2 = Conv(c_in, hidden, 1, act=act)
        self.cv3 = Conv(hidden, hidden, kernel, act=act)
        self.cv4 = Conv(hidden, hidden, 1, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in pools)
        self.cv5 = Conv(hidden * (len(pools) + 1), hidden, 1, act=act)
        self.cv6 = Conv(hidden, hidden, kernel, act=act)
        self.cv7 = Conv(2 * hidden, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv4(self.cv3(self.cv1(x)))
        deep = self.cv6(self.cv5(torch.cat([deep, *(pool(deep) for pool in self.m)], dim=1)))
        return self.cv7(torch.cat((deep, self.cv2(x)), dim=1))


def downc_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    half_of(Shape(args["c_out"], 1))
    return halved(inputs, args)


@register_op(infer=downc_shape)
class DownC(nn.Module):
    """Half the size: one half of the channels by a convolution of stride 2, one by a pool and a 1x1.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // 2, W // 2]``
    """

    def __init__(self, c_in: int, c_out: Width, *, kernel: Kernel = 3, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_in, 1, act=act)
        self.cv2 = Conv(c_in, c_out // 2, kernel, 2, act=act)
        self.cv3 = Conv(c_in, c_out // 2, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.cv2(self.cv1(x)), self.cv3(F.max_pool2d(x, 2))), dim=1)


def stem_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    half_of(Shape(args["c_out"], 1))
    once = halved(inputs, args)
    return halved([once], args)


@register_op(infer=stem_shape)
class Stem(nn.Module):
    """A quarter of the size: a convolution of stride 2, then one more beside a pool (PeleeNet, arXiv 1804.06882).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // 4, W // 4]``
    """

    def __init__(self, c_in: int, c_out: Width, *, kernel: Kernel = 3, act: Act = DEFAULT) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, kernel, 2, act=act)
        self.cv2 = Conv(hidden, hidden, 1, act=act)
        self.cv3 = Conv(hidden, hidden, kernel, 2, act=act)
        self.cv4 = Conv(2 * hidden, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv4(torch.cat((self.cv3(self.cv2(x)), F.max_pool2d(x, 2)), dim=1))


def folded_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    source = one_to_one(inputs, {})
    return replace(source, channels=4 * source.channels, stride=2 * source.stride)


@register_op(infer=folded_shape)
class ReOrg(nn.Module):
    """Every 2 x 2 cells as channels: `Focus` without its convolution.

    Shape: ``[N, C, H, W] -> [N, 4 C, H / 2, W / 2]``
    """

    def forward(self, x: Tensor) -> Tensor:
        # this order of the quarters is that of published weights, as in `Focus`
        return torch.cat([x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=1)


@register_op(infer=folded_shape)
class DWT(nn.Module):
    """Every 2 x 2 cells as their mean and three differences: Haar's wavelet (the stem of yolor-ssss-dwt).

    The means lie in the range of what comes in; the differences are halved and moved by 0.5, so that they do as well.

    Shape: ``[N, C, H, W] -> [N, 4 C, H / 2, W / 2]``; after the means, each channel has its three differences together.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = (x[..., row::2, column::2] for row in (0, 1) for column in (0, 1))
        rows, columns, corners = a + b - c - d, a - b + c - d, a - b - c + d
        differences = torch.stack((rows, columns, corners), dim=2).flatten(1, 2) / 4 + 0.5
        return torch.cat(((a + b + c + d) / 4, differences), dim=1)
