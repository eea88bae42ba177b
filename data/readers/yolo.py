"""YOLO labels: one txt an image, one line an object: ``class cx cy width height``, fractions of the image's size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.config import DataSpec
from data.structures import Fault

ROUNDING = 1e-3  # files are written with as few as four digits; what is further out of 0..1 is no fraction


def label_path(data: DataSpec, image: Path) -> Path:
    """The last folder called ``images`` becomes ``labels``; without one the txt lies beside the image."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, size: tuple[int, int], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``[M, 4]`` float64 xyxy in pixels, not yet clipped, and labels ``[M]`` int64.

    Raises:
        FileNotFoundError: when there is no such file.
        Fault: one line for every wrong line of the file.
    """
    width, height = size
    boxes: list[list[float]] = []
    labels: list[int] = []
    faults: list[str] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file; lines of 'class cx cy width height' are right") from None
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        problem = _problem(fields, names)
        if problem:
            faults.append(f"{path}:{number}: {problem}")
            continue
        cx, cy, w, h = (float(field) for field in fields[1:])
        boxes.append([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height])
        labels.append(int(float(fields[0])))
    if faults:
        raise Fault(*faults)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)


def _problem(fields: list[str], names: Sequence[str]) -> str | None:
    if len(fields) != 5:
        return f"found {len(fields)} fields; 5 are right: class cx cy width height"
    try:
        label, *fractions = (float(field) for field in fields)
    except ValueError:
        return f"{' '.join(fields)!r} are not five numbers; class cx cy width height is right"
    if not (label.is_integer() and 0 <= label < len(names)):
        return f"class {fields[0]} is out of range; there are {len(names)} names, so 0 to {len(names) - 1} is right"
    for name, field, value in zip(("cx", "cy", "width", "height"), fields[1:], fractions, strict=True):
        if not (math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING):
            return f"{name} is {field}; a fraction of the image's size, 0 to 1, is right"
    return None
