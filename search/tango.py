"""The reference system's search: ML-TANGO's neck search (``autonn/neck_nas/neckNAS/ku``), its settings and its files.

Kept: whole blocks side by side, in its order where a row is an ``MBottleneckCSP2`` (3x3 with relu, leaky and mish, then
5x5); alphas from N(0, .001^2), moved by Adam with a learning rate of 1e-4, betas 0 and .999 and no decay; both steps
draw their options by softmax(alpha); after a warm-up of the larger of three epochs and 1,000 steps, a step of alphas
before every step of the weights; the largest alpha is the result; SGD, whose learning rate ends at a fifth.

Left out are its faults: candidates get gradients; alphas move on a part of the training images, not on the validation
set; options that are only looked at change no statistics; a run whose alphas would never move ends before it begins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.structures import Fault
from engine.config import option_name
from engine.runs import write_text
from models.supernet import Supernet
from search.config import SearchConfig
from search.sampling import drawn_options

SPREAD = 1e-3  # standard deviation of the first alphas
WARMUP_EPOCHS, WARMUP_STEPS = 3, 1_000  # the larger of both is the warm-up
FIRST_ALPHAS, WEIGHT_STEP = 13, 14  # purposes of random streams
OVERRIDES: dict[str, Any] = {
    "gates": "full",
    "objective": "hinge",  # without a budget and without exploration this is the plain loss
    "arch_every": 1,
    "arch_lr": 1e-4,
    "optimizer": "SGD",
    "lrf": 0.2,
}


def settings(config: SearchConfig) -> SearchConfig:
    """The config with the reference's settings. Raises `Fault` where another value was asked for, or ``shared``."""
    faults = []
    if config.supernet != "independent":
        faults.append(
            f"--supernet {config.supernet}: --tango holds whole blocks; --supernet independent would be right"
        )
    for name, value in OVERRIDES.items():
        given = getattr(config, name)
        if name in config.model_fields_set and given != value:
            faults.append(f"{option_name(name)} {given}: --tango sets {value}; leave one of the two out")
    if faults:
        raise Fault(*faults)
    return config.model_copy(update=OVERRIDES)


def warmup_steps(epochs: int, steps_per_epoch: int) -> int:
    """The last weight step (from 0) with no step of alphas before it. Raises `Fault` where none would follow."""
    warmup = max(WARMUP_EPOCHS * steps_per_epoch, WARMUP_STEPS)
    needed = -(-(warmup + 2) // steps_per_epoch)  # rounded up
    if epochs < needed:
        raise Fault(
            f"--epochs {epochs}: --tango moves alphas after the larger of {WARMUP_EPOCHS} epochs and {WARMUP_STEPS:,} "
            f"steps, which with {steps_per_epoch} steps an epoch is never; {needed} epochs are needed"
        )
    return warmup


@torch.no_grad()
def initial_alphas(supernet: Supernet, seed: int) -> None:
    """Every alpha drawn from N(0, .001^2)."""
    rng = np.random.default_rng((seed, FIRST_ALPHAS))
    for alpha in supernet.alphas:
        alpha.copy_(torch.from_numpy(rng.normal(0, SPREAD, len(alpha))))


def sample(supernet: Supernet, seed: int, step: int) -> dict[str, Any]:
    """The options that a weight step runs: drawn by softmax(alpha), not fairly."""
    rng = np.random.default_rng((seed, WEIGHT_STEP, step))
    return drawn_options(supernet.decisions, supernet.probabilities(), rng)


def write_epoch(folder: Path, supernet: Supernet, epoch: int) -> None:
    """Adds a line to ``probs_history.txt`` and ``export_history.txt``: how alphas stand after `epoch` epochs, 0 for the
    first ones. Lines of this epoch and later ones, left by a run that was stopped, go.
    """
    probabilities = [p.detach().cpu().tolist() for p in supernet.probabilities().values()]
    shown: dict[str, list[Any]] = {"probs_history.txt": probabilities, "export_history.txt": chosen(supernet)}
    for name, values in shown.items():
        path = folder / name
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if int(line.split("'")[1]) < epoch]
        write_text(path, "".join(kept) + f"{ {str(epoch): dict(zip(labels(supernet), values, strict=True))} }\n")


def write_final(folder: Path, supernet: Supernet) -> None:
    """``final_arch.json``: the candidate of the largest alpha in every row, ``{"m_16": 3, ...}``."""
    write_text(folder / "final_arch.json", json.dumps(dict(zip(labels(supernet), chosen(supernet), strict=True))))


def labels(supernet: Supernet) -> list[str]:
    """``m_16`` for the decision of row 16."""
    return [f"m_{node.index}" for node in supernet.network.graph.nodes if node.choices]


def chosen(supernet: Supernet) -> list[int]:
    """The place of the largest alpha of every decision."""
    return [int(alpha.argmax()) for alpha in supernet.alphas]
