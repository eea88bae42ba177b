"""Cells of a masked map as rows of a matrix: only those that are computed, packed without gaps.

Shape letters: N images, h w patches down and across (the cells of the mask), d the side of a patch, H = d h and W = d w
cells of the map, C channels, K = kernel * kernel taps. R rows: first the first (upper left) cell of every patch, image
by image, which are the map of the network with stride d; then, for the second cell of a patch, the third and so on,
those of the A patches at full resolution. R = N h w + A (d d - 1).

A 1x1 convolution is one product over all rows. A dilation that is a multiple of d stays among cells of one place in
their patches, where a patch at low resolution has its first cell everywhere: the first cells are an ordinary dense
convolution, the other rows one product over gathered taps. The order inside a tap is that of a channels_last weight,
which is then used as it lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GATHERED = 4 << 20  # numbers gathered for one product: more of them leave the processor's cache


@dataclass(frozen=True)
class Packing:
    """Where the cells of a map lie: made once for a mask, and good for every map under it."""

    d: int
    size: tuple[int, int, int]  # N, h, w
    cells_R: Tensor  # the cell of the map, counted through N, H and W, that a row holds
    rows_NHW: Tensor  # the row that holds a cell, flat; all of a patch at low resolution are held by its first
    whole_A3: Tensor  # image, row and column of the patches at full resolution
    rank_Nhw: Tensor  # a patch's number among those, -1 at low resolution

    @property
    def patches(self) -> int:
        """N h w: so many rows are first cells."""
        return self.rank_Nhw.numel()


@dataclass(frozen=True)
class Taps:
    """What a convolution reads for each of M rows: ``index`` ``[M, K]`` into the rows of its source, where ``outside``
    (flat positions) lies beyond the map's edge and counts as zero."""

    index_MK: Tensor
    outside: Tensor


def packing(mask: Tensor, d: int) -> Packing:
    """The packing of maps ``[N, C, d h, d w]`` under a mask ``[N, 1, h, w]``: over one half is low resolution."""
    high = mask[:, 0] <= 0.5
    images, h, w = high.shape
    device, width = mask.device, w * d
    whole = high.nonzero()
    rank = torch.full((images, h, w), -1, device=device)
    rank[high] = torch.arange(len(whole), device=device)
    image, row, column = (torch.arange(n, device=device) for n in (images, h, w))
    first = ((image[:, None, None] * h + row[:, None]) * d) * width + column * d
    offsets = torch.tensor([a * width + b for a in range(d) for b in range(d)][1:], device=device)
    cells = torch.cat([first.flatten(), (first[high] + offsets[:, None]).flatten()])
    numbers = torch.arange(first.numel(), device=device).view(images, h, 1, w, 1)
    rows = numbers.expand(images, h, d, w, d).contiguous().flatten()
    rows[cells] = torch.arange(len(cells), device=device)
    return Packing(d, (images, h, w), cells, rows, whole, rank)


def as_rows(x: Tensor) -> Tensor:
    """``[N, C, H, W] -> [N H W, C]``: a view where x is in the channels_last format."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def pack(x: Tensor, packed: Packing, pooled: Tensor | None = None) -> Tensor:
    """The rows ``[R, C]`` of a map ``[N, C, H, W]``.

    `pooled` ``[N, C, h, w]`` is what patches at low resolution have in place of their first cell.
    """
    rows = as_rows(x).index_select(0, packed.cells_R)
    if pooled is not None:
        low = packed.rank_Nhw.flatten() < 0
        rows[: packed.patches][low] = as_rows(pooled)[low]
    return rows


def unpack(rows: Tensor, packed: Packing) -> Tensor:
    """The map ``[N, C, H, W]``, channels_last, in which patches at low resolution are of one value."""
    images, h, w = packed.size
    x = rows.index_select(0, packed.rows_NHW)
    return x.view(images, h * packed.d, w * packed.d, -1).permute(0, 3, 1, 2)


def taps_inside(packed: Packing, kernel: int, dilation: int) -> Taps:
    """What a convolution reads in rows, for all rows but the first cells. `dilation` is in patches."""
    numbers = torch.arange(packed.patches, device=packed.rank_Nhw.device).view(packed.size)
    patch = _around(numbers, packed.whole_A3, kernel, dilation)
    rank = _around(packed.rank_Nhw, packed.whole_A3, kernel, dilation)
    count = len(packed.whole_A3)
    start = packed.patches + count * torch.arange(packed.d**2 - 1, device=patch.device)[:, None, None]
    return _taps(torch.where(rank >= 0, rank + start, patch).flatten(0, 1))


def taps_of_map(packed: Packing, kernel: int, dilation: int) -> Taps:
    """The same of a map that was not packed, as `as_rows` gives it. `dilation` is in cells of the map."""
    images, h, w = packed.size
    numbers = torch.arange(images * h * w * packed.d**2, device=packed.rank_Nhw.device)
    numbers = numbers.view(images, h * packed.d, w * packed.d)
    cells = packed.cells_R[packed.patches :]
    at = torch.stack([cells // numbers[0].numel(), cells // numbers.shape[2] % numbers.shape[1]], dim=1)
    at = torch.cat([at, (cells % numbers.shape[2])[:, None]], dim=1)
    return _taps(_around(numbers, at, kernel, dilation))


def _around(values_NHW: Tensor, at_M3: Tensor, kernel: int, dilation: int) -> Tensor:
    """The values that a kernel reads around some places, ``[M, K]``, -1 beyond the edge."""
    reach = dilation * (kernel // 2)
    padded = F.pad(values_NHW, (reach, reach, reach, reach), value=-1)
    steps = dilation * torch.arange(kernel, device=values_NHW.device)
    image, row, column = at_M3.unbind(1)
    rows, columns = row[:, None, None] + steps[:, None], column[:, None, None] + steps
    return padded[image[:, None, None], rows, columns].flatten(1)


def _taps(index_MK: Tensor) -> Taps:
    return Taps(index_MK.clamp(min=0), (index_MK.flatten() < 0).nonzero()[:, 0])


def convolved(rows: Tensor, packed: Packing, conv: nn.Conv2d, taps: Taps | None) -> Tensor:
    """A convolution over rows ``[R, C] -> [R, c_out]``; `taps` are those of `taps_inside`, None for a 1x1 kernel."""
    if taps is None:
        return _product(rows, conv)
    images, h, w = packed.size
    first = rows[: packed.patches].view(images, h, w, -1).permute(0, 3, 1, 2)
    dilation, kernel = conv.dilation[0] // packed.d, conv.kernel_size[0]
    y = F.conv2d(first, conv.weight, conv.bias, 1, dilation * (kernel // 2), dilation, conv.groups)
    return _joined(y, rows, conv, taps)


def convolved_map(x: Tensor, packed: Packing, conv: nn.Conv2d, taps: Taps) -> Tensor:
    """The rows ``[R, c_out]`` of a convolution over a map that was not packed; `taps` are those of `taps_of_map`.

    The first cells are the convolution with stride d.
    """
    y = F.conv2d(x, conv.weight, conv.bias, packed.d, conv.padding, conv.dilation, conv.groups)
    return _joined(y, as_rows(x), conv, taps)


def _joined(first: Tensor, source: Tensor, conv: nn.Conv2d, taps: Taps) -> Tensor:
    """The first cells ``[N, c_out, h, w]`` and behind them what `conv` gives for the other rows."""
    out = source.new_empty(first.shape[0] * first.shape[2] * first.shape[3] + len(taps.index_MK), first.shape[1])
    behind = len(out) - len(taps.index_MK)
    out[:behind] = as_rows(first)
    for start, gathered in _gathered(source, taps):
        out[behind + start : behind + start + len(gathered)] = _product(gathered, conv)
    return out


def _gathered(source: Tensor, taps: Taps) -> Iterator[tuple[int, Tensor]]:
    """Taps side by side, ``[m, K C]``, for some rows at a time, with the number of the first of them."""
    total, kernel = taps.index_MK.shape
    at_once = max(1, GATHERED // (kernel * source.shape[1]))
    for start in range(0, total, at_once):
        index = taps.index_MK[start : start + at_once].flatten()
        found = source.index_select(0, index)
        outside = taps.outside
        if total > at_once:
            low = start * kernel
            outside = outside[(outside >= low) & (outside < low + len(index))] - low
        yield start, found.index_fill_(0, outside, 0).view(-1, kernel * source.shape[1])


def _product(gathered: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution whose taps lie side by side, ``[M, K C] -> [M, c_out]``."""
    weight = conv.weight.permute(0, 2, 3, 1)
    if conv.groups == 1:
        return F.linear(gathered, weight.reshape(conv.out_channels, -1), conv.bias)
    groups, kernel = conv.groups, conv.kernel_size[0] ** 2
    split = gathered.view(len(gathered), kernel, groups, -1).permute(2, 0, 1, 3).flatten(2)
    y = torch.bmm(split, weight.reshape(groups, conv.out_channels // groups, -1).transpose(1, 2))
    y = y.permute(1, 0, 2).flatten(1)
    return y if conv.bias is None else y + conv.bias
