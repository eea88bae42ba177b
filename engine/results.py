"""What detect.py leaves in its folder: pictures, videos, labels, crops and tables.

Whatever ends a run, every file in it is whole: pictures and labels appear when they are complete, a video with the
frames that it has, and a table is valid after each row. Names of classes and files are strangers' text: they lead to
no other folder, and a spreadsheet takes none of them for a formula.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.structures import Detections, Fault, LabelMap, Ranking
from engine.classify import ranked_rows, ranking_lines
from engine.doors import printable
from engine.draw import draw_detections, draw_label_map, draw_ranking, write_image
from engine.evaluate import label_lines
from engine.runs import atomically, table
from engine.segment import label_png
from engine.sources import End, Frame, Source, container, write_video

LABELS, CROPS, TABLE, DOCUMENT = "labels", "crops", "predictions.csv", "predictions.json"
COLUMNS = ("image", "frame", "class", "label", "score", "x1", "y1", "x2", "y2")
AREA_COLUMNS = ("image", "frame", "class", "label", "pixels", "share")
RANKED_COLUMNS = ("image", "frame", "rank", "class", "label", "score")
FORMULA = tuple("=+-@\t\r\n")  # what a spreadsheet takes for the start of a formula, or skips before one
LONGEST = 80  # letters of a class in a folder's name

Found = Any  # in a picture: `Detections`, the `Ranking` of a classifier, or the `LabelMap` of a segmenter
Write = Callable[[Frame | End, Found], None]


@dataclass(frozen=True)
class Wanted:
    """Which results a run leaves, and how its pictures look; the fields are the options of detect.py."""

    pictures: bool = True
    txt: bool = False
    conf: bool = False
    json: bool = False
    csv: bool = False
    crops: bool = False
    line_thickness: int = 0
    hide_labels: bool = False
    hide_conf: bool = False
    fourcc: str = "mp4v"
    vid_stride: int = 1


@dataclass(frozen=True)
class Form:
    """How what was found in a picture is written down and drawn; one a task.

    Attributes:
        suffix: what the files in ``labels`` end in.
        label_file: the content of one, of what was found in a picture and with or without scores.
        columns: the names of what `csv_rows` gives.
        json_row: an entry of predictions.json.
        draw: a copy of a picture with what was found in it.
        counted: the classes in a picture for the table of all pictures, each with a number.
        heading: of that table: the class, how many there are, and the mean of their numbers.
    """

    suffix: str
    label_file: Callable[[Frame, Found, bool], bytes]
    columns: tuple[str, ...]
    csv_rows: Callable[[Frame, Found, Sequence[str]], list[tuple[Any, ...]]]
    json_row: Callable[[Frame, Found, Sequence[str]], dict[str, Any]]
    draw: Callable[..., np.ndarray]
    counted: Callable[[Found], list[tuple[int, float]]]
    heading: tuple[str, str, str]


@contextmanager
def write_results(
    folder: Path,
    names: Sequence[str],
    wanted: Wanted,
    tell: Callable[[Source, Fault], None],
    view: Callable[[Source, np.ndarray], None] | None = None,
    task: str = "detect",
) -> Iterator[Write]:
    """``write(frame, what was found)`` for each picture, ``write(end, None)`` behind the last one of a source.

    ``tell`` hears what was wrong with a source; the next ones are written all the same. ``view`` gets each picture with
    its boxes. An OSError, such as that of a full disk, goes on to the caller: after it nothing more can be written.
    """
    form = FORMS[task]
    given_up: set[Source] = set()
    video = ExitStack()
    target: Path | None = None
    write_frame: Callable[[np.ndarray], None] | None = None

    def file_for(source: Source, name: str) -> Path:
        path = folder / name
        if source.kind in ("image", "video") and path.resolve() == Path(source.place).resolve():
            raise Fault(f"{source.place}: the result would replace it; give another --project or --name")
        return path

    def keep(frame: Frame, picture: np.ndarray) -> None:
        nonlocal target, write_frame
        if not frame.source.moves:
            suffix = Path(frame.source.place).suffix or ".jpg"
            path = file_for(frame.source, frame.source.stem + suffix)
            with naming(path):
                write_image(path, picture)
            return
        if write_frame is None:
            target = file_for(frame.source, frame.source.stem + container(wanted.fourcc))
            write_frame = video.enter_context(write_video(target, wanted.fourcc, frame.fps / wanted.vid_stride))
        write_frame(picture)

    def close_video(source: Source) -> None:
        nonlocal target, write_frame
        try:
            video.close()
        except Fault as fault:
            tell(source, fault)
        target, write_frame = None, None

    with ExitStack() as tables:
        write_csv = tables.enter_context(growing(folder / TABLE, _csv([form.columns]))) if wanted.csv else None
        write_json = tables.enter_context(growing_list(folder / DOCUMENT)) if wanted.json else None

        def write(item: Frame | End, found: Found) -> None:
            if isinstance(item, End):
                part = f"; the part before is in {target}" if target else ""
                close_video(item.source)
                if item.fault:
                    tell(item.source, Fault(*item.fault.lines[:-1], item.fault.lines[-1] + part))
                return
            assert found is not None
            if wanted.txt:  # a file for every picture: an empty one says that nothing was found
                path = folder / LABELS / f"{item.name}{form.suffix}"
                with naming(path), atomically(path) as temporary:
                    temporary.write_bytes(form.label_file(item, found, wanted.conf))
            if write_csv:
                write_csv(_csv(form.csv_rows(item, found, names)))
            if write_json:
                write_json(json.dumps(form.json_row(item, found, names)))
            if wanted.crops:
                write_crops(folder / CROPS, item, found, names)
            if not wanted.pictures and view is None:
                return
            picture = form.draw(
                item.image,
                found,
                names,
                wanted.line_thickness,
                show_labels=not wanted.hide_labels,
                show_scores=not wanted.hide_conf,
            )
            if wanted.pictures and item.source not in given_up:
                try:
                    keep(item, picture)
                except Fault as fault:
                    given_up.add(item.source)
                    tell(item.source, fault)
                    close_video(item.source)
            if view:
                view(item.source, picture)

        try:
            yield write
        finally:
            if target is not None:
                video.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a write does not say which file it was about; here it does."""
    try:
        yield
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from None


# ---- files that are whole after every row


@contextmanager
def growing(path: Path, head: str = "", tail: str = "") -> Iterator[Callable[[str], None]]:
    """``append(text)`` to a file that is ``head``, all texts so far, ``tail`` after every call.

    What a full disk cuts off is taken back before its OSError goes on.
    """
    end = 0
    closing = tail.encode()
    with open(path, "wb", buffering=0) as file:

        def put(data: bytes) -> None:
            file.seek(end)
            while data:
                data = data[file.write(data) :]

        def append(text: str) -> None:
            nonlocal end
            data = text.encode("utf-8", "backslashreplace")
            with naming(path):
                try:
                    put(data + closing)
                except OSError:
                    put(closing)  # over what was there before: this needs no room
                    file.truncate(end + len(closing))
                    raise
            end += len(data)

        append(head)
        yield append


@contextmanager
def growing_list(path: Path) -> Iterator[Callable[[str], None]]:
    """``append(row)``: the file is a JSON list of all rows so far after every call."""
    with growing(path, "[", "\n]\n") as append:
        comma = ""

        def append_row(row: str) -> None:
            nonlocal comma
            append(f"{comma}\n{row}")
            comma = ","

        yield append_row


# ---- what is in a row


def rows(found: Detections) -> Iterator[tuple[list[float], float, int]]:
    """Box, score and label of each detection as plain numbers."""
    return zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)


def csv_rows(frame: Frame, found: Detections, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """A row of `COLUMNS` a detection; boxes in pixels of the image, ``frame`` empty for an image."""
    return [
        (*_place(frame), cell(names[label]), label, f"{score:.6f}", *(f"{v:.2f}" for v in box))
        for box, score, label in rows(found)
    ]


def ranked_csv_rows(frame: Frame, found: Ranking, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """A row of `RANKED_COLUMNS` a class, the likeliest first; its rank counts from 1."""
    ranks = enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True), start=1)
    return [(*_place(frame), rank, cell(names[label]), label, f"{score:.6f}") for rank, (label, score) in ranks]


def area_rows(found: LabelMap) -> list[tuple[int, int, float]]:
    """The number, the pixels and the share of the picture of each class in it, the largest first."""
    pixels = np.bincount(found.labels.numpy().reshape(-1))
    order = np.argsort(-pixels, kind="stable")
    return [(int(label), int(pixels[label]), float(pixels[label] / pixels.sum())) for label in order if pixels[label]]


def area_csv_rows(frame: Frame, found: LabelMap, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """A row of `AREA_COLUMNS` a class."""
    return [
        (*_place(frame), cell(names[label]), label, pixels, f"{share:.6f}") for label, pixels, share in area_rows(found)
    ]


def area_json_row(frame: Frame, found: LabelMap, names: Sequence[str]) -> dict[str, Any]:
    """A picture and the classes of its pixels, the largest first."""
    classes = [
        {"class": names[label], "label": label, "pixels": pixels, "share": round(share, 6)}
        for label, pixels, share in area_rows(found)
    ]
    return {**_about(frame), "classes": classes}


def _place(frame: Frame) -> tuple[str, int | str]:
    """Which picture it is: the file's name, and the number of a video's frame."""
    return cell(Path(frame.source.shown).name or frame.source.shown), frame.number or ""


def cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: one that starts like it gets a ``'`` in front."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def json_row(frame: Frame, found: Detections, names: Sequence[str]) -> dict[str, Any]:
    """A picture and what was found in it, boxes ``[x1, y1, x2, y2]`` in its pixels; ``frame`` is null for an image."""
    detections = [
        {"class": names[label], "label": label, "score": round(score, 6), "box": [round(v, 2) for v in box]}
        for box, score, label in rows(found)
    ]
    return {**_about(frame), "detections": detections}


def ranked_json_row(frame: Frame, found: Ranking, names: Sequence[str]) -> dict[str, Any]:
    """A picture and the classes that it may show, the likeliest first."""
    return {**_about(frame), "classes": ranked_rows(found, names)}


def _about(frame: Frame) -> dict[str, Any]:
    height, width = frame.image.shape[:2]
    return {"image": frame.source.shown, "frame": frame.number or None, "width": width, "height": height}


def write_crops(folder: Path, frame: Frame, found: Detections, names: Sequence[str]) -> None:
    """Each detection as a picture of its own, ``CLASS/NAME-1.jpg``, ``-2``, ... by falling score."""
    height, width = frame.image.shape[:2]
    for number, ((x1, y1, x2, y2), _, label) in enumerate(rows(found), start=1):
        left, right = max(0, int(x1)), min(width, int(np.ceil(x2)))
        top, bottom = max(0, int(y1)), min(height, int(np.ceil(y2)))
        if left < right and top < bottom:
            path = folder / folder_name(names[label], label) / f"{frame.name}-{number}.jpg"
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_image(path, frame.image[top:bottom, left:right])


def folder_name(name: str, label: int) -> str:
    """The folder for the crops of a class: its name, or its number and what is harmless of the name."""
    safe = re.sub(r"[^\w .()+-]", "_", name)[:LONGEST].strip(" .")
    return safe if safe and safe == name else f"{label}_{safe}".rstrip("_")


def pairs(found: Detections | Ranking) -> list[tuple[int, float]]:
    """Label and score of each, best first."""
    return list(zip(found.labels.tolist(), found.scores.tolist(), strict=True))


def found_table(form: Form, numbers_by_label: dict[int, list[float]], names: Sequence[str]) -> str:
    """A row a class: how many of it were found, and the mean of their numbers."""
    rows = [
        (printable(names[label]), len(found), sum(found) / len(found))
        for label, found in sorted(numbers_by_label.items())
    ]
    return table(rows, form.heading) if rows else "nothing found"


FORMS = {  # by task
    "detect": Form(
        ".txt",
        lambda frame, found, scores: label_lines(found, frame.image.shape[1::-1], scores=scores).encode(),
        COLUMNS,
        csv_rows,
        json_row,
        lambda *picture, **looks: draw_detections(*picture, **looks),
        pairs,
        ("class", "count", "mean score"),
    ),
    "classify": Form(
        ".txt",
        lambda frame, found, scores: ranking_lines(found, scores=scores).encode(),
        RANKED_COLUMNS,
        ranked_csv_rows,
        ranked_json_row,
        draw_ranking,
        lambda found: pairs(found)[:1],
        ("class", "count", "mean score"),
    ),
    "segment": Form(
        ".png",
        lambda frame, found, scores: label_png(found),
        AREA_COLUMNS,
        area_csv_rows,
        area_json_row,
        draw_label_map,
        lambda found: [(label, share) for label, _, share in area_rows(found)],
        ("class", "images", "mean share"),
    ),
}


# ---- windows


def check_windows() -> None:
    """Raise a Fault where pictures cannot be shown in a window."""
    told = "--view: {}; leave --view out and look at the files"
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise Fault(told.format("there is no screen here"))
    try:
        cv2.namedWindow("detect", cv2.WINDOW_NORMAL)
        cv2.destroyWindow("detect")
    except cv2.error:
        raise Fault(told.format("this OpenCV has no windows (opencv-python has, the headless one has not)")) from None
