"""``worst.jpg``: the images with the most mistakes, what is there beside what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from data.augment import fit_mask
from data.images import read_image
from data.masks import read_mask
from data.structures import VOID, Detections, Sample
from engine.draw import FONT, draw_box, painted, plain, shown_name
from engine.outcomes import Outcomes

CELL_WIDTH, CELL_HEIGHT, CAPTION = 480, 360, 26  # pixels
MISSED, WRONG, SEEN = (255, 60, 60), (255, 150, 0), (0, 170, 60)


def worst_boxes(
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


def worst_classes(
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


def worst_maps(
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
    draw_box(picture, box.tolist(), color, plain(shown_name(text, 24)), thickness=2)


def _write(picture: np.ndarray, text: str, left: int, line: int = 0) -> None:
    cv2.putText(picture, plain(text), (left, (line + 1) * CAPTION - 8), FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
