"""Does it learn? yolov5n trained by us and by yolov5's own train.py: same images, epochs, size, batch and seeds.

python bench/learn.py --yolov5 ~/yolov5 --peer-python ~/peer/bin/python --bccd ~/BCCD --fruit ~/fruit \\
    --weights ~/yolov5n_state_dict_fp16.pth            # trains what is missing and prints the table
python bench/learn.py ... --cells bccd-scratch-0-ours bccd-scratch-0-theirs
python bench/learn.py ... --plan                       # measures an epoch of each, says how long the table takes
python bench/learn.py --show                           # the table of what was measured

A cell is one training. It is kept as a JSON in bench/results; one that was stopped goes on with both programs' own
--resume. `scratch` starts from random weights, `tuned` from the published weights of yolov5n. The first run measures
the plan, which is kept as well.

Both programs read the same copy of the data, in YOLO's layout (made by data.convert). Blood cells are judged on the
test split, which no training sees. Fruit has none, so it is judged on its validation split, by which both choose their
best epoch: a little too well for both. Both networks are measured by our evaluation: theirs is imported by structure
from its best.pt, so the images, NMS and the metric are the same. Two more numbers guard against an unfair ruler. `own`
is what yolov5's val.py detects in its own manner (rectangles of images alike in shape, its NMS), told by our metric:
the better of the two counts for them. `square` is val.py on squares as ours: it has to agree with our evaluation to
.005, or the import is wrong. The 95 % intervals are of a jackknife over ten groups of judged images, for differences
over the same groups; they do not hold how seeds differ, so both seeds are shown.

Both have their own default hyper-parameters. What is not equal, therefore:
- ours: AdamW at .002 under 2,000 steps, else SGD; a cosine; warm-up of a tenth of the run at most; no mosaic in the
  last tenth of the epochs; an average of weights that remembers a fifth of the run; batch norms calibrated anew before
  an evaluation, of which a short run makes about 10; bf16 where a step is measured to be faster in it.
- theirs: SGD at .01; a line; gradients of 64 images a step, once warmed up; warm-up of 3 epochs, 100 batches at least;
  mosaic to the end; an average that remembers 2,000 steps; anchors refitted where they fit ill; an evaluation after
  every epoch, so more of them to choose the best from.
Minutes are of the whole program, start and evaluations included. yolov5's NMS is torchvision's; where that cannot be
loaded, ours takes its place.

The folder for --yolov5 is a clone, --peer-python a Python that has its requirements but for torchvision. Exits with 1
where an interval of ours - theirs lies below 0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench.cells import fill, guarded, is_complete, read, run, timed_run  # noqa: E402
from data.config import read_data_spec  # noqa: E402
from data.convert import convert  # noqa: E402
from data.dataset import ImageSet  # noqa: E402
from data.images import image_size  # noqa: E402
from data.readers import read_split  # noqa: E402
from data.structures import Detections, Fault, Sample  # noqa: E402
from engine.evaluate import detections_of  # noqa: E402
from engine.jackknife import jackknife_error  # noqa: E402
from engine.metrics import coco_metrics  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.checkpoint import load_checkpoint, restore  # noqa: E402
from models.foreign import import_weights  # noqa: E402
from models.network import Network  # noqa: E402
from models.parse import parse  # noqa: E402

RESULTS = ROOT / "bench" / "results"
CFG = ROOT / "cfg" / "models" / "yolov5n.yaml"
BATCH = 16
GROUPS = 10  # of the jackknife
AGREEMENT = 0.005  # of AP, between our evaluation and theirs on the same weights
LONGEST = 120  # minutes that the whole table may take
PLAN_EPOCHS = (1, 3)  # their difference is free of what starting takes
JUDGED_BY = {"conf": 0.001, "iou": 0.6, "max_det": 300}


@dataclass(frozen=True)
class Cell:
    """One training: on which data, from which weights, with which seed, by which program."""

    data: str
    mode: str
    seed: int
    program: str

    def __str__(self) -> str:
        return f"{self.data}-{self.mode}-{self.seed}-{self.program}"


JUDGED = {"bccd": "test", "fruit": "val"}  # the split that networks are measured on
EPOCHS = {("bccd", "scratch"): 60, ("fruit", "scratch"): 60, ("fruit", "tuned"): 30}
SEEDS = (0, 1)
PROGRAMS = ("ours", "theirs")
CELLS = [Cell(data, mode, seed, program) for data, mode in EPOCHS for seed in SEEDS for program in PROGRAMS]


@dataclass(frozen=True)
class Place:
    """Where things are, and what holds for every cell."""

    work: Path
    yolov5: Path | None
    python: Path | None
    weights: Path | None
    data: dict[str, Path | None]
    imgsz: int
    epochs: int | None
    threads: int

    def epochs_of(self, cell: Cell) -> int:
        return self.epochs or EPOCHS[cell.data, cell.mode]

    def peer(self) -> tuple[Path, Path]:
        if self.yolov5 is None or self.python is None:
            raise Fault("--yolov5 and --peer-python are needed: a clone of yolov5, and a Python that can run it")
        return self.yolov5, self.python


# ---- what both read


def data_for(place: Place, name: str) -> Path:
    """The folder of a copy of a data set: ``data.yaml`` for us, ``peer.yaml`` and ``judged.yaml`` for them."""
    folder = place.work / "data" / name
    if not (folder / "judged.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / "cfg" / "data" / f"{name}.yaml"
        if place.data[name] is not None:
            moved = {**yaml.safe_load(source.read_text()), "path": str(place.data[name])}
            source = folder.with_suffix(".yaml")
            write_text(source, yaml.safe_dump(moved))
        convert(source, "yolo", folder, images="copy")  # a copy: yolov5 mends broken JPEGs where they lie
        spec = yaml.safe_load((folder / "data.yaml").read_text())
        theirs = {"path": str(folder), "train": spec["train"], "val": spec["val"], "names": spec["names"]}
        write_text(folder / "peer.yaml", yaml.safe_dump(theirs))
        write_text(folder / "judged.yaml", yaml.safe_dump({**theirs, "val": spec[JUDGED[name]]}))
    return folder


def start_weights(place: Place, program: str) -> Path:
    """The published weights as each program's own checkpoint."""
    if place.weights is None:
        raise Fault("--weights is needed: the state dict of yolov5n that `tuned` begins with")
    target = place.work / f"start-{program}.pt"
    if not target.exists():
        if program == "theirs":
            in_peer(place, START, place.weights, target)
        else:
            names = ROOT / "cfg" / "data" / "coco256.yaml"
            command = [sys.executable, "-m", "models", "import", place.weights, "--cfg", CFG, "--names", names]
            run([*command, "-o", target], ROOT, os.environ, place.work / "start-ours.txt")
    return target


# ---- two programs


def train_cell(place: Place, cell: Cell, folder: Path, epochs: int) -> Path:
    """The best checkpoint of a cell's training, which goes on where it was stopped."""
    data = data_for(place, cell.data)
    best = folder / ("best.pt" if cell.program == "ours" else "weights/best.pt")
    if is_complete(folder, epochs):
        return best
    options: list[Any] = ["--imgsz", place.imgsz, "--batch-size", BATCH, "--epochs", epochs, "--seed", cell.seed]
    options += ["--workers", 0, "--cache", "ram", "--device", "cpu", "--noplots"]
    options += ["--project", folder.parent, "--name", folder.name, "--exist-ok"]
    if cell.program == "ours":
        begin = ["--weights", start_weights(place, "ours")] if cell.mode == "tuned" else ["--cfg", CFG]
        fresh = [sys.executable, "train.py", "--data", data / "data.yaml", *begin, *options]
        again, last = [sys.executable, "train.py", "--resume", folder], folder / "last.pt"
        where, surroundings = ROOT, {**os.environ, "OMP_NUM_THREADS": str(place.threads)}
    else:
        where, python = place.peer()
        weights: list[Any] = ["--weights", ""]
        if cell.mode == "tuned":
            weights = ["--weights", start_weights(place, "theirs")]
        begin = weights if cell.mode == "tuned" else [*weights, "--cfg", "models/yolov5n.yaml"]
        fresh = [python, "train.py", "--data", data / "peer.yaml", *begin, *options]
        again, last = [python, "train.py", "--resume", folder / "weights" / "last.pt"], folder / "weights" / "last.pt"
        surroundings = peer_environment(place)
    timed_run(folder, fresh, again, last, where, surroundings)
    return best


# ---- inside the peer's Python; all of it is asked of yolov5's own functions

# Its checkpoint of published weights, as its train.py takes it.
START = """
import sys, torch
from models.yolo import Model
model = Model("models/yolov5n.yaml")
state = torch.load(sys.argv[1], weights_only=True)
model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
torch.save({"model": model.half()}, sys.argv[2])
"""
# The weights of its best.pt, without its classes.
STATE = """
import sys, torch
from models.experimental import attempt_load
torch.save(attempt_load(sys.argv[1], torch.device("cpu"), fuse=False).state_dict(), sys.argv[2])
"""
# Its val.py, which writes what it detects as text; task "speed" is the one that looks at squares.
VAL = """
import json, sys, val
data, weights, imgsz, folder, task, batch, conf, iou, most = sys.argv[1:]
found = val.run(
    data, weights=weights, imgsz=int(imgsz), batch_size=int(batch), task=task, project=folder, name="", exist_ok=True,
    conf_thres=float(conf), iou_thres=float(iou), max_det=int(most), device="cpu", workers=0, half=False,
    save_txt=True, save_conf=True, plots=False,
)
print("says", json.dumps([float(found[0][3]), float(found[0][2])]))
"""
# What yolov5 takes of torchvision for training and evaluating. Suppressed is what overlaps more than the threshold; it
# keeps 300 boxes of what it gets. Ours is as fast as a compiled one: with a slow one yolov5 gives up on a batch after a
# second, and its evaluations miss boxes.
TORCHVISION = {
    "torchvision/__init__.py": "from . import datasets, ops, transforms\n__version__ = '0.28.0'\n",
    "torchvision/datasets.py": "class ImageFolder:\n    pass\n",
    "torchvision/transforms.py": "def __getattr__(name):\n    return object\n",
    "torchvision/ops.py": """
import torch
from engine.nms import suppress

def nms(boxes, scores, iou_threshold):
    kept = suppress(boxes.detach().numpy(), scores.detach().numpy(), None, iou=iou_threshold, max_det=300)
    return torch.from_numpy(kept)
""",
    "torchvision-0.28.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n",
}


def peer_environment(place: Place) -> dict[str, str]:
    """Nothing is installed, downloaded or reported; a font that yolov5 would download is already there."""
    work, (yolov5, python) = place.work, place.peer()
    config = work / "peer-config"
    config.mkdir(parents=True, exist_ok=True)
    if not (config / "Arial.ttf").exists():
        from matplotlib import font_manager

        shutil.copyfile(font_manager.findfont("DejaVu Sans"), config / "Arial.ttf")
    quiet = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLOv5_AUTOINSTALL": "false"}
    quiet |= {"WANDB_MODE": "disabled", "COMET_MODE": "disabled", "MPLBACKEND": "Agg"}
    quiet |= {"YOLO_CONFIG_DIR": str(config), "YOLOV5_CONFIG_DIR": str(config)}
    surroundings = {**os.environ, **quiet, "OMP_NUM_THREADS": str(place.threads)}
    stub = work / "stand-in"
    if not (work / "torchvision").exists():
        probe = subprocess.run([python, "-c", "import torchvision.ops"], cwd=yolov5, capture_output=True)
        write_text(work / "torchvision", "its own" if probe.returncode == 0 else "stand-in")
        for name, text in TORCHVISION.items():
            (stub / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(stub / name, text)
    return (
        surroundings
        if (work / "torchvision").read_text() == "its own"
        else {**surroundings, "PYTHONPATH": f"{stub}{os.pathsep}{ROOT}"}
    )


def in_peer(place: Place, program: str, *arguments: Any) -> str:
    """Run a few lines inside yolov5's folder by its Python."""
    yolov5, python = place.peer()
    output = place.work / "peer-output.txt"
    return run([python, "-c", program, *arguments], yolov5, peer_environment(place), output)


# ---- one ruler


def judged(truths: Sequence[Sample], found: Sequence[Detections], names: Sequence[str]) -> dict[str, Any]:
    """AP and AP50, also without each tenth of the images, image n being in group n modulo 10."""
    parts: list[Sequence[int]] = [range(len(truths))]
    parts += [[n for n in range(len(truths)) if n % GROUPS != group] for group in range(GROUPS)]
    metrics = [coco_metrics([truths[n] for n in part], [found[n] for n in part], names) for part in parts]
    whole, *without = [{"ap": m.ap, "ap50": m.ap50} for m in metrics]
    return {**whole, "without": {key: [one[key] for one in without] for key in whole}}


def judged_by_us(network: Network, folder: Path, split: str, imgsz: int) -> dict[str, Any]:
    spec = read_data_spec(folder / "data.yaml")
    samples = read_split(spec, split).samples
    images = ImageSet(samples, imgsz, None, seed=0, cache=False)
    found, _times = detections_of(network.eval(), images, batch_size=BATCH, progress=False, **JUDGED_BY)
    return judged(samples, found, spec.names)


def judged_by_them(place: Place, best: Path, folder: Path, split: str, task: str) -> dict[str, Any]:
    """What val.py detects, told by our metric, and ``says``: AP and AP50 by its own."""
    output = place.work / "val" / task
    shutil.rmtree(output, ignore_errors=True)
    options = (place.imgsz, output, task, BATCH, *JUDGED_BY.values())
    said = in_peer(place, VAL, folder / "judged.yaml", best, *options)
    spec = read_data_spec(folder / "data.yaml")
    samples = read_split(spec, split).samples
    found = [read_detections(output / "labels" / f"{sample.path.stem}.txt", sample) for sample in samples]
    says = next(line for line in said.splitlines() if line.startswith("says "))
    return {**judged(samples, found, spec.names), "says": json.loads(says.removeprefix("says "))}


def read_detections(path: Path, sample: Sample) -> Detections:
    """Of one image, from yolov5's text: class, centre and size as fractions of the image, confidence."""
    values = np.loadtxt(path, ndmin=2) if path.exists() else np.zeros((0, 6))
    values = values[np.argsort(-values[:, 5], kind="stable")]
    centre, half = values[:, 1:3], values[:, 3:5] / 2
    boxes = np.concatenate([centre - half, centre + half], axis=1) * (image_size(sample.path) * 2)
    scores, labels = torch.from_numpy(values[:, 5]), torch.from_numpy(values[:, 0].astype(np.int64))
    return Detections(torch.from_numpy(boxes).float(), scores.float(), labels)


def measure(place: Place, cell: Cell) -> dict[str, Any]:
    """Train a cell and judge it."""
    folder, data, split = place.work / "runs" / str(cell), data_for(place, cell.data), JUDGED[cell.data]
    best = train_cell(place, cell, folder, place.epochs_of(cell))
    result: dict[str, Any] = {
        "cell": str(cell),
        "epochs": place.epochs_of(cell),
        "imgsz": place.imgsz,
        "batch": BATCH,
        "judged_on": split,
        "minutes": json.loads((folder / "seconds.json").read_text()) / 60,
        "threads": place.threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    if cell.program == "ours":
        network = restore(load_checkpoint(best))
    else:
        in_peer(place, STATE, best, folder / "state.pth")
        network, result["notes"] = import_weights(
            folder / "state.pth", parse(CFG), read_data_spec(data / "data.yaml").names
        )
        result["own"] = judged_by_them(place, best, data, split, "val")
        result["square"] = judged_by_them(place, best, data, split, "speed")
        result["torchvision"] = (place.work / "torchvision").read_text()
        result["peer"] = peer_version(place)
    return {**result, "ours": judged_by_us(network, data, split, place.imgsz)}


def peer_version(place: Place) -> dict[str, str | None]:
    yolov5, _ = place.peer()
    head = subprocess.run(["git", "-C", yolov5, "rev-parse", "HEAD"], capture_output=True, text=True)
    is_clone = head.returncode == 0 and (yolov5 / ".git").exists()
    train = hashlib.sha256((yolov5 / "train.py").read_bytes()).hexdigest()[:12]
    return {"commit": head.stdout.strip() if is_clone else None, "train.py": train}


# ---- the plan


def plan(place: Place, file: Path) -> dict[str, list[float]]:
    """Seconds to start, and an epoch, of each data set and program, measured by two short trainings."""
    if file.exists():
        return json.loads(file.read_text())
    kinds = [(data, program) for data in JUDGED for program in PROGRAMS]
    found = {}
    bar = tqdm(kinds, "measuring an epoch of each", unit="kind", leave=False)
    for data, program in bar:
        times = []
        for epochs in PLAN_EPOCHS:
            folder = place.work / "plan" / f"{data}-{program}-{epochs}"
            shutil.rmtree(folder, ignore_errors=True)
            train_cell(place, Cell(data, "scratch", 0, program), folder, epochs)
            times.append(json.loads((folder / "seconds.json").read_text()))
        epoch = max(times[1] - times[0], 0.0) / (PLAN_EPOCHS[1] - PLAN_EPOCHS[0])
        found[f"{data}-{program}"] = [max(times[0] - PLAN_EPOCHS[0] * epoch, 0.0), epoch]
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


def shown_plan(place: Place, seconds: dict[str, list[float]]) -> tuple[str, float]:
    rows = []
    for data, mode in EPOCHS:
        for program in PROGRAMS:
            epochs = place.epochs_of(Cell(data, mode, 0, program))
            start, epoch = seconds[f"{data}-{program}"]
            minutes = len(SEEDS) * (start + epochs * epoch) / 60
            rows.append((data, mode, program, len(SEEDS), epochs, f"{epoch:.1f}", f"{minutes:.0f}", minutes))
    total = sum(row[-1] for row in rows)
    header = ("data", "mode", "program", "cells", "epochs", "s an epoch", "minutes")
    return f"{table([row[:-1] for row in rows], header)}\n\nabout {total:.0f} minutes in all", total


# ---- the table


def interval(without: Sequence[float]) -> float:
    """Half the 95 % interval: 1.96 standard errors of the delete-a-group jackknife."""
    return 1.96 * jackknife_error(without)


def better(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that count: of theirs, those by the ruler that suits them best."""
    return max((result[ruler] for ruler in ("ours", "own") if ruler in result), key=lambda numbers: numbers["ap"])


def shown(results: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """The table, and whether ours is below theirs anywhere."""
    rows, below = [], False
    for data, mode in EPOCHS:
        both = [
            [results[name] for program in PROGRAMS if (name := str(Cell(data, mode, seed, program))) in results]
            for seed in SEEDS
        ]
        pairs = [pair for pair in both if len(pair) == 2]
        if not pairs:
            continue
        for key in ("ap", "ap50"):
            ours, theirs = ([better(pair[side]) for pair in pairs] for side in (0, 1))
            means = [sum(one[key] for one in side) / len(side) for side in (ours, theirs)]
            wide = [np.mean([one["without"][key] for one in side], axis=0) for side in (ours, theirs)]
            difference, half = means[0] - means[1], interval(wide[0] - wide[1])
            below |= difference + half < 0
            minutes = [sum(pair[side]["minutes"] for pair in pairs) / len(pairs) for side in (0, 1)]
            rows.append(
                (
                    f"{data} {mode}",
                    pairs[0][0]["epochs"],
                    key.upper(),
                    *(
                        f"{mean:.3f} +- {interval(one):.3f} ({' '.join(f'{run[key]:.3f}' for run in side)})"
                        for mean, one, side in zip(means, wide, (ours, theirs), strict=True)
                    ),
                    f"{difference:+.3f} ({difference - half:+.3f} to {difference + half:+.3f})",
                    f"{minutes[0]:.1f} / {minutes[1]:.1f}",
                )
            )
    header = ("data, mode", "epochs", "", "ours (each seed)", "theirs (each seed)", "difference, 95 %", "minutes")
    return table(rows, header), below


def shown_agreement(results: dict[str, dict[str, Any]]) -> str:
    """Theirs by three rulers, and by its own metric."""
    rows = []
    for name, result in results.items():
        if "square" in result:
            us, square, own = (result[ruler]["ap"] for ruler in ("ours", "square", "own"))
            agree = "yes" if abs(us - square) <= AGREEMENT else "NO"
            rows.append((name, us, square, agree, own, result["own"]["says"][0]))
    header = ("cell", "AP by our val", "theirs on squares", f"within {AGREEMENT}", "theirs, own", "as it says")
    return table(rows, header) if rows else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yolov5", type=Path, help="a clone of it")
    parser.add_argument("--peer-python", type=Path, help="a Python with its requirements")
    parser.add_argument("--weights", type=Path, help="the state dict of a published yolov5n, for `tuned`")
    parser.add_argument("--bccd", type=Path, help="folder of the data set; default as cfg/data/bccd.yaml says")
    parser.add_argument("--fruit", type=Path, help="likewise")
    parser.add_argument("--cells", nargs="+", default=[*map(str, CELLS)], choices=[*map(str, CELLS)], metavar="CELL")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--epochs", type=int, help="default: 60 from scratch, 30 tuned")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each training; default: all cores")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "learn", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="measure the plan and stop")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folders = {
        name: path.resolve() if path else None for name, path in (("bccd", options.bccd), ("fruit", options.fruit))
    }
    place = Place(
        options.work.resolve(),
        options.yolov5 and options.yolov5.resolve(),
        options.peer_python
        and options.peer_python.absolute(),  # not resolved: a link would lead out of its environment
        options.weights and options.weights.resolve(),
        folders,
        options.imgsz,
        options.epochs,
        options.threads,
    )
    cells = {str(cell): cell for cell in CELLS}
    files = {cell: options.out / f"learn-{cell}.json" for cell in cells}
    missing = [cell for cell in cells if cell in options.cells and not files[cell].exists()]
    if (missing and not options.show) or options.plan:
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / "learn-plan.json"
        if options.plan:
            file.unlink(missing_ok=True)
        text, minutes = shown_plan(place, plan(place, file))
        print(text)
        if minutes > LONGEST:
            print(f"That is more than {LONGEST} minutes; --epochs takes a smaller number.")
    if options.plan:
        return 0
    if not options.show:
        fill(files, missing, lambda cell: measure(place, cells[cell]))
    results = read(files)
    text, below = shown(results)
    print(text, shown_agreement(results), sep="\n\n")
    return int(below)


if __name__ == "__main__":
    raise SystemExit(guarded(main))
