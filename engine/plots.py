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

import cv2
import numpy as np
from tqdm import tqdm

from data.augment import fit_mask
from data.check import pixels_of
from data.images import image_size, read_image
from data.masks import read_mask
from data.structures import VOID, Detections, Sample
from engine.draw import FONT, class_color, draw_box, painted, write_image
from engine.nms import USUAL
from engine.runs import atomically
from engine.voc import CONFIDENCES, Curve, best_f1, curves, mean_of, overlap

RECALL_STEPS = 100
LEGEND_CLASSES = 20  # at most; more are drawn in grey and not named
NUMBER_CLASSES = 30  # at most; a larger matrix has colours only
NAME_LENGTH = 24  # characters of a name in a figure
SIZED_IMAGES = 1000  # whose files are asked for their size
WORST_IMAGES = 8
CELL_WIDTH, CELL_HEIGHT, CAPTION = 480, 360, 26  # pixels, of worst.jpg


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
        write_image(folder / "worst.jpg", _worst_picture(places, samples, detections, verdicts, names))
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
        write_image(folder / "worst.jpg", _worst_classes(places, samples, scores_NC, names))
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
        write_image(folder / "worst.jpg", _worst_maps(samples, confusions_NKK, maps, names))
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


def shown_name(name: str, most: int = NAME_LENGTH) -> str:
    """A class or file name as one short line: what cannot be printed becomes ``?``, the middle of a long one goes."""
    line = "".join(letter if letter.isprintable() else "?" for letter in str(name))
    return line if len(line) <= most else f"{line[: most - most // 3 - 1]}…{line[-(most // 3) :]}"


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


# ---- worst.jpg

MISSED, WRONG, SEEN = (255, 60, 60), (255, 150, 0), (0, 170, 60)


def _worst_picture(
    places: Sequence[int],
    samples: Sequence[Sample],
    detections: Sequence[Detections],
    verdicts: Sequence[Outcomes],
    names: Sequence[str],
) -> np.ndarray:
    """Two images a row, each with its truth to the left and what was found to the right."""
    strips = [_compared(samples[at], detections[at], verdicts[at], names) for at in places]
    if len(strips) % 2 and len(strips) > 1:
        strips.append(np.full_like(strips[0], 255))
    rows = [np.concatenate(strips[at : at + 2], axis=1) for at in range(0, len(strips), 2)]
    return np.concatenate(rows)


def _compared(truth: Sample, found: Detections, verdict: Outcomes, names: Sequence[str]) -> np.ndarray:
    """One image twice: objects (red: missed) and detections (orange: wrong), green where both agree in class too.

    Only mistakes are named, or their names would lie under those of the others.
    """
    image, scale = _in_cell(truth.path)
    left, right = image.copy(), image.copy()
    labels = found.labels.tolist()
    agreed = {(int(box), int(thing)) for box, thing in verdict.pairs if labels[box] == truth.labels[thing]}
    good_boxes, good_things = {box for box, _ in agreed}, {thing for _, thing in agreed}
    for place, box in enumerate(truth.boxes * scale):
        good = place in good_things
        _box(left, box, SEEN if good else MISSED, "" if good else names[truth.labels[place]])
    shown = [*verdict.pairs[:, 0].tolist(), *verdict.wrong.tolist()]
    for place in sorted(shown, reverse=True):  # the best on top
        good, text = place in good_boxes, f"{shown_name(names[labels[place]], 16)} {float(found.scores[place]):.2f}"
        _box(right, found.boxes[place].numpy() * scale, SEEN if good else WRONG, "" if good else text)
    missed = len(truth.labels) - len(good_things)
    wrong = len(shown) - len(good_boxes)
    words = f"{shown_name(truth.path.name, 30)}: {missed} missed, {wrong} wrong"
    strip = np.full((CELL_HEIGHT + CAPTION, 2 * CELL_WIDTH, 3), 255, np.uint8)
    for place, picture in enumerate((left, right)):
        _put(strip, picture, place * CELL_WIDTH, CAPTION)
    _write(strip, words, 4)
    _write(strip, "found", CELL_WIDTH + 4)
    return strip


def _worst_classes(
    places: Sequence[int], samples: Sequence[Sample], scores_NC: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Up to four images a row; above each its own class, then the likeliest ones, with their probabilities."""
    cells = [_classed(samples[at], scores_NC[at], names) for at in places]
    columns = min(len(cells), 4)
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[at : at + columns], axis=1) for at in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _classed(truth: Sample, scores_C: np.ndarray, names: Sequence[str]) -> np.ndarray:
    image, _ = _in_cell(truth.path)
    cell = np.full((CELL_HEIGHT + 2 * CAPTION, CELL_WIDTH, 3), 255, np.uint8)
    _put(cell, image, 0, 2 * CAPTION)
    label, (first, second) = int(truth.labels[0]), np.argsort(-scores_C, kind="stable")[:2]
    own, found, next_ = (f"{shown_name(names[at], 18)} {scores_C[at]:.2f}" for at in (label, first, second))
    _write(cell, f"{shown_name(truth.path.name, 20)} is {own}", 4)
    _write(cell, f"found: {found}" + (f", {next_}" if second != label else ""), 4, line=1)
    return cell


def _worst_maps(
    samples: Sequence[Sample], confusions_NKK: np.ndarray, maps: Mapping[int, np.ndarray], names: Sequence[str]
) -> np.ndarray:
    """Two images a row, with its mask to the left, what was found in the middle, and what is wrong to the right."""
    strips = [_mapped(samples[at], confusions_NKK[at], found, names) for at, found in maps.items()]
    if len(strips) % 2 and len(strips) > 1:
        strips.append(np.full_like(strips[0], 255))
    return np.concatenate([np.concatenate(strips[at : at + 2], axis=1) for at in range(0, len(strips), 2)])


def _mapped(truth: Sample, confusion_KK: np.ndarray, found: np.ndarray, names: Sequence[str]) -> np.ndarray:
    assert truth.mask is not None
    image, _ = _in_cell(truth.path)
    wanted, found = (fit_mask(mask, image.shape[1::-1]) for mask in (read_mask(truth.mask), found))
    wrong = (found != wanted) & (wanted != VOID)
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    marked = np.where(wrong[..., None], np.array(MISSED, np.uint8), np.uint8(255))
    pictures = (painted(image, wanted, names), painted(image, found, names), cv2.addWeighted(grey, 0.5, marked, 0.5, 0))
    strip = np.full((CELL_HEIGHT + CAPTION, 3 * CELL_WIDTH, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        _put(strip, picture, place * CELL_WIDTH, CAPTION)
    mistakes = confusion_KK * (1 - np.eye(len(names), dtype=np.int64))
    row, column = divmod(int(mistakes.argmax()), len(names))
    share = mistakes.sum() / max(1, confusion_KK.sum())
    most = f"most: {shown_name(names[column], 16)} as {shown_name(names[row], 16)}"
    _write(strip, f"{shown_name(truth.path.name, 30)}: what it is", 4)
    _write(strip, "found", CELL_WIDTH + 4)
    _write(strip, f"{share:.0%} wrong, {most}", 2 * CELL_WIDTH + 4)
    return strip


def _in_cell(path: Path) -> tuple[np.ndarray, float]:
    """An image as large as a cell allows, and by what it was scaled."""
    image = read_image(path)
    height, width = image.shape[:2]
    scale = min((CELL_WIDTH - 4) / width, (CELL_HEIGHT - 4) / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), scale


def _put(sheet: np.ndarray, picture: np.ndarray, left: int, top: int) -> None:
    """Into the middle of the cell at `left` and `top`."""
    height, width = picture.shape[:2]
    top, left = top + (CELL_HEIGHT - height) // 2, left + (CELL_WIDTH - width) // 2
    sheet[top : top + height, left : left + width] = picture


def _box(picture: np.ndarray, box: np.ndarray, color: tuple[int, int, int], text: str) -> None:
    draw_box(picture, box.tolist(), color, _plain(shown_name(text, 24)), thickness=2)


def _write(picture: np.ndarray, text: str, left: int, line: int = 0) -> None:
    cv2.putText(picture, _plain(text), (left, (line + 1) * CAPTION - 8), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)


def _plain(text: str) -> str:
    """OpenCV's letters are those of ASCII."""
    return text.replace("…", "..").encode("ascii", "replace").decode()
