"""The data YAML: what it means, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.config import read_data_spec
from data.structures import Fault

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> Path:
    path = folder / "data.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "cfg/data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_yaml_reads(path: Path) -> None:
    spec = read_data_spec(path)
    assert spec.sources("train") and len(spec.names) >= 3


def test_folder_is_relative_to_the_yaml_itself(tmp_path: Path) -> None:
    spec = read_data_spec(write(tmp_path, "path: ../other\ntrain: images\nnames: {1: b, 0: a}\nnc: 2\n"))
    assert spec.root == tmp_path.parent / "other"
    assert spec.names == ("a", "b")
    assert (spec.train, spec.val, spec.format) == ("images", None, "yolo")


def test_yamls_of_other_programs_read(tmp_path: Path) -> None:
    text = "path: .\ntrain: [images/a, images/b]\nval: ../valid/images\ntest:\nnc: 2\nnames: ['a', 'b']\n"
    (tmp_path / "valid/images").mkdir(parents=True)
    spec = read_data_spec(write(tmp_path, text + "roboflow:\n  workspace: w\n  version: 3\n"))
    assert spec.sources("train") == (tmp_path / "images/a", tmp_path / "images/b")
    assert (spec.sources("val"), spec.sources("test"), spec.test) == ((tmp_path / "valid/images",), (), None)


def test_a_json_makes_it_coco(tmp_path: Path) -> None:
    spec = read_data_spec(write(tmp_path, "train: a/instances.json\nnames: [a]\n"))
    assert (spec.format, spec.jsons("train")) == ("coco", (tmp_path / "a/instances.json",))
    spec = read_data_spec(write(tmp_path, "train: images\ntrain_json: [a.json, b.json]\nnames: [a]\n"))
    assert (spec.format, spec.jsons("train")) == ("coco", (tmp_path / "a.json", tmp_path / "b.json"))
    assert spec.sources("train") == (tmp_path / "images",)


def test_names_stay_as_they_are_written(tmp_path: Path) -> None:
    assert read_data_spec(write(tmp_path, "train: t\nnames: [no, on, 1, 1e3]\n")).names == ("no", "on", "1", "1e3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: t\nnaems: [a]\n", ":2: unknown key 'naems'; did you mean 'names'?"),
        ("train: t\n", ": no names; list the classes: names: [circle, square]"),
        ("train: t\nnames: a\n", ":2: names is a text; a list is right: names: [circle, square]"),
        ("train: t\nnames: []\n", ":2: names is empty; list at least one class"),
        ("train: t\nnames: [a, a]\n", ":2: class name 'a' is given twice; each class needs its own name"),
        ("train: t\nnames:\n  - a\n  - [b]\n", ":4: class 1 is not a name; a text is right"),
        ("train: t\nnames: {0: a, 2: b}\n", ":2: names are numbered 0, 2; 0 to 1 is right"),
        ("train: t\nnames: {a: b}\n", ":2: names are numbered a; 0 to 0 is right"),
        (
            "train: t\nnc: 3\nnames: [a]\n",
            ":2: nc is 3, but there are 1 names; leave nc out, or make them agree",
        ),
        (
            "train: t\nnames: [a]\nformat: vok\n",
            ":3: format 'vok' is not known; one of yolo, voc, coco, folders, masks; did you mean 'voc'?",
        ),
        ("names: [a]\n", ": none of train, val and test is given; add train: images/train"),
        ("train: {a: b}\nnames: [a]\n", ":1: train is a mapping; one text is right"),
        (
            "train: [a, [b]]\nnames: [a]\n",
            ":1: train is a list of something else than texts; as [images/a, images/b] is right",
        ),
        ("path: [a]\ntrain: a\nnames: [a]\n", ":1: path is a list; one text is right"),
        (
            "train: a.json\nformat: yolo\nnames: [a]\n",
            ":1: train is a JSON, but format is yolo; one of the two is right",
        ),
        (
            "train: a.json\ntrain_json: b.json\nnames: [a]\n",
            ":1: train is a JSON and train_json is one too; one of the two is right",
        ),
        (
            "train: a\nval_json: b.json\nnames: [a]\n",
            ":2: val_json is given and val is not; val: is the folder of its images",
        ),
        (
            "train: a\nformat: coco\nnames: [a]\n",
            ":1: train has no JSON; add train_json: annotations/instances_train.json",
        ),
        ("train: a\ntrain: b\nnames: [a]\n", ":2: train is given twice; the first is in line 1"),
        ("- a\n", ": not a data YAML; it needs lines such as 'train: images/train' and 'names: [circle]'"),
        ("train: [a\n", ":2: not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_fault_says_where_and_what_would_be_right(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(Fault) as fault:
        read_data_spec(path)
    assert str(fault.value) == f"{path}{message}"


def test_a_missing_yaml_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="there is no such file; name a data YAML, as cfg/data/shapes.yaml"):
        read_data_spec(tmp_path / "none.yaml")
    with pytest.raises(Fault, match="a folder, where a data YAML is right"):
        read_data_spec(tmp_path)
