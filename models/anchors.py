"""Anchors fitted to the boxes that a network is to find, and stored in its YAML from then on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.structures import Fault
from models.heads.yolo import LARGEST_RATIO
from models.spec import ModelSpec


def needs_anchors(spec: ModelSpec) -> bool:
    """Whether the file only says how many anchors a level has: ``anchors: 4``."""
    return isinstance(spec.anchors, int)


def with_anchors(spec: ModelSpec, anchors: tuple[tuple[float, ...], ...]) -> ModelSpec:
    return replace(spec, anchors=anchors)


def fit_anchors(
    boxes_wh: np.ndarray, levels: int, per_level: int, rng: np.random.Generator, rounds: int = 300
) -> tuple[tuple[float, ...], ...]:
    """Anchors ``w, h, w, h, ...`` for every level, smallest first, from box sizes ``[M, 2]`` in pixels of the input.

    k-means on the logarithm of width and height, since a head can stretch an anchor by a factor, not by pixels.
    Raises `Fault` without boxes.
    """
    sizes = np.asarray(boxes_wh, dtype=np.float64)
    sizes = sizes[(sizes > 1).all(axis=1)]
    if not len(sizes):
        raise Fault("anchors cannot be fitted: the training images have no box larger than a pixel")
    points = np.log(sizes)
    count = levels * per_level
    # k-means++ start: each new centre is drawn by its squared distance from those there already
    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < count:
        distance = ((points[:, None] - centres[None]) ** 2).sum(-1).min(axis=1)
        if distance.sum() == 0:  # fewer different sizes than anchors: spread copies around them
            extra = points[rng.integers(len(points), size=count - len(centres))]
            centres = np.concatenate([centres, extra + rng.normal(0, 0.2, (len(extra), 2))])
            break
        centres = np.concatenate([centres, points[rng.choice(len(points), size=1, p=distance / distance.sum())]])
    for _ in range(rounds):
        nearest = ((points[:, None] - centres[None]) ** 2).sum(-1).argmin(axis=1)
        moved = np.array(
            [points[nearest == k].mean(axis=0) if (nearest == k).any() else centres[k] for k in range(count)]
        )
        if np.allclose(moved, centres):
            break
        centres = moved
    anchors = np.exp(centres[np.argsort(centres.sum(axis=1))]).round(1)
    return tuple(tuple(float(value) for value in level.reshape(-1)) for level in anchors.reshape(levels, per_level, 2))


def best_possible_recall(
    boxes_wh: np.ndarray, anchors: tuple[tuple[float, ...], ...], largest_ratio: float = LARGEST_RATIO
) -> float:
    """The share of boxes that some anchor may answer for: under `largest_ratio` times off in width and in height."""
    flat = np.array(anchors).reshape(-1, 2)
    ratio = np.asarray(boxes_wh)[:, None] / flat[None]
    worst = np.maximum(ratio, 1 / ratio.clip(1e-9)).max(axis=-1)
    return float((worst.min(axis=1) < largest_ratio).mean()) if len(boxes_wh) else float("nan")
