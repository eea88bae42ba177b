"""The drawn data set, and the two commands of `python -m data`."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from data import shapes
from data.__main__ import main
from data.config import read_data_spec
from data.readers import read_split
from data.shapes import NAMES, Shape, box_of, draw_image, draw_shapes, mask_of, outline
from data.structures import Fault

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("drawn") / "shapes", train=12, val=4, size=96, seconds=0.2).parent


def test_the_drawn_set_reads_without_a_note(drawn: Path) -> None:
    data = read_data_spec(drawn / "data.yaml")
    splits = [read_split(data, split) for split in ("train", "val")]
    assert [len(split.samples) for split in splits] == [12, 4] and data.names == NAMES
    assert all(split.notes == () for split in splits)
    assert read_data_spec(ROOT / "cfg/data/shapes.yaml").names == NAMES


def test_the_same_seed_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    again = draw_shapes(tmp_path / "again", train=3, val=1, size=96, seconds=0.2).parent
    for path in sorted(again.rglob("*.jpg")) + sorted(again.rglob("*.txt")):
        assert path.read_bytes() == (drawn / path.relative_to(again)).read_bytes()
    other = draw_shapes(tmp_path / "other", seed=1, train=1, val=0, size=96, seconds=0.2).parent
    assert (other / "images/train/0000.jpg").read_bytes() != (again / "images/train/0000.jpg").read_bytes()


def test_a_complete_folder_is_left_and_an_outdated_one_replaced(tmp_path: Path) -> None:
    def draw(seed: int) -> Path:
        return draw_shapes(tmp_path / "s", seed, train=1, val=0, size=64, seconds=0.1)

    mark = draw(0).parent / "mark"
    mark.touch()
    draw(0)
    assert mark.exists()
    draw(1)
    assert not mark.exists() and [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(Fault, match="holds something that was not drawn here; name a new folder, or empty this one"):
        draw_shapes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_video_plays(drawn: Path) -> None:
    video = cv2.VideoCapture(str(drawn / "video.mp4"))
    frames = [video.read()[1] for _ in range(5)]
    assert video.get(cv2.CAP_PROP_FPS) == 25 and not video.read()[0]
    assert np.abs(frames[0].astype(int) - frames[-1]).max() > 50


def test_a_missing_codec_is_said_and_the_images_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shapes, "write_video", lambda *_: False)
    folder = draw_shapes(tmp_path / "s", train=1, val=0, size=64).parent
    assert "video.mp4: not drawn, for this OpenCV cannot write mp4v video" in capsys.readouterr().out
    assert (folder / "images/train/0000.jpg").is_file()


@pytest.mark.parametrize("label", range(len(NAMES)), ids=NAMES)
def test_a_box_is_the_extent_of_the_corners_inside_the_image(label: int) -> None:
    rng = np.random.default_rng(label)
    for _ in range(20):
        shape = Shape(label, *rng.uniform(0, 64, 2), rng.uniform(6, 30), rng.uniform(0, 6.3), rng.uniform(0.9, 1.1))
        points = outline(shape).clip(0, 64)
        if ((outline(shape) < 0) | (outline(shape) > 64)).any():
            continue
        box = box_of(mask_of(shape, 64))
        np.testing.assert_allclose(box, [*points.min(axis=0), *points.max(axis=0)], atol=0.3)


def test_a_single_shape_is_exactly_where_its_box_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a black background, every pixel outside the box is untouched and every edge of the box is touched."""
    monkeypatch.setattr(shapes, "COUNTS", (0.0, 1.0))
    monkeypatch.setattr(shapes, "background", lambda size, rng: np.zeros((size, size, 3), dtype=np.uint8))
    monkeypatch.setattr(cv2, "GaussianBlur", lambda image, *_: image)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image, boxes, labels = draw_image(96, rng)
        assert len(boxes) == len(labels) == 1
        found = image.astype(int).sum(axis=2) > 75  # above the grain
        rows, columns = np.flatnonzero(found.any(axis=1)), np.flatnonzero(found.any(axis=0))
        np.testing.assert_allclose(boxes[0], [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], atol=1.5)


def test_boxes_lie_in_the_image_and_no_shape_is_all_but_hidden() -> None:
    for seed in range(10):
        image, boxes, labels = draw_image(96, np.random.default_rng(seed))
        assert image.shape == (96, 96, 3) and image.dtype == np.uint8
        assert (boxes >= 0).all() and (boxes <= 96).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert set(labels) <= set(range(len(NAMES)))


# --- python -m data -------------------------------------------------------------------------------------------------


def test_the_shapes_command_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data.__main__.draw_shapes", lambda folder, seed: Path(folder) / f"{seed}.yaml")
    assert main(["shapes", str(tmp_path), "--seed", "7"]) == 0
    assert capsys.readouterr().out == f"ready: {tmp_path}/7.yaml\n"
