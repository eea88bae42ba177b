"""Every option of a search, checked: a frozen model whose fields are the options of ``search.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from engine.config import RunConfig, TrainConfig

# Of the options that a search shares with a training, those that are its own: a subnet has a plain YAML, which has no
# sizes any more, other weights or none, and a folder for itself.
SEARCHED = ("cfg", "dialect", "cfg_scale", "weights", "epochs", "name", "exist_ok")


class SearchConfig(RunConfig):
    """What `search.run.search` needs to know. What it shares with a training run is called as there."""

    resume: Path | None = Field(default=None, description="folder of a search to go on with")
    supernet: Literal["shared", "independent", "merge"] = Field(
        default="shared", description="one set of weights, a block an option, or one set that runs as a mixture"
    )
    sandwich: bool = Field(
        default=False, description="a step trains the largest subnet, a random one and the smallest; needs shared"
    )
    norms: Literal["act", "shared", "k_act"] = Field(
        default="act",
        description="batch norms of a shared supernet: one an activation, one for all, or one a kernel and activation",
    )
    gates: Literal["full", "two"] = Field(
        default="full", description="options that run in a step of alphas: all, or two that are drawn (ProxylessNAS)"
    )
    objective: Literal["hinge", "proxyless", "fbnet"] = Field(
        default="hinge", description="how a budget moves alphas: only above it, or by the formulas of those papers"
    )
    budget: tuple[str, ...] = Field(default=(), description="macs=900M, params=2.5M or latency_ms=12; may be repeated")
    runtime: Literal["torch", "onnxruntime"] = Field(default="torch", description="what latencies are measured with")
    latency_table: Path | None = Field(
        default=None, description="latency.json of an earlier search of this space, or timings.json of another device"
    )
    latency_device: str = Field(
        default="", description="the other device that --latency-table is of, as that file names it"
    )
    export_blocks: Path | None = Field(
        default=None, description="folder for what another device has to time; nothing is searched then"
    )
    project: Path = Field(default=Path("runs/search"), description="folder of the runs")
    candidates: int = Field(default=24, ge=1, description="subnets that are judged, at most")
    prune: float = Field(
        default=0.0, ge=0, lt=1, description="part of the judging images after which the surely beaten are given up"
    )
    storage: str = Field(
        default="",
        description="where judged subnets are kept and shared: a journal file, by default in the run's folder, or "
        "postgresql+psycopg://user@host/database",
    )
    worker: Path | None = Field(
        default=None, description="folder of a search to help with its judging, from any machine that has the folder"
    )
    trials: int | None = Field(default=None, ge=1, description="subnets that this process judges, at most")
    timeout: float | None = Field(
        default=None, gt=0, description="seconds of judging, after which this process begins no other subnet"
    )
    calibration: int = Field(default=128, ge=1, description="training images for a subnet's batch-norm statistics")
    arch_every: int = Field(default=5, ge=1, description="weight steps to one step of the architecture parameters")
    arch_warmup: float = Field(default=0.3, ge=0, lt=1, description="part of the search before alphas move")
    arch_lr: float | None = Field(
        default=None, gt=0, description="learning rate of alphas; default 1.5 / steps, 0.001 to 0.05"
    )
    tango: bool = Field(
        default=False,
        description="the reference system's settings and files, without its bugs; needs --supernet independent",
    )
    retrain: int = Field(default=0, ge=0, description="subnets of the front to train on at once, the best first")
    retrain_epochs: int | None = Field(
        default=None, ge=1, description="epochs of that; default as many as the search's"
    )
    export: Literal["off", "onnx", "openvino", "torch"] = Field(
        default="off", description="also write the best as a file that runs without this program, retrained if any is"
    )


def training_of(config: SearchConfig, **own: Any) -> TrainConfig:
    """The training of a subnet, with the options that its search was given but for those in `SEARCHED`; and `own`."""
    shared = [name for name in RunConfig.model_fields if name in config.model_fields_set and name not in SEARCHED]
    return TrainConfig(**{name: getattr(config, name) for name in shared}, **own, exist_ok=True, noplots=True)
