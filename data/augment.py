"""From a labelled picture to the network's input: letterbox, and what training does to it by chance.

Pictures are ``[H, W, 3]`` uint8 RGB, boxes ``[M, 4]`` float32 xyxy in pixels of the picture beside them, labels
``[M]`` int64. Of a picture whose pixels are of classes the mask ``[H, W]`` uint8 goes the same way, by the nearest
pixel and with `VOID` where the picture is padded. Chance comes from the `rng` argument alone.

Training pictures are sources on a canvas, seen through a matrix. Where nothing is turned, the canvas is never drawn:
what shows of each source goes straight from its pixels to the output's, in one resampling instead of two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.structures import VOID, Fault, Letterbox

Shape = tuple[int, int]  # height, width in pixels
Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

GREY = 114  # of padding, in every channel
THINNEST = 2  # pixels; a box thinner than this after augmentation is dropped
LEAST_VISIBLE = 0.1  # so is one of whose area less than this fraction is still in the picture
SMALL = 32 * 32  # square pixels; COCO calls objects below it small
MARGIN = 5  # pixels between a pasted object and the edge of its picture
TRIES = 30  # places drawn for a pasted object before it is given up
CENTRE = 0.875  # of an image's shorter side, which a classifier sees: 224 of 256 pixels, as since AlexNet
MOST_STRETCH = 4 / 3  # of a part that is drawn of an image: width to height, or height to width
CROP_TRIES = 10  # parts drawn before it is the middle that is taken
NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)  # and no labels


@dataclass(frozen=True)
class Augment:
    """How strongly training changes a picture; the meanings are those of the YOLO hyper-parameter files.

    Attributes:
        mosaic: probability of joining four pictures.
        scale: pictures are scaled by 1 - scale to 1 + scale; those that are cropped show 1 - scale to 1 of their area.
        translate: and moved by up to this fraction of the input's side.
        degrees: and turned by up to this angle either way.
        hsv: largest relative change of hue, saturation and value.
        flip_lr: probability of a left-right flip.
        flip_ud: probability of an upside-down flip.
        mixup: probability of blending with a second picture, augmented in the same way.
        copy_small: probability, for each image, of pasting its small objects once more at free places.
    """

    mosaic: float = 1.0
    scale: float = 0.5
    translate: float = 0.1
    degrees: float = 0.0
    hsv: tuple[float, float, float] = (0.015, 0.7, 0.4)
    flip_lr: float = 0.5
    flip_ud: float = 0.0
    mixup: float = 0.0
    copy_small: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hsv", tuple(self.hsv))
        chances = dict.fromkeys(("mosaic", "flip_lr", "flip_ud", "mixup", "copy_small"), 1.0)
        for name, most in {**chances, "translate": 0.9, "scale": 0.9, "degrees": 180.0}.items():
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
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """A picture whose size and boxes are known; its pixels ``[height, width, 3]`` are read only where they are seen.

    So is its mask ``[height, width]``, where it has one.
    """

    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    read: Callable[[], np.ndarray]
    read_mask: Callable[[], np.ndarray] | None = None


# --- without chance -------------------------------------------------------------------------------------------------


def fitted_size(width: int, height: int, imgsz: int) -> tuple[int, int]:
    """Width and height of an image whose longer side is scaled to `imgsz`."""
    scale = imgsz / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def letterbox_of(width: int, height: int, imgsz: int, shape: Shape | None = None) -> Letterbox:
    """Where an image of ``width x height``, its longer side scaled to `imgsz`, lies in the middle of `shape`.

    Without a shape that is a square of `imgsz`.
    """
    fitted = fitted_size(width, height, imgsz)
    rows, columns = shape or (imgsz, imgsz)
    return Letterbox(width, height, imgsz / max(width, height), (columns - fitted[0]) // 2, (rows - fitted[1]) // 2)


def centre_crop(width: int, height: int, imgsz: int) -> Letterbox:
    """Where an image lies so that the middle of it, a square of 7/8 of its shorter side, fills ``imgsz x imgsz``."""
    scale = imgsz / (CENTRE * min(width, height))
    return Letterbox(width, height, scale, round((imgsz - width * scale) / 2), round((imgsz - height * scale) / 2))


def longest_side(width: int, height: int, shorter: int) -> int:
    """Of an image whose shorter side becomes `shorter`."""
    return math.ceil(shorter * max(width, height) / min(width, height))


def middle(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Letterbox]:
    """The middle of a picture as it fills ``imgsz x imgsz``: what a classifier sees of it."""
    height, width = image.shape[:2]
    box = centre_crop(width, height, imgsz)
    kept = shrink(image, longest_side(width, height, math.ceil(imgsz / CENTRE)))
    source = Source(kept.shape[1], kept.shape[0], *NO_BOXES, lambda: kept)
    return compose([source], [place_of(box)], (imgsz, imgsz), (imgsz, imgsz))[0], box


def place_of(box: Letterbox) -> Rectangle:
    """The rectangle that the whole image fills."""
    right, bottom = box.pad_x + round(box.width * box.scale), box.pad_y + round(box.height * box.scale)
    return box.pad_x, box.pad_y, right, bottom


def letterbox(image: np.ndarray, imgsz: int) -> tuple[np.ndarray, Letterbox]:
    """Scales a picture into an ``imgsz x imgsz`` square, in the middle of grey."""
    height, width = image.shape[:2]
    box = letterbox_of(width, height, imgsz)
    return paste(fit(image, imgsz), (imgsz, imgsz), box), box


def fit(image: np.ndarray, imgsz: int) -> np.ndarray:
    """A picture with its longer side scaled to `imgsz`, not yet padded."""
    height, width = image.shape[:2]
    size = fitted_size(width, height, imgsz)
    if size == (width, height):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if imgsz < max(width, height) else cv2.INTER_LINEAR)


def shrink(image: np.ndarray, imgsz: int) -> np.ndarray:
    """`fit` for pictures that are larger than `imgsz`; others stay as they are, since `fit` can still enlarge them."""
    return fit(image, imgsz) if max(image.shape[:2]) > imgsz else image


def paste(fitted: np.ndarray, shape: Shape, box: Letterbox) -> np.ndarray:
    """A picture that `fit` has scaled, on grey of `shape`."""
    height, width = fitted.shape[:2]
    canvas = np.full((*shape, 3), GREY, dtype=np.uint8)
    canvas[box.pad_y : box.pad_y + height, box.pad_x : box.pad_x + width] = fitted
    return canvas


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another width and height: every pixel has the class of the one that its middle lies in."""
    if size == mask.shape[::-1]:
        return mask
    return np.asarray(cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT))


def paste_mask(fitted: np.ndarray, shape: Shape, box: Letterbox) -> np.ndarray:
    """A mask that `fit_mask` has scaled, on void of `shape`."""
    height, width = fitted.shape
    canvas = np.full(shape, VOID, dtype=np.uint8)
    canvas[box.pad_y : box.pad_y + height, box.pad_x : box.pad_x + width] = fitted
    return canvas


def flip(picture: Picture, *, left_right: bool) -> Picture:
    """Mirrors a picture, left to right or top to bottom. Twice is the picture itself."""
    height, width = picture.image.shape[:2]
    x1, y1, x2, y2 = picture.boxes.T
    axis = 1 if left_right else 0
    mask = None if picture.mask is None else cv2.flip(picture.mask, axis)
    if left_right:
        boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
    else:
        boxes = np.stack([x1, height - y2, x2, height - y1], axis=1)
    return Picture(cv2.flip(picture.image, axis), boxes, picture.labels, mask)


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The upright boxes ``[M, 4]`` around boxes ``[M, 4]`` moved by an affine ``[2, 3]`` matrix."""
    x1, y1, x2, y2 = boxes.T
    corners_2M4 = np.array([[x1, x2, x2, x1], [y1, y1, y2, y2]]).transpose(0, 2, 1)
    moved_2M4 = np.einsum("ij,jmk->imk", matrix[:, :2], corners_2M4) + matrix[:, 2, None, None]
    return np.concatenate([moved_2M4.min(axis=2).T, moved_2M4.max(axis=2).T], axis=1).astype(np.float32)


def warp(image: np.ndarray, matrix: np.ndarray, shape: Shape) -> np.ndarray:
    """A picture moved by an affine ``[2, 3]`` matrix into `shape`, with grey around it; or a mask, with void."""
    # cv2 speaks of pixel centres, boxes of pixel edges: half a pixel apart
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    if image.ndim == 2:
        return cv2.warpAffine(image, shifted, shape[::-1], flags=cv2.INTER_NEAREST, borderValue=VOID)
    return cv2.warpAffine(image, shifted, shape[::-1], flags=cv2.INTER_LINEAR, borderValue=[GREY] * 3)


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


def window(start: float, end: float, length: int, low: int, high: int) -> tuple[int, int, int, int] | None:
    """Along one axis: which pixels of a source of `length`, stretched over start to end, fill which of low to high.

    Both are whole pixels, so that a resize is all that is left to do: the output's are those nearest to the true
    edges, the source's those nearest to what should be seen there. None where nothing shows.

    Returns:
        first and end of the output's pixels, first and end of the source's.
    """
    x1, x2 = (min(max(round(edge), low), high) for edge in (start, end))
    if x1 >= x2:
        return None
    step = length / (end - start)  # pixels of the source for one of the output
    u1 = min(max(round((x1 - start) * step), 0), length - 1)
    u2 = min(max(round((x2 - start) * step), u1 + 1), length)
    return x1, x2, u1, u2


def compose(
    sources: Sequence[Source],
    rectangles: Sequence[Rectangle],
    canvas: Shape,
    shape: Shape,
    scale: float = 1.0,
    shift: Sequence[float] = (0.0, 0.0),
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sources stretched over rectangles of a canvas, as they show in `shape` once it is scaled and moved by `shift`.

    Returns:
        the image, the whole boxes ``[M, 4]`` in its pixels, the same cropped to what is seen, and the labels. A source
        of which nothing is seen is not read and gives no boxes. What shows of their masks is written into `mask`.
    """
    image = np.full((*shape, 3), GREY, dtype=np.uint8)
    whole, visible, labels = [np.zeros((0, 4), np.float32)], [np.zeros((0, 4), np.float32)], [np.zeros(0, np.int64)]
    low_x, low_y = (max(round(edge), 0) for edge in shift)
    high_x, high_y = (min(round(canvas[i] * scale + shift[1 - i]), shape[i]) for i in (1, 0))
    for source, (left, top, right, bottom) in zip(sources, rectangles, strict=True):
        across = window(left * scale + shift[0], right * scale + shift[0], source.width, low_x, high_x)
        down = window(top * scale + shift[1], bottom * scale + shift[1], source.height, low_y, high_y)
        if across is None or down is None:
            continue
        x1, x2, u1, u2 = across
        y1, y2, v1, v2 = down
        part = source.read()[v1:v2, u1:u2]
        shrunk = u2 - u1 > 2 * (x2 - x1) or v2 - v1 > 2 * (y2 - y1)  # linear would skip pixels
        how = cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR
        cv2.resize(part, (x2 - x1, y2 - y1), dst=image[y1:y2, x1:x2], interpolation=how)
        if mask is not None and source.read_mask is not None:
            mask[y1:y2, x1:x2] = fit_mask(source.read_mask()[v1:v2, u1:u2], (x2 - x1, y2 - y1))
        first, corner, end = (np.array(pair * 2, np.float32) for pair in ([u1, v1], [x1, y1], [x2, y2]))
        stretch = np.array([(x2 - x1) / (u2 - u1), (y2 - y1) / (v2 - v1)] * 2, np.float32)
        moved = (source.boxes - first) * stretch + corner
        whole.append(moved)
        visible.append(moved.clip(corner, end))
        labels.append(source.labels)
    return image, np.concatenate(whole), np.concatenate(visible), np.concatenate(labels)


# --- by chance ------------------------------------------------------------------------------------------------------


def change_colours(image: np.ndarray, gains: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Multiplies hue, saturation and value by 1 +- gain, drawn once a picture."""
    factors = 1 + rng.uniform(-1, 1, 3) * np.array(gains)
    if not any(gains):
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    changed = cv2.transform(hsv, np.diag(factors).astype(np.float32))  # a table would take four times as long
    if 179 * factors[0] > 255:  # hue counts to 179 and starts anew; up to 255 cv2 sees to that
        changed[:, :, 0] = cv2.LUT(hsv[:, :, 0], (np.arange(256) * factors[0] % 180).astype(np.uint8))
    return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB, dst=hsv)


def mosaic_rectangles(sizes: Sequence[tuple[int, int]], shape: Shape, rng: np.random.Generator) -> list[Rectangle]:
    """Where four pictures of (width, height) lie on a canvas of twice `shape`: around a centre drawn from its middle.

    A rectangle may reach out of the canvas; what lies there is not seen.
    """
    rows, columns = shape
    cx = int(rng.integers(columns // 2, 2 * columns - columns // 2 + 1))
    cy = int(rng.integers(rows // 2, 2 * rows - rows // 2 + 1))
    rectangles: list[Rectangle] = []
    for place, (width, height) in enumerate(sizes):
        left = cx - width if place % 2 == 0 else cx
        top = cy - height if place < 2 else cy
        rectangles.append((left, top, left + width, top + height))
    return rectangles


def affine_matrix(canvas: Shape, shape: Shape, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """A ``[2, 3]`` matrix that turns, scales and moves a canvas about its middle into one of `shape`."""
    angle = math.radians(rng.uniform(-augment.degrees, augment.degrees))
    scale = rng.uniform(1 - augment.scale, 1 + augment.scale)
    middle = np.array(shape[::-1]) * (0.5 + rng.uniform(-augment.translate, augment.translate, 2))
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return np.concatenate([turn, (middle - turn @ [canvas[1] / 2, canvas[0] / 2])[:, None]], axis=1)


def copy_small(source: Source, rng: np.random.Generator) -> Source:
    """Pastes every small object, under 32 x 32 pixels, once more where no object is.

    Copies are whole pixels of the picture and touch no other box; one that finds no place in 30 tries is left out
    (Kisantal et al., Augmentation for small object detection, 2019, section 5, without their change of size and angle).
    """
    sides = source.boxes[:, 2:] - source.boxes[:, :2]
    small = np.flatnonzero((area(source.boxes) < SMALL) & (sides >= THINNEST).all(axis=1))
    bounds = np.concatenate([np.floor(source.boxes[:, :2]), np.ceil(source.boxes[:, 2:])], axis=1).astype(int)
    limits = np.array([source.width, source.height])
    taken, patches, boxes = bounds, [], []
    for index in small:
        corner, size = bounds[index, :2], bounds[index, 2:] - bounds[index, :2]
        room = limits - MARGIN - size
        if (corner < 0).any() or (bounds[index, 2:] > limits).any() or (room < MARGIN).any():
            continue
        corners = rng.integers(MARGIN, room + 1, (TRIES, 2))
        apart = (corners[:, None] >= taken[:, 2:]) | (corners[:, None] + size <= taken[:, :2])
        free = corners[apart.any(axis=2).all(axis=1)]
        if len(free):
            taken = np.concatenate([taken, [[*free[0], *(free[0] + size)]]])
            patches.append((corner, free[0], size))
            boxes.append((index, source.boxes[index] + np.tile(free[0] - corner, 2).astype(np.float32)))
    if not patches:
        return source

    def read() -> np.ndarray:
        before = source.read()
        after = before.copy()  # it may be kept for others
        for (u, v), (x, y), (width, height) in patches:
            after[y : y + height, x : x + width] = before[v : v + height, u : u + width]
        return after

    pasted = source.labels[[index for index, _ in boxes]]
    return replace(
        source,
        boxes=np.concatenate([source.boxes, [box for _, box in boxes]]),
        labels=np.concatenate([source.labels, pasted]),
        read=read,
    )


def augmented(
    sources: Sequence[Source], imgsz: int, shape: Shape, augment: Augment, rng: np.random.Generator
) -> Picture:
    """One source, letterboxed, or four, as a mosaic, become one picture of `shape`: scaled, moved and turned.

    Boxes of which too little stays are dropped, the others clipped. Colours and flips come after (`finished`).
    """
    sizes = [fitted_size(source.width, source.height, imgsz) for source in sources]
    if len(sources) == 4:
        canvas = (2 * shape[0], 2 * shape[1])
        rectangles = mosaic_rectangles(sizes, shape, rng)
    else:
        canvas = shape
        box = letterbox_of(sources[0].width, sources[0].height, imgsz, shape)
        rectangles = [(box.pad_x, box.pad_y, box.pad_x + sizes[0][0], box.pad_y + sizes[0][1])]
    sources = [copy_small(source, rng) if rng.random() < augment.copy_small else source for source in sources]
    matrix = affine_matrix(canvas, shape, augment, rng)
    mask = None
    if any(source.read_mask is not None for source in sources):
        mask = np.full(canvas if augment.degrees else shape, VOID, dtype=np.uint8)
    if augment.degrees:
        image, whole, visible, labels = compose(sources, rectangles, canvas, canvas, mask=mask)
        image, whole = warp(image, matrix, shape), warp_boxes(whole, matrix)
        mask = None if mask is None else warp(mask, matrix, shape)
        visible = crop_boxes(warp_boxes(visible, matrix), shape[1], shape[0])
    else:
        image, whole, visible, labels = compose(
            sources, rectangles, canvas, shape, float(matrix[0, 0]), matrix[:, 2].tolist(), mask
        )
    kept = worth_keeping(whole, visible)
    return Picture(image, visible[kept], labels[kept], mask)


def cropped(source: Source, shape: Shape, augment: Augment, rng: np.random.Generator) -> Picture:
    """A part of a source, drawn by its area and its form, fills `shape`, and is turned about its middle.

    The area is ``1 - augment.scale`` to 1 of the source's, the form 3:4 to 4:3 (Szegedy et al., arXiv 1409.4842,
    section 6). Colours and flips come after (`finished`).
    """
    rows, columns = shape
    width = height = float(min(source.width, source.height))
    for _ in range(CROP_TRIES):
        area = source.width * source.height * rng.uniform(1 - augment.scale, 1)
        stretch = math.exp(rng.uniform(-math.log(MOST_STRETCH), math.log(MOST_STRETCH)))
        wide, high = math.sqrt(area * stretch), math.sqrt(area / stretch)
        if wide <= source.width and high <= source.height:
            width, height = wide, high
            break
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    across, down = columns / width, rows / height
    place = (-left * across, -top * down, (source.width - left) * across, (source.height - top) * down)
    image, _, visible, labels = compose([source], [place], shape, shape)
    if augment.degrees:
        turn = replace(augment, scale=0.0, translate=0.0)
        image = warp(image, affine_matrix(shape, shape, turn, rng), shape)
    return Picture(image, visible, labels)


def mixup(one: Picture, other: Picture, rng: np.random.Generator) -> Picture:
    """Two pictures of one shape, blended by a share drawn from Beta(32, 32), with the boxes of both (as in YOLOX)."""
    share = rng.beta(32, 32)
    image = cv2.addWeighted(one.image, share, other.image, 1 - share, 0)
    return Picture(image, np.concatenate([one.boxes, other.boxes]), np.concatenate([one.labels, other.labels]))


def finished(picture: Picture, augment: Augment, rng: np.random.Generator) -> Picture:
    """The colours and the flips, which come last."""
    picture = replace(picture, image=change_colours(picture.image, augment.hsv, rng))
    if rng.random() < augment.flip_lr:
        picture = flip(picture, left_right=True)
    if rng.random() < augment.flip_ud:
        picture = flip(picture, left_right=False)
    return picture
