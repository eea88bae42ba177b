"""The leaves that every op is written with: plain torch modules for plain values, elastic ones for a `Choice`.

Arithmetic on a choice happens here only, so an op made of these is searchable without a line about search in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import nearest
from models.elastic import (
    Channels,
    ElasticActivation,
    ElasticConv2d,
    ElasticSequential,
    SlicedBatchNorm2d,
    SlicedConv2d,
    SwitchableNorm,
    convolution,
)
from models.spec import Choice, PerBottleneck

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(),
    "relu6": lambda: nn.ReLU6(),  # of MobileNet and EfficientNet-Lite: no value above 6, which quantizes well
    "leaky": lambda: nn.LeakyReLU(0.1),  # slope of darknet and of every YOLO since
    "mish": lambda: nn.Mish(),
    "silu": lambda: nn.SiLU(),
    "hardswish": lambda: nn.Hardswish(),
    "sigmoid": lambda: nn.Sigmoid(),
    "identity": lambda: nn.Identity(),
}


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        known = f"; known are {', '.join(ACTIVATIONS)}"
        raise ValueError(f"is unknown{nearest(name, ACTIVATIONS) or known}")
    return name


# What an argument of an op may be. `Choice` in the type says that the op stays whole when the YAML leaves it open,
# `PerBottleneck` that each of the blocks which it repeats may have a value of its own.
Width = Annotated[int, Field(ge=1, le=65536)]
Step = Annotated[int, Field(ge=1, le=64)]
Pad = Annotated[int, Field(ge=0, le=64)]
Same = Literal["same"]  # the padding of TensorFlow, see `PaddedConv2d`
Eps = Annotated[float, Field(gt=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=8)]
Expansion = Fraction | Choice
Expansions = Expansion | PerBottleneck
Inner = int | Channels  # how many channels there are inside a block; what a row takes and gives is always a number
PlainKernel = Annotated[int, Field(ge=1, le=63)]
Kernel = PlainKernel | Choice
Kernels = Kernel | PerBottleneck
PlainAct = Annotated[str, AfterValidator(_known_activation)]
Act = PlainAct | Choice
Acts = Act | PerBottleneck
Count = Annotated[int, Field(ge=1, le=1000)] | Choice
EPS = 1e-3  # of a batch norm, in ScaledYOLOv4, yolov5 and TensorFlow; torch's own is 1e-5
MOMENTUM = 0.03  # of its running statistics, in ScaledYOLOv4 and yolov5, which set it after the build
ALONE = "; --supernet independent can hold it"
DEFAULT = "silu"  # replaced by the model file's `activation:` where an op's row names none


def scaled(channels: Inner, factor: Expansion) -> Inner:
    """`channels` times a factor, rounded down; with a choice among factors, `Channels` inside a block."""
    if isinstance(factor, Choice):
        assert not isinstance(channels, Channels), "a block has one open width"
        return Channels(factor, tuple(int(channels * option) for option in factor.options))
    if isinstance(channels, Channels):
        widths = tuple(int(width * factor) for width in channels.widths)
        return Channels(channels.choice, widths, channels.segments)
    return int(channels * factor)


def conv(
    c_in: Inner,
    c_out: Inner,
    kernel: Kernel = 1,
    stride: int = 1,
    *,
    padding: int | Same | None = None,
    groups: Inner = 1,
    dilation: int = 1,
    bias: bool = False,
    border: Sequence[float] | None = None,
) -> nn.Module:
    """A convolution; ``padding=None`` keeps the map size at stride 1 for odd kernels, ``same`` is that of TensorFlow.

    `border` is what stands around the map, a value a channel; None is 0. With groups that are open, every channel is
    convolved alone. Raises ValueError for a choice of kernels or open channels with a padding or border of its own, or
    in groups.
    """
    width = next((channels.choice for channels in (c_in, c_out) if isinstance(channels, Channels)), None)
    if isinstance(kernel, Choice) or width:
        if padding == "same" and stride == 1:
            padding = None  # which is the same for odd kernels
        for argument, value in (("padding", padding), ("border", border)):
            if value is not None and width:
                raise ValueError(f"{said(width)}, so {argument} must be left out; got {value}{ALONE}")
            if value is not None:
                raise ValueError(f"kernel is a choice {kernel}, so {argument} must be left out; got {value}")
        if width and not isinstance(groups, Channels) and groups != 1:
            raise ValueError(f"{said(width)}, so groups must be 1; got {groups}{ALONE}")
        if isinstance(kernel, Choice):
            return ElasticConv2d(c_in, c_out, kernel, stride, groups, dilation, bias)
        return SlicedConv2d(c_in, c_out, kernel, stride, groups, dilation, bias)
    assert isinstance(c_in, int) and isinstance(c_out, int) and isinstance(groups, int)
    reach = dilation * (kernel - 1) + 1
    both = max(reach - stride, 0) if padding == "same" else 2 * ((reach - 1) // 2 if padding is None else padding)
    if both % 2 == 0 and border is None:
        return convolution(c_in, c_out, kernel, stride, both // 2, dilation, groups, bias)
    return PaddedConv2d(c_in, c_out, kernel, stride, both, dilation, groups, bias, border)


class PaddedConv2d(nn.Conv2d):
    """A convolution that adds `margin` rows and columns to its map, the odd one below and to the right.

    So TensorFlow pads what it calls SAME: a kernel of 3 at stride 2 reads one row below the map and none above it,
    where the usual padding reads one above and none below. What is added has the values of `border`, 0 for None.

    Shape: ``[N, c_in, H, W] -> [N, c_out, (H + margin - reach) // stride + 1, ...]``
    """

    border: Tensor | None

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int,
        margin: int,
        dilation: int,
        groups: int,
        bias: bool,
        border: Sequence[float] | None,
    ) -> None:
        super().__init__(c_in, c_out, kernel, stride, 0, dilation, groups, bias)
        self.margins = (margin // 2, margin - margin // 2) * 2
        values = None if border is None else torch.tensor(border, dtype=self.weight.dtype)[:, None, None]
        self.register_buffer("border", values, persistent=False)  # the model file has it

    def forward(self, x: Tensor) -> Tensor:
        if self.border is None:
            return super().forward(F.pad(x, self.margins))
        return super().forward(F.pad(x - self.border, self.margins) + self.border)


def said(choice: Choice) -> str:
    """What a fault says of a choice that is named after its row and argument, ``16.expansion`` or ``16.expand.2``."""
    return f"{choice.name.split('.')[1]} is a choice {choice}"


def activation(act: Act) -> nn.Module:
    """The activation of a name, or an elastic one."""
    if isinstance(act, Choice):
        return ElasticActivation(act, activation)
    return ACTIVATIONS[act]()


NORMS = ("act", "shared", "k_act")  # of a shared supernet: see `norm`
_norms: ContextVar[str] = ContextVar("norms", default="act")


@contextlib.contextmanager
def keyed_norms(policy: str) -> Iterator[None]:
    """Inside, elastic norms are made by this policy of `NORMS`. It says nothing about a norm with plain values."""
    assert policy in NORMS, policy
    token = _norms.set(policy)
    try:
        yield
    finally:
        _norms.reset(token)


def norm(channels: Inner, *, feeds: Act = DEFAULT, after: Kernel = 1, eps: float = EPS) -> nn.Module:
    """Batch norm. It says which activation it feeds and which kernel it follows, so that an elastic one knows whom to
    follow: it keeps statistics and scale for every activation (``act``), since those shift the mean of what comes
    after; for every kernel and activation (``k_act``), since a small kernel also sums over fewer cells; or one set for
    all of them (``shared``). Widths inside a block share what they have in common, see `SlicedBatchNorm2d`.
    """
    keys = {"act": (feeds,), "shared": (), "k_act": (after, feeds)}[_norms.get()]
    return _switchable(channels, [key for key in keys if isinstance(key, Choice)], eps)


def _switchable(channels: Inner, keys: list[Choice], eps: float) -> nn.Module:
    """A batch norm for every combination of the keys' options: norms that hold norms."""
    if not keys:
        return batch_norm(channels, eps)
    first, *others = keys
    return SwitchableNorm(first, lambda: _switchable(channels, others, eps))


def batch_norm(channels: Inner, eps: float = EPS) -> nn.BatchNorm2d:
    if isinstance(channels, Channels):
        return SlicedBatchNorm2d(channels, eps, MOMENTUM)
    return nn.BatchNorm2d(channels, eps=eps, momentum=MOMENTUM)


def repeat(number: Count, make: Callable[[int], nn.Module]) -> nn.Module:
    """`number` blocks in a row, ``make(index)`` each, from 0 on.

    Each takes what the one before it gives, so a block keeps its channels.
    """
    if isinstance(number, Choice):
        return ElasticSequential(number, make)
    return nn.Sequential(*(make(index) for index in range(number)))


def each(value: Any, index: int) -> Any:
    """What block `index` of a row takes for an argument: a value of its own, or the one of all.

    What a block has besides its bottlenecks takes that of the first of them, which is there whatever `number` is: with
    equal values everywhere it is the block with this one value.
    """
    return value.values[index] if isinstance(value, PerBottleneck) else value


def wide(y: Tensor) -> Tensor:
    """The same in float32 or better, in which scores and losses are computed."""
    return y if y.dtype == torch.float64 else y.float()
