"""Ops without weights that join maps or change their size.

Padding and pooling alone know a margin: rows and columns beyond ``size // stride`` (`models.registry.Shape`). What
padding adds, a pool without padding takes away, as at the end of yolov3-tiny's backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.primitives import Pad, PlainKernel, Step
from models.registry import Shape, one_to_one, register_op


def no_margin(inputs: Sequence[Shape]) -> None:
    """Raises ValueError where a source has a margin, as an op of one source does."""
    for shape in inputs:
        one_to_one([shape], {})


def concat_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    strides = {shape.stride for shape in inputs}
    if len(strides) > 1:
        raise ValueError(f"the sources have different strides {sorted(strides)}; all must be at one")
    return Shape(sum(shape.channels for shape in inputs), strides.pop())


@register_op(infer=concat_shape, many=True)
class Concat(nn.Module):
    """Maps side by side along channels. Shape: ``[[N, C_i, H, W], ...] -> [N, sum C_i, H, W]``"""

    def __init__(self, dimension: Literal[1] = 1) -> None:
        super().__init__()
        self.dimension = dimension

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), dim=self.dimension)


def add_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    joined = concat_shape(inputs, args)
    channels = sorted({shape.channels for shape in inputs})
    if len(channels) > 1:
        raise ValueError(f"the sources have different channels {channels}; a sum needs the same of all")
    return Shape(channels[0], joined.stride)


@register_op(infer=add_shape, many=True)
class Add(nn.Module):
    """The sum of maps, cell by cell. Shape: ``[[N, C, H, W], ...] -> [N, C, H, W]``"""

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return sum(maps[1:], maps[0])


def upsample_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    factor = args.get("scale_factor", 2)
    if inputs[0].stride % factor:
        raise ValueError(f"enlarging {factor} times does not divide the source's stride {inputs[0].stride}")
    return Shape(inputs[0].channels, inputs[0].stride // factor)


@register_op("nn.Upsample", infer=upsample_shape)
class Upsample(nn.Module):
    """A map enlarged `scale_factor` times. Shape: ``[N, C, H, W] -> [N, C, H * scale_factor, W * scale_factor]``"""

    def __init__(
        self,
        size: None = None,
        scale_factor: Annotated[int, Field(ge=1, le=64)] = 2,
        mode: Literal["nearest", "bilinear"] = "nearest",
    ) -> None:
        super().__init__()
        self.scale_factor, self.mode = scale_factor, mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=float(self.scale_factor), mode=self.mode)


def pool_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    source, kernel, padding = inputs[0], args["kernel_size"], args.get("padding", 0)
    stride = kernel if args.get("stride") is None else args["stride"]
    if 2 * padding > kernel:
        raise ValueError(f"padding {padding} is more than half of the pool's size {kernel}")
    # The map has n * stride + margin cells a side, whatever n is: (n * stride + margin + 2p - k) // stride + 1
    margin = (source.margin + 2 * padding - kernel) // stride + 1
    return Shape(source.channels, source.stride * stride, margin=margin)


@register_op("nn.MaxPool2d", infer=pool_shape)
class MaxPool2d(nn.Module):
    """The largest of each `kernel_size` x `kernel_size` cells; ``stride=None`` is `kernel_size`, as in torch.

    Shape: ``[N, C, H, W] -> [N, C, (H + 2 * padding - kernel_size) // stride + 1, likewise W]``
    """

    def __init__(self, kernel_size: PlainKernel, stride: Step | None = None, padding: Pad = 0) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel_size, self.stride, self.padding)


def pad_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    left, right, top, bottom = args["padding"]
    if left + right != top + bottom:
        raise ValueError(f"adds {left + right} columns but {top + bottom} rows; both have to be the same")
    return Shape(inputs[0].channels, inputs[0].stride, margin=inputs[0].margin + left + right)


@register_op("nn.ZeroPad2d", infer=pad_shape)
class ZeroPad2d(nn.Module):
    """Columns and rows of zeros around a map: left, right, top, bottom.

    Shape: ``[N, C, H, W] -> [N, C, H + top + bottom, W + left + right]``
    """

    def __init__(self, padding: tuple[Pad, Pad, Pad, Pad]) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding)
