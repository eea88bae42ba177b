"""The stage of a CSP network under a mask: a detector computes what it does not look at closely at low resolution.

Equations and forms are those of `models.ops.masked`. All that such a stage has besides its convolutions of neighbours
works cell by cell, so one description of it serves every form: a map, a small map, or rows of packed cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import BottleneckCSP, csp_shape
from models.ops.masked import (
    Backend,
    Expected,
    Resolution,
    Wide,
    active,
    best_form,
    filling,
    holds_choices,
    mask_in_force,
    patch_side,
    repeated,
    strided,
)
from models.ops.packed import (
    Packing,
    Taps,
    as_rows,
    convolved,
    convolved_map,
    packing,
    taps_inside,
    taps_of_map,
    unpack,
)
from models.ops.primitives import DEFAULT, Acts, Count, Fraction, Kernels, Width, each
from models.registry import Shape, register_op


def sel_csp_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    patch_side(inputs)
    return csp_shape([Shape(args["c_out"], inputs[0].stride)], args)


@register_op(infer=sel_csp_shape, takes=("map", "mask"))
class SelCSP(nn.Module):
    """A stage of a CSP network under a mask: the 3x3 `Conv` that has a stride there, and a `BottleneckCSP`.

    With d the side of a patch, a low patch is what both give with stride d, whatever lies around it. In a high one the
    first convolution is computed at every cell, and those of the bottlenecks have dilation d. So its every d-th cell is
    always the plain stage of stride d, from the same weights, and what it adds are cells between them. Attributes of
    the second part have the names of `BottleneckCSP`.

    `resolution` says whether it goes by the ``mask``, or is ``low`` or ``high`` everywhere and takes no look at it.
    `expected` is the share of low patches that costs count with where it goes by the mask. `backend` is the form,
    ``auto`` the faster one in use.

    Shape: ``[[N, c_in, H, W], mask] -> [N, c_out, H, W]``
    """

    down: Conv
    cv1: Conv
    cv2: nn.Module
    cv3: nn.Module
    cv4: Conv
    bn: nn.Module
    act: nn.Module
    m: nn.Module

    def __init__(
        self,
        inputs: Sequence[Shape],
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Fraction = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
        backend: Backend = "auto",
        resolution: Resolution = "mask",
        expected: Expected = 0.0,
    ) -> None:
        super().__init__()
        self.d, self.backend = patch_side(inputs), backend
        self.resolution, self.expected = mask_in_force(resolution), expected
        self.down = Conv(inputs[0].channels, c_out, 3, act=each(act, 0))
        csp = BottleneckCSP(
            c_out, c_out, number, shortcut=shortcut, groups=groups, expansion=expansion, kernel=kernel, act=act
        )
        for name, part in csp.named_children():
            self.add_module(name, part)
        bottlenecks: list[Any] = list(self.m.children())
        for block in bottlenecks:
            dilate(block.cv2.conv, self.d)
        self.is_open = holds_choices(self)

    def forward(self, sources: Sequence[Tensor]) -> Tensor:
        x, mask = sources[0], self.resolution(sources[1])
        assert x.shape[2:] == tuple(self.d * side for side in mask.shape[2:]), (x.shape, mask.shape)
        form = best_form(self, mask)
        if form == "packed":
            packed = packing(mask, self.d)
            return unpack(as_rows(self._through(x, packing_cells(packed))), packed)
        if form == "strided":
            return repeated(self._through(x, strided(self.d)), self.d, x)
        return self._through(x, filling(None if form == "plain" else mask))

    def _through(self, x: Tensor, wide: Wide) -> Tensor:
        x = self.down.act(self.down.bn(wide(self.down.conv, x)))
        deep = self.cv1(x)
        for block in active(self.m):
            y = block.cv2.act(block.cv2.bn(wide(block.cv2.conv, block.cv1(deep))))
            deep = deep + y if block.add else y
        return self.cv4(self.act(self.bn(torch.cat((self.cv3(deep), self.cv2(x)), dim=1))))


def dilate(convolution: Any, dilation: int) -> None:
    """Gives a convolution that keeps the size of its map a dilation; it still keeps it."""
    if isinstance(convolution, nn.Conv2d):
        reach = dilation * (convolution.kernel_size[0] // 2)
        convolution.dilation, convolution.padding = (dilation, dilation), (reach, reach)
    else:  # one of several kernels, which pads by what is active
        convolution.dilation = dilation


def packing_cells(packed: Packing) -> Wide:
    """Convolutions among the rows of a packing, as cells ``[1, C, R, 1]`` of a map in channels_last format: what works
    cell by cell needs to know no more of them. The first convolution, the transition, reads the map itself.
    """
    seen: dict[int, Taps] = {}  # of each kernel: the same for all bottlenecks

    def wide(convolution: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(convolution, nn.Conv2d)
        kernel, dilation = convolution.kernel_size[0], convolution.dilation[0]
        if dilation % packed.d:
            return as_cells(convolved_map(x, packed, convolution, taps_of_map(packed, kernel, dilation)))
        if kernel > 1 and kernel not in seen:
            seen[kernel] = taps_inside(packed, kernel, dilation // packed.d)
        return as_cells(convolved(as_rows(x), packed, convolution, seen.get(kernel)))

    return wide


def as_cells(rows: Tensor) -> Tensor:
    """Rows ``[R, C]`` as a map ``[1, C, R, 1]``, a view."""
    return rows.t()[None, :, :, None]
