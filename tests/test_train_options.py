"""The options of a training, each told a second way; a run that ends early, and one that is extended."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_train import CHILD, MODEL, ROOT, Killed, arguments, assert_same, columns, draw_data, kill_before
from torch import Tensor, nn

from data.config import read_data_spec
from data.dataset import ImageSet
from data.loader import batches
from data.structures import Fault, Targets
from engine import measure
from engine import train as training
from engine.config import LACKING, TrainConfig, read_options, train_config
from engine.distributed import World
from engine.metrics import Metrics
from engine.optim import averaged, lr_factor, make_optimizer, set_rates
from engine.plan import check_processes, make_plan
from engine.prepare import anchored, box_sizes, describe, freeze, read_labelled, set_loss, train_mode
from engine.record import environment, git_state
from engine.runs import read_csv
from engine.step import drawn_size, scaled
from engine.train import main, train
from models.checkpoint import load_checkpoint
from models.network import Network, build
from models.parse import parse_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a model, for tests that write into folders of their own."""
    folder = tmp_path_factory.mktemp("options")
    draw_data(folder)
    (folder / "model.yaml").write_text(MODEL)
    return folder


@pytest.fixture
def options(place: Path, tmp_path: Path) -> dict[str, Any]:
    given = {"cfg": place / "model.yaml", "data": place / "data.yaml", "project": tmp_path / "runs", "noplots": True}
    return {**given, "epochs": 4, "batch_size": 3, "imgsz": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The folder of a run of four epochs."""
    files: dict[str, Any] = {"cfg": place / "model.yaml", "data": place / "data.yaml", "project": place / "runs"}
    return train(TrainConfig(**files, epochs=4, batch_size=3, imgsz=64, device="cpu", noplots=True), False).folder


def run(options: dict[str, Any], **more: Any) -> Path:
    return train(train_config({**options, **more}), progress=False).folder


def training_state(folder: Path) -> dict[str, Any]:
    state = load_checkpoint(folder / "last.pt").training
    assert state is not None
    return state


# ---- exact, whatever is on


def test_a_run_with_everything_on_survives_kill_minus_nine(whole: Path, options: dict[str, Any]) -> None:
    options |= {"teacher": whole / "best.pt", "optimizer": "SGD", "warmup_epochs": 4, "warmup_momentum": 0.5}
    options |= {"warmup_bias_lr": 0.1, "mixup": 0.5, "copy_small": 0.5, "patience": 9, "save_period": 2, "freeze": "1"}
    options |= {"multi_scale": True}
    first = run({**options, "cos_lr": False})
    words = [*arguments({**options, "name": "killed"}), "--no-cos-lr"]
    child = subprocess.run([sys.executable, "-c", CHILD, *words], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    folder = options["project"] / "killed"
    assert training_state(folder)["epoch"] == 2
    train(TrainConfig(resume=folder), progress=False)
    assert_same(first / "last.pt", folder / "last.pt")
    assert columns(first) == columns(folder) and "distill" in columns(first)[0]
    assert_same(first / "epoch4.pt", folder / "epoch4.pt")
    assert len(yaml.safe_load((folder / "environment.yaml").read_text())) == 2


# ---- frozen rows


def test_frozen_rows_keep_their_weights_and_statistics(options: dict[str, Any]) -> None:
    folder = run(options, freeze="2", epochs=2)
    last = load_checkpoint(folder / "last.pt")
    torch.manual_seed(0)
    begun = build(last.spec).state_dict()
    for state in (training_state(folder)["network"], last.state, load_checkpoint(folder / "best.pt").state):
        still = {name for name in begun if torch.equal(begun[name], state[name])}
        frozen = {name for name in begun if name.startswith(("layers.0.", "layers.1."))}
        assert frozen <= still and {name.rpartition(".")[2] for name in frozen} >= {"weight", "running_var"}
        assert not {name for name in still - frozen if name.endswith(("conv.weight", "running_mean"))}


def a_network() -> Network:
    rows = MODEL.replace("[-1, 1, Conv, [16, 3, 2]]", "{name: p2, from: -1, op: Conv, args: [16, 3, 2]}")
    return build(parse_text(rows))


@pytest.mark.parametrize(
    ("rows", "frozen"), [(("2",), [0, 1]), (("0", "2"), [0, 2]), (("p2",), [1]), (("p2", "3"), [1, 3]), ((), [])]
)
def test_rows_are_frozen_by_count_number_or_name(rows: tuple[str, ...], frozen: list[int]) -> None:
    network = a_network()
    layers = freeze(network, rows)
    train_mode(network, layers)
    for index, layer in enumerate(network.layers):
        trains = {p.requires_grad for p in layer.parameters()} | {m.training for m in layer.modules()}
        assert trains == {index not in frozen}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (("9",), "--freeze 9: the model has rows 0 to 4"),
        (("9999999999",), "--freeze 9999999999: the model has rows 0 to 4"),
        (("0", "5"), "--freeze 5: the model has rows 0 to 4"),
        (("P2",), "--freeze P2: the model has rows 0 to 4; did you mean 'p2'?"),
        (("-1", "2"), "--freeze -1: the model has rows 0 to 4"),
        (("5",), "--freeze 5: nothing is left to train"),
    ],
)
def test_rows_that_cannot_be_frozen_are_told(rows: tuple[str, ...], told: str) -> None:
    with pytest.raises(Fault) as caught:
        freeze(a_network(), rows)
    assert str(caught.value) == told


def test_the_door_takes_rows_in_yolov5s_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(training, "train", seen.append)
    (tmp_path / "hyp.yaml").write_text("freeze: [0, p2]\n")
    main(["--freeze", "0", "1", "2", "--cache"])
    main(["--freeze", "10", "--cache", "disk"])
    main(["--hyp", str(tmp_path / "hyp.yaml")])
    assert [config.freeze for config in seen] == [("0", "1", "2"), ("10",), ("0", "p2")]
    assert [config.cache for config in seen] == ["ram", "disk", "ram"]
    assert TrainConfig(freeze=(3,)).freeze == ("3",)  # type: ignore[arg-type]


# ---- what is learned


def test_all_classes_are_one(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    real = Network.loss_from

    def spy(self: Network, outputs: Any, targets: Targets, *aux: Any) -> Any:
        seen.append(targets.labels)
        return real(self, outputs, targets, *aux)

    monkeypatch.setattr(Network, "loss_from", spy)
    folder = run(options, single_cls=True, epochs=1)
    best = load_checkpoint(folder / "best.pt")
    assert best.names == ("item",) and best.spec.num_classes == 1
    assert sum(map(len, seen)) > 0 and not torch.cat(seen).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_the_formula(smoothing: float) -> None:
    """A class is 1 - s / 2, the others s / 2, in plain Python."""
    torch.manual_seed(0)
    network = build(replace(parse_text(MODEL), num_classes=3))
    set_loss(network, TrainConfig(label_smoothing=smoothing))
    targets = Targets(torch.tensor([[4.0, 4, 22, 24], [30, 20, 60, 55]]), torch.tensor([2, 0]), torch.tensor([0, 1]))
    with torch.no_grad():
        outputs, _ = network(torch.rand(2, 3, 64, 64))
        outputs = [level * 3 for level in outputs]
    expected = 0.0
    for level, logits in enumerate(outputs):
        terms, found_by_level = [], network.head.assign(targets, level, logits.shape[2:4])
        for image, anchor, row, column, found in zip(*found_by_level, strict=True):
            for label in range(3):
                goal = 1 - smoothing / 2 if label == int(targets.labels[found]) else smoothing / 2
                p = 1 / (1 + math.exp(-float(logits[image, anchor, row, column, 5 + label])))
                terms.append(-goal * math.log(p) - (1 - goal) * math.log(1 - p))
        expected += sum(terms) / len(terms) if terms else 0.0
    _, parts = network.loss_from(outputs, targets)
    assert expected > 0 and float(parts["cls"]) == pytest.approx(expected * 0.5 * 3 / 2 * 4 / 80, rel=1e-4)


def test_gains_and_reach_are_the_heads(options: dict[str, Any]) -> None:
    network = build(parse_text(MODEL))
    targets = Targets(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([2]), torch.tensor([0]))
    images = torch.rand(1, 3, 64, 64)
    network.eval()
    _, before = network.loss(images, targets)
    set_loss(network, TrainConfig(box=0.1, obj=3.0, cls=0.25))
    _, after = network.loss(images, targets)
    ratios = [float(after[name] / before[name]) for name in ("box", "obj", "cls")]
    assert ratios == pytest.approx([2, 3, 0.5], rel=1e-5)
    far = len(network.head.assign(targets, 0, (8, 8))[0])
    set_loss(network, TrainConfig(anchor_t=8.0))
    assert len(network.head.assign(targets, 0, (8, 8))[0]) > far
    with pytest.raises(Fault, match=r"^--dfl 1.5: the loss of Detect has no such option; it has --anchor-t, --box, "):
        set_loss(network, TrainConfig(dfl=1.5))


def test_a_teacher_that_counts_for_nothing_changes_nothing(whole: Path, options: dict[str, Any]) -> None:
    teacher = whole / "best.pt"
    silent, heard = (run(options, teacher=teacher, distill=gain, name=f"gain{gain}") for gain in (0, 1))
    for name, value in load_checkpoint(whole / "last.pt").state.items():
        assert torch.equal(value, load_checkpoint(silent / "last.pt").state[name]), name
    rows = read_csv(heard / "results.csv")
    assert float(rows[0]["distill"]) > 0 and {row["distill"] for row in read_csv(silent / "results.csv")} == {"0.0"}
    assert float(rows[0]["loss"]) == pytest.approx(sum(float(rows[0][n]) for n in ("box", "obj", "cls", "distill")))
    assert not all(
        torch.equal(value, load_checkpoint(heard / "last.pt").state[name])
        for name, value in load_checkpoint(whole / "last.pt").state.items()
    )


def test_a_run_keeps_its_teacher(whole: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = options["project"].parent / "teacher.pt"
    shutil.copy(whole / "best.pt", teacher)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, "append_csv", 2)
        run(options, teacher=teacher)
    folder = options["project"] / "exp"
    shutil.copy(whole / "last.pt", teacher)
    with pytest.raises(Fault, match=r"teacher.pt: another teacher \(\w{12}\) than the run began with \(\w{12}\)"):
        train(TrainConfig(resume=folder), progress=False)
    moved = teacher.with_name("moved.pt")
    shutil.copy(whole / "best.pt", moved)
    train(TrainConfig(resume=folder, teacher=moved), progress=False)
    assert training_state(folder)["epoch"] == 4


def test_a_model_takes_the_anchors_of_its_teacher(whole: Path, options: dict[str, Any], place: Path) -> None:
    said: list[str] = []
    spec = parse_text(MODEL)
    (place / "open.yaml").write_text(MODEL.replace("anchors: [[12, 12, 24, 24], [24, 24, 40, 40]]", "anchors: 2"))
    config = TrainConfig(cfg=place / "open.yaml", data=place / "data.yaml", imgsz=64, teacher=whole / "best.pt")
    data = read_data_spec(place / "data.yaml")
    found = describe(config, data, None, read_labelled(data, "train").samples, said.append)
    assert found.anchors == spec.anchors and said[-1].startswith("anchors of the teacher, ")


# ---- images


@given(st.integers(2, 40), st.sampled_from([8, 16, 32, 64]), st.integers(0, 9), st.integers(0, 10**6))
def test_a_drawn_size_follows_from_seed_and_batch(cells: int, stride: int, seed: int, number: int) -> None:
    imgsz = cells * stride
    size = drawn_size(imgsz, stride, seed, number)
    assert size == drawn_size(imgsz, stride, seed, number)
    assert size % stride == 0 and 0.5 * imgsz <= size <= 1.5 * imgsz


def test_every_size_is_drawn_about_as_often() -> None:
    sizes = [drawn_size(64, 16, 0, number) for number in range(500)]
    counts = [sizes.count(size) for size in (32, 48, 64, 80, 96)]
    assert sum(counts) == 500 and min(counts) > 70
    assert sizes != [drawn_size(64, 16, 1, number) for number in range(500)]


def test_a_run_at_many_sizes_sees_those_that_are_drawn(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = Network.forward

    def spy(self: Network, images: Tensor) -> Any:
        if self.training:
            seen.append(tuple(images.shape[2:]))
        return real(self, images)

    monkeypatch.setattr(Network, "forward", spy)
    run(options, multi_scale=True, seed=3)
    assert seen == [(drawn_size(64, 16, 3, number),) * 2 for number in range(12)] and len(set(seen)) > 2


def test_boxes_are_scaled_with_their_images() -> None:
    images = torch.zeros(1, 3, 64, 96)
    images[:, :, 16:32, 24:72] = 1
    targets = Targets(torch.tensor([[24.0, 16, 72, 32]]), torch.tensor([0]), torch.tensor([0]))
    bigger, moved = scaled(images, targets, 144, 16)
    assert bigger.shape == (1, 3, 96, 144) and moved.boxes.tolist() == [[36, 24, 108, 48]]
    x1, y1, x2, y2 = (int(v) for v in moved.boxes[0])
    assert bigger[:, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() == 1 and bigger.sum() == pytest.approx(
        3 * (x2 - x1) * (y2 - y1)
    )
    rounded, _ = scaled(images, targets, 80, 16)
    assert rounded.shape[2:] == (64, 80)  # 53.3 is no multiple of 16
    assert scaled(images, targets, 96, 16) == (images, targets)


def test_rectangles_leave_out_mosaics(options: dict[str, Any]) -> None:
    folder = run(options, rect=True, epochs=1)
    assert read_options(folder / "config.yaml")["mosaic"] == "0.0"
    assert train_config(read_options(folder / "config.yaml")).rect


# ---- anchors


def test_anchors_of_a_file_are_refitted_where_they_reach_too_few(place: Path) -> None:
    data = read_data_spec(place / "data.yaml")
    samples = read_labelled(data, "train").samples
    sizes = box_sizes(samples, 64)
    spec = parse_text(MODEL)
    small = replace(spec, anchors=((2.0, 2.0, 4.0, 4.0), (5.0, 5.0, 7.0, 7.0)))

    def reach(anchors: Any) -> float:
        """By hand: a box is reached where some anchor is within 2.5 times its width and height."""
        pairs = [(level[i], level[i + 1]) for level in anchors for i in range(0, len(level), 2)]
        return float(np.mean([any(max(w / a, a / w, h / b, b / h) < 2.5 for a, b in pairs) for w, h in sizes]))

    said: list[str] = []
    config = TrainConfig(imgsz=64)
    assert anchored(spec, samples, config, said.append) is spec and reach(spec.anchors) == 1
    assert said == [f"anchors of <text>: 100.0% of {len(sizes)} boxes within reach"]
    assert reach(small.anchors) < 0.98
    fitted = anchored(small, samples, config, said.append)
    assert reach(fitted.anchors) == 1 and isinstance(fitted.anchors, tuple) and len(fitted.anchors[0]) == 4
    assert said[-1].startswith(
        f"anchors of <text>: {reach(small.anchors):.1%} of {len(sizes)} boxes within reach; fitted anew, 100.0%: "
    )
    assert said[-1].endswith("; --noautoanchor would keep those of the file")
    assert anchored(small, samples, TrainConfig(imgsz=64, anchor_t=20.0), said.append) is small


def test_anchors_stay_where_that_is_asked_for(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(MODEL.replace("[[12, 12, 24, 24], [24, 24, 40, 40]]", "[[2, 2, 4, 4], [5, 5, 7, 7]]"))
    data = read_data_spec(place / "data.yaml")
    samples = read_labelled(data, "train").samples
    kept, fitted = (
        describe(TrainConfig(cfg=path, imgsz=64, noautoanchor=no), data, None, samples, lambda line: None).anchors
        for no in (True, False)
    )
    assert kept == ((2, 2, 4, 4), (5, 5, 7, 7)) != fitted


# ---- how long


def judged_as(monkeypatch: pytest.MonkeyPatch, values: Iterator[float]) -> None:
    real = training.evaluate

    def judge(*args: Any, **kwargs: Any) -> Metrics:
        return replace(real(*args, **kwargs), ap=next(values), ap50=0.0)

    monkeypatch.setattr(training, "evaluate", judge)


def test_patience_ends_a_run_at_the_right_epoch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        judged_as(patch, iter([0.1, 0.3, 0.2, 0.2, 0.2, 0.9]))
        result = train(train_config({**options, "epochs": 9, "patience": 3}))
    told = capsys.readouterr().out
    assert "stopped after epoch 5 of 9: no better 0.9 AP + 0.1 AP50 for 3 epochs (--patience)" in told
    assert "best (epoch 2)" in told
    folder = result.folder
    assert len(read_csv(folder / "results.csv")) == 5 and result.metrics.ap == 0.3
    assert main(["--resume", str(folder), "--epochs", "20"]) == 2
    assert capsys.readouterr().err == (
        f"{folder}: stopped after epoch 5, since epoch 2 none was better; --patience 6, or 0 for ever, would go on\n"
    )
    with monkeypatch.context() as patch:
        judged_as(patch, iter([0.1] * 4))
        train(TrainConfig(resume=folder, patience=0), progress=False)
    assert len(read_csv(folder / "results.csv")) == 9
    assert training_state(folder)["best"]["epoch"] == 2 and not training_state(folder)["stopped"]


def test_checkpoints_are_kept_every_few_epochs(options: dict[str, Any]) -> None:
    folder = run(options, save_period=2)
    assert sorted(path.name for path in folder.glob("*.pt")) == ["best.pt", "epoch2.pt", "epoch4.pt", "last.pt"]
    kept, last = load_checkpoint(folder / "epoch4.pt"), load_checkpoint(folder / "last.pt")
    assert kept.training is None and kept.plain["epoch"] == 4
    assert all(torch.equal(kept.state[n], last.state[n]) for n in kept.state if n.endswith("conv.weight"))
    shorter = run(options, save_period=0, exist_ok=True)
    assert sorted(path.name for path in shorter.glob("*.pt")) == ["best.pt", "last.pt"]


def test_a_finished_run_is_extended(
    whole: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    once, killed = tmp_path / "once", tmp_path / "killed"
    for folder in (once, killed):
        shutil.copytree(whole, folder)
    assert main(["--resume", str(once), "--epochs", "6"]) == 0
    rate = [0.002 * lr_factor(step, steps, steps // 10, 0.01) for step, steps in ((11, 12), (12, 18))]
    assert (
        f"note: 4 epochs become 6: the learning rate goes on as in a run of 6, from {rate[0]:.3g} to {rate[1]:.3g} now"
    ) in capsys.readouterr().out
    rows = columns(once)
    assert rows[:4] == columns(whole) and len(rows) == 6
    assert float(rows[5]["lr"]) == 0.002 * lr_factor(17, 18, 1, 0.01)
    assert read_options(once / "config.yaml")["epochs"] == "6"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, "append_csv", 2)
        train(TrainConfig(resume=killed, epochs=6), progress=False)
    train(TrainConfig(resume=killed), progress=False)
    assert_same(once / "last.pt", killed / "last.pt")


def test_a_longer_run_keeps_its_optimizer() -> None:
    config = TrainConfig(epochs=900)
    fresh = make_plan(config, 8, 3, 3, None)
    state = {"chosen": "AdamW"}
    assert (fresh.optimizer, make_plan(config, 8, 3, 3, state).optimizer) == ("SGD", "AdamW")
    assert str(fresh) == "SGD, lr 0.01, 2700 steps of 3 images (9 to warm up), 900 epochs"


def test_an_epoch_is_reported_and_can_end_the_run(options: dict[str, Any]) -> None:
    class Enough(Exception):
        pass

    told: list[tuple[int, float]] = []

    def on_epoch(epoch: int, metrics: Metrics) -> None:
        told.append((epoch, metrics.ap))
        if epoch == 3:
            raise Enough

    with pytest.raises(Enough):
        train(train_config(options), progress=False, on_epoch=on_epoch)
    folder = options["project"] / "exp"
    assert [epoch for epoch, _ in told] == [1, 2, 3] and training_state(folder)["epoch"] == 3
    assert not (folder / "results.png").exists()


# ---- options that contradict each other, or that this machine cannot follow


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rect": True, "mosaic": 0.5}, "--mosaic 0.5: a mosaic is a square; leave out either it or --rect"),
        ({"distill": 2}, "--distill 2: there is no --teacher to learn from"),
        (
            {"noval": True, "patience": 3},
            "--patience 3: --noval measures nothing on the way; leave one of the two out",
        ),
        (
            {"sync_bn": True},
            "--sync-bn: needs several GPUs, this run is on cpu; torchrun --nproc_per_node 2 train.py ... runs on two"
            " where there are two",
        ),
        ({"freeze": "5"}, "--freeze 5: nothing is left to train"),
        ({"teacher": "gone.pt"}, "gone.pt: no such checkpoint"),
        ({"batch_size": 0}, "--batch-size: a batch has 1 image or more; -1 finds how many fit, got 0"),
        ({"cache": "rom"}, "--cache: input should be 'ram', 'disk' or 'off', got 'rom'"),
    ],
)
def test_what_cannot_be_is_told_before_a_folder_is_made(
    change: dict[str, Any], told: str, options: dict[str, Any]
) -> None:
    with pytest.raises(Fault) as caught:
        train(train_config({**options, **change}, "--"), progress=False)
    assert str(caught.value) == told and not options["project"].exists()


def test_several_processes_name_their_batch() -> None:
    with pytest.raises(Fault, match="^--batch-size -1: 2 processes cannot each find their own; give a number$"):
        check_processes(TrainConfig(batch_size=-1), World(1, 2, CPU))
    with pytest.raises(Fault, match="needs several GPUs, this run is on cpu, 2 processes"):
        check_processes(TrainConfig(sync_bn=True), World(1, 2, CPU))
    check_processes(TrainConfig(sync_bn=True), World(1, 2, torch.device("cuda", 1)))


def test_norms_of_several_gpus_keep_their_names_and_average() -> None:
    network = build(parse_text(MODEL))
    ema = averaged(network, 10)
    names = list(network.state_dict())
    assert nn.SyncBatchNorm.convert_sync_batchnorm(network) is network and list(network.state_dict()) == names
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(3)
    ema.update_parameters(network)
    assert all((value == 3).all() for value in ema.module.state_dict().values())
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in ema.module.modules())


# ---- yolov5's files of hyper-parameters

HYP = """# as in a hyper-parameter file of yolov5
lr0: 0.01
lrf: 0.01
momentum: 0.937
weight_decay: 0.0005
warmup_epochs: 3.0
warmup_momentum: 0.8
warmup_bias_lr: 0.1
box: 0.05
cls: 0.5
cls_pw: 1.0
obj: 1.0
obj_pw: 1.0
iou_t: 0.20
anchor_t: 4.0
fl_gamma: 0.0
hsv_h: 0.015
hsv_s: 0.7
hsv_v: 0.4
degrees: 0.0
translate: 0.1
scale: 0.5
shear: 0.0
perspective: 0.0
flipud: 0.0
fliplr: 0.5
mosaic: 1.0
mixup: 0.0
copy_paste: 0.0
"""


def test_a_hyper_parameter_file_of_yolov5_is_taken(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text(HYP)
    config = train_config(read_options(path))
    assert (config.warmup_momentum, config.warmup_bias_lr, config.anchor_t, config.obj) == (0.8, 0.1, 4.0, 1.0)
    assert set(yaml.safe_load(HYP)) == {*read_options(path), *LACKING}
    assert main(["--hyp", str(path), *arguments({**options, "epochs": 1})]) == 0


def test_what_is_lacking_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text(HYP.replace("shear: 0.0", "shear: 2").replace("cls_pw: 1.0", "cls_pw: 0.5"))
    with pytest.raises(Fault) as caught:
        read_options(path)
    assert caught.value.lines == (
        f"{path}:11: cls_pw 0.5: there is no weight of positive classes here; 1 would be right",
        f"{path}:23: shear 2: there is no shearing here; 0 would be right",
    )
    path.write_text("paste_in: 0.1\n")
    with pytest.raises(Fault, match="1: there is no option 'paste_in'"):
        read_options(path)


# ---- how weights move


def test_the_learning_rate_may_fall_along_a_line() -> None:
    factors = [lr_factor(step, 101, 0, 0.2, False) for step in range(101)]
    assert factors == pytest.approx([1 - 0.8 * step / 100 for step in range(101)])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_momentum_and_biases_warm_up_from_values_of_their_own(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    config = TrainConfig(momentum=0.9, warmup_momentum=0.5, warmup_bias_lr=0.1)
    optimizer = make_optimizer(net, name, lr=0.02, momentum=0.9, weight_decay=0.01, biases_apart=True)
    assert type(optimizer).__name__ == name
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 2]
    seen = []
    for step in (0, 2, 4, 9):
        set_rates(optimizer, 0.02, step, 4, config)
        momenta = {group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups}
        seen.append(([group["lr"] for group in optimizer.param_groups], *momenta))
    assert seen == [
        ([0.02, 0.02, pytest.approx(0.1)], pytest.approx(0.5)),
        ([0.02, 0.02, pytest.approx(0.06)], pytest.approx(0.7)),
        ([0.02, 0.02, pytest.approx(0.02)], pytest.approx(0.9)),
        ([0.02, 0.02, pytest.approx(0.02)], pytest.approx(0.9)),
    ]


# ---- the batch that fits


def a_set(place: Path, images: int) -> ImageSet:
    samples = read_labelled(read_data_spec(place / "data.yaml"), "train").samples
    return ImageSet((samples * images)[:images], 64)


@pytest.mark.parametrize(
    ("seconds", "images", "chosen", "why"),
    [
        ({1: 1, 2: 1.2, 4: 1.6, 8: 2.5, 16: 5}, 8, 8, "leave fewer than 8 steps"),
        ({1: 1, 2: 1.2, 4: 1.6, 8: 2.5, 16: 4.9}, 40, 8, "larger ones are hardly faster"),
        ({1: 1, 2: 2, 4: 4, 8: 8, 16: 16}, 400, 1, "larger ones are hardly faster"),
        ({1: 1, 2: 1, 4: 20}, 400, 2, "larger ones are hardly faster"),
        ({1: 4, 2: 6, 4: 16}, 400, 2, "larger ones are hardly faster"),
    ],
)
def test_a_batch_is_found_by_images_per_second(
    seconds: dict[int, float], images: int, chosen: int, why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "timed_step", lambda net, batch, device, amp: seconds[len(batch.images)])
    monkeypatch.setattr(measure, "used_memory", lambda device: 0)
    size, reason = measure.find_batch_size(a_network(), a_set(place, images), CPU, "off")
    assert size == chosen and reason.startswith(f"batch size {chosen}: ") and why in reason


def test_a_batch_is_found_within_the_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = [0]

    def timed(net: Any, batch: Any, device: Any, amp: Any) -> float:
        largest[0] = len(batch.images)
        return 1.0

    monkeypatch.setattr(measure, "timed_step", timed)
    monkeypatch.setattr(measure, "used_memory", lambda device: 10 + largest[0] * 3)
    monkeypatch.setattr(measure, "free_memory", lambda device: 50)  # of which 30 may be taken: 8 need 24, 16 need 48
    size, reason = measure.find_batch_size(a_network(), a_set(place, 400), CPU, "off")
    assert size == 8 and "16 would take over 60% of" in reason
    assert measure.free_memory(CPU) > 0


def test_a_batch_repeats_its_images(place: Path) -> None:
    batch = next(iter(batches(a_set(place, 3), 3)))
    more = measure.repeated(batch, 5)
    for number, source in enumerate((0, 1, 2, 0, 1)):
        assert torch.equal(more.images[number], batch.images[source])
        here, there = more.targets.image_index == number, batch.targets.image_index == source
        assert torch.equal(more.targets.boxes[here], batch.targets.boxes[there])
    assert len(more.targets.labels) == len(more.targets.image_index)


def test_the_batch_that_was_found_is_the_runs(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "find_batch_size", lambda network, images, device, amp: (4, "as drawn"))
    folder = run(options, batch_size=-1, epochs=2)
    assert read_options(folder / "config.yaml")["batch_size"] == "4"
    assert [row["step"] for row in read_csv(folder / "results.csv")] == ["2", "4"]


# ---- what a run writes down


def test_the_environment_is_written_down(whole: Path) -> None:
    (entry,) = yaml.safe_load((whole / "environment.yaml").read_text())
    assert entry["after_epoch"] == 0 and entry["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (entry["threads"], entry["processes"], entry["device"], entry["gpu"]) == (1, 1, "cpu", None)
    assert entry["cpu"] and set(entry["versions"]) >= {"python", "torch", "numpy", "pydantic"}
    assert set(environment(World(0, 1, CPU))) == set(entry) - {"after_epoch"}


def test_the_state_of_the_repository_is_told(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = {
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
        }
        found = subprocess.run(
            ["git", "-C", str(tmp_path), *words], env={**os.environ, **who}, capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None  # nothing is committed
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-q", "-m", "a")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("2\n")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    (tmp_path / "venv").mkdir()
    assert git_state(tmp_path / "venv") is None  # installed inside somebody else's repository


class Writer:
    """In place of TensorBoard's."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.path, self.purge_step = Path(folder) / "events.json", purge_step
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))

    def flush(self) -> None:
        self.path.write_text(json.dumps([self.purge_step, self.rows]))

    def close(self) -> None:
        self.path.with_name("closed").touch()


def test_tensorboard_gets_the_numbers_of_every_epoch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = run(options, epochs=2)
    purged, rows = json.loads((folder / "events.json").read_text())
    assert purged == 1 and (folder / "closed").exists()
    table = read_csv(folder / "results.csv")
    found = {(name, step): value for name, value, step in rows}
    for row in table:
        assert found["loss/box", int(row["epoch"])] == float(row["box"])
        assert found["metrics/ap50", int(row["epoch"])] == float(row["ap50"])
        assert {f"classes/ap of {name}" for name in ("orange", "blue")} <= {n for n, _ in found}


def test_tensorboard_that_is_absent_is_told_once(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(train_config({**options, "epochs": 2}))
    assert capsys.readouterr().out.count("pip install -e '.[dashboard]'") == 1


def test_pictures_can_be_left_out(whole: Path) -> None:
    assert not [path.name for path in whole.iterdir() if path.suffix in (".png", ".jpg")]


# ---- the page


PAGE = ROOT / "docs" / "train.md"


def test_every_option_stands_on_the_page_once() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    named = [line.split("|")[1].strip().strip("`").split()[0] for line in lines]
    own = ["--" + name.replace("_", "-") for name in TrainConfig.model_fields]
    assert sorted(named) == sorted([*own, "--hyp", "--ops"])
