"""How good explanations are: what a network still says when it sees only what they point at. And how sure that is.

Average drop and increase in confidence are those of Grad-CAM++ (Chattopadhay et al., arXiv 1710.11063, section 4.1),
insertion and deletion those of RISE (Petsiuk et al., arXiv 1806.07421, section 3.3). A map of ones has no drop at
all, so no number means anything alone: they stand beside the map's area and beside maps that look at nothing.

Shape letters: K decisions, H W pixels, I images, B resamples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.structures import Fault, nearest
from engine.heatmaps import Decisions, answers, confidences
from engine.metrics import without_nan
from engine.runs import table, write_text
from models.network import Network

LEAST = 1e-6  # a confidence under it has nothing left to drop
IMAGENET_MEAN = (0.485, 0.456, 0.406)
SPACES = {"pixel": (0.0, 0.0, 0.0), "norm": IMAGENET_MEAN}  # what stands where a map is 0
BLUR = 16  # what insertion starts from: the image in cells of 1/16 of its sides
RESAMPLES = 2000
FEWEST = 5  # images that an interval is drawn from
CONTROLS = ("random", "ones", "centre")
FORMAT = "oneshot-yolo explain 1"


@dataclass(frozen=True)
class Number:
    """One of the numbers of an explanation: its title and whether less of it is better (None: neither)."""

    title: str
    less: bool | None
    meaning: str


NUMBERS = {
    "drop": Number("AD %", True, "average drop: how much less sure, seeing only what the map shows"),
    "increase": Number("IIC %", False, "increase in confidence: how often it is more sure than before"),
    "area": Number("area", None, "mean of the map, 0 to 1"),
    "insertion": Number("insertion", False, "mean confidence while the hottest pixels come into a blurred image"),
    "deletion": Number("deletion", True, "mean confidence while the hottest pixels are taken away"),
    "pointing": Number("pointing %", False, "how often the hottest pixel lies in the box"),
    "energy": Number("energy", False, "share of the map's heat that lies in the box"),
}


# ---- of each decision


def average_drop(before: Tensor, after: Tensor) -> Tensor:
    """``100 max(0, Y - O) / Y`` per cent of each decision ``[K]``: its share of the average drop."""
    return 100 * (before - after).clamp(min=0) / before.clamp(min=LEAST)


def increase_in_confidence(before: Tensor, after: Tensor) -> Tensor:
    """100 where ``O > Y`` and 0 elsewhere, ``[K]``: the share of 100s is the increase in confidence, in per cent."""
    return 100.0 * (after > before)


def seen_through(images: Tensor, heat: Tensor, fill: Sequence[float]) -> Tensor:
    """Images ``[K, 3, H, W]`` as a map shows them: whole where it is 1, the colour `fill` where it is 0."""
    share = heat[:, None]
    return images * share + images.new_tensor(fill)[:, None, None] * (1 - share)


def blurred(images: Tensor) -> Tensor:
    """Images of which only large things can be told."""
    size = images.shape[2:]
    coarse = F.adaptive_avg_pool2d(images, (min(size[0], BLUR), min(size[1], BLUR)))
    return F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def hottest_first(heat: Tensor) -> Tensor:
    """The place of each pixel in the order of falling heat, ``[K, H * W]``. Equal ones stand in a random order."""
    shuffle = torch.randperm(heat[0].numel(), generator=torch.Generator().manual_seed(0)).to(heat.device)
    order = shuffle[heat.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    places = torch.arange(order.shape[1], device=heat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


@torch.no_grad()
def sure(network: Network, images: Tensor, asked: Decisions, batch_size: int) -> Tensor:
    """How sure the network is of each decision, seeing image k for decision k; ``[K]``."""
    found = []
    for start in range(0, len(asked), batch_size):
        part = images[start : start + batch_size]
        outputs, _ = network(part)
        boxes, scores = answers(network, outputs, part.shape[2:])
        found.append(confidences(boxes, scores, asked[start : start + batch_size])[0].float())
    return torch.cat(found) if found else images.new_zeros(0)


def judge(
    network: Network,
    images: Tensor,
    asked: Decisions,
    heat: Tensor,
    before: Tensor,
    *,
    space: str = "pixel",
    steps: int = 0,
    boxes: bool = False,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """The `NUMBERS` of maps ``[K, H, W]`` from 0 to 1, one of each decision; ``[K]`` each.

    Row k of `images` is the image of decision k, and `before` how sure the network is of it as it is. `steps` is how
    many parts the order of pixels is cut in for insertion and deletion, which are left out with 0 and for maps without
    an order. `boxes` asks for pointing and energy too.
    """
    fill = SPACES[space]
    after = sure(network, seen_through(images, heat, fill), asked, batch_size)
    found = {
        "drop": average_drop(before, after),
        "increase": increase_in_confidence(before, after),
        "area": heat.mean(dim=(1, 2)),
    }
    if boxes:
        found |= inside(heat, asked.boxes)
    if steps and len(asked):
        place, start = hottest_first(heat).view_as(heat)[:, None], blurred(images)
        empty = images.new_tensor(fill)[:, None, None].expand_as(images)
        curves = {"insertion": [sure(network, start, asked, batch_size)], "deletion": [before]}
        for step in range(1, steps):
            hot = place < round(step / steps * heat[0].numel())
            curves["insertion"].append(sure(network, torch.where(hot, images, start), asked, batch_size))
            curves["deletion"].append(sure(network, torch.where(hot, empty, images), asked, batch_size))
        curves["insertion"].append(before)
        curves["deletion"].append(sure(network, empty, asked, batch_size))
        found |= {name: torch.trapezoid(torch.stack(curve), dx=1 / steps, dim=0) for name, curve in curves.items()}
    return found


def inside(heat: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Whether the hottest pixel of each map lies in the decision's box (100 or 0), and the share of its heat there.

    A map that is 0 everywhere points nowhere.
    """
    height, width = heat.shape[1:]
    y = torch.arange(height, device=heat.device) + 0.5
    x = torch.arange(width, device=heat.device) + 0.5
    left, top, right, bottom = boxes.to(heat)[:, :, None].unbind(1)
    covered = ((y > top) & (y < bottom))[:, :, None] & ((x > left) & (x < right))[:, None]
    total, hottest = heat.sum(dim=(1, 2)), heat.flatten(1).argmax(dim=1)
    hit = covered.flatten(1).gather(1, hottest[:, None])[:, 0] & (total > 0)
    return {"pointing": 100.0 * hit, "energy": (heat * covered).sum(dim=(1, 2)) / total.clamp(min=LEAST)}


# ---- of all decisions


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies, 95 of 100 times, had other images been drawn; nan where those are too few to tell."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value) or math.isnan(self.low):
            return "-" if math.isnan(self.value) else f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @property
    def sure(self) -> bool:
        """Whether 0 is not among the likely values."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Explained:
    """What was measured, decision by decision: what metrics.json holds.

    Attributes:
        about: weights, data, method, target and whatever else it was measured with, plain values.
        images: of each decision the image's path, ``K`` of them; those of an image stand together.
        classes: of each decision its class's name.
        confidences: ``[K]``, how sure the network is, 0 to 1.
        levels: by name the `NUMBERS` of each level, ``[K]``, fine first.
        controls: the same of maps that look at nothing.
        strides: of the levels.
    """

    about: Mapping[str, Any]
    images: Sequence[str]
    classes: Sequence[str]
    confidences: np.ndarray
    levels: Mapping[str, Mapping[str, np.ndarray]]
    controls: Mapping[str, Mapping[str, np.ndarray]]
    strides: Mapping[str, int] = field(default_factory=dict)

    @property
    def maps(self) -> dict[str, Mapping[str, np.ndarray]]:
        return {**self.levels, **self.controls}

    def of_classes(self, names: Sequence[str]) -> Explained:
        """The decisions for some classes only."""
        kept = [k for k, name in enumerate(self.classes) if name in names]

        def part(maps: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
            return {level: {key: y[kept] for key, y in numbers.items()} for level, numbers in maps.items()}

        return Explained(
            self.about,
            [self.images[k] for k in kept],
            [self.classes[k] for k in kept],
            self.confidences[kept],
            part(self.levels),
            part(self.controls),
            self.strides,
        )


@dataclass(frozen=True)
class LevelMetrics:
    """Average drop and increase in confidence of a level, in per cent."""

    name: str
    ad: float
    iic: float


def level_metrics(explained: Explained) -> list[LevelMetrics]:
    """Of every level, fine first: what `engine.select` goes by."""
    return [
        LevelMetrics(name, float(np.mean(numbers["drop"])), float(np.mean(numbers["increase"])))
        for name, numbers in explained.levels.items()
    ]


def interval(explained: Explained, level: str, number: str) -> Interval:
    """The mean of a number of a level or control, and its 95 % interval by the bootstrap over images."""
    values = explained.maps[level][number]
    images = list(dict.fromkeys(explained.images))
    means = _resampled_means([(explained.images, values)], images)
    return _interval(_mean(values), means[0])


def intervals(explained: Explained) -> dict[str, dict[str, Interval]]:
    """`interval` of every number of every level and control."""
    return {
        name: {number: interval(explained, name, number) for number in NUMBERS if number in numbers}
        for name, numbers in explained.maps.items()
    }


def numbers_of(found: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """The `NUMBERS` that any level or control has."""
    return [number for number in NUMBERS if any(number in of_map for of_map in found.values())]


def difference(one: Explained, other: Explained, level: str, number: str, against: str | None = None) -> Interval:
    """How much larger a number of a level is in `other` than in `one`, by the paired bootstrap over their images.

    `against` is the level or control of `one`, where it is not that of `other`. Each resample draws whole images, with
    all that both have measured on them; images that only one of them knows do not count. nan where they have no image
    in common.
    """
    known = set(other.images)
    images = [image for image in dict.fromkeys(one.images) if image in known]
    pairs = ((one, against or level), (other, level))
    sides = [(side.images, side.maps[name][number]) for side, name in pairs]
    if not images:
        return Interval(math.nan, math.nan, math.nan)
    shared = set(images)
    before, after = (_mean(values[np.array([image in shared for image in owners])]) for owners, values in sides)
    means = _resampled_means(sides, images)
    return _interval(after - before, means[1] - means[0])


def wins(one: Explained, other: Explained, level: str) -> float:
    """Per cent of the images on which `other` drops less (Grad-CAM++'s third number); a tie is half."""
    first, second = (_by_image(side.images, side.maps[level]["drop"]) for side in (one, other))
    shared = [image for image in first if image in second]
    scores = [(second[image] < first[image]) + (second[image] == first[image]) / 2 for image in shared]
    return 100 * float(np.mean(scores)) if scores else math.nan


def _by_image(images: Sequence[str], values: np.ndarray) -> dict[str, float]:
    gathered: dict[str, list[float]] = {}
    for image, value in zip(images, values.tolist(), strict=True):
        gathered.setdefault(image, []).append(value)
    return {image: float(np.mean(of_image)) for image, of_image in gathered.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _interval(value: float, means: np.ndarray) -> Interval:
    means = means[np.isfinite(means)]
    low, high = np.percentile(means, (2.5, 97.5)) if len(means) else (math.nan, math.nan)
    return Interval(value, float(low), float(high))


def _resampled_means(
    sides: Sequence[tuple[Sequence[str], np.ndarray]], images: Sequence[str], seed: int = 0
) -> list[np.ndarray]:
    """For each side, owners and values ``[K]``, the means of `RESAMPLES` draws of `images`: the same draws for all.

    None of fewer than `FEWEST` images, which drawn again say nothing of others.
    """
    place = {image: index for index, image in enumerate(images)}
    totals = []
    for owners, values in sides:
        known = [(place[owner], value) for owner, value in zip(owners, values.tolist(), strict=True) if owner in place]
        index = np.array([at for at, _ in known], dtype=np.int64)
        weights = np.array([value for _, value in known])
        count = np.bincount(index, minlength=len(images))
        totals.append(np.stack([np.bincount(index, weights, minlength=len(images)), count], axis=1))
    if len(images) < FEWEST:
        return [np.full(0, math.nan) for _ in sides]
    found: list[list[np.ndarray]] = [[] for _ in sides]
    rng = np.random.default_rng(seed)
    for _ in range(0, RESAMPLES, 100):  # some at a time: draws times images may be many
        times_BI = rng.multinomial(len(images), np.full(len(images), 1 / max(len(images), 1)), size=100)
        for means, total_I2 in zip(found, totals, strict=True):
            drawn_B2 = times_BI @ total_I2
            with np.errstate(invalid="ignore"):
                means.append(drawn_B2[:, 0] / drawn_B2[:, 1])
    return [np.concatenate(means) for means in found]


# ---- as text


def metrics_table(found: Mapping[str, Mapping[str, Interval]], strides: Mapping[str, int]) -> str:
    """A row a level and a control, a column a number with its interval; `found` is what `intervals` gives."""
    known = numbers_of(found)
    rows = [
        (
            f"{name} (stride {strides[name]})" if name in strides else name,
            *(str(of_map[number]) if number in of_map else "-" for number in known),
        )
        for name, of_map in found.items()
    ]
    return table(rows, ("map", *(NUMBERS[number].title for number in known)))


def against_chance(explained: Explained) -> str:
    """A row a level: how much each number is above that of the random maps of the same images; * where that is sure."""
    known = [number for number in NUMBERS if number in explained.controls["random"]]
    rows = []
    for level in explained.levels:
        changes = [difference(explained, explained, level, number, "random") for number in known]
        rows.append((level, *(f"{change}{' *' * change.sure}" for change in changes)))
    return table(rows, ("level - random", *(NUMBERS[number].title for number in known)))


def legend(known: Sequence[str]) -> str:
    """What some numbers mean, a line each."""
    better = {True: "; less is better", False: "; more is better", None: ""}
    return "\n".join(f"{NUMBERS[one].title}: {NUMBERS[one].meaning}{better[NUMBERS[one].less]}" for one in known)


def comparison_table(one: Explained, other: Explained) -> str:
    """A row a level and number that both have: both means, the difference and its paired interval; * where sure."""
    rows = []
    for level in one.levels:
        for number in NUMBERS:
            if number not in one.levels[level] or number not in other.levels.get(level, {}):
                continue
            change = difference(one, other, level, number)
            means = (f"{_mean(side.levels[level][number]):.3g}" for side in (one, other))
            rows.append((level, NUMBERS[number].title, *means, str(change), "*" if change.sure else ""))
        if level in other.levels:
            rows.append((level, "win %", "", f"{wins(one, other, level):.3g}", "", ""))
    return table(rows, ("level", "number", "A", "B", "B - A [95 %]", ""))


# ---- the file


def write_metrics(path: Path, explained: Explained, found: Mapping[str, Mapping[str, Interval]] | None = None) -> None:
    """metrics.json: every decision's numbers, so that two networks can be compared, and the summary.

    `found` is what `intervals` gives, if that is known already.
    """
    summary = {
        name: {number: [one.value, one.low, one.high] for number, one in of_map.items()}
        for name, of_map in (found or intervals(explained)).items()
    }

    def plain(maps: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, list[float]]]:
        return {name: {key: np.round(y, 6).tolist() for key, y in numbers.items()} for name, numbers in maps.items()}

    content = {
        "format": FORMAT,
        "about": dict(explained.about),
        "summary": summary,  # mean, low, high
        "strides": dict(explained.strides),
        "images": list(explained.images),
        "classes": list(explained.classes),
        "confidences": np.round(explained.confidences, 6).tolist(),
        "levels": plain(explained.levels),
        "controls": plain(explained.controls),
    }
    write_text(path, json.dumps(without_nan(content)) + "\n")


def read_metrics(path: str | Path) -> Explained:
    """What `write_metrics` wrote. Raises a Fault for any other file."""
    path = Path(path)
    if not path.is_file():
        raise Fault(f"{path}: no such file; explain.py --metrics writes metrics.json into its run")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise Fault(f"{path}: no JSON; explain.py --metrics writes the right file") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Fault(f"{path}: not a metrics.json of explain.py (format {FORMAT!r})")

    def arrays(maps: Any) -> dict[str, dict[str, np.ndarray]]:
        return {
            name: {key: np.array(y, dtype=np.float64) for key, y in numbers.items()} for name, numbers in maps.items()
        }

    try:
        read = Explained(
            content["about"],
            content["images"],
            content["classes"],
            np.array(content["confidences"], dtype=np.float64),
            arrays(content["levels"]),
            arrays(content["controls"]),
            content["strides"],
        )
        every: list[Any] = [y for numbers in read.maps.values() for y in numbers.values()]
        if any(len(y) != len(read.images) for y in (read.classes, read.confidences, *every)):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Fault(f"{path}: damaged; its lists do not fit together") from None
    return read


# What has to be the same where two files are compared.
ALIKE = ("data", "split", "space", "target", "class", "steps", "top", "conf_thres")


def compare(one: Path, other: Path, classes: Sequence[str] | None = None) -> str:
    """The table of two metrics.json, B against A, on the images that both have. Raises a Fault where they differ."""
    first, second = read_metrics(one), read_metrics(other)
    wrong = [
        f"{key}: {first.about.get(key)!r} in {one}, {second.about.get(key)!r} in {other}; measure both alike"
        for key in ALIKE
        if first.about.get(key) != second.about.get(key)
    ]
    if wrong:
        raise Fault(*wrong)
    if classes:
        known = sorted({*first.classes, *second.classes})
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise Fault(f"--classes {unknown[0]}: no decision is for it{nearest(unknown[0], known)}")
        first, second = first.of_classes(classes), second.of_classes(classes)
    shared = set(first.images) & set(second.images)
    if not shared or not set(first.levels) & set(second.levels):
        raise Fault(f"{one} and {other} have no {'level' if shared else 'image'} in common; nothing can be compared")
    counts = f"{len(shared)} images in common, of {len(set(first.images))} and {len(set(second.images))}"
    return f"A {one}\nB {other}\n{counts}\n\n{comparison_table(first, second)}\n\n* 0 is not in the interval"
