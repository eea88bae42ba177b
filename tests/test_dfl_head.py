"""The anchor-free head against numbers worked out by hand and against slow loops in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_yolo_head import slow_ciou, targets_of
from torch import Tensor

from data.structures import Targets
from models.heads.dfl import ALPHA, BETA, BOX, CLASS, DISTRIBUTION, MOST_POINTS, DFLDetect, distribution_focal_loss
from models.registry import Shape

STRIDES = (8, 16)
HEIGHT, WIDTH = 48, 64
BINS = 5
CELLS = [(HEIGHT // stride, WIDTH // stride) for stride in STRIDES]
POINTS = sum(rows * columns for rows, columns in CELLS)
NOTHING = targets_of([], [], [])


def a_head(classes: int = 3, bins: int = BINS) -> DFLDetect:
    torch.manual_seed(0)
    return DFLDetect([Shape(4, 8), Shape(6, 16)], classes, bins).double()


def logits(classes: int = 3, images: int = 2, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, *cells, 4 * BINS + classes) for cells in CELLS]
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def nothing_said(classes: int = 3, images: int = 2) -> list[Tensor]:
    return [torch.zeros_like(level) for level in logits(classes, images)]


def drawn_targets(count: int, classes: int = 3, images: int = 2, smallest: float = 2, seed: int = 0) -> Targets:
    rng = np.random.default_rng(seed)
    size, centre = rng.uniform(smallest, 40, (count, 2)), rng.uniform(0, 1, (count, 2)) * (WIDTH, HEIGHT)
    boxes = np.concatenate((centre - size / 2, centre + size / 2), axis=1)
    return targets_of(boxes.tolist(), rng.integers(0, classes, count).tolist(), rng.integers(0, images, count).tolist())


# ---- forward and decode


def test_a_cell_of_zeros_reaches_half_of_all_bins_to_every_side():
    """The mean of 0 to 4 is 2 strides."""
    boxes, scores = a_head().decode(nothing_said())
    assert boxes.shape == (2, POINTS, 4) and scores.shape == (2, POINTS, 3)
    assert boxes[0, 0].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]
    assert boxes[1, 8 + 2].tolist() == [20 - 16, 12 - 16, 20 + 16, 12 + 16]  # row 1, column 2
    assert boxes[1, 6 * 8 + 4].tolist() == [8 - 32, 24 - 32, 8 + 32, 24 + 32]  # stride 16: row 1, column 0
    assert (scores == 0.5).all()


def test_decode_gives_the_number_worked_out_by_hand():
    outputs = nothing_said()
    certain, split = [0, 0, 0, 60, 0], [-60, math.log(3), 0, -60, -60]  # 3 strides; 1 or 2 as 3 to 1: 1.25 strides
    half = [-60, -60, 0, 0, -60]  # 2.5 strides
    first = [60, 0, 0, 0, 0]
    outputs[1][1, 2, 1] = torch.tensor([*certain, *split, *half, *first, math.log(3), 0, -math.log(3)])
    boxes, scores = a_head().decode(outputs)
    index, x, y = 6 * 8 + 2 * 4 + 1, 24, 40
    expected = [x - 3 * 16, y - 1.25 * 16, x + 2.5 * 16, y]
    torch.testing.assert_close(boxes[1, index], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores[1, index], torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64))


def test_forward_puts_numbers_where_decode_looks_for_them():
    """Channel side * bins + bin of one convolution is that bin of that side; classes come from the other."""
    head = a_head().eval()
    maps = [torch.randn(2, c, *cells, dtype=torch.float64) for c, cells in zip((4, 6), CELLS, strict=True)]
    sides, classes = head.split(head(maps))
    start = 0
    for distances, scores, x, (rows, columns) in zip(head.cv2, head.cv3, maps, CELLS, strict=True):
        here = slice(start, start + rows * columns)
        for side in range(4):
            for number in range(BINS):
                raw = distances(x)[:, side * BINS + number].flatten(1)
                assert torch.equal(sides[:, here, side, number], raw)
        assert torch.equal(classes[:, here].mT, scores(x).flatten(2))
        start += rows * columns


def test_a_new_head_expects_few_objects_and_says_nothing_of_their_size():
    head = a_head(classes=3)
    for distances, scores, stride in zip(head.cv2, head.cv3, STRIDES, strict=True):
        assert (distances[-1].bias == 1).all()
        expected = math.log(5 / 3 / (640 / stride) ** 2)
        torch.testing.assert_close(scores[-1].bias, torch.full((3,), expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_what_a_bin_stands_for_is_stored_and_never_learned():
    head = a_head()
    assert head.state_dict()["dfl.weight"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert [name for name, p in head.named_parameters() if not p.requires_grad] == ["dfl.weight"]


# ---- the loss of a distribution


def test_the_loss_of_a_distribution_is_the_number_worked_out_by_hand():
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    expected = {
        0.25: -(0.75 * math.log(0.2) + 0.25 * math.log(0.3)),
        1.5: -(0.5 * math.log(0.3) + 0.5 * math.log(0.5)),
        1.0: -math.log(0.3),
        0.0: -math.log(0.2),
        2.0: -math.log(0.5),
        7.0: -math.log(0.5),  # out of reach: the last bin
        -1.0: -math.log(0.2),
    }
    distances = torch.tensor(list(expected), dtype=torch.float64)
    found = distribution_focal_loss(p.log().expand(len(distances), 3), distances)
    torch.testing.assert_close(found, torch.tensor(list(expected.values()), dtype=torch.float64))


@given(st.floats(0, BINS - 1), st.integers(0, 1000))
def test_a_distribution_costs_least_where_it_says_the_distance(distance, seed):
    """Between two bins by nearness: its mean is the distance, and any other distribution costs more (Gibbs)."""
    y = torch.tensor([distance], dtype=torch.float64)
    best = (1 - (torch.arange(float(BINS), dtype=torch.float64) - y).abs()).clamp(min=1e-12)
    assert float((best / best.sum()) @ torch.arange(float(BINS), dtype=torch.float64)) == pytest.approx(
        distance, abs=1e-9
    )
    other = torch.randn(1, BINS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert distribution_focal_loss(best.log()[None], y) < distribution_focal_loss(other, y)


# ---- who answers for what


def slow_points() -> list[tuple[float, float, int]]:
    return [
        ((column + 0.5) * stride, (row + 0.5) * stride, stride)
        for stride, (rows, columns) in zip(STRIDES, CELLS, strict=True)
        for row in range(rows)
        for column in range(columns)
    ]


def slow_assign(boxes: Tensor, classes: Tensor, targets: Targets) -> dict[tuple[int, int], tuple[int, float]]:
    """Truth by truth and point by point: image and point -> truth and alignment."""
    picked: dict[tuple[int, int], list[tuple[float, int, float]]] = {}  # of a point: u, truth, t
    for index, truth in enumerate(targets.boxes.tolist()):
        image, label = int(targets.image_index[index]), int(targets.labels[index])
        sides = truth[2] - truth[0], truth[3] - truth[1]
        if min(sides) <= 0:
            continue
        asked = []
        for point, (x, y, _) in enumerate(slow_points()):
            away = abs(x - (truth[0] + truth[2]) / 2), abs(y - (truth[1] + truth[3]) / 2)
            if all(a <= max(side, STRIDES[0]) / 2 for a, side in zip(away, sides, strict=True)):
                u = slow_ciou(boxes[image, point].tolist(), truth)[0]
                s = 1 / (1 + math.exp(-float(classes[image, point, label])))
                if u > 0:
                    asked.append((s**ALPHA * u**BETA, point, u))
        for t, point, u in sorted(asked, key=lambda one: (-one[0], one[1]))[:MOST_POINTS]:
            picked.setdefault((image, point), []).append((u, index, t))
    mine = {cell: max(picks, key=lambda one: (one[0], -one[1])) for cell, picks in picked.items()}
    found = {}
    for cell, (_, index, t) in mine.items():
        points = [(u, other_t) for u, other, other_t in mine.values() if other == index]
        found[cell] = index, t / max(other_t for _, other_t in points) * max(u for u, _ in points)
    return found


def assigned(head: DFLDetect, outputs: Sequence[Tensor], targets: Targets) -> dict[tuple[int, int], tuple[int, float]]:
    sides, classes = head.split(outputs)
    points, strides = head.points(outputs)
    found = head.assign(head.boxes(sides, points, strides), classes, points, targets)
    columns = [column.tolist() for column in found]
    cells = {(i, p): (t, a) for i, p, t, a in zip(*columns, strict=True)}
    assert len(cells) == len(columns[0]), "a point answers for two truths"
    return cells


SIDE = st.integers(0, 160).map(lambda n: n / 4)  # from none, by less than a stride, to most of the image


@st.composite
def labelled(draw: st.DrawFn) -> Targets:
    """Boxes whose middles lie in the image or on its edge; some the same."""
    boxes, labels, images = [], [], []
    for _ in range(draw(st.integers(0, 7))):
        if boxes and draw(st.booleans()) and draw(st.booleans()):
            boxes.append(boxes[-1])
        else:
            w, h = draw(SIDE), draw(SIDE)
            cx, cy = draw(st.integers(0, 4 * WIDTH)) / 4, draw(st.integers(0, 4 * HEIGHT)) / 4
            boxes.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
        labels.append(draw(st.integers(0, 2)))
        images.append(draw(st.integers(0, 1)))
    return targets_of(boxes, labels, images)


@settings(max_examples=60)
@given(labelled(), st.integers(0, 100), st.sampled_from((0.3, 1.0, 4.0)))
@example(targets_of([[8, 8, 40, 40]] * 3, [0, 0, 1], [0, 0, 0]), 0, 1.0)  # the same truth three times
def test_assignment_is_that_of_the_slow_loop(targets, seed, size):
    head, outputs = a_head(), logits(seed=seed, size=size)
    boxes, _ = head.decode(outputs)
    found, slow = assigned(head, outputs, targets), slow_assign(boxes, head.split(outputs)[1], targets)
    assert found.keys() == slow.keys()
    for cell, (truth, aligned) in slow.items():
        assert found[cell] == (truth, pytest.approx(aligned, rel=1e-4))


@settings(max_examples=60)
@given(labelled(), st.integers(0, 100))
def test_points_answer_for_one_truth_and_say_how_well(targets, seed):
    """At most ten for a truth; the best of them with the largest IoU that one of them reaches."""
    head, outputs = a_head(), logits(seed=seed)
    boxes, _ = head.decode(outputs)
    found = assigned(head, outputs, targets)
    points = slow_points()
    for truth in range(len(targets.boxes)):
        mine = {cell: aligned for cell, (other, aligned) in found.items() if other == truth}
        if not mine:
            continue
        box = targets.boxes[truth].tolist()
        fits = [slow_ciou(boxes[cell].tolist(), box)[0] for cell in mine]
        assert len(mine) <= MOST_POINTS
        assert all(image == int(targets.image_index[truth]) for image, _ in mine)
        assert max(mine.values()) == pytest.approx(max(fits), rel=1e-4) and min(mine.values()) >= 0
        for _, point in mine:
            x, y, _ = points[point]
            assert box[0] - 4 <= x <= box[2] + 4 and box[1] - 4 <= y <= box[3] + 4


def test_alignment_is_the_number_worked_out_by_hand():
    """Two points in a truth of 16 x 8; one has its box and a score of 1/4, the other half of it and 9/16."""
    head, outputs = a_head(), nothing_said(images=1)
    for level in outputs:
        level[..., 4 * BINS :] = -30.0
        level.view(-1, level.shape[-1])[:, : 4 * BINS].view(-1, 4, BINS)[..., 0] = 60  # boxes without area elsewhere
    truth = [16, 16, 32, 24]  # the points 20, 20 and 28, 20
    half, one_and_half = [0, 0, -60, -60, -60], [-60, 0, 0, -60, -60]  # strides
    none = [60, 0, 0, 0, 0]
    outputs[0][0, 2, 2] = torch.tensor([*half, *half, *one_and_half, *half, -30, -math.log(3), -30])
    outputs[0][0, 2, 3] = torch.tensor([*half, *half, *half, *half, -30, math.log(9 / 7), -30])
    found = assigned(head, outputs, targets_of([truth], [1], [0]))
    first, second = (1 / 4) ** 0.5 * 1.0**6, (9 / 16) ** 0.5 * 0.5**6
    assert found.keys() == {(0, 2 * 8 + 2), (0, 2 * 8 + 3)}  # at stride 16 the point 24, 24 has no area, so no IoU
    assert found[0, 18] == (0, pytest.approx(1.0, abs=1e-6))
    assert found[0, 19] == (0, pytest.approx(second / first, rel=1e-5))
    assert len(none) == BINS


@pytest.mark.parametrize("side", [0.5, 2, 7.9])
@pytest.mark.parametrize("middle", [(8, 8), (20, 20), (17.3, 30.9), (0, 0), (64, 48)])
def test_a_truth_smaller_than_a_stride_has_a_point_wherever_it_lies(side, middle):
    """Also on the edges between cells, and with the middle on the edge of the image."""
    x, y = middle
    found = assigned(
        a_head(), nothing_said(), targets_of([[x - side / 2, y - side / 2, x + side / 2, y + side / 2]], [0], [1])
    )
    assert found and all(image == 1 and truth == 0 and aligned > 0 for (image, _), (truth, aligned) in found.items())


def test_a_truth_that_the_boxes_hardly_touch_still_teaches():
    """t = u^6 of an IoU under 1e-7 is too small for a number in single precision; its share of the largest is not."""
    head = a_head(bins=64).float()
    outputs = [torch.zeros(1, *cells, 4 * 64 + 3) for cells in CELLS]
    targets = targets_of([[20, 20, 20.01, 20.3]], [0], [0])
    found = assigned(head, outputs, targets)
    assert len(found) > 0 and 0 < max(aligned for _, aligned in found.values()) < 1e-6


# ---- the loss


def slow_loss(head: DFLDetect, outputs: Sequence[Tensor], targets: Targets, classes: int) -> dict[str, float]:
    """The parts of the loss with one number at a time."""

    def cross_entropy(x: float, goal: float) -> float:
        return goal * math.log1p(math.exp(-x)) + (1 - goal) * math.log1p(math.exp(x))

    flat = torch.cat([level.flatten(1, 2) for level in outputs], dim=1).tolist()
    boxes, _ = head.decode(outputs)
    answers = slow_assign(boxes, head.split(outputs)[1], targets)
    total = max(1.0, sum(aligned for _, aligned in answers.values()))
    parts = {"box": 0.0, "cls": 0.0, "dfl": 0.0}
    points = slow_points()
    for image, numbers in enumerate(flat):
        for point, values in enumerate(numbers):
            truth, aligned = answers.get((image, point), (None, 0.0))
            for label in range(classes):
                goal = aligned if truth is not None and label == int(targets.labels[truth]) else 0.0
                parts["cls"] += cross_entropy(values[4 * BINS + label], goal)
            if truth is None:
                continue
            box = targets.boxes[truth].tolist()
            parts["box"] += aligned * (1 - slow_ciou(boxes[image, point].tolist(), box)[1])
            x, y, stride = points[point]
            for side, distance in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
                d = min(max(distance / stride, 0), BINS - 1)
                left = min(math.floor(d), BINS - 2)
                of_side = values[side * BINS : (side + 1) * BINS]
                log_sum = math.log(sum(math.exp(value) for value in of_side))
                log_left, log_right = of_side[left] - log_sum, of_side[left + 1] - log_sum
                parts["dfl"] -= aligned * ((left + 1 - d) * log_left + (d - left) * log_right) / 4
    gains = {"box": BOX, "cls": CLASS, "dfl": DISTRIBUTION}
    return {name: gains[name] * part / total for name, part in parts.items()}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 6, 40])  # 40 share points
def test_the_loss_is_that_of_the_slow_loop(count, classes):
    head, outputs = a_head(classes), logits(classes, seed=count)
    targets = drawn_targets(count, classes, seed=count)
    expected = slow_loss(head, outputs, targets, classes)
    loss, parts = head.loss(outputs, targets)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert float(loss) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert not any(part.requires_grad for part in parts.values())
    assert (parts["box"] > 0) == (parts["dfl"] > 0) == (count > 0)


def test_the_gains_of_the_loss_are_its_options():
    head, outputs, targets = a_head(), logits(), drawn_targets(3)
    _, parts = head.loss(outputs, targets)
    head.options |= {"box": 2 * BOX, "cls": 3 * CLASS, "dfl": 5 * DISTRIBUTION}
    _, more = head.loss(outputs, targets)
    for name, times in (("box", 2), ("cls", 3), ("dfl", 5)):
        torch.testing.assert_close(more[name], times * parts[name])


def perfect(targets: Targets) -> list[Tensor]:
    """Logits that say what the targets are: every point inside one has its distances, the nearest bins by nearness."""
    outputs = nothing_said()
    flat, start = torch.cat([level.flatten(1, 2) for level in outputs], dim=1), 0
    flat[..., 4 * BINS :] = -30
    bins = torch.arange(float(BINS), dtype=torch.float64)
    for index, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist()):
        for point, (x, y, stride) in enumerate(slow_points()):
            distances = torch.tensor([x - x1, y - y1, x2 - x, y2 - y], dtype=torch.float64) / stride
            if distances.min() >= 0 and distances.max() <= BINS - 1:
                image = int(targets.image_index[index])
                near = (1 - (bins - distances[:, None]).abs()).clamp(min=1e-30)
                flat[image, point, : 4 * BINS] = near.log().flatten()
                flat[image, point, 4 * BINS + int(targets.labels[index])] = 30
    for level, (rows, columns) in zip(outputs, CELLS, strict=True):
        level.copy_(flat[:, start : start + rows * columns].view(level.shape))
        start += rows * columns
    return outputs


def test_the_truth_costs_next_to_nothing_and_decodes_to_the_boxes():
    """Next to nothing but for distances between bins, which are never certain; and for points that are not the best."""
    head = a_head()
    targets = targets_of([[0, 8, 24, 24], [32, 16, 64, 48], [8, 0, 24, 32]], [0, 2, 1], [0, 0, 1])
    outputs = perfect(targets)
    boxes, scores = head.decode(outputs)
    for box, label, image in zip(targets.boxes, targets.labels, targets.image_index, strict=True):
        right = ((boxes[image] - box).abs().amax(dim=1) < 1e-6) & (scores[image, :, label] > 0.99)
        assert right.any()
    _, parts = head.loss(outputs, targets)
    assert float(parts["box"]) < 1e-5
    worse = [y.clone() for y in outputs]
    for y in worse:
        y[..., : 4 * BINS] = y[..., : 4 * BINS].clamp(min=-2)
    assert all(head.loss(worse, targets)[1][name] > parts[name] for name in ("box", "dfl"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.1, 10.0])
@pytest.mark.parametrize(
    "targets",
    [
        NOTHING,
        targets_of([[10, 10, 30, 40]], [0], [0]),
        targets_of([[10.2, 10.1, 10.9, 11], [63.5, 47.5, 64, 48]], [0, 2], [0, 1]),
        targets_of([[10, 10, 10, 20], [0, 0, 64, 48], [0, 0, 64, 48]], [0, 1, 1], [0, 1, 1]),
        drawn_targets(60, smallest=0.01, seed=4),
    ],
    ids=["no box", "one box", "smaller than a stride", "no area, and twice the whole image", "sixty"],
)
def test_gradients_are_finite_and_reach_every_score(targets, size, dtype):
    head = a_head().to(dtype)
    outputs = [y.to(dtype).requires_grad_() for y in logits(size=size)]
    loss, _ = head.loss(outputs, targets)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(y.grad).all() for y in outputs)
    assert all((y.grad[..., 4 * BINS :] != 0).all() for y in outputs)
    boxes = {bool((y.grad[..., : 4 * BINS] != 0).any()) for y in outputs}
    assert (True in boxes) == (len(targets.boxes) > 0)


def test_a_box_moves_to_its_truth_when_it_follows_the_gradient():
    """From what a new head says; the points that answer may change on the way."""
    head, targets = a_head(), targets_of([[12, 10, 41, 33], [2, 30, 12, 44]], [1, 2], [0, 0])
    outputs = [y.requires_grad_() for y in nothing_said(images=1)]
    optimizer = torch.optim.Adam(outputs, lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        head.loss(outputs, targets)[0].backward()
        optimizer.step()
    with torch.no_grad():
        boxes, scores = head.decode(outputs)
    for box, label in zip(targets.boxes.tolist(), targets.labels.tolist(), strict=True):
        best = int(scores[0, :, label].argmax())
        assert scores[0, best, label] > 0.8 and slow_ciou(boxes[0, best].tolist(), box)[0] > 0.9
