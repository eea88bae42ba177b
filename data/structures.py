"""The plain types that every part of the project hands to the next.

Boxes are ``x1 y1 x2 y2`` in pixels everywhere inside the project: pixels of the original image in a `Sample`,
pixels of the network's input in `Targets` and `Detections`. A `Letterbox` leads from one to the other.
"""

from __future__ import annotations

import configparser
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PROGRAM = "oneshot-yolo"
VOID = 255  # in a mask: a pixel of no class, which is neither learned from nor measured on


class Fault(ValueError):
    """Something the user gave is wrong. One line a problem: where, what was found, what would be right.

    Raised at gates only (YAML, labels, checkpoints, options). Doors print the lines and exit with code 2.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def nearest(word: object, words: Iterable[str]) -> str:
    """``"; did you mean 'Conv'?"``, or nothing where no word is near."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    if not close:
        lower = {known.lower(): known for known in words}
        close = [lower[str(word).lower()]] if str(word).lower() in lower else []
    return f"; did you mean {close[0]!r}?" if close else ""


def version() -> str:
    """The program's, from its one place: setup.cfg, or what was installed from it."""
    here = configparser.ConfigParser()
    here.read(Path(__file__).resolve().parents[1] / "setup.cfg", encoding="utf-8")
    try:
        return here["metadata"]["version"] if "metadata" in here else metadata.version(PROGRAM)
    except (KeyError, metadata.PackageNotFoundError):
        return "unknown"


def _none_of(shape: tuple[int, ...], kind: type) -> np.ndarray:
    return field(default_factory=lambda: np.zeros(shape, dtype=kind))


@dataclass(frozen=True)
class MaskFile:
    """A PNG with an id a pixel. Its ids that are not `void` stand, in their order, for the `classes` 0, 1, 2, ..."""

    path: Path
    classes: int
    void: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One labelled image on disk: boxes ``[M, 4]`` float32 in pixels of the original image, labels ``[M]`` int64.

    An image that is of a class as a whole has one box, which fills it. One with a mask has such a box for every class
    that the mask shows, and its pixels as the area.

    Attributes:
        areas: ``[M]`` float64 square pixels of the objects themselves, where the file knows them (COCO's are those of
            the outline); None: the area of the box.
        ignored_boxes: ``[K, 4]`` float32, objects that training never sees and evaluation does not ask for:
            VOC's difficult ones and COCO's crowds.
        ignored_labels: ``[K]`` int64.
        ignored_crowd: ``[K]`` bool; a crowd's overlap is measured over the detection's own area.
        image_id: COCO's number of the image.
        mask: where the class of every pixel stands, if anywhere.
    """

    path: Path
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray | None = None
    ignored_boxes: np.ndarray = _none_of((0, 4), np.float32)
    ignored_labels: np.ndarray = _none_of((0,), np.int64)
    ignored_crowd: np.ndarray = _none_of((0,), np.bool_)
    image_id: int | None = None
    mask: MaskFile | None = None


@dataclass(frozen=True)
class Letterbox:
    """How an image of ``width x height`` was scaled and padded into the network's input.

    ``x_network = x_original * scale + pad_x``, likewise y.
    """

    width: int
    height: int
    scale: float
    pad_x: int
    pad_y: int

    def to_network(self, boxes: np.ndarray) -> np.ndarray:
        return boxes * self.scale + np.array([self.pad_x, self.pad_y] * 2, dtype=np.float32)

    def to_original(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes ``[M, 4]`` back in pixels of the original image, clipped to it."""
        moved = (boxes - np.array([self.pad_x, self.pad_y] * 2, dtype=np.float32)) / self.scale
        return moved.clip(0, np.array([self.width, self.height] * 2, dtype=np.float32))


@dataclass(frozen=True)
class Targets:
    """What a batch should find: boxes ``[M, 4]`` float32, labels ``[M]`` int64, the image ``[M]`` int64 each is in.

    Of images whose pixels are of classes the masks ``[N, H, W]`` uint8, with `VOID` where a pixel is of none; None of
    others.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> Targets:
        masks = None if self.masks is None else self.masks.to(device)
        return Targets(self.boxes.to(device), self.labels.to(device), self.image_index.to(device), masks)


@dataclass(frozen=True)
class Detections:
    """What was found in one image: boxes ``[K, 4]``, scores ``[K]`` in [0, 1] falling, labels ``[K]`` int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Ranking:
    """What one image may show as a whole: scores ``[K]`` in [0, 1] falling, labels ``[K]`` int64."""

    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class LabelMap:
    """The class of every pixel of one image: labels ``[H, W]`` uint8 on the CPU."""

    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Images ``[N, 3, H, W]`` uint8 RGB with their targets; one letterbox and one sample index an image."""

    images: Tensor
    targets: Targets
    letterboxes: tuple[Letterbox, ...]
    indices: tuple[int, ...]
