"""COCO's instances JSON: crowds, gaps in ids, areas, where images are looked for, and lines of its entries."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from data.coco_json import SECTIONS, category_names, lines_of, read_json
from data.config import read_data_spec
from data.readers import read_split
from data.readers.labels import Split
from data.structures import Fault

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}]


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((20, 40, 3), 90, dtype=np.uint8))


def annotation(number: int, box: list[float], category: int = 3, picture: int = 1, **more: object) -> dict[str, object]:
    return {"id": number, "image_id": picture, "category_id": category, "bbox": box, **more}


def write(path: Path, annotations: list[dict[str, object]], names: tuple[str, ...] = ("0.png", "1.png")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}, indent=0))


def coco_set(folder: Path, *annotations: dict[str, object], yaml: str = "names: [cat, dog, cow]\n") -> Path:
    """Two images 40x20 and their JSON in ``annotations``; returns the data YAML."""
    for number in range(2):
        image(folder / f"train/{number}.png")
    write(folder / "annotations/instances_train.json", list(annotations))
    (folder / "data.yaml").write_text(f"train: annotations/instances_train.json\n{yaml}")
    return folder / "data.yaml"


def read(path: Path) -> Split:
    return read_split(read_data_spec(path), "train")


def test_boxes_crowds_areas_and_ids_are_read(tmp_path: Path) -> None:
    path = coco_set(
        tmp_path,
        annotation(1, [1, 2, 10, 5], 7, area=33.5, iscrowd=0),
        annotation(2, [0, 0, 40, 20], 3, area=700, iscrowd=1),
        annotation(3, [5, 5, 5, 5], 90, ignore=1),
        annotation(4, [2.5, 2, 4, 4], 3, 1),
        annotation(5, [2.5, 2, 4, 4], 3, 2, segmentation=[[1, 2, 3, 4, 5, 6]]),
    )
    split = read(path)
    one, two = split.samples
    assert split.category_ids == (3, 7, 90) and split.notes == ()
    assert (one.image_id, two.image_id) == (1, 2)
    assert (one.labels.tolist(), one.boxes.tolist()) == ([1, 0], [[1, 2, 11, 7], [2.5, 2, 6.5, 6]])
    assert one.areas is not None and (one.areas.tolist(), one.areas.dtype) == ([33.5, 16.0], np.float64)
    assert (one.ignored_labels.tolist(), one.ignored_crowd.tolist()) == ([0, 2], [True, False])
    assert one.ignored_boxes.tolist() == [[0, 0, 40, 20], [5, 5, 10, 10]]
    assert (two.labels.tolist(), len(two.ignored_labels)) == ([0], 0)


def test_names_may_come_from_the_json(tmp_path: Path) -> None:
    path = coco_set(tmp_path, annotation(1, [1, 2, 10, 5], 7), yaml="")
    assert read_data_spec(path).names == ("cat", "dog", "cow")  # in the order of their ids 3, 7, 90
    assert read(path).category_ids == (3, 7, 90)


def test_a_class_that_the_json_does_not_have_gets_an_id_of_its_own(tmp_path: Path) -> None:
    path = coco_set(tmp_path, annotation(1, [1, 2, 10, 5], 7), yaml="names: [dog, cat, horse, cow]\n")
    ids = read(path).category_ids
    assert ids is not None and ids[:2] == (7, 3) and ids[3] == 90 and ids[2] > 90


@pytest.mark.parametrize("where", ["annotations", ".", "images", "train", "images/train", "elsewhere"])
def test_images_are_found_in_the_usual_places(where: str, tmp_path: Path) -> None:
    write(tmp_path / "annotations/instances_train.json", [annotation(1, [1, 2, 3, 4])])
    image(tmp_path / where / "0.png")
    image(tmp_path / where / "1.png")
    more = "images: elsewhere\n" if where == "elsewhere" else ""
    (tmp_path / "data.yaml").write_text(f"train: annotations/instances_train.json\nnames: [cat]\n{more}")
    found = read(tmp_path / "data.yaml")
    assert [sample.path for sample in found.samples] == [tmp_path / where / name for name in ("0.png", "1.png")]


def test_folders_in_file_names_may_lie_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "train.json", [annotation(1, [1, 2, 3, 4])], ("train2017/0.png", "old\\1.png"))
    image(tmp_path / "images/0.png")
    image(tmp_path / "images/old/1.png")
    (tmp_path / "data.yaml").write_text("train: images\ntrain_json: train.json\nnames: [cat]\n")
    assert [sample.path.name for sample in read(tmp_path / "data.yaml").samples] == ["0.png", "1.png"]


def test_a_list_beside_the_json_chooses_and_orders_images(tmp_path: Path) -> None:
    write(
        tmp_path / "all.json", [annotation(1, [1, 2, 3, 4]), annotation(2, [5, 6, 7, 8], 7, 2)], ("a/0.png", "b/0.png")
    )
    for folder in "abc":
        image(tmp_path / folder / "0.png")
    (tmp_path / "train.txt").write_text("b/0.png\na/0.png\nc/0.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\ntrain_json: all.json\nnames: [cat, dog]\n")
    split = read(tmp_path / "data.yaml")
    assert [(sample.path.parent.name, sample.labels.tolist()) for sample in split.samples] == [("b", [1]), ("a", [0])]
    assert split.notes == (f"{tmp_path}/c/0.png: {tmp_path}/all.json lists several of this name (image left out)",)


def test_several_jsons_are_one_split(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        image(tmp_path / name / f"{number}.png")
        write(tmp_path / name / "labels.json", [annotation(1, [1, 2, 3 + number, 4])], (f"{number}.png",))
    (tmp_path / "data.yaml").write_text("train: [a/labels.json, b/labels.json]\nnames: [cat]\n")
    assert [sample.boxes.tolist() for sample in read(tmp_path / "data.yaml").samples] == [
        [[1, 2, 4, 6]],
        [[1, 2, 5, 6]],
    ]


def test_crowds_may_lie_on_boxes_but_a_box_counts_once(tmp_path: Path) -> None:
    box: list[float] = [1, 2, 10, 5]
    path = coco_set(tmp_path, annotation(1, box), annotation(2, box, iscrowd=1), annotation(3, box))
    (sample, _) = read(path).samples
    assert (len(sample.labels), len(sample.ignored_labels)) == (1, 1)
    (problem,) = read(path).problems
    assert problem.kind.title == "boxes given twice"


def test_names_that_are_no_names_are_told(tmp_path: Path) -> None:
    path = coco_set(tmp_path, annotation(1, [1, 2, 3, 4]), yaml="")
    for categories, message in (
        ([], ": there is no category; list the classes in the data YAML: names: [circle, square]"),
        (
            [{"id": "1", "name": "a"}],
            ":1: a category is {'id': '1', 'name': 'a'}; as {\"id\": 1, \"name\": \"circle\"} is right",
        ),
    ):
        json_path = tmp_path / "annotations/instances_train.json"
        json_path.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
        with pytest.raises(Fault) as fault:
            read_data_spec(path)
        assert str(fault.value) == f"{json_path}{message}"


def test_it_reads_what_pycocotools_reads(shared_data: Path) -> None:
    path = shared_data / "voc100_formats/gts/coco_format_v2/instances_v2.json"
    reference = COCO(str(path))
    names = category_names(path)
    data = read_data_spec(Path(__file__).resolve().parents[1] / "cfg/data/voc100-coco.yaml")
    data = type(data)(data.path, names, "coco", shared_data / "voc100_formats", str(path), images="images")
    split = read_split(data, "train")
    assert split.category_ids is not None and len(split.samples) == len(reference.imgs)
    for sample in split.samples:
        entries = reference.loadAnns(reference.getAnnIds(sample.image_id))
        expected = sorted((entry["category_id"], *entry["bbox"], entry["area"]) for entry in entries)
        assert sample.areas is not None
        x1, y1, x2, y2 = sample.boxes.T
        ids = [split.category_ids[label] for label in sample.labels]
        assert sorted(zip(ids, x1, y1, x2 - x1, y2 - y1, sample.areas, strict=True)) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30)
@given(
    st.fixed_dictionaries({name: st.lists(values, max_size=4) for name in SECTIONS}),
    values,
    st.sampled_from((0, 1, None)),
)
def test_every_entry_is_in_its_line(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, list[object]], other: object, indent: int | None
) -> None:
    """Entry by entry on lines of their own, the line is the number of line breaks before it."""
    path = tmp_path_factory.getbasetemp() / "lines.json"
    text = json.dumps({"info": other, **content}, indent=indent)
    path.write_text(text)
    assert read_json(path) == content
    for section in SECTIONS:
        lines = lines_of(path, section)
        assert len(lines) == len(content[section])
        for line, entry in zip(lines, content[section], strict=True):
            rest = "\n".join(text.split("\n")[line - 1 :])
            assert json.dumps(entry, indent=indent).split("\n")[0] in rest.split("\n")[0]
        if indent is None:
            assert set(lines) <= {1}
        elif content[section]:
            assert lines == sorted(set(lines))
