"""Spatial pyramid pooling (arXiv 1406.4729) as YOLO uses it: max pools of several sizes at stride 1, concatenated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import hidden_channels
from models.ops.primitives import DEFAULT, Act, Fraction, Kernel, PlainAct, PlainKernel, Width, activation, conv, norm
from models.registry import Shape, one_to_one, register_op


def _odd(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if not sizes or any(size % 2 == 0 for size in sizes):
        raise ValueError("should be a list of odd numbers")
    return sizes


def _odd_one(size: int) -> int:
    if size % 2 == 0:
        raise ValueError("should be an odd number")
    return size


Pools = Annotated[tuple[PlainKernel, ...], AfterValidator(_odd)]
Pool = Annotated[PlainKernel, AfterValidator(_odd_one)]


def spp_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if inputs[0].channels < 2:
        raise ValueError("half of the source's one channel is none")
    return one_to_one(inputs, args)


@register_op(infer=spp_shape)
class SPP(nn.Module):
    """1x1 to half the channels, max pools of `pools` beside it, 1x1 over all.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(self, c_in: int, c_out: Width, pools: Pools = (5, 9, 13), *, act: Act = DEFAULT) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, 1, act=act)
        self.cv2 = Conv(hidden * (len(pools) + 1), c_out, 1, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in pools)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], dim=1))


@register_op(infer=spp_shape)
class SPPF(nn.Module):
    """`SPP` by pooling what was pooled: three pools of 5 in a row see 5, 9 and 13 cells, with fewer comparisons.

    The faster form is yolov5's, since v6.0. YOLO26 has no activation before the pools (``first_act: identity``; left
    out, it is `act`) and with `shortcut` adds the input where channels agree.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        pool: Pool = 5,
        *,
        shortcut: bool = False,
        first_act: PlainAct | None = None,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        hidden = c_in // 2
        self.cv1 = Conv(c_in, hidden, 1, act=act if first_act is None else first_act)
        self.cv2 = Conv(4 * hidden, c_out, 1, act=act)
        self.m = nn.MaxPool2d(pool, stride=1, padding=pool // 2)
        self.add = shortcut and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        first = self.cv1(x)
        once = self.m(first)
        twice = self.m(once)
        y = self.cv2(torch.cat((first, once, twice, self.m(twice)), dim=1))
        return x + y if self.add else y


def sppcsp_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    hidden_channels(args, 2 * args["c_out"])
    return one_to_one(inputs, args)


@register_op(infer=sppcsp_shape)
class SPPCSP(nn.Module):
    """Spatial pyramid pooling inside a cross-stage-partial block (ScaledYOLOv4, arXiv 2011.08036).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

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
        self.cv2 = conv(c_in, hidden, 1)
        self.cv3 = Conv(hidden, hidden, kernel, act=act)
        self.cv4 = Conv(hidden, hidden, 1, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in pools)
        self.cv5 = Conv(hidden * (len(pools) + 1), hidden, 1, act=act)
        self.cv6 = Conv(hidden, hidden, kernel, act=act)
        self.bn = norm(2 * hidden, feeds=act)
        self.act = activation(act)
        self.cv7 = Conv(2 * hidden, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv4(self.cv3(self.cv1(x)))
        deep = self.cv6(self.cv5(torch.cat([deep, *(pool(deep) for pool in self.m)], dim=1)))
        return self.cv7(self.act(self.bn(torch.cat((deep, self.cv2(x)), dim=1))))
