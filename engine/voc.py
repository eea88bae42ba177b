"""Precision and recall at one overlap, and what Pascal VOC makes of them.

Detections are matched as in VOC's development kit (Everingham et al., IJCV 88, 2010): each is held against the object
of its class that it overlaps most. The first to reach an object, by falling score, is right, a second one is wrong,
and one whose object is marked difficult is not counted. COCO matches otherwise (`engine.metrics.coco_metrics`): there
a detection that comes second to its object may take another one.
"""

# Shape letters: D detections by falling score, G objects, C classes, 4 = x1 y1 x2 y2 in pixels.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.structures import Detections, Sample

WRONG, RIGHT, NOT_COUNTED = 0, 1, -1
CONFIDENCES = np.linspace(0, 1, 1001)  # at which `best_f1` looks


@dataclass(frozen=True)
class Curve:
    """The detections of one class over all images: ``scores [D]`` falling, ``right [D]`` bool, and what was there."""

    scores: np.ndarray
    right: np.ndarray
    objects: int

    def precision_at(self, steps: int) -> np.ndarray:
        """The best precision at a recall of 0, 1/steps, ... 1 or more, ``[steps + 1]``; 0 where it is never reached.

        As in the programs that published numbers come from, 3 of 10 objects do not reach the recall of 3 tenths, 6 not
        that of 6, nor 7 that of 7: as floats, numpy's steps are a little larger.
        """
        if not self.objects:
            return np.full(steps + 1, math.nan)
        first = np.searchsorted(self.right.cumsum() / self.objects, np.linspace(0, 1, steps + 1))
        return np.append(self._envelope(), 0.0)[first]

    def area(self) -> float:
        """The area under precision over recall, made falling first; nan without objects. VOC's AP since 2010."""
        return float(self._envelope()[self.right].sum() / self.objects) if self.objects else math.nan

    def eleven_points(self) -> float:
        """The mean precision at the recalls 0, .1, ... 1; nan without objects. VOC's AP up to 2009."""
        return float(self.precision_at(10).mean())

    def at(self, confidences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1 of the detections with at least these scores.

        Precision is nan where there is no detection; recall and F1 are nan without objects.
        """
        found = np.searchsorted(-self.scores, -confidences, side="right")
        right = np.append(0, self.right.cumsum())[found]
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = right / np.float64(self.objects)
            f1 = 2 * right / (found + self.objects) if self.objects else np.full(len(confidences), math.nan)
            return right / found, recall, f1

    def _envelope(self) -> np.ndarray:
        """The best precision at this detection's recall or a higher one, ``[D]``."""
        precision = self.right.cumsum() / np.arange(1, len(self.right) + 1)
        return np.maximum.accumulate(precision[::-1])[::-1]


@dataclass(frozen=True)
class BestF1:
    """The confidence at which the mean F1 of all classes with objects is highest, and each class's numbers there.

    The means are over classes with objects; a class without detections there has precision nan and counts as 0.
    """

    confidence: float
    f1: float
    precision: float
    recall: float
    per_class: tuple[tuple[float, float], ...]  # precision and recall

    def line(self) -> str:
        """``F1 0.71 at confidence 0.342``."""
        return f"F1 {self.f1:.2f} at confidence {self.confidence:.3f}"


@dataclass(frozen=True)
class VocMetrics:
    """VOC's average precision, 0 to 1, by eleven points and by area; nan where there was nothing to find.

    ``per_class`` holds ``(name, objects, eleven points, area)``; difficult objects are not counted.
    """

    eleven_points: float
    area: float
    per_class: tuple[tuple[str, int, float, float], ...]
    best: BestF1


def voc_metrics(
    truths: Sequence[Sample], detections: Sequence[Detections], names: Sequence[str], iou: float = 0.5
) -> VocMetrics:
    """VOC's numbers of the detections of each image against its sample; all boxes in original pixels.

    VOC itself counts pixels, so that a box from 1 to 10 is 10 wide; here boxes have edges and it is 9. To have VOC's
    numbers to the last digit add 1 to every x2 and y2.
    """
    found = curves(truths, detections, len(names), iou)
    rows = [
        (name, curve.objects, curve.eleven_points(), curve.area()) for name, curve in zip(names, found, strict=True)
    ]
    eleven_points, area = mean_of([row[2] for row in rows]), mean_of([row[3] for row in rows])
    return VocMetrics(eleven_points, area, tuple(rows), best_f1(found))


def curves(truths: Sequence[Sample], detections: Sequence[Detections], classes: int, iou: float = 0.5) -> list[Curve]:
    """The curve of every class. Equal scores count in the order of the images, then of their detections."""
    assert len(truths) == len(detections), f"{len(truths)} images, but detections of {len(detections)}"
    scores = np.concatenate([np.zeros(0), *(found.scores.numpy() for found in detections)])
    labels = np.concatenate([np.zeros(0, np.int64), *(found.labels.numpy() for found in detections)])
    parts = [matched(truth, found, iou) for truth, found in zip(truths, detections, strict=True)]
    verdicts = np.concatenate([np.zeros(0, np.int64), *parts])
    objects = np.bincount(np.concatenate([np.zeros(0, np.int64), *(t.labels for t in truths)]), minlength=classes)
    order = np.argsort(-scores, kind="stable")
    order = order[verdicts[order] != NOT_COUNTED]
    order = order[np.argsort(labels[order], kind="stable")]  # by class, and by falling score in each
    places = np.split(order, np.searchsorted(labels[order], np.arange(1, classes)))
    return [
        Curve(scores[place], verdicts[place] == RIGHT, int(count)) for place, count in zip(places, objects, strict=True)
    ]


def matched(truth: Sample, found: Detections, iou: float) -> np.ndarray:
    """What each detection of an image is, ``[D]``: RIGHT, WRONG or NOT_COUNTED, in the order in which they came.

    A detection that reaches no object, but lies with at least ``iou`` of its own area in a crowd, is not counted.
    """
    boxes, labels = found.boxes.numpy().astype(np.float64), found.labels.numpy()
    plain = ~truth.ignored_crowd
    objects = np.concatenate([truth.boxes, truth.ignored_boxes[plain]]).astype(np.float64)
    object_labels = np.concatenate([truth.labels, truth.ignored_labels[plain]])
    verdict = np.full(len(labels), WRONG)
    if len(labels) and len(objects):
        overlaps = np.where(labels[:, None] == object_labels, overlap(boxes, objects), -1.0)
        which = overlaps.argmax(axis=1)
        reached = overlaps[np.arange(len(which)), which] >= iou
        easy = reached & (which < len(truth.labels))
        verdict[reached & ~easy] = NOT_COUNTED
        first = np.argsort(-found.scores.numpy(), kind="stable")
        first = first[easy[first]]
        verdict[first[np.unique(which[first], return_index=True)[1]]] = RIGHT
        unreached = ~reached
    else:
        unreached = np.ones(len(labels), dtype=bool)
    crowds, crowd_labels = truth.ignored_boxes[~plain].astype(np.float64), truth.ignored_labels[~plain]
    if len(crowds):
        inside = (labels[:, None] == crowd_labels) & (overlap(boxes, crowds, crowd=True) >= iou)
        verdict[unreached & inside.any(axis=1)] = NOT_COUNTED
    return verdict


def overlap(boxes: np.ndarray, others: np.ndarray, crowd: bool = False) -> np.ndarray:
    """Intersection over union of boxes ``[D, 4]`` and others ``[G, 4]``: ``[D, G]``, 0 where there is no area.

    ``crowd`` divides by the area of the box alone.
    """
    sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    shared = sides.clip(0).prod(axis=2)
    areas, other_areas = ((y[:, 2:] - y[:, :2]).clip(0).prod(axis=1) for y in (boxes, others))
    whole = np.broadcast_to(areas[:, None], shared.shape) if crowd else areas[:, None] + other_areas - shared
    return np.divide(shared, whole, out=np.zeros_like(shared), where=shared > 0)


def best_f1(found: Sequence[Curve]) -> BestF1:
    """The best confidence in steps of .001, the lowest of equally good ones."""
    asked = [curve for curve in found if curve.objects]
    if not asked:
        return BestF1(math.nan, math.nan, math.nan, math.nan, ((math.nan, math.nan),) * len(found))
    f1 = np.mean([curve.at(CONFIDENCES)[2] for curve in asked], axis=0)
    place = int(f1.argmax())
    confidence = CONFIDENCES[place : place + 1]
    rows = [tuple(float(value[0]) for value in curve.at(confidence)[:2]) for curve in found]
    precision, recall = (
        float(np.mean([np.nan_to_num(row[part]) for row, curve in zip(rows, found, strict=True) if curve.objects]))
        for part in (0, 1)
    )
    return BestF1(float(confidence[0]), float(f1[place]), precision, recall, tuple((row[0], row[1]) for row in rows))


def mean_of(values: Sequence[float]) -> float:
    """The mean of those that are not nan; nan where none remains."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
