"""Any format to any other and back: the same boxes; what a format cannot hold is said."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.__main__ import main
from data.config import read_data_spec
from data.convert import convert, names_for
from data.convert import read_split as read_split_there
from data.readers import read_split
from data.readers.labels import Split
from data.structures import Fault, Sample

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 50, 30


def objects(sample: Sample) -> list[tuple[object, ...]]:
    """Every object of a sample, in an order of its own."""
    areas = [-1.0] * len(sample.labels) if sample.areas is None else sample.areas.tolist()
    found: list[tuple[object, ...]] = [
        ("trained", label, *box, area)
        for box, label, area in zip(sample.boxes.tolist(), sample.labels.tolist(), areas, strict=True)
    ]
    for box, label, crowd in zip(
        sample.ignored_boxes.tolist(), sample.ignored_labels.tolist(), sample.ignored_crowd.tolist(), strict=True
    ):
        found.append(("crowd" if crowd else "difficult", label, *box))
    return sorted(found, key=repr)


def without_areas(sample: Sample) -> Sample:
    return replace(sample, areas=None)


def split_of(path: Path, name: str = "train") -> Split:
    return read_split(read_data_spec(path), name)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    assert cv2.imwrite(str(path), np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))
    return path


def boxes(count: int) -> st.SearchStrategy[list[list[float]]]:
    """Float32 boxes in the image, each at least a 128th of a pixel wide and high, no two the same."""
    sides = [
        st.tuples(st.just(0.0) | st.floats(0.015625, n - 0.5, width=32), st.floats(0.015625, 1, width=32))
        for n in (WIDTH, HEIGHT)
    ]

    def box(pair: tuple[tuple[float, float], tuple[float, float]]) -> list[float]:
        (x, w), (y, h) = pair
        return [float(v) for v in np.array([x, y, x + w * (WIDTH - x), y + h * (HEIGHT - y)], dtype=np.float32)]

    return st.lists(st.tuples(*sides).map(box), max_size=count, unique_by=tuple)


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=6),
    min_size=2,
    max_size=4,
    unique=True,
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, boxes(4), boxes(3), st.data())
@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_what_is_written_is_read_again(
    to: str,
    image: Path,
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    trained: list[list[float]],
    ignored: list[list[float]],
    data: st.DataObject,
) -> None:
    """To the last bit of float32, whatever the classes are called."""
    label = st.integers(0, len(names) - 1)
    labels = [data.draw(label) for _ in trained]
    crowds = [data.draw(st.booleans()) for _ in ignored]
    sample = Sample(
        image,
        np.array(trained, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array([data.draw(st.floats(0, 1e6)) for _ in trained]),
        np.array(ignored, dtype=np.float32).reshape(-1, 4),
        np.array([data.draw(label) for _ in ignored], dtype=np.int64),
        np.array(crowds, dtype=np.bool_),
        77,
    )
    folder = tmp_path_factory.mktemp("out")
    (folder / "source.yaml").write_text("train: images\nnames: [a]\n")
    source = replace(read_data_spec(folder / "source.yaml"), names=tuple(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.convert.data_spec", lambda _: source)
        patch.setattr("data.convert.read_split", lambda *_: Split((sample,), (), tuple(range(5, 5 + len(names)))))
        done = convert("source.yaml", to, folder / "out")
    written = read_data_spec(done.yaml)
    assert written.names == tuple(names)
    if to == "yolo" and not trained:
        return  # nothing to read back: an empty label file
    found = read_split(written, "train")
    (again,) = found.samples
    assert found.notes == ()
    if to == "coco":
        assert objects(again) == objects(sample)
        assert (again.image_id, found.category_ids) == (77, tuple(range(5, 5 + len(names))))
    elif to == "voc":
        assert objects(again) == objects(replace(sample, areas=None, ignored_crowd=np.zeros(len(ignored), np.bool_)))
    else:
        empty = Sample(image, sample.boxes, sample.labels)
        assert objects(again) == objects(empty)
    assert (len([note for note in done.notes if "crowds" in note]) == 1) == (any(crowds) and to != "coco")


def test_real_boxes_survive_every_way_round(shared_data: Path, tmp_path: Path) -> None:
    """VOC with difficult objects, through every format and back to each."""
    text = (ROOT / "cfg/data/voc100.yaml").read_text().replace("../../datasets", str(shared_data))
    (tmp_path / "few.txt").write_text(
        "".join(f"{p.stem}\n" for p in sorted((shared_data / "voc100_formats/images").iterdir())[:40])
    )
    text = text.replace("train: images", f"train: {tmp_path}/few.txt\nimages: images")
    (tmp_path / "voc.yaml").write_text(text)
    first = split_of(tmp_path / "voc.yaml")
    assert sum(len(sample.ignored_labels) for sample in first.samples) > 5
    for way in itertools.permutations(("yolo", "voc", "coco"), 2):
        path = tmp_path / "voc.yaml"
        for step, to in enumerate(way):
            path = convert(path, to, tmp_path / f"{'-'.join(way)}-{step}").yaml
        found = split_of(path)
        assert found.notes == () and len(found.samples) == len(first.samples)
        for one, again in zip(first.samples, found.samples, strict=True):
            expected = Sample(one.path, one.boxes, one.labels) if "yolo" in way else one
            assert again.path.resolve() == one.path.resolve()
            assert objects(without_areas(again)) == objects(expected)


def small_set(folder: Path) -> Path:
    for name in ("train/a.png", "train/sub/a.png", "train/A.jpg", "val/a.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / "images" / name), np.zeros((20, 40, 3), dtype=np.uint8))
        (folder / "labels" / name).with_suffix(".txt").write_text("0 .5 .5 .5 .5\n3 .5 .5 .5 .5\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, dog]\n")
    return folder / "data.yaml"


@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_files_of_the_same_name_stay_apart(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_set(tmp_path / "in")
    before = {file: file.read_bytes() for file in (tmp_path / "in").rglob("*") if file.is_file()}
    assert main(["convert", str(path), "--to", to, "-o", str(tmp_path / "out"), "--images", "copy"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"ready: {tmp_path}/out/data.yaml" and len([line for line in lines if "class 3" in line]) == 4
    assert lines[0].startswith(f"note: train: {tmp_path}/in/labels/train/A.txt:2: class 3 is out of range")
    data = read_data_spec(tmp_path / "out/data.yaml")
    assert [len(read_split(data, name).samples) for name in ("train", "val")] == [3, 1]
    assert all(sample.labels.tolist() == [0] for sample in read_split(data, "train").samples)
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    shutil.rmtree(tmp_path / "out")
    assert {file: file.read_bytes() for file in (tmp_path / "in").rglob("*") if file.is_file()} == before


def test_images_are_links_by_default(tmp_path: Path) -> None:
    convert(small_set(tmp_path / "in"), "yolo", tmp_path / "out")
    assert (tmp_path / "out/images/val/a.png").readlink() == (tmp_path / "in/images/val/a.png").resolve()


def test_a_name_of_a_file_is_made_fit_for_a_list() -> None:
    paths = [Path("x/a.jpg"), Path("y/A.png"), Path("y/a-2.png"), Path("b\n.png"), Path(" .png"), Path("x/a.jpg")]
    assert list(names_for(paths).values()) == ["a.jpg", "A-2.png", "a-2-2.png", "b.png", "image.png"]


def test_what_cannot_be_done_is_a_fault(tmp_path: Path) -> None:
    path = small_set(tmp_path / "in")
    with pytest.raises(Fault, match="holds something already; name a new folder, or empty this one"):
        convert(path, "voc", tmp_path / "in")
    with pytest.raises(Fault, match="format 'cocoa' is not known; one of yolo, voc, coco; did you mean 'coco'?"):
        convert(path, "cocoa", tmp_path / "out")
    path.write_text(path.read_text().replace("dog", '"d\\u0007g"'))
    with pytest.raises(Fault, match="cannot stand in an xml"):
        convert(path, "voc", tmp_path / "out")
    assert not (tmp_path / "out").exists() and read_split_there is read_split


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.convert.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        convert(small_set(tmp_path / "in"), "coco", tmp_path / "out", "copy")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
