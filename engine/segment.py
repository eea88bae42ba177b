"""How good a segmenter is: the intersection over union of each class, over all pixels of a split that are not void.

Shape letters: N images, K classes, H and W rows and columns of an image as it is on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.dataset import ImageSet
from data.masks import read_mask
from data.structures import VOID, LabelMap, Letterbox, Sample
from engine.evaluate import Asked, answered, evaluating, file_names, timed
from engine.jackknife import groups_of, jackknife_error
from engine.metrics import times_line, without_nan
from engine.outcomes import most_wrong
from engine.plots import WORST_IMAGES, draw_segmentation
from engine.runs import atomically, new_run, table, write_text
from models.network import Network
from models.ops.primitives import wide

ALL_ALIKE = "none"  # of --class-weights


@dataclass(frozen=True)
class SegMetrics:
    """Numbers of a segmenter over one split, each 0 to 1, of all pixels that are not void, at the images' own size.

    Attributes:
        miou: the mean over the classes of their IoU; a class that neither is there nor was found is left out.
        pixel_accuracy: share of the pixels whose class was found.
        mean_recall: the mean over the classes of the share of their pixels that was found.
        miou_error: standard error of `miou`, nan with fewer than 4 images. Frames of one film are alike, and their
            mean is less sure than this says.
        per_class: name, share of the pixels, IoU, recall and precision of every class; nan where nothing was asked.
        ms_per_image: where the time went: read, network, compare.
    """

    miou: float
    pixel_accuracy: float
    mean_recall: float
    miou_error: float
    per_class: tuple[tuple[str, float, float, float, float], ...]
    images: int
    ms_per_image: dict[str, float] = field(default_factory=dict)

    @property
    def fitness(self) -> float:
        """What ``best.pt`` is best in: mIoU."""
        return self.miou

    def table(self) -> str:
        """All classes together, then each, in aligned columns."""
        rows = [("all", 1.0, self.miou, self.mean_recall, math.nan), *self.per_class]
        return table(rows, ("class", "pixels", "IoU", "recall", "precision"))

    def summary(self) -> str:
        """The numbers of all classes in one line, and the milliseconds an image took."""
        error = "" if math.isnan(self.miou_error) else f" +- {self.miou_error:.3f}"
        times = f", {times_line(self.ms_per_image)}" if self.ms_per_image else ""
        return (
            f"mIoU {self.miou:.3f}{error}, pixel accuracy {self.pixel_accuracy:.3f}, mean recall "
            f"{self.mean_recall:.3f}, {self.images} images{times}"
        )


# ---- the numbers


def confusion_of(found_HW: np.ndarray, truth_HW: np.ndarray, classes: int) -> np.ndarray:
    """Counts ``[K, K]`` of an image's pixels that are not void: the row is the class found, the column the true one."""
    asked = truth_HW != VOID
    pairs = found_HW[asked].astype(np.int64) * classes + truth_HW[asked]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def ious(confusion_KK: np.ndarray) -> np.ndarray:
    """Of each class the pixels that were found, to all that are of it or were taken for it ``[K]``; nan of none."""
    right = confusion_KK.diagonal()
    return _shares(right, confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1) - right)


def seg_metrics(confusions_NKK: np.ndarray, names: Sequence[str]) -> SegMetrics:
    """The metrics of the pixels of all images together: a class that fills few images counts by its pixels in them."""
    total_KK = confusions_NKK.sum(axis=0)
    right_K, true_K, found_K = total_KK.diagonal(), total_KK.sum(axis=0), total_KK.sum(axis=1)
    recalls_K = _shares(right_K, true_K)
    columns = (true_K / max(1, true_K.sum()), ious(total_KK), recalls_K, _shares(right_K, found_K))
    return SegMetrics(
        miou=_mean(ious(total_KK)),
        pixel_accuracy=float(right_K.sum() / true_K.sum()) if true_K.any() else math.nan,
        mean_recall=_mean(recalls_K),
        miou_error=miou_error(confusions_NKK),
        per_class=tuple(zip(names, *(column.tolist() for column in columns), strict=True)),
        images=len(confusions_NKK),
    )


def miou_error(confusions_NKK: np.ndarray) -> float:
    """The standard error of the mIoU, by the jackknife."""
    groups, total_KK = groups_of(len(confusions_NKK)), confusions_NKK.sum(axis=0)
    left_KK = (total_KK - confusions_NKK[group::groups].sum(axis=0) for group in range(groups))
    return jackknife_error([_mean(ious(counts_KK)) for counts_KK in left_KK])


def _shares(parts_K: np.ndarray, wholes_K: np.ndarray) -> np.ndarray:
    """Parts of wholes, nan where there is no whole."""
    return np.where(wholes_K > 0, parts_K / np.maximum(wholes_K, 1), math.nan)


def _mean(values_K: np.ndarray) -> float:
    defined = values_K[~np.isnan(values_K)]
    return float(defined.mean()) if defined.size else math.nan


def class_weights(samples: Sequence[Sample], classes: int) -> Tensor:
    """How much a pixel of each class counts, so that rare classes are learned as well ``[K]``: the median frequency to
    that of the class (Eigen and Fergus, arXiv 1411.4734).

    The frequency of a class is its share of the pixels of those images that show it. What no image shows counts 1.
    """
    own_K, among_K = np.zeros(classes), np.zeros(classes)
    for sample in samples:
        assert sample.areas is not None, "a mask knows how many pixels are of each class"
        own_K += np.bincount(sample.labels, sample.areas, minlength=classes)
        among_K += np.bincount(sample.labels, minlength=classes) * sample.areas.sum()
    there = own_K > 0
    shares = own_K[there] / among_K[there]
    weights = torch.ones(classes)
    weights[torch.from_numpy(there)] = torch.from_numpy(np.median(shares) / shares).float()
    return weights


# ---- the class of every pixel


def label_map(scores: Tensor, letterbox: Letterbox) -> Tensor:
    """The likeliest class of every pixel of an image ``[H, W]`` uint8, from scores ``[K, ...]`` of the network's input.

    What the image was padded with is cut away, and the scores of the rest are scaled to its own size, linearly and one
    class after the other: all of them together would take gigabytes of a large photo.
    """
    top, left, (height, width) = letterbox.pad_y, letterbox.pad_x, (letterbox.height, letterbox.width)
    rows, columns = (max(1, round(side * letterbox.scale)) for side in (height, width))
    inside = scores[:, top : top + rows, left : left + columns]
    if (rows, columns) == (height, width):
        return inside.argmax(dim=0).to(torch.uint8)
    best = labels = None
    for label, score in enumerate(inside):
        whole = F.interpolate(score[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
        if best is None or labels is None:
            best, labels = whole, torch.zeros_like(whole, dtype=torch.uint8)
            continue
        labels.masked_fill_(whole > best, label)
        best = torch.maximum(best, whole)
    assert labels is not None
    return labels


def label_maps(network: Any, images: Tensor, letterboxes: Sequence[Letterbox]) -> list[LabelMap]:
    """The classes of the pixels of each image of a batch ``[N, 3, ...]``, at the images' own size and on the CPU.

    By the logits of a `Network`; an exported file gives probabilities, which agree but for pixels at some borders.
    """
    if not isinstance(network, Network):
        scores = network.predict(images)
        return [LabelMap(label_map(y, box).cpu()) for y, box in zip(scores, letterboxes, strict=True)]
    outputs, _ = network(images)
    return [LabelMap(one) for one in maps_of(network, outputs, letterboxes)]


def maps_of(network: Network, outputs: Sequence[Tensor], letterboxes: Sequence[Letterbox]) -> Iterator[Tensor]:
    """`label_map` of each image of a batch by the network's outputs, on the CPU, one at a time: enlarged logits are
    large.
    """
    logits = [wide(y) for y in outputs]
    for place, letterbox in enumerate(letterboxes):
        scores = network.head.enlarged([y[place : place + 1] for y in logits])[0]
        yield label_map(scores, letterbox).cpu()


# ---- a network over a data set


def confusions_of(
    network: Network,
    dataset: ImageSet,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    tell: Callable[[int, LabelMap], None] | None = None,
) -> tuple[np.ndarray, dict[str, float]]:
    """`confusion_of` every image ``[N, K, K]``, and the milliseconds an image of read, network and compare.

    They are in the order of the samples. ``network`` must be on ``device`` already, in half precision if it should
    compute in it, and comes back in the mode it was in. ``tell`` gets the number and the classes of each image.
    """
    seconds = {"read": 0.0, "network": 0.0, "compare": 0.0}
    classes = network.num_classes
    found = np.zeros((len(dataset), classes, classes), dtype=np.int64)
    how: Any = {"batch_size": batch_size, "device": device, "workers": workers, "progress": progress}
    precision = next(network.parameters()).dtype
    with evaluating(network):
        for batch, maps in answered(
            dataset, lambda x, batch: label_maps(network, x, batch.letterboxes), seconds, precision=precision, **how
        ):
            with timed(seconds, "compare"):
                for index, one in zip(batch.indices, maps, strict=True):
                    file = dataset.samples[index].mask
                    assert file is not None, "a segmenter is measured by masks"
                    found[index] = confusion_of(one.labels.numpy(), read_mask(file), classes)
                    if tell:
                        tell(index, one)
    return found, {name: 1000 * total / max(len(dataset), 1) for name, total in seconds.items()}


def evaluate_pixels(
    network: Network, dataset: ImageSet, *, names: Sequence[str] | None = None, **options: Any
) -> SegMetrics:
    """Run ``network`` over ``dataset`` and measure it; ``options`` are those of `confusions_of`.

    ``names`` are the classes for the table, their numbers by default.
    """
    confusions, ms_per_image = confusions_of(network, dataset, **options)
    names = names or [str(label) for label in range(network.num_classes)]
    return replace(seg_metrics(confusions, names), ms_per_image=ms_per_image)


def found_again(
    network: Network, dataset: ImageSet, places: Sequence[int], device: torch.device | str
) -> dict[int, np.ndarray]:
    """The classes ``[H, W]`` that the network finds in some images; the maps of all would take too much memory."""
    view = ImageSet([dataset.samples[at] for at in places], dataset.imgsz, None, cache=False, rect=dataset.rect)
    maps: dict[int, np.ndarray] = {}

    def keep(place: int, found: LabelMap) -> None:
        maps[places[place]] = found.labels.numpy()

    if places:
        confusions_of(network, view, batch_size=1, device=device, progress=False, tell=keep)
    return maps


# ---- what val.py writes


def seg_metrics_json(metrics: SegMetrics) -> str:
    """All numbers by name; what is nan is null."""
    return json.dumps(without_nan({"segment": asdict(metrics)}), indent=1) + "\n"


def image_rows(samples: Sequence[Sample], confusions_NKK: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row an image: its file, its mIoU, its pixel accuracy, and the IoU of each class that is there or was found."""
    rows = []
    for sample, confusion in zip(samples, confusions_NKK, strict=True):
        of_classes = ious(confusion)
        accuracy = confusion.trace() / confusion.sum() if confusion.any() else math.nan
        rows.append(
            {
                "image": str(sample.path),
                "miou": round(_mean(of_classes), 6),
                "pixel_accuracy": round(float(accuracy), 6),
                "iou": {
                    name: round(value, 6)
                    for name, value in zip(names, of_classes.tolist(), strict=True)
                    if not math.isnan(value)
                },
            }
        )
    return rows


def label_png(found: LabelMap) -> bytes:
    """A grey PNG with the class of every pixel: what ``format: masks`` reads."""
    return bytes(cv2.imencode(".png", found.labels.numpy())[1])


def validate_segmenter(asked: Asked) -> None:
    """Measures a segmenter, prints its numbers, and writes what is asked for into a folder of its own."""
    options, samples, names = asked.options, asked.split.samples, asked.data.names
    images = ImageSet(samples, asked.imgsz, None, seed=0, cache=False, rect=options.rect)
    folder = new_run(options.project, options.name, options.exist_ok)
    files = file_names(samples)

    def write_map(place: int, found: LabelMap) -> None:
        file = folder / "labels" / f"{files[place]}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomically(file) as temporary:
            Path(temporary).write_bytes(label_png(found))

    confusions, ms_per_image = confusions_of(
        asked.network,
        images,
        batch_size=options.batch_size,
        device=asked.device,
        workers=options.workers,
        tell=write_map if options.save_txt else None,
    )
    metrics = replace(seg_metrics(confusions, names), ms_per_image=ms_per_image)
    print(metrics.table(), metrics.summary(), sep="\n\n")
    write_text(folder / "metrics.json", seg_metrics_json(metrics))
    if options.save_json:
        write_text(folder / "predictions.json", json.dumps(without_nan(image_rows(samples, confusions, names))))
    if not options.noplots:
        maps = found_again(asked.network, images, most_wrong(confusions, WORST_IMAGES), asked.device)
        draw_segmentation(folder, samples, confusions, maps, names)
    print(f"results in {folder}")
