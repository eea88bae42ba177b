"""The CA-block, a convolution with attention over channels and places, of the paper that docs/lightweight.md names.

The paper's figures are lost, and some of its details with them. Every such detail is an argument here, whose default is
the nearest public relative: MobileNetV2 (arXiv 1801.04381) for the inverted bottleneck, squeeze-and-excitation (arXiv
1709.01507) for the channels, CBAM (arXiv 1807.06521) and BAM (arXiv 1807.06514) for the places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.conv import Conv
from models.ops.csp import start_as_nothing
from models.ops.primitives import (
    DEFAULT,
    Act,
    Acts,
    Count,
    Kernel,
    Kernels,
    Step,
    Width,
    activation,
    each,
    norm,
    repeat,
)
from models.registry import Shape, one_to_one, register_op
from models.spec import Choice


def _different(rates: tuple[int, ...]) -> tuple[int, ...]:
    if not rates or len(set(rates)) < len(rates):
        raise ValueError("should be a list of different whole numbers")
    return rates


Expand = Annotated[int, Field(ge=1, le=16)]
Dilations = Annotated[tuple[Step, ...], AfterValidator(_different)] | Choice
Attention = Literal["full", "channel", "spatial", "none"]
Reduction = Annotated[int, Field(ge=1, le=64)] | None
Squeeze = Literal["mean", "max", "both"]
GateKernel = Literal[1, 3, 5, 7]


@dataclass(frozen=True)
class Gates:
    """Which gates a block has and how they are made; see `CABlock`."""

    attention: Attention
    reduction: Reduction
    squeeze: Squeeze
    spatial_kernel: int


class ChannelGate(nn.Module):
    """Each channel times ``g = sigmoid(W2 act(W1 mean(v) + b1) + b2)``, its own number in [0, 1] for the whole map.

    ``narrow=None``: one dense layer, ``g = sigmoid(W mean(v) + b)``. Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, channels: int, narrow: int | None, act: Act) -> None:
        super().__init__()
        if narrow is None:
            self.dense: nn.Module = nn.Linear(channels, channels)
        else:
            self.dense = nn.Sequential(nn.Linear(channels, narrow), activation(act), nn.Linear(narrow, channels))

    def forward(self, v: Tensor) -> Tensor:
        g = torch.sigmoid(self.dense(v.mean(dim=(2, 3))))
        return v * g[:, :, None, None]


class SpatialGate(nn.Module):
    """Each cell times ``m = sigmoid(W * [a_d of every dilation d] + b)``, its own number in [0, 1] for all channels.

    ``a_d`` is what a depth-wise 3x3 convolution of dilation d gives, squeezed along channels to its mean and its
    maximum (or one of them). `kernel` is that of W. Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, channels: int, dilations: tuple[int, ...], squeeze: Squeeze, kernel: int, act: Act) -> None:
        super().__init__()
        self.dilations, self.squeeze = dilations, squeeze
        self.dilated = nn.ModuleList(
            Conv(channels, channels, 3, groups=channels, act=act, dilation=rate) for rate in dilations
        )
        maps = 2 if squeeze == "both" else 1
        # torch's own start for a convolution. A network starts its nn.Conv2d by their fan-out, and with one channel
        # going out the sigmoid would be saturated from the beginning.
        first = nn.Conv2d(maps * len(dilations), 1, kernel)
        self.weight = nn.Parameter(first.weight.detach().view(len(dilations), maps, kernel, kernel))
        self.bias = first.bias

    def forward(self, y: Tensor) -> Tensor:
        return self.of(self.dilations, y)

    def of(self, dilations: tuple[int, ...], y: Tensor) -> Tensor:
        """The same with some of the dilations alone."""
        places = [self.dilations.index(rate) for rate in dilations]
        maps = [squeezed for place in places for squeezed in self._squeezed(self.dilated[place](y))]
        weight = self.weight[places].flatten(0, 1)[None]
        logits = F.conv2d(torch.cat(maps, dim=1), weight, self.bias, padding=weight.shape[-1] // 2)
        return y * torch.sigmoid(logits)

    def _squeezed(self, z: Tensor) -> list[Tensor]:
        """``[N, 1, H, W]`` each."""
        mean = [] if self.squeeze == "max" else [z.mean(dim=1, keepdim=True)]
        return mean if self.squeeze == "mean" else [*mean, z.amax(dim=1, keepdim=True)]


class ElasticSpatialGate(nn.Module):
    """A `SpatialGate` with every dilation of a choice; an option of the choice is some of them, over the same weights.

    Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, channels: int, dilations: Choice, squeeze: Squeeze, kernel: int, act: Act) -> None:
        super().__init__()
        every = tuple(sorted({rate for option in dilations.options for rate in option}))
        self.choice = dilations
        self.active = dilations.options[0]
        self.every = SpatialGate(channels, every, squeeze, kernel, act)

    def option(self, value: tuple[int, ...], y: Tensor) -> Tensor:
        return self.every.of(value, y)

    def forward(self, y: Tensor) -> Tensor:
        return self.option(self.active, y)

    def plain(self) -> nn.Module:
        every, places = self.every, [self.every.dilations.index(rate) for rate in self.active]
        channels = 1  # its own convolutions make way for those that are here
        new = SpatialGate(channels, self.active, every.squeeze, every.weight.shape[-1], DEFAULT)
        new.dilated = nn.ModuleList(every.dilated[place] for place in places)
        new.weight = nn.Parameter(every.weight.detach()[places])
        new.bias = every.bias
        return new


def spatial_gate(channels: int, dilations: Dilations, gates: Gates, act: Act) -> nn.Module:
    """A gate over places, or an elastic one."""
    kind: Any = ElasticSpatialGate if isinstance(dilations, Choice) else SpatialGate
    return kind(channels, dilations, gates.squeeze, gates.spatial_kernel, act)


class AttentionBottleneck(nn.Module):
    """An inverted bottleneck with attention to channels in its wide part, and to places behind it::

        v = act(norm(depth-wise kernel x kernel(act(norm(1x1(x))))))     `expand` times as wide as x
        y = norm(1x1(v * g(v)))                                          see `ChannelGate`
        o = y * m(y), + x where `residual` and shapes agree              see `SpatialGate`

    Its arguments are those of `CABlock`. Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: Kernel,
        stride: int,
        expand: int,
        dilations: Dilations,
        gates: Gates,
        *,
        residual: bool,
        act: Act,
    ) -> None:
        super().__init__()
        hidden, narrow = expand * c_in, None if gates.reduction is None else max(1, c_in // gates.reduction)
        to_channels, to_places = gates.attention in ("full", "channel"), gates.attention in ("full", "spatial")
        self.expand = nn.Identity() if expand == 1 else Conv(c_in, hidden, act=act)
        self.depthwise = Conv(hidden, hidden, kernel, stride, groups=hidden, act=act)
        self.channel = ChannelGate(hidden, narrow, act) if to_channels else nn.Identity()
        self.project = Conv(hidden, c_out, act="identity")
        self.project.bn = norm(c_out, feeds=act)  # feeds none, but gets what the activation before it makes
        self.spatial = spatial_gate(c_out, dilations, gates, act) if to_places else nn.Identity()
        self.add = residual and stride == 1 and c_in == c_out
        if self.add:
            start_as_nothing(self.project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.channel(self.depthwise(self.expand(x))))
        o = self.spatial(y)
        return x + o if self.add else o


def ca_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    one_to_one(inputs, {"kernel": args["kernel"]})  # of the blocks at stride 1; an odd kernel fits any stride
    return one_to_one(inputs, args)


@register_op(infer=ca_shape)
class CABlock(nn.Module):
    """`number` bottlenecks with attention (`AttentionBottleneck`); the first has the `stride` and changes channels.

    `attention` leaves out the gate over channels (spatial), over places (channel) or both (none). ``expand=1`` has no
    first 1x1 convolution, so that with ``attention: none`` a block is a depth-wise separable convolution. The gate over
    channels has c_in // `reduction` numbers in its middle; ``reduction=None`` is one dense layer, as the paper's
    singular may be read. `squeeze`, `dilations` and `spatial_kernel` are those of the gate over places. Where the input
    is added, the last norm starts with a scale of 0, as in `Bottleneck`.

    Kernel and activation may differ from block to block.

    Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: Width,
        kernel: Kernels = 3,
        stride: Step = 1,
        expand: Expand = 4,
        dilations: Dilations = (1, 2, 3),
        number: Count = 1,
        *,
        attention: Attention = "full",
        reduction: Reduction = 4,
        squeeze: Squeeze = "both",
        spatial_kernel: GateKernel = 1,
        residual: bool = True,
        act: Acts = DEFAULT,
    ) -> None:
        super().__init__()
        gates = Gates(attention, reduction, squeeze, spatial_kernel)

        def block(index: int) -> nn.Module:
            channels, step = (c_in, stride) if index == 0 else (c_out, 1)
            return AttentionBottleneck(
                channels,
                c_out,
                each(kernel, index),
                step,
                expand,
                dilations,
                gates,
                residual=residual,
                act=each(act, index),
            )

        self.m = repeat(number, block)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)
