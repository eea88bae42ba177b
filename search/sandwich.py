"""The sandwich rule: a step trains the largest subnet, a random one and the smallest (BigNAS, arXiv 2003.11142).

Rows that they begin with in common run once, and the random one usually has some more in common with one of the others.
The largest learns from the labels, the others half from the labels and half from what the largest says of the same
images (in-place distillation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.structures import Batch, Fault
from engine.distributed import average_numbers, together
from engine.evaluate import pixels
from engine.step import Moment, Mover, autocast, distance_to_teacher, no_number, scaled
from models.distill import LOSSES, distillation_loss
from models.graph import Node
from models.network import Network
from models.supernet import Supernet
from search.costs import CostTable

TAUGHT = 0.5  # part of the loss of a smaller subnet that the largest gives


def sizes(table: CostTable) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the largest and of the smallest subnet, for the choices that change the cost of the table.

    Raises `Fault` where no choice does.
    """
    sized = {
        choice.name
        for choices, values in table.rows
        for axis, choice in enumerate(choices)
        if np.ptp(values, axis=axis).any()
    }
    if not sized:
        raise Fault(f"--sandwich: no choice changes {table.metric}, so no subnet is larger than another; leave it out")
    largest, smallest = (table.extreme(end)[1].picks for end in (True, False))
    return {name: largest[name] for name in sized}, {name: smallest[name] for name in sized}


def teaching_note(network: Network) -> str:
    """How the smaller subnets learn, in a line."""
    head = type(network.head).__name__
    if type(network.head) in LOSSES:
        return "a step trains the largest subnet, a random one and the smallest; the largest teaches the others"
    known = ", ".join(sorted(kind.__name__ for kind in LOSSES))
    return (
        f"note: a step trains the largest subnet, a random one and the smallest, each by its labels alone: {head} has "
        f"no loss of distillation ({known} have)"
    )


def parting(network: Network, start: int, subnets: Sequence[Mapping[str, Any]]) -> int:
    """The first row from `start` on that subnets do not have in common, or that has a loss of its own to go back
    through; how many rows there are, where they part nowhere.
    """
    for node, layer in zip(network.graph.nodes[start:], network.layers[start:], strict=True):
        if hasattr(layer, "aux_loss") or len({options_of(node, picks) for picks in subnets}) > 1:
            return node.index
    return len(network.layers)


def options_of(node: Node, picks: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a subnet has in the open places of a row."""
    return tuple(picks[choice.name] for choice in node.choices)


def backward(
    supernet: Supernet,
    subnets: Sequence[Mapping[str, Any]],
    images: Tensor,
    run: Callable[[range, Mapping[int, Any]], tuple[dict[int, Any], dict[int, Any]]],
    loss_of: Callable[[int, Any, Mapping[int, Any]], Tensor],
) -> None:
    """Adds the gradients of several subnets' losses for the same images. Rows that some of them begin with in common
    run once for these, in each direction.

    `run` is `Network.run`, or what runs it. ``loss_of(place, outputs, aux)`` is the loss of the subnet at a place, from
    its head's outputs and auxiliary tensors; it is asked for that of the first subnet first.
    """
    network = supernet.network
    end = len(network.layers)

    def descend(start: int, places: Sequence[int], held: Mapping[int, Any], said: Mapping[int, Any]) -> None:
        """The rows from `start` on, for subnets that have had all rows before in common."""
        stop = end if len(places) == 1 else parting(network, start, [subnets[place] for place in places])
        supernet.activate(subnets[places[0]])
        made, aux = run(range(start, stop), held)
        said = {**said, **aux}
        if stop == end:
            torch.autograd.backward([loss_of(place, made[end - 1], said) for place in places])
            return
        node, apart = network.graph.nodes[stop], hasattr(network.layers[stop], "aux_loss")
        ways: dict[Any, list[int]] = {}
        for place in places:
            ways.setdefault(place if apart else options_of(node, subnets[place]), []).append(place)
        cuts: list[tuple[Tensor, Tensor]] = []  # where these rows end, and where the next ones begin
        begun = {row: _cut(value, cuts) for row, value in made.items()}
        for way in ways.values():
            descend(stop, way, begun, said)
        reached = [(ended, begin.grad) for ended, begin in cuts if begin.grad is not None]
        if reached:
            torch.autograd.backward([ended for ended, _ in reached], [grad for _, grad in reached])

    descend(0, range(len(subnets)), {-1: images}, {})


def add_sandwich(
    mover: Mover,
    supernet: Supernet,
    subnets: Sequence[Mapping[str, Any]],
    batch: Batch,
    at: Moment,
    *,
    part: float = 1.0,
    imgsz: int | None = None,
) -> dict[str, float]:
    """As `engine.step.add_gradients`, of the mean loss of several subnets; the first of them teaches the others.

    A teacher of the run teaches the first. The parts are means over the subnets.
    """
    network, device = mover.network, mover.world.device
    images, targets = pixels(batch, device), batch.targets.to(device)
    if imgsz is not None:
        images, targets = scaled(images, targets, imgsz, network.max_stride)
    teaches = type(network.head) in LOSSES
    sums: dict[str, Any] = {}
    teacher: list[Tensor] = []

    def loss_of(place: int, outputs: Any, aux: Mapping[int, Any]) -> Tensor:
        loss, parts = network.loss_from(outputs, targets, aux)
        distance = loss.new_zeros(())
        if place == 0 and mover.teacher is not None:
            distance = distance_to_teacher(mover, images, outputs)
            loss = loss + distance
        elif place > 0 and teaches:
            distance = distillation_loss(network, outputs, network, teacher)
            loss = (1 - TAUGHT) * loss + TAUGHT * distance
        if place == 0 and teaches:
            teacher.extend(y.detach() for y in outputs)
        told = {"distill": distance.detach()} if teaches or mover.teacher is not None else {}
        for name, value in {"loss": loss.detach(), **parts, **told}.items():
            sums[name] = sums.get(name, 0.0) + value / len(subnets)
        return mover.scaler.scale(loss * (part * mover.gain / len(subnets)))

    def run(rows: range, outputs: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        with autocast(device, mover.amp):
            return network.run(rows, outputs)

    backward(supernet, subnets, images, run, loss_of)
    own = {name: float(value) for name, value in sums.items()}
    values = average_numbers(own, mover.world)
    if not math.isfinite(values["loss"]):
        with together(mover.world):
            raise no_number("loss", own, at, mover.last)
    return values


def _cut(value: Any, cuts: list[tuple[Tensor, Tensor]]) -> Any:
    """The same tensors without what they were made by; each that had a gradient is noted with the one in its place."""
    if isinstance(value, list | tuple):
        return type(value)(_cut(part, cuts) for part in value)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    begin = value.detach().requires_grad_()
    cuts.append((value, begin))
    return begin
