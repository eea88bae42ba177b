"""A search as one page, ``report.html``: what was searched, what came out, how far to trust it, how to go on.

python -m search.report runs/search/exp

The page is made from the files of the run's folder alone, and nothing else is needed to show it: no network, no script
or style from elsewhere. A file that is not there takes its section along, or leaves a sentence on how to get it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.config import option_name
from engine.doors import door, option_parser, parse_options
from engine.runs import write_text
from models import draw
from search import plots, report_page
from search.config import SearchConfig
from search.objective import UNDECIDED
from search.plots import Series, escaped
from search.report_data import (
    STATES,
    TITLES,
    Run,
    cell,
    cost_number,
    cost_text,
    costs_text,
    decision_text,
    duration,
    listed,
    plain,
    plural,
    read_run,
    score_text,
    search_command,
    taken_option,
    training_command,
)
from search.report_latency import latency_section
from search.report_pieces import (
    absent,
    cheaper_tie,
    command,
    css,
    folded,
    legend,
    link,
    number,
    row_note,
    table,
    with_article,
)
from search.report_subnets import cards_section, cloud_section, facts, front_section

NOISE = 0.01  # a score below this says that the supernet has hardly learned anything yet


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
        device = escaped(run.config.get("latency_device") or "the machine that searched")
        told.append(f"<b>One device.</b> Latencies are those of {device}. Another one has another front.")
    if run.subnets and max(one.score for one in run.subnets) < noise:
        told.insert(
            0,
            f"<b>This front is noise.</b> No subnet reaches {with_article(title)} of {noise:.2g}: the supernet "
            f"has hardly learned to {run.task.name} yet. More epochs come first.",
        )
    lines = "".join(f"<li>{line}</li>" for line in told if run.subnets)
    return f'<div class="caution"><h3>What this does not tell</h3><ul>{lines}</ul></div>' if lines else ""


def noise_level(run: Run) -> float:
    """What the score of a network that has learned nothing yet may be: guessing finds one class of so many."""
    guessed = 1 / run.graph.spec.num_classes if run.task.name == "classify" and run.graph else 0.0
    return max(NOISE, guessed)


# ---- alphas


def alphas_section(run: Run) -> str:
    title = "<h2>Choices over time</h2>"
    if not run.alphas:
        return title + absent("alphas.csv is not there. A search writes it after every epoch.")
    points = [point for options in run.alphas.values() for found in options.values() for point in found]
    last, top = max(step for step, _ in points), min(1.0, 1.06 * max(p for _, p in points))
    done = max(len(found) for options in run.alphas.values() for found in options.values())
    planned = last * float(run.config.get("epochs") or done) / done  # steps, of a search that was stopped, too
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
                start=warmup * planned if isinstance(warmup, float) and warmup * planned <= last else None,
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
        f"{title}<p>Each step trains other subnets, so the loss is a mean over many.{held} Where it "
        f"still falls at the end, more epochs would help.{took}</p>"
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


# ---- options and files

FILES = {
    "config.yaml": "the options",
    "search.yaml": "the model file as it was searched: every choice named, depth and width multiplied out",
    "space.json": "the choices, how many subnets they span, and a hash that latency tables are told apart by",
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
