"""Writes a data set in another format: YOLO, VOC or COCO, from any of them. The data set itself is left as it is."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from tqdm import tqdm

from data.config import BOXES, SPLITS, DataSpec
from data.folder import data_spec
from data.images import image_size
from data.readers import Split, read_split
from data.structures import Fault, Sample, nearest

IMAGES = ("link", "copy")
NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


@dataclass(frozen=True)
class Converted:
    """The new data YAML, and what the new format could not hold."""

    yaml: Path
    notes: tuple[str, ...]


def convert(path: str | Path, to: str, folder: str | Path, images: str = "link") -> Converted:
    """Writes images, labels and ``data.yaml`` into a new `folder`; images are linked or copied.

    Boxes are written as they were read: clipped to their image, and without those that were left out. The folder
    appears whole or not at all.

    Raises:
        Fault: when the data set cannot be read, the folder holds something, or the format cannot hold a class name.
    """
    if to not in BOXES:
        raise Fault(f"format {to!r} is not known; one of {', '.join(BOXES)}{nearest(to, BOXES)}")
    if images not in IMAGES:
        raise Fault(f"images {images!r}: one of {', '.join(IMAGES)} is right{nearest(images, IMAGES)}")
    data = data_spec(path)
    if data.format not in BOXES:
        raise Fault(f"{data.path}: is of format {data.format}, which has no boxes; {to} has nothing else")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Fault(f"{folder}: holds something already; name a new folder, or empty this one")
    splits = {name: read_split(data, name) for name in SPLITS if data.sources(name)}
    if to == "voc":
        _check_xml_names(data)
    notes = [f"{name}: {note}" for name, split in splits.items() for note in split.notes] + _losses(splits, to)

    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        WRITERS[to](data, splits, partial, images)
        if folder.exists():
            folder.rmdir()  # it is empty
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Converted(folder / "data.yaml", tuple(notes))


def _check_xml_names(data: DataSpec) -> None:
    for name in data.names:
        if NOT_IN_XML.search(name) or name != name.strip():
            raise Fault(f"{data.path}: class name {name!r} cannot stand in an xml; name it without such characters")


def _losses(splits: dict[str, Split], to: str) -> list[str]:
    """What the new format cannot say."""
    samples = [sample for split in splits.values() for sample in split.samples]
    crowds = sum(int(sample.ignored_crowd.sum()) for sample in samples)
    difficult = sum(len(sample.ignored_crowd) for sample in samples) - crowds
    areas = sum(sample.areas is not None and not np.allclose(sample.areas, _areas(sample)) for sample in samples)
    notes = []
    if to == "yolo" and difficult:
        notes.append(f"{difficult:,} difficult objects left out: YOLO's labels cannot mark them")
    if to == "yolo" and crowds:
        notes.append(f"{crowds:,} crowds left out: YOLO's labels cannot mark them")
    if to == "voc" and crowds:
        notes.append(f"{crowds:,} crowds become difficult objects: VOC's labels know no crowds")
    if to == "coco" and difficult:
        notes.append(f'{difficult:,} difficult objects are marked "ignore": 1, which COCO\'s own evaluation overlooks')
    if to != "coco" and areas:
        notes.append(f"areas of outlines left out in {areas:,} images: only COCO's labels hold them")
    return notes


def _areas(sample: Sample) -> np.ndarray:
    x1, y1, x2, y2 = sample.boxes.T.astype(np.float64)
    return np.asarray((x2 - x1) * (y2 - y1))


# --- images ---------------------------------------------------------------------------------------------------------


def names_for(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for each different path, with a stem of its own: ``a.jpg b/a.png`` give ``a.jpg a-2.png``.

    A stem is text without line breaks or blanks at its ends, so that it can stand in a list.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        own = "_".join(path.stem.encode("utf-8", "replace").decode().splitlines()).strip() or "image"
        stem, number = own, 1
        while stem.lower() in taken:  # upper and lower case are one on some disks
            number += 1
            stem = f"{own}-{number}"
        taken.add(stem.lower())
        names[path] = stem + path.suffix
    return names


def _place(path: Path, target: Path, images: str) -> None:
    if images == "copy":
        shutil.copyfile(path, target)
    else:
        target.symlink_to(os.path.realpath(path))


def _each(split: str, found: Split) -> tqdm[Sample]:
    return tqdm(found.samples, f"writing {split}", unit="image", delay=2, leave=False)


# --- formats --------------------------------------------------------------------------------------------------------


def write_yolo(data: DataSpec, splits: dict[str, Split], folder: Path, images: str) -> None:
    """``images/train/a.jpg`` and ``labels/train/a.txt``."""
    for split, found in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        names = names_for([sample.path for sample in found.samples])
        for sample in _each(split, found):
            name = names[sample.path]
            if not os.path.lexists(folder / "images" / split / name):
                _place(sample.path, folder / "images" / split / name, images)
            text = yolo_text(sample, image_size(sample.path))
            (folder / "labels" / split / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    _write_yaml(folder, data, {split: f"images/{split}" for split in splits}, {"format": "yolo"})


def yolo_text(sample: Sample, size: tuple[int, int]) -> str:
    """A line a box: class, centre and size as fractions, with digits enough to get the same float32 pixels back."""
    width, height = size
    lines = []
    for (x1, y1, x2, y2), label in zip(sample.boxes.tolist(), sample.labels.tolist(), strict=True):
        values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{label} {' '.join(str(value) for value in values)}\n")
    return "".join(lines)


def write_voc(data: DataSpec, splits: dict[str, Split], folder: Path, images: str) -> None:
    """``JPEGImages/a.jpg``, ``Annotations/a.xml``, and ``ImageSets/Main/train.txt`` with the ids."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    names = names_for([sample.path for found in splits.values() for sample in found.samples])
    for split, found in splits.items():
        for sample in _each(split, found):
            name = names[sample.path]
            if not os.path.lexists(folder / "JPEGImages" / name):
                _place(sample.path, folder / "JPEGImages" / name, images)
                text = voc_text(sample, name, image_size(sample.path), data.names)
                (folder / "Annotations" / f"{Path(name).stem}.xml").write_text(text, encoding="utf-8")
        ids = [Path(names[sample.path]).stem for sample in found.samples]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids), encoding="utf-8")
    lists = {split: f"ImageSets/Main/{split}.txt" for split in splits}
    _write_yaml(folder, data, lists, {"format": "voc", "images": "JPEGImages", "annotations": "Annotations"})


def voc_text(sample: Sample, file_name: str, size: tuple[int, int], names: Sequence[str]) -> str:
    lines = [
        "<annotation>",
        f"  <filename>{escape(NOT_IN_XML.sub('?', file_name))}</filename>",
        f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>",
    ]
    for boxes, labels, difficult in (
        (sample.boxes, sample.labels, 0),
        (sample.ignored_boxes, sample.ignored_labels, 1),
    ):
        for box, label in zip(boxes, labels.tolist(), strict=True):
            x1, y1, x2, y2 = (np.format_float_positional(value, trim="-") for value in box)
            lines += [
                "  <object>",
                f"    <name>{escape(names[label])}</name>",
                f"    <difficult>{difficult}</difficult>",
                f"    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>",
                "  </object>",
            ]
    return "\n".join([*lines, "</annotation>", ""])


def write_coco(data: DataSpec, splits: dict[str, Split], folder: Path, images: str) -> None:
    """``images/train/a.jpg`` and ``annotations/instances_train.json``; COCO's own ids are kept where there are any."""
    (folder / "annotations").mkdir()
    for split, found in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        names = names_for([sample.path for sample in found.samples])
        content = coco_content(_each(split, found), names, data.names, found.category_ids)
        text = ",\n".join(f'"{section}": [\n{_lines(entries)}\n]' for section, entries in content.items())
        (folder / "annotations" / f"instances_{split}.json").write_text(f"{{{text}}}\n", encoding="utf-8")
        for sample in found.samples:
            if not os.path.lexists(folder / "images" / split / names[sample.path]):
                _place(sample.path, folder / "images" / split / names[sample.path], images)
    jsons = {f"{split}_json": f"annotations/instances_{split}.json" for split in splits}
    _write_yaml(folder, data, {split: f"images/{split}" for split in splits}, {**jsons, "format": "coco"})


def _lines(entries: Sequence[dict[str, object]]) -> str:
    """An entry a line, so that a fault has a line."""
    return ",\n".join(json.dumps(entry) for entry in entries)


def coco_content(
    samples: Sequence[Sample] | tqdm[Sample],
    file_names: dict[Path, str],
    names: Sequence[str],
    category_ids: Sequence[int] | None,
) -> dict[str, list[dict[str, object]]]:
    """The three lists of an instances JSON. An image that is listed twice is written once."""
    once = list({sample.path: sample for sample in samples}.values())
    given = [sample.image_id for sample in once]
    keep_ids = None not in given and len(set(given)) == len(given)
    ids = category_ids or range(1, len(names) + 1)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, sample in enumerate(once, 1):
        image_id = sample.image_id if keep_ids else number
        width, height = image_size(sample.path)
        images.append({"id": image_id, "file_name": file_names[sample.path], "width": width, "height": height})
        areas = _areas(sample) if sample.areas is None else sample.areas
        rows = [
            (box, label, {"area": area, "iscrowd": 0})
            for box, label, area in zip(sample.boxes.tolist(), sample.labels.tolist(), areas.tolist(), strict=True)
        ]
        for box, label, crowd in zip(
            sample.ignored_boxes.tolist(), sample.ignored_labels.tolist(), sample.ignored_crowd.tolist(), strict=True
        ):
            area = (box[2] - box[0]) * (box[3] - box[1])
            rows.append((box, label, {"area": area, "iscrowd": int(crowd), **({} if crowd else {"ignore": 1})}))
        for (x1, y1, x2, y2), label, more in rows:
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": ids[label]}
            annotations.append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1], **more, "segmentation": []})
    categories: list[dict[str, object]] = [
        {"id": ids[label], "name": name, "supercategory": ""} for label, name in enumerate(names)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_yaml(folder: Path, data: DataSpec, sources: dict[str, str], more: dict[str, str]) -> None:
    values = {**sources, **more, "names": list(data.names)}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


WRITERS: dict[str, Callable[[DataSpec, dict[str, Split], Path, str], None]] = {
    "yolo": write_yolo,
    "voc": write_voc,
    "coco": write_coco,
}
