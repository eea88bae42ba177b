"""A search that was killed, stopped or given something else to go on with: the same bit for bit, or refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import Killed, draw_data, kill_before, tensors
from torch import Tensor

from data.augment import Augment
from data.config import read_data_spec
from data.dataset import ImageSet
from data.loader import batch_at
from data.structures import Fault, Sample
from engine.config import save_config, train_config
from engine.distributed import start, together
from engine.prepare import read_labelled
from engine.runs import read_csv
from engine.train import reopen_training
from models.checkpoint import load_checkpoint
from models.graph import resolve
from models.parse import parse_text
from models.supernet import Supernet
from search import train as training
from search.config import SearchConfig
from search.costs import CostTable, cost_tables, parse_budget
from search.train import check_unchanged, costs_hash, images_hash, reopen, train_supernet

ROOT = Path(__file__).resolve().parents[1]
SPACE = """
nc: 2
anchors: [[12, 12, 24, 24]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, MBottleneckCSP2, [8]]
  - [-1, 1, Conv, [8, {kernel: {choice: [3, 5]}}]]
  - [-1, 1, Detect, [nc, anchors]]
"""
KINDS = ("shared", "independent")


@dataclass(frozen=True)
class Task:
    """All that `train_supernet` is given, from the same files every time but with weights of chance."""

    supernet: Supernet
    weight_images: ImageSet
    judge_images: ImageSet
    tables: dict[str, CostTable]
    config: SearchConfig

    def run(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> Supernet:
        world = start("cpu")
        with together(world):
            if world.is_first:  # which removes half-written files of others as it begins
                folder.mkdir(parents=True, exist_ok=True)
                save_config(folder / "config.yaml", self.config)
        budgets = [parse_budget(text) for text in self.config.budget]
        images = self.weight_images, self.judge_images
        train_supernet(self.supernet, *images, budgets, self.tables, self.config, folder, world, False, say)
        return self.supernet


def a_task(data: Path, kind: str, weights_seed: int = 0, **options: Any) -> Task:
    """A search of 4 epochs of 3 steps; alphas move before the steps 7, 9 and 11."""
    samples = read_labelled(read_data_spec(data), "train").samples
    torch.manual_seed(weights_seed)
    supernet = Supernet(parse_text(SPACE), kind)
    given = {"epochs": 4, "batch_size": 3, "imgsz": 64, "device": "cpu", "arch_every": 2, "supernet": kind}
    config = SearchConfig(**{**given, "data": data, "budget": ("macs=0.5M", "params=1k"), **options})  # type: ignore[arg-type]
    return Task(
        supernet,
        ImageSet(samples[:8], 64, Augment()),
        ImageSet(samples[8:], 64),
        cost_tables(resolve(supernet.spec), 64),
        config,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("images"), train=12)


@pytest.fixture(scope="module")
def wholes(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of two searches that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in KINDS:
        a_task(data, kind).run(folder / kind)
    return {kind: folder / kind for kind in KINDS}


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit the same weights, averages, alphas, prices, optimizers and history, but for the seconds."""
    left, right = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    a, b = ({**tensors(c.state, "state"), **tensors(c.training or {}, "training")} for c in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        if not name.endswith(".seconds"):
            same = torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else repr(a[name]) == repr(b[name])
            assert same, name
    assert (one / "alphas.csv").read_text() == (other / "alphas.csv").read_text()
    rows = [[{**row, "seconds": ""} for row in read_csv(folder / "results.csv")] for folder in (one, other)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


# ---- the same bit for bit


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_writes_down_what_it_did(kind: str, wholes: dict[str, Path]) -> None:
    rows = read_csv(wholes[kind] / "results.csv")
    assert list(rows[0]) == [
        *("epoch", "step", "loss", "box", "obj", "cls", "held_out", "lr", "seconds", "lambda_macs", "lambda_params")
    ]
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    assert [bool(row["held_out"]) for row in rows] == [False, False, True, True]
    assert float(rows[-1]["lambda_params"]) > float(rows[2]["lambda_params"]) > 1  # 1k parameters are exceeded
    alphas = read_csv(wholes[kind] / "alphas.csv")
    assert list(alphas[0]) == ["step", "choice", "option", "alpha", "probability"]
    assert {row["step"] for row in alphas} == {"3", "6", "9", "12"}
    moved = [float(row["alpha"]) for row in alphas if row["step"] == "12"]
    assert any(moved) and not any(float(row["alpha"]) for row in alphas if row["step"] == "6")
    state = load_checkpoint(wholes[kind] / "last.pt").training  # with weights_only=True
    assert state is not None and (state["epoch"], state["step"], state["threads"]) == (4, 12, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("lr_factor", 8),  # in the middle of epoch 3, after the first step of alphas
        ("alpha_rows", 3),  # epoch 3 is done and nothing of it is written
        ("save_checkpoint", 3),  # its tables are written, its last.pt is not
    ],
)
def test_a_killed_search_ends_as_if_it_had_not_been(
    name: str, call: int, kind: str, data: Path, wholes: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, name, call, training)
        a_task(data, kind).run(tmp_path)
    state = load_checkpoint(tmp_path / "last.pt").training
    assert state is not None and state["epoch"] == 2
    supernet = a_task(data, kind, weights_seed=9, resume=tmp_path).run(tmp_path)
    assert_same(wholes[kind], tmp_path)
    again = a_task(data, kind, weights_seed=9, resume=wholes[kind]).run(wholes[kind])  # is done: gives its weights
    for one, other in zip(supernet.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_reference_systems_search_is_exact_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.tango, "WARMUP_STEPS", 4)  # of its 1,000
    monkeypatch.setattr(training.tango, "WARMUP_EPOCHS", 1)
    given: dict[str, Any] = {"tango": True, "arch_every": 1, "budget": ()}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    a_task(data, "independent", **given).run(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, "save_checkpoint", 3, training)
        a_task(data, "independent", **given).run(killed)
    a_task(data, "independent", weights_seed=9, **given, resume=killed).run(killed)
    assert_same(whole, killed)
    for name in ("probs_history.txt", "export_history.txt"):
        assert (whole / name).read_text() == (killed / name).read_text()
    assert len((whole / "probs_history.txt").read_text().splitlines()) == 5  # the first alphas, and 4 epochs
    held_out = [bool(row["held_out"]) for row in read_csv(whole / "results.csv")]
    assert held_out == [False, True, True, True]  # from step 6 on, before every step


def test_kill_minus_nine_at_any_moment(data: Path, wholes: dict[str, Path], tmp_path: Path) -> None:
    kind = random.choice(KINDS)
    began = time.perf_counter()
    a_task(data, kind).run(tmp_path / "timed")
    duration = time.perf_counter() - began
    command = [sys.executable, __file__, str(data), kind, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and "12 weight steps" in child.stdout.readline()
        moment = random.uniform(0, duration)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
    print(f"{kind}, killed {moment:.2f} s into {duration:.2f} s")
    folder = tmp_path / "killed"
    resume = folder if (folder / "last.pt").exists() else None  # in its first epoch there was nothing to go on with
    a_task(data, kind, weights_seed=9 if resume else 0, resume=resume).run(folder)
    assert_same(wholes[kind], folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_batch_of_the_endless_sequence_follows_from_its_number(data: Path) -> None:
    images = a_task(data, "shared").judge_images
    rounds = [[batch_at(images, 2, 2 * turn + place, seed=3).indices for place in range(2)] for turn in range(5)]
    assert all(sorted(first + second) == [0, 1, 2, 3] for first, second in rounds)
    assert len(set(map(tuple, rounds))) > 1
    shares = [batch_at(images, 4, 7, rank=rank, world_size=2).indices for rank in range(2)]
    whole = batch_at(images, 4, 7).indices
    assert shares == [whole[0::2], whole[1::2]]
    left_over = [batch_at(images, 3, number).indices for number in range(20)]
    assert all(len(set(found)) == 3 for found in left_over) and set(sum(left_over, ())) == {0, 1, 2, 3}


# ---- stopped, broken down, refused


def test_control_c_says_how_to_go_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="^$"):
        patch.setattr(training, "lr_factor", interrupted)
        a_task(data, "shared").run(tmp_path)
    real = training.lr_factor
    monkeypatch.setattr(training, "lr_factor", lambda step, *rest: real(step, *rest) if step < 4 else interrupted())
    with pytest.raises(KeyboardInterrupt) as stop:
        a_task(data, "shared").run(tmp_path)
    assert str(stop.value) == f"stopped; goes on with: python search.py --resume {tmp_path}"


@pytest.mark.parametrize(
    ("call", "told"), [(4, "epoch 2, step 4: the loss is not"), (7, "epoch 3, step 7: the held-out loss is not")]
)
def test_a_loss_that_is_no_number_stops_the_search(
    call: int, told: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training.Network.loss_from, [0]

    def loss_from(self: Any, outputs: Any, targets: Any, *aux: Any) -> Any:
        loss, parts = real(self, outputs, targets, *aux)
        calls[0] += 1
        return (loss * float("nan") if calls[0] == call else loss), parts

    monkeypatch.setattr(training.Network, "loss_from", loss_from)
    with pytest.raises(Fault, match=told) as caught:
        a_task(data, "shared").run(tmp_path)
    assert "last.pt holds epoch" in str(caught.value)


def test_what_a_search_began_with_is_what_it_goes_on_with(
    data: Path, wholes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = wholes["shared"]
    task = a_task(data, "shared", resume=folder)
    first = task.weight_images.samples[0]
    swapped = (replace(first, labels=first.labels + 1), *task.weight_images.samples[1:])
    other_tables = {**task.tables, "latency_ms": task.tables["macs"]}
    for changed, told in (
        (replace(task, weight_images=ImageSet(swapped, 64, Augment())), "the images that train the weights"),
        (replace(task, judge_images=ImageSet(task.judge_images.samples[1:], 64)), "the images that move alphas"),
        (replace(task, tables=other_tables), "the cost tables are others, as on another device"),
    ):
        with pytest.raises(Fault, match=told) as caught:
            changed.run(folder)
        assert len(caught.value.lines) == 1 and "give it those, or start anew" in caught.value.lines[0]
    with pytest.raises(Fault, match="the space of subnets is another one"):
        state = load_checkpoint(folder / "last.pt").training
        check_unchanged(folder / "last.pt", state or {}, {"space": "0123456789ab"})
    said: list[str] = []
    monkeypatch.setattr(training.torch, "get_num_threads", lambda: 3)
    task.run(folder, said.append)
    assert "note: 3 threads, it began with 1: sums round differently" in said


def test_the_hashes_see_what_matters_and_no_more(data: Path) -> None:
    tables = a_task(data, "shared").tables
    assert costs_hash(tables) == costs_hash(a_task(data, "shared", weights_seed=1).tables)
    dearer = replace(tables["macs"], fixed=tables["macs"].fixed + 1)
    assert costs_hash({**tables, "macs": dearer}) != costs_hash(tables)
    boxes = np.float32([[1, 2, 3, 4]])
    here, there = (Sample(Path(folder) / "a.png", boxes, np.zeros(1, np.int64)) for folder in ("here", "there"))
    assert images_hash([here]) == images_hash([there])
    assert images_hash([here]) != images_hash([replace(here, boxes=boxes + 1)])
    assert images_hash([here, replace(here, path=Path("b"))]) != images_hash([replace(here, path=Path("b")), here])


def test_a_search_keeps_its_options_and_its_door(data: Path, wholes: dict[str, Path], tmp_path: Path) -> None:
    folder = wholes["independent"]
    config, found, checkpoint = reopen(SearchConfig(resume=folder, workers=1))
    assert (config.supernet, config.budget, config.workers) == ("independent", ("macs=0.5M", "params=1k"), 1)
    assert found == folder and config.resume == folder and checkpoint.training is not None
    supernet = Supernet(checkpoint.spec, "independent")  # the file in the checkpoint is the whole supernet
    again = replace(a_task(data, "independent", resume=folder), supernet=supernet).run(folder)
    assert all(torch.equal(value, checkpoint.state[name]) for name, value in again.network.state_dict().items())
    with pytest.raises(Fault) as caught:
        reopen(SearchConfig(resume=folder, budget=("macs=1M",), epochs=9))
    assert str(caught.value).startswith("--budget, --epochs: cannot change in a run that goes on")
    with pytest.raises(Fault, match="no .*last.pt; a run that has finished an epoch has one"):
        reopen(SearchConfig(resume=tmp_path))
    with pytest.raises(Fault, match=r"was begun by search.py; python search.py --resume \S+ goes on with it"):
        reopen_training(train_config({"resume": folder}))


def test_a_search_needs_steps_for_its_alphas(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="--epochs 1: 3 steps leave none for the architecture parameters"):
        a_task(data, "shared", epochs=1).run(tmp_path)


def main(data: Path, kind: str, folder: Path) -> None:
    """A search in a process of its own, that may be killed."""
    torch.set_num_threads(1)
    a_task(data, kind).run(folder, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
