"""What is left when a run is struck down? Kills, full disks, dead workers and changed files under the three commands.

python bench/faults.py                                   # everything, 50 kills a command: under an hour on one core
python bench/faults.py --strikes 5 --only train-kill search-kill
python bench/faults.py --show                            # the table of what was measured

A small data set is drawn; search.py, train.py and detect.py run on it once undisturbed, at 64 pixels. Then each is
struck again and again: `kill -9` at a random moment of its run, a disk that has room for a random part of what it
writes, and so on. Moments are told by the CPU time of the run, so that a busy machine does not move them. A strike that
came too late, or hit nothing, does not count and is made again. After every one that counts:

- nothing half-written is taken for whole: every file in the run's folder that a reader would open can be read;
- nothing finished is lost: the epochs that a run has told, or has a row for, are in the checkpoint, and each file that
  detect.py has left is that of the undisturbed run;
- it ends in one clear line on stderr and exit code 2 (1 where detect.py has results to keep), without a traceback;
- where a run can go on, `--resume` ends with the same weights, numbers and front as the undisturbed run, bit for bit.

The commands run in forks of this process, which has imported everything. A full disk and a read-only folder are a
tmpfs where one can be mounted (as root), else a limit on the size of a file and the folder's permissions. A cell that
is measured is not measured again; --again does. Exits with 1 where anything was not as it should be.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":  # before libraries look; whoever imports this keeps their own
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

import engine.infer  # noqa: E402
import engine.step  # noqa: E402
import engine.train  # noqa: E402
import search.run  # noqa: E402
from data.images import read_image  # noqa: E402
from engine.runs import read_csv, write_text  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402

RESULTS = ROOT / "bench" / "results"
DOORS: Mapping[str, Callable[[list[str]], int]] = {
    "train": engine.train.main,
    "search": search.run.main,
    "detect": engine.infer.main,
}
COMMANDS = tuple(DOORS)
LONGEST = 1200.0  # seconds; a run that takes more hangs
TICKS = os.sysconf("SC_CLK_TCK")  # of CPU time, a second
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
EPOCHS = {"train": 4, "search": 4}
IMAGES = 16  # to train on
# What the commands import when they first need it, here before they are forked: every run would pay for it anew.
LAZY = (
    "torch._dynamo",
    "faster_coco_eval",
    "pycocotools.cocoeval",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "optuna",
)
BEATEN = 97  # the exit code of a fork whose command raised what no door knows
BAR = re.compile(r"^[^|\[]*\d+(%\||\w+ \[).*?(/s|s/\w+|\?)[^\]]*\]")  # of tqdm, with and without a total
SPACE = """
nc: 2
anchors: [[12, 12, 24, 24]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, MBottleneckCSP2, [8]]
  - [-1, 1, Conv, [8, {kernel: {choice: [3, 5]}}]]
  - [-1, 1, Detect, [nc, anchors]]
"""
PLAIN = SPACE.replace("MBottleneckCSP2", "BottleneckCSP2").replace("{kernel: {choice: [3, 5]}}", "5")


# ---- the commands, and what they leave


@dataclass(frozen=True)
class Place:
    """Where everything lies: a data set, model files, a trained detector, and what the undisturbed runs left."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data" / "data.yaml"

    def command(self, door: str, project: Path, name: str) -> list[str]:
        """The options of a run; it takes seconds, and all three write several times on their way."""
        small = ["--data", str(self.data), "--imgsz", "64", "--batch-size", "4", "--device", "cpu"]
        where = ["--project", str(project), "--name", name]
        if door == "train":
            options = ["--cfg", str(self.folder / "plain.yaml"), "--epochs", str(EPOCHS["train"])]
            options += ["--noplots", "--mosaic", "1"]
            return [*options, *small, *where]
        if door == "search":
            options = ["--cfg", str(self.folder / "space.yaml"), "--epochs", str(EPOCHS["search"])]
            options += ["--candidates", "4"]
            return [*options, "--arch-every", "2", "--calibration", "8", "--budget", "macs=900k", *small, *where]
        written = ["--save-txt", "--save-csv", "--save-json", "--save-crop", "--conf-thres", "0.0001", "--max-det", "9"]
        source = ["--source", str(self.folder / "photos"), "--device", "cpu"]
        return ["--weights", str(self.folder / "detector.pt"), *source, *written, *where]


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: killed by that signal), what it printed, its CPU seconds."""

    door: str
    code: int
    out: str
    err: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What stands on stderr but for bars of progress."""
        found = (BAR.sub("", line).strip() for line in self.err.splitlines())
        return [line for line in found if line]

    @property
    def line(self) -> str:
        return (self.lines or [""])[-1]

    @property
    def clear(self) -> bool:
        """Whether it ended as it should: with code 2, of detect.py 1 where it leaves results, and a line or two on
        stderr that are no traceback.
        """
        codes = (1, 2) if self.door == "detect" else (2,)
        return self.code in codes and 1 <= len(self.lines) <= 2 and "Traceback" not in self.err


def cpu_seconds(pid: int) -> float:
    """What a process has used until now; 0 where the system does not tell."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from the third word on
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / TICKS


def die_with_parent() -> None:
    """Linux only: where this bench is stopped, what it has started goes too."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def run(
    door: str,
    argv: list[str],
    *,
    before: Callable[[], None] = lambda: None,
    strike: Callable[[int], None] | None = None,
    at: float = 0.0,
) -> Ended:
    """A command in a fork of this process. `before` happens in it first; `strike(pid)` comes after `at` CPU seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            code = BEATEN
            try:
                os.setsid()
                die_with_parent()
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
                torch.set_num_threads(1)
                before()
                code = DOORS[door](argv)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        struck = strike is None
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if not struck and strike and cpu_seconds(pid) >= at:
                struck = True
                strike(pid)
            if time.perf_counter() - began > LONGEST:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.003)
        try:
            os.killpg(pid, signal.SIGKILL)  # processes of a killed one, which prepare images
        except ProcessLookupError:
            pass
        out.seek(0)
        err.seek(0)
        code, seconds = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        return Ended(door, code, out.read(), err.read(), seconds)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def broken(folder: Path) -> list[str]:
    """Files of a run that a reader would open, and cannot. Hidden ones are of a write that did not end."""
    wrong = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".pt":
                load_checkpoint(path)
            elif path.suffix == ".yaml":
                yaml.safe_load(path.read_text())
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".csv":
                assert all(None not in row and None not in row.values() for row in read_csv(path)), "a row is short"
            elif path.suffix in (".jpg", ".png"):
                read_image(path)
            elif path.suffix == ".txt" and path.parent.name == "labels":
                for row in path.read_text().splitlines():
                    assert len(row.split()) == 5
        except Exception as problem:
            wrong.append(f"{path.name}: {type(problem).__name__} {str(problem)[:100]}")
    return wrong


def left(door: str, folder: Path) -> Any:
    """What two runs that went the same way have in common, to the last bit; nothing of clocks and places."""
    if door == "detect":
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if door == "train":
        rows = [
            {name: cell for name, cell in row.items() if name != "seconds"} for row in read_csv(folder / "results.csv")
        ]
        return rows, tensors(folder / "last.pt"), tensors(folder / "best.pt")
    timed = ("latency_ms", "latency_table_ms")
    front = [{name: cell for name, cell in row.items() if name not in timed} for row in read_csv(folder / "front.csv")]
    return front, (folder / "alphas.csv").read_text(), tensors(folder / "last.pt"), tensors(folder / "best.pt")


def tensors(path: Path) -> dict[str, bytes]:
    state = load_checkpoint(path).state
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def said_finished(ended: Ended) -> int:
    """The last epoch of which a training has printed its line."""
    of = f"/{EPOCHS['train']}"
    epochs = [line.split()[0] for line in ended.out.splitlines() if line.split() and line.split()[0].endswith(of)]
    return int(epochs[-1].split("/")[0]) if epochs else 0


# ---- what is struck


def draw(folder: Path) -> Place:
    """The data set, the model files, and a detector of one short training."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(0, 60, (64, 64, 3), np.uint8)
            lines = []
            for label in range(2):
                side, x, y = int(rng.integers(14, 28)), int(rng.integers(0, 36)), int(rng.integers(0, 36))
                image[y : y + side, x : x + side, label] = 255
                cx, cy, w = (x + side / 2) / 64, (y + side / 2) / 64, side / 64
                lines.append(f"{label} {cx:.6f} {cy:.6f} {w:.6f} {w:.6f}\n")
            cv2.imwrite(str(folder / "data" / "images" / split / f"{number:02}.png"), image)
            (folder / "data" / "labels" / split / f"{number:02}.txt").write_text("".join(lines))
    place = Place(folder)
    place.data.write_text("train: images/train\nval: images/val\nnames: [square, box]\n")
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "space.yaml").write_text(SPACE)
    photos = folder / "photos"
    photos.mkdir()
    for number in range(30):
        cv2.imwrite(str(photos / f"{number:02}.jpg"), rng.integers(0, 255, (240, 320, 3), np.uint8))
    ended = run("train", place.command("train", folder / "first", "exp"))
    assert ended.code == 0, ended.err
    shutil.copy(folder / "first" / "exp" / "best.pt", folder / "detector.pt")
    seen = run("detect", place.command("detect", folder / "first", "seen"))
    assert seen.code == 0 and len(read_csv(folder / "first" / "seen" / "predictions.csv")) > 0, "nothing is detected"
    return place


@dataclass(frozen=True)
class Whole:
    """An undisturbed run."""

    folder: Path
    seconds: float  # of CPU time
    left: Any
    size: int  # bytes


def undisturbed(place: Place, door: str) -> Whole:
    """Its second run: the first one also reads what the machine then keeps at hand."""
    for name in ("warm", "whole"):
        ended = run(door, place.command(door, place.folder / f"{door}-whole", name))
        assert ended.code == 0, ended.err
    folder = place.folder / f"{door}-whole" / "whole"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Whole(folder, ended.seconds, left(door, folder), size)


@dataclass(frozen=True)
class Strike:
    """One strike under way: the command, its undisturbed run, the folder that it may use, and its chance."""

    place: Place
    door: str
    whole: Whole
    project: Path
    rng: random.Random

    @property
    def folder(self) -> Path:
        return self.project / "exp"

    def begin(self, *options: str, **how: Any) -> Ended:
        return run(self.door, [*self.place.command(self.door, self.project, "exp"), *options], **how)

    def goes_on(self, *options: str, **how: Any) -> Ended:
        return run(self.door, ["--resume", str(self.folder), *options], **how)

    def half_done(self) -> bool:
        """A run of which a few epochs are done, then killed; False where it has to be tried again."""
        part = 0.55 if self.door == "train" else 0.45
        self.begin(strike=kill, at=self.whole.seconds * part)
        return (self.folder / "last.pt").exists() and not (self.folder / "front.csv").exists()


Outcome = tuple[str, str]  # a kind, and what was wrong where it begins with WRONG
WRONG = "WRONG: "
MISSED = "struck too early or too late", ""  # it does not count
FIXED = ("model.yaml", "search.yaml")  # files that are the same from the first second of a run to its last


def unclear(ended: Ended) -> tuple[str, str]:
    return f"{WRONG}no clear line", f"{ended.code} {ended.out[-300:]} {ended.err[-900:]}"


def names(folder: Path) -> set[str]:
    """All files of a run, hidden ones excepted."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if not path.name.startswith(".")}


def lost(one: Strike, ended: Ended) -> str:
    """What a run had finished, and is not there or not as the undisturbed run has it; "" where nothing is lost."""
    for name in FIXED:
        if (one.folder / name).exists() and (one.folder / name).read_bytes() != (one.whole.folder / name).read_bytes():
            return f"{name} is another one"
    if one.door == "detect":
        for name, content in left("detect", one.folder).items():
            whole = one.whole.left.get(name, b"")
            if name.endswith(".csv"):
                begun = whole.startswith(content)
            elif name.endswith(".json"):
                begun = json.loads(whole)[: len(found := json.loads(content))] == found
            else:
                begun = whole == content
            if not begun:
                return f"{name} is another one"
        return ""
    rows = read_csv(one.folder / "results.csv") if (one.folder / "results.csv").exists() else []
    last = one.folder / "last.pt"
    saved = (load_checkpoint(last).training or {}).get("epoch", 0) if last.exists() else 0
    told = max(said_finished(ended) if one.door == "train" else 0, len(rows) - 1)  # a row comes before its checkpoint
    return f"epoch {told} was finished, the checkpoint has {saved}" if saved < told else ""


def after(one: Strike, ended: Ended) -> Outcome:
    """What a struck run has left, and where it can go on, whether that leads where the undisturbed one went."""
    wrong = broken(one.folder)
    if wrong:
        return f"{WRONG}half-written taken for whole", "; ".join(wrong)
    if ended.code == BEATEN or "Traceback" in ended.err:
        return f"{WRONG}traceback", ended.err[-600:]
    if missing := lost(one, ended):
        return f"{WRONG}something finished is lost", missing
    if one.door == "detect":
        again = run("detect", one.place.command("detect", one.project, "again"))
        if again.code or left("detect", one.project / "again") != one.whole.left:
            return f"{WRONG}another result", again.line
        return "what is there is whole, a new run gives the same", ended.line
    if not (one.folder / "last.pt").exists():
        refused = one.goes_on()
        if not refused.clear:
            return unclear(refused)
        return "nothing was finished yet: one line says so", refused.line
    resumed = one.goes_on()
    kind = "goes on to the same"
    if one.door == "train" and resumed.code == 2 and "epochs are done" in resumed.line:
        kind = "was done, which one line says"
    elif resumed.code:
        return f"{WRONG}cannot go on", f"{resumed.code} {resumed.err[-600:]}"
    if names(one.folder) != names(one.whole.folder):
        return f"{WRONG}other files", ", ".join(sorted(names(one.folder) ^ names(one.whole.folder)))
    if left(one.door, one.folder) != one.whole.left:
        return f"{WRONG}another result", resumed.line
    hidden = [path.name for path in one.folder.rglob(".*")]
    if hidden and kind == "goes on to the same":
        return f"{WRONG}leftovers stay", ", ".join(hidden)
    return kind, ended.line


# ---- the strikes


def killed(one: Strike) -> Outcome:
    ended = one.begin(strike=kill, at=one.rng.uniform(0, one.whole.seconds))
    return after(one, ended) if ended.code == -signal.SIGKILL else MISSED


def through(one: Strike) -> Outcome:
    """What a struck run has left that ended well all the same."""
    if names(one.folder) != names(one.whole.folder) or left(one.door, one.folder) != one.whole.left:
        return f"{WRONG}ended well without all that it writes", ""
    return "went through, to the same", ""


def full(one: Strike) -> Outcome:
    """Room for a part of what the run writes; then there is room again."""
    room = int(one.rng.uniform(0.02, 2.0) * one.whole.size)  # on its way a run needs more than it leaves
    with small_disk(one.project, room) as (before, free):
        ended = one.begin(before=before)
        if ended.code == 0:
            kind, told = through(one)
            return (kind, told) if kind.startswith(WRONG) else MISSED  # there was room enough
        if not ended.clear:
            return unclear(ended)
        free()
        return after(one, ended)


def read_only(one: Strike) -> Outcome:
    """The folder of runs may not be written to; then, where a run can go on, its own."""
    fresh = one.rng.random() < 0.5 or one.door == "detect"
    with sealed_folder(one.project) as (before, seal, unseal):
        if not fresh and not one.half_done():
            return MISSED
        seal()
        ended = one.begin(before=before) if fresh else one.goes_on(before=before)
        unseal()
        if not ended.clear:
            return unclear(ended)
        return ("told in one line", ended.line) if fresh else after(one, ended)


def truncated(one: Strike) -> Outcome:
    """The checkpoint to go on from, or to detect with, is cut off somewhere."""
    weights = one.place.folder / "detector.pt"
    if one.door != "detect":
        if not one.half_done():
            return MISSED
        weights = one.folder / "last.pt"
    content = weights.read_bytes()
    cut = one.project / "cut.pt" if one.door == "detect" else weights
    cut.parent.mkdir(parents=True, exist_ok=True)
    cut.write_bytes(content[: one.rng.randrange(len(content))])
    ended = one.begin("--weights", str(cut)) if one.door == "detect" else one.goes_on()
    if not ended.clear or str(cut) not in ended.err:
        return unclear(ended)
    if one.door == "detect":
        return "told in one line", ended.line
    cut.write_bytes(content)
    return after(one, ended)


def other_checkpoint(one: Strike) -> Outcome:
    """In place of the checkpoint lies that of another model, or of another kind of run."""
    if one.door == "detect":
        other = one.project / "other.pt"
        other.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": {"0.weight": torch.zeros(3)}}, other)
        ended = one.begin("--weights", str(other))
        return ("told in one line", ended.line) if ended.clear else unclear(ended)
    if not one.half_done():
        return MISSED
    last = one.folder / "last.pt"
    content = last.read_bytes()
    model = one.project / "other.yaml"
    model.write_text((PLAIN if one.door == "train" else SPACE).replace("Conv, [8, 3, 2]", "Conv, [4, 3, 2]"))
    made = run(one.door, [*one.place.command(one.door, one.project, "other"), "--cfg", str(model)])
    assert made.code == 0, made.err
    others = [one.project / "other" / "last.pt", one.place.folder / "detector.pt"]
    shutil.copy(one.rng.choice(others), last)
    ended = one.goes_on()
    last.write_bytes(content)
    if not ended.clear:
        return unclear(ended)
    return after(one, ended)


def other_yaml(one: Strike) -> Outcome:
    """The model file of the run is changed before it goes on: the user's own, or the one in the run's folder."""
    if not one.half_done():
        return MISSED
    name = "plain" if one.door == "train" else "space"
    cfg = one.place.folder / f"{name}.yaml"
    inside = one.folder / ("model.yaml" if one.door == "train" else "search.yaml")
    if one.rng.random() < 0.5:
        content = cfg.read_text()
        cfg.write_text(content.replace("[8, 3, 2]", "[16, 3, 2]"))
        try:
            gone_on = one.goes_on()  # the run has its own copy
            return through(one) if gone_on.code == 0 else (f"{WRONG}cannot go on", gone_on.err[-600:])
        finally:
            cfg.write_text(content)
    content = inside.read_text()
    inside.write_text(content.replace("[8, 3, 2]", "[16, 3, 2]").replace("[8, 3, 2", "[16, 3, 2"))
    assert inside.read_text() != content
    ended = one.goes_on()
    inside.write_text(content)
    if not ended.clear:
        return unclear(ended)
    return after(one, ended)  # with its own file again it goes on


def other_data(one: Strike) -> Outcome:
    """An image is gone, or a label is another one, before the run goes on."""
    if not one.half_done():
        return MISSED
    kind, suffix = one.rng.choice([("images", ".png"), ("labels", ".txt")])
    path = one.place.folder / "data" / kind / "train" / f"{one.rng.randrange(IMAGES):02}{suffix}"
    content = path.read_bytes()
    path.unlink() if kind == "images" else path.write_bytes(b"1 0.5 0.5 0.5 0.5\n")
    ended = one.goes_on()
    path.write_bytes(content)
    if not ended.clear:
        return unclear(ended)
    return after(one, ended)


def dead_worker(one: Strike) -> Outcome:
    """One of two processes that prepare images is killed, as the system does where memory is short."""
    killed_one = []

    def strike(pid: int) -> None:
        patience = time.perf_counter() + 10
        while time.perf_counter() < patience:
            try:
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            except OSError:
                return
            if children:
                with suppress(ProcessLookupError):
                    os.kill(int(one.rng.choice(children)), signal.SIGKILL)
                    killed_one.append(pid)
                return
            time.sleep(0.002)

    ended = one.begin("--workers", "2", strike=strike, at=one.rng.uniform(0.1, 0.9) * one.whole.seconds)
    if not killed_one:
        return MISSED
    if ended.code == 0:  # its last images had been handed over
        return through(one)
    if not ended.clear:
        return unclear(ended)
    return after(one, ended)


def not_a_number(one: Strike) -> Outcome:
    """A batch holds NaN. Nothing that this program reads can, so it is put in behind the loader."""
    turn = one.rng.randrange(1, 1 + (IMAGES // 4 if one.door == "train" else IMAGES // 8) * EPOCHS[one.door])

    def before() -> None:
        real, calls = engine.step.pixels, [0]

        def pixels(batch: Any, device: Any) -> torch.Tensor:
            calls[0] += 1
            return real(batch, device) * (float("nan") if calls[0] == turn else 1.0)

        engine.step.pixels = pixels

    ended = one.begin(before=before)
    if not ended.clear or "not a finite number" not in ended.line:
        return unclear(ended)
    return after(one, ended)


def clock_back(one: Strike) -> Outcome:
    """The clock is set back a day in the middle of the run, or between a run and its resume."""
    if one.door == "detect" or one.rng.random() < 0.5:
        at = one.rng.uniform(0, one.whole.seconds)

        def before() -> None:
            real, began = time.time, time.process_time()
            time.time = lambda: real() - 86_400 * (time.process_time() - began > at)  # type: ignore[assignment]

        ended = one.begin(before=before)
        return through(one) if ended.code == 0 else (f"{WRONG}ended", f"{ended.code} {ended.err[-600:]}")
    if not one.half_done():
        return MISSED
    later = time.time() + 86_400  # seen from a clock that was set back, every file is of tomorrow
    for path in [*one.folder.rglob("*"), *(one.place.folder / "data").rglob("*")]:
        os.utime(path, (later, later))
    return after(one, Ended(one.door, -9, "", "", 0.0))


STRIKES: Mapping[str, tuple[Callable[[Strike], Outcome], tuple[str, ...], str, float]] = {
    # name: what it does, to which commands, in words, how often for every kill
    "kill": (killed, COMMANDS, "`kill -9` at a random moment", 1.0),
    "full": (full, COMMANDS, "disk full after a random part", 0.4),
    "read-only": (read_only, COMMANDS, "read-only run folder", 0.1),
    "truncated": (truncated, COMMANDS, "truncated checkpoint", 0.2),
    "other-checkpoint": (other_checkpoint, COMMANDS, "checkpoint of another model or run", 0.1),
    "other-yaml": (other_yaml, ("train", "search"), "YAML changed under a resume", 0.1),
    "other-data": (other_data, ("train", "search"), "data set changed under a resume", 0.1),
    "dead-worker": (dead_worker, ("train", "search"), "a loader worker dies", 0.2),
    "nan": (not_a_number, ("train", "search"), "NaN in a batch", 0.2),
    "clock": (clock_back, COMMANDS, "clock set back a day", 0.1),
}


# ---- disks


def mounts() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None and sys.platform.startswith("linux")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """What a fork does first, and what gives it room again. Without a mount, no single file may be larger."""
    if mounts():
        with tmpfs(folder, max(room, 4096)):
            yield lambda: None, lambda: mount("-o", "remount,size=200m", str(folder))
        return

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room // 4, room // 4))

    yield limit, lambda: None


@contextmanager
def sealed_folder(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None], Callable[[], None]]]:
    """What a fork does first; what forbids to write into the folder and all below it, and what allows it again."""
    if mounts():
        with tmpfs(folder, 200 * 2**20):
            seal = lambda mode: mount("-o", f"remount,{mode}", str(folder))  # noqa: E731
            yield lambda: None, lambda: seal("ro"), lambda: seal("rw")
        return
    folder.mkdir(parents=True, exist_ok=True)

    def allow(mode: int) -> None:
        for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
            path.chmod(mode)

    yield lambda: None, lambda: allow(0o555), lambda: allow(0o755)
    allow(0o755)


# ---- the whole


def measured(place: Place, door: str, whole: Whole, name: str, strikes: int, seed: int) -> dict[str, Any]:
    """So many strikes of a kind; how each ended."""
    what, _, _, often = STRIKES[name]
    outcomes: Counter[str] = Counter()
    wrong, lines = [], Counter()
    began = time.perf_counter()
    done = turn = missed = 0
    while done < max(2, round(strikes * often)) and turn < 10 * strikes:
        turn += 1
        project = place.folder / f"{door}-{name}" / str(turn)
        rng = random.Random(f"{seed} {door} {name} {turn}")
        kind, told = what(Strike(place, door, whole, project, rng))
        shutil.rmtree(project, ignore_errors=True)
        if (kind, told) == MISSED:
            missed += 1
            continue
        done += 1
        outcomes[kind] += 1
        if kind.startswith(WRONG):
            wrong.append({"turn": turn, "kind": kind, "told": told.replace(str(place.folder), "...")})
            tqdm.write(f"{door} {name} {turn}: {kind}: {told}", file=sys.stderr)
        elif told:
            lines[told.replace(str(project), "RUNS").replace(str(place.folder), "...")[:160]] += 1
    return {
        "command": door,
        "strike": name,
        "strikes": done,
        "outcomes": dict(outcomes),
        "missed": missed,
        "wrong": wrong,
        "lines": [line for line, _ in lines.most_common(3)],
        "run_cpu_seconds": round(whole.seconds, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "disk": "tmpfs" if mounts() else "limits",
        "torch": torch.__version__,
    }


def show(cells: list[Mapping[str, Any]]) -> str:
    """A row a strike, as the page in docs/ has it."""
    rows = []
    order = list(STRIKES)
    for cell in sorted(cells, key=lambda cell: (order.index(cell["strike"]), COMMANDS.index(cell["command"]))):
        kinds = "; ".join(f"{count} {kind}" for kind, count in sorted(cell["outcomes"].items(), key=lambda o: -o[1]))
        rows.append((STRIKES[cell["strike"]][2], f"{cell['command']}.py", cell["strikes"], kinds, len(cell["wrong"])))
    header = ("strike", "command", "strikes", "how it ended", "wrong")
    lines = [" | ".join(map(str, row)) for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strikes", type=int, default=50, help="kills a command; the other strikes are fewer")
    names = [f"{door}-{name}" for name, (_, doors, _, _) in STRIKES.items() for door in doors]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="COMMAND-STRIKE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure cells anew that are there")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    files = {name: options.out / f"faults-{name}.json" for name in names}
    wanted = [name for name in options.only if options.again or not files[name].exists()]
    if wanted and not options.show:
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        for name in LAZY:
            with suppress(ImportError):
                importlib.import_module(name)
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            place = draw(Path(folder) / "place")
            wholes: dict[str, Whole] = {}
            for name in wanted:
                door, _, strike = name.partition("-")
                if door not in wholes:
                    wholes[door] = undisturbed(place, door)
                cell = measured(place, door, wholes[door], strike, options.strikes, options.seed)
                options.out.mkdir(parents=True, exist_ok=True)
                write_text(files[name], json.dumps(cell, indent=1) + "\n")
                print(f"{name}: {cell['outcomes']} in {cell['seconds']:.0f} s", flush=True)
    cells = [json.loads(files[name].read_text()) for name in options.only if files[name].exists()]
    print(show(cells))
    return int(any(cell["wrong"] for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
