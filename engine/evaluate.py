"""How good a detector is: COCO's twelve numbers, and how long an image takes. And val.py, for every task.

The metric is pycocotools', or faster-coco-eval's where that is installed (the ``fast`` extra): the same numbers to
1e-6, several times sooner. VOC's numbers are in `engine.voc`, a classifier's in `engine.classify`, a segmenter's in
`engine.segment`, the pictures in `engine.plots`.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, astuple, dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.augment import Augment
from data.config import DataSpec, read_data_spec
from data.dataset import ImageSet
from data.images import image_size
from data.loader import batches
from data.readers import Split, read_split
from data.structures import Batch, Detections, Fault, Letterbox, Sample
from engine.doors import door, option_parser, parse_device, parse_options
from engine.jackknife import groups_of, remaining
from engine.nms import nms
from engine.plots import draw_evaluation
from engine.runs import new_run, table, write_text
from engine.voc import VocMetrics, voc_metrics
from models.checkpoint import load_checkpoint, restore
from models.network import Network

NUMBERS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip  # in the order of COCOeval.stats

CALIBRATION_BATCH = 32
NO_AREA = -1.0  # of an ignored object: it is of no size, and no size's number asks for it
HIGH_CONFIDENCE = 0.01  # from here on AP is noticeably too low
ONE_CLASS = ("item",)  # what all classes are called as one, as in yolov5


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


# ---- the metric ----


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


def _found_rows(detections: Sequence[Detections]) -> Iterator[tuple[Any, ...]]:
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
        for rows in (_true_rows(truths), _found_rows(detections)):
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


# ---- a network over a data set ----


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Add the seconds that the block takes to ``seconds[name]``; waits for the work of a GPU."""
    start = time.perf_counter()
    yield
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] += time.perf_counter() - start


def pixels(batch: Batch, device: torch.device | str) -> torch.Tensor:
    """The batch's images on the device: float 0 to 1, channels last in memory."""
    images = batch.images.to(device, non_blocking=True)
    return images.contiguous(memory_format=torch.channels_last).float() / 255


@contextmanager
def evaluating(network: torch.nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode; afterwards it is in the mode it was in."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def answered(
    dataset: ImageSet,
    answer: Callable[[torch.Tensor, Batch], Any],
    seconds: dict[str, float],
    *,
    precision: torch.dtype,
    batch_size: int,
    device: torch.device | str,
    workers: int,
    progress: bool,
    corner: bool = False,
) -> Iterator[tuple[Batch, Any]]:
    """Every batch of ``dataset`` with ``answer(images, batch)``, without gradients; ``seconds`` collects what reading
    and answering take, as read and network."""
    loader = batches(dataset, batch_size, workers=workers)
    turns = iter(loader)
    for _ in tqdm(range(len(loader)), "evaluate", unit="batch", disable=not progress, leave=False):
        with timed(seconds, "read"):
            batch = next(turns)
            batch = in_corner(batch) if corner else batch
        with timed(seconds, "network", device), torch.no_grad():
            found = answer(pixels(batch, device).to(precision), batch)
        yield batch, found


def calibration_images(
    images: ImageSet, count: int, seed: int, device: torch.device | str, augment: Augment | None = None
) -> Iterator[torch.Tensor]:
    """Training images for `engine.calibrate`, always the same: as they are, or changed by chance as `augment` says.

    They come 32 at a time whatever the training's batch: statistics of few images are unlike those of all, and what
    lies behind a norm would be calibrated for maps that it never sees again.
    """
    view = images.at_epoch(0)  # it shares the images in memory
    view.set_augment(augment)
    loader = batches(view, CALIBRATION_BATCH, seed=seed, shuffle=True)
    for batch in islice(loader, math.ceil(count / CALIBRATION_BATCH)):
        yield pixels(batch, device)


def to_original(found: Detections, letterbox: Letterbox) -> Detections:
    """Detections in the network's input -> the same on the CPU, in pixels of the original image, clipped to it."""
    boxes = letterbox.to_original(found.boxes.cpu().numpy())
    return Detections(torch.from_numpy(boxes), found.scores.cpu(), found.labels.cpu())


def in_corner(batch: Batch) -> Batch:
    """The same images at the top left of their squares: the grey before them is moved behind them."""
    boxes, targets = batch.letterboxes, batch.targets
    images = [image.roll((-box.pad_y, -box.pad_x), (1, 2)) for image, box in zip(batch.images, boxes, strict=True)]
    before = torch.tensor([(box.pad_x, box.pad_y) * 2 for box in boxes], dtype=torch.float32)
    return Batch(
        torch.stack(images),
        replace(targets, boxes=targets.boxes - before[targets.image_index]),
        tuple(replace(box, pad_x=0, pad_y=0) for box in boxes),
        batch.indices,
    )


def detections_of(
    network: Network,
    dataset: ImageSet,
    *,
    batch_size: int = 16,
    conf: float = 0.001,
    iou: float = 0.6,
    max_det: int = 300,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
    one_class: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    corner: bool = False,
) -> tuple[list[Detections], dict[str, float]]:
    """What ``network`` finds in every image of ``dataset``, and the milliseconds an image of read, network and nms.

    The detections are in the order of the samples, on the CPU, in pixels of the original images. ``network`` must be
    on ``device`` already, in half precision if it should compute in it, and comes back in the mode it was in.
    ``one_class`` takes all classes for one, label 0. The other options are those of `engine.nms.nms` and `evaluate`.
    """
    seconds = {"read": 0.0, "network": 0.0, "nms": 0.0}
    found: dict[int, Detections] = {}
    how: Any = {"batch_size": batch_size, "device": device, "workers": workers, "progress": progress, "corner": corner}
    precision = next(network.parameters()).dtype
    with evaluating(network):
        turns = answered(dataset, lambda x, _: network.predict(x), seconds, precision=precision, **how)
        for batch, (boxes, scores) in turns:
            with timed(seconds, "nms", device):
                scores = scores.amax(dim=2, keepdim=True) if one_class else scores
                for index, letterbox, *predicted in zip(batch.indices, batch.letterboxes, boxes, scores, strict=True):
                    kept = nms(
                        *predicted,
                        conf=conf,
                        iou=iou if network.suppresses else 1.0,
                        max_det=max_det,
                        agnostic=agnostic,
                        classes=classes,
                        multi_label=True,
                    )
                    found[index] = to_original(kept, letterbox)
    per_image = {name: 1000 * total / max(len(found), 1) for name, total in seconds.items()}
    return [found[index] for index in range(len(dataset))], per_image


def evaluate(
    network: Network,
    dataset: ImageSet,
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 16,
    conf: float = 0.001,
    iou: float = 0.6,
    max_det: int = 300,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    corner: bool = False,
) -> Metrics:
    """Run ``network`` over ``dataset`` and measure it; the network comes back in the mode it was in.

    ``network`` must be on ``device`` already. ``names`` are the classes for the table, their numbers by default.
    ``corner`` puts every image at the top left of its square instead of in the middle, as some programs do. Where an
    object lies on the grid of cells changes what is found of it: on few images AP moves by as much as .01.
    """
    found, ms_per_image = detections_of(
        network,
        dataset,
        batch_size=batch_size,
        conf=conf,
        iou=iou,
        max_det=max_det,
        device=device,
        workers=workers,
        progress=progress,
        corner=corner,
    )
    names = names or [str(label) for label in range(network.num_classes)]
    return replace(coco_metrics(dataset.samples, found, names), ms_per_image=ms_per_image)


# ---- what val.py writes ----


def as_one_class(samples: Iterable[Sample]) -> tuple[Sample, ...]:
    """The same samples with label 0 everywhere."""
    return tuple(
        replace(sample, labels=np.zeros_like(sample.labels), ignored_labels=np.zeros_like(sample.ignored_labels))
        for sample in samples
    )


def file_names(samples: Sequence[Sample]) -> list[str]:
    """A name for each sample's file: its image's name without the ending, and as much more as makes them different."""
    paths = [sample.path for sample in samples]
    above = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    inside = [path.relative_to(above) for path in paths]
    for names in ([path.stem for path in paths], [path.with_suffix("").as_posix() for path in inside]):
        if len(set(names)) == len(names):
            return names
    return [path.as_posix() for path in inside]


def coco_results(
    samples: Sequence[Sample], detections: Sequence[Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """COCO's results format, a row a detection, with the data's own image ids where it has them.

    Otherwise an image's id is its file's name without the ending, as a number where it is one and all are. Numbers
    are written in full, so that measuring the file gives what was printed.
    """
    ids: Sequence[Any] = [sample.image_id for sample in samples]
    if None in ids:
        ids = file_names(samples)
        ids = [int(name) for name in ids] if all(name.isdecimal() and name.isascii() for name in ids) else ids
    return [
        {
            "image_id": ids[image],
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image, (x1, y1, x2, y2), label, _, _, score in _found_rows(detections)
    ]


def label_lines(found: Detections, size: Sequence[int], *, scores: bool) -> str:
    """A YOLO line a detection: class, centre, width, height as shares of the image's ``size``, and its score if asked.

    Best first; empty where nothing was found.
    """
    width, height = size
    lines = []
    for (x1, y1, x2, y2), label, score in zip(
        found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
    ):
        shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(label), *(f"{share:.6g}" for share in shares), *([f"{score:.6g}"] * scores)]))
    return "".join(f"{line}\n" for line in lines)


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


# ---- val.py ----


def check_imgsz(imgsz: int, stride: int) -> int:
    """``imgsz`` itself; a Fault where the network cannot take it."""
    if imgsz < stride or imgsz % stride:
        below = max(imgsz // stride, 1) * stride
        raise Fault(f"--imgsz {imgsz}: this network needs a multiple of {stride}; {below} or {below + stride} would do")
    return imgsz


def check_names(weights: str | Path, trained: Sequence[str], data: str | Path, asked: Sequence[str]) -> None:
    """Raise a Fault unless the classes a network was trained on are those of the data set, in the same order."""
    if tuple(trained) == tuple(asked):
        return
    raise Fault(
        f"{weights}: trained on {len(trained)} classes: {', '.join(trained)}",
        f"{data}: has {len(asked)} classes: {', '.join(asked)}",
        "They must agree in number, names and order; give the data set that these weights were trained on.",
    )


def check_thresholds(conf: float, iou: float, max_det: int) -> None:
    if not 0 <= conf < 1:
        raise Fault(f"--conf-thres {conf}: must be at least 0 and under 1")
    if not 0 <= iou <= 1:
        raise Fault(f"--iou-thres {iou}: must be between 0 and 1")
    if max_det < 1:
        raise Fault(f"--max-det {max_det}: must be at least 1")


@dataclass(frozen=True)
class Asked:
    """What val.py is asked: its options, and what was read for them."""

    options: Namespace
    network: Network  # on the device, in half precision where that is asked for
    data: DataSpec
    split: Split
    imgsz: int
    device: torch.device


def validate_detector(asked: Asked) -> None:
    """Measures a detector, prints its numbers, and writes what is asked for into a folder of its own."""
    options, split = asked.options, asked.split
    if options.conf_thres > HIGH_CONFIDENCE:
        print(f"--conf-thres {options.conf_thres}: AP counts low scores too and comes out too low; 0.001 is usual")
    names = ONE_CLASS if options.single_cls else asked.data.names
    samples = as_one_class(split.samples) if options.single_cls else split.samples
    dataset = ImageSet(samples, asked.imgsz, None, seed=0, cache=False, rect=options.rect)
    found, ms_per_image = detections_of(
        asked.network,
        dataset,
        batch_size=options.batch_size,
        conf=options.conf_thres,
        iou=options.iou_thres,
        max_det=options.max_det,
        agnostic=options.agnostic_nms,
        one_class=options.single_cls,
        device=asked.device,
        workers=options.workers,
        corner=options.letterbox == "corner",
    )
    metrics = replace(coco_metrics(samples, found, names), ms_per_image=ms_per_image)
    voc = voc_metrics(samples, found, names)
    print(class_table(metrics, voc), metrics.summary(), sep="\n\n")
    print(f"P and R are precision and recall at IoU .5 where their mean F1 is best: {voc.best.line()}")

    folder = new_run(options.project, options.name, options.exist_ok)
    write_text(folder / "metrics.json", metrics_json(metrics, voc))
    if options.save_json:
        given = None if options.single_cls else split.category_ids
        rows = coco_results(samples, found, given or range(len(names)))
        write_text(folder / "predictions.json", json.dumps(rows))
    if options.save_txt:
        pairs = zip(file_names(samples), samples, found, strict=True)
        for name, sample, kept in tqdm(pairs, "writing labels", len(samples), unit="image", delay=2, leave=False):
            file = folder / "labels" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, label_lines(kept, image_size(sample.path), scores=options.save_conf))
    if not options.noplots:
        draw_evaluation(folder, samples, found, names)
    print(f"results in {folder}")


@door
def main(argv: Sequence[str] | None = None) -> int:
    from engine.export import file_to_measure, is_exported  # which asks this file what sizes there are
    from engine.tasks import (
        check_data,
        check_given,
        task_of,
    )  # which knows how each task is measured, detection by this file

    parser = option_parser(
        "Measures a trained network on a labelled data set: COCO's twelve numbers, top-1 and top-5, or mIoU; and each "
        "class."
    )
    parser.add_argument(
        "--weights", required=True, help="a checkpoint (.pt), or what export.py wrote of one (.onnx, .xml)"
    )
    parser.add_argument("--data", required=True, help="the data set's YAML")
    parser.add_argument("--split", "--task", default="val", choices=["train", "val", "test"], help="default: val")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--imgsz", "--img", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--rect", action="store_true", help="pad images to rectangles instead of squares")
    parser.add_argument("--conf-thres", type=float, default=0.001, help="scores above this count")
    parser.add_argument("--iou-thres", type=float, default=0.6, help="NMS: boxes that overlap more are one object")
    parser.add_argument("--max-det", type=int, default=300, help="detections an image at most")
    parser.add_argument("--agnostic-nms", action="store_true", help="NMS: boxes of different classes compete too")
    parser.add_argument("--single-cls", action="store_true", help="take all classes for one, of data and detections")
    parser.add_argument(
        "--letterbox", default="centre", choices=["centre", "corner"], help="where in its square an image lies"
    )
    parser.add_argument("--half", action="store_true", help="compute in float16; needs a GPU")
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--save-json", action="store_true", help="predictions.json, of a detector in COCO's format")
    parser.add_argument(
        "--save-txt", action="store_true", help="labels/*.txt in YOLO's format; of a segmenter labels/*.png"
    )
    parser.add_argument("--save-conf", action="store_true", help="with --save-txt: each line ends with its score")
    parser.add_argument("--noplots", action="store_true", help="draw no pictures")
    parser.add_argument("--project", default="runs/val", help="default: runs/val")
    parser.add_argument("--name", default="exp", help="folder in it; default: exp, then exp2, ...")
    parser.add_argument("--exist-ok", action="store_true", help="write into the folder if it exists")
    options = parse_options(parser, argv)
    check_thresholds(options.conf_thres, options.iou_thres, options.max_det)
    if options.batch_size < 1:
        raise Fault(f"--batch-size {options.batch_size}: must be at least 1")
    if options.workers < 0:
        raise Fault(f"--workers {options.workers}: must be at least 0")
    if options.save_conf and not options.save_txt:
        raise Fault("--save-conf: says what --save-txt writes; give both")
    device = parse_device(options.device)
    if options.half and device.type == "cpu":
        raise Fault("--half: half precision needs a GPU, and this is a CPU; leave --half out")

    network: Any = None
    if is_exported(options.weights):
        asked = {"imgsz": options.imgsz, "half": options.half, "rect": options.rect}
        checkpoint, network = file_to_measure(Path(options.weights), device, **asked)
    else:
        checkpoint = load_checkpoint(options.weights)
    task = task_of(checkpoint.spec)
    check_given(task, options, parser)
    data = read_data_spec(options.data)
    check_data(checkpoint.spec, data)
    if not options.single_cls:
        check_names(options.weights, checkpoint.names, options.data, data.names)
    network = (network or restore(checkpoint)).to(device)
    network = network.half() if options.half else network
    imgsz = check_imgsz(options.imgsz or checkpoint.imgsz, network.max_stride)
    split = read_split(data, options.split)
    for note in split.notes:
        print(note)
    task.validate(Asked(options, network, data, split, imgsz, device))
    return 0
