"""One page of what was measured, bench/RESULTS.md, and from it the tables of the README and of docs/.

python bench/report.py              # writes the page and fills the tables, from bench/results alone; seconds
python bench/report.py --measure    # first, the claims of speed anew, sized for an hour on 2 idle cores: `make bench`
python bench/report.py --keep       # what was measured so takes the place of bench/results, with date and machine
python bench/report.py --again      # it stands beside bench/results on the page: another machine's word
python bench/report.py --check      # writes nothing; exits with 1 where a page is not what bench/results says

`--measure` writes to runs/bench/speed and goes on there where it was stopped; delete the folder to begin anew. It shows
every ratio beside the kept one. Trainings are not repeated, their results are in bench/results. Peers lie in
runs/peers, where `make peers` puts them; without one of them its claims keep the kept result, which is said. So it is
with what only you can bring: a video and the published weights of yolov5n.

A table of a page stands between `<!-- bench: NAME -->` and `<!-- end -->`. NAME is `speed` or one of TABLES.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "bench"))  # behind the doors, of which some have a bench's name

from data.files import write_text  # noqa: E402
from engine.latency import device_name  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "RESULTS.md"
NOW = ROOT / "runs" / "bench" / "speed"
PEERS = ROOT / "runs" / "peers"
MADE = "made.json"  # patterns of files, each with the date and the machine of its measurement
AGAIN = "again.json"  # ratios that another machine measured, with date and machine

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    header: Row
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """In Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def only(self, *columns: str) -> Table:
        places = [self.header.index(column) for column in columns]
        return Table(columns, tuple(tuple(row[place] for place in places) for row in self.rows))

    def pivoted(self, row: str, column: str, cell: str) -> Table:
        """A row for each value in `row`, a column for each in `column`; the cells between are those of `cell`."""
        found = {(line[0], line[1]): line[2] for line in self.only(row, column, cell).rows}
        rows, columns = (tuple(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
        cells = (tuple(found.get((name, at), "") for at in columns) for name in rows)
        return Table(("", *columns), tuple((name, *line) for name, line in zip(rows, cells, strict=True)))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, with its 95 % interval where one was measured."""

    times: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        places = 0 if self.times >= 100 else 1 if self.times >= 3 else 2
        spread = "" if self.low is None else f" ({self.low:.{places}f} to {self.high:.{places}f})"
        return f"{self.times:.{places}f}{spread}"

    def agrees(self, other: Ratio) -> bool:
        """Whether the intervals meet; a ratio without one has a tenth to either side."""
        (low, high), (floor, ceiling) = (
            (one.low or one.times * 0.9, one.high or one.times * 1.1) for one in (self, other)
        )
        return low <= ceiling and floor <= high


@dataclass(frozen=True)
class Claim:
    """One claim of speed: a bench, the file where its result is kept, and how the ratio is read from that."""

    says: str
    clock: str  # what is measured, time or work in a time
    bench: str
    file: str
    read: Callable[[Any], Ratio]
    peer: Callable[[Any], str]

    @property
    def command(self) -> str:
        return f"bench/{self.bench}.py"


# ---- how a ratio is read


def ours_by_theirs(clock: str, cell: Callable[[Any], Any] = lambda content: content) -> Callable[[Any], Ratio]:
    """Of benches in pairs, which keep our time over theirs."""

    def read(content: Any) -> Ratio:
        found = cell(content)[clock]
        low, high = found["interval"]
        return Ratio(1 / found["ratio"], 1 / high, 1 / low)

    return read


def already(content: Any) -> Ratio:
    return Ratio(content["wall"]["ratio"], *content["wall"]["interval"])


def videos(ours: str, theirs: str, what: str) -> Callable[[Any], Ratio]:
    return lambda content: Ratio(*bench("detect").compared(content["rounds"], ours, theirs, "cpu", what))


def pictures(content: Any) -> Ratio:
    """Beside the faster of the peers, in each round."""
    import numpy as np

    loader = bench("loader")
    found = loader.ratios(content["rounds"], "cpu")
    drawn = np.median(np.random.default_rng(0).choice(found, (loader.RESAMPLES, len(found))), axis=1)
    return Ratio(float(np.median(found)), *(float(bound) for bound in np.percentile(drawn, (2.5, 97.5))))


def cell_of(fused: bool) -> Callable[[Any], Any]:
    return lambda content: next(c for c in content["cells"] if c["fused"] == fused and c["what"] == "detect")


def forward_claim(model: str, fused: bool) -> Claim:
    peer = "ScaledYOLOv4, yolov4-large" if model == "yolov4-p5" else "yolov5 7.0"
    says = f"forward of {model}, 640 px, batch 1{', norms folded' if fused else ''}"
    read = ours_by_theirs("wall", cell_of(fused))
    return Claim(says, "wall time", "forward", f"forward-{model}.json", read, lambda content: peer)


def loader_claim(says: str, file: str) -> Claim:
    def peer(content: Any) -> str:
        return f"the faster of yolov5 7.0 and ultralytics {content['contestants']['ultralytics']['version']}"

    return Claim(says, "pictures per CPU second", "loader", file, pictures, peer)


def nms_claim(says: str, cell: str) -> Claim:
    return Claim(
        says, "wall time", "nms", f"nms-{cell}.json", ours_by_theirs("wall"), lambda r: f"OpenCV {r['opencv']}"
    )


def layout_claim(model: str, what: str, other: str) -> Claim:
    says = f"{'a training step' if what == 'step' else 'a forward'} of {model}, 320 px, channels-last"
    return Claim(
        says + (", bf16" if other.endswith("bf16") else ""),
        "wall time",
        "memory_format",
        f"memory-format-{model}-{what}-{other}.json",
        ours_by_theirs("wall"),
        lambda content: "plain float32 maps",
    )


def masked_claim(low: float) -> Claim:
    says = f"stages 4 and 5 of a ResNet-50 segmenter, 512 px, {100 * low:g} % of the patches low"
    peer = "their fastest dense form"
    return Claim(says, "wall time", "masked", f"masked-max-512-{low:g}.json", already, lambda content: peer)


def video_claim(says: str, ours: str, theirs: str, what: str) -> Claim:
    return Claim(says, "frames per CPU second", "detect", "detect.json", videos(ours, theirs, what), lambda r: "yolov5")


CLAIMS = (
    *(forward_claim(model, fused) for model in ("yolov5n", "yolov5s", "yolov4-p5") for fused in (False, True)),
    video_claim("detect.py on a video, yolov5n, both in eager torch", "ours torch", "yolov5 torch", "whole"),
    video_claim("the same without start and end", "ours torch", "yolov5 torch", "steady"),
    video_claim("ours from its ONNX file, theirs in torch", "ours onnx", "yolov5 torch", "whole"),
    video_claim("the same without start and end", "ours onnx", "yolov5 torch", "steady"),
    video_claim("both from ONNX files", "ours onnx", "yolov5 onnx", "whole"),
    video_claim("the same without start and end", "ours onnx", "yolov5 onnx", "steady"),
    loader_claim("mosaic pictures for training, from drawn JPEGs", "loader-drawn-0-off.json"),
    loader_claim("the same with two workers", "loader-drawn-2-off.json"),
    loader_claim("the same of COCO", "loader-coco256-0-off.json"),
    loader_claim("the same from a cache in memory", "loader-drawn-0-ram.json"),
    loader_claim("the same from a cache in memory, of COCO", "loader-coco256-0-ram.json"),
    Claim(
        "COCO's twelve numbers, 1,000 images with 100 detections, equal",
        "wall time",
        "evaluate",
        "evaluate-1000.json",
        ours_by_theirs("wall"),
        lambda content: f"pycocotools {content['pycocotools']}",
    ),
    nms_claim("NMS, 10,000 boxes, a class drawn for each, 300 kept, equal", "mixed-10000"),
    nms_claim("NMS as val.py needs it, 2 million scores, equal", "eval"),
    nms_claim("NMS, 10,000 boxes around 60 objects, few stay, equal", "objects-10000"),
    nms_claim("the same with one class", "one-10000"),
    nms_claim("NMS, 1,000 boxes around 60 objects, equal", "objects-1000"),
    Claim(
        "labels of 20,000 images from the cache, equal",
        "CPU time",
        "label_cache",
        "label_cache.json",
        lambda content: Ratio(content["read_s"] / content["cached_s"]),
        lambda content: "reading them",
    ),
    *(
        layout_claim(model, what, other)
        for what in ("step", "forward")
        for model in ("tiny", "yolov5n")
        for other in ("channels-last", "channels-last-bf16")
    ),
    *(masked_claim(low) for low in (0.0, 0.75, 0.9)),
)

# The sections of the page, by what they ask. What a bench shows of its results is told there as it shows it.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Learning": ("learn", "bccd_front", "pays", "shapes", "ca_ssd", "fal", "camvid", "tiny_masked"),
    "Searching": (
        "nasbench",
        "ranking",
        "step_cost",
        "prefix_tree",
        "calibration",
        "derived",
        "latency",
        "scale",
        "workers",
    ),
    "Equality": ("efficientnet", "explain"),
    "Speed, in full": ("forward", "detect", "loader", "evaluate", "nms", "label_cache", "memory_format", "masked"),
    "Faults": ("faults",),
}

# Tables of pages, made of those that a bench shows. Where a page is shorter than the bench, columns are left out.
TABLES: Mapping[str, Callable[[], Table]] = {
    "speed": lambda: speed(),
    "learn": lambda: tables("learn")[0],
    "bccd_front": lambda: tables("bccd_front")[0].only("", "macs", "AP", "AP50", "found - random", "+-", "better"),
    "pays": lambda: tables("pays")[0],
    "ranking": lambda: or_none(tables("ranking")[0]),
    "shapes": lambda: tables("shapes")[0],
    "ca_ssd": lambda: tables("ca_ssd")[0].only("neck", "GMACs", "AP50 (each seed)", "full is better in AP50 by"),
    "camvid": lambda: tables("camvid")[0].only(
        "model", "low", "GMACs", "mIoU (each seed)", "minus coarse", "minus fine"
    ),
    "camvid_masks": lambda: tables("camvid")[1],
    "camvid_speed": lambda: tables("camvid")[2],
    "tiny_masked": lambda: tables("tiny_masked")[0],
    "hypervolume": lambda: tables("nasbench")[0].pivoted("method", "evaluations", "hypervolume"),
    "regret": lambda: tables("nasbench")[1].pivoted("method", "evaluations", "regret"),
    "step_cost": lambda: tables("step_cost")[0],
    "faults": lambda: or_none(tables("faults")[0]),
}


# ---- what a bench shows


@cache
def bench(name: str) -> Any:
    """A bench as a module, by its whole name: detect.py is a door as well."""
    return importlib.import_module(f"bench.{name}")


@cache
def shown(name: str) -> str:
    """What `python bench/NAME.py --show` prints."""
    import torch

    given, threads, out = sys.argv, torch.get_num_threads(), io.StringIO()
    sys.argv = [f"bench/{name}.py", "--show"]
    try:
        with contextlib.redirect_stdout(out):
            bench(name).main()
    finally:
        sys.argv = given
        torch.set_num_threads(threads)  # a bench sets its own
    return out.getvalue()


RULE = re.compile(r"-+(  -+)*")


def parts(text: str) -> list[str | Table]:
    """Tables (of `engine.runs.table`, or in Markdown) and the lines between them."""
    lines, found = text.splitlines(), list[str | Table]()
    at = 0
    while at < len(lines):
        if lines[at].startswith("| "):
            rows = []
            while at < len(lines) and lines[at].startswith("|"):
                rows.append(tuple(cell.strip() for cell in lines[at].strip("|").split("|")))
                at += 1
            found.append(Table(rows[0], tuple(rows[2:])))
        elif at + 1 < len(lines) and RULE.fullmatch(lines[at + 1]):
            spans = [match.span() for match in re.finditer("-+", lines[at + 1])]
            header, rows = cells(lines[at], spans), []
            at += 2
            while at < len(lines) and is_row(lines[at], spans) and not RULE.fullmatch((lines[at + 1 :] or [""])[0]):
                rows.append(cells(lines[at], spans))
                at += 1
            found.append(Table(header or ("",), tuple(row for row in rows if row)))
        else:
            found += [lines[at].strip()] if lines[at].strip() else []
            at += 1
    return found


def cells(line: str, spans: Sequence[tuple[int, int]]) -> Row:
    return tuple(line[start:end].strip() for start, end in spans)


def is_row(line: str, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether nothing stands between the columns, and something in one."""
    ends = [*(start for start, _ in spans[1:]), len(line) + 1]
    return bool(line.strip()) and all(not line[end:start].strip() for (_, end), start in zip(spans, ends, strict=True))


def tables(name: str) -> list[Table]:
    return [part for part in parts(shown(name)) if isinstance(part, Table)]


def or_none(found: Table) -> Table:
    """With a row that says so where nothing is kept."""
    return found if found.rows else Table(found.header, (("nothing is kept yet", *("",) * (len(found.header) - 1)),))


def asks(name: str) -> str:
    """The first line of a bench: what it asks."""
    return (bench(name).__doc__ or name).strip().splitlines()[0]


# ---- the page


def read(file: str, folder: Path | None = None) -> Any:
    """What is kept of a measurement, or was measured anew in `folder`; None where nothing is."""
    path = (folder or RESULTS) / file
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def made(file: str) -> Row:
    """Date and machine of a result; what stands last in the list counts."""
    known = read(MADE) or {}
    return tuple(([about for pattern, about in known.items() if fnmatch(file, pattern)] or [("not noted", "")])[-1])


def speed() -> Table:
    """The claims of speed that have a result."""
    rows = []
    for claim in CLAIMS:
        if content := read(claim.file):
            command = f"`{claim.command}`"
            rows.append((claim.says, str(claim.read(content)), claim.peer(content), claim.clock, command))
    return Table(("what", "times as fast, 95 %", "beside", "measured in", "command"), tuple(rows))


def machines() -> str:
    """Where and when, in a line for each."""
    found: dict[str, list[str]] = {}
    for pattern, (date, machine) in (read(MADE) or {}).items():
        found.setdefault(f"{date}, {machine}", []).append(pattern)
    most = next((about for about, patterns in found.items() if "*" in patterns), "")
    lines = [f"- {about}: {', '.join(f'`{p}`' for p in files)}" for about, files in found.items() if about != most]
    return "\n".join([f"- {most}: all but what follows" if lines else f"- {most}", *lines])


def page() -> str:
    """bench/RESULTS.md, from what is kept."""
    story = [
        "# Results",
        "<!-- written by `python bench/report.py`; change bench/results, not this page -->",
        "Every table is made of the JSON files in `bench/results`, by the command above it. "
        "`make bench` measures the claims of speed anew beside the kept ones (see `bench/report.py`); trainings take "
        "hours, and each bench says how to repeat its own.",
        "Measured:",
        machines(),
        "## Speed",
        "How many times as fast this program is, the median of interleaved pairs with the 95 % interval of a "
        "bootstrap; under 1 the other one is faster. Threads, pairs and versions are in the full tables below.",
        str(speed()),
    ]
    if other := read(AGAIN):
        rows = [one[:1] + one[2:0:-1] + one[3:] for one in other["rows"]]
        agree = sum(one[-1] == "yes" for one in rows)
        story += [
            f"{len(rows)} of these were measured once more on another machine ({', '.join(other['about'])}); intervals "
            f"meet in {agree}:",
            str(Table(("what", "times as fast, 95 %", "on the other machine", "agree"), tuple(map(tuple, rows)))),
        ]
    for title, names in SECTIONS.items():
        story.append(f"## {title}")
        for name in names:
            if any(isinstance(part, Table) and part.rows for part in parts(shown(name))) or name == "label_cache":
                story += [f"### {asks(name)}", f"`python bench/{name}.py --show`", *map(str, parts(shown(name)))]
            else:
                story += [f"### {asks(name)}", f"Nothing is kept yet; `python bench/{name}.py` measures it."]
    return "\n\n".join(story) + "\n"


BLOCK = re.compile(r"<!-- bench: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """A page with the tables that it names."""
    return BLOCK.sub(lambda found: f"<!-- bench: {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->", text)


def pages() -> dict[Path, str]:
    """Every page that has tables from here, as it has to be."""
    found = {PAGE: page()}
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if BLOCK.search(text := path.read_text(encoding="utf-8")):
            found[path] = filled(text)
    return found


# ---- measuring anew


@dataclass(frozen=True)
class Quick:
    """How `make bench` runs a bench: its options, and what has to be there for it."""

    bench: str
    options: tuple[str, ...]
    out: str = ""  # a file for --out; the folder where this is empty
    needs: tuple[Path, ...] = ()


PEER_PYTHON = PEERS / "python" / "bin" / "python"
YOLOV5, SCALED = PEERS / "yolov5", PEERS / "ScaledYOLOv4"
WEIGHTS, VIDEO = PEERS / "yolov5n_state_dict_fp16.pth", PEERS / "video.mp4"
FORWARD = ("--yolov5", str(YOLOV5), "--scaledyolov4", str(SCALED), "--pairs", "10")
LOADER = ("--yolov5", str(YOLOV5), "--python", str(PEER_PYTHON), "--rounds", "2", "--workers", "0")
DETECT = ("--yolov5", str(YOLOV5), "--peer-python", str(PEER_PYTHON), "--weights", str(WEIGHTS), "--video", str(VIDEO))
QUICK = (  # the cheap ones first
    Quick("label_cache", (), "label_cache.json"),
    Quick("nms", ("--pairs", "20")),
    Quick("evaluate", ("--pairs", "3")),
    Quick("memory_format", ("--pairs", "8")),
    Quick("masked", ("--rounds", "7")),
    Quick("step_cost", ("--cells", "shared", "independent-full", "--pairs", "15")),
    Quick("explain", ("--peers", str(PEER_PYTHON)), "explain.json", (PEER_PYTHON,)),
    Quick("efficientnet", ("--peers", str(PEER_PYTHON)), "efficientnet.json", (PEER_PYTHON,)),
    Quick("forward", FORWARD, needs=(YOLOV5, SCALED)),
    Quick("loader", LOADER, needs=(YOLOV5, PEER_PYTHON)),
    Quick("detect", (*DETECT, "--pairs", "2"), "detect.json", (YOLOV5, PEER_PYTHON, WEIGHTS, VIDEO)),
)


def measure(names: Sequence[str], folder: Path) -> int:
    """Run the benches of QUICK that are named; the number of those that did not reach what they ask, or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for quick in QUICK:
        if quick.bench not in names:
            continue
        if absent := [str(path.relative_to(ROOT)) for path in quick.needs if not path.exists()]:
            kept = sorted({claim.file for claim in CLAIMS if claim.bench == quick.bench}) or [quick.out]
            where = ", ".join(dict.fromkeys(" on ".join(made(file)) for file in kept))
            print(f"{quick.bench}: {', '.join(absent)} is not there; what was measured stays: {where}", flush=True)
            continue
        words = [f"bench/{quick.bench}.py", *quick.options, "--out", str(folder / quick.out)]
        print(f"{quick.bench}: python {' '.join(words)}", flush=True)
        failed += bool(subprocess.run([sys.executable, *words], cwd=ROOT).returncode)
    return failed


def beside(folder: Path) -> Table:
    """Every ratio that was measured anew, beside the kept one."""
    rows = []
    for claim in CLAIMS:
        now, kept = read(claim.file, folder), read(claim.file)
        if now:
            one, other = claim.read(now), claim.read(kept) if kept else None
            alike = "" if other is None else "yes" if one.agrees(other) else "NO"
            rows.append((claim.says, str(one), str(other or "-"), alike))
    return Table(("times as fast", "now", "kept", "agree"), tuple(rows))


def here() -> list[str]:
    """Date and machine."""
    import torch

    machine = f"{os.cpu_count()} cores of {device_name(torch.device('cpu'))}, torch {torch.__version__}"
    return [datetime.date.today().isoformat(), machine]


def keep(folder: Path) -> int:
    """Move what was measured anew to the kept results, and note date and machine. How many files that were."""
    files, about = sorted(folder.glob("*.json")), here()
    noted = {name: what for name, what in (read(MADE) or {}).items() if name not in {file.name for file in files}}
    for file in files:
        shutil.move(file, RESULTS / file.name)
    write_text(RESULTS / MADE, json.dumps(noted | {file.name: about for file in files}, indent=1) + "\n")
    return len(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [quick.bench for quick in QUICK]
    parser.add_argument("--measure", nargs="*", choices=names, metavar="BENCH", help=f"all, or some of {names}")
    parser.add_argument("--out", type=Path, default=NOW, help="folder of what is measured anew")
    parser.add_argument("--keep", action="store_true", help="it takes the place of the kept results")
    parser.add_argument("--again", action="store_true", help="it stands beside the kept results")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    failed = 0
    if options.measure is not None:
        failed = measure(options.measure or names, options.out)
        print(beside(options.out))
    if options.again:
        content = {"about": here(), "rows": beside(options.out).rows}
        write_text(RESULTS / AGAIN, json.dumps(content, indent=1) + "\n")
    if options.keep:
        print(f"{keep(options.out)} results are kept")
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'is not what bench/results says' if options.check else 'written'}")
        failed += options.check
        if not options.check:
            write_text(path, text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
