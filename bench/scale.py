"""How much sooner is a search over with more workers? Its engine on published tables, its storage as measured.

python bench/scale.py --tables FOLDER        # some minutes; the table
python bench/scale.py --show                 # what was measured

FOLDER holds nas-bench-macro_cifar10.json (NAS-Bench-Macro: 6,561 trained networks). The search is `search.optimise` as
a search runs it, over accuracy and FLOPs; what it looks at does not depend on who judges it. It judges generation after
generation, so no more workers than a generation has subnets can ever be busy. Its size is POPULATION, 20, and beside it
stand larger ones: more workers have something to do, and evolution learns less often.

Only time is simulated: every worker takes subnets by the rule of `search.storage.take`, each costs the storage what was
measured of it here (posting, taking, telling; one at a time, for it has one lock), and then --seconds of judging, which
differ by a third of it from subnet to subnet. Minutes are those until the front's hypervolume is TARGET of the whole
table's, the mean over seeds; `never` where most seeds do not come so far within --count subnets.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bench.cells import RESULTS, guarded  # noqa: E402
from bench.nasbench import LOWEST_ACCURACY, SPACE, macro  # noqa: E402
from bench.workers import postgres, why_not_postgres  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from search.front import hypervolume  # noqa: E402
from search.optimise import POPULATION, optimise  # noqa: E402
from search.storage import (  # noqa: E402
    HANDFUL,
    JOURNAL,
    Outcome,
    create,
    open_storage,
    post,
    take,
    tell,
    trials_of,
)

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
POPULATIONS = (POPULATION, 40, 80, 160)
SEEDS = 5
TARGET = 0.98
SPREAD = 1 / 3  # of the seconds of one subnet
SIZES = (100, 400, 1600)  # trials in the study when a further one is measured
TAKEN = 2  # at once


# ---- the storage


def storage_ms(where: str) -> dict[str, float]:
    """Milliseconds that the storage needs for one more subnet in all, by how many there are."""
    import optuna

    queue = create(open_storage(where), "scale", SPACE)
    costs: dict[str, float] = {}
    numbers, done = iter(range(SPACE.size)), 0
    facts = {"subnet": "0", "known": {}, "by": "another", "found": {}}
    old = optuna.trial.create_trial(state=optuna.trial.TrialState.COMPLETE, values=[0.5, 1.0], user_attrs=facts)
    for size in tqdm(SIZES, "storage", leave=False):
        for _ in range(size - done):
            queue.storage.create_new_trial(queue.study, template_trial=old)
        began = time.perf_counter()
        for _ in range(POPULATION):
            post(queue, SPACE.at(next(numbers)), {})
        left = POPULATION
        while left:  # as a process does that shares with others: a look at all, then a few
            for ticket in take(queue, trials_of(queue), TAKEN):
                tell(queue, ticket, Outcome((0.5, 1.0), {"ap": 0.5}))
                left -= 1
        costs[str(size)] = 1000 * (time.perf_counter() - began) / POPULATION
        done = size + POPULATION
    return costs


# ---- the search


def generations(flops: np.ndarray, accuracy: np.ndarray, population: int, seed: int, count: int) -> list[list[float]]:
    """Of each generation how many subnets it has, and the part of the hypervolume that is reached behind it."""
    points = np.stack([flops, -accuracy], axis=1)
    reference = np.array([flops.max(), -LOWEST_ACCURACY])
    whole, seen, found = hypervolume(points, reference), [], []

    def evaluate(new: Sequence[Any]) -> list[tuple[float, float]]:
        numbers = [SPACE.index(one) for one in new]
        seen.extend(numbers)
        found.append([float(len(numbers)), hypervolume(points[seen], reference) / whole])
        return [(-accuracy[number], flops[number]) for number in numbers]

    optimise(
        SPACE,
        evaluate,
        count=count,
        seeds=[SPACE.at(0), SPACE.at(SPACE.size - 1)],
        violation=lambda one: 0.0,
        seed=seed,
        population=population,
        progress=False,
    )
    return found


# ---- the time


def makespan(durations: Sequence[float], workers: int, storage: float) -> float:
    """Seconds until a generation is judged: whoever is free takes some of what waits, as `search.storage.take` says,
    each costing the storage so many seconds, one process after the other.
    """
    waiting, free, locked, last = list(durations), [(0.0, number) for number in range(workers)], 0.0, 0.0
    while waiting:
        now, number = heappop(free)
        share = math.ceil(len(waiting) / (2 * workers)) if workers > 1 else len(waiting)
        handful = [waiting.pop() for _ in range(min(share, HANDFUL, len(waiting)))]
        locked = max(now, locked) + storage * len(handful)
        done = locked + sum(handful)
        last = max(last, done)
        heappush(free, (done, number))
    return last


def minutes(steps: Sequence[Sequence[float]], workers: int, seconds: float, storage: float, seed: int) -> float:
    """Minutes until a search has reached TARGET; inf where it does not."""
    rng, total = np.random.default_rng(seed), 0.0
    for size, reached in steps:
        durations = seconds * rng.uniform(1 - SPREAD, 1 + SPREAD, int(size))
        total += makespan(durations.tolist(), workers, storage)
        if reached >= TARGET:
            return total / 60
    return math.inf


def shown(found: Mapping[str, Any]) -> str:
    rows = [(kind, *(f"{costs[str(size)]:.1f}" for size in SIZES)) for kind, costs in found["storage"].items()]
    texts = [f"milliseconds of storage a subnet\n\n{table(rows, ('storage', *(f'{size} subnets' for size in SIZES)))}"]
    cost = max(costs[str(SIZES[1])] for costs in found["storage"].values()) / 1000
    rows = []
    for workers in WORKERS:
        row: list[Any] = [workers]
        for population in POPULATIONS:
            searches = found["generations"][str(population)]
            times = [minutes(one, workers, found["seconds"], cost, seed) for seed, one in enumerate(searches)]
            alone = [minutes(one, 1, found["seconds"], cost, seed) for seed, one in enumerate(searches)]
            there = [at for at, time in enumerate(times) if math.isfinite(time)]
            if 2 * len(there) <= len(times):
                row += ["never", None]
                continue
            mean = np.mean([times[at] for at in there])
            row += [f"{mean:.1f}", f"{np.mean([alone[at] for at in there]) / mean:.1f}"]
        rows.append(row)
    columns = [part for population in POPULATIONS for part in (f"minutes, {population} a generation", "times as fast")]
    head = (
        f"until {TARGET:.0%} of the hypervolume, {found['seconds']:g} s a subnet, {SEEDS} seeds; storage "
        f"{1000 * cost:.1f} ms a subnet, the slower one's"
    )
    reached = []
    for population in POPULATIONS:
        searches = found["generations"][str(population)]
        reached.append([population, *(f"{np.mean([at(one, count) for one in searches]):.4f}" for count in SIZES[:2])])
    texts.append(f"{head}\n\n{table(rows, ('workers', *columns))}")
    names = ("a generation", *(f"hypervolume after {count}" for count in SIZES[:2]))
    texts.append(table(reached, names))
    return "\n\n".join(texts)


def at(steps: Sequence[Sequence[float]], count: int) -> float:
    """The part of the hypervolume that was reached with at most so many subnets."""
    total, reached = 0.0, 0.0
    for size, value in steps:
        total += size
        if total > count:
            break
        reached = value
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder of the tables")
    parser.add_argument("--seconds", type=float, default=10.0, help="that judging one subnet takes")
    parser.add_argument("--count", type=int, default=800, help="subnets that a search judges at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if not options.show:
        if options.tables is None:
            parser.error("--tables is needed: the folder of the tables")
        flops, accuracies = macro(options.tables)
        accuracy = accuracies.mean(axis=1)
        storage: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            storage["journal"] = storage_ms(str(Path(folder) / JOURNAL))
        if reason := why_not_postgres():
            print(f"postgres: skipped, {reason}")
        else:
            with postgres() as where:
                storage["postgres"] = storage_ms(where)
        searches = {
            str(population): [generations(flops, accuracy, population, seed, options.count) for seed in range(SEEDS)]
            for population in tqdm(POPULATIONS, "searches", leave=False)
        }
        found = {"seconds": options.seconds, "count": options.count, "storage": storage, "generations": searches}
        write_text(options.out, json.dumps(found) + "\n")
    print(shown(json.loads(options.out.read_text())))
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
