"""Which cells of a level speak for a decision: Grad-CAM, maps of attention branches, and maps that look at nothing.

A decision is "this image is of class c" of a classifier, "there is a c in this box" of a detector. The network is run
by its one forward loop, which is cut behind each level; no hook is set and nothing is left on a module.

Shape letters: N images, K decisions about them, P predictions an image, C classes, D channels, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from data.structures import Detections
from models.boxes import pairwise_iou
from models.network import Network

SAME = 0.5  # IoU from which on a prediction is of the same object
FLAT = 1e-6  # a map whose values differ by less, as a share of the largest, says nothing
RANDOM_CELLS = 8  # a side, of the random control
CENTRE_SIGMA = 0.25  # of the side, of the control that looks at the middle


@dataclass(frozen=True, eq=False)
class Decisions:
    """K decisions about the images of a batch.

    Attributes:
        images: ``[K]`` int64, the image each is about, rising.
        labels: ``[K]`` int64, its class.
        boxes: ``[K, 4]`` xyxy, in pixels of the input; of a classifier all of it.
        places: ``[K]`` int64, which of the image's predictions says so; of a classifier 0.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Any) -> Decisions:
        return Decisions(*(y[chosen] for y in (self.images, self.labels, self.boxes, self.places)))


# ---- what a network says


def answers(network: Network, outputs: Any, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes ``[N, P, 4]`` and scores ``[N, P, C]`` of head outputs for inputs of `size` (H, W).

    A classifier makes one prediction, whose box is the whole input.
    """
    found = cast(Any, network.decode(outputs))
    if not isinstance(found, Tensor):
        return found
    whole = found.new_tensor([0, 0, size[1], size[0]]).expand(len(found), 1, 4)
    return whole, found[:, None]


def confidences(boxes: Tensor, scores: Tensor, asked: Decisions) -> tuple[Tensor, Tensor]:
    """How sure a network is of each decision ``[K]``, and the prediction that says so ``[K]``.

    Row k of boxes ``[K, P, 4]`` and scores ``[K, P, C]`` is the answer to the image of decision k, changed or not. It
    is as sure as the best of its predictions of this class whose box has IoU .5 or more with the decision's, else 0.
    """
    K = len(asked)
    scores_KP = scores[torch.arange(K, device=scores.device), :, asked.labels]
    if boxes.shape[1] > 1:
        near = [pairwise_iou(one[None], row)[0] for one, row in zip(asked.boxes.to(boxes), boxes, strict=True)]
        scores_KP = torch.where(torch.stack(near) >= SAME, scores_KP, 0.0) if K else scores_KP
    best = scores_KP.max(dim=1)
    return best.values, best.indices


def class_decisions(scores_NC: Tensor, boxes_N14: Tensor, labels: Tensor | None = None, count: int = 1) -> Decisions:
    """The `count` likeliest classes of every image, best first, or those given, ``[N]``."""
    N = len(scores_NC)
    chosen = scores_NC.topk(count, dim=1).indices if labels is None else labels[:, None].to(scores_NC.device)
    each = chosen.shape[1]
    images = torch.arange(N, device=scores_NC.device).repeat_interleave(each)
    return Decisions(images, chosen.flatten(), boxes_N14[images, 0], torch.zeros_like(images))


def object_decisions(boxes: Tensor, scores: Tensor, objects: Sequence[Detections]) -> tuple[Decisions, Tensor]:
    """A decision for each box of every image, and how sure the network is of it ``[K]``; 0 where it did not find it.

    `objects` are truths or detections, in pixels of the input; boxes ``[N, P, 4]`` and scores ``[N, P, C]`` are what
    the network said of the images.
    """
    counts = torch.tensor([len(one.labels) for one in objects], device=boxes.device)
    images = torch.repeat_interleave(torch.arange(len(objects), device=boxes.device), counts)
    wanted = torch.cat([one.boxes.to(boxes) for one in objects])
    labels = torch.cat([one.labels.to(boxes.device) for one in objects])
    asked = Decisions(images, labels, wanted, torch.zeros_like(images))
    sure = boxes.new_zeros(len(asked))
    for k, image in enumerate(images.tolist()):  # one by one: an image's predictions are many
        sure[k : k + 1], asked.places[k : k + 1] = confidences(
            boxes[image : image + 1], scores[image : image + 1], asked[k : k + 1]
        )
    return asked, sure


# ---- maps


def run_to_maps(network: Network, images: Tensor, rows: Sequence[int]) -> tuple[Any, dict[int, Any], dict[int, Tensor]]:
    """Head outputs, auxiliary tensors and the outputs of `rows`, from which on gradients are recorded.

    The forward loop stops behind each of these rows, whose output becomes the start of a graph of its own where it does
    not hang on an earlier one. Parameters should not require gradients.
    """
    held: dict[int, Any] = {-1: images}
    aux: dict[int, Any] = {}
    maps: dict[int, Tensor] = {}
    start = 0
    with torch.enable_grad():
        for row in sorted(set(rows)):
            held, more = network.run(range(start, row + 1), held)
            if not held[row].requires_grad:
                held[row] = held[row].detach().requires_grad_()
            maps[row], start = held[row], row + 1
            aux |= more
        held, more = network.run(range(start, len(network.layers)), held)
    return held[len(network.layers) - 1], aux | more, maps


def grad_cam(
    network: Network, outputs: Any, maps: Mapping[int, Tensor], asked: Decisions, *, local: bool = False
) -> dict[int, Tensor]:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391, eq. 1 and 2) of each decision on each map, ``[K, h, w]`` by row.

    ``w_d = mean over cells of dy / dA_d``, ``L = ReLU(sum over d of w_d A_d)``, y the logit of the class for a
    classifier, and for a detector the score of the prediction that says so, objectness and class together.

    `local` is LayerCAM (Jiang et al., IEEE TIP 30, 2021, eq. 6 and 7): every cell has weights of its own,
    ``w_d = ReLU(dy / dA_d)`` there. What else an image shows of a class then stays dark, as it should where one box
    is asked about.
    """
    heat = {row: y.new_zeros(len(asked), *y.shape[2:], dtype=torch.float32) for row, y in maps.items()}
    with torch.enable_grad():
        goals = outputs[0][:, None] if _classifies(network) else network.decode(outputs)[1]
        for turn in _turns(asked.images):  # one decision of each image at a time: images do not hear each other
            one = asked[turn]
            y = goals[one.images, one.places, one.labels].sum()
            slopes = torch.autograd.grad(y, list(maps.values()), retain_graph=True, allow_unused=True)
            for (row, A), slope in zip(maps.items(), slopes, strict=True):
                if slope is not None:
                    w = slope[one.images].float()
                    w = w.relu() if local else w.mean(dim=(2, 3), keepdim=True)
                    heat[row][turn] = (w * A.detach()[one.images].float()).sum(dim=1).relu()
    return heat


def _classifies(network: Network) -> bool:
    return getattr(network.head, "task", "detect") == "classify"


def _turns(images: Tensor) -> list[Tensor]:
    """Places of decisions in groups that have one of each image at most: the first of every image, the second, ..."""
    seen: dict[int, int] = {}
    groups: list[list[int]] = []
    for k, image in enumerate(images.tolist()):
        number = seen[image] = seen.get(image, -1) + 1
        if number == len(groups):
            groups.append([])
        groups[number].append(k)
    return [torch.tensor(group, device=images.device) for group in groups]


def branch_maps(aux: Mapping[int, Any], rows: Sequence[int], asked: Decisions) -> dict[int, Tensor]:
    """The maps M of attention branches, ``[K, h, w]`` by row: every decision about an image has the image's."""
    return {row: aux[row]["map"].detach().float()[asked.images, 0] for row in rows}


def spread(heat: Tensor, size: Sequence[int]) -> Tensor:
    """Maps ``[K, h, w]`` over the input, ``[K, H, W]``: bilinear, then each from 0 to 1. A flat map becomes 0."""
    if not len(heat):
        return heat.new_zeros(0, *size)
    wide = F.interpolate(heat[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    low, high = wide.amin(dim=(1, 2), keepdim=True), wide.amax(dim=(1, 2), keepdim=True)
    says = (high - low) > FLAT * high.abs()
    return torch.where(says, (wide - low) / torch.where(says, high - low, 1.0), 0.0)


# ---- maps that look at nothing


def random_map(seeds: Sequence[int], size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Chance, as coarse as a level's map is: 8x8 cells of a uniform draw, spread over the input; a seed each."""
    cells = [torch.rand(RANDOM_CELLS, RANDOM_CELLS, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return spread(torch.stack(cells).to(device), size) if cells else torch.zeros(0, *size, device=device)


def centre_map(size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """A Gaussian in the middle, ``[H, W]``, a quarter of each side wide."""
    y, x = (torch.linspace(-1, 1, side, device=device) / (2 * CENTRE_SIGMA) for side in size)
    return spread(torch.exp(-(y[:, None] ** 2 + x[None] ** 2) / 2)[None], size)[0]
