"""Can a table predict how long a subnet takes? On tiny-search.yaml (kernel, activation, depth) and this machine.

python bench/latency.py                                  # both runtimes; about 10 minutes on 2 idle cores
python bench/latency.py --runtimes torch --seconds 10    # a quick look
python bench/latency.py --show                           # the table of what was measured

Two ways: `table`, the sum of fused rows timed alone, and `regression`, a ridge fit of what the table misses to 100
subnets timed whole. Each is held against 24 random subnets that took no part, timed end to end twice, in turns with all
else. error is the mean of |predicted / measured - 1|, tau is Kendall's; run-to-run is the second measurement in place
of the prediction. A search uses the table where it holds, else the regression. A way holds where error <=
max(5 %, run-to-run) and tau >= .9 of run-to-run. Exits with 1 where neither does. Each runtime and way is kept as a
JSON in bench/results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data.structures import Fault  # noqa: E402
from engine.doors import parse_device  # noqa: E402
from engine.latency import RUNTIMES, check_runtime  # noqa: E402
from engine.runs import table, write_text  # noqa: E402
from models.graph import normalize, resolve  # noqa: E402
from models.parse import parse  # noqa: E402
from search.device_timer import device_timer  # noqa: E402
from search.latency import REGRESSION, SEPARABLE, TABLE, LatencyTable  # noqa: E402
from search.space import SearchSpace  # noqa: E402
from search.tabulate import WHOLE, key_of, of_rows, of_subnets, open_rows, split  # noqa: E402

RESULTS = ROOT / "bench" / "results"
MODEL = ROOT / "cfg" / "models" / "tiny-search.yaml"
ANCHORS = tuple(tuple(float(v) for v in range(8 + 40 * k, 16 + 40 * k)) for k in range(3))  # any will do


def measure(runtime: str, options: argparse.Namespace, device: torch.device) -> None:
    graph = resolve(normalize(replace(parse(MODEL), anchors=ANCHORS)))
    space, rows = SearchSpace.of(graph.spec), open_rows(graph)
    key = key_of(graph, options.imgsz, device, runtime)
    timed = device_timer(graph, options.imgsz, device=device, runtime=runtime, seconds=options.seconds)
    held_out, others = split(space, rows, options.seed)
    began = time.perf_counter()
    alone = of_rows(space, rows, timed, key, held_out, others[:WHOLE])
    write(runtime, alone, options, time.perf_counter() - began)
    began = time.perf_counter()
    fitted = of_subnets(space, rows, timed, key, held_out, others, alone.cost)
    write(runtime, fitted, options, time.perf_counter() - began)


def write(runtime: str, made: LatencyTable, options: argparse.Namespace, seconds: float) -> None:
    check = made.validation
    result = {
        "key": asdict(made.key),
        "kind": made.kind,
        "error": check.error,
        "repeat_error": check.repeat_error,
        "tau": check.tau,
        "repeat_tau": check.repeat_tau,
        "fastest_ms": made.cost.extreme(largest=False)[0],
        "spread_ms": made.spread_ms,
        "noise_ms": made.noise_ms,
        "holds": made.usable,
        "separates": made.separates,
        "seconds": seconds,
        "seed": options.seed,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "entries": [asdict(entry) for entry in made.entries],
        "subnets": [asdict(one) for one in check.subnets],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / f"latency-{runtime}-{made.kind}.json", json.dumps(result, indent=1) + "\n")


def shown(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    header = ("runtime", "way", "error", "run-to-run", "tau", "run-to-run", "holds", "ms", "spread", "noise", "s")
    rows = [
        (
            runtime,
            kind,
            f"{r['error']:.1%}",
            f"{r['repeat_error']:.1%}",
            r["tau"],
            r["repeat_tau"],
            "yes" if r["holds"] else "no",
            f"{r['fastest_ms']:.2f}",
            f"{r['spread_ms']:.2f}",
            f"{r['noise_ms']:.3f}",
            f"{r['seconds']:.0f}",
        )
        for (runtime, kind), r in results.items()
    ]
    return table(rows, header)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--seconds", type=float, default=120.0, help="of timing, for each way; at least 10 rounds")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a CPU; default: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="draws the subnets")
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = {
        (r, kind): options.out / f"latency-{r}-{kind}.json" for r in options.runtimes for kind in (TABLE, REGRESSION)
    }
    try:
        device = parse_device(options.device)
        for runtime in [] if options.show else options.runtimes:
            if options.again or not all(files[runtime, kind].exists() for kind in (TABLE, REGRESSION)):
                check_runtime(runtime, device)
                measure(runtime, options, device)
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 2
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    print(shown(results))
    for (runtime, kind), result in results.items():
        if not result["separates"]:
            print(
                f"{runtime}, {kind}: latency cannot separate these, the spread is under {SEPARABLE:g} times the noise"
            )
    held = {runtime for (runtime, _), result in results.items() if result["holds"]}
    return int(held != {runtime for runtime, _ in results})


if __name__ == "__main__":
    raise SystemExit(main())
