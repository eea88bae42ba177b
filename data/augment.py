"""From a labelled picture to the network's input: letterbox, and what training does to it by chance.

Pictures are ``[H, W, 3]`` uint8 RGB, boxes ``[M, 4]`` float32 xyxy in pixels of the picture beside them, labels
``[M]`` int64. Chance comes from the `rng` argument alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data.structures import Fault, Letterbox

GREY = 114  # of padding, in every channel
THINNEST = 2  # pixels; a box thinner than this after augmentation is dropped
LEAST_VISIBLE = 0.1  # so is one of whose area less than this fraction is still in the picture


@dataclass(frozen=True)
class Augment:
    """How strongly training changes a picture; the meanings are those of the YOLO hyper-parameter files.

    Attributes:
        mosaic: probability of joining four pictures.
        scale: pictures are scaled by 1 - scale to 1 + scale.
        translate: and moved by up to this fraction of the input's side.
        degrees: and turned by up to this angle either way.
        hsv: largest relative change of hue, saturation and value.
        flip_lr: probability of a left-right flip.
        flip_ud: probability of an upside-down flip.
    """

    mosaic: float = 1.0
    scale: float = 0.5
    translate: float = 0.1
    degrees: float = 0.0
    hsv: tuple[float, float, float] = (0.015, 0.7, 0.4)
    flip_lr: float = 0.5
    flip_ud: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", tuple(self.hsv))
        ranges = {"mosaic": 1.0, "flip_lr": 1.0, "flip_ud": 1.0, "translate": 0.9, "scale": 0.9, "degrees": 180.0}
        for name, most in ranges.items():
            if not 0 <= getattr(self, name) <= most:
                raise Fault(f"augment: {name} is {getattr(self, name)}; 0 to {most:g} is right")
        if len(self.hsv) != 3 or not all(0 <= gain <= 1 for gain in self.hsv):
            raise Fault(f"augment: hsv is {list(self.hsv)}; three numbers from 0 to 1 are right")


@dataclass(frozen=True)
class Picture:
    """A picture with its boxes and labels. Boxes may reach out of it while it is being augmented."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


# --- without chance -------------------------------------------------------------------------------------------------


def letterbox(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Letterbox]:
    """Scales a picture into an ``imgsz x imgsz`` square, in the middle of grey."""
    fitted, box = fit(image, imgsz)
    return paste(fitted, imgsz, box), box


def fit(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Letterbox]:
    """A picture with its longer side scaled to `imgsz`, not yet padded, and the letterbox that will pad it."""
    height, width = image.shape[:2]
    scale = imgsz / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    box = Letterbox(width, height, scale, (imgsz - size[0]) // 2, (imgsz - size[1]) // 2)
    if size == (width, height):
        return image, box
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), box


def paste(fitted: np.ndarray, imgsz: int, box: Letterbox) -> np.ndarray:
    """A picture that `fit` has scaled, on grey."""
    height, width = fitted.shape[:2]
    canvas = np.full((imgsz, imgsz, 3), GREY, dtype=np.uint8)
    canvas[box.pad_y : box.pad_y + height, box.pad_x : box.pad_x + width] = fitted
    return canvas


def flip(picture: Picture, *, left_right: bool) -> Picture:
    """Mirrors a picture, left to right or top to bottom. Twice is the picture itself."""
    height, width = picture.image.shape[:2]
    x1, y1, x2, y2 = picture.boxes.T
    if left_right:
        boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
        return Picture(cv2.flip(picture.image, 1), boxes, picture.labels)
    boxes = np.stack([x1, height - y2, x2, height - y1], axis=1)
    return Picture(cv2.flip(picture.image, 0), boxes, picture.labels)


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The upright boxes ``[M, 4]`` around boxes ``[M, 4]`` moved by an affine ``[2, 3]`` matrix."""
    x1, y1, x2, y2 = boxes.T
    corners_2M4 = np.array([[x1, x2, x2, x1], [y1, y1, y2, y2]]).transpose(0, 2, 1)
    moved_2M4 = np.einsum("ij,jmk->imk", matrix[:, :2], corners_2M4) + matrix[:, 2, None, None]
    return np.concatenate([moved_2M4.min(axis=2).T, moved_2M4.max(axis=2).T], axis=1).astype(np.float32)


def area(boxes: np.ndarray) -> np.ndarray:
    """Square pixels ``[M]`` of boxes ``[M, 4]``."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.asarray(sides[:, 0] * sides[:, 1])


def crop_boxes(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    return boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))


def worth_keeping(whole: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Which boxes ``[M]`` still show enough: at least 2 pixels thick, and a tenth of the whole box's area."""
    thick: np.ndarray = np.all(visible[:, 2:] - visible[:, :2] >= THINNEST, axis=1)
    return thick & (area(visible) >= LEAST_VISIBLE * area(whole))


# --- by chance ------------------------------------------------------------------------------------------------------


def change_colours(image: np.ndarray, gains: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Multiplies hue, saturation and value by 1 +- gain, drawn once a picture."""
    factors = 1 + rng.uniform(-1, 1, 3) * np.array(gains)
    if not any(gains):
        return image
    levels = np.arange(256)
    tables = np.stack([levels * factors[0] % 180, levels * factors[1], levels * factors[2]], axis=1)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    changed = cv2.LUT(hsv, tables.clip(0, 255).astype(np.uint8)[None])
    return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB)


def mosaic(pictures: Sequence[Picture], imgsz: int, rng: np.random.Generator) -> Picture:
    """Four pictures, none larger than `imgsz`, around a centre drawn from the middle of a canvas of twice `imgsz`.

    Boxes keep their whole extent, also where the canvas cuts their picture off.
    """
    side = 2 * imgsz
    cx, cy = (int(c) for c in rng.integers(imgsz // 2, side - imgsz // 2 + 1, 2))
    canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
    boxes: list[np.ndarray] = []
    for place, picture in enumerate(pictures):
        height, width = picture.image.shape[:2]
        left = cx - width if place % 2 == 0 else cx
        top = cy - height if place < 2 else cy
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, side), min(top + height, side)
        canvas[y1:y2, x1:x2] = picture.image[y1 - top : y2 - top, x1 - left : x2 - left]
        boxes.append(picture.boxes + np.array([left, top, left, top], dtype=np.float32))
    return Picture(canvas, np.concatenate(boxes), np.concatenate([picture.labels for picture in pictures]))


def affine_matrix(side: int, imgsz: int, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """A ``[2, 3]`` matrix that turns, scales and moves a canvas of `side` about its middle into one of `imgsz`."""
    angle = math.radians(rng.uniform(-augment.degrees, augment.degrees))
    scale = rng.uniform(1 - augment.scale, 1 + augment.scale)
    middle = imgsz * (0.5 + rng.uniform(-augment.translate, augment.translate, 2))
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return np.concatenate([turn, (middle - turn @ [side / 2, side / 2])[:, None]], axis=1)


def affine(picture: Picture, matrix: np.ndarray, imgsz: int) -> Picture:
    """Warps a picture into an ``imgsz`` square; boxes of which too little stays are dropped, the others clipped."""
    height, width = picture.image.shape[:2]
    # cv2 speaks of pixel centres, boxes of pixel edges: half a pixel apart
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    image = cv2.warpAffine(picture.image, shifted, (imgsz, imgsz), flags=cv2.INTER_LINEAR, borderValue=[GREY] * 3)
    whole = warp_boxes(picture.boxes, matrix)
    visible = crop_boxes(warp_boxes(crop_boxes(picture.boxes, width, height), matrix), imgsz, imgsz)
    kept = worth_keeping(whole, visible)
    return Picture(image, visible[kept], picture.labels[kept])


def augmented(pictures: Sequence[Picture], imgsz: int, augment: Augment, rng: np.random.Generator) -> Picture:
    """One picture (on an ``imgsz`` square) or four (for a mosaic) become one training picture."""
    canvas = pictures[0] if len(pictures) == 1 else mosaic(pictures, imgsz, rng)
    picture = affine(canvas, affine_matrix(canvas.image.shape[0], imgsz, augment, rng), imgsz)
    picture = Picture(change_colours(picture.image, augment.hsv, rng), picture.boxes, picture.labels)
    if rng.random() < augment.flip_lr:
        picture = flip(picture, left_right=True)
    if rng.random() < augment.flip_ud:
        picture = flip(picture, left_right=False)
    return picture
