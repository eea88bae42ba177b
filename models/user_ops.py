"""Ops that a user brings: ``nn.Module`` classes under ``@register_op()`` in a Python file, as those of `models.ops`.

Such a file is run, so it is only ever one that the user names (``--ops FILE``), or that a model file names and the
user trusts (``--trust-ops``).
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models.ops  # noqa: F401  (fills OPS, so that names which are taken are known)
from data.structures import Fault
from models.registry import FILLED, OPS, Op, Shape
from models.spec import settled

TRIAL_CELLS = 4  # a side of the smallest map on which a user's op is tried


def load_ops(path: Path) -> tuple[str, ...]:
    """Runs a Python file and returns the names of the ops that it registers. Again: what it registered goes first.

    Raises `Fault` with file and line where the file cannot be run, registers nothing, takes a name that is there, or
    holds an op whose signature is no schema; no op of the file is left behind then.
    """
    if not path.is_file():
        raise Fault(f"{path}: no such file with ops")
    before = {name: op for name, op in OPS.items() if not _is_from(op, path)}
    OPS.clear()
    OPS.update(before)
    try:
        _run(path)
        names = tuple(name for name in OPS if name not in before)
        if not names:
            raise Fault(f"{path}: registers no op; write @register_op() above an nn.Module")
        for name in names:
            OPS[name] = _checked(OPS[name], path)
    except Fault:
        OPS.clear()
        OPS.update(before)
        raise
    return names


def is_loaded(path: Path) -> bool:
    """Whether there are ops of this file: the user has named it."""
    return any(_is_from(op, path) for op in OPS.values())


def trial(op: Op, inputs: Sequence[Shape], output: Shape, arguments: Mapping[str, Any]) -> str | None:
    """What goes wrong when a user's op is made and run without memory (torch's ``meta`` device), None if nothing does.

    `arguments` are all that the class is called with. Of a choice the first option is tried.
    """
    plain = {name: settled(value, lambda choice: choice.options[0]) for name, value in arguments.items()}
    size = TRIAL_CELLS * max(shape.stride for shape in (*inputs, output))
    try:
        with torch.device("meta"), torch.no_grad():
            module = op.module(**plain).eval()
            maps = [
                torch.empty(1, s.channels, size // s.stride + s.margin, size // s.stride + s.margin) for s in inputs
            ]
            given = module(maps if op.many else maps[0])
    except Exception as problem:  # whatever a user's code may raise
        return f"{op.file}: {op.name} raised {said(problem)}"
    given = getattr(given, "output", given)  # of an op that returns something besides its map
    if output.kind != "map":
        return None
    declared = (1, output.channels, size // output.stride + output.margin, size // output.stride + output.margin)
    if not isinstance(given, Tensor):
        return f"{op.file}: {op.name} is declared to give {output}, but gives {type(given).__name__}"
    if tuple(given.shape) != declared:
        reads = " and ".join(str(list(x.shape)) for x in maps)
        return (
            f"{op.file}: {op.name} is declared to give {output}, {list(declared)} from {reads}, "
            f"but gives {list(given.shape)}"
        )
    return None


def said(problem: BaseException) -> str:
    """An exception in one line: ``TypeError: 'int' object is not iterable``."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}" if text else type(problem).__name__


def _is_from(op: Op, path: Path) -> bool:
    return op.file is not None and _is_file(op.file.rpartition(":")[0], path)


def _is_file(name: str, path: Path) -> bool:
    return Path(name).resolve() == path.resolve()


def _run(path: Path) -> None:
    name = f"user_ops_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Fault(f"{path}: a file with ops is Python, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where type hints and dataclasses look for what a class refers to
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a file that is changed at once is read anew
    try:
        spec.loader.exec_module(module)
    except SyntaxError as problem:
        inside = problem.filename and problem.lineno and _is_file(problem.filename, path)
        place = f"{path}:{problem.lineno}:{problem.offset}" if inside else str(path)
        raise Fault(f"{place}: not Python: {problem.msg}") from None
    except (Exception, SystemExit) as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        lines = [frame.lineno for frame in frames if _is_file(frame.filename, path)]
        place = f"{path}:{lines[-1]}" if lines else str(path)
        raise Fault(f"{place}: {problem if isinstance(problem, Fault) else said(problem)}") from None
    finally:
        sys.dont_write_bytecode = cached


def _checked(op: Op, path: Path) -> Op:
    """A user's op with its place. Raises `Fault` where its signature does not say what a row may hold."""
    if not (inspect.isclass(op.module) and issubclass(op.module, nn.Module)):
        raise Fault(f"{path}: op {op.name!r} is no nn.Module")
    here = _is_file(inspect.getsourcefile(op.module) or "", path)  # or a class that the file imports
    place = f"{path}:{inspect.getsourcelines(op.module)[1] if here else 1}"
    for name, parameter in op.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise Fault(f"{place}: op {op.name!r} takes {parameter}; a row can only give arguments that have names")
        if name in FILLED:
            continue
        if name not in op.hints:
            raise Fault(
                f"{place}: argument {name!r} of op {op.name!r} has no type; write {name}: int, or whatever it is"
            )
        try:
            with warnings.catch_warnings(action="error"):  # of types that let everything pass
                op.check(name, None)
        except Exception:  # pydantic has many
            raise Fault(
                f"{place}: the type of argument {name!r} of op {op.name!r} cannot be checked; take int, float, bool, "
                f"str, a tuple of them, or a type of models.ops.primitives"
            ) from None
    return replace(op, file=place)
