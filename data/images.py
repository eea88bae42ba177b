"""Images on disk: their size from the header alone, and their pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from data.structures import Fault

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
REDUCED = {  # cv2's flag by the divisor of both sides
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 mean that the stored picture lies on its side


def read_image(path: str | Path, reduction: int = 1) -> np.ndarray:
    """Pixels ``[H, W, 3]`` uint8 RGB, turned upright as the file's EXIF says.

    `reduction` 2, 4 or 8 gives a picture of which each side is that fraction. A JPEG is then decoded at this size,
    each pixel from the low frequencies of its block, which is faster than all pixels and as clean as their mean.

    Raises:
        Fault: when the file is missing or is no image.
    """
    image = cv2.imread(str(path), REDUCED[reduction])
    if image is None:
        raise unreadable(path)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def unreadable(path: str | Path) -> Fault:
    if not Path(path).is_file():
        return Fault(f"{path}: there is no such image; correct the list, or put the image there")
    return Fault(f"{path}: cannot be read as an image; save it again as JPEG or PNG, or remove it")


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels, equal to `read_image`'s: JPEG and PNG by their headers, others by decoding.

    Raises:
        Fault: when the file is missing or is no image.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(26)
            size = None
            if head.startswith(b"\xff\xd8"):
                size = _jpeg_size(file)
            elif head.startswith(b"\x89PNG\r\n\x1a\n") and b"eXIf" not in file.read(4096):
                size = struct.unpack(">II", head[16:24])
    except (FileNotFoundError, IsADirectoryError, struct.error):
        raise unreadable(path) from None
    if size is None:
        height, width = read_image(path).shape[:2]
        return width, height
    if 0 in size:
        raise unreadable(path)
    return size


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    """Walks the segments to the frame header; None when there is none. EXIF comes before it."""
    sideways = False
    file.seek(2)
    while True:
        marker = file.read(1)
        while marker == b"\xff":
            marker = file.read(1)
        if not marker:
            return None
        code = marker[0]
        if code == 0x00 or code == 0x01 or 0xD0 <= code <= 0xD8:  # stuffing and markers without a body
            continue
        if code in (0xD9, 0xDA):
            return None
        (length,) = struct.unpack(">H", file.read(2))
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack(">BHH", file.read(5))
            return (height, width) if sideways else (width, height)
        body = file.read(length - 2)
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            sideways = _orientation(body[6:]) >= 5


def _orientation(tiff: bytes) -> int:
    """EXIF orientation 1 to 8; 1, upright, when there is none or it cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == ORIENTATION and kind == 3 and 1 <= value <= 8:
                return int(value)
    except struct.error:
        pass
    return 1
