"""The inverted bottleneck: many channels inside, few between the blocks (MobileNetV2, arXiv 1801.04381), with the
squeeze-and-excitation (arXiv 1709.01507) of EfficientNet (arXiv 1905.11946).

Programs that share EfficientNet's weights differ in padding and in the eps of their batch norms, so both are arguments:
those of torchvision and of timm's own training have the usual padding and 1e-5, those that come from TensorFlow
``same`` and 1e-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from models.ops.conv import Conv
from models.ops.csp import start_as_nothing
from models.ops.primitives import (
    ALONE,
    DEFAULT,
    Act,
    Acts,
    Count,
    Eps,
    Expansion,
    Expansions,
    Inner,
    Kernel,
    Kernels,
    Same,
    Step,
    Width,
    activation,
    conv,
    each,
    repeat,
    scaled,
)
from models.registry import Shape, one_to_one, register_op
from models.spec import Choice

Squeeze = Annotated[float, Field(ge=0, le=1)]


class SqueezeExcite(nn.Module):
    """Every channel times a weight in (0, 1) that two layers find from the means of all channels.

    Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, channels: Inner, squeezed: int, act: Act) -> None:
        super().__init__()
        self.reduce = conv(channels, squeezed, 1, bias=True)
        self.act = activation(act)
        self.expand = conv(squeezed, channels, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * self.expand(self.act(self.reduce(means))).sigmoid()


class InvertedBottleneck(nn.Module):
    """1x1 to `expand` times the channels, depth-wise convolution, attention to channels, 1x1 without activation.

    Nothing is expanded where `expand` is 1, and a `squeeze` of 0 leaves the attention out; it is a share of the
    channels that come *in*, not of the expanded ones. Added to the input where the shape stays; the last norm then
    starts with a scale of 0, as in `Bottleneck`.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: Kernel,
        stride: int,
        expand: Expansion,
        squeeze: float,
        act: Act,
        padding: Same | None,
        eps: float,
    ) -> None:
        super().__init__()
        if isinstance(expand, Choice) and 1 in expand.options:
            raise ValueError(f"expand is a choice {expand}, and 1 leaves a convolution out that the others have{ALONE}")
        hidden = scaled(c_in, expand)
        self.expand = Conv(c_in, hidden, 1, act=act, eps=eps) if expand != 1 else nn.Identity()
        self.depthwise = Conv(hidden, hidden, kernel, stride, padding, hidden, act=act, eps=eps)
        self.se = SqueezeExcite(hidden, max(int(c_in * squeeze), 1), act) if squeeze else nn.Identity()
        self.project = Conv(hidden, c_out, 1, act="identity", eps=eps)
        self.add = stride == 1 and c_in == c_out
        if self.add:
            start_as_nothing(self.project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.add else y


def mbconv_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    source, expand = inputs[0], args.get("expand", 6)
    if int(source.channels * expand) < 1:
        raise ValueError(f"expand {expand} of {source.channels} leaves no channel")
    one_to_one(inputs, {"kernel": args["kernel"]})  # of the blocks at stride 1; an odd kernel fits any stride
    return Shape(args["c_out"], source.stride * args["stride"])


@register_op(infer=mbconv_shape)
class MBConv(nn.Module):
    """A stage of EfficientNet: `number` inverted bottlenecks, of which the first has the `stride` and changes channels.

    Kernel, expansion and activation may differ from block to block. `squeeze` is that of the channel attention, a share
    of a block's input, 0 for none (EfficientNet-Lite). `padding` is None or ``same``, `eps` that of all batch norms.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernels = 3,
        stride: Step = 1,
        expand: Expansions = 6,
        squeeze: Squeeze = 0.25,
        number: Count = 1,
        *,
        act: Acts = DEFAULT,
        padding: Same | None = None,
        eps: Eps = 1e-5,
    ) -> None:
        super().__init__()

        def block(index: int) -> nn.Module:
            channels, step = (c_in, stride) if index == 0 else (c_out, 1)
            own_kernel, own_expand, own_act = each(kernel, index), each(expand, index), each(act, index)
            return InvertedBottleneck(channels, c_out, own_kernel, step, own_expand, squeeze, own_act, padding, eps)

        self.m = repeat(number, block)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)
