"""Images of a class as a whole: folders that are called after their classes, and the part of an image that is seen."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.__main__ import main
from data.augment import Augment, Source, cropped, middle
from data.config import DataSpec, read_data_spec
from data.dataset import ImageSet
from data.readers import cache, read_split
from data.structures import Fault

CLASSES = ("beach", "forest", "river")
YAML = "train: train\nval: val\nformat: folders\n"


def write_picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three classes, with two images each to train on and one to validate on."""
    for number, name in enumerate(CLASSES):
        for index in range(2):
            write_picture(tmp_path / "train" / name / f"{index}.png", 10 * number + index)
        write_picture(tmp_path / "val" / name / "0.png", 10 * number + 5)
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def read(place: Path, text: str = YAML) -> DataSpec:
    (place / "data.yaml").write_text(text)
    return read_data_spec(place / "data.yaml")


# ---- reading


def test_an_image_is_of_the_class_that_its_folder_is_called_after(place: Path) -> None:
    data = read(place)
    assert (data.names, data.format) == (CLASSES, "folders")
    split = read_split(data, "train")
    assert [(s.path.parent.name, s.path.name, s.labels.tolist()) for s in split.samples] == [
        (name, f"{index}.png", [label]) for label, name in enumerate(CLASSES) for index in range(2)
    ]
    assert all(sample.boxes.tolist() == [[0, 0, 40, 30]] for sample in split.samples) and split.notes == ()


def test_names_of_the_yaml_give_the_order(place: Path) -> None:
    data = read(place, YAML + "names: [river, beach, forest, desert]\n")
    assert [int(sample.labels[0]) for sample in read_split(data, "val").samples] == [1, 2, 0]


def test_the_nearest_folder_that_is_a_class_counts_and_none_above_the_split(place: Path, tmp_path: Path) -> None:
    write_picture(place / "train/river/beach/deep/9.png", 99)
    labels = {str(s.path.relative_to(place)): int(s.labels[0]) for s in read_split(read(place), "train").samples}
    assert labels["train/river/beach/deep/9.png"] == 0 and labels["train/river/0.png"] == 2
    os.renames(place / "val", place / "river/val")  # the folder above is called like a class
    write_picture(place / "river/val/other/1.png", 7)
    split = read_split(read(place, YAML.replace("val: val", "val: river/val")), "val")
    assert len(split.samples) == 3 and len(split.problems) == 1


def test_a_list_of_images_finds_their_classes(place: Path) -> None:
    (place / "few.txt").write_text("train/river/1.png\nval/beach/0.png\n")
    data = read(place, "train: few.txt\nformat: folders\nnames: [beach, forest, river]\n")
    assert [int(sample.labels[0]) for sample in read_split(data, "train").samples] == [2, 0]


def test_images_without_a_class_are_left_out_and_told(place: Path) -> None:
    write_picture(place / "val/beech/1.png", 3)
    write_picture(place / "val/beech/2.png", 4)
    write_picture(place / "val/0.png", 5)
    (place / "val/river/broken.png").write_bytes(b"no image")
    split = read_split(read(place), "val")
    assert len(split.samples) == 3
    assert split.notes == (
        f"{place}/val: holds an image, but 'val' is no class; classes are beach, forest, river (images left out)",
        f"{place}/val/beech: holds 2 images, but 'beech' is no class; did you mean 'beach'? (images left out)",
        f"{place}/val/river/broken.png: cannot be read as an image; save it again as JPEG or PNG, or remove it "
        "(image left out)",
    )


def test_what_was_read_is_kept_and_forgotten_when_an_image_moves(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FEWEST", 1)
    monkeypatch.setattr(cache, "SETTLED", -3600.0)
    write_picture(place / "val/beech/1.png", 3)
    data, long_ago = read(place), time.time() - 1000
    for file in place.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    first = read_split(data, "val")
    with monkeypatch.context() as patch:
        patch.setattr("data.readers._of_folders", None)  # it is not asked again
        again = read_split(data, "val")
    assert again.notes == first.notes and [s.path for s in again.samples] == [s.path for s in first.samples]
    assert [s.labels.tolist() for s in again.samples] == [[0], [1], [2]]
    os.renames(place / "val/beech", place / "val/forest/more")
    assert [s.labels.tolist() for s in read_split(data, "val").samples] == [[0], [1], [1], [2]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: train/beach\nformat: folders\n", "there is no folder in {place}/train/beach; a folder of images for"),
        ("train: nowhere\nformat: folders\n", "{place}/nowhere does not exist"),
        ("train: few.txt\nformat: folders\n", "{place}/few.txt is no folder of classes; list the classes: names: ["),
        ("train: train\nformat: folders\nnames: [beach]\n", "one class, 'beach'; two or more can be told apart"),
        (
            "train: train\nformat: folder\n",
            "format 'folder' is not known; one of yolo, voc, coco, folders, masks; did you",
        ),
    ],
)
def test_what_is_no_set_of_classes_is_told(place: Path, text: str, said: str) -> None:
    (place / "few.txt").write_text("train/river/1.png\n")
    with pytest.raises(Fault, match=re.escape(said.format(place=place))):
        read(place, text)


def test_a_set_without_a_class_that_is_known_is_of_no_use(place: Path) -> None:
    with pytest.raises(Fault) as fault:
        read_split(read(place, YAML + "names: [cat, dog]\n"), "val")
    assert fault.value.lines[0] == f"{place}/data.yaml: val: nothing can be used" and len(fault.value.lines) == 4


# ---- what `python -m data` makes of it


def test_a_set_is_checked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(place / "data.yaml")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"images +6 +3\n", told) and re.search(r"  0 beach +2  33 % +1  33 %", told)
    assert "side of an image" in told and "box" not in told
    (place / "val/beach/1.png").write_bytes((place / "train/beach/0.png").read_bytes())  # measured on what was learned
    (place / "train/river/7.png").write_bytes((place / "train/forest/0.png").read_bytes())  # which of the two is it?
    (place / "val/river/0.png").unlink()
    assert main(["check", str(place / "data.yaml")]) == 1
    told = capsys.readouterr().out
    assert "images with the same content: 2 groups, 1 across splits, 1 across classes" in told
    assert "classes without an image in val: river" in told
    assert told.endswith("fit for use, but for 1 images in several splits and 1 images in several classes\n")


def test_a_set_is_divided_and_has_no_boxes_to_convert(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = place / "parts"
    assert main(["split", str(place / "data.yaml"), "train=2", "test=1", "-o", str(made)]) == 0
    data = read_data_spec(made / "data.yaml")
    for name, count in (("train", 2), ("test", 1)):
        samples = read_split(data, name).samples
        assert [int((np.array([s.labels[0] for s in samples]) == label).sum()) for label in range(3)] == [count] * 3
        assert all(data.names[int(sample.labels[0])] == sample.path.parent.name for sample in samples)
    capsys.readouterr()
    assert main(["convert", str(place / "data.yaml"), "--to", "yolo", "-o", str(place / "yolo")]) == 2
    assert capsys.readouterr().err == (
        f"{place}/data.yaml: is of format folders, which has no boxes; yolo has nothing else\n"
    )


def test_the_real_set_is_what_its_readme_says(shared_data: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[1] / "cfg/data/ucmerced.yaml"
    text = shipped.read_text().replace("../../datasets/ucmerced", str(shared_data / "ucmerced"))
    (tmp_path / "data.yaml").write_text(text)
    data = read_data_spec(tmp_path / "data.yaml")
    labels = [int(sample.labels[0]) for sample in read_split(data, "val").samples]
    assert len(data.names) == 21 and np.bincount(labels).tolist() == [20] * 21


# ---- what a classifier sees


def test_the_middle_of_an_image_is_seen(place: Path) -> None:
    """256 pixels become the 224 in their middle, none of them changed; larger images are made smaller first."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    seen, box = middle(noise, 224)
    assert np.array_equal(seen, noise[16:-16, 48:-48]) and (box.scale, box.pad_x, box.pad_y) == (1, -48, -16)
    assert box.to_original(np.array([[0, 0, 224, 224]])).tolist() == [[48, 16, 272, 240]]
    flat = np.full((700, 300, 3), 90, dtype=np.uint8)
    assert middle(flat, 64)[0].shape == (64, 64, 3) and (middle(flat, 64)[0] == 90).all()


def test_an_item_without_augmentation_is_what_a_user_sees(place: Path) -> None:
    samples = read_split(read(place), "train").samples
    for size in (32, 96):
        images = ImageSet(samples, size, crop=True)
        for index, sample in enumerate(samples):
            seen, box = middle(cv2.cvtColor(cv2.imread(str(sample.path)), cv2.COLOR_BGR2RGB), size)
            item = images[index]
            assert np.array_equal(item.image.permute(1, 2, 0).numpy(), seen) and item.letterbox == box
            assert item.boxes.tolist() == [[0, 0, size, size]] and item.labels.tolist() == sample.labels.tolist()


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 0.9), st.sampled_from([0.0, 30.0]), st.integers(0, 99))
def test_a_part_of_an_image_fills_the_input(width: int, height: int, scale: float, degrees: float, seed: int) -> None:
    """All of it is the image; only where it is turned there is grey in the corners."""
    flat = np.full((height, width, 3), 90, dtype=np.uint8)
    source = Source(width, height, np.float32([[0, 0, width, height]]), np.array([4]), lambda: flat)
    augment = Augment(scale=scale, degrees=degrees)
    picture = cropped(source, (32, 32), augment, np.random.default_rng(seed))
    assert picture.image.shape == (32, 32, 3) and picture.image[16, 16].tolist() == [90] * 3
    assert degrees or (picture.image == 90).all()
    assert picture.boxes.tolist() == [[0, 0, 32, 32]] and picture.labels.tolist() == [4]
    again = cropped(source, (32, 32), augment, np.random.default_rng(seed))
    assert np.array_equal(again.image, picture.image)


def test_parts_have_the_areas_that_were_asked_for() -> None:
    """A picture whose colour says where it is: the part's corners tell its sides."""
    ramp = np.zeros((200, 200, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None], np.arange(200)[:, None]
    source = Source(200, 200, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), lambda: ramp)
    shares, forms = [], []
    for seed in range(200):
        seen = cropped(source, (100, 100), Augment(scale=0.75), np.random.default_rng(seed)).image.astype(float)
        wide, high = (seen[-1, -1, axis] - seen[0, 0, axis] for axis in (0, 1))
        shares.append(wide * high / 200**2)
        forms.append(wide / high)
    assert 0.22 < min(shares) < 0.35 and 0.8 < max(shares) <= 1
    assert 0.72 < min(forms) < 0.8 and 1.25 < max(forms) < 1.39


def test_an_item_is_the_same_whatever_the_cache_and_whoever_was_asked_before(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    samples = read_split(read(place), "train").samples
    augment = Augment(mosaic=0, mixup=0.5, degrees=10)
    found = []
    for kind in ("ram", "disk", "off"):
        images = ImageSet(samples, 32, augment, seed=3, cache=kind, crop=True)
        plain = images.at_epoch(0)
        plain.set_augment(None)  # as for the calibration of norms
        order: Callable[[list[int]], list[int]] = list if kind == "ram" else lambda indices: indices[::-1]
        items = {index: images.at_epoch(2)[index] for index in order(list(range(6)))}
        found.append([*(items[index] for index in range(6)), *(plain[index] for index in range(6))])
    for items in zip(*found, strict=True):
        assert all(torch.equal(item.image, items[0].image) for item in items)
        assert all(torch.equal(item.labels, items[0].labels) for item in items)
    assert {len(item.labels) for item in found[0]} == {1, 2}  # some are two in one
