"""A cache of labels that were read: JSON in the user's cache folder, never beside the data and never a pickle.

An entry holds for as long as nothing has changed that reading depends on: what the data YAML means, which images there
are, and size and times of every image and label file. Whatever does not fit, or is not what was written, is read anew
without a word. Where the folder cannot be written, there is no cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataSpec, several
from data.files import cache_folder, write_text
from data.readers.labels import KINDS, Problem, Split
from data.structures import MaskFile, Sample

VERSION = 2  # of what readers make of a file, and of this format
FEWEST = 500  # images; fewer are read about as fast as they are looked up
SETTLED = 2.0  # seconds; a file younger than this may change again without a change of its times
ARRAYS = {
    "boxes": (np.float32, 4),
    "labels": (np.int64, 1),
    "areas": (np.float64, 1),
    "ignored_boxes": (np.float32, 4),
    "ignored_labels": (np.int64, 1),
    "ignored_crowd": (np.bool_, 1),
}


def inputs_of(data: DataSpec, split: str, images: Sequence[str]) -> str:
    """A hash of what is known before a label is read: the YAML's meaning, the images of folders and lists, the JSONs.

    `images` are those that were listed, in their order; none where a JSON lists them.
    """
    meaning = [VERSION, data.format, str(data.root), data.names, split, data.images, data.annotations]
    meaning += [several(getattr(data, key)) for key in (split, f"{split}_json", f"{split}_masks")]
    meaning += [data.void]
    jsons = [str(path) for path in (*data.jsons(split), *data.sources(split))]
    return _hash(json.dumps(meaning), *images, _stamps(jsons)[0] if not images else "")


def find(data: DataSpec, split: str, inputs: str) -> Split | None:
    """What `keep` kept, without notes; None where there is nothing or anything has changed."""
    try:
        text = _path(data, split).read_text(encoding="utf-8")
        head, content = text[: len(_head(""))], text[len(_head("")) : -1]
        if head != _head(content):
            return None
        values = json.loads(content)
        if values["inputs"] != inputs or values["stamps"] != _stamps(values["files"])[0]:
            return None
        return _unpacked(values)
    except (OSError, ValueError, KeyError, TypeError, IndexError):  # whatever it is, it is not what was written
        return None


def keep(data: DataSpec, split: str, inputs: str, files: Sequence[str], found: Split, started: float) -> None:
    """Keeps what was read, unless it is little, or a file is so new that it may have changed while it was read.

    `files` are all that it depends on, there or not; `started` is the time at which reading began.
    """
    if len(found.samples) < FEWEST:
        return
    stamps, newest = _stamps(files)
    if newest > started - SETTLED:
        return
    values = {"inputs": inputs, "stamps": stamps, "files": list(files), **_packed(found, files)}
    content = json.dumps(values, ensure_ascii=False)
    try:
        path = _path(data, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{_head(content)}{content}}}")
    except (OSError, UnicodeEncodeError):  # a cache is a convenience; a file name may be no valid text
        return


def _path(data: DataSpec, split: str) -> Path:
    return cache_folder() / "labels" / f"{_hash(os.path.abspath(data.path), split)[:32]}.json"


def _head(content: str) -> str:
    """What a file begins with. It has the same length for every content."""
    return f'{{"hash": "{_hash(content)}", "content": '


def _hash(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogateescape"), digest_size=32).hexdigest()


def _stamps(files: Sequence[str]) -> tuple[str, float]:
    """A hash of the sizes and times of files, and the latest of these times in seconds."""
    found: list[str] = []
    newest = 0
    for file in files:
        try:
            state = os.stat(file)
        except OSError:
            found.append("-")
            continue
        found.append(f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}")
        newest = max(newest, state.st_mtime_ns, state.st_ctime_ns)
    return _hash(*found), newest / 1e9


def _packed(found: Split, files: Sequence[str]) -> dict[str, Any]:
    places = {file: place for place, file in enumerate(files)}
    samples = found.samples
    values: dict[str, Any] = {
        "samples": [places[str(sample.path)] for sample in samples],
        "counts": [len(sample.labels) for sample in samples],
        "ignored_counts": [len(sample.ignored_labels) for sample in samples],
        "image_ids": [sample.image_id for sample in samples],
        "masks": [sample.mask and [places[str(sample.mask.path)], sample.mask.classes] for sample in samples],
        "void": next((sample.mask.void for sample in samples if sample.mask), ()),
        "category_ids": found.category_ids,
        "problems": [[problem.kind.title, problem.where, problem.text] for problem in found.problems],
    }
    for name, (kind, _) in ARRAYS.items():
        arrays = [getattr(sample, name) for sample in samples]
        if any(array is None for array in arrays):
            values[name] = None
        else:
            values[name] = base64.b64encode(np.concatenate(arrays).astype(kind).tobytes()).decode("ascii")
    return values


def _unpacked(values: dict[str, Any]) -> Split:
    arrays: dict[str, np.ndarray | None] = {}
    for name, (kind, width) in ARRAYS.items():
        if values[name] is None:
            arrays[name] = None
        else:
            array: np.ndarray = np.frombuffer(bytearray(base64.b64decode(values[name], validate=True)), dtype=kind)
            arrays[name] = array.reshape(-1, 4) if width == 4 else array
    starts = np.cumsum([0, *values["counts"]]).tolist()
    ignored_starts = np.cumsum([0, *values["ignored_counts"]]).tolist()
    boxes, labels, areas = arrays["boxes"], arrays["labels"], arrays["areas"]
    ignored_boxes, ignored_labels, ignored_crowd = (
        arrays[name] for name in ("ignored_boxes", "ignored_labels", "ignored_crowd")
    )
    if boxes is None or labels is None or ignored_boxes is None or ignored_labels is None or ignored_crowd is None:
        raise ValueError("an array is missing")
    lengths = {len(boxes), len(labels), starts[-1], len(labels if areas is None else areas)}
    ignored_lengths = {len(ignored_boxes), len(ignored_labels), len(ignored_crowd), ignored_starts[-1]}
    if len(lengths) > 1 or len(ignored_lengths) > 1:
        raise ValueError("arrays of different lengths")
    void = tuple(values["void"])
    samples = tuple(
        Sample(
            Path(values["files"][place]),
            boxes[start:end],
            labels[start:end],
            None if areas is None else areas[start:end],
            ignored_boxes[from_:to],
            ignored_labels[from_:to],
            ignored_crowd[from_:to],
            image_id,
            None if mask is None else MaskFile(Path(values["files"][mask[0]]), mask[1], void),
        )
        for place, image_id, mask, start, end, from_, to in zip(
            values["samples"],
            values["image_ids"],
            values["masks"],
            starts[:-1],
            starts[1:],
            ignored_starts[:-1],
            ignored_starts[1:],
            strict=True,
        )
    )
    problems = tuple(Problem(KINDS[title], where, text) for title, where, text in values["problems"])
    category_ids = values["category_ids"]
    return Split(samples, (), None if category_ids is None else tuple(category_ids), problems)
