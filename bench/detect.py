"""Frames per CPU second of detect.py beside yolov5's own, from a video to a video with boxes, with the same weights.

python bench/detect.py --weights yolov5n_state_dict_fp16.pth --video bikes.mp4 --yolov5 ~/yolov5 --peer-python PYTHON
python bench/detect.py --weights ... --video ... --yolov5 ... --peer-python ... --pairs 1     # does it work at all?
python bench/detect.py --show                                                                 # what was measured

Whole processes take turns in a fresh order each round: ours with torch and with onnxruntime, yolov5's with torch and
with onnxruntime. All see 640 pixels, confidence .25, IoU .45, at most 300 detections, lines of 3 pixels, write mp4v,
and run on the same cores. Every round each one looks at a folder with the video once and at one with it three times:
the first is a whole run, half the difference is the steady state without start and end. The ratio is ours / yolov5's
frames per CPU second, the median over the rounds with the 95 % interval of a bootstrap over rounds. Detections of all
are counted: within 2 % they do the same work.

yolov5 pads a video to a rectangle (272x640 to 288x640) with torch but to a square with onnxruntime; its `onnx` row is
of a file exported for just that rectangle, the best it can do. `--peer-python` is the interpreter of the environment
that `make peers` makes. torchvision, whose compiled part fails beside another build of torch, is replaced there by a
stand-in with OpenCV's suppression. Exits with 1 where ours / yolov5's with torch is under 1.0 with torch, or under 1.4
with onnxruntime, in either column of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import table, write_text  # noqa: E402

RESULT = ROOT / "bench" / "results" / "detect.json"
IMGSZ, CONF, IOU, MAX_DET, THICKNESS, STRIDE = 640, 0.25, 0.45, 300, 3, 32
MANY = 3  # copies of the video in the long run
RUNS = ("ours torch", "ours onnx", "yolov5 torch", "yolov5 onnx")
COMPARED = (("ours torch", "yolov5 torch"), ("ours onnx", "yolov5 torch"), ("ours onnx", "yolov5 onnx"))
WANTED = {COMPARED[0]: 1.0, COMPARED[1]: 1.4}
SAME_WORK = 0.02
RESAMPLES = 5000

# What yolov5 takes from torchvision, for its own process.
STAND_IN = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock


def nms(boxes, scores, iou_threshold):
    import cv2
    import torch

    corners = boxes.numpy()
    sides = corners.copy()
    sides[:, 2:] -= corners[:, :2]
    kept = cv2.dnn.NMSBoxes(sides.tolist(), scores.tolist(), 0.0, iou_threshold) if len(boxes) else []
    return torch.as_tensor(kept, dtype=torch.int64).flatten()


class StandIn(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {}) if name[0].isupper() else MagicMock(name=name)


class StandIns(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "torchvision":
            module.__version__ = "0.28.0"
        if module.__name__ == "torchvision.ops":
            module.nms = nms


sys.meta_path.insert(0, StandIns())
import torchvision.ops
"""

# Writes the weights as yolov5 wants them, and an ONNX file of one size, in its own process.
PREPARE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from models.yolo import Model
import json
folder, state, names, height, width = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), *map(int, sys.argv[4:6])
model = Model(folder + "/models/yolov5n.yaml").eval()
model.load_state_dict({k: v.float() for k, v in torch.load(state, map_location="cpu", weights_only=True).items()})
model.names = dict(enumerate(names))
torch.save({"model": model}, sys.argv[6] + ".pt")
model = model.fuse()
model.model[-1].export = True
with torch.no_grad():
    x = torch.zeros(1, 3, height, width)
    model(x)
    names_of = {"input_names": ["images"], "output_names": ["output0"]}
    torch.onnx.export(model, x, sys.argv[6] + ".onnx", dynamo=False, opset_version=17, **names_of)
import onnx
file = onnx.load(sys.argv[6] + ".onnx")
for key, value in {"stride": 32, "names": model.names}.items():
    entry = file.metadata_props.add()
    entry.key, entry.value = key, str(value)
onnx.save(file, sys.argv[6] + ".onnx")
"""


def prepared(options: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """The command of each run, without its source; files that they need lie in ``work`` and are made once."""
    names_file = options.names
    ours, peer = work / "ours.pt", work / "peer"
    stand_in = work / "stand_in"
    if not stand_in.exists():
        stand_in.mkdir(parents=True)
        write_text(stand_in / "sitecustomize.py", STAND_IN)
        (stand_in / "torchvision-0.28.0.dist-info").mkdir()
        write_text(stand_in / "torchvision-0.28.0.dist-info" / "METADATA", "Name: torchvision\nVersion: 0.28.0\n")
    if not ours.exists():
        cfg = ROOT / "cfg" / "models" / "yolov5n.yaml"
        command = [sys.executable, "-m", "models", "import", options.weights, "--cfg", cfg, "--names", names_file]
        run([*command, "-o", ours], ROOT)
    if not ours.with_suffix(".onnx").exists():
        run([sys.executable, "export.py", "--weights", ours, "--format", "onnx", "--imgsz", IMGSZ], ROOT)
    height, width = rectangle(options.video)
    if not peer.with_suffix(".onnx").exists():
        from data.config import read_data_spec

        names = json.dumps(list(read_data_spec(names_file).names))
        arguments = [options.yolov5, options.weights.resolve(), names, height, width, peer]
        run([options.peer_python, "-c", PREPARE, *arguments], options.yolov5, stand_in)
    same = ["--conf-thres", CONF, "--iou-thres", IOU, "--max-det", MAX_DET, "--line-thickness", THICKNESS]
    same += ["--device", "cpu", "--exist-ok"]
    mine = [sys.executable, ROOT / "detect.py", *same, "--imgsz", IMGSZ, "--weights"]
    theirs = [options.peer_python, options.yolov5 / "detect.py", *same, "--imgsz"]
    commands: dict[str, list[Any]] = {
        "ours torch": [*mine, ours],
        "ours onnx": [*mine, ours.with_suffix(".onnx")],
        "yolov5 torch": [*theirs, IMGSZ, "--weights", peer.with_suffix(".pt")],
        "yolov5 onnx": [*theirs, height, width, "--weights", peer.with_suffix(".onnx")],
    }
    return {name: list(map(str, command)) for name, command in commands.items()}


def rectangle(video: Path) -> tuple[int, int]:
    """Height and width that a frame is padded to."""
    capture = cv2.VideoCapture(str(video))
    width, height = capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
    if not width:
        raise Fault(f"{video}: no video")
    sides = (side * IMGSZ / max(width, height) for side in (height, width))
    return tuple(int(-(-round(side) // STRIDE) * STRIDE) for side in sides)  # type: ignore[return-value]


def run(command: Sequence[Any], folder: Path, path: Path | None = None, cores: Sequence[int] = ()) -> str:
    """What a command says. Raises a Fault with its last lines where it fails."""
    environment = os.environ | {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLOv5_AUTOINSTALL": "false"}
    environment |= {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # yolov5 unpickles its networks; the file is made above
    environment |= {"PYTHONPATH": str(path), "YOLO_CONFIG_DIR": str(path)} if path else {}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        raise Fault(f"{' '.join(map(str, command[:4]))} ... failed with {done.returncode}", *said.splitlines()[-8:])
    return said


def detections_of(name: str, said: str) -> int:
    """How many a run found, by what it prints."""
    if name.startswith("ours"):
        return sum(int(count) for count in re.findall(r"^\S.*?\s(\d+)\s+[01]\.\d{3}$", said, re.MULTILINE))
    lines = re.findall(r"\d+x\d+ (.*?)(?:, )?\d[\d.]*ms$", said, re.MULTILINE)
    return sum(int(count) for line in lines for count in re.findall(r"(\d+) [a-z]", line))


def measured(name: str, command: Sequence[str], folder: Path, work: Path, cores: Sequence[int]) -> dict[str, Any]:
    """One run over the videos of a folder: CPU and wall seconds of its process, frames written, detections."""
    path = work / "stand_in" if name.startswith("yolov5") else None
    with tempfile.TemporaryDirectory(dir=work) as out:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        said = run([*command, "--source", folder, "--project", out, "--name", "run"], work, path, cores)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        frames = 0
        for file in Path(out).rglob("*.mp4"):
            frames += int(cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": wall, "frames": frames, "detections": detections_of(name, said)}


def frames_per_second(rounds: Sequence[dict[str, Any]], name: str, clock: str, what: str) -> np.ndarray:
    """Of each round, over a whole run or in steady state."""
    one, many = ([turn[f"{name} {copies}"] for turn in rounds] for copies in (1, MANY))
    if what == "whole":
        return np.array([a["frames"] / a[clock] for a in one])
    return np.array([(b["frames"] - a["frames"]) / (b[clock] - a[clock]) for a, b in zip(one, many, strict=True)])


def compared(rounds: Sequence[dict[str, Any]], ours: str, theirs: str, clock: str, what: str) -> tuple[float, ...]:
    """Median ratio and its 95 % interval, by a bootstrap over rounds."""
    ratios = frames_per_second(rounds, ours, clock, what) / frames_per_second(rounds, theirs, clock, what)
    resampled = np.median(np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    return float(np.median(ratios)), *(float(bound) for bound in np.percentile(resampled, (2.5, 97.5)))


def shown(result: dict[str, Any]) -> str:
    rounds = result["rounds"]
    speeds = []
    for name in RUNS:
        medians = [
            float(np.median(frames_per_second(rounds, name, clock, what)))
            for clock in ("cpu", "wall")
            for what in ("whole", "steady")
        ]
        speeds.append((name, *(f"{value:.2f}" for value in medians), rounds[0][f"{name} 1"]["detections"]))
    header = ("run", "frames/CPU s whole", "steady", "frames/s whole", "steady", "detections")
    ratios = []
    for ours, theirs in COMPARED:
        cells = []
        for clock in ("cpu", "wall"):
            for what in ("whole", "steady"):
                ratio, low, high = compared(rounds, ours, theirs, clock, what)
                cells.append(f"{ratio:.2f} ({low:.2f} to {high:.2f})")
        ratios.append((f"{ours} / {theirs}", *cells))
    ratio_header = ("ratio", "CPU whole", "CPU steady", "wall whole", "wall steady")
    about = f"{len(rounds)} rounds on {len(result['cores'])} cores"
    return "\n\n".join((about, table(speeds, header), table(ratios, ratio_header)))


def missed(result: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    rounds, wrong = result["rounds"], []
    for (ours, theirs), wanted in WANTED.items():
        for what in ("whole", "steady"):
            ratio = compared(rounds, ours, theirs, "cpu", what)[0]
            if ratio < wanted:
                wrong.append(f"{ours} / {theirs}, {what}: {ratio:.2f} frames per CPU second, {wanted} is wanted")
    counts = [rounds[0][f"{name} 1"]["detections"] for name in RUNS]
    if max(counts) > (1 + SAME_WORK) * min(counts):
        wrong.append(f"not the same work: {dict(zip(RUNS, counts, strict=True))} detections")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a state dict of yolov5n")
    parser.add_argument("--video", type=Path, help="what both look at")
    parser.add_argument("--names", type=Path, default=ROOT / "cfg" / "data" / "coco256.yaml", help="class names")
    parser.add_argument("--yolov5", type=Path, help="a clone of it")
    parser.add_argument("--peer-python", type=Path, help="the Python of an environment that its detect.py runs in")
    parser.add_argument("--pairs", type=int, default=7, help="rounds; those already measured count")
    parser.add_argument("--cores", type=int, default=1, help="cores that every process may use")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "bench-detect", help="scratch folder"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    try:
        if not options.show:
            measure(options)
        if not options.out.exists():
            raise Fault(f"{options.out}: nothing was measured yet")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    result = json.loads(options.out.read_text())
    print(shown(result))
    wrong = missed(result)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


def measure(options: argparse.Namespace) -> None:
    """Run the rounds that are missing; the file is written after each."""
    absent = [name for name in ("weights", "video", "yolov5", "peer_python") if getattr(options, name) is None]
    if absent:
        raise Fault(f"needs {' '.join('--' + name.replace('_', '-') for name in absent)}")
    options.video, options.yolov5, work = options.video.resolve(), options.yolov5.resolve(), options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    commands = prepared(options, work)
    folders = {}
    for copies in (1, MANY):
        folders[copies] = work / f"videos{copies}"
        shutil.rmtree(folders[copies], ignore_errors=True)
        folders[copies].mkdir()
        for number in range(copies):
            shutil.copy(options.video, folders[copies] / f"{number}{options.video.suffix}")
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    about = {"cores": cores, "torch": torch.__version__, "opencv": cv2.__version__, "machine": os.uname().machine}
    result: dict[str, Any] = about | {"rounds": []}
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if {key: before.get(key) for key in about} == about:
            result = before
    rng = np.random.default_rng(len(result["rounds"]))
    runs = [(name, copies) for name in RUNS for copies in (1, MANY)]
    missing = options.pairs - len(result["rounds"])
    with tqdm(total=max(missing, 0) * len(runs), unit="run") as bar:
        for _ in range(missing):
            turn = {}
            for index in rng.permutation(len(runs)):
                name, copies = runs[index]
                bar.set_description(f"{name} {copies}")
                turn[f"{name} {copies}"] = measured(name, commands[name], folders[copies], work, cores)
                bar.update()
            result["rounds"].append(turn)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
