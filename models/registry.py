"""The table of ops. A class's signature is the schema of its row.

Filled in by the graph, not written in a YAML: ``c_in`` (channels of the one source), ``inputs`` (the Shapes of all
sources: merges and heads), ``number`` (the row's second field, for blocks that repeat inside). A parameter ``act`` that
the row leaves out takes the file's ``activation:``. ``c_out`` is scaled by ``width_multiple``, by name.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from data.structures import Fault
from models.elastic import Channels
from models.spec import FLOAT, INTEGER, Choice, PerBottleneck, clip, flow

FILLED = ("self", "c_in", "inputs", "number")
WIDTHS = ("c_out",)  # arguments that width_multiple scales
PLAIN_WORDS = {  # for pydantic's
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a word",
    "a valid boolean": "True or False",
    "a valid tuple": "a list",
}


@dataclass(frozen=True)
class Shape:
    """What one row hands to the next: channels, how many input pixels a cell stands for, and the kind of tensor.

    Kinds: ``map`` ``[N, C, H, W]``; ``mask`` ``[N, 1, H, W]`` of 0 and 1, which only ops for masks read; ``maps`` a
    head's list of outputs. An op takes maps unless it says otherwise. A map has ``size // stride + margin`` rows and
    columns; only padding and pooling without padding know a margin.
    """

    channels: int
    stride: int
    kind: str = "map"
    margin: int = 0

    def __str__(self) -> str:
        if self.kind == "mask":
            return f"a mask at stride {self.stride}"
        if self.kind != "map":
            return self.kind
        extra = f", {self.margin:+d} cells a side" if self.margin else ""
        return f"{self.channels} channels at stride {self.stride}{extra}"


Infer = Callable[[Sequence[Shape], Mapping[str, Any]], Shape]
Module = TypeVar("Module", bound=type[nn.Module])


@dataclass(frozen=True)
class Op:
    """An entry of the table: the class, what its row may say, and the Shape it gives."""

    name: str
    module: type[nn.Module]
    parameters: Mapping[str, inspect.Parameter]  # as in the class, FILLED ones included
    hints: Mapping[str, Any]
    infer: Infer
    many: bool  # whether forward takes a list of maps
    file: str | None = None  # "my_ops.py:12" of a user's op, None for ours
    takes: tuple[str, ...] | None = None  # kinds of the sources in their order; None: maps, however many

    @property
    def signature(self) -> inspect.Signature:
        """What a row may write as args."""
        return inspect.Signature([p for name, p in self.parameters.items() if name not in FILLED])

    @property
    def is_head(self) -> bool:
        return hasattr(self.module, "decode")

    def __str__(self) -> str:
        """``Conv(c_out, kernel=1, stride=1)``: what a fault shows."""
        shown = []
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
                shown.append("*")
            default = parameter.default
            shown.append(name if default is parameter.empty else f"{name}={flow(default)}")
        return f"{self.name}({', '.join(shown)})"

    def may_choose(self, argument: str) -> bool:
        """Whether the op is written so that one set of weights serves a choice in this argument."""
        return Choice in _parts(self.hints.get(argument))

    def per_bottleneck(self, argument: str) -> bool:
        """Whether each of the blocks that the op repeats may have a value of its own for this argument."""
        return PerBottleneck in _parts(self.hints.get(argument))

    def check(self, argument: str, value: Any) -> str | None:
        """What is wrong with a plain value of an argument, to be read after the value; None where nothing is."""
        try:
            _adapter(self.module.__init__, argument).validate_python(value)
        except ValidationError as problem:
            first = problem.errors()[0]
            said = str(first["msg"]).removeprefix("Value error, ").replace("Input should be", "should be")
            for theirs, ours in PLAIN_WORDS.items():
                said = said.replace(theirs, ours)
            in_quotes = isinstance(value, str) and (INTEGER.fullmatch(value) or FLOAT.fullmatch(value))
            return f"{said}; write {clip(value)} without quotes" if in_quotes else said
        return None


OPS: dict[str, Op] = {}


def register_op(
    name: str | None = None, *, infer: Infer | None = None, many: bool = False, takes: tuple[str, ...] | None = None
) -> Callable[[Module], Module]:
    """Puts an ``nn.Module`` into the table under its class name, or under `name`. `many`: it takes a list of maps;
    `takes`: a list of just these kinds of Shape, such as a map and a mask.

    `infer` maps the sources' Shapes and the named arguments, choices picked, to the output Shape; it raises ValueError
    with the reason where they do not fit. Left out, an op has one source and gives ``c_out`` channels (or what it got)
    at ``stride`` times the source's stride. Raises `Fault` where the name is taken.
    """

    def register(module: Module) -> Module:
        called = name or module.__name__
        if OPS.get(called) is not None:
            taken = OPS[called].file or f"{OPS[called].module.__module__}.{OPS[called].module.__name__}"
            raise Fault(f"op {called!r} is already there, in {taken}; give this one another name")
        own = module.__init__ is not nn.Module.__init__  # which takes anything and nothing
        parameters = dict(inspect.signature(module.__init__).parameters) if own else {}
        hints = typing.get_type_hints(module.__init__, include_extras=True)
        OPS[called] = Op(called, module, parameters, hints, infer or one_to_one, many or takes is not None, takes=takes)
        return module

    return register


def one_to_one(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    """The Shape rule of most ops. Kernel and padding have to keep ``size // stride`` whole."""
    source = inputs[0]
    if source.margin:
        raise ValueError(
            f"the source has {source.margin:+d} rows and columns too many or too few, which only nn.MaxPool2d and "
            f"nn.ZeroPad2d take"
        )
    stride, kernel, padding = args.get("stride", 1), args.get("kernel", 1), args.get("padding")
    groups, c_out = args.get("groups", 1), args.get("c_out", source.channels)
    margin = (kernel - 1) // 2 if padding is None else padding
    if not kernel - stride <= 2 * margin < kernel:
        wanted = "keep the map's size" if stride == 1 else f"divide the map's size by {stride}"
        raise ValueError(
            f"kernel {kernel}, stride {stride} and padding {margin} do not {wanted}; "
            f"an odd kernel with padding left out does"
        )
    for channels in (source.channels, c_out):
        if channels % groups:
            common = math.gcd(source.channels, c_out)
            fits = max(number for number in range(1, min(groups, common) + 1) if common % number == 0)
            raise ValueError(f"groups {groups} does not divide {channels} channels; {fits} does")
    return Shape(c_out, source.stride * stride)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of ``A | B``; anything else is its only one."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


@functools.cache
def _adapter(init: Callable[..., None], argument: str) -> TypeAdapter[Any]:
    hint = typing.get_type_hints(init, include_extras=True)[argument]
    plain = [part for part in _parts(hint) if part not in (Choice, PerBottleneck, Channels)]  # none is written so
    return TypeAdapter(
        functools.reduce(operator.or_, plain), config=ConfigDict(strict=True, arbitrary_types_allowed=True)
    )
