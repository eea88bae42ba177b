"""Classification: the head, its numbers, and the three doors on a classifier."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import Killed, kill_before, tensors
from torch.nn import functional as F

import engine.train as training
from data.config import read_data_spec
from data.structures import Fault, Targets
from engine.classify import ClassMetrics, class_metrics, ranking, ranking_lines
from engine.config import TrainConfig, train_config
from engine.draw import class_color, draw_ranking
from engine.export import main as export
from engine.infer import load
from engine.infer import main as detect
from engine.outcomes import class_confusion, least_likely
from engine.runs import read_csv
from engine.tasks import CLASSIFY, DETECT, check_data, check_options, task_of
from engine.train import main as train_door
from engine.train import train
from engine.validate import main as val
from models.checkpoint import load_checkpoint
from models.distill import CLASS_TEMPERATURE, check_teacher, distillation_loss
from models.graph import resolve
from models.network import build
from models.parse import parse_text
from models.registry import Shape
from search.run import main as search

NAMES = ("blue", "green", "grey", "red", "white", "yellow")  # as sorted folders
COLOURS = {"red": (200, 30, 30), "green": (30, 190, 40), "blue": (40, 50, 210), "yellow": (220, 210, 40)}
COLOURS |= {"grey": (110, 110, 110), "white": (245, 245, 245)}
MODEL = """\
nc: 6
activation: silu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - {name: trunk, from: -1, op: Conv, args: [16, 3, 2]}
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Classify, [nc, {dropout: 0.1}]]
"""
DETECTOR = """\
nc: 6
anchors: [[12, 12, 24, 24]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""


# ---- the head


def head_of(channels: int = 4, classes: int = 3, **options: Any) -> Any:
    text = "nc: {}\nbackbone:\n  - [-1, 1, Conv, [{}, 3, 2]]\nhead:\n  - [-1, 1, Classify, [nc]]\n"
    network = build(parse_text(text.format(classes, channels)))
    network.head.options.update(options)
    return network.head


def targets_of(labels: list[int], images: list[int] | None = None) -> Targets:
    count = len(labels)
    index = torch.tensor(images if images is not None else range(count))
    return Targets(torch.zeros(count, 4), torch.tensor(labels), index)


def test_the_head_is_a_mean_and_a_linear_layer() -> None:
    torch.manual_seed(0)
    head, x = head_of(), torch.randn(2, 4, 5, 3)
    (logits,) = head([x])
    by_hand = torch.stack([head.linear.weight @ image.reshape(4, -1).mean(1) + head.linear.bias for image in x])
    torch.testing.assert_close(logits, by_hand)
    torch.testing.assert_close(head.decode([logits]), logits.exp() / logits.exp().sum(dim=1, keepdim=True))
    assert sum(p.numel() for p in head.parameters()) == 4 * 3 + 3


def test_the_loss_is_the_cross_entropy_of_the_labels() -> None:
    """Of two logits 0 and log 3 the second class has 3/4."""
    head = head_of(classes=2)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    loss, parts = head.loss([logits], targets_of([1, 0]))
    assert float(loss) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2) == float(parts["cls"])
    torch.manual_seed(0)
    y = torch.randn(5, 3)
    for smoothing in (0.0, 0.2):
        wanted = F.cross_entropy(y, torch.tensor([2, 0, 1, 1, 0]), label_smoothing=smoothing)
        turned = targets_of([0, 1, 1, 0, 2], [4, 3, 2, 1, 0])  # the order of the targets is no matter
        torch.testing.assert_close(head_of(label_smoothing=smoothing).loss([y], turned)[0], wanted)


def test_a_blend_of_two_images_is_half_of_each_class() -> None:
    y = torch.tensor([[1.0, -0.5, 0.25]])
    loss, _ = head_of().loss([y], targets_of([0, 2], [0, 0]))
    torch.testing.assert_close(loss, -(y.log_softmax(1)[0, 0] + y.log_softmax(1)[0, 2]) / 2)


def test_the_head_reads_several_maps_as_the_means_of_all() -> None:
    torch.manual_seed(0)
    rows = "nc: 2\nbackbone:\n  - [-1, 1, Conv, [4, 3, 2]]\n  - [-1, 1, Conv, [6, 3, 2]]\nhead:\n"
    head = build(parse_text(f"{rows}  - [[0, 1], 1, Classify, [nc]]\n")).head
    fine, coarse = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 4, 4)
    parts = head.linear.weight.split([4, 6], dim=1)
    by_hand = fine.mean((2, 3)) @ parts[0].T + coarse.mean((2, 3)) @ parts[1].T + head.linear.bias
    torch.testing.assert_close(head([fine, coarse])[0], by_hand)
    with pytest.raises(Fault, match=re.escape("dropout=1.0 should be less than 1")):
        resolve(parse_text(f"{rows}  - [-1, 1, Classify, [nc, {{dropout: 1.0}}]]\n"))
    assert resolve(parse_text(MODEL)).nodes[-1].output == Shape(0, 8, "maps")


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    torch.manual_seed(0)
    student, teacher = build(parse_text(MODEL)), build(parse_text(MODEL.replace("16, 3, 2", "8, 3, 2")))
    check_teacher(student, teacher, Path("teacher.pt"))  # other widths are no matter
    y, z = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    same = y.detach().clone().requires_grad_()
    loss = distillation_loss(student, [same], teacher, [y])
    (gradient,) = torch.autograd.grad(loss, same)
    assert abs(float(loss.detach())) < 1e-6 and float(gradient.abs().max()) < 1e-7
    t = CLASS_TEMPERATURE
    p, q = (z / t).softmax(1), (y / t).softmax(1)
    by_hand = t**2 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, [y], teacher, [z]), by_hand)
    with pytest.raises(Fault, match=re.escape("teacher.pt: the teacher has classes 5, but <text> has 6")):
        check_teacher(student, build(replace(parse_text(MODEL), num_classes=5)), Path("teacher.pt"))


# ---- the numbers


def test_numbers_that_were_worked_out_by_hand() -> None:
    """Seven classes. Of four images two are right; of one more the truth is fifth, of one it is sixth."""
    scores = np.array(
        [
            [0.50, 0.20, 0.10, 0.10, 0.05, 0.03, 0.02],
            [0.40, 0.30, 0.10, 0.08, 0.06, 0.04, 0.02],
            [0.10, 0.60, 0.10, 0.08, 0.06, 0.04, 0.02],
            [0.40, 0.30, 0.10, 0.08, 0.06, 0.04, 0.02],
        ]
    )
    truths = np.array([0, 4, 1, 5])
    found = class_metrics(truths, scores, list("abcdefg"))
    assert (found.top1, found.top5, found.images) == (0.5, 0.75, 4)
    assert found.mean_top1 == 0.5 and found.fitness == 0.5  # of a, b, e and f
    assert found.loss == pytest.approx(-sum(map(math.log, (0.5, 0.06, 0.6, 0.04))) / 4)
    assert found.per_class[0] == ("a", 1, 1.0, 1.0, pytest.approx(1 / 3))
    assert found.per_class[5][:4] == ("f", 1, 0.0, 0.0) and math.isnan(found.per_class[5][4])
    assert math.isnan(found.per_class[6][2])
    assert found.summary() == "top-1 0.500, top-5 0.750, mean of the classes' top-1 0.500, loss 1.809, 4 images"
    assert found.table().splitlines()[:4] == [
        "class  images  top-1  top-5  precision",
        "-----  ------  -----  -----  ---------",
        "all         4  0.500  0.750          -",
        "a           1  1.000  1.000      0.333",
    ]
    assert least_likely(truths, scores, 9) == [3, 1] and least_likely(truths, scores, 1) == [3]
    assert class_confusion(truths, scores)[0].tolist() == [1, 0, 0, 0, 1, 1, 0]


def test_five_classes_say_nothing_about_top_5() -> None:
    found = class_metrics(np.array([0, 1]), np.full((2, 5), 0.2), list("abcde"))
    assert math.isnan(found.top5) and found.top1 == 0.5 and "top-5" not in found.summary()


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 999))
def test_numbers_are_those_of_counting(images: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(1.0, classes + 1), (images, 1)), axis=1) / 99
    truths = rng.integers(0, classes, images)
    names = [str(label) for label in range(classes)]
    found = class_metrics(truths, scores, names)
    ranks = [sorted(-row).index(-row[truth]) for row, truth in zip(scores, truths, strict=True)]
    assert found.top1 == pytest.approx(sum(rank == 0 for rank in ranks) / images)
    if classes > 5:
        assert found.top5 == pytest.approx(sum(rank < 5 for rank in ranks) / images)
    assert sum(row[1] for row in found.per_class) == images
    matrix = class_confusion(truths, scores)
    assert matrix.trace() == sum(rank == 0 for rank in ranks) and matrix.sum() == images
    asked = [row[2] for row in found.per_class if row[1]]
    assert found.mean_top1 == pytest.approx(sum(asked) / len(asked))


def test_a_ranking_is_written_and_drawn() -> None:
    found = ranking(torch.tensor([0.1, 0.6, 0.3]), 2)
    assert found.labels.tolist() == [1, 2] and ranking_lines(found, scores=False) == "1\n2\n"
    assert ranking_lines(found, scores=True) == "1 0.6\n2 0.3\n"
    image = np.zeros((60, 90, 3), dtype=np.uint8)
    drawn = draw_ranking(image, found, ["a", "b", "c"])
    colours = {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}
    assert {class_color(1), class_color(2)} <= colours and not image.any()
    flat = draw_ranking(np.zeros((14, 90, 3), dtype=np.uint8), found, ["a", "b", "c"])
    colours = {tuple(pixel) for pixel in flat.reshape(-1, 3).tolist()}
    assert class_color(1) in colours and class_color(2) not in colours  # no room for the second
    assert not draw_ranking(image, found, ["a", "b", "c"], show_labels=False).any()


# ---- tasks


def test_a_head_says_its_task() -> None:
    assert task_of(parse_text(MODEL)) is CLASSIFY and task_of(parse_text(DETECTOR)) is DETECT


def test_what_does_not_go_together_is_refused(place: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.yaml"
    boxes.write_text("train: .\nnames: [a, b]\n")
    with pytest.raises(Fault) as fault:
        check_data(parse_text(MODEL, "m.yaml"), read_data_spec(boxes))
    assert str(fault.value) == (
        f"{boxes}: is of format yolo, but m.yaml is a classifier (its head is Classify); one of format folders is right"
    )
    with pytest.raises(Fault, match=r"m.yaml is a detector \(its head is Detect\); one of format yolo or voc or coco"):
        check_data(parse_text(DETECTOR, "m.yaml"), read_data_spec(place / "data.yaml"))
    with pytest.raises(Fault) as fault:
        check_options(CLASSIFY, TrainConfig(mosaic=0.5, rect=True, hsv_h=0.1))
    assert fault.value.lines == (
        "--mosaic 0.5: means nothing to a classifier; leave it out",
        "--rect: means nothing to a classifier; leave it out",
    )
    settled = check_options(CLASSIFY, TrainConfig(mosaic=0.0, mixup=0.3))
    assert (settled.mosaic, settled.translate, settled.mixup) == (0, 0, 0.3)
    assert check_options(DETECT, TrainConfig()) == TrainConfig()


# ---- the doors


def draw_classes(folder: Path, count: int, seed: int) -> None:
    """Pictures of a colour each, with a spot of another."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            width, height = rng.integers(36, 60, 2)
            picture = np.full((height, width, 3), colour, dtype=np.int64) + rng.integers(-25, 26, (height, width, 3))
            x, y = rng.integers(0, 30, 2)
            picture[y : y + 6, x : x + 6] = rng.integers(0, 256, 3)
            picture = picture.clip(0, 255).astype(np.uint8)
            assert cv2.imwrite(str(folder / name / f"{number}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    draw_classes(folder / "train", 6, 0)
    draw_classes(folder / "val", 2, 1)
    (folder / "data.yaml").write_text("train: train\nval: val\nformat: folders\n")
    (folder / "model.yaml").write_text(MODEL)
    return folder


def options_of(place: Path, project: Path, **more: Any) -> dict[str, Any]:
    given = {"cfg": place / "model.yaml", "data": place / "data.yaml", "epochs": 6, "batch_size": 6, "imgsz": 32}
    return {**given, "device": "cpu", "project": project, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.1, "lr0": 0.02, **more}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with mixup, pictures and all."""
    return train(train_config(options_of(place, tmp_path_factory.mktemp("runs"), mixup=0.3)), progress=False).folder


def test_a_classifier_learns_and_leaves_all_that_it_promises(whole: Path) -> None:
    rows = read_csv(whole / "results.csv")
    assert list(rows[0])[2:8] == ["lr", "loss", "cls", "top1", "top5", "mean_top1"]
    assert max(float(row["top1"]) for row in rows) >= 0.75  # by chance 1 of 6
    checkpoint = load_checkpoint(whole / "best.pt")
    assert checkpoint.names == NAMES and checkpoint.plain["top1"] >= 0.75
    pictures = {"train_batch0.jpg", "labels.png", "results.png", "confusion_matrix.png"}
    assert pictures <= {path.name for path in whole.iterdir()}
    assert "mosaic: 0.0" in (whole / "config.yaml").read_text()
    best = load_checkpoint(whole / "last.pt").training["best"]["metrics"]  # type: ignore[index]
    assert asdict(training.Best.restore({"fitness": 1.0, "epoch": 1, "metrics": best}, ClassMetrics))["metrics"] == best


def test_a_run_that_was_killed_ends_with_the_same_weights(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_before(patch, "epoch_line", 3)
        with pytest.raises(Killed):
            train(train_config(options_of(place, tmp_path, mixup=0.3, noplots=True)), progress=False)
    result = train(TrainConfig(resume=tmp_path / "exp"), progress=False)
    one, other = (tensors(load_checkpoint(folder / "last.pt").training) for folder in (whole, result.folder))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif "ms_per_image" not in name:
            assert value == other[name] or (value != value and other[name] != other[name]), name
    ours, theirs = (load_checkpoint(folder / "best.pt").state for folder in (whole, result.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_classifier_is_trained_on_from_weights_with_frozen_rows_and_a_teacher(
    whole: Path, place: Path, tmp_path: Path
) -> None:
    """Other classes than before: all but the last layer is taken over, and what is frozen stays."""
    few = tmp_path / "few.yaml"
    few.write_text(f"path: {place}\ntrain: [train/.]\nval: val\nformat: folders\nnames: [red, green, blue]\n")
    given = options_of(place, tmp_path, data=few, weights=whole / "best.pt", epochs=1, freeze=("0", "trunk"))
    del given["cfg"]
    folder = train(train_config({**given, "noplots": True}), progress=False).folder
    before, after = (load_checkpoint(path / "best.pt").state for path in (whole, folder))
    assert after["3.linear.weight" if "3.linear.weight" in after else "layers.3.linear.weight"].shape == (3, 16)
    still = [name for name in before if re.match(r"(layers\.)?[01]\.", name)]
    assert still and all(torch.equal(before[name], after[name]) for name in still)
    taught = options_of(place, tmp_path, teacher=whole / "best.pt", epochs=1, name="taught", noplots=True)
    row = read_csv(train(train_config(taught), progress=False).folder / "results.csv")[0]
    assert float(row["distill"]) > 0


def test_options_that_mean_nothing_are_refused_by_each_door(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(door: Any, *words: object) -> str:
        assert door([*map(str, words), "--project", str(tmp_path)]) == 2
        return capsys.readouterr().err

    data, best, model = place / "data.yaml", whole / "best.pt", place / "model.yaml"
    told_of = {
        "--translate 0.2": (train_door, "--cfg", model, "--data", data, "--translate", 0.2, "--epochs", 1),
        "--conf-thres 0.5": (val, "--weights", best, "--data", data, "--conf-thres", 0.5),
        "--iou-thres 0.5": (detect, "--weights", best, "--source", place / "val/red", "--iou-thres", 0.5),
        "--classes red": (detect, "--weights", best, "--source", place / "val/red", "--classes", "red"),
        "--save-crop": (detect, "--weights", best, "--source", place / "val/red", "--save-crop"),
    }
    for option, (door, *words) in told_of.items():
        assert told(door, *words) == f"{option}: means nothing to a classifier; leave it out\n"
    wrong = told(train_door, "--cfg", model, "--data", data, "--box", 2, "--epochs", 1)
    assert wrong == "--box 2: the loss of Classify has no such option; it has --label-smoothing\n"
    wrong = told(train_door, "--cfg", model, "--data", data, "--single-cls")
    assert wrong == f"--single-cls: {data} has nothing but the classes of whole images; leave it out\n"
    assert told(search, "--cfg", model, "--data", data, "--mosaic", 1) == (
        "--mosaic 1.0: means nothing to a classifier; leave it out\n"
    )
    for option in (["--nms"], ["--conf-thres", "0.5"], ["--max-det", "3"]):
        assert export(["--weights", str(best), "--format", "torch", *option]) == 2
        assert capsys.readouterr().err == f"{' '.join(option)}: means nothing to a classifier; leave it out\n"
    assert not list(tmp_path.iterdir())


def test_validating_gives_the_numbers_of_training_and_files(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--save-json", "--save-txt", "--save-conf", "--project", str(tmp_path), "--batch-size", "6"]
    assert val(["--weights", str(whole / "best.pt"), "--data", str(place / "data.yaml"), *words]) == 0
    told = capsys.readouterr().out
    reached = max(float(row["top1"]) for row in read_csv(whole / "results.csv"))
    assert f"top-1 {reached:.3f}, top-5 " in told and "class   images  top-1  top-5  precision" in told
    numbers = json.loads((tmp_path / "exp/metrics.json").read_text())["classify"]
    assert numbers["top1"] == pytest.approx(reached) and len(numbers["per_class"]) == 6
    rows = json.loads((tmp_path / "exp/predictions.json").read_text())
    assert len(rows) == 12 and all(len(row["found"]) == 5 for row in rows)
    right = sum(row["class"] == row["found"][0]["class"] for row in rows)
    assert right / 12 == pytest.approx(reached)
    lines = (tmp_path / "exp/labels/red/0.txt").read_text().splitlines()  # two images of each class are called 0
    assert len(lines) == 5 and NAMES[int(lines[0].split()[0])] == next(
        row["found"][0]["class"] for row in rows if row["image"].endswith("red/0.png")
    )
    assert (tmp_path / "exp/confusion_matrix.png").stat().st_size > 0


def test_new_images_are_told_apart_in_all_forms(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = ["--save-txt", "--save-csv", "--save-json", "--project", str(tmp_path)]
    assert detect(["--weights", str(whole / "best.pt"), "--source", str(place / "val/red"), *forms]) == 0
    told = capsys.readouterr().out
    assert re.search(r"red/0.png: \w+ [01]\.\d{3}(, \w+ 0\.\d{3}){4}\n", told)
    assert re.search(r"class +count +mean score", told)
    model = load(whole / "best.pt")
    one = model(place / "val/red/0.png")
    both = model([place / "val/red/0.png", place / "val/red/1.png"], batch_size=2)
    assert len(one) == 5 and one.scores.tolist() == sorted(one.scores, reverse=True) and one.classes[0] in NAMES
    np.testing.assert_allclose(both[0].scores, one.scores, atol=1e-6)
    assert both[0].draw().shape == one.image.shape
    with open(tmp_path / "exp/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == list("12345") * 2 and rows[0]["class"] == one.classes[0]
    assert float(rows[0]["score"]) == pytest.approx(float(one.scores[0]), abs=1e-5)
    entries = json.loads((tmp_path / "exp/predictions.json").read_text())
    assert [entry["classes"][0]["class"] for entry in entries] == [found.classes[0] for found in both]
    assert (tmp_path / "exp/labels/0.txt").read_text() == "".join(f"{label}\n" for label in one.labels)
    assert cv2.imread(str(tmp_path / "exp/0.png")).shape == one.image.shape
    with pytest.raises(Fault, match="mean nothing to a classifier"):
        model(place / "val/red/0.png", conf=0.5)


def test_what_a_user_sees_is_what_was_measured(whole: Path, place: Path, tmp_path: Path) -> None:
    """Folding the norms changes the last bits at most."""
    assert val(["--weights", str(whole / "best.pt"), "--data", str(place / "data.yaml"), "--save-json", "--noplots",
                "--project", str(tmp_path)]) == 0  # fmt: skip
    rows = json.loads((tmp_path / "exp/predictions.json").read_text())
    for row, found in zip(rows, load(whole / "best.pt")([row["image"] for row in rows]), strict=True):
        assert [entry["class"] for entry in row["found"]][:1] == found.classes[:1]
        assert row["found"][0]["score"] == pytest.approx(float(found.scores[0]), abs=1e-4)
