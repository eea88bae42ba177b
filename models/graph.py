"""The meaning of a `ModelSpec`: which op every row is, what it reads, what it gives. No weights are made here.

`normalize` multiplies depth and width out and gives every argument its name; `resolve` follows the rows and holds them
against the ops' signatures and Shapes. Both collect every fault of a file before they raise. What is legal, but hardly
ever meant, is a note of the graph.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import models.ops  # noqa: F401  (fills OPS)
from data.structures import Fault, nearest
from models.parse import MOST_FAULTS, SHORTHANDS, UNREADABLE, in_order, known, read
from models.registry import OPS, WIDTHS, Op, Shape
from models.spec import (
    Choice,
    LayerSpec,
    ModelSpec,
    PerBottleneck,
    Scaling,
    choices_in,
    clip,
    flow,
    row_place,
)
from models.user_ops import said, trial

IMAGE = Shape(3, 1)
# Far above what a model needs (yolov4-p7: 1,280 channels, stride 128, 118 blocks), and so low that no file keeps a
# machine busy or overflows a count.
MOST_COMBINATIONS = 10_000  # of the choices of one row
MOST_COMBINATIONS_IN_ALL = 50_000  # those of every row, added up
MOST_BLOCKS = 1_000  # `number` of every row at its largest, added up
MOST_CHANNELS = 1_000_000  # of one map
LARGEST_STRIDE = 4_096
MOST_HINTED = 200  # names that are looked through for the nearest one
MOST_NEAR = 6  # rows that a message offers
OWN = {"num_classes": "nc", "anchors": "anchors"}  # a head's arguments that are the file's, and the words for them
EACH = "per_bottleneck"  # the word of a row for a choice of its own in each bottleneck
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
    notes: tuple[str, ...] = ()  # what is odd but allowed, a line each: those of the file, then those of its rows

    @property
    def max_stride(self) -> int:
        return max(shape.stride for node in self.nodes for shape in (*node.inputs, node.output))

    def last_use(self) -> dict[int, int]:
        """For every row the last row that reads it; its output can be freed after that."""
        return {source: node.index for node in self.nodes for source in node.sources}


def load_graph(
    source: str | os.PathLike[str], dialect: str | None = None, trust_ops: bool = False, scale: str | None = None
) -> Graph:
    """The graph of the model file at a path: `parse` and `resolve` in one.

    Raises one `Fault` with all that is wrong with the text and, as far as the rows can be read, with their meaning.
    """
    spec, faults = read(source, dialect, trust_ops, scale)
    if spec is None:
        raise Fault(*in_order(faults, str(Path(source))))
    return _resolve(spec, faults)


def normalize(spec: ModelSpec) -> ModelSpec:
    """The same model with depth and width multiplied out and every choice named after its argument.

    Options of a choice are final values and stay as they are. Raises `Fault` for unknown ops and arguments.
    """
    rows, faults = _normal_rows(spec)
    if faults:
        raise Fault(*in_order(faults, spec.path))
    return replace(spec, layers=tuple(row for row in rows if row), scaling=Scaling())


def resolve(spec: ModelSpec) -> Graph:
    """Every row with its op, sources and Shapes. Raises one `Fault` with a line for each thing that is wrong."""
    return _resolve(spec, ())


def _resolve(spec: ModelSpec, told: Sequence[str]) -> Graph:
    """As `resolve`, of a spec whose text is wrong in what `told` says."""
    rows, faults = _normal_rows(spec)
    wrong = OPS["Conv"].check("act", spec.activation)
    if wrong:
        faults.append(f"{spec.activation_at or spec.path}: activation {clip(repr(spec.activation))} {wrong}")
    faults = [*told, *faults]
    too_large = _size_faults(spec, rows)
    if too_large or not spec.layers:
        raise Fault(*in_order([*faults, *too_large], spec.path))
    sources: dict[int, tuple[int, ...]] = {}
    nodes: dict[int, Node] = {}
    names = {layer.name: index for index, layer in enumerate(spec.layers) if layer.name}
    for index, (written, row) in enumerate(zip(spec.layers, rows, strict=True)):
        if written.op == UNREADABLE:
            continue
        if len(faults) > MOST_FAULTS:
            break
        try:
            sources[index] = _sources(index, written, names)
            # behind a faulty row nothing is known: what follows from it is not reported
            if row and all(source == -1 or _gives_map(nodes.get(source)) for source in sources[index]):
                nodes[index] = _node(spec, index, row, sources[index], nodes)
        except Fault as fault:
            faults += fault.lines
    faults += _head_faults(spec)
    if len(sources) == len(spec.layers):
        faults += _dead_faults(spec, sources, nodes)
    head = nodes.get(len(spec.layers) - 1)
    if head and head.op.is_head:
        faults += _anchor_faults(spec, head)
    if faults:
        raise Fault(*in_order(faults, spec.path))
    normal = replace(spec, layers=tuple(node.layer for node in nodes.values()), scaling=Scaling())
    graph = Graph(normal, tuple(nodes.values()), spec.notes)
    graph = _anchors_fine_first(graph)
    return replace(graph, notes=(*graph.notes, *_stride_notes(graph), *_unmixed_notes(graph)))


def make_divisible(channels: float, divisor: int = DIVISOR) -> int:
    """`channels` rounded up to a multiple of `divisor`."""
    return math.ceil(channels / divisor) * divisor


def scale_repeats(number: int, depth: float) -> int:
    """`number` times `depth`, at least 1; halves go to the even number, as in every YOLO."""
    return max(round(number * depth), 1) if number > 1 else number


def combinations(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Every combination of the options of some choices, the last choice moving fastest."""
    found: list[dict[str, Any]] = [{}]
    for choice in choices:
        found = [{**picks, choice.name: option} for picks in found for option in choice.options]
    return found


# ---- one row


def _normal_rows(spec: ModelSpec) -> tuple[list[LayerSpec | None], list[str]]:
    """Every row in normal form, None for a wrong one, and what is wrong."""
    rows: list[LayerSpec | None] = []
    faults: list[str] = []
    for index, layer in enumerate(spec.layers):
        row = None
        if layer.op != UNREADABLE and len(faults) <= MOST_FAULTS:
            try:
                row = _normal_row(spec, index, layer)
            except Fault as fault:
                faults += fault.lines
        rows.append(row)
    return rows, faults


def _normal_row(spec: ModelSpec, index: int, layer: LayerSpec) -> LayerSpec:
    place = row_place(index, layer)
    if layer.op not in OPS:
        ops = [*OPS, *SHORTHANDS]
        hint = nearest(layer.op, ops) or f"{known(ops)}; --ops FILE brings your own"
        raise Fault(f"{place}: unknown module {clip(repr(layer.op))}{hint}")
    op = OPS[layer.op]
    written, spread = dict(layer.kwargs), False
    if EACH in written and EACH not in op.signature.parameters:
        spread = _spread(place, op, written.pop(EACH))
    for key in written:
        if key not in op.signature.parameters:
            hint = nearest(key, [*op.signature.parameters, *([EACH] if _spreadable(op) else [])])
            raise Fault(f"{place}: {op} has no argument {clip(repr(key))}{hint}")
    try:
        bound = op.signature.bind(*layer.args, **written)
    except TypeError as problem:
        raise Fault(f"{place}: {op}: {problem}") from None
    repeats = layer.repeats
    if isinstance(repeats, int):
        repeats = scale_repeats(repeats, spec.scaling.depth)
    most = _largest(repeats)
    if spread and not any(isinstance(v, Choice) and op.per_bottleneck(name) for name, v in bound.arguments.items()):
        raise Fault(f"{place}: {EACH} is for a choice in {_listed(_spreadable(op))}, but none of them is one here")
    label = layer.name or str(index)
    faults = []
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if (
            (op.is_head or name == "num_classes")
            and name in OWN
            and _substitute(spec, value) != _substitute(spec, OWN[name])
        ):
            got = clip(flow(value))
            faults.append(f"{place}: {name} stands at the top of the file; write {OWN[name]} here, not {got}")
            continue
        if op.is_head and choices_in(value):
            got = f"{name}={clip(flow(value))}"
            faults.append(f"{place}: {op}: a head has no choices, the rows before it may; got {got}")
            continue
        listed = value.values if isinstance(value, PerBottleneck) else value
        if spread and op.per_bottleneck(name) and isinstance(value, Choice):
            listed = (value,) * most
        if isinstance(listed, tuple) and op.per_bottleneck(name):
            value = PerBottleneck(tuple(_named(item, f"{label}.{name}.{at}") for at, item in enumerate(listed)))
        elif isinstance(value, Choice):
            value = _named(value, f"{label}.{name}")
        elif choices_in(value):
            faults.append(f"{place}: {op}: {name}={clip(flow(value))}: this argument takes no list with a choice in it")
            continue
        elif name in WIDTHS and isinstance(value, int) and not isinstance(value, bool):
            value = make_divisible(value * spec.scaling.width) if spec.scaling.width != 1 else value
        if isinstance(value, PerBottleneck) and len(value.values) != most:
            got = f"{name}={clip(flow(value))} has {len(value.values)}"
            faults.append(f"{place}: {op}: a list has one value a bottleneck, here {most}; {got}")
            continue
        for final in _finals(_substitute(spec, value)):
            wrong = op.check(name, final)
            if wrong:
                faults.append(f"{place}: {op}: {name}={clip(flow(final))} {wrong}")
            if len(faults) > MOST_FAULTS:
                raise Fault(*faults)
        values[name] = value
    if faults:
        raise Fault(*faults)
    positional = [name for name, p in op.signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    args: list[Any] = []
    for name in positional:
        if name not in values or isinstance(values[name], Choice):
            break  # a choice goes by its argument's name, which it is called after, also where the text is read again
        args.append(values.pop(name))
    return replace(layer, repeats=repeats, args=tuple(args), kwargs=values)


def _spread(place: str, op: Op, asked: Any) -> bool:
    """What a row says under ``per_bottleneck``."""
    if not _spreadable(op):
        able = [name for name, other in OPS.items() if _spreadable(other)]
        raise Fault(f"{place}: {op.name} repeats no bottlenecks, so {EACH} means nothing here{known(able)}")
    if not isinstance(asked, bool):
        raise Fault(f"{place}: {EACH} is True or False; got {clip(flow(asked))}")
    return asked


def _spreadable(op: Op) -> list[str]:
    """The arguments of an op that may differ from bottleneck to bottleneck."""
    return [name for name in op.signature.parameters if op.per_bottleneck(name)]


def _named(value: Any, name: str) -> Any:
    return Choice(name, value.options) if isinstance(value, Choice) else value


def _finals(value: Any) -> list[Any]:
    """Every value that an argument may come to have, each once."""
    if isinstance(value, Choice):
        return list(value.options)
    if isinstance(value, PerBottleneck):
        every = [final for item in value.values for final in _finals(item)]
        return list({repr(final): final for final in every}.values())  # 1 and True are two
    return [value]


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
                near = [name for name, row in names.items() if row < index][-MOST_HINTED:]
                hint = nearest(source, near) or known(near[-MOST_NEAR:])
                faults.append(f"{row_place(index, layer)}: no row is named {clip(repr(source))}{hint}")
                continue
            row = names[source]
        else:
            row = source if source >= 0 else index + source
        if index == 0 and source == -1:
            row = -1  # the image
        elif not 0 <= row < index:
            before = ("-1, the image, comes", "row 0 comes", f"rows 0 to {index - 1} come")[min(index, 2)]
            faults.append(f"{row_place(index, layer)}: reads from {flow(source)}, but only {before} before it")
        found.append(row)
    if not layer.sources:
        faults.append(f"{row_place(index, layer)}: reads from no row")
    if faults:
        raise Fault(*faults)
    return tuple(found)


def _gives_map(node: Node | None) -> bool:
    return node is not None and not node.op.is_head


def _gives(node: Node) -> str:
    """``row 12 nn.Upsample gives 256 channels at stride 8``"""
    return f"row {node.index} {node.op.name} gives {node.output}"


def _node(spec: ModelSpec, index: int, row: LayerSpec, sources: tuple[int, ...], nodes: Mapping[int, Node]) -> Node:
    op, written = OPS[row.op], spec.layers[index]
    place = row_place(index, written)
    inputs = tuple(IMAGE if source < 0 else nodes[source].output for source in sources)
    reads = "; ".join(f"the image has {IMAGE}" if source < 0 else _gives(nodes[source]) for source in sources)
    if not op.many and len(inputs) != 1:
        raise Fault(f"{place}: {row.op} takes one source, got {len(inputs)} ({reads}); Concat joins several")
    _kinds_fit(place, op, sources, inputs, reads)
    bound = op.signature.bind(*row.args, **row.kwargs)
    bound.apply_defaults()
    arguments = {name: _substitute(spec, value) for name, value in bound.arguments.items()}
    if "act" in arguments and "act" not in row.kwargs and len(row.args) <= list(arguments).index("act"):
        arguments["act"] = spec.activation
    try:
        output = _output(op, inputs, arguments)
    except ValueError as problem:
        hint = "" if op.is_head else _stride_hint(sources, nodes)
        raise Fault(f"{place}: {problem} ({reads}){hint}") from None
    except Exception as problem:
        if op.file is None:
            raise
        raise Fault(f"{place}: {op.file}: infer of {op.name} raised {said(problem)} ({reads})") from None
    inside = "number" in op.parameters
    most = max(_largest(row.repeats), _largest(written.repeats))  # a fault at a larger depth is one at this depth
    if op.many and not inside and most > 1:
        raise Fault(f"{place}: {row.op} reads all its sources at once, so `number` is 1; got {flow(written.repeats)}")
    if hasattr(op.module, "aux_loss") and not inside and written.repeats != 1:
        raise Fault(
            f"{place}: {op.name} has a loss of its own, so `number` is 1; got {flow(written.repeats)}; write a row for "
            f"each"
        )
    if not inside and most > 1 and output != inputs[0]:
        times = f"{most} times" if _largest(row.repeats) > 1 else f"{most} times (once at this depth_multiple)"
        raise Fault(
            f"{place}: {row.op} is repeated {times} but turns {inputs[0]} into {output}; only a module that keeps "
            f"its shape can be repeated, so write two rows: one that changes it, one that repeats"
        )
    if op.is_head and op.many:
        levels = len(inputs) // getattr(op.module, "sets", 1)  # a head may read a level several times, set after set
        for first in range(0, len(inputs), levels):
            part = slice(first, first + levels)
            _levels_rise(place, replace(row, sources=row.sources[part]), sources[part], inputs[part], reads)
    node = Node(index, row, op, sources, arguments, row.repeats, inputs, output)
    wrong = trial(op, inputs, output, node.module_arguments()) if op.file else None
    if wrong:
        raise Fault(f"{place}: {wrong}")
    return node


def _kinds_fit(place: str, op: Op, sources: Sequence[int], inputs: Sequence[Shape], reads: str) -> None:
    """Raises `Fault` where a row reads a mask for a map, a map for a mask, or too many or too few of them."""
    takes = op.takes or ("map",) * len(inputs)
    if len(takes) != len(inputs):
        raise Fault(f"{place}: {op.name} takes {_listed(takes)} in this order, got {len(inputs)} sources ({reads})")
    for source, shape, wanted in zip(sources, inputs, takes, strict=True):
        if shape.kind == wanted:
            continue
        where = "the image" if source < 0 else f"row {source}"
        if op.takes:
            got = f"a map of {shape}" if shape.kind == "map" else str(shape)
            wants = f"takes {_listed(takes)} in this order, and {where} gives {got} where it takes a {wanted}"
            raise Fault(f"{place}: {op.name} {wants} ({reads})")
        able = [name for name, other in OPS.items() if "mask" in (other.takes or ())] if shape.kind == "mask" else []
        hint = f"; a mask is for {_listed(able)}" if able else ""
        raise Fault(f"{place}: {where} gives {shape}, which {op.name} does not take{hint} ({reads})")


def _largest(repeats: int | Choice) -> int:
    return max(repeats.options) if isinstance(repeats, Choice) else repeats


def _output(op: Op, inputs: Sequence[Shape], arguments: Mapping[str, Any]) -> Shape:
    """The Shape of a row, whatever its choices pick. Raises ValueError where that differs or does not fit."""
    if math.prod(len(choice.options) for choice in choices_in(tuple(arguments.values()))) > MOST_COMBINATIONS:
        raise ValueError(f"its choices have more than {MOST_COMBINATIONS:,} combinations")
    # bottlenecks keep their shape one by one, so what they have is looked at one by one
    choices = {name: _finals(value) for name, value in arguments.items() if isinstance(value, Choice | PerBottleneck)}
    found: dict[Shape, Mapping[str, Any]] = {}
    for picks in itertools.product(*choices.values()):
        picked = dict(zip(choices, picks, strict=True))
        found.setdefault(op.infer(inputs, {**arguments, **picked}), picked)
    if len(found) > 1:
        (one, here), (other, there) = list(found.items())[:2]
        raise ValueError(f"options have to give one shape, but {flow(here)} gives {one} and {flow(there)} {other}")
    shape = next(iter(found))
    if not (isinstance(shape, Shape) and isinstance(shape.channels, int) and isinstance(shape.stride, int)):
        raise TypeError(f"it gave {shape!r}, not a Shape of whole numbers")
    if shape.kind == "map" and not 1 <= shape.channels <= MOST_CHANNELS:
        raise ValueError(f"would give {shape.channels:,} channels; a map has 1 to {MOST_CHANNELS:,}")
    if not 1 <= shape.stride <= LARGEST_STRIDE:
        raise ValueError(f"would give stride {shape.stride:,}; a map has 1 to {LARGEST_STRIDE:,}")
    return shape


def _stride_hint(sources: Sequence[int], nodes: Mapping[int, Node]) -> str:
    """For a merge of several strides: the rows near the odd source that are at the first one's stride."""
    first, *others = sources
    if first < 0:
        return ""
    stride = nodes[first].output.stride
    odd = next((source for source in others if source >= 0 and nodes[source].output.stride != stride), None)
    if odd is None:
        return ""
    good = [node.index for node in nodes.values() if node.output.stride == stride and node.index != first]
    near = sorted(sorted(good, key=lambda index: abs(index - odd))[:MOST_NEAR])
    return f"; near row {odd}, at stride {stride}, are rows {_listed(near)}" if near else ""


def _levels_rise(place: str, row: LayerSpec, sources: Sequence[int], inputs: Sequence[Shape], reads: str) -> None:
    """Raises `Fault` where the sources of a head are not in the order of their strides, one a stride."""
    strides = [shape.stride for shape in inputs]
    if len(set(strides)) < len(strides):
        raise Fault(f"{place}: {row.op} has a level for each stride, but here they are {_listed(strides)} ({reads})")
    if strides != sorted(strides):
        better = [source for _, source in sorted(zip(strides, row.sources, strict=True))]
        raise Fault(
            f"{place}: {row.op} reads from fine to coarse, but here the strides are {_listed(strides)} ({reads}); "
            f"write {flow(better)}"
        )


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


# ---- the rows together


def _size_faults(spec: ModelSpec, rows: Sequence[LayerSpec | None]) -> list[str]:
    good = [row for row in rows if row]
    faults = []
    blocks = sum(_largest(row.repeats) for row in good)
    if blocks > MOST_BLOCKS:
        faults.append(f"{spec.path}: its rows repeat {blocks:,} blocks; a model has at most {MOST_BLOCKS:,}")
    of_rows = [math.prod(len(choice.options) for choice in row.choices) for row in good if row.choices]
    total = sum(count for count in of_rows if count <= MOST_COMBINATIONS)  # a row with more is told of by itself
    if total > MOST_COMBINATIONS_IN_ALL:
        faults.append(
            f"{spec.path}: the choices of its rows have {total:,} combinations, counted row by row; a model has at "
            f"most {MOST_COMBINATIONS_IN_ALL:,}"
        )
    return faults


def _head_faults(spec: ModelSpec) -> list[str]:
    if not any(layer.section == "head" for layer in spec.layers):
        return []  # told by `parse`
    *before, last = spec.layers
    faults = [
        f"{row_place(index, layer)}: a head is a model's last row; rows behind this one: {len(before) - index}"
        for index, layer in enumerate(before)
        if _is_head(layer)
    ]
    if not faults and last.op in OPS and not _is_head(last):
        heads = sorted((name for name, op in OPS.items() if op.is_head), key=str.lower)
        listed = f"{', '.join(heads[:-1])} or {heads[-1]}"
        faults.append(f"{row_place(len(before), last)}: a model's last row is its head, {listed}; here it is {last.op}")
    return faults


def _is_head(layer: LayerSpec) -> bool:
    return layer.op in OPS and OPS[layer.op].is_head


def _dead_faults(spec: ModelSpec, sources: Mapping[int, tuple[int, ...]], nodes: Mapping[int, Node]) -> list[str]:
    """A line for every row that no other reads, with who may have meant to. `sources` are those of all rows."""
    if not _is_head(spec.layers[-1]) or any(_is_head(layer) for layer in spec.layers[:-1]):
        return []
    read = {source for row in sources.values() for source in row}
    dead = [index for index in range(len(spec.layers) - 1) if index not in read]
    return [
        f"{row_place(index, spec.layers[index])}: no row reads this one{_who_meant(index, spec, sources, nodes)}"
        for index in dead
    ]


def _who_meant(index: int, spec: ModelSpec, sources: Mapping[int, tuple[int, ...]], nodes: Mapping[int, Node]) -> str:
    """Which later row reads the neighbour of a dead one, or is a head that lacks its stride."""
    dead, last = nodes.get(index), len(spec.layers) - 1
    beside = [
        (abs(source - index), -reader, source)
        for reader in range(index + 1, last + 1)
        for source, written in zip(sources[reader], spec.layers[reader].sources, strict=True)
        if written != -1 and 1 <= abs(source - index) <= 2 and _same_stride(dead, nodes.get(source))
    ]
    if beside:
        _, reader, source = min(beside)
        meant: list[Any] = [
            index if read == source else _behind_merge(read, sources, nodes) or written
            for read, written in zip(sources[-reader], spec.layers[-reader].sources, strict=True)
        ]
        reads = f"layer {-reader} {spec.layers[-reader].op} reads row {source} {spec.layers[source].op} beside it"
        return f"; {reads}: did it mean {flow(meant) if len(meant) > 1 else f'row {index}'}?"
    if dead and dead.layer.section == "head" and OPS[spec.layers[last].op].many:
        strides = [nodes[source].output.stride for source in sources[last] if source in nodes]
        if dead.output.stride not in strides:
            return (
                f"; layer {last} {spec.layers[last].op} reads strides {_listed(strides)}: does its `from` lack row "
                f"{index}, at stride {dead.output.stride}?"
            )
    return "; take it out, or name it in the `from` of the row that needs it"


def _behind_merge(source: int, sources: Mapping[int, tuple[int, ...]], nodes: Mapping[int, Node]) -> int | None:
    """The row behind a merge that mixes what it joins; None where there is none."""
    merge, block = nodes.get(source), nodes.get(source + 1)
    if not merge or not block or not merge.op.many or sources[block.index] != (source,):
        return None
    return block.index if _gives_map(block) and _same_stride(merge, block) else None


def _same_stride(one: Node | None, other: Node | None) -> bool:
    return one is not None and other is not None and one.output.stride == other.output.stride


def _anchor_areas(spec: ModelSpec, head: Node) -> list[float]:
    """The areas of each level's anchors, added up; nothing where they are still to be fitted, or no head reads them."""
    if isinstance(spec.anchors, int) or head.arguments.get("anchors") is None:
        return []
    return [sum(w * h for w, h in zip(level[::2], level[1::2], strict=True)) for level in spec.anchors]


def _anchor_faults(spec: ModelSpec, head: Node) -> list[str]:
    areas = _anchor_areas(spec, head)
    if areas in (sorted(areas), sorted(areas, reverse=True)):
        return []
    assert not isinstance(spec.anchors, int)
    sides = [f"{math.sqrt(area / (len(level) / 2)):.0f}" for area, level in zip(areas, spec.anchors, strict=True)]
    return [
        f"{spec.anchors_at or spec.path}: anchors grow from level to level, as the head's strides "
        f"{_listed([shape.stride for shape in head.inputs])} do; these are {_listed(sides)} pixels a side on average"
    ]


def _anchors_fine_first(graph: Graph) -> Graph:
    """The graph with its anchors in the order of the head's levels, which rise from fine to coarse.

    yolov5-panet.yaml of yolov5 v3.0 and v3.1 lists them from coarse to fine, and yolov5 turns them round silently.
    """
    *before, head = graph.nodes
    spec, areas = graph.spec, _anchor_areas(graph.spec, head)
    if areas == sorted(areas):
        return graph
    assert not isinstance(spec.anchors, int)
    turned = tuple(reversed(spec.anchors))
    head = replace(head, arguments={**head.arguments, "anchors": turned})
    note = (
        f"{spec.anchors_at or spec.path}: anchors stand from large to small, while the head reads strides "
        f"{_listed([shape.stride for shape in head.inputs])}; they are turned round, as yolov5 does"
    )
    return Graph(replace(spec, anchors=turned), (*before, head), (*graph.notes, note))


def _stride_notes(graph: Graph) -> list[str]:
    """The one convolution of a backbone that widens but keeps its map's size, where all others halve it."""
    widening = [node for node in graph.nodes if node.layer.section == "backbone" and _widens(node)][1:]  # not the stem
    keeping = [node for node in widening if node.output.stride == node.inputs[0].stride]
    halving = [node for node in widening if node.output.stride == 2 * node.inputs[0].stride]
    if len(keeping) != 1 or len(halving) < 2 or len(halving) + 1 < len(widening):
        return []
    (odd,), head = keeping, graph.nodes[-1]
    return [
        f"{row_place(odd.index, odd.layer)}: widens {odd.inputs[0].channels} channels to {odd.output.channels} but "
        f"stays at stride {odd.output.stride}, while rows {_listed([node.index for node in halving])} of the backbone "
        f"widen and halve; the head's strides are then {_listed([shape.stride for shape in head.inputs])}; "
        f"write stride 2 there if it was forgotten"
    ]


def _widens(node: Node) -> bool:
    kernel = node.arguments.get("kernel", 1)
    largest = max(kernel.options) if isinstance(kernel, Choice) else kernel
    if "stride" not in node.arguments or not isinstance(largest, int):
        return False
    return largest >= 3 and node.output.channels > node.inputs[0].channels


def _unmixed_notes(graph: Graph) -> list[str]:
    """Levels that a head reads from a merge, past the block behind it."""
    nodes, head = {node.index: node for node in graph.nodes}, graph.nodes[-1]
    read = {node.index: node.sources for node in graph.nodes}
    notes = []
    for source in head.sources:
        block = _behind_merge(source, read, nodes)
        if block:
            notes.append(
                f"{row_place(head.index, head.layer)}: {_gives(nodes[source])}, and {head.op.name} reads it past row "
                f"{block} {nodes[block].op.name}; did it mean row {block}?"
            )
    return notes
