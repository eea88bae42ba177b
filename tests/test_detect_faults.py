"""Every row of the table of faults in docs/detect.md: the message, the exit code, and what is kept."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from test_evaluate import RED, Seer, drawn
from test_infer import NAMES, clip, no_threads, tree, video_of

from engine import infer, results, sources
from engine.infer import Model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "detect.md"
ROWS = [
    tuple(part.strip() for part in re.split(r"(?<!\\) \| ", line.strip("| \n")))
    for line in PAGE.read_text().partition("| fault |")[2].splitlines()[2:]
]
TABLES = ["--save-csv", "--save-json"]


def picture(folder: Path, name: str) -> Path:
    return drawn(folder, name, (64, 64), [(RED, 10, 20, 50, 60)]).path


def camera_of(pictures):
    """Stands in for what cv2 opens: gives these pictures and then nothing; says how many there are."""
    turns = iter(pictures)
    capture = SimpleNamespace(image=None, release=lambda: None)

    def grab():
        capture.image = next(turns, None)
        return capture.image is not None

    capture.grab, capture.retrieve = grab, lambda: (True, capture.image)
    capture.get = lambda what: {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: float(len(pictures))}[what]
    grab()
    return capture


class Interrupting(Seer):
    """Ctrl-C comes while the fifth picture is looked at."""

    def __init__(self):
        super().__init__()
        self.seen = count(1)

    def predict(self, images):
        if next(self.seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return super().predict(images)


@pytest.fixture
def stream():
    """An address from which 12 pictures come, and then the connection ends."""
    frames = [cv2.imencode(".jpg", np.full((64, 96, 3), 20 * n, np.uint8))[1].tobytes() for n in range(12)]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
            self.end_headers()
            for frame in frames:
                head = b"--next\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(frame)
                self.wfile.write(head + frame + b"\r\n")
                time.sleep(0.02)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/live"
        server.shutdown()


def arranged(fault, source, run, patch, request):
    """Makes the fault: what ``--source`` is, more options, and the files that are in RUN afterwards.

    A number behind a video is how many frames it has, behind a table how many rows; 0 is any number but none.
    """

    def several(*, broken=None, content=b""):
        for name in ("a.png", "c.png"):
            picture(source, name)
        if broken:
            (source / broken).write_bytes(content)

    match fault:
        case "a path that does not exist":
            return source / "gone.jpg", [], {}
        case "a folder without pictures":
            return source, [], {}
        case "a glob that nothing fits":
            return source / "*.png", [], {}
        case "a file of another kind":
            (source / "a.pdf").touch()
            return source / "a.pdf", [], {}
        case "a list with a wrong line":
            picture(source, "a.png")
            (source / "list.txt").write_text("a.png\ngone.jpg\n")
            return source / "list.txt", [], {}
        case "a list with a stream in it":
            (source / "list.txt").write_text("rtsp://10.0.0.5/1")
            return source / "list.txt", [], {}
        case "an empty list":
            (source / "list.txt").write_text("# nothing\n\n")
            return source / "list.txt", [], {}
        case "a list that is no text":
            (source / "list.txt").write_bytes(b"\xff\xfe\x00\x80")
            return source / "list.txt", [], {}
        case "a broken image among others":
            several(broken="broken.jpg", content=b"\xff\xd8 not an image")
            return source, [], {"a.png": 0, "c.png": 0}
        case "a JPEG that was cut off":
            whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[1].tobytes()
            several(broken="cut.jpg", content=whole[: len(whole) * 2 // 3])
            return source, [], {"a.png": 0, "c.png": 0}
        case "a file that may not be read":
            several(broken="secret.jpg", content=b"x")
            read = Path.read_bytes

            def refused(path):
                if path.name == "secret.jpg":
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return read(path)

            patch.setattr(Path, "read_bytes", refused)
            return source, [], {"a.png": 0, "c.png": 0}
        case "no image that can be read":
            (source / "a.png").write_bytes(b"no")
            (source / "b.png").write_bytes(b"")
            return source, TABLES, {}
        case "no image on standard input":
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a.png")))
            return "-", [], {}
        case "a video that cannot be opened":
            (source / "a.mp4").write_bytes(b"no")
            return source / "a.mp4", [], {}
        case "a video that was cut off":
            content = clip(source / "whole.avi", frames=60, size=(320, 240), fourcc="MJPG").read_bytes()
            where = content.index(b"movi")
            for _ in range(6):  # each frame is a chunk called 00dc; the sixth is cut off
                where = content.index(b"00dc", where + 1)
            (source / "cut.avi").write_bytes(content[: where + 100])
            return source / "cut.avi", [], {"cut.mp4": 5}
        case "a camera that is not there":
            return "77", [], {}
        case "a stream that does not answer":
            return "http://me:secret@127.0.0.1:9/live", [], {}
        case "an address that is no stream":
            return "ftp://10.0.0.5/a.mp4", [], {}
        case "a stream that dies":
            return request.getfixturevalue("stream"), [], {"127.0.0.1-live.mp4": 0}
        case "a stream that changes its size":
            pictures = [np.zeros((side, side, 3), np.uint8) for side in (64, 64, 32, 32)]
            patch.setattr(sources, "_capture", lambda _: camera_of(pictures))
            return "0", [], {"camera0.mp4": 2}
        case "a full disk, images":
            several()
            picture(source, "b.png")
            write = Path.write_bytes
            patch.setattr(
                Path, "write_bytes", lambda p, data: write(Path("/dev/full") if p.name.startswith(".c-") else p, data)
            )
            return source, TABLES, {"a.png": 0, "b.png": 0, "predictions.csv": 3, "predictions.json": 3}
        case "a full disk, a video":
            clip(source / "a.mp4", frames=9)
            free, usage = iter(range(10**6, 0, -(2 * 10**5))), namedtuple("usage", "total used free")
            patch.setattr(sources, "check_codec", lambda _: None)
            patch.setattr(infer, "check_codec", lambda _: None)
            patch.setattr(sources.shutil, "disk_usage", lambda _: usage(0, 0, next(free, 0)))
            return source / "a.mp4", TABLES, {"a.mp4": 5, "predictions.csv": 0, "predictions.json": 0}
        case "a full disk, a table":

            class Full(io.FileIO):
                def write(self, data):
                    if self.tell() + len(data) > 400:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return super().write(data)

            for name in "abcdefgh":
                picture(source, f"{name}.png")
            patch.setattr(results, "open", lambda path, *_, **__: Full(path, "w"), raising=False)
            return source, ["--save-json", "--nosave"], {"predictions.json": 0}
        case "Ctrl-C":
            clip(source / "a.mp4", frames=9)
            usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
            request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
            patch.setattr(infer, "load", lambda *_, **__: Model(Interrupting().eval(), NAMES, 128))
            return source / "a.mp4", TABLES, {"a.mp4": 4, "predictions.csv": 4, "predictions.json": 4}
        case "a codec that cannot be written":
            return clip(source / "a.mp4", 2), ["--fourcc", "abcd"], {}
        case "a result in place of its source":
            run.mkdir(parents=True)
            return picture(run, "a.png"), ["--exist-ok"], {"a.png": 0}
        case "a folder of results that is a file":
            run.parent.touch()
            return picture(source, "a.png"), [], {}
        case "no screen":
            patch.delenv("DISPLAY", raising=False)
            patch.delenv("WAYLAND_DISPLAY", raising=False)
            return picture(source, "a.png"), ["--view"], {}
        case "a class that does not exist":
            return picture(source, "a.png"), ["--classes", "gren"], {}
        case "half precision without a GPU":
            patch.setattr(infer, "load", LOAD)
            return picture(source, "a.png"), ["--half"], {}
        case "an ONNX file of another program":
            onnx = pytest.importorskip("onnx")
            if not find_spec("onnxruntime"):
                pytest.skip("onnxruntime is not installed (the extra `export`)")
            value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
            same = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
            graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [same])
            opset = [onnx.helper.make_opsetid("", 18)]
            onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), source / "other.onnx")
            patch.setattr(infer, "load", LOAD)
            return picture(source, "a.png"), ["--weights", source / "other.onnx"], {}
        case "an ONNX file that was cut off":
            if not find_spec("onnxruntime"):
                pytest.skip("onnxruntime is not installed (the extra `export`)")
            (source / "cut.onnx").write_bytes(b"\x08\x09 not all of it")
            patch.setattr(infer, "load", LOAD)
            return picture(source, "a.png"), ["--weights", source / "cut.onnx"], {}
    raise AssertionError(f"docs/detect.md has a row that no test runs: {fault}")


LOAD = infer.load


@pytest.mark.parametrize(("fault", "message", "code", "kept"), ROWS, ids=[row[0] for row in ROWS])
def test_every_fault_of_the_page(fault, message, code, kept, tmp_path, monkeypatch, capsys, request):
    source, run = tmp_path / "in", tmp_path / "out" / "exp"
    source.mkdir()
    monkeypatch.setattr(infer, "load", lambda *_, **__: Model(Seer().eval(), NAMES, 128))
    place, options, files = arranged(fault, source, run, monkeypatch, request)
    command = ["--weights", "best.pt", "--device", "cpu", "--project", run.parent, "--source", place, *options]
    found = infer.main([str(word) for word in command])
    said = capsys.readouterr().err.replace(str(source), "IN").replace(str(run), "RUN")
    said = re.sub(
        r"; \d+ frames came faster than they were looked at", "", re.sub(r"127.0.0.1:\d{3,}", "127.0.0.1:PORT", said)
    )
    assert message.strip("`") in re.split(r"[\r\n]+", said) and "secret" not in said.replace("IN/secret.jpg", "")
    assert f"{found}" == code and (kept == "nothing") == (not files) and no_threads()
    assert tree(run) == sorted(files) if run.exists() else not files
    for name, number in files.items():
        path = run / name
        if path.suffix == ".mp4":
            assert video_of(path)[0] == number or (number == 0 and video_of(path)[0] > 0)
        elif path.suffix == ".json":
            assert len(rows := json.loads(path.read_text())) == number or (number == 0 and rows)
        elif path.suffix == ".csv":
            assert len(rows := path.read_text().splitlines()[1:]) == number or (number == 0 and rows)
        else:
            assert cv2.imread(str(path)) is not None


def test_the_page_has_enough_rows():
    assert len(ROWS) >= 30 and len({row[0] for row in ROWS}) == len(ROWS) and {len(row) for row in ROWS} == {4}


def test_the_page_names_every_option(capsys):
    assert infer.main(["--help"]) == 0
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help", "--ops", "--weights"}
    assert options <= set(re.findall(r"--[a-z][a-z-]*", PAGE.read_text()))
