"""What benches of trainings share: a table whose cells are trainings, each resumable, each kept as a small JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from data.structures import Fault
from engine.runs import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
SEEDS = (0, 1)  # of every model; a cell is called after both, as `plain-0`
Results = Mapping[str, Mapping[str, Any]]  # by cell


def named(cell: str) -> tuple[str, int]:
    """The model and the seed of a cell."""
    name, _, seed = cell.rpartition("-")
    return name, int(seed)


def runs_of(results: Results, name: str) -> dict[int, Mapping[str, Any]]:
    """What was measured of a model, by seed."""
    return {seed: results[f"{name}-{seed}"] for seed in SEEDS if f"{name}-{seed}" in results}


def data_yaml(name: str, folder: Path | None, work: Path) -> Path:
    """The YAML of a data set of cfg/data; with a `folder`, a copy in `work` that says it lies there."""
    source = ROOT / "cfg" / "data" / f"{name}.yaml"
    if folder is None:
        return source
    moved = work / f"{name}.yaml"
    write_text(moved, yaml.safe_dump({**yaml.safe_load(source.read_text()), "path": str(folder)}))
    return moved


def run(command: Sequence[Any], where: Path, surroundings: Mapping[str, str], output: Path) -> str:
    """Run a program with what it says in a file, and return that. A Fault with its last lines where it fails."""
    with open(output, "w", encoding="utf-8") as file:
        found = subprocess.run([*map(str, command)], cwd=where, env=surroundings, stdout=file, stderr=subprocess.STDOUT)
    said = output.read_text(encoding="utf-8", errors="replace")
    if found.returncode:
        raise Fault(f"{' '.join(map(str, command[:3]))} ...: failed, see {output}", *said.splitlines()[-8:])
    return said


def is_complete(folder: Path, epochs: int) -> bool:
    """Whether all epochs are in results.csv, which yolov5 writes as well."""
    file = folder / "results.csv"
    return file.exists() and len(file.read_text().splitlines()) > epochs


def timed_run(
    folder: Path, fresh: Sequence[Any], again: Sequence[Any], last: Path, where: Path, surroundings: Mapping[str, str]
) -> None:
    """Run a training from the start, or ``again`` where its ``last`` checkpoint exists; seconds.json adds up."""
    seconds = folder / "seconds.json"
    folder.mkdir(parents=True, exist_ok=True)
    before, began = json.loads(seconds.read_text()) if seconds.exists() else 0.0, time.perf_counter()
    try:
        run(again if last.exists() else fresh, where, surroundings, folder / "output.txt")
    finally:
        write_text(seconds, json.dumps(before + time.perf_counter() - began))


def train(folder: Path, options: Mapping[str, Any], epochs: int, threads: int) -> tuple[Path, float]:
    """The checkpoint of a training of ours, which goes on where it was stopped, and the minutes that it took.

    ``options`` are those of train.py by their names, without epochs, folder and name.
    """
    if not is_complete(folder, epochs):
        given = {**options, "--epochs": epochs, "--project": folder.parent, "--name": folder.name}
        words = [word for pair in given.items() for word in pair]
        fresh = [sys.executable, "train.py", *words, "--exist-ok", "--noplots", "--noval"]
        again = [sys.executable, "train.py", "--resume", folder]
        surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        timed_run(folder, fresh, again, folder / "last.pt", ROOT, surroundings)
    return folder / "best.pt", json.loads((folder / "seconds.json").read_text()) / 60


def epoch_minutes(folder: Path, trained: Callable[[Path, int], float]) -> tuple[float, float]:
    """Minutes of a training of one epoch, and of an epoch more; ``trained`` says what so many epochs took."""
    times = []
    for epochs in tqdm((1, 2), "measuring an epoch", leave=False):
        place = folder / str(epochs)
        shutil.rmtree(place, ignore_errors=True)
        times.append(trained(place, epochs))
    return times[0], max(times[1] - times[0], 0.0)


def fill(
    files: Mapping[str, Path], wanted: Sequence[str], measure: Callable[[str], Any], indent: int | None = 1
) -> None:
    """Measure those of the wanted cells that have no file yet, and write what was found."""
    bar = tqdm([cell for cell in wanted if not files[cell].exists()], unit="cell", leave=False)
    for cell in bar:
        bar.set_description(cell)
        if not files[cell].exists():  # another cell may have needed it
            write_text(files[cell], json.dumps(measure(cell), indent=indent) + "\n")


def read(files: Mapping[str, Path]) -> dict[str, Mapping[str, Any]]:
    """What was measured so far, by cell."""
    return {cell: json.loads(file.read_text()) for cell, file in files.items() if file.exists()}


def guarded(work: Callable[[], int]) -> int:
    """The exit status of a bench: a Fault is told in its lines, and what Ctrl-C stopped goes on by the same command."""
    try:
        return work()
    except (Fault, OSError) as problem:
        print(problem, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
