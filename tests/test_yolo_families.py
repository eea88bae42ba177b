"""Blocks and heads of the later YOLOs against a second way of computing them and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from test_ops import EXAMPLES, FRONT, ROW, scramble, spec_with
from test_yolo_head import targets_of
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Fault
from models.fuse import fuse
from models.graph import resolve
from models.heads.dfl import AUXILIARY, DFLDetect, DualDDetect, TripleDDetect, V10Detect
from models.heads.yolo import Detect, IAuxDetect, IDetect
from models.network import build
from models.ops.area import HEAD, AreaAttention
from models.ops.psa import Attention
from models.parse import parse_text
from models.registry import OPS, Shape

FAMILIES = [
    *("A2C2f", "AConv", "ADown", "BottleneckCSPB", "BottleneckCSPC", "BottleneckCSPF", "C2", "C2PSA", "C2fCIB", "C3k2"),
    *("CBLinear", "DownC", "DualDDetect", "ELAN1", "IAuxDetect", "IDetect", "PSA", "RepC3", "RepConv", "RepNCSPELAN4"),
    *("SCDown", "SPPCSPC", "SPPELAN", "Stem", "TripleDDetect", "nn.ConvTranspose2d", "v10Detect", "DFLDetect", "SPPF"),
]
LEVELS = [Shape(8, 8), Shape(8, 16)]
ANCHORS = ((10.0, 13.0, 30.0, 20.0), (40.0, 50.0, 90.0, 60.0))
FOUND = targets_of([[4, 6, 30, 28], [20, 10, 60, 56], [33, 33, 63, 50]], [0, 2, 1], [0, 1, 1])


def maps(sets: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, s.channels, 64 // s.stride, 64 // s.stride, generator=generator) for s in LEVELS * sets]


@pytest.mark.parametrize("row", [row for name in FAMILIES for row in EXAMPLES[name]])
def test_every_weight_learns(row: str) -> None:
    """Norms that start at 0 keep gradients from what is before them, so they are scrambled first."""
    torch.manual_seed(0)
    network = build(resolve(spec_with(row)).spec).train()
    scramble(network)
    if hasattr(network.head, "anchors"):
        network.head.anchors = torch.tensor(ANCHORS).view(2, 2, 2)[: len(network.head.strides)]
        network.head.fitted = True
    images = torch.rand(2, 3, 64, 64)
    if isinstance(network.head, DFLDetect):  # whose boxes learn where they are asked, which is not on every level
        sum(level.square().mean() for level in network(images)[0]).backward()
    else:
        small = targets_of([[4, 6, 30, 28], [1, 1, 9, 8], [33, 33, 63, 50]], [0, 2, 1], [0, 1, 1])
        loss, parts = network.loss(images, small)
        loss.backward()
        assert torch.isfinite(loss) and all(not value.requires_grad for value in parts.values())
    layer = network.layers[ROW]
    still = [n for n, p in layer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []


# ---- blocks


def test_a_folded_block_is_one_convolution():
    torch.manual_seed(0)
    network = build(spec_with("[-1, 1, RepConv, [16, {beside: 1}]]")).eval()
    scramble(network)
    folded = fuse(network).layers[ROW]
    assert [type(module) for module in folded] == [nn.Conv2d, nn.SiLU]
    x = torch.rand(1, 16, 5, 5)
    torch.testing.assert_close(folded(x), network.layers[ROW](x), rtol=1e-4, atol=1e-5)


def test_a_smaller_kernel_lies_in_the_middle_of_the_larger_one():
    block = OPS["RepConv"].module(c_in=1, c_out=1, kernel=5, beside=3, identity=False, act="identity").eval()
    for conv in (block.conv1, block.conv2):
        nn.init.ones_(conv.conv.weight)
    x = torch.zeros(1, 1, 7, 7)
    x[..., 3, 3] = 1
    y = block(x).detach()[0, 0] * (1 + 1e-3) ** 0.5  # eps of the norms
    assert [round(float(value)) for value in y[3]] == [0, 1, 2, 2, 2, 1, 0]


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block, x = Attention(16, 2).eval(), torch.rand(2, 16, 3, 4)
    scramble(block)
    q, k, v = block.qkv(x).view(2, 2, 16, 12).split((4, 4, 8), dim=2)
    seen = F.scaled_dot_product_attention(*(part.transpose(-2, -1) for part in (q, k, v))).transpose(-2, -1)
    wanted = block.proj(seen.reshape(x.shape) + block.pe(v.reshape(x.shape)))
    torch.testing.assert_close(block(x), wanted, rtol=1e-4, atol=1e-5)


def test_a_cell_attends_to_its_part_of_the_map_only():
    torch.manual_seed(0)
    x = torch.rand(1, HEAD, 4, 4)
    other = x.clone()
    other[..., 2:, :] += 1
    for area, same_above in ((2, True), (1, False)):
        block = AreaAttention(HEAD, area, 1).eval()
        above, changed = block(x)[..., :2, :], block(other)[..., :2, :]
        assert torch.allclose(above, changed, atol=1e-6) is same_above
    with pytest.raises(ValueError, match="area 3 does not divide a map of 4 x 4 cells"):
        AreaAttention(HEAD, 3, 1)(x)


def test_pieces_of_coarse_maps_are_added_to_a_fine_one():
    fuse_maps = OPS["CBFuse"].module(firsts=(1,))
    coarse = torch.tensor([[[[9.0]], [[1.0]], [[2.0]]]])
    fine = torch.zeros(1, 2, 2, 2)
    assert fuse_maps([coarse, fine]).tolist() == [[[[1, 1], [1, 1]], [[2, 2], [2, 2]]]]


def test_a_wavelet_has_the_mean_and_three_differences():
    x = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    assert OPS["DWT"].module()(x).flatten().tolist() == [4.0, -1.5, -0.5, 0.5]  # rows: 1 + 3 - 5 - 7, over 4, plus 0.5
    assert OPS["ReOrg"].module()(x).flatten().tolist() == [1, 5, 3, 7]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[-1, 1, PSA, [8]]", "it keeps its channels, so c_out is 16, not 8"),
        ("[-1, 1, A2C2f, [32]]", "attention heads have 32 channels, which do not divide its 16 inner channels"),
        ("[-1, 1, A2C2f, [64, True, -1]]", "area is in how many strips a map is cut, 1 or more; got -1"),
        ("[-1, 1, A2C2f, [64, True, 1, True]]", "residual keeps the channels, so c_out is 16, not 64"),
        ("[-1, 1, ELAN1, [12, 7, 5]]", "half of 7 channels is no whole number"),
        ("[-1, 1, RepConv, [12, {beside: 5}]]", "the kernel beside, 5, is larger than the kernel 3"),
        ("[-1, 1, nn.ConvTranspose2d, [12, 3]]", "kernel_size - 2 * padding has to be the stride"),
        ("[[1, 0], 1, CBFuse, [[10]]]", "one with 16 has not that many from its channel 10 on"),
        ("[[1, 0], 1, CBFuse, [[1, 2]]]", "firsts has a number for each source but the last, here 1; got 2"),
        (
            "[-1, 1, BottleneckCSPC, [12, {block: residual, groups: 2}]]",
            "groups 2 does not divide the 3 inner",
        ),
    ],
)
def test_what_a_block_cannot_do_is_told(row: str, said: str):
    with pytest.raises(Fault) as fault:
        resolve(spec_with(row))
    assert said in str(fault.value)


# ---- heads with anchors


def test_a_head_that_knows_nothing_without_looking_is_the_plain_one():
    torch.manual_seed(0)
    head, plain = IDetect(LEVELS, 3, ANCHORS), Detect(LEVELS, 3, ANCHORS)
    plain.load_state_dict(head.state_dict(), strict=False)
    assert not torch.allclose(head(maps())[0], plain(maps())[0])
    for level in range(2):
        nn.init.zeros_(head.ia[level].implicit)
        nn.init.ones_(head.im[level].implicit)
    for ours, theirs in zip(head(maps()), plain(maps()), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_helping_maps_train_and_are_never_decoded():
    torch.manual_seed(0)
    head = IAuxDetect(LEVELS * 2, 3, ANCHORS)
    outputs = head(maps(2))
    lead, helping = outputs[:2], outputs[2:]
    loss, parts = head.loss(outputs, FOUND)
    first, said = head.loss_of(lead, FOUND)
    second, more = head.loss_of(helping, FOUND, coarse=True)
    torch.testing.assert_close(loss, first + 0.25 * second)
    torch.testing.assert_close(parts["obj"], said["obj"] + 0.25 * more["obj"])
    boxes, scores = head.decode(outputs)
    plain_boxes, plain_scores = IDetect.decode(head, lead)
    assert boxes.shape[1] == 2 * (8 * 8 + 4 * 4) and torch.equal(boxes, plain_boxes[:, : boxes.shape[1]])
    assert torch.equal(scores, plain_scores)


def test_more_cells_answer_for_a_box_where_they_only_help():
    """A box in the middle of the map: its cell and two neighbours, or all four of them."""
    head = Detect(LEVELS, 3, ANCHORS)
    one = targets_of([[20, 22, 30, 35]], [0], [0])
    anchors = len(head.assign(one, 0, (8, 8))[0]) // 3
    assert anchors >= 1 and len(head.assign(one, 0, (8, 8), coarse=True)[0]) == 5 * anchors
    corner = targets_of([[0, 0, 7, 7]], [0], [0])  # the cell in the corner has no neighbour above and on its left
    found = head.assign(corner, 0, (8, 8), coarse=True)
    assert {(int(row), int(column)) for row, column in zip(found[2], found[3], strict=True)} == {(0, 0), (0, 1), (1, 0)}


def test_a_head_says_how_often_it_reads_a_level():
    told = {
        "[[0, 1, 0], 1, IAuxDetect, [nc, anchors]]": "the head reads every level twice, the helping maps last",
        "[[0, 1, 1, 0], 1, IAuxDetect, [nc, anchors]]": "here the strides are [2, 4, 4, 2]",
        "[[0, 1, 0], 1, DualDDetect, [nc]]": "the head reads 2 maps for each of its levels, but got 3 in all",
        "[[0, 1, 1, 0], 1, DualDDetect, [nc]]": "have different strides, [[2, 4], [4, 2]]",
        "[[1, 0, 1, 0], 1, DualDDetect, [nc]]": "write [0, 1]",
    }
    for row, said in told.items():
        with pytest.raises(Fault) as fault:
            resolve(parse_text(f"{FRONT}  - {row}\n"))
        assert said in str(fault.value)


# ---- heads without anchors


@pytest.mark.parametrize("kind", [DualDDetect, TripleDDetect])
def test_only_the_last_set_of_maps_is_decoded(kind: type[DualDDetect]):
    torch.manual_seed(0)
    head = kind(LEVELS * kind.sets, 3, 4).eval()
    outputs = head(maps(kind.sets))
    boxes, scores = head.decode(outputs)
    changed = [torch.zeros_like(level) for level in outputs[:-2]] + outputs[-2:]
    assert torch.equal(head.decode(changed)[0], boxes) and torch.equal(head.decode(changed)[1], scores)
    last, _ = head.loss_of(outputs[-2:], FOUND, 10)
    helping = sum(head.loss_of(outputs[2 * part : 2 * part + 2], FOUND, 10)[0] for part in range(kind.sets - 1))
    torch.testing.assert_close(head.loss(outputs, FOUND)[0], last + AUXILIARY * helping)


def test_at_most_one_point_answers_for_a_box_in_the_head_that_is_decoded():
    torch.manual_seed(0)
    head = V10Detect(LEVELS, 3, 4)
    outputs = head(maps())
    sides, classes = head.split(outputs[2:])
    points, strides = head.points(outputs[2:])
    boxes = head.boxes(sides, points, strides)
    for most in (1, 10):
        _, _, truth, _ = head.assign(boxes, classes, points, FOUND, most)
        assert truth.bincount(minlength=3).max() <= most and len(truth.unique()) == 3
    many, _ = head.loss_of(outputs[:2], FOUND, 10)
    one, _ = head.loss_of(outputs[2:], FOUND, 1)
    torch.testing.assert_close(head.loss(outputs, FOUND)[0], many + one)


def test_the_head_that_is_decoded_trains_nothing_below_it_and_is_left_by_fusion():
    torch.manual_seed(0)
    network = build(parse_text(f"{FRONT}  - [[0, 1], 1, v10Detect, [nc, 4]]\n"))
    outputs, _ = network(torch.rand(1, 3, 64, 64))
    sum(level.square().mean() for level in outputs[2:]).backward()
    assert all(parameter.grad is None for layer in network.layers[:-1] for parameter in layer.parameters())
    assert all(p.grad is None for part in (network.head.cv2, network.head.cv3) for p in part.parameters())
    scramble(network.eval())
    fused, x = fuse(network), torch.rand(1, 3, 64, 64)
    assert len(fused(x)[0]) == 2 and not hasattr(fused.head, "cv2") and hasattr(network.head, "cv2")
    for ours, theirs in zip(fused.predict(x), network.predict(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert not V10Detect.suppresses and getattr(DFLDetect, "suppresses", True)


def test_a_single_bin_is_the_distance_itself():
    """One point at (4, 4) of stride 8 that says 1, 1, 2, 2 strides; the truth is 8, 8, 8, 8 pixels away from it."""
    head = DFLDetect([Shape(4, 8)], 1, 1).double()
    assert not hasattr(head, "dfl")
    said = torch.tensor([1.0, 1, 2, 2, 0], dtype=torch.float64).view(1, 1, 1, 5)
    boxes, _ = head.decode([said])
    assert boxes.tolist() == [[[-4, -4, 20, 20]]]
    _, parts = head.loss([said], targets_of([[-4, -4, 12, 12]], [0], [0]))
    sides, classes = head.split([said])
    aligned = head.assign(boxes, classes, head.points([said])[0], targets_of([[-4, -4, 12, 12]], [0], [0]))[3]
    assert float(parts["dfl"]) == pytest.approx(1.5 * 0.5 * float(aligned.sum()))  # gain, mean of 0, 0, 1, 1
