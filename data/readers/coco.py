"""COCO labels: one instances JSON for all images of a split.

Boxes are ``x y width height`` in pixels. Categories are matched to the data YAML's classes by name, whatever their ids
are. A crowd is no training target; evaluation ignores it. So is an annotation with ``"ignore": 1``, which converters
from VOC write for difficult objects (COCO's own evaluation does not look at it). Outlines are not read, their area is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.coco_json import CATEGORY, is_category, is_integer, lines_of, read_json
from data.config import DataSpec
from data.readers.labels import (
    CROWD,
    DIFFICULT,
    IMAGE_TWICE,
    MISSING_IMAGE,
    MOST_BOXES,
    OTHER_SIZE,
    TRAINED,
    UNKNOWN_CLASS,
    UNKNOWN_IMAGE,
    UNLISTED,
    WRONG_LINE,
    Kind,
    Labels,
    Problem,
    labels_of,
    quoted,
    too_many,
)
from data.readers.listing import list_images
from data.structures import Fault, nearest

Where = Callable[[str, int], str]  # section and number of an entry -> file:line


@dataclass(frozen=True)
class Entry:
    """An image of a JSON: its number in the file, what stands there, and the numbered annotations that are its own."""

    number: int
    image: dict[str, Any]
    annotations: list[tuple[int, dict[str, Any]]]

    @property
    def file_name(self) -> str:
        return str(self.image["file_name"])


@dataclass(frozen=True)
class Document:
    """A JSON: its images, the class of a category's id, the id of a class, and the line of an entry."""

    path: Path
    entries: list[Entry]
    classes: dict[int, int]
    category_ids: tuple[int, ...]
    where: Where


@dataclass(frozen=True)
class Listing:
    """The images of a split in the order of their list or JSON, and where the labels of each stand."""

    images: list[str]
    entries: list[tuple[Document, Entry]]
    problems: list[Problem]
    category_ids: tuple[int, ...]
    depends: list[str]  # the JSONs and lists, and where images were looked for and are not

    def read_labels(self, index: int, size: tuple[int, int]) -> Labels:
        return read_labels(*self.entries[index], size)


def list_split(data: DataSpec, split: str) -> Listing:
    """Every image of a split that is there and that a JSON knows.

    The images are those of the JSON; but beside a ``.txt`` list of images, they are those of the list.

    Raises:
        Fault: when a JSON cannot be read, or none of its categories or images is there.
    """
    problems: list[Problem] = []
    documents = [read_document(data, path, problems) for path in data.jsons(split)]
    for source in data.sources(split):
        if source.suffix not in (".json", ".txt") and not source.is_dir():
            raise Fault(f"{data.path}: {source} does not exist; a folder of images or a .txt list of images is right")
    by_list = any(source.suffix == ".txt" for source in data.sources(split))
    depends = [str(path) for path in (*data.jsons(split), *data.sources(split))]
    pairs = (
        _of_list(data, split, documents, problems) if by_list else _of_json(data, split, documents, problems, depends)
    )
    images, entries = [image for image, _ in pairs], [entry for _, entry in pairs]
    return Listing(images, entries, problems, documents[0].category_ids, depends)


Pairs = list[tuple[str, tuple[Document, Entry]]]  # an image's path, and where its labels stand


def _of_json(
    data: DataSpec, split: str, documents: list[Document], problems: list[Problem], depends: list[str]
) -> Pairs:
    """The images of the JSONs, looked for on disk; `depends` gets those that are not there."""
    pairs: Pairs = []
    taken: dict[str, tuple[Document, Entry]] = {}
    for document in documents:
        folders = _folders(data, split, document)
        folder = _find_folder(folders, document)
        if folder is None:
            raise Fault(
                f"{document.path}: not one of its {len(document.entries)} images is in {', '.join(map(str, folders))}; "
                "'images' in the data YAML names their folder"
            )
        for entry in document.entries:
            image = _image(folder, entry.file_name)
            if image is None:
                depends.append(str(folder / entry.file_name))
                text = f"there is no image {depends[-1]}"
                problems.append(Problem(MISSING_IMAGE, document.where("images", entry.number), text))
            elif image in taken:
                other, first = taken[image]
                text = f"{entry.file_name!r} stands already at {other.where('images', first.number)}"
                problems.append(Problem(IMAGE_TWICE, document.where("images", entry.number), text))
            else:
                taken[image] = (document, entry)
                pairs.append((image, (document, entry)))
    return pairs


def _of_list(data: DataSpec, split: str, documents: list[Document], problems: list[Problem]) -> Pairs:
    """The images of the lists, looked for in the JSONs: by where a JSON's images lie, else by as much of the path as
    it gives, where that is the name of one image only.
    """
    images, missing = list_images(data, split)
    problems += missing
    by_path: dict[str, tuple[Document, Entry]] = {}
    by_name: dict[str, list[tuple[Document, Entry]]] = {}
    for document in documents:
        folder = _find_folder(_folders(data, split, document), document)
        for entry in document.entries:
            place = _image(folder, entry.file_name) if folder else None
            if place is not None:
                by_path.setdefault(place, (document, entry))
            by_name.setdefault(os.path.basename(entry.file_name), []).append((document, entry))
    pairs: Pairs = []
    for image in images:
        alike = by_name.get(os.path.basename(image), [])
        ends = [pair for pair in alike if image.endswith(f"/{pair[1].file_name}")]
        if image in by_path:
            pairs.append((image, by_path[image]))
        elif len(alike) == 1 or len(ends) == 1:
            pairs.append((image, (ends or alike)[0]))
        else:
            told = "lists several of this name" if alike else "does not list it"
            problems.append(Problem(UNLISTED, image, f"{', '.join(str(d.path) for d in documents)} {told}"))
    return pairs


def _folders(data: DataSpec, split: str, document: Document) -> list[Path]:
    """Where a JSON's images may lie: where the YAML says, else the usual places."""
    given = [source for source in data.sources(split) if source.is_dir()]
    if data.images is not None:
        given.append(data.root / data.images)
    name = document.path.stem.removeprefix("instances_")
    usual = [document.path.parent, data.root, data.root / "images", data.root / name, data.root / "images" / name]
    return given or list(dict.fromkeys(usual))


def _find_folder(folders: list[Path], document: Document) -> Path | None:
    """The first of the folders that holds any of the JSON's images."""
    for folder in folders:
        if any(_image(folder, entry.file_name) is not None for entry in document.entries):
            return folder
    return None


def _image(folder: Path, file_name: str) -> str | None:
    """An image by the JSON's name for it, or without the folders in that name; None where it is not there."""
    for name in (file_name, os.path.basename(file_name)):
        path = os.path.abspath(os.path.join(folder, name))
        if os.path.isfile(path):
            return path
    return None


def read_document(data: DataSpec, path: Path, problems: list[Problem]) -> Document:
    """Reads a JSON and sorts its annotations by image; what cannot be used is added to `problems`.

    Raises:
        Fault: when the file is no instances JSON, or has none of the classes.
    """
    content = read_json(path)
    lines: dict[str, list[int]] = {}

    def where(section: str, number: int) -> str:
        if section not in lines:
            lines[section] = lines_of(path, section)
        return f"{path}:{lines[section][number]}"

    classes, left_out, category_ids = _classes(data, path, content["categories"], where, problems)
    entries: dict[int | str, Entry] = {}
    for number, image in enumerate(content["images"]):
        wrong = _wrong_image(image, entries)
        if wrong:
            kind, text = wrong
            problems.append(Problem(kind, where("images", number), text))
        else:
            image["file_name"] = image["file_name"].replace("\\", "/")
            entries[image["id"]] = Entry(number, image, [])
    boxes_left_out: dict[int, int] = {}
    for number, annotation in enumerate(content["annotations"]):
        wrong = _wrong_annotation(annotation, entries, classes, left_out)
        if wrong:
            kind, text = wrong
            problems.append(Problem(kind, where("annotations", number), text))
        elif annotation["category_id"] in left_out:
            category = left_out[annotation["category_id"]]
            boxes_left_out[category] = boxes_left_out.get(category, 0) + 1
        else:
            entries[annotation["image_id"]].annotations.append((number, annotation))
    for category, count in boxes_left_out.items():
        name = content["categories"][category]["name"]
        known = nearest(name, data.names) or f"; names are {', '.join(data.names)}"
        text = f"category {name!r} is not among the names of the data YAML{known}: {count} boxes"
        problems.append(Problem(UNKNOWN_CLASS, where("categories", category), text))
    return Document(path, list(entries.values()), classes, category_ids, where)


def _classes(
    data: DataSpec, path: Path, categories: list[Any], where: Where, problems: list[Problem]
) -> tuple[dict[int, int], dict[int, int], tuple[int, ...]]:
    """The class of each category id; the number in the file of each category that is no class; the id of each class.

    A class that the JSON does not have gets an id that nothing has.
    """
    classes: dict[int, int] = {}
    left_out: dict[int, int] = {}
    for number, category in enumerate(categories):
        if not is_category(category):
            problems.append(
                Problem(UNKNOWN_CLASS, where("categories", number), f"a category is {category}; {CATEGORY}")
            )
        elif category["name"] in data.names:
            classes.setdefault(category["id"], data.names.index(category["name"]))
        else:
            left_out[category["id"]] = number
    if not classes:
        there = ", ".join(str(category.get("name")) for category in categories if isinstance(category, dict)) or "none"
        raise Fault(f"{path}: its categories are {there}; none of them is among the names of {data.path}")
    ids: dict[int, int] = {}
    for category_id, label in classes.items():
        ids.setdefault(label, category_id)
    free = max([*classes, *left_out]) + 1
    return classes, left_out, tuple(ids.get(label, free + label) for label in range(len(data.names)))


def _wrong_image(image: Any, entries: dict[int | str, Entry]) -> tuple[Kind, str] | None:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or not _is_id(image.get("id")):
        return MISSING_IMAGE, f'an image is {quoted(image)}; as {{"id": 1, "file_name": "1.jpg"}} is right'
    if image["id"] in entries:
        first = entries[image["id"]].file_name
        return IMAGE_TWICE, f"image {image['file_name']!r} has the id {image['id']} of {first!r}; give it its own"
    return None


def _wrong_annotation(
    annotation: Any, entries: dict[int | str, Entry], classes: dict[int, int], left_out: dict[int, int]
) -> tuple[Kind, str] | None:
    if not isinstance(annotation, dict):
        return (
            WRONG_LINE,
            f"an annotation is {quoted(annotation)}; a mapping with image_id, category_id and bbox is right",
        )
    named = f"annotation {annotation.get('id', '')}".strip()
    image, category = annotation.get("image_id"), annotation.get("category_id")
    if not _is_id(image) or image not in entries:
        return UNKNOWN_IMAGE, f"{named}: there is no image with the id {quoted(image)}"
    if not is_integer(category) or (category not in classes and category not in left_out):
        return UNKNOWN_CLASS, f"{named}: there is no category with the id {quoted(category)}"
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return WRONG_LINE, f"{named}: bbox is {quoted(box)}; four numbers x, y, width, height in pixels are right"
    if box[2] < 0 or box[3] < 0:
        return WRONG_LINE, f"{named}: bbox is {box}; width and height of 0 or more are right"
    return None


def _is_id(value: Any) -> bool:
    return is_integer(value) or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def read_labels(document: Document, entry: Entry, size: tuple[int, int]) -> Labels:
    """The annotations of an image: boxes in pixels, not yet clipped."""
    boxes: list[list[float]] = []
    labels: list[int] = []
    uses: list[int] = []
    areas: list[float] = []
    numbers: list[int] = []
    if len(entry.annotations) > MOST_BOXES:
        return too_many(document.where("images", entry.number), len(entry.annotations))
    for number, annotation in entry.annotations:
        x, y, width, height = map(float, annotation["bbox"])
        crowd, ignore = annotation.get("iscrowd"), annotation.get("ignore")
        area: Any = annotation.get("area")
        boxes.append([x, y, x + width, y + height])
        labels.append(document.classes[annotation["category_id"]])
        uses.append(CROWD if crowd else DIFFICULT if ignore else TRAINED)
        areas.append(float(area) if _is_number(area) and area >= 0 else width * height)
        numbers.append(number)
    problems = []
    said = entry.image.get("width"), entry.image.get("height")
    if all(map(is_integer, said)) and said != size:
        text = f"{entry.file_name!r} is {size[0]}x{size[1]} pixels, the JSON says {said[0]}x{said[1]}"
        problems.append(Problem(OTHER_SIZE, document.where("images", entry.number), text))
    image_id = entry.image["id"] if is_integer(entry.image["id"]) else None
    return labels_of(
        boxes, labels, uses, lambda index: document.where("annotations", numbers[index]), problems, areas, image_id
    )
