"""Latency on another device: what it has to time, as a folder for it, and the table made of what comes back.

The folder holds every open row with each of its options as an ONNX file, some whole subnets, and a script that times
them without any of our code (`search/time_blocks.py`). All files share one file of weights. What comes back answers
the same questions that `search.tabulate` puts to this device, so the table is made and checked as one of here.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

from data.structures import Fault
from engine.export import write_onnx
from engine.latency import PRECISION, check_runtime, device_name, joined, onnx_rows
from engine.runs import write_text
from engine.timing import CPU, Timing
from models.cost import network_costs
from models.graph import Graph, combinations, resolve
from search.device_timer import Timed, add_layers, covering, row_names
from search.latency import SANE_MS, UNIT, Key, LatencyTable, parsed
from search.space import Architecture, SearchSpace
from search.tabulate import MOST_ROWS, key_of, open_rows, split, tabulate

BLOCKS, SCRIPT, WEIGHTS, TIMINGS = "blocks.json", "time_blocks.py", "weights.bin", "timings.json"
OUTSIDE = 1024  # bytes of a tensor, from which on it lies in the file of weights
SANE_RATE = (1e6, 1e16)  # multiply-adds a second: a microcontroller, and more than any accelerator has
TIMED = (0.02, 2.5)  # what medians times their counts are of the time that passed; in seconds, a thousandth of it


def export_blocks(graph: Graph, imgsz: int, folder: Path, seed: int = 0, progress: bool = True) -> list[Path]:
    """Writes the folder for another device. Raises a Fault where one is there already, or ONNX is not installed."""
    check_runtime("onnxruntime", CPU)
    if folder.exists() and any(folder.iterdir()):
        raise Fault(f"--export-blocks {folder}: is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    space, rows = SearchSpace.of(graph.spec), open_rows(graph)
    held_out, others = split(space, rows, seed)
    alone = [(index, picks) for index, choices in rows for picks in combinations(choices)]
    alone = alone if len(alone) <= MOST_ROWS else []
    subnets = [*held_out, *others]
    layers: dict[tuple[int, Architecture], nn.Module] = {}
    add_layers(graph, [*covering(graph, alone), *subnets], CPU, layers, progress)
    written = onnx_rows([(graph.nodes[name[0]], layer) for name, layer in layers.items()], imgsz, progress)
    models = dict(zip(layers, written, strict=True))
    with (folder / WEIGHTS).open("wb") as file:
        for model in models.values():
            move_weights(model, file)

    content: dict[str, Any] = {"what": "blocks", "space": space.hash, "seed": seed, "imgsz": imgsz, "batch": 1}
    content |= {"precision": PRECISION, "rows": [], "subnets": []}
    for index, picks in alone:
        name = row_file(graph, index, picks)
        write_onnx(folder / name, models[(index, Architecture(picks))], {})
        content["rows"].append({"file": name, "row": index, "picks": dict(picks)})
    for place, one in enumerate(tqdm(subnets, "writing subnets", leave=False, delay=2, disable=not progress)):
        name = f"subnet{space.index(one)}.onnx"
        write_onnx(folder / name, joined(graph, [models[row] for row in row_names(graph, one)], imgsz), {})
        content["subnets"].append({"file": name, "number": space.index(one), "twice": place < len(held_out)})
    write_text(folder / BLOCKS, json.dumps(content, indent=1) + "\n")
    shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    return [folder / name for name in (BLOCKS, SCRIPT, WEIGHTS)]


def row_file(graph: Graph, index: int, picks: Mapping[str, Any]) -> str:
    return f"row{index}-{combinations(graph.nodes[index].choices).index(dict(picks))}.onnx"


def move_weights(model: Any, file: IO[bytes]) -> None:
    """The large tensors of a model go to the end of the file, and the model keeps where they are."""
    from onnx import numpy_helper
    from onnx.external_data_helper import set_external_data

    for value in model.graph.initializer:
        array = numpy_helper.to_array(value)
        if array.nbytes < OUTSIDE:
            continue
        value.CopyFrom(numpy_helper.from_array(array, value.name))
        set_external_data(value, WEIGHTS, offset=file.tell(), length=len(value.raw_data))
        file.write(value.raw_data)
        value.ClearField("raw_data")


def foreign_table(path: Path, graph: Graph, imgsz: int, *, named: str, runtime: str) -> LatencyTable:
    """The table of another device, which the user has named: of a ``timings.json`` that its script wrote, or of a
    ``latency.json`` that a search wrote there.

    Raises a Fault for a file that was measured with anything else than asked for here, has another unit, lacks
    something, or cannot be in milliseconds.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        key = Key(**content["key"])
    except (ValueError, KeyError, TypeError) as problem:
        said = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise Fault(f"{path}: neither {TIMINGS} of {SCRIPT} nor latency.json of a search; {said}") from None
    here = key_of(graph, imgsz, torch.device("cpu"), runtime)
    device = key.device if named in (key.device, of_threads(key)) else named
    wanted = replace(here, device=device, threads=key.threads)
    if not isinstance(key.threads, int) or key.threads < 0:
        raise Fault(f"{path}: its number of threads is {key.threads!r}")
    if content.get("what") != "timings":
        return parsed(path, open_rows(graph), wanted)
    faults = [] if content.get("unit") == UNIT else [f"{path}: its unit is {content.get('unit')!r}, wanted {UNIT!r}"]
    for name, value in asdict(wanted).items():
        found = of_threads(key) if name == "device" else getattr(key, name)
        if getattr(key, name) != value:
            faults.append(f"{path}: was measured with {name} {found!r}, wanted {value!r}")
    if faults:
        raise Fault(*faults)
    timed = answers(path, content, graph)
    return tabulate(SearchSpace.of(graph.spec), open_rows(graph), timed, key, int(content["seed"]))


def of_threads(key: Key) -> str:
    return f"{key.device}, {key.threads} threads"


def check_device(path: Path, named: str, device: torch.device) -> None:
    """Raises a Fault for a table of another device that the user has not named: no device's latencies are another's."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        other, timings = content["key"]["device"], content.get("what") == "timings"
    except (ValueError, KeyError, TypeError):
        return  # is told where it is read
    if not named and (timings or other != device_name(device)):
        raise Fault(
            f"{path}: was measured on {other!r}; --latency-device {other!r} takes it for networks that will run there"
        )


def answers(path: Path, content: Mapping[str, Any], graph: Graph) -> Timed:
    """The device, asked by `tabulate`: its answers are in the file. A subnet's second time is another measurement."""
    space = SearchSpace.of(graph.spec)
    try:
        first = {name: timing_of(path, name, one) for name, one in content["timings"].items()}
        again = {name: timing_of(path, name, one) for name, one in content["again"].items()}
        passed, _ = float(content["timed_s"]), int(content["seed"])
    except Fault:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        said = f"{problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise Fault(f"{path}: is no whole {TIMINGS}; {said}") from None
    told = sum(one.ms * one.count for one in [*first.values(), *again.values()]) / 1000
    if not TIMED[0] * passed <= told <= TIMED[1] * passed:
        raise Fault(
            f"{path}: says {UNIT}, and its runs add up to {told:.3g} s where {passed:.3g} s passed; "
            f"the numbers are in another unit"
        )

    def timed(
        rows: Sequence[tuple[int, Mapping[str, Any]]], subnets: Sequence[Architecture]
    ) -> tuple[list[Timing], list[Timing]]:
        asked: Counter[str] = Counter()
        found = []
        names = [row_file(graph, index, picks) for index, picks in rows]
        for name in [*names, *(f"subnet{space.index(one)}.onnx" for one in subnets)]:
            asked[name] += 1
            one = again.get(name) if asked[name] > 1 else first.get(name)
            if one is None:
                raise Fault(f"{path}: has no time of {name}; it was measured with other blocks")
            found.append(one)
        for subnet, one in zip(subnets, found[len(names) :], strict=True):
            check_rate(path, graph, subnet, one, content["key"]["imgsz"])
        return found[: len(names)], found[len(names) :]

    return timed


def timing_of(path: Path, name: str, one: Mapping[str, Any]) -> Timing:
    timing = Timing(float(one["ms"]), float(one["iqr"]), int(one["count"]))
    if not (math.isfinite(timing.ms) and timing.ms > 0):
        raise Fault(f"{path}: {name} takes {timing.ms} ms, wanted a number over 0")
    return timing


def check_rate(path: Path, graph: Graph, subnet: Architecture, timing: Timing, imgsz: int) -> None:
    """Raises a Fault for a whole network in a time that no device takes."""
    macs = sum(cost.macs for cost in network_costs(resolve(graph.spec.freeze(subnet.picks)), imgsz))
    rate = macs / timing.ms * 1000
    if not (SANE_MS[0] <= timing.ms <= SANE_MS[1] and SANE_RATE[0] <= rate <= SANE_RATE[1]):
        raise Fault(
            f"{path}: says ms, and a subnet of {macs / 1e6:.0f}M multiply-adds takes {timing.ms:.3g}; "
            "no device does that"
        )
