"""A search as one page, ``report.html``: what was searched, what came out, how far to trust it, how to go on.

python -m search.report runs/search/exp

The page is made from the files of the run's folder alone, and nothing else is needed to show it: no network, no script
or style from elsewhere. A file that is not there takes its section along, or leaves a sentence on how to get it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import option_name
from engine.doors import door, option_parser, parse_options
from engine.runs import write_text
from models import draw
from models.layout import Layout
from search import plots, report_page
from search.config import SearchConfig
from search.front import COSTS
from search.latency import ALLOWED_ERROR, ALLOWED_TAU, SEPARABLE
from search.objective import UNDECIDED
from search.plots import Mark, Series, escaped
from search.report_data import (
    STATES,
    TITLES,
    Run,
    Subnet,
    cell,
    cost_number,
    cost_text,
    costs_text,
    decision_text,
    duration,
    listed,
    option_text,
    plain,
    plural,
    read_run,
    score_text,
    search_command,
    taken_option,
    training_command,
)

NOISE = 0.01  # a score below this says that the supernet has hardly learned anything yet
KINDS = {"detect": "detection", "classify": "classification", "segment": "segmentation"}  # of losses, by task
MOST_DOTS = 6_000  # of the cloud of losses
MOST_TIES = 3  # numbers on a badge


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into the folder of a search and returns its path.

    Raises a Fault for a folder that is not a search's, and for a file in it that is not what its name says.
    """
    path = folder / "report.html"
    write_text(path, page(read_run(folder)))
    return path


def page(run: Run) -> str:
    sections = {
        "short": ("In short", headline(run)),
        "front": ("Front", front_section(run)),
        "all": ("All subnets", cloud_section(run)),
        "choices": ("Choices over time", alphas_section(run)),
        "importance": ("What matters", importance_section(run)),
        "training": ("Training", training_section(run)),
        "latency": ("Latency", latency_section(run)),
        "retraining": ("Retraining", retraining_section(run)),
        "subnets": ("Subnets", cards_section(run)),
        "options": ("Options and files", options_section(run)),
    }
    there = {name: part for name, part in sections.items() if part[1]}
    allowed = base64.b64encode(hashlib.sha256(report_page.SCRIPT.encode()).digest()).decode()
    return report_page.PAGE.substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'",
        title=f"Search report: {escaped(run.name)}",
        under=under_title(run),
        links="".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in there.items()),
        sections="\n".join(f'<section id="{name}">{inside}</section>' for name, (_, inside) in there.items()),
        foot=f"Made from the files in <code>{escaped(run.folder)}</code> by "
        f"<code>python -m search.report {escaped(shlex.quote(str(run.folder)))}</code>.",
        facts=json.dumps(facts(run), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        script=report_page.SCRIPT,
        style=report_page.STYLE,
        light=variables(draw.LIGHT | report_page.LIGHT),
        dark=variables(draw.DARK | report_page.DARK),
    )


def variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}: {colour}; " for name, colour in colours.items())


# ---- pieces of HTML


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


# ---- in short


def under_title(run: Run) -> str:
    given = run.config
    if not given:
        return f"<code>{escaped(run.folder)}</code>"
    return (
        f"{escaped(given.get('supernet', 'shared'))} supernet of <code>{escaped(given.get('cfg'))}</code>, data "
        f"<code>{escaped(given.get('data'))}</code>, {escaped(given.get('imgsz'))} px, "
        f"{escaped(given.get('epochs'))} epochs, seed {escaped(given.get('seed', 0))}"
    )


def headline(run: Run) -> str:
    """What was searched, under which budget, what came out, and what none of this tells."""
    space = "A space of unknown size" if run.size is None else f"<b>{plural(run.size, 'subnet')}</b>"
    if run.choices:
        where = plural(len(run.rows), "row")
        space += f", all that {plural(len(run.choices), 'choice')} in {where} of the network allow,"
    limits = [f"{TITLES[b.metric]} at most {cost_text(b.metric, b.limit).partition(' M')[0]}" for b in run.budgets]
    limits = [limit.removesuffix(" parameters") for limit in limits]
    under = f"under the budget <b>{listed(limits)}</b>" if limits else "without a budget"
    data = f" on <code>{escaped(run.config['data'])}</code>" if run.config.get("data") else ""
    was = "was" if run.size == 1 or run.size is None else "were"
    told = f'<h2>In short</h2><p class="lead">{space} {was} searched{data} {under}.</p>'
    best = run.chosen
    if best is None:
        return told + absent("No subnet has been judged yet: a search writes front.csv when it ends.") + cautions(run)
    title = run.score
    tied = sum(bool(one.ties) for one in run.front)
    of_ties = (
        f" {tied} of them {'is a tie' if tied == 1 else 'are ties'}: the judging images cannot tell such a subnet's "
        f"{title} from that of a cheaper one on the front."
    )
    told += (
        f'<p class="lead">{plural(len(run.subnets), "subnet was", "subnets were")} judged, and '
        f"{len(run.front)} of them {'is' if len(run.front) == 1 else 'are'} on the front: none of the judged has a "
        f"higher {title} than one of these without more {listed([TITLES[metric] for metric in run.metrics], 'or')}."
        f"{of_ties * bool(tied)} "
        f'The best is <a href="#subnet-{best.number}">subnet {best.number}</a>.</p>'
    )
    tiles = [(f"★ {best.number}", "the best subnet"), (score_text(best), f"its {title} on the judging images")]
    tiles += [
        (cost_number(metric, value), TITLES[metric] + ", ms" * metric.startswith("latency"))
        for metric, value in best.costs.items()
        if metric != "latency_table_ms"
    ]
    tiles.append((str(len(run.front)), f"on the front, {plural(tied, 'tie')} among them" if tied else "on the front"))
    after = next(
        (values["retrained"] for one, values in run.retrained if one == best.number and "retrained" in values), None
    )
    if after is not None:
        tiles.insert(2, (f"{after:.3f}", f"its {title} on the validation images, retrained"))
    told += (
        f'<div class="tiles">{"".join(f"<div><b>{shown}</b><span>{what}</span></div>" for shown, what in tiles)}</div>'
    )
    cheaper = cheaper_tie(run, best)
    if cheaper:
        told += (
            f'<p>By what was measured, <a href="#subnet-{cheaper.number}">subnet {cheaper.number}</a> may be '
            f"just as good and costs less: {costs_text(cheaper)}.</p>"
        )
    weights = "best.pt" if (run.folder / "best.pt").is_file() else f"subnets/{best.number}.pt"
    told += f"<p>To train the best one on, which makes {run.task.network} of it:</p>"
    return told + command(training_command(run, weights, f"subnet-{best.number}")) + cautions(run)


def cheaper_tie(run: Run, one: Subnet) -> Subnet | None:
    """The cheapest subnet of the front that this one ties with."""
    return next((other for other in run.front if other.number in one.ties), None)


def cautions(run: Run) -> str:
    """What the numbers of this page do not tell."""
    judging = run.images.get("judging")
    on = f"{judging} judging images" if judging else "the judging images (a fifth of the training images, 32 to 2,000)"
    errors = any(one.error is not None for one in run.subnets)
    title, noise = run.score, noise_level(run)
    told = [
        "<b>One search with one seed.</b> Another seed trains other weights and may name another subnet. One run is an "
        "anecdote.",
        "<b>Inherited weights.</b> Each subnet was judged with the weights of the supernet and batch norm statistics "
        "of its own, not after a training of its own. The order after training may differ.",
        f"<b>Few images.</b> {title} was measured on {on}, which the weights never saw. "
        + (
            "± is one standard error over these images; of chance in training it knows nothing. Two subnets saw the "
            "same images, so do not compare them by their ±: ties were found from the error of their difference, "
            "which is smaller."
            if errors
            else "This run kept no standard errors, so which differences are real is not known; small ones mean little."
        ),
    ]
    if "latency_ms" in run.costs:
        told.append(
            "<b>One device.</b> Latencies are those of the machine that searched. Another one has another front."
        )
    if run.subnets and max(one.score for one in run.subnets) < noise:
        told.insert(
            0,
            f"<b>This front is noise.</b> No subnet reaches {with_article(title)} of {noise:.2g}: the supernet "
            f"has hardly learned to {run.task.name} yet. More epochs come first.",
        )
    lines = "".join(f"<li>{line}</li>" for line in told if run.subnets)
    return f'<div class="caution"><h3>What this does not tell</h3><ul>{lines}</ul></div>' if lines else ""


def with_article(title: str) -> str:
    """``an AP``, ``a top-1``"""
    return f"{'an' if title in ('AP', 'mIoU') else 'a'} {title}"


def noise_level(run: Run) -> float:
    """What the score of a network that has learned nothing yet may be: guessing finds one class of so many."""
    guessed = 1 / run.graph.spec.num_classes if run.task.name == "classify" and run.graph else 0.0
    return max(NOISE, guessed)


# ---- the front


def front_section(run: Run) -> str:
    if not run.subnets:
        return ""
    title = run.score
    shown = [metric for metric in run.costs if metric != "latency_table_ms" or "latency_ms" not in run.costs]
    panels = [
        plots.cost_scatter(
            metric,
            [mark(run, one, metric, one.score, one.error or 0.0) for one in run.subnets if metric in one.costs],
            title,
            limits=limits(run, metric),
            joined=run.metrics == (metric,),
        )
        for metric in shown
    ]
    alone = ", so it is a line only there" if len(run.metrics) == 1 < len(shown) else ""
    return (
        f"<h2>The front: {title} against cost</h2>"
        f"<p>Every mark is a subnet, and each picture has all of them. The front is made of {title} and "
        f"{listed([TITLES[metric] for metric in run.metrics])}{alone}. Point at a mark, or tap it, to see what it is; "
        "a click on one of the front leads to its card.</p>"
        f"{front_legend(run)}{figures(panels)}<h3>The front in numbers</h3>{subnet_table(run, run.front)}"
        + folded(
            f"All {plural(len(run.subnets), 'judged subnet')}, with their picks",
            subnet_table(run, run.subnets, picks=True),
        )
    )


def limits(run: Run, metric: str) -> list[tuple[float, str]]:
    """The budgets of a cost, with their texts."""
    own = {metric, metric.replace("_table", "")}
    return [(b.limit, f"budget {cost_number(b.metric, b.limit)}") for b in run.budgets if b.metric in own]


def mark(run: Run, one: Subnet, metric: str, y: float, error: float = 0.0) -> Mark:
    cheaper = cheaper_tie(run, one)
    return Mark(
        subnet=one.number,
        x=one.costs[metric],
        y=y,
        kind=" ".join(kinds(run, one, metric)),
        spoken=f"subnet {one.number}: {run.score} {score_text(one)}, {costs_text(one)}",
        error=error,
        tied_to=cheaper.number if cheaper else None,
        link=run.has_card(one),
    )


def kinds(run: Run, one: Subnet, metric: str) -> list[str]:
    """What a mark of the subnet shows over a cost: words of {judged, front, tied, best, knee}."""
    found = ["front" if one.front else "judged"]
    found += ["tied"] if one.front and one.ties else []
    found += ["best"] if one.number == run.best else []
    return found + (["knee"] if run.knees.get(metric) == one.number else [])


def front_legend(run: Run) -> str:
    """What the marks mean; only those that occur."""
    occur = {kind for one in run.subnets for metric in run.costs for kind in kinds(run, one, metric)}
    title = run.score
    texts = {
        "front best": "the best",
        "front knee": f"the knee: behind it, {title} gets dearer",
        "front": "on the front",
        "front tied": "on the front, but ties with a cheaper one, to which a dotted bow leads",
        "judged": "judged, not on the front",
    }
    keys = [
        (f'<g class="mark {kind}">{plots.symbol(kind)}</g>', text)
        for kind, text in texts.items()
        if kind.split()[-1] in occur
    ]
    if any(one.error for one in run.subnets):
        keys.append(
            ('<g class="front"><path class="error" d="M-3 -8h6M0 -8V8M-3 8h6"/></g>', f"{title} ± one standard error")
        )
    if any(limits(run, metric) for metric in run.costs):
        keys.append(('<path class="budget" d="M0 -10V10"/>', "budget"))
    return legend(keys)


def subnet_table(run: Run, subnets: Sequence[Subnet], picks: bool = False) -> str:
    """Subnets as rows; a click on the name of a column sorts by it."""
    title, second = run.task.titles[:2]
    extra = {"error": "±", "second": second, "loss": "loss"}
    extra = {name: title for name, title in extra.items() if any(getattr(one, name) is not None for one in subnets)}
    heads = ["subnet", "", f">{title}", *(f">{name}" for name in extra.values())]
    heads += [f">{TITLES[metric]}{', ms' * metric.startswith('latency')}" for metric in run.costs]
    lines = []
    for one in subnets:
        cells = [
            f'<td><data value="{one.number}">{link(run, one)}</data></td><td>{badges(run, one)}</td>',
            number(one.score),
        ]
        cells += [number(getattr(one, name)) for name in extra]
        for metric in run.costs:
            value = one.costs.get(metric)
            cells.append(number(value, cost_number(metric, value or 0.0)))
        cells += [f"<td>{escaped(one.picks.get(name, '–'))}</td>" for name in run.choices if picks]
        lines.append(f"<tr{css('off', not one.front)}>{''.join(cells)}</tr>")
    return table([*heads, *(run.choices if picks else ())], lines, sortable=True)


def facts(run: Run) -> dict[str, Any]:
    """What the page's script shows of the subnet under the pointer."""
    title, second = run.task.titles[:2]
    subnets = {}
    for one in run.subnets:
        lines = [(title, score_text(one))]
        lines += [(second, f"{one.second:.3f}")] if one.second is not None else []
        lines += [("loss", f"{one.loss:.4f}")] if one.loss is not None else []
        lines += [
            (TITLES[m], cost_number(m, value) + " ms" * m.startswith("latency")) for m, value in one.costs.items()
        ]
        told = ["the best"] * (one.number == run.best) + ["the knee"] * (one.number in run.knees.values())
        told += ["a tie"] * bool(one.front and one.ties)
        subnets[str(one.number)] = {
            "title": ", ".join([f"Subnet {one.number}", *told]),
            "lines": lines,
            "picks": [(f"row {row}", plots.row_picks(names, one.picks)) for row, names in run.rows.items()],
            "card": run.has_card(one),
        }
    found: dict[str, Any] = {"subnets": subnets, "choices": list(run.choices.items()) if run.size else []}
    if run.losses:
        shown = thinned(run.losses)
        names = [name for name in shown if name != "subnet"]
        found["cloud"] = {name: [float(f"{value:.6g}") for value in shown[name].tolist()] for name in names}
        found["cloud"] |= {
            "subnet": shown["subnet"].astype(int).tolist(),
            "names": names,
            "titles": TITLES | {"loss": "loss"},
        }
    return found


# ---- all subnets


def thinned(losses: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """At most `MOST_DOTS` of all subnets, evenly taken in the order of their loss, the lowest always among them."""
    every = math.ceil(len(losses["loss"]) / MOST_DOTS)
    order = np.argsort(losses["loss"], kind="stable")[::every]
    return losses if every == 1 else {name: values[order] for name, values in losses.items()}


def cloud_section(run: Run) -> str:
    title = "<h2>All subnets: loss against cost</h2>"
    if not run.losses:
        sentence = (
            "Only the judged subnets were measured. Where a space is small enough to be walked through whole, a search "
            "keeps the loss of every subnet in losses.csv, and they are shown here."
        )
        return title + absent(sentence) if run.subnets else ""
    shown = thinned(run.losses)
    count = len(run.losses["loss"])
    metrics = [metric for metric in COSTS if metric in shown]
    loss = dict(zip(run.losses["subnet"].astype(int).tolist(), run.losses["loss"].tolist(), strict=True))
    panels = []
    for metric in metrics:
        marks = [
            mark(run, one, metric, loss[one.number])
            for one in run.subnets
            if one.number in loss and metric in one.costs
        ]
        dots = list(zip(shown[metric].tolist(), shown["loss"].tolist(), strict=True))
        panels.append(plots.cost_scatter(metric, marks, "loss", limits=limits(run, metric), cloud=dots))
    kind = KINDS.get(run.task.name, run.task.name)
    fewer = f" {len(shown['loss']):,} of them are drawn." if len(shown["loss"]) < count else ""
    levels = {TITLES[metric]: len(np.unique(run.losses[metric])) for metric in metrics}
    few = [f"{values} different numbers of {name}" for name, values in levels.items() if values <= min(24, count // 20)]
    columns = f" There are only {listed(few)} among them, hence the columns." if few else ""
    return (
        f"{title}<p>The {kind} loss on the judging images of all {plural(count, 'subnet')}, each with batch norm "
        "statistics of its own: low is good. A loss is cheap to measure and says which subnets are worth "
        f"{with_article(run.score)}; those "
        f"that got one are marked.{fewer}{columns}</p>{figures(panels)}{effects(run)}"
    )


def effects(run: Run) -> str:
    """For every option, the mean loss of all subnets that have it: what each choice matters on its own."""
    if run.size != len(run.losses["loss"]):
        return ""
    numbers, loss = run.losses["subnet"].astype(np.int64), run.losses["loss"]
    found, radix = [], run.size
    for name, options in run.choices.items():
        radix //= len(options)
        means = [float(loss[numbers // radix % len(options) == place].mean()) for place in range(len(options))]
        least, apart = min(means), max(means) - min(means)
        cells = ", ".join(
            f"{'<b>' * (mean == least)}{escaped(option)}{'</b>' * (mean == least)} {mean:.4f}"
            for option, mean in zip(options, means, strict=True)
        )
        found.append((apart, f"<tr><td>{escaped(name)}</td>{number(apart, '{:.4f}')}<td>{cells}</td></tr>"))
    found.sort(key=lambda line: -line[0])
    return folded(
        "How much each choice matters on its own",
        "<p>The mean loss of all subnets that have an option, whatever else they have. The choice that makes the "
        "largest difference comes first, the option of lowest loss is bold.</p>"
        + table(["choice", ">difference", "mean loss by option"], [line for _, line in found]),
    )


# ---- alphas


def alphas_section(run: Run) -> str:
    title = "<h2>Choices over time</h2>"
    if not run.alphas:
        return title + absent("alphas.csv is not there. A search writes it after every epoch.")
    points = [point for options in run.alphas.values() for found in options.values() for point in found]
    last, top = max(step for step, _ in points), min(1.0, 1.06 * max(p for _, p in points))
    warmup = None if run.config.get("tango") else run.config.get("arch_warmup")
    panels, open_ones = [], 0
    for name, options in run.alphas.items():
        taken = taken_option(name, run.chosen, run) if run.chosen else None
        series = [Series(decision_text(o), tuple(found), decision_text(o) == taken) for o, found in options.items()]
        first, second = sorted((0.0, *(found[-1][1] for found in options.values())), reverse=True)[:2]
        undecided = first - second < UNDECIDED
        open_ones += undecided
        badge = ' <span class="badge undecided">undecided: left to evaluation</span>' if undecided else ""
        panels.append(
            f"<figure><figcaption><b>{escaped(name)}</b> {row_note(run, name)}{badge}</figcaption>"
            + plots.curves(
                series,
                f"Probabilities of {name}",
                "step",
                y=(0.0, top),
                shown="{:.2f}",
                start=warmup * last if isinstance(warmup, float) else None,
                level=1 / len(options),
            )
            + "</figure>"
        )
    count = len(run.alphas)
    if max(abs(found[-1][1] - found[0][1]) for options in run.alphas.values() for found in options.values()) < 1e-6:
        outcome = "No probability has moved: the search ended before the alphas had their turn."
    elif open_ones:
        outcome = (
            f"{open_ones} of {plural(count, 'decision')} {'is' if open_ones == 1 else 'are'} undecided at the end: "
            f"the two likeliest options are less than {UNDECIDED:g} apart. Which of them is better is left to the "
            "evaluation."
        )
    else:
        outcome = f"At the end, {'the one decision is' if count == 1 else f'all {count} decisions are'} decided."
    return (
        f"{title}<p>How likely the supernet held each option to be the right one, step by step: the softmax of its "
        "architecture parameters (alphas), which moved on the judging images. They start even (dotted line) and move "
        f"after the warm-up (vertical line). ★ is what the best subnet has. {outcome}</p>"
        "<p>A probability is a leaning and no proof. It says which subnets are worth judging; "
        f"{run.score} says which of them "
        f'are on the front.</p><div class="smalls">{"".join(panels)}</div>'
    )


def row_note(run: Run, name: str) -> str:
    """The op and stride of the row that a choice or decision belongs to."""
    row = name.partition(".")[0]
    nodes = run.graph.nodes if run.graph else ()
    node = next((node for node in nodes if (node.layer.name or str(node.index)) == row), None)
    return f'<span class="faint">{escaped(node.op.name)}, stride {node.output.stride}</span>' if node else ""


# ---- training


def training_section(run: Run) -> str:
    title = "<h2>How the supernet trained</h2>"
    if not run.results:
        return title + absent("results.csv is not there. A search writes its losses into it after every epoch.")
    losses = [name for name in ("loss", "held_out") if name in run.results]
    prices = [name for name in run.results if name.startswith("lambda")]
    parts = [name for name in run.results if name not in {"epoch", "step", "lr", "seconds", *losses, *prices}]
    groups = {
        "The loss": losses,
        "Its parts": parts,
        "Lambda: the price of a budget": prices,
        "The learning rate": [name for name in run.results if name == "lr"],
    }
    panels = []
    for group, names in groups.items():
        series = [Series(name.replace("_", " "), tuple(run.results[name])) for name in names]
        if series:
            top = max(value for one in series for _, value in one.points)
            panels.append(
                f"<figure><figcaption><b>{group}</b></figcaption>"
                + plots.curves(series, group, "epoch", y=(0.0, 1.06 * top if top > 0 else 1.0))
                + "</figure>"
            )
    seconds = [value for _, value in run.results.get("seconds", ())]
    took = f" The {plural(len(seconds), 'epoch')} took {duration(sum(seconds))}." if seconds else ""
    held = " “held out” is the loss on the judging images, in the steps of the alphas." if "held_out" in losses else ""
    return (
        f"{title}<p>A step trains one subnet, and each option has its turn equally often, so the loss is a mean over "
        f"subnets.{held} Where the loss still falls at the end, more epochs would help.{took}</p>"
        f'<div class="smalls">{"".join(panels)}</div>'
    )


# ---- what matters


def importance_section(run: Run) -> str:
    """How much each choice matters to the score, by `search.optimise.importances`."""
    if not run.importances:
        return ""
    lines = []
    for place, row in enumerate(run.importances, start=2):
        where = f"{run.folder}/importances.csv:{place}"
        share, difference = (cell(row, name, where) for name in ("importance", "difference"))
        best, worst = (escaped(row.get(name, "")) for name in ("best", "worst"))
        cells = f"{number(share, '{:.0%}')}<td>{best}</td><td>{worst}</td>{number(difference)}"
        lines.append(f"<tr><td>{escaped(row.get('choice', ''))}</td>{cells}</tr>")
    explained = cell(run.importances[0], "explained", f"{run.folder}/importances.csv:2") or 0.0
    trust = (
        f"Together they predict {explained:.0%} of how the score of a subnet that was left out differs from the mean."
        if explained > 0
        else "They do not predict the score of a subnet that was left out: too few were judged, or the choices matter "
        "too little, to believe this table."
    )
    return (
        f"<h2>What matters: the choices and {run.score}</h2><p>Of the judged subnets, the part that each choice has in "
        f"what the options' effects on {run.score} add up to, fitted as a sum over choices; then the options that add "
        f"most and least, and how far these two are apart. {trust}</p>"
        + table(["choice", ">importance", "best", "worst", ">difference"], lines, sortable=True)
    )


# ---- latency


def latency_section(run: Run) -> str:
    title = "<h2>Latency: the table against measurement</h2>"
    found = run.latency
    if not found:
        sentence = (
            "This folder has no table of latencies (latency.json): the judged subnets were measured one by one, and "
            "nothing says how far two measurements of the same one lie apart. <code>--budget latency_ms=…</code> "
            "lets a search make a table and check it."
        )
        return title + absent(sentence) if "latency_ms" in run.costs else ""
    told = ""
    key = {name: value for name, value in (found.get("key") or {}).items() if name != "space" and value is not None}
    if key:
        under = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in key.items())
        told += f"<p>Measured under: {under}. The table holds for nothing else.</p>"
    spread, noise = found.get("spread_ms"), found.get("noise_ms")
    if spread is not None and noise is not None:
        told += separation(spread, noise)
    return f"{title}{told}{validation(found.get('validation') or {})}{entries(found)}"


def separation(spread: float, noise: float) -> str:
    """Whether latency tells the subnets of this space apart at all."""
    both = (
        f"The latencies of the subnets spread over {spread:.3g} ms, and a repeated measurement moves by {noise:.3g} ms"
    )
    if spread >= SEPARABLE * noise:
        return f"<p>{both}: {spread / noise if noise else math.inf:.1f} times less, so latency tells subnets apart.</p>"
    return (
        f'<div class="caution"><h3>Latency cannot separate these</h3><p>{both}. That is not even {SEPARABLE:g} '
        "times as much, so one subnet is as fast as the other as far as can be told here. MACs are the cost to look at."
        "</p></div>"
    )


def validation(found: Mapping[str, Any]) -> str:
    """Predictions beside measurements beside repeated measurements."""
    subnets = found.get("subnets") or []
    if not subnets:
        return ""
    points = [(str(s["number"]), s["predicted_ms"], s["measured_ms"], s.get("again_ms")) for s in subnets]
    error, again, tau, tau_again = (found.get(name) for name in ("error", "repeat_error", "tau", "repeat_tau"))
    lines = [
        f"<tr><td>mean relative error</td>{number(error, '{:.1%}')}{number(again, '{:.1%}')}</tr>",
        f"<tr><td>Kendall's tau of the order</td>{number(tau)}{number(tau_again)}</tr>",
    ]
    near = error is not None and error <= max(ALLOWED_ERROR, again or 0.0)
    ordered = tau_again is None or (tau or 0.0) >= ALLOWED_TAU * tau_again
    verdict = (
        "So the table can stand in for a measurement here."
        if near and ordered
        else "So the table is not to be trusted here: subnets that matter are measured themselves."
    )
    return (
        f'<div class="panels"><figure>{plots.agreement(points, "ms")}</figure><div>'
        + table(["measured against", ">the table", ">itself again"], lines)
        + f"<p>{plural(len(subnets), 'subnet')} drawn at random were measured from end to end (disc), and once more "
        "(ring). On the dashed line the table is right. It cannot agree with a measurement better than the measurement "
        "agrees with its own repetition, so read one column against the other. Tau is 1 where both put all subnets in "
        f"the same order. {verdict}</p></div></div>"
    )


def entries(found: Mapping[str, Any]) -> str:
    """The table itself."""
    lines = [
        f"<tr><td>{escaped(one.get('row', ''))}</td><td>{escaped(picks_text(one.get('picks')))}</td>"
        f"{number(one.get('ms'), '{:.3f}')}{number(one.get('iqr'), '{:.3f}')}{number(one.get('count'), '{:.0f}')}</tr>"
        for one in found.get("entries") or ()
    ]
    if not lines:
        return ""
    fitted = found.get("kind") == "regression"
    what = (
        "What a row with these options takes longer than with its fastest ones, in whole subnets, and how many subnets "
        "had it. Rows measured alone did not add up, so this was fitted."
        if fitted
        else "Median milliseconds of a row with these options, measured alone, and the distance between its quartiles."
    )
    fixed = found.get("fixed_ms")
    rest = "" if fixed is None else f" What all subnets have in common takes {fixed:.3g} ms."
    return folded(
        f"The table: {plural(len(lines), 'entry', 'entries')}, {'fitted to whole subnets' if fitted else 'by row'}",
        f"<p>{what}{rest}</p>"
        + table(["row", "options", ">ms", ">quartiles", ">subnets" if fitted else ">runs"], lines, sortable=True),
    )


def picks_text(picks: Any) -> str:
    if isinstance(picks, Mapping):
        return ", ".join(f"{name} {option_text(pick)}" for name, pick in picks.items())
    return " ".join(map(option_text, picks)) if isinstance(picks, list) else option_text(picks)


# ---- retraining


def retraining_section(run: Run) -> str:
    title = "<h2>Retraining: what a subnet is worth in the end</h2>"
    if not run.retrained:
        sentence = (
            "No subnet of this front has been trained on yet (retrain.csv). <code>--retrain 3</code> lets a search "
            "do it with the three best; the command on a card does it with one."
        )
        return title + absent(sentence) if run.subnets else ""
    names, second = list(STATES.values()), f"_{run.task.columns[1]}"
    marks = [(f'<g class="stage s{place}">{plots.stage(place)}</g>', name) for place, name in enumerate(names)]
    dots = [(f"subnet {one}", [values.get(state) for state in STATES]) for one, values in run.retrained]
    shown = [*STATES, *(name for state in STATES if any((name := f"{state}{second}") in v for _, v in run.retrained))]
    heads = [
        f">{STATES[name.removesuffix(second)]}{f', {run.task.titles[1]}' * name.endswith(second)}" for name in shown
    ]
    linked = {one.number: link(run, one) for one in run.subnets}
    lines = []
    for one, values in run.retrained:
        cells = "".join(number(values.get(name)) for name in shown)
        lines.append(f'<tr><td><data value="{one}">{linked.get(one, one)}</data></td>{cells}</tr>')
    return (
        f"{title}<p>{run.score} on the validation images of the same subnets in four states: with the supernet's "
        "weights and batch norm statistics (inherited), with batch norm statistics of its own (calibrated), after a "
        "short training from there (fine-tuned), and after a whole one (retrained). "
        f"{kept_order(run.retrained)}</p>{legend(marks)}"
        f"<figure>{plots.dot_rows(dots, names, f'{run.score} on the validation images')}</figure>"
        f"{table(['subnet', *heads], lines, sortable=True)}"
    )


def kept_order(retrained: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    """In how many pairs of subnets the order of calibrated scores is that of retrained ones."""
    both = [(v["calibrated"], v["retrained"]) for _, v in retrained if "calibrated" in v and "retrained" in v]
    pairs = [(one, other) for place, one in enumerate(both) for other in both[place + 1 :]]
    kept = sum((one[0] - other[0]) * (one[1] - other[1]) > 0 for one, other in pairs)
    return (
        f"In {kept} of {plural(len(pairs), 'pair')} the one that is better calibrated is better retrained, too; with "
        "one seed and so few subnets that proves nothing."
        if pairs
        else ""
    )


# ---- cards


def cards_section(run: Run) -> str:
    shown = sorted((one for one in run.subnets if run.has_card(one)), key=run.cheapest_first)
    if not shown:
        return ""
    best = run.chosen or shown[-1]
    placed, common = None, ""
    if run.graph and run.graph.spec.choices:
        placed, inside = plots.detector(run.graph)
        common = (
            f'<svg class="defs" aria-hidden="true"><defs><g id="detector" class="detector">{inside}</g></defs></svg>'
        )
    legend_text = " In the pictures, green rows are those that were searched; /8 is stride 8." if placed else ""
    return (
        "<h2>Every subnet of the front</h2><p>From the cheapest to the dearest. An orange edge marks a row "
        f"with other picks than the best's.{legend_text}</p>{common}"
        + "".join(card(run, one, best, placed) for one in shown)
    )


def card(run: Run, one: Subnet, best: Subnet, placed: Layout | None) -> str:
    """One subnet: what it is, what it costs, its picture, its files, how to train it on."""
    files = [f"subnets/{one.number}.yaml", f"subnets/{one.number}.pt"]
    files += ["best.yaml", "best.pt"] if one.number == run.best else []
    there = [file for file in files if (run.folder / file).is_file()]
    links = " · ".join(f'<a href="{file}">{file}</a>' for file in there)
    gone = absent("Its files are not in the folder.") if not there else ""
    weights = next((file for file in there if file.endswith(".pt")), files[1])
    model = next((file for file in there if file.endswith(".yaml")), None)
    text = (run.folder / model).read_text(encoding="utf-8") if model else ""
    if run.graph and placed:
        spoken = f"Subnet {one.number}: " + ", ".join(f"{name} {pick}" for name, pick in one.picks.items())
        picture = f'<div class="diagram">{plots.subnet_diagram(run.graph, placed, one.picks, best.picks, spoken)}</div>'
    else:
        picture = strip(run, one, best)
    return (
        f'<article class="card" id="subnet-{one.number}"><header><h3>Subnet {one.number}</h3> '
        f"{badges(run, one)}</header><div "
        f'class="two"><div>{against_best(run, one, best)}{picks_table(run, one, best)}<p>{links}</p>{gone}'
        f"<p>To train it on:</p>{command(training_command(run, weights, f'subnet-{one.number}'))}"
        f"{folded('YAML', copied(text, 'yaml')) if text else ''}</div>{picture}</div></article>"
    )


def against_best(run: Run, one: Subnet, best: Subnet) -> str:
    """Scores and costs, and how far they are from the best's."""
    title, second = run.task.titles[:2]
    is_best = one.number == best.number
    rows = [(title, score_text(one), f"{one.score - best.score:+.3f}")]
    if one.second is not None and best.second is not None:
        rows.append((second, f"{one.second:.3f}", f"{one.second - best.second:+.3f}"))
    for metric, value in one.costs.items():
        other = best.costs.get(metric)
        title = TITLES[metric] + ", ms" * metric.startswith("latency")
        rows.append((title, cost_number(metric, value), f"{value / other - 1:+.1%}" if other else ""))
    lines = []
    for title, shown, apart in rows:
        beside = "" if is_best else f'<td class="n">{apart.replace("-", "−")}</td>'
        lines.append(f'<tr><td>{title}</td><td class="n"><b>{shown}</b></td>{beside}</tr>')
    return table(["", ">", *([] if is_best else [">against the best"])], lines)


def picks_table(run: Run, one: Subnet, best: Subnet) -> str:
    """A line a searched row, a column an argument; what the best has otherwise stands beside."""
    arguments = list(dict.fromkeys(name.partition(".")[2] for name in run.choices))
    lines = []
    for row, names in run.rows.items():
        by_argument = {name.partition(".")[2]: name for name in names}
        cells = ""
        for argument in arguments:
            name = by_argument.get(argument, "")
            pick, other = one.picks.get(name), best.picks.get(name)
            same = escaped("" if pick is None else pick)
            cells += (
                f"<td>{same if pick == other else f'<mark>{same}</mark> <small>best: {escaped(other)}</small>'}</td>"
            )
        lines.append(f"<tr><td>{escaped(row)} {row_note(run, row)}</td>{cells}</tr>")
    return table(["row", *arguments], lines)


def strip(run: Run, one: Subnet, best: Subnet) -> str:
    """The searched rows as boxes, for a model file that cannot be drawn here."""
    found = ""
    for row, names in run.rows.items():
        other = any(one.picks.get(name) != best.picks.get(name) for name in names)
        found += (
            f"<div{css('other', other)}>row {escaped(row)}<b>{escaped(plots.row_picks(names, one.picks))}</b></div>"
        )
    return f'<div class="strip">{found}</div>'


# ---- options and files

FILES = {
    "config.yaml": "the options",
    "search.yaml": "the model file as it was searched: every choice named, depth and width multiplied out",
    "space.json": "the choices, how many subnets they span, and the hash by which a subnet of another space is refused",
    "front.csv": "every judged subnet",
    "front.png": "the front as a picture",
    "importances.csv": "how much each choice matters to the score of the judged subnets",
    "study.journal": "what was judged, as an Optuna study that workers share",
    "study.json": "where that study lies, for search.py --worker",
    "losses.csv": "the loss of every subnet",
    "alphas.csv": "alpha and probability of every option after every epoch",
    "results.csv": "losses, learning rate and seconds of every epoch",
    "latency.json": "the table of latencies, and how well it predicts",
    "retrain.csv": "{score} inherited, calibrated, fine-tuned and retrained",
    "retrain": "the runs of these trainings",
    "rank/rank.html": "of python -m search.rank: how well the supernet ranks; a file each of its trainings beside it",
    "best.yaml": "the best subnet as a plain model file",
    "best.pt": "its checkpoint, for train.py, val.py, detect.py and export.py",
    "best.onnx": "of --export: the best, retrained if any is, for onnxruntime and detect.py",
    "best.xml": "of --export: the same for OpenVINO; its weights are best.bin",
    "best.pt2": "of --export: the same as a program of torch.export",
    "last.pt": "what a search that was stopped goes on from, with --resume",
    "subnets": "model file and checkpoint of every subnet of the front",
}


def options_section(run: Run) -> str:
    title = "<h2>Options and files</h2>"
    if not run.config:
        return title + absent("config.yaml is not there, so the options of this search are not known.") + files_of(run)
    lines = []
    for name, value in run.config.items():
        field = SearchConfig.model_fields.get(name)
        shown = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        is_default = field is not None and plain(field.default) == value
        lines.append(
            f"<tr{css('off', is_default)}><td><code>{escaped(option_name(name))}</code></td><td>{escaped(shown)}</td>"
            f"<td>{escaped(field.description or '' if field else '')}</td></tr>"
        )
    return (
        f"{title}<p>The same search once more:</p>{command(search_command(run))}<p>With the same data, machine and "
        "number of threads it trains the same weights. Latencies are measured anew.</p>"
        + folded("All options; those at their defaults are faint", table(["option", "value", "what it is"], lines))
        + files_of(run)
    )


def files_of(run: Run) -> str:
    lines = [
        f'<tr><td><a href="{name}">{name}</a></td><td>{what.format(score=run.score)}</td></tr>'
        for name, what in FILES.items()
        if (run.folder / name).exists()
    ]
    return f"<h3>Files of this folder</h3>{table(['file', 'what it holds'], lines)}" if lines else ""


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Writes report.html into the folder of a search.")
    parser.add_argument("folder", type=Path, help="folder of a search, such as runs/search/exp")
    print(write_report(parse_options(parser, argv).folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
