"""All subnets of a space in one walk: equal to one by one, nothing run twice, the supernet left as it was."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.config import read_data_spec
from data.dataset import ImageSet
from data.loader import batches
from data.readers import read_split
from data.shapes import draw_shapes
from engine.calibrate import calibrate
from engine.evaluate import pixels
from models.elastic import elastic_leaves
from models.network import Network
from models.ops.branch import AttentionBranch
from models.ops.csp import BottleneckCSP2
from models.parse import parse_text
from models.supernet import Supernet, architecture_loss
from search.space import SearchSpace
from search.tree import losses

# A trunk that a late row reads again (6), plain rows between those with choices, a head of two levels.
SEARCHED = """
nc: 5
anchors: [[6, 8, 16, 12], [20, 24, 40, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]  # 0
  - [-1, {choice: [1, 2]}, BottleneckCSP, [8, {kernel: {choice: [1, 3]}}]]  # 1
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, MBottleneckCSP2, [16]]  # 3
head:
  - [-1, 1, Conv, [8, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [0, 1, Conv, [8, 1, 1]]  # 6
  - [[-1, -2], 1, Concat, [1]]
  - [-1, 1, Conv, [8, 3, 1, {act: {choice: [relu, mish]}}]]  # 8
  - [[8, 3], 1, Detect, [nc, anchors]]
"""
SIZE = 2 * 2 * 6 * 2
# Branches with losses of their own: before the first choice, behind one, and one that a subnet may do without.
WITH_AUX = """
nc: 5
anchors: [[6, 8, 16, 12]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, AttentionBranch, [nc, {depth: 1}]]
  - [-1, 1, Conv, [8, 3, 2, {act: {choice: [relu, mish]}}]]
  - [-1, 1, AttentionBranch, [nc, {depth: 1}]]
  - [-1, 1, AttentionBranch, [nc, {depth: 1, blocks: {choice: [none, light]}}]]
head:
  - [-1, 1, Conv, [8, 1, 1, {act: {choice: [relu, leaky]}}]]
  - [-1, 1, Detect, [nc, anchors]]
"""
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = read_data_spec(draw_shapes(tmp_path_factory.mktemp("shapes"), train=3, val=1, size=32, seconds=0))
    return ImageSet(read_split(data, "train").samples, 32)


@pytest.fixture(scope="module")
def calibration():
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(count, 3, 32, 32, generator=generator) for count in (3, 2)]


def supernet(kind, norms="act", text=SEARCHED):
    """With norms that are unlike each other, as training leaves them."""
    torch.manual_seed(0)
    net = Supernet(parse_text(text), kind, norms)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias, 0, 0.3)
    return net


def walked(net, images, calibration, numbers=None):
    space = SearchSpace.of(net.spec)
    return losses(net, space, calibration, images, batch_size=2, device=DEVICE, progress=False, numbers=numbers)


@torch.no_grad()
def one_by_one(net, images, calibration, number):
    network = net.derive(SearchSpace.of(net.spec).at(number).picks).eval()
    calibrate(network, calibration)
    total = 0.0
    for batch in batches(images, 2):
        total += len(batch.images) * float(architecture_loss(pixels(batch, DEVICE), batch.targets)(network))
    return total / len(images)


@pytest.mark.parametrize(
    ("kind", "norms", "checked"),
    [("shared", "act", 30), ("shared", "shared", 8), ("shared", "k_act", 8), ("independent", "act", 30)],
)
def test_the_walk_equals_calibrating_and_judging_one_by_one(kind, norms, checked, images, calibration):
    net = supernet(kind, norms)
    found = walked(net, images, calibration)
    assert found.shape == (SIZE,) and found.dtype == np.float64
    assert len({round(loss, 6) for loss in found}) > SIZE // 2  # subnets do differ
    for number in random.Random(0).sample(range(SIZE), checked):
        assert found[number] == pytest.approx(one_by_one(net, images, calibration, number), rel=1e-6)


@pytest.mark.parametrize("kind", ["shared", "independent"])
@pytest.mark.parametrize("is_price", [True, False])
def test_what_a_branch_says_counts_where_it_is_a_price(kind, is_price, images, calibration, monkeypatch):
    monkeypatch.setattr(AttentionBranch, "is_price", is_price)
    net = supernet(kind, text=WITH_AUX)
    for number, loss in enumerate(walked(net, images, calibration)):
        assert loss == pytest.approx(one_by_one(net, images, calibration, number), rel=1e-6)
    network = net.derive(SearchSpace.of(net.spec).at(0).picks).eval()
    batch = next(iter(batches(images, 2)))
    with torch.no_grad():
        judged = architecture_loss(pixels(batch, DEVICE), batch.targets)(network)
        whole, parts = network.loss(pixels(batch, DEVICE), batch.targets)
    assert parts["att"] > 0
    assert float(whole - judged) == pytest.approx(0 if is_price else float(parts["att"]), rel=1e-4)


def test_named_subnets_come_in_the_order_asked_for(images, calibration):
    net = supernet("shared")
    numbers = [41, 3, 17, 3]
    found = walked(net, images, calibration, numbers)
    assert found.shape == (4,) and found[1] == found[3]
    for number, loss in zip(numbers, found, strict=True):
        assert loss == pytest.approx(one_by_one(net, images, calibration, number), rel=1e-6)


def test_what_depends_on_no_choice_runs_once_and_the_rest_once_a_combination(images, calibration, monkeypatch):
    net = supernet("shared")
    runs: Counter[int] = Counter()
    convolved = F.conv2d

    def counting(x, weight, *args, **kwargs):
        runs[weight.data_ptr()] += 1
        return convolved(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", counting)
    walked(net, images, calibration)
    layers = net.network.layers

    def passes(module):
        return runs[module.weight.data_ptr()] / 4  # two batches of calibration, two of judging

    assert passes(layers[0].conv) == passes(layers[6].conv) == 1  # of the trunk, wherever they stand
    first = layers[1]
    assert passes(first.cv1.conv) == passes(first.cv2) == 1  # before and beside the searched convolutions
    assert passes(first.cv4.conv) == 4 and passes(layers[2].conv) == 4
    assert passes(first.m.get_submodule("0").cv1.conv) == 1
    assert passes(first.m.get_submodule("1").cv1.conv) == 2  # once a kernel, where there is a second bottleneck
    second = layers[3]
    assert passes(second.cv1.conv) == 4  # once for the six options behind each prefix
    assert passes(second.cv2) == 4 * 3  # knows the activation before it, not the kernel
    assert passes(second.cv3.conv) == passes(layers[4].conv) == passes(layers[8].conv) == 24
    fine, coarse = layers[9].m
    assert passes(fine) == 48 and passes(coarse) == 24  # nothing of the last row is seen by the coarse level


def test_ctrl_c_leaves_the_supernet_as_it_was(images, calibration, monkeypatch):
    net = supernet("shared").train()
    net.activate(SearchSpace.of(net.spec).at(7).picks)
    before = copy.deepcopy(net.state_dict()), [leaf.active for _, leaf in elastic_leaves(net)]
    of_the_head = Network.loss_from
    calls = []

    def interrupted(self, outputs, targets, *aux):
        calls.append(0)
        if len(calls) > 30:
            raise KeyboardInterrupt
        return of_the_head(self, outputs, targets, *aux)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "loss_from", interrupted)
        with pytest.raises(KeyboardInterrupt):
            walked(net, images, calibration)
    assert [leaf.active for _, leaf in elastic_leaves(net)] == before[1]
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name
    for module in net.modules():
        assert module.training and "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert walked(net, images, calibration, [9])[0] == pytest.approx(one_by_one(net, images, calibration, 9), rel=1e-6)


def test_an_output_that_was_changed_in_place_is_not_taken_again(images, calibration, monkeypatch):
    def forward(self, x):
        x = self.cv1(x).mul_(2)
        return self.cv3(self.act(self.bn(torch.cat((self.m(x), self.cv2(x)), dim=1))))

    monkeypatch.setattr(BottleneckCSP2, "forward", forward)
    net = supernet("shared")
    numbers = range(12)
    for number, loss in zip(numbers, walked(net, images, calibration, numbers), strict=True):
        assert loss == pytest.approx(one_by_one(net, images, calibration, number), rel=1e-6)


def test_without_calibration_images_statistics_are_those_of_the_supernet(images):
    net = supernet("shared")
    network = net.derive(SearchSpace.of(net.spec).at(30).picks).eval()
    with torch.no_grad():
        total = sum(
            len(batch.images) * float(network.loss(pixels(batch, DEVICE), batch.targets)[0])
            for batch in batches(images, 2)
        )
    assert walked(net, images, [], [30])[0] == pytest.approx(total / len(images), rel=1e-6)
