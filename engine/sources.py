"""What detection reads and writes: the files that ``--source`` means, frames of a video, and videos written back."""

from __future__ import annotations

import glob
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np

from data.images import SUFFIXES as IMAGE_SUFFIXES
from data.structures import Fault
from engine.runs import atomically

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".flv")
CONTAINERS = {"MJPG": ".avi", "XVID": ".avi", "DIVX": ".avi", "FFV1": ".avi", "VP80": ".webm", "VP90": ".webm"}
USUAL_CODECS = ("mp4v", "MJPG", "VP90")
USUAL_FPS = 25.0


# ---- which files ----


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def natural(path: Path) -> list[str | int]:
    """Sort key: ``image2`` before ``image10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def find_files(source: str) -> tuple[list[Path], list[str]]:
    """Images and videos that ``source`` names (a file, a folder, a glob), in natural order, and notes on the rest.

    Raises a Fault when there is none. Folders are not searched below their first level; a glob with ``**`` is.
    """
    path = Path(source)
    known = f"images end in {' '.join(IMAGE_SUFFIXES)}, videos in {' '.join(VIDEO_SUFFIXES)}"
    if path.is_file():
        if not _known(path):
            raise Fault(f"{source}: neither an image nor a video by its name; {known}")
        return [path], []
    if path.is_dir():
        listed = [entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")]
        empty = f"{source}: no image or video in this folder; give e.g. '{path / '**' / '*.jpg'}' to look below it"
    elif glob.has_magic(source):
        listed = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        empty = f"{source}: no image or video has such a name"
    else:
        raise Fault(f"{source}: there is no such file or folder; --source takes an image, a video, a folder or a glob")
    others = sorted({entry.suffix or entry.name for entry in listed if not _known(entry)})
    files = sorted(filter(_known, listed), key=natural)
    if not files:
        raise Fault(f"{empty}; {known}")
    skipped = len(listed) - len(files)
    return files, [f"{source}: skipped {skipped} other files ({' '.join(others[:8])})"] if skipped else []


def _known(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES or is_video(path)


def output_names(files: Sequence[Path]) -> list[str]:
    """A stem for the results of each file, each once: ``a.jpg b/a.jpg`` give ``a a-2``.

    The frames of a video get labels ``stem_1``, ``stem_2``, ...; its stem is chosen so that no image is called so.
    """
    names: list[str] = []
    taken: set[str] = set()
    for path in files:
        for number in count(1):
            stem = path.stem if number == 1 else f"{path.stem}-{number}"
            frame = re.compile(re.escape(stem.lower()) + r"_\d+")
            clash = is_video(path) and any(frame.fullmatch(other.stem.lower()) for other in files)
            if stem.lower() not in taken and not clash:
                break
        taken.add(stem.lower())
        names.append(stem)
    return names


# ---- videos in ----


@dataclass(frozen=True)
class Video:
    """A video file: frames a second, and how many frames it announces (0 when it does not say)."""

    path: Path
    fps: float
    frames: int


def open_video(path: Path) -> Video:
    """Raises a Fault when the file is no video, or its first frame cannot be decoded."""
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened() or not capture.grab():
            raise Fault(f"{path}: cannot be read as a video; convert it to H.264 in .mp4, for example")
        fps = capture.get(cv2.CAP_PROP_FPS)
        # some recorders write 0, nan, or their clock's 1000 a second
        return Video(path, fps if 0 < fps <= 240 else USUAL_FPS, max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))))
    finally:
        capture.release()


def read_frames(video: Video, stride: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Every ``stride``-th frame as RGB ``[H, W, 3]``, with its number in the file, counted from 1."""
    capture = cv2.VideoCapture(str(video.path))
    try:
        for number in count(1):
            if not capture.grab():
                return
            if (number - 1) % stride == 0:
                decoded, frame = capture.retrieve()
                if not decoded:
                    return
                yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


# ---- videos out ----


def container(fourcc: str) -> str:
    """The file ending that a codec is written in."""
    return CONTAINERS.get(fourcc.upper(), ".mp4")


def check_codec(fourcc: str) -> None:
    """Raise a Fault that names a codec that works here, unless a small video can be written with this one."""
    if len(fourcc) != 4 or not fourcc.isascii():
        raise Fault(f"--fourcc {fourcc!r}: a codec has four letters, such as {', '.join(USUAL_CODECS)}")
    if _can_write(fourcc):
        return
    others = [codec for codec in USUAL_CODECS if codec != fourcc and _can_write(codec)]
    better = f"{', '.join(others)} would do" if others else "no other usual one can be written either"
    raise Fault(f"--fourcc {fourcc!r}: this OpenCV cannot write that codec; {better}")


def _can_write(fourcc: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{container(fourcc)}"
        try:
            with write_video(path, fourcc, USUAL_FPS) as write:
                for level in (0, 90, 180):
                    write(np.full((48, 64, 3), level, np.uint8))
        except Fault:
            return False
        return True


@contextmanager
def write_video(path: Path, fourcc: str, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """``write(frame)`` for RGB frames of one size; ``path`` appears once the file is complete and was read back.

    Ctrl-C ends the video where it is: what was written stays valid, takes its place, and the interrupt goes on. Most
    codecs want even sides: of odd ones OpenCV leaves the last row or column out. Raises a Fault where the codec
    cannot be written.
    """
    writer = cv2.VideoWriter()
    written = 0
    interrupt = None

    with atomically(path) as temporary:

        def write(frame: np.ndarray) -> None:
            nonlocal written
            if not writer.isOpened():
                height, width = frame.shape[:2]
                with _quiet():
                    writer.open(str(temporary), cv2.VideoWriter.fourcc(*fourcc), fps, (width, height))
                if not writer.isOpened():
                    raise Fault(f"{path}: cannot be written with codec {fourcc!r} at {width}x{height}, {fps:g} fps")
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            written += 1

        try:
            yield write
        except KeyboardInterrupt as stop:
            if not written:
                raise
            interrupt = stop
        finally:
            writer.release()
        _read_back(temporary, path, written)
    if interrupt:
        raise interrupt


def _read_back(written_to: Path, path: Path, frames: int) -> None:
    """OpenCV drops frames and codecs in silence: look whether the file holds what was written."""
    with _quiet():
        capture = cv2.VideoCapture(str(written_to))
        readable, found = capture.read()[0], int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
    if not readable or found != frames:
        raise Fault(f"{path}: {frames} frames were written, {max(found, 0)} can be read back; try another --fourcc")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the video library's own complaints, which it writes to file descriptor 2, away from the user."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
