"""YAML text to `ModelSpec` and back. Nothing in a file is ever executed.

The grammar is in ``docs/yaml.md``. PyYAML's composer is used for its marks (line and column); the values are built
here, because YAML 1.1 reads ``1e-3`` as a string and ``no`` as False, and lets a duplicate key win in silence.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.structures import Fault, nearest
from models.spec import Anchors, Choice, LayerSpec, ModelSpec, Scaling, Where

LARGEST_FILE = 1_000_000  # bytes
LARGEST_TREE = 50_000  # YAML nodes, aliases counted as often as they are used
DEEPEST_TREE = 40

TOP_KEYS = ("name", "nc", "depth_multiple", "width_multiple", "activation", "anchors", "backbone", "head")
ROW_KEYS = ("name", "from", "number", "op", "args")

# The seed's searchable block: complete BottleneckCSP2 candidates, {3x3, 5x5} x {ReLU, LeakyReLU, Mish}.
SHORTHANDS: Mapping[str, tuple[str, Mapping[str, tuple[Any, ...]]]] = {
    "MBottleneckCSP2": ("BottleneckCSP2", {"kernel": (3, 5), "act": ("relu", "leaky", "mish")}),
}

INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
CONSTANTS: dict[str, bool | None] = {"null": None, "~": None, "": None, "None": None}
CONSTANTS |= {"true": True, "True": True, "false": False, "False": False}
RESOLVER = yaml.resolver.Resolver()
WORD = re.compile(r"[A-Za-z_]([\w. -]*[\w.-])?")  # text that needs no quotes
ESCAPES = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


def parse(source: str | os.PathLike[str]) -> ModelSpec:
    """The model file at a path. Raises `Fault` with ``file:line:column`` for anything that is not one."""
    path = Path(source)
    if not path.is_file():
        raise Fault(f"{path}: no such model file")
    if path.stat().st_size > LARGEST_FILE:
        raise Fault(f"{path}: {path.stat().st_size} bytes; a model file has at most {LARGEST_FILE}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise Fault(f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})") from None
    return parse_text(text, str(path), name=path.stem)


def parse_text(text: str, path: str = "<text>", name: str = "model") -> ModelSpec:
    """The model described by YAML `text`; `path` is only what faults call it."""
    top = _top(text, path)
    faults: list[str] = []
    for key in top.value:
        if key not in TOP_KEYS:
            faults.append(f"{top.key_where[key]}: unknown key {key!r}{nearest(key, TOP_KEYS) or known(TOP_KEYS)}")
    for key in ("nc", "backbone", "head"):
        if key not in top.value:
            faults.append(f"{top.where}: key {key!r} is missing; a model file has nc, backbone and head")

    num_classes = top.get("nc", 1)
    if not _is_int(num_classes) or not 1 <= num_classes <= 100_000:
        faults.append(f"{top.where_of('nc')}: nc is the number of classes, 1 to 100000; got {num_classes!r}")
    multiples = []
    for key in ("depth_multiple", "width_multiple"):
        value = top.get(key, 1.0)
        if not _is_number(value) or not 0 < value <= 100:
            faults.append(f"{top.where_of(key)}: {key} is a number over 0, at most 100; got {value!r}")
            value = 1.0
        multiples.append(float(value))
    activation = top.get("activation", "silu")
    if not isinstance(activation, str):
        faults.append(f"{top.where_of('activation')}: activation is a name such as mish; got {activation!r}")
    called = top.get("name", name)
    if not isinstance(called, str) and not _is_number(called):
        faults.append(f"{top.where_of('name')}: name is a word or a text in quotes; got {flow(called)}")
    anchors = _anchors(top, faults)

    rows: list[tuple[str, _Marked]] = []
    for section in ("backbone", "head"):
        listed = top.value.get(section)
        if listed is None:
            continue
        if not isinstance(listed.value, list) or not listed.value:
            faults.append(f"{listed.where}: {section} is a list of rows [from, number, module, args]")
            continue
        rows += [(section, row) for row in listed.value]
    layers = []
    for index, (section, row) in enumerate(rows):
        try:
            layers.append(_layer(index, section, row))
        except Fault as fault:
            faults += fault.lines
    names = [layer.name for layer in layers if layer.name]
    for layer in layers:
        if layer.name and names.count(layer.name) > 1:
            faults.append(f"{layer.where}: two rows are named {layer.name!r}")
    if faults:
        raise Fault(*faults)
    return ModelSpec(
        name=str(called),
        num_classes=num_classes,
        anchors=anchors,
        layers=tuple(layers),
        scaling=Scaling(*multiples),
        activation=activation,
        path=path,
        activation_at=top.where_of("activation"),
    )


def dump(spec: ModelSpec, comment: str = "") -> str:
    """`spec` as YAML text that `parse_text` reads back to the same model."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"name: {flow(spec.name)}", f"nc: {spec.num_classes}"]
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


def row_text(layer: LayerSpec) -> str:
    """A row as one would write it: ``[-1, 3, BottleneckCSP2, [256, {kernel: 5}]]``."""
    source: Any = layer.sources[0] if len(layer.sources) == 1 else list(layer.sources)
    args = [*layer.args, dict(layer.kwargs)] if layer.kwargs else list(layer.args)
    if layer.name:
        row = {"name": layer.name, "from": source, "number": layer.repeats, "op": layer.op, "args": args}
        return flow(row)
    return flow([source, layer.repeats, layer.op, args])


def known(words: Collection[str]) -> str:
    """``"; known are relu, mish"``, for where no word is near the one that was found."""
    return f"; known are {', '.join(words)}" if words else ""


def flow(value: Any) -> str:
    """A value as YAML on one line, as `parse_text` reads it back."""
    if isinstance(value, Choice):
        return f"{{choice: {flow(value.options)}}}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "None", True: "True", False: "False"}[value]
    if not isinstance(value, str):
        return repr(value)
    if WORD.fullmatch(value) and value not in CONSTANTS:
        return value
    if value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    return '"' + "".join(c if c.isprintable() and c not in ESCAPES else _escaped(c) for c in value) + '"'


def _escaped(character: str) -> str:
    return ESCAPES.get(character, f"\\U{ord(character):08x}")


# ---- rows


def _layer(index: int, section: str, row: _Marked) -> LayerSpec:
    if isinstance(row.value, dict):
        parts = _named_row(row)
    elif isinstance(row.value, list):
        if len(row.value) != 4:
            raise Fault(f"{row.where} layer {index}: a row is [from, number, module, args], got {flow(row.plain())}")
        parts = dict(zip(ROW_KEYS[1:], row.value, strict=True))
    else:
        raise Fault(f"{row.where} layer {index}: a row is [from, number, module, args], got {flow(row.plain())}")
    name = parts["name"].plain() if "name" in parts else None
    if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name)):
        raise Fault(
            f"{parts['name'].where} layer {index}: a row's name is a letter, then letters, digits and _; got {name!r}"
        )
    label = name or str(index)
    faults: list[str] = []

    sources = parts["from"].plain()
    sources = tuple(sources) if isinstance(sources, tuple) else (sources,)
    if not all(_is_int(source) or isinstance(source, str) for source in sources):
        faults.append(
            f"{parts['from'].where} layer {index}: `from` is a row's index or name, or a list of them; "
            f"got {flow(parts['from'].plain())}"
        )
    repeats: Any = 1
    if "number" in parts:
        repeats = _value(parts["number"], f"{label}.number")
        counts = repeats.options if isinstance(repeats, Choice) else (repeats,)
        if not all(_is_int(count) and 1 <= count <= 1000 for count in counts):
            faults.append(
                f"{parts['number'].where} layer {index}: `number` is how often the module is repeated, 1 to 1000; "
                f"got {flow(parts['number'].plain())}"
            )
    op = parts["op"].plain()
    if not isinstance(op, str):
        faults.append(f"{parts['op'].where} layer {index}: the module is a name, got {flow(op)}")
    listed = parts["args"].value if "args" in parts else []
    if not isinstance(listed, list):
        faults.append(f"{parts['args'].where} layer {index}: args is a list, got {flow(parts['args'].plain())}")
        listed = []
    kwargs: dict[str, Any] = {}
    if listed and isinstance(listed[-1].value, dict) and "choice" not in listed[-1].value:
        kwargs = {key: _value(value, f"{label}.{key}") for key, value in listed[-1].value.items()}
        listed = listed[:-1]
    args = tuple(_value(value, f"{label}.{position}") for position, value in enumerate(listed))
    if faults:
        raise Fault(*faults)
    if op in SHORTHANDS:
        op, choices = SHORTHANDS[op]
        kwargs = {key: Choice(f"{label}.{key}", options) for key, options in choices.items()} | kwargs
    return LayerSpec(row.where, sources, repeats, op, args, kwargs, name, section)


def _named_row(row: _Marked) -> dict[str, _Marked]:
    for key in row.value:
        if key not in ROW_KEYS:
            raise Fault(
                f"{row.key_where[key]}: unknown key {key!r} in a row{nearest(key, ROW_KEYS) or known(ROW_KEYS)}"
            )
    for key in ("from", "op"):
        if key not in row.value:
            raise Fault(f"{row.where}: a row needs the key {key!r}")
    return dict(row.value)


def _value(marked: _Marked, name: str) -> Any:
    """A plain value, or a `Choice` where the file says ``{choice: [...]}``."""
    if not isinstance(marked.value, dict):
        return marked.plain()
    if set(marked.value) != {"choice"}:
        raise Fault(f"{marked.where}: a mapping here is a choice, {{choice: [3, 5]}}; got {flow(marked.plain())}")
    options = marked.value["choice"].plain()
    if not isinstance(options, tuple) or _holds_mapping(options):
        raise Fault(f"{marked.where}: a choice needs a list of plain options, got {flow(options)}")
    try:
        return Choice(name, options)
    except Fault as fault:
        raise Fault(f"{marked.where}: {fault}") from None


def _holds_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, tuple) and any(_holds_mapping(item) for item in value))


def _anchors(top: _Marked, faults: list[str]) -> Anchors:
    anchors = top.get("anchors", 3)
    if _is_int(anchors) and 1 <= anchors <= 100:
        return anchors
    good = (
        isinstance(anchors, tuple)
        and anchors
        and all(
            isinstance(level, tuple) and level and len(level) % 2 == 0 and all(_is_number(v) and v > 0 for v in level)
            for level in anchors
        )
        and len({len(level) for level in anchors}) == 1
    )
    if not good:
        faults.append(
            f"{top.where_of('anchors')}: anchors is how many a level (1 to 100), or for every level a list "
            f"w, h, w, h, ... in pixels, the same number on each; got {flow(anchors)}"
        )
        return 3
    return tuple(tuple(float(value) for value in level) for level in anchors)


# ---- YAML nodes with their places


@dataclass(frozen=True)
class _Marked:
    """A YAML value and where it stands. Lists and mappings hold `_Marked` values."""

    value: Any
    where: Where
    key_where: Mapping[str, Where]

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
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        where = Where(path, mark.line + 1, mark.column + 1) if mark else path
        said = ", ".join(part for part in (problem.context, problem.problem) if part)
        raise Fault(f"{where}: not valid YAML: {said}") from None
    except yaml.YAMLError as problem:  # a character that YAML does not allow
        raise Fault(f"{path}: not valid YAML: {str(problem).splitlines()[0]}") from None
    except RecursionError:
        raise Fault(f"{path}: nested deeper than {DEEPEST_TREE} levels") from None
    except (ValueError, OverflowError):  # of an escape or a directive
        raise Fault(f"{path}: not valid YAML: it holds a number that is out of range") from None
    if root is None:
        raise Fault(f"{path}: the file is empty")
    count = [0]

    def build(node: yaml.Node, depth: int) -> _Marked:
        where = Where(path, node.start_mark.line + 1, node.start_mark.column + 1)
        count[0] += 1
        if count[0] > LARGEST_TREE:
            raise Fault(f"{where}: more than {LARGEST_TREE} values")
        if depth > DEEPEST_TREE:
            raise Fault(f"{where}: nested deeper than {DEEPEST_TREE} levels")
        if node.tag != _tag_without_asking(node):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise Fault(f"{where}: tag {tag!r} is not allowed; values are plain words, numbers, lists and mappings")
        if isinstance(node, yaml.ScalarNode):
            return _Marked(_scalar(node, where), where, {})
        if isinstance(node, yaml.SequenceNode):
            return _Marked([build(item, depth + 1) for item in node.value], where, {})
        values: dict[str, _Marked] = {}
        key_where: dict[str, Where] = {}
        for key_node, value_node in node.value:
            place = Where(path, key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                raise Fault(f"{place}: a key is a plain word")
            key = key_node.value
            if key in values:
                raise Fault(f"{place}: key {key!r} stands twice, first at {key_where[key]}")
            values[key] = build(value_node, depth + 1)
            key_where[key] = place
        return _Marked(values, where, key_where)

    top = build(root, 0)
    if not isinstance(top.value, dict):
        raise Fault(f"{top.where}: a model file is a mapping with the keys {', '.join(TOP_KEYS)}")
    return top


def _tag_without_asking(node: yaml.Node) -> str:
    """The tag that YAML gives to a node whose text names none."""
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return str(RESOLVER.resolve(type(node), node.value, (plain, not plain)))


def _scalar(node: yaml.ScalarNode, where: Where) -> Any:
    text = node.value
    if node.style in ("'", '"', "|", ">"):
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
