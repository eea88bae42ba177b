"""How weights move: parameter groups, the optimizer, the learning rate over a run, and the averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from engine.config import RunConfig

Tensors = tuple[Tensor, ...] | list[Tensor]

LEARNING_RATES = {"SGD": 0.01, "Adam": 0.002, "AdamW": 0.002}  # where --lr0 names none
SHORT_RUN = 2_000  # steps; fewer are too few for SGD
NOMINAL_BATCH = 64  # images whose summed loss SGD's learning rates are made for, as in yolov5; Adam has no scale


def parameter_groups(network: nn.Module, weight_decay: float, biases_apart: bool = False) -> list[dict[str, object]]:
    """Two groups: weights of convolutions and linear layers decay; norms, biases and what says ``no_decay`` do not.

    With `biases_apart` the biases are a third, which warms up otherwise (`set_rates`) and says so by ``bias``.
    """
    decay: list[Tensor] = []
    still: list[Tensor] = []
    biases: list[Tensor] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not getattr(parameter, "no_decay", False)
            apart = biases_apart and name.rpartition(".")[2] == "bias"
            (decay if decays else biases if apart else still).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": amount}
        for parameters, amount in ((decay, weight_decay), (still, 0.0))
        if parameters
    ]
    return [*groups, {"params": biases, "weight_decay": 0.0, "bias": True}] if biases else groups


def choose_optimizer(name: str, total_steps: int) -> str:
    """``auto`` becomes AdamW for a run under 2,000 steps, SGD otherwise; a name stays what it is."""
    return name if name != "auto" else "AdamW" if total_steps < SHORT_RUN else "SGD"


def make_optimizer(
    network: nn.Module, name: str, *, lr: float, momentum: float, weight_decay: float, biases_apart: bool = False
) -> torch.optim.Optimizer:
    """``SGD`` with Nesterov momentum, or ``Adam`` or ``AdamW`` whose first beta is the momentum."""
    groups = parameter_groups(network, weight_decay, biases_apart)
    if name in ("Adam", "AdamW"):
        kind = torch.optim.Adam if name == "Adam" else torch.optim.AdamW
        return kind(groups, lr=lr, betas=(momentum, 0.999), fused=True)
    assert name == "SGD", name
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def lr_factor(step: int, total_steps: int, warmup_steps: int, last: float, cosine: bool = True) -> float:
    """What the learning rate of ``step`` (from 0) is multiplied by: a cosine, or a line, from 1 to ``last``.

    The first steps are warmed up linearly.
    """
    progress = step / max(total_steps - 1, 1)
    falling = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1 - progress
    return (last + (1 - last) * falling) * min(1.0, (step + 1) / (warmup_steps + 1))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int, warmup_steps: int, config: RunConfig) -> None:
    """Sets the learning rate of a step, and what else warms up where the config asks for it, as in yolov5.

    Over the warm-up, momentum (or the first beta) goes from ``warmup_momentum`` to ``momentum``, and the learning rate
    of biases from ``warmup_bias_lr`` to that of the others.
    """
    warmed = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr
        if config.warmup_bias_lr is not None and group.get("bias"):
            group["lr"] = config.warmup_bias_lr + (lr - config.warmup_bias_lr) * warmed
        if config.warmup_momentum is not None:
            momentum = config.warmup_momentum + (config.momentum - config.warmup_momentum) * warmed
            if "betas" in group:
                group["betas"] = (momentum, group["betas"][1])
            else:
                group["momentum"] = momentum


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
