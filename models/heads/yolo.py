"""The anchor head of YOLOv3 to v7: forward, loss and decode together.

Decode and assignment are those of YOLOv4/v5: a cell's box centre may move half a cell over its edge, sizes are at most
four times the anchor, and an anchor answers for every box of nearly its size, in the cell of the box's centre and in
its two nearest neighbours. YOLOR added what a head knows without looking (`IDetect`; Wang et al., arXiv 2105.04206),
YOLOv7 a second set of maps that only helps in training (`IAuxDetect`; arXiv 2207.02696).

Shape letters: N images, A anchors a level, H W cells, K = 5 + classes, M boxes, P matched (cell, anchor, box) triples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.boxes import cells, complete_iou, cxcywh_to_xyxy
from models.ops.merge import no_margin
from models.registry import Shape, register_op
from models.spec import Anchors

LARGEST_RATIO = 2.5  # of a box to its anchor, in width and height. yolov5 has 4, as far as decode reaches; with anchors
# fitted to the boxes that makes every level answer for nearly every box, and a short run learns later
BOX, OBJECTNESS, CLASS = 0.05, 1.0, 0.5  # gains of yolov5, meant for 3 levels, 640 pixels and 80 classes
FEWEST_CLASSES = 4  # the class loss of fewer weighs as much as theirs
BALANCE = {3: (4.0, 1.0, 0.4)}  # objectness weight of a level, finest first; its cells are many and mostly empty
BALANCE_OTHER = (4.0, 1.0, 0.25, 0.06, 0.02)
SURE = 10.0  # logit of the class where there is one: its loss has nothing to train, and the score is the objectness
AUXILIARY = 0.25  # what the set of maps counts in YOLOv7's loss that is there for training alone
SPREAD = 0.02  # of what a head knows without looking, at the start


def detect_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    anchors = args["anchors"]
    no_margin(inputs)
    if len(inputs) > len(BALANCE_OTHER):
        raise ValueError(f"the head reads {len(inputs)} levels; its loss has weights for {len(BALANCE_OTHER)} at most")
    if not isinstance(anchors, int) and len(anchors) != len(inputs):
        raise ValueError(f"anchors are given for {len(anchors)} levels, but the head reads {len(inputs)}")
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=detect_shape, many=True)
class Detect(nn.Module):
    """Boxes, objectness and classes from anchors on every level.

    `options` are what its loss goes by, under yolov5's names: the gains, the largest ratio of a box to its anchor
    (``anchor_t``), and s of ``label_smoothing``: a class should score 1 - s / 2, all others s / 2.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, A, H_i, W_i, K], ...]``, logits.
    """

    sets = 1  # how many maps of every level the head reads
    anchors: Tensor  # [levels, A, 2] width and height in pixels; the YAML keeps them, not the state dict

    def __init__(self, inputs: Sequence[Shape], num_classes: int, anchors: Anchors) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.options = {"box": BOX, "obj": OBJECTNESS, "cls": CLASS, "anchor_t": LARGEST_RATIO, "label_smoothing": 0.0}
        self.strides = tuple(shape.stride for shape in inputs)
        self.fitted = not isinstance(anchors, int)
        self.num_anchors = anchors if isinstance(anchors, int) else len(anchors[0]) // 2
        sizes = torch.tensor([]) if isinstance(anchors, int) else torch.tensor(anchors).view(len(inputs), -1, 2)
        self.register_buffer("anchors", sizes, persistent=False)
        self.m = self.last(inputs)

    def last(self, inputs: Sequence[Shape]) -> nn.ModuleList:
        """The convolution of every level."""
        layers = [nn.Conv2d(shape.channels, self.num_anchors * (5 + self.num_classes), 1) for shape in inputs]
        for layer, shape in zip(layers, inputs, strict=True):
            assert layer.bias is not None
            with torch.no_grad():  # start near the truth: about 8 objects in an image of 640 pixels, 0.6 of a class
                bias = layer.bias.view(self.num_anchors, -1)
                bias[:, 4] += math.log(8 / (640 / shape.stride) ** 2)
                bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99)) if self.num_classes > 1 else SURE
        return nn.ModuleList(layers)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [self.by_anchor(layer(x)) for layer, x in zip(self.m, maps, strict=True)]

    def by_anchor(self, y: Tensor) -> Tensor:
        """``[N, A * K, H, W] -> [N, A, H, W, K]``"""
        n, _, height, width = y.shape
        return y.view(n, self.num_anchors, -1, height, width).permute(0, 1, 3, 4, 2).contiguous()

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, cells, 4]`` in pixels of the input and class scores ``[N, cells, classes]`` in [0, 1]."""
        boxes, scores = [], []
        for level, (logits, stride) in enumerate(zip(outputs, self.strides, strict=True)):
            n, _, height, width, _ = logits.shape
            y = logits.sigmoid()
            centre = (y[..., :2] * 2 - 0.5 + cells(height, width, y)) * stride
            size = (y[..., 2:4] * 2) ** 2 * self.anchors[level].to(y.dtype)[:, None, None]
            boxes.append(cxcywh_to_xyxy(torch.cat((centre, size), dim=-1)).reshape(n, -1, 4))
            scores.append((y[..., 4:5] * y[..., 5:]).reshape(n, -1, self.num_classes))
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its parts. CIoU + BCE objectness (target: the IoU reached) + BCE class."""
        return self.loss_of(outputs, targets)

    def loss_of(
        self, outputs: Sequence[Tensor], targets: Targets, coarse: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of one set of levels; see `assign` for `coarse`."""
        assert self.fitted, "anchors are fitted before training starts"
        zero = outputs[0].new_zeros(())
        box, objectness, classes = zero, zero, zero
        levels = len(outputs)
        balance = BALANCE.get(levels, BALANCE_OTHER)
        for level, logits in enumerate(outputs):
            goal = torch.zeros_like(logits[..., 4])
            image, anchor, row, column, found = self.assign(targets, level, logits.shape[2:4], coarse)
            if len(found):
                picked = logits[image, anchor, row, column]  # [P, K]
                stride = self.strides[level]
                centre = picked[:, :2].sigmoid() * 2 - 0.5 + torch.stack((column, row), dim=1)
                size = (picked[:, 2:4].sigmoid() * 2) ** 2 * self.anchors[level][anchor] / stride
                predicted = cxcywh_to_xyxy(torch.cat((centre, size), dim=1))
                iou, ciou = complete_iou(predicted, targets.boxes[found].to(predicted) / stride)
                box = box + (1 - ciou).mean()
                _, anchors, height, width = goal.shape
                cell = ((image * anchors + anchor) * height + row) * width + column
                goal.view(-1).scatter_reduce_(0, cell, iou.detach(), "amax")  # where boxes share a cell, the best stays
                if self.num_classes > 1:
                    truth = F.one_hot(targets.labels[found], self.num_classes).to(picked.dtype)
                    truth = truth * (1 - self.options["label_smoothing"]) + self.options["label_smoothing"] / 2
                    classes = classes + F.binary_cross_entropy_with_logits(picked[:, 5:], truth)
            objectness = objectness + balance[level] * F.binary_cross_entropy_with_logits(logits[..., 4], goal)
        # The gains belong to 3 levels, 80 classes and 640 pixels; fewer cells or classes weigh less.
        pixels = outputs[0].shape[2] * outputs[0].shape[3] * self.strides[0] ** 2
        share = 3 / levels
        box = box * self.options["box"] * share
        objectness = objectness * self.options["obj"] * share * pixels / 640**2
        classes = classes * self.options["cls"] * share * max(self.num_classes, FEWEST_CLASSES) / 80
        parts = {"box": box.detach(), "obj": objectness.detach(), "cls": classes.detach()}
        return box + objectness + classes, parts

    def assign(
        self, targets: Targets, level: int, grid: Sequence[int], coarse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Who answers for what on a level: image, anchor, row, column and the index of the box, ``[P]`` each.

        With `coarse` all four neighbours of a cell answer too, though two of them cannot reach the box's centre: those
        who help may be asked for more than they can give (arXiv 2207.02696, section 4.2).
        """
        height, width = int(grid[0]), int(grid[1])
        stride = self.strides[level]
        boxes = targets.boxes / stride
        size = boxes[:, 2:] - boxes[:, :2]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        ratio = size[None] / (self.anchors[level] / stride)[:, None]  # [A, M, 2]
        near = torch.maximum(ratio, 1 / ratio.clamp(min=1e-9)).amax(dim=-1) < self.options["anchor_t"]
        anchor, found = near.nonzero(as_tuple=True)
        cell = centre[found].floor().long()
        inside = centre[found] - cell  # [P, 2] in [0, 1)
        step = torch.where(inside < 0.5, -1, 1)
        sideways, upright = torch.zeros_like(step), torch.zeros_like(step)
        sideways[:, 0], upright[:, 1] = step[:, 0], step[:, 1]
        near_cells = [cell, cell + sideways, cell + upright]
        if coarse:
            near_cells += [cell - sideways, cell - upright]
        cell = torch.cat(near_cells)
        anchor, found = anchor.repeat(len(near_cells)), found.repeat(len(near_cells))
        # decode reaches from half a cell before a cell's edge to half a cell behind it, and no further
        edge = torch.tensor((width, height), device=cell.device)
        keep = ((cell >= 0) & (cell < edge)).all(dim=1)
        cell, anchor, found = cell[keep], anchor[keep], found[keep]
        return targets.image_index[found], anchor, cell[:, 1], cell[:, 0], found


class Implicit(nn.Module):
    """What a layer knows without looking, a learned number a channel (arXiv 2105.04206). Shape: ``[1, C, 1, 1]``"""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(start + SPREAD * torch.randn(1, channels, 1, 1))

    def forward(self) -> Tensor:
        return self.implicit


@register_op(infer=detect_shape, many=True)
class IDetect(Detect):
    """`Detect` with what it knows without looking: added to its maps and multiplied with what it gives.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, A, H_i, W_i, K], ...]``, logits.
    """

    def __init__(self, inputs: Sequence[Shape], num_classes: int, anchors: Anchors) -> None:
        super().__init__(inputs, num_classes, anchors)
        self.ia = nn.ModuleList(Implicit(shape.channels, 0.0) for shape in inputs)
        self.im = nn.ModuleList(Implicit(self.num_anchors * (5 + num_classes), 1.0) for _ in inputs)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = zip(self.m, self.ia, self.im, maps, strict=True)
        return [self.by_anchor(layer(x + added()) * factor()) for layer, added, factor, x in levels]


def aux_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    levels = len(inputs) // 2
    strides = [shape.stride for shape in inputs]
    if len(inputs) % 2 or strides[:levels] != strides[levels:]:
        raise ValueError(f"the head reads every level twice, the helping maps last; here the strides are {strides}")
    return detect_shape(inputs[:levels], args)


@register_op(infer=aux_shape, many=True)
class IAuxDetect(IDetect):
    """YOLOv7's head for training: every level twice, the helping maps last. Only the first ones are decoded.

    The helping maps count a quarter in the loss, and more cells answer for a box there (see `assign`).

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, A, H_i, W_i, K], ...]``, as the maps stand.
    """

    sets = 2

    def __init__(self, inputs: Sequence[Shape], num_classes: int, anchors: Anchors) -> None:
        levels = len(inputs) // 2
        super().__init__(inputs[:levels], num_classes, anchors)
        self.m2 = self.last(inputs[levels:])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = len(self.m)
        helping = zip(self.m2, maps[levels:], strict=True)
        return [*super().forward(maps[:levels]), *(self.by_anchor(layer(x)) for layer, x in helping)]

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return super().decode(outputs[: len(self.m)])

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = self.loss_of(outputs[: len(self.m)], targets)
        helping, said = self.loss_of(outputs[len(self.m) :], targets, coarse=True)
        return total + AUXILIARY * helping, {name: v + AUXILIARY * said[name] for name, v in parts.items()}
