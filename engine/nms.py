"""Non-maximum suppression: of boxes that overlap, the best one stays.

The result is that of the plain greedy algorithm in double precision, cut at ``max_det``: one box after the other by
falling score, ties by index. Boxes are looked at some hundred at once, and no more of them than it takes to keep
``max_det``, so neither time nor memory grows with the square of the candidates. This part is numpy's on any device: it
is hundreds of small steps, and each would be a launch on a GPU.
"""

# Shape letters: M candidate boxes, C classes, K kept boxes, B boxes of a block, P pairs, 4 = x1 y1 x2 y2 in pixels.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data.structures import Detections

BLOCK = 256  # boxes looked at together
FIRST = 2048  # candidates that are sorted at once; the rest is sorted only where these were not enough
TOP_K = 30_000


@dataclass(frozen=True)
class Suppression:
    """What detections go by: scores above `conf` count, boxes that overlap by more than `iou` are one object, and an
    image has `max_det` at most.
    """

    conf: float
    iou: float
    max_det: int


USUAL = Suppression(conf=0.25, iou=0.45, max_det=300)  # what a user of detect.py sees, as in yolov5


class Suppresses(Protocol):
    """A network, or an exported file: whether the boxes that it decodes need suppression."""

    @property
    def suppresses(self) -> bool: ...


def iou_for(network: Suppresses, iou: float) -> float:
    """The threshold, or 1, which lets every box stay, where a network says an object once and needs no suppression."""
    return iou if network.suppresses else 1.0


def suppress(
    boxes_M4: np.ndarray, scores_M: np.ndarray, labels_M: np.ndarray | None, *, iou: float, max_det: int
) -> np.ndarray:
    """Indices ``[K]`` of the boxes that stay, best first, at most ``max_det``.

    A box goes when a better one that stays overlaps it by more than ``iou``; with ``labels_M`` given, only boxes of
    one label push each other out. Of equal scores the first is the better one. Coordinates are finite.
    """
    boxes = boxes_M4.astype(np.float64)  # or a pair within 1e-7 of the threshold would fall to the wrong side
    apart = boxes.copy()  # labels side by side: where these touch in x, so do the boxes, and the labels are the same
    if labels_M is not None and len(boxes):
        apart[:, ::2] += (labels_M * (np.ptp(boxes[:, ::2]) * 1.5 + 1.0))[:, None]
    # Half as wide, so twice as fast to compare. Rounding keeps the order: what touches, touches afterwards too.
    left, top, right, bottom = np.ascontiguousarray(apart.T, dtype=np.float32)

    def covering(better_N: np.ndarray, others_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in both ``[P]`` of all pairs that overlap by more than ``iou`` and are of one label."""
        near_NB = left[better_N, None] <= right[others_B]
        near_NB &= right[better_N, None] >= left[others_B]
        near_NB &= top[better_N, None] <= bottom[others_B]
        near_NB &= bottom[better_N, None] >= top[others_B]
        first_P, second_P = np.divmod(np.flatnonzero(near_NB), max(len(others_B), 1))
        over_P = paired_iou(boxes[better_N[first_P]], boxes[others_B[second_P]]) > iou
        if labels_M is not None:
            over_P &= labels_M[better_N[first_P]] == labels_M[others_B[second_P]]
        return first_P[over_P], second_P[over_P]

    kept_K = np.zeros(0, dtype=np.int64)
    for block_B in falling(scores_M):
        free_B = np.ones(len(block_B), dtype=bool)
        free_B[covering(kept_K, block_B)[1]] = False
        block_B = block_B[free_B]
        kept_K = np.concatenate([kept_K, block_B[stays(*covering(block_B, block_B), len(block_B))]])
        if len(kept_K) >= max_det:
            break
    return kept_K[:max_det]


def paired_iou(boxes_P4: np.ndarray, others_P4: np.ndarray) -> np.ndarray:
    """Intersection over union of each box with its partner, ``[P]``; 0 where they share no area."""
    sides_P2 = np.minimum(boxes_P4[:, 2:], others_P4[:, 2:]) - np.maximum(boxes_P4[:, :2], others_P4[:, :2])
    shared_P = sides_P2[:, 0].clip(0) * sides_P2[:, 1].clip(0)
    areas = [(y[:, 2] - y[:, 0]).clip(0) * (y[:, 3] - y[:, 1]).clip(0) for y in (boxes_P4, others_P4)]
    return np.divide(shared_P, areas[0] + areas[1] - shared_P, out=np.zeros_like(shared_P), where=shared_P > 0)


def stays(first_P: np.ndarray, second_P: np.ndarray, count: int) -> np.ndarray:
    """Which of ``count`` boxes stay, ``[B]`` bool: those that no box before them covers that stays itself.

    The pairs say which box covers which. First all stay; then whoever is covered by one that stays goes, until nothing
    changes. Each round settles at least one more box for good, so the end is exactly what one box after the other
    would give.
    """
    before_P = first_P < second_P
    first_P, second_P = first_P[before_P], second_P[before_P]
    stays_B = np.ones(count, dtype=bool)
    while True:
        now_B = np.ones(count, dtype=bool)
        now_B[second_P[stays_B[first_P]]] = False
        if np.array_equal(now_B, stays_B):
            return stays_B
        stays_B = now_B


def falling(scores_M: np.ndarray) -> Iterator[np.ndarray]:
    """Indices by falling score, equal scores by index, some at a time: mostly nobody asks for more than the first."""
    parts = [np.ones(len(scores_M), dtype=bool)]
    if len(scores_M) > 2 * FIRST:
        high_M = best(scores_M, FIRST)
        parts = [high_M, ~high_M]
    for part_M in parts:
        index = np.flatnonzero(part_M)
        index = index[np.argsort(-scores_M[index], kind="stable")]
        yield from (index[at : at + BLOCK] for at in range(0, len(index), BLOCK))


def best(scores_M: np.ndarray, count: int) -> np.ndarray:
    """Marks the ``count`` best scores, ``[M]`` bool; of equal scores the first ones. There must be so many."""
    place = len(scores_M) - count
    bar = np.partition(scores_M, place)[place]
    best_M = scores_M > bar
    tied = np.flatnonzero(scores_M == bar)
    best_M[tied[: count - int(best_M.sum())]] = True
    return best_M


def places(mask_M: Tensor) -> Tensor:
    """The indices at which a flat mask is true, rising."""
    if mask_M.is_cpu:  # some five times as fast as nonzero
        return torch.from_numpy(np.flatnonzero(mask_M.numpy()))
    return mask_M.nonzero().flatten()


@torch.no_grad()
def nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    conf: float,
    iou: float,
    max_det: int = 300,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
    multi_label: bool,
    top_k: int = TOP_K,
) -> Detections:
    """What one image holds, best first: boxes ``[M, 4]`` and scores ``[M, C]`` in, at most ``max_det`` boxes out.

    Only scores above ``conf`` count. ``multi_label`` lets a box stand for each class that reaches it (as COCO's
    metric likes it), otherwise for its best class only. ``classes`` keeps these classes alone, before anything is
    compared. ``agnostic`` lets boxes of different classes push each other out. Of more than ``top_k`` candidates the
    best are looked at. Equal scores keep the order of the boxes, then of the classes. Boxes without area, and boxes
    or scores that are not finite, are never kept.
    """
    boxes_M4, scores_MC = boxes.detach().float(), scores.detach().float()
    if classes is not None:
        wanted = torch.tensor(sorted(set(classes)), dtype=torch.int64, device=scores.device)
        scores_MC = scores_MC[:, wanted]
    sound_M = boxes_M4.isfinite().all(dim=1) & (boxes_M4[:, 2:] > boxes_M4[:, :2]).all(dim=1)
    if not sound_M.all():
        boxes_M4, scores_MC = boxes_M4[sound_M], scores_MC[sound_M]
    if not scores_MC.numel():
        return Detections(boxes_M4[:0], scores_MC.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=boxes.device))

    # Millions of scores, so few passes over all of them: what is rare is looked for among the candidates.
    if multi_label:
        flat = scores_MC.flatten()
        index = places(flat > conf)
        score = flat[index]
        if not score.isfinite().all():
            index, score = index[score.isfinite()], score[score.isfinite()]
    else:
        score, label_M = scores_MC.max(dim=1)
        if not score.isfinite().all():  # one that is not finite hides the others of its box
            score, label_M = scores_MC.masked_fill(~scores_MC.isfinite(), -torch.inf).max(dim=1)
        box = places(score > conf)
        index, score = box * scores_MC.shape[1] + label_M[box], score[box]
    if len(score) > top_k:
        candidates = places(torch.from_numpy(best(score.cpu().numpy(), top_k)).to(score.device))
        index, score = index[candidates], score[candidates]
    candidate_boxes, labels = boxes_M4[index // scores_MC.shape[1]], index % scores_MC.shape[1]

    compared = None if agnostic else labels.cpu().numpy()
    kept_K = suppress(candidate_boxes.cpu().numpy(), score.cpu().numpy(), compared, iou=iou, max_det=max_det)
    kept = torch.from_numpy(kept_K).to(labels.device)
    labels = labels[kept] if classes is None else wanted[labels[kept]]
    return Detections(candidate_boxes[kept], score[kept], labels)
