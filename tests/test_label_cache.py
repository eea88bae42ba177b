"""The cache of labels: equal to reading, gone with any change, refused when it is not what was written."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.config import DataSpec, read_data_spec
from data.convert import convert
from data.readers import cache, read_split
from data.readers.labels import Split

LONG_AGO = time.time() - 1000


def settle(folder: Path) -> None:
    """Makes every file old enough to be kept, as far as its owner can."""
    for file in folder.rglob("*"):
        os.utime(file, (LONG_AGO, LONG_AGO))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, in use for sets of any size; a file counts as settled by its own time alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "FEWEST", 1)
    monkeypatch.setattr(cache, "SETTLED", -3600.0)
    return tmp_path / "cache/oneshot-yolo/labels"


@pytest.fixture
def yolo(tmp_path: Path) -> DataSpec:
    for number, text in enumerate(("0 .5 .5 .5 .5\n1 .1 .1 .1 .1\n", "1 .3 .3 .3 .3\n0 0\n", "", None)):
        for folder in ("images", "labels"):
            (tmp_path / "set" / folder).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / f"set/images/{number}.png"), np.full((20, 40, 3), number, dtype=np.uint8))
        if text is not None:
            (tmp_path / f"set/labels/{number}.txt").write_text(text)
    (tmp_path / "set/data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    return read_data_spec(tmp_path / "set/data.yaml")


def same(one: Split, other: Split) -> bool:
    names = ("boxes", "labels", "areas", "ignored_boxes", "ignored_labels", "ignored_crowd")
    for a, b in zip(one.samples, other.samples, strict=True):
        assert (a.path, a.image_id) == (b.path, b.image_id)
        for name in names:
            first, second = getattr(a, name), getattr(b, name)
            assert (first is None) == (second is None)
            if first is not None:
                np.testing.assert_array_equal(first, second, strict=True)
                assert second.flags.writeable or not second.size
    return (one.notes, one.category_ids, one.problems) == (other.notes, other.category_ids, other.problems)


def from_cache(data: DataSpec, monkeypatch: pytest.MonkeyPatch) -> Split | None:
    """The split if nothing had to be read for it, else None."""
    with monkeypatch.context() as patch:

        def reads(*_: object) -> Split:
            raise AssertionError

        patch.setattr("data.readers._read", reads)
        try:
            return read_split(data, "train")
        except AssertionError:
            return None


@pytest.mark.parametrize("to", ["yolo", "voc", "coco"])
def test_what_is_kept_is_what_was_read(
    to: str, yolo: DataSpec, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = yolo if to == "yolo" else read_data_spec(convert(yolo.path, to, tmp_path / "out").yaml)
    read = read_split(data, "train")
    found = from_cache(data, monkeypatch)
    assert found is not None and same(read, found)
    files = [path for path in kept.iterdir() if json.loads(path.read_text())]
    assert len(files) == (1 if to == "yolo" else 2)


def test_any_change_is_seen(yolo: DataSpec, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo.root

    def moved(path: Path) -> None:
        path.rename(path.with_name("9.png"))

    def rewritten(path: Path) -> None:  # as long as before, and no newer
        times = path.stat()
        path.write_text(path.read_text().replace("0", "1", 1))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    for change in (
        lambda: (root / "labels/0.txt").write_text("0 .5 .5 .5 .5\n"),
        lambda: rewritten(root / "labels/0.txt"),
        lambda: (root / "labels/3.txt").write_text("1 .5 .5 .5 .5\n"),
        lambda: (root / "labels/1.txt").unlink(),
        lambda: os.utime(root / "images/0.png", (LONG_AGO, LONG_AGO)),
        lambda: cv2.imwrite(str(root / "images/4.png"), np.zeros((8, 8, 3), dtype=np.uint8)),
        lambda: moved(root / "images/2.png"),
        lambda: (root / "images/4.png").write_bytes(b"no image"),
    ):
        before = read_split(yolo, "train")
        found = from_cache(yolo, monkeypatch)
        assert found is not None and same(before, found)
        change()
        assert from_cache(yolo, monkeypatch) is None
    for other in (replace(yolo, names=("dog", "cat")), replace(yolo, annotations="labels")):
        read_split(yolo, "train")
        assert from_cache(other, monkeypatch) is None
    read_split(yolo, "train")
    assert from_cache(replace(yolo, download="sh get.sh"), monkeypatch) is not None  # no part of the meaning


def test_an_image_that_a_json_lists_may_come_later(
    yolo: DataSpec, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_data_spec(convert(yolo.path, "coco", tmp_path / "out").yaml)
    link = data.root / "images/train/0.png"
    target = link.readlink()
    link.unlink()
    assert len(read_split(data, "train").samples) == 3
    assert from_cache(data, monkeypatch) is not None
    link.symlink_to(target)
    assert from_cache(data, monkeypatch) is None and len(read_split(data, "train").samples) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("counts", "county", 1),
        lambda text: text.replace('"boxes": "A', '"boxes": "B', 1) if '"boxes": "A' in text else text.replace("=", "-"),
        lambda text: "[" * 100_000,
    ],
)
def test_a_spoilt_file_is_read_anew(spoil: object, yolo: DataSpec, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_split(yolo, "train")
    (file,) = kept.iterdir()
    text = file.read_text()
    file.write_text(spoil(text))  # type: ignore[operator]
    assert from_cache(yolo, monkeypatch) is None
    assert same(read, read_split(yolo, "train")) and file.read_text() == text


def test_a_file_with_the_right_hash_and_the_wrong_content_is_read_anew(
    yolo: DataSpec, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_split(yolo, "train")
    (file,) = kept.iterdir()
    values = json.loads(file.read_text())["content"]
    for key, value in (
        ("boxes", "!"),
        ("boxes", "AAAA"),
        ("counts", [1]),
        ("problems", [["?", "", ""]]),
        ("samples", 3),
    ):
        content = json.dumps({**values, key: value})
        file.write_text(f"{cache._head(content)}{content}}}")
        assert from_cache(yolo, monkeypatch) is None, key


def test_files_that_may_still_change_are_not_kept(yolo: DataSpec, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SETTLED", 2.0)
    settle(yolo.root)  # the times of a change of attributes stay new, and are enough
    read_split(yolo, "train")
    assert not kept.exists()


def test_few_images_are_not_kept(yolo: DataSpec, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FEWEST", 5)
    read_split(yolo, "train")
    assert not kept.exists()


def test_without_a_folder_there_is_no_cache(
    yolo: DataSpec, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(read_split(yolo, "train").samples) == 4 == len(read_split(yolo, "train").samples)
    assert from_cache(yolo, monkeypatch) is None
