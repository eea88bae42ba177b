"""The stages of residual networks (He et al., arXiv 1512.03385), with the names and numbers of torchvision.

Parts have torchvision's attribute names (``conv1 bn1 conv2 bn2 conv3 bn3 downsample.0 downsample.1``) and stand in the
same order, so that its state dicts fit by name (`models.resnet`). The stride of a `Bottleneck` is on its 3x3
convolution, as there ("ResNet V1.5").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from models.ops.csp import start_as_nothing
from models.ops.primitives import DEFAULT, Act, Count, Eps, Step, Width, activation, conv, norm, repeat
from models.registry import Shape, one_to_one, register_op

EXPANSION = 4  # a bottleneck gives four times as many channels as its convolution in the middle has
EPS, MOMENTUM = 1e-5, 0.1  # of torch's batch norms, and so of torchvision's weights


def resnet_norm(channels: int, feeds: Act, after: int, eps: float) -> nn.Module:
    """A batch norm, or an elastic one, with the momentum that torchvision trained its weights with."""
    made = norm(channels, feeds=feeds, after=after, eps=eps)
    for child in made.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = MOMENTUM
    return made


def projection(c_in: int, c_out: int, stride: int, act: Act, eps: float) -> nn.Sequential | None:
    """The shortcut of a block that changes the shape: a 1x1 convolution and its norm; None where nothing changes."""
    if stride == 1 and c_in == c_out:
        return None
    return nn.Sequential(conv(c_in, c_out, 1, stride), resnet_norm(c_out, act, 1, eps))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, the block of ResNet-18 and ResNet-34.

    `first_dilation` is that of the convolution with the stride, None for `dilation`. The last norm starts with a scale
    of 0, as in `models.ops.csp.Bottleneck`.

    Shape: ``[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]``
    """

    folded = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act: Act = DEFAULT,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        first = dilation if first_dilation is None else first_dilation
        self.conv1 = conv(c_in, c_out, 3, stride, dilation=first)
        self.bn1 = resnet_norm(c_out, act, 3, eps)
        self.conv2 = conv(c_out, c_out, 3, dilation=dilation)
        self.bn2 = resnet_norm(c_out, act, 3, eps)
        self.act = activation(act)
        self.downsample = projection(c_in, c_out, stride, act, eps)
        start_as_nothing(self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, the block of ResNet-50 and deeper.

    The 3x3 convolution has `width` channels, None for a quarter of `c_out`.
    `first_dilation` is that of the 3x3 convolution, which has the stride, None for `dilation`. The last norm starts
    with a scale of 0, as in `models.ops.csp.Bottleneck`.

    Shape: ``[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]``
    """

    folded = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        act: Act = DEFAULT,
        eps: float = EPS,
        width: int | None = None,
    ) -> None:
        super().__init__()
        width = c_out // EXPANSION if width is None else width
        self.conv1 = conv(c_in, width, 1)
        self.bn1 = resnet_norm(width, act, 1, eps)
        self.conv2 = conv(width, width, 3, stride, dilation=dilation if first_dilation is None else first_dilation)
        self.bn2 = resnet_norm(width, act, 3, eps)
        self.conv3 = conv(width, c_out, 1)
        self.bn3 = resnet_norm(c_out, act, 1, eps)
        self.act = activation(act)
        self.downsample = projection(c_in, c_out, stride, act, eps)
        start_as_nothing(self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.act(y + (x if self.downsample is None else self.downsample(x)))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


def dilations(stride: int, dilation: int, first_dilation: int | None) -> tuple[int, int]:
    """The dilation of the convolution with the stage's stride, and that of all others.

    A stage whose stride was replaced by a dilation (stride 1, dilation d) begins with half of it, that of the stage
    before: torchvision's ``replace_stride_with_dilation``.
    """
    if first_dilation is not None:
        return first_dilation, dilation
    return max(1, dilation // 2) if stride == 1 else dilation, dilation


def stage_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    if args.get("block") == "bottleneck" and args["c_out"] % EXPANSION:
        raise ValueError(f"a bottleneck needs {EXPANSION} times a whole number of channels, got {args['c_out']}")
    return one_to_one(inputs, {"c_out": args["c_out"], "stride": args.get("stride", 1)})


@register_op(infer=stage_shape)
class ResStage(nn.Module):
    """A stage of a residual network: `number` blocks, of which the first has the `stride` and changes the channels.

    `block` is ``basic`` (two 3x3) or ``bottleneck`` (1x1, 3x3, 1x1, of `c_out` / 4 channels inside). All 3x3
    convolutions have the `dilation`, but the one with the stride has `first_dilation`: None is half the dilation where
    the stride is 1 (it was replaced by the dilation), else the dilation. `eps` is that of all batch norms.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        stride: Step = 1,
        number: Count = 1,
        *,
        block: Literal["basic", "bottleneck"] = "basic",
        dilation: Step = 1,
        first_dilation: Step | None = None,
        act: Act = DEFAULT,
        eps: Eps = EPS,
    ) -> None:
        super().__init__()
        first, others = dilations(stride, dilation, first_dilation)

        def make(index: int) -> nn.Module:
            if index == 0:
                return BLOCKS[block](c_in, c_out, stride, others, first, act, eps)
            return BLOCKS[block](c_out, c_out, 1, others, None, act, eps)

        self.blocks = repeat(number, make)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
