"""The data YAML: where the images are, how they are split, what the classes are called.

path: ../../datasets/shapes     # the data set's folder; relative to this file; left out: this file's folder
train: images/train             # a folder of images, or a .txt list of images, or several: [a, b]; relative to path
val: images/val
names: [circle, square]         # or {0: circle, 1: square}
format: yolo                    # or voc, or coco

COCO's instances JSON takes the place of the images, which are then looked for, or stands beside them:

train: annotations/instances_train2017.json        # format coco is understood
train: images/train2017                            # or so
train_json: annotations/instances_train2017.json

Images of a class as a whole lie in folders that are called after the classes:

train: train                                       # train/beach/01.jpg is a beach
val: test
format: folders
names: [beach, forest]                             # left out: the folders of train, in the order of their names

Images of which every pixel is of a class have a PNG of the same name, with an id a pixel:

train: images/train
train_masks: masks/train                           # left out: the folder `images` in the path becomes `masks`
format: masks
void: 11                                           # or several: [0, 11]; ids of no class. 255 always is one
names: [sky, building]                             # of the other ids, in the order of the ids

`annotations` names the folder of the label files where it is not the usual one. `images` names the folder of the images
where lists hold bare ids, as those of a VOC layout do, or where a JSON's images lie. `test` and `nc` may be left out,
and `names` where a JSON or folders have them. `download` says how to get the data set; it is shown when the folder is
missing and never run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from data.coco_json import category_names
from data.files import LARGEST_YAML, compose_yaml, read_bytes
from data.structures import VOID, Fault, nearest

BOXES = ("yolo", "voc", "coco")  # formats with boxes
FORMATS = (*BOXES, "folders", "masks")
SPLITS = ("train", "val", "test")
JSONS = tuple(f"{split}_json" for split in SPLITS)
MASKS = tuple(f"{split}_masks" for split in SPLITS)
MOST_IDS = 256  # in a mask of 8 bits
IGNORED = ("roboflow",)  # what other programs leave in a data YAML and nobody needs
KEYS = (
    *("path", *SPLITS, *JSONS, *MASKS),
    *("names", "nc", "format", "void", "images", "annotations", "download", *IGNORED),
)

Source = str | tuple[str, ...] | None  # one place, or several


@dataclass(frozen=True)
class DataSpec:
    """A data YAML, checked: `path` is the file itself, `root` the data set's folder; the rest is as written."""

    path: Path
    names: tuple[str, ...]
    format: str
    root: Path
    train: Source = None
    val: Source = None
    test: Source = None
    images: str | None = None
    annotations: str | None = None
    download: str | None = None
    train_json: Source = None
    val_json: Source = None
    test_json: Source = None
    train_masks: Source = None
    val_masks: Source = None
    test_masks: Source = None
    void: tuple[int, ...] = ()

    def sources(self, split: str) -> tuple[Path, ...]:
        """The folders, lists and JSONs that a split's images come from, as whole paths; none where it is not given."""
        return tuple(self.place(source) for source in several(getattr(self, split)))

    def jsons(self, split: str) -> tuple[Path, ...]:
        """The JSONs that a split's labels come from."""
        beside = tuple(self.place(source) for source in several(getattr(self, f"{split}_json")))
        return beside or tuple(path for path in self.sources(split) if path.suffix == ".json")

    def masks(self, split: str) -> tuple[Path, ...]:
        """The folders of the masks of a split: one for each of its `sources`, or one for all; none: the usual ones."""
        return tuple(self.place(source) for source in several(getattr(self, f"{split}_masks")))

    def place(self, source: str) -> Path:
        """Where a source lies. Some tools write ``../train/images`` for ``train/images``; that is understood."""
        place = Path(os.path.abspath(self.root / os.path.expanduser(source)))
        if source.startswith("../") and not place.exists():
            inside = Path(os.path.abspath(self.root / source.removeprefix("../")))
            return inside if inside.exists() else place
        return place


def several(source: Source) -> tuple[str, ...]:
    """One or many as many."""
    return (source,) if isinstance(source, str) else source or ()


def read_data_spec(path: str | Path) -> DataSpec:
    """Reads a data YAML. Whether its folders exist is checked by `data.readers.read_split`.

    Raises:
        Fault: with file and line, for anything that is not the format above.
    """
    path = Path(path)
    values = _top_level(path)

    def fault(key: str, problem: str) -> Fault:
        line = f":{values[key].start_mark.line + 1}" if key in values else ""
        return Fault(f"{path}{line}: {problem}")

    def word(key: str) -> str | None:
        node = values.get(key)
        if node is None or node.tag == "tag:yaml.org,2002:null":
            return None
        if not isinstance(node, yaml.ScalarNode):
            raise fault(key, f"{key} is a {_kind(node)}; one text is right")
        if "\0" in node.value:
            raise fault(key, f"{key} holds the letter 0, which no path may")
        return node.value or None

    def words(key: str) -> Source:
        node = values.get(key)
        if not isinstance(node, yaml.SequenceNode):
            return word(key)
        if not node.value or not all(isinstance(item, yaml.ScalarNode) and item.value for item in node.value):
            raise fault(key, f"{key} is a list of something else than texts; as [images/a, images/b] is right")
        if any("\0" in item.value for item in node.value):
            raise fault(key, f"{key} holds the letter 0, which no path may")
        return tuple(item.value for item in node.value)

    sources = {key: words(key) for key in (*SPLITS, *JSONS, *MASKS)}
    given = [key for key in SPLITS if sources[key]]
    if not given:
        raise fault("train", "none of train, val and test is given; add train: images/train")
    for split, key in zip(SPLITS, JSONS, strict=True):
        if sources[key] and not sources[split]:
            raise fault(key, f"{key} is given and {split} is not; {split}: is the folder of its images")
    has_json = any(source.endswith(".json") for key in SPLITS for source in several(sources[key]))
    kind = word("format") or ("coco" if has_json or any(sources[key] for key in JSONS) else "yolo")
    if kind not in FORMATS:
        raise fault("format", f"format {kind!r} is not known; one of {', '.join(FORMATS)}{nearest(kind, FORMATS)}")
    for split, key in zip(SPLITS, JSONS, strict=True):
        jsons = [source for source in several(sources[split]) if source.endswith(".json")]
        if kind == "coco" and sources[split] and not sources[key] and len(jsons) != len(several(sources[split])):
            raise fault(split, f"{split} has no JSON; add {key}: annotations/instances_{split}.json")
        if jsons and (kind != "coco" or sources[key]):
            wrong = f"is a JSON and {key} is one too" if kind == "coco" else f"is a JSON, but format is {kind}"
            raise fault(split, f"{split} {wrong}; one of the two is right")

    for split, key in zip(SPLITS, MASKS, strict=True):
        folders, images = several(sources[key]), several(sources[split])
        if folders and kind != "masks":
            raise fault(key, f"{key} is given, but format is {kind}; format: masks is right, or no {key}")
        if len(folders) > 1 and len(folders) != len(images):
            raise fault(
                key, f"{key} has {len(folders)} folders and {split} {len(images)}; one for each, or one is right"
            )
    if "annotations" in values and kind == "masks":
        raise fault("annotations", "annotations is given, but the folders of masks are train_masks, val_masks, ...")
    if "void" in values and kind != "masks":
        raise fault("void", f"void is given, but format is {kind}; only masks have ids of no class")

    root = Path(os.path.abspath(path.parent / os.path.expanduser(word("path") or ".")))
    spec = DataSpec(
        path,
        (),
        kind,
        root,
        images=word("images"),
        annotations=word("annotations"),
        download=word("download"),
        void=_ids(path, values["void"]) if "void" in values else (),
        **sources,
    )
    if "names" in values:
        names = _names(path, values["names"])
    elif kind == "coco":
        check_root(spec)
        names = category_names(spec.jsons(given[0])[0])
    elif kind == "folders":
        check_root(spec)
        names = _folder_names(spec, given[0])
    else:
        raise fault("names", "no names; list the classes: names: [circle, square]")
    if kind in ("folders", "masks") and len(names) < 2:
        raise fault(
            "names" if "names" in values else given[0], f"one class, {names[0]!r}; two or more can be told apart"
        )
    most = MOST_IDS - len({*spec.void, VOID})
    if kind == "masks" and len(names) > most:
        raise fault("names", f"{len(names)} classes; {most} at most have an id of their own in a mask of 8 bits")
    count = word("nc")
    if count is not None and count != str(len(names)):
        raise fault("nc", f"nc is {count}, but there are {len(names)} names; leave nc out, or make them agree")
    return replace(spec, names=names)


def check_root(data: DataSpec) -> None:
    """Raises a Fault where the data set's folder is missing; it says how to get it, where the YAML does."""
    if not data.root.is_dir():
        how = f"get it with: {data.download.strip()}" if data.download else "set 'path' to where the data set lies"
        raise Fault(f"{data.path}: the folder {data.root} does not exist; {how}")


def _top_level(path: Path) -> dict[str, yaml.Node]:
    """The YAML's top-level nodes by key; nodes know their line."""
    if path.is_dir():
        how = f"python -m data split {path} train=0.8 val=0.2 -o FOLDER makes one of photos with VOC or COCO labels"
        raise Fault(f"{path}: a folder, where a data YAML is right; {how}")
    try:
        root = compose_yaml(read_bytes(path, LARGEST_YAML).decode("utf-8"))
    except FileNotFoundError:
        raise Fault(f"{path}: there is no such file; name a data YAML, as cfg/data/shapes.yaml") from None
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file; name a data YAML, as cfg/data/shapes.yaml") from None
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


def _ids(path: Path, node: yaml.Node) -> tuple[int, ...]:
    """One id of a mask, or several: whole numbers from 0 to 255."""
    found = []
    for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        text = item.value if isinstance(item, yaml.ScalarNode) else _kind(item)
        if not (text.isascii() and text.isdecimal() and len(text) <= 3 and int(text) < MOST_IDS):
            where = f"{path}:{item.start_mark.line + 1}"
            raise Fault(f"{where}: void holds {text!r}; ids from 0 to {MOST_IDS - 1} are right, as void: 11 or [0, 11]")
        found.append(int(text))
    return tuple(sorted(set(found)))


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
    known: set[str] = set()
    for value in values:
        here = f"{path}:{value.start_mark.line + 1}"
        if not isinstance(value, yaml.ScalarNode) or not value.value.strip():
            raise Fault(f"{here}: class {len(names)} is not a name; a text is right")
        if value.value in known:
            raise Fault(f"{here}: class name {value.value!r} is given twice; each class needs its own name")
        names.append(value.value)
        known.add(value.value)
    if not names:
        raise Fault(f"{where}: names is empty; list at least one class")
    return tuple(names)


def _folder_names(data: DataSpec, split: str) -> tuple[str, ...]:
    """The folders in those of a split: each is called after its class."""
    names: set[str] = set()
    for place in data.sources(split):
        if not place.is_dir():
            wrong = "is no folder of classes; list the classes: names: [beach, forest]"
            raise Fault(f"{data.path}: {place} {wrong}" if place.exists() else f"{data.path}: {place} does not exist")
        names |= {entry.name for entry in os.scandir(place) if entry.is_dir() and entry.name[0] != "."}
    if not names:
        here = " or ".join(map(str, data.sources(split)))
        raise Fault(f"{data.path}: there is no folder in {here}; a folder of images for each class is right")
    return tuple(sorted(names))


def _kind(node: yaml.Node) -> str:
    return {yaml.ScalarNode: "text", yaml.SequenceNode: "list", yaml.MappingNode: "mapping"}[type(node)]
