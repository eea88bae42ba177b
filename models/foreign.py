"""Weights that another program trained, loaded by structure: row by row, tensor by tensor, held against their shapes.

The files of YOLO programs name their tensors ``model.<row>.<path inside the row>``, in the order in which a row's parts
are defined. Ours are found by name where names and shapes agree, and what is left by shape in that order. Those of
EfficientNets and residual networks have names without rows, which `models.efficientnet` and `models.resnet` know.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.structures import Fault
from models import resnet
from models.checkpoint import FORMAT, read_tensors
from models.efficientnet import NORMALIZATIONS, naming_of, rows_of, take_unit_images, usual_normalization
from models.graph import Graph, Node, resolve
from models.network import Network
from models.ops.conv import Conv
from models.spec import Anchors, ModelSpec, row_place

HOLDERS = ("state_dict", "model_state_dict", "model", "ema", "state")  # keys under which a file may keep its state dict
IN_A_ROW = re.compile(r"((?:\D*\.)?)(\d+)\.(.+)")  # the first number in a name is the row's
# The branches of a RepConv as RepVGG, YOLOv6 and v7 name them; their order there is not ours, and shapes are alike.
BRANCH = re.compile(r"(?<![^.])rbr_(dense|1x1|identity)\.(?:(0|conv|1|bn)\.)?")
BRANCHES = {"dense": "conv1.", "1x1": "conv2.", "identity": "bn."}
COUNTER = "num_batches_tracked"  # of a batch norm with a momentum: nothing depends on it
SAME_ANCHOR = 1e-3  # relative: half precision keeps that much

Tensors = Mapping[str, Tensor]


def import_weights(
    path: Path, spec: ModelSpec, names: Sequence[str] | None = None, normalization: str | None = None
) -> tuple[Network, tuple[str, ...]]:
    """The network of `spec` with the weights of a foreign state dict in eval mode, and notes on what did not fit.

    The file may hold the state dict itself or keep it under a key such as ``state_dict``; weights of half precision
    become float32. The number of classes and the anchors are those that the weights were trained with, and a note says
    where the YAML differs. A tensor of ours that is not there keeps its random start, with a note that names it.

    `normalization` is what was done to images in [0, 1] before the weights saw them, a key of
    `models.efficientnet.NORMALIZATIONS`; the first convolution is changed to do it. None is what weights of their kind
    are usually trained with: ``none`` but for EfficientNets and residual networks, and a note says what it is.

    Raises `Fault` where a row finds none of its tensors or has its norms folded away, where the file has tensors for a
    row that takes none, where the classes are not as many as `names`, where an EfficientNet or residual network does
    not fit as a whole, and for a file that is no state dict. Nothing in the file is ever run.
    """
    if spec.choices:
        raise Fault(f"{spec.path}: has open choices; weights are imported into a plain network")
    state, graph = _state_dict(path), resolve(spec)
    named = _by_name(path, state, graph)
    rows, notes, usual = named or (*_by_row(path, state), "none")
    normalization = usual if normalization is None else normalization
    spec, changed = _as_trained(path, graph, rows)
    if normalization != "none":
        spec = _with_border(graph, spec, normalization)
    if names is not None and len(names) != spec.num_classes:
        raise Fault(f"{path}: was trained on {spec.num_classes} classes, but {len(names)} names are given")
    graph = resolve(spec)
    network = Network(graph)
    faults = []
    notes += changed
    for node, layer in zip(graph.nodes, network.layers, strict=True):
        ours, theirs = layer.state_dict(), rows.pop(node.index, {})
        place = row_place(node.index, node.layer)
        pairs = _pairs(ours, theirs, by_order=named is None)
        wanted = [name for name in ours if not name.endswith(COUNTER)]
        if wanted and not pairs.keys() & set(wanted):
            there = f"its row {node.index} has {_shapes(theirs)}" if theirs else f"it has no row {node.index}"
            faults.append(f"{place}: needs {_shapes(ours)}; {path}: {there}")
            continue
        if theirs and not ours:
            faults.append(f"{place}: has no weights; {path}: its row {node.index} has {_shapes(theirs)}")
            continue
        with torch.no_grad():
            for name, source in pairs.items():
                ours[name].copy_(theirs[source])  # a state dict shares its memory with the module
        missing = {name: ours[name] for name in wanted if name not in pairs}
        surplus = {name: theirs[name] for name in theirs if name not in pairs.values() and not _is_known(node, name)}
        if named and (missing or surplus):
            there = f"has {_shapes(surplus)}" if surplus else "lacks it"
            faults.append(f"{place}: needs {_shapes(missing) or 'nothing more'}; {path} {there}")
            continue
        if _is_folded(pairs, ours, theirs):
            faults.append(
                f"{place}: needs {_shapes(missing)}; {path}: its row {node.index} has {_shapes(surplus)}: norms "
                "folded into convolutions; the file before that would be right"
            )
            continue
        if missing:
            notes.append(f"row {node.index} {node.op.name}: not in the file, left at its start: {_shapes(missing)}")
        if surplus:
            notes.append(f"row {node.index} {node.op.name}: in the file, but not used: {_shapes(surplus)}")
    for index, theirs in rows.items():
        faults.append(
            f"{path}: its row {index} has {_shapes(theirs)}, but {spec.path} ends with row {len(graph.nodes) - 1}"
        )
    if faults:
        raise Fault(*faults)
    if normalization != "none":
        first = network.layers[0]
        assert isinstance(first, Conv)
        take_unit_images(first, normalization)
        notes.append(f"images are in [0, 1] here, so row 0 does what {normalization!r} did to them before")
    return network.eval(), tuple(notes)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of the file by name, floating ones as float32."""
    content = read_tensors(path)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise Fault(f"{path}: is a checkpoint of this program already; give it as --weights")
    held = [content] if isinstance(content, dict) else []
    held += [content[key] for key in HOLDERS if held and isinstance(content.get(key), dict)]
    for state in held:
        tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        if tensors:
            break
    else:
        raise Fault(f"{path}: holds no state dict: a dict of tensors by name, or one under {' or '.join(HOLDERS)}")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise Fault(f"{path}: {len(broken)} of its tensors hold numbers that are not finite, such as {broken[0]!r}")
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _by_name(path: Path, state: Tensors, graph: Graph) -> tuple[dict[int, dict[str, Tensor]], list[str], str] | None:
    """Tensors by row and our name inside it, notes, and the usual normalization; None where names tell of rows."""
    if naming := naming_of(state):
        return *rows_of(path, state, *naming, graph), usual_normalization(naming[0], graph)
    prefix = resnet.prefix_of(state)
    if prefix is None:
        return None
    return *resnet.rows_of(path, state, prefix, graph), resnet.NORMALIZATION


def _by_row(path: Path, state: Tensors) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """Tensors by row and name inside it, and a note on those whose name is not like that of most others."""
    found = {name: match for name in state if (match := IN_A_ROW.fullmatch(name))}
    prefixes = Counter(match[1] for match in found.values()).most_common()
    if not prefixes:
        raise Fault(f"{path}: none of its tensors belongs to a row, as model.0.conv.weight does: {_shapes(state)}")
    rows: dict[int, dict[str, Tensor]] = {}
    other = {}
    for name, tensor in state.items():
        match = found.get(name)
        if match is not None and match[1] == prefixes[0][0]:
            rows.setdefault(int(match[2]), {})[BRANCH.sub(_branch, match[3])] = tensor
        else:
            other[name] = tensor
    if 2 * len(other) > len(state):
        raise Fault(
            f"{path}: {len(other)} of its {len(state)} tensors belong to no row, as model.0.conv.weight does: "
            f"{_shapes(other)}; it is not of a program that builds its networks from rows"
        )
    return rows, [f"in no row {prefixes[0][0]}<number>, not used: {_shapes(other)}"] if other else []


def _branch(found: re.Match[str]) -> str:
    """``rbr_dense.0.`` and ``rbr_dense.conv.`` -> ``conv1.conv.``; ``rbr_identity.`` -> ``bn.``"""
    part = {None: "", "0": "conv.", "conv": "conv.", "1": "bn.", "bn": "bn."}[found[2]]
    return BRANCHES[found[1]] + part


def _pairs(ours: Tensors, theirs: Tensors, by_order: bool) -> dict[str, str]:
    """Their name for each of ours that is found: the same, or else, `by_order`, the next of its shape and kind."""
    pairs = {name: name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape}
    if not by_order:
        return pairs
    left = [name for name in theirs if name not in pairs]
    for name, tensor in ours.items():
        kind = _kind(name, ours)
        fitting = (o for o in left if _kind(o, theirs) == kind and theirs[o].shape == tensor.shape)
        source = next(fitting, None) if name not in pairs else None
        if source is not None:
            pairs[name] = source
            left.remove(source)
    return pairs


def _kind(name: str, tensors: Tensors) -> tuple[str, bool]:
    """A tensor's last name, and whether it is one of a batch norm."""
    module, _, last = name.rpartition(".")
    return last, f"{module}.running_var" in tensors or last == "running_var"


def _is_folded(pairs: Mapping[str, str], ours: Tensors, theirs: Tensors) -> bool:
    """Whether a convolution of theirs has a bias where ours has a norm behind it, which the file lacks."""
    lacks_norms = any(name.endswith("running_var") for name in ours.keys() - pairs.keys())
    biased = (
        f"{source.removesuffix('weight')}bias" in theirs and f"{name.removesuffix('weight')}bias" not in ours
        for name, source in pairs.items()
        if theirs[source].dim() == 4
    )
    return lacks_norms and any(biased)


# ---- what the weights say about the head


def _as_trained(path: Path, graph: Graph, rows: Mapping[int, Tensors]) -> tuple[ModelSpec, list[str]]:
    """`graph.spec` with the number of classes and the anchors that the weights were made for, and what that changed."""
    spec, head = graph.spec, graph.nodes[-1]
    theirs = rows.get(head.index, {})
    if head.op.name == "Classify" and "linear.weight" in theirs:
        return _with_classes(spec, len(theirs["linear.weight"]))
    if "anchors" not in head.op.parameters:
        return spec, []
    notes = []
    anchors = _trained_anchors(path, head, theirs)
    if anchors is not None and not _alike(spec.anchors, anchors):
        notes.append(f"anchors: {_sizes(spec.anchors)} in {spec.path}; taken from the weights: {_sizes(anchors)}")
        spec = replace(spec, anchors=anchors)
    per_level = spec.anchors if isinstance(spec.anchors, int) else len(spec.anchors[0]) // 2
    widths = sorted({tensor.shape[0] for tensor in theirs.values() if tensor.dim() == 4})
    if len(widths) != 1:
        return spec, notes  # not a head like ours: the rows will tell
    num_classes, rest = widths[0] // per_level - 5, widths[0] % per_level
    if rest or num_classes < 1:
        raise Fault(
            f"{row_place(head.index, head.layer)}: {per_level} anchors of 5 + classes do not make the "
            f"{widths[0]} outputs a level of {path}"
        )
    spec, changed = _with_classes(spec, num_classes)
    return spec, notes + changed


def _with_classes(spec: ModelSpec, num_classes: int) -> tuple[ModelSpec, list[str]]:
    if num_classes == spec.num_classes:
        return spec, []
    note = f"nc: {spec.num_classes} in {spec.path}; taken from the weights: {num_classes}"
    return replace(spec, num_classes=num_classes), [note]


def _with_border(graph: Graph, spec: ModelSpec, normalization: str) -> ModelSpec:
    """`spec` with a first row that pads with the mean colour, which the weights took for 0."""
    node = graph.nodes[0]
    if node.op.name != "Conv" or node.repeats != 1:
        place = row_place(node.index, node.layer)
        raise Fault(f"{place}: only one Conv can be made to normalize its input; got {normalization}")
    mean = tuple(round(value, 6) for value in NORMALIZATIONS[normalization][0])
    row = replace(spec.layers[0], kwargs={**spec.layers[0].kwargs, "border": mean})
    return replace(spec, layers=(row, *spec.layers[1:]))


def _trained_anchors(path: Path, head: Node, theirs: Tensors) -> Anchors | None:
    """The anchors in pixels: the file has them in cells of their level, ``[levels, anchors, 2]``."""
    cells = theirs.get("anchors")
    if cells is None:
        return None
    levels = len(head.inputs) // getattr(head.op.module, "sets", 1)
    if cells.dim() != 3 or cells.shape[0] != levels or cells.shape[2] != 2:
        raise Fault(
            f"{row_place(head.index, head.layer)}: reads {levels} levels; {path} has anchors {list(cells.shape)}, "
            f"where [{levels}, anchors a level, 2] would fit"
        )
    strides = torch.tensor([shape.stride for shape in head.inputs[:levels]])
    sizes = (cells * strides[:, None, None]).flatten(1).tolist()
    return tuple(tuple(_rounded(size) for size in level) for level in sizes)


def _rounded(size: float) -> float:
    """Half precision blurs whole numbers of pixels."""
    return float(round(size)) if abs(size - round(size)) < SAME_ANCHOR * size else round(size, 2)


def _alike(anchors: Anchors, trained: Anchors) -> bool:
    if isinstance(anchors, int) or isinstance(trained, int) or [*map(len, anchors)] != [*map(len, trained)]:
        return False
    pairs = zip(itertools.chain(*anchors), itertools.chain(*trained), strict=True)
    return all(abs(size - other) <= SAME_ANCHOR * other for size, other in pairs)


def _is_known(node: Node, name: str) -> bool:
    """Their tensors that need no note: what `_trained_anchors` reads (and its copy in pixels), and counters."""
    return name.endswith(COUNTER) or (node.op.is_head and name in ("anchors", "anchor_grid"))


# ---- words


def _sizes(anchors: Anchors) -> str:
    if isinstance(anchors, int):
        return f"{anchors} a level"
    return "; ".join(" ".join(f"{size:g}" for size in level) for level in anchors)


def _shapes(tensors: Tensors) -> str:
    """``conv.weight [16, 3, 6, 6], bn.weight [16], bn.bias [16] and 3 more``."""
    texts = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if not name.endswith(COUNTER)]
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(texts[:3]) + more
