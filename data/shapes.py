"""Draws the data set that the project ships: five kinds of shapes on cluttered backgrounds, and a short video.

What tells the classes apart is their outline alone. Colours, textures, sizes and angles are drawn from the same
distributions for every class, and the background holds half moons, bars, long ellipses and scribbles of the same
colours and textures that are no objects. Boxes are read off the drawn masks: the whole extent of a shape inside the
image, also where a later shape covers a part of it. No shape is covered by more than three fifths.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.structures import Fault

VERSION = 1  # of the drawings; another version draws the folder anew
NAMES = ("circle", "square", "triangle", "star", "cross")
SMALLEST, LARGEST = 0.06, 0.45  # diameter over the image's side
FINER = 4  # masks are drawn this many times finer than the image
MOST_COVERED = 0.6
LEAST_INSIDE = 0.7  # of a shape's area lies in the image
STANDS_OUT = 60  # mean difference of a shape's colour from what it covers, of 255
COUNTS = (0.04, 0.10, 0.18, 0.22, 0.20, 0.14, 0.08, 0.04)  # probability of 0, 1, ... 7 shapes in an image
FPS = 25
TRAIN, VAL, VIDEO = 0, 1, 2  # purposes of a random stream: (seed, purpose, index)


@dataclass(frozen=True)
class Shape:
    """One shape: class `label`, centre and `radius` of the circle around it in pixels, `angle` in radians."""

    label: int
    cx: float
    cy: float
    radius: float
    angle: float
    stretch: float  # width over height before it is turned


@dataclass(frozen=True)
class Paint:
    """How a surface looks: a texture between two near colours, `[3]` RGB each."""

    texture: int
    colours: tuple[np.ndarray, np.ndarray]
    period: float
    angle: float


# --- the data set ---------------------------------------------------------------------------------------------------


def draw_shapes(
    folder: str | Path, seed: int = 0, *, train: int = 400, val: int = 100, size: int = 320, seconds: float = 4.0
) -> Path:
    """Draws images, YOLO labels, a video and ``data.yaml`` into `folder`; returns the path of that YAML.

    The same arguments give the same bytes. A folder that was drawn with them before is left as it is; one drawn with
    others is replaced as a whole.

    Raises:
        Fault: when the folder exists and holds something else.
    """
    folder = Path(folder)
    stamp = json.dumps({"version": VERSION, "seed": seed, "train": train, "val": val, "size": size, "seconds": seconds})
    stamp_file = folder / "shapes.json"
    if stamp_file.is_file() and stamp_file.read_text() == stamp:
        return folder / "data.yaml"
    if folder.exists() and not stamp_file.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"{folder}: holds something that was not drawn here; name a new folder, or empty this one")

    whole = Path(os.path.abspath(folder))
    if whole == Path.cwd():
        raise Fault(f"{folder}: is the folder that you are in, which cannot be replaced; name a new one in it")
    partial = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        for purpose, split, count in ((TRAIN, "train", train), (VAL, "val", val)):
            (partial / "images" / split).mkdir(parents=True)
            (partial / "labels" / split).mkdir(parents=True)
            for index in tqdm(range(count), desc=f"drawing {split}", unit="image", delay=2, leave=False):
                image, boxes, labels = draw_image(size, np.random.default_rng((seed, purpose, index)))
                _, jpeg = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
                (partial / "images" / split / f"{index:04d}.jpg").write_bytes(jpeg.tobytes())
                (partial / "labels" / split / f"{index:04d}.txt").write_text(yolo_text(boxes, labels, size))
        (partial / "data.yaml").write_text(
            f"# {train} + {val} drawn images of five shapes; see data/shapes.py\n"
            f"train: images/train\nval: images/val\nformat: yolo\nnames: [{', '.join(NAMES)}]\n"
        )
        if not write_video(partial / "video.mp4", size, seconds, np.random.default_rng((seed, VIDEO))):
            print(
                f"{folder / 'video.mp4'}: not drawn, for this OpenCV cannot write mp4v video; the images are complete"
            )
        (partial / "shapes.json").write_text(stamp)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "data.yaml"


def yolo_text(boxes: np.ndarray, labels: np.ndarray, size: int) -> str:
    """YOLO lines for boxes ``[M, 4]`` xyxy in pixels of a square image."""
    lines = []
    for (x1, y1, x2, y2), label in zip(boxes / size, labels, strict=True):
        lines.append(f"{label} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}\n")
    return "".join(lines)


def write_video(path: Path, size: int, seconds: float, rng: np.random.Generator) -> bool:
    """Five shapes that drift, turn and bounce; False when the codec is missing."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (size, size))
    if not writer.isOpened():
        return False
    scene = background(size, rng)
    shapes = [random_shape(size, rng, label) for label in range(len(NAMES))]
    paints = [paint_for(scene, mask_of(shape, size), rng) for shape in shapes]
    speeds = rng.uniform(0.2, 0.6, (len(shapes), 2)) * rng.choice([-1, 1], (len(shapes), 2)) * size / FPS
    turns = rng.uniform(-2, 2, len(shapes)) / FPS
    for frame in range(round(seconds * FPS)):
        image = scene.copy()
        for shape, paint, speed, turn in zip(shapes, paints, speeds, turns, strict=True):
            # there and back between the two edges: a triangle wave
            x, y = (abs((c + v * frame) % (2 * size) - size) for c, v in zip((shape.cx, shape.cy), speed, strict=True))
            moved = Shape(shape.label, x, y, shape.radius, shape.angle + turn * frame, shape.stretch)
            image = fill(image, mask_of(moved, size), paint)
        writer.write(np.ascontiguousarray(image[:, :, ::-1]))
    writer.release()
    return True


# --- one image ------------------------------------------------------------------------------------------------------


def draw_image(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image ``[size, size, 3]`` uint8 RGB, its boxes ``[M, 4]`` xyxy in pixels and labels ``[M]``."""
    image = background(size, rng)
    wanted = int(rng.choice(len(COUNTS), p=COUNTS))
    whole: list[int] = []  # area in the image of each shape so far, in mask pixels
    visible: list[np.ndarray] = []  # and what later ones left of it
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    for _ in range(wanted):
        shape = random_shape(size, rng, int(rng.integers(len(NAMES))))
        for _ in range(20):
            mask = mask_of(shape, size)
            area = int(np.count_nonzero(mask))
            left = [before & ~mask for before in visible]
            inside = area >= LEAST_INSIDE * FINER**2 * cv2.contourArea(outline(shape).astype(np.float32))
            if inside and all(np.count_nonzero(m) >= (1 - MOST_COVERED) * a for m, a in zip(left, whole, strict=True)):
                image = fill(image, mask, paint_for(image, mask, rng))
                visible, whole = [*left, mask], [*whole, area]
                boxes.append(box_of(mask))
                labels.append(shape.label)
                break
            shape = random_shape(size, rng, shape.label)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.8))
    grain = rng.uniform(1, 6) * rng.standard_normal(image.shape, dtype=np.float32)
    image = np.round(image + grain).clip(0, 255).astype(np.uint8)
    return image, np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(labels, dtype=np.int64)


def random_shape(size: int, rng: np.random.Generator, label: int) -> Shape:
    """Size by its square root, so that small shapes are seen as well as large ones; the centre inside the image."""
    diameter = size * rng.uniform(math.sqrt(SMALLEST), math.sqrt(LARGEST)) ** 2
    cx, cy = rng.uniform(0.03 * size, 0.97 * size, 2)
    return Shape(label, cx, cy, diameter / 2, rng.uniform(0, 2 * math.pi), rng.uniform(0.9, 1.11))


def outline(shape: Shape) -> np.ndarray:
    """The corners ``[P, 2]`` of a shape in pixels."""
    return placed(OUTLINES[NAMES[shape.label]], shape)


def placed(points: np.ndarray, shape: Shape) -> np.ndarray:
    """Points ``[P, 2]`` of the unit circle stretched, turned, scaled and moved to where the shape is."""
    wider = math.sqrt(shape.stretch)
    cos, sin = math.cos(shape.angle), math.sin(shape.angle)
    turned = points * np.array([wider, 1 / wider]) @ np.array([[cos, sin], [-sin, cos]])
    return np.asarray(shape.radius * turned + np.array([shape.cx, shape.cy]))


def mask_of(shape: Shape, size: int) -> np.ndarray:
    """Where a shape is: bool ``[FINER * size, FINER * size]``."""
    return polygon(outline(shape), size)


def polygon(points: np.ndarray, size: int) -> np.ndarray:
    """The mask of a closed line ``[P, 2]`` in pixels."""
    mask = np.zeros((FINER * size, FINER * size), dtype=np.uint8)
    cv2.fillPoly(mask, [np.round(points * FINER - 0.5).astype(np.int32)], 1)
    return mask.astype(bool)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a mask, xyxy in pixels of the image (a mask's pixels are `FINER` times smaller)."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return columns[0] / FINER, rows[0] / FINER, (columns[-1] + 1) / FINER, (rows[-1] + 1) / FINER


def star_points(inner: float) -> np.ndarray:
    """Five points at radius 1, five notches between them."""
    angles = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def regular(corners: int, radius: float = 1.0) -> np.ndarray:
    angles = np.arange(corners) * 2 * math.pi / corners
    return np.asarray(radius * np.stack([np.sin(angles), -np.cos(angles)], axis=1))


ARM = 0.3  # half the width of the cross's arms
# fmt: off
CROSS = [[-ARM, -1], [ARM, -1], [ARM, -ARM], [1, -ARM], [1, ARM], [ARM, ARM],
         [ARM, 1], [-ARM, 1], [-ARM, ARM], [-1, ARM], [-1, -ARM], [-ARM, -ARM]]
# fmt: on
OUTLINES: dict[str, np.ndarray] = {
    "circle": regular(96, 0.85),
    "square": regular(4),
    "triangle": regular(3, 1.05),
    "star": star_points(0.45),
    "cross": np.array(CROSS) * 0.95,
}


# --- surfaces -------------------------------------------------------------------------------------------------------


def fill(image: np.ndarray, mask: np.ndarray, paint: Paint) -> np.ndarray:
    """The image with a mask painted; edges are smooth, for the mask is finer."""
    left, top, right, bottom = box_of(mask)
    x1, y1, x2, y2 = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
    part = mask[y1 * FINER : y2 * FINER, x1 * FINER : x2 * FINER].astype(np.float32)
    alpha = cv2.resize(part, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA)[:, :, None]
    painted = image.copy()
    painted[y1:y2, x1:x2] = np.round(alpha * surface(paint, x2 - x1, y2 - y1) + (1 - alpha) * image[y1:y2, x1:x2])
    return painted


def paint_for(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Paint:
    """A random paint that stands out from what it will cover."""
    below = image[mask[::FINER, ::FINER]]
    mean = below.mean(axis=0) if len(below) else np.full(3, 128.0)
    colour = rng.uniform(20, 235, 3)
    while np.abs(colour - mean).mean() < STANDS_OUT:
        colour = rng.uniform(20, 235, 3)
    near = (colour + rng.choice([-1, 1]) * rng.uniform(10, 32) + rng.uniform(-8, 8, 3)).clip(0, 255)
    return Paint(int(rng.integers(len(WAVES))), (colour, near), rng.uniform(4, 16), rng.uniform(0, math.pi))


def surface(paint: Paint, width: int, height: int) -> np.ndarray:
    """A painted surface ``[height, width, 3]`` float; its pattern starts in the middle, and so moves with a shape."""
    y, x = np.ogrid[:height, :width]
    x, y = x - width / 2, y - height / 2
    u = (x * math.cos(paint.angle) + y * math.sin(paint.angle)) * 2 * math.pi / paint.period
    v = (y * math.cos(paint.angle) - x * math.sin(paint.angle)) * 2 * math.pi / paint.period
    blend = WAVES[paint.texture](u, v)[:, :, None]
    return np.asarray(blend * paint.colours[0] + (1 - blend) * paint.colours[1])


# each takes two phases in radians and gives a blend from 0 to 1
WAVES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.ones(u.shape),  # plain
    lambda u, v: (np.sin(u) > 0).astype(np.float64),  # stripes
    lambda u, v: (np.sin(u) * np.sin(v) > 0).astype(np.float64),  # checks
    lambda u, v: (np.sin(u) + np.sin(v) < 0.9).astype(np.float64),  # dots
    lambda u, v: 0.5 + 0.5 * np.sin(u / 6),  # a slow wave
)


def background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient, clouds, lines, and a few things that are no objects; ``[size, size, 3]`` uint8 RGB."""
    y, x = (axis / size - 0.5 for axis in np.ogrid[:size, :size])
    angle = rng.uniform(0, 2 * math.pi)
    blend = (0.5 + 0.7 * (x * math.cos(angle) + y * math.sin(angle))).clip(0, 1)[:, :, None]
    colours = rng.uniform(20, 235, (2, 3))
    cells = int(rng.integers(4, 24))
    coarse = rng.normal(0, rng.uniform(5, 20), (cells, cells, 3))
    clouds = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    image: np.ndarray = (blend * colours[0] + (1 - blend) * colours[1] + clouds).clip(0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 12)):
        (x1, y1), (x2, y2) = rng.integers(0, size, (2, 2)).tolist()
        colour = rng.integers(0, 256, 3).tolist()
        cv2.line(image, (x1, y1), (x2, y2), colour, int(rng.integers(1, 4)), cv2.LINE_AA)
    for _ in range(rng.integers(0, 4)):
        mask = CLUTTER[int(rng.integers(len(CLUTTER)))](size, rng)
        if mask.any():
            image = fill(image, mask, paint_for(image, mask, rng))
    return image


def half_moon(size: int, rng: np.random.Generator) -> np.ndarray:
    """A disc without a second disc beside its middle."""
    disc = random_shape(size, rng, NAMES.index("circle"))
    away = rng.uniform(0, 2 * math.pi)
    shift = disc.radius * rng.uniform(0.35, 0.6)
    other = Shape(disc.label, disc.cx + shift * math.cos(away), disc.cy + shift * math.sin(away), disc.radius, 0, 1)
    return np.asarray(mask_of(disc, size) & ~mask_of(other, size))


def long_ellipse(size: int, rng: np.random.Generator) -> np.ndarray:
    disc = random_shape(size, rng, NAMES.index("circle"))
    return mask_of(Shape(disc.label, disc.cx, disc.cy, disc.radius, disc.angle, rng.uniform(3, 6)), size)


def bar(size: int, rng: np.random.Generator) -> np.ndarray:
    square = random_shape(size, rng, NAMES.index("square"))
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array([1, rng.uniform(0.1, 0.25)])
    return polygon(placed(corners, square), size)


def scribble(size: int, rng: np.random.Generator) -> np.ndarray:
    """A thick line along a random walk."""
    steps = rng.normal(0, size / 14, (12, 2)).cumsum(axis=0) + rng.uniform(0, size, 2)
    mask = np.zeros((FINER * size, FINER * size), dtype=np.uint8)
    cv2.polylines(mask, [np.round(steps * FINER).astype(np.int32)], False, 1, FINER * int(rng.integers(2, 6)))
    return mask.astype(bool)


CLUTTER: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (half_moon, long_ellipse, bar, scribble)
