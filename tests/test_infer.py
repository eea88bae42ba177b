"""Detection from files to files, with a stand-in network that finds red and green things."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from test_evaluate import GREEN, RED, Seer, drawn

from data import structures
from data.images import read_image
from data.structures import Fault, Targets
from engine import infer, sources
from engine.doors import printable
from engine.draw import class_color, draw_detections, grid, write_image
from engine.exported import ExportedFile
from engine.infer import Model, class_labels, load
from engine.results import cell, folder_name, growing, growing_list
from engine.sources import (
    End,
    Frame,
    check_codec,
    container,
    find_files,
    find_sources,
    natural,
    output_names,
    read_sources,
    write_video,
)

NAMES = ("red", "green")


def clip(path, frames=12, fps=12.5, size=(96, 64), fourcc="mp4v"):
    """A video in which a red square moves right, 4 pixels a frame."""
    with write_video(path, fourcc, fps) as write:
        for number in range(frames):
            frame = np.zeros((size[1], size[0], 3), np.uint8)
            frame[16:32, 4 * number : 4 * number + 16] = RED
            write(frame)
    return path


def video_of(path):
    """What another reader says of a video: how many frames can be read, and its speed."""
    capture = cv2.VideoCapture(str(path))
    frames = 0
    while capture.read()[0]:
        frames += 1
    return frames, capture.get(cv2.CAP_PROP_FPS)


def colors_at(image, *points):
    return [tuple(int(v) for v in image[y, x]) for x, y in points]


def a_model(imgsz=128, **more):
    return Model(Seer().eval(), NAMES, imgsz, **more)


# ---- the model ----


def test_boxes_come_in_pixels_of_the_original(tmp_path):
    sample = drawn(tmp_path, "a.png", (300, 120), [(RED, 30, 20, 90, 100), (GREEN, 200, 40, 280, 70)])
    model = a_model()
    found = model(sample.path)
    assert found.labels.tolist() == [0, 1] and found.scores.tolist() == pytest.approx([0.9, 0.8])
    np.testing.assert_allclose(found.boxes, sample.boxes, atol=3, rtol=0)  # 300 / 128 = 2.3 a pixel
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float32, np.float32, np.int64)
    assert found.names == NAMES and found.classes == ["red", "green"] and len(found) == 2
    assert np.array_equal(found.image, read_image(sample.path))
    assert np.array_equal(model(read_image(sample.path)).boxes, found.boxes)
    assert len(model(sample.path, conf=0.1)) == 4
    assert (
        model(sample.path, classes=[1]).labels.tolist() == model(sample.path, classes=["green"]).labels.tolist() == [1]
    )
    assert len(model(sample.path, max_det=1)) == 1
    picture = found.draw(1)
    assert colors_at(picture, (30, 60)) == [class_color(0)] and not np.array_equal(picture, found.image)
    assert not np.array_equal(found.draw(1, scores=False), picture) and (found.draw(1, labels=False) != picture).any()
    with pytest.raises(Fault, match="gone.png"):
        model(tmp_path / "gone.png")


def test_a_list_of_images_gives_a_list_whatever_the_batch(tmp_path):
    things = [[(RED, 30, 20, 90, 100)], [], [(GREEN, 5, 5, 60, 50)], [(RED, 8, 40, 30, 90), (GREEN, 60, 8, 90, 30)]]
    paths = [drawn(tmp_path, f"{n}.png", (120, 120), found).path for n, found in enumerate(things)]
    alone = [a_model()(path) for path in paths]
    assert [found.labels.tolist() for found in alone] == [[0], [], [1], [0, 1]]
    for size in (1, 3, 4, 9):
        together = a_model()(paths, batch_size=size)
        assert [found.boxes.tolist() for found in together] == [found.boxes.tolist() for found in alone]
    assert a_model()([]) == []


def test_a_batch_is_the_smallest_rectangle_of_multiples_of_the_stride():
    tall, wide, small = (np.full((*size, 3), 200, np.uint8) for size in ((300, 100), (90, 200), (40, 40)))
    planes, (box,) = a_model(128).prepare([wide])
    assert planes.shape == (1, 3, 64, 128) and (box.scale, box.pad_x, box.pad_y) == (0.64, 0, 3)
    assert planes.dtype == torch.uint8 and (planes[0, :, 3:61] == 200).all() and (planes[0, :, [2, 61]] == 114).all()
    planes, boxes = a_model(128).prepare([wide, tall, small])
    assert planes.shape == (3, 3, 128, 128) and [(box.pad_x, box.pad_y) for box in boxes] == [(0, 35), (42, 0), (0, 0)]
    assert a_model(128, rect=False).prepare([wide])[0].shape == (1, 3, 128, 128)
    colours = np.zeros((64, 128, 3), np.uint8)
    colours[...] = (10, 20, 30)
    assert a_model(128).prepare([colours])[0][0, :, 5, 5].tolist() == [10, 20, 30]


@pytest.mark.parametrize("array", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)])
def test_an_array_that_is_no_image_is_a_fault(array):
    with pytest.raises(Fault, match="is no image; uint8"):
        a_model()(array)


def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(Fault, match="--half: half precision needs a GPU, and this is a CPU; leave --half out"):
        load(tmp_path / "best.pt", half=True)


def test_a_static_file_gets_the_squares_it_takes(monkeypatch):
    file = ExportedFile(Path("a.onnx"), lambda images: (), NAMES, 64, 8, side=64, suppression=None)
    monkeypatch.setattr(infer, "read_exported", lambda path, device: file)
    wide = np.zeros((32, 64, 3), np.uint8)
    assert load("a.onnx").prepare([wide])[0].shape == (1, 3, 64, 64)
    with pytest.raises(Fault, match="a.onnx: takes images of 64 px only, not 96; export it with --imgsz 96"):
        load("a.onnx", imgsz=96)
    with pytest.raises(Fault, match="a.onnx: an exported file has the precision it was written with"):
        load("a.onnx", half=True)
    monkeypatch.setattr(infer, "read_exported", lambda path, device: replace(file, side=None))
    assert load("a.onnx", imgsz=96).prepare([wide])[0].shape == (1, 3, 48, 96)
    with pytest.raises(Fault, match="--imgsz 100: this network needs a multiple of 8; 96 or 104 would do"):
        load("a.onnx", imgsz=100)
    with pytest.raises(Fault, match="a.pt2: a program of torch.export; give the checkpoint"):
        load("a.pt2")


def test_classes_by_name_or_number():
    assert class_labels(None, NAMES) is None
    assert class_labels(["green", "0"], NAMES) == [1, 0]
    for wrong in ("2", "gren", "-1"):
        with pytest.raises(Fault, match="red, green"):
            class_labels([wrong], NAMES)


# ---- pictures ----


def test_neighbouring_classes_look_different():
    colors = [class_color(label) for label in range(24)]
    assert len(set(colors)) == 24
    assert all(sum(abs(a - b) for a, b in zip(p, q, strict=True)) > 120 for p, q in pairwise(colors))


def test_drawing_leaves_the_image_and_stays_inside():
    image = np.full((50, 70, 3), 100, np.uint8)
    boxes = torch.tensor([[0.0, 0, 69, 49], [60, 40, 90, 60], [20, 20, 40, 40]])
    found = structures.Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 1]))
    picture = draw_detections(image, found, ("größe", "a very long name that does not fit"), thickness=1)
    assert (image == 100).all() and picture.shape == image.shape
    assert colors_at(picture, (20, 40)) == [class_color(1)]
    nothing = structures.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert np.array_equal(draw_detections(image, nothing, NAMES), image)


@pytest.mark.parametrize("count, shape", [(1, (64, 64)), (3, (128, 128)), (5, (128, 192)), (40, (256, 256))])
def test_grid_puts_each_box_on_its_image(count, shape):
    images = torch.zeros(count, 3, 64, 64, dtype=torch.uint8)
    targets = Targets(torch.tensor([[20.0, 30, 50, 60]]), torch.tensor([1]), torch.tensor([count - 1]))
    picture = grid(images, targets, NAMES)
    assert picture.shape == (*shape, 3)
    if count < 16:
        columns = shape[1] // 64
        left, top = (count - 1) % columns * 64, (count - 1) // columns * 64
        assert colors_at(picture, (left + 50, top + 45)) == [class_color(1)]
        assert (picture[:top] == 0).all()
    assert np.array_equal(grid(images.float(), targets, NAMES), picture)


def test_a_large_grid_is_scaled_down():
    targets = Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert grid(torch.zeros(4, 3, 64, 64), targets, side=100).shape == (100, 100, 3)


# ---- sources ----


def test_a_folder_is_read_in_natural_order_and_the_rest_is_named(tmp_path):
    for name in ("b10.png", "b9.JPG", "clip.mp4", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.png").touch()
    files, notes = find_files(str(tmp_path))
    assert [path.name for path in files] == ["b9.JPG", "b10.png", "clip.mp4"]
    assert len(notes) == 1 and "skipped 1" in notes[0] and ".txt" in notes[0]
    assert [path.name for path in find_files(str(tmp_path / "b*"))[0]] == ["b9.JPG", "b10.png"]
    assert [path.name for path in find_files(str(tmp_path / "**" / "*.png"))[0]] == ["b10.png", "c.png"]
    (tmp_path / "odd[1].png").touch()
    assert find_files(str(tmp_path / "odd[1].png"))[0] == [tmp_path / "odd[1].png"]


@pytest.mark.parametrize("source", ["gone.png", "notes.dat", "empty", "*.bmp", "0", "rtsp://camera"])
def test_a_source_without_pictures_is_a_fault(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.dat").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(Fault) as fault:
        find_files(source)
    assert str(fault.value).startswith(source)


def test_results_have_names_of_their_own(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "a.png", "b/A.jpg", "a-2.jpg", "v.mp4", "v_1.jpg", "w.mp4")]
    names = output_names(files)
    assert names == ["a", "a-2", "A-3", "a-2-2", "v-2", "v_1", "w"]
    assert natural(tmp_path / "a2") < natural(tmp_path / "a10")


@pytest.mark.parametrize("fourcc", ["mp4v", "MJPG", "VP90"])
@pytest.mark.parametrize("size, fps", [((96, 64), 12.5), ((97, 65), 29.97)])
def test_a_video_keeps_its_frames_and_speed(tmp_path, fourcc, size, fps):
    path = clip(tmp_path / f"a{container(fourcc)}", 12, fps, size, fourcc)
    assert video_of(path) == (12, pytest.approx(fps, abs=0.01))
    *frames, end = read_sources(find_sources(str(path))[0])
    assert end == End(frames[0].source) and [frame.number for frame in frames] == list(range(1, 13))
    assert all((frame.frames, frame.fps) == (12, pytest.approx(fps, abs=0.01)) for frame in frames)
    assert [item.number for item in read_sources(find_sources(str(path))[0], 5) if isinstance(item, Frame)] == [
        1,
        6,
        11,
    ]
    red = frames[5].image[24, 28].astype(int)  # frame 6 has its red square at 20 to 36
    assert red[0] > 150 and red[1] < 100 and red[2] < 100
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_h264_is_read_to_its_last_frame(shared_data):
    found, _ = find_sources(str(shared_data / "video" / "bikes.mp4"))
    *frames, end = read_sources(found, 50)
    assert end.fault is None and [frame.number for frame in frames] == [1, 51, 101, 151, 201]
    assert {(frame.frames, frame.fps, frame.image.shape) for frame in frames} == {(250, 25, (272, 640, 3))}


def test_a_codec_that_cannot_be_written_names_one_that_can(capfd):
    check_codec("mp4v")
    for wrong in ("abcd", "toolong", ""):
        with pytest.raises(Fault, match="mp4v"):
            check_codec(wrong)
    assert capfd.readouterr().err == ""


def test_a_frame_of_another_size_ends_the_video_and_keeps_the_part_before(tmp_path):
    with (
        pytest.raises(Fault, match="a.mp4: frame 2 is 32x32, those before it 64x64"),
        write_video(tmp_path / "a.mp4", "mp4v", 10) as write,
    ):
        write(np.zeros((64, 64, 3), np.uint8))
        write(np.zeros((32, 32, 3), np.uint8))  # OpenCV would ignore it without a word
    assert video_of(tmp_path / "a.mp4")[0] == 1


def test_frames_that_opencv_drops_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_frames_in", lambda path: 1)
    with pytest.raises(Fault, match="2 frames were written, 1 can be read back; try another --fourcc"):
        clip(tmp_path / "a.mp4", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    monkeypatch.setattr(sources, "_frames_in", lambda path: 0)
    with pytest.raises(Fault, match="2 frames were written, 0 can be read back"):
        clip(tmp_path / "b.mp4", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


# ---- detect.py ----


@pytest.fixture
def detect(monkeypatch, tmp_path):
    """Runs the command; results go to ``tmp_path / "out" / "exp"``."""
    monkeypatch.setattr(infer, "load", lambda weights, device, imgsz, half, rect: a_model(imgsz or 128, rect=rect))
    (tmp_path / "in").mkdir()
    base = ["--weights", "x.pt", "--device", "cpu", "--project", str(tmp_path / "out")]
    return lambda source, *more: infer.main([*base, "--source", str(source), *more])


def no_threads():
    return {thread.name for thread in threading.enumerate()}.isdisjoint({"ahead", "behind"})


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_with_images_a_video_and_a_broken_image(detect, tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out" / "exp"
    drawn(source, "one.png", (128, 64), [(RED, 10, 20, 50, 60), (GREEN, 70, 10, 110, 40)])
    drawn(source, "none.jpg", (64, 64), [])
    (source / "broken.jpg").write_bytes(b"\xff\xd8 not an image")
    (source / "readme.txt").touch()
    clip(source / "ride.mp4", frames=5)
    assert detect(source, "--save-txt", "--save-conf", "--line-thickness", "2") == 1
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "1 of 4 sources" in said.err and "readme" not in said.err
    assert "skipped 1" in said.out and str(out) in said.out and "7 images" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["red", "6", "0.900"] in rows and ["green", "1", "0.800"] in rows
    labels = ["none.txt", "one.txt", *(f"ride_{number}.txt" for number in range(1, 6))]
    assert tree(out) == sorted([*(f"labels/{name}" for name in labels), "none.jpg", "one.png", "ride.mp4"])
    assert (out / "labels" / "none.txt").read_text() == ""
    lines = (out / "labels" / "one.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert [float(v) for v in lines[0].split()[1:]] == pytest.approx([30 / 128, 40 / 64, 40 / 128, 40 / 64, 0.9])
    assert colors_at(read_image(out / "one.png"), (30, 60)) == [class_color(0)]
    assert video_of(out / "ride.mp4") == (5, 12.5)
    assert detect(source / "one.png") == 0 and (tmp_path / "out" / "exp2" / "one.png").exists()
    assert detect(source / "one.png", "--exist-ok") == 0 and not (tmp_path / "out" / "exp3").exists()


def test_a_part_of_the_classes_and_every_second_frame(detect, tmp_path, capsys):
    drawn(tmp_path / "in", "one.png", (128, 64), [(RED, 10, 20, 50, 60), (GREEN, 70, 10, 110, 40)])
    assert detect(tmp_path / "in", "--classes", "green") == 0
    assert "red" not in capsys.readouterr().out
    path = clip(tmp_path / "a.mp4", frames=9, fps=10)
    assert detect(path, "--vid-stride", "2", "--fourcc", "MJPG", "--save-txt", "--name", "v") == 0
    assert video_of(tmp_path / "out" / "v" / "a.avi") == (5, 5)
    assert tree(tmp_path / "out" / "v" / "labels") == [f"a_{n}.txt" for n in (1, 3, 5, 7, 9)]


def test_ctrl_c_keeps_the_part_of_a_video_that_is_done(detect, tmp_path, capsys, monkeypatch):
    path = clip(tmp_path / "a.mp4", frames=9)
    seen = iter(range(100))

    class Stopped(Seer):
        def predict(self, images):
            if next(seen) == 4:
                raise KeyboardInterrupt
            return super().predict(images)

    stopped = Model(Stopped().eval(), NAMES, 128)
    monkeypatch.setattr(infer, "load", lambda *_, **__: stopped)
    assert detect(path, "--save-txt", "--save-json", "--save-csv") == 130
    out = tmp_path / "out" / "exp"
    assert tree(out) == ["a.mp4", *(f"labels/a_{n}.txt" for n in (1, 2, 3, 4)), "predictions.csv", "predictions.json"]
    assert video_of(out / "a.mp4")[0] == 4
    assert len(json.loads((out / "predictions.json").read_text())) == 4
    assert len((out / "predictions.csv").read_text().splitlines()) == 5
    said = capsys.readouterr()
    assert said.err.endswith("\rinterrupted: what was finished before stays\n") and "results are in" in said.out
    assert no_threads()


def test_a_bug_keeps_its_traceback_and_what_was_finished(detect, tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4", frames=5)
    seen = iter([False, False, True])
    monkeypatch.setattr("engine.results.draw_detections", lambda image, *_, **__: 1 / 0 if next(seen) else image)
    with pytest.raises(ZeroDivisionError):
        detect(path)
    assert video_of(tmp_path / "out" / "exp" / "a.mp4")[0] == 2 and no_threads()


def test_a_video_that_stops_early_is_told(detect, tmp_path, capsys):
    whole = clip(tmp_path / "a.avi", frames=60, size=(320, 240), fourcc="MJPG")
    content = whole.read_bytes()
    cut = content.index(b"movi") + (len(content) - content.index(b"movi")) // 2
    (tmp_path / "cut.avi").write_bytes(content[:cut])
    code = detect(tmp_path / "cut.avi")
    said = capsys.readouterr()
    assert code == 1 and "damaged" in said.err and (tmp_path / "out" / "exp" / "cut.mp4").exists()


def test_tables_crops_and_labels_of_a_folder_and_a_video(detect, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out" / "exp"
    drawn(source, "one.png", (128, 64), [(RED, 10, 20, 50, 60), (GREEN, 70, 10, 110, 40)])
    drawn(source, "none.png", (64, 64), [])
    clip(source / "ride.mp4", frames=3)
    assert detect(source, "--save-csv", "--save-json", "--save-crop", "--nosave", "--batch-size", "2") == 0
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [(row["image"], row["frame"], row["class"], row["label"]) for row in rows] == [
        *(("one.png", "", name, str(n)) for n, name in enumerate(NAMES)),
        *(("ride.mp4", str(n), "red", "0") for n in (1, 2, 3)),
    ]
    assert [float(rows[0][key]) for key in ("score", "x1", "y1", "x2", "y2")] == pytest.approx([0.9, 10, 20, 50, 60])
    entries = json.loads((out / "predictions.json").read_text())
    assert [(Path(entry["image"]).name, entry["frame"], len(entry["detections"])) for entry in entries] == [
        ("none.png", None, 0),
        ("one.png", None, 2),
        *(("ride.mp4", n, 1) for n in (1, 2, 3)),
    ]
    assert entries[1] == {
        "image": str(source / "one.png"),
        "frame": None,
        "width": 128,
        "height": 64,
        "detections": [
            {"class": "red", "label": 0, "score": 0.9, "box": [10.0, 20.0, 50.0, 60.0]},
            {"class": "green", "label": 1, "score": 0.8, "box": [70.0, 10.0, 110.0, 40.0]},
        ],
    }
    assert tree(out) == [
        "crops/green/one-2.jpg",
        *(f"crops/red/{name}-1.jpg" for name in ("one", "ride_1", "ride_2", "ride_3")),
        "predictions.csv",
        "predictions.json",
    ]
    crop = read_image(out / "crops" / "green" / "one-2.jpg").astype(int)
    assert crop.shape == (30, 40, 3) and (crop[..., 1] - crop[..., 0] > 200).all()


def test_names_of_strangers_stay_text_and_stay_inside(detect, tmp_path, monkeypatch):
    names = ("../../up", '=HYPERLINK("http://x","y")')
    monkeypatch.setattr(infer, "load", lambda *_, **__: Model(Seer().eval(), names, 128))
    drawn(tmp_path / "in", "-2+3.png", (128, 64), [(RED, 10, 20, 50, 60), (GREEN, 70, 10, 110, 40)])
    assert detect(tmp_path / "in", "--save-csv", "--save-json", "--save-crop") == 0
    out = tmp_path / "out" / "exp"
    rows = list(csv.reader((out / "predictions.csv").open()))
    assert [row[0] for row in rows[1:]] == ["'-2+3.png"] * 2 and [row[2] for row in rows[1:]] == [
        names[0],
        f"'{names[1]}",
    ]
    found = json.loads((out / "predictions.json").read_text())[0]["detections"]
    assert [detection["class"] for detection in found] == list(names)
    assert tree(tmp_path) == sorted(
        [
            "in/-2+3.png",
            *(f"out/exp/{name}" for name in ("-2+3.png", "predictions.csv", "predictions.json")),
            "out/exp/crops/0__.._up/-2+3-1.jpg",
            f"out/exp/crops/{folder_name(names[1], 1)}/-2+3-2.jpg",
        ]
    )


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("traffic light", "traffic light"),
        ("größe (m)", "größe (m)"),
        ("../../etc", "7__.._etc"),
        ("/etc/passwd", "7__etc_passwd"),
        ("..", "7"),
        ("", "7"),
        (" a", "7_a"),
        ("a\x00b", "7_a_b"),
        ("C:\\x", "7_C__x"),
        ("x" * 300, "7_" + "x" * 80),
    ],
)
def test_a_class_names_one_folder(name, folder):
    found = folder_name(name, 7)
    assert found == folder and "/" not in found and found not in (".", "..") and len(found) < 100


def test_cells_are_no_formulas():
    for text in ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1"):
        assert cell(text) == f"'{text}"
    for text in ("car", "a=b", "1-2", ""):
        assert cell(text) == text


def test_a_table_is_whole_after_every_row_and_on_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")  # a limit on the size of files: the system refuses to write more
    path = tmp_path / "a.json"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with growing_list(path) as append:
            assert json.loads(path.read_text()) == []
            append('"one"')
            assert json.loads(path.read_text()) == ["one"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
            with pytest.raises(OSError, match=r"a\.json"):
                append(json.dumps("two" * 20))
            assert json.loads(path.read_text()) == ["one"]
            append('"three"')
        assert json.loads(path.read_text()) == ["one", "three"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with growing(tmp_path / "b.csv", "head\n") as append:
        append("größe\udc80\n")
    assert (tmp_path / "b.csv").read_text() == "head\ngröße\\udc80\n"


def test_boxes_without_words(detect, tmp_path, monkeypatch):
    drawn(tmp_path / "in", "one.png", (128, 64), [(RED, 10, 20, 50, 60)])
    texts = []
    monkeypatch.setattr("engine.draw.draw_box", lambda image, box, color, text, thickness: texts.append(text))
    for options in ([], ["--hide-conf"], ["--hide-labels"]):
        assert detect(tmp_path / "in", *options) == 0
    assert texts == ["red 0.90", "red", ""]


def test_an_image_on_standard_input(detect, tmp_path, monkeypatch):
    data = drawn(tmp_path, "one.png", (128, 64), [(RED, 10, 20, 50, 60)]).path.read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert detect("-", "--save-txt") == 0
    assert tree(tmp_path / "out" / "exp") == ["labels/stdin.txt", "stdin.jpg"]
    assert (tmp_path / "out" / "exp" / "labels" / "stdin.txt").read_text().startswith("0 ")


def test_a_list_names_files_folders_and_globs(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "photos/b.jpg", "c.png", "ride.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("\ufeff# a list\n\nride.mp4\n photos \nphotos/*.png\n" + str(tmp_path / "c.png"))
    for place in (tmp_path, tmp_path / "photos"):  # beside the list, wherever the program runs
        monkeypatch.chdir(place)
        found, notes = find_sources(str(tmp_path / "list.txt"))
        assert [Path(source.place).name for source in found] == ["ride.mp4", "a.png", "b.jpg", "a.png", "c.png"]
        assert [source.kind for source in found] == ["video", *["image"] * 4] and notes == []
        assert [source.stem for source in found] == ["ride", "a", "b", "a-2", "c"]


def test_cameras_and_streams_are_told_apart_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def only(text):
        ((source,), notes) = find_sources(text)
        return source.kind, source.stem, source.shown

    assert only("0") == ("camera", "camera0", "camera 0")
    assert only("rtsp://me:secret@10.0.0.5:554/door/1?x=2") == (
        "stream",
        "10.0.0.5-1",
        "rtsp://10.0.0.5:554/door/1?x=2",
    )
    assert only("HTTP://cam/../../etc/passwd") == ("stream", "cam-passwd", "HTTP://cam/../../etc/passwd")
    (tmp_path / "7").mkdir()
    drawn(tmp_path / "7", "a.png", (64, 64), [])
    assert only("7")[0] == "image"


def test_a_camera_is_read_as_it_is_now(monkeypatch):
    """Detection slower than the camera: what waits is the newest frame, and the end says how many were left out."""

    class Camera:
        def __init__(self):
            self.number = 0

        def grab(self):
            self.number += 1
            if self.number > 60:
                ended.set()
            return self.number <= 60

        def retrieve(self):
            return True, np.full((4, 4, 3), self.number, np.uint8)

        def get(self, what):
            return {cv2.CAP_PROP_FPS: 0.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[what]

        def release(self):
            pass

    def opened(source):
        camera = Camera()
        camera.grab()
        return camera

    ended = threading.Event()
    monkeypatch.setattr(sources, "_capture", opened)
    taken = []
    for item in read_sources(find_sources("0")[0], 2):
        taken.append(item)
        assert ended.wait(60)  # whoever looks at the first frame takes longer than the whole stream
    *frames, end = taken
    numbers = [frame.number for frame in frames]
    assert len(numbers) <= 2 and numbers[-1] == 59 and numbers[0] % 2  # the last one that stride 2 asks for
    assert all(frame.fps == 25 and (frame.image == frame.number).all() for frame in frames)
    lost = 30 - len(frames)
    assert (
        str(end.fault)
        == f"camera 0: the stream ended after 60 frames; {lost} frames came faster than they were looked at"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (["--conf-thres", "2"], "--conf-thres"),
        (["--vid-stride", "0"], "--vid-stride"),
        (["--line-thickness", "-1"], "--line-thickness"),
        (["--save-conf"], "--save-txt"),
        (["--classes", "blue"], "--classes blue"),
        (["--conf-tres", "0.1"], "--conf-thres"),
    ],
)
def test_detect_says_what_is_wrong(detect, tmp_path, capsys, options, message):
    drawn(tmp_path / "in", "a.png", (64, 64), [])
    assert detect(tmp_path / "in", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_readable_is_a_fault(detect, tmp_path, capsys):
    (tmp_path / "in" / "a.png").write_bytes(b"no")
    (tmp_path / "in" / "b.mp4").write_bytes(b"no")
    assert detect(tmp_path / "in") == 2
    assert "a.png" in (err := capsys.readouterr().err) and "b.mp4" in err and "nothing in it" in err
    assert not list((tmp_path / "out").iterdir())
    assert detect(tmp_path / "gone") == 2
    assert "gone" in capsys.readouterr().err


def test_missing_weights_are_a_fault(tmp_path, capsys):
    drawn(tmp_path, "a.png", (64, 64), [])
    assert infer.main(["--weights", str(tmp_path / "gone.pt"), "--source", str(tmp_path)]) == 2
    assert "gone.pt" in capsys.readouterr().err


def test_a_source_is_never_replaced(detect, tmp_path, capsys):
    source = tmp_path / "out" / "exp"
    source.mkdir(parents=True)
    sample = drawn(source, "a.png", (64, 64), [(RED, 5, 5, 30, 30)])
    before = sample.path.read_bytes()
    assert detect(source, "--exist-ok") == 1
    assert "would replace it" in capsys.readouterr().err and sample.path.read_bytes() == before


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    image = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    write_image(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    write_image(tmp_path / "B.JPG", image)
    with pytest.raises(Fault, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", image)
    assert tree(tmp_path) == ["B.JPG", "a.png"]


def test_file_names_of_no_encoding_and_with_escapes_are_told_in_letters(tmp_path, capsys, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "\x1b[2Jnotes.doc").write_bytes(b"no picture")
    (tmp_path / os.fsdecode(b"caf\xe9.doc")).write_bytes(b"no picture")
    notes = find_files(str(tmp_path))[1]
    assert notes and all(printable(note).isprintable() for note in notes)
    printable("".join(notes)).encode()
