"""Dividing a data set: every image once, classes in their shares, copies together, the same again by seed."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.__main__ import main
from data.config import read_data_spec
from data.convert import convert
from data.readers import read_split
from data.split import divide, split_data
from data.structures import Fault, Sample


def sample(number: int, labels: list[int]) -> Sample:
    return Sample(Path(f"{number}.png"), np.zeros((len(labels), 4), np.float32), np.array(labels, dtype=np.int64))


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=5), min_size=3, max_size=30),
    st.lists(st.floats(0.05, 1), min_size=2, max_size=3),
    st.integers(0, 3),
)
def test_every_image_is_in_a_part_and_no_part_is_empty(labels: list[list[int]], shares: list[float], seed: int) -> None:
    samples = [sample(number, found) for number, found in enumerate(labels)]
    parts = divide(samples, 4, shares, seed)
    assert len(parts) == len(samples) and set(parts) == set(range(len(shares)))
    assert parts == divide(samples, 4, shares, seed)


def test_each_class_gets_its_share() -> None:
    """A rare class of 10 images, a common one everywhere, and 100 images without a box: 8 : 1 : 1 of each."""
    rng = np.random.default_rng(0)
    labels = [[0] * int(rng.integers(1, 4)) for _ in range(300)]
    labels = [[*found, 1] if number < 10 else found for number, found in enumerate(labels)] + [[] for _ in range(100)]
    samples = [sample(number, found) for number, found in enumerate(labels)]
    parts = np.array(divide(samples, 2, [0.8, 0.1, 0.1], 0))
    for wanted, counts in (
        (400, np.ones(400)),
        (10, np.array([found.count(1) for found in labels])),
        (sum(found.count(0) for found in labels), np.array([found.count(0) for found in labels])),
    ):
        shares = np.array([counts[parts == part].sum() for part in range(3)]) / wanted
        np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)


def test_copies_of_an_image_stay_together() -> None:
    samples = [sample(number, [number % 2]) for number in range(40)]
    same = [[("", Path(f"{number}.png")) for number in group] for group in ((0, 1, 2, 3), (10, 30))]
    for seed in range(5):
        parts = divide(samples, 2, [0.5, 0.5], seed, same)
        assert len({parts[number] for number in (0, 1, 2, 3)}) == 1 == len({parts[10], parts[30]})


def folder_of(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "in/images" / f"{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), rng.integers(0, 256, (20, 40, 3), dtype=np.uint8))
        label = tmp_path / "in/labels" / f"{number % 2}/{number}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"{number % 3} .5 .5 .{number + 10} .5\n")
    (tmp_path / "in/images/0/copy.png").write_bytes((tmp_path / "in/images/1/1.png").read_bytes())
    (tmp_path / "in/data.yaml").write_text("train: images/0\nval: images/1\nnames: [a, 'no', \"c: d\"]\n")
    return tmp_path / "in/data.yaml"


@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_the_parts_read_as_the_whole_did(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = convert(folder_of(tmp_path), to, tmp_path / to).yaml
    before = sorted(file for file in tmp_path.rglob("*"))
    options = [str(path), "train=6", "val=3", "test=1", "--seed", "3", "-o"]
    assert main(["split", *options, str(tmp_path / "parts")]) == 0
    assert capsys.readouterr().out == f"ready: {tmp_path}/parts/data.yaml\n"
    assert main(["split", *options, str(tmp_path / "again")]) == 0
    made = [tmp_path / folder / name for folder in ("again", "parts") for name in ("train.txt", "val.txt", "test.txt")]
    assert [file.read_text() for file in made[:3]] == [file.read_text() for file in made[3:]]
    assert set(before) <= set(tmp_path.rglob("*"))

    whole = {s.path: s for name in ("train", "val") for s in read_split(read_data_spec(path), name).samples}
    data = read_data_spec(tmp_path / "parts/data.yaml")
    assert data.names == ("a", "no", "c: d") and data.format == to
    parts = {name: read_split(data, name).samples for name in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(whole) == 21
    for found in (found for samples in parts.values() for found in samples):
        np.testing.assert_array_equal(found.boxes, whole[found.path].boxes)
        np.testing.assert_array_equal(found.labels, whole[found.path].labels)
    assert 11 <= len(parts["train"]) <= 14 and len(parts["test"]) >= 1
    bytes_of = {name: {s.path.read_bytes() for s in samples} for name, samples in parts.items()}
    assert not bytes_of["train"] & bytes_of["val"] and not bytes_of["train"] & bytes_of["test"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train=0.8"], "one part is no division; as train=0.8 val=0.2 is right"),
        (["train=0.8", "vall=0.2"], "part 'vall' is not known; one of train, val, test; did you mean 'val'?"),
        (["train=0.8", "val=0"], "val=0: a share above 0 is right, as val=0.8"),
        (["train=0.8", "val"], "'val' is no share; as train=0.8 is right"),
        (["train=0.8", "train=0.2"], "train is given twice; one share a part is right"),
    ],
)
def test_wrong_shares_are_told(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["split", str(folder_of(tmp_path)), *words, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"{message}\n" and not (tmp_path / "out").exists()


def test_a_list_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder_of(tmp_path)
    assert main(["split", str(path), "train=1", "val=1", "-o", str(path.parent)]) == 2
    err = capsys.readouterr().err
    assert err == f"{path.parent}: has data.yaml already; name another folder, or remove them\n"


def test_a_name_that_several_jsons_list_is_a_fault(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        entries = []
        for number in range(3):
            assert cv2.imwrite(
                str(tmp_path / name / f"{number}.png"), np.full((9, 9, 3), number * 9 + ord(name), np.uint8)
            )
            entries.append({"id": number, "file_name": f"{number}.png"})
        annotations = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}]
        content = {"images": entries, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / f"of-{name}.json").write_text(json.dumps(content))
    (tmp_path / "data.yaml").write_text("train: a\ntrain_json: of-a.json\nval: b\nval_json: of-b.json\nnames: [cat]\n")
    with pytest.raises(Fault, match="a/0.png: the JSONs list several images of this name; give a copy to"):
        split_data(tmp_path / "data.yaml", tmp_path / "out", {"train": 1, "val": 1})
    assert list((tmp_path / "out").iterdir()) == []
