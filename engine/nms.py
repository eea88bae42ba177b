"""Non-maximum suppression: of boxes that overlap, the best one stays.

Boxes are walked by falling score in blocks, so the work ends as soon as ``max_det`` boxes are kept; the result is
that of the plain greedy algorithm cut at ``max_det``. Labels are compared as labels: adding ``label * 4096`` to the
boxes, as is often done, rounds their last bits away in float32.
"""

# Shape letters: M candidate boxes, C classes, K kept boxes, B boxes of a block, 4 = x1 y1 x2 y2 in pixels.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.structures import Detections

BLOCK = 512
TOP_K = 30_000


def pairwise_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Intersection over union of every pair, ``[N, M]`` in [0, 1]. Boxes without area have IoU 0 with everything."""
    lt_NM2 = torch.maximum(boxes_N4[:, None, :2], others_M4[:, :2])
    rb_NM2 = torch.minimum(boxes_N4[:, None, 2:], others_M4[:, 2:])
    sides_NM2 = (rb_NM2 - lt_NM2).clamp(min=0)
    overlap_NM = sides_NM2[..., 0] * sides_NM2[..., 1]
    area_N = (boxes_N4[:, 2:] - boxes_N4[:, :2]).clamp(min=0).prod(dim=-1)
    area_M = (others_M4[:, 2:] - others_M4[:, :2]).clamp(min=0).prod(dim=-1)
    union_NM = area_N[:, None] + area_M - overlap_NM
    return torch.where(overlap_NM > 0, overlap_NM / union_NM, 0.0)


def greedy(boxes_M4: Tensor, labels_M: Tensor | None, *, iou: float, max_det: int) -> Tensor:
    """Indices ``[K]``, rising, of the boxes that stay; boxes come sorted, best first.

    A box goes when it overlaps a kept box before it by more than ``iou``; with ``labels_M`` given, only boxes of one
    label push each other out.
    """

    def overlapping(these: Tensor, those: Tensor) -> Tensor:
        over = pairwise_iou(boxes_M4[these], boxes_M4[those]) > iou
        return over if labels_M is None else over & (labels_M[these][:, None] == labels_M[those])

    indices_M = torch.arange(len(boxes_M4), device=boxes_M4.device)
    kept_K = indices_M[:0]
    for block_B in indices_M.split(BLOCK):
        if len(kept_K) >= max_det:
            break
        if len(kept_K):
            block_B = block_B[~overlapping(block_B, kept_K).any(dim=1)]
        # Inside the block: drop what any kept box before it covers, until nothing changes. Each round settles at
        # least one more box for good, so the end is exactly what one box after the other would give.
        pushes_BB = overlapping(block_B, block_B).triu(diagonal=1).float()
        keep_B = torch.ones_like(block_B, dtype=torch.bool)
        while True:
            now_B = (keep_B.float() @ pushes_BB) == 0
            if torch.equal(now_B, keep_B):
                break
            keep_B = now_B
        kept_K = torch.cat([kept_K, block_B[keep_B]])
    return kept_K[:max_det]


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
    boxes_M4, scores_MC = boxes.float(), scores.float()
    finite_M = boxes_M4.isfinite().all(dim=1) & (boxes_M4[:, 2:] > boxes_M4[:, :2]).all(dim=1)
    allowed_MC = (scores_MC > conf) & scores_MC.isfinite() & finite_M[:, None]
    if classes is not None:
        wanted_C = torch.zeros(scores_MC.shape[1], dtype=torch.bool, device=scores_MC.device)
        wanted_C[list(classes)] = True
        allowed_MC &= wanted_C
    if multi_label:
        box_index, labels = allowed_MC.nonzero(as_tuple=True)
    else:
        best_M, label_M = scores_MC.masked_fill(~allowed_MC, -torch.inf).max(dim=1)
        box_index = (best_M > -torch.inf).nonzero().flatten()
        labels = label_M[box_index]
    score = scores_MC[box_index, labels]

    if len(score) > top_k:  # topk leaves the order of equal scores open, so it only gives the bar
        enough = score >= score.topk(top_k).values[-1]
        box_index, labels, score = box_index[enough], labels[enough], score[enough]
    order = score.argsort(descending=True, stable=True)[:top_k]
    box_index, labels, score = box_index[order], labels[order], score[order]

    kept = greedy(boxes_M4[box_index], None if agnostic else labels, iou=iou, max_det=max_det)
    return Detections(boxes_M4[box_index][kept], score[kept], labels[kept])
