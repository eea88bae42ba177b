"""Area attention of YOLOv12 (Tian et al., arXiv 2502.12524): a cell attends to the cells of its part of the map only.

The map is cut into `area` strips of rows, which costs `area` times less than attention between all cells. Blocks lie
side by side as in ELAN (the paper's R-ELAN); with `residual` what comes out is scaled by a small learned gamma and
added to what came in, so that large networks begin as nothing but their shortcuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.structures import Fault
from models.ops.c3k2 import C3k, halves_shape
from models.ops.conv import Conv
from models.ops.csp import hidden_channels
from models.ops.dense import dense, gather
from models.ops.primitives import DEFAULT, Act, Acts, Count, Fraction, Kernel, Kernels, Width, each
from models.registry import Shape, register_op

HEAD = 32  # channels of a head
PLACE = 7  # kernel of the depth-wise convolution that says where a cell lies
GAMMA = 0.01  # at the start


class AreaAttention(nn.Module):
    """Attention inside each of `area` strips. Shape: ``[N, channels, H, W]``, unchanged; `area` divides H * W."""

    def __init__(self, channels: int, area: int, kernel: Kernel) -> None:
        super().__init__()
        self.heads, self.area = channels // HEAD, area
        self.qkv = Conv(channels, 3 * channels, 1, act="identity")
        self.proj = Conv(channels, channels, 1, act="identity")
        self.pe = Conv(channels, channels, kernel, groups=channels, act="identity")

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        if height * width % self.area:
            raise Fault(f"area {self.area} does not divide a map of {height} x {width} cells; use another image size")
        cells = height * width // self.area
        # heads hold their q, k and v behind each other, as published weights do
        parts = self.qkv(x).view(n, self.heads, 3 * HEAD, self.area, cells).permute(0, 3, 1, 2, 4)
        q, k, v = parts.split(HEAD, dim=3)  # [N, area, heads, HEAD, cells]
        weights = (q.transpose(-2, -1) @ k * HEAD**-0.5).softmax(dim=-1)
        seen = v @ weights.transpose(-2, -1)

        def whole(y: Tensor) -> Tensor:
            return y.permute(0, 2, 3, 1, 4).reshape(n, channels, height, width)

        return self.proj(whole(seen) + self.pe(whole(v)))


class AreaBlock(nn.Module):
    """Area attention, then two 1x1; each adds its input. Shape: ``[N, channels, H, W]``, unchanged."""

    def __init__(self, channels: int, area: int, mlp_ratio: float, kernel: Kernel, act: Act) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.attn = AreaAttention(channels, area, kernel)
        self.mlp = nn.Sequential(Conv(channels, hidden, 1, act=act), Conv(hidden, channels, 1, act="identity"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


def a2c2f_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    size = args["kernel"] if args["kernel"] is not None else 3
    shape = halves_shape(inputs, {**args, "kernel": size})
    if not args["attention"]:
        return shape
    hidden = hidden_channels(args, args["c_out"])
    if hidden % HEAD:
        raise ValueError(f"attention heads have {HEAD} channels, which do not divide its {hidden} inner channels")
    if args["area"] < 1:
        raise ValueError(f"area is in how many strips a map is cut, 1 or more; got {args['area']}")
    if int(hidden * args["mlp_ratio"]) < 1:
        raise ValueError(f"mlp_ratio {args['mlp_ratio']} of {hidden} leaves no channel")
    if args["residual"] and args["c_out"] != inputs[0].channels:
        raise ValueError(f"residual keeps the channels, so c_out is {inputs[0].channels}, not {args['c_out']}")
    return shape


@register_op(infer=a2c2f_shape)
class A2C2f(nn.Module):
    """Pairs of area attention blocks, or small `C3` without ``attention``, side by side before the last 1x1.

    `kernel` is that of the attention's depth-wise convolution, 7 where left out, or that of the C3's bottlenecks, 3;
    `area`, `residual` and `mlp_ratio` mean nothing without attention, `groups` and `shortcut` nothing with it.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        attention: bool = True,
        area: int = 1,
        residual: bool = False,
        mlp_ratio: Fraction = 2.0,
        expansion: Fraction = 0.5,
        groups: Width = 1,
        shortcut: bool = True,
        *,
        kernel: Kernels | None = None,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_out * expansion)
        size = kernel if kernel is not None else PLACE if attention else 3

        def block(index: int) -> nn.Module:
            k, a = each(size, index), each(act, index)
            if not attention:
                return C3k(hidden, shortcut, groups, k, a)
            return nn.Sequential(*(AreaBlock(hidden, area, mlp_ratio, k, a) for _ in range(2)))

        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = gather(hidden, c_out, number, first, parts=1)
        self.gamma = nn.Parameter(GAMMA * torch.ones(c_out)) if attention and residual else None
        self.m = dense(number, block, parts=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.m(self.cv1(x)))
        return y if self.gamma is None else x + self.gamma[:, None, None] * y
