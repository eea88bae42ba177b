"""Arithmetic on boxes. Shape letters: N boxes, M other boxes, 4 = x1 y1 x2 y2."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pairwise_iou(boxes_N4: Tensor, others_M4: Tensor) -> Tensor:
    """Intersection over union of every pair, ``[N, M]`` in [0, 1]. Boxes without area have IoU 0 with everything."""
    left_N1, top_N1, right_N1, bottom_N1 = boxes_N4.T[:, :, None]
    left_M, top_M, right_M, bottom_M = others_M4.T
    overlap_NM = (torch.minimum(right_N1, right_M) - torch.maximum(left_N1, left_M)).clamp_(min=0)
    overlap_NM *= (torch.minimum(bottom_N1, bottom_M) - torch.maximum(top_N1, top_M)).clamp_(min=0)
    area_N1 = (right_N1 - left_N1).clamp(min=0) * (bottom_N1 - top_N1).clamp(min=0)
    area_M = (right_M - left_M).clamp(min=0) * (bottom_M - top_M).clamp(min=0)
    union_NM = area_N1 + area_M - overlap_NM
    return torch.where(overlap_NM > 0, overlap_NM / union_NM, 0.0)


def complete_iou(boxes_N4: Tensor, others_N4: Tensor, eps: float = 1e-7) -> tuple[Tensor, Tensor]:
    """IoU and complete IoU, row by row, ``[N]`` each (Zheng et al., arXiv 1911.08287, eq. 8-11).

    ``CIoU = IoU - d^2 / c^2 - alpha v``: d is the distance of the centres, c the diagonal of the smallest box around
    both, v the difference of the aspect angles. IoU lies in [0, 1], CIoU in (-1.5, 1]; boxes without area have IoU 0.
    """
    (x1, y1, x2, y2), (u1, v1, u2, v2) = boxes_N4.unbind(-1), others_N4.unbind(-1)
    w, h, o_w, o_h = x2 - x1, y2 - y1, u2 - u1, v2 - v1
    overlap = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp(min=0)
    overlap = overlap * (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp(min=0)
    iou = overlap / (w * h + o_w * o_h - overlap + eps)
    hull_w = torch.maximum(x2, u2) - torch.minimum(x1, u1)
    hull_h = torch.maximum(y2, v2) - torch.minimum(y1, v1)
    diagonal = hull_w**2 + hull_h**2 + eps
    distance = ((u1 + u2 - x1 - x2) ** 2 + (v1 + v2 - y1 - y2) ** 2) / 4
    v = (4 / math.pi**2) * (torch.atan(o_w / (o_h + eps)) - torch.atan(w / (h + eps))) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + 1 + eps)
    return iou, iou - distance / diagonal - alpha * v


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """``[..., 4]`` centre and size to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def cells(height: int, width: int, like: Tensor) -> Tensor:
    """Column and row of every cell of a map ``[H, W, 2]``, with the type and on the device of `like`."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)


def cells_of_levels(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of maps ``[N, H, W, ...]``: column and row of every cell of all levels ``[P, 2]``, and its stride ``[P, 1]``."""
    places = [cells(level.shape[1], level.shape[2], level).flatten(0, 1) for level in maps]
    of_cells = [torch.full_like(place[:, :1], stride) for place, stride in zip(places, strides, strict=True)]
    return torch.cat(places), torch.cat(of_cells)
