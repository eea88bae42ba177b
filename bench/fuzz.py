"""Model files that nobody wrote: whatever a text is, it is a model or a Fault, soon and in little memory.

python bench/fuzz.py                     # 30 minutes of one processor: longer, where others use it too
python bench/fuzz.py --seconds 60 --seed 7

Starts from cfg/models and changes texts by chance: bytes, lines, and what a YAML holds (rows, values, sources, ops).
A quarter of them is watched: what comes to a line of models/ from another one than all before is kept and changed
further (coverage-guided, as AFL does it: lcamtuf.coredump.cx/afl).

A finding is any exception but Fault, a text that takes over 5 s of processor, and one that needs over 1 GiB. Each is
kept once a place in the code, as a file in --out with as few lines as still show it, and its traceback beside it. Exits
with 1 where there is any.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import write_text  # noqa: E402
from models.graph import load_graph  # noqa: E402
from models.registry import OPS  # noqa: E402

try:  # of libyaml, several times as fast
    from yaml import CSafeDumper as SafeDumper
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeDumper, SafeLoader

WATCHED = str(ROOT / "models")
RECORDED = 1_800  # seconds of processor; a run as long as this is written into bench/results
LONGEST = 5.0  # seconds of processor for a text
MOST_MEMORY = 2**30  # bytes more than before
WATCH = 0.25  # of the texts: watching takes longer than all else
DEEPEST = 1_000  # opening brackets in a text whose structure is changed; libyaml's reader knows no limit of its own
WORDS = (
    *("nc", "anchors", "None", "null", "true", "no", "-1", "0", "1", "65536", "99999999999999999999", "1e-3", ".inf"),
    *(".nan", "''", "[]", "{}", "[-1]", "[[", "]]", "{choice: [3, 5]}", "{choice: []}", "choice", "number", "from"),
    *("kernel", "act", "silu", "nn.LeakyReLU(0.1)", "na * (nc + 5)", "nearest", "same", "&a", "*a", "<<: *a", "!!int"),
    *("---", "...", "#", ": ", "- ", "\t", "\x00", "\u2028", "é", "|", ">", "? ", "per_bottleneck: true"),
    *("dialect: yolov5", "scales: {n: [0.33, 0.25, 1024]}", "scale: n", "depth_multiple: 1e9", "anchors: 4"),
)  # fmt: skip
VALUES = (
    *(None, True, False, 0, 1, -1, -2, 2, 3, 5, 7, 64, 65_536, 10**30, -(10**9), 0.0, 0.5, 1e-9, 1e300),
    *(float("inf"), float("nan"), "", "nc", "anchors", "silu", "nn.ReLU()", "x" * 300, [], {}, [[]], [-1], [0, 1]),
    *({"choice": [3, 5]}, {"choice": [1, 2, 3]}, {"choice": ["relu", "mish"]}, {"choice": [1]}, {"kernel": 5}),
    *([10, 13, 16, 30], [1] * 70, {"name": "p3", "from": -1, "op": "Conv", "args": [8]}),
)


class TooSlow(BaseException):
    """Not an Exception: nothing that is being tested may catch it."""


# ---- one text


def read(content: bytes, folder: Path, watch: bool = False) -> tuple[str, set[Any], BaseException | None]:
    """What became of a text (``model``, ``fault`` or the finding's name), what lines followed which, and why.

    Unless it is asked to `watch`, it sees no lines, and is several times faster.
    """
    arcs: set[Any] = set()
    file = folder / "model.yaml"
    file.write_bytes(content)
    sys.settrace(tracer(arcs) if watch else None)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)  # of this process alone, however busy the machine is
    try:
        load_graph(file)
        return "model", arcs, None
    except Fault:
        return "fault", arcs, None
    except TooSlow as problem:
        return "over 5 s", arcs, problem
    except MemoryError as problem:
        return "over 1 GiB", arcs, problem
    except Exception as problem:
        return type(problem).__name__, arcs, problem
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.settrace(None)


def tracer(arcs: set[Any]) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that adds what line follows which, in the functions of models/."""
    last: dict[CodeType, int] = {}

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            code = frame.f_code
            arcs.add((code, last.get(code, 0), frame.f_lineno))
            last[code] = frame.f_lineno
        return line

    return lambda frame, event, argument: line if frame.f_code.co_filename.startswith(WATCHED) else None


def place(problem: BaseException) -> str:
    """The last line of ours that a finding came through."""
    ours = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename.startswith(str(ROOT))]
    return f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "?"


def too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def limit_memory() -> None:
    """Lets this process grow by `MOST_MEMORY` from what it has mapped now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


# ---- changes


def changed(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """A text of one or several changes to another."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice((structure, structure, structure, lines, characters))
        content = change(content, corpus, rng)
    return content


def characters(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((0, 1, 1, 2, 8, 64)))
    word = rng.choice(WORDS).encode() if rng.random() < 0.7 else bytes([rng.randrange(256)])
    return content[:at] + rng.choice((b"", word, content[at:end] * 2)) + content[end:]


def lines(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    ours, theirs = content.splitlines(keepends=True), rng.choice(corpus).splitlines(keepends=True)
    at = rng.randrange(len(ours) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        del ours[at : at + rng.choice((1, 1, 3))]
    elif kind == 1 and theirs:
        ours.insert(at, rng.choice(theirs))
    elif kind == 2:
        ours[at:at] = ours[at : at + rng.choice((1, 5, 40))]
    else:
        ours[at:at] = theirs[rng.randrange(len(theirs) + 1) :]
    return b"".join(ours)


def structure(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """One value of the YAML replaced, removed, doubled or taken from elsewhere; `content` where it is no YAML."""
    theirs = rng.choice(corpus)
    if max(text.count(b"[") + text.count(b"{") for text in (content, theirs)) > DEEPEST:
        return characters(content, corpus, rng)
    try:
        tree, other = (yaml.load(text, SafeLoader) for text in (content, theirs))
    except (yaml.YAMLError, ValueError, IndexError, RecursionError):  # "0b_" and !!int "" are no numbers to it
        return characters(content, corpus, rng)
    spots = list(places(tree))
    if not spots:
        return characters(content, corpus, rng)
    holder, key = rng.choice(spots)
    kind = rng.randrange(6)
    if kind == 0:
        holder[key] = rng.choice(VALUES)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, holder[rng.randrange(len(holder))])
    elif kind == 3 and isinstance(holder[key], int):
        holder[key] += rng.choice((-1, 1, 2, -8, 1000))
    elif kind == 4:
        holder[key] = rng.choice(sorted(OPS)) if rng.random() < 0.5 else {"choice": [holder[key], rng.choice(VALUES)]}
    else:
        found = list(places(other))
        if found:
            their_holder, their_key = rng.choice(found)
            holder[key] = their_holder[their_key]
    try:
        options = {"sort_keys": False, "default_flow_style": None, "allow_unicode": True, "width": 200}
        return str(yaml.dump(tree, Dumper=SafeDumper, **options)).encode()
    except (yaml.YAMLError, RecursionError, UnicodeEncodeError):
        return content


def places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree that holds a value: its list or mapping, and the index or key."""
    if depth < 12 and isinstance(tree, list | dict):
        for key in range(len(tree)) if isinstance(tree, list) else list(tree):
            yield tree, key
            yield from places(tree[key], depth + 1)


def smallest(content: bytes, kind: str, where: str, folder: Path) -> bytes:
    """The text without any line that the finding does not need; 10 s of processor at most."""
    end = time.process_time() + 10
    rows = content.splitlines(keepends=True)
    for number in reversed(range(len(rows))):
        if time.process_time() > end:
            break
        without = rows[:number] + rows[number + 1 :]
        found, _, problem = read(b"".join(without), folder)
        if problem is not None and (found, place(problem)) == (kind, where):
            rows = without
    return b"".join(rows)


# ---- the run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=RECORDED, help="of processor; default: 30 minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=ROOT / "cfg" / "models", help="folder of the first texts")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fuzz", help="folder of the findings")
    options = parser.parse_args()
    rng, end, since = random.Random(options.seed), time.process_time() + options.seconds, time.monotonic()
    signal.signal(signal.SIGPROF, too_slow)
    options.out.mkdir(parents=True, exist_ok=True)
    first = sorted((path.read_bytes() for path in options.corpus.rglob("*.yaml")), key=len)
    if not first:
        parser.error(f"--corpus {options.corpus}: no model file in it")
    limit_memory()
    seen: set[Any] = set()
    corpus, findings, became, slowest = [], {}, Counter(), 0.0
    with tempfile.TemporaryDirectory() as name, tqdm(unit="text") as bar:
        folder = Path(name)
        while time.process_time() < end:
            watch = bar.n < len(first) or rng.random() < WATCH
            if bar.n < len(first):
                content = first[bar.n]
            else:  # the shorter of two: it is read sooner
                content = changed(min(rng.choices(corpus, k=2), key=len), corpus, rng)
            began = time.process_time()
            kind, arcs, problem = read(content, folder, watch)
            slowest = max(slowest, time.process_time() - began)
            became[kind] += 1
            if not arcs <= seen or bar.n < len(first):
                seen |= arcs
                corpus.append(content)
            if problem is not None and (kind, place(problem)) not in findings:
                where = place(problem)
                findings[kind, where] = f"{kind.replace(' ', '-')}-{where.replace('/', '_').replace(':', '-')}.yaml"
                file = options.out / findings[kind, where]
                file.write_bytes(smallest(content, kind, where, folder))
                write_text(file.with_suffix(".txt"), "".join(traceback.format_exception(problem)))
                bar.write(f"{kind} at {where}: {file}")
            bar.update()
            bar.set_postfix(kept=len(corpus), pairs=len(seen), findings=len(findings), refresh=False)
    result = {
        "texts": sum(became.values()),
        "became": dict(became),
        "kept": len(corpus),
        "pairs of lines": len(seen),
        "slowest text, s of processor": round(slowest, 2),
        "most memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "findings": sorted(f"{kind} at {where}" for kind, where in findings),
        "seconds of processor": options.seconds,
        "seconds in all": round(time.monotonic() - since),
        "seed": options.seed,
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if options.seconds >= RECORDED:
        write_text(ROOT / "bench" / "results" / "fuzz.json", text)
    return int(bool(findings))


if __name__ == "__main__":
    raise SystemExit(main())
