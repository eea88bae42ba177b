"""Images on disk: their size from the header alone, and their pixels."""

from __future__ import annotations

import io
import os
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image

from data.structures import Fault

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
REDUCED = {  # cv2's flag by the divisor of both sides
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
WIDTH, HEIGHT, ORIENTATION = 0x0100, 0x0101, 0x0112  # tags of TIFF and EXIF
SIDEWAYS = 5  # this orientation and those above it, up to 8, mean that the stored picture lies on its side
MOST_MARKERS = 100_000  # of a JPEG, with the bytes that fill the gaps between them
MOST_TAGS = 1000  # of one directory of a TIFF; real ones have some dozens
MOST_PIXELS = 200_000_000  # 600 MB once decoded; the largest phone cameras stay below. A PNG of 100 kB can hold more
OTHERS = ("BMP", "DIB", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")  # of which Pillow finds the size

# What is wrong with an image is told by a Fault, in one line.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read_image(path: str | Path, reduction: int = 1) -> np.ndarray:
    """Pixels ``[H, W, 3]`` uint8 RGB, turned upright as the file's EXIF says.

    `reduction` 2, 4 or 8 gives a picture of which each side is that fraction. A JPEG is then decoded at this size,
    each pixel from the low frequencies of its block, which is faster than all pixels and as clean as their mean.

    Raises:
        Fault: when the file is missing, is no image, or has more than `MOST_PIXELS`; those are never decoded.
    """
    with _opened(path) as file:
        if stored_size(file, path) is None:
            raise unreadable(path)
    image = None
    with suppress(cv2.error):
        image = cv2.imread(str(path), REDUCED[reduction])
    if image is None:
        raise unreadable(path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def decode_image(data: bytes, shown: str) -> np.ndarray | None:
    """As `read_image`, from the bytes of a file that faults call `shown`; None for what is no image."""
    image = None
    if stored_size(io.BytesIO(data), shown) is not None:
        with suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def _opened(path: str | Path) -> BinaryIO:
    """A file that is one: a pipe or a device of that name would be waited for, or read, for ever."""
    if not os.path.isfile(path):
        raise unreadable(path)
    return open(path, "rb")


def unreadable(path: str | Path) -> Fault:
    if not Path(path).is_file():
        return Fault(f"{path}: there is no such image; correct the list, or put the image there")
    return Fault(f"{path}: cannot be read as an image; save it again as JPEG or PNG, or remove it")


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels, equal to `read_image`'s: JPEG and PNG by their headers, others by decoding.

    Raises:
        Fault: when the file is missing, is no image, or has more than `MOST_PIXELS`.
    """
    with _opened(path) as file:
        found = stored_size(file, path)
    if found is None:
        raise unreadable(path)
    size, certain = found
    if certain:
        return size
    height, width = read_image(path).shape[:2]
    return width, height


def stored_size(file: BinaryIO, shown: str | Path) -> tuple[tuple[int, int], bool] | None:
    """Width and height by the header alone, and whether they are surely those of the decoded picture.

    None for what is no image. Raises a Fault for one of more than `MOST_PIXELS`.
    """
    certain, size = False, None
    with suppress(struct.error, OSError):
        head = file.read(26)
        if head.startswith(b"\xff\xd8"):
            size, certain = _jpeg_size(file), True
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            size, certain = struct.unpack(">II", head[16:24]), b"eXIf" not in file.read(4096)
        elif head[:4] in (b"II*\0", b"MM\0*"):
            tags = _tags(file)
            size = (tags[WIDTH], tags[HEIGHT]) if WIDTH in tags and HEIGHT in tags else None
        else:
            size = _size_by_pillow(file)
    if size is None or 0 in size:
        return None
    if size[0] * size[1] > MOST_PIXELS:
        raise Fault(f"{shown}: has more than {MOST_PIXELS:,} pixels; save it smaller, or remove it")
    return size, certain


def _size_by_pillow(file: BinaryIO) -> tuple[int, int] | None:
    """Of a file in one of the `OTHERS` formats, without decoding it; None for what is none."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, which are counted here
            with Image.open(file, formats=OTHERS) as image:
                return image.size
    except Image.DecompressionBombError:
        return MOST_PIXELS, 2  # or more
    except Exception:  # what a damaged header raises is not documented
        return None


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    """Walks the segments to the frame header; None when there is none. EXIF comes before it."""
    sideways = False
    file.seek(2)
    for _ in range(MOST_MARKERS):
        marker = file.read(1)
        if not marker:
            return None
        code = marker[0]
        if code == 0xFF or code == 0x00 or code == 0x01 or 0xD0 <= code <= 0xD8:  # stuffing and markers without a body
            continue
        if code in (0xD9, 0xDA):
            return None
        (length,) = struct.unpack(">H", file.read(2))
        if length < 2:  # it counts itself
            return None
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack(">BHH", file.read(5))
            return (height, width) if sideways else (width, height)
        body = file.read(length - 2)
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            with suppress(struct.error):
                sideways = SIDEWAYS <= _tags(io.BytesIO(body[6:])).get(ORIENTATION, 1) <= 8
    return None


def _tags(file: BinaryIO) -> dict[int, int]:
    """The whole numbers in the first directory of a TIFF, or of the EXIF data that is written like one."""
    file.seek(0)
    head = file.read(8)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        return {}
    (place,) = struct.unpack_from(order + "I", head, 4)
    file.seek(place)
    (count,) = struct.unpack(order + "H", file.read(2))
    entries = file.read(12 * min(count, MOST_TAGS))
    tags: dict[int, int] = {}
    for number in range(len(entries) // 12):
        tag, kind = struct.unpack_from(order + "HH", entries, 12 * number)
        if kind == 3 or (kind == 4 and tag != ORIENTATION):  # of two bytes, of four
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), entries, 12 * number + 8)
    return tags
