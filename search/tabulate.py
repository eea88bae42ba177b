"""The latency table of a device: of rows timed alone where that predicts whole subnets, otherwise of a regression.

Which device answers is a function, `Timed`: this one, by its clock (`search.device_timer`), or another one's timings
(`search.blocks`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.structures import Fault
from engine.latency import PRECISION, check_runtime, device_name, threads_used
from engine.timing import Timing
from models.graph import Graph, combinations
from search.additive import fit_additive
from search.costs import CostTable
from search.device_timer import SECONDS, Timed, device_timer
from search.latency import REGRESSION, TABLE, Check, Entry, Key, LatencyTable, Rows, Validation, parsed
from search.space import Architecture, SearchSpace

HELD_OUT = 24  # subnets that a table is held against
WHOLE = 8  # subnets from which the rest of the network is known
PER_ENTRY, MOST_SUBNETS = 4, 100  # timed whole for a regression: so many an entry, and at most
MOST_ROWS = 400  # rows with options picked that are timed alone; a space of more starts with the regression
ANOTHER_UNIT = 5.0  # a subnet cannot differ so much from its table on the device where that was made


def latency_table(
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    seed: int = 0,
    progress: bool = True,
    seconds: float = SECONDS,
) -> LatencyTable:
    """Measures a table of an open graph on this device, with weights of its own: for time they do not matter.

    Raises `Fault` where `runtime` is not there.
    """
    check_runtime(runtime, device)
    timed = device_timer(graph, imgsz, device=device, runtime=runtime, progress=progress, seconds=seconds)
    return tabulate(SearchSpace.of(graph.spec), open_rows(graph), timed, key_of(graph, imgsz, device, runtime), seed)


def key_of(graph: Graph, imgsz: int, device: torch.device, runtime: str) -> Key:
    space = SearchSpace.of(graph.spec)
    return Key(device_name(device), runtime, threads_used(device), 1, PRECISION, imgsz, space.hash)


def open_rows(graph: Graph) -> Rows:
    return tuple((node.index, node.choices) for node in graph.nodes if node.choices)


def tabulate(space: SearchSpace, rows: Rows, timed: Timed, key: Key, seed: int = 0) -> LatencyTable:
    """The table of a device: of rows timed alone where that predicts whole subnets, otherwise the regression."""
    held_out, others = split(space, rows, seed)
    if sum(len(combinations(choices)) for _, choices in rows) > MOST_ROWS:
        return of_subnets(space, rows, timed, key, held_out, others)
    table = of_rows(space, rows, timed, key, held_out, others[:WHOLE])
    if table.usable:
        return table
    fitted = of_subnets(space, rows, timed, key, held_out, others, table.cost)
    return fitted if fitted.usable or fitted.validation.error < table.validation.error else table


def split(space: SearchSpace, rows: Rows, seed: int) -> tuple[list[Architecture], list[Architecture]]:
    """Random subnets: those that a table is held against (24, but never more than half), and those it is made of."""
    entries = sum(len(combinations(choices)) for _, choices in rows)
    subnets = drawn(space, HELD_OUT + min(MOST_SUBNETS, PER_ENTRY * entries), random.Random(f"latency {seed}"))
    count = min(HELD_OUT, len(subnets) // 2)
    return subnets[:count], subnets[count:]


def of_rows(
    space: SearchSpace,
    rows: Rows,
    timed: Timed,
    key: Key,
    held_out: Sequence[Architecture],
    whole: Sequence[Architecture],
) -> LatencyTable:
    """A table of every row timed alone; the rest is the mean of what some whole subnets take beyond their rows."""
    alone = [(index, picks) for index, choices in rows for picks in combinations(choices)]
    found, all_whole = timed(alone, [*whole, *held_out, *held_out])
    entries = tuple(Entry(i, picks, t.ms, t.iqr, t.count) for (i, picks), t in zip(alone, found, strict=True))
    table = LatencyTable(key, TABLE, 0.0, entries, Validation(()))
    beyond = [t.ms - table.cost.of(one) for one, t in zip(whole, all_whole[: len(whole)], strict=True)]
    table = replace(table, fixed_ms=float(np.mean(beyond)))
    return replace(table, validation=checked(space, table.cost, held_out, all_whole[len(whole) :]))


def of_subnets(
    space: SearchSpace,
    rows: Rows,
    timed: Timed,
    key: Key,
    held_out: Sequence[Architecture],
    whole: Sequence[Architecture],
    prior: CostTable | None = None,
) -> LatencyTable:
    """A regression on whole subnets, of what a `prior` does not say about them already."""
    _, found = timed([], [*whole, *held_out, *held_out])
    cost = fit_additive([choices for _, choices in rows], whole, [t.ms for t in found[: len(whole)]], prior)
    entries = tuple(
        Entry(index, picks, float(ms), None, sum(picks.items() <= one.picks.items() for one in whole))
        for (index, choices), (_, array) in zip(rows, cost.rows, strict=True)
        for picks, ms in zip(combinations(choices), array.ravel(), strict=True)
    )
    return LatencyTable(key, REGRESSION, cost.fixed, entries, checked(space, cost, held_out, found[len(whole) :]))


def drawn(space: SearchSpace, count: int, rng: random.Random) -> list[Architecture]:
    """Different subnets in random order: so many, or all that there are."""
    if space.size <= 2 * count:
        return [space.at(number) for number in rng.sample(range(space.size), min(count, space.size))]
    found: dict[Architecture, None] = {}
    while len(found) < count:
        found[space.sample(rng)] = None
    return list(found)


def checked(
    space: SearchSpace, cost: CostTable, subnets: Sequence[Architecture], twice: Sequence[Timing]
) -> Validation:
    """Of subnets and their timings: those of all, then those of all again."""
    first, again = twice[: len(subnets)], twice[len(subnets) :]
    rows = zip(subnets, first, again, strict=True)
    return Validation(tuple(Check(space.index(one), cost.of(one), a.ms, b.ms) for one, a, b in rows))


def read_table(
    path: Path,
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    progress: bool = True,
) -> LatencyTable:
    """The table of a file that `write_table` wrote for this graph, device, runtime and image size.

    Raises `Fault` for a file that is none, was measured with anything else, lacks an entry, or has a number that cannot
    be one of milliseconds; its fastest subnet is timed once more to know.
    """
    check_runtime(runtime, device)
    timed = device_timer(graph, imgsz, device=device, runtime=runtime, progress=progress, seconds=1.0)
    return confirmed(path, open_rows(graph), key_of(graph, imgsz, device, runtime), timed)


def confirmed(path: Path, rows: Rows, wanted: Key, timed: Timed) -> LatencyTable:
    """The file's table, after the device has said how long its fastest subnet takes."""
    table = parsed(path, rows, wanted)
    expected, subnet = table.cost.extreme(largest=False)
    _, (timing,) = timed([], [subnet])
    if not 1 / ANOTHER_UNIT <= timing.ms / expected <= ANOTHER_UNIT:
        raise Fault(
            f"{path}: says ms, but a subnet of {expected:.4g} ms by the table took {timing.ms:.4g} ms here just now; "
            f"it has another unit, or this device was busy when one of the two was measured"
        )
    return table
