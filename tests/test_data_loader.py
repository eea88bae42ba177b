"""Items and batches: the same for any number of workers, and after any resume."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.augment import Augment, letterbox
from data.dataset import DetectionSet
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
    item = DetectionSet(samples, 64)[2]
    bgr = cv2.imread(str(samples[2].path))
    image, box = letterbox(bgr[:, :, ::-1], 64)
    assert torch.equal(item.image, torch.from_numpy(image.transpose(2, 0, 1).copy()))
    assert item.letterbox == box and item.index == 2
    np.testing.assert_allclose(box.to_original(item.boxes.numpy()), samples[2].boxes, atol=1e-4)


def test_a_batch_says_which_image_a_target_is_in(samples: list[Sample]) -> None:
    first, last = list(batches(DetectionSet(samples, 64), 6))
    assert first.images.shape == (6, 3, 64, 64) and first.images.dtype == torch.uint8
    assert first.targets.image_index.tolist() == [1, 2, 2, 4, 5, 5]
    assert first.targets.labels.tolist() == [1, 2, 2, 4, 5, 5]
    assert last.targets.image_index.tolist() == [1, 2, 2]
    assert last.indices == (6, 7, 8, 9)


def test_a_batch_without_any_box_has_empty_targets(samples: list[Sample]) -> None:
    (batch,) = batches(DetectionSet([samples[0]], 64), 4)
    assert batch.targets.boxes.shape == (0, 4) and batch.targets.labels.dtype == torch.int64


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_length_is_the_number_of_batches(samples: list[Sample], drop_last: bool, sizes: list[int]) -> None:
    loader = batches(DetectionSet(samples, 32), 4, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(batch.indices) for batch in loader] == sizes
    assert len(batches(DetectionSet([], 32), 4)) == 0


def test_workers_change_nothing(samples: list[Sample]) -> None:
    alone, helped = (
        list(batches(DetectionSet(samples, 64, Augment(), seed=3), 4, epoch=2, seed=5, shuffle=True, workers=workers))
        for workers in (0, 2)
    )
    for one, other in zip(alone, helped, strict=True):
        assert_equal(one, other)


def test_an_epoch_can_be_had_again_without_those_before_it(samples: list[Sample]) -> None:
    dataset = DetectionSet(samples, 64, Augment())
    epochs = [list(batches(dataset, COUNT, epoch=epoch, shuffle=True))[0] for epoch in range(3)]
    fresh = DetectionSet(samples, 64, Augment(), cache=False)
    assert_equal(epochs[2], next(iter(batches(fresh, COUNT, epoch=2, shuffle=True))))
    assert not torch.equal(epochs[0].images, epochs[1].images) and epochs[0].indices != epochs[1].indices


def test_an_augmented_item_depends_on_seed_and_epoch_only(samples: list[Sample]) -> None:
    dataset = DetectionSet(samples, 64, Augment())
    first = dataset[3].image
    assert torch.equal(dataset[3].image, first)
    assert not torch.equal(dataset.at_epoch(1)[3].image, first) and dataset.epoch == 0
    assert not torch.equal(DetectionSet(samples, 64, Augment(), seed=1)[3].image, first)
    dataset.set_augment(None)
    assert torch.equal(dataset[3].image, DetectionSet(samples, 64)[3].image)


def test_loading_leaves_the_global_random_states_alone(samples: list[Sample]) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches(DetectionSet(samples, 32, Augment()), 4, shuffle=True, workers=1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line(samples: list[Sample], workers: int, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"\xff\xd8no image")
    dataset = DetectionSet([*samples, Sample(path, samples[1].boxes, samples[1].labels)], 32, cache=False)
    with pytest.raises(Fault) as fault:
        list(batches(dataset, 4, workers=workers))
    assert str(fault.value) == f"{path}: cannot be read as an image; save it again as JPEG or PNG, or remove it"
