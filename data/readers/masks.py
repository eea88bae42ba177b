"""Masks: a PNG with an id a pixel for every image, of the same name (see `data.config`).

An image with a mask has a box that fills it for every class that the mask shows, with the number of its pixels as area.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data.config import SPLITS, DataSpec
from data.masks import SUFFIX, ids_of, read_ids, table
from data.readers.labels import (
    ALL_VOID,
    MASK_SIZE,
    NO_MASK,
    TRAINED,
    UNKNOWN_ID,
    WRONG_MASK,
    Labels,
    Problem,
    labels_of,
    no_labels,
    some,
)
from data.structures import VOID, Fault, MaskFile

__all__ = ["SUFFIX", "label_path", "read_labels"]

IMAGES, MASKS = f"{os.sep}images{os.sep}", f"{os.sep}masks{os.sep}"


def label_path(data: DataSpec, image: str, split: str | None = None) -> str:
    """The mask of an image: at its place below the folder of masks that belongs to its own folder.

    An image of a list is looked for by its name alone, first in the masks of its `split`, where that is said. Without a
    folder of masks, the last folder called ``images`` in the image's path becomes ``masks``, and where there is none,
    the mask lies beside the image.
    """
    for splits in [SPLITS] if split is None else [(split,), SPLITS]:
        for one in splits:
            sources, masks = data.sources(one), data.masks(one)
            for source, folder in zip(sources, masks * len(sources) if len(masks) == 1 else masks, strict=False):
                place = f"{source}{os.sep}"
                if image.startswith(place):
                    return os.path.splitext(os.path.join(folder, image.removeprefix(place)))[0] + SUFFIX
        for one in splits:
            listed = [source for source in data.sources(one) if source.suffix == ".txt"]
            if listed and len(data.masks(one)) == 1:
                name = os.path.splitext(os.path.basename(image))[0]
                return os.path.join(data.masks(one)[0], name + SUFFIX)
    before, found, behind = image.rpartition(IMAGES)
    return os.path.splitext(f"{before}{MASKS}{behind}" if found else image)[0] + SUFFIX


def read_labels(data: DataSpec, image: str, path: str, size: tuple[int, int]) -> Labels:
    """The classes that the mask at `path` shows of an `image` of `size`, and what is wrong with it."""
    if not os.path.isfile(path):
        return no_labels(Problem(NO_MASK, image, f"there is no mask {path}"), lost=True)
    if path == image:
        return no_labels(Problem(NO_MASK, image, "would be its own mask; name the folder of masks"), lost=True)
    try:
        ids = read_ids(path)
    except Fault as fault:
        return no_labels(Problem(WRONG_MASK, path, str(fault).removeprefix(f"{path}: ")), lost=True)
    height, width = ids.shape
    if (width, height) != size:
        wrong = f"is of {width}x{height} pixels, its image of {size[0]}x{size[1]}; masks of the image's size are right"
        return no_labels(Problem(MASK_SIZE, path, wrong), lost=True)

    pixels = np.bincount(ids.reshape(-1), minlength=256)  # of each id
    classes = table(len(data.names), data.void)
    problems = []
    unknown = [number for number in np.flatnonzero(pixels * (classes == VOID)).tolist() if not _is_void(data, number)]
    if unknown:
        problems.append(Problem(UNKNOWN_ID, path, _unknown(data, unknown, int(pixels[unknown].sum()))))
    labels = sorted(int(classes[number]) for number in np.flatnonzero(pixels) if classes[number] != VOID)
    if not labels:
        problems.append(Problem(ALL_VOID, path, "not one pixel is of a class"))
    areas = pixels[ids_of(len(data.names), data.void)][labels].tolist()
    boxes = [[0.0, 0.0, float(width), float(height)] for _ in labels]
    found = labels_of(boxes, labels, [TRAINED] * len(labels), lambda _: path, problems, areas)
    mask = MaskFile(Path(path), len(data.names), data.void)
    return Labels(found.boxes, found.labels, found.uses, found.where, found.problems, found.areas, mask=mask)


def _is_void(data: DataSpec, number: int) -> bool:
    return number == VOID or number in data.void


def _unknown(data: DataSpec, numbers: list[int], pixels: int) -> str:
    shown = some([str(number) for number in numbers])
    known = ids_of(len(data.names), data.void).tolist()
    void = sorted({*data.void, VOID})
    return (
        f"{pixels:,} pixels have the id{'s' * (len(numbers) > 1)} {shown}; the classes have {known[0]} to {known[-1]}, "
        f"and {', '.join(map(str, void))} {'are' if len(void) > 1 else 'is'} void"
    )
