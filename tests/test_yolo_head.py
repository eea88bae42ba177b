"""The anchor head against numbers worked out by hand and against slow loops, and the anchors it starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.structures import Fault, Targets
from models.anchors import best_possible_recall, fit_anchors, needs_anchors, with_anchors
from models.boxes import complete_iou, cxcywh_to_xyxy
from models.heads.yolo import BALANCE, BOX, CLASS, LARGEST_RATIO, OBJECTNESS, Detect
from models.parse import parse_text
from models.registry import Shape

ANCHORS = ((10.0, 13.0, 30.0, 20.0), (50.0, 60.0, 100.0, 80.0))
HEIGHT, WIDTH = 64, 96
LN3 = math.log(3)  # its sigmoid is 3/4


def a_head(classes: int = 3) -> Detect:
    torch.manual_seed(0)
    return Detect([Shape(4, 8), Shape(6, 16)], classes, ANCHORS)


def logits(classes: int = 3, images: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 2, HEIGHT // stride, WIDTH // stride, 5 + classes) for stride in (8, 16)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def targets_of(boxes: Sequence[Sequence[float]], labels: Sequence[int], images: Sequence[int]) -> Targets:
    index = torch.tensor(images, dtype=torch.int64)
    return Targets(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels, dtype=torch.int64), index)


NOTHING = targets_of([], [], [])


# ---- decode


def test_a_cell_of_zeros_is_its_anchor_in_the_middle_of_the_cell():
    boxes, scores = a_head().decode([torch.zeros_like(level) for level in logits()])
    fine, coarse = (HEIGHT // 8) * (WIDTH // 8), (HEIGHT // 16) * (WIDTH // 16)
    assert boxes.shape == (2, 2 * (fine + coarse), 4) and scores.shape == (2, 2 * (fine + coarse), 3)
    assert boxes[0, 0].tolist() == [4 - 5, 4 - 6.5, 4 + 5, 4 + 6.5]  # first cell, anchor 10x13
    assert boxes[1, WIDTH // 8 + 2].tolist() == [20 - 5, 12 - 6.5, 20 + 5, 12 + 6.5]  # row 1, column 2
    assert boxes[1, 2 * fine + coarse].tolist() == [8 - 50, 8 - 40, 8 + 50, 8 + 40]  # stride 16, anchor 100x80
    assert (scores == 0.25).all()


def test_decode_gives_the_number_worked_out_by_hand():
    outputs = [torch.zeros_like(level) for level in logits()]
    # image 1, stride 16, anchor 100x80, row 2, column 1
    outputs[1][1, 1, 2, 1] = torch.tensor([LN3, 0, LN3, -LN3, LN3, 0, -LN3, LN3])
    boxes, scores = a_head().decode(outputs)
    index = 2 * 8 * 12 + 1 * 4 * 6 + 2 * 6 + 1
    cx, cy = (2 * 0.75 - 0.5 + 1) * 16, (2 * 0.5 - 0.5 + 2) * 16  # 32, 40
    w, h = (2 * 0.75) ** 2 * 100, (2 * 0.25) ** 2 * 80  # 225, 20
    expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(boxes[1, index], expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scores[1, index], torch.tensor([0.375, 0.1875, 0.5625]))


def test_forward_puts_anchors_and_numbers_where_decode_looks_for_them():
    """Channel a * K + k of the convolution is number k of anchor a."""
    head = a_head()
    maps = [torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6)]
    for layer, x, y in zip(head.m, maps, head(maps), strict=True):
        raw = layer(x)
        for anchor in range(2):
            for number in range(8):
                assert torch.equal(y[:, anchor, ..., number], raw[:, anchor * 8 + number])


def test_the_score_of_the_only_class_is_the_objectness():
    torch.manual_seed(0)
    head = Detect([Shape(8, 8), Shape(8, 16)], 1, ((10, 13, 16, 30), (30, 61, 62, 45)))
    outputs = head([torch.randn(2, 8, 8, 8), torch.randn(2, 8, 4, 4)])
    objectness = torch.cat([y[..., 4:5].sigmoid().reshape(2, -1, 1) for y in outputs], dim=1)
    torch.testing.assert_close(head.decode(outputs)[1], objectness, rtol=1e-3, atol=0)


def test_a_new_head_expects_few_objects():
    """Within 0.5 = 1 / sqrt(4), from where torch draws the bias of a convolution with 4 inputs."""
    bias = a_head().m[0].bias.detach().view(2, 8)
    assert bias[:, :4].abs().max() <= 0.5
    assert (bias[:, 4] - math.log(8 / 80**2)).abs().max() <= 0.5
    assert (bias[:, 5:] - math.log(0.6 / 2.01)).abs().max() <= 0.5


# ---- who answers for what


def slow_assign(boxes: np.ndarray, images: Sequence[int], level: int) -> list[tuple[int, int, int, int, int]]:
    """Box by box, anchor by anchor, cell by cell; float32 where the head divides in float32."""
    stride = (8, 16)[level]
    rows, columns = HEIGHT // stride, WIDTH // stride
    found = []
    for index, (x1, y1, x2, y2) in enumerate((boxes / np.float32(stride)).astype(np.float32)):
        for anchor in range(2):
            fits = True
            for side, length in zip((x2 - x1, y2 - y1), ANCHORS[level][2 * anchor : 2 * anchor + 2], strict=True):
                ratio = np.float32(side) / (np.float32(length) / np.float32(stride))
                fits = fits and ratio > 0 and max(ratio, np.float32(1) / ratio) < LARGEST_RATIO
            if not fits:
                continue
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            column, row = math.floor(x), math.floor(y)
            beside = column - 1 if x - column < 0.5 else column + 1
            above = row - 1 if y - row < 0.5 else row + 1
            for r, c in ((row, column), (row, beside), (above, column)):
                if 0 <= r < rows and 0 <= c < columns:
                    found.append((images[index], anchor, r, c, index))
    return sorted(found)


SIDE = st.integers(0, 240).map(lambda n: n / 2)  # half pixels, so that edges, middles and the ratio 2.5 come up


@st.composite
def labelled(draw: st.DrawFn) -> Targets:
    """Boxes whose centres lie in the image or on its edge; sides from none to larger than any anchor."""
    count = draw(st.integers(0, 6))
    boxes, labels, images = [], [], []
    for _ in range(count):
        w, h = draw(SIDE), draw(SIDE)
        cx, cy = draw(st.integers(0, 2 * WIDTH)) / 2, draw(st.integers(0, 2 * HEIGHT)) / 2
        boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        labels.append(draw(st.integers(0, 2)))
        images.append(draw(st.integers(0, 1)))
    return targets_of(boxes, labels, images)


@settings(max_examples=150)
@given(labelled())
@example(targets_of([[4, 4, 29, 36.5]], [0], [1]))  # 2.5 times 10 x 13, no less
@example(targets_of([[91, 57.5, 101, 70.5]], [0], [1]))  # the centre on the image's corner
def test_assignment_is_that_of_the_slow_loop(targets):
    head = a_head()
    for level, stride in enumerate((8, 16)):
        found = head.assign(targets, level, (HEIGHT // stride, WIDTH // stride))
        slow = slow_assign(targets.boxes.numpy(), targets.image_index.tolist(), level)
        assert sorted(zip(*(column.tolist() for column in found), strict=True)) == slow


def test_a_box_of_one_anchor_is_answered_by_three_cells():
    """Centre 44, 20 at stride 8 is cell 5.5, 2.5: its neighbours are to the right and below."""
    image, anchor, row, column, found = a_head().assign(targets_of([[39, 13.5, 49, 26.5]], [0], [1]), 0, (8, 12))
    cells = set(zip(anchor.tolist(), row.tolist(), column.tolist(), strict=True))
    assert cells == {(0, 2, 5), (0, 2, 6), (0, 3, 5)}  # 30x20, the other anchor, is three times as wide
    assert image.unique().tolist() == [1] and found.unique().tolist() == [0]


# ---- the loss


def slow_ciou(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """IoU and complete IoU of two boxes, the paper's formulas one after the other."""
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    iou = overlap / (sum(areas) - overlap)
    c2 = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    d2 = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    angles = [math.atan((x2 - x1) / (y2 - y1)) for x1, y1, x2, y2 in (a, b)]
    v = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
    return iou, iou - d2 / c2 - (v * v / (1 - iou + v) if v else 0)


def slow_loss(outputs: list[Tensor], targets: Targets, classes: int) -> dict[str, float]:
    """The parts of the loss with one number at a time."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def cross_entropy(x: float, goal: float) -> float:
        return -goal * math.log(sigmoid(x)) - (1 - goal) * math.log(1 - sigmoid(x))

    parts = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    weights = BALANCE.get(len(outputs), (4.0, 1.0, 0.25, 0.06, 0.02))
    for level, y in enumerate(outputs):
        stride, goals, missed, wrong = (8, 16)[level], {}, [], []
        for image, anchor, row, column, index in slow_assign(
            targets.boxes.numpy(), targets.image_index.tolist(), level
        ):
            numbers = y[image, anchor, row, column].tolist()
            x, up, w, h = (sigmoid(number) for number in numbers[:4])
            cx, cy = (2 * x - 0.5 + column) * stride, (2 * up - 0.5 + row) * stride
            w, h = (2 * w) ** 2 * ANCHORS[level][2 * anchor], (2 * h) ** 2 * ANCHORS[level][2 * anchor + 1]
            iou, ciou = slow_ciou((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), targets.boxes[index].tolist())
            missed.append(1 - ciou)
            cell = (image, anchor, row, column)
            goals[cell] = max(goals.get(cell, 0.0), iou)
            label = int(targets.labels[index])
            wrong += [cross_entropy(number, float(k == label)) for k, number in enumerate(numbers[5:])]
        objectness = [cross_entropy(float(y[cell][4]), goals.get(cell, 0.0)) for cell in np.ndindex(*y.shape[:4])]
        parts["box"] += float(np.mean(missed)) if missed else 0.0
        parts["cls"] += float(np.mean(wrong)) if wrong and classes > 1 else 0.0
        parts["obj"] += weights[level] * float(np.mean(objectness))
    share = 3 / len(outputs)
    parts["box"] *= BOX * share
    parts["obj"] *= OBJECTNESS * share * HEIGHT * WIDTH / 640**2
    parts["cls"] *= CLASS * share * max(classes, 4) / 80
    return parts


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 7, 60])  # 60 boxes share cells
def test_the_loss_is_that_of_the_slow_loop(count, classes):
    rng = np.random.default_rng(count)
    size, centre = rng.uniform(8, 90, (count, 2)), rng.uniform(0, 1, (count, 2)) * (WIDTH, HEIGHT)
    boxes = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
    targets = targets_of(boxes.tolist(), rng.integers(0, classes, count).tolist(), rng.integers(0, 2, count).tolist())
    outputs = logits(classes, seed=count)
    expected = slow_loss(outputs, targets, classes)
    loss, parts = a_head(classes).loss(outputs, targets)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert float(loss) == pytest.approx(sum(expected.values()), rel=1e-4)
    assert not any(part.requires_grad for part in parts.values())


def test_the_loss_goes_by_its_options():
    """Gains multiply a part; with s = 0.2 the class of a box should score 0.9, others 0.1; anchor_t is a limit."""
    targets, outputs = targets_of([[39, 13.5, 49, 26.5]], [1], [0]), logits()
    head = a_head()
    _, parts = head.loss(outputs, targets)
    head.options |= {"box": 2 * BOX, "obj": 3 * OBJECTNESS, "cls": 5 * CLASS}
    _, more = head.loss(outputs, targets)
    for name, times in (("box", 2), ("obj", 3), ("cls", 5)):
        torch.testing.assert_close(more[name], times * parts[name])

    head = a_head()
    head.options["label_smoothing"] = 0.2
    zeros = [torch.zeros_like(level) for level in outputs]
    assert float(head.loss(zeros, targets)[1]["cls"]) == pytest.approx(float(a_head().loss(zeros, targets)[1]["cls"]))
    for level in zeros:
        level[..., 5:] = torch.tensor([-LN3, LN3, 0])  # 1/4, 3/4, 1/2
    wanted = [0.1 * math.log(4) + 0.9 * math.log(4 / 3), 0.1 * math.log(4) + 0.9 * math.log(4 / 3), math.log(2)]
    expected = sum(wanted) / 3 * CLASS * 3 / 2 * 4 / 80  # of 10 x 13, one anchor of the fine level
    assert float(head.loss(zeros, targets)[1]["cls"]) == pytest.approx(expected, rel=1e-5)

    head.options["anchor_t"] = 3.5  # 30 x 20 is three times as wide
    assert len(head.assign(targets, 0, (8, 12))[4]) == 6 and len(a_head().assign(targets, 0, (8, 12))[4]) == 3


def perfect(head: Detect, targets: Targets) -> list[Tensor]:
    """Logits that say what the targets are, in every cell that is asked."""
    outputs = [torch.full_like(level, -20.0) for level in logits()]
    for level, y in enumerate(outputs):
        stride = head.strides[level]
        for image, anchor, row, column, index in zip(*head.assign(targets, level, y.shape[2:4]), strict=True):
            box = targets.boxes[index]
            centre = (box[:2] + box[2:]) / 2 / stride - torch.stack((column, row))
            size = (box[2:] - box[:2]) / head.anchors[level][anchor]
            y[image, anchor, row, column, :2] = ((centre + 0.5) / 2).logit()
            y[image, anchor, row, column, 2:4] = (size.sqrt() / 2).logit()
            y[image, anchor, row, column, 4] = 20
            y[image, anchor, row, column, 5 + targets.labels[index]] = 20
    return outputs


def test_the_truth_costs_next_to_nothing_and_decodes_to_the_boxes():
    head = a_head()
    targets = targets_of([[13, 9, 24, 23], [55, 20, 90, 61], [3, 5, 40, 52]], [0, 2, 1], [0, 0, 1])
    outputs = perfect(head, targets)
    loss, parts = head.loss(outputs, targets)
    assert max(float(part) for part in parts.values()) < 1e-6
    assert float(head.loss(logits(), targets)[0]) > 0.05
    boxes, scores = head.decode(outputs)
    sure = scores.amax(dim=-1) > 0.9
    for box, label, image in zip(targets.boxes, targets.labels, targets.image_index, strict=True):
        near = (boxes[image] - box).abs().amax(dim=-1) < 0.01
        assert near.sum() >= 3 and (scores[image][near].argmax(dim=-1) == label).all()
        sure[image] &= ~near
    assert not sure.any()


@pytest.mark.parametrize("targets", [NOTHING, targets_of([[13, 9, 24, 23], [3, 5, 80, 62]], [0, 2], [0, 1])])
def test_every_parameter_of_the_head_gets_a_finite_gradient(targets):
    head = a_head()
    maps = [torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6)]
    loss, parts = head.loss(head(maps), targets)
    loss.backward()
    assert loss.isfinite()
    for parameter in head.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
    if not len(targets.boxes):
        assert float(parts["box"]) == float(parts["cls"]) == 0 and float(parts["obj"]) > 0


def test_boxes_without_area_and_far_predictions_keep_the_loss_finite():
    targets = targets_of([[10, 10, 10, 10], [10, 10, 30, 10], [0, 0, 96, 64]], [0, 1, 2], [0, 1, 1])
    outputs = [(level * 100).requires_grad_() for level in logits()]
    loss, _ = a_head().loss(outputs, targets)
    loss.backward()
    assert loss.isfinite() and all(level.grad.isfinite().all() for level in outputs)


def test_where_boxes_share_a_cell_the_best_one_is_its_goal():
    """Two boxes in one cell: with the objectness at the better IoU's logit, the gradient of that cell is zero."""
    head = a_head()
    boxes = [[40.0, 15.0, 50.0, 28.0], [41.0, 17.0, 49.0, 25.0]]
    for order in ([0, 1], [1, 0]):
        targets = targets_of([boxes[i] for i in order], [0, 0], [0, 0])
        outputs = perfect(head, targets_of(boxes[:1], [0], [0]))
        outputs[0][0, 0, 2, 5, 4] = 20.0  # the first box to the pixel: its goal is an IoU of 1
        outputs = [level.requires_grad_() for level in outputs]
        head.loss(outputs, targets)[0].backward()
        assert outputs[0].grad[0, 0, 2, 5, 4].abs() < 1e-6


# ---- boxes


def test_complete_iou_by_hand():
    pairs = [
        ((0, 0, 4, 3), (0, 0, 4, 3), 1, 1),
        ((0, 0, 1, 1), (2, 0, 3, 1), 0, -4 / 10),  # centres 2 apart, both inside 3 x 1
        ((0, 0, 2, 1), (0, 0, 1, 2), 1 / 3, 0.237083),  # 1/3 - 0.5/8 - 0.2011 * 0.16782
        ((0, 0, 2, 2), (1, 1, 2, 2), 1 / 4, 1 / 4 - 0.5 / 8),
    ]
    a, b, ious, cious = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    iou, ciou = complete_iou(a, b)
    torch.testing.assert_close(iou, ious, rtol=0, atol=1e-5)
    torch.testing.assert_close(ciou, cious, rtol=0, atol=1e-5)


COORDINATES = st.tuples(*[st.floats(0.5, 50, width=32)] * 4)


@given(COORDINATES, COORDINATES)
def test_complete_iou_is_the_formula_of_the_paper(one, other):
    a, b = ((x, y, x + w, y + h) for x, y, w, h in (one, other))
    iou, ciou = (float(value) for value in complete_iou(torch.tensor([a]).double(), torch.tensor([b]).double()))
    assert (iou, ciou) == pytest.approx(slow_ciou(a, b), abs=1e-5)
    assert 0 <= iou <= 1 and -1.5 < ciou <= 1
    back = complete_iou(torch.tensor([b]).double(), torch.tensor([a]).double())
    assert [float(value) for value in back] == pytest.approx([iou, ciou], abs=1e-9)


def test_centre_and_size_become_corners():
    assert cxcywh_to_xyxy(torch.tensor([[10.0, 20.0, 4.0, 6.0]])).tolist() == [[8, 17, 12, 23]]


# ---- anchors


def test_clusters_become_anchors_smallest_first():
    rng = np.random.default_rng(0)
    centres = np.array([[12, 9], [30, 62], [110, 50], [200, 220]])
    boxes = np.concatenate([centre * np.exp(rng.normal(0, 0.05, (100, 2))) for centre in centres])
    anchors = fit_anchors(rng.permutation(boxes), 2, 2, np.random.default_rng(1))
    assert np.array(anchors) == pytest.approx(centres.reshape(2, 4), rel=0.02)
    assert anchors == fit_anchors(rng.permutation(boxes), 2, 2, np.random.default_rng(2))  # whatever the start
    assert best_possible_recall(boxes, anchors) == 1


@pytest.mark.parametrize("boxes", [[[20.0, 30.0]], [[20.0, 30.0]] * 9, [[20.0, 30.0], [50.0, 5.0]]])
def test_fewer_sizes_than_anchors_still_give_every_anchor(boxes):
    anchors = np.array(fit_anchors(np.array(boxes), 3, 3, np.random.default_rng(0))).reshape(-1, 2)
    assert anchors.shape == (9, 2) and (anchors > 1).all()
    areas = anchors.prod(axis=1)
    assert (np.diff(areas) > -1).all()
    assert best_possible_recall(np.array(boxes), tuple(map(tuple, anchors.reshape(3, 6)))) == 1


@pytest.mark.parametrize("boxes", [np.zeros((0, 2)), np.array([[0.5, 30.0], [1.0, 1.0]])])
def test_no_box_is_a_fault(boxes):
    with pytest.raises(Fault) as caught:
        fit_anchors(boxes, 3, 3, np.random.default_rng(0))
    assert str(caught.value) == "anchors cannot be fitted: the training images have no box larger than a pixel"


def test_recall_counts_boxes_less_than_two_and_a_half_times_off():
    boxes = np.array([[10, 10], [24, 10], [25, 10], [4, 10], [4.1, 10], [10, 100]])
    assert best_possible_recall(boxes, ((10.0, 10.0),)) == 3 / 6
    assert best_possible_recall(boxes, ((10.0, 10.0, 11.0, 90.0),)) == 4 / 6  # the tall box has an anchor of its own
    assert math.isnan(best_possible_recall(np.zeros((0, 2)), ((10.0, 10.0),)))


def test_anchors_are_asked_for_by_number_and_stored_as_lists():
    spec = parse_text("nc: 1\nanchors: 2\nbackbone: [[-1, 1, Conv, [8]]]\nhead: [[-1, 1, Detect, [nc, anchors]]]")
    assert needs_anchors(spec)
    fitted = with_anchors(spec, ((10.0, 13.0, 30.0, 20.0),))
    assert not needs_anchors(fitted) and fitted.anchors == ((10.0, 13.0, 30.0, 20.0),)
