"""The one step of weights that training and search take: loss, gradients, their mean, clip, optimizer, moving average.

A step is `add_gradients` for each of its batches, then `move_weights`. Both stop the run, in all processes alike, where
a number is none any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from data.structures import Batch, Fault, Targets
from engine.distributed import World, average_gradients, average_numbers, together
from engine.evaluate import pixels
from models.distill import distillation_loss
from models.network import Network

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_NORM = 10.0  # of all gradients together; a longer one is scaled down to it
CHECKED_STEPS = 3  # in which several processes compare which weights have gradients
MULTI_SCALE = 4  # purpose of a random stream, beside those of data.dataset
SMALLEST, LARGEST = 0.5, 1.5  # times imgsz, of --multi-scale


@dataclass(frozen=True)
class Mover:
    """What moves the weights of a run: the same objects in every step of it."""

    network: Network
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    scaler: torch.amp.GradScaler
    world: World
    amp: str  # off, bf16 or fp16
    gain: float  # of the mean loss: `engine.optim.NOMINAL_BATCH` for SGD, whose learning rates are for its sum
    last: Path  # the checkpoint that is left where the run breaks down
    teacher: Network | None = None
    distill: float = 0.0  # gain of the loss against the teacher


@dataclass(frozen=True)
class Moment:
    """Where in a run a step is: its epoch from 1, its number from 0. For the fault of a run that breaks down."""

    epoch: int
    step: int


def add_gradients(
    mover: Mover, batch: Batch, at: Moment, *, part: float = 1.0, imgsz: int | None = None
) -> dict[str, float]:
    """Adds a batch's gradients to those of the step and returns its loss and the parts of it, over all processes.

    `part` is how much of the step this batch is. With `imgsz` the images are scaled to that longer side first. Raises a
    Fault where the loss is no finite number.
    """
    network, device = mover.network, mover.world.device
    images, targets = pixels(batch, device), batch.targets.to(device)
    if imgsz is not None:
        images, targets = scaled(images, targets, imgsz, network.max_stride)
    with autocast(device, mover.amp):
        outputs, aux = network(images)
    loss, parts = network.loss_from(outputs, targets, aux)
    if mover.teacher is not None:
        distance = distance_to_teacher(mover, images, outputs)
        loss, parts = loss + distance, {**parts, "distill": distance.detach()}
    own = {name: float(value) for name, value in {"loss": loss.detach(), **parts}.items()}
    values = average_numbers(own, mover.world)
    if not math.isfinite(values["loss"]):
        with together(mover.world):
            raise no_number("loss", own, at, mover.last)
    mover.scaler.scale(loss * part * mover.gain).backward()
    return values


def move_weights(mover: Mover, at: Moment, values: Mapping[str, float], *, check: bool) -> None:
    """The step itself, by the gradients that were added. Raises a Fault where they are no finite numbers.

    `check` is that of `average_gradients`; `values` are what the fault shows besides.
    """
    average_gradients(mover.network, mover.world, check=check)
    mover.scaler.unscale_(mover.optimizer)
    norm = nn.utils.clip_grad_norm_(mover.network.parameters(), LARGEST_NORM)
    if not mover.scaler.is_enabled() and not torch.isfinite(norm):  # a scaler skips such a step by itself
        with together(mover.world):
            raise no_number("gradient", {"norm": float(norm), **values}, at, mover.last)
    mover.scaler.step(mover.optimizer)
    mover.scaler.update()
    mover.optimizer.zero_grad(set_to_none=True)  # weights that a step does not sample must not move by momentum
    mover.ema.update_parameters(mover.network)


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES.get(amp), enabled=amp in DTYPES)


def no_number(what: str, values: Mapping[str, float], at: Moment, last: Path) -> Fault:
    """The fault of a training that broke down: where it was, and what remains of it."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    kept = f"{last} holds epoch {at.epoch - 1}" if last.exists() else "nothing is saved"
    return Fault(
        f"epoch {at.epoch}, step {at.step + 1}: the {what} is not a finite number ({shown}); {kept};"
        " a smaller --lr0 or --amp off may be right"
    )


def distance_to_teacher(mover: Mover, images: Tensor, outputs: Any) -> Tensor:
    """The loss against the teacher's outputs for the same images, times its gain. The teacher is not changed."""
    assert mover.teacher is not None
    with torch.no_grad(), autocast(mover.world.device, mover.amp):
        wanted, _ = mover.teacher(images)
    return mover.distill * distillation_loss(mover.network, outputs, mover.teacher, wanted)


# ---- images at many sizes


def smallest_size(imgsz: int, stride: int) -> int:
    """The smallest size that `drawn_size` draws."""
    return max(1, math.ceil(SMALLEST * imgsz / stride)) * stride


def drawn_size(imgsz: int, stride: int, seed: int, number: int) -> int:
    """The size of batch `number` of a run under ``--multi-scale``: a multiple of `stride`, `imgsz` -50 to +50 %."""
    fewest, most = smallest_size(imgsz, stride) // stride, math.floor(LARGEST * imgsz / stride)
    return int(np.random.default_rng((seed, number, MULTI_SCALE)).integers(fewest, most + 1)) * stride


def scaled(images: Tensor, targets: Targets, imgsz: int, stride: int) -> tuple[Tensor, Targets]:
    """Images ``[N, 3, H, W]`` with their longer side at `imgsz`, the other at the next multiple of `stride`."""
    height, width = images.shape[2:]
    cells = stride * max(height, width)
    size = [-(-side * imgsz // cells) * stride for side in (height, width)]
    if size == [height, width]:
        return images, targets
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    factors = torch.tensor([size[1] / width, size[0] / height] * 2, device=targets.boxes.device)
    masks = targets.masks
    if masks is not None:
        masks = F.interpolate(masks[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(masks.dtype)
    return images, replace(targets, boxes=targets.boxes * factors, masks=masks)
