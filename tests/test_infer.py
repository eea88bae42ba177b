"""Detection from files to files, with a stand-in network that finds red and green things."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_evaluate import GREEN, RED, SHARED, Seer, drawn

from data.images import read_image
from data.structures import Detections, Fault, Targets
from engine import infer
from engine.draw import class_color, draw_detections, grid, write_image
from engine.infer import Model, class_labels, yolo_lines
from engine.sources import (
    check_codec,
    container,
    find_files,
    natural,
    open_video,
    output_names,
    read_frames,
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


def colors_at(image, *points):
    return [tuple(int(v) for v in image[y, x]) for x, y in points]


# ---- the model ----


def test_boxes_come_in_pixels_of_the_original(tmp_path):
    sample = drawn(tmp_path, "a.png", (300, 120), [(RED, 30, 20, 90, 100), (GREEN, 200, 40, 280, 70)])
    model = Model(Seer(), NAMES, 128)
    found = model(sample.path)
    assert found.labels.tolist() == [0, 1] and found.scores.tolist() == pytest.approx([0.9, 0.8])
    torch.testing.assert_close(found.boxes, torch.tensor(sample.boxes), atol=3, rtol=0)  # 300 / 128 = 2.3 a pixel
    assert torch.equal(model(read_image(sample.path)).boxes, found.boxes)
    assert len(model(sample.path, conf=0.1)) == 4
    assert model(sample.path, classes=[1]).labels.tolist() == [1]
    assert len(model(sample.path, max_det=1)) == 1
    with pytest.raises(Fault, match="gone.png"):
        model(tmp_path / "gone.png")


def test_yolo_lines_by_hand():
    found = Detections(torch.tensor([[10.0, 20, 30, 60]]), torch.tensor([0.75]), torch.tensor([3]))
    assert yolo_lines(found, 80, 100) == "3 0.200000 0.500000 0.200000 0.500000\n"
    assert yolo_lines(found, 80, 100, scores=True) == "3 0.200000 0.500000 0.200000 0.500000 0.750000\n"


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
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 1]))
    picture = draw_detections(image, found, ("größe", "a very long name that does not fit"), thickness=1)
    assert (image == 100).all() and picture.shape == image.shape
    assert colors_at(picture, (20, 40)) == [class_color(1)]
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
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


@pytest.mark.parametrize("source", ["gone.png", "notes.txt", "empty", "*.bmp", "0", "rtsp://camera"])
def test_a_source_without_pictures_is_a_fault(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
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
    video = open_video(path)
    assert video.frames == 12 and video.fps == pytest.approx(fps, abs=0.01)
    frames = list(read_frames(video))
    assert [number for number, _ in frames] == list(range(1, 13))
    assert [number for number, _ in read_frames(video, 5)] == [1, 6, 11]
    red = frames[5][1][24, 28].astype(int)  # frame 6 has its red square at 20 to 36
    assert red[0] > 150 and red[1] < 100 and red[2] < 100
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_h264_is_read_to_its_last_frame():
    path = SHARED / "video" / "bikes.mp4"
    if not path.is_file():
        pytest.skip(f"no H.264 video to read: {path} is missing")
    video = open_video(path)
    assert (video.frames, video.fps) == (250, 25)
    assert [number for number, _ in read_frames(video, 50)] == [1, 51, 101, 151, 201]
    assert sum(1 for _ in read_frames(video)) == 250


def test_a_codec_that_cannot_be_written_names_one_that_can(capfd):
    check_codec("mp4v")
    for wrong in ("abcd", "toolong", ""):
        with pytest.raises(Fault, match="mp4v"):
            check_codec(wrong)
    assert capfd.readouterr().err == ""


def test_frames_that_opencv_drops_are_noticed(tmp_path):
    with (
        pytest.raises(Fault, match="2 frames were written, 1 can be read"),
        write_video(tmp_path / "a.mp4", "mp4v", 10) as write,
    ):
        write(np.zeros((64, 64, 3), np.uint8))
        write(np.zeros((32, 32, 3), np.uint8))  # another size: OpenCV ignores it without a word
    assert not list(tmp_path.iterdir())


# ---- detect.py ----


@pytest.fixture
def detect(monkeypatch, tmp_path):
    """Runs the command; results go to ``tmp_path / "out" / "exp"``."""
    monkeypatch.setattr(infer, "load", lambda weights, device, imgsz: Model(Seer(), NAMES, imgsz or 128))
    (tmp_path / "in").mkdir()
    base = ["--weights", "x.pt", "--device", "cpu", "--project", str(tmp_path / "out")]
    return lambda source, *more: infer.main([*base, "--source", str(source), *more])


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
    assert "broken.jpg" in said.err and "1 of 4 files" in said.err and "readme" not in said.err
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
    video = open_video(out / "ride.mp4")
    assert (video.frames, video.fps) == (5, 12.5)
    assert detect(source / "one.png") == 0 and (tmp_path / "out" / "exp2" / "one.png").exists()
    assert detect(source / "one.png", "--exist-ok") == 0 and not (tmp_path / "out" / "exp3").exists()


def test_a_part_of_the_classes_and_every_second_frame(detect, tmp_path, capsys):
    drawn(tmp_path / "in", "one.png", (128, 64), [(RED, 10, 20, 50, 60), (GREEN, 70, 10, 110, 40)])
    assert detect(tmp_path / "in", "--classes", "green") == 0
    assert "red" not in capsys.readouterr().out
    path = clip(tmp_path / "a.mp4", frames=9, fps=10)
    assert detect(path, "--vid-stride", "2", "--fourcc", "MJPG", "--save-txt", "--name", "v") == 0
    video = open_video(tmp_path / "out" / "v" / "a.avi")
    assert (video.frames, video.fps) == (5, 5)
    assert tree(tmp_path / "out" / "v" / "labels") == [f"a_{n}.txt" for n in (1, 3, 5, 7, 9)]


def test_ctrl_c_keeps_the_part_of_a_video_that_is_done(detect, tmp_path, capsys, monkeypatch):
    path = clip(tmp_path / "a.mp4", frames=9)
    seen = iter(range(100))

    def draw(image, *rest):
        if next(seen) == 4:
            raise KeyboardInterrupt
        return image

    monkeypatch.setattr(infer, "draw_detections", draw)
    assert detect(path) == 130
    assert tree(tmp_path / "out" / "exp") == ["a.mp4"]
    assert open_video(tmp_path / "out" / "exp" / "a.mp4").frames == 4
    said = capsys.readouterr()
    assert "interrupted" in said.err and "results are in" in said.out


def test_a_bug_leaves_no_half_video(detect, tmp_path, monkeypatch):
    path = clip(tmp_path / "a.mp4", frames=3)
    monkeypatch.setattr(infer, "draw_detections", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        detect(path)
    assert tree(tmp_path / "out") == []


def test_a_video_that_stops_early_is_told(detect, tmp_path, capsys):
    whole = clip(tmp_path / "a.avi", frames=60, size=(320, 240), fourcc="MJPG")
    content = whole.read_bytes()
    cut = content.index(b"movi") + (len(content) - content.index(b"movi")) // 2
    (tmp_path / "cut.avi").write_bytes(content[:cut])
    code = detect(tmp_path / "cut.avi")
    said = capsys.readouterr()
    assert code == 1 and "damaged" in said.err and (tmp_path / "out" / "exp" / "cut.mp4").exists()


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
    assert detect(source, "--exist-ok") == 2
    assert "would replace it" in capsys.readouterr().err and sample.path.read_bytes() == before


def test_an_image_is_written_whole_or_not_at_all(tmp_path):
    image = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    write_image(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    write_image(tmp_path / "B.JPG", image)
    with pytest.raises(Fault, match=r"\.xyz"):
        write_image(tmp_path / "a.xyz", image)
    assert tree(tmp_path) == ["B.JPG", "a.png"]
