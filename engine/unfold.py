"""Batch norms that an exporter folded away, unfolded again before a network is trained on.

An imported network (`models.onnx_weights`) has norms that only add a bias. In training they would take the mean and
the deviation of each channel away, which the folded weights are not made for: the network would forget what it knows at
its first step. With the statistics of images that it is trained on, and a scale and a bias that undo them, a norm does
the same as before, in eval mode exactly, in training as far as a batch is like these images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.checkpoint import Checkpoint, restore
from models.network import Network
from models.onnx_weights import adds_only
from models.ops.conv import Conv


def with_statistics(origin: Checkpoint, images: Callable[[], Iterable[Tensor]]) -> tuple[Checkpoint, str | None]:
    """A checkpoint whose folded norms have the statistics of `images`, and a line that says so; else `origin`, None.

    ``images()`` gives batches ``[N, 3, H, W]`` in [0, 1]; it is only called where there is such a norm.
    """
    means = [tensor for name, tensor in origin.state.items() if name.endswith(".running_mean")]
    if origin.spec.choices or all(mean.any() for mean in means):
        return origin, None
    network = restore(origin)
    number = len(folded(network))
    if not number:
        return origin, None
    unfold(network, images())
    line = f"{origin.path}: {number} norms were folded into convolutions, they get statistics of these images"
    return replace(origin, state=network.state_dict()), line


def folded(network: nn.Module) -> list[Conv]:
    """The convolution blocks whose norm only adds a bias."""
    blocks = [module for module in network.modules() if isinstance(module, Conv)]
    return [block for block in blocks if isinstance(block.bn, nn.BatchNorm2d) and adds_only(block.bn)]


@torch.no_grad()
def unfold(network: Network, images: Iterable[Tensor]) -> None:
    """Gives every folded norm the mean and variance of what it gets for `images`, and a scale and bias that undo them.

    The weights of a convolution before a norm have no size of their own, so each filter gets the one that new filters
    have (`models.network`): what was folded into it, and the 255 of an input of bytes, would else decide how fast it
    learns. In eval mode the network stays the function that it was, up to rounding.
    """
    blocks = folded(network)
    sums: dict[nn.Module, Tensor] = {}  # [3, channels]: number of values, their sum, that of their squares

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        count = x.new_full((x.shape[1],), x.numel() / x.shape[1])
        total = torch.stack((count, x.sum(dim=(0, 2, 3)), (x**2).sum(dim=(0, 2, 3))))
        sums[norm] = sums[norm] + total if norm in sums else total

    hooks = [block.bn.register_forward_pre_hook(collect) for block in blocks]
    try:
        network.eval()
        for batch in images:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for block in blocks:
        if block.bn in sums:
            conv, norm = block.conv, block.bn
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            n, total, squares = sums[norm]
            mean, variance = total / n, (squares / n - (total / n) ** 2).clamp(min=0)
            _give(conv, norm, mean, variance)


def _give(conv: nn.Conv2d, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """``y = x + b`` written as ``g (s x - s m) / sqrt(s^2 v + eps) + (b + m)``: s makes the filter as large as a new
    one, and ``g = sqrt(s^2 v + eps) / s``."""
    assert norm.running_mean is not None and norm.running_var is not None
    fan_out = conv.weight[:, 0].numel() / conv.groups
    wanted = math.sqrt(2 / fan_out * conv.weight[0].numel())  # the length of a filter of independent normal weights
    length = conv.weight.double().flatten(1).norm(dim=1)
    size = torch.where(length > 0, wanted / length, 1.0)
    conv.weight.mul_(size[:, None, None, None])
    variance = variance * size**2
    norm.running_mean.copy_(mean * size)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt() / size)
    norm.bias.copy_(norm.bias + mean)
