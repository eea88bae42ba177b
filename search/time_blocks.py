"""Times the ONNX files of this folder on this device. Needs Python 3.8 or newer, numpy and onnxruntime, nothing else.

python time_blocks.py --device "Raspberry Pi 5" --threads 4

writes timings.json, which goes back to where the files came from:

python search.py ... --runtime onnxruntime --latency-table timings.json --latency-device "Raspberry Pi 5"

All files take turns in a fresh order every round, so that a slow spell hits all alike; the median is kept, in
milliseconds. Close whatever else runs. TensorRT and TFLite are not timed as such: onnxruntime's TensorRT provider is,
with --provider TensorrtExecutionProvider where it is installed; for TFLite there is no road from these files here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from typing import Any, Callable  # noqa: UP035  Python 3.8

ROUNDS, WARMUP = 50, 5
FEWEST_ROUNDS, FEWEST_WARMUP = 10, 2  # where --seconds ends them early


def this_device() -> str:
    """The model of this CPU, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def session_of(path: str, threads: int, provider: str) -> Callable[[], object]:
    """A run without arguments, on noise of the right shape."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    rng = np.random.default_rng(0)
    values = {one.name: rng.random(one.shape, dtype=np.float32) for one in session.get_inputs()}
    return lambda: session.run(None, values)


def timed(runs: list[Callable[[], object]], seconds: float) -> tuple[list[list[float]], float]:
    """Milliseconds of every run, as lists, and the seconds that were timed in all."""
    rng = random.Random(0)
    times: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    start, warmed, rounds, total = time.perf_counter(), 0, 0, 0.0
    while rounds < ROUNDS:
        passed = time.perf_counter() - start
        if rounds >= FEWEST_ROUNDS and passed > seconds:
            break
        warm = warmed >= WARMUP or (warmed >= FEWEST_WARMUP and passed > 0.2 * seconds)
        rng.shuffle(order)
        for index in order:
            began = time.perf_counter_ns()
            runs[index]()
            if warm:
                times[index].append((time.perf_counter_ns() - began) / 1e6)
        rounds += warm
        warmed += not warm
    for found in times:
        total += sum(found) / 1e3
    return times, total


def summary(times: list[float]) -> dict[str, Any]:
    """The median and the distance between the quartiles."""
    import numpy as np

    low, middle, high = np.percentile(times, (25, 50, 75))
    return {"ms": float(middle), "iqr": float(high - low), "count": len(times)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="", help="what to call this device; default: the model of its CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that one network may use")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of onnxruntime")
    parser.add_argument("--seconds", type=float, default=600.0, help="after which it ends with fewer rounds")
    parser.add_argument("--together", type=int, default=64, help="files in memory at a time")
    parser.add_argument("--out", default="timings.json")
    options = parser.parse_args()
    import onnxruntime

    if options.provider not in onnxruntime.get_available_providers():
        print(f"--provider {options.provider}: not one of {onnxruntime.get_available_providers()}", file=sys.stderr)
        return 2
    if options.provider != "CPUExecutionProvider" and not options.device:
        print("--device: give the accelerator a name, the model of the CPU would be wrong", file=sys.stderr)
        return 2
    folder = os.path.dirname(os.path.abspath(__file__))
    with open(os.path.join(folder, "blocks.json"), encoding="utf-8") as file:
        blocks = json.load(file)
    jobs = [(one["file"], "timings") for one in blocks["rows"] + blocks["subnets"]]
    jobs += [(one["file"], "again") for one in blocks["subnets"] if one["twice"]]
    random.Random(1).shuffle(jobs)
    found: dict[str, dict[str, Any]] = {"timings": {}, "again": {}}
    total = 0.0
    for start in range(0, len(jobs), options.together):
        group = jobs[start : start + options.together]
        runs = [session_of(os.path.join(folder, name), options.threads, options.provider) for name, _ in group]
        times, seconds = timed(runs, options.seconds * len(group) / len(jobs))
        total += seconds
        for (name, part), one in zip(group, times):  # noqa: B905  Python 3.8 has no strict=
            found[part][name] = summary(one)
        print(f"{min(start + options.together, len(jobs))} of {len(jobs)} timed", file=sys.stderr)
    key = {name: blocks[name] for name in ("batch", "precision", "imgsz", "space")}
    key.update(device=options.device or this_device(), runtime="onnxruntime", threads=options.threads)
    content = {"what": "timings", "unit": "ms", "key": key, "seed": blocks["seed"], "timed_s": total}
    content.update(provider=options.provider, version=onnxruntime.__version__, **found)
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    print(f"{options.out}: device {key['device']!r}, {options.threads} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
