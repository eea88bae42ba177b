"""Do workers that are killed lose anything? Several processes on one study, with processes that die at random.

python bench/workers.py                                  # journal file and PostgreSQL: 4 workers, 20 kills, minutes
python bench/workers.py --kills 3 --count 60 --storage journal
python bench/workers.py --show                           # the table of what was measured

A parent evolves a seeded space of 3^8 subnets whose values are a made-up table, each of which takes a while to look
up; workers help it, and one of them is killed (SIGKILL) every second or so and replaced. Half claim to be on another
machine, so that they are missed by their beats, the others by their process. Compared with one process alone: the same
subnets in the same order, the same front. Of what workers wrote down as finished, each in a file of its own, nothing
may be missing from the study, and no subnet may be finished twice.

PostgreSQL is started from Debian's package in a folder of its own and stopped at the end; where `initdb` or psycopg is
absent, that part is left out and the table says so. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from engine.runs import table, write_text  # noqa: E402
from models.spec import Choice  # noqa: E402
from search.front import non_dominated  # noqa: E402
from search.optimise import Values, optimise  # noqa: E402
from search.space import Architecture, SearchSpace  # noqa: E402
from search.storage import (  # noqa: E402
    JOURNAL,
    POSTGRES,
    Limits,
    Outcome,
    Queue,
    Tell,
    Ticket,
    beating,
    close,
    create,
    finished,
    gather,
    join,
    open_storage,
    outcome_of,
    own,
    subnet_of,
    trials_of,
    work,
)

RESULTS = ROOT / "bench" / "results" / "workers.json"
SPACE = SearchSpace(tuple(Choice(f"layer{place}", ("a", "b", "c")) for place in range(8)))
STUDY, SEED = "bench", 0
RHYTHM = {"beat": 0.3, "grace": 4.0}
BETWEEN_KILLS = (0.7, 1.7)  # seconds
POSTGRES_BIN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def values_of(one: Architecture) -> Values:
    """A made-up error and cost, both to be small: effects of options and of neighbours, drawn once."""
    rng = np.random.default_rng(7)
    single, pairs, costs = rng.normal(size=(8, 3)), rng.normal(size=(7, 3, 3)) / 2, rng.integers(1, 20, size=(8, 3))
    at = ["abc".index(pick) for pick in one.picks.values()]
    error = sum(single[n, a] for n, a in enumerate(at)) + sum(pairs[n, at[n], at[n + 1]] for n in range(7))
    return float(error), float(sum(costs[n, a] for n, a in enumerate(at)))


def evolved(evaluate: Any, count: int) -> dict[Architecture, Values]:
    return optimise(
        SPACE, evaluate, count=count, seeds=[SPACE.at(0)], violation=lambda one: 0.0, seed=SEED, progress=False
    )


def looked_up(tickets: Sequence[Ticket], tell: Tell, seconds: float) -> None:
    for ticket in tickets:
        time.sleep(seconds)
        error, cost = values_of(ticket.architecture)
        tell(ticket, Outcome((-error, cost), {"error": error, "cost": cost}))


def worker(where: str, owner: str, log: Path, seconds: float) -> None:
    """Joins the study, and writes down what it finished once the storage has it."""
    queue = join(open_storage(where), STUDY, SPACE, owner, **RHYTHM)
    with log.open("a") as file:

        def evaluate(tickets: Sequence[Ticket], tell: Tell) -> None:
            def told(ticket: Ticket, outcome: Outcome) -> None:
                tell(ticket, outcome)
                file.write(f"{ticket.id} {SPACE.index(ticket.architecture)}\n")
                file.flush()

            looked_up(tickets, told, seconds)

        work(queue, evaluate, Limits())


def started(where: str, number: int, folder: Path, seconds: float) -> Any:
    """A worker; every second one says that it is elsewhere. Forked from a process that has imported everything."""
    owner = f"elsewhere {number} x" if number % 2 else ""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=worker, args=(where, owner, folder / f"{number}.log", seconds), daemon=True)
    process.start()
    return process


def killing(
    queue: Queue, where: str, folder: Path, workers: int, kills: int, seconds: float, over: threading.Event
) -> list[int]:
    """Keeps so many workers alive and kills one now and then, until `over`; how many died, with and without a trial."""
    rng = random.Random(SEED)
    running = {number: started(where, number, folder, seconds) for number in range(workers)}
    died, following = [0, 0], workers
    while not over.wait(rng.uniform(*BETWEEN_KILLS)):
        if sum(died) >= kills:
            continue
        joined = [n for n in running if (folder / f"{n}.log").exists()]
        if not joined:
            continue
        victim = rng.choice(joined)
        process = running.pop(victim)
        names = (f"elsewhere {victim} x", f"{socket.gethostname()} {process.pid} ")
        process.kill()
        process.join()
        states = [t for t in trials_of(queue) if t.state.name == "RUNNING"]
        busy = any(t.user_attrs.get("by", "").startswith(names) for t in states)
        died[busy] += 1
        running[following] = started(where, following, folder, seconds)
        following += 1
    for process in running.values():
        process.join(timeout=60)
    return died


def measured(where: str, options: argparse.Namespace) -> dict[str, Any]:
    """One search with workers that die, next to the same search alone."""
    alone = evolved(lambda new: [values_of(one) for one in new], options.count)
    queue = create(open_storage(where), STUDY, SPACE, **RHYTHM)
    over, died = threading.Event(), []

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arguments = (queue, where, folder, options.workers, options.kills, options.seconds, over)
        killer = threading.Thread(target=lambda: died.extend(killing(*arguments)))
        killer.start()
        began = time.perf_counter()

        def evaluate(new: list[Architecture]) -> list[Values]:
            found: dict[Architecture, Values] = {}

            def done(one: Architecture, outcome: Outcome) -> None:
                found[one] = (outcome.facts["error"], outcome.facts["cost"])

            def look(tickets: Sequence[Ticket], tell: Tell) -> None:
                looked_up(tickets, tell, options.seconds)

            gather(queue, {one: {} for one in new}, look, done, Limits())
            return [found[one] for one in new]

        with beating(queue):
            together = evolved(evaluate, options.count)
        seconds = time.perf_counter() - began
        close(queue)
        over.set()
        killer.join()
        logs = [line.split() for path in folder.glob("*.log") for line in path.read_text().splitlines()]

    kept = finished(queue)
    lost = sum(SPACE.at(int(number)) not in kept for _, number in logs)
    done = [subnet_of(queue, trial) for trial in trials_of(queue) if outcome_of(trial)]
    failed = sum(trial.state.name == "FAIL" for trial in trials_of(queue))
    return {
        "trials": len(done),
        "twice": len(done) - len(set(done)),
        "by_workers": len(logs),
        "by_parent": own(queue, trials_of(queue)),
        "killed_idle": died[0],
        "killed_busy": died[1],
        "requeued": failed,
        "lost": lost,
        "same_results": list(together.items()) == list(alone.items()),
        "same_front": front(together) == front(alone),
        "seconds": seconds,
    }


def front(found: Mapping[Architecture, Values]) -> list[int]:
    on = non_dominated(np.array(list(found.values())))
    return sorted(SPACE.index(one) for one, is_on in zip(found, on, strict=True) if is_on)


@contextmanager
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL of our own. The superuser may not run one: then it is the user `postgres`."""
    folder = Path(tempfile.mkdtemp(prefix="workers-postgres-"))
    user: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        user |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder_bin, cluster = POSTGRES_BIN[-1], folder / "cluster"
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, **user}
    control = [str(folder_bin / "pg_ctl"), "-D", str(cluster), "-w"]
    try:
        subprocess.run([str(folder_bin / "initdb"), "-D", str(cluster), "-U", "bench", "-A", "trust"], **quiet)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c max_connections=100"
        subprocess.run([*control, "-l", str(folder / "log"), "-o", options, "start"], **quiet)
        try:
            yield f"{POSTGRES}://bench@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def why_not_postgres() -> str:
    if not POSTGRES_BIN:
        return "no PostgreSQL in /usr/lib/postgresql (Debian: apt-get install postgresql)"
    return "" if find_spec("psycopg") else "psycopg is not installed (pip install -e '.[postgres]')"


def show(results: Mapping[str, Any]) -> str:
    names = ("trials", "twice", "by_workers", "killed_idle", "killed_busy", "requeued", "lost", "same_front", "seconds")
    rows = [
        (kind, *(found.get(name, found.get("skipped") and "skipped") for name in names))
        for kind, found in results.items()
    ]
    return table([[f"{cell:.0f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows],
                 ("storage", *names))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", choices=("journal", "postgres", "both"), default="both")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--count", type=int, default=300, help="subnets that the search evaluates")
    parser.add_argument("--seconds", type=float, default=0.4, help="that one evaluation takes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    if options.show:
        print(show(json.loads(options.out.read_text())))
        return 0
    multiprocessing.set_forkserver_preload(["search.storage", "search.optimise", "search.front", "optuna"])
    results: dict[str, Any] = {}
    if options.storage in ("journal", "both"):
        with tempfile.TemporaryDirectory() as folder:
            results["journal"] = measured(str(Path(folder) / JOURNAL), options)
    if options.storage in ("postgres", "both"):
        reason = why_not_postgres()
        if reason:
            print(f"postgres: skipped, {reason}")
            results["postgres"] = {"skipped": reason}
        else:
            with postgres() as where:
                results["postgres"] = measured(where, options)
    write_text(options.out, json.dumps(results, indent=1) + "\n")
    print(show(results))
    wrong = [
        kind
        for kind, found in results.items()
        if "skipped" not in found
        and (found["lost"] or found["twice"] or not found["same_results"] or not found["same_front"]
             or found["killed_idle"] + found["killed_busy"] < options.kills)
    ]  # fmt: skip
    for kind in wrong:
        print(f"{kind}: not as it should be: {results[kind]}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
