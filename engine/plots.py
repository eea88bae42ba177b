"""Pictures of an evaluation and of a data set's labels, and the numbers behind them.

The pictures need no screen: figures are made without pyplot. Each file appears whole or not at all.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.check import pixels_of
from data.images import image_size
from data.structures import Detections, Sample
from engine.draw import class_color, shown_name, write_image
from engine.nms import USUAL
from engine.outcomes import class_confusion, confusion, least_likely, outcomes, worst
from engine.runs import atomically
from engine.voc import CONFIDENCES, Curve, best_f1, curves, mean_of
from engine.worst import worst_boxes, worst_classes, worst_maps

RECALL_STEPS = 100
LEGEND_CLASSES = 20  # at most; more are drawn in grey and not named
NUMBER_CLASSES = 30  # at most; a larger matrix has colours only
SIZED_IMAGES = 1000  # whose files are asked for their size
WORST_IMAGES = 8


def draw_evaluation(
    folder: str | Path, samples: Sequence[Sample], detections: Sequence[Detections], names: Sequence[str]
) -> None:
    """``PR_curve.png``, ``F1_curve.png``, ``confusion_matrix.png`` and ``worst.jpg`` in a folder that exists.

    ``samples`` and ``detections`` are of the same images, all boxes in original pixels; the detections should reach
    down to low scores, or the curves end early. Without an image with a mistake there is no ``worst.jpg``.
    """
    folder = Path(folder)
    found = curves(samples, detections, len(names))
    _draw_precision(folder / "PR_curve.png", found, names)
    _draw_f1(folder / "F1_curve.png", found, names)
    verdicts = [outcomes(truth, seen) for truth, seen in zip(samples, detections, strict=True)]
    title = f"confidence > {USUAL.conf}, IoU > {USUAL.iou}"
    matrix = confusion(verdicts, len(names))
    _draw_confusion(folder / "confusion_matrix.png", matrix, [*names, "background"], title)
    places = worst(verdicts, WORST_IMAGES)
    if places:
        write_image(folder / "worst.jpg", worst_boxes(places, samples, detections, verdicts, names))
    else:
        (folder / "worst.jpg").unlink(missing_ok=True)


def draw_classification(
    folder: str | Path, samples: Sequence[Sample], scores_NC: np.ndarray, names: Sequence[str]
) -> None:
    """``confusion_matrix.png`` and ``worst.jpg`` of a classifier's probabilities, in a folder that exists.

    Without an image that was taken for another class there is no ``worst.jpg``.
    """
    folder, truths_N = Path(folder), np.array([sample.labels[0] for sample in samples])
    right = float((scores_NC.argmax(axis=1) == truths_N).mean())
    title = f"{len(samples)} images, top-1 {right:.3f}"
    _draw_confusion(folder / "confusion_matrix.png", class_confusion(truths_N, scores_NC), names, title)
    places = least_likely(truths_N, scores_NC, 2 * WORST_IMAGES)
    if places:
        write_image(folder / "worst.jpg", worst_classes(places, samples, scores_NC, names))
    else:
        (folder / "worst.jpg").unlink(missing_ok=True)


def draw_segmentation(
    folder: str | Path,
    samples: Sequence[Sample],
    confusions_NKK: np.ndarray,
    maps: Mapping[int, np.ndarray],
    names: Sequence[str],
) -> None:
    """``confusion_matrix.png`` of all pixels and ``worst.jpg``, in a folder that exists.

    `confusions_NKK` count the pixels of each image by the class found and the true one; `maps` are the classes
    ``[H, W]`` found in the images to be shown, by their places. Without one there is no ``worst.jpg``.
    """
    folder, total_KK = Path(folder), confusions_NKK.sum(axis=0)
    title = f"{len(samples)} images, pixel accuracy {total_KK.trace() / max(1, total_KK.sum()):.3f}"
    _draw_confusion(folder / "confusion_matrix.png", total_KK, names, title, shares_only=True)
    if maps:
        write_image(folder / "worst.jpg", worst_maps(samples, confusions_NKK, maps, names))
    else:
        (folder / "worst.jpg").unlink(missing_ok=True)


def draw_pixels(path: str | Path, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """How many pixels are of each class."""
    figure = new_figure(max(8.0, 0.16 * len(names)), 5.0)
    _draw_counts(figure.subplots(), pixels_of(samples, len(names)), names, "pixels")
    save_figure(figure, Path(path))


def draw_classes(path: str | Path, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """How many images each class has."""
    counts = instances(samples, len(names))
    figure = new_figure(max(8.0, 0.16 * len(names)), 5.0)
    _draw_counts(figure.subplots(), counts, names, "images")
    save_figure(figure, Path(path))


def draw_labels(path: str | Path, samples: Sequence[Sample], names: Sequence[str]) -> None:
    """How often each class occurs, where boxes lie, how large they are and of which shape.

    Positions and sizes are those of at most 1,000 images, evenly taken from all.
    """
    step = max(1, math.ceil(len(samples) / SIZED_IMAGES))
    some = tqdm(samples[::step], desc="measuring images", unit="image", delay=2, leave=False)
    sizes = [image_size(sample.path) for sample in some]
    statistics = label_statistics(samples[::step], sizes)
    _draw_statistics(Path(path), instances(samples, len(names)), statistics, names)


# ---- the numbers


@dataclass(frozen=True)
class LabelStatistics:
    """Boxes as shares of their images: ``centres [M, 2]`` and ``sides [M, 2]`` in 0 to 1, x or width first.

    ``aspects [M]`` are width over height in pixels.
    """

    centres: np.ndarray
    sides: np.ndarray
    aspects: np.ndarray


def label_statistics(samples: Sequence[Sample], sizes: Sequence[tuple[int, int]]) -> LabelStatistics:
    """Of the trained boxes of all samples that have an area; ``sizes`` are width and height of each image."""
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.boxes for sample in samples)])
    images = np.repeat(np.array(sizes, dtype=np.float64).reshape(-1, 2), [len(s.labels) for s in samples], axis=0)
    sides = boxes[:, 2:] - boxes[:, :2]
    whole = (sides > 0).all(axis=1)
    boxes, images, sides = boxes[whole], images[whole], sides[whole]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return LabelStatistics(centres / images, sides / images, sides[:, 0] / sides[:, 1])


def instances(samples: Sequence[Sample], classes: int) -> np.ndarray:
    """How many objects of each class there are, ``[classes]``."""
    return np.bincount(np.concatenate([np.zeros(0, np.int64), *(s.labels for s in samples)]), minlength=classes)


# ---- figures


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # here because it is slow to import; it needs no screen

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    with atomically(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # its font has no sign for every name
        figure.savefig(temporary, dpi=120)


def _named_ticks(axis: Any, names: Sequence[str], size: float, rotation: float = 0) -> None:
    """A tick a name; a ``$`` in it is a dollar and no formula."""
    axis.set_ticks(range(len(names)), [shown_name(name) for name in names], fontsize=size, rotation=rotation)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


def _legend(axes: Any, lines: Sequence[Any], names: Sequence[str]) -> None:
    legend = axes.legend(lines, ["x"] * len(lines), loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)
    for text, name in zip(legend.get_texts(), names, strict=True):  # a label with _ in front would be left out
        text.set_parse_math(False)
        text.set_text(name)


def _color(label: int) -> tuple[float, float, float]:
    red, green, blue = (0.85 * part / 255 for part in class_color(label))
    return red, green, blue


def _draw_lines(
    path: Path,
    x: np.ndarray,
    rows: Sequence[np.ndarray],
    names: Sequence[str],
    mean: np.ndarray | None,
    mean_name: str,
    axis_names: tuple[str, str],
    mark: tuple[float, float] | None = None,
) -> None:
    """A thin line a class and a thick one for their mean; few classes are named, many are grey."""
    figure = new_figure(8.5, 5.5)
    axes = figure.subplots()
    few = len(rows) <= LEGEND_CLASSES
    lines = [
        axes.plot(x, row, linewidth=1, color=_color(place) if few else "0.82")[0] for place, row in enumerate(rows)
    ]
    shown = list(names) if few else []
    lines = lines if few else []
    if mean is not None:
        lines += axes.plot(x, mean, linewidth=3, color="#1f4fd8")
        shown.append(mean_name)
    if mark is not None:
        axes.plot(*mark, marker="o", color="#1f4fd8")
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1], xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    if lines:
        _legend(axes, lines, shown)
    else:
        axes.text(0.5, 0.5, "no objects", ha="center", va="center", color="0.5")
    save_figure(figure, path)


def _draw_precision(path: Path, found: Sequence[Curve], names: Sequence[str]) -> None:
    asked = [(curve, name) for curve, name in zip(found, names, strict=True) if curve.objects]
    rows = [curve.precision_at(RECALL_STEPS) for curve, _ in asked]
    shown = [f"{shown_name(name)}  {row.mean():.3f}" for row, (_, name) in zip(rows, asked, strict=True)]
    mean = np.mean(rows, axis=0) if rows else None
    average = mean_of([float(row.mean()) for row in rows])
    recalls = np.linspace(0, 1, RECALL_STEPS + 1)
    title = f"all {len(rows)} classes  {average:.3f}"
    _draw_lines(path, recalls, rows, shown, mean, title, ("recall", "precision at IoU .5"))


def _draw_f1(path: Path, found: Sequence[Curve], names: Sequence[str]) -> None:
    asked = [(curve, name) for curve, name in zip(found, names, strict=True) if curve.objects]
    rows = [curve.at(CONFIDENCES)[2] for curve, _ in asked]
    shown = [f"{shown_name(name)}  {row.max():.2f}" for row, (_, name) in zip(rows, asked, strict=True)]
    mean = np.mean(rows, axis=0) if rows else None
    best = best_f1(found)
    title = f"all {len(rows)} classes  {best.f1:.2f} at {best.confidence:.3f}"
    mark = (best.confidence, best.f1) if rows else None
    _draw_lines(path, CONFIDENCES, rows, shown, mean, title, ("confidence", "F1 at IoU .5"), mark)


def _draw_confusion(
    path: Path, matrix: np.ndarray, names: Sequence[str], title: str, *, shares_only: bool = False
) -> None:
    """Colours are shares of the column: of all that is of a class, how much was taken for what.

    The cells hold counts, or with `shares_only` the shares in percent, without those that round to 0.
    """
    count = len(matrix)
    side = min(30.0, max(5.0, 2.0 + 0.24 * count if count > NUMBER_CLASSES else 2.5 + 0.45 * count))
    shares = matrix / np.maximum(matrix.sum(axis=0), 1)
    figure = new_figure(side + 1.5, side)
    axes = figure.subplots()
    picture = axes.imshow(np.where(matrix > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=1)
    size = 7 if count > NUMBER_CLASSES else 9
    _named_ticks(axes.xaxis, names, size, rotation=90)
    _named_ticks(axes.yaxis, names, size)
    axes.set(xlabel="true", ylabel="predicted")
    axes.set_title(title, fontsize=10)
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if count <= NUMBER_CLASSES + 1:
        for row, column in np.argwhere(matrix):
            ink = "white" if shares[row, column] > 0.55 else "black"
            share = round(100 * shares[row, column])
            text = str(matrix[row, column]) if not shares_only else str(share) if share else ""
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the column")
    if shares_only:
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    save_figure(figure, path)


def _draw_statistics(path: Path, counts: np.ndarray, statistics: LabelStatistics, names: Sequence[str]) -> None:
    figure = new_figure(max(11.0, 0.16 * len(names)), 10.0)
    bars, *rest = figure.subplot_mosaic("AAA;BCD", height_ratios=(1, 1)).values()
    _draw_counts(bars, counts, names, "objects")
    centres, sizes, aspects = rest
    for axes, points, words in (
        (centres, statistics.centres, ("x of the centre / image width", "y of the centre / image height")),
        (sizes, statistics.sides, ("box width / image width", "box height / image height")),
    ):
        density, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=50, range=((0, 1), (0, 1)))
        picture = np.log1p(density.T)
        axes.imshow(
            np.where(picture > 0, picture, np.nan), cmap="viridis", extent=(0, 1, 0, 1), origin="lower", aspect="auto"
        )
        axes.set(xlabel=words[0], ylabel=words[1])
    centres.invert_yaxis()  # as in the image: 0 is at the top
    ratios = np.log2(np.clip(statistics.aspects, 1 / 16, 16))
    aspects.hist(ratios, bins=np.linspace(-4, 4, 49), color="#1f4fd8")
    aspects.set_xticks(range(-4, 5, 2), ["1:16", "1:4", "1:1", "4:1", "16:1"])
    aspects.set(xlabel="width : height", ylabel="boxes")
    save_figure(figure, path)


def _draw_counts(axes: Any, counts: np.ndarray, names: Sequence[str], what: str) -> None:
    """A bar a class."""
    axes.bar(range(len(counts)), counts, color=[_color(label) for label in range(len(counts))])
    size = 7 if len(names) > NUMBER_CLASSES else 9
    _named_ticks(axes.xaxis, names, size, rotation=90 if len(names) > 6 else 0)
    axes.set(ylabel=what, title=f"{int(counts.sum())} {what}")
    axes.set_xlim(-0.6, max(len(names) - 0.4, 5.6))  # few bars are no walls
