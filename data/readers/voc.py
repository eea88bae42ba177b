"""Pascal VOC labels: one xml an image.

Coordinates are taken as they are written: ``xmin ymin xmax ymax`` become ``x1 y1 x2 y2``. The original VOC files count
pixels from 1, today's tools (labelImg and others) write 0-based edges, and nothing in a file says which; the
difference is at most a pixel. Objects marked ``difficult`` are no training targets, and evaluation ignores them. The
image's own size counts; the one in the xml is not read, for it is often 0x0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.parsers import expat

from data.config import DataSpec
from data.files import read_bytes
from data.readers.labels import (
    DIFFICULT,
    LABEL_FILE,
    LARGEST_FILE,
    MOST_BOXES,
    TRAINED,
    UNKNOWN_CLASS,
    WRONG_LINE,
    Labels,
    Problem,
    labels_of,
    no_labels,
    quoted,
    too_many,
)
from data.structures import Fault, nearest

CORNERS = ("xmin", "ymin", "xmax", "ymax")
SUFFIX = ".xml"
DEEPEST = 20  # levels of tags; the parts of a VOC object stand on the fifth


def label_path(data: DataSpec, image: str) -> str:
    """In the YAML's ``annotations`` folder under the image's name; without that entry, beside the image."""
    if data.annotations is None:
        return os.path.splitext(image)[0] + SUFFIX
    return os.path.join(data.root, data.annotations, os.path.splitext(os.path.basename(image))[0] + SUFFIX)


def read_labels(path: Path, size: tuple[int, int], names: Sequence[str]) -> Labels:
    """Boxes in pixels, not yet clipped; an object that is no box becomes a problem.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    boxes: list[list[float]] = []
    labels: list[int] = []
    uses: list[int] = []
    lines: list[int] = []
    problems: list[Problem] = []
    objects = _objects(path)
    if isinstance(objects, Problem):
        return no_labels(objects, lost=True)
    if len(objects) > MOST_BOXES:
        return too_many(path, len(objects))
    for line, fields in objects:
        problem = _problem(fields, names)
        if problem:
            kind = UNKNOWN_CLASS if fields.get("name") not in names else WRONG_LINE
            problems.append(Problem(kind, f"{path}:{line}", problem))
            continue
        boxes.append([float(fields[f"bndbox/{corner}"]) for corner in CORNERS])
        labels.append(names.index(fields["name"]))
        uses.append(DIFFICULT if fields.get("difficult", "").lower() in ("1", "true") else TRAINED)
        lines.append(line)
    return labels_of(boxes, labels, uses, lambda index: f"{path}:{lines[index]}", problems)


def class_names(paths: Iterable[Path]) -> tuple[str, ...]:
    """The names of all objects, each once, in their order. A file that cannot be read has none."""
    names: set[str] = set()
    for path in paths:
        objects = _objects(path)
        if not isinstance(objects, Problem):
            names |= {fields.get("name", "") for _, fields in objects}
    return tuple(sorted(names - {""}))


def _problem(fields: dict[str, str], names: Sequence[str]) -> str | None:
    name = fields.get("name", "")
    if name not in names:
        known = nearest(name, names) or f"; names are {', '.join(names)}"
        return f"class {quoted(name)} is not among the names of the data YAML{known}"
    try:
        corners = [float(fields[f"bndbox/{corner}"]) for corner in CORNERS]
    except KeyError as missing:
        return f"the object has no {missing.args[0]}; {', '.join(CORNERS)} are right"
    except ValueError:
        written = ", ".join(f"{corner} {quoted(fields[f'bndbox/{corner}'])}" for corner in CORNERS)
        return f"{written}: not four numbers; pixels are right"
    if not all(map(math.isfinite, corners)):
        return f"the box is {corners}; finite pixels are right"
    if corners[0] > corners[2] or corners[1] > corners[3]:
        return f"the box is {corners}; xmin <= xmax and ymin <= ymax are right"
    return None


def _objects(path: Path) -> list[tuple[int, dict[str, str]]] | Problem:
    """Every ``<object>``: the line that it starts in, and its texts by path, as ``bndbox/xmin``.

    expat itself and no tree on top of it: it knows the line, and a DOCTYPE is refused before any entity is defined.
    """
    objects: list[tuple[int, dict[str, str]]] = []
    tags: list[str] = []
    text: list[str] = []
    parser = expat.ParserCreate()

    def start(tag: str, _: dict[str, str]) -> None:
        tags.append(tag)
        text.clear()
        if len(tags) > DEEPEST:
            raise Fault(f"tags are nested deeper than {DEEPEST} levels")
        if len(tags) == 2 and tag == "object":
            objects.append((parser.CurrentLineNumber, {}))

    def end(_: str) -> None:
        if tags[1:2] == ["object"] and len(tags) > 2:
            objects[-1][1]["/".join(tags[2:])] = "".join(text).strip()
        tags.pop()
        text.clear()

    def doctype(*_: object) -> None:
        raise Fault("the xml declares a DOCTYPE; remove it, labels need none")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(read_bytes(path, LARGEST_FILE), True)
    except expat.ExpatError as problem:
        what = f"not well-formed xml: {expat.ErrorString(problem.code)}"
        return Problem(LABEL_FILE, f"{path}:{problem.lineno}", what)
    except Fault as fault:
        where = str(path) if str(fault).startswith(f"{path}: ") else f"{path}:{parser.CurrentLineNumber}"
        return Problem(LABEL_FILE, where, str(fault).removeprefix(f"{path}: "))
    except (ValueError, LookupError) as problem:  # an encoding that expat does not know
        return Problem(LABEL_FILE, str(path), f"cannot be read: {problem}; save it as UTF-8")
    return objects
