"""A detector as data: what a model YAML says, before any weight exists. No torch here.

``text -> ModelSpec`` is `models.parse`; ``ModelSpec -> Graph -> Network`` is `models.graph` and `models.network`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.structures import Fault

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

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The row's open places in the order in which they stand: arguments, then `number`."""
        values = (*self.args, *self.kwargs.values(), self.repeats)
        return tuple(value for value in values if isinstance(value, Choice))

    def freeze(self, picks: Mapping[str, Any]) -> LayerSpec:
        """The same row with every choice replaced by the pick of its name."""

        def final(value: Any) -> Any:
            return picks[value.name] if isinstance(value, Choice) else value

        return replace(
            self,
            repeats=final(self.repeats),
            args=tuple(final(value) for value in self.args),
            kwargs={key: final(value) for key, value in self.kwargs.items()},
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
