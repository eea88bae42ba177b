"""Ghost convolutions (GhostNet, arXiv 1911.11907): half of the maps are made cheaply from the other half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import hidden_channels
from models.ops.primitives import DEFAULT, Act, Acts, Count, Fraction, Kernel, Kernels, Step, Width, each, repeat
from models.registry import Shape, one_to_one, register_op

CHEAP = 5  # kernel of the depth-wise convolution in yolov5; the paper has 3


def ghost_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if args["c_out"] % 2:
        raise ValueError(f"half of {args['c_out']} channels is no whole number")
    primary = one_to_one(inputs, {**args, "c_out": args["c_out"] // 2})
    one_to_one([primary], {"kernel": args["cheap"]})
    return replace(primary, channels=args["c_out"])


@register_op(infer=ghost_shape)
class GhostConv(nn.Module):
    """A `Conv` to half the channels, and beside its maps what a depth-wise `cheap` x `cheap` makes of each.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernel = 1,
        stride: Step = 1,
        groups: Width = 1,
        *,
        cheap: Kernel = CHEAP,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        hidden = c_out // 2
        self.cv1 = Conv(c_in, hidden, kernel, stride, groups=groups, act=act)
        self.cv2 = Conv(hidden, hidden, cheap, groups=hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return torch.cat((x, self.cv2(x)), dim=1)


class GhostBottleneck(nn.Module):
    """Two 1x1 ghost convolutions, the second without activation, added to the input (the paper's, at stride 1).

    Shape: ``[N, channels, H, W]``, unchanged; `channels` is a multiple of 4.
    """

    def __init__(self, channels: int, cheap: Kernel, act: Act) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            GhostConv(channels, channels // 2, cheap=cheap, act=act),
            nn.Identity(),  # where the paper has a depth-wise convolution at stride 2
            GhostConv(channels // 2, channels, cheap=cheap, act="identity"),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def c3ghost_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    hidden = hidden_channels(args, args["c_out"])
    if hidden % 4:
        raise ValueError(f"its ghost bottlenecks have {hidden} channels, which is no multiple of 4")
    return one_to_one(inputs, args)


@register_op(infer=c3ghost_shape)
class C3Ghost(nn.Module):
    """`C3` with ghost bottlenecks. Each adds its input; `kernel` is that of their depth-wise convolutions.

    Both `kernel` and `act` may differ from bottleneck to bottleneck; the rest of the block has the first one's `act`.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        expansion: Fraction = 0.5,
        *,
        kernel: Kernels = CHEAP,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = Conv(c_in, hidden, 1, act=first)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = repeat(number, lambda index: GhostBottleneck(hidden, each(kernel, index), each(act, index)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
