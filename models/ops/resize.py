"""Rows that pass a map on, or enlarge it by learned weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.ops.primitives import Pad, PlainKernel, Step, Width
from models.registry import Shape, one_to_one, register_op


def same(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    return inputs[0]


@register_op("nn.Identity", infer=same)
class Identity(nn.Module):
    """The map as it is: a name for the image, or a row that others count from. Shape: unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def transposed_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    source = one_to_one(inputs, {})
    kernel, stride, padding = args["kernel_size"], args["stride"], args["padding"]
    if kernel - 2 * padding != stride:
        raise ValueError(
            f"kernel_size {kernel}, stride {stride} and padding {padding} do not enlarge {stride} times; "
            f"kernel_size - 2 * padding has to be the stride"
        )
    if source.stride % stride:
        raise ValueError(f"enlarging {stride} times does not divide the source's stride {source.stride}")
    return Shape(args["c_out"], source.stride // stride)


@register_op("nn.ConvTranspose2d", infer=transposed_shape)
class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution with bias (Long et al., arXiv 1411.4038).

    Shape: ``[N, c_in, H, W] -> [N, c_out, H * stride, W * stride]``
    """

    def __init__(
        self, c_in: int, c_out: Width, kernel_size: PlainKernel = 2, stride: Step = 2, padding: Pad = 0
    ) -> None:
        super().__init__(c_in, c_out, kernel_size, stride, padding)
