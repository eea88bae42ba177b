"""VOC's numbers: against published ones and against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.structures import Detections, Sample
from engine.voc import RIGHT, WRONG, Curve, best_f1, curves, matched, overlap, voc_metrics

REFS = Path(__file__).resolve().parents[2] / "shared" / "data" / "metric_refs"


def found(boxes, scores, labels=None):
    labels = [0] * len(scores) if labels is None else labels
    return Detections(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores).float(), torch.tensor(labels))


def sample(boxes, labels=None, **more):
    labels = [0] * len(boxes) if labels is None else labels
    return Sample(Path("a"), np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), **more)


# ---- published


def published(folder, truth, seen):
    """Files of ``name [score] x y width height`` a line, in pixels that are counted: a box is width + 1 wide."""
    folder = REFS / folder
    if not folder.is_dir():
        pytest.skip(f"the published VOC numbers are not here: {folder} is missing")
    truths, detections = [], []
    for file in sorted((folder / truth).glob("*.txt")):
        rows = [np.array(line.split()[1:], float) for line in file.read_text().splitlines() if line.strip()]
        lines = [line for line in (folder / seen / file.name).read_text().splitlines() if line.strip()]
        others = [np.array(line.split()[1:], float) for line in lines]
        truths.append(sample([[x, y, x + w + 1, y + h + 1] for x, y, w, h in rows]))
        detections.append(found([[x, y, x + w + 1, y + h + 1] for _, x, y, w, h in others], [r[0] for r in others]))
    return truths, detections


@pytest.mark.parametrize(
    "iou, eleven_points, area",
    [(0.1, 0.3333333333, 0.3371980676), (0.3, 0.2683982683, 0.2456866804), (0.5, 0.0303030303, 0.0222222222)],
)
def test_the_published_numbers_of_seven_images(iou, eleven_points, area):
    metrics = voc_metrics(*published("review_tests/test_case_1", "gts", "dets"), ["object"], iou)
    assert metrics.eleven_points == pytest.approx(eleven_points, abs=1e-9)
    assert metrics.area == pytest.approx(area, abs=1e-9)


def test_the_published_zero():
    metrics = voc_metrics(*published("review_tests/test_case_1", "gts", "dets"), ["object"], 0.75)
    assert (metrics.eleven_points, metrics.area) == (0, 0)


def test_the_published_sample_with_its_precisions():
    truths, detections = published("voc_ap_sample", "groundtruths", "detections")
    assert voc_metrics(truths, detections, ["person"], 0.3).area == pytest.approx(0.2457, abs=5e-5)
    (curve,) = curves(truths, detections, 1, 0.3)
    precision, recall, _ = curve.at(curve.scores)
    assert curve.objects == 15 and len(curve.scores) == 24
    assert precision[[0, 1, 2, -1]].round(2).tolist() == [0.5, 0.5, 0.67, 0.29]  # the first two have one score
    assert recall[-1].round(2) == 0.47


# ---- by hand


def test_a_curve_worked_out_by_hand():
    # right, wrong, right, wrong of 3 objects: precision 1, 1/2, 2/3, 1/2, made falling 1, 2/3, 2/3, 1/2
    curve = Curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]), 3)
    assert curve.area() == pytest.approx((1 + 2 / 3) / 3)
    assert curve.eleven_points() == pytest.approx((4 + 3 * 2 / 3) / 11)  # 0 to .3, then .4 to .6, then nothing
    assert curve.precision_at(3).tolist() == [1, 1, pytest.approx(2 / 3), 0]
    precision, recall, f1 = curve.at(np.array([0.95, 0.9, 0.65, 0.0]))
    assert precision.tolist() == pytest.approx([math.nan, 1, 2 / 3, 1 / 2], nan_ok=True)
    assert recall.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 2 / 3])
    assert f1.tolist() == pytest.approx([0, 2 / 4, 4 / 6, 4 / 7])


def test_three_of_ten_objects_are_no_recall_of_three_tenths():
    curve = Curve(np.linspace(0.9, 0.8, 3), np.ones(3, dtype=bool), 10)
    assert curve.eleven_points() == pytest.approx(3 / 11)  # 3 * .1 is .30000000000000004
    assert curve.precision_at(5).tolist() == [1, 1, 0, 0, 0, 0]


def test_the_best_f1_is_where_the_mean_of_the_classes_is_highest():
    first = Curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]), 3)
    second = Curve(np.array([0.65]), np.array([True]), 1)
    absent = Curve(np.array([0.99]), np.array([False]), 0)
    best = best_f1([first, second, absent])
    assert best.confidence == pytest.approx(0.601)  # the wrong one at .6 is out, the right one at .65 is in
    assert best.f1 == pytest.approx((4 / 6 + 1) / 2)
    assert (best.precision, best.recall) == (pytest.approx((2 / 3 + 1) / 2), pytest.approx((2 / 3 + 1) / 2))
    assert best.per_class[2] == (0, pytest.approx(math.nan, nan_ok=True))
    assert best.line() == "F1 0.83 at confidence 0.601"


def test_nothing_to_find_is_nan_and_nothing_found_is_zero():
    assert math.isnan(voc_metrics([], [], ["cat"]).area)
    nothing = voc_metrics([sample([[0, 0, 9, 9]]), sample([])], [found([], []), found([], [])], ["cat", "dog"])
    assert (nothing.area, nothing.eleven_points, nothing.best.f1) == (0, 0, 0)
    assert nothing.per_class[0] == ("cat", 1, 0, 0) and math.isnan(nothing.per_class[1][2])
    only_found = voc_metrics([sample([])], [found([[0, 0, 9, 9]], [0.5])], ["cat"])
    assert math.isnan(only_found.area) and math.isnan(only_found.best.f1)


def test_the_second_to_reach_an_object_is_wrong_whatever_its_overlap():
    truth = sample([[0, 0, 10, 10], [0, 0, 10, 6]])
    # the closest object of each is the first one; VOC does not try the other
    seen = found([[0, 0, 10, 9], [0, 0, 10, 10]], [0.5, 0.9])
    assert matched(truth, seen, 0.5).tolist() == [WRONG, RIGHT]


def test_classes_do_not_meet():
    truth = sample([[0, 0, 10, 10]], [1])
    seen = found([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0, 1])
    assert matched(truth, seen, 0.5).tolist() == [WRONG, RIGHT]
    assert [row[1:] for row in voc_metrics([truth], [seen], ["a", "b"]).per_class][1] == (1, 1, 1)


def test_difficult_objects_and_crowds_are_not_counted():
    truth = sample(
        [[0, 0, 10, 10]],
        ignored_boxes=np.array([[50, 50, 60, 60], [100, 100, 200, 200]], np.float32),
        ignored_labels=np.zeros(2, np.int64),
        ignored_crowd=np.array([False, True]),
    )
    boxes = [[50, 50, 60, 60], [50, 50, 60, 60], [110, 110, 120, 120], [195, 110, 205, 120], [0, 0, 10, 10]]
    seen = found([*boxes, [206, 110, 216, 120]], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert matched(truth, seen, 0.5).tolist() == [-1, -1, -1, -1, 1, 0]  # half of the fourth is in the crowd
    metrics = voc_metrics([truth], [seen], ["cat"])
    assert metrics.area == metrics.eleven_points == 1 and metrics.per_class[0][1] == 1


def test_overlaps_by_hand():
    boxes, others = np.array([[0, 0, 10, 10.0], [5, 5, 5, 5]]), np.array([[5, 0, 15, 10.0], [5, 5, 5, 5]])
    assert overlap(boxes, others).tolist() == [[1 / 3, 0], [0, 0]]
    assert overlap(boxes, others, crowd=True).tolist() == [[0.5, 0], [0, 0]]


# ---- another way


def slow_voc(truths, detections, iou):
    """One class, one detection after the other, as the development kit's loop does it; precision and recall."""
    rows = sorted(
        ((-float(s), image, place) for image, d in enumerate(detections) for place, s in enumerate(d.scores)),
    )
    taken, right = set(), []
    for _, image, place in rows:
        overlaps = overlap(detections[image].boxes[place][None].double().numpy(), truths[image].boxes.astype(float))[0]
        which = int(overlaps.argmax()) if len(overlaps) else -1
        good = which >= 0 and overlaps[which] >= iou and (image, which) not in taken
        if good:
            taken.add((image, which))
        right.append(good)
    right, objects = np.array(right, bool), sum(len(truth.boxes) for truth in truths)
    recall = np.concatenate([[0], right.cumsum() / objects, [1]])
    precision = np.concatenate([[0], right.cumsum() / np.arange(1, len(right) + 1), [0]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = np.flatnonzero(recall[1:] != recall[:-1])
    return float(((recall[steps + 1] - recall[steps]) * precision[steps + 1]).sum())


corner = st.integers(0, 6)
boxes = st.lists(st.tuples(corner, corner, st.integers(1, 6), st.integers(1, 6)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(boxes, boxes), min_size=1, max_size=3), st.sampled_from([0.3, 0.5]), st.data())
def test_any_drawn_case_is_that_of_the_plain_loop(images, iou, data):
    def xyxy(rows):
        return [[x, y, x + w, y + h] for x, y, w, h in rows]

    truths = [sample(xyxy(truth)) for truth, _ in images]
    score = st.integers(1, 9)
    detections = [found(xyxy(rows), [data.draw(score) / 10 for _ in rows]) for _, rows in images]
    metrics = voc_metrics(truths, detections, ["thing"], iou)
    if any(truth for truth, _ in images):
        assert metrics.area == pytest.approx(slow_voc(truths, detections, iou), abs=1e-12)
    else:
        assert math.isnan(metrics.area)
