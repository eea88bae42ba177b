"""What was found beside what is there: which are one, what is wrong or missed, and in which images most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.structures import Detections, Sample
from engine.nms import USUAL
from engine.voc import overlap


@dataclass(frozen=True)
class Outcomes:
    """What became of the boxes of one image: pairs of places and what was left over.

    ``pairs [P, 2]`` are detection and object that lie on each other, of whatever classes; ``wrong`` are detections
    without an object, ``missed`` objects without a detection. ``labels`` holds predicted and true class of each of the
    three, -1 for none.
    """

    pairs: np.ndarray
    wrong: np.ndarray
    missed: np.ndarray
    labels: np.ndarray

    @property
    def mistakes(self) -> int:
        """Detections without an object, objects without a detection, and pairs of different classes."""
        return int((self.labels[:, 0] != self.labels[:, 1]).sum())


def outcomes(truth: Sample, found: Detections, conf: float = USUAL.conf, iou: float = USUAL.iou) -> Outcomes:
    """Pairs detections above ``conf`` with the objects of an image, whatever their classes.

    Of all pairs that overlap by more than ``iou`` the closest come first, and each box is in one pair at most.
    Detections without an object that lie on an ignored one are not counted.
    """
    seen = np.flatnonzero(found.scores.numpy() > conf)
    boxes, labels = found.boxes.numpy()[seen].astype(np.float64), found.labels.numpy()[seen]
    overlaps = overlap(boxes, truth.boxes.astype(np.float64))
    near = np.argwhere(overlaps > iou)
    near = near[np.argsort(-overlaps[near[:, 0], near[:, 1]], kind="stable")]
    free_boxes, free_objects = np.ones(len(boxes), dtype=bool), np.ones(len(truth.labels), dtype=bool)
    pairs = []
    for box, thing in near:
        if free_boxes[box] and free_objects[thing]:
            free_boxes[box] = free_objects[thing] = False
            pairs.append((box, thing))
    for crowd in (False, True):
        ignored = truth.ignored_boxes[truth.ignored_crowd == crowd].astype(np.float64)
        free_boxes &= ~(overlap(boxes, ignored, crowd) > iou).any(axis=1)
    wrong, missed = np.flatnonzero(free_boxes), np.flatnonzero(free_objects)
    paired = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    rows = [
        np.stack([labels[paired[:, 0]], truth.labels[paired[:, 1]]], axis=1),
        np.stack([labels[wrong], np.full(len(wrong), -1)], axis=1),
        np.stack([np.full(len(missed), -1), truth.labels[missed]], axis=1),
    ]
    paired[:, 0] = seen[paired[:, 0]]
    return Outcomes(paired, seen[wrong], missed, np.concatenate(rows).astype(np.int64))


def confusion(verdicts: Sequence[Outcomes], classes: int) -> np.ndarray:
    """Counts ``[classes + 1, classes + 1]``: the row is what was predicted, the column what it was.

    The last row counts objects that were missed, the last column detections of nothing.
    """
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for verdict in verdicts:
        np.add.at(matrix, (verdict.labels[:, 0], verdict.labels[:, 1]), 1)  # -1 is the last one
    return matrix


def worst(verdicts: Sequence[Outcomes], count: int) -> list[int]:
    """Places of the images with the most mistakes, most first, those with the same number in their order."""
    order = sorted(range(len(verdicts)), key=lambda place: -verdicts[place].mistakes)
    return [place for place in order[:count] if verdicts[place].mistakes]


def class_confusion(truths_N: np.ndarray, scores_NC: np.ndarray) -> np.ndarray:
    """Counts ``[C, C]`` of images: the row is the likeliest class, the column the true one."""
    matrix = np.zeros((scores_NC.shape[1],) * 2, dtype=np.int64)
    np.add.at(matrix, (scores_NC.argmax(axis=1), truths_N), 1)
    return matrix


def least_likely(truths_N: np.ndarray, scores_NC: np.ndarray, count: int) -> list[int]:
    """Places of the images that were taken for another class, first those whose own was the least likely."""
    wrong = np.flatnonzero(scores_NC.argmax(axis=1) != truths_N)
    order = np.argsort(scores_NC[wrong, truths_N[wrong]], kind="stable")
    return [int(place) for place in wrong[order][:count]]


def most_wrong(confusions_NKK: np.ndarray, count: int) -> list[int]:
    """Places of the images with the largest shares of wrong pixels, the worst first."""
    pixels_N = confusions_NKK.sum(axis=(1, 2))
    wrong_N = 1 - confusions_NKK.trace(axis1=1, axis2=2) / np.maximum(pixels_N, 1)
    wrong_N[pixels_N == 0] = 0
    return [int(place) for place in np.argsort(-wrong_N, kind="stable")[:count] if wrong_N[place]]
