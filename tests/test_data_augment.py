"""Where boxes go when pictures are scaled, mirrored, turned and joined."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.augment import (
    Augment,
    Picture,
    affine,
    affine_matrix,
    augmented,
    change_colours,
    crop_boxes,
    flip,
    letterbox,
    mosaic,
    warp_boxes,
    worth_keeping,
)
from data.structures import Fault

sides = st.integers(1, 90)
seeds = st.integers(0, 2**32)


@st.composite
def pictures(draw: st.DrawFn, side: int = 64) -> Picture:
    """Noise with up to four boxes inside it."""
    width, height = draw(st.integers(8, side)), draw(st.integers(8, side))
    ends = draw(arrays(np.float32, (draw(st.integers(0, 4)), 2, 2), elements=st.floats(0, 1, width=32)))
    boxes = np.concatenate([ends.min(axis=1), ends.max(axis=1)], axis=1) * np.float32([width, height, width, height])
    image = np.random.default_rng(draw(seeds)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Picture(image, boxes, np.arange(len(boxes)))


def same(one: Picture, other: Picture) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)
    np.testing.assert_array_equal(one.labels, other.labels)


@settings(max_examples=50)
@given(picture=pictures(), imgsz=st.sampled_from([32, 64, 96]))
def test_a_letterbox_leads_there_and_back(picture: Picture, imgsz: int) -> None:
    image, box = letterbox(picture.image, imgsz)
    assert image.shape == (imgsz, imgsz, 3)
    there = box.to_network(picture.boxes)
    assert (there > -0.51).all() and (there < imgsz + 0.51).all()  # the image's size is rounded, its boxes are not
    np.testing.assert_allclose(box.to_original(there), picture.boxes, atol=1e-3)


def test_a_letterbox_is_grey_above_and_below_a_wide_image() -> None:
    image, box = letterbox(np.full((10, 20, 3), 7, dtype=np.uint8), 40)
    assert (box.scale, box.pad_x, box.pad_y) == (2.0, 0, 10)
    assert set(image[:10].ravel()) == set(image[30:].ravel()) == {114}
    assert set(image[10:30].ravel()) == {7}


@settings(max_examples=30)
@given(picture=pictures(), left_right=st.booleans())
def test_two_flips_are_none(picture: Picture, left_right: bool) -> None:
    same(flip(flip(picture, left_right=left_right), left_right=left_right), picture)


@pytest.mark.parametrize("left_right", [True, False])
def test_a_flip_takes_the_box_along(left_right: bool) -> None:
    image = np.zeros((20, 30, 3), dtype=np.uint8)
    image[3:8, 4:14] = 255
    flipped = flip(Picture(image, np.float32([[4, 3, 14, 8]]), np.array([0])), left_right=left_right)
    x1, y1, x2, y2 = flipped.boxes[0].astype(int)
    assert (flipped.image[y1:y2, x1:x2] == 255).all() and flipped.image.sum() == image.sum()


@settings(max_examples=50)
@given(picture=pictures(), seed=seeds, degrees=st.floats(0, 180))
def test_a_warped_box_touches_its_turned_corners(picture: Picture, seed: int, degrees: float) -> None:
    matrix = affine_matrix(64, 48, Augment(degrees=degrees), np.random.default_rng(seed))
    for (x1, y1, x2, y2), warped in zip(picture.boxes, warp_boxes(picture.boxes, matrix), strict=True):
        corners = np.array([matrix @ [x, y, 1] for x in (x1, x2) for y in (y1, y2)])
        np.testing.assert_allclose(warped, [*corners.min(axis=0), *corners.max(axis=0)], atol=1e-3)


def test_a_picture_and_its_box_move_together() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[20:40, 10:34] = 255
    for seed in range(20):
        matrix = affine_matrix(64, 64, Augment(scale=0.2), np.random.default_rng(seed))
        moved = affine(Picture(image, np.float32([[10, 20, 34, 40]]), np.array([0])), matrix, 64)
        rows, columns = (np.flatnonzero((moved.image[:, :, 0] > 160).any(axis=axis)) for axis in (1, 0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(moved.boxes[0], seen, atol=1.01)


def test_half_the_size_is_the_mean_of_four_pixels() -> None:
    """cv2 counts from the centre of a pixel and boxes from its edge; forgetting that moves pictures by half a pixel."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    half = affine(
        Picture(image, np.zeros((0, 4), np.float32), np.zeros(0, int)), np.array([[0.5, 0, 0], [0, 0.5, 0]]), 16
    )
    np.testing.assert_allclose(half.image, image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)), atol=1)


def test_no_change_is_no_change() -> None:
    rng = np.random.default_rng(0)
    picture = Picture(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), np.float32([[1, 2, 30, 48]]), np.array([3]))
    still = Augment(mosaic=0, scale=0, translate=0, hsv=(0, 0, 0), flip_lr=0)
    same(augmented([picture], 48, still, rng), picture)


@settings(max_examples=50)
@given(four=st.lists(pictures(), min_size=4, max_size=4), seed=seeds, degrees=st.floats(0, 180))
def test_boxes_stay_inside_and_worth_learning(four: list[Picture], seed: int, degrees: float) -> None:
    changed = augmented(four, 64, Augment(degrees=degrees, flip_ud=0.5), np.random.default_rng(seed))
    assert changed.image.shape == (64, 64, 3) and changed.image.dtype == np.uint8
    assert len(changed.boxes) == len(changed.labels)
    assert (changed.boxes >= 0).all() and (changed.boxes <= 64).all()
    assert (changed.boxes[:, 2:] - changed.boxes[:, :2] >= 2 - 1e-4).all()


@settings(max_examples=30)
@given(four=st.lists(pictures(), min_size=4, max_size=4), seed=seeds)
def test_a_mosaic_shows_each_picture_where_its_boxes_are(four: list[Picture], seed: int) -> None:
    joined = mosaic(four, 64, np.random.default_rng(seed))
    assert joined.labels.tolist() == [label for picture in four for label in picture.labels]
    visible = crop_boxes(joined.boxes, 128, 128)
    start = 0
    for picture in four:
        for before, whole, after in zip(picture.boxes, joined.boxes[start:], visible[start:], strict=False):
            np.testing.assert_allclose(whole[2:] - whole[:2], before[2:] - before[:2], atol=1e-3)
            x, y = np.floor((after[:2] + after[2:]) / 2).astype(int)
            u, v = (np.array([x, y]) - np.round(whole[:2] - before[:2])).astype(int)
            if (after[2:] - after[:2] > 2).all():
                np.testing.assert_array_equal(joined.image[y, x], picture.image[v, u])
        start += len(picture.boxes)


def test_what_is_cropped_away_or_too_thin_is_dropped() -> None:
    whole = np.float32([[-90, 0, 10, 10], [-91, 0, 9, 10], [0, 0, 2, 9], [0, 0, 1.9, 9], [20, 20, 30, 30]])
    visible = crop_boxes(whole, 20, 20)
    assert worth_keeping(whole, visible).tolist() == [True, False, True, False, False]


def test_colours_change_by_the_three_gains() -> None:
    image = cv2.cvtColor(np.full((2, 2, 3), (60, 100, 100), dtype=np.uint8), cv2.COLOR_HSV2RGB)
    assert change_colours(image, (0, 0, 0), np.random.default_rng(0)) is image
    values = []
    for seed in range(200):
        changed = change_colours(image, (0, 0, 0.4), np.random.default_rng(seed))
        hue, saturation, value = cv2.cvtColor(changed, cv2.COLOR_RGB2HSV)[0, 0].astype(int)
        assert abs(hue - 60) <= 2 and abs(saturation - 100) <= 4
        values.append(value)
    assert 59 <= min(values) < 65 and 135 < max(values) <= 141


def test_turning_is_about_the_middle() -> None:
    rng = np.random.default_rng(1)
    matrix = affine_matrix(100, 50, Augment(degrees=90, translate=0), rng)
    np.testing.assert_allclose(matrix @ [50, 50, 1], [25, 25])
    assert 0.5 <= math.hypot(*matrix[0, :2]) <= 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mosaic": 1.5}, "augment: mosaic is 1.5; 0 to 1 is right"),
        ({"scale": 1.0}, "augment: scale is 1.0; 0 to 0.9 is right"),
        ({"degrees": math.nan}, "augment: degrees is nan; 0 to 180 is right"),
        ({"hsv": [0.1, 0.2]}, "augment: hsv is [0.1, 0.2]; three numbers from 0 to 1 are right"),
    ],
)
def test_a_wrong_strength_is_a_fault(values: dict[str, object], message: str) -> None:
    with pytest.raises(Fault) as fault:
        Augment(**values)  # type: ignore[arg-type]
    assert str(fault.value) == message
