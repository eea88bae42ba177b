"""What a data set holds, and everything that is wrong with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.config import BOXES, SPLITS, DataSpec
from data.folder import data_spec
from data.images import image_size, read_image
from data.readers import READERS, read_split
from data.readers.labels import IMAGE_FILE, Kind, Problem, Split, some
from data.structures import Fault, Sample

SMALL, LARGE = 32**2, 96**2  # square pixels of the original image, as COCO has them
SIDES = (8, 16, 32, 64, 128, 256, 512)  # pixels; bounds of the histogram of box sizes
MOST_CLASSES = 20  # named as without a box
BAR = 24  # characters of the longest bar
BLOCK = 2**20  # bytes that are read at a time

CUT_SHORT = Kind("images that are cut short", "read as far as it goes")
NO_IMAGE = Kind("label files without an image", "not read")


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        faults: why a split cannot be used at all.
        problems: all others, by split; label files without an image are under "".
        copies: groups of images with the same bytes, each image as its split and its path.
        idle: classes without a box in a split, or without an image where images are of classes, or their pixels.
    """

    data: DataSpec
    splits: Mapping[str, Split]
    faults: tuple[str, ...]
    problems: Mapping[str, tuple[Problem, ...]]
    copies: tuple[tuple[tuple[str, Path], ...], ...]
    idle: tuple[tuple[str, str], ...]

    @property
    def lost(self) -> list[Problem]:
        """Problems by which a box or an image is lost."""
        return [problem for found in self.problems.values() for problem in found if not problem.kind.harmless]

    @property
    def leaks(self) -> list[tuple[tuple[str, Path], ...]]:
        """Copies of an image in several splits: what was trained on is then measured on."""
        return [group for group in self.copies if len({split for split, _ in group}) > 1]

    @property
    def torn(self) -> list[tuple[tuple[str, Path], ...]]:
        """Copies of an image that are each of another class, where images are of a class as a whole."""
        if self.data.format != "folders":
            return []
        label = {s.path: s.labels.tolist() for split in self.splits.values() for s in split.samples}
        return [group for group in self.copies if any(label[path] != label[group[0][1]] for _, path in group)]

    @property
    def code(self) -> int:
        """For a shell: 2 where a split cannot be used, 1 where something is wrong with it, else 0."""
        return 2 if self.faults else 1 if self.lost or self.leaks or self.torn else 0


def check(path: str | Path, decode: bool = False) -> Report:
    """Reads every split, and the ends of all images, or with `decode` all of them.

    Raises:
        Fault: when the YAML itself is wrong.
    """
    data = data_spec(path)
    splits: dict[str, Split] = {}
    faults: list[str] = []
    for name in SPLITS:
        if not data.sources(name):
            continue
        try:
            splits[name] = read_split(data, name)
        except Fault as fault:
            faults += [line for line in fault.lines if line not in faults]
    problems = {name: (*split.problems, *_broken_images(name, split, decode)) for name, split in splits.items()}
    problems[""] = tuple(_orphans(data, splits))
    held = [(name, sample.path) for name, split in splits.items() for sample in split.samples]
    idle = [
        (split, name)
        for split, found in splits.items()
        for label, name in enumerate(data.names)
        if not any((sample.labels == label).any() for sample in found.samples)
    ]
    return Report(data, splits, tuple(faults), problems, copies(held), tuple(idle))


def _is_whole(path: Path) -> bool:
    """Whether a JPEG can be decoded to its end, whatever stands behind it: phones append a video to a photo."""
    try:
        with Image.open(path, formats=("JPEG",)) as image:
            image.load()
        return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _broken_images(name: str, split: Split, decode: bool) -> Iterator[Problem]:
    """JPEG and PNG files without their end; with `decode`, every image that cannot be decoded."""
    samples = tqdm(split.samples, f"looking at {name} images", unit="image", delay=2, leave=False)
    for path in dict.fromkeys(sample.path for sample in samples):
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(max(0, os.path.getsize(path) - 4096))
            tail = file.read()
        if head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail and not _is_whole(path):
            yield Problem(CUT_SHORT, str(path), "the end of the JPEG is missing; get the file again, or remove it")
        elif head.startswith(b"\x89PNG") and b"IEND" not in tail:
            yield Problem(CUT_SHORT, str(path), "the end of the PNG is missing; get the file again, or remove it")
        elif decode:
            try:
                read_image(path)
            except Fault as fault:
                yield Problem(IMAGE_FILE, str(path), str(fault).removeprefix(f"{path}: "))


def _orphans(data: DataSpec, splits: Mapping[str, Split]) -> Iterator[Problem]:
    """Label files that belong to no image, where folders of images are given: beside a list they mean nothing."""
    sources = [source for name in splits for source in data.sources(name)]
    if data.format not in READERS or not all(source.is_dir() for source in sources):
        return
    reader = READERS[data.format]
    images = {str(sample.path) for split in splits.values() for sample in split.samples}
    told = {problem.file for split in splits.values() for problem in split.problems}  # images and label files
    expected = told | {reader.label_path(data, image) for image in images | told}
    for folder in sorted({os.path.dirname(reader.label_path(data, image)) for image in images}):
        for path in sorted(Path(folder).glob(f"*{reader.SUFFIX}")):
            if str(path) not in expected and path.name != "classes.txt":
                yield Problem(NO_IMAGE, str(path), "there is no image of this name; remove the file, or put it there")


def copies(images: Sequence[tuple[str, Path]]) -> tuple[tuple[tuple[str, Path], ...], ...]:
    """Groups of images, each a split and a path, whose files hold the same bytes.

    Files of different sizes differ, so only files of equal size are read.
    """
    by_size: dict[int, list[tuple[str, Path]]] = {}
    for image in images:
        by_size.setdefault(os.path.getsize(image[1]), []).append(image)
    same_size = [image for group in by_size.values() if len(group) > 1 for image in group]
    by_hash: dict[str, list[tuple[str, Path]]] = {}
    for split, path in tqdm(same_size, "comparing images", unit="image", delay=2, leave=False):
        by_hash.setdefault(content_hash(path), []).append((split, path))
    return tuple(tuple(group) for group in by_hash.values() if len(group) > 1)


def content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- for people -----------------------------------------------------------------------------------------------------


def report_text(report: Report) -> str:
    """Counts, histograms, and every problem with file and line, by kind."""
    data, splits = report.data, report.splits
    lines = [f"{data.path}: {len(data.names)} classes, format {data.format}, in {data.root}"]
    if splits:
        lines += ["", *table(data, splits)]
    for title, harmless in (("faults", False), ("notes", True)):
        found = by_kind(report, harmless)
        count = sum(len(problems) for _, problems in found)
        if found:
            lines += ["", f"{title}: {count:,}"]
        for kind, problems in found:
            lines += ["", f"  {kind.title}: {len(problems):,} ({kind.outcome})"]
            lines += [f"    {split + ': ' if split else ''}{found.where}: {found.text}" for split, found in problems]
    if report.copies:
        lines += [
            "",
            f"images with the same content: {len(report.copies):,} groups, {len(report.leaks):,} across splits"
            + (f", {len(report.torn):,} across classes" if report.torn else ""),
        ]
        lines += ["    " + " = ".join(f"{split}: {path}" for split, path in group) for group in report.copies]
    for split in splits:
        idle = [name for held, name in report.idle if held == split]
        if idle:
            what = "a box" if data.format in BOXES else "an image"
            lines += ["", f"classes without {what} in {split}: {some(idle, MOST_CLASSES)}"]
    lines += ["", *(f"fault: {fault}" for fault in report.faults)] if report.faults else []
    lines += ["", verdict(report)]
    return "\n".join(lines)


def verdict(report: Report) -> str:
    if report.faults:
        return "not fit for use: correct the faults above"
    what = [f"{len(report.lost):,} faults"] if report.lost else []
    what += [f"{len(report.leaks):,} images in several splits"] if report.leaks else []
    what += [f"{len(report.torn):,} images in several classes"] if report.torn else []
    return f"fit for use, but for {' and '.join(what)}" if what else "fit for use"


def by_kind(report: Report, harmless: bool) -> list[tuple[Kind, list[tuple[str, Problem]]]]:
    """Problems with their split, those of a kind together."""
    groups: dict[str, tuple[Kind, list[tuple[str, Problem]]]] = {}
    for split, problems in report.problems.items():
        for problem in problems:
            if problem.kind.harmless == harmless:
                groups.setdefault(problem.kind.title, (problem.kind, []))[1].append((split, problem))
    return list(groups.values())


def table(data: DataSpec, splits: Mapping[str, Split]) -> list[str]:
    """Counts by split: images, boxes, boxes by size, boxes by class with a bar.

    Where images are of a class as a whole, the boxes are the images, and are not counted apart. Where pixels are of
    classes, it is these that are counted.
    """
    if data.format == "masks":
        return mask_table(data, splits)
    samples = {name: split.samples for name, split in splits.items()}
    rows: list[tuple[str, list[str]]] = [("", list(splits))]
    rows.append(("images", [f"{len(found):,}" for found in samples.values()]))
    areas = [areas_of(found) for found in samples.values()]
    if data.format in BOXES:
        rows.append(("  without a box", [f"{sum(not len(s.labels) for s in found):,}" for found in samples.values()]))
        rows.append(("boxes", [f"{len(a):,}" for a in areas]))
        rows.append(("  small  < 32 x 32", [_count(a < SMALL) for a in areas]))
        rows.append(("  medium", [_count((a >= SMALL) & (a < LARGE)) for a in areas]))
        rows.append(("  large  >= 96 x 96", [_count(a >= LARGE) for a in areas]))
        ignored = [sum(len(s.ignored_labels) for s in found) for found in samples.values()]
        if any(ignored):
            rows.append(("ignored objects", [f"{count:,}" for count in ignored]))
    rows.append(("side of a box" if data.format in BOXES else "side of an image", ["" for _ in splits]))
    for index, name in enumerate(side_names()):
        rows.append((f"  {name}", [_count(sides_of(a) == index) for a in areas]))
    rows.append(("classes", ["" for _ in splits]))
    labels = [labels_of(found) for found in samples.values()]
    for index, name in enumerate(data.names):
        rows.append((f"  {index} {name}", [_count(values == index) for values in labels]))
    return aligned(rows, np.bincount(np.concatenate(labels), minlength=len(data.names)))


def mask_table(data: DataSpec, splits: Mapping[str, Split]) -> list[str]:
    """Counts by split: images, the pixels that are void, and of each class the images and its share of the pixels."""
    samples = {name: split.samples for name, split in splits.items()}
    pixels = {name: pixels_of(found, len(data.names)) for name, found in samples.items()}
    void = [1 - pixels[name].sum() / max(1, sizes_of(found).sum()) for name, found in samples.items()]
    rows: list[tuple[str, list[str]]] = [("", list(splits))]
    rows.append(("images", [f"{len(found):,}" for found in samples.values()]))
    rows.append(("  without a class", [f"{sum(not len(s.labels) for s in found):,}" for found in samples.values()]))
    rows.append(("pixels that are void", [f"{100 * share:.1f} %" for share in void]))
    rows.append(("images with, and pixels of", ["" for _ in splits]))
    for label, name in enumerate(data.names):
        cells = []
        for split, found in samples.items():
            images = sum(bool((sample.labels == label).any()) for sample in found)
            cells.append(f"{images:,} {100 * pixels[split][label] / max(1, pixels[split].sum()):5.1f} %")
        rows.append((f"  {label} {name}", cells))
    return aligned(rows, np.sum(list(pixels.values()), axis=0))


def aligned(rows: Sequence[tuple[str, Sequence[str]]], totals: np.ndarray) -> list[str]:
    """Rows of a name and cells as lines; the last ones have a bar for each of `totals`."""
    bars = ["█" * round(BAR * int(total) / max(1, int(totals.max()))) for total in totals]
    padded = [*("" for _ in rows[: -len(bars)]), *bars]
    first = max(len(name) for name, _ in rows)
    return [
        f"{name:<{first}}{''.join(f'{cell:>14}' for cell in cells)}  {bar}".rstrip()
        for (name, cells), bar in zip(rows, padded, strict=True)
    ]


def pixels_of(samples: Sequence[Sample], classes: int) -> np.ndarray:
    """How many pixels ``[classes]`` of all masks are of each class."""
    areas = [np.zeros(0), *(sample.areas for sample in samples if sample.areas is not None)]
    return np.bincount(labels_of(samples), np.concatenate(areas), minlength=classes).astype(np.int64)


def sizes_of(samples: Sequence[Sample]) -> np.ndarray:
    """The pixels ``[N]`` of each image that has a mask, void or not."""
    return np.array([np.prod(image_size(sample.path)) for sample in samples], dtype=np.int64)


def labels_of(samples: Sequence[Sample]) -> np.ndarray:
    """The classes ``[M]`` of all boxes."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(sample.labels for sample in samples)])


def areas_of(samples: Sequence[Sample]) -> np.ndarray:
    """The areas ``[M]`` of all boxes in square pixels."""
    boxes = np.concatenate([np.zeros((0, 4)), *(sample.boxes for sample in samples)])
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def sides_of(areas: np.ndarray) -> np.ndarray:
    """The bin ``[M]`` of `side_names` for each area: by its root, the side of a square as large."""
    return np.digitize(np.sqrt(areas), SIDES)


def side_names() -> list[str]:
    middle = [f"{low} to {high} pixels" for low, high in zip(SIDES[:-1], SIDES[1:], strict=True)]
    return [f"under {SIDES[0]} pixels", *middle, f"{SIDES[-1]} pixels and more"]


def _count(chosen: np.ndarray) -> str:
    """``"12  34 %"``: how many, and the share of all."""
    share = f"{100 * chosen.mean():.0f} %" if len(chosen) else ""
    return f"{int(chosen.sum()):,} {share:>5}"
