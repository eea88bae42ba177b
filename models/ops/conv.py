"""Convolution blocks."""

from __future__ import annotations

from torch import Tensor, nn

from models.ops.primitives import DEFAULT, Act, Kernel, Pad, Step, Width, activation, conv, norm
from models.registry import register_op


@register_op()
class Conv(nn.Module):
    """Convolution, batch norm, activation: the block every YOLO is made of.

    ``padding=None`` keeps the map size at stride 1 (`kernel` must be odd for that).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernel = 1,
        stride: Step = 1,
        padding: Pad | None = None,
        groups: Width = 1,
        *,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        self.conv = conv(c_in, c_out, kernel, stride, padding=padding, groups=groups)
        self.bn = norm(c_out, feeds=act, after=kernel)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))
