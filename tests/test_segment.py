"""Segmentation: the pyramid, the head, the numbers, and the three doors on a segmenter."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import draw_data
from test_train import Killed, kill_before, tensors
from torch.nn import functional as F

import engine.train as training
from data.augment import letterbox_of
from data.config import read_data_spec
from data.images import read_image
from data.masks import read_ids
from data.structures import VOID, Fault, LabelMap, Sample, Targets
from engine.calibrate import calibrate_by
from engine.config import TrainConfig, train_config
from engine.draw import class_color, draw_label_map, grid, wide_places
from engine.infer import load
from engine.infer import main as detect
from engine.measure import repeated
from engine.outcomes import most_wrong
from engine.runs import read_csv
from engine.segment import SegMetrics, class_weights, confusion_of, ious, label_map, miou_error, seg_metrics
from engine.step import scaled
from engine.tasks import SEGMENT, check_data, check_options, task_of
from engine.train import main as train_door
from engine.train import train
from engine.validate import main as val
from models.checkpoint import load_checkpoint
from models.graph import load_graph, resolve
from models.network import Network, build
from models.ops.aspp import ASPP
from models.parse import parse_text
from models.registry import Shape

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("sky", "road", "car")
MODEL = """\
nc: 21
activation: relu
backbone:
  - [-1, 1, Conv, [12, 3, 2]]
  - {name: trunk, from: -1, op: Conv, args: [24, 3, 2]}
head:
  - [-1, 1, ASPP, [16, [2, 4], {dropout: 0.1}]]
  - [-1, 1, SegHead, [nc]]
"""


# ---- the pyramid and the head


@pytest.mark.parametrize(
    ("name", "stride", "parameters"),
    [
        ("resnet18-deeplab", 8, 15_904_085),
        ("resnet18-deeplab-os16", 16, 15_904_085),
        # torchvision's, less the second head that only training sees: 42,004,074 and 60,996,202 less 2,365,205
        ("resnet50-deeplab", 8, 39_638_869),
        ("resnet101-deeplab", 8, 58_630_997),
    ],
)
def test_the_models_have_the_parameters_of_the_published_ones(name: str, stride: int, parameters: int) -> None:
    graph = load_graph(ROOT / f"cfg/models/{name}.yaml")
    with torch.device("meta"):
        network = Network(graph)
        (logits,), _ = network(torch.empty(2, 3, 64, 96))
    assert graph.notes == () and task_of(graph.spec) is SEGMENT
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert logits.shape == (2, 21, 64 // stride, 96 // stride) and network.max_stride == stride


def test_the_pyramid_is_its_parts_side_by_side() -> None:
    torch.manual_seed(0)
    pyramid, x = ASPP(6, 4, (1, 3), act="relu").eval(), torch.randn(2, 6, 7, 5)
    for norm in pyramid.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()  # type: ignore[union-attr]

    def part(block: Any, y: torch.Tensor, **how: Any) -> torch.Tensor:
        bn = block.bn
        y = F.conv2d(y, block.conv.weight, **how)
        return F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5))

    mean = part(pyramid.pool, x.mean((2, 3), keepdim=True)).repeat(1, 1, 7, 5)
    first, *dilated = pyramid.convs
    wide = [part(block, x, padding=rate, dilation=rate) for block, rate in zip(dilated, (1, 3), strict=True)]
    torch.testing.assert_close(pyramid(x), part(pyramid.project, torch.cat([part(first, x), *wide, mean], 1)))


def test_one_image_alone_is_no_batch_for_the_norm_of_its_mean() -> None:
    """A mean of one value is the value itself: what it norms is nothing, and torch refuses it."""
    torch.manual_seed(0)
    pyramid, x = ASPP(6, 4, (1,), dropout=0.0), torch.randn(2, 6, 4, 4)
    pyramid(x)
    before = pyramid.pool.bn.running_mean.clone()  # type: ignore[union-attr, operator]
    assert before.any() and pyramid(x[:1]).shape == (1, 4, 4, 4)
    assert torch.equal(pyramid.pool.bn.running_mean, before)  # type: ignore[arg-type]
    assert pyramid.pool.training and pyramid.pool.bn.training
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        pyramid.pool(x[:1].mean((2, 3), keepdim=True))


def test_calibration_reaches_the_norm_of_the_images_mean() -> None:
    """Three images, in batches of two and one: the last has no variance, and says nothing of this norm."""
    torch.manual_seed(0)
    pyramid, x = ASPP(6, 4, (1,), dropout=0.0).eval(), torch.randn(3, 6, 4, 4)
    norm = pyramid.pool.bn
    calibrate_by(pyramid, pyramid, [x[:2], x[2:]])
    seen = pyramid.pool.conv(x[:2].mean((2, 3), keepdim=True))  # type: ignore[union-attr, operator]
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))  # type: ignore[union-attr]
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))  # type: ignore[union-attr]
    assert not norm.training  # type: ignore[union-attr]


def head_of(classes: int = 3, **options: Any) -> Any:
    text = f"nc: {classes}\nbackbone:\n  - [-1, 1, Conv, [4, 3, 2]]\nhead:\n  - [-1, 1, SegHead, [nc]]\n"
    head = build(parse_text(text)).head
    head.options.update(options)
    return head


def targets_of(masks: torch.Tensor) -> Targets:
    none = torch.zeros(0, dtype=torch.int64)
    return Targets(torch.zeros(0, 4), none, none, masks.to(torch.uint8))


def test_scores_are_linear_between_the_middles_of_cells() -> None:
    """Of cells 0 and 4 at stride 2 the middles lie at 1 and 3: pixels at 0.5, 1.5, 2.5 and 3.5 have 0, 1, 3 and 4."""
    head = head_of(2)
    logits = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    enlarged = head.enlarged([logits])
    assert enlarged[0, 0].tolist() == [[0, 1, 3, 4]] * 2
    found = head.decode([logits])
    torch.testing.assert_close(found[:, 0], torch.sigmoid(enlarged[:, 0]))
    torch.testing.assert_close(found.sum(1), torch.ones(1, 2, 4))
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(head([x])[0], torch.einsum("kc,nchw->nkhw", head.conv.weight[..., 0, 0], x)
                               + head.conv.bias[:, None, None])  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_over_all_pixels_that_are_not_void(smoothing: float) -> None:
    torch.manual_seed(0)
    head, y = head_of(label_smoothing=smoothing), torch.randn(2, 3, 4, 3)
    masks = torch.randint(0, 3, (2, 8, 6))
    masks[0, :3] = VOID
    loss, parts = head.loss([y], targets_of(masks))
    log = F.interpolate(y, (8, 6), mode="bilinear").log_softmax(1)
    by_hand = [
        -(1 - smoothing) * log[n, masks[n, r, c], r, c] - smoothing * log[n, :, r, c].mean()
        for n in range(2)
        for r in range(8)
        for c in range(6)
        if masks[n, r, c] != VOID
    ]
    assert len(by_hand) == 2 * 48 - 18
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    assert float(parts["seg"]) == float(loss)


def test_a_batch_of_nothing_but_void_has_no_loss_and_moves_nothing() -> None:
    y = torch.randn(2, 3, 4, 3, requires_grad=True)
    loss, _ = head_of().loss([y], targets_of(torch.full((2, 8, 6), VOID)))
    (gradient,) = torch.autograd.grad(loss, y)
    assert float(loss.detach()) == 0 and not gradient.any()


def test_a_pixel_counts_by_the_weight_of_its_class() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 5.0, 0.5])
    head, y = head_of(class_weights=weights), torch.randn(2, 3, 4, 3)
    masks = torch.randint(0, 3, (2, 8, 6))
    masks[0, :3] = VOID
    loss, _ = head.loss([y], targets_of(masks))
    wanted = F.cross_entropy(F.interpolate(y, (8, 6), mode="bilinear"), masks, weights, ignore_index=VOID)
    torch.testing.assert_close(loss, wanted)  # torch's own mean is the weighted one
    assert float(head.loss([y], targets_of(torch.full((2, 8, 6), VOID)))[0]) == 0


def test_weights_of_classes_are_the_median_frequency_to_their_own() -> None:
    """Class 0 fills half of both images, 1 half of the first one, 2 an eighth of the second; nothing shows class 3."""

    def sample(labels: list[int], areas: list[float]) -> Sample:
        boxes = np.zeros((len(labels), 4), np.float32)
        return Sample(Path("a.png"), boxes, np.array(labels, np.int64), areas=np.array(areas))

    samples = [sample([0, 1], [40.0, 40.0]), sample([0, 2], [35.0, 5.0])]
    shares = torch.tensor([75 / 120, 40 / 80, 5 / 40])
    torch.testing.assert_close(class_weights(samples, 4), torch.tensor([*(0.5 / shares).tolist(), 1.0]))


def test_a_second_head_is_there_in_training_only() -> None:
    """With it the network has as many parameters as torchvision's, and a loss that reaches what lies before it."""
    text = (ROOT / "cfg/models/resnet50-deeplab.yaml").read_text()
    row = "dilation: 2}]]  # 4: stride 8 in place of 16\n"
    with_it = text.replace(row, f"{row}  - [-1, 1, AuxSegHead, [nc]]\n")
    with torch.device("meta"):
        assert sum(p.numel() for p in build(parse_text(with_it)).parameters()) == 42_004_074
    torch.manual_seed(0)
    small = MODEL.replace("head:\n", "  - [-1, 1, AuxSegHead, [nc, 0.4, {dropout: 0.0}]]\nhead:\n")
    network, images = build(parse_text(small)), torch.rand(2, 3, 16, 24)
    targets = targets_of(torch.randint(0, 3, (2, 16, 24)))
    outputs, aux = network.train()(images)
    loss, parts = network.loss_from(outputs, targets, aux)
    wanted = F.cross_entropy(F.interpolate(aux[2], scale_factor=4.0, mode="bilinear"), targets.masks.long())  # type: ignore[union-attr]
    torch.testing.assert_close(parts["aux"], 0.4 * wanted.detach())
    torch.testing.assert_close(loss.detach(), parts["seg"] + parts["aux"])
    parts_of = dict(network.layers[2].named_parameters())
    assert set(parts_of) == {f"classifier.{name}" for name in ("0.weight", "1.weight", "1.bias", "4.weight", "4.bias")}
    network.layers[2].aux_loss(aux[2], targets).backward()
    assert network.layers[0].conv.weight.grad.any()
    _, aux = network.eval()(images)
    assert aux == {}


def test_the_head_reads_one_map() -> None:
    rows = "nc: 2\nbackbone:\n  - [-1, 1, Conv, [4, 3, 2]]\n  - [-1, 1, Conv, [4, 3, 2]]\nhead:\n"
    with pytest.raises(Fault, match="the head reads one map, got 2"):
        resolve(parse_text(f"{rows}  - [[0, 1], 1, SegHead, [nc]]\n"))
    with pytest.raises(Fault, match=re.escape("dilations=[] should be a list of at least one dilation")):
        resolve(parse_text(f"{rows}  - [-1, 1, ASPP, [4, []]]\n  - [-1, 1, SegHead, [nc]]\n"))
    assert resolve(parse_text(MODEL)).nodes[-1].output == Shape(0, 4, "maps")


# ---- the numbers


def test_numbers_that_were_worked_out_by_hand() -> None:
    """Four classes, the last of which neither is there nor was found; two pixels of twelve are void."""
    truth = np.array([[0, 0, 0, 0], [1, 1, 1, 2], [2, 2, VOID, VOID]], np.uint8)
    found = np.array([[0, 0, 0, 1], [1, 1, 0, 2], [1, 1, 3, 0]], np.uint8)
    confusion = confusion_of(found, truth, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [1, 2, 2, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    metrics = seg_metrics(confusion[None], list("abcd"))
    assert ious(confusion)[:3] == pytest.approx([3 / 5, 2 / 6, 1 / 3]) and math.isnan(ious(confusion)[3])
    assert metrics.miou == metrics.fitness == pytest.approx((3 / 5 + 1 / 3 + 1 / 3) / 3)
    assert metrics.pixel_accuracy == pytest.approx(6 / 10)
    assert metrics.mean_recall == pytest.approx((3 / 4 + 2 / 3 + 1 / 3) / 3)
    assert metrics.per_class[0] == ("a", pytest.approx(0.4), pytest.approx(0.6), pytest.approx(0.75), 0.75)
    assert metrics.per_class[2][4] == 1 and math.isnan(metrics.per_class[3][4]) and math.isnan(metrics.miou_error)
    assert metrics.summary() == "mIoU 0.422, pixel accuracy 0.600, mean recall 0.583, 1 images"
    assert metrics.table().splitlines()[:4] == [
        "class  pixels    IoU  recall  precision",
        "-----  ------  -----  ------  ---------",
        "all     1.000  0.422   0.583          -",
        "a       0.400  0.600   0.750      0.750",
    ]


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 999))
def test_numbers_are_those_of_counting_pixel_by_pixel(images: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truths = rng.integers(0, classes, (images, 4, 5)).astype(np.uint8)
    truths[rng.random(truths.shape) < 0.2] = VOID
    founds = rng.integers(0, classes, (images, 4, 5)).astype(np.uint8)
    confusions = np.stack([confusion_of(one, other, classes) for one, other in zip(founds, truths, strict=True)])
    metrics = seg_metrics(confusions, [str(label) for label in range(classes)])
    pairs = [(f, t) for f, t in zip(founds.ravel().tolist(), truths.ravel().tolist(), strict=True) if t != VOID]
    shares = []
    for label in range(classes):
        either = sum(label in pair for pair in pairs)
        if either:
            shares.append(sum(pair == (label, label) for pair in pairs) / either)
    if pairs:
        assert metrics.miou == pytest.approx(sum(shares) / len(shares))
        assert metrics.pixel_accuracy == pytest.approx(sum(f == t for f, t in pairs) / len(pairs))
    else:
        assert math.isnan(metrics.miou) and math.isnan(metrics.pixel_accuracy)
    places = most_wrong(confusions, images)
    wrong = [1 - c.trace() / max(1, c.sum()) if c.any() else 0 for c in confusions]
    assert [wrong[at] for at in places] == sorted((share for share in wrong if share), reverse=True)


def test_the_error_of_the_mean_is_a_jackknife_over_groups_of_images() -> None:
    """Four images are two groups; without each, mIoU is that of the other two: here 0.5 and 1."""
    right, wrong = np.diag([2, 2]), np.array([[1, 1], [1, 1]])
    assert ious(right + wrong).tolist() == [0.6, 0.6]
    confusions = np.stack([right, wrong, right, right])
    without = [0.6, 1.0]  # images 1 and 3 are left, then 0 and 2
    assert miou_error(confusions) == pytest.approx(math.sqrt(1 / 2 * 2 * ((without[0] - without[1]) / 2) ** 2))
    assert math.isnan(miou_error(confusions[:3])) and miou_error(np.stack([right] * 20)) == 0


@settings(max_examples=30)
@given(st.integers(5, 60), st.integers(5, 60), st.integers(0, 99))
def test_a_map_of_classes_is_that_of_scores_at_the_size_of_the_image(width: int, height: int, seed: int) -> None:
    """Against all classes at once, by torch, from the part of the square that the image fills."""
    box = letterbox_of(width, height, 32)
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 32, 32)).astype(np.float32))
    rows, columns = (max(1, round(side * box.scale)) for side in (height, width))
    inside = scores[None, :, box.pad_y : box.pad_y + rows, box.pad_x : box.pad_x + columns]
    wanted = F.interpolate(inside, (height, width), mode="bilinear", align_corners=False)[0].argmax(0)
    found = label_map(scores, box)
    assert found.shape == (height, width) and found.dtype == torch.uint8
    assert torch.equal(found.long(), wanted)


def test_a_map_is_drawn_with_names_where_its_classes_are_wide() -> None:
    labels = np.zeros((120, 200), np.uint8)
    labels[:, 100:] = 1
    labels[:40, 150:] = VOID
    labels[100:103, 3:6] = 2  # too small to be named
    assert wide_places(labels).keys() == {0, 1}
    (x0, y0), (x1, y1) = wide_places(labels).values()
    assert 40 < x0 < 60 and 40 < y0 < 80 and 130 < x1 < 170 and 60 < y1 < 90
    image = np.full((120, 200, 3), 100, np.uint8)
    plain = draw_label_map(image, LabelMap(torch.from_numpy(labels)), NAMES, show_labels=False)
    assert (plain[10, 180] == 100).all() and (image == 100).all()  # void stays, and so does the image itself
    np.testing.assert_allclose(plain[60, 20], 0.45 * 100 + 0.55 * np.array(class_color(0)), atol=1)
    named = draw_label_map(image, LabelMap(torch.from_numpy(labels)), NAMES)
    changed = np.flatnonzero((named != plain).any(axis=(0, 2)))
    assert changed.min() > 20 and changed.max() < 190


# ---- tasks


def test_what_does_not_go_together_is_refused(place: Path, tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.yaml"
    boxes.write_text("train: .\nnames: [a, b]\n")
    with pytest.raises(Fault) as fault:
        check_data(parse_text(MODEL, "m.yaml"), read_data_spec(boxes))
    assert str(fault.value) == (
        f"{boxes}: is of format yolo, but m.yaml is a segmenter (its head is SegHead); one of format masks is right"
    )
    with pytest.raises(Fault) as fault:
        check_options(SEGMENT, TrainConfig(mixup=0.5, copy_small=0.5))
    assert fault.value.lines == (
        "--mixup 0.5: means nothing to a segmenter; leave it out",
        "--copy-small 0.5: means nothing to a segmenter; leave it out",
    )
    assert check_options(SEGMENT, TrainConfig()).mosaic == 0  # unless it is asked for
    assert check_options(SEGMENT, TrainConfig(mosaic=0.5, rect=True)).mosaic == 0.5


def test_masks_go_with_their_images_wherever_a_batch_is_made_anew() -> None:
    masks = torch.arange(2 * 4 * 8).reshape(2, 4, 8)
    images, targets = scaled(torch.rand(2, 3, 4, 8), targets_of(masks), 16, 4)
    assert images.shape == (2, 3, 8, 16) and targets.masks is not None and targets.masks.dtype == torch.uint8
    assert torch.equal(targets.masks, masks.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8))
    batch = training_batch(masks)
    assert torch.equal(repeated(batch, 5).targets.masks, targets_of(masks[[0, 1, 0, 1, 0]]).masks)  # type: ignore[arg-type]
    picture = grid(torch.zeros(2, 3, 300, 300, dtype=torch.uint8), targets_of(torch.ones(2, 300, 300)), NAMES)
    assert picture.shape == (300, 600, 3) and (picture[20, 20] == np.round(0.55 * np.array(class_color(1)))).all()


def training_batch(masks: torch.Tensor) -> Any:
    from data.structures import Batch, Letterbox

    box = Letterbox(8, 4, 1.0, 0, 0)
    return Batch(torch.zeros(2, 3, 4, 8, dtype=torch.uint8), targets_of(masks), (box, box), (0, 1))


# ---- the doors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw_data(folder, 9, 4, (60, 44))
    (folder / "model.yaml").write_text(MODEL)
    return folder


def options_of(place: Path, project: Path, **more: Any) -> dict[str, Any]:
    given = {"cfg": place / "model.yaml", "data": place / "data.yaml", "epochs": 6, "batch_size": 4, "imgsz": 64}
    return {**given, "device": "cpu", "project": project, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.1, "lr0": 0.02, **more}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, pictures and all. Its last batch of an epoch has one image."""
    return train(train_config(options_of(place, tmp_path_factory.mktemp("runs"))), progress=False).folder


def test_a_segmenter_learns_and_leaves_all_that_it_promises(whole: Path) -> None:
    rows = read_csv(whole / "results.csv")
    assert list(rows[0])[2:8] == ["lr", "loss", "seg", "miou", "pixel_accuracy", "mean_recall"]
    assert max(float(row["miou"]) for row in rows) >= 0.6  # all as road: under .25
    checkpoint = load_checkpoint(whole / "best.pt")
    assert checkpoint.names == NAMES and checkpoint.plain["miou"] >= 0.6
    pictures = {"train_batch0.jpg", "labels.png", "results.png", "confusion_matrix.png", "worst.jpg"}
    assert pictures <= {path.name for path in whole.iterdir()}
    assert "mosaic: 0.0" in (whole / "config.yaml").read_text()
    best = load_checkpoint(whole / "last.pt").training["best"]["metrics"]  # type: ignore[index]
    again = training.Best.restore({"fitness": 1.0, "epoch": 1, "metrics": best}, SegMetrics)
    assert asdict(again)["metrics"] == best


def test_a_run_that_was_killed_ends_with_the_same_weights(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_before(patch, "epoch_line", 3)
        with pytest.raises(Killed):
            train(train_config(options_of(place, tmp_path, noplots=True)), progress=False)
    result = train(TrainConfig(resume=tmp_path / "exp"), progress=False)
    one, other = (tensors(load_checkpoint(folder / "last.pt").training) for folder in (whole, result.folder))
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
        elif "ms_per_image" not in name:
            assert value == other[name] or (value != value and other[name] != other[name]), name


def test_options_that_mean_nothing_are_refused_by_each_door(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(door: Any, *words: object) -> str:
        assert door([*map(str, words), "--project", str(tmp_path)]) == 2
        return capsys.readouterr().err

    data, best, model, images = place / "data.yaml", whole / "best.pt", place / "model.yaml", place / "images/val"
    told_of = {
        "--mixup 0.2": (train_door, "--cfg", model, "--data", data, "--mixup", 0.2, "--epochs", 1),
        "--letterbox corner": (val, "--weights", best, "--data", data, "--letterbox", "corner"),
        "--iou-thres 0.5": (detect, "--weights", best, "--source", images, "--iou-thres", 0.5),
        "--save-crop": (detect, "--weights", best, "--source", images, "--save-crop"),
    }
    for option, (door, *words) in told_of.items():
        assert told(door, *words) == f"{option}: means nothing to a segmenter; leave it out\n"
    wrong = told(train_door, "--cfg", model, "--data", data, "--box", 2, "--epochs", 1)
    assert wrong == "--box 2: the loss of SegHead has no such option; it has --class-weights, --label-smoothing\n"
    wrong = told(train_door, "--cfg", model, "--data", data, "--single-cls")
    assert wrong == f"--single-cls: {data} has nothing but the classes of pixels; leave it out\n"
    assert not list(tmp_path.iterdir())


def test_the_numbers_of_val_are_those_of_its_own_masks_counted_anew(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--save-json", "--save-txt", "--project", str(tmp_path), "--batch-size", "4"]
    assert val(["--weights", str(whole / "best.pt"), "--data", str(place / "data.yaml"), *words]) == 0
    told = capsys.readouterr().out
    reached = max(float(row["miou"]) for row in read_csv(whole / "results.csv"))
    assert f"mIoU {reached:.3f} +- " in told and "class  pixels    IoU  recall  precision" in told
    numbers = json.loads((tmp_path / "exp/metrics.json").read_text())["segment"]
    assert numbers["miou"] == pytest.approx(reached) and len(numbers["per_class"]) == 3

    right, either = np.zeros(3), np.zeros(3)
    for index in range(4):
        truth, found = read_ids(place / f"masks/val/{index}.png"), read_ids(tmp_path / f"exp/labels/{index}.png")
        for label in range(3):
            mine, asked = (found == label) & (truth != 3), truth == label
            right[label] += (mine & asked).sum()
            either[label] += (mine | asked).sum()
    assert numbers["miou"] == pytest.approx(float((right / either).mean()))
    rows = json.loads((tmp_path / "exp/predictions.json").read_text())
    assert len(rows) == 4 and all(0 < row["pixel_accuracy"] <= 1 and set(row["iou"]) == set(NAMES) for row in rows)
    assert (tmp_path / "exp/confusion_matrix.png").stat().st_size > 0 and (tmp_path / "exp/worst.jpg").is_file()


def test_new_images_are_shown_in_all_forms(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, forms = place / "images/val", ["--save-txt", "--save-csv", "--save-json", "--project", str(tmp_path)]
    assert detect(["--weights", str(whole / "best.pt"), "--source", str(source), *forms]) == 0
    told = capsys.readouterr().out
    assert re.search(r"class +images +mean share\n", told) and re.search(r"\nroad +4 +0\.\d{3}\n", told)
    model = load(whole / "best.pt")
    one = model(source / "0.png")
    both = model([source / "0.png", source / "1.png"], batch_size=2)
    assert one.labels.shape == (44, 60) and sum(one.shares.values()) == pytest.approx(1)
    assert (both[0].labels == one.labels).mean() > 0.99 and both[0].draw().shape == one.image.shape
    np.testing.assert_array_equal(read_ids(tmp_path / "exp/labels/0.png"), one.labels)
    with open(tmp_path / "exp/predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == "0.png"]
    assert {row["class"]: float(row["share"]) for row in rows} == {
        name: pytest.approx(share, abs=1e-5) for name, share in one.shares.items() if share
    }
    entries = json.loads((tmp_path / "exp/predictions.json").read_text())
    assert sum(entry["pixels"] for entry in entries[0]["classes"]) == 60 * 44
    np.testing.assert_array_equal(read_image(tmp_path / "exp/0.png"), one.draw())
    with pytest.raises(Fault, match="mean nothing to a segmenter"):
        model(source / "0.png", conf=0.5)


def test_a_film_is_painted_frame_by_frame(whole: Path, place: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 10, (60, 44))
    for index in range(3):
        writer.write(cv2.imread(str(place / f"images/val/{index}.png")))
    writer.release()
    words = ["--save-txt", "--fourcc", "MJPG", "--project", str(tmp_path / "out"), "--batch-size", "2"]
    assert detect(["--weights", str(whole / "best.pt"), "--source", str(film), *words]) == 0
    assert sorted(path.name for path in (tmp_path / "out/exp/labels").iterdir()) == [f"film_{n}.png" for n in (1, 2, 3)]
    capture = cv2.VideoCapture(str(tmp_path / "out/exp/film.avi"))
    frames = [frame for done, frame in iter(capture.read, (False, None)) if done]
    assert len(frames) == 3 and frames[0].shape == (44, 60, 3)


def test_half_a_class_more_or_less_is_no_obstacle_for_weights(whole: Path, place: Path, tmp_path: Path) -> None:
    """Other classes than before: all but the last layer is taken over. Mosaics, turned images and rectangles do."""
    few = tmp_path / "few.yaml"
    few.write_text(f"path: {place}\n" + (place / "data.yaml").read_text().replace("names: [sky, road, car]",
                   "names: [sky, ground]").replace("void: 3", "void: [2, 3]"))  # fmt: skip
    given = options_of(place, tmp_path, data=few, weights=whole / "best.pt", epochs=2, freeze=("0", "trunk"))
    given |= {"mosaic": 0.5, "degrees": 10, "multi_scale": True, "noplots": True}
    del given["cfg"]
    folder = train(train_config(given), progress=False).folder
    before, after = (load_checkpoint(path / "best.pt").state for path in (whole, folder))
    assert after["layers.3.conv.weight"].shape == (2, 16, 1, 1)
    still = [name for name in before if re.match(r"layers\.[01]\.", name)]
    assert still and all(torch.equal(before[name], after[name]) for name in still)
