"""The block of YOLO11 (Ultralytics, 2024): the layout of `C2f` (docs of `models.ops.csp`) with other blocks inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.elastic import Channels
from models.ops.conv import Conv
from models.ops.csp import Bottleneck, bottleneck, csp_shape, hidden_channels
from models.ops.dense import dense, gather
from models.ops.primitives import (
    ALONE,
    DEFAULT,
    Act,
    Acts,
    Count,
    Expansion,
    Inner,
    Kernel,
    Kernels,
    Width,
    each,
    repeat,
    scaled,
)
from models.ops.psa import PSABlock, check_heads
from models.registry import Shape, register_op

DEPTH = 2  # bottlenecks of a C3k


class C3k(nn.Module):
    """`C3` with two bottlenecks, both of whose kernels are `kernel`. Shape: ``[N, channels, H, W]``, unchanged."""

    def __init__(self, channels: Inner, shortcut: bool, groups: int, kernel: Kernel, act: Act) -> None:
        super().__init__()
        hidden = scaled(channels, 0.5)
        self.cv1 = Conv(channels, hidden, 1, act=act)
        self.cv2 = Conv(channels, hidden, 1, act=act)
        self.cv3 = Conv(2 * hidden, channels, 1, act=act)
        self.m = repeat(DEPTH, bottleneck(hidden, shortcut, groups, kernel, act, wide=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


def halves_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    """Of blocks whose bottlenecks have half of the inner channels."""
    hidden = hidden_channels(args, args["c_out"])
    if hidden < 2:
        raise ValueError(f"expansion {args['expansion']} of {args['c_out']} leaves no half of a channel")
    csp_shape(inputs, {**args, "expansion": args["expansion"] / 2})
    return csp_shape(inputs, args)


def c3k2_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if args["attention"]:
        check_heads(hidden_channels(args, args["c_out"]))
    return halves_shape(inputs, args)


@register_op(infer=c3k2_shape)
class C3k2(nn.Module):
    """`C2f` whose blocks are bottlenecks, or small `C3` with ``c3k``, or a bottleneck and attention (YOLO26).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        c3k: bool = False,
        expansion: Expansion = 0.5,
        attention: bool = False,
        groups: Width = 1,
        shortcut: bool = True,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        if attention and isinstance(hidden, Channels):
            raise ValueError(f"expansion is a choice {hidden.choice}, so attention must be False{ALONE}")

        def block(index: int) -> nn.Module:
            size, a = each(kernel, index), each(act, index)
            if c3k and not attention:
                return C3k(hidden, shortcut, groups, size, a)
            narrow = Bottleneck(hidden, hidden, shortcut, groups, wide=True, kernel=size, act=a)
            if not attention:
                return narrow
            assert isinstance(hidden, int)
            return nn.Sequential(narrow, PSABlock(hidden, 3, a))

        self.cv1 = Conv(c_in, 2 * hidden, 1, act=first)
        self.cv2 = gather(hidden, c_out, number, first)
        self.m = dense(number, block)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.m(self.cv1(x)))
