"""What a run leaves on disk: its folder, its table of results, its pictures. Every file appears whole or not at all."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from data.files import atomically as atomically
from data.files import write_text as write_text
from data.structures import Fault


def new_run(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """Make and return ``project/name``, or ``name2``, ``name3``, ... where that exists already.

    ``exist_ok`` takes the existing folder. Two processes that ask at once get two folders.
    """
    for number in count(1):
        folder = Path(project) / (name if number == 1 else f"{name}{number}")
        try:
            folder.mkdir(parents=True, exist_ok=exist_ok)
        except FileExistsError:
            if exist_ok:
                raise Fault(f"{folder}: exists and is not a folder; give another --name") from None
            continue
        except NotADirectoryError:
            raise Fault(f"{folder}: a part of this path is a file; give another --project") from None
        return folder
    raise AssertionError("count() never ends")


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished checkpoints, tables and pictures of a run that was killed while it wrote them."""
    for leftover in folder.rglob(".*-????????.*"):  # of `atomically`
        leftover.unlink(missing_ok=True)


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows under the keys of the first one; None becomes an empty cell. Without rows there is no file."""
    if not rows:
        return Path(path).unlink(missing_ok=True)
    with atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def append_csv(path: str | Path, row: Mapping[str, Any]) -> None:
    """Add a row at the end, under the names that the first row brought."""
    path = Path(path)
    if not path.exists():
        return write_csv(path, [row])
    with open(path, newline="", encoding="utf-8") as file:
        names = next(csv.reader(file))
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, names).writerow(row)


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The whole rows of a file that `append_csv` wrote; a last row cut off by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Rows in aligned columns under a header: text to the left, numbers to the right, None and nan as ``-``.

    Floats are shown with three decimals; hand in text where another number of them is right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [_is_number_column([row[i] for row in rows]) for i in range(len(header))]
    lines = [list(header), ["-" * width for width in widths], *cells]
    aligned = (
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        for line in lines
    )
    return "\n".join(line.rstrip() for line in aligned)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _is_number_column(values: Sequence[Any]) -> bool:
    return bool(values) and all(value is None or isinstance(value, int | float) for value in values)


def draw_curves(path: str | Path, rows: Sequence[Mapping[str, Any]], panels: Sequence[Sequence[str]]) -> None:
    """Draw columns of a results table over ``epoch``, one panel a group of names; empty cells are skipped."""
    from matplotlib.figure import Figure  # here because it is slow to import; it needs no screen

    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name) not in (None, "")]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=120)
