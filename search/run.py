"""A search from start to end: the story behind ``search.py``."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.config import read_data_spec
from data.dataset import DetectionSet
from data.loader import batches
from data.structures import Batch, Fault, Sample
from engine.config import add_options, checked, save_config
from engine.doors import door, option_parser, parse_device, parse_options
from engine.evaluate import Metrics, calibration_images, check_imgsz, evaluate, pixels
from engine.latency import measure_ms
from engine.optim import LEARNING_RATES, averaged, choose_optimizer, lr_factor, make_optimizer, warmup_length
from engine.runs import new_run, write_csv, write_text
from engine.train import (
    NOMINAL_BATCH,
    augmentation,
    autocast,
    choose_amp,
    closing_epochs,
    describe,
    no_number,
    read_labelled,
)
from models.checkpoint import load_checkpoint, save_checkpoint, warm_start
from models.graph import resolve
from models.network import Network
from models.parse import dump
from models.supernet import Supernet
from search.config import SearchConfig
from search.costs import Budget, CostTable, check_budgets, cost_tables, format_cost, parse_budget, within
from search.front import Judged, draw_front, front_table, on_front, write_front
from search.judge import first_choice, judge
from search.objective import Prices, architecture_step
from search.propose import argmax, propose
from search.sampling import drawn_options, fair_options
from search.space import Architecture, SearchSpace

JUDGING_PART, FEWEST_JUDGING, MOST_JUDGING = 0.2, 32, 2_000  # of the training images; the weights never see them
ARCHITECTURE, PROPOSAL = 11, 12  # purposes of random streams
ALPHA_REACH = 1.5  # how far an alpha may walk over a whole search with steps of one sign
SLOWEST_ALPHA, FASTEST_ALPHA = 1e-3, 5e-2  # bounds of its learning rate; the lower one is ProxylessNAS's


@dataclass(frozen=True)
class SearchResult:
    """A finished search: its folder, the judged subnets, which of them are the front, and the best one's files."""

    folder: Path
    judged: tuple[Judged, ...]
    front: tuple[bool, ...]
    best: Path
    best_yaml: Path
    metrics: Metrics  # of the best, on the validation split


def search(config: SearchConfig, progress: bool = True) -> SearchResult:
    """Trains a supernet, moves its architecture parameters, judges subnets within the budgets and derives the front.

    Raises a Fault for input that cannot be searched, and for a budget that no subnet can meet.
    """
    say: Callable[[str], None] = print if progress else lambda line: None
    began = time.perf_counter()
    budgets = [parse_budget(text) for text in config.budget]
    device = parse_device(config.device)
    if config.cfg is None or config.data is None:
        raise Fault("--cfg and --data are needed: a model YAML with choices, and the YAML of a data set")

    # The data, in three parts: training images for the weights, others for alphas and judging, validation to report.
    data = read_data_spec(config.data)
    train_split, val_split = read_labelled(data, "train"), read_labelled(data, "val")
    weight_samples, judge_samples = split_train(train_split.samples)
    say(
        f"{config.data}: {len(weight_samples)} images train the weights, {len(judge_samples)} move alphas and judge, "
        f"{len(val_split.samples)} only report"
    )
    for note in (*train_split.notes, *val_split.notes):
        say(f"note: {note}")

    # The space and what its subnets cost. A budget that cannot be met ends here, before anything is trained.
    spec = describe(config, data, None, train_split.samples, say)
    torch.manual_seed(config.seed)  # first weights
    supernet = Supernet(spec, config.supernet)
    check_imgsz(config.imgsz, supernet.network.max_stride)
    space = SearchSpace.of(supernet.spec)
    tables = cost_tables(resolve(supernet.spec), config.imgsz)
    check_budgets(budgets, tables)
    say(f"{spec.path}: {space.size:,} subnets from {len(space.choices)} choices, {config.supernet} supernet")
    for metric, cost_table in tables.items():
        least, most = cost_table.extreme(largest=False)[0], cost_table.extreme(largest=True)[0]
        say(f"  {metric}: {format_cost(metric, least)} to {format_cost(metric, most)}")
    if config.weights:
        loaded, missing = warm_start(supernet.network, load_checkpoint(config.weights).state)
        say(f"{config.weights}: {len(loaded)} of {len(loaded) + len(missing)} tensors loaded")
    supernet.to(device)
    supernet.network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    check_latency(supernet, space, tables, budgets, config.imgsz, device, progress)

    folder = new_run(config.project, config.name, config.exist_ok)
    (folder / "subnets").mkdir(exist_ok=True)
    save_config(folder / "config.yaml", config)
    write_text(folder / "search.yaml", dump(supernet.spec))
    say(f"results in {folder}")

    # Train, propose, judge.
    weight_images = DetectionSet(weight_samples, config.imgsz, augmentation(config), config.seed)
    judge_images = DetectionSet(judge_samples, config.imgsz, None, config.seed)
    train_supernet(supernet, weight_images, judge_images, budgets, tables, config, folder, device, progress, say)
    proposed = propose(
        supernet, space, tables, budgets, config.candidates, np.random.default_rng((config.seed, PROPOSAL))
    )
    if not proposed:
        raise Fault(f"no subnet was found within {', '.join(map(str, budgets))} together; one of them alone can be met")
    calibration = list(calibration_images(weight_images, config.calibration, config.seed, device))
    networks = {one: supernet.derive(one.picks).eval() for one in proposed}
    costs = subnet_costs(networks, tables, budgets, config.imgsz, device, progress)
    kept = list(costs)
    found = judge(
        [networks[one] for one in kept],
        first_choice(supernet.network, [choice.name for choice in space.choices]),
        calibration,
        judge_images,
        names=data.names,
        batch_size=config.batch_size,
        device=device,
        progress=progress,
    )
    judged = [
        Judged(space.index(one), one, measured.ap, measured.ap50, costs[one])
        for one, measured in zip(kept, found, strict=True)
    ]

    # The front and its files.
    metrics = [*dict.fromkeys(budget.metric for budget in budgets)] or ["macs"]
    front = on_front(judged, metrics)
    best = max(range(len(judged)), key=lambda number: (judged[number].ap, -judged[number].costs["macs"]))
    write_front(folder / "front.csv", space, judged, front)
    draw_front(folder / "front.png", judged, front, metrics, best, budgets)
    for number, one in enumerate(judged):
        if front[number] or number == best:
            save_subnet(folder / "subnets" / f"{one.number}", networks[one.architecture], one, data.names, config.imgsz)
    winner = judged[best]
    network = networks[winner.architecture]
    save_subnet(folder / "best", network, winner, data.names, config.imgsz)
    val_images = DetectionSet(val_split.samples, config.imgsz, None, config.seed)
    reached = evaluate(
        network, val_images, names=data.names, batch_size=config.batch_size, device=device, progress=progress
    )
    say(f"\nfront over AP and {', '.join(metrics)} ({len(judged)} subnets judged on {len(judge_images)} images):")
    say(front_table(judged, front))
    say(f"\nbest: subnet {winner.number}, {winner.architecture}")
    say(f"alpha alone would pick: {argmax(supernet)}")
    say(f"with inherited weights on {len(val_images)} validation images: AP {reached.ap:.3f}, AP50 {reached.ap50:.3f}")
    say(f"{folder / 'best.yaml'}\n{folder / 'best.pt'}\n{folder / 'front.csv'}\n{folder / 'front.png'}")
    say(f"{time.perf_counter() - began:.0f} s; train it on with: python train.py --weights {folder / 'best.pt'} ...")
    return SearchResult(folder, tuple(judged), tuple(front), folder / "best.pt", folder / "best.yaml", reached)


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


def train_supernet(
    supernet: Supernet,
    weight_images: DetectionSet,
    judge_images: DetectionSet,
    budgets: Sequence[Budget],
    tables: dict[str, CostTable],
    config: SearchConfig,
    folder: Path,
    device: torch.device,
    progress: bool,
    say: Callable[[str], None],
) -> None:
    """Weight steps on one part of the training images, steps of the architecture parameters on the other.

    A weight step runs one subnet, strictly fair over the options. The weights end as their moving average; the
    architecture parameters are those of the last step, never averaged.
    """
    network = supernet.network
    batch_size = min(config.batch_size, len(weight_images))
    steps_per_epoch = math.ceil(len(weight_images) / batch_size)
    total_steps = config.epochs * steps_per_epoch
    arch_from = round(config.arch_warmup * total_steps)
    arch_steps = max(0, (total_steps - arch_from)) // config.arch_every
    if arch_steps < 1:
        raise Fault(
            f"--epochs {config.epochs}: {total_steps} steps leave none for the architecture parameters, which move "
            f"every {config.arch_every} steps after {arch_from}; more epochs or a smaller batch would be right"
        )
    chosen = choose_optimizer(config.optimizer, total_steps)
    lr = config.lr0 or LEARNING_RATES[chosen]
    optimizer = make_optimizer(network, chosen, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
    arch_lr = config.arch_lr or min(max(ALPHA_REACH / arch_steps, SLOWEST_ALPHA), FASTEST_ALPHA)
    arch_optimizer = torch.optim.Adam(supernet.alphas, lr=arch_lr, betas=(0.0, 0.999))  # ProxylessNAS's betas
    ema = averaged(network, total_steps)
    warmup_steps = warmup_length(config.warmup_epochs, steps_per_epoch, total_steps)
    calm_from = config.epochs - closing_epochs(config) + 1
    priced = [budget for budget in budgets if budget.metric in tables]
    prices = Prices(lambdas=(1.0,) * len(priced))
    say(f"{chosen}, lr {lr:g}, {total_steps} weight steps; {arch_steps} steps of alpha, lr {arch_lr:.2g}")

    first = next(iter(batches(weight_images, batch_size, epoch=1, seed=config.seed, shuffle=True)))
    supernet.activate(supernet.picks(fair_options(supernet.decisions, config.seed, 0)))
    amp, reason = choose_amp(config.amp, network, first, device, total_steps)
    say(reason)
    judge_batches = endless(judge_images, batch_size, config.seed)
    history: list[dict[str, Any]] = []
    step = 0
    bar = tqdm(total=total_steps, desc="supernet", unit="step", disable=not progress, leave=False)
    for epoch in range(1, config.epochs + 1):
        network.train()
        if epoch == calm_from:
            assert weight_images.augment is not None
            weight_images.set_augment(replace(weight_images.augment, mosaic=0.0))
        for batch in batches(
            weight_images, batch_size, epoch=epoch, seed=config.seed, shuffle=True, workers=config.workers
        ):
            supernet.activate(supernet.picks(fair_options(supernet.decisions, config.seed, step)))
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor(step, total_steps, warmup_steps, config.lrf)
            with autocast(device, amp):
                outputs, _ = network(pixels(batch, device))
            loss, parts = network.loss_from(outputs, batch.targets.to(device))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise no_number("loss", {"loss": loss, **parts}, epoch, step, folder / "best.pt")
            (loss * (NOMINAL_BATCH if chosen == "SGD" else 1)).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)  # weights that a step does not sample must not move by momentum
            ema.update_parameters(network)
            step += 1
            if step > arch_from and (step - arch_from) % config.arch_every == 0:
                held_out = next(judge_batches)
                rng = np.random.default_rng((config.seed, ARCHITECTURE, step))
                decided = drawn_options(supernet.decisions, supernet.probabilities(), rng)
                with autocast(device, amp):
                    held_value, prices = architecture_step(
                        supernet,
                        arch_optimizer,
                        pixels(held_out, device),
                        held_out.targets.to(device),
                        decided,
                        prices,
                        budgets=priced,
                        tables=tables,
                        progress=step / total_steps,
                    )
                bar.set_postfix(loss=f"{value:.3g}", held_out=f"{held_value:.3g}", lr=f"{group['lr']:.2g}")
            bar.update()
        history += alpha_rows(supernet, step)
        write_csv(folder / "alphas.csv", history)
    bar.close()
    network.load_state_dict(ema.module.state_dict())


def endless(images: DetectionSet, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches for ever, in a fresh order every time round."""
    epoch = 0
    while True:
        epoch += 1
        yield from batches(images, min(batch_size, len(images)), epoch=epoch, seed=seed, shuffle=True)


def alpha_rows(supernet: Supernet, step: int) -> list[dict[str, Any]]:
    """A row for every option of every decision: its alpha and probability after `step` steps."""
    return [
        {"step": step, "choice": decision.name, "option": option, "alpha": float(alpha), "probability": float(p)}
        for decision, alphas in zip(supernet.decisions, supernet.alphas, strict=True)
        for option, alpha, p in zip(decision.options, alphas.detach(), alphas.detach().softmax(dim=0), strict=True)
    ]


def check_latency(
    supernet: Supernet,
    space: SearchSpace,
    tables: dict[str, CostTable],
    budgets: Sequence[Budget],
    imgsz: int,
    device: torch.device,
    progress: bool,
) -> None:
    """Raises a Fault for a latency that not even the subnets of fewest multiply-adds reach, before anything is trained.

    Options that MACs do not tell apart, such as activations, are tried in turn, all choices alike.
    """
    limits = [budget for budget in budgets if budget.metric == "latency_ms"]
    if not limits:
        return
    least, cheapest = tables["macs"].extreme(largest=False)
    variants = {cheapest: None}
    for turn in range(max(len(choice.options) for choice in space.choices)):
        picks = dict(cheapest.picks)
        for choice in space.choices:
            swapped = {**picks, choice.name: choice.options[turn % len(choice.options)]}
            picks = swapped if tables["macs"].of(Architecture(swapped)) == least else picks
        variants[Architecture(picks)] = None
    networks = [supernet.derive(one.picks) for one in variants]
    smallest = min(measure_ms(networks, imgsz, device=device, progress=progress))
    for budget in limits:
        if smallest > budget.limit:
            raise Fault(
                f"--budget {budget}: no subnet can meet it on this device; the smallest latency, of those with the "
                f"fewest multiply-adds, is latency_ms={smallest:.3f}"
            )


def subnet_costs(
    networks: dict[Architecture, Network],
    tables: dict[str, CostTable],
    budgets: Sequence[Budget],
    imgsz: int,
    device: torch.device,
    progress: bool,
) -> dict[Architecture, dict[str, float]]:
    """What the proposed subnets cost: counted, and measured on this device; only those within every budget."""
    measured = measure_ms(list(networks.values()), imgsz, device=device, progress=progress)
    costs = {
        one: {metric: table.of(one) for metric, table in tables.items()} | {"latency_ms": latency}
        for one, latency in zip(networks, measured, strict=True)
    }
    kept = {one: found for one, found in costs.items() if within(found, budgets)}
    if not kept:
        least = min(found["latency_ms"] for found in costs.values())
        limit = next(budget for budget in budgets if budget.metric == "latency_ms")
        raise Fault(
            f"--budget {limit}: none of {len(costs)} subnets measured on this device meets it, the cheapest one "
            f"included; the smallest latency was latency_ms={least:.3f}"
        )
    return kept


def save_subnet(path: Path, network: Network, judged: Judged, names: Sequence[str], imgsz: int) -> None:
    """``path.yaml`` and ``path.pt``: a plain model file and checkpoint, for train.py, val.py and detect.py alike."""
    costs = ", ".join(f"{metric} {format_cost(metric, value)}" for metric, value in judged.costs.items())
    comment = f"subnet {judged.number}: {judged.architecture}\njudged AP {judged.ap:.4f}, {costs} at {imgsz} px"
    write_text(path.with_suffix(".yaml"), dump(network.spec, comment))
    picks = {name: list(pick) if isinstance(pick, tuple) else pick for name, pick in judged.architecture.picks.items()}
    save_checkpoint(path.with_suffix(".pt"), network, names, imgsz=imgsz, subnet=judged.number, picks=picks)


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Trains a supernet of a YAML's open choices and derives its best subnets within a budget.")
    add_options(parser, SearchConfig)
    search(checked(SearchConfig, vars(parse_options(parser, argv)), "--"))
    return 0
