"""What a data set holds, in one table, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.config import SPLITS, DataSpec, read_data_spec
from data.readers import Split, read_split, some
from data.structures import Fault

SMALL, LARGE = 32**2, 96**2  # square pixels of the original image, as COCO has them


def check(path: str | Path) -> tuple[str, bool]:
    """Reads every split. Returns a text for people, and whether training can use the data set.

    Raises:
        Fault: when the YAML itself is wrong.
    """
    data = read_data_spec(path)
    splits: dict[str, Split] = {}
    faults: list[str] = []
    for name in SPLITS:
        if getattr(data, name) is None:
            continue
        try:
            splits[name] = read_split(data, name)
        except Fault as fault:
            faults += [line for line in fault.lines if line not in faults]
    notes = [f"{name}: {note}" for name, split in splits.items() for note in split.notes] + _shared(splits)
    lines = [f"{data.path}: {len(data.names)} classes, format {data.format}, in {data.root}"]
    if splits:
        lines += ["", *table(data, splits)]
    lines += ["", *(f"note: {note}" for note in notes)] if notes else []
    lines += ["", *(f"fault: {fault}" for fault in faults)] if faults else []
    lines += ["", "not fit for use: correct the faults above" if faults else "fit for use"]
    return "\n".join(lines), not faults


def table(data: DataSpec, splits: Mapping[str, Split]) -> list[str]:
    """Counts by split: images, boxes, boxes by COCO size, boxes by class."""
    rows: list[tuple[str, list[str]]] = [("", list(splits))]
    labels = [np.concatenate([sample.labels for sample in split.samples]) for split in splits.values()]
    boxes = [np.concatenate([sample.boxes for sample in split.samples]) for split in splits.values()]
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in boxes]
    rows.append(("images", [str(len(split.samples)) for split in splits.values()]))
    rows.append(("  without a box", [str(sum(not len(s.labels) for s in split.samples)) for split in splits.values()]))
    rows.append(("boxes", [str(len(b)) for b in boxes]))
    rows.append(("  small  < 32 x 32", [_count(a < SMALL) for a in areas]))
    rows.append(("  medium", [_count((a >= SMALL) & (a < LARGE)) for a in areas]))
    rows.append(("  large  >= 96 x 96", [_count(a >= LARGE) for a in areas]))
    rows.append(("classes", ["" for _ in splits]))
    for index, name in enumerate(data.names):
        rows.append((f"  {index} {name}", [_count(values == index) for values in labels]))
    first = max(len(name) for name, _ in rows)
    return [f"{name:<{first}}{''.join(f'{cell:>14}' for cell in cells)}".rstrip() for name, cells in rows]


def _count(chosen: np.ndarray) -> str:
    """``"12  34 %"``: how many, and the share of all."""
    share = f"{100 * chosen.mean():.0f} %" if len(chosen) else ""
    return f"{int(chosen.sum())} {share:>5}"


def _shared(splits: Mapping[str, Split]) -> list[str]:
    """A note for every two splits that hold the same image file."""
    notes: list[str] = []
    names = list(splits)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            held = {sample.path for sample in splits[one].samples}
            both = [sample.path.name for sample in splits[other].samples if sample.path in held]
            if both:
                notes.append(f"{one} and {other} share {len(both)} images: {some(both)}")
    return notes
