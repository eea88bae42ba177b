"""Where the tensors of torchvision's residual networks belong: ``conv1``, ``bn1``, ``layer1`` to ``layer4`` and ``fc``.

Inside a block our names are theirs (`models.ops.resnet`), so a place is a row and, in it, a block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data.structures import Fault
from models.graph import Graph, Node

BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
ELSEWHERE = re.compile(r"(conv1|bn1|fc)\.(\w+)")
AROUND = {"conv1": (0, "conv"), "bn1": (0, "bn"), "fc": (-1, "linear")}  # the row, and our name in it
FIRST = "layer1.0.conv1.weight"
NORMALIZATION = "imagenet"  # of their weights, a key of `models.efficientnet.NORMALIZATIONS`


def prefix_of(state: Mapping[str, Tensor]) -> str | None:
    """What stands before every name (``module.``) of a residual network's state dict; None for any other."""
    return next((name.removesuffix(FIRST) for name in state if name.endswith(FIRST)), None)


def rows_of(
    path: Path, state: Mapping[str, Tensor], prefix: str, graph: Graph
) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """Tensors by row and by our name inside it, and a note on those that have no place.

    Raises `Fault` where `graph` is no residual network of as many stages and blocks.
    """
    stages = [node for node in graph.nodes if node.op.name == "ResStage"]
    ops = [node.op.name for node in graph.nodes]
    if ops != ["Conv", "nn.MaxPool2d", *["ResStage"] * len(stages), "Classify"]:
        raise Fault(
            f"{path}: is a residual network, but {graph.spec.path} is no plain classifier of this kind; import it with "
            f"one as cfg/models/resnet50.yaml, then train.py --weights takes what fits"
        )
    rows: dict[int, dict[str, Tensor]] = {}
    blocks: dict[int, int] = {}  # of each of their stages
    unknown = []
    for name, tensor in state.items():
        inside = name.removeprefix(prefix)
        if block := BLOCK.fullmatch(inside):
            stage, number = int(block[1]), int(block[2])
            blocks[stage] = max(blocks.get(stage, 0), number + 1)
            if 1 <= stage <= len(stages):
                rows.setdefault(stages[stage - 1].index, {})[f"blocks.{number}.{block[3]}"] = tensor
        elif other := ELSEWHERE.fullmatch(inside):
            row, ours = AROUND[other[1]]
            rows.setdefault(graph.nodes[row].index, {})[f"{ours}.{other[2]}"] = tensor
        else:
            unknown.append(f"{name} {list(tensor.shape)}")
    theirs = [blocks[stage] for stage in sorted(blocks)]
    if theirs != [_number(node) for node in stages]:
        here = ", ".join(str(_number(node)) for node in stages)
        raise Fault(f"{path}: has stages of {', '.join(map(str, theirs))} blocks, {graph.spec.path} of {here}")
    return rows, [f"in no part of a residual network, not used: {', '.join(unknown)}"] if unknown else []


def _number(node: Node) -> int:
    assert isinstance(node.repeats, int), "weights are imported into a plain network"
    return node.repeats
