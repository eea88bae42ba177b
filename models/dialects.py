"""What a model file of another program means, in our normal form.

The rows of ScaledYOLOv4 and of every yolov5 look alike and differ in what they leave out: the activation that a Conv
has, the order of its arguments, where the head's output convolutions stand. A `Dialect` holds these differences as
data, one for each time a program changed its mind; `translate` applies them. What a program does that its file does not
say (a width that it does not scale, an argument that it never reads) is told in a note, never done in silence.

To read a further program: add a `Dialect` below, and a function where rows have to change places.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.structures import Fault, nearest
from models.spec import LayerSpec, ModelSpec, Where, clip, row_place, row_text

NEEDED = ("nc", "depth_multiple", "width_multiple", "anchors")  # keys without which no other program reads a file
DIVISOR = 8  # other programs round every width up to a multiple of it, whatever width_multiple is

# Text that stands for an activation or a constant there. Nothing is ever run: what is not listed stays text.
ACTIVATIONS = {
    "nn.ReLU()": "relu",
    "nn.LeakyReLU(0.1)": "leaky",
    "nn.Mish()": "mish",
    "nn.SiLU()": "silu",
    "nn.Hardswish()": "hardswish",
    "nn.Sigmoid()": "sigmoid",
    "nn.Identity()": "identity",
}
CONSTANTS = {"None": None, "True": True, "False": False}
OUTPUTS = "na*(nc+5)"  # anchors a level times the numbers of a box: what a head's last convolution gives

COMMON = frozenset(("Conv", "Bottleneck", "SPP", "nn.Upsample", "Concat", "Detect"))
OLD = COMMON | {"Focus", "BottleneckCSP"}
NEW = OLD | {"C3", "C3Ghost", "C3TR", "GhostConv", "SPPF", "nn.MaxPool2d", "nn.ZeroPad2d"}
UNSCALED = ("nn.Upsample", "nn.MaxPool2d", "nn.ZeroPad2d", "Concat", "Detect", "nn.Conv2d")  # by width_multiple

BLOCK = ("c_out", "kernel", "stride", "padding", "groups")  # our order; `act` and `dilation` go by name
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "Conv": (*BLOCK, "act"),
    "Focus": (*BLOCK, "act"),
    "GhostConv": ("c_out", "kernel", "stride", "groups", "act"),
    "C3Ghost": ("c_out", "shortcut", "groups", "expansion"),
    "C3TR": ("c_out", "shortcut", "groups", "expansion"),
}
OURS: Mapping[str, tuple[str, ...]] = {
    "Conv": BLOCK,
    "Focus": BLOCK,
    "GhostConv": ("c_out", "kernel", "stride", "groups"),
    "C3Ghost": ("c_out", "expansion"),
    "C3TR": ("c_out", "expansion"),
    "BottleneckCSP2": ("c_out", "shortcut", "groups"),
    "SPPCSP": ("c_out", "expansion", "pools"),
    "VoVCSP": ("c_out",),
}


@dataclass(frozen=True)
class Dialect:
    """How a program reads its files, where that differs from `oneshot`, our own reading."""

    name: str
    program: str  # and its versions
    activation: str = "silu"  # of a Conv that names none
    concat_act: str | None = None  # of a BottleneckCSP after its concatenation, whatever a Conv has; None: the same
    switch: bool = False  # a Conv's `act` only says whether there is one
    words: frozenset[str] = NEW  # the modules of its published files
    marks: frozenset[str] = frozenset()  # of which a file of it holds one or more; none: any file may be its
    arguments: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: ARGUMENTS)  # by position, where not ours
    unread: Mapping[str, tuple[str, ...]] = field(  # what a module takes and never looks at
        default_factory=lambda: {"C3Ghost": ("shortcut", "groups"), "C3TR": ("shortcut", "groups")}
    )


ONESHOT = Dialect("oneshot", "this program", words=frozenset())
V2 = Dialect("yolov5-v2", "yolov5 v2.0 and v3.0", "leaky", "leaky", True, OLD, frozenset(("Focus", "BottleneckCSP")))
V1 = replace(
    V2,
    name="yolov5-v1",
    program="yolov5 v1.0",
    words=OLD | {"nn.Conv2d"},
    marks=frozenset(("nn.Conv2d",)),
    arguments={"Conv": ("c_out", "kernel", "stride", "groups", "act"), "Focus": ("c_out", "kernel")},
)
V3 = replace(V2, name="yolov5-v3", program="yolov5 v3.1", activation="hardswish")
V4 = Dialect("yolov5-v4", "yolov5 v4.0 to v6.0", concat_act="leaky", marks=NEW - COMMON)
V5 = Dialect(
    "yolov5",
    "yolov5 v6.1 and later",
    concat_act="silu",
    arguments={**ARGUMENTS, "Conv": (*BLOCK, "dilation", "act")},
)
SCALED = Dialect(
    "scaledyolov4",
    "ScaledYOLOv4",
    "mish",
    switch=True,
    words=OLD | {"BottleneckCSP2", "SPPCSP", "VoVCSP"},
    marks=frozenset(("BottleneckCSP2", "SPPCSP", "VoVCSP")),
    arguments={
        **ARGUMENTS,
        "BottleneckCSP2": ("c_out", "shortcut", "groups", "expansion"),
        "SPPCSP": ("c_out", "shortcut", "groups", "expansion", "pools"),
        "VoVCSP": ("c_out", "shortcut", "groups", "expansion"),
    },
    unread={
        "BottleneckCSP2": ("expansion",),
        "SPPCSP": ("number", "shortcut", "groups"),
        "VoVCSP": ("number", "shortcut", "groups", "expansion"),
    },
)
FOREIGN = (SCALED, V1, V2, V3, V4, V5)  # the newest last: of readings that agree it is the one that is named
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (ONESHOT, *FOREIGN)}


def translate(spec: ModelSpec, *, keys: Collection[str], stated: Any, stated_at: Where, asked: str | None) -> ModelSpec:
    """`spec`, whose rows hold what the file says, as its dialect means it, in normal form.

    ``keys`` are the file's top-level keys, ``stated`` its `dialect:` and ``asked`` the one that a user forces. With
    neither, it is recognised. Raises `Fault` where several dialects fit and read the file differently, and for what no
    reading of a dialect can mean.
    """
    forced = _forced(stated, stated_at, asked)
    if forced:
        return read_as(spec, forced, keys)
    fitting = recognise(spec, keys)
    readings: dict[str, ModelSpec] = {}
    problem = Fault()
    for dialect in fitting:
        try:
            readings[dialect.name] = read_as(spec, dialect, keys)
        except Fault as fault:
            problem = fault
    if not readings:
        raise problem
    *others, newest = readings.values()
    if any(other != newest for other in others):
        raise _several(spec, readings)
    if newest.activation != "silu":
        return newest
    return replace(newest, notes=(*_unsaid(spec, keys), *newest.notes))


def recognise(spec: ModelSpec, keys: Collection[str]) -> tuple[Dialect, ...]:
    """The dialects that a file may be in, by its keys and modules; the newest last.

    Ours is a file with something that no other program knows: named arguments, named rows, choices, a `name:`, an
    activation by its name; and one without a key that all others need.
    """
    if not set(NEEDED) <= set(keys) or "name" in keys or any(_only_ours(layer) for layer in spec):
        return (ONESHOT,)
    if "activation" in keys:
        return (V5,) if spec.activation.startswith("nn.") else (ONESHOT,)
    used = _used(spec)
    found = tuple(d for d in FOREIGN if used <= d.words and (used & d.marks or not d.marks))
    return found or (ONESHOT,)


def _unsaid(spec: ModelSpec, keys: Collection[str]) -> list[str]:
    """A note where silu is taken because the file names no activation, and older programs had another for its rows."""
    if "activation" in keys or not set(NEEDED) <= set(keys):
        return []
    others = {d.activation: d.program for d in FOREIGN if _used(spec) <= d.words and d.activation != "silu"}
    said = ", ".join(f"{activation} to {program}" for activation, program in others.items())
    settled = "`activation: NAME` in the file settles it"
    return [f"{spec.path}: no `activation:`, so silu; such rows meant {said}. {settled}"] if others else []


def _used(spec: ModelSpec) -> set[str]:
    """The modules of a file, without those that no other program knows: these are ours, or a mistake told of later."""
    return {layer.op for layer in spec} & frozenset().union(*(dialect.words for dialect in FOREIGN))


def _only_ours(layer: LayerSpec) -> bool:
    words = any(isinstance(source, str) for source in layer.sources)
    return bool(layer.name or layer.kwargs or layer.choices or words)


def _forced(stated: Any, stated_at: Where, asked: str | None) -> Dialect | None:
    names = ", ".join(DIALECTS)
    if stated is not None and (not isinstance(stated, str) or stated not in DIALECTS):
        raise Fault(
            f"{stated_at}: unknown dialect {clip(repr(stated))}{nearest(stated, DIALECTS) or f'; known are {names}'}"
        )
    if asked is not None and asked not in DIALECTS:
        raise Fault(f"--dialect {asked} is unknown{nearest(asked, DIALECTS) or f'; known are {names}'}")
    if stated and asked and stated != asked:
        raise Fault(
            f"{stated_at}: the file says dialect: {stated}, the command --dialect {asked}; leave one of them out"
        )
    name = stated or asked
    return DIALECTS[name] if name else None


def _several(spec: ModelSpec, readings: Mapping[str, ModelSpec]) -> Fault:
    """A line for each of several readings, with what it is alone in: the activation and the first row that differs."""
    lines = [
        f"{spec.path}: dialects {', '.join(readings)} fit this file and differ on it; write `dialect: NAME` into the "
        f"file, or give --dialect NAME:"
    ]
    activations = {reading.activation for reading in readings.values()}
    by_row = zip(*(reading.layers for reading in readings.values()), strict=True)
    differing = next((i for i, rows in enumerate(by_row) if any(row != rows[0] for row in rows)), None)
    for name, reading in readings.items():
        said = [f"activation {reading.activation}"] if len(activations) > 1 else []
        if differing is not None:
            said.append(f"layer {differing} is {clip(row_text(reading.layers[differing]))}")
        lines.append(f"{spec.path}: {name} ({DIALECTS[name].program}): {', '.join(said)}")
    return Fault(*lines)


# ---- one reading


def read_as(spec: ModelSpec, dialect: Dialect, keys: Collection[str]) -> ModelSpec:
    """`spec` as one dialect means it. Raises `Fault` for rows that it cannot mean."""
    if dialect is ONESHOT:
        return spec
    activation = _word(spec.activation, spec) if "activation" in keys else dialect.activation
    spec = replace(spec, activation=activation)
    notes: list[str] = []
    unread: dict[tuple[str, str], list[int]] = {}  # module and argument: the rows that write it
    layers: list[LayerSpec] = []
    faults: list[str] = []
    for index, layer in enumerate(spec):
        try:
            layers.append(_row(spec, index, layer, dialect, notes, unread))
        except Fault as fault:
            faults += fault.lines
    if faults:
        raise Fault(*faults)
    for (op, argument), rows in unread.items():
        where = f"layer{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
        notes.append(f"{spec.path} {where}: {op} never reads its {argument}, neither in {dialect.program} nor here")
    spec = replace(spec, layers=tuple(layers), notes=(*spec.notes, *notes))
    return _outputs_into_head(spec) if any(layer.op == "nn.Conv2d" for layer in layers) else spec


def _row(
    spec: ModelSpec,
    index: int,
    layer: LayerSpec,
    dialect: Dialect,
    notes: list[str],
    unread: dict[tuple[str, str], list[int]],
) -> LayerSpec:
    place = row_place(index, layer)
    args = tuple(_word(value, spec) for value in layer.args)
    repeats, named = layer.repeats, {key: _word(value, spec) for key, value in layer.kwargs.items()}
    positions = dialect.arguments.get(layer.op)
    if positions:
        if len(args) > len(positions):
            raise Fault(
                f"{place}: {layer.op} of {dialect.program} takes {', '.join(positions)}; got {len(args)} values"
            )
        twice = [name for name in positions[: len(args)] if name in named]
        if twice:
            raise Fault(f"{place}: {twice[0]} is given by its position and by name")
        named = dict(zip(positions, args, strict=False)) | named
        ignored = dialect.unread.get(layer.op, ())
        for name in ignored:
            if name in named:
                del named[name]
                unread.setdefault((layer.op, name), []).append(index)
        if "number" in ignored and repeats != 1:
            repeats = 1
            unread.setdefault((layer.op, "number"), []).append(index)
        _activation(named, spec, place, dialect, notes)
        _kernel(named, positions, place, dialect)
        ours = OURS[layer.op]
        gap = next((k for k, name in enumerate(ours) if name not in named), len(ours))
        args = tuple(named.pop(name) for name in ours[:gap])  # behind a gap, by name
    if layer.op == "BottleneckCSP" and dialect.concat_act not in (None, spec.activation):
        named = {"concat_act": dialect.concat_act} | named
    if layer.op in dialect.words and layer.op not in UNSCALED:
        if args:
            args = (_width(args[0], spec, place, dialect, notes), *args[1:])
        elif "c_out" in named:
            named["c_out"] = _width(named["c_out"], spec, place, dialect, notes)
    return replace(layer, args=args, kwargs=named, repeats=repeats)


def _activation(named: dict[str, Any], spec: ModelSpec, place: str, dialect: Dialect, notes: list[str]) -> None:
    """``act: True`` is the default, False none; yolov5 v7.0 put a dilation before it, and older files did not know."""
    if isinstance(named.get("dilation"), str | bool) and "act" not in named:
        named["act"] = named.pop("dilation")
    act = named.get("act")
    if act is True:
        del named["act"]
    elif act is False:
        named["act"] = "identity"
    elif isinstance(act, int | float):
        raise Fault(f"{place}: act is True, False or an activation; got {act}")
    elif dialect.switch and act in ACTIVATIONS.values():
        del named["act"]
        notes.append(
            f"{place}: for {dialect.program} any activation here means its own, so this one is {spec.activation}"
        )


def _kernel(named: dict[str, Any], positions: Sequence[str], place: str, dialect: Dialect) -> None:
    """``[1, 1]`` is 1. Other programs pad by half of a kernel, rounded down: one cell too many where it is even."""
    kernel = named.get("kernel", 1)
    if isinstance(kernel, tuple) and len(kernel) == 2 and kernel[0] == kernel[1]:
        named["kernel"] = kernel = kernel[0]
    if isinstance(kernel, int) and kernel % 2 == 0 and named.get("padding") is None:
        hint = "; write its padding" if "padding" in positions else ""
        raise Fault(
            f"{place}: {dialect.program} pads the even kernel {kernel} by {kernel // 2}, which adds a row and a column "
            f"to the map{hint}"
        )


def _width(width: Any, spec: ModelSpec, place: str, dialect: Dialect, notes: list[str]) -> Any:
    """The width to write for what the file says, with a note where the program builds another than one would expect."""
    if not isinstance(width, int) or isinstance(width, bool):
        return width
    scale = spec.scaling.width
    rounded = math.ceil(width * scale / DIVISOR) * DIVISOR
    if width == _outputs(spec):
        if scale != 1:
            notes.append(
                f"{place}: c_out {width} is scaled to {rounded} like any other; {dialect.program} would leave it at "
                f"{width}, because a head for {spec.num_classes} classes has as many outputs (na * (nc + 5))"
            )
        return width
    if scale == 1 and rounded != width:
        notes.append(
            f"{place}: c_out {width} is rounded up to {rounded}, a multiple of {DIVISOR}, as in {dialect.program}"
        )
        return rounded
    return width


def _word(value: Any, spec: ModelSpec) -> Any:
    """What a piece of text stands for; text that the closed grammar does not hold stays as it is."""
    if not isinstance(value, str):
        return value
    if value in CONSTANTS:
        return CONSTANTS[value]
    short = value.replace(" ", "")
    if short == OUTPUTS:
        return _outputs(spec)
    return ACTIVATIONS.get(short.replace("inplace=True", "").replace(",)", ")"), value)


def _outputs(spec: ModelSpec) -> int:
    """Channels of a head's last convolution: ``na * (nc + 5)``."""
    per_level = spec.anchors if isinstance(spec.anchors, int) else len(spec.anchors[0]) // 2
    return per_level * (spec.num_classes + 5)


# ---- yolov5 v1.0: output convolutions as rows


def _outputs_into_head(spec: ModelSpec) -> ModelSpec:
    """The same model with the rows ``nn.Conv2d [na * (nc + 5), 1, 1]`` gone: `Detect` holds such convolutions itself.

    A Detect from ``[]`` reads the output rows, the last first. Here levels go by ascending stride, and anchors, which
    stand in the file's order of levels, go with them. Rows behind an output row move up.
    """
    layers = spec.layers
    head = len(layers) - 1
    sources = [_absolute(layer, index) for index, layer in enumerate(layers)]
    outputs = [index for index, layer in enumerate(layers) if layer.op == "nn.Conv2d"]
    faults = []
    for index in outputs:
        if layers[index].args not in ((_outputs(spec), 1, 1), (_outputs(spec), 1), (_outputs(spec),)):
            faults.append(
                f"{row_place(index, layers[index])}: nn.Conv2d is read as an output row before Detect only, "
                f"[na * (nc + 5), 1, 1]"
            )
    for index, layer in enumerate(layers[:head]):
        for source in set(outputs).intersection(sources[index]):
            faults.append(f"{row_place(index, layer)}: reads row {source}, an output row, which only Detect may read")
    levels = sources[head] or outputs[::-1]
    if layers[head].op != "Detect" or set(levels) != set(outputs):
        faults.append(
            f"{row_place(head, layers[head])}: behind nn.Conv2d rows the last row is a Detect that reads them all"
        )
    elif not isinstance(spec.anchors, int) and len(spec.anchors) != len(levels):
        faults.append(f"{spec.path}: anchors are given for {len(spec.anchors)} levels, output rows are {len(levels)}")
    if faults:
        raise Fault(*faults)

    strides = _strides(layers, sources)
    order = sorted(range(len(levels)), key=lambda level: strides[levels[level]])
    anchors = spec.anchors
    if not isinstance(anchors, int):
        anchors = tuple(anchors[level] for level in order)
    read = [sources[levels[level]][0] for level in order]

    kept = [index for index in range(len(layers)) if index not in outputs]
    place = {old: new for new, old in enumerate(kept)} | {-1: -1}
    moved = []
    for old in kept[:-1]:
        new = place[old]
        renamed = tuple(
            place[source] - new if isinstance(written, int) and written < 0 else place[source]
            for written, source in zip(layers[old].sources, sources[old], strict=True)
        )
        moved.append(replace(layers[old], sources=renamed))
    moved.append(replace(layers[head], sources=tuple(place[source] for source in read)))
    said = (
        f"{spec.path}: the nn.Conv2d rows {', '.join(map(str, outputs))} went into Detect, which has such convolutions "
        f"itself; the rows behind them moved up, and the levels of head and anchors go by ascending stride"
    )
    return replace(spec, layers=tuple(moved), anchors=anchors, notes=(*spec.notes, said))


def _absolute(layer: LayerSpec, index: int) -> list[int]:
    """The rows that a row reads, -1 for the image. Raises `Fault` where there is no such row."""
    found = []
    for source in layer.sources:
        row = -1 if index == 0 and source == -1 else source
        if isinstance(row, int) and row < 0 < index:
            row = index + row
        if not isinstance(row, int) or not (0 <= row < index or (index == 0 and row == -1)):
            raise Fault(f"{row_place(index, layer)}: reads from {source}, which is no row before it")
        found.append(row)
    return found


def _strides(layers: Sequence[LayerSpec], sources: Sequence[Sequence[int]]) -> list[float]:
    """The stride of every row of a yolov5 v1.0 file, whose maps change size in Conv, Focus and nn.Upsample only."""
    strides: list[float] = []
    for layer, read in zip(layers, sources, strict=True):
        stride = strides[read[0]] if read and read[0] >= 0 else 1.0
        if layer.op in ("Conv", "Focus"):
            given = layer.kwargs.get("stride", layer.args[2] if len(layer.args) > 2 else 1)
            stride *= (2 if layer.op == "Focus" else 1) * (given if isinstance(given, int) else 1)
        elif layer.op == "nn.Upsample" and len(layer.args) > 1 and isinstance(layer.args[1], int):
            stride /= max(layer.args[1], 1)
        strides.append(stride)
    return strides
