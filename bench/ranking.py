"""Does the supernet's order hold? Subnets that it has judged, trained each alone from random weights, two seeds.

python bench/ranking.py --bccd ~/BCCD      # a search and 32 trainings, about an hour of one core; resumable
python bench/ranking.py --show             # what was measured

A search over cfg/models/tiny-search.yaml (kernel, activation and depth), 30 epochs at 128 px, then ``python -m
search.rank`` with 16 subnets from four levels of MACs and 12 epochs each. AP is on the validation images, for the
supernet and the trainings; no subnet's architecture was chosen by it. Intervals are a bootstrap over subnets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.bccd import RECIPE  # noqa: E402
from bench.cells import RESULTS, data_yaml, guarded, run, timed_run  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from search.rank_study import told  # noqa: E402

SEARCH = {"imgsz": 128, "epochs": 30, "candidates": 8, "seed": 0}
STUDY = {"subnets": 16, "seeds": 2, "epochs": 12}


def words(options: dict[str, Any]) -> list[Any]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def measure(work: Path, bccd: Path | None, threads: int) -> dict[str, Any]:
    """The search and the study, each of which goes on where it was stopped."""
    folder, surroundings = work / "search", {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not (folder / "best.yaml").exists():
        options = {"cfg": ROOT / "cfg" / "models" / "tiny-search.yaml", "data": data_yaml("bccd", bccd, work)}
        options |= {**SEARCH, **RECIPE, "device": "cpu", "project": work, "name": "search"}
        fresh = [sys.executable, "search.py", *words(options), "--exist-ok"]
        again = [sys.executable, "search.py", "--resume", folder]
        timed_run(folder, fresh, again, folder / "last.pt", ROOT, surroundings)
    command = [sys.executable, "-m", "search.rank", folder, *words({**STUDY, "device": "cpu"})]
    run(command, ROOT, surroundings, work / "output.txt")
    found = json.loads((folder / "rank" / "rank.json").read_text())
    about = {"search": SEARCH, "study": STUDY, "threads": threads, "torch": torch.__version__}
    return {**about, **found}


def shown(result: dict[str, Any]) -> str:
    """A row a ranking, with its agreements."""
    agreement = result["agreement"]
    titles = list(next(iter(agreement.values())))
    rows = [
        (name, *(told(*(float("nan") if v is None else v for v in of[t])) for t in titles))
        for name, of in agreement.items()
    ]
    search, study = result["search"], result["study"]
    head = (
        f"bccd, {search['imgsz']} px; a search of {search['epochs']} epochs, {study['subnets']} subnets trained alone, "
        f"{study['epochs']} epochs, {study['seeds']} seeds; {result['short']} of the trainings still gained"
    )
    return f"{head}\n\n{table(rows, ('ranked by', *titles))}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, help="folder of the data set; default as cfg/data/bccd.yaml says")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench" / "ranking", help="folder of all runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="train nothing")
    options = parser.parse_args()
    file = options.out / "ranking-bccd.json"
    if not file.exists() and not options.show:
        work = options.work.resolve()
        for folder in (work, options.out):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(measure(work, options.bccd, options.threads), indent=1) + "\n")
    print(shown(json.loads(file.read_text())) if file.exists() else "nothing was measured yet")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
