"""Pictures for people: boxes or classes on an image, a grid of a training batch. Pixels are uint8 RGB ``[H, W, 3]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from data.structures import VOID, Detections, Fault, LabelMap, Ranking, Targets
from engine.runs import atomically

FONT = cv2.FONT_HERSHEY_SIMPLEX
PAINT = 0.55  # how much of a pixel is the colour of its class
NAMED_SHARE = 0.004  # of a picture: a class that fills less is not named in it
NAMED_SIDE = 240  # pixels: in a smaller picture of a grid, names would hide what they name
NAME_LENGTH = 24  # characters of a name in a picture
SKETCH = 160  # pixels of the longer side, at which the places of names are looked for
Color = tuple[int, int, int]


@cache
def class_color(label: int) -> Color:
    """A colour for a class, always the same: hues a golden angle apart, so neighbours in number differ most."""
    hue = int(180 * (0.02 + label * 0.618033988749895) % 180)  # OpenCV's hues end at 180
    saturation, value = ((230, 255), (140, 255), (255, 170))[label // 8 % 3]
    red, green, blue = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)


def auto_thickness(height: int, width: int) -> int:
    """Line thickness that can be seen on an image of this size: 1 at 240 pixels, 2 at 640, 6 at 2000."""
    return max(1, round((height + width) / 2 * 0.003))


def draw_box(image: np.ndarray, box: Sequence[float], color: Color, text: str = "", thickness: int = 0) -> None:
    """Draw one box, xyxy in pixels, and its text on a filled background, into ``image`` itself.

    The text stands on top of the box, or inside it where there is no room; it is moved to stay in the picture.
    """
    height, width = image.shape[:2]
    thickness = thickness or auto_thickness(height, width)
    x1, y1, x2, y2 = (int(round(float(value))) for value in box)
    cv2.rectangle(image, (x1, y1), (x2, y2), color, thickness)
    if not text:
        return
    text_width, room = text_size(text, thickness)
    left = max(0, min(x1, width - text_width))
    draw_text(image, left, y1 - room if y1 >= room else max(0, y1), text, color, thickness)


def text_size(text: str, thickness: int) -> tuple[int, int]:
    """Width and height of a text on its background, beside lines of this thickness."""
    (width, height), below = cv2.getTextSize(text, FONT, *_letters(thickness))
    return width + 4, height + below + 2


def draw_text(image: np.ndarray, left: int, top: int, text: str, color: Color, thickness: int) -> None:
    """Draw a text on a filled background into ``image`` itself, in black or white, whichever can be read."""
    scale, weight = _letters(thickness)
    (text_width, text_height), below = cv2.getTextSize(text, FONT, scale, weight)
    corner = (left + text_width + 4, top + text_height + below + 2)
    cv2.rectangle(image, (left, top), corner, color, cv2.FILLED)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    cv2.putText(image, text, (left + 2, top + text_height + 1), FONT, scale, ink, weight, cv2.LINE_AA)


def _letters(thickness: int) -> tuple[float, int]:
    return max(0.4, thickness * 0.25), max(1, thickness // 2)


def draw_detections(
    image: np.ndarray,
    found: Detections,
    names: Sequence[str],
    thickness: int = 0,
    *,
    show_labels: bool = True,
    show_scores: bool = True,
) -> np.ndarray:
    """A copy of ``image`` with every detection, class name and score; boxes in pixels of this image.

    ``thickness`` 0 suits the size of the image. The best detections are drawn last, on top. Without ``show_labels``
    there are boxes only, without ``show_scores`` names only.
    """
    picture = np.array(image, order="C")
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    for box, score, label in reversed(list(rows)):
        text = f"{names[label]} {score:.2f}" if show_scores else names[label]
        draw_box(picture, box, class_color(label), text if show_labels else "", thickness)
    return picture


def draw_ranking(
    image: np.ndarray,
    found: Ranking,
    names: Sequence[str],
    thickness: int = 0,
    *,
    show_labels: bool = True,
    show_scores: bool = True,
) -> np.ndarray:
    """A copy of ``image`` with the likeliest classes in its corner, the best on top, as many as there is room for.

    The options are those of `draw_detections`.
    """
    picture = np.array(image, order="C")
    thickness = thickness or auto_thickness(*picture.shape[:2])
    top = 0
    for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True):
        text = f"{names[label]} {score:.2f}" if show_scores else names[label]
        _, room = text_size(text, thickness)
        if show_labels and (top == 0 or top + room <= picture.shape[0]):
            draw_text(picture, 0, top, text, class_color(label), thickness)
        top += room
    return picture


def draw_label_map(
    image: np.ndarray,
    found: LabelMap,
    names: Sequence[str],
    thickness: int = 0,
    *,
    show_labels: bool = True,
    show_scores: bool = True,
) -> np.ndarray:
    """A copy of ``image`` under the colours of its pixels' classes, with their names unless ``show_labels`` is off.

    ``thickness`` is that of the letters, 0 suits the size of the image; there are no scores to be shown.
    """
    return painted(image, found.labels.numpy(), names if show_labels else (), thickness)


def painted(image: np.ndarray, labels: np.ndarray, names: Sequence[str] = (), thickness: int = 0) -> np.ndarray:
    """A copy of ``image`` under the colours of the classes ``[H, W]``, borders drawn darker; void stays as it is.

    ``names`` are written where their class is widest, of those that fill enough of the picture.
    """
    colors = np.array([class_color(label) for label in range(VOID + 1)], np.uint8)
    picture = cv2.addWeighted(image, 1 - PAINT, colors[labels], PAINT, 0)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] = labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    picture[border] = picture[border] // 2
    picture[labels == VOID] = image[labels == VOID]
    thickness = thickness or auto_thickness(*labels.shape)
    for label, (x, y) in wide_places(labels).items() if names else ():
        text = str(names[label])
        width, height = text_size(text, thickness)
        left = min(max(0, x - width // 2), max(0, labels.shape[1] - width))
        top = min(max(0, y - height // 2), max(0, labels.shape[0] - height))
        draw_text(picture, left, top, text, class_color(label), thickness)
    return picture


def wide_places(labels: np.ndarray) -> dict[int, tuple[int, int]]:
    """For each class that fills enough of ``[H, W]``, x and y of the pixel that is farthest from any other class."""
    height, width = labels.shape
    scale = min(1.0, SKETCH / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sketch = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST_EXACT)
    places = {}
    for label in np.unique(sketch).tolist():
        mine = sketch == label
        if label == VOID or mine.mean() < NAMED_SHARE:
            continue
        inside = np.pad(mine, 1).astype(np.uint8)  # the edge of the picture is a border too
        away = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        row, column = np.unravel_index(int(away.argmax()), away.shape)
        places[label] = (int((column + 0.5) * width / size[0]), int((row + 0.5) * height / size[1]))
    return places


def grid(
    images: Tensor, targets: Targets, names: Sequence[str] = (), *, limit: int = 16, side: int = 1920
) -> np.ndarray:
    """One picture of the first ``limit`` images of a batch with their targets.

    Images are ``[N, 3, S, S]``, uint8 or floats 0 to 1; the picture is at most ``side`` pixels wide and high. Boxes
    are named by ``names``, or by their numbers. Masks are laid over their images.
    """
    pixels = images[:limit].detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().clamp(0, 255).byte()
    count, _, height, width = pixels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = min(1.0, side / (columns * width), side / (rows * height))
    cell = (max(1, int(width * scale)), max(1, int(height * scale)))
    picture = np.full((rows * cell[1], columns * cell[0], 3), 114, np.uint8)
    for index in range(count):
        image = cv2.resize(pixels[index].permute(1, 2, 0).numpy(), cell, interpolation=cv2.INTER_AREA)
        if targets.masks is not None:
            mask = cv2.resize(targets.masks[index].cpu().numpy(), cell, interpolation=cv2.INTER_NEAREST_EXACT)
            image = painted(image, mask, names if min(cell) >= NAMED_SIDE else ())
        here = (targets.image_index == index).cpu()
        for box, label in zip(
            (targets.boxes.cpu()[here] * scale).tolist(), targets.labels.cpu()[here].tolist(), strict=True
        ):
            draw_box(image, box, class_color(label), names[label] if names else str(label))
        top, left = index // columns * cell[1], index % columns * cell[0]
        picture[top : top + cell[1], left : left + cell[0]] = image
    return picture


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write an RGB image in the format that the ending says; the file appears whole or not at all."""
    path = Path(path)
    if not cv2.haveImageWriter(path.name):
        raise Fault(f"{path}: OpenCV cannot write {path.suffix} files here; .jpg or .png would do")
    _, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    with atomically(path) as temporary:
        temporary.write_bytes(data.tobytes())


def shown_name(name: str, most: int = NAME_LENGTH) -> str:
    """A class or file name as one short line: what cannot be printed becomes ``?``, the middle of a long one goes."""
    line = "".join(letter if letter.isprintable() else "?" for letter in str(name))
    return line if len(line) <= most else f"{line[: most - most // 3 - 1]}…{line[-(most // 3) :]}"


def plain(text: str) -> str:
    """A text in the letters that OpenCV can write, those of ASCII."""
    return text.replace("…", "..").encode("ascii", "replace").decode()
