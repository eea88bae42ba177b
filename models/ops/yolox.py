"""Depth-wise separable convolutions (MobileNets, arXiv 1704.04861) as YOLOX-Nano has them (arXiv 2107.08430).

Where the larger YOLOX have a `Conv` of 3x3, its Nano has two: one that looks at each channel by itself, and a 1x1 that
mixes them. Both have a norm and an activation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.elastic import Channels
from models.ops.conv import Conv
from models.ops.csp import csp_shape, start_as_nothing
from models.ops.primitives import (
    DEFAULT,
    Act,
    Acts,
    Count,
    Expansion,
    Kernel,
    Kernels,
    Step,
    Width,
    each,
    repeat,
    scaled,
)
from models.registry import register_op


@register_op()
class SeparableConv(nn.Module):
    """A depth-wise `kernel` x `kernel` `Conv`, then a 1x1 `Conv` over all channels.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int | Channels,
        c_out: Width | Channels,
        kernel: Kernel = 3,
        stride: Step = 1,
        *,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        self.depthwise = Conv(c_in, c_in, kernel, stride, groups=c_in, act=act)
        self.pointwise = Conv(c_in, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class SeparableBottleneck(nn.Module):
    """`models.ops.csp.Bottleneck` with a `SeparableConv` for its second convolution.

    Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, channels: int | Channels, shortcut: bool, kernel: Kernel, act: Act) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, 1, act=act)
        self.cv2 = SeparableConv(channels, channels, kernel, act=act)
        self.add = shortcut
        if self.add:
            start_as_nothing(self.cv2.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register_op(infer=csp_shape)
class C3Separable(nn.Module):
    """`C3` with separable bottlenecks. `kernel` is that of their depth-wise convolutions.

    Both `kernel` and `act` may differ from bottleneck to bottleneck; the rest of the block has the first one's `act`.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        expansion: Expansion = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = Conv(c_in, hidden, 1, act=first)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = repeat(
            number, lambda index: SeparableBottleneck(hidden, shortcut, each(kernel, index), each(act, index))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
