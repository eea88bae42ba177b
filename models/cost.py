"""Parameters and multiply-adds, exact and without weights: everything here runs on the ``meta`` device.

MACs are the multiply-adds of convolutions and matrix products (half of what torch's FlopCounterMode counts); norms,
activations and pooling are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.elastic import ElasticActivation, SwitchableNorm
from models.graph import Graph, Node
from models.network import Network, build_plain
from models.ops.masked import low_share
from models.ops.primitives import ACTIVATIONS


@dataclass(frozen=True)
class RowCost:
    """What one row costs for one image: parameters, multiply-adds, and its output's shape without the batch."""

    params: int
    macs: int
    shape: tuple[int, ...]


def network_costs(graph: Graph, imgsz: int, supernet: str | None = None, low: float | None = None) -> list[RowCost]:
    """The cost of every row at ``imgsz x imgsz``, in the order of the rows. A supernet is counted as it is active.

    `low` is the share of masks that is at low resolution, None the one that a row under a mask expects: 0 where it
    names none, which counts the most that it can cost.
    """
    with torch.device("meta"):
        network = Network(graph, supernet).eval()
        held: dict[int, Any] = {-1: torch.empty(1, 3, imgsz, imgsz)}
    params = [count_params(layer) for layer in network.layers]
    _skip_uncounted(network)
    costs = []
    for node, count in zip(graph.nodes, params, strict=True):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            held, _ = network.run([node.index], held)
        y = held[node.index] if node.index in held else None
        if isinstance(y, list):  # a head's levels: cells of all of them, numbers a cell
            cells = sum(level.numel() // level.shape[-1] for level in y)
            shape: tuple[int, ...] = (cells, y[0].shape[-1])
        else:
            shape = tuple(y.shape[1:]) if y is not None else ()
        macs = counter.get_total_flops() // 2
        if "mask" in (node.op.takes or ()):
            layer = network.layers[node.index]
            macs = masked_macs(macs, layer, node, imgsz, low_share(layer, low))
        costs.append(RowCost(count, macs, shape))
    return costs


def masked_macs(dense: int, layer: nn.Module, node: Node, imgsz: int, low: float) -> int:
    """What remains of a row's `dense` multiply-adds under a mask with a share S = `low` of low patches.

    A patch of d x d cells is one cell where it is low, so ``S / d^2 + 1 - S`` of them, but of what the layer counts as
    `unmasked` multiply-adds a cell, all.
    """
    x, mask = node.inputs
    d, cells = mask.stride // x.stride, (imgsz // x.stride) ** 2
    always = getattr(layer, "unmasked", 0) * cells
    return round(always + (dense - always) * (low / d**2 + 1 - low))


def row_cost(node: Node, picks: dict[str, Any], imgsz: int) -> RowCost:
    """The cost of one row with its choices picked."""
    with torch.device("meta"):
        module = build_plain(node, picks).eval()
        maps = [torch.empty(1, s.channels, imgsz // s.stride, imgsz // s.stride) for s in node.inputs]
    params = count_params(module)
    _skip_uncounted(module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = module(maps if node.op.many else maps[0])
    shape = tuple(y.shape[1:]) if isinstance(y, torch.Tensor) else ()
    macs = counter.get_total_flops() // 2
    if "mask" in (node.op.takes or ()):
        macs = masked_macs(macs, module, node, imgsz, low_share(module))
    return RowCost(params, macs, shape)


def _skip_uncounted(network: nn.Module) -> None:
    """Norms and activations keep the shape and count nothing, but are what takes the time on the ``meta`` device."""
    kinds = (nn.BatchNorm2d, SwitchableNorm, ElasticActivation, *(type(make()) for make in ACTIVATIONS.values()))
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, nn.Identity())


def count_params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def totals(costs: Sequence[RowCost]) -> tuple[int, int]:
    """Parameters and MACs of all rows."""
    return sum(cost.params for cost in costs), sum(cost.macs for cost in costs)
