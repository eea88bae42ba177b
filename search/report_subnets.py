"""The sections of a search's report about subnets: the front, all of them, and a card for each that is on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.layout import Layout
from search import plots
from search.front import COSTS
from search.plots import Mark, escaped
from search.report_data import (
    TITLES,
    Run,
    Subnet,
    cost_number,
    costs_text,
    listed,
    plural,
    score_text,
    training_command,
)
from search.report_pieces import (
    absent,
    badges,
    cheaper_tie,
    command,
    copied,
    css,
    figures,
    folded,
    legend,
    link,
    number,
    row_note,
    table,
    with_article,
)

KINDS = {"detect": "detection", "classify": "classification", "segment": "segmentation"}  # of losses, by task
MOST_DOTS = 6_000  # of the cloud of losses


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
