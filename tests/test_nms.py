"""The blocked NMS against a plain one that looks at one box after the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import nms as module
from engine.nms import BLOCK, best, nms, suppress
from models.boxes import pairwise_iou


def slow_nms(boxes, scores, *, conf, iou, max_det, agnostic, multi_label, classes=None):
    """One box after the other, best first; rows of (box index, label)."""
    candidates, boxes = [], boxes.double().numpy()
    for index, row in enumerate(scores.numpy()):
        x1, y1, x2, y2 = boxes[index]
        labels = [label for label in range(len(row)) if classes is None or label in classes]
        if not (x2 > x1 and y2 > y1):
            continue
        if not multi_label:
            labels = sorted(labels, key=lambda label: -row[label])[:1]  # noqa: B023
        candidates += [(-row[label], index, label) for label in labels if row[label] > np.float32(conf)]
    kept = []
    for _, index, label in sorted(candidates):
        if len(kept) == max_det:
            break
        if all(slow_iou(boxes[index], boxes[i]) <= iou for i, other in kept if agnostic or other == label):
            kept.append((index, label))
    return kept


def slow_iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


@st.composite
def predictions(draw):
    """Boxes on a coarse grid, so that ties, equal boxes and boxes without area come up, with equal scores too."""
    count, classes = draw(st.integers(0, 25)), draw(st.integers(1, 3))
    corner = st.integers(0, 8)
    boxes = [[draw(corner), draw(corner), draw(corner), draw(corner)] for _ in range(count)]
    scores = [[draw(st.integers(0, 10)) / 10 for _ in range(classes)] for _ in range(count)]
    return torch.tensor(boxes).reshape(count, 4).float(), torch.tensor(scores).reshape(count, classes).float()


@settings(max_examples=100, deadline=None)
@given(
    predictions(),
    st.sampled_from([0.0, 0.25, 0.55]),
    st.sampled_from([0.0, 0.34, 0.62, 1.0]),
    st.sampled_from([1, 3, 300]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, [0]]),
    st.sampled_from([(BLOCK, module.FIRST), (2, 3), (5, 1)]),
)
def test_blocked_is_greedy_for_any_boxes(given_, conf, iou, max_det, agnostic, multi_label, classes, sizes):
    boxes, scores = given_
    options = dict(conf=conf, iou=iou, max_det=max_det, agnostic=agnostic, multi_label=multi_label, classes=classes)
    expected = slow_nms(boxes, scores, **options)
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("BLOCK", "FIRST"), sizes, strict=True):
            patch.setattr(module, name, size)
        found = nms(boxes, scores, **options)
    assert found.labels.tolist() == [label for _, label in expected]
    torch.testing.assert_close(found.boxes, boxes[[index for index, _ in expected]], rtol=0, atol=0)
    torch.testing.assert_close(found.scores, torch.stack([scores[r] for r in expected]) if expected else scores[:0, 0])


finite = st.floats(0, 4000, width=32, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(finite, finite, finite, finite, st.integers(0, 3)), max_size=20), st.data())
def test_any_float_is_compared_in_double_precision(rows, data):
    """The threshold is the very overlap of a pair, where it is hardest to fall to the same side as the plain walk."""
    boxes = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores, labels = np.array([row[4] for row in rows], np.float32), np.zeros(len(rows), np.int64)
    exact = boxes.astype(np.float64)
    overlaps = sorted({slow_iou(a, b) for a in exact for b in exact} | {0.5})
    iou = data.draw(st.sampled_from(overlaps))
    expected: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: -rows[index][4]):
        if all(slow_iou(exact[index], exact[other]) <= iou for other in expected):
            expected.append(index)
    assert suppress(boxes, scores, labels, iou=iou, max_det=100).tolist() == expected
    assert suppress(boxes, scores, None, iou=iou, max_det=3).tolist() == expected[:3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_best_are_the_first_of_a_stable_sort(values, data):
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda place: -values[place])[:count])
    assert np.flatnonzero(best(np.array(values, np.float32), count)).tolist() == expected


def test_thirty_thousand_candidates_are_no_matrix():
    """One box beside the other, so that none goes and every block is looked at; a matrix would take 7 GB."""
    corner = np.stack(np.meshgrid(np.arange(200.0), np.arange(150.0), indexing="ij"), -1).reshape(-1, 2)
    boxes, scores = np.concatenate([corner * 10, corner * 10 + 8], 1), np.random.default_rng(0).random(30_000)
    kept = suppress(boxes, scores, np.zeros(30_000, np.int64), iou=0.5, max_det=1000)
    assert np.array_equal(kept, np.argsort(-scores, kind="stable")[:1000])


@pytest.mark.parametrize("max_det", [40, 4 * BLOCK])
@pytest.mark.parametrize("agnostic", [False, True])
def test_blocked_is_greedy_over_several_blocks(max_det, agnostic):
    boxes, scores = crowd(1500, classes=2, clusters=200)
    options = dict(conf=0.001, iou=0.5, max_det=max_det, agnostic=agnostic, multi_label=False)
    expected = slow_nms(boxes, scores, **options)
    found = nms(boxes, scores, **options)
    assert len(expected) > (BLOCK / 4 if max_det > 40 else 39)
    assert found.labels.tolist() == [label for _, label in expected]
    assert torch.equal(found.boxes, boxes[[index for index, _ in expected]])


def crowd(count, classes, clusters):
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(clusters, 2, generator=generator) * 600
    centre = centres[torch.randint(clusters, (count,), generator=generator)]
    centre = centre + torch.randn(count, 2, generator=generator) * 4
    size = 20 + 30 * torch.rand(count, 2, generator=generator)
    return torch.cat([centre - size / 2, centre + size / 2], 1), torch.rand(count, classes, generator=generator)


def test_a_chain_keeps_every_second_box():
    start = torch.arange(1200.0) * 3  # each overlaps its neighbours by 7 of 13, and no one further than two along
    boxes = torch.stack([start, start * 0, start + 10, start * 0 + 10], 1)
    scores = torch.linspace(1, 0.5, 1200)[:, None]
    found = nms(boxes, scores, conf=0.1, iou=0.5, max_det=2000, multi_label=True)
    assert torch.equal(found.boxes, boxes[::2])


def test_classes_are_compared_not_moved_apart():
    # IoU .50001; 79 * 4096 + 5.0001 is 79 * 4096 + 5 in float32, IoU .5, and both boxes would stay
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5.0001]])
    scores = torch.zeros(2, 80)
    scores[0, 79], scores[1, 79] = 0.9, 0.8
    assert len(nms(boxes, scores, conf=0.1, iou=0.5, multi_label=True)) == 1
    scores[1] = scores[1].roll(-1)
    assert nms(boxes, scores, conf=0.1, iou=0.5, multi_label=True).labels.tolist() == [79, 78]
    assert len(nms(boxes, scores, conf=0.1, iou=0.5, multi_label=True, agnostic=True)) == 1


def test_multi_label_gives_a_box_for_each_class_and_detect_one():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.3, 0.8, 0.05]])
    assert nms(boxes, scores, conf=0.1, iou=0.5, multi_label=True).labels.tolist() == [1, 0]
    assert nms(boxes, scores, conf=0.1, iou=0.5, multi_label=False).labels.tolist() == [1]
    assert nms(boxes, scores, conf=0.1, iou=0.5, multi_label=False, classes=[0]).labels.tolist() == [0]
    assert len(nms(boxes, scores, conf=0.1, iou=0.5, multi_label=False, classes=[2])) == 0


def test_top_k_takes_the_first_of_equal_scores():
    boxes = torch.arange(100.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    found = nms(boxes, torch.full((100, 1), 0.5), conf=0.1, iou=0.5, multi_label=True, top_k=7)
    assert torch.equal(found.boxes, boxes[:7])


@pytest.mark.parametrize("multi_label", [False, True])
def test_nothing_in_gives_nothing_out(multi_label):
    found = nms(torch.zeros(0, 4), torch.zeros(0, 3), conf=0.1, iou=0.5, multi_label=multi_label)
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)
    assert found.labels.dtype == torch.int64


def test_boxes_without_area_or_end_are_not_kept():
    boxes = torch.tensor([[5.0, 5, 5, 9], [9, 9, 1, 1], [0, 0, torch.inf, 5], [0, 0, torch.nan, 5], [0, 0, 4, 4]])
    scores = torch.full((5, 2), 0.5)
    found = nms(boxes, scores, conf=0.1, iou=0.5, multi_label=False)
    assert found.boxes.tolist() == [[0, 0, 4, 4]]
    assert len(nms(boxes, scores * torch.nan, conf=0.1, iou=0.5, multi_label=True)) == 0


def test_iou_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [3, 3, 3, 3]])
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(boxes, boxes), expected)


def test_half_precision_comes_out_as_float32():
    boxes, scores = torch.tensor([[0, 0, 300, 300]]).half(), torch.tensor([[0.5]]).half()
    found = nms(boxes, scores, conf=0.1, iou=0.5, multi_label=True)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert len(nms(boxes.repeat(2, 1), scores.repeat(2, 1), conf=0.1, iou=0.5, multi_label=True)) == 1
