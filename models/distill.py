"""What a teacher has learned, as a loss of a student's head outputs for the same images.

Both have the same head over the same strides and classes, so that their outputs answer cell by cell. What says whether
there is anything (objectness, or the class scores of a head without it) is compared everywhere; what says where and
which, the more the surer the teacher is, since boxes of empty cells mean nothing (Mehta & Ozturk, arXiv 1812.04820,
eq. 5-7). Distributions of distances are compared as such: localization distillation (Zheng et al., arXiv 2102.12252).
Classifiers need no more in common than their classes, which are compared as distributions too.

All terms are 0 with a gradient of 0 where the student says what the teacher says, and weigh as much as their
counterparts in the head's own loss.

Shape letters: N images, A anchors a level, H W cells, K numbers of a cell, P points, B bins, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from data.structures import Fault
from models.heads import yolo
from models.heads.classify import Classify
from models.heads.dfl import DFLDetect
from models.heads.yolo import Detect
from models.network import Network
from models.ops.primitives import wide

TEMPERATURE = 10.0  # that both distributions are softened by, as in arXiv 2102.12252, section 4.2
CLASS_TEMPERATURE = 4.0  # that those of classes are softened by (Hinton et al., arXiv 1503.02531, try 1 to 20)


def check_teacher(network: Network, teacher: Network, path: Path) -> None:
    """Raises `Fault` with a line for each thing in which `teacher`, of the file `path`, has another head."""
    head, other, file = network.head, teacher.head, network.spec.path
    kind, others = type(head).__name__, type(other).__name__
    if type(head) not in LOSSES:
        raise Fault(f"{file}: only {' and '.join(sorted(h.__name__ for h in LOSSES))} have a teacher, not {kind}")
    if kind != others:
        raise Fault(f"{path}: a teacher with the head {others} cannot teach {file}, which has {kind}")
    faults = []

    def same(what: str, mine: Any, theirs: Any, hint: str = "") -> None:
        if mine != theirs:
            faults.append(f"{path}: the teacher has {what} {theirs}, but {file} has {mine}{hint}")

    same("classes", head.num_classes, other.num_classes)
    if not isinstance(head, Classify):
        same("strides", _listed(head.strides), _listed(other.strides))
    if isinstance(head, DFLDetect):
        same("bins", head.bins, other.bins)
    elif isinstance(head, Detect):
        same("anchors", _sizes(head), _sizes(other), "; write the teacher's anchors into it")
    if faults:
        raise Fault(*faults)


def distillation_loss(
    network: Network, outputs: Sequence[Tensor], teacher: Network, teacher_outputs: Sequence[Tensor]
) -> Tensor:
    """How far head outputs of `network` are from those of `teacher` for the same images: 0 or more, a batch's mean.

    Both have passed `check_teacher`. The teacher's outputs get no gradient.
    """
    found = [wide(y) for y in outputs]
    return LOSSES[type(network.head)](network.head, found, [y.detach().to(found[0].dtype) for y in teacher_outputs])


def detect_loss(head: Detect, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Of the anchor head: objectness everywhere; box numbers and classes by the teacher's objectness."""
    objectness = box = classes = sure = outputs[0].new_zeros(())
    balance = yolo.BALANCE.get(len(outputs), yolo.BALANCE_OTHER)
    for level, (y, z) in enumerate(zip(outputs, wanted, strict=True)):
        weight = z[..., 4].sigmoid()
        sure = sure + weight.sum()
        objectness = objectness + balance[level] * bernoulli_kl(y[..., 4], z[..., 4]).mean()
        box = box + (weight[..., None] * (y[..., :4].sigmoid() - z[..., :4].sigmoid()) ** 2).sum()
        classes = classes + (weight[..., None] * bernoulli_kl(y[..., 5:], z[..., 5:])).sum() / head.num_classes
    pixels = outputs[0].shape[2] * outputs[0].shape[3] * head.strides[0] ** 2
    sure = sure.clamp(min=1)
    return (
        head.options["obj"] * objectness * 3 / len(outputs) * pixels / 640**2
        + head.options["box"] * 3 * box / sure  # the head's loss has a mean for each of 3 levels
        + head.options["cls"] * 3 * classes / sure * max(head.num_classes, yolo.FEWEST_CLASSES) / 80
    )


def dfl_loss(head: DFLDetect, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Of the anchor-free head: class scores everywhere; the four distributions by the teacher's best class score."""
    (sides_NP4B, classes_NPC), (their_sides, their_classes) = head.split(outputs), head.split(wanted)
    weight_NP = their_classes.sigmoid().amax(dim=-1)
    soft, hard = ((z / TEMPERATURE).log_softmax(dim=-1) for z in (sides_NP4B, their_sides))
    apart_NP = F.kl_div(soft, hard, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1) * TEMPERATURE**2
    sure = weight_NP.sum().clamp(min=1)
    classes = bernoulli_kl(classes_NPC, their_classes).sum()
    return (head.options["cls"] * classes + head.options["dfl"] * (weight_NP * apart_NP).sum()) / sure


def classify_loss(head: Classify, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """``T^2 KL(softmax(wanted / T) || softmax(logits / T))``, of images the mean (arXiv 1503.02531, section 2)."""
    soft, hard = ((z[0] / CLASS_TEMPERATURE).log_softmax(dim=-1) for z in (outputs, wanted))
    return F.kl_div(soft, hard, reduction="batchmean", log_target=True) * CLASS_TEMPERATURE**2


def bernoulli_kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """``KL(sigmoid(wanted) || sigmoid(logits))`` of each number: soft-target cross-entropy less what is in the target.

    ``= q (z - y) + softplus(y) - softplus(z)`` with q the sigmoid of z.
    """
    return wanted.sigmoid() * (wanted - logits) + F.softplus(logits) - F.softplus(wanted)


LOSSES: dict[type, Callable[[Any, Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    Detect: detect_loss,
    DFLDetect: dfl_loss,
    Classify: classify_loss,
}


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def _sizes(head: Detect) -> str:
    levels = head.anchors.tolist() if head.fitted else []
    shown = "; ".join(_listed([f"{size:g}" for anchor in level for size in anchor]) for level in levels)
    return shown or f"to fit, {head.num_anchors} a level,"
