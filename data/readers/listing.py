"""The images that a split's folders and lists name."""

from __future__ import annotations

import os
from pathlib import Path

from data.config import DataSpec
from data.images import SUFFIXES
from data.readers.labels import MISSING_IMAGE, Problem
from data.structures import Fault


def list_images(data: DataSpec, split: str) -> tuple[list[str], list[Problem]]:
    """Whole paths: those of a list in its order, those of a folder and all below it in the order of their names.

    Hidden files are left out. An image of a list that is not there becomes a problem.

    Raises:
        Fault: when a folder or list is missing, cannot be read, or has no image.
    """
    images: list[str] = []
    problems: list[Problem] = []
    for place in data.sources(split):
        if place.is_dir():
            found = _in_folder(place)
            if not found:
                raise Fault(f"{data.path}: there is no image in {place}; images end in {', '.join(SUFFIXES)}")
        elif place.suffix == ".txt" and place.is_file():
            found, missing = _in_list(data, place)
            problems += missing
        else:
            raise Fault(f"{data.path}: {place} does not exist; a folder of images or a .txt list of images is right")
        images += found
    return images, problems


def _in_folder(folder: Path) -> list[str]:
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        start = here if here.endswith(os.sep) else here + os.sep
        found += [start + name for name in names if name[0] != "." and name.lower().endswith(SUFFIXES)]
    return sorted(found, key=lambda path: path.split(os.sep))


def _in_list(data: DataSpec, path: Path) -> tuple[list[str], list[Problem]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file; a list of images, one a line, is right") from None
    entries = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not entries:
        raise Fault(f"{path}: the list is empty; one image a line is right")
    if data.images is not None:
        folder = data.root / data.images
        by_id = {name.stem: str(name) for name in sorted(folder.glob("*")) if name.suffix.lower() in SUFFIXES}
        named = [(number, by_id.get(line, str(folder / line))) for number, line in entries]
    else:
        named = [(number, os.path.abspath(path.parent / line)) for number, line in entries]
    missing = [
        Problem(MISSING_IMAGE, f"{path}:{number}", f"there is no image {image}")
        for number, image in named
        if not os.path.isfile(image)
    ]
    if len(missing) == len(named):
        raise Fault(f"{path}: not one of the {len(named)} images of the list is there; the first is {named[0][1]}")
    gone = {problem.where for problem in missing}
    return [image for number, image in named if f"{path}:{number}" not in gone], missing
