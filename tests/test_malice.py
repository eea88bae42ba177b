"""Strangers' files, made to do harm: none runs, fills or hangs the machine, and each is told in lines of its own.

Hostile names in pages are in test_check, test_draw and test_report; hostile models in test_safety.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data import images
from data.__main__ import main as data_main
from data.config import read_data_spec
from data.images import MOST_PIXELS, decode_image, image_size, read_image
from data.masks import read_ids
from data.readers import read_split
from data.structures import PROGRAM, Detections, Fault, version
from engine import doors, explain, export, infer, train, validate
from engine.config import read_options
from engine.doors import door, parse_device, told
from engine.results import folder_name, write_crops
from engine.sources import Frame, Source, read_picture
from models.__main__ import main as models_main
from models.checkpoint import load_checkpoint, restore, save_checkpoint
from models.network import MOST_WEIGHTS, build
from models.parse import parse_text
from models.spec import ModelSpec
from search import run as search_run

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
nc: 2
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""


# ---- YAML


@pytest.mark.parametrize("text", ['names: ["\\U00110000"]\ntrain: a\n', "%YAML " + "9" * 5000 + ".1\n---\ntrain: a\n"])
def test_numbers_out_of_range_in_a_data_yaml_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(Fault, match="data.yaml"):
        read_data_spec(tmp_path / "data.yaml")


@pytest.mark.parametrize(
    "command", ["check {0} --seed -1", "check {0} --pictures -1", "shapes {0} --seed -1", "shapes ."]
)
def test_wrong_numbers_and_places_on_the_command_line_are_told(tmp_path, command, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = data_main(command.format("there").split())
    except SystemExit as left:  # argparse's
        code = left.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err and list(tmp_path.iterdir()) == []


# ---- images


@pytest.mark.parametrize("length", [0, 1])
def test_a_jpeg_whose_segment_has_no_length_is_no_picture(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0" + struct.pack(">H", length) + bytes(64))
    with pytest.raises(Fault):
        image_size(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width: int, height: int) -> bytes:
    """The head of a PNG of one bit a pixel. A whole one of 30,000 x 30,000 takes 110 kB, and 2.7 GB once decoded."""
    rows = zlib.compress(b"\0" * 10_000, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    small = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    frame = small.index(b"\xff\xc0")
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


BOMBS: dict[str, bytes] = {
    "a PNG": png_bomb(30_000, 30_000),
    "a PNG beyond OpenCV's own limit": png_bomb(40_000, 40_000),
    "a PNG beyond libpng's": png_bomb(2**30, 2**30),
    "a JPEG": jpeg_bomb(65_500, 65_500),
    "a GIF": b"GIF89a"
    + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0)
    + b"\0\0\0\xff\xff\xff,"
    + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
    + b"\x02\x02\x44\x01\0;",
    "a PPM": b"P6\n30000 30000\n255\n",
    "a BMP": b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "a TIFF": b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 256, 4, 1, 30_000, 257, 4, 1, 30_000) + b"\0" * 4,
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_decompression_bomb_is_refused_by_its_header(
    kind: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(BOMBS[kind])
    monkeypatch.setattr(images.cv2, "imread", None)  # nothing is decoded
    monkeypatch.setattr(images.cv2, "imdecode", None)
    wanted = f"{path}: has more than 200,000,000 pixels; save it smaller, or remove it"
    if kind == "a JPEG":  # that ends, as a photo does
        assert BOMBS[kind].endswith(b"\xff\xd9")
    for read in (image_size, read_image, read_picture):
        with pytest.raises(Fault) as caught:
            read(path)
        assert str(caught.value) == wanted
    if kind.startswith("a PNG"):
        with pytest.raises(Fault, match="more than 200,000,000 pixels"):
            read_ids(path)


def test_the_largest_photos_pass() -> None:
    assert 16_320 * 12_240 <= MOST_PIXELS  # 200 megapixels
    with pytest.raises(Fault, match="more than"):
        decode_image(png_bomb(20_000, 10_001), "x")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif", ".gif", ".ppm"])
def test_an_image_may_have_another_kind_s_name(suffix: str, tmp_path: Path) -> None:
    if not cv2.haveImageWriter(f"a{suffix}"):
        pytest.skip(f"this OpenCV writes no {suffix}")
    content = cv2.imencode(suffix, np.full((20, 30, 3), 99, np.uint8))[1].tobytes()
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).write_bytes(content)
        assert image_size(tmp_path / name) == (30, 20)
        assert read_image(tmp_path / name).shape == read_picture(tmp_path / name).shape == (20, 30, 3)


def test_a_cut_off_image_is_an_image_or_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".tif"):
        whole = cv2.imencode(suffix, pixels)[1].tobytes()
        for end in (0, 1, 5, 12, 27, 60, len(whole) // 2, len(whole) - 1):
            path = tmp_path / f"a{suffix}"
            path.write_bytes(whole[:end])
            try:
                assert read_image(path).shape[1] == image_size(path)[0]
            except Fault as fault:
                assert fault.lines == (
                    f"{path}: cannot be read as an image; save it again as JPEG or PNG, or remove it",
                )
    assert "[ERROR" not in capfd.readouterr().err  # OpenCV's own words


def test_exif_of_a_stranger_turns_an_image_or_does_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    whole = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    tag = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    for exif, size in {
        b"MM\0*\0\0\0\x08\0\x01" + tag: (20, 30),
        b"MM\0*\0\0\0\x08\xff\xff" + tag: (20, 30),  # more entries than there are
        b"MM\0*\xff\xff\xff\xff\0\x01" + tag: (30, 20),  # outside the file
        b"II*\0\x08": (30, 20),
        b"": (30, 20),
    }.items():
        body = b"Exif\0\0" + exif
        path.write_bytes(whole[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body + whole[2:])
        assert image_size(path) == size == read_image(path).shape[1::-1]


def test_a_jpeg_of_fill_bytes_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff" * 3_000_000 + b"\xd9")
    path.write_bytes(b"\xff\xd8" + b"\xff" * 3_000_000)
    with pytest.raises(Fault, match="cannot be read as an image"):
        image_size(path)


@pytest.mark.parametrize("size", [(1, 90_000), (90_000, 1)])
def test_a_thread_of_pixels_fits_into_a_square(size: tuple[int, int], tmp_path: Path) -> None:
    from data.dataset import ImageSet
    from data.structures import Sample

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((size[1], size[0], 3), np.uint8))
    boxes = np.array([[0, 0, *size]], np.float32)
    item = ImageSet([Sample(tmp_path / "a.png", boxes, np.zeros(1, np.int64))], 64)[0]
    assert item.image.shape == (3, 64, 64) and item.boxes.isfinite().all()


# ---- labels


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Two images, the second with a good label in all formats."""
    for folder in ("images", "labels", "xml"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "labels" / "b.txt").write_text("0 .5 .5 .5 .5\n")
    (tmp_path / "xml" / "b.xml").write_text(XML)
    return tmp_path


def notes(folder: Path, text: str) -> list[str]:
    (folder / "data.yaml").write_text(text)
    found = read_split(read_data_spec(folder / "data.yaml"), "train")
    assert len(found.samples) >= 1 and all(np.isfinite(sample.boxes).all() for sample in found.samples)
    return [note.replace(f"{folder}/", "") for note in found.notes]


YOLO = "train: images\nnames: [x]\n"
VOC = "train: images\nformat: voc\nannotations: xml\nnames: [x]\n"
COCO = "train: c.json\nimages: images\nnames: [x]\n"
XML = (
    "<annotation><object><name>x</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    "</object></annotation>"
)
FRACTION = "a fraction of the image's size, 0 to 1, is right (box left out)"


@pytest.mark.parametrize(
    ("label", "note"),
    [
        ("0 nan .5 .5 .5", f"labels/a.txt:1: cx is nan; {FRACTION}"),
        ("0 .5 inf .5 .5", f"labels/a.txt:1: cy is inf; {FRACTION}"),
        ("0 .5 .5 -.5 .5", f"labels/a.txt:1: width is -.5; {FRACTION}"),
        ("0 .5 .5 .5 1e308", f"labels/a.txt:1: height is 1e308; {FRACTION}"),
        ("9" * 99_999 + " .5 .5 .5 .5", f"labels/a.txt:1: class {'9' * 60} is out of range; there are 1 names, so 0 to "
         "0 is right (box left out)"),
        ("0 .5 .5 .5 .5\0", "labels/a.txt:1: '0 .5 .5 .5 .5\\x00' are not five numbers; class cx cy width height is "
         "right (box left out)"),
        ("0 .5 .5 .1 .1\n" * 10_001, "labels/a.txt: has 10,001 boxes; 10,000 at most are right (image left out)"),
        ("0 .5 .5 .1 .1\n" * 10**6, "labels/a.txt: has 14,000,000 bytes; 8,000,000 at most are right (image left out)"),
    ],
)  # fmt: skip
def test_a_hostile_label_costs_itself(label: str, note: str, drawn: Path) -> None:
    (drawn / "labels" / "a.txt").write_text(label)
    assert notes(drawn, YOLO) == [note]


def test_pipes_and_devices_are_neither_labels_nor_images(drawn: Path) -> None:
    os.symlink("/dev/zero", drawn / "labels" / "a.txt")
    os.mkfifo(drawn / "images" / "c.png")
    os.symlink("/dev/zero", drawn / "images" / "d.png")
    assert notes(drawn, YOLO) == [
        "labels/a.txt: is no file (image left out)",
        "images/c.png: there is no such image; correct the list, or put the image there (image left out)",
        "images/d.png: there is no such image; correct the list, or put the image there (image left out)",
    ]
    (drawn / "images" / "c.png").unlink()


@pytest.mark.parametrize(
    ("xml", "note"),
    [
        (f'<!DOCTYPE l [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>{XML}', "xml/a.xml:1: the xml declares a DOCTYPE; remove "
         "it, labels need none (image left out)"),
        ("<a>" * 50_000, "xml/a.xml:1: tags are nested deeper than 20 levels (image left out)"),
        ("<annotation>" + "<object><name>x</name></object>" * 10_001 + "</annotation>", "xml/a.xml: has 10,001 boxes; "
         "10,000 at most are right (image left out)"),
        (XML.replace(">9<", ">nan<"), "xml/a.xml:1: the box is [1.0, 1.0, nan, nan]; finite pixels are right (box left "
         "out)"),
        (XML.replace(">x<", ">" + "y" * 90_000 + "<"), f"xml/a.xml:1: class '{'y' * 56}... is not among the names of "
         "the data YAML; names are x (box left out)"),
    ],
)  # fmt: skip
def test_a_hostile_xml_costs_itself(xml: str, note: str, drawn: Path) -> None:
    (drawn / "xml" / "a.xml").write_text(xml)
    found = notes(drawn, VOC)
    assert found[0] == note or len(found) > 3  # a line for every object


def test_a_hostile_json_costs_itself(drawn: Path) -> None:
    good: dict[str, list[Any]] = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"id": 7, "image_id": 2, "category_id": 1, "bbox": [1, 1, 5, 5]}],
        "categories": [{"id": 1, "name": "x"}],
    }

    def told_of(**changed: Any) -> list[str]:
        (drawn / "c.json").write_text(json.dumps(good | changed))
        return notes(drawn, COCO)

    assert told_of() == []
    elsewhere = {"id": 1, "file_name": "../../../../../../../../../etc/passwd"}
    assert "cannot be read as an image" in told_of(images=[elsewhere, good["images"][1]])[0]
    box = {"id": 8, "image_id": 1, "category_id": 1}
    assert "bbox is [nan, 1, 1, 1]" in told_of(annotations=[*good["annotations"], box | {"bbox": [np.nan, 1, 1, 1]}])[0]
    assert told_of(categories=[*good["categories"], {"id": 10**40, "name": "x"}]) == []
    many = [box | {"bbox": [1, 1, 5, 5]}] * 10_001
    assert "has 10,001 boxes; 10,000 at most are right" in told_of(annotations=[*good["annotations"], *many])[0]
    for text in ("[" * 100_000, '{"images": [' + "9" * 5000 + "]}", '{"images": 1}'):
        (drawn / "c.json").write_text(text)
        with pytest.raises(Fault, match=r"c\.json: (not JSON|there is no list)"):
            notes(drawn, COCO)


# ---- YAML of data sets and options


LAUGHS = "a: &a [x,x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefghi")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (LAUGHS + YOLO, "data.yaml:1: unknown key 'a'"),
        ("names: &a [*a]\ntrain: images\n", "data.yaml:1: class 0 is not a name; a text is right"),
        ("names: " + "[" * 300, "data.yaml: not YAML: nested deeper than 40 levels"),
        ("names: " + "{a: " * 300, "data.yaml: not YAML: nested deeper than 40 levels"),
        (YOLO + "#" * 400_000, "data.yaml: has 400,025 bytes; 400,000 at most are right"),
        ('train: "images\\0"\nnames: [x]\n', "data.yaml:1: train holds the letter 0, which no path may"),
        ('train: [images, "b\\0"]\nnames: [x]\n', "data.yaml:1: train holds the letter 0, which no path may"),
        ("nc: " + "9" * 5000 + "\n" + YOLO, "data.yaml:1: nc is 9999"),
        ("train: !!python/object/apply:os.mkdir [EVIL]\nnames: [x]\n", "EVIL does not exist"),
        ("path: ../../../../../../../../..\ntrain: etc\nnames: [x]\n", "data.yaml: there is no image in /etc"),
        ("download: mkdir EVIL\npath: gone\n" + YOLO, "get it with: mkdir EVIL"),
    ],
)
def test_a_hostile_data_yaml_is_one_line(text: str, wanted: str, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(drawn)
    before = sorted(os.listdir(drawn))
    with pytest.raises(Fault) as caught:
        notes(drawn, text)
    assert wanted in str(caught.value) and len(caught.value.lines) == 1
    assert sorted(os.listdir(drawn)) == sorted({*before, "data.yaml"})


def test_many_classes_are_read_in_time(drawn: Path) -> None:
    """Each was compared with all before it: minutes for the classes of a large data set."""
    (drawn / "data.yaml").write_text("train: images\nnames:\n" + "".join(f"- n{number}\n" for number in range(3_000)))
    assert len(read_data_spec(drawn / "data.yaml").names) == 3_000


def test_a_hostile_options_file_is_one_line(tmp_path: Path) -> None:
    for text, wanted in {
        "lr0: " + "[" * 300: "nested deeper than 40 levels",
        "lr0: !!python/object/apply:os.mkdir [EVIL]": "lr0 is one value",
        "#" * 500_000: "has 500,000 bytes; 400,000 at most are right",
    }.items():
        (tmp_path / "hyp.yaml").write_text(text)
        with pytest.raises(Fault, match=wanted):
            read_options(tmp_path / "hyp.yaml")


def test_names_for_imported_weights_are_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cfg = tmp_path / "names.yaml", tmp_path / "model.yaml"
    cfg.write_text(MODEL)
    torch.save({}, tmp_path / "a.pth")
    argv = ["import", str(tmp_path / "a.pth"), "--cfg", str(cfg), "-o", str(tmp_path / "o.pt"), "--names", str(path)]
    for text in (LAUGHS + "names: [*i]", "names: " + "[" * 500, "names: !!python/object/apply:os.getpid []"):
        path.write_text(text)
        assert models_main(argv) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"{path}:") and len(told) < 400 and len(told.splitlines()) == 1


# ---- checkpoints


class Payload:
    """What it says happens when it is loaded by pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def a_spec() -> ModelSpec:
    return parse_text(MODEL)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "good.pt", build(a_spec()), ["a", "b"], imgsz=64)
    return tmp_path / "good.pt"


def doors_with(weights: Path, folder: Path) -> dict[str, Callable[[], int]]:
    """Every command that reads a checkpoint, given this one."""
    run, picture, out = folder / "run", folder / "a.png", str(folder / "out")
    run.mkdir()
    (run / "last.pt").write_bytes(weights.read_bytes())
    (run / "config.yaml").write_text("epochs: 2\n")
    cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    for kind in ("images", "labels"):
        (folder / "d" / kind).mkdir(parents=True)
    for number in range(40):
        cv2.imwrite(str(folder / "d" / "images" / f"{number}.png"), np.zeros((64, 64, 3), np.uint8))
        (folder / "d" / "labels" / f"{number}.txt").write_text("0 .5 .5 .5 .5\n")
    data = folder / "d" / "data.yaml"
    data.write_text("train: images\nval: images\nnames: [a, b]\n")
    cfg = folder / "model.yaml"
    cfg.write_text(MODEL)
    space = folder / "space.yaml"
    space.write_text(MODEL.replace("[8, 3, 2]", "[8, {kernel: {choice: [3, 5]}}, 2]").replace("8, {", "8, {stride: 2, ")
                     .replace("}, 2]", "}]"))  # fmt: skip
    small = ["--data", str(data), "--imgsz", "64", "--device", "cpu", "--project", out]
    given = ["--weights", str(weights)]
    return {
        "train --weights": lambda: train.main(["--cfg", str(cfg), *given, *small]),
        "train --teacher": lambda: train.main(["--cfg", str(cfg), "--teacher", str(weights), *small]),
        "train --resume": lambda: train.main(["--resume", str(run)]),
        "search --weights": lambda: search_run.main(["--cfg", str(space), *given, *small, "--epochs", "9"]),
        "search --resume": lambda: search_run.main(["--resume", str(run)]),
        "val": lambda: validate.main([*given, "--data", str(data), "--device", "cpu"]),
        "detect": lambda: infer.main([*given, "--source", str(picture), "--project", out, "--device", "cpu"]),
        "export": lambda: export.main([*given, "--format", "torch"]),
        "explain": lambda: explain.main([*given, "--source", str(picture), "--project", out, "--device", "cpu"]),
        "models import": lambda: models_main(["import", str(weights), "--cfg", str(cfg), "-o", f"{out}.pt"]),
    }


def test_a_pickle_in_a_checkpoint_runs_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker, weights = tmp_path / "EVIL", tmp_path / "evil.pt"
    torch.save({"format": "oneshot-yolo 1", "state": Payload(marker)}, weights)
    for name, command in doors_with(weights, tmp_path).items():
        assert command() == 2, name
        told = capsys.readouterr().err
        assert "holds Python objects or is no checkpoint at all; it was not opened" in told, name
        assert not marker.exists(), name
    run, arguments = Payload(marker).__reduce__()
    run(*arguments)  # what unpickling does: the trap itself works
    assert marker.exists()


def test_a_checkpoint_that_unpacks_to_more_than_it_is_stays_shut(saved: Path) -> None:
    bomb = saved.with_name("bomb.pt")
    with zipfile.ZipFile(saved) as parts, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in parts.infolist():
            packed.writestr(part.filename, parts.read(part))
        packed.writestr("good/data/99", bytes(5_000_000))
    with pytest.raises(Fault, match=r"bomb\.pt: would unpack to 5,\d+,\d+ bytes; a checkpoint holds its tensors as"):
        load_checkpoint(bomb)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("names", ["a", 7], "a checkpoint whose 'names' are not all texts"),
        ("names", ["a", ["b"]], "a checkpoint whose 'names' are not all texts"),
        ("names", ["a", "b", "c"], "3 names for 2 classes"),
        ("imgsz", 10**9, "a checkpoint for images of 1000000000 pixels; 1 to 16,384 are right"),
        ("imgsz", -64, "a checkpoint for images of -64 pixels; 1 to 16,384 are right"),
        ("yaml", MODEL + "ops: evil.py\n", "ops: evil.py is Python code that would run"),
        ("yaml", "[" * 9_000, "nested deeper than 40 levels"),
        ("state", {"layers.0.conv.weight": torch.zeros(1).expand(10**6, 10**6)}, "of its tensors do not fit its YAML"),
    ],
)
def test_what_a_checkpoint_says_is_checked(key: str, value: Any, told: str, saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    content[key] = value
    torch.save(content, saved)
    with pytest.raises(Fault) as caught:
        restore(load_checkpoint(saved))
    assert told in str(caught.value)


def test_a_training_state_of_a_stranger_is_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("epochs: 2\n")
    for state in ({}, {"epoch": 1}, {"epoch": "x", "best": {"epoch": 1}}, {"epoch": 1, "best": 3}):
        save_checkpoint(folder / "last.pt", build(a_spec()), ["a", "b"], imgsz=64, training=state)
        assert train.main(["--resume", str(folder)]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and "nothing can go on from its training state" in told[0]


def test_a_model_that_fills_the_memory_is_refused_before_it_is_built() -> None:
    rows = "".join("  - [-1, 1, Conv, [65536, 3, 1]]\n" for _ in range(2))
    with pytest.raises(Fault, match=r"layer 2: .* weights up to here; a network has at most 1,000,000,000"):
        build(parse_text(MODEL.replace("head:", rows + "head:")))
    assert MOST_WEIGHTS > 3 * 287_575_580  # yolov4-p7


# ---- what is written under names from elsewhere


NAMES = ["..", ".", "", "../../x", "/etc/x", "a/b", "a\\b", "a\0b", "C:", " x ", "~", "x" * 999, "\n"]


@pytest.mark.parametrize("name", NAMES)
def test_the_crops_of_a_class_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    frame = Frame(Source("image", "a.png", "a"), np.zeros((9, 9, 3), np.uint8))
    found = Detections(torch.tensor([[1.0, 1, 5, 5]]), torch.tensor([0.5]), torch.tensor([0]))
    write_crops(tmp_path / "crops", frame, found, [name])
    (crop,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert crop.resolve().parents[2] == tmp_path.resolve() and crop.parent.name == folder_name(name, 0)


def test_convert_and_split_write_into_their_folder_only(drawn: Path) -> None:
    secret = drawn / "secret.png"
    cv2.imwrite(str(secret), np.ones((64, 64, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "../secret.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in (1, 2)],
        "categories": [{"id": 1, "name": "../../x"}],
    }
    (drawn / "c.json").write_text(json.dumps(content))
    (drawn / "data.yaml").write_text("train: c.json\nimages: images\nnames: [../../x]\n")
    before = {path for path in drawn.rglob("*")}
    for to in ("yolo", "voc", "coco"):
        assert data_main(["convert", str(drawn / "data.yaml"), "--to", to, "-o", str(drawn / "out" / to)]) == 0
    data_main(["split", str(drawn / "data.yaml"), "train=.5", "val=.5", "-o", str(drawn / "out" / "split")])
    new = {path for path in drawn.rglob("*")} - before
    assert new and all(drawn / "out" in (path, *path.parents) for path in new)


# ---- what is told


def test_what_is_told_moves_no_cursor_and_stays_on_its_line() -> None:
    assert told(Fault("a\x1b[2J\nb\r.png: é is fine", "2")) == ["a?[2J?b?.png: é is fine", "2"]
    assert told(OSError(2, "gone", "a\n.png")) == ["a?.png: gone"]


def test_a_dead_worker_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @door
    def main(argv: Any = None) -> int:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore of torch's")

    assert main([]) == 2
    assert capsys.readouterr().err == f"DataLoader worker (pid 7) is killed by signal: Killed. ; {doors.LESS_MEMORY}\n"


@pytest.mark.parametrize(
    "main",
    [train.main, validate.main, infer.main, export.main, explain.main, search_run.main],
    ids=["train", "val", "detect", "export", "explain", "search"],
)
def test_every_door_says_its_version(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{PROGRAM} {version()}\n"
    for other in (models_main, data_main):
        with pytest.raises(SystemExit):
            other(["--version"])
        assert capsys.readouterr().out == f"{PROGRAM} {version()}\n"


def test_there_is_one_version() -> None:
    setup = (ROOT / "setup.cfg").read_text()
    assert f"version = {version()}\n" in setup
    assert f"\nversion: {version()}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version()}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_a_mac_s_device_is_taken_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert parse_device("mps") == torch.device("mps") and parse_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Fault, match="--device 'mps': not a device"):
        parse_device("mps")


def test_threads_are_set_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(doors.torch, "set_num_threads", asked.append)
    parser = doors.option_parser("x")
    assert vars(doors.parse_options(parser, ["--threads", "3"])) == {} and asked == [3]
    with pytest.raises(Fault, match="--threads 0: 1 or more"):
        doors.parse_options(parser, ["--threads", "0"])


def test_pillow_finds_the_size_that_opencv_decodes() -> None:
    held = io.BytesIO()
    Image.new("RGB", (31, 17)).save(held, "WEBP")
    assert images.stored_size(io.BytesIO(held.getvalue()), "x") == ((31, 17), False)
