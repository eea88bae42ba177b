"""`python -m data check`: counts, every fault, copies, and a page that hostile names cannot break."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.__main__ import main
from data.check import SIDES, check, copies, report_text, side_names, sides_of
from data.contact_sheet import choose, write_contact_sheet
from data.structures import Fault

HOSTILE = "</title><script>alert('1')</script><img src=x onerror=\"alert(2)\">&"


def data_set(folder: Path, names: str = "[cat, dog, cow]") -> Path:
    rng = np.random.default_rng(0)
    texts = {
        "train": ["0 .5 .5 .5 .5\n1 .2 .2 .1 .1\n", "0 .5 .5 .25 .25\n0 1 2\n5 .1 .1 .1 .1\n", "", None],
        "val": ["0 .5 .5 .9 .9\n", "1 .3 .1 .3 .1\n"],
    }
    for split, labels in texts.items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for number, text in enumerate(labels):
            pixels = rng.integers(0, 256, (100, 200, 3), dtype=np.uint8)
            assert cv2.imwrite(str(folder / f"images/{split}/{number}.jpg"), pixels)
            if text is not None:
                (folder / f"labels/{split}/{number}.txt").write_text(text)
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    return folder / "data.yaml"


def lines_of(path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    code = main(["check", str(path), *options])
    return code, [line.strip() for line in capsys.readouterr().out.replace(f"{path.parent}/", "").splitlines()]


def test_what_is_there_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = lines_of(data_set(tmp_path), capsys)
    assert code == 1
    rows = [re.split(r"\s{2,}", line) for line in lines]
    assert lines[0] == f"data.yaml: 3 classes, format yolo, in {tmp_path}"
    for row in (
        ["images", "4", "2"],
        ["without a box", "2", "0"],
        ["boxes", "3", "2"],
        ["small  < 32 x 32", "1", "33 %", "1", "50 %"],
        ["0 cat", "2", "67 %", "1", "50 %", "█" * 24],
        ["1 dog", "1", "33 %", "1", "50 %", "█" * 16],
        ["2 cow", "0", "0 %", "0", "0 %"],
        ["8 to 16 pixels", "1", "33 %", "0", "0 %"],
    ):
        assert row in rows or re.split(r"\s{2,}", "  ".join(row)) in rows, row
    assert "classes without a box in train: cow" in lines
    assert lines[-1] == "fit for use, but for 2 faults"


def test_every_fault_is_listed_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_set(tmp_path)
    (tmp_path / "labels/val/9.txt").write_text("")
    (tmp_path / "labels/val/classes.txt").write_text("cat")
    jpeg = (tmp_path / "images/val/0.jpg").read_bytes()
    (tmp_path / "images/val/0.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (tmp_path / "images/val/2.jpg").write_bytes(b"no image")
    code, lines = lines_of(path, capsys)
    start = lines.index("faults: 5")
    assert (code, [line for line in lines[start:] if line]) == (
        1,
        [
            "faults: 5",
            "lines that are no box: 1 (box left out)",
            "train: labels/train/1.txt:2: found 3 fields; 5 are right: class cx cy width height",
            "classes that are not known: 1 (box left out)",
            "train: labels/train/1.txt:3: class 5 is out of range; there are 3 names, so 0 to 2 is right",
            "images that cannot be read: 1 (image left out)",
            "val: images/val/2.jpg: cannot be read as an image; save it again as JPEG or PNG, or remove it",
            "images that are cut short: 1 (read as far as it goes)",
            "val: images/val/0.jpg: the end of the JPEG is missing; get the file again, or remove it",
            "label files without an image: 1 (not read)",
            "labels/val/9.txt: there is no image of this name; remove the file, or put it there",
            "notes: 1",
            "images without a label file: 1 (taken as without objects)",
            "train: images/train/3.jpg: there is no label file labels/train/3.txt",
            "classes without a box in train: cow",
            "classes without a box in val: cow",
            "fit for use, but for 5 faults",
        ],
    )


def test_copies_are_found_within_and_across_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_set(tmp_path)
    for name in ("train/2.jpg", "val/1.jpg"):
        (tmp_path / "images" / name).write_bytes((tmp_path / "images/train/0.jpg").read_bytes())
    _, lines = lines_of(path, capsys)
    start = lines.index("images with the same content: 1 groups, 1 across splits")
    assert lines[start + 1] == "train: images/train/0.jpg = train: images/train/2.jpg = val: images/val/1.jpg"
    assert lines[-1] == "fit for use, but for 2 faults and 1 images in several splits"
    other = tmp_path / "other"
    other.write_bytes(b"x" * (tmp_path / "images/train/1.jpg").stat().st_size)
    assert copies([("", tmp_path / "images/train/1.jpg"), ("", other)]) == ()


def test_a_sound_set_is_fit_and_a_split_that_is_no_use_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_set(tmp_path)
    for file in (tmp_path / "labels").rglob("*.txt"):
        file.write_text("0 .5 .5 .5 .5\n1 .5 .5 .5 .5\n2 .5 .5 .5 .5\n")
    code, lines = lines_of(path, capsys, "--decode")
    assert (code, lines[-1]) == (0, "fit for use")
    for file in (tmp_path / "labels/val").iterdir():
        file.write_text("0 .5\n")
    code, lines = lines_of(path, capsys)
    assert code == 2 and lines[-1] == "not fit for use: correct the faults above"
    assert "fault: data.yaml: val: nothing can be used" in lines
    assert "fault: labels/val/0.txt:1: found 2 fields; 5 are right: class cx cy width height (box left out)" in lines


def test_decoding_finds_what_a_header_does_not_tell(tmp_path: Path) -> None:
    path = data_set(tmp_path)
    target = tmp_path / "images/val/0.png"
    assert cv2.imwrite(str(target), np.zeros((20, 20, 3), dtype=np.uint8))
    png = target.read_bytes()
    target.write_bytes(png[:33] + b"\0" * 20 + png[-12:])  # header and end, nothing between
    assert cv2.imread(str(target)) is None
    assert not any(problem.file == str(target) for problem in check(path).lost)
    assert any(problem.file == str(target) for problem in check(path, decode=True).lost)


def test_a_wrong_yaml_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_side_is_in_the_bin_that_names_it() -> None:
    assert len(side_names()) == len(SIDES) + 1
    areas = np.array([7.99, 8, 15, 511, 512, 4000]) ** 2
    assert [side_names()[index] for index in sides_of(areas)] == [
        "under 8 pixels",
        "8 to 16 pixels",
        "8 to 16 pixels",
        "256 to 512 pixels",
        "512 pixels and more",
        "512 pixels and more",
    ]


# --- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_names_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / HOSTILE.replace("/", "_")
    path = data_set(folder, names="['" + HOSTILE.replace("'", "''") + "', dog, cow]")
    assert cv2.imwrite(str(folder / 'images/train/"onload="alert(3).jpg'), np.zeros((9, 9, 3), dtype=np.uint8))
    (folder / 'labels/train/"onload="alert(3).txt').write_text(f"0 .5 .5 .5 .5\n{HOSTILE} .5 .5 .5 .5\n")
    sheet = tmp_path / "sheet.html"
    assert main(["check", str(path), "--html", str(sheet)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"pictures: {sheet}"
    page = Page(sheet.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and HOSTILE in page.text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert [str(words).split() for words in policy] == [
        ["default-src", "'none';", "img-src", "data:;", "style-src", "'unsafe-inline'"]
    ]
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 7 and all(source.startswith("data:image/jpeg;base64,") for source in sources)


def test_boxes_stand_where_they_are(tmp_path: Path) -> None:
    report = check(data_set(tmp_path))
    write_contact_sheet(tmp_path / "sheet.html", report)
    page = Page((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    rects = [attributes for tag, attributes in page.tags if tag == "rect"]
    places = {tuple(float(str(rect[key])) for key in ("x", "y", "width", "height")) for rect in rects}
    assert len(rects) == 5 and (50.0, 25.0, 100.0, 50.0) in places and (30.0, 5.0, 60.0, 10.0) in places
    assert {attributes["viewbox"] for tag, attributes in page.tags if tag == "svg"} == {"0 0 200 100"}


def test_pictures_with_faults_and_rare_classes_come_first(tmp_path: Path) -> None:
    report = check(data_set(tmp_path))
    chosen = choose(report, 4, seed=0)
    assert [entry[1].path.name for entry in chosen][:1] in (["1.jpg"], ["3.jpg"]) and len(chosen) == 4
    assert 1 in np.concatenate([entry[1].labels for entry in chosen])
    assert len(choose(report, 100, seed=0)) == 6
    assert [entry[1].path for entry in choose(report, 4, 0)] == [entry[1].path for entry in chosen]


def test_a_page_needs_a_folder(tmp_path: Path) -> None:
    report = check(data_set(tmp_path))
    with pytest.raises(Fault, match="does not exist; make it, or name another"):
        write_contact_sheet(tmp_path / "none/sheet.html", report)
    assert "2 faults" in report_text(report)
