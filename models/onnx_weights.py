"""The weights of a YOLOX that was exported to ONNX, as weights of ours. Only numbers are read; nothing is run.

An exporter leaves a network's convolutions in the order in which they are computed, each with the batch norm behind it
folded into it, and forgets their names. So they are taken in that order, and each is held against the one of ours that
stands there: shape, stride, padding, groups.

What was folded cannot be unfolded without images: the norms here leave what they get as it is, but for the bias. So the
network is the same function and can be run, measured and exported. Before it is trained on, its norms are given
statistics (`engine.unfold`), for in training they would normalize what was never meant to be.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.structures import Fault
from models.graph import Graph, Node, resolve
from models.network import Network
from models.ops.conv import Conv
from models.spec import ModelSpec, row_place

BRIGHTEST = 255.0  # YOLOX sees blue, green and red from 0 to 255, since its version 0.1.1
CSP = ("cv1", "cv2", "m", "cv3")  # how YOLOX computes it; our own order of definition is another one
HEAD = ("stems", "cls_convs", "cls_preds", "reg_convs", "reg_preds", "obj_preds")  # of each level
COMPUTED = {"C3": CSP, "C3Separable": CSP}


@dataclass(frozen=True)
class Convolution:
    """A convolution of the file: weight ``[c_out, c_in // groups, kernel, kernel]``, bias ``[c_out]`` or None."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # above and to the left, then below and to the right
    groups: int

    def __str__(self) -> str:
        return _shown(self.weight.shape, self.stride, self.padding, self.groups)


@dataclass(frozen=True)
class Place:
    """A convolution of ours, the norm behind it if there is one, and the row that it belongs to."""

    node: Node
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None

    @property
    def padding(self) -> tuple[int, ...]:
        assert not isinstance(self.conv.padding, str)
        return self.conv.padding * 2

    def __str__(self) -> str:
        return _shown(self.conv.weight.shape, self.conv.stride, self.padding, self.conv.groups)

    def takes(self, theirs: Convolution) -> bool:
        ours = self.conv
        return (
            ours.weight.shape == theirs.weight.shape
            and (ours.stride, self.padding, ours.groups) == (theirs.stride, theirs.padding, theirs.groups)
            and theirs.bias is not None
        )


def import_onnx(path: Path, spec: ModelSpec, names: Sequence[str] | None = None) -> tuple[Network, tuple[str, ...]]:
    """The network of `spec` with the weights of an ONNX file in eval mode, and notes on what was changed.

    The number of classes is that of the file. The first convolution takes images as all networks here do, red, green
    and blue from 0 to 1, and turns them into what the file's saw. Raises `Fault` where `spec` is no YOLOX, where a
    convolution of the file is not the one that stands there in `spec`, where a norm is not folded, where the classes
    are not as many as `names`, and for a file that is not ONNX.
    """
    graph = resolve(spec)
    if graph.nodes[-1].op.name != "YOLOXHead":
        raise Fault(
            f"{spec.path}: ends with {graph.nodes[-1].op.name}; of ONNX files only those of YOLOX are read, "
            f"for one as cfg/models/yolox-nano.yaml"
        )
    theirs, notes = convolutions_of(path), []
    spec, changed = _as_trained(spec, graph, theirs)
    if names is not None and len(names) != spec.num_classes:
        raise Fault(f"{path}: was trained on {spec.num_classes} classes, but {len(names)} names are given")
    network = Network(resolve(spec))
    ours = list(places_of(network))
    for number, (place, convolution) in enumerate(zip(ours, theirs, strict=False)):
        if not place.takes(convolution):
            raise Fault(
                f"{row_place(place.node.index, place.node.layer)}: needs {place}; convolution {number} of {path} "
                f"is {convolution}{'' if convolution.bias is not None else ', without a bias'}"
            )
    if len(ours) != len(theirs):
        raise Fault(f"{path}: has {len(theirs)} convolutions, {spec.path} has {len(ours)}")
    with torch.no_grad():
        for place, convolution in zip(ours, theirs, strict=True):
            assert convolution.bias is not None
            place.conv.weight.copy_(convolution.weight)
            if place.norm is not None:
                add_only(place.norm, convolution.bias)
            elif place.conv.bias is not None:
                place.conv.bias.copy_(convolution.bias)
        take_rgb(ours[0].conv)
    notes += changed
    notes.append("images are red, green and blue in [0, 1] here, so row 0 turns them into the file's: BGR, 0 to 255")
    notes.append(
        f"{sum(place.norm is not None for place in ours)} norms were folded into convolutions; they get statistics "
        f"from the images that the network is trained on"
    )
    return network.eval(), tuple(notes)


# ---- the file


def convolutions_of(path: Path) -> list[Convolution]:
    """All convolutions of an ONNX file in the order in which they are computed, as float32."""
    model = _model(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            raise Fault(
                f"{path}: has a norm of its own, {node.output[0]!r}, where exported networks have them folded into "
                f"their convolutions; export it in eval mode"
            )
        if node.op_type != "Conv":
            continue
        tensors = [_tensor(path, weights, name) for name in node.input[1:3]]
        lists = {attribute.name: tuple(attribute.ints) for attribute in node.attribute}
        groups = next((int(attribute.i) for attribute in node.attribute if attribute.name == "group"), 1)
        if not tensors or tensors[0].dim() != 4 or set(lists.get("dilations", (1, 1))) != {1}:
            raise Fault(f"{path}: {node.output[0]!r} is no plain convolution over rows and columns, as all here are")
        bias = tensors[1] if len(tensors) > 1 else None
        stride, padding = lists.get("strides", (1, 1)), lists.get("pads", (0, 0, 0, 0))
        found.append(Convolution(tensors[0], bias, stride, padding, groups))
    if not found:
        raise Fault(f"{path}: has no convolution")
    return found


def _model(path: Path) -> Any:
    if not path.is_file():
        raise Fault(f"{path}: no such file")
    try:
        onnx = importlib.import_module("onnx")
    except ImportError:
        raise Fault(f"{path}: reading ONNX files needs: pip install -e '.[export]'") from None
    try:
        return onnx.load(str(path), load_external_data=False)  # no other file is opened, whatever this one names
    except Exception as problem:  # protobuf's DecodeError, which has moved between its versions
        raise Fault(f"{path}: is no ONNX file ({str(problem).partition(chr(10))[0][:120]})") from None


def _tensor(path: Path, weights: Mapping[str, Any], name: str) -> Tensor:
    stored = weights.get(name)
    if stored is None:
        raise Fault(f"{path}: the weights {name!r} are computed or come from outside; they have to be in the file")
    if stored.data_location == 1:  # EXTERNAL
        raise Fault(f"{path}: keeps {name!r} in another file; save it as one file")
    try:
        array = importlib.import_module("onnx.numpy_helper").to_array(stored)
    except (ValueError, TypeError) as problem:
        raise Fault(f"{path}: {name!r} is damaged ({problem})") from None
    tensor = torch.from_numpy(array.astype("float32"))
    if not tensor.isfinite().all():
        raise Fault(f"{path}: {name!r} has numbers that are not finite")
    return tensor


# ---- ours


def places_of(network: Network) -> Iterator[Place]:
    """The convolutions of a YOLOX of ours in the order in which an exported one computes them."""
    for node, layer in zip(network.graph.nodes, network.layers, strict=True):
        if node is network.graph.nodes[-1]:
            parts = [layer.get_submodule(f"{name}.{level}") for level in range(len(node.inputs)) for name in HEAD]
        else:
            parts = [layer.get_submodule(name) for name in COMPUTED.get(node.op.name, ())] or [layer]
        for part in parts:
            for conv, norm in _pairs(part):
                yield Place(node, conv, norm)


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """The convolutions below a module in the order of definition, each with the norm behind it."""
    if isinstance(module, Conv):
        assert isinstance(module.conv, nn.Conv2d) and isinstance(module.bn, nn.BatchNorm2d)
        yield module.conv, module.bn
    elif isinstance(module, nn.Conv2d):
        yield module, None
    else:
        for child in module.children():
            yield from _pairs(child)


def take_rgb(conv: nn.Conv2d) -> None:
    """Changes a first convolution so that it takes RGB in [0, 1] in place of BGR from 0 to 255.

    Its channels may be several pixels of three colours each, as behind `Focus`. It pads with zeros, which black is in
    both, so nothing changes at the edge.
    """
    with torch.no_grad():
        weight = conv.weight
        conv.weight.copy_(weight.unflatten(1, (-1, 3)).flip(2).flatten(1, 2) * BRIGHTEST)


def add_only(norm: nn.BatchNorm2d, bias: Tensor) -> None:
    """Makes a norm in eval mode add `bias` and do no more: the scale undoes what eps takes away."""
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)
        norm.weight.fill_((1.0 + norm.eps) ** 0.5)
        norm.bias.copy_(bias)


def adds_only(norm: nn.BatchNorm2d) -> bool:
    """Whether `add_only` made it and no training has changed it since. A new norm has a scale of 1 or 0."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.full_like(norm.weight, (1.0 + norm.eps) ** 0.5)
    return bool((norm.running_mean == 0).all() and (norm.running_var == 1).all() and (norm.weight == scale).all())


def _as_trained(spec: ModelSpec, graph: Graph, theirs: Sequence[Convolution]) -> tuple[ModelSpec, list[str]]:
    """`spec` with the number of classes of the file: that of the first convolution for them."""
    with torch.device("meta"):
        network = Network(graph)
    wanted = network.head.cls_preds[0]
    number = next(number for number, place in enumerate(places_of(network)) if place.conv is wanted)
    found = len(theirs[number].weight) if number < len(theirs) else spec.num_classes
    if found == spec.num_classes:
        return spec, []
    return replace(spec, num_classes=found), [f"nc: {spec.num_classes} in {spec.path}; taken from the weights: {found}"]


def _shown(shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int) -> str:
    """``32x16x3x3, stride 2, padding 1, 16 groups``."""
    text = f"{'x'.join(map(str, shape))}, stride {_one(stride)}, padding {_one(padding)}"
    return f"{text}, {groups} groups" if groups > 1 else text


def _one(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
