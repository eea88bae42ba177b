"""COCO's numbers: against published ones, against numbers worked out by hand, and through a network that sees."""

import contextlib
import io
import json
import math
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from data.dataset import ImageSet
from data.structures import Detections, Fault, Sample
from engine import validate as module
from engine.doors import check_imgsz, check_names
from engine.evaluate import coco_results, detections_of, evaluate, file_names, label_lines
from engine.metrics import coco_metrics
from models.parse import parse_text

SHARED = Path(__file__).parents[2] / "shared" / "data"
RED, GREEN = (255, 0, 0), (0, 255, 0)


class Seer(nn.Module):
    """Stands in for a network: finds the red (label 0) and the green (label 1) thing in an image, and its mirror.

    The mirrored box has a low score, so that there is something for thresholds to leave out.
    """

    num_classes, max_stride, suppresses = 2, 32, True

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def predict(self, images):
        assert not self.training and not torch.is_grad_enabled()
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        boxes = torch.zeros(len(images), 4, 4)
        scores = torch.zeros(len(images), 4, 2)
        for n, image in enumerate(images):
            for label in (0, 1):
                y, x = (image[label] - image[[1 - label, 2]].amax(0) > 0.5).nonzero(as_tuple=True)
                if len(x):
                    left, right, width = x.min(), x.max() + 1, image.shape[2]
                    boxes[n, label] = torch.stack([left, y.min(), right, y.max() + 1])
                    boxes[n, 2 + label] = torch.stack([width - right, y.min(), width - left, y.max() + 1])
                    scores[n, label, label], scores[n, 2 + label, label] = 0.9 - 0.1 * label, 0.2
        return boxes, scores


def drawn(folder, name, size, things):
    """An image with filled rectangles, ``(colour, x1, y1, x2, y2)``, and the sample that says so."""
    width, height = size
    image = np.full((height, width, 3), 90, np.uint8)
    for color, x1, y1, x2, y2 in things:
        image[y1:y2, x1:x2] = color
    path = folder / name
    assert cv2.imwrite(str(path), image[..., ::-1])
    boxes = np.array([box for _, *box in things], np.float32).reshape(-1, 4)
    return Sample(path, boxes, np.array([int(color == GREEN) for color, *_ in things], np.int64))


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores), torch.tensor(labels).long())


def close(values):
    return pytest.approx(values, abs=1e-6, nan_ok=True)


# ---- the metric ----


@pytest.fixture(params=["pycocotools", "faster_coco_eval"])
def backend(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def coco_reference():
    folder = SHARED / "metric_refs" / "review_tests" / "test_coco_eval"
    if not folder.is_dir():
        pytest.skip(f"the published COCO numbers are not here: {folder} is missing")
    truth = json.loads((folder / "gts" / "sampled_gts_bbox_area.json").read_text())
    rows = json.loads((folder / "cocoapi_results.json").read_text())
    labels = {category["id"]: n for n, category in enumerate(truth["categories"])}

    def of(image, annotations):
        mine = [row for row in annotations if row["image_id"] == image]
        xywh = np.array([row["bbox"] for row in mine]).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return mine, xyxy, np.array([labels[row["category_id"]] for row in mine], np.int64)

    truths, detections = [], []
    for image in sorted(row["id"] for row in truth["images"]):
        _, boxes, classes = of(image, truth["annotations"])
        truths.append(Sample(Path(str(image)), boxes, classes))  # float64: some IoUs are a threshold to the last bit
        mine, boxes, classes = of(image, rows)
        scores = torch.tensor([row["score"] for row in mine])
        detections.append(Detections(torch.tensor(boxes), scores, torch.tensor(classes)))
    return truths, detections, [category["name"] for category in truth["categories"]]


def test_published_coco_numbers(backend):
    metrics = coco_metrics(*coco_reference(), backend=backend)
    expected = [0.503647, 0.696973, 0.571667, 0.593252, 0.557991, 0.489363, 0.386813, 0.593680, 0.595353]
    assert list(astuple(metrics)[:9]) == close(expected)
    assert np.nanmean([ap for _, ap, _ in metrics.per_class]) == close(metrics.ap)
    assert np.nanmean([ap50 for _, _, ap50 in metrics.per_class]) == close(metrics.ap50)


def test_a_case_worked_out_by_hand(backend, capsys):
    # one hit, one miss, one hit of IoU 7.6 / 12.4 = .613: precision 1 up to recall .5, then 2/3 where .613 is enough
    truths = [Sample(Path("a"), np.array([[0, 0, 10, 10], [40, 0, 50, 10]], np.float32), np.zeros(2, np.int64))]
    boxes = [[0.0, 0, 10, 10], [80, 0, 90, 10], [42.4, 0, 52.4, 10], [0, 0, 10, 10]]
    metrics = coco_metrics(truths, [found(boxes, [0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1])], ["cat", "dog"], backend=backend)
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    ap = 0.3 * loose + 0.7 * strict
    nan = math.nan
    assert list(astuple(metrics)[:12]) == close([ap, loose, strict, ap, nan, nan, 0.5, 0.65, 0.65, 0.65, nan, nan])
    assert list(metrics.per_class[0][1:]) == close([ap, loose])
    assert math.isnan(metrics.per_class[1][1])  # found, but nothing of it was there: it is in no mean
    assert capsys.readouterr().out == ""
    assert metrics.table().splitlines() == [
        "class     AP   AP50",
        "-----  -----  -----",
        "all    0.604  0.835",
        "cat    0.604  0.835",
        "dog        -      -",
    ]
    assert "1 images" in metrics.summary()


def test_finding_nothing_is_zero_and_nothing_to_find_is_nan(backend):
    truths = [Sample(Path("a"), np.array([[0, 0, 10, 10]], np.float32), np.zeros(1, np.int64))]
    nothing = found([], [], [])
    assert coco_metrics(truths, [nothing], ["cat"], backend=backend).ap == 0
    empty = [Sample(Path("a"), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))]
    assert math.isnan(coco_metrics(empty, [nothing], ["cat"], backend=backend).ap)
    assert math.isnan(coco_metrics([], [], ["cat"], backend=backend).ap)


def test_both_backends_agree():
    pytest.importorskip("faster_coco_eval", reason="faster_coco_eval is not installed (the fast extra)")
    rng = np.random.default_rng(0)
    truths, detections = [], []
    for _ in range(20):
        corner, label = rng.uniform(0, 300, (12, 2)), rng.integers(0, 4, 12)
        boxes = np.concatenate([corner, corner + rng.uniform(5, 150, (12, 2))], axis=1)
        truths.append(Sample(Path("a"), boxes.astype(np.float32), label))
        moved = np.concatenate([boxes + rng.normal(0, 6, boxes.shape), boxes[::-1]])
        detections.append(found(moved.tolist(), rng.uniform(0, 1, 24).round(1).tolist(), [*label, *label]))
    slow, fast = (
        coco_metrics(truths, detections, list("abcd"), backend=b) for b in ("pycocotools", "faster_coco_eval")
    )
    assert list(astuple(slow)[:12]) == close(list(astuple(fast)[:12]))
    for a, b in zip(slow.per_class, fast.per_class, strict=True):
        assert list(a[1:]) == close(list(b[1:]))


def ignoring(boxes, crowd, **more):
    """A sample of one object, 10 x 10 at the corner, beside which these are ignored."""
    return Sample(
        Path("a"),
        np.array([[0, 0, 10, 10]], np.float32),
        np.zeros(1, np.int64),
        ignored_boxes=np.array(boxes, np.float32),
        ignored_labels=np.zeros(len(boxes), np.int64),
        ignored_crowd=np.full(len(boxes), crowd),
        **more,
    )


def test_a_crowd_takes_every_detection_inside(backend):
    boxes = [[110.0, 110, 120, 120], [130, 130, 140, 140], [0, 0, 10, 10]]
    seen = found(boxes, [0.9, 0.8, 0.7], [0, 0, 0])
    assert coco_metrics([ignoring([[100, 100, 200, 200]], True)], [seen], ["cat"], backend=backend).ap == close(1)
    # by plain overlap neither is in it: two wrong ones before the right one
    plain = coco_metrics([ignoring([[100, 100, 200, 200]], False)], [seen], ["cat"], backend=backend)
    assert plain.ap == close(1 / 3)


def test_a_difficult_object_takes_one_detection(backend):
    boxes = [[50.0, 50, 60, 60], [0, 0, 10, 10], [50, 50, 60, 60]]
    truth = ignoring([[50, 50, 60, 60]], False)
    once, twice = found(boxes[:2], [0.9, 0.7], [0, 0]), found(boxes, [0.9, 0.7, 0.8], [0, 0, 0])
    assert list(astuple(coco_metrics([truth], [once], ["cat"], backend=backend))[:4]) == close([1, 1, 1, 1])
    assert coco_metrics([truth], [twice], ["cat"], backend=backend).ap == close(0.5)


def test_the_area_of_the_outline_says_how_large_an_object_is(backend):
    truth = [Sample(Path("a"), np.array([[0, 0, 40, 40]], np.float32), np.zeros(1, np.int64), np.array([500.0]))]
    by_outline = coco_metrics(truth, [found([[0.0, 0, 40, 40]], [0.9], [0])], ["cat"], backend=backend)
    assert [by_outline.ap_small, by_outline.ap_medium] == close([1, math.nan])
    assert by_outline.per_class_sizes == (close((1, math.nan, math.nan)),)
    by_box = coco_metrics([Sample(*astuple(truth[0])[:3])], [found([[0.0, 0, 40, 40]], [0.9], [0])], ["cat"])
    assert [by_box.ap_small, by_box.ap_medium] == close([math.nan, 1])


def pycocotools_stats(truths, detections, classes):
    """COCO's own program on files as one would write them by hand: results go through its ``loadRes``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(box):
        x1, y1, x2, y2 = map(float, box)
        return [x1, y1, x2 - x1, y2 - y1]

    annotations, rows = [], []
    for image, (truth, seen) in enumerate(zip(truths, detections, strict=True)):
        areas = truth.areas if truth.areas is not None else [w * h for *_, w, h in map(xywh, truth.boxes)]
        for box, label, area in zip(truth.boxes, truth.labels, areas, strict=True):
            annotations.append(dict(image_id=image, category_id=int(label), bbox=xywh(box), area=area, iscrowd=0))
        for box, label in zip(truth.ignored_boxes, truth.ignored_labels, strict=True):
            annotations.append(dict(image_id=image, category_id=int(label), bbox=xywh(box), area=1.0, iscrowd=1))
        for box, label, score in zip(seen.boxes, seen.labels, seen.scores, strict=True):
            rows.append(dict(image_id=image, category_id=int(label), bbox=xywh(box), score=float(score)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(truths))],
            "categories": [{"id": label} for label in range(classes)],
            "annotations": [{**row, "id": number} for number, row in enumerate(annotations, start=1)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [value if value > -1 else math.nan for value in evaluation.stats]


@pytest.mark.parametrize("seed", range(3))
def test_any_data_gives_the_numbers_of_pycocotools(backend, seed):
    rng = np.random.default_rng(seed)
    truths, detections = [], []
    for _ in range(12):
        corner, label = rng.uniform(0, 300, (12, 2)), rng.integers(0, 5, 12)
        boxes = np.concatenate([corner, corner + np.exp(rng.uniform(1.5, 5.5, (12, 2)))], axis=1).astype(np.float32)
        crowd = rng.random(12) < 0.2
        truths.append(
            Sample(
                Path("a"),
                boxes[~crowd],
                label[~crowd],
                rng.uniform(50, 20_000, (~crowd).sum()) if seed else None,
                boxes[crowd],
                label[crowd],
                np.ones(crowd.sum(), dtype=bool),
            )
        )
        moved = np.concatenate([boxes + rng.normal(0, 4, boxes.shape), boxes[::-1], boxes])
        scores = np.sort(rng.uniform(0, 1, 36).round(1))[::-1]
        detections.append(found(moved.tolist(), scores.tolist(), [*label, *label, *rng.integers(0, 5, 12)]))
    metrics = coco_metrics(truths, detections, list("abcde"), backend=backend)
    assert list(astuple(metrics)[:12]) == close(pycocotools_stats(truths, detections, 5))


# ---- a network over a data set ----


@pytest.fixture
def pictures(tmp_path):
    return [
        drawn(tmp_path, "wide.png", (200, 80), [(RED, 20, 20, 80, 60), (GREEN, 120, 10, 180, 70)]),
        drawn(tmp_path, "tall.png", (60, 150), [(GREEN, 10, 20, 40, 90)]),
        drawn(tmp_path, "empty.png", (64, 64), []),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_network_that_sees_everything_scores_one(pictures, batch_size):
    network = Seer().train()
    dataset = ImageSet(pictures, 256, None, seed=0, cache=False)
    metrics = evaluate(network, dataset, names=["red", "green"], batch_size=batch_size, conf=0.3, progress=False)
    assert network.training
    assert metrics.ap50 == close(1) and metrics.ap > 0.9 and metrics.images == 3
    assert [name for name, *_ in metrics.per_class] == ["red", "green"]
    assert set(metrics.ms_per_image) == {"read", "network", "nms"}
    assert all(ms > 0 for ms in metrics.ms_per_image.values())


@pytest.mark.parametrize("rect", [False, True])
def test_detections_come_in_the_order_of_the_samples(pictures, rect):
    dataset = ImageSet(pictures, 256, None, seed=0, cache=False, rect=rect)
    detections, ms = detections_of(Seer(), dataset, batch_size=2, conf=0.3, progress=False)
    for sample, seen in zip(pictures, detections, strict=True):
        order = seen.labels.argsort()
        assert seen.labels[order].tolist() == sample.labels.tolist()
        np.testing.assert_allclose(seen.boxes[order], sample.boxes, atol=1)
    assert list(ms) == ["read", "network", "nms"]


def test_one_class_is_found_whatever_the_network_calls_it(pictures):
    dataset = ImageSet(pictures, 256, None, seed=0, cache=False)
    detections, _ = detections_of(Seer(), dataset, conf=0.3, one_class=True, progress=False)
    assert [seen.labels.tolist() for seen in detections] == [[0, 0], [0], []]


def test_a_network_is_put_back_after_a_failure(pictures, tmp_path):
    network = Seer().train()
    (tmp_path / "wide.png").write_bytes(b"no image")
    with pytest.raises(Fault, match="wide.png"):
        evaluate(network, ImageSet(pictures, 64, None, seed=0, cache=False), progress=False)
    assert network.training


def test_input_sizes_follow_the_stride():
    assert check_imgsz(64, 32) == 64
    for wrong in (0, 16, 70, -64):
        with pytest.raises(Fault, match=r"multiple of 32; \d+ or \d+ would do"):
            check_imgsz(wrong, 32)


def test_class_names_must_agree():
    check_names("a.pt", ("cat", "dog"), "b.yaml", ["cat", "dog"])
    for other in (("cat",), ("dog", "cat"), ("cat", "cow")):
        with pytest.raises(Fault) as fault:
            check_names("a.pt", ("cat", "dog"), "b.yaml", other)
        assert "cat, dog" in fault.value.lines[0] and ", ".join(other) in fault.value.lines[1]


# ---- val.py ----


@pytest.fixture
def val(monkeypatch, pictures, tmp_path):
    rows = "backbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead:\n  - [-1, 1, Detect, [nc, anchors]]\n"
    checkpoint = SimpleNamespace(names=("red", "green"), imgsz=256, spec=parse_text(f"nc: 2\nanchors: 1\n{rows}"))
    monkeypatch.setattr(module, "load_checkpoint", lambda path: checkpoint)
    monkeypatch.setattr(module, "restore", lambda _: Seer())
    for split in ("images", "labels"):
        (tmp_path / "set" / split / "val").mkdir(parents=True)
    for sample in pictures:
        height, width = cv2.imread(str(sample.path)).shape[:2]
        sample.path.rename(tmp_path / "set" / "images" / "val" / sample.path.name)
        lines = [
            f"{label} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
            for (x1, y1, x2, y2), label in zip(sample.boxes, sample.labels, strict=True)
        ]
        (tmp_path / "set" / "labels" / "val" / f"{sample.path.stem}.txt").write_text("".join(lines))
    data = tmp_path / "data.yaml"
    data.write_text("path: set\ntrain: images/val\nval: images/val\nnames: [red, green]\n")
    monkeypatch.chdir(tmp_path)
    return lambda *more: module.main(["--weights", "x.pt", "--data", str(data), "--device", "cpu", *more])


def test_val_prints_every_number_and_class(val, capsys):
    assert val("--conf-thres", "0.3", "--noplots") == 0
    out = capsys.readouterr().out
    for word in ("all", "red", "green", "AP75", "AR 100", "AP small", "VOC 11-point", "3 images", "network"):
        assert word in out
    assert "--conf-thres 0.3: AP counts low scores too and comes out too low; 0.001 is usual" in out
    assert sorted(path.name for path in Path("runs/val/exp").iterdir()) == ["metrics.json"]


def test_val_writes_what_was_asked_for(val, tmp_path):
    (tmp_path / "data.yaml").write_text("path: set\nval: images/val\ntest: images/val\nnames: [red, green]\n")
    options = ["--conf-thres", "0.3", "--save-json", "--save-txt", "--save-conf", "--rect"]
    assert val(*options, "--task", "test", "--name", "here") == 0
    folder = Path("runs/val/here")
    assert {path.name for path in folder.iterdir()} >= {"PR_curve.png", "F1_curve.png", "confusion_matrix.png"}
    rows = json.loads((folder / "predictions.json").read_text())
    assert {(row["image_id"], row["category_id"]) for row in rows} == {("wide", 0), ("wide", 1), ("tall", 1)}
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["coco"]["ap50"] == close(1) and numbers["voc"]["area"] == close(1)
    assert numbers["coco"]["ap_large"] is None
    first = (folder / "labels" / "wide.txt").read_text().splitlines()[0].split()
    assert first[0] == "0"
    assert [float(value) for value in first[1:]] == pytest.approx([0.25, 0.5, 0.3, 0.5, 0.9], abs=0.02)
    assert (folder / "labels" / "empty.txt").read_text() == ""
    assert val("--noplots", "--name", "here") == 0 and Path("runs/val/here2/metrics.json").is_file()


def test_val_of_a_single_class_takes_any_names(val, capsys, tmp_path):
    (tmp_path / "data.yaml").write_text("path: set\nval: images/val\nnames: [apple, pear]\n")
    assert val("--single-cls", "--conf-thres", "0.3", "--noplots", "--save-json") == 0
    assert "item" in capsys.readouterr().out
    rows = json.loads(Path("runs/val/exp/predictions.json").read_text())
    assert len(rows) == 3 and {row["category_id"] for row in rows} == {0}
    assert json.loads(Path("runs/val/exp/metrics.json").read_text())["coco"]["ap50"] == close(1)


def test_results_carry_the_ids_of_the_data():
    seen = found([[1.0, 2, 4, 6]], [0.5], [1])
    samples = [Sample(Path("a/7.jpg"), np.zeros((0, 4)), np.zeros(0), image_id=397133)]
    (row,) = coco_results(samples, [seen], (1, 90))
    assert row == {"image_id": 397133, "category_id": 90, "bbox": [1, 2, 3, 4], "score": 0.5}
    without = [Sample(Path("a/007.jpg"), np.zeros((0, 4)), np.zeros(0))]
    assert coco_results(without, [seen], range(2))[0]["image_id"] == 7


@pytest.mark.parametrize(
    "paths, names",
    [
        (["/d/a/1.jpg", "/d/a/2.jpg"], ["1", "2"]),
        (["/d/a/1.jpg", "/d/b/1.jpg"], ["a/1", "b/1"]),
        (["/d/a/1.jpg", "/d/a/1.png"], ["1.jpg", "1.png"]),
        ([], []),
    ],
)
def test_a_file_has_the_shortest_name_that_is_its_own(paths, names):
    assert file_names([Sample(Path(path), np.zeros((0, 4)), np.zeros(0)) for path in paths]) == names


def test_label_lines_by_hand():
    seen = found([[10.0, 10, 30, 20], [0, 0, 100, 50]], [0.75, 0.5], [3, 0])
    assert label_lines(seen, (100, 50), scores=True) == "3 0.2 0.3 0.2 0.2 0.75\n0 0.5 0.5 1 1 0.5\n"
    assert label_lines(seen, (100, 50), scores=False) == "3 0.2 0.3 0.2 0.2\n0 0.5 0.5 1 1\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--imgsz", "100"], "multiple of 32"),
        (["--imgsz", "0"], "multiple of 32"),
        (["--conf-thres", "1.5"], "--conf-thres"),
        (["--iou-thres", "-1"], "--iou-thres"),
        (["--max-det", "0"], "--max-det"),
        (["--batch-size", "0"], "--batch-size"),
        (["--device", "tpu"], "--device"),
        (["--split", "test"], "test"),
        (["--workers", "-1"], "--workers"),
        (["--save-conf"], "--save-conf: says what --save-txt writes; give both"),
        (["--half"], "--half: half precision needs a GPU"),
    ],
)
def test_val_says_what_is_wrong(val, capsys, options, message):
    assert val(*options) == 2
    assert message in capsys.readouterr().err
