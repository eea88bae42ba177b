"""Heat maps as pictures for people: a row a decision, the image and each level's map over it side by side.

Pixels are uint8 RGB ``[H, W, 3]``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from engine.draw import FONT, class_color, draw_box, plain, shown_name
from engine.explain_metrics import NUMBERS, Interval, numbers_of
from engine.plots import new_figure, save_figure

TILE = 320  # pixels a tile is wide, at least
WIDEST = 480  # and at most
GAP, LINE = 10, 22  # pixels between tiles, and of a line of text
INK, PALE, PAPER = (24, 24, 24), (110, 110, 110), (255, 255, 255)
LETTERS = 0.48  # size of the text, of OpenCV's
GREY = 0.75  # how much of an image's colours goes under its heat
COLD_LIGHT = 0.55  # how bright an image stays where a map is 0
STRONGEST = 0.65  # share of the heat's colour where a map is 1


@dataclass(frozen=True, eq=False)
class Shown:
    """A decision as it is drawn.

    Attributes:
        name: its class.
        label: the class's number, which gives the colour of the box.
        confidence: how sure the network is.
        box: xyxy in pixels of the picture, None of a classifier.
        heats: a map ``[H, W]`` from 0 to 1 for each level, as large as the picture.
        left: of each level how sure the network is when it sees only what the map shows.
    """

    name: str
    label: int
    confidence: float
    box: Sequence[float] | None
    heats: Sequence[np.ndarray]
    left: Sequence[float]


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A picture under its heat: grey and darker where the map is 0, yellow to dark red where it is hot."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    base = GREY * grey + (1 - GREY) * picture
    base *= COLD_LIGHT + (1 - COLD_LIGHT) * heat[..., None]
    hot = heat_colors(heat).astype(np.float32)
    share = STRONGEST * np.sqrt(heat)[..., None]
    return (base * (1 - share) + hot * share).round().clip(0, 255).astype(np.uint8)


def heat_colors(heat: np.ndarray) -> np.ndarray:
    """The colour of each value from 0 to 1: blue, green, yellow, red (Turbo)."""
    index = (heat * 255).round().clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(index, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)


def explanation(
    picture: np.ndarray, rows: Sequence[Shown], levels: Sequence[str], title: str, method: str
) -> np.ndarray:
    """The whole picture: a heading, a row of tiles for each decision, and the scale of the colours below.

    Over each tile stands its level, under it how sure the network is when it sees only what is hot.
    """
    height, width = picture.shape[:2]
    wide = min(max(width, TILE), WIDEST)
    size = (wide, max(1, round(height * wide / width)))
    base = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if wide < width else cv2.INTER_CUBIC)
    columns, across = 1 + len(levels), (1 + len(levels)) * (wide + GAP) + GAP
    row_height = size[1] + 2 * LINE + GAP
    sheet = np.full((2 * LINE + len(rows) * row_height + 3 * LINE, across, 3), PAPER, np.uint8)
    _write(sheet, title, GAP, LINE + 4, scale=0.6, weight=2)
    for number, row in enumerate(rows):
        top = 2 * LINE + number * row_height
        box = None if row.box is None else [value * wide / width for value in row.box]
        tiles = [base, *(overlay(base, cv2.resize(heat, size).clip(0, 1)) for heat in row.heats)]
        what = "detected" if row.box is not None else "image"
        above = [f"{what}: {shown_name(row.name)} {row.confidence:.2f}", *levels]
        below = ["", *(_left(*pair, row.confidence) for pair in zip(row.heats, row.left, strict=True))]
        for column in range(columns):
            left = GAP + column * (wide + GAP)
            tile = tiles[column].copy()
            if box is not None:
                draw_box(tile, box, class_color(row.label) if not column else PAPER, "", 2)
            sheet[top + LINE : top + LINE + size[1], left : left + wide] = tile
            _write(sheet, above[column], left, top + LINE - 7)
            _write(sheet, below[column], left, top + LINE + size[1] + 16, PALE)
    _scale(sheet, sheet.shape[0] - 2 * LINE - 4, method)
    return sheet


def _left(heat: np.ndarray, left: float, before: float) -> str:
    if not heat.any():
        return "flat: no part speaks for it"
    return f"seen alone: {left:.2f}" + (f"  ({100 * left / before:.0f} %)" if before > 0 else "")


def _write(
    sheet: np.ndarray,
    text: str,
    left: int,
    base: int,
    ink: tuple[int, int, int] = INK,
    scale: float = LETTERS,
    weight: int = 1,
) -> int:
    """Writes a line into `sheet`; returns where it ends. Letters that the font lacks become ``?``."""
    line = plain(text)
    cv2.putText(sheet, line, (left, base), FONT, scale, ink, weight, cv2.LINE_AA)
    return left + cv2.getTextSize(line, FONT, scale, weight)[0][0]


def _scale(sheet: np.ndarray, top: int, method: str) -> None:
    """What the colours mean."""
    end = _write(sheet, "does not count", GAP, top + 12, PALE)
    bar = heat_colors(np.tile(np.linspace(0, 1, 160, dtype=np.float32), (12, 1)))
    room = max(0, min(160, sheet.shape[1] - end - 8))
    sheet[top + 2 : top + 14, end + 8 : end + 8 + room] = bar[:, :room]
    _write(sheet, f"speaks for it     ({method})", end + 176, top + 12, PALE)
    _write(
        sheet, "seen alone: how sure the network is of it when all that does not count is hidden", GAP, top + 32, PALE
    )


def draw_metrics(path: Path, found: Mapping[str, Mapping[str, Interval]], levels: Collection[str], title: str) -> None:
    """A panel a number: a bar a level with its interval, and grey ones of the maps that look at nothing.

    `found` is what `engine.explain_metrics.intervals` gives, `levels` are the names of the levels in it.
    """
    known = numbers_of(found)
    columns = 3 if len(known) in (3, 5, 6) else 4
    lines = -(-len(known) // columns)
    figure = new_figure(3.6 * columns, 3.0 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[len(known) :]:
        axes.set_axis_off()
    for axes, number in zip(panels, known, strict=False):
        shown = {name: of_map[number] for name, of_map in found.items() if number in of_map}
        values = [one.value for one in shown.values()]
        reach = [[one.value - one.low for one in shown.values()], [one.high - one.value for one in shown.values()]]
        colors = ["#1f4fd8" if name in levels else "0.75" for name in shown]
        axes.bar(list(shown), values, color=colors, yerr=np.maximum(reach, 0), capsize=3, ecolor="0.25")
        less = NUMBERS[number].less
        better = "" if less is None else f"  ({'less' if less else 'more'} is better)"
        axes.set_title(f"{NUMBERS[number].title}{better}", fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(f"{title}; grey: maps that look at nothing", fontsize=9)
    save_figure(figure, path)
