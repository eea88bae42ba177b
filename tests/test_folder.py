"""A folder of labelled photos without a data YAML: what it is, and what is told where that is not clear."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.__main__ import main
from data.config import read_data_spec
from data.folder import folder_spec
from data.readers import read_split
from data.split import split_data
from data.structures import Fault

OBJECT = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"


def photos(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:  # each of its own grey, since copies stay together
        assert cv2.imwrite(str(folder / name), np.full((20, 40, 3), sum(name.encode()) % 256, np.uint8))


def xml(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{''.join(map(OBJECT.format, names))}</annotation>")


def instances(path: Path, *files: str, names: tuple[str, ...] = ("pear", "apple")) -> None:
    """Categories with ids 7, 3, ...; one box of the first for each image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [7, 3, 5][: len(names)]
    images = [{"id": k, "file_name": file, "width": 40, "height": 20} for k, file in enumerate(files)]
    boxes = [{"id": k, "image_id": k, "category_id": ids[0], "bbox": [1, 2, 8, 6]} for k in range(len(files))]
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def test_xmls_beside_their_images(tmp_path: Path) -> None:
    photos(tmp_path, "a.jpg", "b.png", "background.jpg")
    photos(tmp_path / "more", "c.jpg")
    xml(tmp_path / "a.xml", "pear", "apple")
    xml(tmp_path / "b.xml")
    xml(tmp_path / "more" / "c.xml", "apple")
    spec = folder_spec(tmp_path)
    assert (spec.names, spec.format, spec.train, spec.annotations) == (("apple", "pear"), "voc", (".",), None)
    found = {sample.path.name: sample.labels.tolist() for sample in read_split(spec, "train").samples}
    assert found == {"a.jpg": [1, 0], "b.png": [], "background.jpg": [], "c.jpg": [0]}


def test_the_folders_of_voc_and_no_other_images(tmp_path: Path) -> None:
    photos(tmp_path / "JPEGImages", "a.jpg", "b.jpg")
    photos(tmp_path / "SegmentationClass", "z.png")
    xml(tmp_path / "Annotations" / "a.xml", "pear")
    xml(tmp_path / "Annotations" / "b.xml", "pear")
    spec = folder_spec(tmp_path)
    assert (spec.train, spec.annotations, spec.names) == (("JPEGImages",), "Annotations", ("pear",))
    assert [sample.labels.tolist() for sample in read_split(spec, "train").samples] == [[0], [0]]


@pytest.mark.parametrize("place", ["annotations/instances_train.json", "_annotations.coco.json", "images/labels.json"])
def test_a_coco_json_wherever_it_lies(place: str, tmp_path: Path) -> None:
    photos(tmp_path / "images", "a.jpg", "b.jpg")
    (tmp_path / "settings.json").write_text('{"version": 1}')
    instances(tmp_path / place, "a.jpg", "b.jpg")
    spec = folder_spec(tmp_path)
    assert (spec.names, spec.format, spec.train, spec.train_json) == (("apple", "pear"), "coco", ("images",), (place,))
    assert [sample.labels.tolist() for sample in read_split(spec, "train").samples] == [[1], [1]]


def test_several_jsons_of_one_data_set(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        photos(tmp_path / name, f"{name}.jpg")
        instances(tmp_path / name / "_annotations.coco.json", f"{name}.jpg")
    spec = folder_spec(tmp_path)
    assert spec.train == ("train", "valid")
    assert [sample.path.name for sample in read_split(spec, "train").samples] == ["train.jpg", "valid.jpg"]
    made = split_data(tmp_path, tmp_path / "mine", {"train": 1, "val": 1})
    assert "&" not in made.read_text() and read_data_spec(made).jsons("val") == spec.jsons("train")


def nothing(_: Path) -> None: ...


def no_labels(place: Path) -> None:
    photos(place, "a.jpg")
    (place / "a.txt").write_text("0 .5 .5 .2 .2\n")


def two_kinds(place: Path) -> None:
    photos(place, "a.jpg")
    xml(place / "a.xml", "pear")
    instances(place / "b.json", "a.jpg")


def far_apart(place: Path) -> None:
    photos(place / "photos", "a.jpg", "b.jpg")
    xml(place / "x" / "a.xml", "pear")
    xml(place / "y" / "b.xml", "pear")


def other_names(place: Path) -> None:
    photos(place, "a.jpg")
    xml(place / "labels" / "b.xml", "pear")


def no_objects(place: Path) -> None:
    photos(place, "a.jpg")
    xml(place / "a.xml")


def unlike(place: Path) -> None:
    photos(place, "a.jpg", "b.jpg")
    instances(place / "a.json", "a.jpg")
    instances(place / "b.json", "b.jpg", names=("pear", "plum"))


def unlisted(place: Path) -> None:
    photos(place, "a.jpg")
    instances(place / "a.json", "b.jpg")


UNCLEAR = {
    nothing: "there is no image in it; images end in ",
    no_labels: "has 1 images and no labels, neither a VOC xml for an image nor COCO's instances JSON; labels in YOLO's",
    two_kinds: "has labels twice, as a.xml and as b.json; write a data YAML",
    far_apart: "its xmls lie neither beside their images nor in one folder, but in x and y; write a data YAML",
    other_names: "not one of its 1 images is called as an xml; b.xml has none",
    no_objects: "there is no object with a name in its 1 xmls, as of a.xml",
    unlike: "a.json and b.json have different categories; write a data YAML",
    unlisted: "not one of its 1 images is listed in a.json",
}


@pytest.mark.parametrize("make", UNCLEAR, ids=lambda make: make.__name__)
def test_what_is_not_clear_is_told(make: object, tmp_path: Path) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(Fault) as fault:
        folder_spec(tmp_path)
    assert str(fault.value).startswith(f"{tmp_path}: {UNCLEAR[make]}")  # type: ignore[index]


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_a_folder_is_checked_divided_and_trained_on(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"{number}.jpg" for number in range(10)]
    photos(tmp_path / "photos", *files)
    if kind == "voc":
        for file in files:
            xml(tmp_path / "photos" / f"{file[:-4]}.xml", "pear")
    else:
        instances(tmp_path / "photos" / "all.json", *files, names=("pear",))
    assert main(["check", str(tmp_path / "photos")]) == 0
    assert main(["split", str(tmp_path / "photos"), "train=0.8", "val=0.2", "-o", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.endswith(f"found 1 class: pear\nready: {tmp_path / 'mine' / 'data.yaml'}\n")
    made = read_data_spec(tmp_path / "mine" / "data.yaml")
    parts = [read_split(made, name).samples for name in ("train", "val")]
    assert sorted(sample.path.name for part in parts for sample in part) == files
    assert all(sample.labels.tolist() == [0] for part in parts for sample in part)


def test_where_a_data_yaml_is_needed_a_folder_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(Fault) as fault:
        read_data_spec(tmp_path)
    how = f"python -m data split {tmp_path} train=0.8 val=0.2 -o FOLDER makes one of photos with VOC or COCO labels"
    assert str(fault.value) == f"{tmp_path}: a folder, where a data YAML is right; {how}"
