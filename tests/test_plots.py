"""The pictures of an evaluation: the numbers behind them by hand, and that they can be drawn of anything."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.structures import Detections, Sample
from engine.draw import shown_name
from engine.outcomes import confusion, outcomes, worst
from engine.plots import draw_evaluation, draw_labels, instances, label_statistics

HOSTILE = ("_hidden", "$\\frac{", "a\nb\tc", "汽车", "x" * 200, "", "<b>&amp;", "%s {0}")


def found(boxes, scores, labels):
    return Detections(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores), torch.tensor(labels).long())


def sample(boxes, labels, path="a", **more):
    return Sample(Path(path), np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), **more)


CAT, DOG = 0, 1
TRUTH = sample([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [CAT, DOG, DOG])
SEEN = found(
    [[0, 0, 10, 10], [20, 0, 30, 9], [20, 0, 30, 10], [80, 0, 90, 10], [40, 0, 50, 10]],
    [0.9, 0.8, 0.7, 0.6, 0.2],
    [CAT, DOG, CAT, DOG, DOG],
)


def test_a_confusion_worked_out_by_hand():
    # a cat as a cat; a dog taken by the closer box, which says cat; the other box on it and one far off are of
    # nothing; the last dog is seen with too low a score
    verdict = outcomes(TRUTH, SEEN)
    assert verdict.pairs.tolist() == [[0, 0], [2, 1]]
    assert verdict.wrong.tolist() == [1, 3] and verdict.missed.tolist() == [2]
    assert confusion([verdict], 2).tolist() == [[1, 1, 0], [0, 0, 2], [0, 1, 0]]
    assert verdict.mistakes == 4
    assert outcomes(TRUTH, SEEN, conf=0.1).mistakes == 3


def test_a_confusion_counts_every_object_and_every_detection():
    rng = np.random.default_rng(0)
    verdicts, objects, seen = [], np.zeros(3, int), np.zeros(3, int)
    for _ in range(20):
        corner, labels = rng.uniform(0, 60, (8, 2)), rng.integers(0, 3, 8)
        boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (8, 2))], axis=1)
        other, scores = rng.integers(0, 3, 8), rng.uniform(0, 1, 8)
        verdicts.append(outcomes(sample(boxes, labels), found((boxes + 3).tolist(), scores.tolist(), other.tolist())))
        objects += np.bincount(labels, minlength=3)
        seen += np.bincount(other[scores > 0.25], minlength=3)
    matrix = confusion(verdicts, 3)
    assert matrix[:, :3].sum(axis=0).tolist() == objects.tolist()
    assert matrix[:3].sum(axis=1).tolist() == seen.tolist()


def test_ignored_objects_excuse_a_detection():
    truth = sample(
        [],
        [],
        ignored_boxes=np.array([[0, 0, 10, 10], [100, 100, 200, 200]], np.float32),
        ignored_labels=np.array([CAT, CAT]),
        ignored_crowd=np.array([False, True]),
    )
    seen = found([[0, 0, 10, 9], [110, 110, 120, 120], [300, 0, 310, 10]], [0.9, 0.8, 0.7], [CAT, CAT, CAT])
    assert outcomes(truth, seen).wrong.tolist() == [2]


def test_the_worst_images_come_first_and_good_ones_not_at_all():
    nothing = found([], [], [])
    verdicts = [outcomes(sample([], []), nothing), outcomes(TRUTH, nothing), outcomes(TRUTH, SEEN)]
    assert worst([*verdicts, verdicts[1]], 8) == [2, 1, 3]
    assert worst([*verdicts, verdicts[1]], 2) == [2, 1]
    assert worst(verdicts[:1], 8) == []


def test_label_statistics_are_shares_of_the_image():
    samples = [sample([[0, 0, 50, 20]], [DOG]), sample([], []), sample([[10, 10, 20, 20], [0, 0, 5, 0]], [CAT, DOG])]
    statistics = label_statistics(samples, [(100, 40), (7, 7), (20, 40)])
    assert statistics.centres.tolist() == [[0.25, 0.25], [0.75, 0.375]]
    assert statistics.sides.tolist() == [[0.5, 0.5], [0.5, 0.25]]
    assert statistics.aspects.tolist() == [2.5, 1]
    assert instances(samples, 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "name, shown",
    [("cat", "cat"), ("a\nb", "a?b"), ("abcdefghijkl", "abcdef…jkl"), ("汽车", "汽车"), (7, "7")],
)
def test_a_name_is_one_short_line(name, shown):
    assert shown_name(name, 10) == shown


def crowd(folder, classes, images=3):
    """Noise images with boxes of every class, and detections of which some are right."""
    rng = np.random.default_rng(0)
    samples, detections = [], []
    for number in range(images):
        path = folder / f"{HOSTILE[1].replace(chr(92), '')} {number} {'long' * 20}.png"
        cv2.imwrite(str(path), rng.integers(0, 255, (60, 90, 3), dtype=np.uint8))
        corner, labels = rng.uniform(0, 50, (40, 2)), rng.integers(0, classes, 40)
        boxes = np.concatenate([corner, corner + rng.uniform(3, 10, (40, 2))], axis=1)
        samples.append(sample(boxes, labels, path))
        guessed = np.where(rng.random(40) < 0.7, labels, rng.integers(0, classes, 40))
        moved = boxes + rng.normal(0, 0.6, boxes.shape)
        detections.append(found(moved.tolist(), np.sort(rng.random(40))[::-1].tolist(), guessed.tolist()))
    return samples, detections


FILES = ("PR_curve.png", "F1_curve.png", "confusion_matrix.png", "worst.jpg")


@pytest.mark.parametrize("names", [("only",), (*HOSTILE, *(f"class {n}" for n in range(72)))], ids=["one", "eighty"])
def test_pictures_of_one_class_and_of_eighty(tmp_path, names):
    samples, detections = crowd(tmp_path, len(names))
    out = tmp_path / "out"
    out.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_evaluation(out, samples, detections, names)
        draw_labels(out / "labels.png", samples, names)
    assert sorted(path.name for path in out.iterdir()) == sorted((*FILES, "labels.png"))  # nothing temporary stays
    for file in (*FILES, "labels.png"):
        picture = cv2.imread(str(out / file))
        assert picture is not None and picture.std() > 5 and max(picture.shape) < 4000


def test_few_classes_with_hostile_names_are_named(tmp_path):
    samples, detections = crowd(tmp_path, len(HOSTILE))
    draw_evaluation(tmp_path, samples, detections, HOSTILE)
    assert all((tmp_path / file).is_file() for file in FILES)


def test_pictures_of_nothing(tmp_path):
    (tmp_path / "worst.jpg").write_bytes(b"of the run before")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_evaluation(tmp_path, [], [], ["cat"])
        draw_labels(tmp_path / "labels.png", [], ["cat"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*FILES[:3], "labels.png"))
