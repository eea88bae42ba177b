"""Batch-norm statistics estimated anew, for a subnet that inherits shared weights and for the end of a short run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def calibrate(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Sets running mean and variance of every batch norm to those of `images`, batches ``[N, 3, H, W]`` in [0, 1].

    Moments are pooled exactly over all images: ``var = E[x^2] - E[x]^2``, so the part between batches counts as well,
    and the result depends on batch size only through what the layers before see. Modes are left as they were.
    """
    calibrate_by(network, lambda batch: network(batch), images)


@torch.no_grad()
def in_float64(tensor: Tensor) -> Tensor:
    """On the CPU of a Mac, whose GPU has no float64."""
    return (tensor.cpu() if tensor.is_mps else tensor).double()


def calibrate_by(
    module: nn.Module,
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
) -> None:
    """As `calibrate`, for the norms below `module` that ``forward(batch)`` runs through; others keep what they have.

    It runs in float32, also inside an autocast. With several processes, `reduce` adds each of its tensors up over all
    of them, in place: counts, sums and sums of squares, in float64, of every norm. The processes then agree, also on
    norms that only some of them ran through.
    """
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    sums: dict[_BatchNorm, Tensor] = {}  # [1 + 2 * channels]: number of values a channel, their sum, that of squares

    def collect(norm: _BatchNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not norm.training:  # an op kept it from a batch of a single value
            return
        count = inputs[0].numel() / inputs[0].shape[1]
        assert norm.running_mean is not None and norm.running_var is not None
        mean = in_float64(norm.running_mean)  # momentum 1: just this batch
        square = in_float64(norm.running_var) * ((count - 1) / count) + mean**2
        total = torch.cat((mean.new_ones(1), mean, square)) * count
        sums[norm] = sums[norm] + total if norm in sums else total

    hooks = [norm.register_forward_hook(collect) for norm in norms]
    before = [(norm, norm.training, norm.momentum, int(norm.num_batches_tracked or 0)) for norm in norms]
    place = next(module.buffers(), torch.empty(0)).device.type
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        with torch.autocast(place, enabled=False):
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, training, momentum, tracked in before:
            norm.training, norm.momentum = training, momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(tracked)  # of training, as it was
    if reduce is not None:
        for norm in norms:
            assert norm.running_mean is not None
            sums.setdefault(norm, norm.running_mean.new_zeros(1 + 2 * len(norm.running_mean), dtype=torch.float64))
        reduce([sums[norm] for norm in norms])
    for norm, total in sums.items():
        n = float(total[0])
        if n == 0:
            continue
        mean, square = (total[1:] / n).chunk(2)
        variance = (square - mean**2).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance * (n / max(n - 1, 1)))  # torch keeps the unbiased one
