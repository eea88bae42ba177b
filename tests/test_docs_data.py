"""``docs/data.md`` is true: every fault of its table is made here and gives the message that stands there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.__main__ import _parser
from data.check import check
from data.config import KEYS, read_data_spec
from data.readers import read_split
from data.structures import Fault

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text()
GOOD = "0 .5 .5 .5 .5\n"
YOLO = "train: images/train\nnames: [cat, dog]\n"


def rows() -> list[list[str]]:
    part = TEXT.partition("\n| fault |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))


def yolo(label: str | bytes, yaml: str = YOLO, other: str | None = GOOD, suffix: str = "png") -> Callable[[Path], None]:
    """Two images 40x20; the labels of the first and of the second."""

    def make(folder: Path) -> None:
        (folder / "labels/train").mkdir(parents=True)
        for number, text in enumerate((label, other)):
            picture(folder / f"images/train/{number}.{suffix}")
            if text is not None:
                data = text if isinstance(text, bytes) else text.encode()
                (folder / f"labels/train/{number}.txt").write_bytes(data)
        (folder / "data.yaml").write_text(yaml)

    return make


def then(make: Callable[[Path], None], change: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        make(folder)
        change(folder)

    return both


def voc(second: str, start: str = "<annotation>\n<size/>\n", end: str = "</annotation>") -> Callable[[Path], None]:
    """Two images; the first has a good object in line 3 and another in line 6."""

    def make(folder: Path) -> None:
        (folder / "labels").mkdir(parents=True)
        good = "<object>\n<name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>\n"
        good += "</object>\n"
        for number, text in enumerate((start + good + second + end, f"<annotation>{good}</annotation>")):
            picture(folder / f"images/{number}.png")
            (folder / f"labels/{number}.xml").write_text(text)
        (folder / "data.yaml").write_text("train: images\nformat: voc\nannotations: labels\nnames: [cat, dog]\n")

    return make


def box(name: str, *corners: object) -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    inside = "".join(f"<{tag}>{corner}</{tag}>" for tag, corner in zip(tags, corners, strict=True) if corner != "")
    return f"<object>\n<name>{name}</name><bndbox>{inside}</bndbox></object>\n"


def coco(second: dict[str, object], image: str = "") -> Callable[[Path], None]:
    """Two images in lines 3 and 4, annotations in 7 and 8, categories in 11 to 13."""

    def make(folder: Path) -> None:
        for number in range(2):
            picture(folder / f"images/{number}.png")
        first = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
        images = ['{"id": 1, "file_name": "0.png", "width": 40}', '{"id": 2, "file_name": "1.png"}']
        images = [image, images[1]] if '"id": 1, "file_name": "0' in image else [images[0], image or images[1]]
        sections = {
            "images": images,
            "annotations": [json.dumps(first), json.dumps({**first, "id": 2, **second})],
            "categories": [json.dumps({"id": n, "name": name}) for n, name in ((1, "cat"), (4, "dog"), (7, "cow"))],
        }
        text = ",\n".join(f'"{name}": [\n' + ",\n".join(entries) + "\n]" for name, entries in sections.items())
        (folder / "train.json").write_text(f"{{\n{text}\n}}")
        (folder / "data.yaml").write_text("train: train.json\nimages: images\nnames: [cat, dog]\n")

    return make


def write(name: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


LISTED = "train: train.txt\nnames: [cat, dog]\n"
FAULTS: dict[str, Callable[[Path], None]] = {
    "a YAML key that is not known": yolo(GOOD, "train: images/train\nnaems: [cat, dog]\n"),
    "`nc` that is not the number of names": yolo(GOOD, "train: images/train\nnc: 3\nnames: [cat, dog]\n"),
    "the data set is not there": yolo(GOOD, f"path: gone\ndownload: sh get.sh\n{YOLO}"),
    "a folder is not there": yolo(GOOD, YOLO.replace("train\n", "trian\n")),
    "a folder without an image": then(
        yolo(GOOD, YOLO.replace("images/train", "empty")), lambda folder: (folder / "empty").mkdir()
    ),
    "an empty list": then(yolo(GOOD, LISTED), write("train.txt", "\n")),
    "no image has labels": then(
        yolo(GOOD), lambda folder: [file.unlink() for file in (folder / "labels/train").iterdir()]
    ),
    "not one good line": yolo("0 0\n", other="1 2 3\n"),
    "YOLO: missing fields": yolo(f"{GOOD}0 .5 .5 .5\n"),
    "YOLO: not numbers": yolo(f"{GOOD}cat .5 .5 .1 .1\n"),
    "YOLO: a class without a name": yolo(f"{GOOD}2 .5 .5 .1 .1\n"),
    "YOLO: pixels for fractions": yolo(f"{GOOD}0 20 10 8 4\n"),
    "YOLO: not a number after all": yolo(f"{GOOD}0 .5 nan .1 .1\n"),
    "YOLO: not a text file": yolo(b"\xff\xfe\x00\x80"),
    "VOC: a class without a name": voc(box("dgo", 1, 2, 3, 4)),
    "VOC: a corner is missing": voc(box("dog", 1, 2, "", 4)),
    "VOC: a corner is no number": voc(box("dog", "a", 2, 3, 4)),
    "VOC: corners the wrong way round": voc(box("dog", 9, 2, 3, 4)),
    "VOC: broken xml": voc("", "<annotation>\n<size>\n</annotation>"),
    "VOC: an xml with entities": voc("", '<!DOCTYPE a [<!ENTITY b "b">]><annotation>'),
    "COCO: not JSON": then(coco({}), write("train.json", '{\n"images":\n]')),
    "COCO: another JSON": then(coco({}), write("train.json", '{"boxes": []}')),
    "COCO: none of the classes": then(
        coco({}),
        write(
            "train.json",
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "Cat"}, {"id": 2, "name": "Dog"}]}',
        ),
    ),
    "COCO: a class without a name": coco({"category_id": 7}),
    "COCO: a category without an entry": coco({"category_id": 9}),
    "COCO: a wrong box": coco({"bbox": [1, 2, "a", 4]}),
    "COCO: corners for width and height": coco({"bbox": [9, 2, -6, 2]}),
    "COCO: labels of an unknown image": coco({"image_id": 9}),
    "COCO: an image that is not there": coco({"bbox": [9, 9, 1, 1]}, '{"id": 2, "file_name": "7.png"}'),
    "COCO: an id given twice": coco({"bbox": [9, 9, 1, 1]}, '{"id": 1, "file_name": "1.png"}'),
    "COCO: an image of another size": coco(
        {"bbox": [9, 9, 1, 1]}, '{"id": 1, "file_name": "0.png", "width": 80, "height": 40}'
    ),
    "no image is there": then(coco({}), write("data.yaml", "train: train.json\nimages: nowhere\nnames: [cat, dog]\n")),
    "a box without area": yolo(f"{GOOD}0 .5 .5 0 .1\n"),
    "a box outside its image": voc(box("dog", 50, 2, 60, 9)),
    "a box reaching out of its image": voc(box("dog", 30, 2, 60, 9)),
    "a box given twice": yolo(f"{GOOD}1 .5 .5 .1 .1\n{GOOD}"),
    "an image without a label file": yolo(GOOD, other=None),
    "a file that is no image": then(yolo(GOOD), write("images/train/1.png", "no image")),
    "a list names an image that is not there": then(
        yolo(GOOD, LISTED), write("train.txt", "images/train/0.png\nimages/train/7.png\n")
    ),
    "an image that ends in the middle": then(
        yolo(GOOD, suffix="jpg"),
        lambda folder: write("images/train/1.jpg", (folder / "images/train/1.jpg").read_bytes()[:-40])(folder),
    ),
    "a label file without an image": then(yolo(GOOD), write("labels/train/2.txt", GOOD)),
}


def told(path: Path) -> list[str]:
    """What a run says: the lines of the fault that stops it, else its notes."""
    try:
        return list(read_split(read_data_spec(path), "train").notes)
    except Fault as fault:
        return ["stop", *fault.lines]


def test_every_fault_of_the_table_is_made() -> None:
    assert [row[0] for row in rows()] == list(FAULTS) and len(FAULTS) >= 30


@pytest.mark.parametrize(("fault", "message", "outcome"), rows(), ids=[row[0] for row in rows()])
def test_a_fault_gives_its_message(fault: str, message: str, outcome: str, tmp_path: Path) -> None:
    FAULTS[fault](tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    lines = [line.replace(f"{tmp_path}/", "") for line in told(tmp_path / "data.yaml")]
    expected = message.strip("`")
    if outcome.startswith("the run stops"):
        assert lines[:2] == ["stop", expected]
        assert (len(lines) > 2) == ("lines that follow" in outcome)
    elif fault in list(FAULTS)[-2:]:
        assert lines == []
        problems = check(tmp_path / "data.yaml").lost
        assert [str(problem).replace(f"{tmp_path}/", "") for problem in problems] == [f"{expected} ({outcome})"]
    else:
        assert lines == [f"{expected} ({outcome})"]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_every_key_stands_there() -> None:
    table = TEXT.partition("| key |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:]))
    assert sorted(named) == sorted(set(KEYS) - {"roboflow"}) and "`roboflow:`" in TEXT


def test_the_commands_are_commands() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "data"] and _parser().parse_args(words[3:])


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL))
def test_the_yamls_are_data_yamls(text: str, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    if "names" not in text:
        text += "names: [cat]\n"
    (tmp_path / "a/b/data.yaml").write_text(text)
    assert read_data_spec(tmp_path / "a/b/data.yaml").sources("train")
