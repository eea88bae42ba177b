"""A search from start to end: the story behind ``search.py``."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.config import read_data_spec
from data.dataset import ImageSet
from data.structures import Fault, Sample
from engine import distributed
from engine.config import add_options, checked, save_config
from engine.doors import door, option_parser, parse_options
from engine.evaluate import calibration_images, check_imgsz
from engine.plan import check_single
from engine.runs import new_run, write_text
from engine.tasks import Task, check_options, evaluate, task_of
from engine.train import augmentation, describe, read_labelled
from engine.unfold import with_statistics
from models.checkpoint import load_checkpoint, warm_start
from models.graph import resolve
from models.parse import dump
from models.supernet import Supernet
from search import tango
from search.config import SearchConfig
from search.costs import CostTable, check_budgets, cost_tables, format_cost, parse_budget
from search.find import Trial, calibrated, find, save_subnet
from search.front import Judged, draw_front, front_table, on_front, write_front
from search.judge import judging_of
from search.latency import SECONDS, LatencyTable, latency_table, read_table, write_table
from search.objective import check_form
from search.propose import argmax
from search.report import write_report
from search.retrain import retrain, retrain_table
from search.space import Architecture, SearchSpace
from search.train import lengths, reopen, train_supernet, weight_batches

JUDGING_PART, FEWEST_JUDGING, MOST_JUDGING = 0.2, 32, 2_000  # of the training images; the weights never see them

Say = Callable[[str], None]


@dataclass(frozen=True)
class SearchResult:
    """A finished search: its folder, the judged subnets, which of them are the front, and the best one's files."""

    folder: Path
    judged: tuple[Judged, ...]
    front: tuple[bool, ...]
    best: Path
    best_yaml: Path
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
    budgets = [parse_budget(text) for text in config.budget]
    check_form(config.objective, budgets)
    if config.cfg is None or config.data is None:
        raise Fault("--cfg and --data are needed: a model YAML with choices, and the YAML of a data set")
    world = distributed.start(config.device)
    progress = progress and world.is_first
    say: Say = print if progress else lambda line: None

    with distributed.together(world):
        # The data, in three parts: images for the weights, for alphas and judging, and to report.
        data = read_data_spec(config.data)
        train_split, val_split = read_labelled(data, "train"), read_labelled(data, "val")
        weight_samples, judge_samples = split_train(train_split.samples, by_class=data.format == "folders")
        say(
            f"{config.data}: {len(weight_samples)} images train the weights, {len(judge_samples)} move alphas "
            f"and judge, {len(val_split.samples)} only report"
        )
        for note in (*train_split.notes, *val_split.notes):
            say(f"note: {note}")

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
        for metric, table in tables.items():
            least, most = (table.extreme(largest)[0] for largest in (False, True))
            say(f"  {metric}: {format_cost(metric, least)} to {format_cost(metric, most)}")
        check_budgets(budgets, tables)
        lengths(weight_images, config, world)  # nor does a search begin that is too short
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
    judged: dict[Architecture, Judged] = {}
    stopped = False
    try:
        find(trial, judged, folder)
    except KeyboardInterrupt:
        if not judged:
            raise
        stopped = True
        say(f"stopped; this is the front of the {len(judged)} subnets that were judged until now")

    # The front and its files.
    found = list(judged.values())
    metrics = trial.metrics
    front = on_front(found, metrics)
    best = max(range(len(found)), key=lambda place: (found[place].score, -found[place].costs["macs"]))
    write_front(folder / "front.csv", task, space, found, front)
    draw_front(folder / "front.png", task, found, front, metrics, best, budgets)
    (folder / "subnets").mkdir(exist_ok=True)
    shown = sorted((one for one, on in zip(found, front, strict=True) if on), key=lambda one: -one.score)
    for one in {found[best].number: found[best], **{one.number: one for one in shown}}.values():
        save_subnet(folder / "subnets" / f"{one.number}", calibrated(trial, one), one, data.names, config.imgsz)
    winner = found[best]
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
        raise KeyboardInterrupt(f"stopped; {folder / 'front.csv'} has the front; judging anew: --resume {folder}")
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
    page = write_report(folder)
    for path in (page, folder / "front.csv", folder / "front.png", folder / "best.yaml", folder / "best.pt"):
        say(str(path))
    say(f"{time.perf_counter() - began:.0f} s; train it on with: python train.py --weights {folder / 'best.pt'} ...")
    return SearchResult(folder, tuple(found), tuple(front), folder / "best.pt", folder / "best.yaml", reached)


def told(task: Task, metrics: Any) -> str:
    """``AP 0.312, AP50 0.581``, or ``top-1 0.904, top-5 0.991``; what is not a number is left out."""
    numbers = {title: getattr(metrics, name) for title, name in zip(task.titles[:2], task.columns[:2], strict=True)}
    return ", ".join(f"{title} {value:.3f}" for title, value in numbers.items() if not math.isnan(value))


def split_train(samples: Sequence[Sample], by_class: bool = False) -> tuple[list[Sample], list[Sample]]:
    """Images for the weights, and images for alphas and judging: disjoint, chosen by the hash of the file's name.

    The second part is a fifth, at least 32 and at most 2,000 images, and never more than half. With `by_class` each
    class, which is that of an image's one box, gives its share.
    """
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path.name.encode()).digest())
    count = round(JUDGING_PART * len(ranked))
    count = min(max(count, FEWEST_JUDGING), MOST_JUDGING, len(ranked) // 2)
    if count < 1:
        raise Fault(f"a search needs two or more training images, got {len(ranked)}")
    if by_class:
        ranked = spread_by_class(ranked)
    judging = {sample.path for sample in ranked[:count]}
    return [s for s in samples if s.path not in judging], [s for s in samples if s.path in judging]


def spread_by_class(samples: Sequence[Sample]) -> list[Sample]:
    """The same in such an order that any first part of them has its share of every class; else as they were."""
    classes = [int(sample.labels[0]) for sample in samples]
    sizes, seen = Counter(classes), Counter[int]()
    places = []
    for label in classes:
        places.append((seen[label] + 0.5) / sizes[label])
        seen[label] += 1
    order = sorted(range(len(samples)), key=lambda index: places[index])
    return [samples[index] for index in order]


def find_latencies(
    supernet: Supernet, config: SearchConfig, folder: Path | None, device: torch.device, progress: bool
) -> LatencyTable:
    """The table of this device: the one that a resumed search began with, the one that was given, or a new one."""
    graph = resolve(supernet.spec)
    known = folder / "latency.json" if folder else config.latency_table
    if known:
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
    for name in ("last.pt", "latency.json", "losses.csv", "front.csv", "retrain.csv"):  # of the search before
        (folder / name).unlink(missing_ok=True)
    save_config(folder / "config.yaml", config)
    write_text(folder / "search.yaml", dump(supernet.spec))
    choices = [{"name": choice.name, "options": choice.options} for choice in space.choices]
    content = {"hash": space.hash, "size": space.size, "choices": choices, "images": dict(images)}
    write_text(folder / "space.json", json.dumps(content))
    if latencies:
        write_table(folder / "latency.json", latencies)
    return folder


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Trains a supernet of a YAML's open choices and derives its best subnets within a budget.")
    add_options(parser, SearchConfig)
    search(checked(SearchConfig, vars(parse_options(parser, argv)), "--"))
    return 0
