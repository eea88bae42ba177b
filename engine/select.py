"""Which levels of a pyramid explain badly, and the same network with attention branches on them: FAL (docs/fal.md).

`attend` is the whole way, from a trained network and what its levels' explanations measured to a model file and a
checkpoint that training starts from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from data.structures import Fault
from engine.runs import write_text
from models.checkpoint import Checkpoint, save_checkpoint
from models.graph import resolve
from models.insert import branches_on, insert_after, moved_state
from models.levels import levels
from models.network import build
from models.parse import dump

THRESHOLD = "threshold"  # the rule's name
HALF_STD = 0.5  # how many standard deviations from the mean of all levels is weak


class Explained(Protocol):
    """How well a level explains, both in per cent: average drop, increase in confidence (docs/explain.md)."""

    @property
    def ad(self) -> float: ...

    @property
    def iic(self) -> float: ...


Rule = int | str  # how many levels, or THRESHOLD


def read_rule(text: str) -> Rule:
    """What ``--select`` was given: how many levels, or the name of the rule. Raises `Fault` for anything else."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text == THRESHOLD:
        return THRESHOLD
    raise Fault(f"--select {text}: how many levels get a branch, such as 2, or {THRESHOLD}, would be right")


def weak_levels(metrics: Sequence[Explained], rule: Rule) -> list[int]:
    """The levels that explain worst, by their place in `metrics` (fine to coarse), in that order.

    A number K takes the K levels of the smallest increase in confidence (IIC); of levels that are equal in it those
    with the larger average drop (AD), then the finer ones. ``threshold`` takes every level with
    ``IIC < mean - std / 2`` or ``AD > mean + std / 2``, mean and standard deviation (divided by the number of levels)
    over all levels. Raises `Fault` for more levels than there are, for one whose metrics are no numbers, and where the
    rule finds none: then the levels are alike.
    """
    for level, one in enumerate(metrics):
        if not (math.isfinite(one.ad) and math.isfinite(one.iic)):
            raise Fault(f"level {level}: AD {one.ad:g} and IIC {one.iic:g} are no measurement; no level can be chosen")
    if isinstance(rule, int):
        if not 1 <= rule <= len(metrics):
            raise Fault(f"--select {rule}: there are {len(metrics)} levels, so 1 to {len(metrics)} can be chosen")
        worst = sorted(range(len(metrics)), key=lambda level: (metrics[level].iic, -metrics[level].ad))
        return sorted(worst[:rule])
    if rule != THRESHOLD:
        raise Fault(f"--select {rule}: how many levels, or {THRESHOLD}, would be right")
    ad, iic = (np.array([getattr(one, name) for one in metrics], dtype=np.float64) for name in ("ad", "iic"))
    weak = (iic < iic.mean() - HALF_STD * iic.std()) | (ad > ad.mean() + HALF_STD * ad.std())
    if not weak.any():
        raise Fault(f"--select {THRESHOLD}: no level is weaker than the others; --select K takes the K weakest")
    return [int(level) for level in np.flatnonzero(weak)]


def attend(
    checkpoint: Checkpoint,
    metrics: Sequence[Explained],
    rule: Rule,
    folder: Path,
    *,
    seed: int = 0,
    **arguments: Any,
) -> tuple[Path, Path, list[int]]:
    """Writes ``fal.yaml`` and ``fal.pt`` into `folder`: the network with a branch on each weak level.

    `metrics` are those of the network's `models.levels.levels`, in their order. The checkpoint holds all weights of the
    trained network, under the names that they have behind the inserted rows, and branches that `seed` started;
    ``train.py --weights fal.pt`` goes on from it. `arguments` are more of AttentionBranch's. Returns both paths and the
    levels, by their place in `metrics`. Raises `Fault` as `weak_levels` does, for open choices, and for a level that
    has a branch already.
    """
    weak = weak_levels(metrics, rule)
    yaml, weights = attend_on(checkpoint, weak, folder, seed=seed, **arguments)
    return yaml, weights, weak


def attend_on(
    checkpoint: Checkpoint, weak: Sequence[int], folder: Path, *, seed: int = 0, **arguments: Any
) -> tuple[Path, Path]:
    """As `attend`, with the levels named: their places in `models.levels.levels`."""
    graph = resolve(checkpoint.spec)
    there = levels(graph)
    new = branches_on(graph, {there[level].name: there[level].row for level in weak}, **arguments)
    called = ", ".join(there[level].name for level in weak)
    spec = insert_after(replace(checkpoint.spec, name=f"{checkpoint.spec.name}-fal"), new)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(spec)
    kept = moved_state(checkpoint.state, len(graph.nodes), new)
    fresh = {name: tensor for name, tensor in network.state_dict().items() if name not in kept}
    network.load_state_dict({**kept, **fresh})
    folder.mkdir(parents=True, exist_ok=True)
    yaml, weights = folder / "fal.yaml", folder / "fal.pt"
    write_text(yaml, dump(spec, f"{checkpoint.path} with attention branches on {called}"))
    save_checkpoint(weights, network, checkpoint.names, imgsz=checkpoint.imgsz, attended=list(new))
    return yaml, weights
