"""A search from start to end: the story behind ``search.py``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.config import read_data_spec
from data.dataset import ImageSet
from data.structures import Fault, Sample
from engine import distributed
from engine.config import add_options, checked, save_config
from engine.doors import door, option_parser, parse_options
from engine.evaluate import Metrics, calibration_images, check_imgsz, evaluate
from engine.runs import new_run, write_text
from engine.tasks import task_of
from engine.train import augmentation, describe, read_labelled
from models.checkpoint import load_checkpoint, warm_start
from models.graph import resolve
from models.parse import dump
from models.spec import ModelSpec
from models.supernet import Supernet
from search import tango
from search.config import SearchConfig
from search.costs import CostTable, check_budgets, cost_tables, format_cost, parse_budget
from search.find import Trial, calibrated, find, save_subnet
from search.front import Judged, draw_front, front_table, on_front, write_front
from search.latency import SECONDS, LatencyTable, latency_table, read_table, write_table
from search.objective import check_form
from search.propose import argmax
from search.report import write_report
from search.retrain import retrain, retrain_table
from search.space import Architecture, SearchSpace
from search.train import lengths, reopen, train_supernet

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
    metrics: Metrics  # of the best, on the validation split


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
        weight_samples, judge_samples = split_train(train_split.samples)
        say(
            f"{config.data}: {len(weight_samples)} images train the weights, {len(judge_samples)} move alphas "
            f"and judge, {len(val_split.samples)} only report"
        )
        for note in (*train_split.notes, *val_split.notes):
            say(f"note: {note}")
        weight_images = ImageSet(weight_samples, config.imgsz, augmentation(config), config.seed, config.cache)
        judge_images = ImageSet(judge_samples, config.imgsz, None, config.seed, config.cache)
        val_images = ImageSet(val_split.samples, config.imgsz, None, config.seed, config.cache)

        # The space and what its subnets cost. A budget that cannot be met ends here, before anything is trained.
        spec = resumed.spec if resumed else describe(config, data, None, train_split.samples, say)
        check_searchable(spec)
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
        if config.weights and not resumed:
            loaded, missing = warm_start(supernet.network, load_checkpoint(config.weights).state)
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
    best = max(range(len(found)), key=lambda place: (found[place].ap, -found[place].costs["macs"]))
    write_front(folder / "front.csv", space, found, front)
    draw_front(folder / "front.png", found, front, metrics, best, budgets)
    (folder / "subnets").mkdir(exist_ok=True)
    shown = sorted((one for one, on in zip(found, front, strict=True) if on), key=lambda one: -one.ap)
    for one in {found[best].number: found[best], **{one.number: one for one in shown}}.values():
        save_subnet(folder / "subnets" / f"{one.number}", calibrated(trial, one), one, data.names, config.imgsz)
    winner = found[best]
    network = calibrated(trial, winner)
    save_subnet(folder / "best", network, winner, data.names, config.imgsz)
    if config.tango:
        tango.write_final(folder, supernet)
    say(f"\nfront over AP and {', '.join(metrics)} ({len(found)} subnets judged on {len(judge_images)} images):")
    say(front_table(found, front))
    say(f"\nbest: subnet {winner.number}, {winner.architecture}")
    say(f"alpha alone would pick: {argmax(supernet)}")
    if stopped:
        write_report(folder)
        raise KeyboardInterrupt(f"stopped; {folder / 'front.csv'} has the front; judging anew: --resume {folder}")
    reached = evaluate(
        network, val_images, names=data.names, batch_size=config.batch_size, device=world.device, progress=progress
    )
    say(f"with inherited weights on {len(val_images)} validation images: AP {reached.ap:.3f}, AP50 {reached.ap50:.3f}")

    # Some of them trained on, and the page that shows it all.
    if config.retrain:
        rows = retrain(
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
        say(f"\nAP on the validation images:\n{retrain_table(rows)}")
    page = write_report(folder)
    for path in (page, folder / "front.csv", folder / "front.png", folder / "best.yaml", folder / "best.pt"):
        say(str(path))
    say(f"{time.perf_counter() - began:.0f} s; train it on with: python train.py --weights {folder / 'best.pt'} ...")
    return SearchResult(folder, tuple(found), tuple(front), folder / "best.pt", folder / "best.yaml", reached)


def check_searchable(spec: ModelSpec) -> None:
    """Raises a Fault where subnets cannot be judged by AP."""
    task = task_of(spec)
    if task.name != "detect":
        raise Fault(f"{spec.path}: {task.network}; search.py judges subnets by AP, which detectors have")


def split_train(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Images for the weights, and images for alphas and judging: disjoint, chosen by the hash of the file's name.

    The second part is a fifth, at least 32 and at most 2,000 images, and never more than half.
    """
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(sample.path.name.encode()).digest())
    count = round(JUDGING_PART * len(ranked))
    count = min(max(count, FEWEST_JUDGING), MOST_JUDGING, len(ranked) // 2)
    if count < 1:
        raise Fault(f"a search needs two or more training images, got {len(ranked)}")
    judging = {sample.path for sample in ranked[:count]}
    return [s for s in samples if s.path not in judging], [s for s in samples if s.path in judging]


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
