"""Labels on disk: the same boxes in two formats, real dirt, and what is said about wrong lines."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.config import DataSpec, read_data_spec
from data.images import image_size, read_image
from data.readers import read_split
from data.structures import Fault

ROOT = Path(__file__).resolve().parents[1]


def image(path: Path, width: int = 40, height: int = 20) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, dtype=np.uint8))
    return path


def yolo_set(folder: Path, *labels: str | None) -> DataSpec:
    """Images 40x20, one a label text; None for no label file."""
    (folder / "labels/train").mkdir(parents=True)
    for number, text in enumerate(labels):
        image(folder / f"images/train/{number}.png")
        if text is not None:
            (folder / f"labels/train/{number}.txt").write_text(text)
    return DataSpec(folder / "data.yaml", ("cat", "dog"), "yolo", folder, train="images/train")


def xml(*objects: tuple[str, tuple[object, object, object, object]]) -> str:
    text = "<annotation>\n<size><width>0</width><height>0</height></size>\n"
    for name, (x1, y1, x2, y2) in objects:
        text += f"<object>\n<name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        text += f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n</object>\n"
    return text + "</annotation>\n"


def voc_set(folder: Path, *labels: str) -> DataSpec:
    """Images 40x20 with their xml beside them."""
    for number, text in enumerate(labels):
        image(folder / f"{number}.png")
        (folder / f"{number}.xml").write_text(text)
    return DataSpec(folder / "data.yaml", ("cat", "dog"), "voc", folder, train=".")


def fault_of(data: DataSpec, split: str = "train") -> list[str]:
    with pytest.raises(Fault) as fault:
        read_split(data, split)
    return [line.replace(f"{data.root}/", "") for line in fault.value.lines]


def notes_of(data: DataSpec, split: str = "train") -> list[str]:
    return [line.replace(f"{data.root}/", "") for line in read_split(data, split).notes]


# --- YOLO -----------------------------------------------------------------------------------------------------------


def test_yolo_fractions_become_pixels(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "1 0.5 0.5 0.5 0.2\n\n0.0 0.1 0.25 0.2 0.5\n")
    (sample,) = read_split(data, "train").samples
    np.testing.assert_allclose(sample.boxes, [[10, 8, 30, 12], [0, 0, 8, 10]], atol=1e-5)
    assert (sample.labels.tolist(), sample.boxes.dtype, sample.labels.dtype) == ([1, 0], np.float32, np.int64)
    assert sample.path == tmp_path / "images/train/0.png"


def test_every_wrong_yolo_line_is_told_and_loses_one_box(tmp_path: Path) -> None:
    lines = ["0 .5 .5 .5", "x .5 .5 .1 .1", "2 .5 .5 .1 .1", "0.5 .5 .5 .1 .1", "0 1.2 .5 .1 .1", "0 .5 nan .1 .1"]
    data = yolo_set(tmp_path, "\n".join([*lines, "1 .5 .5 .5 .2"]), "0 .5 .5 -.1 .1")
    split = read_split(data, "train")
    assert [sample.labels.tolist() for sample in split.samples] == [[1], []]
    assert [f"{problem.where}: {problem.text}".replace(f"{tmp_path}/", "") for problem in split.problems] == [
        "labels/train/0.txt:1: found 4 fields; 5 are right: class cx cy width height",
        "labels/train/0.txt:2: 'x .5 .5 .1 .1' are not five numbers; class cx cy width height is right",
        "labels/train/0.txt:3: class 2 is out of range; there are 2 names, so 0 to 1 is right",
        "labels/train/0.txt:4: class 0.5 is out of range; there are 2 names, so 0 to 1 is right",
        "labels/train/0.txt:5: cx is 1.2; a fraction of the image's size, 0 to 1, is right",
        "labels/train/0.txt:6: cy is nan; a fraction of the image's size, 0 to 1, is right",
        "labels/train/1.txt:1: width is -.1; a fraction of the image's size, 0 to 1, is right",
    ]


def test_a_split_without_a_good_line_is_a_fault(tmp_path: Path) -> None:
    lines = fault_of(yolo_set(tmp_path, "0 0\n" * 25))
    assert lines[0] == "data.yaml: train: nothing can be used"
    assert (len(lines), lines[-1]) == (22, "... and 5 more")


def test_many_notes_of_a_kind_are_counted(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "0 .5 .5 .5 .5\n" + "0 0\n" * 8, "1 .5 .5 .5 .5\n4 .5 .5 .5 .5")
    wrong = "found 2 fields; 5 are right: class cx cy width height (box left out)"
    assert notes_of(data) == [
        *(f"labels/train/0.txt:{line}: {wrong}" for line in (2, 3, 4)),
        "... and 5 more lines that are no box (box left out); python -m data check data.yaml lists all",
        "labels/train/1.txt:2: class 4 is out of range; there are 2 names, so 0 to 1 is right (box left out)",
    ]
    assert len(read_split(data, "train").problems) == 9


def test_boxes_are_clipped_left_out_and_noted(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "0 0 .5 .5 .5\n0 .5 .5 0 .1\n0 .5 .5 .1 .1\n0 .5 .5 .1 .1\n1 .5 .5 .1 .1", None, "")
    split = read_split(data, "train")
    np.testing.assert_allclose(split.samples[0].boxes, [[0, 5, 10, 15], [18, 9, 22, 11], [18, 9, 22, 11]], atol=1e-5)
    assert split.samples[0].labels.tolist() == [0, 0, 1]
    assert [sample.boxes.shape for sample in split.samples[1:]] == [(0, 4), (0, 4)]
    assert notes_of(data) == [
        "labels/train/0.txt:1: the box from -10, 5 to 10, 15 reaches out of the image of 40x20 pixels (box clipped)",
        "labels/train/0.txt:2: the box from 20, 9 to 20, 11 has no area (box left out)",
        "labels/train/0.txt:4: the same box of the same class as at labels/train/0.txt:3 (box left out)",
        "images/train/1.png: there is no label file labels/train/1.txt (taken as without objects)",
    ]


def test_rounded_edges_are_no_fault(tmp_path: Path) -> None:
    split = read_split(yolo_set(tmp_path, "0 0.50005 0.5 1.0001 1"), "train")
    np.testing.assert_array_equal(split.samples[0].boxes, [[0, 0, 40, 20]])
    assert split.notes == ()


def test_a_split_where_no_image_has_labels_is_a_fault(tmp_path: Path) -> None:
    (line,) = fault_of(yolo_set(tmp_path, None, None))
    message = "data.yaml: train: not one of the 2 images has a label file; the first was looked for at "
    assert line == message + "labels/train/0.txt"


def test_a_list_names_its_images(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "0 .5 .5 .5 .5", "1 .5 .5 .5 .5")
    (tmp_path / "val.txt").write_text("./images/train/1.png\n\nimages/train/0.png\n")
    (tmp_path / "bad.txt").write_text("images/train/0.png\nimages/train/7.png\n")
    (tmp_path / "worse.txt").write_text("images/train/7.png\nimages/train/8.png\n")
    data = DataSpec(data.path, data.names, "yolo", data.root, val=("val.txt", "val.txt"), test="bad.txt")
    assert [sample.labels.tolist() for sample in read_split(data, "val").samples] == [[1], [0], [1], [0]]
    assert [sample.labels.tolist() for sample in read_split(data, "test").samples] == [[0]]
    assert notes_of(data, "test") == ["bad.txt:2: there is no image images/train/7.png (image left out)"]
    worse = DataSpec(data.path, data.names, "yolo", data.root, val="worse.txt")
    assert fault_of(worse, "val") == [
        "worse.txt: not one of the 2 images of the list is there; the first is images/train/7.png"
    ]
    assert fault_of(data, "train") == ["data.yaml: there is no 'train' entry; add one, as train: images/train"]


def test_a_missing_or_empty_folder_is_a_fault(tmp_path: Path) -> None:
    data = DataSpec(Path("d.yaml"), ("a",), "yolo", tmp_path, train="none", val="empty")
    (tmp_path / "empty").mkdir()
    assert fault_of(data) == ["d.yaml: none does not exist; a folder of images or a .txt list of images is right"]
    assert fault_of(data, "val")[0].startswith("d.yaml: there is no image in empty; images end in .jpg")
    gone = DataSpec(Path("d.yaml"), ("a",), "yolo", tmp_path / "gone", train="t", download="python -m data shapes gone")
    assert fault_of(gone) == [
        f"d.yaml: the folder {tmp_path}/gone does not exist; get it with: python -m data shapes gone"
    ]


def test_an_unreadable_image_loses_itself(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "", "", "0 .5 .5 .5 .5")
    (tmp_path / "images/train/0.png").write_bytes(b"no image")
    (tmp_path / "images/train/1.png").write_bytes(b"\xff\xd8\xff")
    right = "cannot be read as an image; save it again as JPEG or PNG, or remove it (image left out)"
    assert notes_of(data) == [f"images/train/{i}.png: {right}" for i in (0, 1)]
    assert [sample.path.name for sample in read_split(data, "train").samples] == ["2.png"]
    (tmp_path / "images/train/2.png").write_bytes(b"")
    assert fault_of(data)[0] == "data.yaml: train: nothing can be used"


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    data = yolo_set(tmp_path, "0 .5 .5 .5 .5")
    (tmp_path / "images/train/._0.png").write_bytes(b"what some systems leave beside a file")
    (tmp_path / "images/train/.ipynb_checkpoints").mkdir()
    image(tmp_path / "images/train/.ipynb_checkpoints/0-checkpoint.png")
    split = read_split(data, "train")
    assert split.notes == () and len(split.samples) == 1


@pytest.mark.parametrize("encoding", ["GBK", "Shift_JIS", "foo"])
def test_an_xml_of_an_encoding_that_is_not_known_costs_one_image(tmp_path: Path, encoding: str) -> None:
    good = xml(("dog", (1, 2, 12, 13)))
    data = voc_set(tmp_path, f'<?xml version="1.0" encoding="{encoding}"?>{good}', good)
    split = read_split(data, "train")
    assert len(split.samples) == 1 and "save it as UTF-8" in split.notes[0]


def test_a_box_that_float32_makes_nothing_of_is_none(tmp_path: Path) -> None:
    split = read_split(yolo_set(tmp_path, "0 .5 .5 1e-9 1e-9\n0 .5 .5 .5 .5"), "train")
    assert len(split.samples[0].boxes) == 1 and "has no area" in split.notes[0]


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b/0.png", "b-1/0.png", "b.png", "a/z.jpg", "a/y/1.PNG"):
        image(tmp_path / "images" / name)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/b.txt").write_text("0 .5 .5 .5 .5")
    data = DataSpec(tmp_path / "data.yaml", ("cat",), "yolo", tmp_path, train="images")
    found = [sample.path for sample in read_split(data, "train").samples]
    assert found == sorted(found) and len(found) == 5


# --- VOC ------------------------------------------------------------------------------------------------------------


def test_voc_pixels_are_taken_as_written(tmp_path: Path) -> None:
    data = voc_set(tmp_path, xml(("dog", (1, 2, 12.0, 13)), ("cat", (-5, 0, 40, 25))))
    split = read_split(data, "train")
    np.testing.assert_array_equal(split.samples[0].boxes, [[1, 2, 12, 13], [0, 0, 40, 20]])
    assert split.samples[0].labels.tolist() == [1, 0]
    assert notes_of(data) == [
        "0.xml:6: the box from -5, 0 to 40, 25 reaches out of the image of 40x20 pixels (box clipped)"
    ]


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    text = xml(("dog", (1, 2, 12, 13)), ("cat", (3, 4, 9, 19)), ("dog", (0, 0, 5, 5)))
    text = text.replace("<name>cat</name>", "<name>cat</name><difficult> 1 </difficult>")
    (sample,) = read_split(
        voc_set(tmp_path, text.replace("<name>", "<difficult>0</difficult><name>", 1)), "train"
    ).samples
    assert (sample.labels.tolist(), sample.ignored_labels.tolist()) == ([1, 1], [0])
    assert (sample.ignored_boxes.tolist(), sample.ignored_crowd.tolist()) == ([[3, 4, 9, 19]], [False])
    assert sample.ignored_boxes.dtype == np.float32 and sample.areas is None and sample.image_id is None


def test_a_part_of_an_object_is_no_object(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
    split = read_split(voc_set(tmp_path, xml(("dog", (1, 2, 12, 13))).replace("</object>", part)), "train")
    np.testing.assert_array_equal(split.samples[0].boxes, [[1, 2, 12, 13]])


def test_every_wrong_voc_object_is_told(tmp_path: Path) -> None:
    boxes = xml(("dgo", (1, 2, 3, 4)), ("dog", ("a", 2, 3, 4)), ("dog", (9, 2, 3, 4)), ("dog", (1, 2, "inf", 4)))
    missing = xml(("cat", (1, 2, 3, 4)), ("dog", (1, 2, 3, 4))).replace("<xmax>3</xmax>", "", 1)
    data = voc_set(tmp_path, boxes, missing, "<annotation>\n<object>", xml())
    assert [sample.labels.tolist() for sample in read_split(data, "train").samples] == [[], [1], []]
    problems = [f"{problem.where}: {problem.text}" for problem in read_split(data, "train").problems]
    assert [line.replace(f"{tmp_path}/", "") for line in problems] == [
        "0.xml:3: class 'dgo' is not among the names of the data YAML; did you mean 'dog'?",
        "0.xml:6: xmin 'a', ymin '2', xmax '3', ymax '4': not four numbers; pixels are right",
        "0.xml:9: the box is [9.0, 2.0, 3.0, 4.0]; xmin <= xmax and ymin <= ymax are right",
        "0.xml:12: the box is [1.0, 2.0, inf, 4.0]; finite pixels are right",
        "1.xml:3: the object has no bndbox/xmax; xmin, ymin, xmax, ymax are right",
        "2.xml:2: not well-formed xml: no element found",
    ]


def test_an_entity_bomb_is_refused(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE a [<!ENTITY b "b"><!ENTITY c "&b;&b;">]>\n' + xml(("&c;", (1, 2, 3, 4)))
    data = voc_set(tmp_path, bomb, xml(("dog", (1, 2, 3, 4))))
    assert notes_of(data) == ["0.xml:1: the xml declares a DOCTYPE; remove it, labels need none (image left out)"]
    assert len(read_split(data, "train").samples) == 1


def test_a_box_outside_its_image_is_left_out_and_noted(tmp_path: Path) -> None:
    data = voc_set(tmp_path, xml(("dog", (50, 2, 60, 9)), ("dog", (1, 1, 9, 9))))
    assert len(read_split(data, "train").samples[0].boxes) == 1
    assert notes_of(data) == [
        "0.xml:3: the box from 50, 2 to 60, 9 is wholly outside the image of 40x20 pixels (box left out)"
    ]


def test_voc_lists_hold_ids(tmp_path: Path) -> None:
    image(tmp_path / "JPEGImages/a.1.jpg")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/a.1.xml").write_text(xml(("dog", (1, 2, 3, 4))))
    (tmp_path / "train.txt").write_text("a.1\n")
    (tmp_path / "val.txt").write_text("a.1\nb\n")
    text = "train: train.txt\nval: val.txt\nformat: voc\nimages: JPEGImages\nannotations: Annotations\nnames: [dog]\n"
    (tmp_path / "data.yaml").write_text(text)
    data = read_data_spec(tmp_path / "data.yaml")
    assert read_split(data, "train").samples[0].boxes.tolist() == [[1, 2, 3, 4]]
    assert notes_of(data, "val") == ["val.txt:2: there is no image JPEGImages/b (image left out)"]


# --- image headers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_size_is_that_of_the_decoded_image(suffix: str, tmp_path: Path) -> None:
    path = image(tmp_path / f"a.{suffix}", 37, 21)
    assert image_size(path) == (37, 21) == read_image(path).shape[1::-1]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_turned_photo_has_the_size_that_is_seen(order: str, orientation: int, tmp_path: Path) -> None:
    path = image(tmp_path / "a.jpg", 37, 21)
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(
        order + "IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0
    )
    exif = b"Exif\0\0" + tiff
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    assert image_size(path) == read_image(path).shape[1::-1] == ((21, 37) if orientation >= 5 else (37, 21))


def test_a_turned_png_too(tmp_path: Path) -> None:
    path = image(tmp_path / "a.png", 37, 21)
    body = b"eXIf" + b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    png = path.read_bytes()
    path.write_bytes(
        png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]
    )
    assert image_size(path) == read_image(path).shape[1::-1]


# --- real data ------------------------------------------------------------------------------------------------------


def real(shared_data: Path, name: str, folder: str) -> DataSpec:
    return replace(read_data_spec(ROOT / "cfg/data" / f"{name}.yaml"), root=shared_data / folder)


def test_the_same_images_in_three_formats_agree_within_a_pixel(shared_data: Path) -> None:
    names = ("voc100", "voc100-coco", "voc100-yolo")
    voc, coco, yolo = (read_split(real(shared_data, name, "voc100_formats"), "train") for name in names)
    assert len(voc.samples) == len(coco.samples) == len(yolo.samples) == 100
    assert (voc.notes, coco.notes, yolo.notes) == ((), (), ())
    assert sum(len(sample.labels) for sample in voc.samples) == 235
    assert sum(len(sample.ignored_labels) for sample in voc.samples) == 38
    assert sum(len(sample.labels) for sample in yolo.samples) == 273
    by_name = {sample.path.name: sample for sample in coco.samples}
    for one, other in zip(voc.samples, yolo.samples, strict=True):
        boxes, labels = np.concatenate([one.boxes, one.ignored_boxes]), np.concatenate([one.labels, one.ignored_labels])
        for sample in (other, by_name[one.path.name]):
            order, other_order = (
                np.lexsort((*b.round().T, c)) for b, c in ((boxes, labels), (sample.boxes, sample.labels))
            )
            np.testing.assert_array_equal(labels[order], sample.labels[other_order])
            np.testing.assert_allclose(boxes[order], sample.boxes[other_order], atol=1)


def test_the_two_boxes_without_area_of_bccd_are_left_out(shared_data: Path) -> None:
    data = replace(real(shared_data, "bccd", "bccd/BCCD"), train="ImageSets/Main/trainval.txt")
    split = read_split(data, "train")
    assert (len(split.samples), sum(len(sample.labels) for sample in split.samples)) == (292, 3941)
    lines = (
        "BloodImage_00338.xml:158: the box from 504, 337 to 504, 337",
        "BloodImage_00343.xml:50: the box from 181, 329 to 181, 329",
    )
    assert sorted(notes_of(data)) == [f"Annotations/{line} has no area (box left out)" for line in lines]


def test_the_0x0_sizes_of_fruit_do_no_harm(shared_data: Path) -> None:
    splits = [read_split(real(shared_data, "fruit", "fruit"), split) for split in ("train", "val")]
    assert [len(split.samples) for split in splits] == [240, 60]
    assert sum(len(sample.labels) for split in splits for sample in split.samples) == 582
    assert all(split.notes == () for split in splits)
