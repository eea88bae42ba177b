"""Leaves that hold every option of a choice, made by `models.ops.primitives` where a YAML left one open.

All of them work alike. `active` is the option in use, `option(value, x)` is what the leaf computes under an option,
`plain()` is the torch module that a derived network has in its place. In a `blended` network a leaf computes its
``mixture(gates, x) = sum_k gates[k] option_k(x)``; it has a method for that where running every option would be dearer.

A width inside a block is different: it is not one leaf's affair. Whoever writes such a map gives just the channels in
use, and whoever reads it has weights for more: both ask a `Cut`, which is the leaf.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from models.spec import Choice


@dataclass(frozen=True)
class WithAux:
    """What an op returns that has something to say besides its output: an attention map, a mask, an extra loss.

    Where the op's class has ``aux_loss(aux, targets)``, a scalar in float32, it is a part of the network's loss; the
    class's ``aux_name`` is what it is called there. With ``is_price`` it says what the row costs, so a search counts it
    too; without, it only helps the row to learn.
    """

    output: Any
    aux: Any


@runtime_checkable
class Elastic(Protocol):
    """What a leaf offers to the supernet."""

    choice: Choice
    active: Any

    def option(self, value: Any, x: Tensor) -> Any: ...

    def plain(self) -> nn.Module: ...


def elastic_leaves(module: nn.Module) -> Iterator[tuple[str, Elastic]]:
    """Every elastic leaf below `module`, in the order of the network."""
    for name, child in module.named_modules():
        if isinstance(child, Elastic):
            yield name, child


@contextlib.contextmanager
def blended(leaves: Sequence[Elastic], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every leaf computes the mixture of its options by the gates ``[options]`` of its choice, whatever is
    active. Gates are any numbers, and differentiable. Maps are `wide`.
    """
    forwards = [
        (leaf, partial(getattr(leaf, "mixture", partial(sum_of_options, leaf)), gates[leaf.choice.name]))
        for leaf in cast(Sequence[Any], leaves)
    ]
    try:
        for leaf, forward in forwards:
            leaf.forward = forward
        with wide(leaves):
            yield
    finally:
        for leaf, _ in forwards:
            del leaf.forward  # the class's own is back


def sum_of_options(leaf: Elastic, gates: Tensor, x: Any) -> Any:
    """``sum_k gates[k] option_k(x)``, every option run."""
    terms = [gate * leaf.option(value, x) for gate, value in zip(gates, leaf.choice.options, strict=True)]
    return sum(terms[1:], start=terms[0])


@dataclass(frozen=True)
class Channels:
    """Channels inside a block while their number is a choice: segments side by side, of each of which the first
    ``widths[k]`` are in use under option k.

    A map is one segment; two branches that meet are two, so what is in use of them is no prefix. As a number it is the
    most there can be.
    """

    choice: Choice
    widths: tuple[int, ...]  # of a segment, one an option
    segments: int = 1

    def __mul__(self, times: int) -> Channels:
        """So many maps like this one side by side."""
        return replace(self, segments=times * self.segments)

    __rmul__ = __mul__

    def __int__(self) -> int:
        return self.segments * self.widest

    @property
    def widest(self) -> int:
        """Channels of a segment, in use or not."""
        return max(self.widths)


class Cut(nn.Module):
    """What is in use of the channels of a map, and of the weights that read or write it. It has no weights itself.

    To be called with the map, by who reads it. Usually that holds just the channels in use, so it is given back. In a
    `wide` network it holds all of them, and ``option_k(x)`` is x with zeros where option k has no channel: the reader
    gives the same as without them, and the options become comparable (FBNetV2, arXiv 2004.05565, section 3.1).

    Shape: ``[N, channels in use, H, W]``, unchanged; wide, ``[N, channels, H, W]``.
    """

    def __init__(self, channels: Channels) -> None:
        super().__init__()
        self.choice, self.channels = channels.choice, channels
        self.active = max(zip(channels.widths, channels.choice.options, strict=True))[1]
        self.wide = False

    def width(self, value: Any) -> int:
        """Channels of a segment that are in use under an option."""
        return self.channels.widths[self.choice.index(value)]

    @property
    def whole(self) -> bool:
        """Whether every channel is there."""
        return self.wide or self.width(self.active) == self.channels.widest

    def of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """What is in use of a tensor with a slice for every channel along `dim`: a view of it, or a copy where it has
        several segments.
        """
        if self.whole:
            return tensor
        starts = range(0, tensor.shape[dim], self.channels.widest)
        parts = [tensor.narrow(dim, start, self.width(self.active)) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def has(self, value: Any, like: Tensor) -> Tensor:
        """1 for the channels of an option and 0 for the others, ``[channels, 1, 1]``."""
        ones = like.new_ones(self.width(value))
        segment = F.pad(ones, (0, self.channels.widest - len(ones)))
        return segment.repeat(self.channels.segments)[:, None, None]

    def option(self, value: Any, x: Tensor) -> Tensor:
        return x * self.has(value, x)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        shares = [gate * self.has(value, gates) for gate, value in zip(gates, self.choice.options, strict=True)]
        return x * torch.stack(shares).sum(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x) if self.wide else x

    def plain(self) -> nn.Module:
        return nn.Identity()


@contextlib.contextmanager
def wide(leaves: Sequence[Elastic]) -> Iterator[None]:
    """Inside, every map has all its channels, and who reads it counts those that are in use: the same outputs, for the
    price of the widest blocks. So options of a width can be weighed against each other.
    """
    cuts = [leaf for leaf in leaves if isinstance(leaf, Cut)]
    try:
        for cut in cuts:
            cut.wide = True
        yield
    finally:
        for cut in cuts:
            cut.wide = False


def cuts_of(c_in: int | Channels, c_out: int | Channels, groups: int | Channels) -> tuple[Cut | None, Cut | None]:
    """Of a convolution, for what it reads and for what it writes; None where that is not open.

    With `groups` open every channel is convolved alone, so that none reads another.
    """
    reads = Cut(c_in) if isinstance(c_in, Channels) and not isinstance(groups, Channels) else None
    return reads, Cut(c_out) if isinstance(c_out, Channels) else None


def in_use(tensor: Tensor, cut: Cut | None, dim: int = 0) -> Tensor:
    """As `Cut.of`; all of it where nothing is open."""
    return tensor if cut is None else cut.of(tensor, dim)


class PointwiseConv2d(nn.Conv2d):
    """A strided 1x1 convolution that drops the cells which it does not read before it runs: the same numbers.

    torch 2.13 on CPUs corrupts memory in the backward pass of the usual form, for fewer than 16 channels in the
    channels_last format. Shape: ``[N, c_in, H, W] -> [N, c_out, ceil(H / stride), ceil(W / stride)]``
    """

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(x[:, :, ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def convolution(
    c_in: int, c_out: int, kernel: int, stride: int, padding: int, dilation: int, groups: int, bias: bool
) -> nn.Conv2d:
    """The torch module of a convolution with plain values."""
    kind = PointwiseConv2d if kernel == 1 and stride > 1 and padding == 0 else nn.Conv2d
    return kind(c_in, c_out, kernel, stride, padding, dilation, groups, bias)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int) -> Tensor:
    """The convolution of a map by an odd kernel that keeps its size; how many groups, the two shapes say."""
    size, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    if size == 1 and stride > 1:  # as PointwiseConv2d
        return F.conv2d(x[:, :, ::stride, ::stride], weight, bias, groups=groups)
    return F.conv2d(x, weight, bias, stride, dilation * (size - 1) // 2, dilation, groups)


def with_weights(weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int) -> nn.Conv2d:
    """The torch module of such a convolution, with a copy of its weights."""
    c_out, c_in_group, size = weight.shape[:3]
    padding = dilation * (size - 1) // 2
    new = convolution(c_in_group * groups, c_out, size, stride, padding, dilation, groups, bias is not None)
    new.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        if bias is not None and new.bias is not None:
            new.bias.copy_(bias)
    return new


class SlicedConv2d(nn.Conv2d):
    """A convolution of one odd kernel that reads or writes channels inside a block whose number is open: it uses the
    part of its weight that is for the channels in use. It is no leaf, what it asks is.

    Padding keeps the map size. Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int | Channels,
        c_out: int | Channels,
        kernel: int,
        stride: int = 1,
        groups: int | Channels = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        assert kernel % 2 == 1, "blocks with channels inside keep the size of their maps"
        padding = dilation * (kernel - 1) // 2
        super().__init__(int(c_in), int(c_out), kernel, stride, padding, dilation, int(groups), bias)
        self.reads, self.writes = cuts_of(c_in, c_out, groups)

    def in_use(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[c_out, c_in / groups, kernel, kernel]`` and bias, as far as they are in use."""
        weight = in_use(in_use(self.weight, self.writes), self.reads, dim=1)
        return weight, None if self.bias is None else in_use(self.bias, self.writes)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.reads is None else self.reads(x)
        return convolved(x, *self.in_use(), self.stride[0], self.dilation[0])

    def plain(self) -> nn.Module:
        weight, bias = self.in_use()
        groups = len(weight) if self.groups > 1 else 1  # one a channel, or one for all: see `models.ops.primitives`
        return with_weights(weight, bias, self.stride[0], self.dilation[0], groups)


class ElasticConv2d(nn.Module):
    """A convolution of several kernel sizes over one weight (Once-for-all, arXiv 1908.09791).

    A smaller kernel is the centre of the next larger one through a learned matrix: ``W_k = unvec(T_k vec(centre))``
    with T_k ``[k * k, k * k]``, one for each smaller size over 1, shared by all pairs of channels and the identity at
    the start. Sizes follow each other, 7 -> 5 -> 3. A 1x1 kernel is the middle of the largest weight itself.

    What it reads or writes may be `Channels` inside a block: as in `SlicedConv2d`.

    Padding keeps the map size. Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int | Channels,
        c_out: int | Channels,
        kernel: Choice,
        stride: int = 1,
        groups: int | Channels = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not all(isinstance(option, int) and option % 2 == 1 for option in kernel.options):
            raise ValueError(f"kernel sizes that share one centre are odd, got {list(kernel.options)}")
        self.choice = kernel
        self.active = max(kernel.options)
        self.stride, self.groups, self.dilation = stride, int(groups), dilation
        # only for torch's initialisation
        largest = nn.Conv2d(int(c_in), int(c_out), self.active, groups=self.groups, bias=bias)
        self.weight, self.bias = largest.weight, largest.bias
        self.reads, self.writes = cuts_of(c_in, c_out, groups)
        self.depthwise = isinstance(groups, Channels)
        self.smaller = sorted((size for size in kernel.options if 1 < size < self.active), reverse=True)
        self.transforms = nn.ParameterDict({str(size): torch.eye(size * size) for size in self.smaller})
        self._mark()

    def _mark(self) -> None:
        for transform in self.transforms.values():
            transform.no_decay = True  # decay would pull it to zero, not to the identity

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # a deep copy of a parameter forgets what was written on it

    def kernel(self, size: int) -> Tensor:
        """The weight of a kernel size, ``[c_out, c_in / groups, size, size]``, as far as it is in use."""
        weight = in_use(in_use(self.weight, self.writes), self.reads, dim=1)
        if size == 1:
            return _centre(weight, 1)
        for step in self.smaller:
            if step >= size:
                centre = _centre(weight, step)
                weight = F.linear(centre.flatten(2), self.transforms[str(step)]).view(centre.shape)
        return weight

    def offset(self) -> Tensor | None:
        return None if self.bias is None else in_use(self.bias, self.writes)

    def option(self, value: int, x: Tensor) -> Tensor:
        x = x if self.reads is None else self.reads(x)
        return convolved(x, self.kernel(value), self.offset(), self.stride, self.dilation)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        """One convolution: ``W = sum_k gates[k] pad(W_k)``, smaller kernels with zeros around them."""
        x = x if self.reads is None else self.reads(x)
        largest = self.weight.shape[-1]
        smaller = [(gate, size) for gate, size in zip(gates, self.choice.options, strict=True) if size < largest]
        weight = gates[self.choice.index(largest)] * self.weight
        for gate, size in smaller:
            weight = weight + F.pad(gate * self.kernel(size), ((largest - size) // 2,) * 4)
        bias = None if self.bias is None else gates.sum() * self.bias
        return convolved(x, weight, bias, self.stride, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        weight = self.kernel(self.active)
        groups = len(weight) if self.depthwise else self.groups
        return with_weights(weight, self.offset(), self.stride, self.dilation, groups)


def _centre(weight: Tensor, size: int) -> Tensor:
    """The middle ``size x size`` of a kernel ``[c_out, c_in, k, k]``, as a view."""
    margin = (weight.shape[-1] - size) // 2
    return weight[:, :, margin : margin + size, margin : margin + size]


class ElasticActivation(nn.Module):
    """One of several activation functions. Shape: any, unchanged."""

    def __init__(self, act: Choice, make: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.choice = act
        self.active = act.options[0]
        self.functions = nn.ModuleList(make(option) for option in act.options)

    def option(self, value: str, x: Tensor) -> Tensor:
        return self.functions[self.choice.index(value)](x)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        return MixedActivation.apply(x, gates, tuple(self.functions))

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        return self.functions[self.choice.index(self.active)]


class MixedActivation(torch.autograd.Function):
    """``y = sum_k gates[k] f_k(x)`` of functions of each number by itself, which are run again in the backward pass: it
    remembers x, as one of them alone would, and not what each of them needs.

    Shape: any, unchanged; gates ``[functions]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, functions: tuple[nn.Module, ...]) -> Tensor:
        ctx.save_for_backward(x, gates)
        ctx.functions = functions
        y = torch.zeros_like(x)
        for gate, function in zip(gates.to(x.dtype), functions, strict=True):
            y.addcmul_(function(x), gate)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gates = ctx.saved_tensors
        dx, dgates = torch.zeros_like(x), torch.zeros_like(gates)
        for place, (gate, function) in enumerate(zip(gates.to(x.dtype), ctx.functions, strict=True)):
            with torch.enable_grad():
                x_k = x.detach().requires_grad_()
                y_k = function(x_k).view_as(x_k)  # an identity would hand on x itself
            if ctx.needs_input_grad[1]:
                dgates[place] = (y_k.detach() * dy).sum(dtype=gates.dtype)
            if ctx.needs_input_grad[0]:
                dx.addcmul_(torch.autograd.grad(y_k, x_k, dy)[0], gate)
        return dx, dgates, None


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm of channels inside a block whose number is open. A channel has its scale, shift and statistics, one
    set for all widths that it is in use under; what is not in use is not touched. It is no leaf, what it asks is.

    The statistics that weight steps leave are a mixture over widths, as they are over all other choices: a subnet gets
    its own (`engine.calibrate`).

    Shape: ``[N, channels in use, H, W]``, unchanged.
    """

    def __init__(self, channels: Channels, eps: float, momentum: float) -> None:
        super().__init__(int(channels), eps=eps, momentum=momentum)
        self.cut = Cut(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.cut.whole:
            return super().forward(x)
        assert self.num_batches_tracked is not None and self.momentum is not None
        weight, bias = self.cut.of(self.weight), self.cut.of(self.bias)
        if self.training and not self.track_running_stats:
            return F.batch_norm(x, None, None, weight, bias, True, self.momentum, self.eps)
        assert self.running_mean is not None and self.running_var is not None
        mean, variance = self.cut.of(self.running_mean), self.cut.of(self.running_var)
        y = F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)
        if self.training:
            self.num_batches_tracked.add_(1)
            segments = self.cut.channels.segments
            if segments > 1:  # these were copies. By `data`, as torch does: a backward to come may hold the buffer
                for buffer, found in ((self.running_mean, mean), (self.running_var, variance)):
                    buffer.data.view(segments, -1)[:, : len(found) // segments] = found.view(segments, -1)
        return y

    def plain(self) -> nn.Module:
        of = self.cut.of
        new = nn.BatchNorm2d(len(of(self.weight)), self.eps, self.momentum)
        new.to(device=self.weight.device, dtype=self.weight.dtype)
        new.load_state_dict({k: v if v.dim() == 0 else of(v) for k, v in self.state_dict().items()})
        return new


class SwitchableNorm(nn.Module):
    """A norm of its own for every option of the choice it follows, since their statistics differ.

    Each is a batch norm, or again one of these, that follows another choice.

    Shape: ``[N, channels, H, W]``, unchanged.
    """

    def __init__(self, follows: Choice, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.choice = follows
        self.active = follows.options[0]
        self.norms = nn.ModuleList(make() for _ in follows.options)

    def option(self, value: Any, x: Tensor) -> Tensor:
        return self.norms[self.choice.index(value)](x)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        """In training all norms divide by the same statistics of the batch, so it is one norm with the mixed scale and
        shift. It moves no running statistics: those of a mixture fit no subnet.
        """
        first = self.norms[0]
        if not isinstance(first, _BatchNorm) or not self.training:
            return sum_of_options(self, gates, x)
        weight = sum(gate * norm.weight for gate, norm in zip(gates, self.norms, strict=True))
        bias = sum(gate * norm.bias for gate, norm in zip(gates, self.norms, strict=True))
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=first.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        return self.norms[self.choice.index(self.active)]


class ElasticSequential(nn.Module):
    """The first `active` of a row of blocks. Every count of the choice is a prefix of the longest.

    `bare`: a single block stands for itself in a derived network, not in an ``nn.Sequential`` of one.
    """

    def __init__(self, number: Choice, make: Callable[[int], nn.Module], bare: bool = False) -> None:
        super().__init__()
        self.choice, self.bare = number, bare
        self.active = max(number.options)
        for index in range(self.active):
            self.add_module(str(index), make(index))  # the keys that nn.Sequential has

    def blocks(self) -> list[nn.Module]:
        return list(self.children())

    def option(self, value: int, x: Tensor) -> Tensor:
        for block in self.blocks()[:value]:
            x = block(x)
        return x

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        """Every block runs once: the sum is over what the first, the second, ... of them gives."""
        total: Any = 0
        for index, block in enumerate(self.blocks()):
            x = block(x)
            if index + 1 in self.choice.options:
                total = total + gates[self.choice.index(index + 1)] * x
        return total

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        blocks = self.blocks()[: self.active]
        return blocks[0] if self.bare and len(blocks) == 1 else nn.Sequential(*blocks)


class IndependentRow(nn.Module):
    """Complete blocks side by side, one for every combination of a row's options (TANGO, ProxylessNAS).

    Each says what it says, `WithAux` or not.
    """

    def __init__(self, combinations: Choice, make: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.choice = combinations
        self.active = combinations.options[0]
        self.candidates = nn.ModuleList(make(option) for option in combinations.options)

    def candidate(self, value: Any) -> nn.Module:
        return self.candidates[self.choice.index(value)]

    def option(self, value: Any, x: Tensor) -> Any:
        return self.candidate(value)(x)

    def forward(self, x: Tensor) -> Any:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        return self.candidate(self.active)


def plain_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of the derived network: `module` with all that has a `plain()` as that, at any depth."""
    plain: Callable[[], nn.Module] | None = getattr(module, "plain", None)
    if plain is not None:
        return plain_state(plain(), prefix)
    own = {
        name: tensor
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if name not in module._non_persistent_buffers_set
    }
    state = {prefix + name: tensor.detach() for name, tensor in own.items()}
    for name, child in module.named_children():
        state.update(plain_state(child, f"{prefix}{name}."))
    return state
