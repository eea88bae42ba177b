"""Batch norms folded into the convolutions before them: the same outputs from fewer weights and steps.

Blocks that train as several branches say themselves what they are in one: they have a method `fold`.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.network import Network
from models.ops.conv import Conv


class Folded(nn.Module):
    """Where a batch norm stood that is now part of the convolution before it. Shape: any, unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("a fused network has no batch norms left to train; train the network it was made from")
        return x


def fuse(network: Network) -> Network:
    """A copy of `network` in eval mode with every norm that directly follows a convolution folded into it.

    In eval mode a norm is ``y = g (x - m) / sqrt(v + eps) + b``, linear in what the convolution gives, so a convolution
    of weight ``g w / sqrt(v + eps)`` and bias ``b - g m / sqrt(v + eps)`` replaces both. A norm behind a concatenation
    (BottleneckCSP, SPPCSP, ...) stays. Then what has a method `fold` (`RepConv`: one convolution; `v10Detect`: the head
    that decodes) is replaced by what that gives. The copy is for inference only: its forward raises RuntimeError in
    training mode, and its state dict is no longer that of its YAML.
    """
    assert not network.spec.choices, "fuse a derived network: what a norm follows is open in a supernet"
    fused = deepcopy(network).eval()
    for parent, convolution, norm in list(_pairs(fused)):
        conv, bn = parent.get_submodule(convolution), parent.get_submodule(norm)
        if not isinstance(conv, nn.Conv2d) or not isinstance(bn, nn.BatchNorm2d) or bn.running_mean is None:
            continue
        parent.set_submodule(convolution, fuse_conv_bn_eval(conv, bn))
        parent.set_submodule(norm, Folded().eval())
    for name, module in [*fused.named_modules()]:
        if callable(getattr(module, "fold", None)):
            fused.set_submodule(name, module.fold().eval())
    return fused


def _pairs(network: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Where one module takes just what another gives, as far as that can be known: in `Conv`, in a row of modules, and
    where a class lists such pairs as `folded`.

    The forward of any other module is its own affair.
    """
    for module in network.modules():
        if type(module).forward is Conv.forward:
            yield module, "conv", "bn"
        elif type(module).forward is nn.Sequential.forward:
            names = [name for name, _ in module.named_children()]
            yield from ((module, first, second) for first, second in zip(names, names[1:], strict=False))
        yield from ((module, first, second) for first, second in getattr(module, "folded", ()))
