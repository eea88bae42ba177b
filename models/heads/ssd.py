"""The head of SSD (Liu et al., arXiv 1512.02325): prior boxes, matching, forward, loss and decode together.

On every cell of every level lie some boxes of fixed sizes, the priors. For each of them the head says how a box near it
differs from it, and by a softmax which class that box has, the background being one. Predictions are depth-wise and
point-wise convolutions, as in SSDLite (Sandler et al., arXiv 1801.04381, section 6.2). The numbers of equations are
those of docs/lightweight.md.

Shape letters: N images, A priors a cell, H W cells, P priors of all levels, C classes, K = 4 + 1 + C numbers a prior:
offsets, background, classes. T truths of an image, M boxes, B priors that answer for a truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Targets
from models.boxes import cells, cxcywh_to_xyxy, pairwise_iou
from models.ops.conv import Conv
from models.ops.merge import no_margin
from models.ops.primitives import DEFAULT, PlainAct
from models.registry import Shape, register_op
from models.spec import Anchors

SMALLEST, FIRST, LAST = 0.1, 0.2, 0.9  # scales of SSD: of the finest level, the next one and the coarsest
BACKGROUND = 0  # its place among the logits of a prior, as in equation (4)
LARGEST_LOG = math.log(1000 / 16)  # of a box to its prior, so that its exponential stays a number, as in Faster R-CNN
MOST_MEASURED = 2_000  # boxes that the best possible recall is measured on

Positive = Annotated[float, Field(gt=0, le=1000)]
Share = Annotated[float, Field(gt=0, le=10)]
Overlap = Annotated[float, Field(gt=0, lt=1)]
Sizes = tuple[tuple[float, float], ...]  # width and height of each prior of a cell


def ssd_scales(levels: int) -> tuple[float, ...]:
    """SSD's scale of every level, and one more: .1, then from .2 to .9 in equal steps, and one step further.

    ``s_k = .2 + .7 (k - 1) / (m - 1)`` for the m maps behind the finest one (arXiv 1512.02325, eq. 4, and the .1 of its
    section 3.1). The one more is for the extra square of the coarsest level.
    """
    step = (LAST - FIRST) / max(levels - 2, 1)
    return SMALLEST, *(FIRST + step * k for k in range(levels))


def ssd_ratios(levels: int) -> tuple[tuple[float, ...], ...]:
    """SSD's ratios beside 1: 2 on the finest and on the coarsest level, 2 and 3 on all between, each also turned."""
    return tuple((2.0,) if level in (0, levels - 1) else (2.0, 3.0) for level in range(levels))


def ssd_sizes(scale: float, following: float, ratios: Sequence[float]) -> Sizes:
    """The priors of a cell: a square of `scale`, one between it and the `following` level, two boxes a ratio.

    ``w = s sqrt(r), h = s / sqrt(r)`` and turned; the extra square has the side ``sqrt(s_k s_k+1)``.
    """
    extra = math.sqrt(scale * following)
    sizes = [(scale, scale), (extra, extra)]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        sizes += [(long, short), (short, long)]
    return tuple(sizes)


def ssd_shape(inputs: Sequence[Shape], args: Mapping[str, Any]) -> Shape:
    anchors, scales, ratios = args.get("anchors"), args.get("scales"), args.get("ratios")
    levels = len(inputs)
    no_margin(inputs)
    if anchors is not None and (scales is not None or ratios is not None):
        raise ValueError("its priors are the file's anchors, so scales and ratios mean nothing; leave one of them out")
    if isinstance(anchors, tuple) and len(anchors) != levels:
        raise ValueError(f"anchors are given for {len(anchors)} levels, but the head reads {levels}")
    if scales is not None and len(scales) != levels + 1:
        raise ValueError(
            f"scales has {len(scales)} numbers; the head reads {levels} levels, so {levels + 1} would be right: one a "
            f"level and one behind the last, for its extra square"
        )
    if ratios is not None and len(ratios) != levels:
        raise ValueError(f"ratios has {len(ratios)} lists, but the head reads {levels} levels")
    return Shape(0, inputs[0].stride, "maps")


@register_op(infer=ssd_shape, many=True)
class SSDHead(nn.Module):
    """Boxes and classes from priors on every level, by a depth-wise and a point-wise convolution each.

    Without `anchors` the priors follow SSD's rule, as shares of the longer side of the input, so any input size goes:
    `scales` (one a level and one more) and `ratios` (a list a level) replace `ssd_scales` and `ssd_ratios`. With the
    file's anchors they have those sizes in pixels. A prior answers for the truth that it overlaps most, from an IoU of
    `match` on, and every truth has the best prior that is left for it, whatever they share (`match_priors`). Of the
    others the `negatives` hardest count for each that answers. `variances` divide the offsets of centre and size, and
    `delta` is where the box loss becomes linear. `options` are the gains of its loss.

    Shape: ``[[N, C_i, H_i, W_i], ...] -> [[N, A_i, H_i, W_i, K], ...]``: offsets, then logits, the background's first.
    """

    task = "detect"

    def __init__(
        self,
        inputs: Sequence[Shape],
        num_classes: int,
        anchors: Anchors | None = None,
        *,
        scales: tuple[Share, ...] | None = None,
        ratios: tuple[tuple[Positive, ...], ...] | None = None,
        variances: tuple[Positive, Positive] = (0.1, 0.2),
        negatives: Positive = 3.0,
        match: Overlap = 0.5,
        delta: Positive = 1.0,
        act: PlainAct = DEFAULT,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.variances, self.negatives, self.match, self.delta = variances, negatives, match, delta
        self.options = {"box": 1.0, "cls": 1.0}
        self.strides = tuple(shape.stride for shape in inputs)
        self.fitted = not isinstance(anchors, int)
        self.in_pixels = anchors is not None

        levels = len(inputs)
        if isinstance(anchors, int):
            sizes: list[Sizes] = [((0.0, 0.0),) * anchors] * levels
        elif anchors is not None:
            sizes = [tuple(zip(level[::2], level[1::2], strict=True)) for level in anchors]
        else:
            s, r = scales or ssd_scales(levels), ratios or ssd_ratios(levels)
            sizes = [ssd_sizes(s[k], s[k + 1], r[k]) for k in range(levels)]
        self.num_priors = tuple(len(level) for level in sizes)  # a cell, of each level
        for k, level in enumerate(sizes):  # the YAML keeps them, not the state dict
            self.register_buffer(f"sizes_{k}", torch.tensor(level), persistent=False)

        def branches(start: Sequence[float]) -> nn.ModuleList:
            """One a level; `start` are the biases of the numbers that each prior has."""
            found = nn.ModuleList()
            for shape, priors in zip(inputs, self.num_priors, strict=True):
                last = nn.Conv2d(shape.channels, priors * len(start), 1)
                last.bias = nn.Parameter(torch.tensor(start).repeat(priors))
                depthwise = Conv(shape.channels, shape.channels, 3, groups=shape.channels, act=act)
                found.append(nn.Sequential(depthwise, last))
            return found

        self.box = branches([0.0] * 4)
        # near the truth: so much background as counts in the loss, and all classes alike
        self.classes = branches([math.log(negatives * num_classes), *[0.0] * num_classes])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for box, classes, priors, x in zip(self.box, self.classes, self.num_priors, maps, strict=True):
            offsets, logits = (branch(x).unflatten(1, (priors, -1)) for branch in (box, classes))
            outputs.append(torch.cat((offsets, logits), dim=2).permute(0, 1, 3, 4, 2).contiguous())
        return outputs

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, P, 4]`` in pixels of the input and class scores ``[N, P, C]`` in [0, 1], without background."""
        offsets_NP4, logits_NPC = self.split(outputs)
        scores = logits_NPC.softmax(dim=-1)[..., BACKGROUND + 1 :]
        return decoded(offsets_NP4, self.priors(outputs), self.variances), scores

    def split(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """All levels behind each other: offsets ``[N, P, 4]``, logits of background and classes ``[N, P, 1 + C]``."""
        y = torch.cat([level.flatten(1, 3) for level in outputs], dim=1)
        return y[..., :4], y[..., 4:]

    def priors(self, outputs: Sequence[Tensor]) -> Tensor:
        """Centre and size ``[P, 4]`` of every prior in pixels, in the order of the outputs; some reach over an edge."""
        found = []
        for level, (y, stride) in enumerate(zip(outputs, self.strides, strict=True)):
            height, width = y.shape[2:4]
            grid = cells(height, width, y)
            sizes_A2 = self.get_buffer(f"sizes_{level}").to(y.dtype)
            if not self.in_pixels:  # asked of tensors, since an exported file does not know its input's size
                sizes_A2 = sizes_A2 * (grid[-1, -1].max() + 1) * stride
            centre = (grid + 0.5) * stride  # [H, W, 2]
            centre = centre.expand(len(sizes_A2), -1, -1, -1)
            sizes = sizes_A2[:, None, None].expand(-1, height, width, -1)
            found.append(torch.cat((centre, sizes), dim=-1).flatten(0, 2))
        return torch.cat(found)

    def loss(self, outputs: Sequence[Tensor], targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (3), ``L = (L_conf + alpha L_loc) / N``, and its two parts.

        N is how many priors of the batch answer for a truth. Where none does, the loss is 0: images without an object
        teach nothing by themselves.
        """
        assert self.fitted, "anchors are fitted before training starts"
        offsets_NP4, logits_NPC = self.split(outputs)
        priors_P4 = self.priors(outputs)
        image, prior, found = self.assign(priors_P4, targets, len(offsets_NP4))
        n = max(len(found), 1)

        # (4): the right class where a prior answers for a truth, the background where a negative is hard
        minus_log_c = -logits_NPC.log_softmax(dim=-1)
        positives = minus_log_c[image, prior, BACKGROUND + 1 + targets.labels[found]].sum()
        of_background_NP = minus_log_c[..., BACKGROUND]
        answers_NP = torch.zeros_like(of_background_NP, dtype=torch.bool)
        answers_NP[image, prior] = True
        hardest_NP = of_background_NP.masked_fill(answers_NP, 0.0).sort(dim=1, descending=True).values
        wanted_N1 = self.negatives * answers_NP.sum(dim=1, keepdim=True)
        rank_P = torch.arange(len(priors_P4), device=hardest_NP.device)
        negatives = torch.where(rank_P < wanted_N1, hardest_NP, 0.0).sum()
        classes = self.options["cls"] * (positives + negatives) / n

        # (5): how the truth differs from its prior
        goal_B4 = encoded(targets.boxes[found].to(offsets_NP4), priors_P4[prior], self.variances)
        apart = F.huber_loss(offsets_NP4[image, prior], goal_B4, reduction="sum", delta=self.delta)
        box = self.options["box"] * apart / n
        return box + classes, {"box": box.detach(), "cls": classes.detach()}

    @torch.no_grad()
    def assign(self, priors_P4: Tensor, targets: Targets, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which priors answer for what: image, prior and index of the truth, ``[B]`` each."""
        corners_P4 = cxcywh_to_xyxy(priors_P4)
        truth_NP = []
        for image in range(images):
            mine_T = (targets.image_index == image).nonzero()[:, 0]
            matched_P = match_priors(pairwise_iou(targets.boxes[mine_T].to(corners_P4), corners_P4), self.match)
            truth_NP.append(torch.cat((mine_T, mine_T.new_tensor([-1])))[matched_P])  # nobody's index, -1, is the last
        found_NP = torch.stack(truth_NP)
        image_B, prior_B = (found_NP >= 0).nonzero(as_tuple=True)
        return image_B, prior_B, found_NP[image_B, prior_B]

    @torch.no_grad()
    def best_possible_recall(self, boxes_M4: Tensor, imgsz: int) -> float:
        """The share of boxes, ``xyxy`` in pixels of an input of ``imgsz x imgsz``, that some prior overlaps by `match`.

        Where the priors lie counts, not only their sizes. Of more than `MOST_MEASURED` boxes so many are asked, at
        equal distances in their list; nan without boxes.
        """
        cells = [(priors, imgsz // stride) for priors, stride in zip(self.num_priors, self.strides, strict=True)]
        corners_P4 = cxcywh_to_xyxy(self.priors([torch.empty(1, a, side, side, 0) for a, side in cells]))
        asked = boxes_M4[:: math.ceil(max(len(boxes_M4), 1) / MOST_MEASURED)].float()
        if not len(asked):
            return math.nan
        reached = [pairwise_iou(some, corners_P4).amax(dim=1) >= self.match for some in asked.split(64)]
        return float(torch.cat(reached).float().mean())


def encoded(boxes: Tensor, priors: Tensor, variances: Sequence[float]) -> Tensor:
    """``g^`` of equation (5), ``[..., 4]``: how boxes ``xyxy`` differ from priors ``cx cy w h``.

    ``g^cx = (g_cx - d_cx) / (d_w s_0)``, ``g^w = log(g_w / d_w) / s_1``, likewise y and h. Boxes have an area.
    """
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    moved = (centre - priors[..., :2]) / priors[..., 2:] / variances[0]
    return torch.cat((moved, (size / priors[..., 2:]).log() / variances[1]), dim=-1)


def decoded(offsets: Tensor, priors: Tensor, variances: Sequence[float]) -> Tensor:
    """The inverse of `encoded`, ``xyxy``; a box is at most 62.5 times as wide or high as its prior."""
    centre = priors[..., :2] + offsets[..., :2] * variances[0] * priors[..., 2:]
    size = priors[..., 2:] * (offsets[..., 2:] * variances[1]).clamp(max=LARGEST_LOG).exp()
    return cxcywh_to_xyxy(torch.cat((centre, size), dim=-1))


def match_priors(iou_TP: Tensor, least: float) -> Tensor:
    """The truth of each prior, ``[P]``, or -1, from the overlaps of an image's truths with its priors.

    A prior takes the truth that it overlaps most, from `least` on. But first every truth gets a prior of its own: the
    pair that overlaps most is joined, then of all that are left the next one, and so on (SSD's own code does so; its
    paper says "the best"). A pair that is best for both sides is one that this order would come to, so all such pairs
    are joined at once. Of equal overlaps the first counts; what overlaps nothing gets nobody.
    """
    if not len(iou_TP):
        return torch.full(iou_TP.shape[1:], -1, device=iou_TP.device)
    best_P, truth_P = iou_TP.max(dim=0)
    matched_P = torch.where(best_P >= least, truth_P, -1)
    free_TP, places_T = iou_TP.clone(), torch.arange(len(iou_TP), device=iou_TP.device)
    while True:
        most_T, prior_T = free_TP.max(dim=1)
        both_T = (most_T > 0) & (free_TP[:, prior_T].max(dim=0).indices == places_T)
        if not both_T.any():
            return matched_P
        matched_P[prior_T[both_T]] = places_T[both_T]
        free_TP[both_T] = 0
        free_TP[:, prior_T[both_T]] = 0
