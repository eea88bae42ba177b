"""Training pictures a second: our mosaics beside those of yolov5 and ultralytics, from the same JPEGs, in one run.

python bench/loader.py --yolov5 ~/yolov5 --python ~/peers/bin/python                 # about 20 minutes on 2 idle cores
python bench/loader.py --yolov5 ~/yolov5 --python ~/peers/bin/python --images ~/coco256   # on real images as well
python bench/loader.py --yolov5 ~/yolov5 --python ~/peers/bin/python --count 144 --rounds 2 --workers 0   # a quick look
python bench/loader.py --show                                                        # the table of what was measured

The peers run in an environment of their own (--python), which has torch, psutil, pandas, ultralytics and
opencv-python-headless of the version that ours has; yolov5 (v7.0) comes from a clone. What they import beyond that and
loading does not need, torchvision above all, is a stand-in. All make mosaics of four at --imgsz, affine, hsv and flips
by their own default hyper-parameters, batches of 16, with one thread a process, and new workers for each epoch.

A round is one epoch of each, in drawn order; CPU time is that of the process and all that it started, read from /proc.
The ratio is images per CPU-second of ours over those of the faster peer in the same round: the median of all rounds,
with the 95 % interval of a bootstrap over them. `decoded` counts how many images were decoded for one training picture
(known without workers only). Drawn JPEGs are 640x480, about 105 kB; there are more of them than anyone keeps in memory
when told not to: ultralytics keeps the last 128, we the last 127. Exits with 1 where a median ratio is below 1.3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LEAST_RATIO = 1.3
BATCH = 16
RESAMPLES = 5000
CONTESTANTS = ("ours", "yolov5", "ultralytics")

# hyper-parameters that yolov5 trains with from scratch (hyp.scratch-low.yaml); ours and ultralytics' are the defaults
HYP = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4, "degrees": 0.0, "translate": 0.1, "scale": 0.5, "shear": 0.0}
HYP |= {"perspective": 0.0, "flipud": 0.0, "fliplr": 0.5, "mosaic": 1.0, "mixup": 0.0, "copy_paste": 0.0}


# ---- in the process of a contestant


class StandIn(ModuleType):
    """A package that is not there: whatever is taken from it does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, _: MagicMock()}) if name[:1].isupper() else MagicMock()


class StandIns(MetaPathFinder, Loader):
    """Finds a `StandIn` for torchvision, and for what the environment lacks of the others."""

    NAMES = ("torchvision", "pandas", "requests", "IPython", "pkg_resources", "seaborn", "scipy", "thop", "polars")

    def __init__(self) -> None:
        self.names = [n for n in self.NAMES if n == "torchvision" or importlib.util.find_spec(n) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "pkg_resources":
            module.parse_version = importlib.import_module("packaging.version").parse  # type: ignore[attr-defined]
        if module.__name__ == "IPython":
            module.version_info, module.get_ipython = (9, 0), lambda: None  # type: ignore[attr-defined]


Epoch = Callable[[], Iterator[int]]  # goes through an epoch; how many pictures each batch had


def ours(folder: Path, imgsz: int, workers: int, cache: str) -> Epoch:
    sys.path.insert(0, str(ROOT))
    from data.augment import Augment
    from data.dataset import ImageSet
    from data.loader import batches
    from data.structures import Sample

    samples = []
    for path in sorted((folder / "images").iterdir()):
        height, width = cv2.imread(str(path)).shape[:2]
        rows = np.loadtxt(folder / "labels" / f"{path.stem}.txt", dtype=np.float32, ndmin=2).reshape(-1, 5)
        boxes = np.concatenate([rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2], axis=1)
        samples.append(Sample(path, boxes * np.float32([width, height] * 2), rows[:, 0].astype(np.int64)))
    images = ImageSet(samples, imgsz, Augment(), cache=cache)
    number = 0

    def epoch() -> Iterator[int]:
        nonlocal number
        number += 1
        for batch in batches(images, BATCH, epoch=number, shuffle=True, workers=workers):
            yield len(batch.images)

    return epoch


def yolov5(folder: Path, imgsz: int, workers: int, cache: str, source: Path) -> Epoch:
    sys.path.insert(0, str(source))
    sys.meta_path.insert(0, StandIns())
    from utils.dataloaders import LoadImagesAndLabels  # type: ignore[import-not-found]

    memory = "ram" if cache == "ram" else False
    return loaded(LoadImagesAndLabels(str(folder / "images"), imgsz, BATCH, True, HYP, cache_images=memory), workers)


def ultralytics(folder: Path, imgsz: int, workers: int, cache: str) -> Epoch:
    sys.meta_path.insert(0, StandIns())
    known = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.28.0" if name == "torchvision" else known(name)
    from ultralytics.cfg import get_cfg  # type: ignore[import-not-found]
    from ultralytics.data.build import build_yolo_dataset  # type: ignore[import-not-found]

    config = get_cfg(overrides={"imgsz": imgsz, "cache": "ram" if cache == "ram" else False, "task": "detect"})
    data = {"names": {i: str(i) for i in range(80)}, "nc": 80, "channels": 3}
    return loaded(build_yolo_dataset(config, str(folder / "images"), BATCH, data), workers)


def loaded(dataset: Any, workers: int) -> Epoch:
    """A peer's data set in torch's loader, as both use it."""

    def epoch() -> Iterator[int]:
        loader = torch.utils.data.DataLoader(
            dataset, BATCH, shuffle=True, num_workers=workers, collate_fn=dataset.collate_fn, worker_init_fn=one_thread
        )
        for batch in loader:
            yield len(batch["img"] if isinstance(batch, dict) else batch[0])

    return epoch


def one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
    np.random.seed(worker)  # noqa: NPY002  their pipelines draw from the global states


def serve(options: argparse.Namespace) -> None:
    """Goes through an epoch whenever a line comes in, and answers with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peers print is no answer
    decoded = [0]
    for name in ("imread", "imdecode"):
        setattr(cv2, name, counted(getattr(cv2, name), decoded))
    torch.set_num_threads(1)
    given = (options.folder, options.imgsz, options.serve_workers, options.serve_cache)
    if options.serve == "yolov5":
        epoch = yolov5(*given, options.yolov5)
    else:
        epoch = (ours if options.serve == "ours" else ultralytics)(*given)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    version = getattr(sys.modules.get("ultralytics"), "__version__", None)
    told = {"version": version, "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({**told, "cv2": cv2.__version__, "numpy": np.__version__}), file=answers, flush=True)
    for _ in sys.stdin:
        decoded[0] = 0
        start = time.perf_counter()
        count = sum(epoch())
        wall = time.perf_counter() - start
        print(json.dumps({"images": count, "wall": wall, "decoded": decoded[0]}), file=answers, flush=True)


def counted(function: Callable, count: list[int]) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return function(*args, **kwargs)

    return wrapped


# ---- in the process that measures


def draw_images(folder: Path, count: int) -> None:
    """JPEGs of 640x480 pixels and about 105 kB, with 1 to 10 rectangles as objects."""
    for index in range(count):
        rng = np.random.default_rng(index)
        image = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
        rows = []
        for _ in range(int(rng.integers(1, 11))):
            width, height = rng.uniform(0.04, 0.4, 2)
            x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
            corners = [(int(x * 640), int(y * 480)), (int((x + width) * 640), int((y + height) * 480))]
            cv2.rectangle(image, *corners, rng.integers(0, 256, 3).tolist(), -1)
            rows.append(f"{rng.integers(0, 80)} {x + width / 2:.6f} {y + height / 2:.6f} {width:.6f} {height:.6f}\n")
        noise = rng.normal(0, 14, (480, 640, 3)).astype(np.int16)
        save(folder, f"{index:05d}.jpg", cv2.add(image, noise, dtype=cv2.CV_8U), "".join(rows))


def save(folder: Path, name: str, image: np.ndarray, rows: str) -> None:
    cv2.imwrite(str(folder / "images" / name), image, [cv2.IMWRITE_JPEG_QUALITY, 86])
    (folder / "labels" / Path(name).with_suffix(".txt")).write_text(rows)


def copy_images(folder: Path, source: Path) -> None:
    """The JPEGs below `source` that have a YOLO label file; the peers write beside them, so they get copies."""
    for path in sorted(source.rglob("*.jpg")):
        parts = ["labels" if part == "images" else part for part in path.with_suffix(".txt").parts]
        if Path(*parts).is_file():
            shutil.copy(path, folder / "images")
            shutil.copy(Path(*parts), folder / "labels")
    if not any((folder / "images").iterdir()):
        sys.exit(f"{source}: no .jpg with its .txt in a folder labels beside images")


def cpu_seconds(process: int) -> float:
    """Of a process, what it started, and of those of them that have ended."""
    parents: dict[int, list[int]] = {}
    spent: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
            spent[int(entry.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found, waiting = 0.0, [process]
    while waiting:
        one = waiting.pop()
        found += spent.get(one, 0.0)
        waiting += parents.get(one, [])
    return found


def measured(folder: Path, workers: int, cache: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of all contestants, after one that is not counted and fills what is kept in memory."""
    processes, told = {}, {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(folder)}
    given = ["--imgsz", options.imgsz, "--serve-workers", workers, "--serve-cache", cache]
    for name in CONTESTANTS:
        if name == "yolov5" and options.yolov5 is None:
            continue
        own = folder / f"{name}-{workers}-{cache}"  # the peers' label caches have the same name
        for part in ("images", "labels"):
            shutil.copytree(folder / part, own / part, copy_function=os.link)
        python = sys.executable if name == "ours" else options.python
        command = [python, Path(__file__).resolve(), "--serve", name, "--folder", own, *given]
        command += ["--yolov5", options.yolov5] if name == "yolov5" else []
        processes[name] = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=folder,
        )
    try:
        for name, process in processes.items():
            told[name] = answer(name, process)
        rng = np.random.default_rng(0)
        rounds: list[dict[str, Any]] = []
        for number in range(options.rounds + 1):
            one: dict[str, Any] = {}
            for name in rng.permutation(list(processes)):
                process = processes[name]
                before = cpu_seconds(process.pid)
                print(file=process.stdin, flush=True)
                one[str(name)] = answer(name, process)
                one[str(name)]["cpu"] = cpu_seconds(process.pid) - before
            if number > 0:
                rounds.append(one)
    finally:
        for process in processes.values():
            process.communicate()  # the end of its input ends it
    return {"contestants": told, "rounds": rounds}


def answer(name: str, process: subprocess.Popen) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{name} ended; --verbose shows what it said")
    return json.loads(line)


def ratios(rounds: Sequence[dict[str, Any]], clock: str) -> np.ndarray:
    """Of each round: our pictures a second over those of the faster peer."""
    speeds = [{name: one["images"] / one[clock] for name, one in turn.items()} for turn in rounds]
    return np.array([turn["ours"] / max(speed for name, speed in turn.items() if name != "ours") for turn in speeds])


def shown(cells: Sequence[dict[str, Any]]) -> str:
    sys.path.insert(0, str(ROOT))
    from engine.runs import table

    header = ("images", "workers", "cache", "clock", *CONTESTANTS, "times as fast", "95 %", "decoded", "rounds")
    rows = []
    for cell in cells:
        rounds = cell["rounds"]
        for clock in ("cpu", "wall"):
            found = ratios(rounds, clock)
            resampled = np.median(np.random.default_rng(0).choice(found, (RESAMPLES, len(found))), axis=1)
            low, high = np.percentile(resampled, (2.5, 97.5))
            speeds = {
                name: f"{np.median([one[name]['images'] / one[name][clock] for one in rounds]):.0f}"
                for name in rounds[0]
            }
            each = [f"{np.median([o[n]['decoded'] / o[n]['images'] for o in rounds]):.2f}" for n in rounds[0]]
            rows.append(
                (
                    f"{cell['set']} {cell['count']}",
                    cell["workers"],
                    cell["cache"],
                    clock,
                    *(speeds.get(name, "-") for name in CONTESTANTS),
                    float(np.median(found)),
                    f"{low:.2f} to {high:.2f}",
                    " ".join(each) if cell["workers"] == 0 else "-",
                    len(rounds),
                )
            )
    return table(rows, header)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yolov5", type=Path, help="a clone of it; without it only ultralytics is measured")
    parser.add_argument("--python", type=Path, help="the python of the peers' environment")
    parser.add_argument("--images", type=Path, help="a folder with images/ and labels/ (YOLO txt), besides drawn ones")
    parser.add_argument("--count", type=int, default=432, help="of drawn JPEGs")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--caches", nargs="+", default=["off", "ram"], choices=("off", "ram"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--again", action="store_true", help="measure also what has its result")
    parser.add_argument("--verbose", action="store_true", help="show what the peers print")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    for name, kind in {"serve": str, "folder": Path, "serve-workers": int, "serve-cache": str}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return 0
    if options.python is None and not options.show:
        parser.error("--python: the peers' environment, or --show")
    sources = {"drawn": None, **({options.images.name: options.images} if options.images else {})}
    for kind, source in {} if options.show else sources.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for part in ("images", "labels"):
                (folder / part).mkdir()
            copy_images(folder, source) if source else draw_images(folder, options.count)
            sizes = [path.stat().st_size for path in (folder / "images").iterdir()]
            for workers in options.workers:
                for cache in options.caches:
                    path = options.out / f"loader-{kind}-{workers}-{cache}.json"
                    if path.exists() and not options.again:
                        continue
                    cell = {"set": kind, "count": len(sizes), "kilobytes": round(float(np.mean(sizes)) / 1000, 1)}
                    cell |= {"imgsz": options.imgsz, "batch": BATCH, "workers": workers, "cache": cache}
                    cell |= {"cores": os.cpu_count(), **measured(folder, workers, cache, options)}
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write(path, cell)
    cells = [json.loads(path.read_text()) for path in sorted(options.out.glob("loader-*.json"))]
    if not cells:
        print("nothing was measured yet")
        return 0
    print(shown(cells))
    return int(any(np.median(ratios(cell["rounds"], "cpu")) < LEAST_RATIO for cell in cells))


def write(path: Path, cell: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(cell, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
