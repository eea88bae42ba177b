"""Does the supernet rank subnets as trainings of their own do? The study behind ``python -m search.rank``.

Subnets from levels of equal MACs are judged by the supernet and then each trained alone from nothing, with several
seeds, all for the same epochs. What is compared, with intervals by a bootstrap over subnets: the supernet's scores,
parameters and MACs alone, and another seed of the same training, which is the ceiling. Each is held against one
training at a time and averaged over them, so that they compare with each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.config import read_data_spec
from data.structures import Fault
from engine.config import MOVABLE, checked, read_options
from engine.doors import door, option_parser, parse_options
from engine.prepare import images_hash, read_labelled
from engine.runs import read_csv, table, write_text
from engine.tasks import Task
from models.graph import resolve
from models.parse import dump
from search.config import SearchConfig, training_of
from search.costs import CostTable, cost_tables
from search.find import Found, Trial, judge_subnets, study_name
from search.plots import Frame, axes, escaped, picture, spanned, words
from search.rank import regret, spearman, tau_within
from search.report import write_report
from search.retrain import BEGUN, conditions, epochs_done, trained_once
from search.space import Architecture, SearchSpace
from search.worker import reopened

A_LEVEL = 4  # subnets of a level of MACs, about: fewer leave no pairs, more leave few levels
POOL = 2_000  # random subnets that levels are made of
RESAMPLES, LEVEL = 1_000, 0.95
RISING = 0.02  # of a score in the last fifth of the epochs: such trainings were too short to rank by
STREAM = 21  # purpose of a random stream

Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # of predictor, truth and levels
STATISTICS: dict[str, Statistic] = {
    "tau-b": lambda x, y, level: tau_within(x, y, np.zeros(len(x))),
    "rho": lambda x, y, level: spearman(x, y),
    "tau-b at equal MACs": tau_within,
    "regret": lambda x, y, level: regret(x, y),
    "regret of 3": lambda x, y, level: regret(x, y, min(3, len(x))),
}


@dataclass(frozen=True)
class Planned:
    """A subnet of the study, its level of MACs, what it costs, and the supernet's score of it."""

    number: int
    level: int
    macs: float
    params: float
    score: float


def study(folder: Path, subnets: int, seeds: int, epochs: int, moved: dict[str, Any], progress: bool = True) -> Path:
    """Does what of the study in ``folder/rank`` is missing, and writes its page, whose path returns; the search's own
    report links to it.
    """
    out = folder / "rank"
    if not (folder / "last.pt").is_file() or not (folder / "config.yaml").is_file():
        raise Fault(f"{folder}: no folder of a finished search, it lacks last.pt or config.yaml")
    config = checked(SearchConfig, {**read_options(folder / "config.yaml", SearchConfig), **moved}, str(folder))
    done = epochs_done(folder / "last.pt")
    if done < config.epochs:
        raise Fault(
            f"{folder}: no folder of a finished search, {done} of its {config.epochs} epochs are done; "
            f"python search.py --resume {folder} does the others"
        )
    trial = reopened(folder, config.model_copy(update={"prune": 0.0}), progress)
    (out / "models").mkdir(parents=True, exist_ok=True)
    about = conditions_of(trial, epochs)
    for path in (*out.glob("*-*.json"), *out.glob(f"runs/*/{BEGUN}")):  # before hours are spent beside them
        check_conditions(path, about, out)
    plan = planned(trial, out / "plan.json", subnets)
    jobs = [(seed, one) for seed in range(seeds) for one in plan]
    for seed, one in tqdm(jobs, "trainings", unit="training", disable=not progress):
        path = out / f"{one.number}-{seed}.json"
        if not path.is_file():
            curve = trained(trial, one, seed, about, out, progress)
            write_text(path, json.dumps({**about, "curve": curve, "score": curve[-1]}) + "\n")
        for checkpoint in (out / "runs" / path.stem).glob("*.pt"):
            checkpoint.unlink()  # of dozens of trainings; the curve is what is asked for
    curves = [[curve_of(out / f"{one.number}-{seed}.json") for seed in range(seeds)] for one in plan]
    page = write_page(out, trial.task, plan, curves, epochs, config.seed)
    if (folder / "report.html").is_file():
        write_report(folder)
    return page


def conditions_of(trial: Trial, epochs: int) -> dict[str, Any]:
    """What all trainings of a study have in common; a file's name says its subnet and its seed."""
    config = trial.config
    assert config.data is not None
    data = read_data_spec(config.data)
    about = conditions(training_of(config, epochs=epochs, patience=epochs))
    del about["seed"]
    model = hashlib.sha256(dump(trial.supernet.spec).encode()).hexdigest()[:12]
    images = [images_hash(read_labelled(data, split).samples) for split in ("train", "val")]
    return {**about, "space": trial.space.hash, "model": model, "images": images}


def check_conditions(path: Path, about: Mapping[str, Any], out: Path) -> None:
    """Raises a Fault where a training of the study in `out` was begun under other conditions than `about`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in about.items():
        before = content.get(name, value)  # of files that lack one, of earlier versions, it is not known
        if before != value:
            same = f"give the same --{name}, or " if name == "epochs" else ""
            raise Fault(
                f"{path}: was trained with {name} {before!r}, the others with {value!r}; {same}move {out} away to "
                "begin anew"
            )


def planned(trial: Trial, path: Path, count: int) -> list[Planned]:
    """The subnets of the study, at most `count`, judged by the supernet: those of the file, where they are of it.

    Once a training is begun, the subnets stay: where the supernet has other weights by now, or judges on other images,
    it judges the same ones anew. Raises a Fault where another number of them is asked for then, or another space.
    """
    space, supernet = trial.space, study_name(trial, path.parent).split()[-1]
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    plan = [Planned(**one) for one in content.get("subnets", ())]
    asked = content.get("asked", len(plan))  # more than there are, in a small space
    trains = any(path.parent.glob("*-*.json")) or any(path.parent.glob("runs/*/last.pt"))
    if plan and (content["space"] != space.hash or asked != count):
        if trains:
            raise Fault(
                f"{path}: has {len(plan)} subnets of space {content['space']!r} for --subnets {asked}, wanted {count} "
                f"of {space.hash!r}; --subnets {asked} goes on in that space, move {path.parent} away to begin anew"
            )
    elif content.get("supernet") == supernet:
        return plan
    tables = cost_tables(resolve(trial.supernet.spec), trial.config.imgsz)
    if plan and trains:
        chosen = {space.at(one.number): one.level for one in plan}
    else:
        chosen = stratified(space, tables["macs"], count, np.random.default_rng((trial.config.seed, STREAM)))
    found = Found()
    alone = replace(trial, tables=tables, budgets=(), timed_here=False)
    judge_subnets(alone, dict.fromkeys(chosen), found)
    macs, params = (tables[name].of for name in ("macs", "params"))
    plan = [
        Planned(space.index(one), level, macs(one), params(one), found.judged[one].score)
        for one, level in chosen.items()
    ]
    about = {"space": space.hash, "supernet": supernet, "asked": count}
    write_text(path, json.dumps({**about, "subnets": [asdict(one) for one in plan]}, indent=1) + "\n")
    return plan


def stratified(space: SearchSpace, macs: CostTable, count: int, rng: np.random.Generator) -> dict[Architecture, int]:
    """Different subnets and their levels of MACs: as evenly many as there are from every level, at random within it.

    Subnets of equal MACs share a level. A space with fewer networks gives all it has.
    """
    if space.size <= POOL:
        numbers = rng.permutation(space.size).tolist()
    else:
        numbers = [int(rng.integers(space.size)) for _ in range(POOL)]
    pool = list(dict.fromkeys(space.canonical(space.at(number)) for number in numbers))
    costs = np.array([macs.of(one) for one in pool])
    levels = max(1, min(len(np.unique(costs)), count // A_LEVEL))
    edges = np.quantile(np.unique(costs), np.linspace(0, 1, levels + 1))[1:-1]
    of_level = np.searchsorted(edges, costs, side="right")
    queues = [[one for one, at in zip(pool, of_level, strict=True) if at == level] for level in range(levels)]
    chosen: dict[Architecture, int] = {}
    while len(chosen) < min(count, len(pool)):
        for level, queue in enumerate(queues):
            if queue and len(chosen) < count:
                chosen[queue.pop()] = level
    return chosen


def trained(trial: Trial, one: Planned, seed: int, about: Mapping[str, Any], out: Path, progress: bool) -> list[float]:
    """The score on the validation images after every epoch of a training of its own, without the search's weights."""
    model, epochs = out / "models" / f"{one.number}.yaml", about["epochs"]
    write_text(model, dump(trial.supernet.spec.freeze(trial.space.at(one.number).picks)))
    own = {"cfg": model, "epochs": epochs, "patience": epochs, "project": out / "runs", "name": f"{one.number}-{seed}"}
    config = training_of(trial.config.model_copy(update={"seed": seed}), **own)
    run = trained_once(config, about, progress)
    column = trial.task.columns[0]
    return [float(row[column]) for row in read_csv(run / "results.csv") if row.get(column)]


def curve_of(path: Path) -> list[float]:
    """The curve in a file of this study."""
    return [float(value) for value in json.loads(path.read_text(encoding="utf-8"))["curve"]]


# ---- what it says


def agreements(plan: Sequence[Planned], scores_MS: np.ndarray, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each predictor each statistic with its interval, as ``[value, low, high]``; `scores_MS` are those of M
    subnets trained with S seeds. The ceiling needs two.
    """
    seeds = scores_MS.shape[1]
    levels = np.array([one.level for one in plan])
    columns = {
        "supernet": np.array([one.score for one in plan]),
        "MACs": np.array([one.macs for one in plan]),
        "params": np.array([one.params for one in plan]),
    }
    pairs = {name: [(column, scores_MS[:, s]) for s in range(seeds)] for name, column in columns.items()}
    if seeds > 1:
        orders = [(a, b) for a in range(seeds) for b in range(seeds) if a != b]
        pairs = {"another seed": [(scores_MS[:, a], scores_MS[:, b]) for a, b in orders], **pairs}
    drawn = np.random.default_rng(seed).integers(len(plan), size=(RESAMPLES, len(plan)))
    found: dict[str, dict[str, Any]] = {}
    for name, both in pairs.items():
        found[name] = {}
        for title, statistic in STATISTICS.items():
            value = mean_of([statistic(x, y, levels) for x, y in both])
            again = [mean_of([statistic(x[d], y[d], levels[d]) for x, y in both]) for d in drawn]
            known = [one for one in again if not math.isnan(one)]
            low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)]) if known else (math.nan, math.nan)
            found[name][title] = [value, float(low), float(high)]
    return found


def mean_of(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def rising(curve: Sequence[float]) -> bool:
    """Whether a training still gained much: the mean score of its last fifth of epochs over that of the one before."""
    fifth = len(curve) // 5
    return fifth > 0 and float(np.mean(curve[-fifth:]) - np.mean(curve[-2 * fifth : -fifth])) > RISING


def told(value: float, low: float, high: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f} ({low:.3f} to {high:.3f})"


def write_page(
    out: Path,
    task: Task,
    plan: Sequence[Planned],
    curves: Sequence[Sequence[Sequence[float]]],
    epochs: int,
    seed: int,
) -> Path:
    """``rank.json`` and ``rank.html``. A curve has a value for each epoch with an evaluation."""
    scores_MS = np.array([[curve[-1] for curve in of_seeds] for of_seeds in curves])
    found = agreements(plan, scores_MS, seed)
    short = sum(rising(curve) for of_seeds in curves for curve in of_seeds)
    rows = [(name, *(told(*of[title]) for title in STATISTICS)) for name, of in found.items()]
    print(table(rows, ("ranked by", *STATISTICS)))
    notes = [
        f"{len(plan)} subnets from {len({one.level for one in plan})} levels of MACs, {scores_MS.shape[1]} seeds each, "
        f"{epochs} epochs from nothing; {task.titles[0]} of the last epoch on the validation images. "
        f"Intervals: 95 %, bootstrap over subnets. Regret: {task.titles[0]} lost by taking the first, or the best of "
        "the first three."
    ]
    if short:
        notes.append(
            f"{short} of {scores_MS.size} trainings gained over {RISING} in their last fifth: they were too short. A "
            "ranking of half-trained networks is of how fast they learn; raise --epochs."
        )
    if scores_MS.shape[1] < 2:
        notes.append("One seed has no ceiling: --seeds 2 trains what is missing.")
    for note in notes:
        print(note)
    content = {"plan": [asdict(one) for one in plan], "scores": scores_MS.tolist(), "short": short}
    clean = {n: {t: [None if math.isnan(v) else v for v in of] for t, of in by.items()} for n, by in found.items()}
    write_text(out / "rank.json", json.dumps({**content, "agreement": clean}, indent=1, allow_nan=False) + "\n")
    head = "".join(f"<th>{escaped(title)}</th>" for title in ("ranked by", *STATISTICS))
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    each = "".join(
        f"<tr><td>{one.number}</td><td>{one.level}</td><td>{one.macs / 1e6:.1f}M</td><td>{one.score:.3f}</td>"
        f"<td>{', '.join(f'{value:.3f}' for value in scores)}</td></tr>"
        for one, scores in zip(plan, scores_MS, strict=True)
    )
    title = f"{task.titles[0]} of each subnet by the supernet and trained alone, a colour a level of MACs"
    write_text(
        out / "rank.html",
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Rank study</title><style>body{font:16px/1.5 '
        "system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}td,th{padding:.2rem "
        ".7rem;text-align:left;border-bottom:1px solid #9995}svg{width:100%;max-width:760px;font-size:12px;fill:"
        "currentColor}.grid{stroke:#9995}</style>"
        f"<h1>Rank study</h1>{''.join(f'<p>{escaped(note)}</p>' for note in notes)}<table><tr>{head}</tr>{body}</table>"
        f"<h2>{escaped(title)}</h2>{scatter(plan, scores_MS, task.titles[0])}<h2>Subnets</h2>"
        "<table><tr><th>subnet</th><th>level</th>"
        f"<th>MACs</th><th>supernet</th><th>trained alone</th></tr>{each}</table></html>\n",
    )
    return out / "rank.html"


def scatter(plan: Sequence[Planned], scores_MS: np.ndarray, score: str) -> str:
    """A dot a subnet, with a line from the least to the largest of its trainings; `score` is what is compared."""
    x = [one.score for one in plan]
    frame = Frame(60, 30, 600, 340, spanned(x), spanned(scores_MS.ravel().tolist()))
    dots = []
    for one, scores in zip(plan, scores_MS, strict=True):
        at, mean = frame.at(one.score, float(scores.mean()))
        low, high = (frame.at(0, float(end))[1] for end in (scores.min(), scores.max()))
        dots.append(f'<path d="M{at:.1f} {low:.1f}V{high:.1f}" stroke="{colour(one.level)}"/>')
        dots.append(
            f'<circle cx="{at:.1f}" cy="{mean:.1f}" r="5" fill="{colour(one.level)}"><title>subnet {one.number}: '
            f"{one.score:.3f} by the supernet, {', '.join(f'{y:.3f}' for y in scores)} alone</title></circle>"
        )
    for place, level in enumerate(sorted({one.level for one in plan})):
        macs = [one.macs / 1e6 for one in plan if one.level == level]
        of_level = f"{min(macs):.1f}M" if min(macs) == max(macs) else f"{min(macs):.1f}M to {max(macs):.1f}M"
        y = 44 + 16 * place
        dots.append(f'<circle cx="622" cy="{y - 4}" r="5" fill="{colour(level)}"/>{words(634, y, of_level, "key")}')
    names = f"{score} by the supernet", f"{score} trained alone"
    return picture(760, 376, " and ".join(names), axes(frame, *names) + "".join(dots))


def colour(level: int) -> str:
    return f"hsl({level * 67 % 360} 70% 45%)"


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Trains some subnets of a finished search alone and says how well its supernet ranked them.")
    parser.add_argument("folder", type=Path, help="of the search")
    parser.add_argument("--subnets", type=int, default=12, help="how many; default 12")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each; default 2, one has no ceiling")
    parser.add_argument("--epochs", type=int, default=None, help="of each; default as many as the search's")
    parser.add_argument("--device", default=None)
    parser.add_argument("--data", default=None)
    options = parse_options(parser, argv)
    for name, least in (("subnets", 2), ("seeds", 1), ("epochs", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise Fault(f"--{name} {value}: {least} or more would be right")
    moved = {name: getattr(options, name) for name in MOVABLE if getattr(options, name, None) is not None}
    begun = options.folder / "config.yaml"
    epochs = options.epochs or (read_options(begun, SearchConfig).get("epochs", 100) if begun.is_file() else 100)
    print(study(options.folder, options.subnets, options.seeds, int(epochs), moved))
    return 0
