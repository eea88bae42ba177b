"""Every option of a search, checked: a frozen model whose fields are the options of ``search.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from engine.config import RunConfig


class SearchConfig(RunConfig):
    """What `search.run.search` needs to know. What it shares with a training run is called as there."""

    supernet: Literal["shared", "independent"] = Field(
        default="shared", description="one set of weights, or a block an option"
    )
    budget: tuple[str, ...] = Field(default=(), description="macs=900M, params=2.5M or latency_ms=12; may be repeated")
    project: Path = Field(default=Path("runs/search"), description="folder of the runs")
    candidates: int = Field(default=24, ge=1, description="subnets judged, at most")
    calibration: int = Field(default=128, ge=1, description="training images for a subnet's batch-norm statistics")
    arch_every: int = Field(default=5, ge=1, description="weight steps to one step of the architecture parameters")
    arch_warmup: float = Field(default=0.3, ge=0, lt=1, description="part of the search before alphas move")
    arch_lr: float | None = Field(
        default=None, gt=0, description="learning rate of alphas; default 1.5 / steps, 0.001 to 0.05"
    )
