"""A teacher's outputs as a loss: against numbers worked out by hand, and who may teach whom."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.structures import Fault
from models.distill import TEMPERATURE, bernoulli_kl, check_teacher, distillation_loss
from models.network import Network, build
from models.parse import parse_text

TEXT = """
nc: {nc}
anchors: {anchors}
backbone:
  - [-1, 1, Conv, [{width}, 3, 4]]
head:
  - [-1, 1, Conv, [16, 3, {stride}]]
  - [[0, 1], 1, {head}]
"""
HEADS = {"Detect": "Detect, [nc, anchors]", "DFLDetect": "DFLDetect, [nc, 4]"}
LN3 = math.log(3)  # its sigmoid is 3/4


def network(
    head: str = "Detect, [nc, anchors]",
    *,
    nc: int = 2,
    width: int = 8,
    stride: int = 2,
    anchors: str = "[[4, 5], [9, 7]]",
    path: str = "student.yaml",
) -> Network:
    torch.manual_seed(0)
    return build(parse_text(TEXT.format(head=head, nc=nc, width=width, stride=stride, anchors=anchors), path)).double()


def random_outputs(net: Network, seed: int, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shapes = [y.shape for y in net(torch.zeros(images, 3, 16, 16, dtype=torch.float64))[0]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def test_the_divergence_of_two_scores_is_the_number_worked_out_by_hand():
    """KL(1/4 || 3/4) = 1/4 ln(1/3) + 3/4 ln 3 = ln(3) / 2"""
    y, z = torch.tensor([LN3, 0.5, 40.0], dtype=torch.float64), torch.tensor([-LN3, 0.5, 40.0], dtype=torch.float64)
    torch.testing.assert_close(bernoulli_kl(y, z), torch.tensor([LN3 / 2, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("head", HEADS)
def test_a_student_that_says_the_same_costs_nothing_and_moves_nowhere(head):
    net = network(HEADS[head])
    wanted = random_outputs(net, 0)
    outputs = [y.clone().requires_grad_() for y in wanted]
    loss = distillation_loss(net, outputs, net, wanted)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12
    assert all(y.grad.abs().max() < 1e-12 for y in outputs)


@pytest.mark.parametrize("head", HEADS)
def test_gradients_equal_central_differences_and_the_teacher_gets_none(head):
    net = network(HEADS[head])
    outputs = [y.requires_grad_() for y in random_outputs(net, 1, images=1)]
    wanted = [y.requires_grad_() for y in random_outputs(net, 2, images=1)]
    loss = distillation_loss(net, outputs, net, wanted)
    assert float(loss.detach()) > 0.01
    loss.backward()
    assert all(y.grad is None for y in wanted)
    assert torch.autograd.gradcheck(lambda *ys: distillation_loss(net, ys, net, wanted), outputs)


@pytest.mark.parametrize("head", HEADS)
def test_steps_against_the_gradient_come_near_to_the_teacher(head):
    net = network(HEADS[head])
    outputs, wanted = [y.requires_grad_() for y in random_outputs(net, 3)], random_outputs(net, 4)
    optimizer, losses = torch.optim.Adam(outputs, lr=0.05), []
    for _ in range(40):
        losses.append(distillation_loss(net, outputs, net, wanted))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert 0 <= float(losses[-1].detach()) < 0.2 * float(losses[0].detach())


def test_the_anchor_head_is_compared_as_worked_out_by_hand():
    """One image, 2 x 2 and 1 x 1 cells, all zeros but for one cell of the first level, where the teacher is sure."""
    net = network()
    outputs, wanted = ([torch.zeros(1, 1, n, n, 7, dtype=torch.float64) for n in (2, 1)] for _ in range(2))
    for y in wanted:
        y[..., 4] = -50.0  # nothing there, and the student says so
    for y in outputs:
        y[..., 4] = -50.0
    wanted[0][0, 0, 1, 0] = torch.tensor([LN3, 0, 0, 0, LN3, -LN3, 0])
    outputs[0][0, 0, 1, 0] = torch.tensor([0, 0, 0, 0, -LN3, LN3, 0])
    sure = 1.0  # 3/4 of one cell; what divides is at least 1
    objectness = 4 * (LN3 / 2) / 4 * 3 / 2 * (2 * 4) ** 2 / 640**2  # of 4 cells, weighed 4 on the finest of 2 levels
    box = 0.05 * 3 * 0.75 * (3 / 4 - 1 / 2) ** 2 / sure
    classes = 0.5 * 3 * 0.75 * (LN3 / 2) / 2 / sure * 4 / 80
    loss = distillation_loss(net, outputs, net, wanted)
    assert float(loss) == pytest.approx(objectness + box + classes, rel=1e-6)


def test_the_anchor_free_head_is_compared_as_worked_out_by_hand():
    """One point has a distribution and a class that differ; its neighbours have nothing and the same to say."""
    net = network("DFLDetect, [nc, 2]")
    outputs, wanted = ([torch.zeros(1, n, n, 4 * 2 + 2, dtype=torch.float64) for n in (2, 1)] for _ in range(2))
    for y in (*outputs, *wanted):
        y[..., 8:] = -50.0
    wanted[0][0, 0, 1] = torch.tensor([TEMPERATURE * LN3, 0, 0, 0, 0, 0, 0, 0, LN3, -50])  # 3/4, 1/4 when softened
    outputs[0][0, 0, 1, 8] = -LN3
    side = TEMPERATURE**2 * (3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)) / 4
    expected = 0.5 * (LN3 / 2) + 1.5 * 0.75 * side  # divided by 1, since the teacher is sure of 3/4 of a point
    assert float(distillation_loss(net, outputs, net, wanted)) == pytest.approx(expected, rel=1e-6)


def test_a_sure_teacher_divides_by_how_much_it_is_sure_of():
    """The same cell in every image of a batch costs what it costs in one."""
    for head in HEADS.values():
        net = network(head)
        outputs, wanted = random_outputs(net, 5, images=1), random_outputs(net, 6, images=1)
        once = distillation_loss(net, outputs, net, wanted)
        twice = distillation_loss(
            net,
            *([y.repeat(2, *[1] * (y.ndim - 1)) for y in outputs],),
            net,
            [y.repeat(2, *[1] * (y.ndim - 1)) for y in wanted],
        )
        torch.testing.assert_close(once, twice)


def test_a_larger_network_with_the_same_head_may_teach():
    for head in HEADS.values():
        check_teacher(network(head), network(head, width=16), Path("best.pt"))


@pytest.mark.parametrize(
    ("student", "teacher", "told"),
    [
        (
            {},
            {"head": HEADS["DFLDetect"]},
            ["best.pt: a teacher with the head DFLDetect cannot teach student.yaml, which has Detect"],
        ),
        (
            {"nc": 3},
            {"stride": 4},
            [
                "best.pt: the teacher has classes 2, but student.yaml has 3",
                "best.pt: the teacher has strides 4, 16, but student.yaml has 4, 8",
            ],
        ),
        (
            {},
            {"anchors": "[[4, 5], [9, 8]]"},
            [
                "best.pt: the teacher has anchors 4, 5; 9, 8, but student.yaml has 4, 5; 9, 7; "
                "write the teacher's anchors into it"
            ],
        ),
        (
            {"head": HEADS["DFLDetect"]},
            {"head": "DFLDetect, [nc, 8]"},
            ["best.pt: the teacher has bins 8, but student.yaml has 4"],
        ),
    ],
)
def test_who_cannot_teach_is_told_with_both_files_and_what_differs(student, teacher, told):
    with pytest.raises(Fault) as fault:
        check_teacher(network(**student), network(**teacher), Path("best.pt"))
    assert list(fault.value.lines) == told
