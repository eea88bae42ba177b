"""A detector as data: what a model YAML says, before any weight exists. No torch here.

``text -> ModelSpec`` is `models.parse`; ``ModelSpec -> Graph -> Network`` is `models.graph` and `models.network`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.structures import Fault

CONSTANTS: dict[str, bool | None] = {"null": None, "~": None, "": None, "None": None}
CONSTANTS |= {"true": True, "True": True, "false": False, "False": False}
INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
WORD = re.compile(r"[A-Za-z_]([\w. -]*[\w.-])?")  # text that needs no quotes
ESCAPES = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}

LONGEST_SHOWN = 300  # characters of a row or value in a message

Anchors = int | tuple[tuple[float, ...], ...]  # how many a level, or w h w h ... in pixels for every level


@dataclass(frozen=True)
class Where:
    """A place in a text file; line and column count from 1."""

    path: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Choice:
    """A place in a model where the search may pick one of several values."""

    name: str  # row and argument: "16.kernel"
    options: tuple[Any, ...]  # final values; lists arrive as tuples, so that they can be compared and hashed

    def __post_init__(self) -> None:
        distinct = {(type(option), option) for option in self.options}  # 1, 1.0 and True are different options
        if len(self.options) < 2 or len(distinct) < len(self.options):
            raise Fault(f"choice {self.name!r} needs two or more different options, got {list(self.options)}")

    def __str__(self) -> str:
        return "{" + "|".join(str(option) for option in self.options) + "}"

    def index(self, option: Any) -> int:
        """The place of an option. Raises ValueError where it is none; 1, 1.0 and True are different options."""
        for place, known in enumerate(self.options):
            if known == option and type(known) is type(option):
                return place
        raise ValueError(f"choice {self.name!r} has no option {option!r}; options are {list(self.options)}")


@dataclass(frozen=True)
class PerBottleneck:
    """An argument with a value for each bottleneck of a row; any of them may be a `Choice`.

    While the row's `number` is a choice there are as many as its largest option; the first so many of them count.
    """

    values: tuple[Any, ...]


def choices_in(value: Any) -> tuple[Choice, ...]:
    """The open places in an argument, in the order in which they stand."""
    if isinstance(value, Choice):
        return (value,)
    values = value.values if isinstance(value, PerBottleneck) else value if isinstance(value, tuple) else ()
    return tuple(choice for item in values for choice in choices_in(item))


def settled(value: Any, pick: Callable[[Choice], Any]) -> Any:
    """An argument with what `pick` says in place of each of its choices."""
    if isinstance(value, Choice):
        return pick(value)
    if isinstance(value, PerBottleneck):
        return PerBottleneck(tuple(settled(item, pick) for item in value.values))
    return value


@dataclass(frozen=True)
class Scaling:
    """How far a file's rows are stretched: `depth` multiplies repeats, `width` multiplies channels."""

    depth: float = 1.0
    width: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """One row, ``[from, number, module, args]``; `repeats` and any argument may hold a `Choice`."""

    where: Where
    sources: tuple[int | str, ...]  # as written: negative = rows back, otherwise a row's index or name
    repeats: int | Choice
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    section: str = "backbone"
    written: str = field(default="", compare=False)  # the row as it stands in the file, for a fault

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The row's open places in the order in which they stand: arguments, then `number`."""
        return choices_in((*self.args, *self.kwargs.values(), self.repeats))

    def freeze(self, picks: Mapping[str, Any]) -> LayerSpec:
        """The same row with every choice replaced by the pick of its name, and a value for each bottleneck it has."""
        number = settled(self.repeats, lambda choice: picks[choice.name])

        def final(value: Any) -> Any:
            value = settled(value, lambda choice: picks[choice.name])
            return PerBottleneck(value.values[:number]) if isinstance(value, PerBottleneck) else value

        return replace(
            self,
            repeats=number,
            args=tuple(final(value) for value in self.args),
            kwargs={key: final(value) for key, value in self.kwargs.items()},
            written="",
        )


@dataclass(frozen=True)
class ModelSpec:
    """A whole model file. `activation` is what an op takes whose row names none."""

    name: str
    num_classes: int
    anchors: Anchors
    layers: tuple[LayerSpec, ...]
    scaling: Scaling = Scaling()
    activation: str = "silu"
    path: str = "<text>"
    activation_at: Where | None = field(default=None, compare=False)  # for a fault
    anchors_at: Where | None = field(default=None, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)  # what reading the file should say, a line each

    def __iter__(self) -> Iterator[LayerSpec]:
        return iter(self.layers)

    @property
    def choices(self) -> tuple[Choice, ...]:
        return tuple(choice for layer in self.layers for choice in layer.choices)

    def freeze(self, picks: Mapping[str, Any]) -> ModelSpec:
        """The plain model of an architecture: `picks` names an option for every choice.

        Options are final values, so only a model whose scaling is already multiplied out can be frozen.
        """
        assert self.scaling == Scaling(), "freeze a normalized spec (models.graph.normalize)"
        return replace(self, layers=tuple(layer.freeze(picks) for layer in self.layers))


# ---- values as text


def row_place(index: int, layer: LayerSpec) -> str:
    """``cfg/models/tiny.yaml:12:5 layer 4 [-1, 1, Conv, [16]]``: how a fault or note of a row begins."""
    return f"{layer.where} layer {index} {clip(layer.written or row_text(layer))}"


def clip(text: str) -> str:
    """`text` as a message shows it: not longer than `LONGEST_SHOWN`."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def row_text(layer: LayerSpec) -> str:
    """A row as one would write it: ``[-1, 3, BottleneckCSP2, [256, {kernel: 5}]]``."""
    source: Any = layer.sources[0] if len(layer.sources) == 1 else list(layer.sources)
    args = [*layer.args, dict(layer.kwargs)] if layer.kwargs else list(layer.args)
    if layer.name:
        row = {"name": layer.name, "from": source, "number": layer.repeats, "op": layer.op, "args": args}
        return flow(row)
    return flow([source, layer.repeats, layer.op, args])


def flow(value: Any) -> str:
    """A value as YAML on one line, as `parse_text` reads it back."""
    if isinstance(value, Choice):
        return f"{{choice: {flow(value.options)}}}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, PerBottleneck):
        return flow(value.values)
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
