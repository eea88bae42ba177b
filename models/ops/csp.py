"""Residual bottlenecks and the cross-stage-partial blocks built of them (CSPNet, arXiv 1911.11929).

BottleneckCSP and BottleneckCSP2 follow ScaledYOLOv4 (arXiv 2011.08036): a plain convolution ends one branch, another is
the second branch, and one batch norm and activation work on their concatenation. C3 is what yolov5 made of the first
since its v4.0: three blocks of convolution, norm and activation, and nothing after the concatenation. C2f is YOLOv8's:
what every bottleneck gives goes into the last convolution, as in ELAN (arXiv 2211.04800). VoVCSP is the one-shot
aggregation of VoVNet (arXiv 1904.09730) on half of the channels.

Kernel and activation may differ from bottleneck to bottleneck; the rest of a block has the first one's activation. How
wide a block is inside, `expansion`, is the same everywhere in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.elastic import Channels
from models.ops.conv import Conv
from models.ops.dense import dense, gather
from models.ops.primitives import (
    DEFAULT,
    Act,
    Acts,
    Count,
    Expansion,
    Inner,
    Kernel,
    Kernels,
    Width,
    activation,
    conv,
    each,
    norm,
    repeat,
    scaled,
)
from models.registry import Shape, one_to_one, register_op


def hidden_channels(args: Mapping[str, Any], channels: int) -> int:
    """`channels` times the argument `expansion`, rounded down. Raises ValueError where none is left."""
    hidden = int(channels * args.get("expansion", 1.0))
    if hidden < 1:
        raise ValueError(f"expansion {args['expansion']} of {channels} leaves no channel")
    return hidden


def bottleneck_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    hidden = hidden_channels(args, args["c_out"])
    return one_to_one([replace(inputs[0], channels=hidden)], args)  # of the second convolution, the grouped one


def csp_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    hidden = hidden_channels(args, args["c_out"])
    inside = one_to_one([replace(inputs[0], channels=hidden)], {**args, "c_out": hidden})  # the bottlenecks
    return replace(inside, channels=args["c_out"])


@register_op(infer=bottleneck_shape)
class Bottleneck(nn.Module):
    """1x1 convolution, then `kernel` x `kernel`; added to the input where `shortcut` is asked for and channels agree.

    With ``wide`` the first has the same kernel as the second, as in YOLOv8 and later.

    Where it is added, the last norm starts with a scale of 0, so that a new network begins as its shortcuts alone and
    grows deep as it learns (Goyal et al., arXiv 1706.02677, section 5.1). In short runs it helps: docs/architecture.md.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: Inner,
        c_out: Width | Channels,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Expansion = 0.5,
        *,
        wide: bool = False,
        kernel: Kernel = 3,
        act: Act = DEFAULT,
    ) -> None:
        super().__init__()
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, kernel if wide else 1, act=act)
        self.cv2 = Conv(hidden, c_out, kernel, groups=groups, act=act)
        self.add = shortcut and c_in == c_out
        if self.add:
            start_as_nothing(self.cv2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


def start_as_nothing(block: nn.Module) -> None:
    """Scales of 0 in all norms of the last part of a residual branch."""
    for child in block.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.zeros_(child.weight)


def bottleneck(
    channels: Inner, shortcut: bool, groups: int, kernel: Kernels, act: Acts, *, wide: bool = False
) -> Callable[[int], nn.Module]:
    """Makes the bottleneck of an index, which narrows nothing; each has its own kernel and activation where given."""
    return lambda index: Bottleneck(
        channels, channels, shortcut, groups, 1.0, wide=wide, kernel=each(kernel, index), act=each(act, index)
    )


def bottlenecks(number: Count, channels: Inner, shortcut: bool, groups: int, kernel: Kernels, act: Acts) -> nn.Module:
    """`number` bottlenecks in a row."""
    return repeat(number, bottleneck(channels, shortcut, groups, kernel, act))


@register_op(infer=csp_shape)
class BottleneckCSP(nn.Module):
    """Cross-stage-partial block: half the channels go through `number` bottlenecks, half past them.

    ``concat_act`` is the activation after the concatenation; None takes `act`. yolov5 up to v6.0 has LeakyReLU there,
    whatever its other activations are.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Expansion = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
        concat_act: Act | None = None,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        after = first if concat_act is None else concat_act
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = conv(c_in, hidden, 1)
        self.cv3 = conv(hidden, hidden, 1)
        self.cv4 = Conv(2 * hidden, c_out, 1, act=first)
        self.bn = norm(2 * hidden, feeds=after)
        self.act = activation(after)
        self.m = bottlenecks(number, hidden, shortcut, groups, kernel, act)

    def forward(self, x: Tensor) -> Tensor:
        deep = self.cv3(self.m(self.cv1(x)))
        past = self.cv2(x)
        return self.cv4(self.act(self.bn(torch.cat((deep, past), dim=1))))


@register_op(infer=csp_shape)
class BottleneckCSP2(nn.Module):
    """The neck's cross-stage-partial block of ScaledYOLOv4: one 1x1 first, both branches from it, no halving.

    An `expansion` other than 1 is ours: both branches then have that many times `c_out` channels.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = False,
        groups: Width = 1,
        *,
        expansion: Expansion = 1.0,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = conv(hidden, hidden, 1)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=first)
        self.bn = norm(2 * hidden, feeds=first)
        self.act = activation(first)
        self.m = bottlenecks(number, hidden, shortcut, groups, kernel, act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv3(self.act(self.bn(torch.cat((self.m(x), self.cv2(x)), dim=1))))


@register_op(infer=csp_shape)
class C3(nn.Module):
    """Cross-stage-partial block of yolov5 since v4.0: `number` bottlenecks beside a 1x1 `Conv`, and one over both.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Expansion = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, hidden, 1, act=first)
        self.cv2 = Conv(c_in, hidden, 1, act=first)
        self.cv3 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = bottlenecks(number, hidden, shortcut, groups, kernel, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


@register_op(infer=csp_shape)
class C2f(nn.Module):
    """Cross-stage-partial block of YOLOv8: half the channels through `number` bottlenecks; all that each of them gives
    goes into the last 1x1 `Conv`, beside both halves.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = False,
        groups: Width = 1,
        expansion: Expansion = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, 2 * hidden, 1, act=first)
        self.cv2 = gather(hidden, c_out, number, first)
        self.m = dense(number, bottleneck(hidden, shortcut, groups, kernel, act, wide=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.m(self.cv1(x)))


@register_op(infer=csp_shape)
class C2(nn.Module):
    """The `C2f` that keeps only the last bottleneck's output: half of the channels through `number` of them, half past.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        number: Count = 1,
        shortcut: bool = True,
        groups: Width = 1,
        expansion: Expansion = 0.5,
        *,
        kernel: Kernels = 3,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        first = each(act, 0)
        hidden = scaled(c_out, expansion)
        self.cv1 = Conv(c_in, 2 * hidden, 1, act=first)
        self.cv2 = Conv(2 * hidden, c_out, 1, act=first)
        self.m = repeat(number, bottleneck(hidden, shortcut, groups, kernel, act, wide=True))

    def forward(self, x: Tensor) -> Tensor:
        deep, past = self.cv1(x).chunk(2, dim=1)
        return self.cv2(torch.cat((self.m(deep), past), dim=1))


def vovcsp_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    for channels in (inputs[0].channels, args["c_out"]):
        if channels % 2:
            raise ValueError(f"half of {channels} channels is no whole number")
    return one_to_one(inputs, args)


@register_op(infer=vovcsp_shape)
class VoVCSP(nn.Module):
    """The second half of the channels through two convolutions; what each gives is kept, and a 1x1 joins them.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H, W]``
    """

    def __init__(self, c_in: int, c_out: Width, *, kernel: Kernel = 3, act: Act = DEFAULT) -> None:
        super().__init__()
        self.cv1 = Conv(c_in // 2, c_out // 2, kernel, act=act)
        self.cv2 = Conv(c_out // 2, c_out // 2, kernel, act=act)
        self.cv3 = Conv(c_out, c_out, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        first = self.cv1(x.chunk(2, dim=1)[1])
        return self.cv3(torch.cat((first, self.cv2(first)), dim=1))
