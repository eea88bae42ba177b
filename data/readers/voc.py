"""Pascal VOC labels: one xml an image.

Coordinates are taken as they are written: ``xmin ymin xmax ymax`` become ``x1 y1 x2 y2``. The original VOC files count
pixels from 1, today's tools (labelImg and others) write 0-based edges, and nothing in a file says which; the
difference is at most a pixel. Objects marked ``difficult`` count like any other. The image's own size counts; the one
in the xml is not read, for it is often 0x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from xml.parsers import expat

import numpy as np

from data.config import DataSpec
from data.structures import Fault, nearest

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def label_path(data: DataSpec, image: Path) -> Path:
    """In the YAML's ``annotations`` folder under the image's name; without that entry, beside the image."""
    if data.annotations is None:
        return image.with_suffix(".xml")
    return data.root / data.annotations / f"{image.stem}.xml"


def read_labels(path: Path, size: tuple[int, int], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[M, 4]`` float64 xyxy in pixels, not yet clipped, and labels ``[M]`` int64.

    Raises:
        FileNotFoundError: when there is no such file.
        Fault: one line for every wrong object.
    """
    boxes: list[list[float]] = []
    labels: list[int] = []
    faults: list[str] = []
    for line, fields in _objects(path):
        where = f"{path}:{line}"
        name = fields.get("name", "")
        if name not in names:
            known = nearest(name, names) or f"; names are {', '.join(names)}"
            faults.append(f"{where}: class {name!r} is not among the names of the data YAML{known}")
            continue
        try:
            corners = [float(fields[f"bndbox/{corner}"]) for corner in CORNERS]
        except KeyError as missing:
            faults.append(f"{where}: the object has no {missing.args[0]}; {', '.join(CORNERS)} are right")
            continue
        except ValueError:
            written = ", ".join(f"{corner} {fields[f'bndbox/{corner}']!r}" for corner in CORNERS)
            faults.append(f"{where}: {written}: not four numbers; pixels are right")
            continue
        if not all(map(math.isfinite, corners)):
            faults.append(f"{where}: the box is {corners}; finite pixels are right")
        elif corners[0] > corners[2] or corners[1] > corners[3]:
            faults.append(f"{where}: the box is {corners}; xmin <= xmax and ymin <= ymax are right")
        else:
            boxes.append(corners)
            labels.append(names.index(name))
    if faults:
        raise Fault(*faults)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)


def _objects(path: Path) -> list[tuple[int, dict[str, str]]]:
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
        if tags[1:] == ["object"]:
            objects.append((parser.CurrentLineNumber, {}))

    def end(_: str) -> None:
        if tags[1:2] == ["object"] and len(tags) > 2:
            objects[-1][1]["/".join(tags[2:])] = "".join(text).strip()
        tags.pop()
        text.clear()

    def doctype(*_: object) -> None:
        raise Fault(f"{path}:{parser.CurrentLineNumber}: the xml declares a DOCTYPE; remove it, labels need none")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as problem:
        raise Fault(f"{path}:{problem.lineno}: not well-formed xml: {expat.ErrorString(problem.code)}") from None
    return objects
