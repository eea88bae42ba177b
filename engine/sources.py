"""What detection reads and writes: all that ``--source`` may mean, as pictures in order, and videos written back."""

from __future__ import annotations

import errno
import glob
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np

from data.images import SUFFIXES as IMAGE_SUFFIXES
from data.images import decode_image, unreadable
from data.structures import Fault
from engine.overlap import ahead
from engine.runs import atomically

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".flv")
CONTAINERS = {"MJPG": ".avi", "XVID": ".avi", "DIVX": ".avi", "FFV1": ".avi", "VP80": ".webm", "VP90": ".webm"}
USUAL_CODECS = ("mp4v", "MJPG", "VP90")
USUAL_FPS = 25.0

# What matters is told by a Fault. Read once, when a video is first opened or written.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp")
PATIENCE_MS = 10_000  # for a stream to open, and for each of its frames
WHOLE = 0.95  # of the frames that a video announces; headers are often wrong by a few
JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
MOST_LINES = 10  # of a list that are told as wrong
TAKES = "--source takes an image, a video, a folder, a glob, a .txt list, a camera's number, a stream's address or -"


# ---- which sources ----


@dataclass(frozen=True)
class Source:
    """One thing to look at: an ``image``, a ``video``, a ``stream``, a ``camera``, or ``stdin``.

    ``place`` is what opens it, ``stem`` what its results are called. ``shown`` names it for people: a stream without
    the password that its address may hold.
    """

    kind: str
    place: str
    stem: str = ""

    @property
    def shown(self) -> str:
        if self.kind == "camera":
            return f"camera {self.place}"
        if self.kind == "stdin":
            return "standard input"
        return re.sub(r"(?<=://)[^/@]*@", "", self.place) if self.kind == "stream" else self.place

    @property
    def moves(self) -> bool:
        return self.kind in ("video", "stream", "camera")


def find_sources(text: str) -> tuple[list[Source], list[str]]:
    """All that ``--source`` names, in order, each with a stem of its own, and notes on what was left out.

    ``-`` is one image on standard input, digits are a camera unless a file is called so, a ``.txt`` file is a list:
    a path, folder or glob a line, relative to where the program runs or else to the list; empty lines and those that
    start with ``#`` say nothing. Raises a Fault where there is nothing to look at.
    """
    scheme = text.partition("://")[0].lower() if "://" in text else ""
    if text == "-":
        return [Source("stdin", text, "stdin")], []
    if text.isdecimal() and not Path(text).exists():
        return [Source("camera", text, f"camera{int(text)}")], []
    if scheme in SCHEMES:
        return [Source("stream", text, _stem_of_address(text))], []
    if scheme:
        raise Fault(f"{text}: a stream's address starts with {', '.join(f'{known}://' for known in SCHEMES)}")
    files, notes = _listed(Path(text)) if text.lower().endswith(".txt") and Path(text).is_file() else find_files(text)
    kinds = ("video" if is_video(path) else "image" for path in files)
    named = zip(kinds, files, output_names(files), strict=True)
    return [Source(kind, str(path), stem) for kind, path, stem in named], notes


def _stem_of_address(address: str) -> str:
    """``rtsp://me:secret@10.0.0.5:554/door?x=1`` gives ``10.0.0.5-door``."""
    parts = urlsplit(address)
    words = re.findall(r"[\w.-]+", f"{parts.hostname or ''} {Path(parts.path).stem}")
    return "-".join(word.strip(".") for word in words if word.strip("."))[:80] or "stream"


def _listed(path: Path) -> tuple[list[Path], list[str]]:
    """The files that the lines of a list name, and notes. Raises a Fault that tells every line that names none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file in UTF-8; a list has one path a line") from None
    files: list[Path] = []
    notes: list[str] = []
    wrong: list[str] = []
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        try:
            if "://" in entry:
                raise Fault(f"{entry}: a stream in a list; give it as --source by itself")
            beside = path.parent / entry
            here = Path(entry).exists() or glob.glob(entry, recursive=True)
            more, said = find_files(entry if here or not (beside.exists() or glob.has_magic(entry)) else str(beside))
        except Fault as fault:
            wrong += [f"{path}:{number}: {told}" for told in fault.lines]
        else:
            files, notes = files + more, notes + said
    if wrong:
        rest = [f"{path}: and {len(wrong) - MOST_LINES} more lines like these"] if len(wrong) > MOST_LINES else []
        raise Fault(*wrong[:MOST_LINES], *rest)
    if not files:
        raise Fault(f"{path}: an empty list; it needs the path of an image, a video or a folder a line")
    return files, notes


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
        raise Fault(f"{source}: there is no such file or folder; {TAKES}")
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
    numbered = {match[1].lower() for path in files if (match := re.fullmatch(r"(.*)_\d+", path.stem))}
    for path in files:
        for number in count(1):
            stem = path.stem if number == 1 else f"{path.stem}-{number}"
            clash = is_video(path) and stem.lower() in numbered
            if stem.lower() not in taken and not clash:
                break
        taken.add(stem.lower())
        names.append(stem)
    return names


# ---- pictures in ----


@dataclass(frozen=True)
class Frame:
    """A picture of a source, uint8 RGB ``[H, W, 3]``.

    Of an image ``number`` is 0. Of a video it counts frames from 1, skipped ones too; ``fps`` is its speed and
    ``frames`` how many it announces, 0 when it does not say.
    """

    source: Source
    image: np.ndarray
    number: int = 0
    fps: float = 0.0
    frames: int = 0

    @property
    def name(self) -> str:
        """What the results of this picture are called: a stem that no other picture of the run has."""
        return f"{self.source.stem}_{self.number}" if self.number else self.source.stem


@dataclass(frozen=True)
class End:
    """Comes behind the last picture of each source: what was wrong with it, or None."""

    source: Source
    fault: Fault | None = None


def read_sources(sources: Sequence[Source], stride: int = 1) -> Generator[Frame | End, None, None]:
    """Every picture of every source in order, of videos each ``stride``-th frame, and an `End` behind each source.

    What cannot be read is told by the `End` of its source, and the next one follows.
    """
    for source in sources:
        try:
            if source.moves:
                yield from _read_moving(source, stride)
            else:
                yield Frame(source, read_stdin() if source.kind == "stdin" else read_picture(Path(source.place)))
        except Fault as fault:
            yield End(source, fault)
        except OSError as problem:
            yield End(source, Fault(f"{source.shown}: {problem.strerror or problem}"))
        else:
            yield End(source)


def read_picture(path: Path) -> np.ndarray:
    """The pixels of an image file, upright as its EXIF says. Raises a Fault, also for a JPEG that ends too early."""
    if not path.is_file():
        raise unreadable(path)
    return _decoded(path.read_bytes(), str(path), unreadable(path))


def read_stdin() -> np.ndarray:
    """The image whose bytes come on standard input, as from ``curl`` or ``magick``. Raises a Fault for others."""
    data = sys.stdin.buffer.read()
    told = f"standard input: {len(data)} bytes that are no image; - takes the bytes of one image"
    return _decoded(data, "standard input", Fault(f"{told}; a list of paths goes into a .txt file"))


def _decoded(data: bytes, shown: str, otherwise: Fault) -> np.ndarray:
    # Some decoders fill the missing part of a JPEG with grey and say nothing. Cameras may write more behind its end.
    if data.startswith(JPEG_START) and JPEG_END not in data[-len(data) // 2 :]:
        raise Fault(f"{shown}: a JPEG that ends too early, its last part is missing; copy it again")
    image = decode_image(data, shown)
    if image is None:
        raise otherwise
    return image


def _capture(source: Source) -> Any:
    """An open cv2.VideoCapture whose first frame has been grabbed. Raises a Fault where there is none."""
    if source.kind == "camera":
        with _opencv_silent():
            capture = cv2.VideoCapture(int(source.place))
        wrong = f"{source.shown}: cannot be opened; is it plugged in, and used by no other program?"
    elif source.kind == "stream":
        patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, PATIENCE_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, PATIENCE_MS]
        with _opencv_silent():
            capture = cv2.VideoCapture(source.place, cv2.CAP_FFMPEG, patience)
        wrong = f"{source.shown}: no video comes from there; check the address, the name and the password in it"
    else:
        with _opencv_silent():
            capture = cv2.VideoCapture(source.place)
        wrong = f"{source.place}: cannot be read as a video; convert it to H.264 in .mp4, for example"
    if not capture.isOpened() or not capture.grab():
        capture.release()
        raise Fault(wrong)
    return capture


@contextmanager
def _opencv_silent() -> Iterator[None]:
    """OpenCV warns in its own words where a source cannot be opened; the Fault says it in ours."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def _fps(capture: Any) -> float:
    """Some recorders write 0, nan, or their clock's 1000 a second."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps <= 240 else USUAL_FPS


def _frames(capture: Any) -> int:
    announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(announced) if 0 < announced < 1e9 else 0


def _read_moving(source: Source, stride: int) -> Generator[Frame, None, None]:
    """The frames of a video, a stream or a camera. Raises a Fault where it ends before its end."""
    capture = _capture(source)
    fps, frames = _fps(capture), _frames(capture)
    endless = source.kind != "video" and not frames
    read = shown = 0

    def grabbed() -> Generator[tuple[int, np.ndarray], None, None]:
        """Number and picture of each ``stride``-th frame.

        The capture is released by the thread that reads it: another one would pull it from under a read that hangs.
        """
        nonlocal read
        try:
            while read == 0 or capture.grab():  # `_capture` has grabbed the first
                if read % stride:
                    read += 1
                    continue
                decoded, frame = capture.retrieve()
                if not decoded:
                    return
                read += 1
                yield read, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            capture.release()

    with ahead(grabbed(), 1, newest=True) if endless else closing(grabbed()) as coming:
        for number, image in coming:
            shown += 1
            yield Frame(source, image, number, fps, frames)
    if endless:
        lost = math.ceil(read / stride) - shown
        left_out = f"; {lost} frames came faster than they were looked at" if lost else ""
        raise Fault(f"{source.shown}: the stream ended after {read} frames{left_out}")
    if read <= WHOLE * frames - 1:
        raise Fault(f"{source.shown}: damaged, only {read} of its {frames} frames can be read")


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


def check_room(path: Path, wanted: int) -> None:
    """Raise the OSError of a full disk while so many bytes are still free: OpenCV would drop frames in silence."""
    if shutil.disk_usage(path.parent).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextmanager
def write_video(path: Path, fourcc: str, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """``write(frame)`` for RGB frames of one size; ``path`` appears when the block ends, after it was read back.

    It appears however the block ends, with the frames written until then; only a file of which nothing can be read is
    taken away. Most codecs want even sides: of odd ones OpenCV leaves the last row or column out. Raises a Fault where
    the codec cannot be written, where a frame has another size, and where frames are missing from the file; an OSError
    while a full disk has just room for the end of the file.
    """
    writer = cv2.VideoWriter()
    size = (0, 0)
    written = found = 0
    problem: BaseException | None = None

    def write(frame: np.ndarray) -> None:
        nonlocal written, size
        height, width = frame.shape[:2]
        if not written:
            size = (width, height)
            with _quiet():
                writer.open(str(temporary), cv2.VideoWriter.fourcc(*fourcc), fps, size)
            if not writer.isOpened():
                raise Fault(f"{path}: cannot be written with codec {fourcc!r} at {width}x{height}, {fps:g} fps")
        if (width, height) != size:
            raise Fault(f"{path}: frame {written + 1} is {width}x{height}, those before it {size[0]}x{size[1]}")
        check_room(path, 2 * frame.nbytes + 64 * written + 65536)  # this frame, what waits to be written, the index
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        written += 1

    with atomically(path) as temporary:
        try:
            yield write
        except BaseException as stop:  # told after the file is in its place
            problem = stop
        finally:
            writer.release()
        found = _frames_in(temporary) if written else 0
        if not found:
            raise problem or Fault(
                f"{path}: {written} frames were written, 0 can be read back; try another --fourcc than {fourcc}"
            )
    if problem:
        raise problem
    if found != written:
        raise Fault(f"{path}: {written} frames were written, {found} can be read back; try another --fourcc")


def _frames_in(path: Path) -> int:
    """OpenCV drops frames and codecs in silence: how many frames the file holds, 0 where none can be read."""
    with _quiet():
        capture = cv2.VideoCapture(str(path))
        readable, found = capture.read()[0], int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        capture.release()
    return max(found, 1) if readable else 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the video library's own complaints, which it writes to file descriptor 2, away from the user.

    For one thread at a time: the descriptor belongs to the whole process.
    """
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
