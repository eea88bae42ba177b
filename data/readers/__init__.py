"""Labels on disk become `Sample`s: one reader a format, and what they share.

Read `read_split` first. A reader finds an image's label file and turns its text into boxes and labels; what becomes of
a box without area or outside its image is decided here, once for all formats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from data.config import SPLITS, DataSpec
from data.images import SUFFIXES, image_size
from data.readers import voc, yolo
from data.structures import Fault, Sample, nearest

READERS: dict[str, ModuleType] = {"yolo": yolo, "voc": voc}
MOST_FAULTS = 20  # lines shown before "... and N more"
MOST_NAMES = 5  # files named in a note

Kind = tuple[str, str, str]  # a note's words: one, many, what became of them
NO_FILE: Kind = ("image", "images", "without a label file, taken as without objects")
NO_AREA: Kind = ("box", "boxes", "without area dropped")
OUTSIDE: Kind = ("box", "boxes", "wholly outside the image dropped")
CLIPPED: Kind = ("box", "boxes", "reaching out of the image by more than a pixel clipped")
KINDS = (NO_FILE, NO_AREA, OUTSIDE, CLIPPED)


@dataclass(frozen=True)
class Split:
    """A split's samples in the order of its list or, from a folder, of their paths; `notes` are counted warnings."""

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]


def read_split(data: DataSpec, split: str) -> Split:
    """Reads every label of ``train``, ``val`` or ``test``.

    A box is clipped to its image; one without area or wholly outside is dropped, and a note counts it. An image
    without a label file has no objects; a note counts these too.

    Raises:
        Fault: one line for every wrong label, up to 20.
    """
    if split not in SPLITS:
        raise Fault(f"split {split!r} is not known; one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    source = getattr(data, split)
    if source is None:
        raise Fault(f"{data.path}: there is no {split!r} entry; add one, as {split}: images/{split}")
    if not data.root.is_dir():
        how = f"get it with: {data.download}" if data.download else "set 'path' to where the data set lies"
        raise Fault(f"{data.path}: the folder {data.root} does not exist; {how}")

    paths = _image_paths(data, source)
    reader = READERS[data.format]
    samples: list[Sample] = []
    faults: list[str] = []
    notes: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for path in tqdm(paths, desc=f"reading {split} labels", unit="image", delay=2, leave=False):
        label_path = reader.label_path(data, path)
        try:
            size = image_size(path)
            boxes, labels = reader.read_labels(label_path, size, data.names)
        except FileNotFoundError:
            notes[NO_FILE].append(path.name)
            samples.append(Sample(path, np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)))
            continue
        except Fault as fault:
            faults.extend(fault.lines)
            continue
        samples.append(_sample(path, boxes, labels, size, label_path.name, notes))
    if faults:
        raise Fault(*_first(faults))
    if len(notes[NO_FILE]) == len(paths):
        raise Fault(
            f"{data.path}: {split}: not one of the {len(paths)} images has a label file; "
            f"the first was looked for at {reader.label_path(data, paths[0])}"
        )
    return Split(tuple(samples), tuple(_note(kind, files) for kind, files in notes.items() if files))


def _sample(
    path: Path,
    boxes: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    label_file: str,
    notes: dict[Kind, list[str]],
) -> Sample:
    """Clips boxes ``[M, 4]`` to the image, drops those of which nothing is left, and takes note."""
    clipped = boxes.clip(0, np.array([*size, *size]))
    had_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    moved = kept & (np.abs(clipped - boxes) > 1).any(axis=1)
    notes[NO_AREA] += [label_file] * int((~had_area).sum())
    notes[OUTSIDE] += [label_file] * int((had_area & ~kept).sum())
    notes[CLIPPED] += [label_file] * int(moved.sum())
    return Sample(path, clipped[kept].astype(np.float32), labels[kept])


def _note(kind: Kind, files: Sequence[str]) -> str:
    """``"2 boxes without area dropped: a.xml, b.xml"``."""
    one, many, what = kind
    return f"{len(files)} {one if len(files) == 1 else many} {what}: {some(files)}"


def some(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """The first few different names, and dots where there are more."""
    different = list(dict.fromkeys(names))
    return ", ".join([*different[:most], *(["..."] if len(different) > most else [])])


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_FAULTS
    return [*lines[:MOST_FAULTS], *([f"... and {more} more"] if more > 0 else [])]


def _image_paths(data: DataSpec, source: str) -> list[Path]:
    location = Path(os.path.abspath(data.root / Path(source).expanduser()))
    if location.is_dir():
        paths = sorted(path for path in location.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise Fault(f"{data.path}: there is no image in {location}; images end in {', '.join(SUFFIXES)}")
        return paths
    if location.suffix != ".txt" or not location.is_file():
        raise Fault(f"{data.path}: {location} does not exist; a folder of images or a .txt list of images is right")
    lines = [line.strip() for line in location.read_text(encoding="utf-8").splitlines()]
    entries = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not entries:
        raise Fault(f"{location}: the list is empty; one image a line is right")
    if data.images is not None:
        folder = data.root / data.images
        by_id = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES}
        found = [(number, by_id.get(line, folder / line)) for number, line in entries]
    else:
        found = [(number, Path(os.path.abspath(location.parent / line))) for number, line in entries]
    missing = [f"{location}:{number}: there is no image {path}" for number, path in found if not path.is_file()]
    if missing:
        raise Fault(*_first(missing))
    return [path for _, path in found]
