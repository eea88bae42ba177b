"""YOLOX: its head against numbers worked out by hand and against slow loops in double precision; its model files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_yolo_head import targets_of
from torch import Tensor

from data.structures import Targets
from models.boxes import cells_of_levels
from models.heads.yolox import BOX, MOST_CELLS, RADIUS, YOLOXHead, boxes_of, class_cost, flat, numbers_of
from models.network import build
from models.parse import parse, parse_text
from models.registry import OPS, Shape

CFG = Path(__file__).resolve().parents[1] / "cfg" / "models"
STRIDES = (8, 16)
HEIGHT, WIDTH = 48, 64
CELLS = [(HEIGHT // stride, WIDTH // stride) for stride in STRIDES]
NUMBER = sum(rows * columns for rows, columns in CELLS)
NOTHING = targets_of([], [], [])
LN2, LN3 = math.log(2), math.log(3)


def a_head(classes: int = 3, separable: bool = False) -> YOLOXHead:
    torch.manual_seed(0)
    return YOLOXHead([Shape(4, 8), Shape(6, 16)], classes, separable).double()


def logits(classes: int = 3, images: int = 2, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, *cells, 5 + classes) for cells in CELLS]
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def nothing_said(classes: int = 3, images: int = 2) -> list[Tensor]:
    return [torch.zeros_like(level) for level in logits(classes, images)]


def drawn_targets(count: int, classes: int = 3, images: int = 2, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    size, middle = rng.uniform(2, 50, (count, 2)), rng.uniform(0, 1, (count, 2)) * (WIDTH, HEIGHT)
    boxes = np.concatenate((middle - size / 2, middle + size / 2), axis=1)
    return targets_of(boxes.tolist(), rng.integers(0, classes, count).tolist(), rng.integers(0, images, count).tolist())


# ---- forward and decode


def test_a_cell_of_zeros_is_a_box_of_its_own_size_around_its_corner():
    boxes, scores = a_head().decode(nothing_said())
    assert boxes.shape == (2, NUMBER, 4) and scores.shape == (2, NUMBER, 3)
    assert boxes[0, 0].tolist() == [-4, -4, 4, 4]
    assert boxes[1, 8 + 2].tolist() == [16 - 4, 8 - 4, 16 + 4, 8 + 4]  # row 1, column 2
    assert boxes[1, 6 * 8 + 4].tolist() == [-8, 16 - 8, 8, 16 + 8]  # stride 16: row 1, column 0
    assert (scores == 0.25).all()


def test_decode_gives_the_number_worked_out_by_hand():
    outputs = nothing_said()
    outputs[1][1, 2, 1] = torch.tensor([0.5, -0.25, LN2, LN3, LN3, 0, LN3, -LN3])
    boxes, scores = a_head().decode(outputs)
    index, x, y, w, h = 6 * 8 + 2 * 4 + 1, 24, 28, 32, 48
    expected = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dtype=torch.float64)
    torch.testing.assert_close(boxes[1, index], expected)
    expected = torch.tensor([0.75 * 0.5, 0.75 * 0.75, 0.75 * 0.25], dtype=torch.float64)
    torch.testing.assert_close(scores[1, index], expected)


def test_the_numbers_of_a_box_give_it_again():
    head = a_head()
    corners, strides = cells_of_levels(logits(), head.strides)
    numbers = torch.randn(NUMBER, 4, dtype=torch.float64)
    boxes = boxes_of(numbers, corners, strides)
    torch.testing.assert_close(numbers_of(boxes, corners, strides), numbers, rtol=0, atol=1e-6)


def test_classes_and_boxes_have_branches_of_their_own():
    """Numbers 0 to 3 come from `reg_preds`, 4 from `obj_preds`, the rest from `cls_preds` over the other branch."""
    head = a_head().eval()
    maps = [torch.randn(2, c, *cells, dtype=torch.float64) for c, cells in zip((4, 6), CELLS, strict=True)]
    for level, (x, y) in enumerate(zip(maps, head(maps), strict=True)):
        stem = head.stems[level](x)
        box, classes = head.reg_convs[level](stem), head.cls_convs[level](stem)
        found = y.permute(0, 3, 1, 2)
        assert torch.equal(found[:, :4], head.reg_preds[level](box))
        assert torch.equal(found[:, 4:5], head.obj_preds[level](box))
        assert torch.equal(found[:, 5:], head.cls_preds[level](classes))


def test_a_new_head_gives_every_cell_and_class_one_percent():
    head = a_head()
    for convolution in (*head.cls_preds, *head.obj_preds):
        torch.testing.assert_close(convolution.bias.sigmoid(), torch.full_like(convolution.bias, 0.01))


def test_the_separable_head_looks_at_each_channel_by_itself():
    convolutions = a_head(separable=True).cls_convs[0]
    assert [block.depthwise.conv.groups for block in convolutions] == [4, 4]
    assert a_head().cls_convs[0][0].conv.groups == 1


# ---- who answers for what


def slow_iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


def slow_cells() -> list[tuple[float, float, int]]:
    return [
        ((column + 0.5) * stride, (row + 0.5) * stride, stride)
        for stride, (rows, columns) in zip(STRIDES, CELLS, strict=True)
        for row in range(rows)
        for column in range(columns)
    ]


def slow_assign(boxes: Tensor, said: Tensor, targets: Targets) -> dict[tuple[int, int], tuple[int, float]]:
    """Image by image, truth by truth and cell by cell: image and cell -> truth and overlap."""
    found = {}
    for image in range(len(boxes)):
        truths = [
            number
            for number, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist())
            if targets.image_index[number] == image and x2 > x1 and y2 > y1
        ]
        near = {
            truth: [
                cell
                for cell, (x, y, stride) in enumerate(slow_cells())
                for x1, y1, x2, y2 in [targets.boxes[truth].tolist()]
                if abs(x - (x1 + x2) / 2) < RADIUS * stride and abs(y - (y1 + y2) / 2) < RADIUS * stride
            ]
            for truth in truths
        }
        asked = sorted({cell for cells in near.values() for cell in cells})
        cost, takers = {}, {}
        for truth in truths:
            overlaps = {cell: slow_iou(targets.boxes[truth].tolist(), boxes[image, cell].tolist()) for cell in asked}
            for cell in near[truth]:
                p = [1 / (1 + math.exp(-value)) for value in said[image, cell].tolist()]
                score = [math.sqrt(p[0] * one) for one in p[1:]]
                bce = -sum(
                    math.log(s) if label == targets.labels[truth] else math.log(1 - s) for label, s in enumerate(score)
                )
                cost[truth, cell] = bce - 3 * math.log(overlaps[cell] + 1e-8)
            k = max(int(sum(sorted(overlaps.values(), reverse=True)[:MOST_CELLS])), 1)
            for cell in sorted(near[truth], key=lambda cell: cost[truth, cell])[:k]:
                takers.setdefault(cell, []).append(truth)
        for cell, several in takers.items():
            those = [truth for truth in truths if (truth, cell) in cost] if len(several) > 1 else several
            best = min(those, key=lambda truth: cost[truth, cell])
            found[image, cell] = (best, slow_iou(targets.boxes[best].tolist(), boxes[image, cell].tolist()))
    return found


def assigned(head: YOLOXHead, outputs: list[Tensor], targets: Targets) -> dict[tuple[int, int], tuple[int, float]]:
    y, (corners, strides) = flat(outputs), cells_of_levels(outputs, head.strides)
    boxes = boxes_of(y[..., :4], corners, strides)
    image, cell, truth, iou = head.assign(boxes, y[..., 4:], corners, strides, targets)
    keys = list(zip(image.tolist(), cell.tolist(), strict=True))
    assert len(set(keys)) == len(keys), "a cell answers for one truth"
    return dict(zip(keys, zip(truth.tolist(), iou.tolist(), strict=True), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.integers(0, 10_000), st.floats(0.1, 3))
def test_assignment_is_that_of_slow_loops(count, seed, size):
    head, outputs, targets = a_head(), logits(seed=seed, size=size), drawn_targets(count, seed=seed)
    corners, strides = cells_of_levels(outputs, head.strides)
    y = flat(outputs)
    expected = slow_assign(boxes_of(y[..., :4], corners, strides), y[..., 4:], targets)
    found = assigned(head, outputs, targets)
    assert {key: truth for key, (truth, _) in found.items()} == {key: truth for key, (truth, _) in expected.items()}
    for key, (_, iou) in found.items():
        assert iou == pytest.approx(expected[key][1], abs=1e-6)  # targets are float32


def test_a_truth_takes_as_many_cells_as_overlap_it_and_those_of_least_cost():
    """Three cells say just its box, a fourth half of it: 3.5 in all, so it takes three, and they are the three."""
    head, outputs = a_head(), nothing_said()
    truth, half = [12.0, 12.0, 28.0, 28.0], [12.0, 12.0, 20.0, 28.0]  # in the middle, 20 20, are row 2 and column 2
    for level in outputs:
        level[..., 2:4] = -20  # all others say boxes of no size
    for row, column, box in ((2, 2, truth), (2, 1, truth), (1, 2, truth), (1, 1, half)):
        corner, stride = (torch.tensor(values, dtype=torch.float64) for values in ([column, row], [8.0]))
        outputs[0][0, row, column, :4] = numbers_of(torch.tensor(box, dtype=torch.float64), corner, stride)
    found = assigned(head, outputs, targets_of([truth], [1], [0]))
    assert set(found) == {(0, 2 * 8 + 2), (0, 2 * 8 + 1), (0, 1 * 8 + 2)}
    assert all(number == 0 and iou == pytest.approx(1, abs=1e-6) for number, iou in found.values())


def test_every_truth_has_a_cell_however_bad_all_boxes_are():
    outputs = nothing_said()
    for level in outputs:
        level[..., :2] = 1000
    found = assigned(a_head(), outputs, targets_of([[0, 0, 4, 4], [30, 20, 60, 40]], [0, 1], [0, 1]))
    assert sorted(number for number, _ in found.values()) == [0, 1]


def test_nobody_answers_where_nothing_is_or_for_a_box_without_area():
    assert assigned(a_head(), logits(), NOTHING) == {}
    assert assigned(a_head(), logits(), targets_of([[8, 8, 8, 20]], [0], [1])) == {}


def test_a_class_costs_its_cross_entropy():
    said = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([2, 0])
    score = (said[:, 1:].sigmoid() * said[:, :1].sigmoid()).sqrt()
    for truth, label in enumerate(labels.tolist()):
        goal = torch.nn.functional.one_hot(torch.tensor(label), 3).double().expand(5, 3)
        expected = torch.nn.functional.binary_cross_entropy(score, goal, reduction="none").sum(dim=1)
        torch.testing.assert_close(class_cost(said, labels)[truth], expected)


# ---- the loss


def test_the_loss_is_the_number_worked_out_by_hand():
    """One truth, just the box of one cell; all other boxes have no overlap with it."""
    head, outputs = a_head(), nothing_said(images=1)
    for level in outputs:
        level[..., 2:4] = -20
    outputs[0][0, 2, 2, :4] = torch.tensor([0.5, 0.5, LN2, LN2])  # 20 20, 16x16
    targets = targets_of([[12, 12, 28, 28]], [1], [0])
    loss, parts = head.loss(outputs, targets)
    expected = {"box": 0.0, "obj": NUMBER * LN2, "cls": 3 * LN2, "l1": 0.0}
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, abs=1e-6)
    assert float(loss) == pytest.approx(sum(expected.values()), abs=1e-6)

    outputs[0][0, 2, 2, 2] = 0.0  # half as wide: IoU 1/2
    outputs[0][0, 2, 2, 4:] = torch.tensor([LN3, 0, LN3, 0])
    head.calm = True
    _, parts = head.loss(outputs, targets)
    class_bce = LN2 * 2 + -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    expected = {"box": BOX * (1 - 0.25), "obj": (NUMBER - 1) * LN2 - math.log(0.75), "cls": class_bce, "l1": LN2}
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, abs=1e-6)


def test_without_truths_only_objectness_is_left():
    loss, parts = a_head().loss(nothing_said(), NOTHING)
    assert float(loss) == pytest.approx(2 * NUMBER * LN2)
    assert [float(parts[name]) for name in ("box", "cls", "l1")] == [0, 0, 0]


def test_the_loss_counts_each_image_for_itself():
    """Two images together: sums are those of both, divided by the cells of both."""
    head, outputs, targets = a_head(), logits(), drawn_targets(6, seed=3)
    loss, parts = head.loss(outputs, targets)
    sums, cells = dict.fromkeys(parts, 0.0), 0
    for image in range(2):
        mine = targets.image_index == image
        alone = Targets(targets.boxes[mine], targets.labels[mine], targets.image_index[mine] * 0)
        one = [level[image : image + 1] for level in outputs]
        number = len(assigned(head, one, alone))
        _, of_one = head.loss(one, alone)
        sums = {name: sums[name] + float(part) * number for name, part in of_one.items()}
        cells += number
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(
        {name: value / cells for name, value in sums.items()}, rel=1e-5
    )
    assert float(loss) == pytest.approx(sum(float(part) for part in parts.values()), rel=1e-9)


def test_any_number_is_survived():
    head = a_head()
    outputs = [torch.full_like(level, 1e4) for level in logits()]
    loss, _ = head.loss(outputs, drawn_targets(5))
    assert loss.isfinite()


# ---- the model files


SMALL = """
nc: 2
backbone:
  - [-1, 1, Focus, [8, 3]]
  - [-1, 1, SeparableConv, [16, 3, 2]]
  - [-1, 1, SeparableConv, [16, 3, 2]]  # 2: stride 8
head:
  - [-1, 1, C3Separable, [16]]
  - [-1, 1, SeparableConv, [24, 3, 2]]  # 4: stride 16
  - [[3, 4], 1, YOLOXHead, [nc, True]]
"""


def test_every_weight_has_a_gradient():
    torch.manual_seed(0)
    network = build(parse_text(SMALL))
    for norm in network.modules():  # a residual branch starts with a scale of 0
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(norm.weight)
    truths = targets_of([[4, 6, 12, 14], [30, 30, 48, 48]], [0, 1], [0, 1])  # one for each level
    loss, _ = network.loss(torch.rand(2, 3, 64, 64), truths)
    loss.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_a_small_network_learns_two_pictures_by_heart():
    torch.manual_seed(0)
    network = build(parse_text(SMALL))
    images = torch.full((2, 3, 64, 64), 0.4)
    images[0, 0, 10:40, 12:44], images[1, 2, 24:56, 8:30] = 1.0, 1.0
    truths, labels = [[12, 10, 44, 40], [8, 24, 30, 56]], [0, 1]
    targets = targets_of(truths, labels, [0, 1])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for step in range(90):
        network.head.calm = step >= 60
        loss, parts = network.loss(images, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(sum(float(part) for name, part in parts.items() if name != "l1"))
    assert losses[-1] < 0.2 * losses[0]
    with torch.no_grad():
        boxes, scores = network.predict(images)  # in training mode: norms with the statistics of these two
    for image, (truth, label) in enumerate(zip(truths, labels, strict=True)):
        best = int(scores[image].amax(dim=1).argmax())
        assert int(scores[image, best].argmax()) == label
        assert slow_iou(boxes[image, best].tolist(), truth) > 0.7


def test_the_three_files_differ_in_width_and_in_their_convolutions():
    files = {name: parse(CFG / f"yolox-{name}.yaml") for name in ("nano", "tiny", "s")}
    ops = {name: [layer.op for layer in spec.layers] for name, spec in files.items()}
    plain = {"SeparableConv": "Conv", "C3Separable": "C3"}
    assert ops["tiny"] == ops["s"] == [plain.get(op, op) for op in ops["nano"]]
    assert all(op in OPS for op in ops["nano"])
