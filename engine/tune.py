"""Hyper-parameters by trial: short trainings on the user's data, each with other settings. The best are kept.

The first trial has the user's own settings, so the result is never worse than what was asked for, as measured. The next
few lie near them, the others are proposed by TPE (Bergstra et al., Algorithms for Hyper-Parameter Optimization, 2011)
from what was seen so far. A trial that is worse than half of those before it ends early.

All of it stands in a journal, so a stopped search goes on. What a trial tries depends on the seed and on the results
before it alone: a search that was killed and goes on makes the same trials as one that was not.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from data.config import read_data_spec
from data.structures import Fault
from engine.config import MOVABLE, TrainConfig, checked, option_name, read_options, save_config
from engine.distributed import several
from engine.doors import import_optuna
from engine.prepare import read_data
from engine.runs import atomically, new_run, table, write_csv, write_text
from engine.tasks import DETECT, TASKS, Task, check_options
from engine.train import TrainResult, agreed, fitness, make_plan, train

Train = Callable[[TrainConfig, bool, Callable[[int, Any], None]], TrainResult]
Settings = Mapping[str, float]


@dataclass(frozen=True)
class Range:
    """Where a hyper-parameter is looked for, bounds included; in equal steps of its logarithm if ``log``."""

    name: str
    low: float
    high: float
    log: bool = False

    def around(self, value: float) -> Range:
        """The same range, widened where `value` lies outside it. One that reaches 0 or less has no logarithm."""
        low, high = min(self.low, value), max(self.high, value)
        return Range(self.name, low, high, self.log and low > 0)

    def near(self, value: float, rng: np.random.Generator) -> float:
        """A value drawn beside `value`: normally distributed, with a tenth of the range as its deviation."""
        low, high, middle = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        drawn = min(max(rng.normal(middle, NEAR * (high - low)), low), high)
        return min(max(math.exp(drawn) if self.log else drawn, self.low), self.high)


# The ranges are those in which yolov5 evolves. A flip is as strong as it gets at a half: beyond, mirror images are the
# rule, and the images themselves the exception.
RANGES = (
    Range("lr0", 1e-5, 0.1, log=True),
    Range("lrf", 0.01, 1.0, log=True),
    Range("momentum", 0.6, 0.98),
    Range("weight_decay", 0.0, 0.001),
    Range("warmup_epochs", 0.0, 5.0),
    Range("hsv_h", 0.0, 0.1),
    Range("hsv_s", 0.0, 0.9),
    Range("hsv_v", 0.0, 0.9),
    Range("degrees", 0.0, 45.0),
    Range("translate", 0.0, 0.9),
    Range("scale", 0.0, 0.9),
    Range("fliplr", 0.0, 0.5),
    Range("flipud", 0.0, 0.5),
    Range("mosaic", 0.0, 1.0),
    Range("mixup", 0.0, 1.0),
)
NEARBY = 5  # trials after the first that are drawn near it; then TPE has something to go by
NEAR = 0.1
UNDISTURBED = 0.3  # part of the epochs in which no trial is ended: a slow start is no bad end
JUDGES = 4  # finished trials that it takes to say that another one is hopeless
DIGITS = 4  # significant ones of what is tried, so that a hyp file can be read
JOURNAL, HYP = "journal.log", "hyp.yaml"
STATES = {"COMPLETE": "done", "PRUNED": "ended early", "FAIL": "failed"}


def tune(config: TrainConfig, trials: int, progress: bool = True, run: Train = train) -> Path:
    """Make `trials` trainings in all and return the file for ``--hyp`` that holds the best settings.

    The folder, of ``--project`` (here ``runs/tune``) and ``--name``, gets the journal, ``tune.csv`` with a row a trial,
    ``tune.png`` unless ``--noplots``, ``hyp.yaml``, and in ``trials`` the run of each, with the weights of the best.
    With ``config.resume`` an earlier search in such a folder goes on: a trial that was killed is repeated, and `trials`
    counts those that were there already. Only one process may work on a folder.

    A trial whose loss stops being a number has failed, and the next one follows. Raises a Fault for what cannot be
    trained on at all, where every trial failed, and where Optuna is missing. `run` trains a trial, as `train` does.
    """
    if several():
        raise Fault("--tune: a trial is a training in one process; start it without torchrun")
    optuna = import_optuna("--tune: needs Optuna;")
    config, folder = reopen_tuning(config) if config.resume else begin(config)
    study = open_study(folder, config)
    own, ranges = study.user_attrs["own"], [Range(*values) for values in study.user_attrs["ranges"]]
    distributions = {r.name: optuna.distributions.FloatDistribution(r.low, r.high, log=r.log) for r in ranges}
    say: Callable[[str], None] = tqdm.write if progress else lambda line: None
    say(f"tuning {len(ranges)} hyper-parameters in {folder}, {len(finished(study))} of {trials} trials are done")
    bar = tqdm(total=trials * config.epochs, unit="epoch", disable=not progress, leave=False)
    try:
        while (number := len(finished(study))) < trials:
            bar.n = number * config.epochs
            bar.set_description(f"trial {number}, {number + 1} of {trials}")
            study.sampler = optuna.samplers.TPESampler(n_startup_trials=1 + NEARBY, seed=config.seed + number)
            if number <= NEARBY and not study.get_trials(states=[optuna.trial.TrialState.WAITING]):
                study.enqueue_trial(first_settings(ranges, own, config.seed, number))
            trial = study.ask(distributions)
            settings = {r.name: rounded(trial.params[r.name], r, own[r.name]) for r in ranges}
            make_trial(study, trial, trial_config(config, folder, number, settings), run, bar)
            keep_best_weights(folder, study)
            write_csv(folder / "tune.csv", rows(study))
            if not config.noplots:
                draw(folder / "tune.png", study, ranges, own)
            say(trial_line(task_of_study(study), finished(study)[-1], number, trials))
    except KeyboardInterrupt:
        again = f"python train.py --tune {trials} --resume {folder}"
        raise KeyboardInterrupt(f"stopped; goes on with: {again}") from None
    finally:
        bar.close()
    best = best_trial(study)
    if best is None:
        raise Fault(f"{folder}: no trial of {len(finished(study))} came to its end; see tune.csv there")
    write_text(folder / HYP, hyp_text(config, best, len(finished(study))))
    write_csv(folder / "tune.csv", rows(study))
    say("\n" + report(folder, study, own))
    return folder / HYP


# ---- what the story calls, in its order


def begin(config: TrainConfig) -> tuple[TrainConfig, Path]:
    """A new folder with the config in it. The optimizer and its learning rate are settled in the config: they are to
    be the same for a longer training with the settings that are found.
    """
    if config.batch_size == -1:
        raise Fault("--batch-size -1: every trial would find its own; give a number with --tune")
    config = check_options(task_of_data(config), agreed(config))
    if config.optimizer == "auto" or config.lr0 is None:
        images = len(read_data(config)[1].samples)
        batch_size = min(config.batch_size, images)
        plan = make_plan(config, images, batch_size, math.ceil(images / batch_size), None)
        config = config.model_copy(update={"optimizer": plan.optimizer, "lr0": plan.lr})
    project = config.project if "project" in config.model_fields_set else Path("runs/tune")
    if config.exist_ok and (project / config.name / JOURNAL).exists():
        here = project / config.name
        raise Fault(f"--exist-ok: {here} holds a search already; --tune N --resume {here} goes on with it")
    folder = new_run(project, config.name, config.exist_ok)
    save_config(folder / "config.yaml", config)
    return config, folder


def task_of_data(config: TrainConfig) -> Task:
    """The task that a data set is for; without one detection."""
    form = read_data_spec(config.data).format if config.data else DETECT.formats[0]
    return next(task for task in TASKS.values() if form in task.formats)


def reopen_tuning(config: TrainConfig) -> tuple[TrainConfig, Path]:
    """The config and folder of a search that goes on. A Fault for a folder that holds none, and for options that it
    cannot change.
    """
    assert config.resume is not None
    folder = config.resume if config.resume.is_dir() else config.resume.parent
    if not (folder / JOURNAL).is_file():
        raise Fault(f"--resume {config.resume}: no {folder / JOURNAL}; without --tune a training goes on")
    fixed = sorted(config.model_fields_set - MOVABLE - {"tune"})
    if fixed:
        names = ", ".join(map(option_name, fixed))
        raise Fault(f"{names}: cannot change in a search that goes on; leave it out, or start anew")
    here = {name: getattr(config, name) for name in config.model_fields_set}
    options = folder / "config.yaml"
    return checked(TrainConfig, {**read_options(options), **here}, str(options)), folder


def open_study(folder: Path, config: TrainConfig) -> Any:
    """The study in the folder's journal, new or with all that it has seen. What was running when it was killed is
    marked as failed without a problem, which `finished` does not count.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    journal = folder / JOURNAL
    if journal.exists():  # what a kill may leave: a lock that nobody holds, half a line
        Path(f"{journal}.lock").unlink(missing_ok=True)
        text = journal.read_bytes()
        os.truncate(journal, text.rfind(b"\n") + 1)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    pruner = optuna.pruners.MedianPruner(JUDGES, n_warmup_steps=1 + math.floor(UNDISTURBED * config.epochs))
    study = optuna.create_study(
        study_name="tune", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
    )
    if "ranges" not in study.user_attrs:  # kept, since the program may change while a search rests
        task = task_of_data(config)
        ranges = [r.around(getattr(config, r.name)) for r in RANGES if is_searched(r.name, task, config)]
        study.set_user_attr("task", task.name)
        study.set_user_attr("own", {r.name: float(getattr(config, r.name)) for r in ranges})
        study.set_user_attr("ranges", [[r.name, r.low, r.high, r.log] for r in ranges])
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def task_of_study(study: Any) -> Task:
    """What the networks of a search are for; a journal of before classifiers were tuned does not say it."""
    return TASKS[study.user_attrs.get("task", DETECT.name)]


def is_searched(name: str, task: Task, config: TrainConfig) -> bool:
    """All of `RANGES`, but for what means nothing to the task, for a flip that the user has set to 0, since with some
    objects a mirror image shows another one (letters, left and right), and for mosaics where rectangles leave no room
    for them.
    """
    if name in task.neutral:
        return False
    if name in ("fliplr", "flipud"):
        return not (name in config.model_fields_set and getattr(config, name) == 0)
    return not (name == "mosaic" and config.rect)


def first_settings(ranges: Sequence[Range], own: Settings, seed: int, number: int) -> dict[str, float]:
    """The user's own for trial 0, others near them for the next ones."""
    if number == 0:
        return dict(own)
    rng = np.random.default_rng((seed, number))
    return {r.name: r.near(own[r.name], rng) for r in ranges}


def rounded(value: float, within: Range, own: float) -> float:
    """Four significant digits of `value`, inside the range; the user's own value stays what it is."""
    if value == own:
        return own
    return min(max(float(f"{value:.{DIGITS}g}"), within.low), within.high)


def trial_config(config: TrainConfig, folder: Path, number: int, settings: Settings) -> TrainConfig:
    """A training with these settings, in a folder of its own below ``trials``, without pictures."""
    place = {"project": folder / "trials", "name": str(number), "exist_ok": True}
    return config.model_copy(update={**settings, **place, "noplots": True, "tune": 0, "resume": None})


def make_trial(study: Any, trial: Any, config: TrainConfig, run: Train, bar: Any) -> None:
    """Train, and tell the study how it went. What no setting can help raises its Fault."""
    from optuna.exceptions import TrialPruned
    from optuna.trial import TrialState

    seen, started = bar.n, time.perf_counter()

    task = task_of_study(study)

    def on_epoch(epoch: int, metrics: Any) -> None:
        bar.update(seen + epoch - bar.n)
        trial.report(fitness(metrics), epoch)
        remember(metrics, epochs=epoch)
        if epoch < config.epochs and trial.should_prune():
            raise TrialPruned

    def remember(metrics: Any, **others: Any) -> None:
        scores = {name: getattr(metrics, name) for name in task.columns[:2]}
        facts = {**scores, "seconds": time.perf_counter() - started, **others}
        for name, value in facts.items():
            trial.set_user_attr(name, value)

    place = config.project / config.name
    shutil.rmtree(place, ignore_errors=True)  # of the same trial, killed
    trial.set_user_attr("settings", {r: getattr(config, r) for r in trial.params})
    try:
        metrics = run(config, False, on_epoch).metrics
    except TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return
    except Fault as fault:
        if not (place / "config.yaml").exists():  # it never began: the data or the model are wrong, not the settings
            raise
        problem = fault.lines[0]
    else:
        remember(metrics)
        if math.isfinite(fitness(metrics)):
            study.tell(trial, fitness(metrics))
            return
        problem = f"{task.titles[0]} is {getattr(metrics, task.columns[0])}"
    trial.set_user_attr("problem", problem)
    study.tell(trial, state=TrialState.FAIL)


def finished(study: Any) -> list[Any]:
    """The trials that count, in order; not those that were killed."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state.name in ("COMPLETE", "PRUNED") or "problem" in t.user_attrs]


def reached(trial: Any) -> float | None:
    """The fitness of a trial that came to its end. Optuna has a value for one that was ended early as well."""
    return trial.value if trial.state.name == "COMPLETE" else None


def best_trial(study: Any) -> Any:
    """The trial with the best fitness, the earliest of equals; None while none came to its end."""
    done = [trial for trial in finished(study) if reached(trial) is not None]
    return max(done, key=lambda trial: trial.value, default=None)


def keep_best_weights(folder: Path, study: Any) -> None:
    """Removes the checkpoints of all trials but the best, and what that would need to go on."""
    best = best_trial(study)
    for number, trial in enumerate(finished(study)):
        for file in (folder / "trials" / str(number)).glob("*.pt"):
            if trial is not best or file.name != "best.pt":
                file.unlink()


# ---- what is shown


def rows(study: Any) -> list[dict[str, Any]]:
    """A row a trial: how it went, then what it tried. Of one that ended early, the numbers of its last evaluation."""
    found, task = [], task_of_study(study)
    for number, trial in enumerate(finished(study)):
        facts = {name: trial.user_attrs.get(name) for name in (*task.columns[:2], "epochs", "seconds")}
        score = {"trial": number, "state": STATES[trial.state.name], "fitness": reached(trial), **facts}
        problem = {"problem": trial.user_attrs.get("problem")}
        found.append({**score, **trial.user_attrs["settings"], **problem})
    return found


def trial_line(task: Task, trial: Any, number: int, trials: int) -> str:
    facts = trial.user_attrs
    scores = [f"{title} {value:.4f}" for title, value in scores_of(task, trial).items() if not math.isnan(value)]
    how = {
        "COMPLETE": lambda: ", ".join([f"fitness {trial.value:.4f}", *scores]),
        "PRUNED": lambda: ", ".join(["ended early", *scores[:1]]) + f" after epoch {facts['epochs']}",
        "FAIL": lambda: f"failed: {facts['problem']}",
    }[trial.state.name]()
    return f"trial {number} ({number + 1} of {trials}): {how}"


def scores_of(task: Task, trial: Any) -> dict[str, float]:
    """The first two numbers of its last evaluation, under their titles; none where there was no evaluation."""
    names = zip(task.titles[:2], task.columns[:2], strict=True)
    return {title: trial.user_attrs[name] for title, name in names if name in trial.user_attrs}


def hyp_text(config: TrainConfig, best: Any, trials: int) -> str:
    """YAML for ``--hyp``. It names the optimizer too, which the learning rate belongs to."""
    settings = {"optimizer": config.optimizer, **best.user_attrs["settings"]}
    return (
        f"# The best of {trials} trials of {config.epochs} epochs on {config.data}: fitness {best.value:.4f}.\n"
        f"# python train.py --hyp {HYP} ...\n" + yaml.safe_dump(settings, sort_keys=False)
    )


def report(folder: Path, study: Any, own: Settings) -> str:
    """What was gained, the settings side by side, and how far to trust it."""
    best, trials = best_trial(study), finished(study)
    counts = {state: sum(t.state.name == name for t in trials) for name, state in STATES.items()}
    first = trials[0]
    task = task_of_study(study)
    mine, found = (
        {} if reached(trial) is None else {"fitness": trial.value, **scores_of(task, trial)} for trial in (first, best)
    )
    numbers = [name for name, value in found.items() if not math.isnan(value)]
    compared: list[tuple[Any, ...]] = [(name, _text(mine.get(name)), _text(found[name])) for name in numbers]
    compared += [(name, _text(own[name]), _text(best.user_attrs["settings"][name])) for name in own]
    lines = [
        f"{len(trials)} trials: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count),
        table(compared, ("", "your own", f"trial {trials.index(best)}")),
    ]
    if best is first:
        lines.append("No trial was better than your own settings.")
    elif reached(first) is None:
        lines.append("Your own settings failed.")
    else:
        lines.append(
            f"Fitness {best.value:.4f} instead of {first.value:.4f}. This is the best of {len(trials)} trials on one"
            " validation set, with one seed: a part of it is luck. Train both with another --seed, or measure them on"
            " images that no trial was judged by (val.py --split test), before you believe it."
        )
    lines.append(f"all trials: {folder / 'tune.csv'}\nto train with the best: python train.py --hyp {folder / HYP} ...")
    return "\n\n".join(lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.{DIGITS}g}"


def draw(path: Path, study: Any, ranges: Sequence[Range], own: Settings) -> None:
    """Fitness over the trials, and below it over each hyper-parameter: what helped, and where it was looked for."""
    from matplotlib.figure import Figure  # here because it is slow to import; it needs no screen

    trials, best = finished(study), best_trial(study)
    done = [(n, t) for n, t in enumerate(trials) if reached(t) is not None]
    pruned = [(n, t) for n, t in enumerate(trials) if t.state.name == "PRUNED" and t.intermediate_values]
    failed = [n for n, t in enumerate(trials) if t.state.name == "FAIL"]
    early = [max(t.intermediate_values.values()) for _, t in pruned]

    columns = 5
    lines = math.ceil(len(ranges) / columns)
    figure = Figure(figsize=(3 * columns, 3.2 + 2.4 * lines), layout="constrained")
    (upper,), (lower,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.2, 2.4 * lines])
    axes = upper.subplots()
    if done:
        numbers, values = [n for n, _ in done], [t.value for _, t in done]
        axes.step(numbers, np.maximum.accumulate(values), where="post", color="C1", label="best so far")
        axes.plot(numbers, values, "o", color="C0", label="trial")
    if pruned:
        axes.plot([n for n, _ in pruned], early, "x", color="grey", label="ended early")
    for n in failed:
        axes.axvline(n, color="C3", linestyle=":", label="failed" if n == failed[0] else None)
    if reached(trials[0]) is not None:
        axes.axhline(trials[0].value, color="C2", linestyle="--", label="your own settings")
    axes.set_xlabel("trial")
    axes.set_ylabel("fitness")
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()

    grid = lower.subplots(lines, columns, squeeze=False).flatten()
    for axes, r in zip(grid, ranges, strict=False):
        axes.plot([t.user_attrs["settings"][r.name] for _, t in pruned], early, "x", color="grey", markersize=4)
        axes.plot([t.user_attrs["settings"][r.name] for _, t in done], [t.value for _, t in done], ".", color="C0")
        if best is not None:
            axes.plot(best.user_attrs["settings"][r.name], best.value, "*", color="C1", markersize=12)
        axes.axvline(own[r.name], color="C2", linestyle="--", linewidth=1)
        axes.set_xlabel(r.name)
        edge = 0 if r.log else 0.03 * (r.high - r.low)  # the user's own value is often a bound
        axes.set_xlim(r.low - edge, r.high + edge)
        if r.log:
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=3)
        axes.grid(alpha=0.3)
    for axes in grid[len(ranges) :]:
        axes.set_visible(False)
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=100)
