"""Batch-norm statistics estimated anew, for a subnet that inherits shared weights and for the end of a short run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def calibrate(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Sets running mean and variance of every batch norm to those of `images`, batches ``[N, 3, H, W]`` in [0, 1].

    Moments are pooled exactly over all images: ``var = E[x^2] - E[x]^2``, so the part between batches counts as well,
    and the result depends on batch size only through what the layers before see. Modes are left as they were.
    """
    calibrate_by(network, lambda batch: network(batch), images)


@torch.no_grad()
def calibrate_by(module: nn.Module, forward: Any, batches: Iterable[Any]) -> None:
    """As `calibrate`, for the norms below `module` that `forward(batch)` runs through."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    sums: dict[nn.BatchNorm2d, tuple[float, Tensor, Tensor]] = {}

    def collect(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = inputs[0].numel() / inputs[0].shape[1]
        assert norm.running_mean is not None and norm.running_var is not None
        mean = norm.running_mean.double()  # momentum 1: just this batch
        square = norm.running_var.double() * ((count - 1) / count) + mean**2
        n, total_mean, total_square = sums.get(norm, (0.0, torch.zeros_like(mean), torch.zeros_like(mean)))
        sums[norm] = (n + count, total_mean + count * mean, total_square + count * square)

    hooks = [norm.register_forward_hook(collect) for norm in norms]
    before = [(norm, norm.training, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        for batch in batches:
            forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, training, momentum in before:
            norm.training, norm.momentum = training, momentum
    for norm, (n, total_mean, total_square) in sums.items():
        mean = total_mean / n
        variance = (total_square / n - mean**2).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance * (n / max(n - 1, 1)))  # torch keeps the unbiased one
