"""A detector over a data set: what it finds, how good that is, and what val.py writes of it.

Batches on their device, and networks that answer them, are here for every task; the metric is in `engine.metrics`.
"""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data.augment import Augment
from data.config import DataSpec
from data.dataset import ImageSet
from data.images import image_size
from data.loader import batches
from data.readers import Split
from data.structures import Batch, Detections, Letterbox, Sample
from engine.metrics import Metrics, class_table, coco_metrics, found_rows, metrics_json
from engine.nms import iou_for, nms
from engine.plots import draw_evaluation
from engine.runs import new_run, write_text
from engine.voc import voc_metrics
from models.network import Network

CALIBRATION_BATCH = 32
HIGH_CONFIDENCE = 0.01  # from here on AP is noticeably too low
ONE_CLASS = ("item",)  # what all classes are called as one, as in yolov5


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
    for number, batch in enumerate(islice(loader, math.ceil(count / CALIBRATION_BATCH))):
        if len(batch.images) > 1 or number == 0:  # one image left over says little, and nothing of a map of one cell
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
                        iou=iou_for(network, iou),
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
    if None in ids or len(set(ids)) < len(ids):  # several JSONs may number theirs alike
        ids = file_names(samples)
        ids = [int(name) for name in ids] if all(name.isdecimal() and name.isascii() for name in ids) else ids
    return [
        {
            "image_id": ids[image],
            "category_id": int(category_ids[label]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image, (x1, y1, x2, y2), label, _, _, score in found_rows(detections)
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
