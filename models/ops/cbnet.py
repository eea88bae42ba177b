"""Several backbones as one (CBNet, Liu et al., arXiv 1909.03625; CBNetV2, arXiv 2107.00420), as YOLOv9 uses them.

What a first backbone found on its levels is laid out by `CBLinear`, a piece for each level of a second backbone, and
added to that level by `CBFuse`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.merge import no_margin
from models.ops.primitives import Width
from models.registry import Shape, one_to_one, register_op

First = Annotated[int, Field(ge=0, le=1_000_000)]


def cblinear_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if not args["pieces"]:
        raise ValueError("pieces is a list of channels, [64, 128]; it is empty")
    return Shape(sum(args["pieces"]), one_to_one(inputs, {}).stride)


@register_op(infer=cblinear_shape)
class CBLinear(nn.Module):
    """A 1x1 convolution with bias whose channels are `pieces` side by side. `CBFuse` takes one of them.

    Shape: ``[N, c_in, H, W] -> [N, sum of pieces, H, W]``
    """

    def __init__(self, c_in: int, pieces: tuple[Width, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, sum(pieces), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def cbfuse_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    *sources, target = inputs
    firsts = args["firsts"]
    if len(firsts) != len(sources):
        raise ValueError(f"firsts has a number for each source but the last, here {len(sources)}; got {len(firsts)}")
    for source, first in zip(sources, firsts, strict=True):
        if first + target.channels > source.channels:
            raise ValueError(
                f"the last source has {target.channels} channels; one with {source.channels} has not that many from "
                f"its channel {first} on"
            )
        if source.stride % target.stride:
            raise ValueError(f"a source's stride {source.stride} is no multiple of the last one's, {target.stride}")
    return target


@register_op(infer=cbfuse_shape, many=True)
class CBFuse(nn.Module):
    """The last map plus as many channels of every other one, from its channel `firsts` on, enlarged to its size.

    Shape: ``[[N, C_i, H_i, W_i], ..., [N, C, H, W]] -> [N, C, H, W]``
    """

    def __init__(self, firsts: tuple[First, ...]) -> None:
        super().__init__()
        self.firsts = firsts

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *sources, y = maps
        size = y.shape[-2:]
        for source, first in zip(sources, self.firsts, strict=True):
            y = y + F.interpolate(source[:, first : first + maps[-1].shape[1]], size=size, mode="nearest")
        return y
