"""Folders of classes: an image is of the class that its folder is called after.

Of several folders above an image the nearest one that is a class counts; those above a split's folder say nothing. An
image of a list may lie anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from data.config import DataSpec
from data.readers.labels import NO_CLASS, TRAINED, Labels, Problem, labels_of, some
from data.structures import nearest


def list_split(data: DataSpec, split: str, images: Sequence[str]) -> tuple[list[str], list[int], list[Problem]]:
    """Those of `images` that have a class, the class of each, and a problem for every folder of others."""
    places = [f"{place}{os.sep}" for place in map(str, data.sources(split)) if os.path.isdir(place)]
    labels = {name: label for label, name in enumerate(data.names)}
    found = [(image, label_of(image, places, labels)) for image in images]
    strays: dict[str, int] = {}
    for image, label in found:
        if label is None:
            strays[os.path.dirname(image)] = strays.get(os.path.dirname(image), 0) + 1
    problems = [Problem(NO_CLASS, folder, _stray(folder, count, data.names)) for folder, count in strays.items()]
    kept = [(image, label) for image, label in found if label is not None]
    return [image for image, _ in kept], [label for _, label in kept], problems


def label_of(image: str, places: Sequence[str], labels: Mapping[str, int]) -> int | None:
    """The class of an image, None where no folder above it is one. `places` are the split's folders, ended by a /."""
    inside = next((image.removeprefix(place) for place in places if image.startswith(place)), image)
    above = inside.split(os.sep)[:-1]
    return next((labels[name] for name in reversed(above) if name in labels), None)


def labels_for(label: int, size: tuple[int, int]) -> Labels:
    """One object that fills the image."""
    return labels_of([[0, 0, *size]], [label], [TRAINED], lambda _: "", [])


def _stray(folder: str, count: int, names: Sequence[str]) -> str:
    name = os.path.basename(folder)
    images = "an image" if count == 1 else f"{count} images"
    return f"holds {images}, but {name!r} is no class{nearest(name, names) or f'; classes are {some(names)}'}"
