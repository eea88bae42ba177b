"""How good a classifier is: top-1 and top-5, each class, what is taken for what, and how long an image takes.

Shape letters: N images, C classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ImageSet
from data.structures import Ranking, Sample
from engine.evaluate import Asked, answered, evaluating, file_names
from engine.metrics import times_line, without_nan
from engine.plots import draw_classification
from engine.runs import new_run, table, write_text
from models.network import Network

FIVE = 5  # classes an image that top-5 counts, and that are told of an image
LEAST = 1e-12  # probability whose logarithm is taken: a float32 may be 0


@dataclass(frozen=True)
class ClassMetrics:
    """Numbers of a classifier over one split, each but the loss 0 to 1.

    Attributes:
        top1: share of the images whose likeliest class is theirs.
        top5: share of those that have theirs among the five likeliest; nan with five classes or fewer.
        mean_top1: top-1 of each class, and of these the mean: rare classes count as much as frequent ones.
        loss: mean of -log of the probability of an image's class.
        per_class: name, number of images, top-1, top-5 and precision of every class; nan where nothing was asked, or
            for a precision where nothing was found.
        ms_per_image: where the time went: read, network.
    """

    top1: float
    top5: float
    mean_top1: float
    loss: float
    per_class: tuple[tuple[str, int, float, float, float], ...]
    images: int
    ms_per_image: dict[str, float] = field(default_factory=dict)

    @property
    def fitness(self) -> float:
        """What ``best.pt`` is best in: top-1."""
        return self.top1

    def table(self) -> str:
        """All classes together, then each, in aligned columns."""
        rows = [("all", self.images, self.top1, self.top5, math.nan), *self.per_class]
        return table(rows, ("class", "images", "top-1", "top-5", "precision"))

    def summary(self) -> str:
        """The numbers of all classes in one line, and the milliseconds an image took."""
        top5 = "" if math.isnan(self.top5) else f", top-5 {self.top5:.3f}"
        times = f", {times_line(self.ms_per_image)}" if self.ms_per_image else ""
        return (
            f"top-1 {self.top1:.3f}{top5}, mean of the classes' top-1 {self.mean_top1:.3f}, loss {self.loss:.3f}, "
            f"{self.images} images{times}"
        )


# ---- the numbers


def true_labels(samples: Sequence[Sample]) -> np.ndarray:
    """The class ``[N]`` of each image, which is that of its one box."""
    return np.array([sample.labels[0] for sample in samples], dtype=np.int64)


def class_metrics(truths_N: np.ndarray, scores_NC: np.ndarray, names: Sequence[str]) -> ClassMetrics:
    """The metrics of probabilities against the classes that the images are of.

    Of classes that are equally likely the first is the likelier one.
    """
    images, classes = scores_NC.shape
    order_NC = np.argsort(-scores_NC, axis=1, kind="stable")
    found_N = order_NC[:, 0]
    first_N = found_N == truths_N
    among_N = (order_NC[:, :FIVE] == truths_N[:, None]).any(axis=1) if classes > FIVE else np.full(images, math.nan)
    per_class = tuple(
        (
            name,
            int((truths_N == label).sum()),
            _mean(first_N[truths_N == label]),
            _mean(among_N[truths_N == label]),
            _mean(first_N[found_N == label]),
        )
        for label, name in enumerate(names)
    )
    asked = [row[2] for row in per_class if row[1]]
    true_N = scores_NC[np.arange(images), truths_N].astype(np.float64)
    return ClassMetrics(
        top1=_mean(first_N),
        top5=_mean(among_N),
        mean_top1=_mean(np.array(asked)),
        loss=_mean(-np.log(true_N.clip(LEAST))),
        per_class=per_class,
        images=images,
    )


def ranking(scores_C: Tensor, count: int = FIVE) -> Ranking:
    """The likeliest classes of an image."""
    return Ranking(*(y.cpu() for y in scores_C.float().topk(min(count, len(scores_C)))))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


# ---- a network over a data set


def scores_of(
    network: Network,
    dataset: ImageSet,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
) -> tuple[np.ndarray, dict[str, float]]:
    """The probabilities ``[N, C]`` of every image of ``dataset``, and the milliseconds an image of read and network.

    They are in the order of the samples. ``network`` must be on ``device`` already, in half precision if it should
    compute in it, and comes back in the mode it was in.
    """
    seconds = {"read": 0.0, "network": 0.0}
    found = np.zeros((len(dataset), network.num_classes), dtype=np.float32)
    how: Any = {"batch_size": batch_size, "device": device, "workers": workers, "progress": progress}
    precision = next(network.parameters()).dtype
    with evaluating(network):
        for batch, scores in answered(dataset, lambda x, _: network.predict(x), seconds, precision=precision, **how):
            found[list(batch.indices)] = scores.float().cpu().numpy()
    return found, {name: 1000 * total / max(len(dataset), 1) for name, total in seconds.items()}


def evaluate_classes(
    network: Network, dataset: ImageSet, *, names: Sequence[str] | None = None, **options: Any
) -> ClassMetrics:
    """Run ``network`` over ``dataset`` and measure it; ``options`` are those of `scores_of`.

    ``names`` are the classes for the table, their numbers by default.
    """
    scores, ms_per_image = scores_of(network, dataset, **options)
    names = names or [str(label) for label in range(network.num_classes)]
    return replace(class_metrics(true_labels(dataset.samples), scores, names), ms_per_image=ms_per_image)


# ---- what val.py writes


def class_metrics_json(metrics: ClassMetrics) -> str:
    """All numbers by name; what is nan is null."""
    return json.dumps(without_nan({"classify": asdict(metrics)}), indent=1) + "\n"


def ranking_lines(found: Ranking, *, scores: bool) -> str:
    """A line a class: its number, and its score if asked; the likeliest first."""
    rows = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    return "".join(f"{label} {score:.6g}\n" if scores else f"{label}\n" for label, score in rows)


def prediction_rows(samples: Sequence[Sample], found: Sequence[Ranking], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row an image: its file, its class, and the likeliest classes with their scores."""
    return [
        {"image": str(sample.path), "class": names[sample.labels[0]], "found": ranked_rows(one, names)}
        for sample, one in zip(samples, found, strict=True)
    ]


def ranked_rows(found: Ranking, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    return [{"class": names[label], "label": label, "score": round(score, 6)} for label, score in rows]


def validate_classifier(asked: Asked) -> None:
    """Measures a classifier, prints its numbers, and writes what is asked for into a folder of its own."""
    options, samples, names = asked.options, asked.split.samples, asked.data.names
    images = ImageSet(samples, asked.imgsz, None, seed=0, cache=False, crop=True)
    scores, ms_per_image = scores_of(
        asked.network, images, batch_size=options.batch_size, device=asked.device, workers=options.workers
    )
    metrics = replace(class_metrics(true_labels(samples), scores, names), ms_per_image=ms_per_image)
    print(metrics.table(), metrics.summary(), sep="\n\n")

    folder = new_run(options.project, options.name, options.exist_ok)
    write_text(folder / "metrics.json", class_metrics_json(metrics))
    found = [ranking(row) for row in torch.from_numpy(scores)]
    if options.save_json:
        write_text(folder / "predictions.json", json.dumps(prediction_rows(samples, found, names)))
    if options.save_txt:
        pairs = zip(file_names(samples), found, strict=True)
        for name, one in tqdm(pairs, "writing labels", len(samples), unit="image", delay=2, leave=False):
            file = folder / "labels" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, ranking_lines(one, scores=options.save_conf))
    if not options.noplots:
        draw_classification(folder, samples, scores, names)
    print(f"results in {folder}")
