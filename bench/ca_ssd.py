"""Does the CA-block pay, and does fusing levels? What does the detector cost beside others? docs/lightweight.md asks.

python bench/ca_ssd.py --weights lite0.pt --fruit ~/fruit           # trains what is missing and prints the table
python bench/ca_ssd.py --weights lite0.pt --fruit ~/fruit --cells full-0 none-0
python bench/ca_ssd.py --weights lite0.pt --fruit ~/fruit --plan    # measures an epoch, says how long the table takes
python bench/ca_ssd.py --speed                                      # milliseconds an image, and counts; --tuned best.pt
python bench/ca_ssd.py --show                                       # what was measured

A cell is one training of one neck (`bench.necks`) with one seed, kept as a JSON in bench/results; one that was stopped
goes on where it was. `--weights` is a checkpoint of efficientnet-lite0.yaml (docs/lightweight.md says how to make one).
Its thirteen rows are frozen, so what is compared is what learns: neck and head. All cells have the same images, epochs,
size, batch and options. There is one evaluation, after the last epoch, so nothing is chosen by the judged images.

The 95 % intervals are of a jackknife over ten groups of judged images, those of differences over the same groups. They
do not hold how seeds differ, so both seeds are shown: a difference that is smaller than theirs says nothing.

Speed is of whole images: forward, decode and suppression. `--tuned` takes a trained checkpoint as well. Of networks
that never learned, the threshold lets as many boxes through as SUPPRESSED says, so suppression has the same work in
each. Peers that are not of this program are counted layer by layer; with the 91 classes of COCO the sums are those that
torchvision publishes for its own (tests/test_ssd.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench import cells  # noqa: E402
from bench.learn import BATCH, JUDGED_BY, interval, judged  # noqa: E402
from bench.necks import CFG, NECKS, neck  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.structures import Fault  # noqa: E402
from engine.evaluate import detections_of  # noqa: E402
from engine.export import Exported, write_file  # noqa: E402
from engine.exported import read_file  # noqa: E402
from engine.nms import nms  # noqa: E402
from engine.parity import check_images  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from engine.timing import interleaved  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from models.cost import network_costs, totals  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.graph import resolve  # noqa: E402
from models.network import Network, build  # noqa: E402
from models.parse import dump, parse  # noqa: E402

COMPARED = ("full", "channel", "spatial", "none", "wide-separable", "fusion-up", "fusion-off", "detect")
CELLS = [f"{name}-{seed}" for name in NECKS for seed in cells.SEEDS]  # those of COMPARED are trained if none are named
BACKBONE = 13  # rows, all frozen
OPTIONS = {"--lr0": 0.002, "--amp": "off", "--batch-size": BATCH, "--freeze": BACKBONE}
LONGEST = 120  # minutes that the whole table may take
SUPPRESSED = 300  # boxes of an image that come to suppression
TIMED = ("effl0-ca-ssd", "effb0-ca-ssd", "yolov5n")
CLASSES = 20


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    weights: Path
    fruit: Path | None
    imgsz: int
    epochs: int
    threads: int

    def data(self) -> Path:
        """The YAML of the data set."""
        return cells.data_yaml("fruit", self.fruit, self.work)


# ---- the ablation


def train_cell(place: Place, cell: str, folder: Path, epochs: int) -> tuple[Path, float]:
    """The checkpoint of a cell's training, which goes on where it was stopped, and the minutes that it took."""
    name, seed = cells.named(cell)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder.with_suffix(".yaml"), dump(neck(parse(CFG), name)))
    options = {"--cfg": folder.with_suffix(".yaml"), "--weights": place.weights, "--data": place.data(), **OPTIONS}
    options |= {"--imgsz": place.imgsz, "--seed": seed, "--device": "cpu"}
    return cells.train(folder, options, epochs, place.threads)


def measure(place: Place, cell: str) -> dict[str, Any]:
    """Train a cell and judge it on the images that nothing was trained on."""
    folder = place.work / "runs" / cell
    best, minutes = train_cell(place, cell, folder, place.epochs)
    checkpoint = load_checkpoint(best)
    spec = read_data_spec(place.data())
    samples = read_split(spec, "val").samples
    images = ImageSet(samples, place.imgsz, None, seed=0, cache=False)
    found, _ = detections_of(restore(checkpoint).eval(), images, batch_size=BATCH, progress=False, **JUDGED_BY)
    params, macs = totals(network_costs(resolve(checkpoint.spec), place.imgsz))
    about = {"cell": cell, "epochs": place.epochs, "imgsz": place.imgsz, "params": params, "macs": macs}
    about |= {"minutes": minutes, "threads": place.threads}
    return {**about, "torch": torch.__version__, **judged(samples, found, spec.names)}


def plan(place: Place, missing: int) -> float:
    """Minutes that so many cells take at most, by two short trainings of the full neck, the dearest but one."""
    first, epoch = cells.epoch_minutes(
        place.work / "plan", lambda folder, epochs: train_cell(place, "full-0", folder, epochs)[1]
    )
    minutes = missing * (first + (place.epochs - 1) * epoch)
    print(f"an epoch takes {60 * epoch:.1f} s; {missing} cells of {place.epochs} epochs take {minutes:.0f} minutes")
    if minutes > LONGEST:
        fits = int(place.epochs * LONGEST / minutes)
        print(f"That is more than {LONGEST} minutes; --epochs {fits} would take so long.")
    return minutes


def shown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a neck: its AP50 and AP, and by how much the full one is better, over the same seeds."""
    rows = []
    for name in NECKS:
        runs = cells.runs_of(results, name)
        if not runs:
            continue
        some = next(iter(runs.values()))
        row = [name, f"{some['params']:,}", some["macs"] / 1e9]
        for key in ("ap50", "ap"):
            mean, width = averaged([one[key] for one in runs.values()], [one["without"][key] for one in runs.values()])
            row.append(f"{mean:.3f} +- {width:.3f} ({' '.join(f'{one[key]:.3f}' for one in runs.values())})")
        both = [seed for seed in runs if f"full-{seed}" in results]
        if both and name != "full":
            pairs = [(results[f"full-{seed}"], runs[seed]) for seed in both]
            apart = [full["ap50"] - other["ap50"] for full, other in pairs]
            without = [np.subtract(full["without"]["ap50"], other["without"]["ap50"]) for full, other in pairs]
            mean, width = averaged(apart, without)
            seeds = " ".join(f"{value:+.3f}" for value in apart)
            row.append(f"{mean:+.3f} ({mean - width:+.3f} to {mean + width:+.3f}; {seeds})")
        else:
            row.append(None)
        rows.append(row)
    if not rows:
        return ""
    how = " and ".join(sorted({f"{one['imgsz']} px, {one['epochs']} epochs" for one in results.values()}))
    head = f"judged on the validation images of fruit; {how}, frozen backbone"
    header = ("neck", "parameters", "GMACs", "AP50 (each seed)", "AP", "full is better in AP50 by")
    return f"{head}\n\n{table(rows, header)}"


def averaged(values: list[float], without: list[Any]) -> tuple[float, float]:
    """The mean over seeds, and half the interval of that mean."""
    return float(np.mean(values)), interval(np.mean(without, axis=0).tolist())


# ---- counts


@dataclass(frozen=True)
class Layer:
    """A convolution: channels, kernel, the side of its output, and what else it learns."""

    c_in: int
    c_out: int
    kernel: int
    side: int
    groups: int = 1
    bias: bool = True
    norm: bool = False

    def counts(self) -> tuple[int, int]:
        weights = self.c_in // self.groups * self.c_out * self.kernel**2
        return weights + self.c_out * (self.bias + 2 * self.norm), weights * self.side**2


def ssd300_vgg16(classes: int) -> tuple[int, int]:
    """Parameters and MACs of SSD300 (arXiv 1512.02325) for so many classes, the background among them."""
    layers, c_in = [], 3
    for c_out, count, side in ((64, 2, 300), (128, 2, 150), (256, 3, 75), (512, 3, 38), (512, 3, 19)):
        for _ in range(count):
            layers.append(Layer(c_in, c_out, 3, side))
            c_in = c_out
    layers += [Layer(512, 1024, 3, 19), Layer(1024, 1024, 1, 19)]
    maps = [(512, 38), (1024, 19)]
    for narrow, wide, side in ((256, 512, 10), (128, 256, 5), (128, 256, 3), (128, 256, 1)):
        c_in, before = maps[-1]
        layers += [Layer(c_in, narrow, 1, before), Layer(narrow, wide, 3, side)]
        maps.append((wide, side))
    for (channels, side), priors in zip(maps, (4, 6, 6, 6, 4, 4), strict=True):
        layers.append(Layer(channels, priors * (4 + classes), 3, side))
    params, macs = summed(layers)
    return params + 512, macs  # a scale for each channel of the first map


def ssdlite320_mobilenetv3(classes: int) -> tuple[int, int]:
    """Those of SSDLite on MobileNetV3-Large (arXiv 1905.02244) with the narrow tail that it has as a detector."""
    layers = [norm(3, 16, 3, 160)]
    blocks = [  # channels in, kernel, expanded, channels out, squeeze-and-excitation, sides before and behind
        *((16, 3, 16, 16, False, 160, 160), (16, 3, 64, 24, False, 160, 80), (24, 3, 72, 24, False, 80, 80)),
        *((24, 5, 72, 40, True, 80, 40), (40, 5, 120, 40, True, 40, 40), (40, 5, 120, 40, True, 40, 40)),
        *((40, 3, 240, 80, False, 40, 20), (80, 3, 200, 80, False, 20, 20), (80, 3, 184, 80, False, 20, 20)),
        *((80, 3, 184, 80, False, 20, 20), (80, 3, 480, 112, True, 20, 20), (112, 3, 672, 112, True, 20, 20)),
        *((112, 5, 672, 80, True, 20, 10), (80, 5, 480, 80, True, 10, 10), (80, 5, 480, 80, True, 10, 10)),
    ]
    for c_in, kernel, wide, c_out, squeeze, before, side in blocks:
        layers += [norm(c_in, wide, 1, before)] if wide != c_in else []
        layers.append(norm(wide, wide, kernel, side, wide))
        narrow = divisible(wide // 4)
        layers += [Layer(wide, narrow, 1, 1), Layer(narrow, wide, 1, 1)] if squeeze else []
        layers.append(norm(wide, c_out, 1, side))
    layers.append(norm(80, 480, 1, 10))
    maps = [(672, 20), (480, 10)]
    for c_out, side in ((512, 5), (256, 3), (256, 2), (128, 1)):
        c_in, before = maps[-1]
        narrow = c_out // 2
        layers += [norm(c_in, narrow, 1, before), norm(narrow, narrow, 3, side, narrow), norm(narrow, c_out, 1, side)]
        maps.append((c_out, side))
    for channels, side in maps:
        for numbers in (4, classes):
            layers += [norm(channels, channels, 3, side, channels), Layer(channels, 6 * numbers, 1, side)]
    return summed(layers)


def norm(c_in: int, c_out: int, kernel: int, side: int, groups: int = 1) -> Layer:
    return Layer(c_in, c_out, kernel, side, groups, bias=False, norm=True)


def divisible(channels: int) -> int:
    """To a multiple of 8, not under nine tenths of it."""
    rounded = max(8, (channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def summed(layers: list[Layer]) -> tuple[int, int]:
    params, macs = zip(*(layer.counts() for layer in layers), strict=True)
    return sum(params), sum(macs)


def shown_counts(imgsz: int) -> str:
    rows = []
    for name in TIMED:
        spec = replace(parse(ROOT / "cfg" / "models" / f"{name}.yaml"), num_classes=CLASSES)
        rows.append([name, imgsz, *totals(network_costs(resolve(spec), imgsz)), "models.cost"])
    rows.append(["SSD300, VGG16", 300, *ssd300_vgg16(CLASSES + 1), "layer by layer"])
    rows.append(["SSDLite, MobileNetV3-L", 320, *ssdlite320_mobilenetv3(CLASSES + 1), "layer by layer"])
    shown = [[name, side, f"{params:,}", macs / 1e9, source] for name, side, params, macs, source in rows]
    return table(shown, ("network", "pixels", "parameters", "GMACs", f"counted, {CLASSES} classes"))


# ---- speed


def speed(tuned: Path | None, imgsz: int) -> dict[str, Any]:
    """Median milliseconds of an image by the name of the network and what runs it."""
    networks: dict[str, Network] = {}
    for name in TIMED:
        torch.manual_seed(0)
        spec = replace(parse(ROOT / "cfg" / "models" / f"{name}.yaml"), num_classes=CLASSES)
        networks[name] = build(spec).eval()
    if tuned:
        networks["tuned"] = restore(load_checkpoint(tuned)).eval()
    images = check_images(None, imgsz)
    runs: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, network in tqdm(networks.items(), "exporting", leave=False):
            with torch.no_grad():
                _, scores = network.predict(images[:1])
            best = scores.amax(dim=-1).flatten().topk(SUPPRESSED + 1).values
            conf = 0.25 if name == "tuned" else float(best[-1])
            fused = fuse(network)
            path = Path(folder) / f"{name}.onnx"
            write_file(path, "onnx", Exported(fused, None), images, {})
            by_onnx = read_file(path, "onnx")
            for how, predict in (("eager", network.predict), ("fused", fused.predict), ("onnxruntime", by_onnx)):
                runs[f"{name} {how}"] = partial(detect, predict, images[:1], conf)
        times = interleaved(list(runs.values()), rounds=15, warmup=2)
    ms = {name: time.ms for name, time in zip(runs, times, strict=True)}
    return {"imgsz": imgsz, "ms": ms, "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": cpu()}


def detect(predict: Callable[[torch.Tensor], Any], image: torch.Tensor, conf: float) -> object:
    boxes, scores = predict(image)
    return nms(boxes[0], scores[0], conf=conf, iou=0.45, multi_label=False)


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def shown_speed(result: Mapping[str, Any]) -> str:
    ways = ("eager", "fused", "onnxruntime")
    names = dict.fromkeys(label.rpartition(" ")[0] for label in result["ms"])
    rows = [[name, *(f"{result['ms'][f'{name} {way}']:.1f}" for way in ways)] for name in names]
    head = f"milliseconds of an image of {result['imgsz']} px with decode and suppression, medians"
    return f"{head}; {result['threads']} threads of {result['cpu']}\n\n{table(rows, ('network', *ways))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a checkpoint of efficientnet-lite0.yaml")
    parser.add_argument("--fruit", type=Path, help="folder of the data set; default as cfg/data/fruit.yaml says")
    wanted = [cell for cell in CELLS if cells.named(cell)[0] in COMPARED]
    parser.add_argument("--cells", nargs="+", default=wanted, choices=CELLS, metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=128, help="of the ablation; a multiple of 128")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "ca-ssd", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=cells.RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="measure how long it takes, and stop")
    parser.add_argument("--speed", action="store_true", help="measure milliseconds, and stop")
    parser.add_argument("--speed-imgsz", type=int, default=384)
    parser.add_argument("--tuned", type=Path, help="a trained checkpoint, for --speed")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speed_file = options.out / "ca-ssd-speed.json"
    files = {cell: options.out / f"ca-ssd-{cell}.json" for cell in CELLS}
    missing = [cell for cell in CELLS if cell in options.cells and not files[cell].exists()]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.speed:
        write_text(speed_file, json.dumps(speed(options.tuned, options.speed_imgsz), indent=1) + "\n")
    elif not options.show and (missing or options.plan):
        if options.weights is None:
            raise Fault("--weights is needed: a checkpoint of efficientnet-lite0.yaml")
        fruit = options.fruit and options.fruit.resolve()
        work = options.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        place = Place(work, options.weights.resolve(), fruit, options.imgsz, options.epochs, options.threads)
        if options.plan:
            plan(place, len(missing))
            return 0
        cells.fill(files, missing, lambda cell: measure(place, cell))
    results = cells.read(files)
    texts = [shown(results), shown_counts(options.speed_imgsz)]
    texts += [shown_speed(json.loads(speed_file.read_text()))] if speed_file.exists() else []
    print("\n\n".join(text for text in texts if text))
    return 0


if __name__ == "__main__":
    raise SystemExit(cells.guarded(main))
