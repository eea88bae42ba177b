"""Ops without weights that join maps or change their size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.registry import Shape, register_op


def concat_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
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


def upsample_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
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
