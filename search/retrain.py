"""The best subnets of a front, trained on: what each was worth inherited, calibrated, fine-tuned and retrained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from data.config import DataSpec
from data.dataset import ImageSet
from engine.config import MOVABLE, TrainConfig
from engine.prepare import file_hash
from engine.runs import append_csv, read_csv, table, write_text
from engine.tasks import Task, evaluate
from engine.train import Best, train
from models.checkpoint import load_checkpoint, restore
from models.network import Network
from search.config import SearchConfig, training_of
from search.front import Judged

FINE_TUNING = 5  # a fine-tuning takes this part of the retraining's epochs: a fifth
STATES = ("inherited", "calibrated", "fine_tuned", "retrained")
BEGUN = "begun.json"  # in the folder of a training: what it began with
# Options of a training that do not decide what comes out of it: where things lie, and what else it writes.
WHERE = MOVABLE | {"project", "name", "exist_ok", "cache", "noplots", "save_period"}
MODEL = {"cfg", "dialect", "cfg_scale", "trust_ops", "weights"}  # its model, of which a path says too little


def retrain(
    task: Task,
    chosen: Sequence[Judged],
    inherited: Callable[[Judged], Network],
    folder: Path,
    config: SearchConfig,
    data: DataSpec,
    val_images: ImageSet,
    device: torch.device,
    progress: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Four scores on the validation split for each of the `chosen`, in ``retrain.csv``; the runs lie in ``retrain/``.

    ``inherited(subnet)`` is the network with the statistics that the supernet's training left behind, calibrated is
    the checkpoint in ``subnets/``. From there a fine-tuning of a fifth of the epochs and a retraining of all of them
    start anew each, with the options of the search. Both are measured after their last epoch, so that no epoch is
    chosen on the images that report. Subnets that ``retrain.csv`` has already are not trained again, and a training
    that was stopped goes on.
    """
    path = folder / "retrain.csv"
    epochs = config.retrain_epochs or config.epochs
    done = {row["subnet"] for row in read_csv(path)}
    supernet = file_hash(folder / "last.pt")  # of its weights are those of subnets/, which are written anew each time

    def measured(network: Network) -> Any:
        return evaluate(
            network, val_images, names=data.names, batch_size=config.batch_size, device=device, progress=progress
        )

    def trained(number: int, length: int, what: str) -> Any:
        weights = folder / "subnets" / f"{number}.pt"
        say(f"\nsubnet {number}, {what}: {length} epochs from {weights}")
        wanted = continued(config, weights, length, folder / "retrain", f"{number}-{what}")
        run = trained_once(wanted, {"supernet": supernet, **conditions(wanted)}, progress)
        state = load_checkpoint(run / "last.pt").training
        assert state is not None
        return Best.restore(state["best"], task.metrics).metrics  # of the last epoch, the only one that is measured

    for one in chosen:
        if str(one.number) in done:
            continue
        calibrated = restore(load_checkpoint(folder / "subnets" / f"{one.number}.pt"))
        found = {
            "inherited": measured(inherited(one).to(device)),
            "calibrated": measured(calibrated.to(device)),
            "fine_tuned": trained(one.number, max(1, epochs // FINE_TUNING), "fine-tuned"),
            "retrained": trained(one.number, epochs, "retrained"),
        }
        score, second = task.columns[:2]
        row: dict[str, Any] = {"subnet": one.number} | {state: getattr(found[state], score) for state in STATES}
        append_csv(path, row | {f"{state}_{second}": _or_none(getattr(found[state], second)) for state in STATES})
    return [
        {"subnet": int(row.pop("subnet"))} | {name: float(value) for name, value in row.items() if value}
        for row in read_csv(path)
    ]


def trained_on(folder: Path, one: Judged) -> Path:
    """The checkpoint of a subnet that `retrain` has trained."""
    return folder / "retrain" / f"{one.number}-retrained" / "best.pt"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def continued(config: SearchConfig, weights: Path, epochs: int, project: Path, name: str) -> TrainConfig:
    """The training of a subnet with the options that its search had; its YAML is in `weights`."""
    return training_of(config, weights=weights, epochs=epochs, project=project, name=name, noval=True)


def conditions(config: TrainConfig) -> dict[str, Any]:
    """What decides what comes out of a training, but for its model and images: every option with its value, as JSON."""
    options = config.model_dump(mode="json", exclude=WHERE | MODEL | {"teacher"})
    return {**options, "teacher": file_hash(config.teacher)}


def trained_once(config: TrainConfig, about: Mapping[str, Any], progress: bool) -> Path:
    """The folder of the training that `config` describes, with all of its epochs done, now or before.

    One that was stopped goes on from its ``last.pt``, if it began with the same `about`; otherwise it begins anew.
    """
    run = config.project / config.name
    begun, last = run / BEGUN, run / "last.pt"
    if not (last.is_file() and begun.is_file() and json.loads(begun.read_text(encoding="utf-8")) == about):
        run.mkdir(parents=True, exist_ok=True)
        last.unlink(missing_ok=True)  # first of all: it is not what the file beside it is about to say
        write_text(begun, json.dumps(about) + "\n")
        train(config, progress)
    elif epochs_done(last) < config.epochs:
        train(TrainConfig(resume=run, device=config.device, data=config.data, workers=config.workers), progress)
    return run


def epochs_done(last: Path) -> int:
    """The epochs that a checkpoint has behind it; 0 where it holds weights only."""
    state = load_checkpoint(last).training
    return int(state["epoch"]) if state else 0


def retrain_table(rows: Sequence[dict[str, Any]]) -> str:
    """The scores on the validation split, one line a subnet."""
    return table([(str(row["subnet"]), *(row[state] for state in STATES)) for row in rows], ("subnet", *STATES))
