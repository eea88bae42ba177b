"""How other programs name the tensors of an EfficientNet, and what their weights were trained to see.

timm, torchvision and EfficientNet-PyTorch (of lukemelas) hold the same tensors in the same order, each under names of
its own. What was converted from TensorFlow also computes with its padding and eps, which the tensors do not show.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data.structures import Fault
from models.graph import Graph, Node
from models.ops.conv import Conv

# Our names of what has weights: in a block, and around the blocks.
EXPANSION = ("expand.conv", "expand.bn")
REST = ("depthwise.conv", "depthwise.bn", "se.reduce", "se.expand", "project.conv", "project.bn")
BEFORE, BEHIND = ("conv", "bn"), ("conv", "bn")  # of the first row and of the last but one
CLASSES = ("linear",)

# What was done to images in [0, 1] before a network saw them: (x - mean) / std for red, green and blue.
NORMALIZATIONS = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # mean and deviation of its images, used by most
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]; timm calls it inception
    "lite": ((127 / 255,) * 3, (128 / 255,) * 3),  # of EfficientNet-Lite
}


@dataclass(frozen=True)
class Computing:
    """What the tensors of a network do not tell: its padding where a kernel strides, and the eps of its norms."""

    padding: str | None
    eps: float

    def __str__(self) -> str:
        return f"padding {self.padding or 'on all sides alike'} and eps {self.eps:g}"


USUAL, TENSORFLOW = Computing(None, 1e-5), Computing("same", 1e-3)


@dataclass(frozen=True)
class Naming:
    """A program's names, in the order of ours.

    `block` is how the tensors of a block begin. `unexpanded` names `REST` in a block that expands nothing.
    """

    program: str
    before: tuple[str, ...]
    block: re.Pattern[str]
    expansion: tuple[str, ...]
    rest: tuple[str, ...]
    unexpanded: tuple[str, ...]
    behind: tuple[str, ...]
    classes: tuple[str, ...]
    computing: tuple[Computing, ...]  # what weights under these names may have been trained with
    normalization: str  # of most of them, a key of NORMALIZATIONS
    normalization_lite: str  # of those without squeeze-and-excitation


NAMINGS = (
    Naming(
        "timm",
        ("conv_stem", "bn1"),
        re.compile(r"blocks\.(\d+)\.(\d+)\."),
        ("conv_pw", "bn1"),
        ("conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"),
        ("conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"),
        ("conv_head", "bn2"),
        ("classifier",),
        (USUAL, TENSORFLOW),
        "imagenet",
        "half",
    ),
    Naming(
        "torchvision",
        ("features.0.0", "features.0.1"),
        re.compile(r"features\.(\d+)\.(\d+)\.block\."),
        ("0.0", "0.1"),
        ("1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"),
        ("0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"),
        ("features.8.0", "features.8.1"),
        ("classifier.1",),
        (USUAL,),
        "imagenet",
        "imagenet",
    ),
    Naming(
        "EfficientNet-PyTorch",
        ("_conv_stem", "_bn0"),
        re.compile(r"_blocks\.(\d+)\."),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"),
        ("_depthwise_conv", "_bn1", "_se_reduce", "_se_expand", "_project_conv", "_bn2"),
        ("_conv_head", "_bn1"),
        ("_fc",),
        (TENSORFLOW,),
        "imagenet",
        "lite",
    ),
)


def naming_of(state: Mapping[str, Tensor]) -> tuple[Naming, str] | None:
    """The program that names its tensors so, and what stands before every name (``module.``); None for any other."""
    for naming in NAMINGS:
        stem = f"{naming.before[0]}.weight"
        for prefix in (name.removesuffix(stem) for name in state if name.endswith(stem)):
            if any(naming.block.match(name.removeprefix(prefix)) for name in state):
                return naming, prefix
    return None


def usual_normalization(naming: Naming, graph: Graph) -> str:
    """What most weights of this kind were trained with; the file does not tell."""
    lite = not any(node.arguments.get("squeeze") for node in graph.nodes)
    return naming.normalization_lite if lite else naming.normalization


def rows_of(
    path: Path, state: Mapping[str, Tensor], naming: Naming, prefix: str, graph: Graph
) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """Tensors by row and by our name inside it, and notes: on those that have no place, on what names leave open.

    Blocks are counted through, so rows may hold several of them each. The order of the file is a check of the names: it
    is that of our rows, and a note says where it is not. Raises `Fault` where the rows of `graph` are not those of such
    a network, or compute otherwise than weights under these names were trained to.
    """
    stem, *stages, last, classes = _checked(path, naming, graph)
    places = {their: (stem.index, ours) for their, ours in zip(naming.before, BEFORE, strict=True)}
    matches = (naming.block.match(name.removeprefix(prefix)) for name in state)
    theirs = {match[0]: tuple(map(int, match.groups())) for match in matches if match}
    blocks = [(node, index) for node in stages for index in range(_number(node))]
    if len(theirs) != len(blocks):
        raise Fault(f"{path}: has {len(theirs)} inverted bottlenecks, {graph.spec.path} has {len(blocks)}")
    for block, (node, index) in zip(sorted(theirs, key=theirs.__getitem__), blocks, strict=True):
        plain = node.arguments["expand"] == 1
        names = naming.unexpanded if plain else naming.expansion + naming.rest
        for their, ours in zip(names, REST if plain else EXPANSION + REST, strict=True):
            places[f"{block}{their}"] = (node.index, f"m.{index}.{ours}")
    for node, names, inside in ((last, naming.behind, BEHIND), (classes, naming.classes, CLASSES)):
        places |= {their: (node.index, ours) for their, ours in zip(names, inside, strict=True)}

    rows: dict[int, dict[str, Tensor]] = {}
    order, unknown = [], []
    for name, tensor in state.items():
        part, _, kind = name.removeprefix(prefix).rpartition(".")
        if part not in places:
            unknown.append(f"{name} {list(tensor.shape)}")
            continue
        row, ours = places[part]
        rows.setdefault(row, {})[f"{ours}.{kind}"] = tensor
        order.append(part)
    notes = [f"in no part of an EfficientNet, not used: {', '.join(unknown)}"] if unknown else []
    if [part for part, _ in itertools.groupby(order)] != [part for part in places if part in set(order)]:
        notes.append(
            f"tensors of {path} stand in another order than those of {graph.spec.path}; only names were followed"
        )
    if len(naming.computing) > 1:
        here = _computing(graph)
        notes.append(
            f"{naming.program} names tensors alike whatever computes with them; {graph.spec.path} has {here}, as "
            f"{'tf_ models have' if here == TENSORFLOW else 'models without tf_ have'}"
        )
    return rows, notes


def _checked(path: Path, naming: Naming, graph: Graph) -> Sequence[Node]:
    """The rows of a graph that can take the weights: a convolution, stages, a convolution, classes."""
    ops = [node.op.name for node in graph.nodes]
    if len(ops) < 4 or ops != ["Conv", *["MBConv"] * (len(ops) - 3), "Conv", "Classify"]:
        raise Fault(
            f"{path}: is an EfficientNet with the names of {naming.program}, but {graph.spec.path} is no classifier of "
            f"this kind; import it with one as cfg/models/efficientnet-b0.yaml, then train.py --weights takes what fits"
        )
    here = _computing(graph)
    if here not in naming.computing:
        raise Fault(
            f"{path}: weights with the names of {naming.program} want {' or '.join(map(str, naming.computing))}, "
            f"{graph.spec.path} has {here or 'several kinds'}; cfg/models/{_file_for(naming, graph)} has them so"
        )
    return graph.nodes


def _computing(graph: Graph) -> Computing | None:
    """What all rows have in common; None where they differ."""
    rows = [node.arguments for node in graph.nodes if "eps" in node.arguments]
    paddings = {row["padding"] for row in rows if row["stride"] > 1}
    eps = {row["eps"] for row in rows}
    return Computing(paddings.pop(), eps.pop()) if len(paddings) == len(eps) == 1 else None


def _file_for(naming: Naming, graph: Graph) -> str:
    if TENSORFLOW not in naming.computing:
        return "efficientnet-b0.yaml"
    lite = usual_normalization(naming, graph) == naming.normalization_lite
    return "efficientnet-lite0.yaml" if lite else "tf-efficientnet-b0.yaml"


def _number(node: Node) -> int:
    assert isinstance(node.repeats, int), "weights are imported into a plain network"
    return node.repeats


def take_unit_images(conv: Conv, normalization: str) -> None:
    """Changes the first convolution of a network so that it takes images in [0, 1] in place of normalized ones.

    ``w * (x - mean) / std = (w / std) * x - B`` with B the sum of ``w / std * mean`` over the kernel, and the norm
    behind it subtracts B with its mean. Exact where the convolution's border has the mean colour, which was 0 before;
    with a border of zeros the cells at the edge differ.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in NORMALIZATIONS[normalization])
    convolution, norm = conv.conv, conv.bn
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    with torch.no_grad():
        weight = convolution.weight.double() / std
        convolution.weight.copy_(weight)
        norm.running_mean.add_((weight * mean).sum(dim=(1, 2, 3)))
