"""Do fine levels explain worse, and do attention branches on them help? What do they cost? docs/fal.md asks.

python bench/fal.py --ucmerced ~/ucmerced                # trains what is missing and prints the tables
python bench/fal.py --ucmerced ~/ucmerced --plan         # measures an epoch, says how long all of it takes
python bench/fal.py --ucmerced ~/ucmerced --cells plain-0 low-0
python bench/fal.py --speed                              # milliseconds an image with and without branches
python bench/fal.py --show                               # what was measured

A cell is one model with one seed, kept as a JSON in bench/results; one that was stopped goes on where it was. All
models of a seed go on from the same network, a ResNet-18 with a pyramid of four levels (Layer 1 to 4, strides 4 to 32)
that learned from random weights for half of the epochs: `plain` as it is, the others with attention branches put in.
`low` has them on Layers 1 and 2, as in the paper, `high` on 3 and 4, `all` on all; `chosen` has them on the two levels
that the metrics of the common start name; `flat` is `low` without the product, g' = g: the same parameters and the same
extra losses, but nothing is attended.

A tenth of the training images of each class is kept from training; on those the levels are chosen. All else is measured
on the test images, which nothing was trained or chosen on: there is one evaluation, after the last epoch. Explanations
are Grad-CAM's of the predicted class on the output of each level, behind its branch if it has one. AD (average drop)
and IIC (increase in confidence) are in per cent.

Intervals are of a paired bootstrap: images are drawn again, and of each the difference of the two models, averaged over
seeds. They hold 95 %, and do not hold how seeds differ, so each seed's numbers are shown where it matters.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from bench import cells  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.structures import Sample  # noqa: E402
from engine.classify import class_metrics, scores_of, true_labels  # noqa: E402
from engine.explain import Question  # noqa: E402
from engine.explain import measure as explain  # noqa: E402
from engine.explain_metrics import Explained, level_metrics  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from engine.select import attend_on, weak_levels  # noqa: E402
from engine.timing import interleaved  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from models.cost import network_costs, totals  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.insert import branches_on, insert_after  # noqa: E402
from models.levels import levels  # noqa: E402
from models.network import Network, build  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.spec import ModelSpec, Scaling  # noqa: E402

CFG = ROOT / "cfg" / "models" / "resnet18-fpn-cls.yaml"
LAYERS = 4
ON = {"plain": (), "chosen": None, "low": (0, 1), "high": (2, 3), "all": (0, 1, 2, 3), "flat": (0, 1)}  # levels
NAMES = ("begin", *ON)  # begin: what all of a seed go on from
CELLS = [f"{name}-{seed}" for seed in cells.SEEDS for name in NAMES]
COUNT = 2  # levels that are chosen
KEPT = 10  # one image in so many of each class is kept from training
BATCH = 16
OPTIONS = {"--batch-size": BATCH, "--workers": 0, "--cache": "ram", "--device": "cpu", "--amp": "off", "--flipud": 0.5}
LONGEST = 120  # minutes that everything may take
KEYS = {"drop": "AD", "increase": "IIC"}  # of `engine.explain_metrics.NUMBERS`
MOST_MORE = 5  # per cent of parameters that branches may add
DRAWS = 2_000  # of the bootstrap
AIRPLANE = "airplane"
CLASSES = 21


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    ucmerced: Path | None
    imgsz: int
    width: float
    epochs: int
    per_class: int | None
    threads: int

    def model(self) -> ModelSpec:
        """The plain model at the width that is asked for."""
        return replace(parse(CFG), num_classes=CLASSES, scaling=Scaling(1.0, self.width))


# ---- the images


def splits(place: Place) -> dict[str, list[Sample]]:
    """The images to ``train`` on, those to ``choose`` levels by, and those to ``judge`` by."""
    spec = read_data_spec(cells.data_yaml("ucmerced", place.ucmerced, place.work))
    found: dict[str, list[Sample]] = {"train": [], "choose": [], "judge": []}
    for split, role in (("train", "train"), ("val", "judge")):
        seen: dict[int, int] = {}
        for sample in sorted(read_split(spec, split).samples, key=lambda one: one.path):
            number = seen[label] = seen.get(label := int(sample.labels[0]), 0) + 1
            if place.per_class is None or number <= place.per_class:
                found["choose" if role == "train" and number % KEPT == 1 else role].append(sample)
    return found


def learned(place: Place) -> Path:
    """The YAML of the images to train on."""
    found, names = splits(place), list(read_data_spec(cells.data_yaml("ucmerced", place.ucmerced, place.work)).names)
    for role, samples in found.items():
        write_text(place.work / f"{role}.txt", "".join(f"{sample.path.resolve()}\n" for sample in samples))
    whole = {"path": str(place.work), "train": "train.txt", "val": "judge.txt", "format": "folders", "names": names}
    write_text(place.work / "learned.yaml", yaml.safe_dump(whole))
    return place.work / "learned.yaml"


# ---- a cell


def train_cell(place: Place, folder: Path, start: Mapping[str, Path], epochs: int, seed: int) -> tuple[Path, float]:
    """The checkpoint of a training, which goes on where it was stopped, and the minutes that it took."""
    options = {**start, "--data": learned(place), **OPTIONS, "--imgsz": place.imgsz, "--seed": seed}
    return cells.train(folder, options, epochs, place.threads)


def begin(place: Place, seed: int) -> tuple[Path, float]:
    """The network that all models of a seed go on from."""
    file = place.work / "plain.yaml"
    write_text(file, dump(place.model()))
    return train_cell(place, place.work / "runs" / f"begin-{seed}", {"--cfg": file}, place.epochs, seed)


def chosen_levels(place: Place, seed: int, out: Path) -> tuple[int, ...]:
    """The levels that the metrics of the common start name, on images that it did not see."""
    file = out / f"fal-begin-{seed}.json"
    if not file.exists():
        write_text(file, json.dumps(measure(place, "begin", seed, out), indent=1) + "\n")
    return tuple(json.loads(file.read_text())["chosen"])


def measure(place: Place, name: str, seed: int, out: Path) -> dict[str, Any]:
    """Train a cell and judge it on the images that nothing was trained on."""
    weights, minutes = begin(place, seed)
    picked = chosen_levels(place, seed, out) if name == "chosen" else ON.get(name, ())
    if name != "begin":
        # models with the same branches are one training, whatever they are called
        called = ("".join(str(level + 1) for level in picked) or "plain") + ("-flat" if name == "flat" else "")
        start = weights
        if picked:
            given = {"product": False} if name == "flat" else {}
            branched = place.work / "starts" / f"{called}-{seed}"
            _, start = attend_on(load_checkpoint(weights), picked, branched, seed=seed, **given)
        folder = place.work / "runs" / f"{called}-{seed}"
        weights, minutes = train_cell(place, folder, {"--weights": start}, place.epochs, seed)
    checkpoint = load_checkpoint(weights)
    role = "choose" if name == "begin" else "judge"
    samples = splits(place)[role]
    images = ImageSet(samples, place.imgsz, None, seed=0, cache=False, crop=True)
    network = restore(checkpoint).requires_grad_(False)
    scores, _ = scores_of(network, images, batch_size=BATCH, progress=False)
    truths = true_labels(samples)
    metrics = class_metrics(truths, scores, checkpoint.names)
    found = explained(network, samples, place.imgsz, checkpoint.names)
    maps = list(found.levels.values())
    params, macs = totals(network_costs(resolve(checkpoint.spec), place.imgsz))
    about = {
        "cell": f"{name}-{seed}",
        "levels": list(picked),
        "epochs": place.epochs,
        "imgsz": place.imgsz,
        "width": place.width,
        "params": params,
        "macs": macs,
        "minutes": minutes,
        "threads": place.threads,
        "torch": torch.__version__,
        "judged_on": role,
        "top1": metrics.top1,
        "ad": [float(one["drop"].mean()) for one in maps],
        "iic": [float(one["increase"].mean()) for one in maps],
        "area": [float(one["area"].mean()) for one in maps],
        "controls": {name: [float(y[key].mean()) for key in KEYS] for name, y in found.controls.items()},
        "names": list(checkpoint.names),
        "classes": truths.tolist(),  # of each image, and so on
        "right": (scores.argmax(axis=1) == truths).astype(int).tolist(),
        **{key: [np.round(one[key], 2).tolist() for one in maps] for key in KEYS},
    }
    return {**about, "chosen": weak_levels(level_metrics(found), COUNT)} if name == "begin" else about


def explained(network: Network, samples: Sequence[Sample], imgsz: int, names: Sequence[str]) -> Explained:
    """Grad-CAM of the predicted class on every level, and maps that look at nothing, each over all images."""
    there = levels(network.graph)
    return explain(network, samples, names, imgsz, Question(), there, batch_size=BATCH, progress=False)


# ---- tables


def values(one: Mapping[str, Any], key: str, level: int | None, only: str | None) -> np.ndarray:
    """Of every judged image, or those of one class: ``right``, or ``drop`` or ``increase`` on a level."""
    found = np.array(one[key] if level is None else one[key][level], dtype=np.float64)
    return found if only is None else found[np.array(one["classes"]) == one["names"].index(only)]


def apart(
    results: cells.Results, name: str, other: str, key: str, level: int | None, only: str | None = None
) -> tuple[float, float, float] | None:
    """By how much a model is above another on the same images, and the interval of that; None where one is missing."""
    ours, theirs = cells.runs_of(results, name), cells.runs_of(results, other)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    of_images = [values(ours[seed], key, level, only) - values(theirs[seed], key, level, only) for seed in both]
    return bootstrap(np.mean(of_images, axis=0))


def bootstrap(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of it when images are drawn again."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(differences), size=(DRAWS, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def told(found: tuple[float, float, float] | None, scale: float = 1.0) -> str | None:
    return found and "{:+.1f} ({:+.1f} to {:+.1f})".format(*(scale * value for value in found))


def shown(results: cells.Results) -> str:
    parts = [shown_choice(results)]
    parts += [part(results, only) for only in (None, AIRPLANE) for part in (shown_levels, shown_differences)]
    return "\n\n".join(part for part in [*parts, verdicts(results)] if part)


def columns(first: str) -> list[str]:
    return [first, "top-1", *(f"{title} {level + 1}" for title in KEYS.values() for level in range(LAYERS))]


def on_layers(levels: Sequence[int]) -> str:
    return " ".join(str(level + 1) for level in levels) or "-"


def shown_choice(results: cells.Results) -> str:
    """What the levels were chosen by."""
    rows = []
    for seed, one in cells.runs_of(results, "begin").items():
        numbers = [f"{value:.1f}" for key in ("ad", "iic") for value in one[key]]
        rows.append([f"seed {seed}", f"{one['top1']:.3f}", *numbers, on_layers(one["chosen"])])
    head = "the common starts, on images that only the choice of levels saw: the weakest two Layers get the branches"
    return f"{head}\n\n{table(rows, [*columns('start'), 'chosen'])}" if rows else ""


def shown_levels(results: cells.Results, only: str | None) -> str:
    """A row a model: top-1 of each seed, AD and IIC of each level, averaged over seeds."""
    rows = []
    for name in ON:
        runs = list(cells.runs_of(results, name).values())
        if not runs:
            continue
        on = " or ".join(dict.fromkeys(on_layers(one["levels"]) for one in runs))
        top1 = [values(one, "right", None, only).mean() for one in runs]
        row = [name, on, f"{np.mean(top1):.3f} ({' '.join(f'{value:.3f}' for value in top1)})"]
        for key in KEYS:
            row += [f"{np.mean([values(one, key, n, only).mean() for one in runs]):.1f}" for n in range(LAYERS)]
        rows.append(row)
    if not rows:
        return ""
    some = next(one for name in ON for one in cells.runs_of(results, name).values())
    how = f"{some['imgsz']} px, width {some['width']:g}, {some['epochs']} + {some['epochs']} epochs"
    head = (
        f"{only or 'all classes'}, {len(values(some, 'right', None, only))} images, {how}; AD is better low, IIC high"
    )
    plain = [one["controls"] for one in cells.runs_of(results, "plain").values()] if only is None else []
    means = {name: np.mean([one[name] for one in plain], axis=0) for name in (plain[0] if plain else ())}
    nothing = "; ".join(f"{name} AD {ad:.1f} IIC {iic:.1f}" for name, (ad, iic) in means.items())
    below = f"\n\nmaps that look at nothing, on plain: {nothing}" if nothing else ""
    model, *others = columns("model")
    return f"{head}\n\n{table(rows, (model, 'branches on', *others))}{below}"


def shown_differences(results: cells.Results, only: str | None) -> str:
    """By how much each model is above `plain`, level by level, with intervals."""
    rows: list[list[Any]] = []
    for name in ON:
        if name == "plain" or apart(results, name, "plain", "right", None) is None:
            continue
        first = [name, told(apart(results, name, "plain", "right", None, only), 100)]
        for level in range(LAYERS):
            numbers = [told(apart(results, name, "plain", key, level, only)) for key in KEYS]
            rows.append([*(("", "") if level else first), f"Layer {level + 1}", *numbers])
    head = f"{only or 'all classes'}: model minus plain in points, and 95 % intervals"
    return f"{head}\n\n{table(rows, ('model', 'top-1', 'level', *KEYS.values()))}" if rows else ""


def verdicts(results: cells.Results) -> str:
    """F1 to F4 in a line each, as far as they were measured."""
    lines = []
    plain = cells.runs_of(results, "plain")
    for only in (None, AIRPLANE):
        if plain:
            lines.append(f"F1, {only or 'all classes'}: {low_levels(list(plain.values()), only)}")
    for only in (None, AIRPLANE):
        if apart(results, "low", "plain", "right", None):
            lines.append(f"F2, {only or 'all classes'}: {explains_better(results, only)}")
    for name in ("low", "chosen"):
        found = apart(results, name, "plain", "right", None)
        if found:
            said = "above plain" if found[1] > 0 else "below plain" if found[2] < 0 else "not told apart from plain"
            others = {other: apart(results, name, other, "right", None) for other in ("low", "high", "all", "flat")}
            beside = [f"minus {other} {told(one, 100)}" for other, one in others.items() if one and other != name]
            lines.append(f"F3, {name}: top-1 is {said}: {'; '.join([f'minus plain {told(found, 100)}', *beside])}")
    for name in ("low", "chosen", "all"):
        for seed, one in cells.runs_of(results, name).items():
            if seed in plain:
                more = {key: 100 * (one[key] / plain[seed][key] - 1) for key in ("params", "macs")}
                said = "holds" if more["params"] <= MOST_MORE else "does not hold"
                cost = f"parameters +{more['params']:.1f} %, MACs +{more['macs']:.1f} %"
                lines.append(f"F4, {name} (seed {seed}, Layers {on_layers(one['levels'])}): {said}: {cost}")
    return "\n".join(lines)


def low_levels(runs: Sequence[Mapping[str, Any]], only: str | None) -> str:
    """F1: Layers 1 and 2 explain worse than 3 and 4, each of them, in every seed; and the means as an interval."""
    parts, good = [], True
    for key, title in KEYS.items():
        each = [[values(one, key, level, only) for level in range(LAYERS)] for one in runs]
        worse = 1 if key == "drop" else -1
        means = [worse * np.mean(of_level, axis=1) for of_level in each]
        holding = sum(bool(min(mean[:2]) > max(mean[2:])) for mean in means)
        good &= holding == len(runs)
        found = bootstrap(np.mean([np.mean(one[:2], axis=0) - np.mean(one[2:], axis=0) for one in each], axis=0))
        parts.append(f"{title} {told(found)}, worse in {holding} of {len(runs)} seeds")
    return f"{'holds' if good else 'does not hold'}: Layers 1 2 minus Layers 3 4: {'; '.join(parts)}"


def explains_better(results: cells.Results, only: str | None) -> str:
    """F2: with branches on Layers 1 and 2, AD falls and IIC rises on Layers 1, 2 and 4."""
    parts, good = [], True
    for level in (0, 1, 3):
        ad, iic = (apart(results, "low", "plain", key, level, only) for key in KEYS)
        assert ad and iic
        good &= ad[2] < 0 < iic[1]
        parts.append(f"Layer {level + 1} AD {told(ad)}, IIC {told(iic)}")
    return f"{'holds' if good else 'does not hold'}: low minus plain: {'; '.join(parts)}"


# ---- what it costs


def priced(width: float) -> dict[str, ModelSpec]:
    """The plain model and those with branches, of either kind of blocks."""
    plain = replace(parse(CFG), num_classes=CLASSES, scaling=Scaling(1.0, width))
    graph = resolve(plain)
    there = levels(graph)
    found = {"plain": plain}
    for blocks in ("light", "abn"):
        for name in ("low", "all"):
            rows = {there[level].name: there[level].row for level in ON[name] or ()}
            found[f"{name}, {blocks}"] = insert_after(plain, branches_on(graph, rows, blocks=blocks))
    return found


def speed(imgsz: int, width: float) -> dict[str, Any]:
    """Median milliseconds of an image."""
    torch.manual_seed(0)
    networks = {name: build(spec).eval() for name, spec in priced(width).items()}
    image = torch.rand(1, 3, imgsz, imgsz)

    def predict(name: str) -> object:
        with torch.no_grad():
            return networks[name].predict(image)

    times = interleaved([partial(predict, name) for name in networks], rounds=15, warmup=2)
    ms = {name: time.ms for name, time in zip(networks, times, strict=True)}
    return {"ms": ms, "imgsz": imgsz, "width": width, "threads": torch.get_num_threads(), "torch": torch.__version__}


def shown_speed(imgsz: int, width: float, result: Mapping[str, Any] | None) -> str:
    if result:
        imgsz, width = result["imgsz"], result["width"]
    rows: list[list[Any]] = []
    counted = {name: totals(network_costs(resolve(spec), imgsz)) for name, spec in priced(width).items()}
    plain = counted["plain"]
    for name, (params, macs) in counted.items():
        more = [f"{100 * (params / plain[0] - 1):+.1f} %", f"{100 * (macs / plain[1] - 1):+.1f} %"]
        ms = f"{result['ms'][name]:.1f}" if result else None
        rows.append([name, f"{params:,}", more[0], macs / 1e9, more[1], ms])
    threads = f"; milliseconds of one image, {result['threads']} threads" if result else ""
    head = f"what branches cost, {imgsz} px, width {width:g}{threads}"
    return f"{head}\n\n{table(rows, ('model', 'parameters', 'more', 'GMACs', 'more', 'ms'))}"


# ---- the plan


def plan(place: Place, missing: Sequence[str]) -> float:
    """Minutes that the missing cells take at most, by two short trainings of the plain model and one evaluation."""
    write_text(place.work / "plain.yaml", dump(place.model()))

    def trained(folder: Path, epochs: int) -> float:
        return train_cell(place, folder, {"--cfg": place.work / "plain.yaml"}, epochs, 0)[1]

    first, epoch = cells.epoch_minutes(place.work / "plan", trained)
    best = place.work / "plan" / "1" / "best.pt"
    checkpoint, found = load_checkpoint(best), splits(place)
    began = time.perf_counter()
    explained(restore(checkpoint).requires_grad_(False), found["choose"], place.imgsz, checkpoint.names)
    judging = (time.perf_counter() - began) / 60 * len(found["judge"]) / len(found["choose"])
    minutes = len(missing) * (first + (place.epochs - 1) * epoch + judging)
    print(f"an epoch takes {60 * epoch:.1f} s, judging a model {60 * judging:.0f} s")
    print(f"{len(missing)} cells of {place.epochs} epochs take {minutes:.0f} minutes at most, one after the other")
    if minutes > LONGEST:
        print(
            f"That is more than {LONGEST} minutes; --epochs {int(place.epochs * LONGEST / minutes)} would take so long."
        )
    return minutes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ucmerced", type=Path, help="folder of the data set; default as cfg/data/ucmerced.yaml says")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS, metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--width", type=float, default=0.5, help="channels of all rows, 1 is ResNet-18's own")
    parser.add_argument("--epochs", type=int, default=16, help="of the common start, and again of each model")
    parser.add_argument("--per-class", type=int, help="images of each class, for a trial; default all")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "fal", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=cells.RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="measure how long it takes, and stop")
    parser.add_argument("--speed", action="store_true", help="measure milliseconds, and stop")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed_file = options.out / "fal-speed.json"
    files = {cell: options.out / f"fal-{cell}.json" for cell in CELLS}
    missing = [cell for cell in CELLS if cell in options.cells and not files[cell].exists()]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.speed:
        write_text(speed_file, json.dumps(speed(options.imgsz, options.width), indent=1) + "\n")
    elif not options.show and (missing or options.plan):
        ucmerced = options.ucmerced and options.ucmerced.resolve()
        work = options.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        how = (options.imgsz, options.width, options.epochs, options.per_class, options.threads)
        place = Place(work, ucmerced, *how)
        if options.plan:
            plan(place, missing)
            return 0
        cells.fill(files, missing, lambda cell: measure(place, *cells.named(cell), options.out), indent=None)
    results = cells.read(files)
    costs = json.loads(speed_file.read_text()) if speed_file.exists() else None
    texts = [shown(results), shown_speed(options.imgsz, options.width, costs)]
    print("\n\n".join(text for text in texts if text))
    return 0


if __name__ == "__main__":
    raise SystemExit(cells.guarded(main))
