"""Heat maps and their numbers: hand cases, a second way by hooks, maps that look at nothing, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from data.config import read_data_spec
from data.readers import read_split
from data.structures import Detections, Fault, Letterbox
from engine import explain
from engine.explain import Question, heat_of, levels_of, measure, seen_part
from engine.explain_metrics import (
    CONTROLS,
    Explained,
    average_drop,
    blurred,
    compare,
    difference,
    hottest_first,
    increase_in_confidence,
    inside,
    interval,
    judge,
    level_metrics,
    read_metrics,
    seen_through,
    wins,
    write_metrics,
)
from engine.explain_page import Shown, explanation, overlay
from engine.heatmaps import (
    Decisions,
    answers,
    centre_map,
    class_decisions,
    confidences,
    grad_cam,
    object_decisions,
    random_map,
    run_to_maps,
    spread,
)
from models.checkpoint import save_checkpoint
from models.graph import resolve
from models.levels import branches, levels
from models.network import Network, build
from models.parse import parse_text

CLASSIFIER = """
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Conv, [8, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 0], 1, Concat, [1]]
  - [-1, 1, Conv, [8, 3, 1]]  # 5: stride 4
  - [2, 1, Conv, [8, 3, 1]]  # 6: stride 8
  - [[5, 6], 1, Classify, [nc]]
"""
PLAIN = """
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 1]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Classify, [nc]]
"""
# coarse to fine and back: rows 2 and 6 turn, row 3 only carries row 2 to the finer stride
DETECTOR = """
nc: 2
activation: silu
anchors: {anchors}
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Conv, [16, 3, 1]]  # 2
  - [-1, 1, Conv, [8, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 0], 1, Concat, [1]]
  - [-1, 1, Conv, [8, 3, 1]]  # 6
  - [-1, 1, Conv, [16, 3, 2]]
  - [[-1, 2], 1, Concat, [1]]
  - [-1, 1, Conv, [16, 3, 1]]
  - [[6, 9], 1, {head}, [nc{more}]]
"""
HEADS = {
    "Detect": DETECTOR.format(anchors="[[10, 13, 16, 30], [30, 61, 62, 45]]", head="Detect", more=", anchors"),
    "DFLDetect": DETECTOR.format(anchors="3", head="DFLDetect", more=""),
    "v10Detect": DETECTOR.format(anchors="3", head="v10Detect", more=""),
    "YOLOXHead": DETECTOR.format(anchors="3", head="YOLOXHead", more=""),
    "SSDHead": DETECTOR.format(anchors="3", head="SSDHead", more=""),
}


def a_network(text: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = build(parse_text(text)).eval().requires_grad_(False)
    for module in network.modules():  # as different from a fresh one as a trained network is
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.3)
    return network


def images_of(count: int, side: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def the_decisions(network: Network, images: torch.Tensor) -> Decisions:
    """The likeliest class of each image, or the two surest predictions, each its own object."""
    outputs, _ = network(images)
    boxes, scores = answers(network, outputs, images.shape[2:])
    if boxes.shape[1] == 1:
        return class_decisions(scores[:, 0], boxes)
    best = [row.amax(dim=1).topk(2).indices for row in scores]
    objects = [Detections(boxes[n][at], torch.ones(2), scores[n][at].argmax(dim=1)) for n, at in enumerate(best)]
    return object_decisions(boxes, scores, objects)[0]


# ---- levels


def test_levels_of_a_pyramid_in_front_of_a_classifier_are_the_maps_of_its_head():
    assert [(one.name, one.row, one.stride) for one in levels(resolve(parse_text(CLASSIFIER)))] == [
        ("P2", 5, 4),
        ("P3", 6, 8),
    ]


def test_levels_of_a_classifier_without_a_pyramid_are_the_last_maps_of_its_stages():
    assert [(one.name, one.row) for one in levels(resolve(parse_text(PLAIN)))] == [("P2", 2), ("P3", 3)]


@pytest.mark.parametrize("head", HEADS)
def test_levels_of_a_detector_reach_every_prediction(head):
    graph = resolve(parse_text(HEADS[head]))
    assert [(one.name, one.row) for one in levels(graph)] == [("P2", 6), ("P3", 2)]
    network = a_network(HEADS[head])
    outputs, _, maps = run_to_maps(network, images_of(1), [one.row for one in levels(graph)])
    for output in outputs:  # of each level of the head
        for slope in torch.autograd.grad(output.sum(), list(maps.values()), retain_graph=True):
            assert slope.abs().sum() > 0


def test_levels_are_named_or_numbered_and_others_are_a_fault():
    graph = resolve(parse_text(CLASSIFIER))
    assert [one.name for one in levels_of(graph, "gradcam", ["1", "P2", "P3"])] == ["P3", "P2"]
    with pytest.raises(Fault, match=r"^--level p3: the levels are 0 P2, 1 P3, or all; did you mean 'P3'\?$"):
        levels_of(graph, "gradcam", ["p3"])
    with pytest.raises(Fault, match="^--method branch: <text> has no attention branch; --method gradcam explains"):
        levels_of(graph, "branch")
    assert branches(graph) == ()


# ---- Grad-CAM


@pytest.mark.parametrize("text", [CLASSIFIER, PLAIN, *HEADS.values()], ids=["pyramid", "plain", *HEADS])
@pytest.mark.parametrize("local", [False, True])
def test_grad_cam_is_that_of_hooks_on_the_layers(text, local):
    network, images = a_network(text), images_of(3)
    asked = the_decisions(network, images)
    rows = [one.row for one in levels(network.graph)]
    outputs, _, maps = run_to_maps(network, images, rows)
    heat = grad_cam(network, outputs, maps, asked, local=local)

    for k in range(len(asked)):
        kept: dict[int, torch.Tensor] = {}

        def keep(row, kept=kept):
            def hook(module, given, output):
                kept[row] = output.requires_grad_() if output.is_leaf else output
                kept[row].retain_grad()

            return hook

        handles = [network.layers[row].register_forward_hook(keep(row)) for row in rows]
        image = images[asked.images[k] : asked.images[k] + 1].clone().requires_grad_()
        outputs, _ = network(image)
        label, place = int(asked.labels[k]), int(asked.places[k])
        y = outputs[0][0, label] if "Classify" in text else network.decode(outputs)[1][0, place, label]
        y.backward()
        for handle in handles:
            handle.remove()
        for row in rows:
            slope, A = kept[row].grad[0], kept[row].detach()[0]
            w = slope.clamp(min=0) if local else slope.mean(dim=(1, 2))[:, None, None]
            torch.testing.assert_close(heat[row][k], (w * A).sum(dim=0).clamp(min=0), rtol=1e-4, atol=1e-7)


def test_a_network_that_was_cut_says_what_it_said_and_keeps_nothing():
    network, images = a_network(HEADS["Detect"]), images_of(2)
    whole, _ = network(images)
    cut, _, maps = run_to_maps(network, images, [6, 2])
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert sorted(maps) == [2, 6]
    assert all(parameter.grad is None for parameter in network.parameters())
    held = [value for module in network.modules() for value in vars(module).values() if torch.is_tensor(value)]
    assert held == []


ATTENDED = CLASSIFIER.replace("[[5, 6], 1, C", "[5, 1, AttentionBranch, [nc, {{blocks: {blocks}}}]]\n  - [[7, 6], 1, C")


def test_the_map_of_a_branch_is_the_images_own_for_every_decision():
    network, images = a_network(ATTENDED.format(blocks="light")), images_of(2)
    (level,) = branches(network.graph)
    assert (level.name, level.row) == ("P2", 7) and level in levels(network.graph)
    outputs, _ = network(images)
    boxes, scores = answers(network, outputs, (32, 32))
    asked, _, heat = heat_of(network, images, Question(method="branch", top=2), [level])
    kept: list[torch.Tensor] = []
    network.layers[7].register_forward_hook(lambda module, given, output: kept.append(output.aux["map"]))
    network(images)
    assert asked.labels.tolist() == scores[:, 0].topk(2).indices.flatten().tolist()
    torch.testing.assert_close(heat["P2"], kept[0][:, 0].repeat_interleave(2, dim=0))


def test_a_branch_that_a_search_left_empty_has_no_map():
    graph = resolve(parse_text(ATTENDED.format(blocks="none")))
    assert branches(graph) == () and [one.row for one in levels(graph)] == [7, 6]


def test_a_flat_map_becomes_0_and_others_reach_from_0_to_1():
    heat = torch.stack([torch.full((2, 2), 3.0), torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.zeros(2, 2)])
    wide = spread(heat, (8, 8))
    assert wide[0].abs().max() == wide[2].abs().max() == 0
    assert wide[1].min() == 0 and wide[1].max() == 1 and wide[1].argmax() == 54  # the first of the corner's quarter
    assert spread(heat[:0], (8, 8)).shape == (0, 8, 8)


# ---- decisions


def test_an_object_is_found_by_the_surest_prediction_of_its_class_that_overlaps_it_by_half():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [20, 20, 30, 30]]], dtype=torch.float32)
    scores = torch.tensor([[[0.3, 0.9], [0.6, 0.0], [0.8, 0.0], [0.99, 0.99]]])
    truth = Detections(torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]]), torch.ones(2), torch.tensor([0, 0]))
    asked, sure = object_decisions(boxes, scores, [truth])
    assert sure.tolist() == pytest.approx([0.6, 0.0])  # IoU .5; the .8 has .4, the .9 is of another class
    assert asked.places[0] == 1 and asked.images.tolist() == [0, 0]


def test_of_a_classifier_the_whole_image_is_the_object():
    network, images = a_network(CLASSIFIER), images_of(2)
    outputs, _ = network(images)
    boxes, scores = answers(network, outputs, (32, 32))
    assert boxes.tolist() == [[[0, 0, 32, 32]]] * 2
    torch.testing.assert_close(scores[:, 0], outputs[0].softmax(dim=1))
    asked = class_decisions(scores[:, 0], boxes, count=2)
    assert asked.images.tolist() == [0, 0, 1, 1]
    sure, _ = confidences(boxes[asked.images], scores[asked.images], asked)
    assert sure[0] == scores[0].max() and sure[1] == scores[0, 0].sort(descending=True).values[1]


# ---- numbers


def test_drop_and_increase_of_a_case_worked_by_hand():
    before, after = torch.tensor([0.8, 0.5, 0.4]), torch.tensor([0.4, 0.6, 0.4])
    assert average_drop(before, after).tolist() == pytest.approx([50, 0, 0])
    assert average_drop(before, after).mean().item() == pytest.approx(16.6667, abs=1e-3)
    assert increase_in_confidence(before, after).mean().item() == pytest.approx(33.3333, abs=1e-3)
    assert average_drop(torch.zeros(1), torch.zeros(1)).tolist() == [0]


@pytest.mark.parametrize("text", [CLASSIFIER, HEADS["Detect"]], ids=["classifier", "detector"])
@pytest.mark.parametrize("space", ["pixel", "norm"])
def test_a_map_of_ones_drops_nothing_and_raises_nothing(text, space):
    network, images = a_network(text), images_of(3)
    asked = the_decisions(network, images)
    shown = images[asked.images]
    before = explain.sure(network, shown, asked, 2)
    numbers = judge(network, shown, asked, torch.ones(len(asked), 32, 32), before, space=space, batch_size=2)
    assert numbers["drop"].abs().max() == numbers["increase"].abs().max() == 0
    assert numbers["area"].tolist() == [1] * len(asked)


def test_what_a_map_hides_is_black_or_the_mean_colour():
    images, heat = torch.ones(1, 3, 1, 3), torch.tensor([[[1.0, 0.5, 0.0]]])
    assert seen_through(images, heat, (0, 0, 0))[0, 0, 0].tolist() == [1, 0.5, 0]
    assert seen_through(images, heat, (0.4, 0, 0))[0, 0, 0].tolist() == pytest.approx([1, 0.7, 0.4])


class Bright(nn.Module):
    """A classifier that is as sure of class 0 as the left half of an image is bright."""

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
        light = images[..., : images.shape[3] // 2].mean(dim=(1, 2, 3))
        return [torch.stack([light, 1 - light], dim=1)], {}

    def decode(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        return outputs[0]


def test_insertion_and_deletion_worked_by_hand():
    """The image is white on the left, and the map points there: two steps of a half each."""
    images, heat = torch.zeros(1, 3, 32, 32), torch.zeros(1, 32, 32)
    images[..., :16], heat[..., :16] = 1, 1
    asked = Decisions(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0.0, 0, 32, 32]]), torch.tensor([0]))
    numbers = judge(Bright(), images, asked, heat, torch.ones(1), steps=2)
    assert numbers["drop"].item() == 0
    blurry = explain.sure(Bright(), blurred(images), asked, 1).item()
    assert numbers["insertion"].item() == pytest.approx((blurry + 1) / 4 + (1 + 1) / 4)
    assert numbers["deletion"].item() == pytest.approx((1 + 0) / 4 + 0)
    wrong = judge(Bright(), images, asked, 1 - heat, torch.ones(1), steps=2)
    assert wrong["drop"].item() == 100 and wrong["deletion"].item() == pytest.approx((1 + 1) / 4 + (1 + 0) / 4)


def test_the_order_of_pixels_falls_and_takes_each_once():
    heat = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0))
    heat[1] = heat[1].round()  # many equal ones
    place = hottest_first(heat)
    assert place.sort(dim=1).values.tolist() == [list(range(20))] * 2
    for values, order in zip(heat.flatten(1), place.argsort(dim=1), strict=True):
        assert (values[order].diff() <= 0).all()


def test_pointing_and_energy_of_a_box():
    heat = torch.zeros(3, 4, 4)
    heat[0, 1, 1], heat[0, 3, 3], heat[1, 3, 0] = 1.0, 0.5, 0.25
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4, 4]])
    found = inside(heat, boxes)
    assert found["pointing"].tolist() == [100, 0, 0]  # a map of zeros points nowhere
    assert found["energy"].tolist() == pytest.approx([1 / 1.5, 0, 0])
    assert inside(torch.ones(1, 4, 4), boxes[:1])["energy"].item() == 0.25  # the box's share of the image


def test_the_centre_looks_at_the_middle_and_chance_repeats():
    middle = centre_map((9, 9))
    assert middle[4, 4] == 1 and middle.argmax() == 40 and middle[0, 0] == 0
    torch.testing.assert_close(middle, middle.flip(0), rtol=0, atol=1e-6)
    first = random_map([3, 4], (16, 16))
    torch.testing.assert_close(first[1], random_map([4], (16, 16))[0], rtol=0, atol=0)
    assert not torch.equal(first[0], first[1])


# ---- intervals and comparing


def an_explained(images, drops, **about):
    numbers = {"drop": np.array(drops, dtype=float), "increase": np.zeros(len(drops))}
    return Explained(about, images, ["a"] * len(images), np.full(len(images), 0.5), {"P3": numbers}, {}, {"P3": 8})


def test_an_interval_of_equal_values_is_a_point_and_of_others_that_of_a_normal_mean():
    same = interval(an_explained([*"vwxyz"], [5] * 5), "P3", "drop")
    assert (same.value, same.low, same.high) == (5, 5, 5)
    rng = np.random.default_rng(0)
    values = rng.normal(10, 4, 400)
    one = interval(an_explained([str(i) for i in range(400)], values), "P3", "drop")
    half = 1.96 * values.std() / 20
    assert one.value == pytest.approx(values.mean())
    assert (one.low, one.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.08)


def test_a_few_images_have_no_interval_and_nothing_is_sure():
    few = an_explained([*"wxyz"], [50, 60, 70, 80])
    alone, change = interval(few, "P3", "drop"), difference(few, an_explained([*"wxyz"], [5, 6, 7, 8]), "P3", "drop")
    assert str(alone) == "65" and str(change) == "-58.5" and not change.sure


def test_a_paired_difference_is_surer_than_the_two_means():
    rng = np.random.default_rng(0)
    names, hard = [str(i) for i in range(60)], rng.uniform(0, 80, 60)
    before, after = an_explained(names, hard), an_explained(names[::-1], (hard - 2)[::-1])
    change = difference(before, after, "P3", "drop")
    assert change.value == pytest.approx(-2) and change.sure and change.high - change.low < 1e-9
    alone = interval(before, "P3", "drop")
    assert alone.high - alone.low > 5
    assert wins(before, after, "P3") == 100 and wins(before, before, "P3") == 50
    assert difference(before, after, "P3", "drop", against="P3").value == change.value
    assert math.isnan(difference(before, an_explained(["other"], [1]), "P3", "drop").value)


def test_images_are_drawn_whole_and_only_shared_ones_count():
    one = an_explained(["x"] * 12 + [*"stuv"], [0] * 12 + [8] * 4)
    assert interval(one, "P3", "drop").value == 2
    assert interval(one, "P3", "drop").high == 8  # x is in no draw of a third of them: of single numbers, of 1 in 100
    other = an_explained(["v", "z"], [9, 100])
    assert difference(one, other, "P3", "drop").value == 1


def test_metrics_come_back_from_their_file_and_are_compared(tmp_path):
    names = [*"vwxyz"]
    first, second = (
        an_explained(names, [10, 20, 10, 20, 15], data="d"),
        an_explained(names, [5, 15, 5, 15, 10], data="d"),
    )
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_metrics(a, first), write_metrics(b, second)
    back = read_metrics(a)
    assert (
        back.levels["P3"]["drop"].tolist() == [10, 20, 10, 20, 15]
        and back.images == names
        and back.strides == {"P3": 8}
    )
    assert json.loads(a.read_text())["summary"]["P3"]["drop"][0] == 15
    lines = compare(a, b).splitlines()
    assert lines[2] == "5 images in common, of 5 and 5"
    assert lines[6].split() == ["P3", "AD", "%", "15", "10", "-5", "[-5,", "-5]", "*"]
    assert level_metrics(back)[0].ad == 15 and level_metrics(back)[0].iic == 0


def test_what_cannot_be_compared_is_a_fault(tmp_path):
    a, b, c = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    write_metrics(a, an_explained(["x"], [1], space="pixel"))
    write_metrics(b, an_explained(["x"], [1], space="norm"))
    write_metrics(c, an_explained(["y"], [1], space="pixel"))
    with pytest.raises(Fault, match=r"^space: 'pixel' in .*a.json, 'norm' in .*b.json; measure both alike$"):
        compare(a, b)
    write_metrics(b, an_explained(["x"], [1], space="pixel", steps=20))
    with pytest.raises(Fault, match=r"^steps: None in .*a.json, 20 in .*b.json; measure both alike$"):
        compare(a, b)
    with pytest.raises(Fault, match="have no image in common; nothing can be compared"):
        compare(a, c)
    with pytest.raises(Fault, match="^--classes b: no decision is for it$"):
        compare(a, a, ["b"])
    b.write_text("{}")
    with pytest.raises(Fault, match="not a metrics.json of explain.py"):
        read_metrics(b)
    b.write_text(a.read_text().replace('"images": ["x"]', '"images": []'))
    with pytest.raises(Fault, match="damaged; its lists do not fit together"):
        read_metrics(b)


# ---- pictures


def test_heat_colours_what_is_hot_and_leaves_the_rest_grey():
    picture = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:, 4:] = 1
    seen = overlay(picture, heat).astype(int)
    cold, hot = seen[0, 0], seen[0, 7]
    assert np.ptp(cold) < 50 and hot[0] > hot[2] + 60 and (overlay(picture, heat * 0) == seen[0, 0]).all()


def test_a_very_thin_picture_has_a_row_of_the_input():
    letterbox = Letterbox(4000, 3, 0.16, 0, 15)
    (x1, y1, x2, y2), inside = seen_part(letterbox, (32, 640))
    assert (x1, x2, y2 - y1 >= 1) == (0, 4000, True) and inside[3] > inside[1]


def test_a_picture_has_a_tile_a_level_and_a_row_a_decision():
    heat = np.zeros((40, 60), np.float32)
    row = Shown("a", 0, 0.5, [1, 2, 30, 20], [heat, heat], [0.2, 0.1])
    one = explanation(np.zeros((40, 60, 3), np.uint8), [row], ["P3", "P4"], "x.jpg", "Grad-CAM")
    two = explanation(np.zeros((40, 60, 3), np.uint8), [row, row], ["P3", "P4"], "x.jpg", "Grad-CAM")
    assert one.shape[1] == two.shape[1] == 3 * 330 + 10 and two.shape[0] - one.shape[0] == 213 + 54


# ---- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images of three classes, a data set of classes, one of boxes, and a checkpoint for each."""
    rng = np.random.default_rng(0)
    for number in range(6):
        for place in (f"classes/{'abc'[number % 3]}", "images"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            picture = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / place / f"{number}.png"), picture)
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.9 0.9\n")
    (tmp_path / "c.yaml").write_text("train: classes\nval: classes\nformat: folders\nnames: [a, b, c]\n")
    (tmp_path / "d.yaml").write_text("train: images\nval: images\nnames: [red, green]\n")
    save_checkpoint(tmp_path / "c.pt", a_network(CLASSIFIER), "abc", imgsz=32)
    save_checkpoint(tmp_path / "d.pt", a_network(HEADS["Detect"]), ["red", "green"], imgsz=32)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pictures_of_a_classifier(folder, capsys):
    assert explain.main("--weights c.pt --source images --top 2 --name r".split()) == 0
    assert sorted(path.name for path in Path("runs/explain/r").iterdir()) == [f"{n}.png" for n in range(6)]
    picture = cv2.imread("runs/explain/r/0.png")
    assert picture.shape[1] == 3 * 330 + 10
    assert "levels: P2 (stride 4, row 5), P3 (stride 8, row 6)\n" in capsys.readouterr().out


def test_numbers_of_a_classifier_and_the_comparison(folder, capsys):
    run = "--weights c.pt --data c.yaml --metrics --steps 3 --batch-size 4 --device cpu --name"
    assert explain.main([*run.split(), "r"]) == 0
    out = capsys.readouterr().out
    assert "6 decisions about 6 of 6 images" in out
    ones = next(line for line in out.splitlines() if line.startswith("ones"))
    assert ones.split()[1:7] == ["0", "[0,", "0]", "0", "[0,", "0]"]
    kept = read_metrics("runs/explain/r/metrics.json")
    assert list(kept.levels) == ["P2", "P3"] and tuple(kept.controls) == CONTROLS
    assert set(kept.levels["P2"]) == {"drop", "increase", "area", "insertion", "deletion"}
    assert set(kept.images) == {f"classes/{'abc'[n % 3]}/{n}.png" for n in range(6)}
    files = {path.name for path in Path("runs/explain/r").iterdir()}
    assert files == {"metrics.json", "metrics.png", *(f"{n}.png" for n in range(6))}
    assert explain.main("--compare runs/explain/r/metrics.json runs/explain/r/metrics.json".split()) == 0
    assert "6 images in common" in capsys.readouterr().out


def test_the_batch_changes_nothing(folder):
    network = a_network(CLASSIFIER)
    samples = read_split(read_data_spec("c.yaml"), "val").samples
    there = levels(network.graph)
    one, six = (
        measure(network, samples, "abc", 32, Question(), there, batch_size=size, progress=False) for size in (1, 6)
    )
    assert one.images == six.images and one.classes == six.classes
    for name, numbers in one.maps.items():
        for number, y in numbers.items():
            if number != "increase":  # a hair's breadth decides it
                np.testing.assert_allclose(y, six.maps[name][number], rtol=1e-3, atol=2e-3)


def test_numbers_of_a_detector_are_about_its_objects(folder, capsys):
    run = "--weights d.pt --data d.yaml --metrics --steps 0 --conf-thres 0.0001 --limit 4 --device cpu --name r"
    code = explain.main(run.split())
    printed = capsys.readouterr()
    assert code == 0, printed.err
    kept = read_metrics("runs/explain/r/metrics.json")
    assert set(kept.levels["P2"]) == {"drop", "increase", "area", "pointing", "energy"}
    assert kept.about["target"] == "true" and kept.about["method"] == "gradcam"
    assert kept.controls["ones"]["drop"].max() == 0 and kept.controls["ones"]["increase"].max() == 0
    assert kept.controls["ones"]["energy"] == pytest.approx(0.81 * 27 / 32, abs=0.06)  # of the square input


def test_select_puts_branches_on_the_weakest_level(folder, capsys):
    code = explain.main("--weights c.pt --data c.yaml --select 1 --steps 0 --name r --device cpu".split())
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "weak levels: P" in printed.out and "\npython train.py --cfg runs/explain/r/fal.yaml" in printed.out
    network = build(parse_text(Path("runs/explain/r/fal.yaml").read_text()))
    assert len(branches(network.graph)) == 1
    code = explain.main("--weights runs/explain/r/fal.pt --source images/0.png --method branch --name b".split())
    assert code == 0 and Path("runs/explain/b/0.png").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--source images", "--weights: a checkpoint is needed, or --compare with two metrics.json"),
        ("--weights c.pt", "give --source (images) or --data (a data set's YAML), one of them"),
        ("--weights c.pt --source images --metrics", "--metrics: needs a data set; give --data in place of --source"),
        ("--weights c.pt --data c.yaml --target true", "--target true: is for --metrics and --select; pictures show"),
        ("--weights c.pt --source images --method branch", "--method branch: c.pt[yaml] has no attention branch"),
        ("--weights c.pt --source images --class d", "--classes d: no such class; there are: a, b, c"),
        ("--weights c.pt --data c.yaml --metrics --level P9", "--level P9: the levels are 0 P2, 1 P3, or all"),
        ("--weights c.pt --data d.yaml --metrics", "d.yaml: is of format yolo, but c.pt[yaml] is a classifier"),
        ("--weights c.pt --data c.yaml --select most", "--select most: "),
        ("--weights c.pt --source images --top 4", "--top 4: there are 3 classes"),
        ("--weights c.pt --data c.yaml --steps 1", "--steps 1: a curve has at least 2 steps; 0 measures none"),
        ("--weights no.pt --source images", "no.pt: no such checkpoint"),
        ("--weights c.pt --source nothing.jpg", "nothing.jpg: there is no such file or folder"),
        ("--compare a.json b.json", "a.json: no such file; explain.py --metrics writes metrics.json into its run"),
    ],
)
def test_a_wrong_option_is_a_line_and_code_2(options, said, folder, capsys):
    assert explain.main([*options.split(), "--device", "cpu"] if "compare" not in options else options.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(said) and "Traceback" not in err
    assert not Path("runs").exists()
