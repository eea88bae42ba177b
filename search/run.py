"""A search from start to end: the story behind ``search.py``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.config import read_data_spec
from data.dataset import ImageSet
from data.structures import Fault
from engine import distributed
from engine.config import add_options, checked, save_config
from engine.doors import check_imgsz, door, import_optuna, option_parser, parse_options, printable
from engine.evaluate import calibration_images
from engine.export import ANY_SIZE, ENDINGS, check_packages, export
from engine.latency import check_runtime
from engine.nms import USUAL
from engine.plan import check_single
from engine.prepare import augmentation, describe, images_hash, read_labelled
from engine.runs import new_run, write_csv, write_text
from engine.tasks import Task, check_options, evaluate, task_of
from engine.unfold import with_statistics
from models.checkpoint import load_checkpoint, warm_start
from models.graph import resolve
from models.parse import dump
from models.supernet import Supernet
from search import tango
from search.blocks import check_device, export_blocks, foreign_table
from search.config import SearchConfig
from search.costs import CostTable, check_budgets, check_together, cost_tables, format_cost, parse_budget
from search.device_timer import SECONDS
from search.find import EVOLUTION, EXHAUSTIVE, Found, Trial, calibrated, find, save_subnet, study_name
from search.front import Judged, draw_front, front_table, on_front, write_front
from search.judge import judging_of
from search.latency import LatencyTable, write_table
from search.objective import check_form
from search.optimise import NEEDED, importances
from search.parts import split_train
from search.propose import argmax
from search.report import write_report
from search.retrain import retrain, retrain_table, trained_on
from search.sandwich import sizes
from search.space import SearchSpace
from search.storage import JOURNAL, Limits, Queue, beating, check_address, close, create, open_storage
from search.tabulate import latency_table, read_table
from search.train import check_supernet, lengths, reopen, train_supernet, weight_batches
from search.worker import ABOUT, help_judging

Say = Callable[[str], None]


@dataclass(frozen=True)
class SearchResult:
    """A finished search: its folder, the judged subnets, which of them are the front, and the best one's files."""

    folder: Path
    judged: tuple[Judged, ...]
    front: tuple[bool, ...]
    best: Path
    metrics: Any  # of the best, on the validation split: `Metrics` of a detector, `ClassMetrics` of a classifier


def search(config: SearchConfig, progress: bool = True) -> SearchResult | None:
    """Trains a supernet, moves its architecture parameters, judges subnets within the budgets and derives the front.

    Raises a Fault for input that cannot be searched, and for a budget that no subnet can meet. Ctrl-C while subnets are
    judged keeps the front of those that are, then goes on upwards. Of several processes only the first gets a result.
    """
    began = time.perf_counter()
    resumed, folder = None, None
    if config.resume is not None:
        config, folder, resumed = reopen(config)
    if config.tango:
        config = tango.settings(config)
    check_supernet(config)
    budgets = [parse_budget(text) for text in config.budget]
    check_form(config.objective, budgets)
    check_address(config.storage)
    if config.export != "off":
        check_packages(config.export, "--export")
    if config.latency_device and not config.latency_table:
        raise Fault(f"--latency-device {config.latency_device}: what it takes, --latency-table has to say")
    if config.cfg is None or config.data is None:
        raise Fault("--cfg and --data are needed: a model YAML with choices, and the YAML of a data set")
    world = distributed.start(config.device)
    progress = progress and world.is_first
    say: Say = print if progress else lambda line: None

    with distributed.together(world):
        if config.storage and world.is_first:
            open_storage(config.storage)  # what is wrong with it is told now, not after the training
        # The data, in three parts: images for the weights, for alphas and judging, and to report.
        data = read_data_spec(config.data)
        train_split, val_split = read_labelled(data, "train"), read_labelled(data, "val")
        weight_samples, judge_samples = split_train(train_split.samples, by_class=data.format == "folders")
        say(
            f"{config.data}: {len(weight_samples)} images train the weights, {len(judge_samples)} move alphas "
            f"and judge, {len(val_split.samples)} only report"
        )
        for note in (*train_split.notes, *val_split.notes):
            say(f"note: {printable(note)}")
        for part, does in ((weight_samples, "train the weights"), (judge_samples, "move alphas and judge")):
            if not any(len(sample.labels) for sample in part):
                raise Fault(
                    f"{config.data}: none of the {len(part)} images that {does} has a label; label more of them"
                )

        # The space and what its subnets cost. A budget that cannot be met ends here, before anything is trained.
        spec = resumed.spec if resumed else describe(config, data, None, train_split.samples, say)
        task = task_of(spec)
        judging_of(spec)  # or there is nothing to compare subnets by
        config = config if resumed else check_options(task, config)
        how = (config.seed, config.cache, False, task.crops)
        weight_images = ImageSet(weight_samples, config.imgsz, augmentation(config), *how)
        judge_images = ImageSet(judge_samples, config.imgsz, None, *how)
        val_images = ImageSet(val_split.samples, config.imgsz, None, *how)
        torch.manual_seed(config.seed)  # first weights
        supernet = Supernet(spec, config.supernet, config.norms)
        check_imgsz(config.imgsz, supernet.network.max_stride)
        space = SearchSpace.of(supernet.spec)
        tables = cost_tables(resolve(supernet.spec), config.imgsz)
        say(f"{spec.path}: {space.size:,} subnets from {len(space.choices)} choices, {config.supernet} supernet")
        say(f"on {world}, {torch.get_num_threads()} threads")
        for metric, table in tables.items():
            least, most = (table.extreme(largest)[0] for largest in (False, True))
            say(f"  {metric}: {format_cost(metric, least)} to {format_cost(metric, most)}")
        check_budgets(budgets, tables)
        if space.size <= EXHAUSTIVE:
            check_together(budgets, tables, map(space.at, range(space.size)))
        elif config.candidates > EVOLUTION:
            import_optuna(NEEDED)
        if not config.latency_device:
            check_runtime(config.runtime, world.device)
        if config.export_blocks:
            if world.is_first:
                graph = resolve(supernet.spec)
                files = export_blocks(graph, config.imgsz, config.export_blocks, config.seed, progress)
                say("\n".join(map(str, files)))
                say(f"on the other device: python {files[1].name} --device NAME --threads N")
            return None
        lengths(weight_images, config, world)  # nor does a search begin that is too short
        if config.sandwich:
            sizes(tables["macs"])  # or whose subnets are all of one size
        check_single(supernet.network, config.imgsz, weight_batches(weight_images, config, world)(epoch=1).lists)
        if config.weights and not resumed:
            seen = (weight_images, config.calibration, config.seed, "cpu", augmentation(config))
            origin, line = with_statistics(load_checkpoint(config.weights), partial(calibration_images, *seen))
            if line:
                say(line)
            loaded, missing = warm_start(supernet.network, origin.state)
            say(f"{config.weights}: {len(loaded)} of {len(loaded) + len(missing)} tensors loaded")
        supernet.to(world.device)
        supernet.network.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        latencies = None
        if world.is_first and (config.latency_table or any(budget.metric == "latency_ms" for budget in budgets)):
            latencies = find_latencies(supernet, config, folder, world.device, progress)
            say("\n".join(latencies.lines()))
        if folder is None and world.is_first:
            check_budgets(budgets, tables | ({"latency_ms": latencies.cost} if latencies else {}))
            counts = {"weights": len(weight_images), "judging": len(judge_images), "validation": len(val_images)}
            folder = start_folder(config, supernet, space, latencies, counts)
    tables |= to_all(latencies, tables["macs"], world)
    folder = Path(distributed.gather_objects(str(folder), world)[0])
    say(f"results in {folder}")

    # Train. What follows is the work of one process.
    train_supernet(
        supernet, weight_images, judge_images, budgets, tables, config, folder, world, progress, say, data.names
    )
    distributed.finish()
    if not world.is_first:
        return None

    # Judge.
    calibration = list(calibration_images(weight_images, config.calibration, config.seed, world.device))
    trial = Trial(
        supernet, space, tables, budgets, config, calibration, judge_images, data.names, world.device, progress
    )
    trial = replace(trial, timed_here=not config.latency_device, weight_images=images_hash(weight_samples))
    trial = replace(trial, queue=open_queue(trial, folder, say), limits=Limits(config.trials, config.timeout))
    known = Found()
    stopped = False
    try:
        with beating(trial.queue) if trial.queue else nullcontext():
            find(trial, known, folder)
    except (KeyboardInterrupt, TimeoutError) as stop:
        if not known.judged:
            raise
        stopped = isinstance(stop, KeyboardInterrupt)
        say(f"{str(stop) or 'stopped'}; this is the front of the {len(known.judged)} subnets judged until now")
    finally:
        if trial.queue:
            close(trial.queue)
    if known.given_up:
        say(f"{len(known.given_up)} more were given up after a part of the images: others beat them surely")

    # The front and its files.
    found = sorted(known.judged.values(), key=lambda one: one.number)
    write_csv(folder / "importances.csv", importances(space, {one.architecture: one.score for one in found}))
    metrics = trial.metrics
    front = on_front(found, metrics)
    best = max(
        range(len(found)),
        key=lambda place: (front[place], found[place].score, [-found[place].costs[metric] for metric in metrics]),
    )
    write_front(folder / "front.csv", task, space, found, front)
    draw_front(folder / "front.png", task, found, front, metrics, best, budgets)
    (folder / "subnets").mkdir(exist_ok=True)
    winner = found[best]
    shown = sorted((one for one, on in zip(found, front, strict=True) if on), key=lambda one: -one.score)
    shown = [winner, *(one for one in shown if one is not winner)]
    for one in shown:
        save_subnet(folder / "subnets" / f"{one.number}", calibrated(trial, one), one, data.names, config.imgsz)
    network = calibrated(trial, winner)
    save_subnet(folder / "best", network, winner, data.names, config.imgsz)
    if config.tango:
        tango.write_final(folder, supernet)
    over = ", ".join(metrics)
    judged_on = f"{len(found)} subnets judged on {len(judge_images)} images"
    say(f"\nfront over {task.titles[0]} and {over} ({judged_on}):")
    say(front_table(task, found, front))
    say(f"\nbest: subnet {winner.number}, {winner.architecture}")
    say(f"alpha alone would pick: {argmax(supernet)}")
    if stopped:
        write_report(folder)
        raise KeyboardInterrupt(f"stopped; {folder / 'front.csv'} has the front; goes on with: --resume {folder}")
    reached = evaluate(
        network, val_images, names=data.names, batch_size=config.batch_size, device=world.device, progress=progress
    )
    say(f"with inherited weights on {len(val_images)} validation images: {told(task, reached)}")

    # Some of them trained on, and the page that shows it all.
    if config.retrain:
        rows = retrain(
            task,
            shown[: config.retrain],
            lambda one: supernet.derive(one.architecture.picks).eval(),
            folder,
            config,
            data,
            val_images,
            world.device,
            progress,
            say,
        )
        say(f"\n{task.titles[0]} on the validation images:\n{retrain_table(rows)}")
    if config.export != "off":
        first = trained_on(folder, shown[0]) if config.retrain else folder / "best.pt"
        say(f"\n{config.export} of {first}")
        for line in export_best(first, folder, config.export):
            say(line)
    page = write_report(folder)
    for path in (page, folder / "front.csv", folder / "front.png", folder / "best.yaml", folder / "best.pt"):
        say(str(path))
    say(f"{time.perf_counter() - began:.0f} s; train it on with: python train.py --weights {folder / 'best.pt'} ...")
    return SearchResult(folder, tuple(found), tuple(front), folder / "best.pt", reached)


def export_best(weights: Path, folder: Path, kind: str) -> Iterator[str]:
    """Writes ``best.onnx`` or the like as ``export.py`` does by default, checked and timed; yields a line for each."""
    how: dict[str, Any] = {"imgsz": None, "asked": USUAL, "inside": False, "source": None}
    out = folder / f"best{ENDINGS[kind]}"
    return export(load_checkpoint(weights), kind, out, **how, any_size=kind in ANY_SIZE)


def told(task: Task, metrics: Any) -> str:
    """``AP 0.312, AP50 0.581``, or ``top-1 0.904, top-5 0.991``; what is not a number is left out."""
    numbers = {title: getattr(metrics, name) for title, name in zip(task.titles[:2], task.columns[:2], strict=True)}
    return ", ".join(f"{title} {value:.3f}" for title, value in numbers.items() if not math.isnan(value))


def find_latencies(
    supernet: Supernet, config: SearchConfig, folder: Path | None, device: torch.device, progress: bool
) -> LatencyTable:
    """The table of this device: the one that a resumed search began with, the one that was given, or a new one."""
    graph = resolve(supernet.spec)
    known = folder / "latency.json" if folder else config.latency_table
    if known and config.latency_device:
        return foreign_table(known, graph, config.imgsz, named=config.latency_device, runtime=config.runtime)
    if known:
        check_device(known, config.latency_device, device)
        return read_table(known, graph, config.imgsz, device=device, runtime=config.runtime, progress=progress)
    return latency_table(
        graph,
        config.imgsz,
        device=device,
        runtime=config.runtime,
        seed=config.seed,
        progress=progress,
        seconds=SECONDS,
    )


def to_all(latencies: LatencyTable | None, like: CostTable, world: distributed.World) -> dict[str, CostTable]:
    """The first process's latencies in every process, as the cost table ``latency_ms``; nothing where it has none."""
    cost = latencies.cost if latencies else None
    numbers = [cost.fixed, *(values.tolist() for _, values in cost.rows)] if cost else None
    found = distributed.gather_objects(numbers, world)[0]
    if found is None:
        return {}
    rows = tuple((choices, np.array(values)) for (choices, _), values in zip(like.rows, found[1:], strict=True))
    return {"latency_ms": CostTable("latency_ms", found[0], rows)}


def start_folder(
    config: SearchConfig,
    supernet: Supernet,
    space: SearchSpace,
    latencies: LatencyTable | None,
    images: Mapping[str, int],
) -> Path:
    """A folder for this search with all that is known before it begins; `images` counts those of each part."""
    folder = new_run(config.project, config.name, config.exist_ok)
    before = ("last.pt", "latency.json", "losses.csv", "front.csv", "retrain.csv", "importances.csv")
    exported = (*(f"best{ending}" for ending in ENDINGS.values()), "best.bin")
    for name in (*before, *exported, ABOUT, JOURNAL, f"{JOURNAL}.lock"):  # of the search before
        (folder / name).unlink(missing_ok=True)
    save_config(folder / "config.yaml", config)
    write_text(folder / "search.yaml", dump(supernet.spec))
    choices = [{"name": choice.name, "options": choice.options} for choice in space.choices]
    content = {"hash": space.hash, "size": space.size, "choices": choices, "images": dict(images)}
    write_text(folder / "space.json", json.dumps(content))
    if latencies:
        write_table(folder / "latency.json", latencies)
    return folder


def open_queue(trial: Trial, folder: Path, say: Say) -> Queue | None:
    """The queue that workers may join, which ``study.json`` tells them of; None where Optuna is not installed."""
    config = trial.config
    if not config.storage and find_spec("optuna") is None:
        say("note: Optuna is not installed (the extra `search`): no worker can help, and a --resume judges anew")
        return None
    storage = open_storage(config.storage or str(folder / JOURNAL))
    name = study_name(trial, folder)
    queue = create(storage, name, trial.space, 1 + len(trial.metrics))
    where = config.storage if "://" in config.storage or not config.storage else str(Path(config.storage).resolve())
    write_text(folder / ABOUT, json.dumps({"study": name, "storage": where}) + "\n")
    say(f"judging; workers help with: python search.py --worker {folder}")
    return queue


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Trains a supernet of a YAML's open choices and derives its best subnets within a budget.")
    add_options(parser, SearchConfig)
    config = checked(SearchConfig, vars(parse_options(parser, argv)), "--")
    if config.worker:
        help_judging(config)
    else:
        search(config)
    return 0
