"""One HTML page of a data set: its numbers, its problems, and pictures with their boxes.

The page needs no other file and runs nothing: pictures are JPEG inside it, and its own policy forbids scripts and any
connection. Names of classes and files come from whoever made the data set; all are escaped.
"""

from __future__ import annotations

import base64
import colorsys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from data.check import Report, areas_of, by_kind, labels_of, pixels_of, side_names, sides_of, verdict
from data.files import write_text
from data.images import read_image
from data.masks import read_mask
from data.readers import READERS
from data.structures import VOID, Fault, MaskFile, Sample

MASKED = 0.5  # how much of a pixel is the colour of its class
SIDE = 360  # pixels of a thumbnail's longer side
QUALITY = 80  # of its JPEG
EACH = 3  # pictures of every class, before any others
MOST_LINES = 1000  # problems of a kind that are listed

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: light-dark(#222, #ddd); --paper: light-dark(#fff, #16181c) }
body { margin: 2rem auto; max-width: 1240px; padding: 0 1rem; font: 15px/1.45 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .1rem .8rem .1rem 0; text-align: left; font-weight: normal }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { display: inline-block; height: .7em; min-width: 1px; border-radius: 2px; background: #4a90d9 }
.columns { display: flex; flex-wrap: wrap; gap: 1rem 4rem }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 1rem }
figure { margin: 0; overflow-wrap: anywhere } figcaption { font-size: .8rem }
.picture { position: relative } .picture img { display: block; width: 100%; border-radius: 4px }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
rect { fill: transparent; stroke-width: 2; vector-effect: non-scaling-stroke }
rect:hover { fill: #fff4 } .ignored { stroke-dasharray: 5 4 }
text { paint-order: stroke; stroke: #000b; stroke-width: .22em; fill: #fff; font-weight: 600 }
.wrong { color: light-dark(#b00020, #ff8a80) } li { overflow-wrap: anywhere; font-size: .85rem }
summary { cursor: pointer; margin: .3rem 0 }
"""


def write_contact_sheet(path: str | Path, report: Report, most: int = 60, seed: int = 0) -> None:
    """Writes the page with at most `most` pictures: those with problems, some of every class, and others by chance.

    Raises:
        Fault: when the page's folder is missing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise Fault(f"{path}: the folder {path.parent} does not exist; make it, or name another")
    if path.is_dir():
        raise Fault(f"{path}: is a folder; name a file, as {path / 'sheet.html'}")
    text = "".join(f"{part}\n" for part in _page(report, most, seed))
    write_text(path, text.encode(errors="replace").decode())  # file names may be of no encoding


def _page(report: Report, most: int, seed: int) -> Iterator[str]:
    data = report.data
    title = escape(str(data.path))
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    yield "style-src 'unsafe-inline'\">"
    yield f"<title>{title}</title><style>{STYLE}</style></head><body>"
    yield f"<h1>{title}</h1><p>{escape(verdict(report))}. {len(data.names)} classes, format {escape(data.format)}, "
    yield f"in {escape(str(data.root))}</p>"
    if report.faults:
        yield f'<ul class="wrong">{"".join(f"<li>{escape(fault)}</li>" for fault in report.faults)}</ul>'
    yield from _problems(report)
    yield from _numbers(report)
    chosen = choose(report, most, seed)
    if chosen:
        told = "Dashed boxes are ignored in evaluation and never trained on."
        told = "Pixels without a colour are void." if data.format == "masks" else told
        yield f"<h2>{len(chosen)} pictures</h2><p>{told}</p>"
    yield '<div class="sheet">'
    for split, sample, problems in tqdm(chosen, "drawing pictures", unit="image", delay=2, leave=False):
        yield from _figure(report, split, sample, problems)
    yield "</div></body></html>"


def _numbers(report: Report) -> Iterator[str]:
    splits = report.splits
    if not splits:
        return
    labels = {name: labels_of(split.samples) for name, split in splits.items()}
    named = [f"{index} {name}" for index, name in enumerate(report.data.names)]
    if report.data.format == "masks":
        images = {name: np.bincount(found, minlength=len(named)) for name, found in labels.items()}
        pixels = {name: pixels_of(split.samples, len(named)) for name, split in splits.items()}
        yield '<div class="columns"><div><h2>Images that show a class</h2>'
        yield from _bars(named, images)
        yield "</div><div><h2>Pixels of each class</h2>"
        yield from _bars(named, pixels)
        yield "</div></div>"
        return
    yield '<div class="columns"><div><h2>Splits</h2><table><tr><th></th><th>images</th><th>boxes</th>'
    yield "<th>without a box</th><th>ignored objects</th></tr>"
    for name, split in splits.items():
        bare = sum(not len(sample.labels) for sample in split.samples)
        ignored = sum(len(sample.ignored_labels) for sample in split.samples)
        counts = (len(split.samples), len(labels[name]), bare, ignored)
        yield f"<tr><th>{name}</th>{''.join(f'<td class=n>{count:,}</td>' for count in counts)}</tr>"
    yield "</table><h2>Side of a box</h2>"
    sides = {name: sides_of(areas_of(split.samples)) for name, split in splits.items()}
    yield from _histogram(side_names(), sides)
    yield "</div><div><h2>Boxes of each class</h2>"
    yield from _histogram(named, labels)
    yield "</div></div>"


def _histogram(names: Sequence[str], found: dict[str, np.ndarray]) -> Iterator[str]:
    """A row a name: how often each split has it, and a bar for all together."""
    yield from _bars(names, {split: np.bincount(values, minlength=len(names)) for split, values in found.items()})


def _bars(names: Sequence[str], counts: dict[str, np.ndarray]) -> Iterator[str]:
    totals = sum(counts.values(), np.zeros(len(names), dtype=np.int64))
    yield f"<table><tr><th></th>{''.join(f'<th>{split}</th>' for split in counts)}<th></th></tr>"
    for index, name in enumerate(names):
        cells = "".join(f"<td class=n>{int(count[index]):,}</td>" for count in counts.values())
        width = 180 * int(totals[index]) / max(1, int(totals.max()))
        bar = f'<span class="bar" style="width:{width:.0f}px"></span>' if totals[index] else ""
        yield f"<tr><th>{escape(name)}</th>{cells}<td>{bar}</td></tr>"
    yield "</table>"


def _problems(report: Report) -> Iterator[str]:
    for title, harmless in (("Faults", False), ("Notes", True)):
        kinds = by_kind(report, harmless)
        if kinds:
            yield f"<h2>{title}</h2>"
        for kind, found in kinds:
            yield f'<details><summary class="{"" if harmless else "wrong"}">{len(found):,} {escape(kind.title)} '
            yield f"({escape(kind.outcome)})</summary><ul>"
            for _, problem in found[:MOST_LINES]:
                yield f"<li>{escape(f'{problem.where}: {problem.text}')}</li>"
            yield f"{'<li>...</li>' if len(found) > MOST_LINES else ''}</ul></details>"
    if report.copies:
        yield f"<h2>Images with the same content</h2><p>{len(report.leaks):,} across splits</p>"
        yield f"<details><summary>{len(report.copies):,} groups</summary><ul>"
        for group in report.copies[:MOST_LINES]:
            yield f"<li>{' = '.join(escape(f'{split}: {path}') for split, path in group)}</li>"
        yield "</ul></details>"


def choose(report: Report, most: int, seed: int) -> list[tuple[str, Sample, list[str]]]:
    """The samples to show, each with its split and problems.

    First, up to a quarter of the page, those with a problem; then of every class a few, rare classes first; then any.
    """
    told: dict[str, list[str]] = {}
    for problems in report.problems.values():
        for problem in problems:
            told.setdefault(problem.file, []).append(str(problem))
    reader = READERS.get(report.data.format)
    everyone: list[tuple[str, Sample, list[str]]] = []
    for split, found in report.splits.items():
        for sample in found.samples:
            files = [str(sample.path), *([reader.label_path(report.data, str(sample.path))] if reader else [])]
            everyone.append((split, sample, [line for file in files for line in told.get(file, [])]))
    order = [everyone[index] for index in np.random.default_rng(seed).permutation(len(everyone))]
    chosen = [entry for entry in order if entry[2]][: most // 4]
    names = len(report.data.names)
    held = [set(entry[1].labels.tolist()) | set(entry[1].ignored_labels.tolist()) for entry in order]
    totals = [sum(label in labels for labels in held) for label in range(names)]
    taken = {id(entry) for entry in chosen}
    for label in sorted(range(names), key=lambda label: totals[label]):
        shown = sum(label in entry[1].labels for entry in chosen)
        for entry, labels in zip(order, held, strict=True):
            if shown >= EACH or len(chosen) >= most:
                break
            if label in labels and id(entry) not in taken:
                chosen.append(entry)
                taken.add(id(entry))
                shown += 1
    chosen += [entry for entry in order if id(entry) not in taken][: most - len(chosen)]
    return chosen


def _figure(report: Report, split: str, sample: Sample, problems: Sequence[str]) -> Iterator[str]:
    root = report.data.root
    file = sample.path.relative_to(root) if sample.path.is_relative_to(root) else sample.path
    caption = f"{escape(split)}: {escape(str(file))}"
    caption += "".join(f'<br><span class="wrong">{escape(line)}</span>' for line in problems[:3])
    try:
        image = read_image(sample.path)
    except Fault as fault:
        yield f'<figure><figcaption>{caption}<br><span class="wrong">{escape(str(fault))}</span></figcaption></figure>'
        return
    height, width = image.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if sample.mask is not None:
        small = coloured(small, sample.mask)
        chips = (
            f'<span style="color:{class_colour(label)}">■</span> {escape(report.data.names[label])}'
            for label in sample.labels.tolist()
        )
        caption += f"<br>{', '.join(chips)}"
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    yield '<figure><div class="picture">'
    yield f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg.tobytes()).decode("ascii")}">'
    yield f'<svg viewBox="0 0 {width} {height}">'
    boxes_of_uses = (
        (sample.ignored_boxes, sample.ignored_labels, "ignored"),
        (sample.boxes, sample.labels, "trained"),
    )
    for boxes, labels, name in boxes_of_uses if sample.mask is None else ():
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            text, colour, letters = escape(report.data.names[label]), class_colour(label), max(width, height) / 26
            yield f'<rect class="{name}" x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            yield f'stroke="{colour}"><title>{text}</title></rect>'
            if x2 - x1 > 2 * letters:
                above = max(y1 - letters / 4, letters)
                yield f'<text x="{x1:.1f}" y="{above:.1f}" font-size="{letters:.1f}">{text}</text>'
    yield f"</svg></div><figcaption>{caption}</figcaption></figure>"


def coloured(image: np.ndarray, file: MaskFile) -> np.ndarray:
    """A picture with the colours of its classes on it; void stays as it is."""
    mask = cv2.resize(read_mask(file), image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    tones = [colorsys.hls_to_rgb(hue_of(label) / 360, 0.55, 0.9) for label in range(VOID + 1)]
    painted = (255 * np.array(tones)).round().astype(np.uint8)[mask]
    blended = cv2.addWeighted(image, 1 - MASKED, painted, MASKED, 0)
    return np.where((mask == VOID)[..., None], image, blended)


def hue_of(label: int) -> float:
    """Hues a golden angle apart, in degrees, so that neighbours in number differ most."""
    return label * 137.508 % 360


def class_colour(label: int) -> str:
    return f"hsl({hue_of(label):.0f} 90% 55%)"
