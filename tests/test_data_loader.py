"""Items and batches: the same for any number of workers, and after any resume."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data.dataset
from data.augment import GREY, Augment, letterbox
from data.dataset import NEAR, ImageSet, order
from data.images import read_image
from data.loader import batches
from data.structures import Batch, Fault, Sample

COUNT = 10


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Ten noise images of different sizes with 0, 1, 2, 0, 1, ... boxes."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    found = []
    for index in range(COUNT):
        width, height = (int(side) for side in rng.integers(40, 80, 2))
        path = folder / f"{index}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        boxes = np.tile(np.float32([[5, 6, 35, 30]]), (index % 3, 1))
        found.append(Sample(path, boxes, np.full(index % 3, index, dtype=np.int64)))
    return found


def assert_equal(one: Batch, other: Batch) -> None:
    assert (one.indices, one.letterboxes) == (other.indices, other.letterboxes)
    assert torch.equal(one.images, other.images)
    for name in ("boxes", "labels", "image_index"):
        assert torch.equal(getattr(one.targets, name), getattr(other.targets, name))


def test_an_item_without_augmentation_is_its_letterboxed_image(samples: list[Sample]) -> None:
    item = ImageSet(samples, 64)[2]
    bgr = cv2.imread(str(samples[2].path))
    image, box = letterbox(bgr[:, :, ::-1], 64)
    assert torch.equal(item.image, torch.from_numpy(image.transpose(2, 0, 1).copy()))
    assert item.letterbox == box and item.index == 2
    np.testing.assert_allclose(box.to_original(item.boxes.numpy()), samples[2].boxes, atol=1e-4)


def test_a_batch_says_which_image_a_target_is_in(samples: list[Sample]) -> None:
    first, last = list(batches(ImageSet(samples, 64), 6))
    assert first.images.shape == (6, 3, 64, 64) and first.images.dtype == torch.uint8
    assert first.targets.image_index.tolist() == [1, 2, 2, 4, 5, 5]
    assert first.targets.labels.tolist() == [1, 2, 2, 4, 5, 5]
    assert last.targets.image_index.tolist() == [1, 2, 2]
    assert last.indices == (6, 7, 8, 9)


def test_a_batch_without_any_box_has_empty_targets(samples: list[Sample]) -> None:
    (batch,) = batches(ImageSet([samples[0]], 64), 4)
    assert batch.targets.boxes.shape == (0, 4) and batch.targets.labels.dtype == torch.int64


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_length_is_the_number_of_batches(samples: list[Sample], drop_last: bool, sizes: list[int]) -> None:
    loader = batches(ImageSet(samples, 32), 4, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(batch.indices) for batch in loader] == sizes
    assert len(batches(ImageSet([], 32), 4)) == 0


def test_workers_change_nothing(samples: list[Sample]) -> None:
    alone, helped = (
        list(batches(ImageSet(samples, 64, Augment(), seed=3), 4, epoch=2, seed=5, shuffle=True, workers=workers))
        for workers in (0, 2)
    )
    for one, other in zip(alone, helped, strict=True):
        assert_equal(one, other)


def test_an_epoch_can_be_had_again_without_those_before_it(samples: list[Sample]) -> None:
    dataset = ImageSet(samples, 64, Augment())
    epochs = [list(batches(dataset, COUNT, epoch=epoch, shuffle=True))[0] for epoch in range(3)]
    fresh = ImageSet(samples, 64, Augment(), cache=False)
    assert_equal(epochs[2], next(iter(batches(fresh, COUNT, epoch=2, shuffle=True))))
    assert not torch.equal(epochs[0].images, epochs[1].images) and epochs[0].indices != epochs[1].indices


def test_an_augmented_item_depends_on_seed_and_epoch_only(samples: list[Sample]) -> None:
    dataset = ImageSet(samples, 64, Augment())
    first = dataset[3].image
    assert torch.equal(dataset[3].image, first)
    assert not torch.equal(dataset.at_epoch(1)[3].image, first) and dataset.epoch == 0
    assert not torch.equal(ImageSet(samples, 64, Augment(), seed=1)[3].image, first)
    dataset.set_augment(None)
    assert torch.equal(dataset[3].image, ImageSet(samples, 64)[3].image)


def test_loading_leaves_the_global_random_states_alone(samples: list[Sample]) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches(ImageSet(samples, 32, Augment()), 4, shuffle=True, workers=1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_the_cache_changes_nothing(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data.dataset, "RECENT", 3)
    strong = Augment(mixup=0.5, copy_small=0.5, degrees=0.0)
    for augment in (strong, None):
        sets = [ImageSet(samples, 64, augment, cache=cache) for cache in ("ram", "disk", "disk", "off")]
        for index in (0, 1, 2, 5, 9, 0, 5):
            first, *others = [items[index] for items in sets]
            for other in others:
                assert torch.equal(first.image, other.image) and torch.equal(first.boxes, other.boxes)
                assert torch.equal(first.labels, other.labels) and first.letterbox == other.letterbox
    assert [ImageSet(samples, 64, cache=cache).cache for cache in (True, False)] == ["ram", "off"]
    with pytest.raises(Fault) as fault:
        ImageSet(samples, 64, cache="disc")
    assert str(fault.value) == "cache is 'disc'; ram, disk, off are right; did you mean 'disk'?"


def test_the_cache_in_memory_has_a_limit(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.dataset, "CACHE_BYTES", 3 * 64 * 64 * 4)
    small = ImageSet(samples, 64, Augment())
    small.fill_cache()
    large = ImageSet(samples, 64, Augment(), cache="off")
    assert len(small._cache) == 4 and not small.is_cached()
    assert all(torch.equal(small[index].image, large[index].image) for index in range(COUNT))


def test_the_cache_on_disk_is_outside_the_data_and_notices_a_changed_image(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "image.png"
    path.write_bytes(samples[0].path.read_bytes())
    sample = Sample(path, samples[0].boxes, samples[0].labels)
    first = ImageSet([sample], 32, cache="disk")[0]
    (kept,) = (tmp_path / "cache" / "oneshot-yolo" / "images").rglob("*.npy")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cache", path]
    np.save(kept, np.zeros_like(np.load(kept)))  # so that it shows who is asked
    assert ImageSet([sample], 32, cache="disk")[0].image.max() == GREY
    kept.write_bytes(kept.read_bytes()[:200])  # cut off: read anew
    assert torch.equal(ImageSet([sample], 32, cache="disk")[0].image, first.image)
    assert np.load(kept).any()
    assert ImageSet([sample], 64, cache="disk")[0].image.shape == (3, 64, 64)

    before = path.stat()
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = ImageSet([sample], 32, cache="disk")[0]
    assert torch.equal(changed.image, ImageSet([sample], 32, cache="off")[0].image)
    assert not torch.equal(changed.image, first.image)


def test_another_process_gets_the_set_without_its_images(samples: list[Sample]) -> None:
    images = ImageSet(samples, 64, Augment())
    before = len(pickle.dumps(images))
    expected = [images[index].image for index in range(COUNT)]
    assert len(images._cache) == COUNT and len(pickle.dumps(images)) - before < 1000
    assert len(images.at_epoch(1)._cache) == COUNT
    arrived = pickle.loads(pickle.dumps(images))
    assert not arrived._cache and all(torch.equal(arrived[i].image, expected[i]) for i in range(COUNT))


def test_spawned_workers_change_nothing(samples: list[Sample]) -> None:
    """As on Windows and macOS."""
    images = ImageSet(samples, 32, Augment(), seed=3)
    alone = list(batches(images, 5, epoch=2, shuffle=True))
    spawned = list(batches(images, 5, epoch=2, shuffle=True, workers=1, start_method="spawn"))
    for one, other in zip(alone, spawned, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("count", [1, NEAR - 1, NEAR, 2 * NEAR - 1, 2 * NEAR, 3 * NEAR + 5])
def test_mosaics_are_made_of_images_that_stand_together(count: int) -> None:
    images = ImageSet([Sample(Path(f"{i}.png"), np.zeros((0, 4)), np.zeros(0)) for i in range(count)], 32, seed=4)
    at = images.at_epoch(3)
    groups = {tuple(at._near(index).tolist()) for index in range(count)}
    assert all(index in at._near(index) for index in range(count))
    assert sorted(index for group in groups for index in group) == list(range(count))
    assert all(min(count, NEAR) <= len(group) < 2 * NEAR for group in groups)
    first = order(count, 3, 4)[: NEAR if count >= 2 * NEAR else count]
    assert tuple(first.tolist()) in groups and at._near(int(first[0])).tolist() == first.tolist()


def test_whoever_keeps_the_order_decodes_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 images are two groups, of 64 and 86; without a cache, four images a mosaic would be 600 readings."""
    seen: list[str] = []

    def read(path: Path, reduction: int) -> np.ndarray:
        seen.append(str(path))
        return np.full((24, 32, 3), int(path.stem), dtype=np.uint8)

    monkeypatch.setattr(data.dataset, "read_image", read)
    monkeypatch.setattr(data.dataset, "image_size", lambda path: (32, 24))
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    images = ImageSet([Sample(Path(f"{i}.jpg"), *empty) for i in range(150)], 32, Augment(), seed=4, cache="off")
    for batch in batches(images, 16, epoch=1, seed=4, shuffle=True):
        assert batch.images.shape[1:] == (3, 32, 32)
    assert len(seen) == len(set(seen)) > 140  # one that shows nowhere is not read at all


def test_runs_of_batches_go_to_one_worker(samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.loader, "NEAR", 6)
    images = ImageSet(samples, 32, Augment(), seed=3, cache="off")
    helped = batches(images, 2, epoch=2, shuffle=True, workers=2)
    assert [len(run) for run in helped.loader.sampler] == [3, 2]  # type: ignore[arg-type]
    alone = list(batches(images, 2, epoch=2, shuffle=True))
    assert len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert_equal(one, other)


# --- rectangles


@settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(8, 300), st.integers(8, 300)), min_size=1, max_size=20),
    batch_size=st.integers(1, 6),
    shuffle=st.booleans(),
)
def test_batches_of_rectangles_hold_every_sample_once(
    sizes: list[tuple[int, int]], batch_size: int, shuffle: bool
) -> None:
    samples = [Sample(Path(f"{i}.png"), np.zeros((0, 4)), np.zeros(0)) for i in range(len(sizes))]
    images = ImageSet(samples, 96, rect=True)
    images._sizes.update(dict(enumerate(sizes)))
    loader = batches(images, batch_size, epoch=1, shuffle=shuffle)
    assert sorted(index for indices in loader.lists for index in indices) == list(range(len(sizes)))
    at = loader.loader.dataset.items  # type: ignore[attr-defined]
    ratios = []
    for indices in loader.lists:
        (shape,) = {at.shape(index) for index in indices}
        fitted = np.array([np.array(sizes[index][::-1]) * 96 / max(sizes[index]) for index in indices])
        assert all(side % 32 == 0 for side in shape)
        slack = shape - fitted.max(axis=0)
        assert (slack > -0.5 - 1e-9).all() and (slack < 32).all()  # the smallest that holds them; sides are rounded
        ratios.append([sizes[index][1] / sizes[index][0] for index in indices])
    if not shuffle:
        assert sum(ratios, []) == sorted(sum(ratios, []))
    for one in ratios:  # nobody else's image is between those of a batch
        assert sum(min(one) < ratio < max(one) for other in ratios if other is not one for ratio in other) == 0


@pytest.mark.parametrize("augment", [None, Augment(mosaic=0, mixup=0.5), Augment()])
def test_a_batch_of_rectangles_has_one_shape(samples: list[Sample], augment: Augment | None) -> None:
    wide = [sample for sample in samples if np.divide(*cv2.imread(str(sample.path)).shape[:2]) < 0.9]
    (batch,) = batches(ImageSet(wide, 64, augment, rect=True), COUNT, shuffle=True)
    assert len(wide) > 1 and batch.images.shape == (len(wide), 3, 64, 64)
    images = ImageSet(wide, 320, augment, rect=True)
    for batch in batches(images, 2, shuffle=True, workers=1):
        (rows, columns), boxes = batch.images.shape[2:], batch.targets.boxes
        assert columns == 320 and rows < 320 and rows % 32 == 0
        assert (boxes >= 0).all() and (boxes <= torch.tensor([columns, rows] * 2)).all()


def test_a_letterbox_leads_back_from_a_rectangle(samples: list[Sample]) -> None:
    for batch in batches(ImageSet(samples, 64, rect=True), 3):
        for place, (index, box) in enumerate(zip(batch.indices, batch.letterboxes, strict=True)):
            found = batch.targets.boxes[batch.targets.image_index == place].numpy()
            np.testing.assert_allclose(box.to_original(found), samples[index].boxes, atol=1e-4)
            square, within = letterbox(read_image(samples[index].path), 64)
            fitted = square[within.pad_y : 64 - within.pad_y or None, within.pad_x : 64 - within.pad_x or None]
            height, width = batch.images.shape[2] - 2 * box.pad_y, batch.images.shape[3] - 2 * box.pad_x
            shown = batch.images[place, :, box.pad_y :, box.pad_x :].numpy().transpose(1, 2, 0)
            rows, columns = min(height, fitted.shape[0]) - 1, min(width, fitted.shape[1]) - 1
            np.testing.assert_array_equal(shown[:rows, :columns], fitted[:rows, :columns])


def test_left_over_rectangles_are_drawn_anew_each_epoch() -> None:
    images = ImageSet([Sample(Path(f"{i}.png"), np.zeros((0, 4)), np.zeros(0)) for i in range(7)], 64, rect=True)
    images._sizes.update({index: (40 + index, 40) for index in range(7)})
    left = [
        set(range(7)) - set(sum(batches(images, 3, epoch=e, shuffle=True, drop_last=True).lists, [])) for e in range(20)
    ]
    assert all(len(indices) == 1 for indices in left) and len(set.union(*left)) > 3


# --- large images


def test_a_large_jpeg_is_decoded_small_for_training_only(tmp_path: Path) -> None:
    """By 4 here: 256 x 192 is at least four times 64, and both sides divide."""
    rng = np.random.default_rng(0)
    path = tmp_path / "large.jpg"
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (256, 192), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    sample = Sample(path, np.float32([[64, 32, 160, 96]]), np.array([0]))
    still = Augment(mosaic=0, scale=0, translate=0, hsv=(0, 0, 0), flip_lr=0)
    training, plain = ImageSet([sample], 64, still), ImageSet([sample], 64)
    assert training._reduction(0) == 4 and plain._reduction(0) == 1
    assert training[0].letterbox == plain[0].letterbox
    np.testing.assert_allclose(training[0].boxes, plain[0].boxes)
    difference = (training[0].image.int() - plain[0].image.int()).abs()
    assert difference.max() <= 6 and difference.float().mean() < 1.5
    assert torch.equal(plain[0].image, torch.from_numpy(letterbox(read_image(path), 64)[0].transpose(2, 0, 1).copy()))
    odd = tmp_path / "odd.jpg"
    cv2.imwrite(str(odd), picture[:191])
    assert ImageSet([Sample(odd, sample.boxes, sample.labels)], 64, still)._reduction(0) == 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_image_is_upright_and_its_sides_divided(tmp_path: Path, reduction: int) -> None:
    path = tmp_path / "image.jpg"
    cv2.imwrite(str(path), np.full((64, 128, 3), (10, 100, 200), dtype=np.uint8))
    image = read_image(path, reduction)
    assert image.shape == (64 // reduction, 128 // reduction, 3)
    np.testing.assert_allclose(image.reshape(-1, 3).mean(axis=0), [200, 100, 10], atol=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line(samples: list[Sample], workers: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"\xff\xd8no image")
    dataset = ImageSet([*samples, Sample(path, samples[1].boxes, samples[1].labels)], 32, cache=False)
    with pytest.raises(Fault) as fault:
        list(batches(dataset, 4, workers=workers))
    assert str(fault.value) == f"{path}: cannot be read as an image; save it again as JPEG or PNG, or remove it"
