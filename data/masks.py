"""Masks on disk: PNG files with an id a pixel, and the classes that ids stand for."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from data.images import stored_size
from data.structures import VOID, Fault, MaskFile

SUFFIX = ".png"  # other formats lose ids, or turn them into colours
SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY = 0  # colour type of a PNG with one number a pixel and no palette
COLOURS = {2: "colours", 4: "grey with transparency", 6: "colours with transparency"}


def read_mask(file: MaskFile) -> np.ndarray:
    """The class of every pixel ``[H, W]`` uint8, `VOID` where it is of none.

    Raises:
        Fault: when the file is missing or is no PNG with an id a pixel.
    """
    return np.asarray(cv2.LUT(read_ids(file.path), table(file.classes, file.void)))


@functools.cache
def table(classes: int, void: tuple[int, ...]) -> np.ndarray:
    """The class ``[256]`` uint8 of every id: ids that are not `void` stand for the classes in their order.

    `VOID` is what a void id becomes, and one for which no class is left.
    """
    found = np.full(256, VOID, dtype=np.uint8)
    found[ids_of(classes, void)] = np.arange(classes)
    return found


def ids_of(classes: int, void: tuple[int, ...]) -> np.ndarray:
    """The ids ``[classes]`` of the classes, as they stand in a file."""
    free = np.array([number for number in range(VOID) if number not in void])
    return np.asarray(free[:classes])


def read_ids(path: str | Path) -> np.ndarray:
    """The ids ``[H, W]`` uint8 of a PNG: its greys, or of one with a palette the places in it.

    Raises:
        Fault: when the file is missing or is no PNG with an id of 8 bits a pixel.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as problem:
        raise Fault(f"{path}: cannot be read: {problem.strerror}") from None
    if not content.startswith(SIGNATURE) or len(content) < 26:
        raise Fault(f"{path}: is no PNG; save masks as PNG, which keeps every id")
    stored_size(io.BytesIO(content), path)
    depth, colour = content[24], content[25]
    if colour in COLOURS:
        raise Fault(f"{path}: holds {COLOURS[colour]}; a grey PNG, or one with a palette, has an id a pixel")
    if depth > 8:
        raise Fault(f"{path}: has {depth} bits a pixel; save it with 8, for ids from 0 to 255")
    try:  # Pillow's: OpenCV gives the colours of a palette and hides the places
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            ids = np.array(image, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise Fault(f"{path}: cannot be read as a PNG; save it again") from None
    if colour == GREY and 1 < depth < 8:
        ids = ids // (255 // (2**depth - 1))  # greys of few bits come stretched to 0 to 255
    return ids
