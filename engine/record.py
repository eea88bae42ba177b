"""What a training writes down about itself beside its checkpoints: where it ran, what it saw, how it went."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from data.config import DataSpec
from data.dataset import ImageSet
from data.loader import Batches
from engine.distributed import World
from engine.draw import grid, write_image
from engine.runs import draw_curves, read_csv, write_text
from engine.tasks import Task
from models.checkpoint import load_checkpoint, restore

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).resolve().parents[1]
SHOWN_BATCHES = 3  # the first of a run, as pictures
PACKAGES = ("oneshot-yolo", "torch", "numpy", "opencv-python", "opencv-python-headless", "pydantic", "PyYAML")


# ---- where it ran


def write_environment(path: Path, world: World, epoch: int) -> None:
    """Adds an entry to a YAML list: what the run stands on from this `epoch` on. A resumed run has several."""
    before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []
    entry = {"after_epoch": epoch, **environment(world)}
    write_text(path, yaml.safe_dump([*before, entry], sort_keys=False, allow_unicode=True))


def environment(world: World) -> dict[str, Any]:
    """Versions, the machine, its threads and GPU, and the state of the program's repository."""
    versions = {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}}
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version for name, version in versions.items() if version},
        "system": platform.platform(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "processes": world.size,
        "device": str(world.device),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "git": git_state(ROOT),
    }


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's name, where the system tells one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def git_state(root: Path) -> dict[str, Any] | None:
    """Commit of the repository whose top `root` is, and whether its files differ from it; None where there is none."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top, commit = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root.resolve():
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changed)}


# ---- what it saw


def draw_beginning(folder: Path, task: Task, loader: Batches, images: ImageSet, names: Sequence[str]) -> None:
    """``train_batch0.jpg`` and two more, as the network gets them, and ``labels.png``."""
    for number, batch in enumerate(islice(loader, SHOWN_BATCHES)):
        write_image(folder / f"train_batch{number}.jpg", grid(batch.images, batch.targets, names))
    task.draw_data(folder / "labels.png", images.samples, names)


def draw_end(
    folder: Path,
    task: Task,
    data: DataSpec,
    images: ImageSet,
    device: torch.device,
    *,
    parts: Sequence[str],
    batch_size: int,
    workers: int,
    progress: bool,
) -> None:
    """``results.png``, and what ``best.pt`` finds on the validation images: curves, confusions, worst images."""
    draw_results(folder, parts, task.curves)
    best = restore(load_checkpoint(folder / "best.pt")).to(device)
    options = {"batch_size": batch_size, "device": device, "workers": workers, "progress": progress}
    task.draw_best(folder, best, images, data.names, **options)


def draw_results(folder: Path, parts: Sequence[str], numbers: Sequence[str]) -> None:
    """``results.png`` from ``results.csv``; `parts` are the columns of the losses, `numbers` those of metrics."""
    panels = [list(parts), list(numbers), ["lr"]]
    draw_curves(folder / "results.png", read_csv(folder / "results.csv"), panels)


# ---- how it goes, on a page that follows


def open_dashboard(folder: Path, epoch: int) -> SummaryWriter | None:
    """TensorBoard's files in the run's folder, to be written after `epoch`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=epoch + 1)


def write_dashboard(writer: SummaryWriter, task: Task, row: Mapping[str, Any], metrics: Any) -> None:
    """A row of ``results.csv``, and the numbers of every class where `metrics` is not None."""
    values = {name: value for name, value in row.items() if name not in ("epoch", "step") and value is not None}
    values |= task.per_class(metrics) if metrics else {}
    for name, value in values.items():
        if not np.isnan(value):
            writer.add_scalar(f"{group_of(name, task)}/{name}", value, row["epoch"])
    writer.flush()


def group_of(name: str, task: Task) -> str:
    """The heading under which TensorBoard shows a number."""
    if " of " in name:
        return "classes"
    return "metrics" if name in task.columns else "run" if name in ("lr", "seconds") else "loss"
