"""What train.py, val.py and detect.py do differently for networks that answer different questions.

A network's head says its task by an attribute of its class, ``task = "classify"``; without one it detects. A task is a
row of `TASKS`: which data sets it learns from, how an image becomes an input, how the network is measured and which
number is the best one, what is drawn. How detect.py writes down what a network of a task finds is a row of
`engine.results.FORMS`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.config import BOXES, DataSpec
from data.dataset import ImageSet
from data.structures import Fault, Sample
from engine.classify import ClassMetrics, evaluate_classes, scores_of, validate_classifier
from engine.config import RunConfig, option_name
from engine.evaluate import Asked, detections_of, validate_detector
from engine.evaluate import evaluate as evaluate_detector
from engine.metrics import Metrics
from engine.outcomes import most_wrong
from engine.plots import (
    WORST_IMAGES,
    draw_classes,
    draw_classification,
    draw_evaluation,
    draw_labels,
    draw_pixels,
    draw_segmentation,
)
from engine.segment import SegMetrics, confusions_of, evaluate_pixels, found_again, validate_segmenter
from models.network import Network
from models.registry import OPS
from models.spec import ModelSpec

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Task:
    """A row of `TASKS`.

    Attributes:
        name: what a head's class says.
        network: what its networks are called.
        formats: of the data sets that it learns from.
        crops: whether an input is a crop of an image, or the whole image with grey around it.
        neutral: options of training that mean nothing to it, each with the value that says so.
        usual: options of training whose default is another for it.
        foreign: options of val.py, detect.py and export.py that mean nothing to it.
        metrics: what `evaluate` gives: a dataclass of plain values with a `fitness`, a `table` and a `summary`.
        columns: those of its numbers that stand in results.csv; a search compares by the first.
        titles: what the columns are called in tables and on pages.
        curves: those of them that are drawn.
        best_by: what `fitness` is called.
        evaluate: measures a network over a set.
        per_class: of its metrics, numbers of single classes by name.
        draw_data: how often each class occurs, and the like, into a file.
        draw_best: what a network makes of a set, into a folder.
        validate: val.py, once all is read that it was given.
    """

    name: str
    network: str
    formats: tuple[str, ...]
    crops: bool
    neutral: Mapping[str, Any]
    usual: Mapping[str, Any]
    foreign: tuple[str, ...]
    metrics: type
    columns: tuple[str, ...]
    titles: tuple[str, ...]
    curves: tuple[str, ...]
    best_by: str
    evaluate: Callable[..., Any]
    per_class: Callable[[Any], dict[str, float]]
    draw_data: Callable[[Path, Sequence[Sample], Sequence[str]], None]
    draw_best: Callable[..., None]
    validate: Callable[[Asked], None]


# ---- detection


def classes_of_detector(metrics: Metrics) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, ap, ap50 in metrics.per_class:
        found |= {f"ap of {name}": ap, f"ap50 of {name}": ap50}
    return found


def draw_detector(folder: Path, network: Network, images: ImageSet, names: Sequence[str], **options: Any) -> None:
    found, _ = detections_of(network, images, **options)
    draw_evaluation(folder, images.samples, found, names)


# ---- classification


def classes_of_classifier(metrics: ClassMetrics) -> dict[str, float]:
    return {f"top1 of {name}": top1 for name, _, top1, *_ in metrics.per_class}


def draw_classifier(folder: Path, network: Network, images: ImageSet, names: Sequence[str], **options: Any) -> None:
    scores, _ = scores_of(network, images, **options)
    draw_classification(folder, images.samples, scores, names)


# ---- segmentation


def classes_of_segmenter(metrics: SegMetrics) -> dict[str, float]:
    return {f"iou of {name}": iou for name, _, iou, *_ in metrics.per_class}


def draw_segmenter(folder: Path, network: Network, images: ImageSet, names: Sequence[str], **options: Any) -> None:
    confusions, _ = confusions_of(network, images, **options)
    maps = found_again(network, images, most_wrong(confusions, WORST_IMAGES), options.get("device", "cpu"))
    draw_segmentation(folder, images.samples, confusions, maps, names)


# ---- the table

DETECT = Task(
    name="detect",
    network="a detector",
    formats=BOXES,
    crops=False,
    neutral={},
    usual={},
    foreign=(),
    metrics=Metrics,
    columns=("ap", "ap50", "ap75", "ar100"),
    titles=("AP", "AP50", "AP75", "AR100"),
    curves=("ap", "ap50", "ar100"),
    best_by="0.9 AP + 0.1 AP50",
    evaluate=evaluate_detector,
    per_class=classes_of_detector,
    draw_data=draw_labels,
    draw_best=draw_detector,
    validate=validate_detector,
)
CLASSIFY = Task(
    name="classify",
    network="a classifier",
    formats=("folders",),
    crops=True,
    neutral={"mosaic": 0.0, "copy_small": 0.0, "translate": 0.0, "rect": False, "single_cls": False},
    usual={},
    foreign=(
        *("conf_thres", "iou_thres", "max_det", "nms", "agnostic_nms", "single_cls", "rect", "letterbox"),
        *("square", "classes", "save_crop"),
    ),
    metrics=ClassMetrics,
    columns=("top1", "top5", "mean_top1"),
    titles=("top-1", "top-5", "mean of the classes' top-1"),
    curves=("top1", "top5", "mean_top1"),
    best_by="top-1",
    evaluate=evaluate_classes,
    per_class=classes_of_classifier,
    draw_data=draw_classes,
    draw_best=draw_classifier,
    validate=validate_classifier,
)
SEGMENT = Task(
    name="segment",
    network="a segmenter",
    formats=("masks",),
    crops=False,
    neutral={"mixup": 0.0, "copy_small": 0.0, "single_cls": False},
    usual={"mosaic": 0.0},
    foreign=(
        *("conf_thres", "iou_thres", "max_det", "nms", "agnostic_nms", "single_cls", "letterbox", "save_conf"),
        *("classes", "save_crop", "hide_conf"),
    ),
    metrics=SegMetrics,
    columns=("miou", "pixel_accuracy", "mean_recall"),
    titles=("mIoU", "pixel accuracy", "mean recall"),
    curves=("miou", "pixel_accuracy", "mean_recall"),
    best_by="mIoU",
    evaluate=evaluate_pixels,
    per_class=classes_of_segmenter,
    draw_data=draw_pixels,
    draw_best=draw_segmenter,
    validate=validate_segmenter,
)
TASKS = {task.name: task for task in (DETECT, CLASSIFY, SEGMENT)}


def task_of(spec: ModelSpec) -> Task:
    """The task of a model's head."""
    head = spec.layers[-1].op
    name = getattr(OPS[head].module, "task", DETECT.name)
    if name not in TASKS:
        raise Fault(f"{spec.path}: the head {head} has the task {name!r}; {', '.join(TASKS)} are known")
    return TASKS[name]


def evaluate(network: Network, dataset: ImageSet, **options: Any) -> Any:
    """The metrics of the network's task over ``dataset``; ``options`` are those of the task's own `evaluate`."""
    return task_of(network.spec).evaluate(network, dataset, **options)


# ---- what does not go together


def check_data(spec: ModelSpec, data: DataSpec) -> None:
    """Raises a Fault for a data set that a model of this task cannot learn from, or be measured on."""
    task = task_of(spec)
    if data.format not in task.formats:
        right = " or ".join(task.formats)
        raise Fault(
            f"{data.path}: is of format {data.format}, but {spec.path} is {task.network} (its head is "
            f"{spec.layers[-1].op}); one of format {right} is right"
        )


def check_options(task: Task, config: Config) -> Config:
    """The config of a new run, without what means nothing to its task. Raises a Fault where that was asked for."""
    asked = [name for name in task.neutral if name in config.model_fields_set]
    refuse(task, {name: getattr(config, name) for name in asked if getattr(config, name) != task.neutral[name]})
    usual = {name: value for name, value in task.usual.items() if name not in config.model_fields_set}
    update = {name: value for name, value in {**usual, **task.neutral}.items() if name in type(config).model_fields}
    return config.model_copy(update=update) if update else config


def check_given(task: Task, options: Namespace, parser: ArgumentParser) -> None:
    """Raises a Fault for options of val.py, detect.py or export.py that mean nothing to a task."""
    given = {name: getattr(options, name, None) for name in task.foreign}
    refuse(task, {name: value for name, value in given.items() if value != parser.get_default(name)})


def refuse(task: Task, given: Mapping[str, Any]) -> None:
    lines = []
    for name, value in given.items():
        shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
        lines.append(f"{option_name(name)}{shown}: means nothing to {task.network}; leave it out")
    if lines:
        raise Fault(*lines)
