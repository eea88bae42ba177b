"""Is a written file the network that it was made from? Their numbers are compared, and their detections one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.augment import letterbox, middle
from data.images import SUFFIXES, read_image
from data.shapes import draw_image
from data.structures import Detections, Fault
from engine.exported import CANDIDATES, Run
from engine.nms import Suppression, nms
from engine.sources import find_files
from models.boxes import pairwise_iou
from models.network import Network

BATCHES = (1, 3)  # of the check; the file takes any
TOLERANCE = 1e-4  # largest difference of numbers, as a share of the largest number
SAME_IOU, SAME_SCORE = 0.99, 1e-3  # of two detections that are one
LOOKED_AT = (30, 200)  # boxes an image that the check compares, at least and at most
LEAST = 1e-12  # score whose logarithm is compared


@dataclass(frozen=True)
class Parity:
    """How near a file is to its network: worst differences as a share of the largest number, and matched detections."""

    boxes: float
    scores: float
    detections: int

    def line(self) -> str:
        compared = f"{self.detections} detections matched one to one"
        return f"parity: boxes {self.boxes:.1e}, scores {self.scores:.1e} of their largest; {compared}"


@dataclass(frozen=True)
class ScoreParity:
    """The same for a network that gives scores alone: worst differences of these and of their logarithms."""

    scores: float
    logarithms: float
    images: int

    def line(self) -> str:
        return (
            f"parity: scores {self.scores:.1e}, their logarithms {self.logarithms:.1e} of the largest, "
            f"{self.images} images"
        )


def check_scores(network: Network, run: Run, images: Tensor) -> ScoreParity:
    """Hold a written file that gives scores against the network, in batches of 1 and 3. Raises a `Fault` where they
    differ.

    Their logarithms are compared as well: a network that is sure of itself has scores of 0 and 1 whatever its last
    digits are.
    """
    scores, logarithms = 0.0, 0.0
    for batch in BATCHES:
        with torch.no_grad():
            wanted, (found,) = network.predict(images[:batch]), run(images[:batch])
        assert isinstance(wanted, Tensor)
        scores = max(scores, _difference("scores", wanted, found))
        pair = (y.clamp(min=LEAST).log() for y in (wanted, found))
        logarithms = max(logarithms, _difference("logarithms of scores", *pair))
    return ScoreParity(scores, logarithms, sum(BATCHES))


def check_parity(
    network: Network, read: Callable[[float | None], Run], images: Tensor, asked: Suppression, *, inside: bool
) -> Parity:
    """Hold a written file against the network, in batches of 1 and 3. Raises a `Fault` where they differ.

    ``read(conf)`` gives the file as a function, with another threshold where one is given; ``inside`` says that it
    suppresses by itself, as ``asked``. Detections of both are compared twice: those asked for, and, where these are
    few, the best of each image at a threshold low enough to find some.
    """
    low = _threshold(network, images)
    boxes, scores, matched = 0.0, 0.0, 0
    for conf in sorted({asked.conf, min(asked.conf, low)}):
        run = read(conf if inside and conf != asked.conf else None)
        for batch in BATCHES:
            with torch.no_grad():
                wanted, found = network.predict(images[:batch]), run(images[:batch])
            if not inside:
                boxes = max(boxes, _difference("boxes", wanted[0], found[0]))
                scores = max(scores, _difference("scores", wanted[1], found[1]))
            for index in range(batch):
                mine = suppressed(wanted[0][index], wanted[1][index], asked, conf)
                if inside:
                    count = int(found[3][index])
                    other = Detections(*(y[index, :count] for y in found[:3]))
                else:
                    other = suppressed(found[0][index], found[1][index], asked, conf)
                here, there = _matched(mine, other, max(conf, low), asked.max_det)
                boxes = max(boxes, _difference("boxes", mine.boxes[here], other.boxes[there]))
                scores = max(scores, _difference("scores", mine.scores[here], other.scores[there]))
                matched += len(here)
    return Parity(boxes, scores, matched)


def _difference(what: str, wanted: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest number; of scores as a share of .01 at least: smaller ones are
    those of a network that has learned nothing yet. Raises a `Fault` where that is more than allowed.
    """
    if wanted.shape != found.shape:
        raise Fault(f"not the same: {what} are {list(found.shape)}, not {list(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    least = 0.01 if what == "scores" else 1e-12
    difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=least))
    if not difference < TOLERANCE:  # also where it is nan
        raise Fault(f"not the same: {what} differ by {difference:.1e} of the largest, {TOLERANCE:.0e} is allowed")
    return difference


def _threshold(network: Network, images: Tensor) -> float:
    """A score that no box is near to, with a few dozen boxes an image above it."""
    with torch.no_grad():
        _, scores = network.predict(images)
    best = scores.amax(dim=-1).flatten().sort(descending=True).values
    first, last = (min(count * len(images), len(best) - 1) for count in LOOKED_AT)
    ranked = best[first : last + 1]
    if len(ranked) < 2:
        return 0.0
    widest = int((ranked[:-1] - ranked[1:]).argmax())
    return float((ranked[widest] + ranked[widest + 1]) / 2)


def suppressed(boxes: Tensor, scores: Tensor, asked: Suppression, conf: float) -> Detections:
    return nms(boxes, scores, conf=conf, iou=asked.iou, max_det=asked.max_det, multi_label=False, top_k=CANDIDATES)


def _matched(wanted: Detections, found: Detections, above: float, max_det: int) -> tuple[list[int], list[int]]:
    """Indices of detections that are one, of both in the same order. Raises a `Fault` for any without a partner.

    Scores at the threshold, or at the last place of a full list, may fall to either side: they need no partner.
    """
    if len(wanted) == max_det:
        above = max(above, float(wanted.scores[-1]))
    same = pairwise_iou(wanted.boxes, found.boxes) > SAME_IOU
    same &= wanted.labels[:, None] == found.labels
    same &= (wanted.scores[:, None] - found.scores).abs() < SAME_SCORE
    here: list[int] = []
    there: list[int] = []
    left, alone = list(range(len(found))), []
    for index in range(len(wanted)):
        partner = next((other for other in left if same[index, other]), None)
        if partner is not None:
            here.append(index)
            there.append(partner)
            left.remove(partner)
        elif wanted.scores[index] > above + TOLERANCE:
            alone.append(index)
    surplus = [index for index in left if found.scores[index] > above + TOLERANCE]
    if alone or surplus:
        raise Fault(
            f"not the same: {len(alone)} of {len(wanted)} detections are missing, {len(surplus)} of {len(found)} new"
        )
    return here, there


def check_images(source: str | None, imgsz: int, crops: bool = False) -> Tensor:
    """The images of the check ``[3, 3, imgsz, imgsz]`` in 0 to 1, of ``source`` or drawn ones: whole, with grey around
    them, or with `crops` their middles.
    """
    if source is None:
        pictures = [draw_image(imgsz, np.random.default_rng(seed))[0] for seed in range(max(BATCHES))]
    else:
        files = [path for path in find_files(source)[0] if path.suffix.lower() in SUFFIXES]
        if not files:
            raise Fault(f"--source {source}: no image in it")
        pictures = [read_image(files[index % len(files)]) for index in range(max(BATCHES))]
    squares = np.stack([(middle if crops else letterbox)(picture, imgsz)[0] for picture in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().float() / 255
