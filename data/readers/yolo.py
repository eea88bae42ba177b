"""YOLO labels: one txt an image, one line an object: ``class cx cy width height``, fractions of the image's size."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from data.config import DataSpec
from data.files import read_bytes
from data.readers.labels import (
    LABEL_FILE,
    LARGEST_FILE,
    LONGEST_QUOTE,
    MOST_BOXES,
    TRAINED,
    UNKNOWN_CLASS,
    WRONG_LINE,
    Kind,
    Labels,
    Problem,
    labels_of,
    no_labels,
    quoted,
    too_many,
)
from data.structures import Fault

ROUNDING = 1e-3  # files are written with as few as four digits; what is further out of 0..1 is no fraction
IMAGES, LABELS = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"
SUFFIX = ".txt"


def label_path(data: DataSpec, image: str) -> str:
    """The last folder called ``images`` becomes ``labels``; without one the txt lies beside the image.

    Where the YAML names a folder of ``annotations``, the txt lies in it, under the image's name.
    """
    if data.annotations is not None:
        return os.path.join(data.root, data.annotations, os.path.splitext(os.path.basename(image))[0] + SUFFIX)
    before, found, behind = image.rpartition(IMAGES)
    return os.path.splitext(f"{before}{LABELS}{behind}" if found else image)[0] + SUFFIX


def read_labels(path: Path, size: tuple[int, int], names: Sequence[str]) -> Labels:
    """Boxes in pixels, not yet clipped; a line that is no box becomes a problem.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    width, height = size
    boxes: list[list[float]] = []
    labels: list[int] = []
    lines: list[int] = []
    problems: list[Problem] = []
    try:
        text = read_bytes(path, LARGEST_FILE).decode("utf-8-sig")
    except Fault as fault:
        return no_labels(Problem(LABEL_FILE, str(path), str(fault).removeprefix(f"{path}: ")), lost=True)
    except UnicodeDecodeError:
        right = "not a text file; lines of 'class cx cy width height' are right"
        return no_labels(Problem(LABEL_FILE, str(path), right), lost=True)
    found = text.splitlines()
    if len(found) > MOST_BOXES:
        return too_many(path, len(found))
    for number, line in enumerate(found, 1):
        fields = line.split()
        if not fields:
            continue
        problem = _problem(fields, names)
        if problem:
            kind, what = problem
            problems.append(Problem(kind, f"{path}:{number}", what))
            continue
        cx, cy, w, h = (float(field) for field in fields[1:])
        boxes.append([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height])
        labels.append(int(float(fields[0])))
        lines.append(number)
    return labels_of(boxes, labels, [TRAINED] * len(labels), lambda index: f"{path}:{lines[index]}", problems)


def _problem(fields: list[str], names: Sequence[str]) -> tuple[Kind, str] | None:
    if len(fields) != 5:
        return WRONG_LINE, f"found {len(fields)} fields; 5 are right: class cx cy width height"
    try:
        label, *fractions = (float(field) for field in fields)
    except ValueError:
        return WRONG_LINE, f"{quoted(' '.join(fields))} are not five numbers; class cx cy width height is right"
    if not (label.is_integer() and 0 <= label < len(names)):
        right = f"there are {len(names)} names, so 0 to {len(names) - 1} is right"
        return UNKNOWN_CLASS, f"class {fields[0][:LONGEST_QUOTE]} is out of range; {right}"
    for name, field, value in zip(("cx", "cy", "width", "height"), fields[1:], fractions, strict=True):
        if not (math.isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING):
            return WRONG_LINE, f"{name} is {field[:LONGEST_QUOTE]}; a fraction of the image's size, 0 to 1, is right"
    return None
