"""Model files of other programs, built by ours: are they the same networks?

python bench/zoo.py ~/ScaledYOLOv4 ~/yolov5 yolov5-v3.1     # any clones or folders that are there, one a release
python bench/zoo.py ~/yolov7 ~/yolov9 yolor_paper=~/yolor ultralytics=~/ultralytics/ultralytics

Every model YAML below a folder is read, built on the `meta` device (no memory, no weights) and held against the counts
that the program's own code gave: parameters, parameters after fusion, multiply-adds at 640 px, strides; a file with
`scales:` at each scale that is counted. A file belongs
to the counts of REPOSITORY/its path in the folder. The repository is known by the folder's name or by the tag that is
checked out there; where neither says it, write REPOSITORY=FOLDER. Exits with 1 where a counted detector differs.

A file that several releases read differently takes its dialect from the release, and the table says so.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import table  # noqa: E402
from models.cost import count_params, network_costs, totals  # noqa: E402
from models.dialects import DIALECTS  # noqa: E402
from models.fuse import fuse  # noqa: E402
from models.graph import Graph, resolve  # noqa: E402
from models.network import Network  # noqa: E402
from models.parse import parse  # noqa: E402
from models.spec import ModelSpec  # noqa: E402

COUNTS = ROOT / "bench" / "results" / "zoo_counts.csv"
IMGSZ = 640
ALLOWED_MACS = 1e-3  # as a share; published with three decimals
REPOSITORIES = {
    "scaledyolov4": "ScaledYOLOv4_large",
    "pytorch_yolov4": "PyTorch_YOLOv4_u5",
    "yolov5": "ultralytics_yolov5",  # its default branch; a release has its tag behind it
}
HEADS = ("Detect", "IDetect", "IAuxDetect", "DDetect", "DualDDetect", "TripleDDetect", "v10Detect")  # give boxes only
READERS = {  # how the program of a repository reads a file that several read differently
    "PyTorch_YOLOv4_u5": "scaledyolov4",
    "PyTorch_YOLOv4_u5_preview": "yolov4-preview",
    "ultralytics": "ultralytics",
    "yolor_paper": "yolor",
    "yolov7": "yolov7",
    "yolov9": "yolov9",
}
# The first release of yolov5 that reads a file so; the newest reading is that of every later one.
RELEASES = {"v1": "yolov5-v1", "v2": "yolov5-v2", "v3.0": "yolov5-v2", "v3": "yolov5-v3"}
RELEASES |= {"v4": "yolov5-v4", "v5": "yolov5-v4", "v6.0": "yolov5-v4"}


@dataclass(frozen=True)
class Line:
    """What became of one file."""

    file: str
    dialect: str = ""
    verdict: str = ""
    params: tuple[int | None, int | None] = (None, None)  # ours, theirs
    fused: tuple[int | None, int | None] = (None, None)
    gmacs: tuple[float | None, float | None] = (None, None)
    strides: tuple[str, str] = ("", "")
    fault: str = ""  # why it is not read
    wrong: bool = False  # it is counted and differs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="[REPOSITORY=]FOLDER")
    parser.add_argument(
        "--counts", type=Path, default=COUNTS, help="a CSV with the columns of bench/results/zoo_counts.csv"
    )
    parser.add_argument("--dialect", choices=DIALECTS, help="how to read every file, instead of recognising it")
    options = parser.parse_args()
    with options.counts.open(newline="") as file:
        counts = {(row["yaml"], row["scale"]): row for row in csv.DictReader(file)}
    found: list[tuple[str, Path, str]] = []  # repository, file, path in the folder
    for written in options.folders:
        named, _, folder = written.rpartition("=")
        place = Path(folder)
        if not place.is_dir():
            print(f"{place}: no such folder", file=sys.stderr)
            return 2
        repository = named or repository_of(place, {row["repo"] for row in counts.values()})
        files = [path for path in sorted(place.rglob("*.yaml")) if is_model(path)]
        found += [(repository, path, path.relative_to(place).as_posix()) for path in files]
    lines: list[Line] = []
    for repository, path, inside in tqdm(found, unit="file"):
        key = f"{repository}/{inside}"
        for scale in [scale for file, scale in counts if file == key] or [""]:
            count = counts.get((key, scale))
            lines.append(compared(key, path, scale, count, options.dialect, release_dialect(repository)))
    shown(lines)
    repositories, read = {repository for repository, _, _ in found}, {line.file for line in lines}
    for key in dict.fromkeys(file for (file, _), row in counts.items() if row["repo"] in repositories):
        if key not in read and f"{key} " not in {name[: len(key) + 1] for name in read}:
            print(f"not there: {key}")
    return int(any(line.wrong for line in lines))


def repository_of(folder: Path, known: set[str]) -> str:
    """The name under which a folder's files are counted: ``ultralytics_yolov5_v3.1`` for a clone at that tag."""
    name = folder.resolve().name
    if name in known:
        return name
    tag = ""
    if (folder / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(folder), "describe", "--tags", "--exact-match"]
        tag = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    release = re.search(r"v?(\d+\.\d+)$", tag or name)
    for word, repository in REPOSITORIES.items():
        if word in name.lower():
            return f"{repository}_v{release[1]}" if release and word == "yolov5" else repository
    return name


def release_dialect(repository: str) -> str | None:
    """How the release that a repository's name ends with reads its files; None where the files say it themselves."""
    tag = repository.rpartition("_")[2]
    if repository in READERS:
        return READERS[repository]
    if not repository.startswith("ultralytics_yolov5"):
        return None
    return RELEASES.get(tag) or RELEASES.get(tag.partition(".")[0]) or "yolov5"


def is_model(path: Path) -> bool:
    """Whether a YAML has a list of rows; anchors, data sets and hyper-parameters have none."""
    return re.search(r"^backbone:", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None


def understood(path: Path, scale: str | None, forced: str | None, release: str | None) -> tuple[ModelSpec, str]:
    """A file as it says itself, or as its release reads it where several dialects fit; and which dialect that was."""
    if forced:
        return parse(path, forced, scale=scale), f"{forced}, forced"
    try:
        spec = parse(path, scale=scale)
    except Fault as fault:
        if release is None or not any("--dialect NAME" in line for line in fault.lines):
            raise
        return parse(path, release, scale=scale), f"{release}, by release"
    if release is None:
        return spec, "recognised"
    reading = parse(path, release, scale=scale)
    same = reading == spec
    return spec, f"{release}, recognised" if same else f"recognised; {release} reads it with {reading.activation}"


def compared(
    key: str, path: Path, scale: str, count: Mapping[str, str] | None, forced: str | None, release: str | None
) -> Line:
    counted = count is not None and count["params"] != "" and count["head"] in HEADS
    key = f"{key} {scale}" if scale else key
    try:
        spec, dialect = understood(path, scale or None, forced, release)
        graph = resolve(spec)
    except Fault as fault:
        return Line(key, verdict="not read", fault=fault.lines[0].removeprefix(str(path)), wrong=counted)
    line = measured(key, dialect, graph)
    if count is None or not counted:
        return line
    theirs = {
        "params": int(count["params"]),
        "fused": int(count["params_fused"]),
        "gmacs": float(count["gflops_conv_mm_640"]) / 2,
        "strides": " ".join(sorted(count["strides"].split(), key=int)),  # yolov5 v1.0 has them from coarse to fine
    }
    gmacs = line.gmacs[0] or 0.0
    equal = {
        "params": line.params[0] == theirs["params"],
        "fused": line.fused[0] == theirs["fused"],
        "gmacs": abs(gmacs / theirs["gmacs"] - 1) <= ALLOWED_MACS,
        "strides": line.strides[0] == theirs["strides"],
    }
    differs = [name for name, good in equal.items() if not good]
    return Line(
        key,
        dialect,
        f"differs in {', '.join(differs)}" if differs else "equal",
        (line.params[0], theirs["params"]),
        (line.fused[0], theirs["fused"]),
        (line.gmacs[0], theirs["gmacs"]),
        (line.strides[0], theirs["strides"]),
        wrong=bool(differs),
    )


def measured(key: str, dialect: str, graph: Graph) -> Line:
    """Our own counts of a file."""
    params, macs = totals(network_costs(graph, IMGSZ))
    with torch.device("meta"):
        network = Network(graph)
        fused = count_params(fuse(network))
    strides = " ".join(map(str, network.head.strides))
    return Line(key, dialect, "no count", (params, None), (fused, None), (macs / 1e9, None), (strides, ""))


def shown(lines: Sequence[Line]) -> None:
    rows = [
        (
            line.file,
            line.dialect,
            line.verdict,
            line.params[0],
            line.params[1],
            line.fused[0],
            line.fused[1],
            line.gmacs[0],
            line.gmacs[1],
            line.strides[0],
        )
        for line in lines
    ]
    header = ("file", "dialect", "verdict", "params", "theirs", "fused", "theirs", "GMACs", "theirs", "strides")
    print(table(rows, header))
    for line in lines:
        if line.fault:
            print(f"{line.file}{line.fault}")
    equal, wrong = sum(line.verdict == "equal" for line in lines), sum(line.wrong for line in lines)
    print(f"{equal} of {equal + wrong} counted detectors are equal; {len(lines)} files")


if __name__ == "__main__":
    sys.exit(main())
