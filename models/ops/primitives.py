"""The leaves that every op is written with: plain torch modules for plain values, elastic ones for a `Choice`.

Arithmetic on a choice happens here only, so an op made of these is searchable without a line about search in it.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from torch import nn

from models.elastic import ElasticActivation, ElasticConv2d, ElasticSequential, SwitchableNorm, convolution
from models.spec import Choice, PerBottleneck

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(),
    "leaky": lambda: nn.LeakyReLU(0.1),  # slope of darknet and of every YOLO since
    "mish": lambda: nn.Mish(),
    "silu": lambda: nn.SiLU(),
    "hardswish": lambda: nn.Hardswish(),
    "sigmoid": lambda: nn.Sigmoid(),
    "identity": lambda: nn.Identity(),
}


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        close = difflib.get_close_matches(name, ACTIVATIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(ACTIVATIONS)}"
        raise ValueError(f"is unknown; {hint}")
    return name


# What an argument of an op may be. `Choice` in the type says that the op stays whole when the YAML leaves it open,
# `PerBottleneck` that each of the blocks which it repeats may have a value of its own.
Width = Annotated[int, Field(ge=1, le=65536)]
Step = Annotated[int, Field(ge=1, le=64)]
Pad = Annotated[int, Field(ge=0, le=64)]
Fraction = Annotated[float, Field(gt=0, le=8)]
PlainKernel = Annotated[int, Field(ge=1, le=63)]
Kernel = PlainKernel | Choice
Kernels = Kernel | PerBottleneck
PlainAct = Annotated[str, AfterValidator(_known_activation)]
Act = PlainAct | Choice
Acts = Act | PerBottleneck
Count = Annotated[int, Field(ge=1, le=1000)] | Choice
DEFAULT = "silu"  # replaced by the model file's `activation:` where an op's row names none


def conv(
    c_in: int,
    c_out: int,
    kernel: Kernel = 1,
    stride: int = 1,
    *,
    padding: int | None = None,
    groups: int = 1,
    dilation: int = 1,
    bias: bool = False,
) -> nn.Module:
    """A convolution; ``padding=None`` keeps the map size at stride 1 for odd kernels.

    Raises ValueError for a choice of kernels with a padding of its own.
    """
    if isinstance(kernel, Choice):
        if padding is not None:
            raise ValueError(f"kernel is a choice {kernel}, so padding must be left out; got {padding}")
        return ElasticConv2d(c_in, c_out, kernel, stride, groups, dilation, bias)
    padding = dilation * (kernel - 1) // 2 if padding is None else padding
    return convolution(c_in, c_out, kernel, stride, padding, dilation, groups, bias)


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


def norm(channels: int, *, feeds: Act = DEFAULT, after: Kernel = 1) -> nn.Module:
    """Batch norm. It says which activation it feeds and which kernel it follows, so that an elastic one knows whom to
    follow: it keeps statistics and scale for every activation (``act``), since those shift the mean of what comes
    after; for every kernel and activation (``k_act``), since a small kernel also sums over fewer cells; or one set for
    all of them (``shared``).
    """
    keys = {"act": (feeds,), "shared": (), "k_act": (after, feeds)}[_norms.get()]
    return _switchable(channels, [key for key in keys if isinstance(key, Choice)])


def _switchable(channels: int, keys: list[Choice]) -> nn.Module:
    """A batch norm for every combination of the keys' options: norms that hold norms."""
    if not keys:
        return batch_norm(channels)
    first, *others = keys
    return SwitchableNorm(first, lambda: _switchable(channels, others))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    # eps and momentum of ScaledYOLOv4 and yolov5, set there after the build
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


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
