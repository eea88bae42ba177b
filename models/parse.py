"""YAML text to `ModelSpec` and back. Nothing in a file is ever executed.

The grammar is in ``docs/yaml.md``. PyYAML's parser is used for its events and marks (line and column); the values are
built here, because YAML 1.1 reads ``1e-3`` as a string and ``no`` as False, and lets a duplicate key win in silence.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data.structures import Fault, nearest
from models.dialects import KEYS, OTHER_KEYS, translate
from models.registry import OPS
from models.spec import (
    CONSTANTS,
    FLOAT,
    INTEGER,
    Anchors,
    Choice,
    LayerSpec,
    ModelSpec,
    Scaling,
    Where,
    clip,
    flow,
    row_text,
)
from models.user_ops import is_loaded, load_ops

# Far above what a model needs (yolov4-p7: 4 kB, 60 rows), so low that no file keeps a machine busy.
LARGEST_FILE = 100_000  # bytes
LARGEST_TREE = 20_000  # YAML nodes, aliases counted as often as they are used
DEEPEST_TREE = 40
MOST_ROWS = 1_000
MOST_SOURCES = 64  # of one row
MOST_FAULTS = 50  # told of one file; what comes after them follows from them as a rule

TOP_KEYS = (
    *("name", "dialect", "ops", "nc", "depth_multiple", "width_multiple", "activation", "anchors"),
    *("backbone", "head"),
)
ROW_KEYS = ("name", "from", "number", "op", "args")

# The searchable block of ML-TANGO: complete BottleneckCSP2 candidates, {3x3, 5x5} x {ReLU, LeakyReLU, Mish}.
SHORTHANDS: Mapping[str, tuple[str, Mapping[str, tuple[Any, ...]]]] = {
    "MBottleneckCSP2": ("BottleneckCSP2", {"kernel": (3, 5), "act": ("relu", "leaky", "mish")}),
}

NAME = re.compile(r"[A-Za-z_]\w{0,31}")
PLACE = "(here):"  # begins a fault of a row's part until it is known where that stands
UNREADABLE = ""  # the op of a row that is so wrong that only its place is known
POSITION = re.compile(r":(\d+):(\d+)")


def parse(
    source: str | os.PathLike[str], dialect: str | None = None, trust_ops: bool = False, scale: str | None = None
) -> ModelSpec:
    """The model file at a path. Raises `Fault` with ``file:line:column`` for anything that is not one.

    ``dialect`` forces how the file is read; left out, the file says it, or it is recognised (`models.dialects`).
    ``scale`` is one of the sizes that a file of ultralytics lists; left out, the file or its name says it.
    ``trust_ops`` runs the Python file that the YAML names with ``ops:`` (`models.user_ops`); without it, that is a
    Fault. `models.graph.load_graph` tells what is wrong with the rows' meaning in the same Fault.
    """
    spec, faults = read(source, dialect, trust_ops, scale)
    if faults or spec is None:
        raise Fault(*in_order(faults, str(Path(source))))
    return spec


def parse_text(
    text: str, path: str = "<text>", name: str = "model", dialect: str | None = None, scale: str | None = None
) -> ModelSpec:
    """The model described by YAML `text`; `path` is only what faults call it."""
    spec, faults = read_text(text, path, name, dialect, scale=scale)
    if faults or spec is None:
        raise Fault(*in_order(faults, path))
    return spec


def in_order(faults: Sequence[str], path: str) -> list[str]:
    """Faults of a file by line and column, each once, at most `MOST_FAULTS` of them."""

    def position(fault: str) -> tuple[int, int]:
        found = POSITION.match(fault.removeprefix(path))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    distinct = sorted(dict.fromkeys(faults), key=position)
    return distinct[:MOST_FAULTS] + [f"{path}: there are more faults than these"] * (len(distinct) > MOST_FAULTS)


def read(
    source: str | os.PathLike[str], dialect: str | None = None, trust_ops: bool = False, scale: str | None = None
) -> tuple[ModelSpec | None, list[str]]:
    """As `read_text`, of the file at a path. Raises `Fault` where no text can be read from it."""
    path = Path(source)
    if path.is_dir():
        raise Fault(f"{path}: is a folder, not a model file")
    if not path.is_file():
        whole = path.with_stem(path.stem[:-1]) if len(path.stem) > 1 else path
        hint = f"; {whole} with --scale {path.stem[-1]}?" if whole.is_file() else ""
        raise Fault(f"{path}: no such model file{hint}")
    if path.stat().st_size > LARGEST_FILE:
        raise Fault(f"{path}: {path.stat().st_size:,} bytes; a model file has at most {LARGEST_FILE:,}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise Fault(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})") from None
    return read_text(text, str(path), path.stem, dialect, trust_ops, scale)


def read_text(
    text: str,
    path: str = "<text>",
    name: str = "model",
    dialect: str | None = None,
    trust_ops: bool = False,
    scale: str | None = None,
) -> tuple[ModelSpec | None, list[str]]:
    """A model as far as its text can be read, and what is wrong with the text, a line each.

    With faults, the spec has an `UNREADABLE` row for each that says nothing, and the default for each wrong value; it
    is None where what the rows mean cannot be known. Raises `Fault` for text that is not a YAML mapping at all.
    """
    top = _top(text, path)
    faults: list[str] = []
    for key in top.value:
        if key not in TOP_KEYS and key not in KEYS and key not in OTHER_KEYS:
            faults.append(f"{top.key_where[key]}: unknown key {clip(repr(key))}{_near(key, TOP_KEYS)}")
        if len(faults) > MOST_FAULTS:
            break
    for key in ("nc", "backbone", "head"):
        if key not in top.value:
            faults.append(f"{top.where}: key {key!r} is missing; a model file has nc, backbone and head")

    num_classes = top.get("nc", 1)
    if not _is_int(num_classes) or not 1 <= num_classes <= 100_000:
        got = clip(repr(num_classes))
        faults.append(f"{top.where_of('nc')}: nc is the number of classes, 1 to 100000; got {got}")
        num_classes = 1
    multiples = []
    for key in ("depth_multiple", "width_multiple"):
        value = top.get(key, 1.0)
        if not _is_number(value) or not 0 < value <= 100:
            faults.append(f"{top.where_of(key)}: {key} is a number over 0, at most 100; got {clip(repr(value))}")
            value = 1.0
        multiples.append(float(value))
    activation = top.get("activation", "silu")
    if not isinstance(activation, str):
        got = clip(repr(activation))
        faults.append(f"{top.where_of('activation')}: activation is a name such as mish; got {got}")
        activation = "silu"
    called = top.get("name", name)
    if not isinstance(called, str) and not _is_number(called):
        faults.append(f"{top.where_of('name')}: name is a word or a text in quotes; got {clip(flow(called))}")
    anchors = _anchors(top, faults)
    layers = _layers(top, faults)
    lacking = _ops(top, path, trust_ops)
    if lacking:  # that the ops of that file are unknown follows from it
        faults += lacking
        layers = [layer if layer.op in OPS else replace(layer, op=UNREADABLE) for layer in layers]
    written = ModelSpec(
        name=str(called),
        num_classes=num_classes,
        anchors=anchors,
        layers=tuple(layers),
        scaling=Scaling(*multiples),
        activation=activation,
        path=path,
        activation_at=top.where_of("activation"),
        anchors_at=top.where_of("anchors"),
    )
    stated = top.get("dialect", None)
    try:
        spec = translate(
            written,
            keys=tuple(top.value),
            stated=stated,
            stated_at=top.where_of("dialect"),
            asked=dialect,
            extra={key: (top.get(key, None), top.key_where[key]) for key in top.value if key in (*KEYS, *OTHER_KEYS)},
            scale=scale,
        )
    except Fault as fault:
        return None, [*faults, *fault.lines]
    return spec, faults


def dump(spec: ModelSpec, comment: str = "") -> str:
    """`spec` as YAML text that `parse_text` reads back to the same model."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"name: {flow(spec.name)}", "dialect: oneshot", f"nc: {spec.num_classes}"]
    lines += [f"depth_multiple: {spec.scaling.depth}", f"width_multiple: {spec.scaling.width}"]
    lines += [f"activation: {flow(spec.activation)}"]
    if isinstance(spec.anchors, int):
        lines.append(f"anchors: {spec.anchors}")
    else:
        levels = [[int(size) if size == int(size) else size for size in level] for level in spec.anchors]
        lines += ["anchors:", *(f"  - {flow(level)}" for level in levels)]
    for section in ("backbone", "head"):
        lines += ["", f"{section}:"]
        for index, layer in enumerate(spec.layers):
            if layer.section == section:
                lines.append(f"  - {row_text(layer)}  # {index}")
    return "\n".join(lines) + "\n"


def known(words: Collection[str]) -> str:
    """``"; known are relu, mish"``, for where no word is near the one that was found."""
    return f"; known are {', '.join(words)}" if words else ""


# ---- rows


def _layers(top: _Marked, faults: list[str]) -> list[LayerSpec]:
    """All rows of a file, with their faults added to `faults`."""
    rows: list[tuple[str, _Marked]] = []
    for section in ("backbone", "head"):
        listed = top.value.get(section)
        if listed is None:
            continue
        if not isinstance(listed.value, list) or not listed.value:
            faults.append(f"{listed.where}: {section} is a list of rows [from, number, module, args]")
            continue
        rows += [(section, row) for row in listed.value]
    if len(rows) > MOST_ROWS:
        faults.append(f"{rows[MOST_ROWS][1].where}: {len(rows):,} rows; a model has at most {MOST_ROWS:,}")
        return []
    layers = []
    places: dict[str, list[Where]] = {}
    for index, (section, row) in enumerate(rows):
        layer, wrong = _layer(index, section, row)
        layers.append(layer)
        faults += wrong
        if layer.name:
            places.setdefault(layer.name, []).append(layer.where)
        if len(faults) > MOST_FAULTS:
            break
    for name, found in places.items():
        if len(found) > 1:
            faults += [f"{where}: two rows are named {name!r}" for where in found]
    return layers


def _layer(index: int, section: str, row: _Marked) -> tuple[LayerSpec, list[str]]:
    """A row as far as it can be read, and what is wrong with it."""
    unreadable = LayerSpec(row.where, (), 1, UNREADABLE, section=section)
    try:
        parts = _parts(index, row)
    except Fault as fault:
        return unreadable, list(fault.lines)
    faults: list[str] = []
    written = clip(flow(row.plain()))

    def attempt(key: str, read: Callable[[_Marked], Any], absent: Any) -> Any:
        """What a part says, None where it is wrong."""
        if key not in parts:
            return absent
        try:
            return read(parts[key])
        except Fault as fault:
            place = f"{parts[key].where} layer {index} {written}:"
            faults.extend(place + line.removeprefix(PLACE) if line.startswith(PLACE) else line for line in fault.lines)
            return None

    name = attempt("name", _name, None)
    label = name or str(index)
    sources = attempt("from", _from, None)
    repeats = attempt("number", lambda part: _number(part, label), 1)
    op = attempt("op", _module, None)
    arguments = attempt("args", lambda part: _arguments(part, label), ((), {}))
    if sources is None or op is None or arguments is None:
        return replace(unreadable, name=name), faults
    args, kwargs = arguments
    if op in SHORTHANDS:
        op, choices = SHORTHANDS[op]
        kwargs = {key: Choice(f"{label}.{key}", options) for key, options in choices.items()} | kwargs
    return LayerSpec(row.where, sources, repeats or 1, op, args, kwargs, name, section, written), faults


def _parts(index: int, row: _Marked) -> dict[str, _Marked]:
    """The parts of a row by `ROW_KEYS`. Raises `Fault` where it is not one."""
    if isinstance(row.value, dict):
        return _named_row(row)
    if isinstance(row.value, list) and len(row.value) == 4:
        return dict(zip(ROW_KEYS[1:], row.value, strict=True))
    plain = row.plain()
    hint = ""
    if isinstance(plain, tuple):
        hint = _meant(plain)
    raise Fault(f"{row.where} layer {index}: a row is [from, number, module, args], got {clip(flow(plain))}{hint}")


def _meant(row: tuple[Any, ...]) -> str:
    """The row of four fields that one with more or fewer may stand for."""
    words = [index for index, value in enumerate(row) if isinstance(value, str)]
    match words:
        case [1] if len(row) == 3 and isinstance(row[2], tuple):
            return f"; `number` is missing: {clip(flow([row[0], 1, *row[1:]]))}"
        case [2] if len(row) == 3:
            return f"; args are missing: {clip(flow([*row, []]))}"
        case [2, *_] if len(row) > 4 and not isinstance(row[3], tuple):
            return f"; args are one list: {clip(flow([*row[:3], list(row[3:])]))}"
    return ""


def _name(part: _Marked) -> str:
    name = part.plain()
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Fault(f"{PLACE} a row's name is a letter, then up to 31 letters, digits and _; got {clip(repr(name))}")
    return name


def _from(part: _Marked) -> tuple[int | str, ...]:
    written = part.plain()
    sources = written if isinstance(written, tuple) else (written,)
    if not all(_is_int(source) or isinstance(source, str) for source in sources):
        raise Fault(f"{PLACE} `from` is a row's index or name, or a list of them; got {clip(flow(written))}")
    if len(sources) > MOST_SOURCES:
        raise Fault(f"{PLACE} a row reads at most {MOST_SOURCES} others, this one {len(sources):,}")
    return sources


def _number(part: _Marked, label: str) -> int | Choice:
    number = _value(part, f"{label}.number")
    counts = number.options if isinstance(number, Choice) else (number,)
    if not all(_is_int(count) and 1 <= count <= 1000 for count in counts):
        got = clip(flow(part.plain()))
        raise Fault(f"{PLACE} `number` is how often the module is repeated, 1 to 1000; got {got}")
    return number


def _module(part: _Marked) -> str:
    op = part.plain()
    if not isinstance(op, str) or not op:
        raise Fault(f"{PLACE} the module is a name, got {clip(flow(op))}")
    return op


def _arguments(part: _Marked, label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A row's arguments by position and by name."""
    listed = part.value
    if not isinstance(listed, list):
        got = clip(flow(part.plain()))
        raise Fault(f"{PLACE} args is a list, got {got}; write [{got}]")
    kwargs: dict[str, Any] = {}
    if listed and isinstance(listed[-1].value, dict) and "choice" not in listed[-1].value:
        kwargs = {key: _value(value, f"{label}.{key}") for key, value in listed[-1].value.items()}
        listed = listed[:-1]
    return tuple(_value(value, f"{label}.{position}") for position, value in enumerate(listed)), kwargs


def _named_row(row: _Marked) -> dict[str, _Marked]:
    for key in row.value:
        if key not in ROW_KEYS:
            raise Fault(f"{row.key_where[key]}: unknown key {clip(repr(key))} in a row{_near(key, ROW_KEYS)}")
    for key in ("from", "op"):
        if key not in row.value:
            raise Fault(f"{row.where}: a row needs the key {key!r}")
    return dict(row.value)


def _near(word: str, words: Collection[str]) -> str:
    return nearest(word, words) or known(words)


def _value(marked: _Marked, name: str) -> Any:
    """A plain value, or a `Choice` where the file says ``{choice: [...]}``; in a list, one step down, likewise."""
    if isinstance(marked.value, list):
        items = enumerate(marked.value)
        return tuple(_value(v, f"{name}.{at}") if isinstance(v.value, dict) else v.plain() for at, v in items)
    if not isinstance(marked.value, dict):
        return marked.plain()
    if set(marked.value) != {"choice"}:
        raise Fault(f"{marked.where}: a mapping here is a choice, {{choice: [3, 5]}}; got {clip(flow(marked.plain()))}")
    options = marked.value["choice"].plain()
    if not isinstance(options, tuple) or _holds_mapping(options):
        raise Fault(f"{marked.where}: a choice needs a list of plain options, got {clip(flow(options))}")
    try:
        return Choice(name, options)
    except Fault as fault:
        raise Fault(f"{marked.where}: {clip(str(fault))}") from None


def _holds_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, tuple) and any(_holds_mapping(item) for item in value))


def _anchors(top: _Marked, faults: list[str]) -> Anchors:
    anchors = top.get("anchors", 3)
    if _is_int(anchors) and 1 <= anchors <= 100:
        return anchors
    where, wrong = top.where_of("anchors"), ""
    if not isinstance(anchors, tuple) or not anchors:
        wrong = f"got {clip(flow(anchors))}"
    for level, sizes in enumerate(anchors if isinstance(anchors, tuple) else ()):
        if not isinstance(sizes, tuple) or not all(_is_number(size) and size > 0 for size in sizes):
            wrong = f"level {level} is {clip(flow(sizes))}"
        elif not sizes or len(sizes) % 2:
            wrong = f"level {level} has {len(sizes)} numbers"
        elif len(sizes) > 200:
            wrong = f"level {level} has {len(sizes) // 2} anchors"
        elif len(sizes) != len(anchors[0]):
            wrong = f"level {level} has {len(sizes) // 2}, level 0 has {len(anchors[0]) // 2}"
        if wrong:
            where = top.value["anchors"].value[level].where
            break
    if wrong:
        faults.append(
            f"{where}: anchors is how many a level (1 to 100), or for every level a list w, h, w, h, ... in pixels, "
            f"the same number on each; {wrong}"
        )
        return 3
    return tuple(tuple(float(size) for size in sizes) for sizes in anchors)


def _ops(top: _Marked, path: str, trusted: bool) -> list[str]:
    """Loads the Python file that a YAML names with ``ops:``, if it may; what is wrong with that."""
    if "ops" not in top.value:
        return []
    file, where = top.get("ops", None), top.where_of("ops")
    if not isinstance(file, str) or not file or not file.isprintable():
        return [f"{where}: ops is a Python file, its path seen from this file; got {clip(flow(file))}"]
    beside = Path(path).parent / file
    if is_loaded(beside):
        return []
    if not trusted:
        said = "is Python code that would run; --trust-ops allows it, or --ops FILE names it"
        return [f"{where}: ops: {clip(file)} {said}"]
    try:
        load_ops(beside)
    except Fault as fault:
        return list(fault.lines)
    return []


# ---- YAML nodes with their places


@dataclass(frozen=True)
class _Marked:
    """A YAML value and where it stands. Lists and mappings hold `_Marked` values."""

    value: Any
    where: Where
    key_where: Mapping[str, Where] = field(default_factory=dict)

    @property
    def inside(self) -> list[_Marked]:
        return [*self.value] if isinstance(self.value, list) else [*getattr(self.value, "values", list)()]

    @property
    def size(self) -> int:
        """How many values it is, with all inside it."""
        return 1 + sum(item.size for item in self.inside)

    @property
    def levels(self) -> int:
        """How many levels of values there are inside it."""
        return max((1 + item.levels for item in self.inside), default=0)

    def plain(self) -> Any:
        """The value alone; lists become tuples."""
        if isinstance(self.value, list):
            return tuple(item.plain() for item in self.value)
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value

    def get(self, key: str, default: Any) -> Any:
        return self.value[key].plain() if key in self.value else default

    def where_of(self, key: str) -> Where:
        return self.value[key].where if key in self.value else self.where


def _top(text: str, path: str) -> _Marked:
    try:
        top = _document(text, path)
    except Fault:
        raise
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = Where(path, mark.line + 1, mark.column + 1) if mark else path
        said = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise Fault(f"{where}: not valid YAML: {said}") from None
    except yaml.YAMLError as problem:  # a character that YAML does not allow
        raise Fault(f"{path}: not valid YAML: {str(problem).splitlines()[0]}") from None
    except (ValueError, OverflowError):  # of an escape or a directive
        raise Fault(f"{path}: not valid YAML: it holds a number that is out of range") from None
    if not isinstance(top.value, dict):
        raise Fault(f"{top.where}: a model file is a mapping with the keys {', '.join(TOP_KEYS)}")
    return top


def _document(text: str, path: str) -> _Marked:
    """The one value that `text` holds, read event by event, so that what is too large is not read to its end."""
    events: Iterator[Any] = yaml.parse(text, Loader=yaml.SafeLoader)
    anchored: dict[str, _Marked] = {}
    count = 0

    def place(event: Any) -> Where:
        return Where(path, event.start_mark.line + 1, event.start_mark.column + 1)

    def counted(values: int, levels: int, where: Where) -> None:
        nonlocal count
        count += values
        if count > LARGEST_TREE:
            raise Fault(f"{where}: more than {LARGEST_TREE:,} values")
        if levels > DEEPEST_TREE:
            raise Fault(f"{where}: nested deeper than {DEEPEST_TREE} levels")

    def value(event: Any, level: int) -> _Marked:
        where = place(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise Fault(f"{where}: no value before this one is marked &{clip(str(event.anchor))}")
            again = anchored[event.anchor]
            counted(again.size, level + again.levels, where)
            return again
        counted(1, level, where)
        if event.tag is not None:
            tag = clip(repr(event.tag.replace("tag:yaml.org,2002:", "!!")))
            raise Fault(f"{where}: tag {tag} is not allowed; values are plain words, numbers, lists and mappings")
        if isinstance(event, yaml.ScalarEvent):
            marked = _Marked(_scalar(event, where), where)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(item := next(events), yaml.SequenceEndEvent):
                items.append(value(item, level + 1))
            marked = _Marked(items, where)
        else:
            values: dict[str, _Marked] = {}
            key_where: dict[str, Where] = {}
            while not isinstance(key := next(events), yaml.MappingEndEvent):
                if not isinstance(key, yaml.ScalarEvent):
                    raise Fault(f"{place(key)}: a key is a plain word")
                if key.value in values:
                    first = key_where[key.value]
                    raise Fault(f"{place(key)}: key {clip(repr(key.value))} stands twice, first at {first}")
                values[key.value] = value(next(events), level + 1)
                key_where[key.value] = place(key)
            marked = _Marked(values, where, key_where)
        if event.anchor:
            anchored[event.anchor] = marked
        return marked

    next(events)  # of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        raise Fault(f"{path}: the file is empty")
    top = value(next(events), 0)
    next(events)  # the document's end
    if not isinstance(more := next(events), yaml.StreamEndEvent):
        raise Fault(f"{place(more)}: a second document begins here; a model file has one")
    return top


def _scalar(event: yaml.ScalarEvent, where: Where) -> Any:
    text = event.value
    if event.style in ("'", '"', "|", ">"):
        return text
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        if len(text) > 18:
            raise Fault(f"{where}: {text[:20]}... is too large a number")
        return int(text)
    if FLOAT.fullmatch(text):
        if not math.isfinite(float(text)):
            raise Fault(f"{where}: {text[:20]} is too large a number")
        return float(text)
    return text


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
