"""What a label file says about one image, and every kind of thing that can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.structures import MaskFile, Sample

MOST_BOXES = 10_000  # of an image; more take all memory in a loss, and are no labels
LARGEST_FILE = 8_000_000  # bytes of an image's label file; so many boxes take less
LONGEST_QUOTE = 60  # letters of a file that a problem repeats
MOST_NAMES = 5  # of files, classes or ids that a problem shows in a row

TRAINED, DIFFICULT, CROWD = 0, 1, 2  # what an object is for: training sees only the first


@dataclass(frozen=True)
class Kind:
    """A kind of problem: its heading in a report, and what becomes of the box or image that has it."""

    title: str
    outcome: str
    harmless: bool = False  # nothing is lost by it


WRONG_LINE = Kind("lines that are no box", "box left out")
UNKNOWN_CLASS = Kind("classes that are not known", "box left out")
NO_AREA = Kind("boxes without area", "box left out")
OUTSIDE = Kind("boxes wholly outside their image", "box left out")
TWICE = Kind("boxes given twice", "box left out")
UNKNOWN_IMAGE = Kind("labels of an image that is not listed", "label left out")
CLIPPED = Kind("boxes reaching out of their image", "box clipped", harmless=True)
LABEL_FILE = Kind("label files that cannot be read", "image left out")
TOO_MANY = Kind("images with too many boxes", "image left out")
IMAGE_FILE = Kind("images that cannot be read", "image left out")
MISSING_IMAGE = Kind("images that are not there", "image left out")
UNLISTED = Kind("images that the JSON does not list", "image left out")
IMAGE_TWICE = Kind("images listed twice", "the first counts")
OTHER_SIZE = Kind("images of another size than their labels say", "the file counts", harmless=True)
NO_FILE = Kind("images without a label file", "taken as without objects", harmless=True)
NO_CLASS = Kind("folders that are no class", "images left out")
NO_MASK = Kind("images without a mask", "image left out")
WRONG_MASK = Kind("masks that cannot be read", "image left out")
MASK_SIZE = Kind("masks of another size than their image", "image left out")
UNKNOWN_ID = Kind("ids that are no class", "pixels left out")
ALL_VOID = Kind("masks without a class", "nothing to learn from", harmless=True)
KINDS = {
    kind.title: kind
    for kind in (
        WRONG_LINE,
        UNKNOWN_CLASS,
        NO_AREA,
        OUTSIDE,
        TWICE,
        UNKNOWN_IMAGE,
        CLIPPED,
        LABEL_FILE,
        TOO_MANY,
        IMAGE_FILE,
        MISSING_IMAGE,
        UNLISTED,
        IMAGE_TWICE,
        OTHER_SIZE,
        NO_FILE,
        NO_CLASS,
        NO_MASK,
        WRONG_MASK,
        MASK_SIZE,
        UNKNOWN_ID,
        ALL_VOID,
    )
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, as ``file:line``, what was found, and what would be right."""

    kind: Kind
    where: str
    text: str

    @property
    def file(self) -> str:
        """`where` without the line."""
        file, _, line = self.where.rpartition(":")
        return file if line.isdecimal() else self.where

    def __str__(self) -> str:
        return f"{self.where}: {self.text} ({self.kind.outcome})"


@dataclass(frozen=True)
class Split:
    """A split's samples in the order of its list or, from a folder, of their paths.

    Attributes:
        notes: what is wrong, in as many lines as a run can show; each names file and line.
        category_ids: COCO's ids of the classes, in the order of their names, where the format has them.
        problems: everything that is wrong.
    """

    samples: tuple[Sample, ...]
    notes: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Labels:
    """The objects of one image as its label file has them, not yet clipped to the image.

    Attributes:
        boxes: ``[M, 4]`` float64 xyxy in pixels.
        labels: ``[M]`` int64.
        uses: ``[M]`` uint8, each TRAINED, DIFFICULT or CROWD.
        where: ``file:line`` of an object; a function, for few are ever asked for.
        problems: the objects that could not be read, and the like.
        areas: ``[M]`` float64, or None where the format has none.
        image_id: COCO's.
        lost: whether the label file is so broken that the image is left out: without its labels it would be taken as
            one without objects.
        mask: where the class of every pixel stands.
    """

    boxes: np.ndarray
    labels: np.ndarray
    uses: np.ndarray
    where: Callable[[int], str]
    problems: tuple[Problem, ...] = ()
    areas: np.ndarray | None = None
    image_id: int | None = None
    lost: bool = False
    mask: MaskFile | None = None


def quoted(value: object) -> str:
    """What a file holds, as a problem repeats it: in quotes where it is text, and not all of what is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE - 3]}..."


def too_many(path: str | Path, count: int) -> Labels:
    """In place of the labels of an image that has more than `MOST_BOXES`."""
    return no_labels(Problem(TOO_MANY, str(path), f"has {count:,} boxes; {MOST_BOXES:,} at most are right"), lost=True)


def labels_of(
    boxes: list[list[float]],
    labels: list[int],
    uses: list[int],
    where: Callable[[int], str],
    problems: list[Problem],
    areas: list[float] | None = None,
    image_id: int | None = None,
) -> Labels:
    """From plain lists."""
    return Labels(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(uses, dtype=np.uint8),
        where,
        tuple(problems),
        None if areas is None else np.array(areas, dtype=np.float64),
        image_id,
    )


def no_labels(*problems: Problem, lost: bool = False) -> Labels:
    """An image without objects, or with a label file that cannot be read."""
    return Labels(*_EMPTY, lambda _: "", problems, lost=lost)


_EMPTY = (np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8))


def some(names: Sequence[str], most: int = MOST_NAMES) -> str:
    """The first few different names, and dots where there are more."""
    different = list(dict.fromkeys(names))
    return ", ".join([*different[:most], *(["..."] if len(different) > most else [])])
