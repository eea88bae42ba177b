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
    Shape,
    Source,
    affine_matrix,
    augmented,
    change_colours,
    compose,
    copy_small,
    crop_boxes,
    finished,
    fit,
    flip,
    letterbox,
    mixup,
    mosaic_rectangles,
    shrink,
    warp,
    warp_boxes,
    window,
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


def source_of(picture: Picture) -> Source:
    height, width = picture.image.shape[:2]
    return Source(width, height, picture.boxes, picture.labels, lambda: picture.image)


def smooth(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A picture in which a pixel is nearly its neighbour, so that half a pixel more or less is hardly seen."""
    few = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(few, (width, height), interpolation=cv2.INTER_CUBIC)


def slowly(
    pictures: list[Picture], imgsz: int, shape: Shape, augment: Augment, rng: np.random.Generator
) -> tuple[Picture, np.ndarray]:
    """What `augmented` should give, by drawing the canvas and warping it; and how often each label may be there.

    The same numbers are drawn in the same order. Labels: 1 surely there, 0 surely not, .5 where a box is so near to
    being too small that a pixel decides.
    """
    fitted = [fit(picture.image, imgsz) for picture in pictures]
    rows, columns = canvas_shape = tuple(2 * side if len(pictures) == 4 else side for side in shape)
    if len(pictures) == 4:
        cx = rng.integers(shape[1] // 2, columns - shape[1] // 2 + 1)
        cy = rng.integers(shape[0] // 2, rows - shape[0] // 2 + 1)
        ends = [(cx, cy), (cx + fitted[1].shape[1], cy), (cx, cy + fitted[2].shape[0])]
        ends.append((cx + fitted[3].shape[1], cy + fitted[3].shape[0]))
    else:
        ends = [(columns - (columns - fitted[0].shape[1] + 1) // 2, rows - (rows - fitted[0].shape[0] + 1) // 2)]
    rng.random(len(pictures))
    large = np.full((4 * rows, 4 * columns, 3), 114, dtype=np.uint8)
    boxes = []
    for picture, image, (right, bottom) in zip(pictures, fitted, ends, strict=True):
        (height, width), (before_y, before_x) = image.shape[:2], picture.image.shape[:2]
        left, top = right - width, bottom - height
        large[rows + top : rows + bottom, columns + left : columns + right] = image
        boxes.append(picture.boxes * np.tile([width / before_x, height / before_y], 2) + np.tile([left, top], 2))
    canvas = large[rows : 2 * rows, columns : 2 * columns]
    matrix = affine_matrix(canvas_shape, shape, augment, rng)  # type: ignore[arg-type]
    shifted = matrix.copy()
    shifted[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    image = cv2.warpAffine(canvas, shifted, shape[::-1], flags=cv2.INTER_LINEAR, borderValue=[114] * 3)
    whole = warp_boxes(np.concatenate(boxes), matrix)
    seen = crop_boxes(warp_boxes(crop_boxes(np.concatenate(boxes), columns, rows), matrix), shape[1], shape[0])
    sides = seen[:, 2:] - seen[:, :2]
    share = sides.prod(axis=1) / np.maximum((whole[:, 2:] - whole[:, :2]).prod(axis=1), 1e-9)
    slack = 2.0  # pixels
    sure = (sides > 2 + slack).all(axis=1) & (share > 0.1 + 2 * slack / np.maximum(sides.min(axis=1), 1e-9))
    never = (sides < 2 - slack).any(axis=1) | (share < 0.02)
    labels = np.concatenate([picture.labels for picture in pictures])
    return Picture(image, seen, labels), np.where(sure, 1, np.where(never, 0, 0.5))


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
    matrix = affine_matrix((64, 64), (48, 48), Augment(degrees=degrees), np.random.default_rng(seed))
    for (x1, y1, x2, y2), warped in zip(picture.boxes, warp_boxes(picture.boxes, matrix), strict=True):
        corners = np.array([matrix @ [x, y, 1] for x in (x1, x2) for y in (y1, y2)])
        np.testing.assert_allclose(warped, [*corners.min(axis=0), *corners.max(axis=0)], atol=1e-3)


def test_a_picture_and_its_box_move_together() -> None:
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[20:40, 10:34] = 255
    source = source_of(Picture(image, np.float32([[10, 20, 34, 40]]), np.array([0])))
    for seed in range(40):
        augment = Augment(scale=0.2, degrees=0.0 if seed % 2 else 1e-6)  # without and with a canvas
        moved = augmented([source], 64, (64, 64), augment, np.random.default_rng(seed))
        rows, columns = (np.flatnonzero((moved.image[:, :, 0] > 160).any(axis=axis)) for axis in (1, 0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(moved.boxes[0], seen, atol=1.01)


@pytest.mark.parametrize("turned", [False, True])
def test_half_the_size_is_the_mean_of_four_pixels(turned: bool) -> None:
    """cv2 counts from the centre of a pixel and boxes from its edge; forgetting that moves pictures by half a pixel."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    source = source_of(Picture(image, np.zeros((0, 4), np.float32), np.zeros(0, int)))
    half = warp(image, np.array([[0.5, 0, 0], [0, 0.5, 0]]), (16, 16))
    if not turned:
        half = compose([source], [(0, 0, 32, 32)], (32, 32), (16, 16), 0.5)[0]
    np.testing.assert_allclose(half, image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)), atol=1)


def test_no_change_is_no_change() -> None:
    rng = np.random.default_rng(0)
    picture = Picture(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8), np.float32([[1, 2, 30, 48]]), np.array([3]))
    still = Augment(mosaic=0, scale=0, translate=0, hsv=(0, 0, 0), flip_lr=0)
    same(finished(augmented([source_of(picture)], 48, (48, 48), still, rng), still, rng), picture)


@settings(max_examples=50)
@given(
    four=st.lists(pictures(), min_size=4, max_size=4),
    seed=seeds,
    degrees=st.sampled_from([0.0, 0.0, 30.0, 180.0]),
    count=st.sampled_from([1, 4]),
    shape=st.sampled_from([(64, 64), (32, 64), (64, 48)]),
)
def test_boxes_stay_inside_and_worth_learning(
    four: list[Picture], seed: int, degrees: float, count: int, shape: Shape
) -> None:
    augment = Augment(degrees=degrees, flip_ud=0.5, copy_small=0.5, mixup=1.0)
    rng = np.random.default_rng(seed)
    sources = [source_of(picture) for picture in four]
    one = augmented(sources[:count], 64, shape, augment, rng)
    other = augmented(sources[:count], 64, shape, augment, rng)
    changed = finished(mixup(one, other, rng), augment, rng)
    assert changed.image.shape == (*shape, 3) and changed.image.dtype == np.uint8
    assert len(changed.boxes) == len(changed.labels) == len(one.labels) + len(other.labels)
    assert changed.labels.tolist() == [*one.labels, *other.labels]
    assert (changed.boxes >= 0).all() and (changed.boxes <= np.tile(shape[::-1], 2)).all()
    assert (changed.boxes[:, 2:] - changed.boxes[:, :2] >= 2 - 1e-4).all()


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(8, 90), st.integers(8, 90)), min_size=4, max_size=4),
    seed=seeds,
    degrees=st.sampled_from([0.0, 0.0, 20.0]),
    count=st.sampled_from([1, 4]),
    shape=st.sampled_from([(64, 64), (32, 64)]),
)
def test_pictures_are_those_of_a_canvas_that_was_drawn_and_warped(
    sizes: list[tuple[int, int]], seed: int, degrees: float, count: int, shape: Shape
) -> None:
    """Same centre, scale and place; a source's pixel, or one of the output, more or less at an edge."""
    rng = np.random.default_rng(seed)
    four = []
    for number, (width, height) in enumerate(sizes[:count]):
        ends = np.sort(rng.random((3, 2, 2)), axis=1) * [width, height]
        four.append(Picture(smooth(width, height, rng), np.float32(ends.reshape(3, 4)), np.arange(3) + 3 * number))
    augment = Augment(degrees=degrees)
    expected, there = slowly(four, 64, shape, augment, np.random.default_rng(seed))
    small = [replace_image(picture, shrink(picture.image, 64)) for picture in four]
    found = augmented([source_of(picture) for picture in small], 64, shape, augment, np.random.default_rng(seed))
    for label, chance in zip(expected.labels, there, strict=True):
        assert chance == 0.5 or (label in found.labels) == chance
    # one pixel of the smallest source, enlarged, and one of the output
    pixel = 1.01 + max(1.0, *(64 / max(size) for size in sizes[:count])) * 1.5 / 2
    for box, label in zip(found.boxes, found.labels, strict=True):
        np.testing.assert_allclose(box, expected.boxes[expected.labels == label][0], atol=pixel)
    differences = np.abs(found.image.astype(int) - expected.image)
    assert np.quantile(differences, 0.5) <= 6 * pixel
    assert (differences.max(axis=2) > 40 * pixel).mean() < 0.15  # edges of pictures


def replace_image(picture: Picture, image: np.ndarray) -> Picture:
    stretch = np.tile(np.array(image.shape[1::-1]) / picture.image.shape[1::-1], 2)
    return Picture(image, (picture.boxes * stretch).astype(np.float32), picture.labels)


def test_pixels_are_those_of_a_canvas_where_the_edges_are_whole_pixels() -> None:
    """Half, the same and one and a half times the size, moved by whole pixels: nothing is rounded but colours."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    source = source_of(Picture(image, np.float32([[4, 8, 32, 40]]), np.array([7])))
    for scale, shift in ((0.5, (8, 4)), (1.0, (-6, 3)), (1.5, (-12, -18)), (1.5, (3, 6))):
        found, whole, visible, labels = compose([source], [(0, 0, 64, 48)], (48, 64), (60, 60), scale, shift)
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        x1, y1, x2, y2 = np.clip(np.array([shift[0], shift[1], 64 * scale + shift[0], 48 * scale + shift[1]]), 0, 60)
        inner = np.s_[int(y1) + 2 : int(y2) - 2, int(x1) + 2 : int(x2) - 2]  # warpAffine blends edges with the grey
        expected = warp(image, matrix, (60, 60))
        # warpAffine knows 32 places between two pixels: 1/64 of the largest step between neighbours
        np.testing.assert_allclose(found[inner].astype(int), expected[inner].astype(int), atol=9)
        np.testing.assert_allclose(whole, warp_boxes(source.boxes, matrix), atol=1e-4)
        np.testing.assert_allclose(visible, whole.clip([x1, y1, x1, y1], [x2, y2, x2, y2]), atol=1e-4)
        assert labels.tolist() == [7]


def test_a_centre_is_drawn_from_the_middle_of_the_canvas() -> None:
    corners = [mosaic_rectangles([(64, 48)] * 4, (64, 96), np.random.default_rng(seed))[3][:2] for seed in range(3000)]
    xs, ys = np.array(corners).T
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (48, 144, 32, 96)
    assert abs(xs.mean() - 96) < 2 and abs(ys.mean() - 64) < 2 and abs(np.corrcoef(xs, ys)[0, 1]) < 0.1


@given(
    start=st.floats(-200, 200),
    extent=st.floats(0.5, 400),
    length=st.integers(1, 500),
    low=st.integers(0, 20),
    high=st.integers(0, 64),
)
def test_a_window_is_filled_from_the_nearest_pixels(
    start: float, extent: float, length: int, low: int, high: int
) -> None:
    found = window(start, start + extent, length, low, high)
    if found is None:
        assert min(start + extent, high) - max(start, low) <= 1
        return
    x1, x2, u1, u2 = found
    assert low <= x1 < x2 <= high and 0 <= u1 < u2 <= length
    assert x1 - start > -0.51 and start + extent - x2 > -0.51
    step = length / extent
    assert abs((x1 - start) * step - u1) <= max(1, step) and abs((x2 - start) * step - u2) <= max(1, step)


@settings(max_examples=30)
@given(four=st.lists(pictures(), min_size=4, max_size=4), seed=seeds)
def test_a_mosaic_shows_each_picture_where_its_boxes_are(four: list[Picture], seed: int) -> None:
    """On the canvas itself, with pictures that need no scaling."""
    sizes = [(picture.image.shape[1], picture.image.shape[0]) for picture in four]
    rectangles = mosaic_rectangles(sizes, (64, 64), np.random.default_rng(seed))
    image, whole, visible, labels = compose(
        [source_of(picture) for picture in four], rectangles, (128, 128), (128, 128)
    )
    assert labels.tolist() == [label for picture in four for label in picture.labels]
    start = 0
    for picture, (left, top, _, _) in zip(four, rectangles, strict=True):
        for before, now, after in zip(picture.boxes, whole[start:], visible[start:], strict=False):
            np.testing.assert_allclose(now, before + np.tile([left, top], 2), atol=1e-3)
            if (after[2:] - after[:2] > 2).all():
                x, y = np.floor((after[:2] + after[2:]) / 2).astype(int)
                np.testing.assert_array_equal(image[y, x], picture.image[y - top, x - left])
        start += len(picture.boxes)


def test_what_is_not_seen_is_not_read() -> None:
    def unseen() -> np.ndarray:
        raise AssertionError

    empty = np.zeros((0, 4), np.float32), np.zeros(0, int)
    picture = np.full((64, 64, 3), 9, dtype=np.uint8)
    sources = [Source(64, 64, *empty, unseen), Source(64, 64, *empty, lambda: picture)]
    image, *_ = compose(sources, [(0, 0, 64, 64), (64, 0, 128, 64)], (128, 128), (64, 64), 1.0, (-64, 0))
    assert (image == 9).all()


@settings(max_examples=60)
@given(picture=pictures(side=90), seed=seeds)
def test_copies_are_pixels_of_small_objects_where_nothing_was(picture: Picture, seed: int) -> None:
    before = picture.image.copy()
    source = source_of(picture)
    pasted = copy_small(source, np.random.default_rng(seed))
    image, count = pasted.read(), len(picture.boxes)
    np.testing.assert_array_equal(picture.image, before)
    np.testing.assert_array_equal(pasted.boxes[:count], picture.boxes)
    assert pasted.labels[:count].tolist() == picture.labels.tolist() and len(pasted.labels) == len(pasted.boxes)
    outside = np.ones(image.shape[:2], dtype=bool)
    for number in range(count, len(pasted.boxes)):
        box, label = pasted.boxes[number], pasted.labels[number]
        origin = picture.boxes[picture.labels == label][0]
        assert np.prod(origin[2:] - origin[:2]) < 32 * 32
        moved = np.round(box[:2] - origin[:2]).astype(int)
        np.testing.assert_allclose(box, origin + np.tile(moved, 2), atol=1e-4)
        x1, y1, x2, y2 = *np.floor(origin[:2]).astype(int), *np.ceil(origin[2:]).astype(int)
        place = np.s_[y1 + moved[1] : y2 + moved[1], x1 + moved[0] : x2 + moved[0]]
        np.testing.assert_array_equal(image[place], before[y1:y2, x1:x2])
        assert (box[:2] >= 5).all() and (box[2:] <= np.array(image.shape[1::-1]) - 5).all()
        for index, other in enumerate(pasted.boxes):
            if index != number:
                assert (box[:2] >= other[2:]).any() or (box[2:] <= other[:2]).any()
        outside[place] = False
    np.testing.assert_array_equal(image[outside], before[outside])


def test_only_small_objects_are_copied_and_only_where_there_is_room() -> None:
    image = np.zeros((100, 100, 3), dtype=np.uint8)
    boxes = np.float32([[10, 10, 30, 40], [50, 50, 82, 82], [50, 10, 51, 40]])  # small, 32 x 32, too thin
    pasted = copy_small(source_of(Picture(image, boxes, np.array([4, 5, 6]))), np.random.default_rng(0))
    assert pasted.labels.tolist() == [4, 5, 6, 4]
    full = source_of(Picture(image, np.float32([[0, 0, 100, 100], [10, 10, 30, 40]]), np.array([5, 4])))
    assert copy_small(full, np.random.default_rng(0)) is full


def test_a_blend_has_its_share_of_both() -> None:
    dark, light = (np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 200))
    boxes = np.float32([[1, 1, 5, 5]])
    shares = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        blend = mixup(Picture(light, boxes, np.array([3])), Picture(dark, boxes + 2, np.array([1])), rng)
        shares.append(blend.image[0, 0, 0] / 200)
        assert len(set(blend.image.ravel().tolist())) == 1
    np.testing.assert_array_equal(blend.boxes, [[1, 1, 5, 5], [3, 3, 7, 7]])
    assert blend.labels.tolist() == [3, 1]
    # of Beta(32, 32): mean 1/2, variance 1 / (4 * 65)
    assert abs(np.mean(shares) - 0.5) < 0.01 and abs(np.std(shares) - math.sqrt(1 / 260)) < 0.01


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


def test_hue_goes_round() -> None:
    """Red is at both ends of the circle; a factor of 2 takes hue 170 to 340, which is 160."""
    image = cv2.cvtColor(np.full((2, 2, 3), (170, 200, 200), dtype=np.uint8), cv2.COLOR_HSV2RGB)
    for seed in range(100):
        factor = 1 + np.random.default_rng(seed).uniform(-1, 1, 3)[0]
        hue = cv2.cvtColor(change_colours(image, (1, 0, 0), np.random.default_rng(seed)), cv2.COLOR_RGB2HSV)[0, 0, 0]
        apart = abs(int(hue) - 170 * factor % 180)
        assert min(apart, 180 - apart) <= 2


def test_turning_is_about_the_middle() -> None:
    rng = np.random.default_rng(1)
    matrix = affine_matrix((100, 100), (50, 50), Augment(degrees=90, translate=0), rng)
    np.testing.assert_allclose(matrix @ [50, 50, 1], [25, 25])
    assert 0.5 <= math.hypot(*matrix[0, :2]) <= 1.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mosaic": 1.5}, "augment: mosaic is 1.5; 0 to 1 is right"),
        ({"mixup": -0.1}, "augment: mixup is -0.1; 0 to 1 is right"),
        ({"copy_small": 2}, "augment: copy_small is 2; 0 to 1 is right"),
        ({"scale": 1.0}, "augment: scale is 1.0; 0 to 0.9 is right"),
        ({"degrees": math.nan}, "augment: degrees is nan; 0 to 180 is right"),
        ({"hsv": [0.1, 0.2]}, "augment: hsv is [0.1, 0.2]; three numbers from 0 to 1 are right"),
    ],
)
def test_a_wrong_strength_is_a_fault(values: dict[str, object], message: str) -> None:
    with pytest.raises(Fault) as fault:
        Augment(**values)  # type: ignore[arg-type]
    assert str(fault.value) == message
