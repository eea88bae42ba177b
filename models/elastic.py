"""Leaves that hold every option of a choice, made by `models.ops.primitives` where a YAML left one open.

All of them work alike. `active` is the option in use, `option(value, x)` is what the leaf computes under an option,
`plain()` is the torch module that a derived network has in its place. While `gates` is set (see `mixing`), the forward
is the mixture of ProxylessNAS, ``y = sum_k g_k o_k(x)``: with one-hot gates its value is that of the active option, and
autograd hands ``dL/dg_k = <o_k, dL/dy>`` to the gates without running backward through the options not in use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.spec import Choice


@runtime_checkable
class Elastic(Protocol):
    """What a leaf offers to the supernet."""

    choice: Choice
    active: Any
    gates: Tensor | None

    def option(self, value: Any, x: Tensor) -> Tensor: ...

    def plain(self) -> nn.Module: ...


def elastic_leaves(module: nn.Module) -> Iterator[tuple[str, Elastic]]:
    """Every elastic leaf below `module`, in the order of the network."""
    for name, child in module.named_modules():
        if isinstance(child, Elastic):
            yield name, child


@contextlib.contextmanager
def mixing(module: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every leaf mixes its options by the gates ``[options]`` of its choice; nothing stays on a leaf after."""
    leaves = [leaf for _, leaf in elastic_leaves(module)]
    try:
        for leaf in leaves:
            leaf.gates = gates[leaf.choice.name]
        yield
    finally:
        for leaf in leaves:
            leaf.gates = None


def _mixed(leaf: Elastic, x: Tensor) -> Tensor:
    """The active option's output; under `mixing`, ``sum_k g_k o_k`` with the other options held constant."""
    y = leaf.option(leaf.active, x)
    if leaf.gates is None:
        return y
    outputs = []
    for value in leaf.choice.options:
        if value == leaf.active:
            outputs.append(y)
        else:
            with torch.no_grad():
                outputs.append(leaf.option(value, x))
    return _blend(leaf.gates, outputs)


def _blend(gates: Tensor, outputs: list[Tensor]) -> Tensor:
    terms = [gate * output for gate, output in zip(gates.unbind(), outputs, strict=True)]
    return torch.stack(terms).sum(dim=0)


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
    """A convolution of several kernel sizes over one weight: a smaller kernel is the centre of the largest.

    Padding keeps the map size. Shape: ``[N, c_in, H, W] -> [N, c_out, H // stride, W // stride]``
    """

    gates: Tensor | None = None

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

    def kernel(self, size: int) -> Tensor:
        """The weight of a kernel size, ``[c_out, c_in / groups, size, size]``: a view of the largest one's centre."""
        margin = (self.weight.shape[-1] - size) // 2
        return self.weight[:, :, margin : margin + size, margin : margin + size]

    def option(self, value: int, x: Tensor) -> Tensor:
        padding = self.dilation * (value - 1) // 2
        if value == 1 and self.stride > 1:  # as PointwiseConv2d
            return F.conv2d(x[:, :, :: self.stride, :: self.stride], self.kernel(1), self.bias, groups=self.groups)
        return F.conv2d(x, self.kernel(value), self.bias, self.stride, padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self, x)

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


class ElasticActivation(nn.Module):
    """One of several activation functions. Shape: any, unchanged."""

    gates: Tensor | None = None

    def __init__(self, act: Choice, make: Callable[[str], nn.Module]) -> None:
        super().__init__()
        self.choice = act
        self.active = act.options[0]
        self.functions = nn.ModuleList(make(option) for option in act.options)

    def option(self, value: str, x: Tensor) -> Tensor:
        return self.functions[self.choice.options.index(value)](x)

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self, x)

    def plain(self) -> nn.Module:
        return self.functions[self.choice.options.index(self.active)]


class SwitchableNorm(nn.Module):
    """A batch norm of its own for every option of the choice it follows, since their statistics differ.

    Shape: ``[N, channels, H, W]``, unchanged.
    """

    gates: Tensor | None = None

    def __init__(self, follows: Choice, make: Callable[[], nn.BatchNorm2d]) -> None:
        super().__init__()
        self.choice = follows
        self.active = follows.options[0]
        self.norms = nn.ModuleList(make() for _ in follows.options)

    def option(self, value: Any, x: Tensor) -> Tensor:
        return self.norms[self.choice.options.index(value)](x)

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self, x)

    def plain(self) -> nn.Module:
        return self.norms[self.choice.options.index(self.active)]


class ElasticSequential(nn.Module):
    """The first `active` of a row of blocks. Every count of the choice is a prefix of the longest.

    `bare`: a single block stands for itself in a derived network, not in an ``nn.Sequential`` of one.
    """

    gates: Tensor | None = None

    def __init__(self, number: Choice, make: Callable[[], nn.Module], bare: bool = False) -> None:
        super().__init__()
        self.choice, self.bare = number, bare
        self.active = max(number.options)
        for index in range(self.active):
            self.add_module(str(index), make())  # the keys that nn.Sequential has

    def blocks(self) -> list[nn.Module]:
        return list(self.children())

    def option(self, value: int, x: Tensor) -> Tensor:
        for block in self.blocks()[:value]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.gates is None:
            return self.option(self.active, x)
        # Each prefix is computed once: those up to the active one lie on its path, the longer ones are only looked at.
        prefixes = []
        for index, block in enumerate(self.blocks(), start=1):
            if index <= self.active:
                x = block(x)
                prefixes.append(x if index == self.active else x.detach())
            else:
                with torch.no_grad(), _one_path(block):
                    x = block(x)
                prefixes.append(x)
        return _blend(self.gates, [prefixes[count - 1] for count in self.choice.options])

    def plain(self) -> nn.Module:
        blocks = self.blocks()[: self.active]
        return blocks[0] if self.bare and len(blocks) == 1 else nn.Sequential(*blocks)


@contextlib.contextmanager
def _one_path(module: nn.Module) -> Iterator[None]:
    """Inside, the leaves below run their active option only: a constant branch needs no mixture."""
    held = [(leaf, leaf.gates) for _, leaf in elastic_leaves(module)]
    try:
        for leaf, _ in held:
            leaf.gates = None
        yield
    finally:
        for leaf, gates in held:
            leaf.gates = gates


class IndependentRow(nn.Module):
    """Complete blocks side by side, one for every combination of a row's options (TANGO, ProxylessNAS)."""

    gates: Tensor | None = None

    def __init__(self, combinations: Choice, make: Callable[[Any], nn.Module]) -> None:
        super().__init__()
        self.choice = combinations
        self.active = combinations.options[0]
        self.candidates = nn.ModuleList(make(option) for option in combinations.options)

    def option(self, value: Any, x: Tensor) -> Tensor:
        return self.candidates[self.choice.options.index(value)](x)

    def forward(self, x: Tensor) -> Tensor:
        return _mixed(self, x)

    def plain(self) -> nn.Module:
        return self.candidates[self.choice.options.index(self.active)]


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
