"""A folder of labelled photos as a labelling tool leaves it: what a data YAML would say is found out by looking."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from data.coco_json import category_names, read_json
from data.config import DataSpec, read_data_spec
from data.images import SUFFIXES
from data.readers import voc
from data.structures import Fault

YAML = "; write a data YAML, as cfg/data/shapes.yaml, that says which counts"


def data_spec(path: str | Path) -> DataSpec:
    """What a data YAML says, or what is found out of a folder."""
    return folder_spec(Path(path)) if os.path.isdir(path) else read_data_spec(path)


def folder_spec(folder: Path) -> DataSpec:
    """All photos of a folder, and in folders below it, as the split ``train``; its labels and its classes.

    VOC: an xml for each image, beside it or all in one folder. Classes are in the order of their names. COCO: instances
    JSONs, wherever they lie, with the same categories; they are in the order of their ids.

    Raises:
        Fault: where there is no label, there are labels of both kinds, or it is not clear what belongs to what.
    """
    root = Path(os.path.abspath(folder))
    images, xmls, jsons = _files(root)
    if not images:
        raise Fault(f"{folder}: there is no image in it; images end in {', '.join(SUFFIXES)}")
    if xmls and jsons:
        raise Fault(f"{folder}: has labels twice, as {xmls[0].name} and as {jsons[0].name}{YAML}")
    if jsons:
        return _of_jsons(folder, root, images, jsons)
    if xmls:
        return _of_xmls(folder, root, images, xmls)
    raise Fault(
        f"{folder}: has {len(images)} images and no labels, neither a VOC xml for an image nor COCO's instances JSON; "
        "labels in YOLO's text files do not say what their classes are called, so they need a data YAML, as "
        "cfg/data/shapes.yaml"
    )


def _files(root: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The images, xmls and instances JSONs of a folder and all below it, without hidden ones."""
    images, xmls, jsons = [], [], []
    for here, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(name for name in names if name[0] != "."):
            path, lower = Path(here, name), name.lower()
            if lower.endswith(SUFFIXES):
                images.append(path)
            elif lower.endswith(voc.SUFFIX):
                xmls.append(path)
            elif lower.endswith(".json") and _is_instances(path):
                jsons.append(path)
    return images, xmls, jsons


def _is_instances(path: Path) -> bool:
    try:
        return bool(read_json(path))
    except Fault:  # another JSON: tools leave their settings beside labels
        return False


def _of_jsons(folder: Path, root: Path, images: list[Path], jsons: list[Path]) -> DataSpec:
    names = category_names(jsons[0])
    for other in jsons[1:]:
        if category_names(other) != names:
            raise Fault(f"{folder}: {jsons[0].name} and {other.name} have different categories{YAML}")
    listed = {
        os.path.basename(str(image.get("file_name")).replace("\\", "/"))
        for json in jsons
        for image in read_json(json)["images"]
        if isinstance(image, Mapping)
    }
    places = _places(root, (image for image in images if image.name in listed))
    if not places:
        raise Fault(f"{folder}: not one of its {len(images)} images is listed in {', '.join(j.name for j in jsons)}")
    sources = tuple(json.relative_to(root).as_posix() for json in jsons)
    return DataSpec(folder, names, "coco", root, train=places, train_json=sources)


def _of_xmls(folder: Path, root: Path, images: list[Path], xmls: list[Path]) -> DataSpec:
    labelled = {xml.stem for xml in xmls}
    beside = {xml.with_suffix("") for xml in xmls}
    mine = [image for image in images if image.stem in labelled]
    folders = {xml.parent for xml in xmls}
    if any(image.with_suffix("") in beside for image in mine):
        annotations = None
    elif len(folders) == 1:
        annotations = folders.pop().relative_to(root).as_posix()
    else:
        some = " and ".join(str(place.relative_to(root)) for place in sorted(folders)[:2])
        raise Fault(f"{folder}: its xmls lie neither beside their images nor in one folder, but in {some}{YAML}")
    if not mine:
        raise Fault(f"{folder}: not one of its {len(images)} images is called as an xml; {xmls[0].name} has none")
    names = voc.class_names(tqdm(xmls, "looking for classes", unit="file", delay=2, leave=False))
    if not names:
        raise Fault(f"{folder}: there is no object with a name in its {len(xmls)} xmls, as of {xmls[0].name}")
    return DataSpec(folder, names, "voc", root, train=_places(root, mine), annotations=annotations)


def _places(root: Path, images: Iterable[Path]) -> tuple[str, ...]:
    """The folders that images lie in, from the root on; without those in others of them."""
    folders = {image.parent for image in images}
    return tuple(f.relative_to(root).as_posix() for f in sorted(folders) if not folders & set(f.parents))
