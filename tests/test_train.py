"""Training: exact after a kill, honest when it breaks down, and it learns."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from data.config import read_data_spec
from data.dataset import ImageSet
from data.readers import read_split
from data.structures import Fault
from engine import measure, plan
from engine import train as training
from engine.calibrate import calibrate
from engine.config import TrainConfig, train_config
from engine.evaluate import calibration_images
from engine.optim import averaged, choose_optimizer, lr_factor, make_optimizer, parameter_groups, warmup_length
from engine.runs import read_csv
from engine.train import main, train
from models.checkpoint import load_checkpoint, restore
from models.network import Network

ROOT = Path(__file__).resolve().parents[1]

MODEL = """
nc: 80
activation: relu
anchors: [[12, 12, 24, 24], [24, 24, 40, 40]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [24, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc, anchors]]
"""


def draw_data(folder: Path, train: int = 8, val: int = 4) -> Path:
    """Images 64x64 with one or two bright boxes of two colours, and their data YAML."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(count):
            image = rng.integers(0, 40, (64, 64, 3), dtype=np.uint8)
            lines = []
            for label in range(1 + index % 2):
                x, y = (int(v) for v in rng.integers(2, 38, 2))
                w, h = (int(v) for v in rng.integers(14, 25, 2))
                image[y : y + h, x : x + w] = (0, 80, 255) if label else (255, 120, 0)
                lines.append(f"{label} {(x + w / 2) / 64} {(y + h / 2) / 64} {w / 64} {h / 64}")
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), image)
            (folder / "labels" / split / f"{index}.txt").write_text("\n".join(lines))
    path = folder / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [orange, blue]\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a model, for tests that write into folders of their own."""
    folder = tmp_path_factory.mktemp("train")
    draw_data(folder)
    (folder / "model.yaml").write_text(MODEL)
    return folder


@pytest.fixture
def options(place: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "cfg": place / "model.yaml",
        "data": place / "data.yaml",
        "epochs": 4,
        "batch_size": 3,
        "imgsz": 64,
        "device": "cpu",
        "project": tmp_path / "runs",
        "noplots": True,
    }


def arguments(options: dict[str, Any]) -> list[str]:
    """The options on a command line; of those that are on, only the name."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and plain value of a checkpoint by its path in it."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors(item, f"{name}.{key}").items()}
    return {name: value}


def assert_same(one: Path, other: Path) -> None:
    """Bit for bit the same weights, averages, optimizer and counters."""
    left, right = (load_checkpoint(path) for path in (one, other))
    a, b = ({**tensors(c.state, "state"), **tensors(c.training or {}, "training")} for c in (left, right))
    assert a.keys() == b.keys()
    for name in a:
        if "ms_per_image" in name:
            continue
        same = torch.equal(a[name], b[name]) if isinstance(a[name], Tensor) else repr(a[name]) == repr(b[name])
        assert same, name


def columns(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "results.csv")]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four epochs that nothing disturbed."""
    config = TrainConfig(
        cfg=place / "model.yaml",
        data=place / "data.yaml",
        epochs=4,
        batch_size=3,
        imgsz=64,
        device="cpu",
        project=tmp_path_factory.mktemp("whole"),
    )
    return train(config, progress=False).folder


class Killed(BaseException):
    """As good as kill -9: nothing catches it."""


def kill_before(monkeypatch: pytest.MonkeyPatch, name: str, call: int, module: Any = training) -> None:
    """In place of its ``call``-th call, a function of ``module`` kills the run."""
    real, calls = getattr(module, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, deadly)


# ---- a run ----


def test_a_run_leaves_all_that_it_promises(whole: Path) -> None:
    found = {path.name for path in whole.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert found == {
        *("best.pt", "last.pt", "results.csv", "config.yaml", "model.yaml", "environment.yaml"),
        *("train_batch0.jpg", "train_batch1.jpg", "train_batch2.jpg", "labels.png", "results.png"),
        *("PR_curve.png", "F1_curve.png", "confusion_matrix.png", "worst.jpg"),
    }
    rows = read_csv(whole / "results.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0])[:4] == ["epoch", "step", "lr", "loss"] and rows[-1]["step"] == "12"
    best = load_checkpoint(whole / "best.pt")
    assert best.names == ("orange", "blue") and best.imgsz == 64 and best.training is None
    assert restore(best).num_classes == 2
    assert yaml.safe_load((whole / "config.yaml").read_text())["batch_size"] == 3


def test_the_same_run_twice_is_the_same_bit_for_bit(whole: Path, options: dict[str, Any]) -> None:
    result = train(train_config(options), progress=False)
    assert_same(whole / "last.pt", result.last)
    assert columns(whole) == columns(result.folder)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("lr_factor", 8),  # in the middle of epoch 3
        ("append_csv", 3),  # best.pt may be ahead of last.pt
        ("epoch_line", 2),  # all of epoch 2 is on disk
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    name: str, call: int, whole: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, name, call)
        train(train_config(options), progress=False)
    folder = options["project"] / "exp"
    state = load_checkpoint(folder / "last.pt").training
    assert state is not None and state["epoch"] == 2
    resumed = train(TrainConfig(resume=folder), progress=False)
    assert resumed.folder == folder
    assert_same(whole / "last.pt", folder / "last.pt")
    assert columns(whole) == columns(folder)


CHILD = """
import os, signal, sys
replace, calls = os.replace, []

def deadly(source, target):  # in the middle of the third last.pt: it is written, but not yet in place
    calls.extend([target] if str(target).endswith("last.pt") else [])
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = deadly
from engine.train import main
sys.exit(main(sys.argv[1:]))
"""


def test_kill_minus_nine_while_a_checkpoint_is_written(whole: Path, options: dict[str, Any]) -> None:
    command = [sys.executable, "-c", CHILD, *arguments(options)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    folder = options["project"] / "exp"
    assert len(read_csv(folder / "results.csv")) == 3  # ahead of last.pt, which is whole and of epoch 2
    assert main(["--resume", str(folder / "last.pt")]) == 0
    assert_same(whole / "last.pt", folder / "last.pt")
    assert columns(whole) == columns(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_kill_minus_nine_at_any_moment(whole: Path, options: dict[str, Any]) -> None:
    seconds = sum(float(row["seconds"]) for row in read_csv(whole / "results.csv"))
    code = "import sys; from engine.train import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-u", "-c", code, *arguments(options)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None and any(line.startswith("results in") for line in child.stdout)
        moment = random.uniform(0, seconds)
        time.sleep(moment)
        child.send_signal(signal.SIGKILL)
    print(f"killed {moment:.2f} s into {seconds:.2f} s")
    folder = options["project"] / "exp"
    if (folder / "last.pt").exists():
        state = load_checkpoint(folder / "last.pt").training
        if state is not None and state["epoch"] < 4:
            train(TrainConfig(resume=folder), progress=False)
    else:  # in its first epoch there was nothing to go on with
        train(train_config({**options, "exist_ok": True}), progress=False)
    assert_same(whole / "last.pt", folder / "last.pt")
    assert columns(whole) == columns(folder)


def test_control_c_says_how_to_go_on(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(row: Any, epochs: int, heading: bool) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "epoch_line", interrupted)
    assert main(arguments(options)) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.strip() == f"stopped; goes on with: python train.py --resume {options['project'] / 'exp'}"


def test_a_finished_run_says_so(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "last.pt").read_bytes()
    assert main(["--resume", str(whole)]) == 2
    assert capsys.readouterr().err == f"{whole}: all 4 epochs are done; --epochs 8 would train on\n"
    assert main(["--resume", str(whole), "--epochs", "3"]) == 2
    assert "all 4 epochs are done" in capsys.readouterr().err
    assert (whole / "last.pt").read_bytes() == before


def test_a_resumed_run_keeps_its_options(
    options: dict[str, Any], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(whole), "--lr0", "0.1", "--batch-size", "8"]) == 2
    assert "--batch-size, --lr0: cannot change" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "nothing")]) == 2
    assert "no " in capsys.readouterr().err
    assert main(["--resume", str(whole / "best.pt"), "--seed", "5", "--freeze", "2", "--mixup", "1"]) == 2
    assert "--freeze, --mixup, --seed: cannot change" in capsys.readouterr().err


def test_a_resumed_run_wants_its_data(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, "append_csv", 2)
        train(train_config(options), progress=False)
    other = draw_data(tmp_path / "other", train=9)
    with pytest.raises(Fault, match="9 images .* began with 8"):
        train(TrainConfig(resume=options["project"] / "exp", data=other), progress=False)
    other.write_text(other.read_text().replace("orange", "red"))
    with pytest.raises(Fault, match="red, blue"):
        train(TrainConfig(resume=options["project"] / "exp", data=other), progress=False)


# ---- breaking down ----


def poison(monkeypatch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """The ``call``-th loss of a run is multiplied by ``value``."""
    real, calls = Network.loss_from, [0]

    def loss_from(self: Network, outputs: Any, targets: Any, *aux: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = real(self, outputs, targets, *aux)
        calls[0] += 1
        return (loss * value, {**parts, "obj": parts["obj"] * value}) if calls[0] == call else (loss, parts)

    monkeypatch.setattr(Network, "loss_from", loss_from)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(
    value: float, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 5, value)  # three steps an epoch: the second step of epoch 2
    with pytest.raises(Fault, match=r"epoch 2, step 5: the loss is not a finite number \(.*obj (nan|inf)") as caught:
        train(train_config(options), progress=False)
    assert "last.pt holds epoch 1" in str(caught.value)
    state = load_checkpoint(options["project"] / "exp" / "last.pt").training
    assert state is not None and state["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["network"].values())


def test_a_gradient_that_is_no_number_stops_the_run(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(parameters: Any, most: float) -> Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spoilt)
    with pytest.raises(Fault, match="epoch 1, step 1: the gradient is not .* nothing is saved"):
        train(train_config(options), progress=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"imgsz": 72}, "--imgsz 72: this network needs a multiple of 16; 64 or 80"),
        ({"data": None}, "--data is missing"),
        ({"cfg": None}, "--cfg is missing"),
        ({"device": "99"}, "--device '99'"),
        ({"weights": "no.pt"}, "no.pt"),
    ],
)
def test_what_cannot_be_trained_is_told_before_a_folder_is_made(
    change: dict[str, Any], told: str, options: dict[str, Any]
) -> None:
    with pytest.raises((Fault, OSError), match=told.replace("(", r"\(")):
        train(train_config({**options, **change}), progress=False)
    assert not options["project"].exists()


def test_the_door_tells_a_wrong_option_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--epoch", "3"]) == 2
    assert capsys.readouterr().err == "--epoch: there is no such option; did you mean '--epochs'?\n"


def test_a_file_of_options_gives_way_to_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(training, "train", seen.append)
    (tmp_path / "hyp.yaml").write_text("lr0: 0.5\nmosaic: 0\nepochs: 7\n")
    assert main(["--hyp", str(tmp_path / "hyp.yaml"), "--epochs", "9", "--cache", "off"]) == 0
    assert (seen[0].lr0, seen[0].mosaic, seen[0].epochs, seen[0].cache) == (0.5, 0.0, 9, "off")


# ---- learning ----


def test_the_loss_falls_and_the_boxes_are_found(options: dict[str, Any]) -> None:
    options |= {"epochs": 60, "batch_size": 8, "mosaic": 0, "scale": 0, "hsv_h": 0, "lr0": 0.01}
    result = train(train_config(options), progress=False)
    rows = read_csv(result.folder / "results.csv")
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert result.metrics.ap50 > 0.3
    assert sum(row["ap"] != "" for row in rows) == 10  # a short run is evaluated ten times, not sixty


def test_weights_are_taken_by_name_and_shape(
    whole: Path, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw_data(tmp_path / "three")
    data.write_text(data.read_text().replace("blue]", "blue, green]"))
    options |= {"data": data, "weights": whole / "best.pt", "epochs": 1, "noval": True}
    del options["cfg"]
    train(train_config(options))
    told = capsys.readouterr().out
    state = load_checkpoint(whole / "best.pt").state
    head = [name for name in state if name.startswith("layers.4.m.")]
    assert len(head) == 4
    assert f"{len(state) - 4} of {len(state)} tensors loaded, missing: {', '.join(head)}" in told
    assert "nc 2 becomes 3" in told


def test_an_open_number_of_anchors_is_fitted_and_kept(
    place: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options["cfg"] = tmp_path / "open.yaml"
    options["cfg"].write_text(MODEL.replace("anchors: [[12, 12, 24, 24], [24, 24, 40, 40]]", "anchors: 2"))
    result = train(train_config({**options, "epochs": 1}))
    assert "anchors" in capsys.readouterr().out
    anchors = load_checkpoint(result.best).spec.anchors
    assert isinstance(anchors, tuple) and len(anchors) == 2 and all(len(level) == 4 for level in anchors)
    assert all(5 < value < 64 for level in anchors for value in level)
    assert "anchors: 2" not in (result.folder / "model.yaml").read_text()


def test_mosaics_close_before_the_end(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    real = training.batches

    def spy(dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("shuffle") and dataset.augment is not None:
            seen.append((kwargs["epoch"], dataset.augment.mosaic))
        return real(dataset, *args, **kwargs)

    monkeypatch.setattr(training, "batches", spy)
    train(train_config({**options, "close_mosaic": 2}), progress=False)
    assert seen[-4:] == [(1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)]
    closing = [training.closing_epochs(TrainConfig(epochs=epochs)) for epochs in (1, 2, 30, 300)]
    assert closing == [0, 1, 3, 10]


def test_sgd_weighs_a_loss_as_the_sum_of_its_nominal_batch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    real = nn.utils.clip_grad_norm_

    def spy(parameters: Any, most: float) -> Tensor:
        norm = real(parameters, most)
        norms.append(norm.item())
        return norm

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    for optimizer in ("AdamW", "SGD"):
        train(train_config({**options, "batch_size": 8, "epochs": 1, "optimizer": optimizer}), progress=False)
    assert norms[1] == pytest.approx(64 * norms[0], rel=1e-4)


def test_accumulated_batches_step_as_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LARGE_SET", 8)
    monkeypatch.setattr(plan, "NOMINAL_BATCH", 6)
    result = train(train_config({**options, "epochs": 1}), progress=False)
    assert read_csv(result.folder / "results.csv")[0]["step"] == "2"  # 8 images: 3 + 3, and the rest


def test_bf16_is_taken_where_it_pays(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    choose: Callable[..., tuple[str, str]] = measure.choose_amp
    for plain, chosen in ((1.2, "bf16"), (1.1, "off")):
        times = {"off": plain, "bf16": 1.0}
        monkeypatch.setattr(measure, "seconds_a_step", lambda *given, times=times: times[given[3]])
        assert choose("auto", None, None, cpu, 1000)[0] == chosen
    assert choose("auto", None, None, cpu, 10)[0] == "off"
    assert choose("bf16", None, None, cpu, 10)[0] == "bf16"


def test_a_run_in_bf16_keeps_float32_weights(options: dict[str, Any]) -> None:
    result = train(train_config({**options, "amp": "bf16", "epochs": 1}), progress=False)
    state = load_checkpoint(result.last).training
    assert state is not None and state["amp"] == "bf16"
    assert {tensor.dtype for tensor in state["network"].values() if tensor.is_floating_point()} == {torch.float32}


# ---- how weights move ----


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    setattr(net[3].weight, "no_decay", True)  # noqa: B010  mypy knows no such attribute
    net[2].bias.requires_grad_(False)
    decay, still = parameter_groups(net, 0.1)
    assert [id(p) for p in decay["params"]] == [id(net[0].weight), id(net[2].weight)]  # type: ignore[attr-defined]
    others = (net[0].bias, net[1].weight, net[1].bias, net[3].weight, net[3].bias)
    assert [id(p) for p in still["params"]] == [id(p) for p in others]  # type: ignore[attr-defined]
    assert (decay["weight_decay"], still["weight_decay"]) == (0.1, 0.0)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    factors = [lr_factor(step, 101, 4, 0.01) for step in range(101)]
    assert factors[0] == pytest.approx(0.2) and factors[100] == pytest.approx(0.01)
    assert factors[50] == pytest.approx(0.505)  # half way between 1 and 0.01
    assert max(factors) == factors[4] and factors[4:] == sorted(factors[4:], reverse=True)
    assert lr_factor(0, 1, 0, 0.01) == 1.0
    assert warmup_length(3, 100, 30_000) == 300 and warmup_length(3, 10, 40) == 4 and warmup_length(3, 1, 5) == 0


def test_short_runs_take_adamw() -> None:
    assert [choose_optimizer("auto", steps) for steps in (1999, 2000)] == ["AdamW", "SGD"]
    assert choose_optimizer("SGD", 10) == "SGD"
    net = nn.Linear(2, 2)
    sgd = make_optimizer(net, "SGD", lr=0.1, momentum=0.9, weight_decay=0)
    assert sgd.defaults["nesterov"] and make_optimizer(net, "SGD", lr=0.1, momentum=0, weight_decay=0)


def test_averaged_weights_follow_the_formula() -> None:
    net = nn.BatchNorm1d(1)
    ema, expected = averaged(net, total_steps=10), 0.0
    for step in range(5):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.fill_(step)
        ema.update_parameters(net)
        keep = 0.9999 * (1 - np.exp(-step / 2))
        expected = keep * expected + (1 - keep) * step
    averages = {name: value.item() for name, value in ema.module.state_dict().items()}
    assert averages.pop("num_batches_tracked") == 4
    assert averages == {name: pytest.approx(expected, rel=1e-5) for name in ("weight", "bias", *averages)}


def test_fitness_leans_on_ap(whole: Path) -> None:
    state = load_checkpoint(whole / "last.pt").training
    assert state is not None
    metrics = training.Best.restore(state["best"]).metrics
    assert metrics is not None
    assert training.fitness(replace(metrics, ap=0.5, ap50=1.0)) == pytest.approx(0.55)


def test_best_is_calibrated_on_images_as_training_sees_them(options: dict[str, Any]) -> None:
    """With statistics of plain images the same weights are up to .06 AP worse."""
    config = train_config({**options, "epochs": 2, "noval": True})
    folder = train(config, progress=False).folder
    best, last = (restore(load_checkpoint(folder / name)) for name in ("best.pt", "last.pt"))
    samples = read_split(read_data_spec(config.data), "train").samples
    images = ImageSet(samples, config.imgsz, training.augmentation(config), config.seed)
    for augment, same in ((None, False), (training.augmentation(config), True)):
        calibrate(last, calibration_images(images, training.CALIBRATION_IMAGES, config.seed, "cpu", augment))
        norms = {name: tensor for name, tensor in last.state_dict().items() if "running" in name}
        assert norms and all(torch.equal(tensor, best.state_dict()[name]) for name, tensor in norms.items()) is same
