"""Times open rows alone and subnets whole on this device, all in turns; subnets share the modules of equal rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from engine.latency import deployed, image_of, inputs_of, joined, onnx_rows, onnx_run, torch_row_run
from engine.timing import CPU, Run, Timing, interleaved
from models.cost import count_params
from models.graph import Graph, resolve
from models.network import Network
from search.space import Architecture

SECONDS = 120.0  # of timing, each time
MOST_HELD, FEWEST_TOGETHER = 400_000_000, 8  # parameters of all subnets that are in onnxruntime at a time; subnets

Timed = Callable[[Sequence[tuple[int, Mapping[str, Any]]], Sequence[Architecture]], tuple[list[Timing], list[Timing]]]
"""A device: times open rows alone with their choices picked, and whole subnets, all taking turns with each other."""


def device_timer(
    graph: Graph,
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    progress: bool = True,
    seconds: float = SECONDS,
) -> Timed:
    """Times rows and subnets of an open graph here. Subnets share the modules of the rows that they have in common.

    What does not fit into memory together is timed in groups, by lot, of as many as do.
    """
    layers: dict[tuple[int, Architecture], nn.Module] = {}  # fused rows, by row and the picks of its choices
    written: dict[tuple[int, Architecture], Any] = {}  # the same as ONNX models
    frames: list[Network] = []  # one fused network, the rows of which are replaced by those of a subnet
    place = device if runtime == "torch" else CPU
    rng = np.random.default_rng(0)

    def prepare(subnets: Sequence[Architecture]) -> None:
        built = add_layers(graph, subnets, place, layers, progress)
        frames[:] = frames or ([built] if built else [])
        if runtime == "onnxruntime":
            missing = [name for name in layers if name not in written]
            rows = [(graph.nodes[name[0]], layers[name]) for name in missing]
            written.update(zip(missing, onnx_rows(rows, imgsz, progress), strict=True))

    def row_run(name: tuple[int, Architecture]) -> Run:
        node = graph.nodes[name[0]]
        if runtime == "torch":
            return torch_row_run(node, layers[name], imgsz, device)
        return onnx_run(written[name], inputs_of(node, imgsz), device)

    def subnet_run(subnet: Architecture) -> Run:
        names = row_names(graph, subnet)
        if runtime == "onnxruntime":
            return onnx_run(joined(graph, [written[name] for name in names], imgsz), [image_of(imgsz, CPU)], device)
        (frame,) = frames
        modules, image = nn.ModuleList([layers[name] for name in names]), image_of(imgsz, device)

        def run() -> object:
            frame.layers = modules
            return frame.predict(image)

        return run

    def timed(
        rows: Sequence[tuple[int, Mapping[str, Any]]], subnets: Sequence[Architecture]
    ) -> tuple[list[Timing], list[Timing]]:
        prepare([*covering(graph, rows), *subnets])
        makers = [partial(row_run, (index, Architecture(picks))) for index, picks in rows]
        makers += [partial(subnet_run, subnet) for subnet in subnets]
        order = rng.permutation(len(makers))
        # onnxruntime keeps a subnet's weights for itself, as written and packed: not all of a large model fit at once
        together = len(makers) if runtime == "torch" else max(FEWEST_TOGETHER, MOST_HELD // count_params(frames[0]))
        found: dict[int, Timing] = {}
        with tqdm(total=len(makers), desc="loading", unit="run", leave=False, delay=2, disable=not progress) as bar:
            for start in range(0, len(makers), together):
                group = order[start : start + together]
                runs = []
                for index in group:
                    runs.append(makers[index]())
                    bar.update()
                limit = seconds * len(group) / len(makers)
                timings = interleaved(runs, device=device, seconds=limit, progress=progress)
                found.update(zip(group.tolist(), timings, strict=True))
        in_order = [found[index] for index in range(len(makers))]
        return in_order[: len(rows)], in_order[len(rows) :]

    return timed


def row_names(graph: Graph, subnet: Architecture) -> list[tuple[int, Architecture]]:
    """Every row's index with the picks of its choices: equal rows of subnets have equal names."""
    picks = [{choice.name: subnet.picks[choice.name] for choice in node.choices} for node in graph.nodes]
    return [(index, Architecture(of_row)) for index, of_row in enumerate(picks)]


def add_layers(
    graph: Graph,
    subnets: Sequence[Architecture],
    place: torch.device,
    layers: dict[tuple[int, Architecture], nn.Module],
    progress: bool = True,
) -> Network | None:
    """Adds the fused rows of subnets to `layers`, by their `row_names`. A network that was built for it, if any was."""
    frame = None
    for one in tqdm(subnets, "building", unit="subnet", leave=False, delay=2, disable=not progress):
        names = row_names(graph, one)
        if all(name in layers for name in names):
            continue
        network = deployed(Network(resolve(graph.spec.freeze(one.picks))), place)
        frame = frame or network
        for name, layer in zip(names, network.layers, strict=True):
            layers.setdefault(name, layer)
    return frame


def covering(graph: Graph, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Architecture]:
    """A few subnets in which every one of these rows with its picks occurs."""
    first = {choice.name: choice.options[0] for choice in graph.spec.choices}
    queues: dict[int, list[Mapping[str, Any]]] = {}
    for index, picks in rows:
        queues.setdefault(index, []).append(picks)
    count = max(map(len, queues.values()), default=0)
    found = []
    for turn in range(count):
        picks = dict(first)
        for queue in queues.values():
            picks |= queue[turn % len(queue)]
        found.append(Architecture(picks))
    return found
