"""What the sections of a search's report are put together from: small functions from values to HTML."""

from __future__ import annotations

from collections.abc import Sequence

from search.plots import escaped
from search.report_data import (
    TITLES,
    Run,
    Subnet,
    listed,
)

MOST_TIES = 3  # numbers on a badge


def css(kind: str, on: bool = True) -> str:
    """A class attribute, or nothing."""
    return f' class="{kind}"' if on and kind else ""


def absent(text: str) -> str:
    """A sentence in place of what the folder does not hold. `text` is HTML."""
    return f'<p class="absent">{text}</p>'


def copied(text: str, kind: str = "") -> str:
    """A text, with a button that copies it."""
    return (
        f'<div class="copied"><pre{css(kind)}>{escaped(text)}</pre>'
        '<button type="button" class="copy">copy</button></div>'
    )


def command(line: str) -> str:
    """A command to copy; it is wrapped between its words only."""
    wrapped = " ".join(f'<span class="word">{escaped(word)}</span>' for word in line.split(" "))
    return f'<div class="copied"><pre>{wrapped}</pre><button type="button" class="copy">copy</button></div>'


def table(heads: Sequence[str], lines: Sequence[str], sortable: bool = False) -> str:
    """`heads` are texts, those of numbers beginning with ``>``; `lines` are rows of cells."""
    head = "".join(f"<th{css('n', text.startswith('>'))}>{escaped(text.removeprefix('>'))}</th>" for text in heads)
    return (
        f'<div class="scroll"><table{css("sortable", sortable)}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def number(value: float | None, shown: str = "{:.3f}") -> str:
    """A cell with a number as it is shown, and the whole of it for sorting and for programs."""
    return (
        '<td class="n">–</td>'
        if value is None
        else f'<td class="n"><data value="{value!r}">{shown.format(value)}</data></td>'
    )


def folded(title: str, inside: str) -> str:
    return f"<details><summary>{title}</summary>{inside}</details>"


def figures(pictures: Sequence[str]) -> str:
    return f'<div class="panels">{"".join(f"<figure>{picture}</figure>" for picture in pictures)}</div>'


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """What the marks of a picture mean: pairs of an SVG around 0 0 and a text."""
    return '<ul class="legend">' + "".join(
        f'<li><svg viewBox="-11 -11 22 22">{shape}</svg>{text}</li>' for shape, text in keys
    ) + "</ul>"  # fmt: skip


def link(run: Run, one: Subnet) -> str:
    return f'<a href="#subnet-{one.number}">{one.number}</a>' if run.has_card(one) else str(one.number)


def badges(run: Run, one: Subnet) -> str:
    found = ['<span class="badge best">★ best</span>'] if one.number == run.best else []
    for metric, bend in run.knees.items():
        of = f" of {TITLES[metric]}" if len(run.metrics) > 1 else ""
        found += [f'<span class="badge knee">◆ knee{of}</span>'] if bend == one.number else []
    if one.front and one.ties:
        more = f" and {len(one.ties) - MOST_TIES} more" if len(one.ties) > MOST_TIES + 1 else ""
        shown = ", ".join(map(str, one.ties[:MOST_TIES])) + more if more else listed(one.ties)
        found.append(f'<span class="badge tied">ties with {shown}</span>')
    return " ".join(found)


def cheaper_tie(run: Run, one: Subnet) -> Subnet | None:
    """The cheapest subnet of the front that this one ties with."""
    return next((other for other in run.front if other.number in one.ties), None)


def with_article(title: str) -> str:
    """``an AP``, ``a top-1``"""
    return f"{'an' if title in ('AP', 'mIoU') else 'a'} {title}"


def row_note(run: Run, name: str) -> str:
    """The op and stride of the row that a choice or decision belongs to."""
    row = name.partition(".")[0]
    nodes = run.graph.nodes if run.graph else ()
    node = next((node for node in nodes if (node.layer.name or str(node.index)) == row), None)
    return f'<span class="faint">{escaped(node.op.name)}, stride {node.output.stride}</span>' if node else ""
