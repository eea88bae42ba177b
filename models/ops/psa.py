"""Partial self-attention of YOLOv10 (Wang et al., arXiv 2405.14458, section 3.3.2): half of the channels attend.

Attention between all cells of a map, with keys of half the values' size and a depth-wise convolution of the values for
where a cell lies; then two 1x1 convolutions. Both add their input. Its memory grows with the square of the map's cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import hidden_channels
from models.ops.primitives import DEFAULT, Act, Acts, Count, Fraction, Kernel, Kernels, Width, each, repeat
from models.registry import Shape, one_to_one, register_op

HEAD = 64  # channels of a head


def heads_of(channels: int) -> int:
    return max(channels // HEAD, 1)


def check_heads(channels: int) -> None:
    """Raises ValueError where a map of so many channels has no whole heads."""
    heads = heads_of(channels)
    if channels % heads or channels // heads < 2:
        raise ValueError(f"{heads} attention heads do not divide its {channels} inner channels in parts of 2 or more")


class Attention(nn.Module):
    """What every cell asks of all others. Shape: ``[N, channels, H, W]``, unchanged."""

    def __init__(self, channels: int, heads: int, kernel: Kernel = 3) -> None:
        super().__init__()
        self.heads, self.value = heads, channels // heads
        self.key = self.value // 2
        self.qkv = Conv(channels, channels + 2 * heads * self.key, 1, act="identity")
        self.proj = Conv(channels, channels, 1, act="identity")
        self.pe = Conv(channels, channels, kernel, groups=channels, act="identity")

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        parts = self.qkv(x).view(n, self.heads, 2 * self.key + self.value, height * width)
        q, k, v = parts.split((self.key, self.key, self.value), dim=2)
        weights = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(dim=-1)  # [N, heads, asking cells, asked cells]
        seen = (v @ weights.transpose(-2, -1)).reshape(x.shape)
        return self.proj(seen + self.pe(v.reshape(x.shape)))


class PSABlock(nn.Module):
    """Attention, then 1x1 to twice the channels and back; each adds its input. Shape: ``[N, channels, H, W]``."""

    def __init__(self, channels: int, kernel: Kernel, act: Act) -> None:
        super().__init__()
        self.attn = Attention(channels, heads_of(channels), kernel)
        self.ffn = nn.Sequential(
            Conv(channels, 2 * channels, 1, act=act), Conv(2 * channels, channels, 1, act="identity")
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.ffn(x)


def psa_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if args["c_out"] != inputs[0].channels:
        raise ValueError(f"it keeps its channels, so c_out is {inputs[0].channels}, not {args['c_out']}")
    check_heads(hidden_channels(args, args["c_out"]))
    return one_to_one(inputs, args)


@register_op(infer=psa_shape)
class PSA(nn.Module):
    """The block of YOLOv10. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``, c_out is c_in."""

    def __init__(
        self, c_in: int, c_out: Width, expansion: Fraction = 0.5, *, kernel: Kernel = 3, act: Act = DEFAULT
    ) -> None:
        super().__init__()
        hidden = int(c_in * expansion)
        block = PSABlock(hidden, kernel, act)
        self.cv1 = Conv(c_in, 2 * hidden, 1, act=act)
        self.cv2 = Conv(2 * hidden, c_out, 1, act=act)
        self.attn, self.ffn = block.attn, block.ffn  # the names that published weights have

    def forward(self, x: Tensor) -> Tensor:
        past, asking = self.cv1(x).chunk(2, dim=1)
        asking = asking + self.attn(asking)
        return self.cv2(torch.cat((past, asking + self.ffn(asking)), dim=1))


@register_op(infer=psa_shape)
class C2PSA(nn.Module):
    """`PSA` with `number` such blocks one after the other, of YOLO11. Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``"""

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        expansion: Fraction = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = int(c_in * expansion)
        self.cv1 = Conv(c_in, 2 * hidden, 1, act=first)
        self.cv2 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = repeat(number, lambda index: PSABlock(hidden, each(kernel, index), each(act, index)))

    def forward(self, x: Tensor) -> Tensor:
        past, asking = self.cv1(x).chunk(2, dim=1)
        return self.cv2(torch.cat((past, self.m(asking)), dim=1))
