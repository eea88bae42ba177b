"""Divides a data set into parts: lists of images and a data YAML. No file of the data set is moved or changed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from data.check import copies
from data.config import SPLITS, DataSpec, read_data_spec
from data.files import write_text
from data.folder import data_spec
from data.readers import read_split
from data.structures import Fault, Sample, nearest


def split_data(
    path: str | Path, folder: str | Path, shares: Mapping[str, float], seed: int = 0, of: Sequence[str] = ()
) -> Path:
    """Writes ``train.txt`` (and so on) and ``data.yaml`` into `folder`; returns the path of that YAML.

    `shares` are those of train, val and test; they are made to sum to 1. `of` names the splits whose images are divided
    anew; by default all that the YAML has. The same seed gives the same parts.

    Raises:
        Fault: when the data set cannot be read, a share makes no sense, or a list would replace one that is there.
    """
    data = data_spec(path)
    folder = Path(os.path.abspath(folder))
    check_shares(shares)
    chosen = tuple(of) or tuple(name for name in SPLITS if data.sources(name))
    if any(data.masks(name) for name in SPLITS):
        raise Fault(
            f"{data.path}: names folders of masks, which are unknown to a list of images; "
            "folders called images and masks would find each other without a name"
        )
    found = {sample.path: sample for name in chosen for sample in read_split(data, name).samples}
    samples = list(found.values())
    if len(samples) < len(shares):
        raise Fault(f"{data.path}: {len(samples)} images cannot be divided into {len(shares)} parts")
    files = [*(f"{name}.txt" for name in shares), "data.yaml"]
    there = [name for name in files if (folder / name).exists()]
    if there:
        raise Fault(f"{folder}: has {', '.join(there)} already; name another folder, or remove them")
    same = copies([("", sample.path) for sample in samples])
    part_of = divide(samples, len(data.names), list(shares.values()), seed, same)

    lines = [_line(folder, sample.path) for sample in samples]
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in enumerate(shares):
        of_part = (line for line, its_part in zip(lines, part_of, strict=True) if its_part == part)
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in of_part))
    write_text(folder / "data.yaml", _yaml(data, folder, list(shares), chosen))
    if data.format == "coco":
        _check_found(folder, files, samples)
    return folder / "data.yaml"


def _check_found(folder: Path, files: Sequence[str], samples: Sequence[Sample]) -> None:
    """JSONs know images by name alone: takes the lists back where that leaves one of them unclear."""
    made = read_data_spec(folder / "data.yaml")
    try:
        found = {sample.path for name in SPLITS if made.sources(name) for sample in read_split(made, name).samples}
    except Fault:  # all of a part are unclear
        found = set()
    unclear = [sample.path for sample in samples if sample.path not in found]
    if unclear:
        for name in files:
            (folder / name).unlink()
        raise Fault(
            f"{unclear[0]}: the JSONs list several images of this name; "
            "give a copy to `python -m data convert --to yolo` first, and divide that"
        )


def check_shares(shares: Mapping[str, float]) -> None:
    for name, share in shares.items():
        if name not in SPLITS:
            raise Fault(f"part {name!r} is not known; one of {', '.join(SPLITS)}{nearest(name, SPLITS)}")
        if not 0 < share < float("inf"):
            raise Fault(f"{name}={share:g}: a share above 0 is right, as {name}=0.8")
    if len(shares) < 2:
        raise Fault("one part is no division; as train=0.8 val=0.2 is right")


def divide(
    samples: Sequence[Sample],
    classes: int,
    shares: Sequence[float],
    seed: int,
    same: Sequence[Sequence[tuple[str, Path]]] = (),
) -> list[int]:
    """The part of each sample, so that every part gets its share of images and of the boxes of each class.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas, 2011, algorithm 1), with boxes counted rather than
    images: the class with the fewest boxes left is dealt first, each of its images to the part that lacks most of it.
    Images that are `same` go to the same part. Images without a box are dealt last, by the number of images.
    """
    rng = np.random.default_rng(seed)
    share = np.array(shares, dtype=np.float64) / sum(shares)
    group_of = {path: number for number, group in enumerate(same) for _, path in group}
    groups: dict[tuple[str, int], list[int]] = {}
    for index, sample in enumerate(samples):
        number = group_of.get(sample.path)
        groups.setdefault(("one", index) if number is None else ("same", number), []).append(index)
    units = [list(groups.values())[place] for place in rng.permutation(len(groups))]
    labels = [np.concatenate([samples[index].labels for index in unit]) for unit in units]
    counts_UC = np.stack([np.bincount(found, minlength=classes) for found in labels])  # U units, C classes
    sizes_U = np.array([len(unit) for unit in units])
    wanted_PC = share[:, None] * counts_UC.sum(axis=0)  # P parts: boxes that are still to come
    wanted_P = share * sizes_U.sum()  # and images
    part_U = np.full(len(units), -1)
    while True:
        left_C = counts_UC[part_U < 0].sum(axis=0)
        if not left_C.any():
            break
        rarest = int(np.where(left_C > 0, left_C, np.iinfo(np.int64).max).argmin())
        for unit in np.flatnonzero((part_U < 0) & (counts_UC[:, rarest] > 0)):
            _deal(int(unit), part_U, wanted_PC[:, rarest], wanted_P, wanted_PC, counts_UC, sizes_U)
    for unit in np.flatnonzero(part_U < 0):
        _deal(int(unit), part_U, wanted_P, wanted_P, wanted_PC, counts_UC, sizes_U)
    _fill_empty(part_U, len(shares))
    parts = {index: int(part_U[place]) for place, unit in enumerate(units) for index in unit}
    return [parts[index] for index in range(len(samples))]


def _deal(
    unit: int,
    part_U: np.ndarray,
    lacking_P: np.ndarray,
    wanted_P: np.ndarray,
    wanted_PC: np.ndarray,
    counts_UC: np.ndarray,
    sizes_U: np.ndarray,
) -> None:
    """To the part that lacks most, of equals to the one that lacks most images; and that is counted."""
    best = np.flatnonzero(lacking_P >= lacking_P.max() - 1e-9)
    part = best[wanted_P[best].argmax()]
    part_U[unit] = part
    wanted_PC[part] -= counts_UC[unit]
    wanted_P[part] -= sizes_U[unit]


def _fill_empty(part_U: np.ndarray, parts: int) -> None:
    """No part stays empty as long as there are as many units as parts: the largest gives one away."""
    for part in range(parts):
        held = np.bincount(part_U, minlength=parts)
        if held[part] == 0 and held.max() > 1:
            part_U[np.flatnonzero(part_U == held.argmax())[-1]] = part


def _line(folder: Path, image: Path) -> str:
    """An image as a list names it, from the list's folder on."""
    line = Path(os.path.relpath(image, folder)).as_posix()
    if line != line.strip() or line.splitlines() != [line] or line.encode(errors="ignore").decode() != line:
        raise Fault(
            f"{str(image)!r}: a list cannot hold this name; rename the file: UTF-8, no line breaks, no end blanks"
        )
    return line


def _yaml(data: DataSpec, folder: Path, parts: Sequence[str], of: Sequence[str]) -> str:
    values: dict[str, object] = {"path": Path(os.path.relpath(data.root, folder)).as_posix()}
    for part in parts:
        values[part] = Path(os.path.relpath(folder / f"{part}.txt", data.root)).as_posix()
    if data.format == "coco":
        jsons = list(
            dict.fromkeys(Path(os.path.relpath(json, data.root)).as_posix() for s in of for json in data.jsons(s))
        )
        values |= {f"{part}_json": list(jsons) if len(jsons) > 1 else jsons[0] for part in parts}
    if data.format == "masks":
        values |= {"void": list(data.void)} if data.void else {}
    if data.annotations is not None:
        values["annotations"] = data.annotations
    values |= {"format": data.format, "names": list(data.names)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
