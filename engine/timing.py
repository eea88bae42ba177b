"""How long things take when they take turns: in a fresh order every round, so that a slow spell hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

ROUNDS, WARMUP = 50, 20
FEWEST_ROUNDS, FEWEST_WARMUP = 10, 2  # where a time limit ends them early
WARMUP_PART = 0.2  # of the time limit, at most
CPU = torch.device("cpu")

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """How long something took: the median and the distance between the quartiles in milliseconds, of `count` runs."""

    ms: float
    iqr: float
    count: int


@torch.inference_mode()
def interleaved(
    runs: Sequence[Run],
    *,
    device: torch.device = CPU,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    seconds: float = 60.0,
    fewest: int = FEWEST_ROUNDS,
    progress: bool = True,
) -> list[Timing]:
    """How long each run takes. Every round runs each once, in a fresh order.

    After so many `seconds` it ends with fewer rounds, but never under the `fewest`; warming up takes a fifth of them at
    most, and two rounds at least.
    """
    rng = np.random.default_rng(0)
    times: list[list[float]] = [[] for _ in runs]
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    warmed, timed = 0, 0
    start = time.perf_counter()
    with tqdm(total=rounds, desc="latency", unit="round", leave=False, delay=2, disable=not progress) as bar:
        while timed < rounds:
            passed = time.perf_counter() - start
            if timed >= fewest and passed > seconds:
                break
            warm = warmed >= warmup or (warmed >= FEWEST_WARMUP and passed > WARMUP_PART * seconds)
            for index in rng.permutation(len(runs)):
                wait()
                began = time.perf_counter()
                runs[index]()
                wait()
                if warm:
                    times[index].append((time.perf_counter() - began) * 1000)
            warmed, timed = warmed + (not warm), timed + warm
            bar.update(warm)
    return [summarized(found) for found in times]


def summarized(times: Sequence[float]) -> Timing:
    """Of milliseconds, one a run."""
    low, middle, high = np.percentile(times, (25, 50, 75))
    return Timing(float(middle), float(high - low), len(times))
