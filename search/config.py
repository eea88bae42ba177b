"""Every option of a search, checked: a frozen model whose fields are the options of ``search.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.config import TrainConfig


class SearchConfig(BaseModel):
    """What `search.run.search` needs to know. What it shares with a training run is called as there."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cfg: Path | None = Field(None, description="model YAML with open choices")
    data: Path | None = Field(None, description="data set YAML")
    supernet: Literal["shared", "independent"] = Field("shared", description="one set of weights, or a block an option")
    weights: Path | None = Field(None, description="plain checkpoint to start trunk and centre kernels from")
    budget: tuple[str, ...] = Field((), description="macs=900M, params=2.5M or latency_ms=12; may be repeated")
    epochs: int = Field(100, ge=1, description="times that every image for the weights is seen")
    batch_size: int = Field(16, ge=1, description="images a step")
    imgsz: int = Field(640, ge=32, description="side of the square that images are letterboxed into, pixels")
    device: str = Field("", description="cpu, 0 or cuda:0; empty takes the first GPU, or the CPU")
    project: Path = Field(Path("runs/search"), description="folder of the runs")
    name: str = Field("exp", min_length=1, description="folder of this run; exp2, exp3, ... where it exists")
    exist_ok: bool = Field(False, description="take the folder even where it exists")
    seed: int = Field(0, ge=0, description="everything that is drawn by chance comes from it")
    workers: int = Field(0, ge=0, description="processes that prepare images; 0 prepares them in this one")
    amp: Literal["auto", "off", "bf16", "fp16"] = Field("auto", description="numbers of the forward pass")
    lr0: float | None = Field(None, gt=0, description="largest learning rate of the weights")
    mosaic: float = Field(1.0, ge=0, le=1, description="probability of joining four images")

    candidates: int = Field(24, ge=1, description="subnets judged, at most")
    calibration: int = Field(128, ge=1, description="training images for a subnet's batch-norm statistics")
    arch_every: int = Field(5, ge=1, description="weight steps to one step of the architecture parameters")
    arch_warmup: float = Field(0.3, ge=0, lt=1, description="part of the search before alphas move")
    arch_lr: float | None = Field(None, gt=0, description="learning rate of alphas; default 1.5 / steps, 0.001 to 0.05")

    def training(self) -> TrainConfig:
        """The same options as those of a training run."""
        shared = {name: getattr(self, name) for name in TrainConfig.model_fields if name in SearchConfig.model_fields}
        return TrainConfig(**shared)
