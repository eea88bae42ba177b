"""Transformer layers over the cells of a map (ViT, arXiv 2010.11929), without the paper's layer norms as in yolov5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import hidden_channels
from models.ops.primitives import DEFAULT, Act, Count, Fraction, Width, repeat
from models.registry import Shape, one_to_one, register_op

HEADS = 4


class TransformerLayer(nn.Module):
    """Multi-head attention, then two linear layers; each adds its input. Shape: ``[cells, N, channels]``, unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # projections before those that MultiheadAttention has itself: published weights hold both
        self.q = nn.Linear(channels, channels, bias=False)
        self.k = nn.Linear(channels, channels, bias=False)
        self.v = nn.Linear(channels, channels, bias=False)
        self.ma = nn.MultiheadAttention(channels, HEADS)
        self.fc1 = nn.Linear(channels, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0]
        return x + self.fc2(self.fc1(x))


class TransformerBlock(nn.Module):
    """`number` layers over the cells of a map. Shape: ``[N, channels, H, W]``, unchanged.

    Where a cell lies is told by nothing but its content: a linear layer of it is added to it.
    """

    def __init__(self, channels: int, number: Count) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = repeat(number, lambda _: TransformerLayer(channels))

    def forward(self, x: Tensor) -> Tensor:
        cells = x.flatten(2).permute(2, 0, 1)  # [H * W, N, channels]
        cells = self.tr(cells + self.linear(cells))
        return cells.permute(1, 2, 0).reshape(x.shape)


def c3tr_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    hidden = hidden_channels(args, args["c_out"])
    if hidden % HEADS:
        raise ValueError(f"{HEADS} attention heads do not divide its {hidden} inner channels")
    return one_to_one(inputs, args)


@register_op(infer=c3tr_shape)
class C3TR(nn.Module):
    """`C3` with `number` transformer layers for its bottlenecks. Its memory grows with the square of the map's cells.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self, c_in: int, c_out: Width, number: Count = 1, expansion: Fraction = 0.5, *, act: Act = DEFAULT
    ) -> None:
        super().__init__()
        hidden = int(c_out * expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=act)
        self.cv2 = Conv(c_in, hidden, 1, act=act)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=act)
        self.m = TransformerBlock(hidden, number)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
