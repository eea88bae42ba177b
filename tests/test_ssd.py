"""The head of SSD: priors, matching and equations (3) to (5) against numbers worked out by hand and slow loops."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_yolo_head import slow_ciou, targets_of
from torch import Tensor
from torch.nn import functional as F

from bench.ca_ssd import ssd300_vgg16, ssdlite320_mobilenetv3
from data.structures import Fault, Targets
from models.boxes import pairwise_iou
from models.graph import resolve
from models.heads.ssd import SSDHead, decoded, encoded, match_priors, ssd_ratios, ssd_scales, ssd_sizes
from models.network import build
from models.parse import dump, parse_text
from models.registry import Shape
from models.spec import row_text
from models.supernet import Supernet

VARIANCES = (0.1, 0.2)
PYRAMID = [Shape(128, stride) for stride in (8, 16, 32, 64, 128)]
NOTHING = targets_of([], [], [])


def tiles(classes: int = 1, **options) -> SSDHead:
    """Four priors that tile an input of 32 x 32: one of 16 x 16 a cell."""
    torch.manual_seed(0)
    return SSDHead([Shape(4, 16)], classes, ((16.0, 16.0),), **options).double()


def silent(classes: int = 1, images: int = 1) -> list[Tensor]:
    """What a head of `tiles` gives if all its numbers are 0."""
    return [torch.zeros(images, 1, 2, 2, 5 + classes, dtype=torch.float64)]


def a_head(classes: int = 3, **options) -> SSDHead:
    """Two levels of 4 priors a cell, for an input of 64 x 48."""
    torch.manual_seed(0)
    return SSDHead([Shape(4, 8), Shape(6, 16)], classes, **options).double()


def logits(classes: int = 3, images: int = 2, seed: int = 0, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 4, 6, 8, 5 + classes), (images, 4, 3, 4, 5 + classes)]
    return [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def outputs_at(head: SSDHead, imgsz: int) -> list[Tensor]:
    return [
        torch.empty(1, priors, imgsz // stride, imgsz // stride, 0, dtype=torch.float64)
        for priors, stride in zip(head.num_priors, head.strides, strict=True)
    ]


# ---- the priors


def test_scales_and_ratios_are_those_of_ssd():
    """SSD300 has six maps: its configuration says 30, 60, 111, 162, 213, 264 and 315 of 300 pixels, rounded down."""
    assert ssd_scales(6) == pytest.approx((0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075))
    assert ssd_scales(5) == pytest.approx((0.1, 0.2, 0.2 + 0.7 / 3, 0.2 + 1.4 / 3, 0.9, 0.9 + 0.7 / 3))
    assert ssd_ratios(5) == ((2,), (2, 3), (2, 3), (2, 3), (2,))
    sides = [side for size in ssd_sizes(0.4, 0.9, (4.0,)) for side in size]
    assert sides == pytest.approx([0.4, 0.4, 0.6, 0.6, 0.8, 0.2, 0.2, 0.8])
    assert len(ssd_scales(1)) == 2 and len(ssd_ratios(1)) == 1


def test_the_pyramid_of_five_levels_has_13788_priors_at_384():
    head = SSDHead(PYRAMID, 20)
    assert head.num_priors == (4, 6, 6, 6, 4)
    priors = head.priors(outputs_at(head, 384))
    assert len(priors) == 48**2 * 4 + 24**2 * 6 + 12**2 * 6 + 6**2 * 6 + 3**2 * 4 == 13_788
    root = math.sqrt(2)
    by_hand = [(38.4, 38.4), (38.4 * root, 38.4 * root), (38.4 * root, 38.4 / root), (38.4 / root, 38.4 * root)]
    for prior, (w, h) in enumerate(by_hand):
        assert priors[prior * 48 * 48].tolist() == pytest.approx([4, 4, w, h], rel=1e-6)
        assert priors[prior * 48 * 48 + 48 + 2].tolist() == pytest.approx([20, 12, w, h], rel=1e-6)  # row 1, column 2
    assert priors[-1].tolist() == pytest.approx([320, 320, 0.9 * 384 / root, 0.9 * 384 * root], rel=1e-6)


def test_the_head_of_five_levels_has_97930_parameters():
    """Each level: two depth-wise 3 x 3 with their norms, and 25 outputs a prior with their biases."""
    head = SSDHead(PYRAMID, 20)
    assert sum(p.numel() for p in head.parameters()) == 5 * 2 * (9 * 128 + 2 * 128) + 26 * 25 * 129 == 97_930
    assert not any("sizes" in name for name in head.state_dict())


def test_priors_are_shares_of_the_longer_side():
    """An input of 64 x 48, twice its size, and turned."""
    head = a_head()
    small, turned = head.priors(logits()), head.priors([y.transpose(2, 3) for y in logits()])
    twice = head.priors([y.repeat(1, 1, 2, 2, 1) for y in logits()])
    assert small[0, 2:].tolist() == pytest.approx([6.4, 6.4])
    assert twice[0].tolist() == pytest.approx([4, 4, 12.8, 12.8])
    assert sorted(turned[:, [1, 0, 2, 3]].tolist()) == sorted(small.tolist())


def test_priors_of_the_files_anchors_are_pixels_of_any_input():
    head = SSDHead([Shape(4, 8), Shape(4, 16)], 2, ((10.0, 20.0, 30.0, 12.0), (40.0, 41.0, 50.0, 70.0)))
    for side in (32, 64):
        priors = head.priors(outputs_at(head, side))
        cells = (side // 8) ** 2
        assert priors[0].tolist() == [4, 4, 10, 20] and priors[cells].tolist() == [4, 4, 30, 12]
        assert priors[-1].tolist() == [side - 8, side - 8, 50, 70]


def test_the_best_possible_recall_is_that_of_priors_where_they_lie():
    """Of the four tiles: one box is a tile, one lies between two (1/3), one is half of a tile (1/2), one is nothing."""
    boxes = torch.tensor([[0, 16, 16, 32], [8, 0, 24, 16], [0, 0, 8, 16], [3, 3, 3, 9]])
    assert tiles().best_possible_recall(boxes, 32) == 0.5
    assert tiles(match=0.3).best_possible_recall(boxes, 32) == 0.75
    assert tiles().best_possible_recall(boxes[:1].repeat(2501, 1), 32) == 1.0
    assert math.isnan(tiles().best_possible_recall(boxes[:0], 32))


# ---- forward and decode


def test_forward_puts_numbers_where_decode_looks_for_them():
    head = a_head().eval()
    maps = [torch.randn(2, c, *cells, dtype=torch.float64) for c, cells in ((4, (6, 8)), (6, (3, 4)))]
    y = head(maps)
    assert [tuple(level.shape) for level in y] == [(2, 4, 6, 8, 8), (2, 4, 3, 4, 8)]
    for level, x in enumerate(maps):
        offsets, classes = head.box[level](x), head.classes[level](x)
        for prior in range(4):
            assert torch.equal(y[level][:, prior, ..., :4], offsets[:, 4 * prior : 4 * prior + 4].movedim(1, -1))
            assert torch.equal(y[level][:, prior, ..., 4:], classes[:, 4 * prior : 4 * prior + 4].movedim(1, -1))
    flat, _ = head.split(y)
    at = 3 * 6 * 8 + 2 * 8 + 5  # prior 3, row 2, column 5 of the finest level
    assert torch.equal(flat[:, at], y[0][:, 3, 2, 5, :4])
    assert head.priors(y)[at, :2].tolist() == [5.5 * 8, 2.5 * 8]


def test_decode_gives_the_number_worked_out_by_hand():
    """Of the lower left tile, around 8, 24: a tenth of 16 pixels an offset, and a fifth of a logarithm."""
    outputs = silent(classes=2)
    outputs[0][0, 0, 1, 0] = torch.tensor([2, -1, 5 * math.log(2), 0, math.log(2), 0, math.log(5)])
    boxes, scores = tiles(classes=2).decode(outputs)
    cx, cy, w, h = 8 + 2 * 1.6, 24 - 1.6, 32, 16
    assert boxes[0, 2].tolist() == pytest.approx([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    assert scores[0, 2].tolist() == pytest.approx([1 / 8, 5 / 8])  # the background has 2 / 8
    assert boxes[0, 3].tolist() == [16, 16, 32, 32] and scores[0, 3].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_decode_is_finite_whatever_the_network_says():
    boxes, scores = tiles().decode([torch.full_like(silent()[0], 1e6)])
    assert boxes.isfinite().all() and scores.isfinite().all()


def test_a_new_head_says_how_much_background_counts():
    """Three negatives to one that answers, and all classes alike: what costs least while nothing is known."""
    _, scores = a_head(classes=4).decode(a_head(classes=4).eval()([torch.zeros(1, c, 4, 4).double() for c in (4, 6)]))
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 4 / 4))


SIDE = st.floats(1, 300)
BOX = st.tuples(st.floats(-50, 400), st.floats(-50, 400), SIDE, SIDE)


@settings(max_examples=40)
@given(BOX, BOX)
def test_decode_leads_back_what_the_loss_asks_for(box, prior):
    x, y, w, h = box
    truth, priors = (torch.tensor(values, dtype=torch.float64) for values in ([x, y, x + w, y + h], prior))
    if max(w / prior[2], h / prior[3]) < 62:
        offsets = encoded(truth, priors, VARIANCES)
        torch.testing.assert_close(decoded(offsets, priors, VARIANCES), truth, rtol=0, atol=1e-8)


def test_offsets_are_those_of_equation_5_by_hand():
    """g^cx = (52 - 50) / 20 / .1, g^cy = (46 - 50) / 40 / .1, g^w = log(20 e / 20) / .2, g^h = log(40 / 40) / .2."""
    prior = torch.tensor([50.0, 50, 20, 40], dtype=torch.float64)
    half = 10 * math.e
    truth = torch.tensor([52 - half, 46 - 20, 52 + half, 46 + 20], dtype=torch.float64)
    torch.testing.assert_close(encoded(truth, prior, (0.1, 0.2)).tolist(), [1.0, -1.0, 5.0, 0.0])
    torch.testing.assert_close(encoded(truth, prior, (1.0, 0.5)).tolist(), [0.1, -0.1, 2.0, 0.0])


# ---- who answers for what


def slow_match(iou: list[list[float]], least: float) -> list[int]:
    """Pair by pair by falling overlap, the first of equal ones first; then prior by prior."""
    priors = len(iou[0]) if iou else 0
    found, own = [-1] * priors, {}
    pairs = sorted((-value, t, p) for t, row in enumerate(iou) for p, value in enumerate(row) if value > 0)
    for _, t, p in pairs:
        if t not in own.values() and p not in own:
            own[p] = t
    for p in range(priors):
        column = [row[p] for row in iou]
        if p in own:
            found[p] = own[p]
        elif max(column) >= least:
            found[p] = column.index(max(column))
    return found


def test_matching_gives_what_was_worked_out_by_hand():
    """Truth 0 takes prior 1, so truth 1, which overlaps it nearly as much, has to take prior 2 at .2; prior 0 reaches
    .5 with truth 0, prior 3 with none; truth 2 lies nowhere.
    """
    iou = [[0.5, 0.9, 0.6, 0.1], [0.0, 0.8, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0]]
    assert match_priors(torch.tensor(iou), 0.5).tolist() == [0, 0, 1, -1]
    assert match_priors(torch.tensor(iou), 0.51).tolist() == [-1, 0, 1, -1]
    assert match_priors(torch.tensor(iou[1:]), 0.99).tolist() == [-1, 0, -1, -1]


def test_a_truth_that_lost_its_best_prior_may_still_push_another_one_out():
    """Truth 1 loses prior 0 to truth 0, and takes prior 1 from truth 2, whose best it is but which shares less."""
    iou = [[0.9, 0.0, 0.0], [0.8, 0.7, 0.0], [0.0, 0.6, 0.3]]
    assert match_priors(torch.tensor(iou), 0.95).tolist() == [0, 1, 2]


def test_equal_truths_have_a_prior_each():
    assert match_priors(torch.tensor([[0.7, 0.2, 0.0, 0.6]] * 3), 0.5).tolist() == [0, 2, -1, 1]
    assert match_priors(torch.zeros(0, 5), 0.5).tolist() == [-1] * 5


OVERLAPS = st.integers(0, 6).flatmap(
    lambda truths: st.lists(
        st.lists(st.integers(0, 9).map(lambda n: n / 10), min_size=7, max_size=7), min_size=truths, max_size=truths
    )
)


@settings(max_examples=60)
@given(OVERLAPS, st.sampled_from((0.3, 0.5, 0.75)))
def test_matching_is_that_of_the_slow_loop(iou, least):
    """Overlaps that differ: equal ones may be joined in another order, but then as well."""
    distinct = [[value and value + (7 * t + p) * 1e-6 for p, value in enumerate(row)] for t, row in enumerate(iou)]
    found = match_priors(torch.tensor(distinct, dtype=torch.float64).reshape(-1, 7), least).tolist()
    assert found == (slow_match(distinct, least) if iou else [-1] * 7)
    tied = match_priors(torch.tensor(iou, dtype=torch.float64).reshape(-1, 7), least).tolist()
    for truth, row in enumerate(iou):
        answers = [prior for prior, other in enumerate(tied) if other == truth]
        assert all(row[prior] > 0 for prior in answers)
        reaches = sum(any(line[prior] > 0 for line in iou) for prior in range(7))
        assert answers or not any(row) or reaches < 7


def drawn_targets(count: int, classes: int = 3, images: int = 2, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    size = 2 + 38 * torch.rand(count, 2, generator=generator)
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([64.0, 48.0])
    labels, image = (torch.randint(0, most, (count,), generator=generator).tolist() for most in (classes, images))
    return targets_of(torch.cat((centre - size / 2, centre + size / 2), dim=1).tolist(), labels, image)


def slow_assign(head: SSDHead, outputs: Sequence[Tensor], targets: Targets) -> dict[tuple[int, int], int]:
    priors, found = head.priors(outputs).tolist(), {}
    for image in range(len(outputs[0])):
        mine = [index for index, where in enumerate(targets.image_index.tolist()) if where == image]
        corners = [[cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] for cx, cy, w, h in priors]
        iou = [[slow_ciou(corner, targets.boxes[index].tolist())[0] for corner in corners] for index in mine]
        matched = slow_match(iou, head.match) if mine else []
        found |= {(image, prior): mine[truth] for prior, truth in enumerate(matched) if truth >= 0}
    return found


@pytest.mark.parametrize("count", [0, 1, 6, 15])
def test_priors_answer_for_truths_of_their_image(count):
    head, outputs, targets = a_head(), logits(), drawn_targets(count, seed=count)
    found = head.assign(head.priors(outputs), targets, images=2)
    answers = {(i, p): t for i, p, t in zip(*(column.tolist() for column in found), strict=True)}
    assert answers == slow_assign(head, outputs, targets)
    assert set(answers.values()) == set(range(count))


def test_a_truth_smaller_than_any_prior_has_one_and_a_truth_without_area_none():
    head = a_head()
    targets = targets_of([[21, 21, 22, 22.5], [10, 10, 10, 30]], [0, 1], [1, 1])
    image, prior, truth = head.assign(head.priors(logits()), targets, images=2)
    assert (image.tolist(), truth.tolist()) == ([1], [0])
    assert head.priors(logits())[prior[0], :2].tolist() == [20, 20]


def test_overlaps_are_those_of_one_pair_after_the_other():
    boxes, others = drawn_targets(9).boxes, drawn_targets(5, seed=1).boxes
    slow = [[slow_ciou(one.tolist(), other.tolist())[0] for other in others] for one in boxes]
    torch.testing.assert_close(pairwise_iou(boxes, others), torch.tensor(slow), rtol=0, atol=1e-6)
    assert pairwise_iou(boxes[:0], others).shape == (0, 5)


# ---- the loss, by hand

TILE = [0, 0, 16, 16]  # the first prior; no other one touches it


def test_equation_4_takes_the_right_class_and_the_background_of_the_hardest():
    """c^0 of the others is 3/4, 1/2, 1/4; the tile itself has 1/2: -log of 1/2, and of 1/4 and 1/2."""
    outputs = silent()
    outputs[0][0, 0, 0, 1, 4] = math.log(3)
    outputs[0][0, 0, 1, 1, 5] = math.log(3)
    loss, parts = tiles(negatives=2).loss(outputs, targets_of([TILE], [0], [0]))
    assert float(parts["cls"]) == pytest.approx((1 + 2 + 1) * math.log(2))
    assert float(parts["box"]) == 0 and float(loss) == float(parts["cls"])
    _, parts = tiles(negatives=1).loss(outputs, targets_of([TILE], [0], [0]))
    assert float(parts["cls"]) == pytest.approx((1 + 2) * math.log(2))
    _, parts = tiles(negatives=9).loss(outputs, targets_of([TILE], [0], [0]))  # there are only three
    assert float(parts["cls"]) == pytest.approx(4 * math.log(2) + math.log(4 / 3))


def test_equation_4_has_the_background_first():
    """A logit of log 6 at the second class makes its probability 6 / 9, and that of the background 1 / 9."""
    outputs = silent(classes=3)
    outputs[0][0, 0, 0, 0, 4:] = torch.tensor([0, 0, math.log(6), 0])
    outputs[0][0, 0, 1, :, 4] = 60  # certain background costs nothing
    outputs[0][0, 0, 0, 1, 4] = 60
    for label, probability in ((0, 1 / 9), (1, 6 / 9), (2, 1 / 9)):
        _, parts = tiles(classes=3).loss(outputs, targets_of([TILE], [label], [0]))
        assert float(parts["cls"]) == pytest.approx(-math.log(probability))


def test_equation_5_is_the_huber_loss_of_the_offsets():
    """Offsets 0 are right, and the head says .5, 2, -1 and 0: 1/8 + 3/2 + 1/2; with a delta of 1/2: 1/8 + 7/8 + 3/8."""
    outputs = silent()
    outputs[0][0, 0, 0, 0, :4] = torch.tensor([0.5, 2, -1, 0])
    outputs[0][0, 0, 1, 1, :4] = 7  # of a prior that answers for nothing
    for delta, expected in ((1.0, 2.125), (0.5, 1.375)):
        _, parts = tiles(delta=delta).loss(outputs, targets_of([TILE], [0], [0]))
        assert float(parts["box"]) == pytest.approx(expected)


def test_huber_of_1_is_the_smooth_l1_of_ssd_and_other_deltas_are_a_factor_away():
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    zero = torch.zeros_like(x)
    assert torch.equal(F.huber_loss(x, zero, delta=1.0), F.smooth_l1_loss(x, zero, beta=1.0))
    torch.testing.assert_close(F.huber_loss(x, zero, delta=0.3), 0.3 * F.smooth_l1_loss(x, zero, beta=0.3))


def test_equation_3_divides_by_all_that_answer_and_mines_image_by_image():
    """Two truths in image 0, none in image 1: N is 2, and only image 0 has negatives, both of its others."""
    outputs = silent(images=2)
    outputs[0][1, ..., 5] = 9  # image 1 is full of false alarms, which cost nothing
    targets = targets_of([TILE, [16, 16, 32, 32]], [0, 0], [0, 0])
    loss, parts = tiles().loss(outputs, targets)
    assert float(loss) == float(parts["cls"]) == pytest.approx(4 * math.log(2) / 2)


def test_alpha_and_the_gain_of_classes_are_options():
    head, outputs = tiles(), silent()
    outputs[0][0, 0, 0, 0, 1] = 1
    targets = targets_of([TILE], [0], [0])
    _, parts = head.loss(outputs, targets)
    head.options |= {"box": 3.0, "cls": 0.25}
    loss, more = head.loss(outputs, targets)
    assert float(more["box"]) == 3 * float(parts["box"]) == pytest.approx(1.5)
    assert float(more["cls"]) == 0.25 * float(parts["cls"]) and float(loss) == float(more["box"] + more["cls"])


@pytest.mark.parametrize("targets", [NOTHING, targets_of([[10, 10, 10, 20]], [0], [0])], ids=["no box", "no area"])
def test_the_loss_is_0_where_nothing_answers(targets):
    outputs = [y.requires_grad_() for y in logits()]
    loss, _ = a_head().loss(outputs, targets)
    loss.backward()
    assert float(loss.detach()) == 0 and all((y.grad == 0).all() for y in outputs)


# ---- the loss, by a slow loop


def slow_loss(head: SSDHead, outputs: Sequence[Tensor], targets: Targets) -> dict[str, float]:
    answers, priors = slow_assign(head, outputs, targets), head.priors(outputs).tolist()
    flat = torch.cat([y.flatten(1, 3) for y in outputs], dim=1).tolist()
    parts = {"box": 0.0, "cls": 0.0}
    for image, rows in enumerate(flat):
        minus_log = [[math.log(sum(map(math.exp, row[4:]))) - c for c in row[4:]] for row in rows]
        mine = {prior: truth for (where, prior), truth in answers.items() if where == image}
        for prior, truth in mine.items():
            parts["cls"] += minus_log[prior][1 + int(targets.labels[truth])]
            (x1, y1, x2, y2), (cx, cy, w, h) = targets.boxes[truth].tolist(), priors[prior]
            goal = [(x1 + x2 - 2 * cx) / 2 / w / 0.1, (y1 + y2 - 2 * cy) / 2 / h / 0.1]
            goal += [math.log((x2 - x1) / w) / 0.2, math.log((y2 - y1) / h) / 0.2]
            for said, wanted in zip(rows[prior], goal, strict=False):
                apart = abs(said - wanted)
                parts["box"] += apart**2 / 2 if apart <= 1 else apart - 0.5
        others = sorted((row[0] for prior, row in enumerate(minus_log) if prior not in mine), reverse=True)
        parts["cls"] += sum(others[: 3 * len(mine)])
    return {name: part / max(len(answers), 1) for name, part in parts.items()}


@pytest.mark.parametrize("count", [0, 1, 5, 15])
def test_the_loss_is_that_of_the_slow_loop(count):
    head, outputs, targets = a_head(), logits(seed=count), drawn_targets(count, seed=count)
    expected = slow_loss(head, outputs, targets)
    loss, parts = head.loss(outputs, targets)
    assert {name: float(part) for name, part in parts.items()} == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert float(loss) == pytest.approx(sum(expected.values()), rel=1e-5)
    assert not any(part.requires_grad for part in parts.values())


def test_gradients_are_those_of_differences():
    """Where the hardest stay the hardest: they are far apart here."""
    head, targets = tiles(classes=2, negatives=2), targets_of([[1, 2, 14, 13]], [1], [0])
    start = torch.randn(1, 1, 2, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda y: head.loss([y], targets)[0], start.requires_grad_())


def test_gradients_reach_who_answers_and_the_hardest_three_times_as_many():
    head, targets = a_head(), targets_of([[4, 4, 30, 30]], [1], [0])
    outputs = [y.requires_grad_() for y in logits()]
    head.loss(outputs, targets)[0].backward()
    gradients = torch.cat([y.grad.flatten(1, 3) for y in outputs], dim=1)
    _, prior, _ = head.assign(head.priors(outputs), targets, images=2)
    assert (gradients[0, :, :4] != 0).any(dim=1).nonzero()[:, 0].tolist() == prior.tolist()
    assert int((gradients[0, :, 4:] != 0).any(dim=1).sum()) == 4 * len(prior)
    assert (gradients[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_gradients_are_finite(size, dtype):
    targets = targets_of([[10.2, 10.1, 10.9, 11], [0, 0, 64, 48], [0, 0, 64, 48], [63, 47, 80, 60]], [0] * 4, [0] * 4)
    outputs = [y.to(dtype).requires_grad_() for y in logits(size=size)]
    loss, _ = a_head().to(dtype).loss(outputs, targets)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(y.grad).all() for y in outputs)


def test_a_box_moves_to_its_truth_when_it_follows_the_gradient():
    head, targets = a_head(), targets_of([[12, 10, 41, 33], [2, 30, 12, 44]], [1, 2], [0, 0])
    outputs = [torch.zeros_like(y).requires_grad_() for y in logits(images=1)]
    optimizer = torch.optim.Adam(outputs, lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        head.loss(outputs, targets)[0].backward()
        optimizer.step()
    with torch.no_grad():
        boxes, scores = head.decode(outputs)
    for box, label in zip(targets.boxes.tolist(), targets.labels.tolist(), strict=True):
        best = int(scores[0, :, label].argmax())
        assert scores[0, best, label] > 0.8 and slow_ciou(boxes[0, best].tolist(), box)[0] > 0.9


# ---- as a row of a file

FILE = """
nc: 2
{top}
backbone:
  - [-1, 1, Conv, [8, 3, 2{open}]]
head:
  - [-1, 1, Conv, [8, 3, 2]]
  - [[0, 1], 1, SSDHead, [nc{args}]]
"""


def file(args: str = "", top: str = "", choice: str = "") -> str:
    return FILE.format(args=args, top=top, open=choice)


def test_a_row_may_say_everything_about_the_priors():
    args = ", {scales: [.2, .5, 1], ratios: [[2], []], variances: [.2, .3], negatives: 2, match: .4, delta: 2}"
    head = build(parse_text(file(args))).head
    assert head.num_priors == (4, 2) and head.variances == (0.2, 0.3)
    assert (head.negatives, head.match, head.delta) == (2, 0.4, 2)
    sizes = head.priors(outputs_at(head, 100))[:, 2:]
    assert sizes[0].tolist() == pytest.approx([20, 20]) and sizes[-1].tolist() == pytest.approx([50**0.5 * 10] * 2)
    spec = parse_text(file(args))
    assert row_text(parse_text(dump(spec)).layers[-1]) == row_text(spec.layers[-1])


def test_a_head_without_anchors_leaves_those_of_the_file_alone():
    """They stand from large to small, which would be turned round, or be told of, for a head that reads them."""
    top = "anchors: [[90, 90], [10, 13]]"
    assert resolve(parse_text(file(top=top))).nodes[-1].arguments["anchors"] is None
    assert resolve(parse_text(file(", anchors", top))).nodes[-1].arguments["anchors"] == ((10, 13), (90, 90))


def test_the_files_anchors_may_still_be_to_fit():
    head = build(parse_text(file(", anchors", "anchors: 3"))).head
    assert head.num_priors == (3, 3) and not head.fitted
    assert build(parse_text(file(", anchors", "anchors: [[10, 13], [90, 90]]"))).head.fitted


@pytest.mark.parametrize(
    ("args", "top", "said"),
    [
        (", {scales: [.1, .2]}", "", "scales has 2 numbers; the head reads 2 levels, so 3 would be right: one a level"),
        (", {ratios: [[2]]}", "", "ratios has 1 lists, but the head reads 2 levels"),
        (", anchors, {ratios: [[2], [2]]}", "", "its priors are the file's anchors, so scales and ratios mean nothing"),
        (", anchors", "anchors: [[10, 13]]", "anchors are given for 1 levels, but the head reads 2"),
        (", {match: 1.5}", "", "match=1.5 should be less than 1"),
        (", {negatives: 0}", "", "negatives=0 should be greater than 0"),
        (", {delta: {choice: [1, 2]}}", "", "a head has no choices"),
    ],
)
def test_what_the_head_cannot_do_is_told(args, top, said):
    with pytest.raises(Fault, match=re.escape(said)):
        resolve(parse_text(file(args, top)))


def test_rows_before_the_head_can_be_searched():
    torch.manual_seed(0)
    net = Supernet(parse_text(file(choice=", {act: {choice: [relu, silu]}}")), "shared")
    images, targets = torch.rand(2, 3, 32, 32), targets_of([[4, 4, 20, 28]], [1], [0])
    for act in ("relu", "silu"):
        net.activate({"0.act": act})
        loss, _ = net.network.train().loss(images, targets)
        loss.backward()
        assert loss > 0
        with torch.no_grad():
            boxes, scores = net.network.eval().predict(images)
        assert boxes.shape == (2, (16 * 16 + 8 * 8) * 4, 4) and scores.shape == (2, 1280, 2)


# ---- bench/ca_ssd.py


def test_peers_counted_layer_by_layer_have_the_published_parameters():
    """Those of torchvision's two with the 91 classes of COCO; the MACs of its documentation, in billions."""
    for counted, params, macs in ((ssd300_vgg16, 35_641_826, 34.858), (ssdlite320_mobilenetv3, 3_440_060, 0.583)):
        assert counted(91)[0] == params and counted(91)[1] / 1e9 == pytest.approx(macs, rel=0.01)
