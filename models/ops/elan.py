"""Layer aggregation of YOLOv9 (GELAN; Wang et al., arXiv 2402.13616) after ELAN (arXiv 2211.04800).

Half of a 1x1's channels go through two stages one after the other; the other half, this half and what each stage gives
lie side by side before the last 1x1. `middle` are the channels of the first 1x1, `inner` those of a stage; neither is
scaled by width_multiple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.conv import Conv
from models.ops.csp import start_as_nothing
from models.ops.primitives import DEFAULT, Act, Count, Kernel, Width, repeat
from models.ops.rep import RepConv, half_of, halved
from models.ops.spp import Pool
from models.registry import Shape, one_to_one, register_op


def elan_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    for name in ("middle", "inner"):
        if name == "middle" or "repeats" in args:
            half_of(Shape(args[name], 1))
    return one_to_one(inputs, args)


class RepBottleneck(nn.Module):
    """A `RepConv` and a `Conv`, added to the input. Shape: ``[N, channels, H, W]``, unchanged."""

    def __init__(self, channels: int, kernel: Kernel, act: Act) -> None:
        super().__init__()
        self.cv1 = RepConv(channels, channels, kernel, identity=False, act=act)
        self.cv2 = Conv(channels, channels, kernel, act=act)
        start_as_nothing(self.cv2)  # as in `Bottleneck`

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class RepCSP(nn.Module):
    """`C3` with `number` bottlenecks whose first convolution folds. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(self, c_in: int, c_out: int, number: Count, kernel: Kernel, act: Act) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, 1, act=act)
        self.cv2 = Conv(c_in, hidden, 1, act=act)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=act)
        self.m = repeat(number, lambda _: RepBottleneck(hidden, kernel, act))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


def aggregate(x: Tensor, first: nn.Module, stages: Sequence[nn.Module], last: nn.Module) -> Tensor:
    """Both halves of what `first` gives, and what each stage makes of the one before it, side by side into `last`."""
    maps = list(first(x).chunk(2, dim=1))
    for stage in stages:
        maps.append(stage(maps[-1]))
    return last(torch.cat(maps, dim=1))


@register_op(infer=elan_shape)
class RepNCSPELAN4(nn.Module):
    """The block of YOLOv9: a stage is a `C3` of `repeats` bottlenecks that fold, and a convolution.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        middle: Width,
        inner: Width,
        repeats: Count = 1,
        *,
        kernel: Kernel = 3,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()

        def stage(channels: int) -> nn.Sequential:
            return nn.Sequential(RepCSP(channels, inner, repeats, kernel, act), Conv(inner, inner, kernel, act=act))

        self.cv1 = Conv(c_in, middle, 1, act=act)
        self.cv2 = stage(middle // 2)
        self.cv3 = stage(inner)
        self.cv4 = Conv(middle + 2 * inner, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, (self.cv2, self.cv3), self.cv4)


@register_op(infer=elan_shape)
class ELAN1(nn.Module):
    """The same with one convolution for each stage. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self, c_in: int, c_out: Width, middle: Width, inner: Width, *, kernel: Kernel = 3, act: Act = DEFAULT
    ) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, middle, 1, act=act)
        self.cv2 = Conv(middle // 2, inner, kernel, act=act)
        self.cv3 = Conv(inner, inner, kernel, act=act)
        self.cv4 = Conv(middle + 2 * inner, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return aggregate(x, self.cv1, (self.cv2, self.cv3), self.cv4)


@register_op()
class SPPELAN(nn.Module):
    """`SPPF` with `middle` channels inside: three pools in a row, all of them side by side.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(self, c_in: int, c_out: Width, middle: Width, pool: Pool = 5, *, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, middle, 1, act=act)
        self.cv5 = Conv(4 * middle, c_out, 1, act=act)
        self.pool = nn.MaxPool2d(pool, stride=1, padding=pool // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv5(torch.cat(maps, dim=1))


def blurred(x: Tensor) -> Tensor:
    """The mean of every 2 x 2 cells. Shape: ``[N, C, H, W] -> [N, C, H - 1, W - 1]``"""
    return F.avg_pool2d(x, 2, stride=1)


@register_op(infer=halved)
class AConv(nn.Module):
    """Half the size: blurred, then a convolution of stride 2.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // 2, W // 2]``
    """

    def __init__(self, c_in: int, c_out: Width, *, kernel: Kernel = 3, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in, c_out, kernel, 2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv1(blurred(x))


def adown_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    half_of(inputs[0])
    half_of(Shape(args["c_out"], 1))
    return halved(inputs, args)


@register_op(infer=adown_shape)
class ADown(nn.Module):
    """Half the size: blurred; half of the channels through a convolution of stride 2, half through a pool and a 1x1.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // 2, W // 2]``
    """

    def __init__(self, c_in: int, c_out: Width, *, kernel: Kernel = 3, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in // 2, c_out // 2, kernel, 2, act=act)
        self.cv2 = Conv(c_in // 2, c_out // 2, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        deep, pooled = blurred(x).chunk(2, dim=1)
        return torch.cat((self.cv1(deep), self.cv2(F.max_pool2d(pooled, 3, 2, 1))), dim=1)
