"""Does a segmenter keep its score where a mask lowers its resolution? What does each way to train the mask give?

python bench/camvid.py --camvid ~/camvid                     # trains what is missing and prints the tables
python bench/camvid.py --camvid ~/camvid --plan              # measures an epoch, says how long all of it takes
python bench/camvid.py --camvid ~/camvid --cells fine-0 coarse-0
python bench/camvid.py --camvid ~/camvid --speed             # milliseconds an image of what was trained
python bench/camvid.py --show                                # what was measured

A cell is one model with one seed, kept as a JSON in bench/results; one that was stopped goes on where it was. All
models of a seed go on from the same network, DeepLabV3 on ResNet-18 at output stride 8 that learned from random weights
(`begin`), for the same epochs. `fine` is that network, `coarse` the one at output stride 16, which has the same
weights. The others compute stages 4 and 5 under a mask:

- `heavy`: the predictor of Hesse et al. (arXiv 2305.09504); low patches take their first cell, loss (S - 0.5)^2;
- `light`: the same with a predictor of depth-wise separable convolutions and a norm;
- `target-T`: light, low patches take their maximum, loss (S - T)^2;
- `price-P`: likewise, but the loss needs no target: P (1 - S).

S is the share of low patches. The loss of the mask rises over the first epoch. There is one evaluation, after the last
epoch, on the test images, which nothing was trained on. What the masks are worth is told by three others in their
place: all high, all low, and the same cells in another order (`shuffled`). How the light predictor starts, its pace and
that the price needs no epoch of its own were chosen by seed 0 of target-0.5 and price-0.05 on these images: those two
flatter themselves a little, seed 1 and the others do not.

Intervals are of a jackknife over ten stretches of the test films, since frames that follow each other are alike; those
of differences are over the same stretches, averaged over seeds. They do not hold how seeds differ, so each is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench import cells  # noqa: E402
from bench.learn import interval  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.loader import collate  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.structures import Sample  # noqa: E402
from engine.evaluate import pixels  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from engine.segment import confusions_of, ious  # noqa: E402
from engine.timing import interleaved  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from models.cost import network_costs, totals  # noqa: E402
from models.elastic import WithAux  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.graph import normalize, resolve  # noqa: E402
from models.network import Network  # noqa: E402
from models.ops.mask import MaskPredictor  # noqa: E402
from models.parse import dump, parse  # noqa: E402
from models.registry import OPS  # noqa: E402
from models.spec import LayerSpec, ModelSpec, Scaling  # noqa: E402

MODELS = ROOT / "cfg" / "models"
CLASSES = 11
PRICES, TARGETS = (0.02, 0.05, 0.1, 0.2), (0.3, 0.5, 0.7)
LIGHT = {"MaskPredictor": {"pace": 10}}  # so that shares have time to change in a training as short as this one
# of a masked model: what is changed in the rows of these ops
MASKED: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "heavy": {
        "MaskPredictor": {"light": False},
        "SelStage": {"pool": "pick"},
        "SelLoss": {"price": 1, "target": 0.5},
    },
    "light": {**LIGHT, "SelStage": {"pool": "pick"}, "SelLoss": {"price": 1, "target": 0.5}},
    **{f"price-{price:g}": {**LIGHT, "SelLoss": {"price": price}} for price in PRICES},
    **{f"target-{target:g}": {**LIGHT, "SelLoss": {"price": 1, "target": target}} for target in TARGETS},
}
DENSE = {"fine": "resnet18-deeplab", "coarse": "resnet18-deeplab-os16"}
FIRST = ("begin", "fine", "coarse", "heavy", "light", "target-0.5", "price-0.05")  # the others are its two curves
NAMES = (*FIRST, *(name for name in MASKED if name not in FIRST))
CELLS = [f"{name}-{seed}" for name in NAMES for seed in cells.SEEDS]
BATCH = 8
OPTIONS = {"--batch-size": BATCH, "--workers": 0, "--cache": "ram", "--device": "cpu", "--amp": "bf16"}
STRETCHES = 10
LONGEST = 120  # minutes that everything may take
SPEED_IMAGES = 20
COLLAPSED = 0.01  # a mask has collapsed where it leaves no more than this share high, or low


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    camvid: Path | None
    imgsz: int
    width: float
    begin: int
    epochs: int
    threads: int

    def data(self) -> Path:
        """The YAML of the data set."""
        return cells.data_yaml("camvid", self.camvid, self.work)

    def test(self) -> tuple[Sequence[Sample], ImageSet]:
        """The images that models are judged by."""
        samples = read_split(read_data_spec(self.data()), "test").samples
        return samples, ImageSet(samples, self.imgsz, None, seed=0, cache=False, rect=True)


# ---- the models


def model(name: str, width: float, batches: int = 0) -> ModelSpec:
    """The model of a name; ``batches`` has an epoch."""
    file = DENSE.get(name, "resnet18-deeplab" if name == "begin" else "resnet18-mds-seg")
    spec = replace(parse(MODELS / f"{file}.yaml"), num_classes=CLASSES, scaling=Scaling(1.0, width))
    if name not in MASKED:
        return spec
    changes = {op: dict(given) for op, given in MASKED[name].items()}
    changes["SelLoss"] |= {"ramp": batches}

    def changed(row: LayerSpec) -> LayerSpec:
        given = dict(OPS[row.op].signature.bind(*row.args, **row.kwargs).arguments) | changes.get(row.op, {})
        if given.get("pool") == "pick" and "keep" in (row.kwargs | dict.fromkeys(row.args)).values():
            given["pool"] = "keep"
        return replace(row, args=(), kwargs=given) if row.op in changes else row

    return normalize(replace(spec, name=f"camvid-{name}", layers=tuple(changed(row) for row in spec)))


# ---- a cell


def trained(place: Place, name: str, seed: int) -> tuple[Path, float]:
    """The checkpoint of a model, and the minutes that its training took."""
    spec = read_data_spec(place.data())
    batches = -(-len(read_split(spec, "train").samples) // BATCH)
    file = place.work / f"{name}.yaml"
    write_text(file, dump(model(name, place.width, batches)))
    options = {"--cfg": file, "--data": place.data(), "--imgsz": place.imgsz, "--seed": seed, **OPTIONS}
    if name != "begin":
        options["--weights"] = trained(place, "begin", seed)[0]
    epochs = place.begin if name == "begin" else place.epochs
    return cells.train(place.work / "runs" / f"{name}-{seed}", options, epochs, place.threads)


def measure(place: Place, cell: str) -> dict[str, Any]:
    """Train a cell and judge it by the test images."""
    name, seed = cells.named(cell)
    best, minutes = trained(place, name, seed)
    checkpoint = load_checkpoint(best)
    network, (_, images) = restore(checkpoint).eval(), place.test()
    stretches, shares = judged(network, images)
    graph = resolve(checkpoint.spec)
    found: dict[str, Any] = {
        "cell": cell,
        "epochs": [place.begin, place.epochs],
        "imgsz": place.imgsz,
        "width": place.width,
        "minutes": minutes,
        "threads": place.threads,
        "torch": torch.__version__,
        "params": totals(network_costs(graph, place.imgsz))[0],
        "macs": float(np.mean([macs(graph, place.imgsz, low) for low in shares or [0.0]])),
        "confusions": stretches.tolist(),
    }
    if shares:
        others = {other: judged(network, images, change)[0].tolist() for other, change in INSTEAD.items()}
        found |= {"low": [round(share, 3) for share in shares], "instead": others}
    return found


def macs(graph: Any, imgsz: int, low: float) -> int:
    """Multiply-adds of an image with this share of low patches."""
    return totals(network_costs(graph, imgsz, low=round(low, 2)))[1]


def judged(
    network: Network, images: ImageSet, change: Callable[[Tensor], Tensor] | None = None
) -> tuple[np.ndarray, list[float]]:
    """Confusions of each stretch of film ``[stretches, K, K]``, and the share of low patches of each image, if any.

    ``change`` makes other masks of those that the network predicts.
    """
    shares: list[float] = []

    def seen(_: nn.Module, __: Any, found: WithAux) -> WithAux:
        mask = found.output if change is None else change(found.output)
        shares.extend(mask.mean(dim=(1, 2, 3)).tolist())
        return replace(found, output=mask)

    hooks = [part.register_forward_hook(seen) for part in network.modules() if isinstance(part, MaskPredictor)]
    try:
        confusions, _times = confusions_of(network, images, batch_size=BATCH, progress=False)
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack([part.sum(axis=0) for part in np.array_split(confusions, STRETCHES)]), shares


def shuffled(mask: Tensor) -> Tensor:
    """As many low patches of each image, elsewhere."""
    draw = torch.Generator().manual_seed(0)
    flat = mask.flatten(1)
    return torch.stack([one[torch.randperm(len(one), generator=draw)] for one in flat]).view_as(mask)


INSTEAD = {"high": torch.zeros_like, "low": torch.ones_like, "shuffled": shuffled}


# ---- tables


def miou(stretches: Any) -> tuple[float, np.ndarray]:
    """mIoU of all stretches, and without each in turn."""
    parts = np.array(stretches)
    without = [np.nanmean(ious(parts.sum(axis=0) - part)) for part in parts]
    return float(np.nanmean(ious(parts.sum(axis=0)))), np.array(without)


def scores(runs: Mapping[int, Mapping[str, Any]], instead: str | None = None) -> list[tuple[float, np.ndarray]]:
    return [miou(one["instead"][instead] if instead else one["confusions"]) for one in runs.values()]


def told(found: Sequence[tuple[float, np.ndarray]]) -> str:
    """Mean over seeds with its interval, and each."""
    mean, wide = np.mean([value for value, _ in found]), interval(np.mean([without for _, without in found], axis=0))
    return f"{mean:.3f} +- {wide:.3f} ({' '.join(f'{value:.3f}' for value, _ in found)})"


def apart(results: cells.Results, name: str, other: str) -> tuple[float, float] | None:
    """By how much a model is above another, over the seeds that both have, and half its interval."""
    ours, theirs = cells.runs_of(results, name), cells.runs_of(results, other)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    pairs = [(miou(ours[seed]["confusions"]), miou(theirs[seed]["confusions"])) for seed in both]
    without = np.mean([one[1] - two[1] for one, two in pairs], axis=0)
    return float(np.mean([one[0] - two[0] for one, two in pairs])), interval(without)


def difference(found: tuple[float, float] | None) -> str | None:
    return found and f"{found[0]:+.3f} ({found[0] - found[1]:+.3f} to {found[0] + found[1]:+.3f})"


def shares(one: Mapping[str, Any]) -> str:
    """Share of low patches: mean over images, and the standard deviation of images."""
    return f"{np.mean(one['low']):.2f} +- {np.std(one['low']):.2f}"


def shown(results: cells.Results) -> str:
    rows = []
    for name in NAMES:
        if runs := cells.runs_of(results, name):
            low = "; ".join(shares(one) for one in runs.values() if "low" in one) or None
            row = [name, f"{next(iter(runs.values()))['params']:,}", low, cost_of(runs), told(scores(runs))]
            rows.append([*row, difference(apart(results, name, "coarse")), difference(apart(results, name, "fine"))])
    if not rows:
        return ""
    some = next(iter(results.values()))
    how = f"{some['imgsz']} px, width {some['width']:g}, {some['epochs'][0]} + {some['epochs'][1]} epochs"
    head = f"CamVid's 233 test images, {how}; low is the mean and the spread over images, a seed each"
    columns = ("model", "parameters", "low", "GMACs", "mIoU (each seed)", "minus coarse", "minus fine")
    return f"{head}\n\n{table(rows, columns)}"


def shown_masks(results: cells.Results) -> str:
    """What other masks give in the place of those that were predicted."""
    rows = []
    for name in MASKED:
        if runs := cells.runs_of(results, name):
            rows.append([name, told(scores(runs)), *(told(scores(runs, other)) for other in INSTEAD)])
    head = "mIoU with other masks in the place of the predicted ones"
    return f"{head}\n\n{table(rows, ('model', 'predicted', *(f'all {o}' if o != 'shuffled' else o for o in INSTEAD)))}"


def verdicts(results: cells.Results) -> str:
    """What was asked, in a line each, as far as it was measured."""
    lines = []
    if worth := apart(results, "fine", "coarse"):
        said = "it is worth something" if worth[0] > worth[1] else "its worth is not told apart from nothing"
        lines.append(f"resolution: fine minus coarse {difference(worth)}: {said}")
    low = {
        cell: float(np.mean(one["low"]))
        for cell, one in results.items()
        if "low" in one and cells.named(cell)[0] in MASKED
    }
    if low:
        gone = [cell for cell, share in low.items() if not COLLAPSED < share < 1 - COLLAPSED]
        lines.append(
            f"collapse: {len(gone)} of {len(low)} masks are all low or all high{': ' if gone else ''}{', '.join(gone)}"
        )
    chain = ("coarse", "light", "price-0.05", "heavy", "fine")
    steps = [(one, two, apart(results, two, one)) for one, two in zip(chain, chain[1:], strict=False)]
    lines += [f"order: {two} minus {one} {difference(found)}" for one, two, found in steps if found]
    if found := apart(results, "target-0.5", "light"):
        lines.append(f"pooling: target-0.5 minus light, which takes the first cell, {difference(found)}")
    return "\n".join([*lines, *beside_targets(results)])


def beside_targets(results: cells.Results) -> list[str]:
    """How far the curve of prices is above each target, at the multiply-adds of that target; `fine` has no price."""
    priced = (cells.runs_of(results, name) for name in ("fine", *MASKED) if name.startswith(("fine", "price")))
    points = sorted(((cost_of(runs), mean_miou(runs)) for runs in priced if runs), key=lambda point: point[0])
    lines = []
    for name in MASKED:
        runs = cells.runs_of(results, name)
        if not name.startswith("target") or not runs or not points:
            continue
        cost = cost_of(runs)
        if not points[0][0] <= cost <= points[-1][0]:
            lines.append(f"no target: {name} has {cost:.2f} GMACs, which no price has")
            continue
        costs, theirs = [at for at, _ in points], mean_miou(runs)
        ours = [np.interp(cost, costs, [scores[part] for _, scores in points]) for part in range(STRETCHES + 1)]
        found = float(ours[0] - theirs[0]), interval(np.array(ours[1:]) - theirs[1:])
        lines.append(f"no target: the curve of prices minus {name}, at its {cost:.2f} GMACs, {difference(found)}")
    return lines


def cost_of(runs: Mapping[int, Mapping[str, Any]]) -> float:
    return float(np.mean([one["macs"] for one in runs.values()])) / 1e9


def mean_miou(runs: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """The mean over seeds, and the same without each stretch."""
    return np.mean([(value, *without) for value, without in scores(runs)], axis=0)


# ---- milliseconds


def speed(place: Place) -> dict[str, Any]:
    """Median milliseconds of an image of what was trained with seed 0, fused, channels-last, in turns."""
    samples = place.test()[0][:: max(1, len(place.test()[0]) // SPEED_IMAGES)][:SPEED_IMAGES]
    names = [name for name in NAMES if name != "begin" and (place.work / "runs" / f"{name}-0" / "best.pt").exists()]
    networks = {}
    for name in names:
        network = restore(load_checkpoint(place.work / "runs" / f"{name}-0" / "best.pt")).eval()
        networks[name] = fuse(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "sizes": {}}
    for imgsz in (place.imgsz, 2 * place.imgsz):
        view = ImageSet(samples, imgsz, None, seed=0, cache=False, rect=True)
        inputs = [
            pixels(collate([view[at]]), "cpu").to(memory_format=torch.channels_last) for at in range(len(samples))
        ]

        def predict(name: str, inputs: Sequence[Tensor] = inputs) -> None:
            with torch.inference_mode():
                for x in inputs:
                    networks[name](x)

        times = interleaved([partial(predict, name) for name in networks], rounds=5, warmup=1)
        low = {name: judged(networks[name], view)[1] for name in networks}
        found["sizes"][imgsz] = {
            name: {"ms": time.ms / len(samples), "low": float(np.mean(low[name])) if low[name] else None}
            for name, time in zip(networks, times, strict=True)
        }
    return found


def shown_speed(found: Mapping[str, Any]) -> str:
    rows = []
    for imgsz, models in found["sizes"].items():
        for name, one in models.items():
            times = [
                f"{models[other]['ms'] / one['ms']:.2f}" if other in models else None for other in ("fine", "coarse")
            ]
            rows.append(
                [imgsz, name, f"{one['low']:.2f}" if one["low"] is not None else None, f"{one['ms']:.1f}", *times]
            )
    head = f"milliseconds of a test image, mask predictor and packing included, {found['threads']} threads"
    return f"{head}\n\n{table(rows, ('px', 'model', 'low', 'ms', 'times as fast as fine', 'as coarse'))}"


# ---- the plan


def plan(place: Place, missing: Sequence[str]) -> None:
    """Says how many minutes the missing cells take at most: epochs of a masked model, and four evaluations of each."""
    write_text(place.work / "plan.yaml", dump(model("price-0.05", place.width)))
    options = {"--cfg": place.work / "plan.yaml", "--data": place.data(), "--imgsz": place.imgsz, **OPTIONS}
    first, epoch = cells.epoch_minutes(
        place.work / "plan", lambda folder, epochs: cells.train(folder, options, epochs, place.threads)[1]
    )
    began = time.perf_counter()
    judged(restore(load_checkpoint(place.work / "plan" / "1" / "best.pt")).eval(), place.test()[1])
    judging = (time.perf_counter() - began) / 60 * (1 + len(INSTEAD))
    epochs = sum(place.begin if cells.named(cell)[0] == "begin" else place.epochs for cell in missing)
    minutes = len(missing) * (first - epoch + judging) + epochs * epoch
    print(f"an epoch takes {60 * epoch:.1f} s, judging a model {60 * judging:.0f} s")
    print(f"{len(missing)} cells take {minutes:.0f} minutes at most, one after the other")
    if minutes > LONGEST:
        print(f"That is more than {LONGEST} minutes; --cells, --epochs and --begin take less.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", type=Path, help="folder of the data set; default as cfg/data/camvid.yaml says")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS, metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=240, help="the longer side; CamVid's own is 480")
    parser.add_argument("--width", type=float, default=0.5, help="channels of all rows, 1 is ResNet-18's own")
    parser.add_argument("--begin", type=int, default=14, help="epochs of the common start")
    parser.add_argument("--epochs", type=int, default=4, help="of each model behind it")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "camvid", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=cells.RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="measure how long it takes, and stop")
    parser.add_argument("--speed", action="store_true", help="measure milliseconds, and stop")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed_file = options.out / "camvid-speed.json"
    files = {cell: options.out / f"camvid-{cell}.json" for cell in CELLS}
    missing = [cell for cell in CELLS if cell in options.cells and not files[cell].exists()]
    if not options.show:
        work = options.work.resolve()
        for folder in (work, options.out):
            folder.mkdir(parents=True, exist_ok=True)
        how = (options.imgsz, options.width, options.begin, options.epochs, options.threads)
        place = Place(work, options.camvid and options.camvid.resolve(), *how)
        if options.plan:
            plan(place, missing)
            return 0
        if options.speed:
            write_text(speed_file, json.dumps(speed(place), indent=1) + "\n")
        else:
            cells.fill(files, missing, lambda cell: measure(place, cell), indent=None)
    results = cells.read(files)
    costs = json.loads(speed_file.read_text()) if speed_file.exists() else None
    texts = [shown(results), shown_masks(results), verdicts(results), shown_speed(costs) if costs else ""]
    print("\n\n".join(text for text in texts if text))
    return 0


if __name__ == "__main__":
    raise SystemExit(cells.guarded(main))
