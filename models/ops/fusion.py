"""Fusion of two neighbouring levels of a pyramid through a CA-block: equations 1 and 2 of docs/lightweight.md.

Which convolution joins the levels, and what the paper's circled plus stands for, is lost: a 1x1 convolution that brings
both to one width is only needed behind a concatenation, so that is the default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.attention import (
    Attention,
    AttentionBottleneck,
    Dilations,
    Expand,
    GateKernel,
    Gates,
    Reduction,
    Squeeze,
)
from models.ops.conv import Conv
from models.ops.merge import no_margin
from models.ops.primitives import DEFAULT, Act, Kernel, Width
from models.registry import Shape, one_to_one, register_op

Mode = Literal["cat", "add"]


def two_levels(inputs: Sequence[Shape], names: str) -> tuple[Shape, Shape]:
    """Both sources. Raises ValueError where they are not two, or have a margin."""
    if len(inputs) != 2:
        raise ValueError(f"takes two sources, {names}; got {len(inputs)}")
    no_margin(inputs)
    return inputs[0], inputs[1]


def added(one: int, other: int) -> None:
    """Raises ValueError where maps of so many channels cannot be added."""
    if one != other:
        raise ValueError(f"mode add takes maps of one width, not of {one} and {other} channels; cat does")


def joined(maps: Sequence[Tensor], mode: Mode) -> Tensor:
    """The circled plus of both equations."""
    return torch.cat(list(maps), dim=1) if mode == "cat" else maps[0] + maps[1]


def up_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    high, low = two_levels(inputs, "[high, low]: the coarse level first")
    if high.stride <= low.stride:
        raise ValueError(
            f"reads [high, low], the coarse level first, but the strides are {high.stride} and {low.stride}"
        )
    if args["mode"] == "add":
        added(high.channels, low.channels)
    return one_to_one([replace(low, channels=args["c_out"])], args)


def down_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    fine, coarse = two_levels(inputs, "[fine, coarse]: the fine level first")
    if coarse.stride != 2 * fine.stride:
        raise ValueError(
            f"reads [fine, coarse], the second at twice the first one's stride, but the strides are {fine.stride} and "
            f"{coarse.stride}"
        )
    if args["mode"] == "add":
        added(args["c_out"], coarse.channels)
    return one_to_one([fine], {**args, "stride": 2})


@register_op(infer=up_shape, many=True)
class UpFusion(nn.Module):
    """What the coarse level knows, for the fine one: ``CA(conv(low (+) enlarged(high)))``, equation 1.

    `mode` says what (+) is, `fuse_kernel` is that of the convolution; the other arguments are those of `CABlock`.

    Shape: ``[[N, C_high, h, w], [N, C_low, H, W]] -> [N, c_out, H, W]``, whatever h and w are.
    """

    def __init__(
        self,
        inputs: Sequence[Shape],
        c_out: Width,
        expand: Expand = 4,
        mode: Mode = "cat",
        up: Literal["bilinear", "nearest"] = "bilinear",
        *,
        kernel: Kernel = 3,
        dilations: Dilations = (1, 2, 3),
        fuse_kernel: GateKernel = 1,
        attention: Attention = "full",
        reduction: Reduction = 4,
        squeeze: Squeeze = "both",
        spatial_kernel: GateKernel = 1,
        residual: bool = True,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        high, low = inputs
        self.mode, self.up = mode, up
        self.fuse = Conv(low.channels + (high.channels if mode == "cat" else 0), c_out, fuse_kernel, act=act)
        gates = Gates(attention, reduction, squeeze, spatial_kernel)
        self.ca = AttentionBottleneck(c_out, c_out, kernel, 1, expand, dilations, gates, residual=residual, act=act)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        high, low = maps
        high = F.interpolate(high, size=low.shape[-2:], mode=self.up)  # to a size, not by a factor: sizes may be odd
        return self.ca(self.fuse(joined((low, high), self.mode)))


@register_op(infer=down_shape, many=True)
class DownFusion(nn.Module):
    """What the fine level knows, for the coarse one: ``conv(CA(fine) (+) coarse)``, equation 2.

    The CA-block's depth-wise convolution has stride 2. `mode` says what (+) is, `fuse_kernel` is that of the last
    convolution; the other arguments are those of `CABlock`.

    Shape: ``[[N, C_fine, H, W], [N, C_coarse, h, w]] -> [N, c_out, h, w]`` with h = ceil(H / 2), w = ceil(W / 2)
    """

    def __init__(
        self,
        inputs: Sequence[Shape],
        c_out: Width,
        expand: Expand = 4,
        mode: Mode = "cat",
        *,
        kernel: Kernel = 3,
        dilations: Dilations = (1, 2, 3),
        fuse_kernel: GateKernel = 1,
        attention: Attention = "full",
        reduction: Reduction = 4,
        squeeze: Squeeze = "both",
        spatial_kernel: GateKernel = 1,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        fine, coarse = inputs
        self.mode = mode
        gates = Gates(attention, reduction, squeeze, spatial_kernel)
        self.ca = AttentionBottleneck(
            fine.channels, c_out, kernel, 2, expand, dilations, gates, residual=False, act=act
        )
        self.fuse = Conv(coarse.channels + (c_out if mode == "cat" else 0), c_out, fuse_kernel, act=act)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine, coarse = maps
        return self.fuse(joined((self.ca(fine), coarse), self.mode))
