"""Judging: many subnets at once as one by one, how sure an AP is, and norms calibrated as they should be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_masks import draw_data as draw_masks
from test_search import draw_classes
from torch import nn

from data.augment import Augment
from data.config import read_data_spec
from data.dataset import ImageSet
from data.readers import read_split
from data.shapes import draw_shapes
from data.structures import Detections, Fault, Sample
from engine.calibrate import calibrate, calibrate_by
from engine.classify import class_metrics
from engine.evaluate import calibration_images, evaluate
from engine.jackknife import JACKKNIFE_GROUPS, jackknife_error
from engine.metrics import coco_metrics, jackknife_ap
from engine.segment import seg_metrics
from engine.tasks import evaluate as evaluate_task
from engine.tasks import task_of
from models.parse import parse_text
from models.supernet import Supernet
from search import judge as module
from search.judge import first_choice, jackknife_miou, jackknife_top1, judge
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
OTHERS = """
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, Conv, [8, 3, 2, {{act: {{choice: [relu, mish]}}}}]]
  - [-1, 1, {}, [nc]]
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
        assert len(verdict.without) == 3


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_classifiers_and_segmenters_are_judged_as_they_are_measured_alone(task, calibration, tmp_path):
    data = read_data_spec({"classify": draw_classes, "segment": draw_masks}[task](tmp_path))
    images = ImageSet(read_split(data, "train").samples, 48, crop=task == "classify")
    torch.manual_seed(0)
    net = Supernet(parse_text(OTHERS.format({"classify": "Classify", "segment": "SegHead"}[task])), "shared").eval()
    space = SearchSpace.of(net.spec)
    picked = [space.at(number).picks for number in range(space.size)]
    together = [net.derive(picks) for picks in picked]
    found = judge(together, 1, calibration, images, names=data.names, batch_size=4, device=DEVICE, progress=False)
    score = task_of(net.spec).columns[0]
    for picks, verdict in zip(picked, found, strict=True):
        alone = net.derive(picks)
        calibrate(alone, calibration)
        expected = evaluate_task(alone, images, names=data.names, batch_size=4, progress=False)
        for name in task_of(net.spec).columns:
            assert getattr(verdict.metrics, name) == pytest.approx(getattr(expected, name), abs=1e-6, nan_ok=True)
        groups = min(JACKKNIFE_GROUPS, len(images) // 2)
        assert len(verdict.without) == groups and 0 <= getattr(expected, score) <= 1
        kept = ImageSet([s for n, s in enumerate(images.samples) if n % groups], 48, crop=task == "classify")
        left = evaluate_task(alone, kept, names=data.names, batch_size=4, progress=False)
        assert verdict.without[0] == pytest.approx(getattr(left, score), abs=1e-6)


def test_what_is_given_up_saw_the_first_images_alone_and_the_others_saw_all(images, calibration):
    net = supernet()
    space = SearchSpace.of(net.spec)
    networks = [net.derive(space.at(number).picks).eval() for number in range(3)]
    whole = judged(copy.deepcopy(networks), images, calibration)
    first, asked, told = [4, 1], {}, {}

    def keep(place, verdict):
        asked[place] = verdict
        return place != 1

    found = judged(networks, images, calibration, first=first, keep=keep, done=told.__setitem__)
    part = ImageSet([images.samples[place] for place in sorted(first)], 48)
    alone = judged([net.derive(space.at(number).picks).eval() for number in range(3)], part, calibration)
    assert list(asked) == [0, 1, 2] and [asked[n].metrics.ap for n in asked] == [one.metrics.ap for one in alone]
    assert found[1] is asked[1] and list(told) == [0, 2]
    for place in (0, 2):
        assert found[place].metrics.ap == pytest.approx(whole[place].metrics.ap, abs=1e-6)
        assert found[place].without == pytest.approx(whole[place].without, abs=1e-6)


def test_a_head_that_no_search_judges_is_refused(monkeypatch):
    monkeypatch.delitem(module.JUDGINGS, "detect")
    with pytest.raises(Fault, match="a detector; search.py judges networks that classify or segment"):
        module.judging_of(parse_text(SEARCHED))


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

    monkeypatch.setitem(module.JUDGINGS, "detect", replace(module.JUDGINGS["detect"], measured=interrupted))
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


@pytest.mark.parametrize("count", [4, 13, 20, 31])
def test_top_1_without_a_group_is_that_of_the_other_images(count):
    rng = np.random.default_rng(count)
    labels, scores = rng.integers(0, 3, count), rng.dirichlet(np.ones(3), count).astype(np.float32)
    scores[::4] = 1 / 3  # of equals the first class counts
    samples = [Sample(Path("a"), np.zeros((1, 4), np.float32), labels[n : n + 1]) for n in range(count)]
    metrics, without = jackknife_top1(samples, list(scores), list("abc"))
    assert metrics.top1 == class_metrics(labels, scores, list("abc")).top1
    groups = min(JACKKNIFE_GROUPS, count // 2)
    assert len(without) == groups
    for group, top1 in enumerate(without):
        kept = [n for n in range(count) if n % groups != group]
        assert top1 == pytest.approx(class_metrics(labels[kept], scores[kept], list("abc")).top1, abs=1e-12)
        right = [max(range(3), key=lambda label, n=n: scores[n, label]) == labels[n] for n in kept]
        assert top1 == pytest.approx(sum(right) / len(kept), abs=1e-12)


def test_the_error_of_top_1_is_that_of_a_share():
    """Of 40 images in 10 groups, 4 to a group, all of the last two groups are wrong."""
    samples = [Sample(Path("a"), np.zeros((1, 4), np.float32), np.array([int(n % 10 >= 8)])) for n in range(40)]
    metrics, without = jackknife_top1(samples, [np.array([0.9, 0.1], np.float32)] * 40, ["a", "b"])
    assert metrics.top1 == 0.8 and without == pytest.approx([28 / 36] * 8 + [32 / 36] * 2)
    # shares of groups 1 x 8, 0 x 2: the standard error of their mean is sqrt(.8 * .2 / 9)
    assert jackknife_error(without) == pytest.approx(math.sqrt(0.16 / 9))
    for count in (1, 3):
        assert jackknife_top1(samples[:count], [np.array([0.9, 0.1])] * count, ["a", "b"])[1] == ()


def test_miou_without_a_group_is_that_of_the_other_images():
    rng = np.random.default_rng(0)
    confusions = [rng.integers(0, 9, (3, 3)) for _ in range(13)]
    samples = [Sample(Path("a"), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))] * 13
    metrics, without = jackknife_miou(samples, confusions, list("abc"))
    assert metrics.miou == seg_metrics(np.stack(confusions), list("abc")).miou and len(without) == 6
    for group, miou in enumerate(without):
        total = sum(one for n, one in enumerate(confusions) if n % 6 != group)
        shares = [total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k]) for k in range(3)]
        assert miou == pytest.approx(sum(shares) / 3)
    assert jackknife_error(without) == pytest.approx(metrics.miou_error)


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
    for count, sizes in ((33, [32]), (1, [1])):  # one image left over has no variance where its map has one cell
        few = ImageSet(images.samples[:count], 32, None, seed=3)
        assert [len(batch) for batch in calibration_images(few, 256, 0, "cpu")] == sizes
    mosaics = list(calibration_images(images, 40, 0, "cpu", images.augment))
    assert [len(batch) for batch in mosaics] == [32, 32] and not torch.equal(mosaics[0], found[0])
    again = list(calibration_images(images.at_epoch(5), 40, 0, "cpu", images.augment))
    assert all(torch.equal(one, other) for one, other in zip(mosaics, again, strict=True))
