"""What a model file of another program means, in our normal form.

The rows of ScaledYOLOv4 and of every yolov5 look alike and differ in what they leave out: the activation that a Conv
has, the order of its arguments, where the head's output convolutions stand. A `Dialect` holds these differences as
data, one for each time a program changed its mind; `translate` applies them. What a program does that its file does not
say (a width that it does not scale, an argument that it never reads) is told in a note, never done in silence.

To read a further program: add a `Dialect` below, a function into `MEANINGS` where a module has another name or layout
here, and one over all rows where these have to change places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.structures import Fault, nearest
from models.spec import LayerSpec, ModelSpec, Scaling, Where, clip, flow, row_place, row_text

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
FREE = "Detect [nc]"  # the head `Detect` where it is written without anchors, which makes it another one
GELAN = frozenset(("RepNCSPELAN4", "SPPELAN", "ELAN1", "ADown", "AConv", "CBLinear", "CBFuse"))
V9_HEADS = frozenset((FREE, "DDetect", "DualDDetect", "TripleDDetect"))
V7_BLOCKS = frozenset(
    ("BottleneckCSPA", "BottleneckCSPB", "BottleneckCSPC", "Stem", "RepConv", "Shortcut", "IAuxDetect")
)
V7_BLOCKS |= {"MP", "SP", "SPPCSPC", "ResCSPB", "ResCSPC", "ResXCSPB", "ResXCSPC"}
V8_BLOCKS = frozenset(("C2", "C2f", "C3k2", "C2fCIB", "PSA", "C2PSA", "SCDown", "A2C2f", "RepC3", "v10Detect"))
# Heads of other programs that say something else than boxes, and what that is.
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("Segment", "Segment26", "DSegment", "DualDSegment", "ISegment"), "a head for instance masks"),
    **dict.fromkeys(("Pose", "Pose26", "IKeypoint"), "a head for key points"),
    **dict.fromkeys(("OBB", "OBB26"), "a head for turned boxes"),
    **dict.fromkeys(("Panoptic", "SemanticSegment"), "a head for masks of the whole image"),
    "Depth": "a head for distances",
    "Classify": "a classifier whose layers differ from those of `Classify` here",
    "RTDETRDecoder": "a transformer that decodes boxes",
    **dict.fromkeys(("WorldDetect", "YOLOEDetect", "YOLOESegment", "YOLOESegment26"), "a head for classes by text"),
}
UNSCALED = frozenset(  # by width_multiple
    ("nn.Upsample", "nn.MaxPool2d", "nn.ZeroPad2d", "nn.Identity", "nn.Conv2d", "Concat", "Add", "ReOrg", "DWT")
)
UNSCALED |= {"CBLinear", "CBFuse", "Detect", "IDetect", "IAuxDetect", "DFLDetect", "DualDDetect", "TripleDDetect"}
UNSCALED |= {"v10Detect"}

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
    "Bottleneck": ("c_out", "shortcut", "groups"),
    "C3": ("c_out", "shortcut", "groups", "expansion"),
    "C2fCIB": ("c_out", "shortcut", "large", "expansion"),
    "SPPF": ("c_out", "pool"),
    "RepConv": ("c_out", "kernel", "stride", "groups"),
    "SPPCSPC": ("c_out", "expansion", "pools"),
    "BottleneckCSPB": ("c_out", "shortcut", "groups"),
    "BottleneckCSPC": ("c_out", "shortcut", "groups", "expansion"),
    "DownC": ("c_out",),
    "Stem": ("c_out",),
    "nn.MaxPool2d": ("kernel_size", "stride", "padding"),
    "Detect": ("num_classes", "anchors"),
    "DFLDetect": ("num_classes", "bins"),
    "v10Detect": ("num_classes", "bins"),
}

Named = dict[str, Any]


# ---- modules that have another name or layout here: what a row's arguments are then called


def _named(op: str, **given: Any) -> Callable[[Named], tuple[str, Named]]:
    """Another name, and arguments that a row does not write."""
    return lambda named: (op, {**given, **named})


def _max_pool(named: Named) -> tuple[str, Named]:
    return "nn.MaxPool2d", {"kernel_size": named.get("kernel_size", 2)}


def _same_pool(named: Named) -> tuple[str, Named]:
    size = named.get("kernel_size", 3)
    padding = size // 2 if isinstance(size, int) else None
    return "nn.MaxPool2d", {"kernel_size": size, "stride": named.get("stride", 1), "padding": padding}


def _nothing(op: str) -> Callable[[Named], tuple[str, Named]]:
    """A module that takes an argument (a dimension) and has no use for it."""
    return lambda named: (op, {})


def _rep_conv(named: Named) -> tuple[str, Named]:
    padding, kernel = named.pop("padding", None), named.get("kernel", 3)
    if padding is not None and isinstance(kernel, int) and padding != kernel // 2:
        raise ValueError(f"padding {padding} does not keep the map's size, which its branches need")
    return "RepConv", named


def _down(named: Named) -> tuple[str, Named]:
    if named.pop("pool", 2) != 2:
        raise ValueError("it halves the map here, and does nothing else")
    return "DownC", named


def _with_or_without_anchors(named: Named) -> tuple[str, Named]:
    return ("Detect", named) if "anchors" in named else ("DFLDetect", {**named, "widths": "v9"})


def _end_to_end(named: Named) -> tuple[str, Named]:
    """Ultralytics' Detect; what the file's keys and other rows say about it is in `named` (`_scaled`)."""
    if named.get("bins") == "anchors":
        raise ValueError("it has no anchors")
    if not named.pop("end2end", False):
        return "DFLDetect", named
    if not named.pop("light", False):
        raise ValueError("end2end with convolutions that are not depth-wise is not known here")
    return "v10Detect", named


def _late_sppf(named: Named) -> tuple[str, Named]:
    """Its third argument is how many pools; rows that have it also have no activation before the pools."""
    if "times" in named:
        if named.pop("times") != 3:
            raise ValueError("there are 3 pools in a row here")
        named["first_act"] = "identity"
    return "SPPF", named


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
    meanings: Mapping[str, Callable[[Named], tuple[str, Named]]] = field(default_factory=dict)
    leaves_outputs: bool = True  # a width that equals a head's number of outputs is not scaled there


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
    words=NEW | {"Segment"},
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
PREVIEW = replace(  # before it was ScaledYOLOv4
    V1,
    name="yolov4-preview",
    program="PyTorch_YOLOv4, branch u5_preview",
    words=V1.words | {"BottleneckCSP2", "SPPCSP", "VoVCSP", "MP"},
    arguments={**V1.arguments, **{op: SCALED.arguments[op] for op in SCALED.marks}, "MP": ("kernel_size",)},
    unread=SCALED.unread,
    meanings={"MP": _max_pool},
)
YOLOR = replace(
    SCALED,
    name="yolor",
    program="yolor, branch paper",
    activation="silu",
    words=SCALED.words | {"BottleneckCSPF", "DownC", "ReOrg", "DWT", "IDetect"},
    marks=frozenset(("IDetect", "BottleneckCSPF", "DWT")),
    arguments={**SCALED.arguments, "DownC": ("c_out", "pool")},
    unread={**SCALED.unread, "DownC": ("number",)},
    meanings={"DownC": _down},
)
YOLOV7 = Dialect(
    "yolov7",
    "yolov7",
    words=COMMON | V7_BLOCKS | {"DownC", "ReOrg", "IDetect"},
    marks=V7_BLOCKS | {"DownC", "ReOrg", "IDetect"},
    arguments={
        **ARGUMENTS,
        "RepConv": (*BLOCK, "act"),
        "MP": ("kernel_size",),
        "SP": ("kernel_size", "stride"),
        "Shortcut": ("dimension",),
        "Stem": (*BLOCK, "act"),
        "DownC": ("c_out", "pool"),
        "SPPCSPC": ("c_out", "shortcut", "groups", "expansion", "pools"),
        **dict.fromkeys(
            ("BottleneckCSPA", "BottleneckCSPB", "BottleneckCSPC", "ResCSPB", "ResCSPC", "ResXCSPB", "ResXCSPC"),
            ("c_out", "shortcut", "groups", "expansion"),
        ),
    },
    unread={
        "DownC": ("number",),
        "SPPCSPC": ("number", "shortcut", "groups"),
        "Stem": ("kernel", "stride", "padding", "groups", "act"),
        **dict.fromkeys(("BottleneckCSPB", "ResCSPB", "ResXCSPB"), ("expansion",)),
    },
    meanings={
        "MP": _max_pool,
        "SP": _same_pool,
        "Shortcut": _nothing("Add"),
        "RepConv": _rep_conv,
        "DownC": _down,
        "BottleneckCSPA": _named("C3"),
        "ResCSPB": _named("BottleneckCSPB", shortcut=True, block="residual"),
        "ResCSPC": _named("BottleneckCSPC", shortcut=True, block="residual"),
        "ResXCSPB": _named("BottleneckCSPB", shortcut=True, groups=32, block="residual", squeeze=1.0),
        "ResXCSPC": _named("BottleneckCSPC", shortcut=True, groups=32, block="residual", squeeze=1.0),
    },
)
V9_REFUSED = {"Segment", "DSegment", "DualDSegment", "Panoptic"}
YOLOV9 = Dialect(
    "yolov9",
    "yolov9",
    words=(COMMON - {"Detect"})
    | GELAN
    | V9_HEADS
    | V9_REFUSED
    | {"MP", "SP", "SPPCSPC", "SPPF", "Silence", "ReOrg", "Shortcut"}
    | {"nn.MaxPool2d", "nn.ZeroPad2d", "nn.ConvTranspose2d"},
    marks=GELAN | V9_HEADS | V9_REFUSED | {"Silence"},
    arguments={
        **YOLOV7.arguments,
        "Conv": (*BLOCK, "dilation", "act"),
        "Silence": (),
        **dict.fromkeys(("Detect", "DDetect"), ("num_classes", "anchors")),
    },
    unread=YOLOV7.unread,
    meanings={
        **{op: YOLOV7.meanings[op] for op in ("MP", "SP", "Shortcut")},
        "Silence": _nothing("nn.Identity"),
        "Detect": _with_or_without_anchors,
        "DDetect": _named("DFLDetect", widths="v9", groups=4),
    },
)
ULTRALYTICS = Dialect(
    "ultralytics",
    "ultralytics 8",
    words=(NEW - {"Detect"}) | GELAN | V8_BLOCKS | set(REFUSED) | {FREE, "nn.Identity", "nn.ConvTranspose2d"},
    marks=frozenset((FREE, "v10Detect", *REFUSED)) - {"Classify"},  # which is a head of ours as well
    arguments={
        **V5.arguments,
        "Bottleneck": ("c_out", "shortcut", "groups"),
        "C2fCIB": ("c_out", "shortcut", "large", "groups", "expansion"),
        "SPPF": ("c_out", "pool", "times", "shortcut"),
        "Detect": ("num_classes", "bins"),
    },
    unread={**V5.unread, "C2fCIB": ("groups",)},
    meanings={
        "Bottleneck": _named("Bottleneck", wide=True),
        "SPPF": _late_sppf,
        "Detect": _end_to_end,
    },
    leaves_outputs=False,
)
# What ultralytics does to rows at some scales and its files do not say: at which, from which argument on, and what.
SCALE_RULES: Mapping[str, tuple[str, int, tuple[Any, ...]]] = {
    "C3k2": ("mlx", 1, (True,)),
    "A2C2f": ("lx", 3, (True, 1.2)),
}
LIGHT_HEAD = ("C3k2", "A2C2f", "C2fCIB")  # with one of these rows its Detect has depth-wise convolutions
SCALED_NAME = re.compile(r"yolo(?:e-)?v?\d+([a-z])(?![a-z])")  # yolov8n, yolo11x-p2
KEYS = ("scales", "scale", "reg_max", "end2end")  # of ultralytics' files, besides ours
OTHER_KEYS = ("kpt_shape", "ch", "channels", "text_model", "sem_nc", "nid")  # that say nothing about a detector

# The newest last: of readings that agree it is the one that is named.
FOREIGN = (SCALED, YOLOR, YOLOV7, YOLOV9, ULTRALYTICS, PREVIEW, V1, V2, V3, V4, V5)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (ONESHOT, *FOREIGN)}


def translate(
    spec: ModelSpec,
    *,
    keys: Collection[str],
    stated: Any,
    stated_at: Where,
    asked: str | None,
    extra: Mapping[str, tuple[Any, Where]] | None = None,
    scale: str | None = None,
) -> ModelSpec:
    """`spec`, whose rows hold what the file says, as its dialect means it, in normal form.

    ``keys`` are the file's top-level keys, ``stated`` its `dialect:` and ``asked`` the one that a user forces. With
    neither, it is recognised. ``extra`` holds the keys that only other programs have, ``scale`` is the one of the
    file's `scales:` that a user asks for. Raises `Fault` where several dialects fit and read the file differently, and
    for what no reading of a dialect can mean.
    """
    extra = extra or {}
    forced = _forced(stated, stated_at, asked)
    fitting = (forced,) if forced else recognise(spec, keys)
    readings: dict[str, ModelSpec] = {}
    problem = Fault()
    for dialect in fitting:
        try:
            _check_heads(spec, dialect)
            readings[dialect.name] = read_as(_scaled(spec, dialect, extra, scale), dialect, keys)
        except Fault as fault:
            problem = fault
    if not readings:
        raise problem
    *others, newest = readings.values()
    if any(other != newest for other in others):
        raise _several(spec, readings)
    if forced or newest.activation != "silu":
        return newest
    return replace(newest, notes=(*_unsaid(spec, keys), *newest.notes))


def recognise(spec: ModelSpec, keys: Collection[str]) -> tuple[Dialect, ...]:
    """The dialects that a file may be in, by its keys and modules; the newest last.

    Ours is a file with something that no other program knows: named arguments, named rows, choices, a `name:`, an
    activation by its name; and one without a key that all others need. Ultralytics' files alone need neither anchors
    nor multiples; they have `scales:`, or a head without anchors.
    """
    text = "activation" in keys and "nn." in spec.activation  # an activation as code, which is never ours
    if "name" in keys or any(_only_ours(layer) for layer in spec) or ("activation" in keys and not text):
        return (ONESHOT,)
    used = _used(spec)
    if "anchors" not in keys:
        return (ULTRALYTICS,) if "scales" in keys or used & ULTRALYTICS.marks else (ONESHOT,)
    if not set(NEEDED) <= set(keys):
        return (ONESHOT,)
    if text:
        return (YOLOV9,) if used & YOLOV9.marks else (V5,)
    others = [dialect for dialect in FOREIGN if dialect is not ULTRALYTICS]
    found = tuple(d for d in others if used <= d.words and (used & d.marks or not d.marks))
    return found or (ONESHOT,)


def _unsaid(spec: ModelSpec, keys: Collection[str]) -> list[str]:
    """A note where silu is taken because the file names no activation, and older programs had another for its rows."""
    if "activation" in keys or not set(NEEDED) <= set(keys):
        return []
    used = _used(spec)
    able = [d for d in FOREIGN if used <= d.words and (used & d.marks or d.marks != V1.marks)]  # not without its rows
    others = {d.activation: d.program for d in able if d.activation != "silu"}
    said = ", ".join(f"{activation} to {program}" for activation, program in others.items())
    settled = "`activation: NAME` in the file settles it"
    return [f"{spec.path}: no `activation:`, so silu; such rows meant {said}. {settled}"] if others else []


def _used(spec: ModelSpec) -> set[str]:
    """The modules of a file, without those that no other program knows: these are ours, or a mistake told of later."""
    used = {FREE if layer.op == "Detect" and len(layer.args) == 1 else layer.op for layer in spec}
    return used & frozenset().union(*(dialect.words for dialect in FOREIGN))


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


def _check_heads(spec: ModelSpec, dialect: Dialect) -> None:
    """Refuses a head that is not there at any scale before anybody looks for the right one."""
    faults = []
    for index, layer in enumerate(spec):
        if layer.op in REFUSED and layer.op in dialect.words:
            said = f"{layer.op} of {dialect.program} is {REFUSED[layer.op]}, which is not supported here"
            faults.append(f"{row_place(index, layer)}: {said}")
    if faults:
        raise Fault(*faults)


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
    spec = _pieces_by_channel(spec)
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
    op = layer.op
    args = tuple(_word(value, spec) for value in layer.args)
    repeats, named = layer.repeats, {key: _word(value, spec) for key, value in layer.kwargs.items()}
    positions = dialect.arguments.get(layer.op)
    if positions is not None:
        if len(args) > len(positions):
            raise Fault(
                f"{place}: {op} of {dialect.program} takes {', '.join(positions) or 'nothing'}; got {len(args)} values"
            )
        twice = [name for name in positions[: len(args)] if name in named]
        if twice:
            raise Fault(f"{place}: {twice[0]} is given by its position and by name")
        named = dict(zip(positions, args, strict=False)) | named
        ignored = dialect.unread.get(layer.op, ())
        for name in ignored:
            if name in positions[: len(args)]:  # what is given by name is no row of that program
                del named[name]
                unread.setdefault((layer.op, name), []).append(index)
        if "number" in ignored and repeats != 1:
            repeats = 1
            unread.setdefault((layer.op, "number"), []).append(index)
        _activation(named, spec, place, dialect, notes)
        _kernel(named, positions, place, dialect)
        if op in dialect.meanings:
            try:
                op, named = dialect.meanings[op](named)
            except ValueError as problem:
                raise Fault(f"{place}: {op} of {dialect.program}: {problem}") from None
        ours = OURS.get(op, ())
        gap = next((k for k, name in enumerate(ours) if name not in named), len(ours))
        args = tuple(named.pop(name) for name in ours[:gap])  # behind a gap, by name
    if layer.op == "BottleneckCSP" and dialect.concat_act not in (None, spec.activation):
        named = {"concat_act": dialect.concat_act} | named
    if layer.op in dialect.words and op not in UNSCALED:
        if args:
            args = (_width(args[0], spec, place, dialect, notes), *args[1:])
        elif "c_out" in named:
            named["c_out"] = _width(named["c_out"], spec, place, dialect, notes)
    return replace(layer, op=op, args=args, kwargs=named, repeats=repeats)


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
    if dialect.leaves_outputs and width == _outputs(spec):
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
    short = value.replace(" ", "").removeprefix("torch.")
    if short == OUTPUTS:
        return _outputs(spec)
    return ACTIVATIONS.get(short.replace("inplace=True", "").replace(",)", ")"), value)


def _outputs(spec: ModelSpec) -> int:
    """Channels of a head's last convolution: ``na * (nc + 5)``."""
    per_level = spec.anchors if isinstance(spec.anchors, int) else len(spec.anchors[0]) // 2
    return per_level * (spec.num_classes + 5)


# ---- yolov9: pieces of a map


def _pieces_by_channel(spec: ModelSpec) -> ModelSpec:
    """The same model whose `CBFuse` rows say from which channel on they take a source, not which of its pieces.

    There a CBLinear gives several maps; here it gives one, with its pieces side by side.
    """
    layers = list(spec.layers)
    for index, layer in enumerate(layers):
        if layer.op != "CBFuse":
            continue
        place, sources = row_place(index, layer), _absolute(layer, index)[:-1]
        chosen = layer.args[0] if len(layer.args) == 1 else None
        if not isinstance(chosen, tuple) or len(chosen) != len(sources):
            raise Fault(f"{place}: CBFuse says for each of its sources but the last which piece it takes, [[0, 1]]")
        firsts = []
        for source, piece in zip(sources, chosen, strict=True):
            pieces = layers[source].args[0] if source >= 0 and layers[source].op == "CBLinear" else None
            if not isinstance(pieces, tuple) or not isinstance(piece, int) or not 0 <= piece < len(pieces):
                raise Fault(f"{place}: row {source} is no CBLinear with a piece {flow(piece)}")
            if not all(isinstance(channels, int) for channels in pieces):
                raise Fault(f"{row_place(source, layers[source])}: the pieces of a CBLinear are numbers of channels")
            firsts.append(sum(pieces[:piece]))
        layers[index] = replace(layer, args=(tuple(firsts),))
    return replace(spec, layers=tuple(layers))


# ---- ultralytics: one file for several sizes


def _scaled(spec: ModelSpec, dialect: Dialect, extra: Mapping[str, tuple[Any, Where]], asked: str | None) -> ModelSpec:
    """`spec` at one of its file's scales, with what the file's other keys say put into its rows."""
    if dialect is not ULTRALYTICS:
        for key, (_, where) in extra.items():
            if key in KEYS:
                reads = f"dialect {dialect.name}" + (", this program's own," if dialect is ONESHOT else "")
                raise Fault(f"{where}: {key} is a key of dialect ultralytics; {reads} has no such key")
            if dialect is ONESHOT:
                raise Fault(f"{where}: unknown key {clip(repr(key))}; dialect {dialect.name} has no such key")
        if asked is not None:
            raise Fault(f"--scale {asked}: {spec.path} has no `scales:`")
        unread = [f"{where}: {key} says nothing about a detector, and is not read" for key, (_, where) in extra.items()]
        return replace(spec, notes=(*spec.notes, *unread))
    letter = _which_scale(spec, extra, asked)
    most = math.inf
    notes = list(spec.notes)
    if letter is not None:
        depth, width, most = extra["scales"][0][letter]
        spec = replace(spec, scaling=Scaling(float(depth), float(width)))
        if not Path(spec.path).stem.endswith(spec.name) or not _names_scale(spec.path, letter):
            spec = replace(spec, name=f"{spec.name}{letter}")
    light = any(layer.op in LIGHT_HEAD for layer in spec)
    layers = []
    changed: dict[str, list[int]] = {}
    for index, layer in enumerate(spec):
        letters, at, values = SCALE_RULES.get(layer.op, ("", 0, ()))
        args = layer.args
        if letter is not None and letter in letters:
            if len(args) < at:
                raise Fault(f"{row_place(index, layer)}: at scale {letter} ultralytics needs {at} arguments here")
            args = (*args[:at], *values, *args[at + len(values) :])
            if args != layer.args:
                changed.setdefault(layer.op, []).append(index)
        widest = args[0] if args and layer.op not in UNSCALED and layer.op != "Classify" else None
        if isinstance(widest, int) and widest > most:
            args = (int(most), *args[1:])
        kwargs = dict(layer.kwargs)
        if layer.op == "Detect":
            kwargs |= {"light": True} if light else {}
            kwargs |= {"end2end": True} if extra.get("end2end", (False,))[0] is True else {}
            if "reg_max" in extra and len(args) < 2:
                kwargs["bins"] = extra["reg_max"][0]
        layers.append(replace(layer, args=args, kwargs=kwargs))
    for op, rows in changed.items():
        values = SCALE_RULES[op][2]
        notes.append(
            f"{spec.path}: at scale {letter} {dialect.program} gives {op} {flow(values)} from its argument "
            f"{SCALE_RULES[op][1]} on, which the file does not say (layers {', '.join(map(str, rows))})"
        )
    return replace(spec, layers=tuple(layers), notes=tuple(notes))


def _names_scale(path: str, letter: str) -> bool:
    found = SCALED_NAME.search(Path(path).stem)
    return found is not None and found[1] == letter


def _which_scale(spec: ModelSpec, extra: Mapping[str, tuple[Any, Where]], asked: str | None) -> str | None:
    """The scale to read a file at: what a user asks for, what the file's `scale:` or its name says, or its only one."""
    if "scales" not in extra:
        if asked is not None:
            raise Fault(f"--scale {asked}: {spec.path} has no `scales:`")
        return None
    scales, where = extra["scales"]
    good = isinstance(scales, Mapping) and scales and all(_is_scale(values) for values in scales.values())
    if not good:
        raise Fault(
            f"{where}: scales is a mapping, a name and [depth, width, most channels] each, "
            f"{{n: [0.33, 0.25, 1024]}}; got {clip(flow(scales))}"
        )
    stated, stated_at = extra.get("scale", (None, where))
    for wanted, origin in ((asked, f"--scale {asked}"), (stated, f"{stated_at}: scale {clip(flow(stated))}")):
        if wanted is not None and (not isinstance(wanted, str) or wanted not in scales):
            raise Fault(
                f"{origin} is none of this file's scales{nearest(str(wanted), scales) or ': ' + ', '.join(scales)}"
            )
    found = SCALED_NAME.search(Path(spec.path).stem)
    named = found[1] if found and found[1] in scales else None
    chosen = asked or stated or named or (next(iter(scales)) if len(scales) == 1 else None)
    if chosen is None:
        one = next(iter(scales))
        raise Fault(
            f"{where}: the file has the scales {', '.join(scales)}; say which one: `scale: {one}` in the file, a copy "
            f"of it that is named so, or --scale {one}"
        )
    return str(chosen)


def _is_scale(values: Any) -> bool:
    """Whether it is depth and width, over 0 and at most 100, and a number of channels."""
    if not isinstance(values, tuple) or len(values) != 3:
        return False
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return numbers and 0 < values[0] <= 100 and 0 < values[1] <= 100 and values[2] >= 1


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
        elif len(sources[index]) != 1:
            faults.append(f"{row_place(index, layers[index])}: an output row reads one row, not {len(sources[index])}")
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
    """The stride of every row of a yolov5 v1.0 file, whose maps change size in few modules only."""
    strides: list[float] = []
    for layer, read in zip(layers, sources, strict=True):
        stride = strides[read[0]] if read and read[0] >= 0 else 1.0
        if layer.op in ("Conv", "Focus"):
            given = layer.kwargs.get("stride", layer.args[2] if len(layer.args) > 2 else 1)
            stride *= (2 if layer.op == "Focus" else 1) * (given if isinstance(given, int) else 1)
        elif layer.op == "nn.MaxPool2d" and len(layer.args) == 1 and isinstance(layer.args[0], int):
            stride *= max(layer.args[0], 1)
        elif layer.op == "nn.Upsample" and len(layer.args) > 1 and isinstance(layer.args[1], int):
            stride /= max(layer.args[1], 1)
        strides.append(stride)
    return strides
