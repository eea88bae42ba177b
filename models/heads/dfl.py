"""The anchor-free heads of YOLOv8 and of what came after it: forward, loss and decode together.

Every cell is a point that answers with the distances to the four sides of a box. A distance is the mean of a
distribution over 0, 1, ..., bins - 1 strides (Generalized Focal Loss, Li et al., arXiv 2006.04388). Who answers for a
box is asked of the predictions themselves: the points inside it whose class score and box agree best with it (TOOD,
Feng et al., arXiv 2108.07755).

YOLOv9 trains with a second set of maps beside the first (arXiv 2402.13616), which only helps: `DualDDetect`. YOLOv10
has a second head on the same maps, of which one point alone answers for a box, so that nothing is left to suppress
(arXiv 2405.14458): `v10Detect`.

Shape letters: N images, H W cells, P points of all levels, B bins, C classes, K = 4 B + C, T truths, M points that
answer for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.boxes import cells_of_levels, complete_iou
from models.ops.conv import Conv
from models.ops.merge import no_margin
from models.ops.primitives import DEFAULT, PlainAct
from models.registry import Shape, register_op

BOX, CLASS, DISTRIBUTION = 7.5, 0.5, 1.5  # gains of YOLOv8
ALPHA, BETA = 0.5, 6.0  # how much class score and IoU count in the alignment; TOOD has 1 and 6, YOLOv8 these
MOST_POINTS = 10  # that answer for a truth; TOOD has 13, YOLOv8 this
AUXILIARY = 0.25  # what a set of maps counts in the loss that is there for training alone

Bins = Annotated[int, Field(ge=1, le=64)]
Widths = Literal["v8", "v9"]


def dfl_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    no_margin(inputs)
    return Shape(0, inputs[0].stride, "maps")


def sets_shape(inputs: Sequence[Shape], args: Mapping[str, Any], sets: int) -> Shape:
    """Of a head that reads every level `sets` times."""
    if len(inputs) % sets:
        raise ValueError(f"the head reads {sets} maps for each of its levels, but got {len(inputs)} in all")
    levels = len(inputs) // sets
    strides = [[shape.stride for shape in inputs[k * levels : (k + 1) * levels]] for k in range(sets)]
    if any(other != strides[0] for other in strides):
        raise ValueError(f"the {sets} sets of maps that the head reads have different strides, {strides}")
    return dfl_shape(inputs, args)


def dual_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    return sets_shape(inputs, args, 2)


def triple_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    return sets_shape(inputs, args, 3)


def branches(
    inputs: Sequence[Shape], num_classes: int, bins: int, act: PlainAct, widths: Widths, light: bool, groups: int
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The convolutions of every level for boxes and for classes. Hidden channels follow from the finest level."""
    finest = inputs[0].channels
    box = max(16, finest // 4, 4 * bins)
    box = math.ceil(box / groups) * groups
    classes = max(finest, min(num_classes, 100) if widths == "v8" else min(2 * num_classes, 128))

    def start(last: nn.Conv2d, bias: float) -> nn.Conv2d:
        assert last.bias is not None
        nn.init.constant_(last.bias, bias)
        return last

    def of_boxes(c_in: int) -> nn.Sequential:
        last = start(nn.Conv2d(box, 4 * bins, 1, groups=groups), 1.0)
        return nn.Sequential(Conv(c_in, box, 3, act=act), Conv(box, box, 3, groups=groups, act=act), last)

    def of_classes(shape: Shape) -> nn.Sequential:
        # near the truth at the start: 5 objects on a level of an image of 640 pixels
        last = start(nn.Conv2d(classes, num_classes, 1), math.log(5 / num_classes / (640 / shape.stride) ** 2))

        def convolution(c_in: int) -> nn.Module:
            if not light:
                return Conv(c_in, classes, 3, act=act)
            return nn.Sequential(Conv(c_in, c_in, 3, groups=c_in, act=act), Conv(c_in, classes, 1, act=act))

        return nn.Sequential(convolution(shape.channels), convolution(classes), last)

    return nn.ModuleList(of_boxes(s.channels) for s in inputs), nn.ModuleList(of_classes(s) for s in inputs)


def bin_values(bins: int) -> nn.Conv2d:
    """What a bin stands for. It never learns, but the published networks count it and store it among their weights."""
    values = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
    with torch.no_grad():
        values.weight.copy_(torch.arange(float(bins)).view(1, bins, 1, 1))
    return values


def answer(maps: Sequence[Tensor], boxes: nn.ModuleList, classes: nn.ModuleList) -> list[Tensor]:
    """What the convolutions of every level make of its map, ``[N, H, W, K]`` each."""
    outputs = []
    for distances, scores, x in zip(boxes, classes, maps, strict=True):
        y = torch.cat((distances(x), scores(x)), dim=1)
        outputs.append(y.permute(0, 2, 3, 1).contiguous())
    return outputs


@register_op(infer=dfl_shape, many=True)
class DFLDetect(nn.Module):
    """Boxes and classes from points on every level, each with two convolutions of its own before the last one.

    `bins` limits what a point can reach: bins - 1 strides to every side. `options` are the gains that its loss goes by.
    `light` has depth-wise convolutions before the classes, as in YOLO11 and later; `groups` are those of the last two
    convolutions before the boxes. `widths` says how wide the hidden layers of the classes are at least: with ``v8`` one
    channel a class, up to 100, with ``v9`` two, up to 128.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, H_i, W_i, K], ...]``, logits: four distributions, then the classes.
    """

    sets = 1  # how many maps of every level the head reads

    def __init__(
        self,
        inputs: Sequence[Shape],
        num_classes: int,
        bins: Bins = 16,
        *,
        widths: Widths = "v8",
        light: bool = False,
        groups: Literal[1, 2, 4] = 1,
        act: PlainAct = DEFAULT,
    ) -> None:
        super().__init__()
        self.num_classes, self.bins = num_classes, bins
        self.options = {"box": BOX, "cls": CLASS, "dfl": DISTRIBUTION}
        self.strides = tuple(shape.stride for shape in inputs)
        self.cv2, self.cv3 = branches(inputs, num_classes, bins, act, widths, light, groups)
        if bins > 1:
            self.dfl = bin_values(bins)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return answer(maps, self.cv2, self.cv3)

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, P, 4]`` in pixels of the input and class scores ``[N, P, C]`` in [0, 1]."""
        sides_NP4B, classes_NPC = self.split(outputs)
        return self.boxes(sides_NP4B, *self.points(outputs)), classes_NPC.sigmoid()

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits of all levels behind each other: of the four distances ``[N, P, 4, B]``, of classes."""
        y = torch.cat([level.flatten(1, 2) for level in outputs], dim=1)
        sides, classes = y.split((4 * self.bins, self.num_classes), dim=-1)
        return sides.unflatten(-1, (4, self.bins)), classes

    def points(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The middle of every cell ``[P, 2]``, x y in pixels, and its stride ``[P, 1]``."""
        places, strides = cells_of_levels(outputs, self.strides)
        return (places + 0.5) * strides, strides

    def boxes(self, sides: Tensor, points: Tensor, strides: Tensor) -> Tensor:
        """Boxes ``[..., 4]`` of logits ``[..., 4, B]``: left, top, right and bottom of a point by a distance each.

        A distance is the mean of its distribution, in strides (arXiv 2006.04388, eq. 4); of one bin it is the number
        itself, as in YOLO26.
        """
        if self.bins == 1:
            distances = sides[..., 0] * strides
        else:
            distances = sides.softmax(dim=-1) @ self.dfl.weight.to(sides.dtype).flatten() * strides
        return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its parts: CIoU, BCE of classes, distribution focal loss."""
        return self.loss_of(outputs, targets, MOST_POINTS)

    def loss_of(self, outputs: Sequence[Tensor], targets: Targets, most: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same of one set of levels, where at most `most` points answer for a truth.

        A point that answers for a truth should give its class with the alignment that `assign` found, all others
        nothing; boxes and distributions weigh by it too. All is divided by what the alignments add up to, at least 1.
        With one bin there is no distribution, and the distances themselves are compared, in strides.
        """
        sides_NP4B, classes_NPC = self.split(outputs)
        points_P2, strides_P1 = self.points(outputs)
        boxes_NP4 = self.boxes(sides_NP4B, points_P2, strides_P1)
        image, point, found, aligned_M = self.assign(boxes_NP4, classes_NPC, points_P2, targets, most)

        goal = torch.zeros_like(classes_NPC)
        goal[image, point, targets.labels[found]] = aligned_M
        total = aligned_M.sum().clamp(min=1)
        classes = self.options["cls"] * F.binary_cross_entropy_with_logits(classes_NPC, goal, reduction="sum") / total

        truth_M4 = targets.boxes[found].to(boxes_NP4)
        _, ciou_M = complete_iou(boxes_NP4[image, point], truth_M4)
        box = self.options["box"] * ((1 - ciou_M) * aligned_M).sum() / total

        here, stride = points_P2[point], strides_P1[point]
        distances_M4 = torch.cat((here - truth_M4[:, :2], truth_M4[:, 2:] - here), dim=-1) / stride
        said_M4B = sides_NP4B[image, point]
        if self.bins == 1:
            distribution_M = (said_M4B[..., 0] - distances_M4).abs().mean(dim=-1)
        else:
            distribution_M = distribution_focal_loss(said_M4B, distances_M4).mean(dim=-1)
        distribution = self.options["dfl"] * (distribution_M * aligned_M).sum() / total
        parts = {"box": box.detach(), "cls": classes.detach(), "dfl": distribution.detach()}
        return box + classes + distribution, parts

    @torch.no_grad()
    def assign(
        self,
        boxes_NP4: Tensor,
        classes_NPC: Tensor,
        points_P2: Tensor,
        targets: Targets,
        most: int = MOST_POINTS,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which points answer for what: image, point, index of the truth and alignment in [0, 1], ``[M]`` each.

        Asked are the points in a truth, or within half of the finest stride of its middle, so that a truth between the
        points is not lost. The alignment of a point is ``t = s^alpha u^beta``, s its score for the truth's class and u
        its box's IoU; the best `most` answer. A point in several truths answers for the one that its box fits
        best. At last t is scaled so that a truth's largest is the largest u among its points (arXiv 2108.07755, 3.2).

        A truth without area, or that no box of its points touches, has nobody.
        """
        truths_T4, none = targets.boxes.to(boxes_NP4), -math.inf
        size, middle = truths_T4[:, 2:] - truths_T4[:, :2], (truths_T4[:, :2] + truths_T4[:, 2:]) / 2
        reach = size.clamp(min=self.strides[0]) / 2
        asked_TP = ((points_P2 - middle[:, None]).abs() <= reach[:, None]).all(dim=-1)
        truth, point = (asked_TP & (size > 0).all(dim=-1)[:, None]).nonzero(as_tuple=True)

        def fit(truth: Tensor, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """The image, u, and log t: t itself is too small for a number where u is."""
            image = targets.image_index[truth]
            u, _ = complete_iou(boxes_NP4[image, point], truths_T4[truth])
            s = classes_NPC[image, point, targets.labels[truth]]
            return image, u, ALPHA * F.logsigmoid(s) + BETA * u.log()

        log_t_TP = boxes_NP4.new_full(asked_TP.shape, none)
        log_t_TP[truth, point] = fit(truth, point)[2]
        best, chosen = log_t_TP.topk(min(most, len(points_P2)), dim=1)
        truth, rank = (best > none).nonzero(as_tuple=True)
        point = chosen[truth, rank]

        # One truth a point: the one of the largest u, the first of those.
        image, u, log_t = fit(truth, point)
        cell = image * len(points_P2) + point
        cells, truths = boxes_NP4.shape[0] * len(points_P2), len(truths_T4)
        mine = u == u.new_zeros(cells).scatter_reduce(0, cell, u, "amax")[cell]
        first = truth.new_full((cells,), truths).scatter_reduce(0, cell[mine], truth[mine], "amin")
        mine &= truth == first[cell]
        image, point, truth, u, log_t = (x[mine] for x in (image, point, truth, u, log_t))

        top_u = u.new_zeros(truths).scatter_reduce(0, truth, u, "amax")
        top_t = log_t.new_full((truths,), none).scatter_reduce(0, truth, log_t, "amax")
        return image, point, truth, (log_t - top_t[truth]).exp() * top_u[truth]


@register_op(infer=dual_shape, many=True)
class DualDDetect(DFLDetect):
    """YOLOv9's head: every level twice, the helping set of maps first. Only the second one is decoded.

    The helping set counts a quarter in the loss. Both have answers of their own.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, H_i, W_i, K], ...]``, as the maps stand.
    """

    sets = 2

    def __init__(self, inputs: Sequence[Shape], num_classes: int, bins: Bins = 16, *, act: PlainAct = DEFAULT) -> None:
        levels = len(inputs) // self.sets
        super().__init__(inputs[:levels], num_classes, bins, widths="v9", groups=4, act=act)
        self.levels = levels
        for extra in range(1, self.sets):  # cv4 cv5 dfl2, then cv6 cv7 dfl3: the names that published weights have
            maps = inputs[extra * levels : (extra + 1) * levels]
            boxes, classes = branches(maps, num_classes, bins, act, "v9", False, 4)
            self.add_module(f"cv{2 + 2 * extra}", boxes)
            self.add_module(f"cv{3 + 2 * extra}", classes)
            if bins > 1:
                self.add_module(f"dfl{extra + 1}", bin_values(bins))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for part, (boxes, classes) in enumerate(self.each_set()):
            outputs += answer(maps[part * self.levels : (part + 1) * self.levels], boxes, classes)
        return outputs

    def each_set(self) -> list[tuple[nn.ModuleList, nn.ModuleList]]:
        """The convolutions of every set."""
        named = dict(self.named_children())
        found = []
        for part in range(self.sets):
            boxes, classes = named[f"cv{2 + 2 * part}"], named[f"cv{3 + 2 * part}"]
            assert isinstance(boxes, nn.ModuleList) and isinstance(classes, nn.ModuleList)
            found.append((boxes, classes))
        return found

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return super().decode(outputs[-self.levels :])

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        total, parts = super().loss(outputs[-self.levels :], targets)
        for part in range(self.sets - 1):
            helping = outputs[part * self.levels : (part + 1) * self.levels]
            loss, said = self.loss_of(helping, targets, MOST_POINTS)
            total = total + AUXILIARY * loss
            parts = {name: value + AUXILIARY * said[name] for name, value in parts.items()}
        return total, parts


@register_op(infer=triple_shape, many=True)
class TripleDDetect(DualDDetect):
    """`DualDDetect` with two helping sets of maps. Only the third one is decoded.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, H_i, W_i, K], ...]``, as the maps stand.
    """

    sets = 3


@register_op("v10Detect", infer=dfl_shape, many=True)
class V10Detect(DFLDetect):
    """Two `DFLDetect` on the same maps: up to ten points answer for a box in the first, a single one in the second.

    The first one trains the network below it, the second one nothing but itself; it is the one that is decoded, and
    since nothing but the best point says a box there, boxes need no suppression (YOLOv10, arXiv 2405.14458, section
    3.1). Both loss terms count the same. A fused network has the second head only.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, H_i, W_i, K], ...]``: the levels of the first, then those of the second.
    """

    suppresses = False  # what `decode` gives needs no non-maximum suppression

    def __init__(self, inputs: Sequence[Shape], num_classes: int, bins: Bins = 16, *, act: PlainAct = DEFAULT) -> None:
        super().__init__(inputs, num_classes, bins, light=True, act=act)
        self.one2one_cv2, self.one2one_cv3 = deepcopy(self.cv2), deepcopy(self.cv3)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        one = answer([x.detach() if self.training else x for x in maps], self.one2one_cv2, self.one2one_cv3)
        many = answer(maps, self.cv2, self.cv3) if hasattr(self, "cv2") else []
        return [*many, *one]

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return super().decode(outputs[-len(self.strides) :])

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both heads' losses, and their parts."""
        many, one = outputs[: len(self.strides)], outputs[len(self.strides) :]
        loss, parts = self.loss_of(many, targets, MOST_POINTS)
        alone, said = self.loss_of(one, targets, 1)
        return loss + alone, {name: value + said[name] for name, value in parts.items()}

    def fold(self) -> nn.Module:
        """The head without what only trains."""
        del self.cv2, self.cv3
        return self


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """``-((y_r - y) log S_l + (y - y_l) log S_r)`` (arXiv 2006.04388, eq. 6): the bins l and r beside a distance.

    Logits ``[..., B]``, distances ``[...]`` in bins; what no bin reaches counts as the last one, or as 0.
    """
    last = logits.shape[-1] - 1
    y = distances.clamp(0, last)
    left = y.floor().clamp(max=last - 1)
    log_s = logits.log_softmax(dim=-1)
    log_left = log_s.gather(-1, left.long()[..., None])[..., 0]
    log_right = log_s.gather(-1, left.long()[..., None] + 1)[..., 0]
    return -((left + 1 - y) * log_left + (y - left) * log_right)
