"""How good a detector is: COCO's twelve numbers, and how long an image takes.

The metric is pycocotools', or faster-coco-eval's where that is installed (the ``fast`` extra): the same numbers to
1e-6, some ten times sooner.
"""

from __future__ import annotations

import io
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import astuple, dataclass, field, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.config import read_data_spec
from data.dataset import DetectionSet
from data.loader import batches
from data.readers import read_split
from data.structures import Batch, Detections, Fault, Letterbox, Sample
from engine.doors import door, option_parser, parse_device, parse_options
from engine.nms import nms
from engine.runs import table
from models.checkpoint import load_checkpoint, restore
from models.network import Network

NUMBERS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip  # in the order of COCOeval.stats

JACKKNIFE_GROUPS = 10
CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Metrics:
    """COCO's numbers over one split, each 0 to 1, or nan where no ground truth asks for it.

    ``per_class`` holds ``(name, ap, ap50)`` of every class. small is under 32x32, large over 96x96 pixels of the
    original image; ar1, ar10, ar100 allow so many detections an image and class. ``ms_per_image`` says where the
    time went: read, network, nms.
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
    """``ms an image: read 1.2, network 20.1, nms 0.8``."""
    return "ms an image: " + ", ".join(f"{name} {ms:.1f}" for name, ms in ms_per_image.items())


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
    a size) it is left out of the means, and nan if nothing remains. ``backend`` is ``pycocotools`` or
    ``faster_coco_eval``; None takes the faster one that is installed.
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

    This is the delete-a-group jackknife (Kott, Journal of Official Statistics 17, 2001). Image n belongs to group n
    modulo the number of groups: 10, with fewer than 20 images half as many as there are images, with fewer than 4 none.
    Detections are matched to truths only once. An AP is nan where the images that remain show nothing to find.
    """
    evaluation = _matched(truths, detections, names, backend)
    metrics = _metrics(evaluation, names, len(truths))
    groups = min(JACKKNIFE_GROUPS, len(truths) // 2)
    return metrics, _ap_without(evaluation, len(truths), groups) if groups > 1 else ()


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
    )


def _ap_without(evaluation: Any, images: int, groups: int) -> tuple[float, ...]:
    """AP without each group, from the matches of an evaluation, which is of no other use afterwards."""
    held = "_evalImgs_cpp" if hasattr(evaluation, "_evalImgs_cpp") else "evalImgs"
    matches = getattr(evaluation, held)  # of every class, then area, then image
    of_a_class = images * len(evaluation.params.areaRng)
    found = []
    for group in range(groups):
        kept = [image for image in range(images) if image % groups != group]
        for parameters in (evaluation.params, evaluation._paramsEval):
            parameters.imgIds, parameters.areaRng, parameters.maxDets = kept, parameters.areaRng[:1], [100]
        setattr(evaluation, held, [matches[at + n] for at in range(0, len(matches), of_a_class) for n in kept])
        with redirect_stdout(io.StringIO()):
            evaluation.accumulate()
        found.append(_mean(np.asarray(evaluation.eval["precision"])))
    return tuple(found)


def _rows(image: int, boxes: Any, labels: Any, scores: Any = None) -> list[dict[str, Any]]:
    """COCO annotations of one image; xyxy becomes xywh in float64, so that nothing is rounded on the way."""
    xyxy = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1).tolist()
    rows = [
        {"image_id": image, "category_id": int(label), "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for box, label in zip(xywh, np.asarray(labels).tolist(), strict=True)
    ]
    if scores is not None:
        for row, score in zip(rows, np.asarray(scores, dtype=np.float64).tolist(), strict=True):
            row["score"] = score
    return rows


def _coco(frame: dict[str, list[dict[str, Any]]], rows: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """A COCO data set. Ids start at 1: the evaluation takes 0 for "not matched"."""
    annotations = [row for image_rows in rows for row in image_rows]
    return {**frame, "annotations": [{**row, "id": number} for number, row in enumerate(annotations, start=1)]}


def _matched(
    truths: Sequence[Sample], detections: Sequence[Detections], names: Sequence[str], backend: str | None
) -> Any:
    """The backend's evaluation, detections and truths of each image matched; None where there is no image."""
    assert len(truths) == len(detections), f"{len(truths)} images, but detections of {len(detections)}"
    if not truths:
        return None
    true_rows = [_rows(image, truth.boxes, truth.labels) for image, truth in enumerate(truths)]
    found_rows = [_rows(image, found.boxes, found.labels, found.scores) for image, found in enumerate(detections)]
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
        for rows in (true_rows, found_rows):
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


def calibration_images(
    images: DetectionSet, count: int, seed: int, device: torch.device | str
) -> Iterator[torch.Tensor]:
    """Training images as a network will meet them, without augmentation, for `engine.calibrate`: always the same.

    They come 32 at a time whatever the training's batch: statistics of few images are unlike those of all, and what
    lies behind a norm would be calibrated for maps that it never sees again.
    """
    plain = images.at_epoch(0)  # a view; it shares the images in memory
    plain.set_augment(None)
    loader = batches(plain, CALIBRATION_BATCH, seed=seed, shuffle=True)
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


def evaluate(
    network: Network,
    dataset: DetectionSet,
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
    names = names or [str(label) for label in range(network.num_classes)]
    seconds: dict[str, float] = defaultdict(float)
    found: dict[int, Detections] = {}
    was_training = network.training
    network.eval()
    try:
        loader = batches(dataset, batch_size, workers=workers)
        bar = tqdm(total=len(loader), desc="evaluate", unit="batch", disable=not progress, leave=False)
        with torch.no_grad(), bar:
            turns = iter(loader)
            for _ in range(len(loader)):
                with timed(seconds, "read"):
                    batch = next(turns)
                    batch = in_corner(batch) if corner else batch
                with timed(seconds, "network", device):
                    boxes, scores = network.predict(pixels(batch, device))
                with timed(seconds, "nms", device):
                    for index, letterbox, *predicted in zip(
                        batch.indices, batch.letterboxes, boxes, scores, strict=True
                    ):
                        kept = nms(*predicted, conf=conf, iou=iou, max_det=max_det, multi_label=True)
                        found[index] = to_original(kept, letterbox)
                bar.update()
    finally:
        network.train(was_training)
    images = sorted(found)
    metrics = coco_metrics([dataset.samples[index] for index in images], [found[index] for index in images], names)
    per_image = {name: 1000 * total / max(len(images), 1) for name, total in seconds.items()}
    return replace(metrics, ms_per_image=per_image)


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


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Measures a trained detector on a labelled data set: COCO's twelve numbers and each class.")
    parser.add_argument("--weights", required=True, help="a checkpoint (.pt) that train.py wrote")
    parser.add_argument("--data", required=True, help="the data set's YAML")
    parser.add_argument("--split", default="val", choices=["train", "val", "test"], help="default: val")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--imgsz", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--conf-thres", type=float, default=0.001, help="scores above this count")
    parser.add_argument("--iou-thres", type=float, default=0.6, help="NMS: boxes that overlap more are one object")
    parser.add_argument("--max-det", type=int, default=300, help="detections an image at most")
    parser.add_argument(
        "--letterbox", default="centre", choices=["centre", "corner"], help="where in its square an image lies"
    )
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    options = parse_options(parser, argv)
    check_thresholds(options.conf_thres, options.iou_thres, options.max_det)
    if options.batch_size < 1:
        raise Fault(f"--batch-size {options.batch_size}: must be at least 1")
    device = parse_device(options.device)

    checkpoint = load_checkpoint(options.weights)
    data = read_data_spec(options.data)
    check_names(options.weights, checkpoint.names, options.data, data.names)
    network = restore(checkpoint).to(device)
    imgsz = check_imgsz(options.imgsz or checkpoint.imgsz, network.max_stride)
    split = read_split(data, options.split)
    for note in split.notes:
        print(note)
    metrics = evaluate(
        network,
        DetectionSet(split.samples, imgsz, None, seed=0, cache=False),
        names=data.names,
        batch_size=options.batch_size,
        conf=options.conf_thres,
        iou=options.iou_thres,
        max_det=options.max_det,
        device=device,
        workers=options.workers,
        corner=options.letterbox == "corner",
    )
    print(metrics.table(), metrics.summary(), sep="\n\n")
    return 0
