"""How a run goes, before it does: options that agree with each other, steps, learning rates, evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from data.dataset import STRIDE
from data.structures import Fault
from engine.config import TrainConfig
from engine.distributed import World
from engine.optim import LEARNING_RATES, NOMINAL_BATCH, SHORT_RUN, choose_optimizer, lr_factor, warmup_length
from models.network import Network

LARGE_SET = 2_000  # training images; smaller sets step after every batch
EVALUATIONS = 10  # of a short run, at most


# ---- options


def agreed(config: TrainConfig) -> TrainConfig:
    """The config with what one option makes of another. Raises a Fault for options that contradict each other."""
    if config.noval and config.patience:
        raise Fault(f"--patience {config.patience}: --noval measures nothing on the way; leave one of the two out")
    if not config.rect:
        return config
    if config.resume is None and config.mosaic > 0 and "mosaic" in config.model_fields_set:
        raise Fault(f"--mosaic {config.mosaic:g}: a mosaic is a square; leave out either it or --rect")
    return config.model_copy(update={"mosaic": 0.0})


def check_processes(config: TrainConfig, world: World) -> None:
    """Raises a Fault for what the number of processes, or their device, does not allow."""
    if config.sync_bn and (world.size == 1 or world.device.type != "cuda"):
        raise Fault(
            f"--sync-bn: needs several GPUs, this run is on {world}; "
            "torchrun --nproc_per_node 2 train.py ... runs on two where there are two"
        )
    if config.batch_size == -1 and world.size > 1:
        raise Fault(f"--batch-size -1: {world.size} processes cannot each find their own; give a number")


def check_rectangles(config: TrainConfig, stride: int) -> None:
    """Raises a Fault where rectangles would not fit the network's grid of cells."""
    if config.rect and STRIDE % stride:
        raise Fault(f"--rect: sides of rectangles are multiples of {STRIDE}, this network needs {stride}")


def check_single(network: Network, imgsz: int, lists: Sequence[Sequence[int]], smallest: int | None = None) -> None:
    """Raises a Fault where a batch of one image would meet a norm that sees one cell of it: a single value has no
    variance. `lists` are the images of each batch of training, `smallest` is the smallest size that they get; None:
    all have `imgsz`.
    """
    if min(map(len, lists)) > 1:
        return
    coarse = [network.layers[node.index] for node in network.graph.nodes if node.output.stride >= (smallest or imgsz)]
    if any(isinstance(module, _BatchNorm) for layer in coarse for module in layer.modules()):
        images = sum(map(len, lists))
        left = (
            f"{images} images in batches of {len(lists[0])} leave one alone"
            if len(lists[0]) > 1
            else "a batch is one image"
        )
        raise Fault(
            f"--batch-size {len(lists[0])}: {left}, and at --imgsz {imgsz} the coarsest map of it has one cell, from "
            f"which no norm can learn; another batch size, or --imgsz {2 * imgsz}, would be right"
        )


# ---- steps


@dataclass(frozen=True)
class Plan:
    """How many steps a run has, of how many images, and with which learning rate."""

    epochs: int
    batch_size: int  # images a batch, over all processes
    batches_per_epoch: int
    accumulate: int  # batches a step
    optimizer: str
    lr: float
    warmup_epochs: float

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        return warmup_length(self.warmup_epochs, self.steps_per_epoch, self.total_steps)

    def __str__(self) -> str:
        return (
            f"{self.optimizer}, lr {self.lr:g}, {self.total_steps} steps of {self.batch_size * self.accumulate} images"
            f" ({self.warmup_steps} to warm up), {self.epochs} epochs"
        )


def make_plan(
    config: TrainConfig, images: int, batch_size: int, batches_per_epoch: int, state: Mapping[str, Any] | None
) -> Plan:
    """The plan of a run; one that goes on, from `state`, keeps its optimizer however long it becomes."""
    accumulate = max(1, round(NOMINAL_BATCH / batch_size)) if images >= LARGE_SET else 1
    total_steps = config.epochs * math.ceil(batches_per_epoch / accumulate)
    chosen = (state or {}).get("chosen") or choose_optimizer(config.optimizer, total_steps)
    lr = config.lr0 or LEARNING_RATES[chosen]
    return Plan(config.epochs, batch_size, batches_per_epoch, accumulate, chosen, lr, config.warmup_epochs)


def extended(state: Mapping[str, Any], plan: Plan, config: TrainConfig) -> list[str]:
    """A line about the learning rate of a run that gets more, or fewer, epochs than it began with."""
    if state.get("epochs", config.epochs) == config.epochs:
        return []
    step = state["epoch"] * plan.steps_per_epoch
    rates = [
        plan.lr * lr_factor(at, other.total_steps, other.warmup_steps, config.lrf, config.cos_lr)
        for at, other in ((step - 1, replace(plan, epochs=state["epochs"])), (step, plan))
    ]
    return [
        f"{state['epochs']} epochs become {config.epochs}: the learning rate goes on as in a run of {config.epochs},"
        f" from {rates[0]:.3g} to {rates[1]:.3g} now"
    ]


def evaluation_interval(config: TrainConfig, total_steps: int) -> int:
    """Epochs between evaluations. The last epoch is evaluated in any case."""
    if config.noval:
        return config.epochs
    fewest = math.ceil(config.epochs / EVALUATIONS) if total_steps < SHORT_RUN else 1
    return max(config.val_interval, fewest)
