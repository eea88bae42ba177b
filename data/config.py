"""The data YAML: where the images are, how they are split, what the classes are called.

path: ../../datasets/shapes     # the data set's folder; relative to this file; left out: this file's folder
train: images/train             # a folder of images, or a .txt list of images; relative to path
val: images/val
names: [circle, square]         # or {0: circle, 1: square}
format: yolo                    # or voc

`images` and `annotations` name the folders of a VOC layout, in which the lists hold bare ids. `test` and `nc` may
be left out. `download` says how to get the data set; it is shown when the folder is missing and never run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from data.structures import Fault, nearest

FORMATS = ("yolo", "voc")
SPLITS = ("train", "val", "test")
KEYS = ("path", *SPLITS, "names", "nc", "format", "images", "annotations", "download")


@dataclass(frozen=True)
class DataSpec:
    """A data YAML, checked: `path` is the file itself, `root` the data set's folder; the rest is as written."""

    path: Path
    names: tuple[str, ...]
    format: str
    root: Path
    train: str | None = None
    val: str | None = None
    test: str | None = None
    images: str | None = None
    annotations: str | None = None
    download: str | None = None


def read_data_spec(path: str | Path) -> DataSpec:
    """Reads a data YAML. Whether its folders exist is checked by `data.readers.read_split`.

    Raises:
        Fault: with file and line, for anything that is not the format above.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Fault(f"{path}: there is no such file; name a data YAML, as cfg/data/shapes.yaml") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise Fault(f"{path}: not a text file; name a data YAML, as cfg/data/shapes.yaml") from None
    values = _top_level(path, text)

    def fault(key: str, problem: str) -> Fault:
        line = f":{values[key].start_mark.line + 1}" if key in values else ""
        return Fault(f"{path}{line}: {problem}")

    def word(key: str) -> str | None:
        node = values.get(key)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return None
        if not isinstance(node, yaml.ScalarNode):
            raise fault(key, f"{key} is a {_kind(node)}; one text is right")
        return node.value or None

    if "names" not in values:
        raise fault("names", "no names; list the classes: names: [circle, square]")
    names = _names(path, values["names"])
    count = word("nc")
    if count is not None and count != str(len(names)):
        raise fault("nc", f"nc is {count}, but there are {len(names)} names; leave nc out, or make them agree")
    kind = word("format") or "yolo"
    if kind not in FORMATS:
        raise fault("format", f"format {kind!r} is not known; one of {', '.join(FORMATS)}{nearest(kind, FORMATS)}")
    if not any(word(split) for split in SPLITS):
        raise fault("train", "none of train, val and test is given; add train: images/train")
    root = Path(os.path.abspath(path.parent / Path(word("path") or ".").expanduser()))
    return DataSpec(
        path,
        names,
        kind,
        root,
        train=word("train"),
        val=word("val"),
        test=word("test"),
        images=word("images"),
        annotations=word("annotations"),
        download=word("download"),
    )


def _top_level(path: Path, text: str) -> dict[str, yaml.Node]:
    """The YAML's top-level nodes by key; nodes know their line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as problem:
        line = f":{problem.problem_mark.line + 1}" if problem.problem_mark else ""
        raise Fault(f"{path}{line}: not YAML: {problem.problem}") from None
    except yaml.YAMLError as problem:
        raise Fault(f"{path}: not YAML: {str(problem).splitlines()[0]}") from None
    if not isinstance(root, yaml.MappingNode):
        raise Fault(f"{path}: not a data YAML; it needs lines such as 'train: images/train' and 'names: [circle]'")
    values: dict[str, yaml.Node] = {}
    for key, value in root.value:
        where = f"{path}:{key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else _kind(key)
        if name not in KEYS:
            raise Fault(f"{where}: unknown key {name!r}{nearest(name, KEYS) or '; known are ' + ', '.join(KEYS)}")
        if name in values:
            raise Fault(f"{where}: {name} is given twice; the first is in line {values[name].start_mark.line + 1}")
        values[name] = value
    return values


def _names(path: Path, node: yaml.Node) -> tuple[str, ...]:
    """Class names as they are written: ``no`` and ``1`` stay the texts 'no' and '1', as YAML alone would not."""
    where = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        values = node.value
    elif isinstance(node, yaml.MappingNode):
        numbers = [key.value for key, _ in node.value]
        if sorted(numbers, key=str) != sorted((str(i) for i in range(len(numbers))), key=str):
            raise Fault(f"{where}: names are numbered {', '.join(map(str, numbers))}; 0 to {len(numbers) - 1} is right")
        values = [value for _, value in sorted(node.value, key=lambda pair: int(pair[0].value))]
    else:
        raise Fault(f"{where}: names is a {_kind(node)}; a list is right: names: [circle, square]")
    names: list[str] = []
    for value in values:
        here = f"{path}:{value.start_mark.line + 1}"
        if not isinstance(value, yaml.ScalarNode) or not value.value.strip():
            raise Fault(f"{here}: class {len(names)} is not a name; a text is right")
        if value.value in names:
            raise Fault(f"{here}: class name {value.value!r} is given twice; each class needs its own name")
        names.append(value.value)
    if not names:
        raise Fault(f"{where}: names is empty; list at least one class")
    return tuple(names)


def _kind(node: yaml.Node) -> str:
    return {yaml.ScalarNode: "text", yaml.SequenceNode: "list", yaml.MappingNode: "mapping"}[type(node)]
