"""Labels on disk become `Sample`s: one reader a format, and what they share.

Read `read_split` first. A reader finds an image's label file and turns its text into boxes and labels; what becomes of
a box without area or outside its image is decided here, once for all formats. What is wrong is never silent, and does
not stop a run that can go on: a bad line loses one box, an image that cannot be read loses itself, and each becomes a
`Problem` with file and line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from data.config import SPLITS, DataSpec, check_root
from data.images import image_size
from data.readers import coco, folders, masks, voc, yolo
from data.readers.cache import find, inputs_of, keep
from data.readers.labels import (
    CLIPPED,
    CROWD,
    IMAGE_FILE,
    LABEL_FILE,
    NO_AREA,
    NO_FILE,
    OUTSIDE,
    TRAINED,
    TWICE,
    Labels,
    Problem,
    Split,
    no_labels,
)
from data.readers.listing import list_images
from data.structures import Fault, Sample, nearest

READERS: dict[str, ModuleType] = {"yolo": yolo, "voc": voc, "masks": masks}  # those with one label file an image
MOST_FAULTS = 20  # lines of a fault before "... and N more"
MOST_ALIKE = 5  # notes of one kind; where there are more, three of them and a count

ReadLabels = Callable[[int, tuple[int, int]], Labels]  # an image's index and size -> what its label file says


@dataclass(frozen=True)
class Listing:
    """The images of a split, how to read the labels of each, and what else that depends on.

    `depends` is the label file of each image; of a JSON, it and the images that it lists and that are not there.
    """

    images: list[str]
    read_labels: ReadLabels
    depends: list[str]
    problems: list[Problem]
    category_ids: tuple[int, ...] | None = None


def read_split(data: DataSpec, split: str) -> Split:
    """Reads every label of ``train``, ``val`` or ``test``; from the cache where nothing has changed since.

    A box is clipped to its image; one without area or wholly outside is left out. An image without a label file has no
    objects. All of this, bad lines and broken images become problems and notes.

    Raises:
        Fault: when nothing can be used: a missing folder, an unreadable list, no image, no label, no good line.
    """
    if split not in SPLITS:
        raise Fault(f"split {split!r} is not known; one of {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if not data.sources(split):
        raise Fault(f"{data.path}: there is no {split!r} entry; add one, as {split}: images/{split}")
    check_root(data)

    endings = {source.suffix for source in data.sources(split)}
    found_by_json = data.format == "coco" and (".txt" not in endings or ".json" in endings)
    listed, missing = ([], []) if found_by_json else list_images(data, split)
    inputs = inputs_of(data, split, listed)
    found = find(data, split, inputs)
    if found is None:
        started = time.time()
        if data.format == "coco":
            listing = _of_json(data, split)
        elif data.format == "folders":
            listing = _of_folders(data, split, listed, missing)
        elif data.format == "masks":
            listing = _of_masks(data, split, listed, missing)
        else:
            listing = _of_files(data, listed, missing)
        found = _read(data, split, listing)
        keep(data, split, inputs, [*listing.images, *listing.depends], found, started)
    return replace(found, notes=notes_of(data, found.problems))


def _of_files(data: DataSpec, images: list[str], problems: list[Problem]) -> Listing:
    reader = READERS[data.format]
    label_files = [reader.label_path(data, image) for image in images]

    def read_labels(index: int, size: tuple[int, int]) -> Labels:
        try:
            return reader.read_labels(Path(label_files[index]), size, data.names)
        except FileNotFoundError:
            return no_labels(Problem(NO_FILE, images[index], f"there is no label file {label_files[index]}"))
        except OSError as problem:
            return no_labels(Problem(LABEL_FILE, label_files[index], f"cannot be read: {problem.strerror}"), lost=True)

    return Listing(images, read_labels, label_files, problems)


def _of_json(data: DataSpec, split: str) -> Listing:
    listing = coco.list_split(data, split)
    return Listing(listing.images, listing.read_labels, listing.depends, listing.problems, listing.category_ids)


def _of_folders(data: DataSpec, split: str, images: list[str], problems: list[Problem]) -> Listing:
    found, labels, strays = folders.list_split(data, split, images)
    return Listing(found, lambda index, size: folders.labels_for(labels[index], size), [], [*problems, *strays])


def _of_masks(data: DataSpec, split: str, images: list[str], problems: list[Problem]) -> Listing:
    for folder in data.masks(split):
        if not folder.is_dir():
            raise Fault(f"{data.path}: {folder} does not exist; {split}_masks names a folder of masks")
    paths = [masks.label_path(data, image, split) for image in images]
    return Listing(images, lambda at, size: masks.read_labels(data, images[at], paths[at], size), paths, problems)


def _read(data: DataSpec, split: str, listing: Listing) -> Split:
    """Reads the size and the labels of every image."""
    samples: list[Sample] = []
    problems = list(listing.problems)
    for index, image in enumerate(tqdm(listing.images, f"reading {split} labels", unit="image", delay=2, leave=False)):
        path = Path(image)
        try:
            size = image_size(path)
        except Fault as fault:
            problems.append(Problem(IMAGE_FILE, image, str(fault).removeprefix(f"{image}: ")))
            continue
        except OSError as problem:
            problems.append(Problem(IMAGE_FILE, image, f"cannot be read: {problem.strerror}"))
            continue
        labels = listing.read_labels(index, size)
        problems += labels.problems
        if not labels.lost:
            samples.append(_sample(path, labels, size, problems))
    _check_useful(data, split, listing, samples, problems)
    return Split(tuple(samples), (), listing.category_ids, tuple(problems))


def _sample(path: Path, found: Labels, size: tuple[int, int], problems: list[Problem]) -> Sample:
    """Clips boxes ``[M, 4]`` to the image and leaves out those of which nothing is left, or that stand there twice."""
    clipped = found.boxes.clip(0, np.array([*size, *size])).astype(np.float32)  # in which a narrow box may be none
    kept: np.ndarray = np.all(clipped[:, 2:] > clipped[:, :2], axis=1)
    moved = np.abs(clipped - found.boxes).max(axis=1, initial=0)
    for index in np.flatnonzero(~kept | (moved > 1)).tolist():
        x1, y1, x2, y2 = found.boxes[index].tolist()
        box = f"the box from {x1:g}, {y1:g} to {x2:g}, {y2:g}"
        if kept[index]:
            kind, text = CLIPPED, f"{box} reaches out of the image of {size[0]}x{size[1]} pixels"
        elif np.float32(x2) > np.float32(x1) and np.float32(y2) > np.float32(y1):
            kind, text = OUTSIDE, f"{box} is wholly outside the image of {size[0]}x{size[1]} pixels"
        else:
            kind, text = NO_AREA, f"{box} has no area"
        problems.append(Problem(kind, found.where(index), text))
    first: dict[tuple[float, ...], int] = {}
    rows = zip(found.uses.tolist(), found.labels.tolist(), *found.boxes.T.tolist(), strict=True)
    for index, row in enumerate(rows):
        if kept[index] and row[0] != CROWD and first.setdefault(row, index) != index:
            kept[index] = False
            text = f"the same box of the same class as at {found.where(first[row])}"
            problems.append(Problem(TWICE, found.where(index), text))
    boxes = clipped
    trained, ignored = kept & (found.uses == TRAINED), kept & (found.uses != TRAINED)
    return Sample(
        path,
        boxes[trained],
        found.labels[trained],
        None if found.areas is None else found.areas[trained],
        boxes[ignored],
        found.labels[ignored],
        found.uses[ignored] == CROWD,
        found.image_id,
        found.mask,
    )


def _check_useful(
    data: DataSpec, split: str, listing: Listing, samples: Sequence[Sample], problems: Sequence[Problem]
) -> None:
    """Raises a Fault where nothing of a split can be used."""
    bad = [problem for problem in problems if not problem.kind.harmless]
    bare = [problem for problem in problems if problem.kind is NO_FILE]
    if samples and len(bare) == len(samples):
        raise Fault(
            f"{data.path}: {split}: not one of the {len(samples)} images has a label file; "
            f"the first was looked for at {listing.depends[listing.images.index(bare[0].where)]}"
        )
    if not samples and not bad:
        raise Fault(f"{data.path}: {split}: there is no image")
    if bad and not any(len(sample.labels) or len(sample.ignored_labels) for sample in samples):
        lines = [str(problem) for problem in bad]
        more = len(lines) - MOST_FAULTS
        raise Fault(
            f"{data.path}: {split}: nothing can be used",
            *lines[:MOST_FAULTS],
            *([f"... and {more} more"] if more > 0 else []),
        )


def notes_of(data: DataSpec, problems: Sequence[Problem]) -> tuple[str, ...]:
    """A line for every problem; of many of one kind the first three, and how many more there are."""
    alike: dict[str, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(problem.kind.title, []).append(problem)
    notes: list[str] = []
    for title, found in alike.items():
        shown = len(found) if len(found) <= MOST_ALIKE else MOST_ALIKE - 2
        notes += map(str, found[:shown])
        if found[shown:]:
            notes.append(
                f"... and {len(found) - shown:,} more {title} ({found[0].kind.outcome}); "
                f"python -m data check {data.path} lists all"
            )
    return tuple(notes)
