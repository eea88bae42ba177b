"""Is our forward as fast as the peers' own code? Both in one process, in pairs, with the same weights.

python bench/forward.py --yolov5 ~/yolov5 --scaledyolov4 ~/ScaledYOLOv4            # about 10 minutes on 2 idle cores
python bench/forward.py --yolov5 ~/yolov5 --models yolov5n --imgsz 320 --pairs 5   # a quick look
python bench/forward.py --show                                                     # the table of what was measured

The folders are clones (yolov5 at v7.0, ScaledYOLOv4 at yolov4-large); their code is imported from there and nothing of
it is kept here. The peer's model gets random weights, ours imports them, and the head's logits have to agree before
anything is timed. A pair is one forward of each, which first is drawn; the ratio is ours / theirs, the median of all
pairs with the 95 % interval of a bootstrap over pairs. `detect` is the whole forward with decoding: the peers' give
boxes, objectness and classes, ours boxes and scores, already multiplied. `logits` ends at the head's convolutions.
Exits with 1 where a median ratio of wall time is over 1.05.

What the peers import and a forward does not need (pandas, torchvision, ...) is replaced by stand-ins where it is not
installed; torchvision always is, since its compiled part fails beside another build of torch. MishCuda, a CUDA
extension, is torch's own Mish, which ours is as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from packaging.version import parse as parse_version  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.foreign import import_weights  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.network import Network, head_maximum  # noqa: E402
from models.parse import parse  # noqa: E402

RESULTS = ROOT / "bench" / "results"
ALLOWED_RATIO = 1.05
ALLOWED_DIFFERENCE = 1e-4  # of the largest logit
WARMUP = 3
RESAMPLES = 5000


@dataclass(frozen=True)
class Case:
    """A model that both have: whose clone, and how many pairs are enough."""

    peer: str
    pairs: int


CASES = {"yolov5n": Case("yolov5", 50), "yolov5s": Case("yolov5", 50), "yolov4-p5": Case("scaledyolov4", 10)}


# ---- the peers' code


# What a forward does not need; GIVEN is used all the same.
ABSENT = (
    *("torchvision", "mish_cuda", "pkg_resources", "pandas", "scipy", "seaborn", "requests", "IPython"),
    *("psutil", "git", "ultralytics"),
)
GIVEN: dict[str, dict[str, Any]] = {
    "mish_cuda": {"MishCuda": nn.Mish},
    "pkg_resources": {"parse_version": parse_version},
    "IPython": {"version_info": (9, 0), "get_ipython": lambda: None},  # matplotlib asks it
}


class StandIn(ModuleType):
    """A package that is not there: whatever is taken from it does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class StandIns(MetaPathFinder, Loader):
    """Finds a `StandIn` for the packages of ABSENT, and for all below them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(GIVEN.get(module.__name__, {}))


@contextlib.contextmanager
def packages_of(folder: Path) -> Iterator[None]:
    """Inside, `models` and `utils` are the peer's; afterwards ours are back."""
    names = [name for name in ABSENT if name == "torchvision" or importlib.util.find_spec(name) is None]
    finder = StandIns(names)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("models", "utils")}
    paths = list(sys.path)
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths  # they add their own
        sys.meta_path.remove(finder)
        for name in list(sys.modules):
            if name.split(".")[0] in ("models", "utils", *names):
                del sys.modules[name]
        sys.modules.update(before)


def peer_model(folder: Path, name: str) -> nn.Module:
    """The peer's network of a model file, with weights and norms that look trained, in eval mode."""
    files = sorted(folder.glob(f"models/**/{name}.yaml"))
    if not files:
        raise Fault(f"{folder}: no {name}.yaml below its models; give a clone of the program")
    torch.manual_seed(0)
    logging.disable(logging.INFO)
    # no_grad: ScaledYOLOv4 changes biases in place, which torch forbids by now where gradients are recorded
    with packages_of(folder), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        model = importlib.import_module("models.yolo").Model(str(files[0]))
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (norm.bias.data, norm.running_mean):
                tensor.normal_(0, 0.1, generator=generator)
    return model.eval()


def peer_fused(model: nn.Module) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        return model.fuse().eval()  # type: ignore[operator]


def commit(folder: Path) -> str | None:
    """The commit of a clone; None of a folder that is none."""
    found = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 and (folder / ".git").exists() else None


def same_weights(name: str, theirs: nn.Module) -> Network:
    """Our network of the model's file with the peer's weights."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "state.pth")
        network, notes = import_weights(Path(folder) / "state.pth", parse(ROOT / "cfg" / "models" / f"{name}.yaml"))
    if notes:
        raise Fault(*notes)
    return network


# ---- pairs


def forwards(ours: Network, theirs: nn.Module, what: str, images: Tensor) -> tuple[Callable, Callable]:
    head = list(theirs.children())[0][-1]  # type: ignore[index]
    if what == "detect":
        head.training = False
        return lambda: ours.predict(images), lambda: theirs(images)
    head.training = True  # the peers' head decodes where it does not train
    return lambda: ours(images)[0], lambda: theirs(images)


@torch.no_grad()
def largest_difference(ours: Network, theirs: nn.Module, images: Tensor) -> float:
    """Between the logits of both, as a share of the largest one."""
    mine, other = (forward() for forward in forwards(ours, theirs, "logits", images))
    return max(float((y - z).abs().max()) for y, z in zip(mine, other, strict=True)) / head_maximum(other)


def paired(ours: Callable, theirs: Callable, pairs: int, label: str, warmup: int = WARMUP) -> np.ndarray:
    """Milliseconds ``[pairs, 2, 2]``: ours and theirs, wall and CPU time."""
    rng = np.random.default_rng(0)
    times = np.empty((pairs, 2, 2))
    for turn in tqdm(range(-warmup, pairs), label, unit="pair", leave=False):
        for which in rng.permutation(2):
            wall, cpu = time.perf_counter(), time.process_time()
            (ours, theirs)[which]()
            if turn >= 0:
                times[turn, which] = time.perf_counter() - wall, time.process_time() - cpu
    return times * 1000


def summarized(times: np.ndarray) -> dict[str, Any]:
    """Medians of ours and theirs, and of the pairs' ratios with the 95 % interval of a bootstrap over pairs."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {"pairs": len(times)}
    for index, clock in enumerate(("wall", "cpu")):
        ratios = times[:, 0, index] / times[:, 1, index]
        resampled = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
        found[clock] = {
            "ours_ms": float(np.median(times[:, 0, index])),
            "theirs_ms": float(np.median(times[:, 1, index])),
            "ratio": float(np.median(ratios)),
            "interval": [float(bound) for bound in np.percentile(resampled, (2.5, 97.5))],
        }
    return found


def measured(name: str, folder: Path, imgsz: int, pairs: int) -> dict[str, Any]:
    images = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(1))
    theirs = peer_model(folder, name)
    ours = same_weights(name, theirs)
    cells = []
    for fused in (False, True):
        if fused:
            ours, theirs = fuse(ours), peer_fused(theirs)
        difference = largest_difference(ours, theirs, images)
        if not difference < ALLOWED_DIFFERENCE:
            raise Fault(f"{name}: logits differ by {difference:.1e} of the largest; these are two networks")
        for what in ("logits", "detect"):
            with torch.no_grad():
                times = paired(*forwards(ours, theirs, what, images), pairs, f"{name} {what}")
            cells.append({"fused": fused, "what": what, "difference": difference, **summarized(times)})
    return {
        "model": name,
        "imgsz": imgsz,
        "peer": CASES[name].peer,
        "peer_commit": commit(folder),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "cells": cells,
    }


def shown(results: Sequence[dict[str, Any]]) -> str:
    header = ("model", "fused", "what", "pairs", "clock", "ours ms", "theirs ms", "ours / theirs", "95 %", "threads")
    rows = []
    for result in results:
        for cell in result["cells"]:
            for clock in ("wall", "cpu"):
                times = cell[clock]
                low, high = times["interval"]
                rows.append(
                    (
                        f"{result['model']} {result['imgsz']}",
                        "yes" if cell["fused"] else "no",
                        cell["what"],
                        cell["pairs"],
                        clock,
                        f"{times['ours_ms']:.1f}",
                        f"{times['theirs_ms']:.1f}",
                        times["ratio"],
                        f"{low:.3f} to {high:.3f}",
                        result["threads"],
                    )
                )
    return table(rows, header)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yolov5", type=Path, help="a clone of it")
    parser.add_argument("--scaledyolov4", type=Path, help="a clone of it")
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--pairs", type=int, help="default: 50 of the small ones, 10 of yolov4-p5")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; default: all cores")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        for name in [] if options.show else options.models:
            folder = getattr(options, CASES[name].peer)
            if folder is None:
                raise Fault(f"{name} needs --{CASES[name].peer} FOLDER, or leave it out of --models")
            result = measured(name, folder.resolve(), options.imgsz, options.pairs or CASES[name].pairs)
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(options.out / f"forward-{name}.json", json.dumps(result, indent=1) + "\n")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    files = [options.out / f"forward-{name}.json" for name in options.models]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    print(shown(results))
    return int(any(cell["wall"]["ratio"] > ALLOWED_RATIO for result in results for cell in result["cells"]))


if __name__ == "__main__":
    raise SystemExit(main())
