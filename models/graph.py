"""The meaning of a `ModelSpec`: which op every row is, what it reads, what it gives. No weights are made here.

`normalize` multiplies depth and width out and gives every argument its name; `resolve` follows the rows and holds them
against the ops' signatures and Shapes. Both collect every fault of a file before they raise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import models.ops  # noqa: F401  (fills OPS)
from data.structures import Fault, nearest
from models.parse import SHORTHANDS, flow, known, row_text
from models.registry import OPS, WIDTHS, Op, Shape
from models.spec import Choice, LayerSpec, ModelSpec, Scaling

IMAGE = Shape(3, 1)
MOST_COMBINATIONS = 10_000  # of the choices of one row
OWN = {"num_classes": "nc", "anchors": "anchors"}  # a head's arguments that are the file's, and the words for them
DIVISOR = 8  # scaled widths are rounded up to a multiple of it


@dataclass(frozen=True)
class Node:
    """One row, understood. `sources` are row indices, -1 is the image; `arguments` are complete and named."""

    index: int
    layer: LayerSpec
    op: Op
    sources: tuple[int, ...]
    arguments: Mapping[str, Any]  # without c_in, inputs, number
    repeats: int | Choice
    inputs: tuple[Shape, ...]
    output: Shape

    @property
    def choices(self) -> tuple[Choice, ...]:
        return self.layer.choices

    def module_arguments(self) -> dict[str, Any]:
        """Everything that the op's class is called with, for one repetition."""
        given = dict(self.arguments)
        if "c_in" in self.op.parameters:
            given["c_in"] = self.inputs[0].channels
        if "inputs" in self.op.parameters:
            given["inputs"] = self.inputs
        if "number" in self.op.parameters:
            given["number"] = self.repeats
        return given


@dataclass(frozen=True)
class Graph:
    """A model whose rows fit together. The last row is its head."""

    spec: ModelSpec
    nodes: tuple[Node, ...]

    @property
    def max_stride(self) -> int:
        return max(shape.stride for node in self.nodes for shape in (*node.inputs, node.output))

    def last_use(self) -> dict[int, int]:
        """For every row the last row that reads it; its output can be freed after that."""
        return {source: node.index for node in self.nodes for source in node.sources}


def normalize(spec: ModelSpec) -> ModelSpec:
    """The same model with depth and width multiplied out and every choice named after its argument.

    Options of a choice are final values and stay as they are. Raises `Fault` for unknown ops and arguments.
    """
    faults: list[str] = []
    layers = []
    for index, layer in enumerate(spec.layers):
        try:
            layers.append(_normal_row(spec, index, layer))
        except Fault as fault:
            faults += fault.lines
    if faults:
        raise Fault(*faults)
    return replace(spec, layers=tuple(layers), scaling=Scaling())


def resolve(spec: ModelSpec) -> Graph:
    """Every row with its op, sources and Shapes. Raises one `Fault` with a line for each thing that is wrong."""
    faults: list[str] = []
    wrong = OPS["Conv"].check("act", spec.activation)
    if wrong:
        faults.append(f"{spec.activation_at or spec.path}: activation {spec.activation!r} {wrong}")
    normal: list[LayerSpec | None] = []
    for index, layer in enumerate(spec.layers):
        try:
            normal.append(_normal_row(spec, index, layer))
        except Fault as fault:
            faults += fault.lines
            normal.append(None)
    nodes: list[Node] = []
    shapes: list[Shape | None] = []  # None behind a faulty row: what follows from it is not reported
    names = {layer.name: index for index, layer in enumerate(spec.layers) if layer.name}
    for index, (written, row) in enumerate(zip(spec.layers, normal, strict=True)):
        shapes.append(None)
        try:
            sources = _sources(index, written, names)
            if row is None:
                continue
            inputs = [IMAGE if source < 0 else shapes[source] for source in sources]
            if any(shape is None for shape in inputs):
                continue
            known = tuple(shape for shape in inputs if shape is not None)
            node = _node(spec, index, row, written, sources, known)
        except Fault as fault:
            faults += fault.lines
            continue
        nodes.append(node)
        shapes[index] = node.output if not node.op.is_head else None
    faults += _head_faults(spec)
    if faults:
        raise Fault(*faults)
    return Graph(replace(spec, layers=tuple(node.layer for node in nodes), scaling=Scaling()), tuple(nodes))


def make_divisible(channels: float, divisor: int = DIVISOR) -> int:
    """`channels` rounded up to a multiple of `divisor`."""
    return math.ceil(channels / divisor) * divisor


def scale_repeats(number: int, depth: float) -> int:
    """`number` times `depth`, at least 1; halves go to the even number, as in every YOLO."""
    return max(round(number * depth), 1) if number > 1 else number


# ---- one row


def _place(index: int, layer: LayerSpec) -> str:
    return f"{layer.where} layer {index} {row_text(layer)}"


def _normal_row(spec: ModelSpec, index: int, layer: LayerSpec) -> LayerSpec:
    place = _place(index, layer)
    if layer.op not in OPS:
        ops = [*OPS, *SHORTHANDS]
        raise Fault(f"{place}: unknown module {layer.op!r}{nearest(layer.op, ops) or known(ops)}")
    op = OPS[layer.op]
    for key in layer.kwargs:
        if key not in op.signature.parameters:
            raise Fault(f"{place}: {op} has no argument {key!r}{nearest(key, op.signature.parameters)}")
    try:
        bound = op.signature.bind(*layer.args, **layer.kwargs)
    except TypeError as problem:
        raise Fault(f"{place}: {op}: {problem}") from None
    label = layer.name or str(index)
    faults = []
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if isinstance(value, Choice):
            value = Choice(f"{label}.{name}", value.options)
        elif name in WIDTHS and isinstance(value, int) and not isinstance(value, bool):
            value = make_divisible(value * spec.scaling.width) if spec.scaling.width != 1 else value
        if op.is_head and name in OWN and _substitute(spec, value) != _substitute(spec, OWN[name]):
            faults.append(f"{place}: {name} stands at the top of the file; write {OWN[name]} here, not {flow(value)}")
            continue
        for final in value.options if isinstance(value, Choice) else (_substitute(spec, value),):
            wrong = op.check(name, final)
            if wrong:
                faults.append(f"{place}: {op}: {name}={flow(final)} {wrong}")
        values[name] = value
    if faults:
        raise Fault(*faults)
    repeats = layer.repeats
    if isinstance(repeats, int):
        repeats = scale_repeats(repeats, spec.scaling.depth)
    positional = [name for name, p in op.signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    args: list[Any] = []
    for name in positional:
        if name not in values:
            break
        args.append(values.pop(name))
    return replace(layer, repeats=repeats, args=tuple(args), kwargs=values)


def _substitute(spec: ModelSpec, value: Any) -> Any:
    """The closed grammar of words that stand for the file's own numbers."""
    if value == "nc":
        return spec.num_classes
    if value == "anchors":
        return spec.anchors
    return value


def _sources(index: int, layer: LayerSpec, names: Mapping[str, int]) -> tuple[int, ...]:
    found, faults = [], []
    for source in layer.sources:
        if isinstance(source, str):
            if source not in names:
                hint = nearest(source, names) or known(names)
                faults.append(f"{_place(index, layer)}: no row is named {source!r}{hint}")
                continue
            row = names[source]
        else:
            row = source if source >= 0 else index + source
        if index == 0 and source == -1:
            row = -1  # the image
        elif not 0 <= row < index:
            before = ("-1, the image, comes", "row 0 comes", f"rows 0 to {index - 1} come")[min(index, 2)]
            faults.append(f"{_place(index, layer)}: reads from {flow(source)}, but only {before} before it")
        found.append(row)
    if not layer.sources:
        faults.append(f"{_place(index, layer)}: reads from no row")
    if faults:
        raise Fault(*faults)
    return tuple(found)


def _node(
    spec: ModelSpec, index: int, row: LayerSpec, written: LayerSpec, sources: tuple[int, ...], inputs: tuple[Shape, ...]
) -> Node:
    op = OPS[row.op]
    place = _place(index, written)
    reads = "; ".join(
        f"row {source} gives {shape}" if source >= 0 else f"the image has {shape}"
        for source, shape in zip(sources, inputs, strict=True)
    )
    if not op.many and len(inputs) != 1:
        raise Fault(f"{place}: {row.op} takes one source, got {len(inputs)} ({reads}); Concat joins several")
    for source, shape in zip(sources, inputs, strict=True):
        if shape.kind != "map":
            raise Fault(f"{place}: row {source} gives {shape}, which {row.op} does not take")
    bound = op.signature.bind(*row.args, **row.kwargs)
    bound.apply_defaults()
    arguments = {name: _substitute(spec, value) for name, value in bound.arguments.items()}
    if "act" in arguments and "act" not in row.kwargs and len(row.args) <= list(arguments).index("act"):
        arguments["act"] = spec.activation
    try:
        output = _output(op, inputs, arguments)
    except ValueError as problem:
        raise Fault(f"{place}: {problem} ({reads})") from None
    inside = "number" in op.parameters
    most = max(row.repeats.options) if isinstance(row.repeats, Choice) else row.repeats
    if op.many and most > 1:
        raise Fault(f"{place}: {row.op} reads all its sources at once, so `number` is 1; got {flow(row.repeats)}")
    if not inside and most > 1 and output != inputs[0]:
        raise Fault(
            f"{place}: {row.op} is repeated {most} times but turns {inputs[0]} into {output}; "
            f"only a module that keeps its shape can be repeated"
        )
    return Node(index, row, op, sources, arguments, row.repeats, inputs, output)


def _output(op: Op, inputs: Sequence[Shape], arguments: Mapping[str, Any]) -> Shape:
    """The Shape of a row, whatever its choices pick. Raises ValueError where that differs or does not fit."""
    choices = {name: value.options for name, value in arguments.items() if isinstance(value, Choice)}
    if math.prod(map(len, choices.values())) > MOST_COMBINATIONS:
        raise ValueError(f"its choices have more than {MOST_COMBINATIONS:,} combinations")
    found: dict[Shape, str] = {}
    for picks in itertools.product(*choices.values()):
        picked = dict(zip(choices, picks, strict=True))
        found.setdefault(op.infer(inputs, {**arguments, **picked}), flow(picked))
    if len(found) > 1:
        (one, here), (other, there) = list(found.items())[:2]
        raise ValueError(f"options have to give one shape, but {here} gives {one} and {there} {other}")
    return next(iter(found))


def _head_faults(spec: ModelSpec) -> list[str]:
    *before, last = spec.layers
    faults = [
        f"{_place(index, layer)}: a head is a model's last row; rows behind this one: {len(before) - index}"
        for index, layer in enumerate(before)
        if layer.op in OPS and OPS[layer.op].is_head
    ]
    if not faults and last.op in OPS and not OPS[last.op].is_head:
        heads = " or ".join(name for name, op in OPS.items() if op.is_head)
        faults.append(f"{_place(len(before), last)}: a model's last row is its head, {heads}; here it is {last.op}")
    return faults


def combinations(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Every combination of the options of some choices, the last choice moving fastest."""
    found: list[dict[str, Any]] = [{}]
    for choice in choices:
        found = [{**picks, choice.name: option} for picks in found for option in choice.options]
    return found
