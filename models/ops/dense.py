"""Blocks in a row that keep what each of them gave, side by side: for a plain number of blocks, and for a `Choice`.

Of a choice every number is a prefix of the largest, as in `models.ops.primitives.repeat`. What reads the maps side by
side has an input for each of them, so it holds weights for the largest number, and its maps are zero where blocks are
left out: the same output as without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic import SlicedConv2d, with_weights
from models.ops.conv import Conv
from models.ops.primitives import Act, Count, Inner
from models.spec import Choice


def side_by_side(blocks: Iterable[nn.Module], x: Tensor, parts: int = 2) -> Tensor:
    """`x`, then what each block gives; the first reads the last of the `parts` of `x`, the others what the one before
    gave.
    """
    maps, y = [x], x.chunk(parts, dim=1)[-1]
    for block in blocks:
        y = block(y)
        maps.append(y)
    return torch.cat(maps, dim=1)


class Dense(nn.Sequential):
    """`number` blocks with C channels. Shape: ``[N, parts * C, H, W] -> [N, (parts + number) * C, H, W]``"""

    def __init__(self, *blocks: nn.Module, parts: int = 2) -> None:
        super().__init__(*blocks)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return side_by_side(self, x, self.parts)


class ElasticDense(nn.Module):
    """`Dense` of the first `active` blocks, with zeros for the others.

    Shape: ``[N, parts * C, H, W] -> [N, (parts + largest number) * C, H, W]``
    """

    def __init__(self, number: Choice, make: Callable[[int], nn.Module], parts: int = 2) -> None:
        super().__init__()
        self.choice, self.parts = number, parts
        self.active = max(number.options)
        for index in range(self.active):
            self.add_module(str(index), make(index))  # the keys that Dense has

    def option(self, value: int, x: Tensor) -> Tensor:
        blocks = list(self.children())
        missing = (len(blocks) - value) * (x.shape[1] // self.parts)
        return F.pad(side_by_side(blocks[:value], x, self.parts), (0, 0, 0, 0, 0, missing))

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        """Every block runs once; what it gives counts for the options that have it."""
        blocks, width = list(self.children()), x.shape[1] // self.parts
        has = torch.tensor([[number > index for number in self.choice.options] for index in range(len(blocks))])
        shares = (has.to(gates) * gates).sum(dim=1)
        scale = torch.cat((gates.sum().expand(x.shape[1]), shares.repeat_interleave(width)))
        return side_by_side(blocks, x, self.parts) * scale[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        return Dense(*list(self.children())[: self.active], parts=self.parts)


class DenseReader(SlicedConv2d):
    """The 1x1 convolution behind an `ElasticDense` of C channels: its plain form has no weights for what is zero.

    Shape: ``[N, (parts + largest number) * C, H, W] -> [N, c_out, H, W]``
    """

    def __init__(self, channels: Inner, c_out: int, number: Choice, parts: int = 2) -> None:
        super().__init__((parts + max(number.options)) * channels, c_out, 1, bias=False)
        self.choice, self.parts = number, parts
        self.active = max(number.options)

    def option(self, value: Any, x: Tensor) -> Tensor:
        """The same for every option: what `x` holds makes the difference."""
        return super().forward(x)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        return super().forward(x) * gates.sum()

    def plain(self) -> nn.Module:
        weight, _ = self.in_use()
        channels = weight.shape[1] // (self.parts + max(self.choice.options))
        return with_weights(weight[:, : (self.parts + self.active) * channels], None, 1, 1, 1)


def dense(number: Count, make: Callable[[int], nn.Module], parts: int = 2) -> nn.Module:
    """`number` blocks, ``make(index)`` each, side by side with the `parts` before them; the first reads the last."""
    if isinstance(number, Choice):
        return ElasticDense(number, make, parts)
    return Dense(*(make(index) for index in range(number)), parts=parts)


def gather(channels: Inner, c_out: int, number: Count, act: Act, parts: int = 2) -> Conv:
    """The 1x1 `Conv` over all that `dense` gives."""
    most = max(number.options) if isinstance(number, Choice) else number
    new = Conv((parts + most) * channels, c_out, 1, act=act)
    if isinstance(number, Choice):
        new.conv = DenseReader(channels, c_out, number, parts)
    return new
