"""How weights move: parameter groups, the optimizer, the learning rate over a run, and the averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]

LEARNING_RATES = {"SGD": 0.01, "AdamW": 0.005}  # where --lr0 names none
SHORT_RUN = 2_000  # steps; fewer are too few for SGD


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: weights of convolutions and linear layers decay; norms, biases and what says ``no_decay`` do not."""
    decay: list[Tensor] = []
    still: list[Tensor] = []
    for parameter in network.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not getattr(parameter, "no_decay", False)
            (decay if decays else still).append(parameter)
    groups = ((decay, weight_decay), (still, 0.0))
    return [{"params": parameters, "weight_decay": amount} for parameters, amount in groups if parameters]


def choose_optimizer(name: str, total_steps: int) -> str:
    """``auto`` becomes AdamW for a run under 2,000 steps, SGD otherwise; a name stays what it is."""
    return name if name != "auto" else "AdamW" if total_steps < SHORT_RUN else "SGD"


def make_optimizer(
    network: nn.Module, name: str, *, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """``SGD`` with Nesterov momentum, or ``AdamW`` whose first beta is the momentum."""
    groups = parameter_groups(network, weight_decay)
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=True)
    assert name == "SGD", name
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def lr_factor(step: int, total_steps: int, warmup_steps: int, last: float) -> float:
    """What the learning rate of ``step`` (from 0) is multiplied by: a cosine from 1 to ``last``, warmed up linearly."""
    progress = step / max(total_steps - 1, 1)
    cosine = last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2
    return cosine * min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_length(warmup_epochs: float, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up: the epochs asked for, but at most a tenth of the run."""
    return min(round(warmup_epochs * steps_per_epoch), total_steps // 10)


def averaged(network: nn.Module, total_steps: int, decay: float = 0.9999) -> AveragedModel:
    """A copy of ``network`` that follows it as an exponential moving average, buffers too.

    The decay grows as ``decay * (1 - exp(-updates / tau))``, so that the first weights are soon forgotten; ``tau``
    is 2,000 updates, or a fifth of a run that is shorter than 10,000.
    """
    tau = max(min(2_000, total_steps / 5), 1)

    @torch.no_grad()
    def follow(averages: Tensors, currents: Tensors, updates: Tensor | int) -> None:
        keep = decay * (1 - math.exp(-int(updates) / tau))
        if averages[0].is_floating_point():  # all of one kind: they come grouped by type
            torch._foreach_lerp_(averages, currents, 1 - keep)
        else:
            torch._foreach_copy_(averages, currents)  # counters

    return AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
