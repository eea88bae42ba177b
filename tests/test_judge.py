"""Judging: many subnets at once as one by one, how sure an AP is, and norms calibrated as they should be."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from data.augment import Augment
from data.config import read_data_spec
from data.dataset import ImageSet
from data.readers import read_split
from data.shapes import draw_shapes
from data.structures import Detections, Sample
from engine.calibrate import calibrate, calibrate_by
from engine.evaluate import JACKKNIFE_GROUPS, calibration_images, coco_metrics, evaluate, jackknife_ap
from models.parse import parse_text
from models.supernet import Supernet
from search import judge as module
from search.judge import first_choice, judge
from search.space import SearchSpace

SEARCHED = """
nc: 5
anchors: [[6, 8, 16, 12, 24, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - {name: neck, from: -1, number: 1, op: BottleneckCSP, args: [8, {kernel: {choice: [1, 3]}}]}
head:
  - [-1, 1, Conv, [8, 3, 1, {act: {choice: [relu, leaky, mish]}}]]
  - [-1, 1, Detect, [nc, anchors]]
"""
NAMES = list("abcde")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return read_data_spec(draw_shapes(tmp_path_factory.mktemp("shapes"), train=6, val=1, size=48, seconds=0))


@pytest.fixture(scope="module")
def images(shapes):
    return ImageSet(read_split(shapes, "train").samples, 48)


@pytest.fixture(scope="module")
def calibration():
    return [torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(count)) for count in (4, 2)]


def supernet():
    torch.manual_seed(0)
    return Supernet(parse_text(SEARCHED), "shared").eval()


def judged(networks, images, calibration, **more):
    return judge(networks, 2, calibration, images, names=NAMES, batch_size=4, device=DEVICE, progress=False, **more)


# ---- many subnets


def test_judging_together_equals_calibrating_and_measuring_one_by_one(images, calibration, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 2)  # the trunk runs three times
    net = supernet()
    space = SearchSpace.of(net.spec)
    assert first_choice(net.network, [choice.name for choice in space.choices]) == 2
    picked = [space.at(number).picks for number in range(5)]
    together = [net.derive(picks) for picks in picked]
    heard = []
    found = judged(together, images, calibration, done=lambda place, verdict: heard.append((place, verdict)))
    assert heard == list(enumerate(found))
    for picks, network, verdict in zip(picked, together, found, strict=True):
        alone = net.derive(picks)
        calibrate(alone, calibration)
        expected = evaluate(alone, images, names=NAMES, batch_size=4, progress=False)
        assert alone.state_dict().keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not network.training
        assert verdict.metrics.ap == pytest.approx(expected.ap, abs=1e-6)
        assert len(verdict.ap_without) == 3


def test_ctrl_c_keeps_the_subnets_that_were_finished(images, calibration, monkeypatch):
    net = supernet()
    networks = [net.derive(SearchSpace.of(net.spec).at(number).picks) for number in range(3)]
    finished = {}
    calls = []

    def interrupted(*given):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return jackknife_ap(*given)

    monkeypatch.setattr(module, "jackknife_ap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judged(networks, images, calibration, done=finished.__setitem__)
    assert list(finished) == [0, 1]
    assert judged([], images, calibration) == []


# ---- how sure an AP is


@pytest.fixture(params=["pycocotools", "faster_coco_eval"])
def backend(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def drawn(count):
    """Images of few boxes, with detections that are near them, doubled or wrong."""
    rng = np.random.default_rng(count)
    truths, detections = [], []
    for _ in range(count):
        boxes_here = rng.integers(0, 4)
        corner, label = rng.uniform(0, 100, (boxes_here, 2)), rng.integers(0, 3, boxes_here)
        boxes = np.concatenate([corner, corner + rng.uniform(10, 120, (boxes_here, 2))], axis=1)
        truths.append(Sample(Path("a"), boxes.astype(np.float32), label))
        moved = np.concatenate([boxes + rng.normal(0, 4, boxes.shape), boxes[::-1]])
        scores = torch.tensor(rng.uniform(0, 1, 2 * boxes_here))
        detections.append(Detections(torch.tensor(moved).float(), scores, torch.tensor([*label, *label]).long()))
    return truths, detections


@pytest.mark.parametrize("count", [4, 13, 20, 31])
def test_ap_without_a_group_is_that_of_the_other_images(count, backend):
    truths, detections = drawn(count)
    metrics, without = jackknife_ap(truths, detections, list("abc"), backend=backend)
    assert metrics == coco_metrics(truths, detections, list("abc"), backend=backend)
    groups = min(JACKKNIFE_GROUPS, count // 2)
    assert len(without) == groups
    for group, ap in enumerate(without):
        kept = [n for n in range(count) if n % groups != group]
        alone = coco_metrics([truths[n] for n in kept], [detections[n] for n in kept], list("abc"), backend=backend)
        assert ap == pytest.approx(alone.ap, abs=1e-9, nan_ok=True)


def test_too_few_images_have_no_groups(backend):
    for count in (0, 1, 3):
        assert jackknife_ap(*drawn(count), list("abc"), backend=backend)[1] == ()


def test_without_the_only_object_there_is_nothing_to_measure(backend):
    nothing = Sample(Path("a"), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    one = Sample(Path("a"), np.array([[0, 0, 9, 9]], np.float32), np.zeros(1, np.int64))
    blind = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    seen = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0.5]), torch.zeros(1).long())
    metrics, without = jackknife_ap([one, *[nothing] * 3], [seen, *[blind] * 3], ["a"], backend=backend)
    assert metrics.ap == pytest.approx(1) and math.isnan(without[0]) and without[1] == pytest.approx(1)


# ---- calibration


class Two(nn.Module):
    """Two norms in a row, and one that no image reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.second(self.first(x).relu())


def statistics(network):
    return {name: tensor for name, tensor in network.state_dict().items() if "running" in name}


def test_moments_are_those_of_all_images_whatever_the_batches():
    x = torch.randn(12, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13).view(-1, 1, 1, 1)
    for size in (1, 5, 12):
        network = Two()
        calibrate(network, x.split(size))
        torch.testing.assert_close(network.first.running_mean, x.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(network.first.running_var, x.var(dim=(0, 2, 3)))


def test_a_norm_that_no_image_reaches_keeps_what_it_has():
    network = Two().eval()
    network.idle.running_mean.fill_(3.0)
    calibrate(network, [torch.rand(2, 2, 4, 4)])
    assert (network.idle.running_mean == 3).all() and (network.idle.running_var == 1).all()
    assert not network.first.training and network.first.momentum == 0.1


def test_sums_over_processes_are_those_of_all_their_images():
    """Two processes that take turns: the first leaves its sums, the second adds them to its own."""
    mine, others = (list(torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(n)).split(2)) for n in (0, 1))
    together, one, other = Two(), Two(), Two()
    calibrate(together, mine + others)
    left = []
    calibrate_by(other, other, others, reduce=left.extend)
    sums = copy.deepcopy(left)

    def add(tensors):
        assert all(tensor.dtype == torch.float64 for tensor in tensors)
        for tensor, more in zip(tensors, sums, strict=True):
            tensor += more

    calibrate_by(one, one, mine, reduce=add)
    for name, tensor in statistics(one).items():
        torch.testing.assert_close(tensor, statistics(together)[name])
    idle = Two()  # a process that has no images agrees as well
    calibrate_by(idle, idle, [], reduce=add)
    for name, tensor in statistics(idle).items():
        torch.testing.assert_close(tensor, statistics(other)[name])


def test_calibration_is_exact_inside_an_autocast():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batches = [torch.rand(2, 3, 8, 8)]
    calibrate(network, batches)
    expected = copy.deepcopy(statistics(network))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calibrate(network, batches)
    for name, tensor in statistics(network).items():
        assert torch.equal(tensor, expected[name])


def test_calibration_comes_in_batches_of_32_without_augmentation(tmp_path):
    data = read_data_spec(draw_shapes(tmp_path, train=70, val=1, size=32, seconds=0))
    images = ImageSet(read_split(data, "train").samples, 32, Augment(), seed=3)
    found = list(calibration_images(images, 40, 0, "cpu"))
    assert [len(batch) for batch in found] == [32, 32]
    again = list(calibration_images(images.at_epoch(5), 40, 0, "cpu"))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert images.augment is not None  # the set itself is left as it was
    mosaics = list(calibration_images(images, 40, 0, "cpu", images.augment))
    assert [len(batch) for batch in mosaics] == [32, 32] and not torch.equal(mosaics[0], found[0])
    again = list(calibration_images(images.at_epoch(5), 40, 0, "cpu", images.augment))
    assert all(torch.equal(one, other) for one, other in zip(mosaics, again, strict=True))
