"""The anchor-free head of YOLOX (Ge et al., arXiv 2107.08430): forward, loss and decode together.

Every cell answers with one box: where its middle is, counted in cells from the cell's own corner, the logarithm of its
size, whether there is anything at all, and the class. Classes and boxes have convolutions of their own ("decoupled").
Who answers for a truth is asked of the predictions themselves: those that would cost least, and as many as overlap it
("SimOTA", section 2.1 there; a simpler form of OTA, arXiv 2103.14259).

Shape letters: N images, H W cells of a level, P cells of all levels, C classes, K = 4 + 1 + C, T truths of one image,
F cells that are asked for them, M cells of the batch that answer for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.boxes import cells_of_levels, cxcywh_to_xyxy, pairwise_iou
from models.ops.conv import Conv
from models.ops.merge import no_margin
from models.ops.primitives import DEFAULT, PlainAct
from models.ops.yolox import SeparableConv
from models.registry import Shape, register_op

BOX, OBJECTNESS, CLASS, DISTANCE = 5.0, 1.0, 1.0, 1.0  # gains of YOLOX
PRIOR = 0.01  # what a new head says of every class and cell (RetinaNet, arXiv 1708.02002, section 4.1)
RADIUS = 1.5  # cells of a level that a cell may be away from a truth's middle
IOU_COST = 3.0  # lambda of equation (1): how much the box counts in a cost, the class being 1
MOST_CELLS = 10  # that answer for a truth
LARGEST_LOG = 10.0  # of a box's side to its cell's, so that its exponential stays a number
SMALLEST = 1e-8  # what logarithms are taken of instead of 0


def yolox_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=yolox_shape, many=True)
class YOLOXHead(nn.Module):
    """Boxes, objectness and classes from one prediction a cell, classes and boxes by convolutions of their own.

    Hidden channels are those of the first level, as in every YOLOX. With `separable` the 3x3 convolutions are
    `SeparableConv`, as in YOLOX-Nano. `options` are the gains that its loss goes by.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, H_i, W_i, K], ...]``, logits: x y w h, objectness, classes.
    """

    # Set by who trains: the last epochs see neither mosaics nor blends, and their loss also has the distance of the
    # box's numbers from the truth's (L1).
    calm: bool = False

    def __init__(
        self, inputs: Sequence[Shape], num_classes: int, separable: bool = False, *, act: PlainAct = DEFAULT
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = {"box": BOX, "obj": OBJECTNESS, "cls": CLASS}
        self.strides = tuple(shape.stride for shape in inputs)
        hidden = inputs[0].channels
        block = SeparableConv if separable else Conv

        def branch() -> nn.ModuleList:
            pairs = ((block(hidden, hidden, 3, act=act), block(hidden, hidden, 3, act=act)) for _ in inputs)
            return nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

        def last(c_out: int, prior: float | None) -> nn.ModuleList:
            convolutions = [nn.Conv2d(hidden, c_out, 1) for _ in inputs]
            for convolution in convolutions:
                if prior is not None and convolution.bias is not None:
                    nn.init.constant_(convolution.bias, math.log(prior / (1 - prior)))
            return nn.ModuleList(convolutions)

        self.stems = nn.ModuleList(Conv(shape.channels, hidden, 1, act=act) for shape in inputs)
        self.cls_convs, self.reg_convs = branch(), branch()
        self.cls_preds, self.reg_preds, self.obj_preds = last(num_classes, PRIOR), last(4, None), last(1, PRIOR)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for level, x in enumerate(maps):
            x = self.stems[level](x)
            classes, box = self.cls_convs[level](x), self.reg_convs[level](x)
            y = (self.reg_preds[level](box), self.obj_preds[level](box), self.cls_preds[level](classes))
            outputs.append(torch.cat(y, dim=1).permute(0, 2, 3, 1).contiguous())
        return outputs

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, P, 4]`` in pixels of the input and class scores ``[N, P, C]`` in [0, 1]."""
        y_NPK = flat(outputs)
        corners_P2, strides_P1 = cells_of_levels(outputs, self.strides)
        scores = y_NPK[..., 4:5].sigmoid() * y_NPK[..., 5:].sigmoid()
        return boxes_of(y_NPK[..., :4], corners_P2, strides_P1), scores

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch over the number of cells that answer for a truth, at least 1, and its parts.

        ``5 (1 - IoU^2)`` of the boxes, BCE of the classes (the target is the IoU) where a cell answers for a truth, BCE
        of objectness everywhere; where it is `calm`, the L1 distance of the four numbers as well, else 0.
        """
        y_NPK = flat(outputs)
        corners_P2, strides_P1 = cells_of_levels(outputs, self.strides)
        boxes_NP4 = boxes_of(y_NPK[..., :4], corners_P2, strides_P1)
        image, cell, found, iou_M = self.assign(boxes_NP4, y_NPK[..., 4:], corners_P2, strides_P1, targets)
        n = max(len(found), 1)
        mine_MK, truth_M4 = y_NPK[image, cell], targets.boxes[found].to(boxes_NP4)

        box = self.options["box"] * (1 - row_iou(boxes_NP4[image, cell], truth_M4) ** 2).sum() / n
        there_NP = torch.zeros_like(y_NPK[..., 4])
        there_NP[image, cell] = 1.0
        objectness = F.binary_cross_entropy_with_logits(y_NPK[..., 4], there_NP, reduction="sum")
        objectness = self.options["obj"] * objectness / n
        goal_MC = F.one_hot(targets.labels[found], self.num_classes).to(iou_M) * iou_M[:, None]
        classes = F.binary_cross_entropy_with_logits(mine_MK[:, 5:], goal_MC, reduction="sum")
        classes = self.options["cls"] * classes / n
        distance = box.new_zeros(())
        if self.calm:
            wanted_M4 = numbers_of(truth_M4, corners_P2[cell], strides_P1[cell])
            distance = DISTANCE * (mine_MK[:, :4] - wanted_M4).abs().sum() / n
        parts = {"box": box, "obj": objectness, "cls": classes, "l1": distance}
        return box + objectness + classes + distance, {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def assign(
        self, boxes_NP4: Tensor, logits_NPC: Tensor, corners_P2: Tensor, strides_P1: Tensor, targets: Targets
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which cells answer for what: image, cell, index of the truth and IoU of box and truth, ``[M]`` each.

        `logits_NPC` has objectness before the classes. A truth without area has nobody.
        """
        alive_T = (targets.boxes[:, 2:] > targets.boxes[:, :2]).all(dim=1)
        image, cell, found, iou = [], [], [], []
        for number in range(len(boxes_NP4)):
            mine_T = ((targets.image_index == number) & alive_T).nonzero()[:, 0]
            truths_T4, labels_T = targets.boxes[mine_T].to(boxes_NP4), targets.labels[mine_T]
            middle_T2 = (truths_T4[:, :2] + truths_T4[:, 2:]) / 2
            away_TP = ((corners_P2 + 0.5) * strides_P1 - middle_T2[:, None]).abs().amax(dim=-1)
            near_TP = away_TP < RADIUS * strides_P1[:, 0]
            asked_F = near_TP.any(dim=0).nonzero()[:, 0]
            iou_TF = pairwise_iou(truths_T4, boxes_NP4[number, asked_F])
            cost_TF = class_cost(logits_NPC[number, asked_F], labels_T) - IOU_COST * (iou_TF + SMALLEST).log()
            truth_F = matched(cost_TF.masked_fill(~near_TP[:, asked_F], math.inf), iou_TF)
            answers = (truth_F >= 0).nonzero()[:, 0]
            image.append(torch.full_like(answers, number))
            cell.append(asked_F[answers])
            found.append(mine_T[truth_F[answers]])
            iou.append(iou_TF[truth_F[answers], answers])
        return torch.cat(image), torch.cat(cell), torch.cat(found), torch.cat(iou)


def flat(outputs: Sequence[Tensor]) -> Tensor:
    """All levels behind each other, ``[N, P, K]``."""
    return torch.cat([level.flatten(1, 2) for level in outputs], dim=1)


def boxes_of(numbers: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
    """Boxes ``[..., 4]`` xyxy in pixels of a cell's four numbers: ``(x + column) s, (y + row) s, e^w s, e^h s``."""
    size = numbers[..., 2:].clamp(max=LARGEST_LOG).exp() * strides
    return cxcywh_to_xyxy(torch.cat(((numbers[..., :2] + corners) * strides, size), dim=-1))


def numbers_of(boxes: Tensor, corners: Tensor, strides: Tensor) -> Tensor:
    """The inverse of `boxes_of`."""
    middle, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return torch.cat((middle / strides - corners, (size / strides + SMALLEST).log()), dim=-1)


def row_iou(boxes_M4: Tensor, others_M4: Tensor) -> Tensor:
    """IoU row by row, ``[M]`` in [0, 1]."""
    size = torch.minimum(boxes_M4[:, 2:], others_M4[:, 2:]) - torch.maximum(boxes_M4[:, :2], others_M4[:, :2])
    overlap = size.clamp(min=0).prod(dim=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (boxes_M4, others_M4)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-16)


def class_cost(logits_FC: Tensor, labels_T: Tensor) -> Tensor:
    """What cell f's classes would cost if it answered for truth t, ``[T, F]``: their BCE against the truth's class.

    The score of a class is ``sqrt(p(class) p(object))``; logarithms end at -100, as torch's BCE has it. `logits_FC` has
    objectness before the classes.
    """
    score_FC = (logits_FC[:, 1:].sigmoid() * logits_FC[:, :1].sigmoid()).sqrt()
    yes, no = score_FC.log().clamp(min=-100), (1 - score_FC).log().clamp(min=-100)
    return (no - yes)[:, labels_T].T - no.sum(dim=1)


def matched(cost_TF: Tensor, iou_TF: Tensor) -> Tensor:
    """The truth of every asked cell, ``[F]``, or -1. A cost is infinite where the cell is too far from the truth.

    A truth takes k of its cells, those of least cost: k is the sum of its ten largest overlaps with any asked cell,
    rounded down, at least 1. A cell that several truths take answers for the one for which it costs least.
    """
    truths, asked = cost_TF.shape
    nobody = torch.full((asked,), -1, device=cost_TF.device)
    if not truths or not asked:
        return nobody
    most = min(MOST_CELLS, asked)
    k_T1 = iou_TF.topk(most, dim=1).values.sum(dim=1, keepdim=True).int().clamp(min=1)
    cost, cell = cost_TF.topk(most, dim=1, largest=False)
    rank = torch.arange(most, device=cost.device)
    taken_TF = torch.zeros_like(cost_TF, dtype=torch.bool)
    taken_TF.scatter_(1, cell, (rank < k_T1) & cost.isfinite())
    takers_F = taken_TF.sum(dim=0)
    truth_F = torch.where(takers_F > 1, cost_TF.argmin(dim=0), taken_TF.int().argmax(dim=0))
    return torch.where(takers_F > 0, truth_F, nobody)
