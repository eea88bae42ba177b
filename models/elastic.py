"""Leaves that hold every option of a choice, made by `models.ops.primitives` where a YAML left one open.

All of them work alike. `active` is the option in use, `option(value, x)` is what the leaf computes under an option,
`plain()` is the torch module that a derived network has in its place. In a `blended` network a leaf computes its
``mixture(gates, x) = sum_k gates[k] option_k(x)``; it has a method for that where running every option would be dearer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    active. Gates are any numbers, and differentiable.
    """
    forwards = [
        (leaf, partial(getattr(leaf, "mixture", partial(sum_of_options, leaf)), gates[leaf.choice.name]))
        for leaf in cast(Sequence[Any], leaves)
    ]
    try:
        for leaf, forward in forwards:
            leaf.forward = forward
        yield
    finally:
        for leaf, _ in forwards:
            del leaf.forward  # the class's own is back


def sum_of_options(leaf: Elastic, gates: Tensor, x: Any) -> Any:
    """``sum_k gates[k] option_k(x)``, every option run."""
    terms = [gate * leaf.option(value, x) for gate, value in zip(gates, leaf.choice.options, strict=True)]
    return sum(terms[1:], start=terms[0])


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


class ElasticConv2d(nn.Module):
    """A convolution of several kernel sizes over one weight (Once-for-all, arXiv 1908.09791).

    A smaller kernel is the centre of the next larger one through a learned matrix: ``W_k = unvec(T_k vec(centre))``
    with T_k ``[k * k, k * k]``, one for each smaller size over 1, shared by all pairs of channels and the identity at
    the start. Sizes follow each other, 7 -> 5 -> 3. A 1x1 kernel is the middle of the largest weight itself.

    Padding keeps the map size. Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: Choice,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not all(isinstance(option, int) and option % 2 == 1 for option in kernel.options):
            raise ValueError(f"kernel sizes that share one centre are odd, got {list(kernel.options)}")
        self.choice = kernel
        self.active = max(kernel.options)
        largest = nn.Conv2d(c_in, c_out, self.active, groups=groups, bias=bias)  # only for torch's initialisation
        self.weight, self.bias = largest.weight, largest.bias
        self.stride, self.groups, self.dilation = stride, groups, dilation
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
        """The weight of a kernel size, ``[c_out, c_in / groups, size, size]``."""
        weight: Tensor = self.weight
        if size == 1:
            return _centre(weight, 1)
        for step in self.smaller:
            if step >= size:
                centre = _centre(weight, step)
                weight = F.linear(centre.flatten(2), self.transforms[str(step)]).view(centre.shape)
        return weight

    def option(self, value: int, x: Tensor) -> Tensor:
        padding = self.dilation * (value - 1) // 2
        if value == 1 and self.stride > 1:  # as PointwiseConv2d
            return F.conv2d(x[:, :, :: self.stride, :: self.stride], self.kernel(1), self.bias, groups=self.groups)
        return F.conv2d(x, self.kernel(value), self.bias, self.stride, padding, self.dilation, self.groups)

    def mixture(self, gates: Tensor, x: Tensor) -> Tensor:
        """One convolution: ``W = sum_k gates[k] pad(W_k)``, smaller kernels with zeros around them."""
        largest = self.weight.shape[-1]
        smaller = [(gate, size) for gate, size in zip(gates, self.choice.options, strict=True) if size < largest]
        weight = gates[self.choice.index(largest)] * self.weight
        for gate, size in smaller:
            weight = weight + F.pad(gate * self.kernel(size), ((largest - size) // 2,) * 4)
        bias = None if self.bias is None else gates.sum() * self.bias
        return F.conv2d(x, weight, bias, self.stride, self.dilation * (largest - 1) // 2, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.option(self.active, x)

    def plain(self) -> nn.Module:
        c_out, c_in_group = self.weight.shape[:2]
        padding = self.dilation * (self.active - 1) // 2
        c_in, bias = c_in_group * self.groups, self.bias is not None
        new = convolution(c_in, c_out, self.active, self.stride, padding, self.dilation, self.groups, bias)
        new.to(device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(self.kernel(self.active))
            if self.bias is not None and new.bias is not None:
                new.bias.copy_(self.bias)
        return new


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
    """The state dict of the derived network: `module` with every elastic leaf as its `plain()`, at any depth."""
    if isinstance(module, Elastic):
        return plain_state(module.plain(), prefix)
    own = {
        name: tensor
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if name not in module._non_persistent_buffers_set
    }
    state = {prefix + name: tensor.detach() for name, tensor in own.items()}
    for name, child in module.named_children():
        state.update(plain_state(child, f"{prefix}{name}."))
    return state
