"""How good a detector is: COCO's twelve numbers.

The metric is pycocotools', or faster-coco-eval's where that is installed (the ``fast`` extra): the same numbers to
1e-6, several times sooner. VOC's numbers are in `engine.voc`, a classifier's in `engine.classify`, a segmenter's in
`engine.segment`, the pictures in `engine.plots`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, astuple, dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from data.structures import Detections, Sample
from engine.jackknife import groups_of, remaining
from engine.runs import table
from engine.voc import VocMetrics

NUMBERS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip  # in the order of COCOeval.stats
NO_AREA = -1.0  # of an ignored object: it is of no size, and no size's number asks for it


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers over one split, each 0 to 1, or nan where no ground truth asks for it.

    ``per_class`` holds ``(name, ap, ap50)`` of every class, ``per_class_sizes`` its AP of small, medium and large
    objects. small is under 32x32, large over 96x96 pixels of the original image, by the object's own area where the
    data has it; ar1, ar10, ar100 allow so many detections an image and class. ``ms_per_image`` says where the time
    went: read, network, nms.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: tuple[tuple[str, float, float], ...]
    images: int
    ms_per_image: dict[str, float] = field(default_factory=dict)
    per_class_sizes: tuple[tuple[float, float, float], ...] = ()

    @property
    def fitness(self) -> float:
        """What ``best.pt`` is best in: ``0.9 AP + 0.1 AP50``, as in yolov5."""
        return 0.9 * self.ap + 0.1 * self.ap50

    def table(self) -> str:
        """AP and AP50 of all classes together, then of each class, in aligned columns."""
        return table([("all", self.ap, self.ap50), *self.per_class], ("class", "AP", "AP50"))

    def summary(self) -> str:
        """The twelve numbers in aligned columns, the number of images and the milliseconds each took."""
        values = astuple(self)[: len(NUMBERS)]
        precision = table([values[:6]], ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"))
        recall = table([values[6:]], ("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"))
        times = f", {times_line(self.ms_per_image)}" if self.ms_per_image else ""
        return f"{precision}\n\n{recall}\n\n{self.images} images{times}"


def times_line(ms_per_image: dict[str, float]) -> str:
    """``ms an image, 2 threads: read 1.2, network 20.1, nms 0.8``."""
    times = ", ".join(f"{name} {ms:.1f}" for name, ms in ms_per_image.items())
    return f"ms an image, {torch.get_num_threads()} threads: {times}"


def coco_metrics(
    truths: Sequence[Sample],
    detections: Sequence[Detections],
    names: Sequence[str],
    *,
    backend: str | None = None,
) -> Metrics:
    """COCO metrics of the detections of each image against its sample; all boxes in original pixels.

    ``names`` are the classes, the n-th for label n. Where a number has no ground truth to be measured on (a class,
    a size) it is left out of the means, and nan if nothing remains. A detection that matches an ignored object
    counts neither for nor against; a crowd takes any number of them, each by the share of its own area that lies in
    the crowd, another ignored object takes one. ``backend`` is ``pycocotools`` or ``faster_coco_eval``; None takes
    the faster one that is installed.
    """
    return _metrics(_matched(truths, detections, names, backend), names, len(truths))


def jackknife_ap(
    truths: Sequence[Sample],
    detections: Sequence[Detections],
    names: Sequence[str],
    *,
    backend: str | None = None,
) -> tuple[Metrics, tuple[float, ...]]:
    """`coco_metrics`, and AP with each group of images left out in turn, which says how sure the AP is.

    The groups are those of `engine.jackknife`. Detections are matched to truths only once. An AP is nan where the
    images that remain show nothing to find.
    """
    evaluation = _matched(truths, detections, names, backend)
    metrics = _metrics(evaluation, names, len(truths))
    return metrics, _ap_without(evaluation, len(truths)) if groups_of(len(truths)) else ()


def _metrics(evaluation: Any, names: Sequence[str], images: int) -> Metrics:
    """All numbers of what `_matched` gives."""
    if evaluation is None:
        stats, precision = np.full(len(NUMBERS), -1.0), np.full((10, 101, len(names), 4, 3), -1.0)
    else:
        with redirect_stdout(io.StringIO()):  # both report their progress with print
            evaluation.accumulate()
            evaluation.summarize()
        stats, precision = np.asarray(evaluation.stats)[: len(NUMBERS)], np.asarray(evaluation.eval["precision"])
    numbers: dict[str, Any] = {name: _or_nan(value) for name, value in zip(NUMBERS, stats, strict=True)}
    return Metrics(
        **numbers,
        per_class=tuple(
            # all areas, at most 100 detections; the first IoU threshold is .5
            (name, _mean(precision[:, :, label, 0, -1]), _mean(precision[0, :, label, 0, -1]))
            for label, name in enumerate(names)
        ),
        images=images,
        per_class_sizes=tuple(
            (_mean(sizes[:, :, 0]), _mean(sizes[:, :, 1]), _mean(sizes[:, :, 2]))
            for sizes in np.moveaxis(precision[:, :, :, 1:, -1], 2, 0)
        ),
    )


def _ap_without(evaluation: Any, images: int) -> tuple[float, ...]:
    """AP without each group, from the matches of an evaluation, which is of no other use afterwards."""
    held = "_evalImgs_cpp" if hasattr(evaluation, "_evalImgs_cpp") else "evalImgs"
    matches = getattr(evaluation, held)  # of every class, then area, then image
    of_a_class = images * len(evaluation.params.areaRng)
    found = []
    for kept in (places.tolist() for places in remaining(images)):
        for parameters in (evaluation.params, evaluation._paramsEval):
            parameters.imgIds, parameters.areaRng, parameters.maxDets = kept, parameters.areaRng[:1], [100]
        setattr(evaluation, held, [matches[at + n] for at in range(0, len(matches), of_a_class) for n in kept])
        with redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        found.append(_mean(np.asarray(evaluation.eval["precision"])))
    return tuple(found)


def _coco(frame: dict[str, list[dict[str, Any]]], rows: Iterable[tuple[Any, ...]]) -> dict[str, Any]:
    """A COCO data set of rows ``image, box, label, area, crowd, score``, boxes xyxy.

    Ids start at 1: the evaluation takes 0 for "not matched".
    """
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area,
            "iscrowd": crowd,
            "score": score,
        }
        for number, (image, (x1, y1, x2, y2), label, area, crowd, score) in enumerate(rows, start=1)
    ]
    return {**frame, "annotations": annotations}


def _true_rows(truths: Sequence[Sample]) -> Iterator[tuple[Any, ...]]:
    """What `_coco` takes, of the objects and behind them the ignored ones of each image."""
    for image, truth in enumerate(truths):
        areas = _areas(truth.boxes) if truth.areas is None else truth.areas
        objects = zip(truth.boxes.tolist(), truth.labels.tolist(), areas.tolist(), strict=True)
        yield from ((image, box, label, area, 0, 0.0) for box, label, area in objects)
        ignored = zip(
            truth.ignored_boxes.tolist(), truth.ignored_labels.tolist(), truth.ignored_crowd.tolist(), strict=True
        )
        yield from ((image, box, label, NO_AREA, int(crowd), 0.0) for box, label, crowd in ignored)


def found_rows(detections: Sequence[Detections]) -> Iterator[tuple[Any, ...]]:
    """What `_coco` takes, of the detections of each image."""
    for image, found in enumerate(detections):
        areas = _areas(found.boxes.numpy()).tolist()
        rows = zip(found.boxes.tolist(), found.labels.tolist(), areas, found.scores.tolist(), strict=True)
        yield from ((image, box, label, area, 0, score) for box, label, area, score in rows)


def _areas(boxes: np.ndarray) -> np.ndarray:
    """Areas ``[M]`` of boxes xyxy, in float64 so that nothing is rounded on the way."""
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2].astype(np.float64)
    return sides[:, 0] * sides[:, 1]


def _matched(
    truths: Sequence[Sample], detections: Sequence[Detections], names: Sequence[str], backend: str | None
) -> Any:
    """The backend's evaluation, detections and truths of each image matched; None where there is no image."""
    assert len(truths) == len(detections), f"{len(truths)} images, but detections of {len(detections)}"
    if not truths:
        return None
    frame: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": image} for image in range(len(truths))],
        "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
    }
    options: dict[str, Any] = {"iouType": "bbox"}
    if (backend or ("faster_coco_eval" if find_spec("faster_coco_eval") else "pycocotools")) == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

        options["separate_eval"] = True  # keeps the matches for `_ap_without`

    with redirect_stdout(io.StringIO()):
        tables = []
        for rows in (_true_rows(truths), found_rows(detections)):
            coco = COCO()
            coco.dataset = _coco(frame, rows)
            coco.createIndex()
            tables.append(coco)
        evaluation = COCOeval(*tables, **options)
        evaluation.evaluate()
    return evaluation


def _or_nan(value: float) -> float:
    return float(value) if value > -1 else math.nan


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def class_table(metrics: Metrics, voc: VocMetrics) -> str:
    """Every number of all classes together, then of each, in aligned columns; `engine.voc` has those from P on."""
    header = (
        *("class", "objects", "AP", "AP50", "AP small", "AP medium", "AP large"),
        *("VOC 11-point", "VOC area", "P", "R"),
    )
    total = sum(row[1] for row in voc.per_class)
    first = ("all", total, metrics.ap, metrics.ap50, metrics.ap_small, metrics.ap_medium, metrics.ap_large)
    rows: list[tuple[Any, ...]] = [(*first, voc.eleven_points, voc.area, voc.best.precision, voc.best.recall)]
    for (name, ap, ap50), sizes, (_, objects, eleven_points, area), best in zip(
        metrics.per_class, metrics.per_class_sizes, voc.per_class, voc.best.per_class, strict=True
    ):
        rows.append((name, objects, ap, ap50, *sizes, eleven_points, area, *best))
    return table(rows, header)


def metrics_json(metrics: Metrics, voc: VocMetrics) -> str:
    """All numbers by name; what is nan is null."""
    return json.dumps(without_nan({"coco": asdict(metrics), "voc": asdict(voc)}), indent=1) + "\n"


def without_nan(value: Any) -> Any:
    """The same with null, as JSON has it, for nan."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
