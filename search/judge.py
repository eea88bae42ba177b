"""Many subnets calibrated and measured at once. What lies before the first choice runs once for many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import ImageSet
from data.loader import batches, collate
from data.masks import read_mask
from data.structures import Batch, Detections, Fault, Sample
from engine.calibrate import calibrate_by
from engine.classify import ClassMetrics, class_metrics, true_labels
from engine.evaluate import pixels, to_original
from engine.jackknife import remaining
from engine.metrics import jackknife_ap
from engine.nms import iou_for, nms
from engine.segment import SegMetrics, confusion_of, maps_of, seg_metrics
from engine.tasks import task_of
from models.network import Network
from models.spec import ModelSpec

CONFIDENCE, IOU, MOST = 0.001, 0.6, 300  # as in `engine.evaluate.evaluate`
TOGETHER = 8  # subnets behind one pass of the trunk; after so many, Ctrl-C finds some finished

Found = dict[int, Any]  # what a network makes of images, by their place in their set


@dataclass(frozen=True)
class Verdict:
    """What was measured of a subnet: metrics of its task, and its score with each group of images left out in turn.

    The score is the first of the task's columns: AP of a detector, top-1 of a classifier, mIoU of a segmenter. The
    groups are those of `engine.metrics.jackknife_ap`: the same for all subnets, so that they compare in pairs.
    """

    metrics: Any
    without: tuple[float, ...]


@dataclass(frozen=True)
class Judging:
    """How subnets of a task are measured; a row of `JUDGINGS`.

    Attributes:
        found: what a network makes of each image of a batch, from its head's outputs and the images' samples; in the
            order of the batch.
        measured: metrics, and the score without each group, of images, what was found in each, and names of classes.
    """

    found: Callable[[Network, Any, Batch, Sequence[Sample]], Iterator[Any]]
    measured: Callable[[Sequence[Sample], Sequence[Any], Sequence[str]], tuple[Any, tuple[float, ...]]]


def first_choice(network: Network, choices: Sequence[str]) -> int:
    """The first row of a supernet that holds any of the named choices: rows before it are the same in every subnet."""
    return next(node.index for node in network.graph.nodes if any(choice.name in choices for choice in node.choices))


def share_trunk(networks: Sequence[Network], rows: int) -> None:
    """Gives all networks the first one's modules for the first `rows` rows, whose weights are equal anyway."""
    for network in networks[1:]:
        for index in range(rows):
            network.layers[index] = networks[0].layers[index]


def judge(
    networks: Sequence[Network],
    trunk_rows: int,
    calibration: Sequence[Tensor],
    images: ImageSet,
    *,
    names: Sequence[str],
    batch_size: int,
    device: torch.device,
    progress: bool = True,
    done: Callable[[int, Verdict], None] | None = None,
    first: Sequence[int] = (),
    keep: Callable[[int, Verdict], bool] | None = None,
) -> list[Verdict]:
    """Calibrates every network on the `calibration` batches and measures it on `images`.

    Equal to `engine.calibrate.calibrate` and `engine.evaluate.evaluate` of one after the other; the networks are left
    calibrated, in eval mode, with one trunk in common. ``done(place, verdict)`` hears of each network as soon as it is
    measured, so that a Ctrl-C costs no more than what was under way.

    With `keep` the `first` images, by their places in the set, come before the others: ``keep(place, verdict)`` hears
    what was measured on these alone, and where it says no, that is the verdict, and `done` does not hear of it.
    """
    share_trunk(networks, trunk_rows)
    whole = batches(images, batch_size)
    chosen = set(first)
    others = [place for place in range(len(images)) if place not in chosen]
    parts = [networks[start : start + TOGETHER] for start in range(0, len(networks), TOGETHER)]
    passes = len(parts) * (len(calibration) + len(whole))
    verdicts: list[Verdict] = []
    with tqdm(
        total=passes, desc=f"judging {len(networks)} subnets", unit="batch", disable=not progress, leave=False
    ) as bar:

        def look(some: Sequence[Network], loader: Iterable[Batch], calibration: Sequence[Tensor]) -> list[Found]:
            judging = judging_of(some[0].spec)
            return _found(some, judging, trunk_rows, calibration, images.samples, loader, device, bar.update)

        def measured(found: Found) -> Verdict:
            samples = [images.samples[index] for index in sorted(found)]
            in_order = [found[index] for index in sorted(found)]
            return Verdict(*judging_of(networks[0].spec).measured(samples, in_order, names))

        for part in parts:
            found = look(part, by_place(images, sorted(chosen), batch_size) if keep else whole, calibration)
            kept = range(len(part))
            early: dict[int, Verdict] = {}
            if keep:
                early = {place: measured(found[place]) for place in kept}
                stay = [place for place in kept if keep(len(verdicts) + place, early[place])]
                early = {place: verdict for place, verdict in early.items() if place not in stay}
                rest = look([part[n] for n in stay], by_place(images, others, batch_size), ()) if stay else []
                for place, more in zip(stay, rest, strict=True):
                    found[place] |= more
            for place in kept:
                verdict = early.get(place) or measured(found[place])
                if done is not None and place not in early:
                    done(len(verdicts), verdict)
                verdicts.append(verdict)
    return verdicts


def by_place(images: ImageSet, places: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Some images of a set in batches, by their places in it."""
    for start in range(0, len(places), batch_size):
        yield collate([images[place] for place in places[start : start + batch_size]])


@torch.no_grad()
def _found(
    networks: Sequence[Network],
    judging: Judging,
    trunk_rows: int,
    calibration: Sequence[Tensor],
    samples: Sequence[Sample],
    loader: Iterable[Batch],
    device: torch.device,
    passed: Callable[[], Any],
) -> list[Found]:
    """What every network finds in the images, by their place in their set; calibrated first, if there are batches."""
    subnets = nn.ModuleList(networks).eval()
    rows = range(trunk_rows, len(networks[0].layers))

    def tails(batch: Tensor) -> Iterator[Any]:
        trunk, _ = networks[0].run(range(trunk_rows), {-1: batch})
        for network in networks:
            yield network.run(rows, trunk)[0][rows[-1]]

    def run_all(batch: Tensor) -> None:
        for _ in tails(batch):
            pass
        passed()

    if calibration:
        calibrate_by(subnets, run_all, calibration)
    found: list[Found] = [{} for _ in networks]
    for batch in loader:
        shown = [samples[index] for index in batch.indices]
        for network, outputs, kept in zip(networks, tails(pixels(batch, device)), found, strict=True):
            kept.update(zip(batch.indices, judging.found(network, outputs, batch, shown), strict=True))
        passed()
    return found


# ---- by task


def found_boxes(network: Network, outputs: Any, batch: Batch, samples: Sequence[Sample]) -> Iterator[Detections]:
    for letterbox, *predicted in zip(batch.letterboxes, *network.decode(outputs), strict=True):
        best = nms(*predicted, conf=CONFIDENCE, iou=iou_for(network, IOU), max_det=MOST, multi_label=True)
        yield to_original(best, letterbox)


def found_classes(network: Network, outputs: Any, batch: Batch, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    """The probabilities ``[C]`` of each image."""
    scores: Any = network.decode(outputs)
    yield from scores.float().cpu().numpy()


def found_pixels(network: Network, outputs: Any, batch: Batch, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    """The confusion ``[K, K]`` of each image's pixels: maps of all images would take too much memory."""
    for found, sample in zip(maps_of(network, outputs, batch.letterboxes), samples, strict=True):
        assert sample.mask is not None, "a segmenter is measured by masks"
        yield confusion_of(found.numpy(), read_mask(sample.mask), network.num_classes)


def jackknife_top1(
    samples: Sequence[Sample], scores: Sequence[np.ndarray], names: Sequence[str]
) -> tuple[ClassMetrics, tuple[float, ...]]:
    """The metrics of a classifier, and top-1 with each group of images left out in turn, as `jackknife_ap` does it."""
    truths_N, scores_NC = true_labels(samples), np.stack(scores)
    right_N = scores_NC.argmax(axis=1) == truths_N
    without = tuple(float(right_N[kept].mean()) for kept in remaining(len(samples)))
    return class_metrics(truths_N, scores_NC, names), without


def jackknife_miou(
    samples: Sequence[Sample], confusions: Sequence[np.ndarray], names: Sequence[str]
) -> tuple[SegMetrics, tuple[float, ...]]:
    """The metrics of a segmenter, and mIoU with each group of images left out in turn, as `jackknife_ap` does it."""
    confusions_NKK = np.stack(confusions)
    without = tuple(seg_metrics(confusions_NKK[kept], names).miou for kept in remaining(len(samples)))
    return seg_metrics(confusions_NKK, names), without


JUDGINGS = {
    "detect": Judging(found_boxes, jackknife_ap),
    "classify": Judging(found_classes, jackknife_top1),
    "segment": Judging(found_pixels, jackknife_miou),
}


def judging_of(spec: ModelSpec) -> Judging:
    """How subnets of a model are measured. Raises a Fault for a task that no search judges by."""
    task = task_of(spec)
    if task.name not in JUDGINGS:
        raise Fault(f"{spec.path}: {task.network}; search.py judges networks that {' or '.join(JUDGINGS)}")
    return JUDGINGS[task.name]
