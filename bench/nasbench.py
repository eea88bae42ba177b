"""Do the search's algorithms find what there is to find? Asked of tables in which every network was trained already.

python bench/nasbench.py --tables FOLDER    # the seeds that are missing, about 5 minutes in all; the tables
python bench/nasbench.py --show             # the tables of what was measured

FOLDER holds nas-bench-macro_cifar10.json (NAS-Bench-Macro: 6,561 networks, three trainings each) and
yolobench/merged_results.csv (YOLOBench: YOLOs and their latencies on 8 devices).

`front`: the hypervolume of accuracy and FLOPs that n evaluations reach, as a part of that of the whole table (reference
point: its largest FLOPs, 85 % accuracy), and how many of the 35 points of its front were hit. `best`: the regret, what
the best evaluated network within 60 MFLOPs is short of the best there is, in % accuracy; all n evaluations are spent
within the budget. Evolution is `search.optimise` as a search runs it, from the cheapest and the dearest network;
`evolution, front only` is the same without its second half, which goes to the best alone. Random draws without
repetition, for `best` from the networks within the budget. Means over seeds, with the 95 % interval of a bootstrap.

Exits with 1 where a hypervolume is under .98 at 400 or .99 at 800, a regret over .05 % at 200, random is not worse, a
front of YOLOBench has another size than by brute force, or a tau is not the known one.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.spec import Choice  # noqa: E402
from search.costs import Budget, CostTable  # noqa: E402
from search.front import hypervolume, non_dominated, ranks  # noqa: E402
from search.optimise import FOCUS, optimise  # noqa: E402
from search.propose import excess, fit  # noqa: E402
from search.rank import kendall_tau  # noqa: E402
from search.space import SearchSpace  # noqa: E402

RESULTS = ROOT / "bench" / "results"
SPACE = SearchSpace(tuple(Choice(f"layer{place}", ("0", "1", "2")) for place in range(8)))
LOWEST_ACCURACY = 85.0
BUDGET = Budget("macs", 60e6)
FRONT_COUNTS, BEST_COUNTS = (100, 200, 400, 800, 1600), (50, 100, 200, 400)
METHODS = ("random", "evolution", "evolution, front only")
MEASURES = {"front": "hypervolume", "best": "regret"}
CELLS = [("front", "random"), ("front", "evolution"), *(("best", method) for method in METHODS)]
DEVICES = {  # of YOLOBench, with the size of the front of VOC AP and latency
    "nano_gpu": 65,
    "openvino": 50,
    "vim3": 38,
    "raspi4_tflite": 60,
    "orange_pi": 46,
    "a40_trt": 52,
    "pi5_ort": 71,
    "pi4_ort": 69,
}
TAUS = {"all": 0.882, "best tenth": 0.184, "FLOPs": 0.556}
RESAMPLES = 5000


def macro(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs ``[6561]`` and the accuracy of three trainings in % ``[6561, 3]``, by number in the space."""
    path = folder / "nas-bench-macro_cifar10.json"
    if not path.is_file():
        raise Fault(f"{path}: no such file; --tables FOLDER is where the tables lie")
    entries = json.loads(path.read_text())
    found = [entries["".join(SPACE.at(number).picks.values())] for number in range(SPACE.size)]
    return np.array([float(one["flops"]) for one in found]), np.array([one["test_acc"] for one in found])


def flops_table(flops: np.ndarray) -> CostTable:
    """The FLOPs as a sum over layers, which here they are exactly."""
    effects = [np.array([flops[digit * 3 ** (7 - place)] - flops[0] for digit in range(3)]) for place in range(8)]
    additive = CostTable("macs", flops[0], tuple(((c,), e) for c, e in zip(SPACE.choices, effects, strict=True)))
    assert all(additive.of(SPACE.at(number)) == flops[number] for number in range(SPACE.size))
    return additive


def evaluated(
    method: str, flops: np.ndarray, accuracy: np.ndarray, seed: int, count: int, budgets: Sequence[Budget]
) -> list[int]:
    """The networks that a search looks at, in order."""
    rng = np.random.default_rng(seed)
    if method == "random":
        allowed = np.flatnonzero(flops <= min([budget.limit for budget in budgets], default=np.inf))
        return rng.permutation(allowed)[:count].tolist()
    tables = {"macs": flops_table(flops)}
    dearest = fit(SPACE.at(SPACE.size - 1), tables, budgets, rng)
    assert dearest is not None
    found = optimise(
        SPACE,
        lambda new: [(-accuracy[number], flops[number]) for number in map(SPACE.index, new)],
        count=count,
        seeds=[SPACE.at(0), dearest],
        violation=lambda one: excess(one, tables, budgets),
        seed=seed,
        focus=FOCUS if budgets and method == "evolution" else 0.0,
        progress=False,
    )
    return [SPACE.index(one) for one in found]


def front_seed(method: str, flops: np.ndarray, accuracy: np.ndarray, seed: int) -> dict[str, list[float]]:
    """The parts of the hypervolume and of the front's points that each count of evaluations reaches."""
    points = np.stack([flops, -accuracy], axis=1)
    reference = np.array([flops.max(), -LOWEST_ACCURACY])
    whole = hypervolume(points, reference)
    front = {tuple(point) for point in points[non_dominated(points)].tolist()}  # equal ones are one network
    order = evaluated(method, flops, accuracy, seed, max(FRONT_COUNTS), [])
    assert len(set(order)) == len(order) == max(FRONT_COUNTS)
    hit = [{tuple(point) for point in points[order[:count]].tolist()} & front for count in FRONT_COUNTS]
    return {
        "hypervolume": [hypervolume(points[order[:count]], reference) / whole for count in FRONT_COUNTS],
        "recall": [len(found) / len(front) for found in hit],
    }


def best_seed(method: str, flops: np.ndarray, accuracy: np.ndarray, seed: int) -> dict[str, list[float]]:
    """The regret at each count: of a search planned for so many where its halves depend on that."""
    best = accuracy[flops <= BUDGET.limit].max()
    if method == "evolution":
        orders = [evaluated(method, flops, accuracy, seed, count, [BUDGET]) for count in BEST_COUNTS]
    else:
        order = evaluated(method, flops, accuracy, seed, max(BEST_COUNTS), [BUDGET])
        orders = [order[:count] for count in BEST_COUNTS]
    assert all(flops[order].max() <= BUDGET.limit for order in orders)
    return {"regret": [float(best - accuracy[order].max()) for order in orders]}


def ranking_cell(flops: np.ndarray, accuracies: np.ndarray, folder: Path) -> dict[str, Any]:
    """Fronts of YOLOBench by the sort and by brute force; how far two trainings of NAS-Bench-Macro agree."""
    mean = accuracies.mean(axis=1)
    best = np.argsort(-mean.round(6), kind="stable")[: SPACE.size // 10]
    taus = {
        "all": kendall_tau(accuracies[:, 0], accuracies[:, 1]),
        "best tenth": kendall_tau(accuracies[best, 0], accuracies[best, 1]),
        "FLOPs": kendall_tau(flops, mean),
    }
    with open(folder / "yolobench" / "merged_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    fronts = {}
    for device in DEVICES:
        points = [(float(row[f"{device}_latency"]), -float(row["mAP_0.5:0.95_voc"])) for row in rows]
        brute = [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]
        fronts[device] = {"sorted": int((ranks(np.array(points)) == 0).sum()), "brute_force": sum(brute)}
    return {"tau": taus, "fronts": fronts}


# ---- tables


def summarized(values: Sequence[float]) -> tuple[float, str]:
    """The mean over seeds, and the 95 % interval of a bootstrap over them."""
    drawn = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.mean(values)), f"{low:.4f} to {high:.4f}"


def shown(cells: dict[str, dict[str, Any]]) -> str:
    blocks = []
    for task, measure in MEASURES.items():
        rows = []
        for method in METHODS:
            cell = cells.get(name_of(task, method))
            if cell is None:
                continue
            for place, count in enumerate(cell["counts"]):
                mean, interval = summarized([values[place] for values in cell[measure]])
                row = (task, method, count, f"{mean:.4f}", interval, len(cell[measure]))
                hit = (float(np.mean([values[place] for values in cell["recall"]])),) if task == "front" else ()
                rows.append(row + hit)
        if rows:
            titles = ("task", "method", "evaluations", measure, "95 %", "seeds")
            blocks.append(table(rows, titles + (("front hit",) if task == "front" else ())))
    ranking = cells.get("nasbench-rankings")
    if ranking:
        fronts = [(d, f["sorted"], f["brute_force"], DEVICES[d]) for d, f in ranking["fronts"].items()]
        blocks.append(table(fronts, ("device", "front", "brute force", "known")))
        blocks.append(table([(n, tau, TAUS[n]) for n, tau in ranking["tau"].items()], ("tau of", "found", "known")))
    return "\n\n".join(blocks)


def failures(cells: dict[str, dict[str, Any]]) -> list[str]:
    """What falls short of the claims, of the cells that are there."""

    def mean(task: str, method: str, measure: str, count: int) -> float | None:
        cell = cells.get(name_of(task, method))
        return None if cell is None else float(np.mean([v[cell["counts"].index(count)] for v in cell[measure]]))

    found = []
    for count, least in ((400, 0.98), (800, 0.99)):
        ours, random = (mean("front", method, "hypervolume", count) for method in ("evolution", "random"))
        if ours is not None and (ours < least or (random is not None and random >= ours)):
            found.append(f"hypervolume {ours:.4f} at {count}")
    ours, random = (mean("best", method, "regret", 200) for method in ("evolution", "random"))
    if ours is not None and (ours > 0.05 or (random is not None and random <= ours)):
        found.append(f"regret {ours:.4f} % at 200")
    ranking = cells.get("nasbench-rankings")
    if ranking:
        found += [
            f"front of {device}"
            for device, sizes in ranking["fronts"].items()
            if not sizes["sorted"] == sizes["brute_force"] == DEVICES[device]
        ]
        found += [f"tau {name}" for name, tau in ranking["tau"].items() if abs(tau - TAUS[name]) > 0.002]
    return found


def name_of(task: str, method: str) -> str:
    return f"nasbench-{task}-{method.replace(', ', '-').replace(' ', '-')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder of the tables")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results; the seeds that are there are kept"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    names = [*(name_of(task, method) for task, method in CELLS), "nasbench-rankings"]
    try:
        if not options.show:
            if options.tables is None:
                raise Fault("--tables FOLDER: where do the tables lie? --show shows what was measured")
            options.out.mkdir(parents=True, exist_ok=True)
            flops, accuracies = macro(options.tables)
            ranking = options.out / "nasbench-rankings.json"
            if not ranking.exists():
                write_text(ranking, json.dumps(ranking_cell(flops, accuracies, options.tables)) + "\n")
            for task, method in CELLS:
                file = options.out / f"{name_of(task, method)}.json"
                cell = json.loads(file.read_text()) if file.exists() else {}
                done = len(cell.get(MEASURES[task], []))
                for seed in tqdm(range(done, options.seeds), f"{task}, {method}", unit="seed", leave=False):
                    found = (front_seed if task == "front" else best_seed)(method, flops, accuracies.mean(axis=1), seed)
                    cell["counts"] = FRONT_COUNTS if task == "front" else BEST_COUNTS
                    for measure, values in found.items():
                        cell.setdefault(measure, []).append(values)
                    write_text(file, json.dumps(cell) + "\n")
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    files = {name: options.out / f"{name}.json" for name in names}
    cells = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    print(shown(cells))
    short = failures(cells)
    print(f"\nfalls short: {', '.join(short)}" if short else "")
    return int(bool(short))


if __name__ == "__main__":
    raise SystemExit(main())
