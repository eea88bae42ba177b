"""The training of a supernet: weights and architecture parameters in turn. `train_supernet` reads downwards.

Exact, like `engine.train`: what is drawn follows from (seed, step, purpose) and never from what was drawn before. So
the queues of fair sampling, the images of an architecture step and its path need no memory, a killed search goes on
bit for bit, and several processes agree on every subnet without a word.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import ImageSet
from data.loader import Batches, batch_at, batches
from data.structures import Fault
from engine import config as options
from engine.distributed import (
    World,
    average,
    broadcast,
    check_shares,
    gather_objects,
    moved,
    surroundings,
    together,
)
from engine.evaluate import pixels
from engine.measure import choose_amp
from engine.optim import (
    LEARNING_RATES,
    NOMINAL_BATCH,
    averaged,
    choose_optimizer,
    lr_factor,
    make_optimizer,
    set_rates,
    warmup_length,
)
from engine.prepare import closing_epochs, file_hash, images_hash, load_teacher, set_loss
from engine.runs import remove_leftovers, write_csv
from engine.step import (
    CHECKED_STEPS,
    Moment,
    Mover,
    add_gradients,
    autocast,
    drawn_size,
    move_weights,
    no_number,
)
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.network import Network
from models.supernet import Supernet
from search import tango
from search.config import SearchConfig
from search.costs import Budget, CostTable
from search.objective import ENTROPY, Prices, architecture_step
from search.sampling import (
    drawn_options,
    fair_options,
    gumbel_noise,
    mixing_epochs,
    relaxed,
    sandwich_options,
    temperature,
)
from search.sandwich import add_sandwich, sizes, teaching_note
from search.space import SearchSpace

ARCHITECTURE, MIXTURE = 11, 15  # purposes of random streams: paths of architecture steps, noise of weight steps
ALPHA_REACH = 1.5  # how far an alpha may walk over a whole search with steps of one sign
RATES = {**LEARNING_RATES, "Adam": 0.005, "AdamW": 0.005}  # of a supernet, each of whose weights moves in some steps
SLOWEST_ALPHA, FASTEST_ALPHA = 1e-3, 5e-2  # bounds of its learning rate; the lower one is ProxylessNAS's


def train_supernet(
    supernet: Supernet,
    weight_images: ImageSet,
    judge_images: ImageSet,
    budgets: Sequence[Budget],
    tables: Mapping[str, CostTable],
    config: SearchConfig,
    folder: Path,
    world: World,
    progress: bool,
    say: Callable[[str], None],
    names: Sequence[str] = (),
) -> None:
    """Weight steps on one part of the training images, steps of the architecture parameters on the other.

    A weight step runs one subnet, strictly fair over the options, or three with ``config.sandwich``. A ``merge``
    supernet runs all of them as one mixture, whose gates get colder, up to the last fifth of the epochs. The weights
    end as their moving average; the architecture parameters are those of the last step, never averaged. Where
    ``config.resume`` is set, it goes on from the ``last.pt`` in `folder`, which is written after every epoch together
    with ``results.csv`` and ``alphas.csv``.
    `names` of the classes are for that checkpoint.

    Raises a Fault where no step is left for the architecture parameters, where the search to go on with began with
    something else than this, and where the loss stops being a number.
    """
    if config.tango:
        config = tango.settings(config)
    network, device = supernet.network, world.device
    last_path = folder / "last.pt"

    # How many steps. An architecture step comes before every `arch_every`-th weight step, once the warm-up is over.
    batch_size = min(config.batch_size, len(weight_images))
    judge_size = min(config.batch_size, len(judge_images)) // world.size * world.size
    check_shares(min(batch_size, judge_size), world)
    share = weight_batches(weight_images, config, world)
    total_steps, arch_from, arch_steps = lengths(weight_images, config, world)

    # How weights and architecture parameters move in them.
    chosen = choose_optimizer(config.optimizer, total_steps)
    lr = config.lr0 or RATES[chosen]
    warmup_steps = warmup_length(config.warmup_epochs, total_steps // config.epochs, total_steps)
    optimizer = make_optimizer(
        network,
        chosen,
        lr=lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        biases_apart=config.warmup_bias_lr is not None,
    )
    arch_lr = config.arch_lr or min(max(ALPHA_REACH / arch_steps, SLOWEST_ALPHA), FASTEST_ALPHA)
    arch_optimizer = torch.optim.Adam(supernet.alphas, lr=arch_lr, betas=(0.0, 0.999))  # ProxylessNAS's betas
    priced = [] if config.tango else [budget for budget in budgets if budget.metric in tables]
    prices = Prices(lambdas=(1.0,) * len(priced))
    if config.tango:
        tango.initial_alphas(supernet, config.seed)
    ema = averaged(network, total_steps)
    average_network = ema.module
    assert isinstance(average_network, Network) and weight_images.augment is not None
    augment = weight_images.augment
    calm = replace(augment, mosaic=0.0, mixup=0.0)
    calm_from = config.epochs - closing_epochs(config) + 1
    mixing = mixing_epochs(config.epochs) if config.supernet == "merge" else 0
    mixing_steps = mixing * (total_steps // config.epochs)
    largest, smallest = sizes(tables["macs"]) if config.sandwich else ({}, {})
    if config.sandwich:
        say(teaching_note(network))
    if mixing:
        say(f"mixtures in the first {mixing} of {config.epochs} epochs, one subnet a step in the others")
    say(f"{chosen}, lr {lr:g}, {total_steps} weight steps; {arch_steps} steps of alpha, lr {arch_lr:.2g}")

    # A new search begins at epoch 1; a resumed one goes on from its last.pt.
    epoch, step, state, amp = 0, 0, None, ""
    history: dict[str, list[dict[str, Any]]] = {"results": [], "alphas": []}
    begun_with = {
        "space": SearchSpace.of(supernet.spec).hash,
        "costs": costs_hash(tables),
        "weight_images": images_hash(weight_images.samples),
        "judge_images": images_hash(judge_images.samples),
        "teacher": file_hash(config.teacher),
    }
    supernet.activate(supernet.picks(fair_options(supernet.decisions, config.seed, 0)))
    with together(world):
        set_loss(network, config, weight_images.samples)
        teacher, distill = load_teacher(config, network, names, device)
        if config.resume is not None:
            checkpoint = load_checkpoint(last_path)
            state = checkpoint.training
            assert state is not None  # reopen() saw to it
            check_unchanged(last_path, state, begun_with)
            for note in moved(state, world):
                say(f"note: {note}")
            with options.restoring(last_path):
                network.load_state_dict(state["network"])
                average_network.load_state_dict(checkpoint.state)
                ema.n_averaged.fill_(state["updates"])
                optimizer.load_state_dict(state["optimizer"])
                arch_optimizer.load_state_dict(state["arch_optimizer"])
                with torch.no_grad():
                    for alpha, value in zip(supernet.alphas, state["alphas"], strict=True):
                        alpha.copy_(value)
                prices = Prices(**state["prices"])
                epoch, step, amp, history = state["epoch"], state["step"], state["amp"], state["history"]
            say(f"{folder}: goes on after epoch {epoch} of {config.epochs}")
        elif world.is_first:
            last_path.unlink(missing_ok=True)  # of the search before, where --exist-ok took its folder
            amp, reason = choose_amp(config.amp, network, next(iter(share(epoch=1))), device, total_steps)
            say(reason)
            if config.tango:
                tango.write_epoch(folder, supernet, 0)
        if world.is_first:
            remove_leftovers(folder)
    amp = gather_objects(amp, world)[0]
    broadcast(supernet, world)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if state and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    gain = NOMINAL_BATCH if chosen == "SGD" else 1
    mover = Mover(network, optimizer, ema, scaler, world, amp, gain, last_path, teacher, distill)

    # The loop.
    bar = tqdm(total=total_steps, initial=step, desc="supernet", unit="step", disable=not progress, leave=False)
    try:
        while epoch < config.epochs:
            epoch += 1
            began = time.perf_counter()
            torch.manual_seed(config.seed + epoch)  # what a dropout draws
            network.train()
            weight_images.set_augment(augment if epoch < calm_from else calm)
            mixes = epoch <= mixing
            sums: dict[str, float] = {}
            held_out: list[float] = []
            for number, batch in enumerate(share(epoch=epoch, workers=config.workers), 1):
                at = Moment(epoch, step)
                # The architecture parameters, on images that the weights never see.
                turn, wait = divmod(step - arch_from, config.arch_every)
                if turn > 0 and wait == 0:
                    judged = batch_at(
                        judge_images, judge_size, turn - 1, seed=config.seed, rank=world.rank, world_size=world.size
                    )
                    rng = np.random.default_rng((config.seed, ARCHITECTURE, step))
                    drawn = drawn_options(supernet.decisions, supernet.probabilities(), rng)
                    mixture = mixed_gates(supernet, supernet.alphas, rng, step / mixing_steps) if mixes else None
                    with autocast(device, amp if amp == "bf16" else "off"):  # without a scaler fp16 underflows
                        value, prices = architecture_step(
                            supernet,
                            arch_optimizer,
                            pixels(judged, device),
                            judged.targets.to(device),
                            drawn,
                            prices,
                            budgets=priced,
                            tables=tables,
                            progress=step / total_steps,
                            entropy=0.0 if config.tango else ENTROPY,
                            form=config.objective,
                            paths=config.gates,
                            rng=rng,
                            mixture=mixture,
                            reduce=partial(average, world=world),
                        )
                    if not math.isfinite(value):
                        with together(world):
                            raise no_number("held-out loss", {"loss": value}, at, last_path)
                    held_out.append(value)

                # The weights of one subnet, of three, or of the mixture of all.
                lr_now = lr * lr_factor(step, total_steps, warmup_steps, config.lrf, config.cos_lr)
                set_rates(optimizer, lr_now, step, warmup_steps, config)
                size = drawn_size(config.imgsz, network.max_stride, config.seed, step) if config.multi_scale else None
                # Of this loss in the step: the shares of the processes are averaged, not summed.
                part = len(batch.images) * world.size / batch_size
                if config.sandwich:
                    three = sandwich_options(supernet.decisions, largest, smallest, config.seed, step)
                    values = add_sandwich(mover, supernet, three, batch, at, part=part, imgsz=size)
                elif mixes:
                    rng = np.random.default_rng((config.seed, MIXTURE, step))
                    alphas = [alpha.detach() for alpha in supernet.alphas]
                    with supernet.mixed(mixed_gates(supernet, alphas, rng, step / mixing_steps)):
                        values = add_gradients(mover, batch, at, part=part, imgsz=size)
                else:
                    if config.tango:
                        decided = tango.sample(supernet, config.seed, step)
                    else:
                        decided = fair_options(supernet.decisions, config.seed, step)
                    supernet.activate(supernet.picks(decided))
                    values = add_gradients(mover, batch, at, part=part, imgsz=size)
                move_weights(mover, at, values, check=number <= CHECKED_STEPS)
                sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
                means = {name: value / number for name, value in sums.items()}
                step += 1
                bar.set_postfix({"epoch": epoch, **{k: f"{v:.3g}" for k, v in means.items()}}, refresh=False)
                bar.update()

            if not world.is_first:
                continue  # the first writes; the others wait for it at the next gradients
            row = {
                "epoch": epoch,
                "step": step,
                **means,
                "held_out": sum(held_out) / len(held_out) if held_out else None,
            }
            row |= {"lr": lr_now, "seconds": time.perf_counter() - began, **lambdas(priced, prices)}
            history["results"].append(row)
            history["alphas"] += alpha_rows(supernet, step)
            for name, rows in history.items():
                write_csv(folder / f"{name}.csv", rows)
            if config.tango:
                tango.write_epoch(folder, supernet, epoch)
            training = {
                "network": network.state_dict(),
                "alphas": [alpha.detach().clone() for alpha in supernet.alphas],
                "optimizer": optimizer.state_dict(),
                "arch_optimizer": arch_optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "updates": int(ema.n_averaged),
                "prices": asdict(prices),
                "epoch": epoch,
                "step": step,
                "history": history,
                "amp": amp,
                **begun_with,
                **surroundings(world),
            }
            save_checkpoint(last_path, average_network, names, imgsz=config.imgsz, training=training)
    except KeyboardInterrupt:
        if not last_path.exists():
            raise
        raise KeyboardInterrupt(f"stopped; goes on with: python search.py --resume {folder}") from None
    finally:
        bar.close()
    network.load_state_dict(average_network.state_dict())
    broadcast(network, world)  # norms saw different images in every process


# ---- what the story calls, in its order ----


def weight_batches(images: ImageSet, config: SearchConfig, world: World) -> Callable[..., Batches]:
    """The batches of a process that the weights see, a function of the epoch."""
    size = min(config.batch_size, len(images))
    return partial(batches, images, size, seed=config.seed, shuffle=True, rank=world.rank, world_size=world.size)


def lengths(images: ImageSet, config: SearchConfig, world: World) -> tuple[int, int, int]:
    """Weight steps in all, how many of them come before the first step of alphas can, and the steps of alphas.

    Raises a Fault where there would be none of the latter, and where a process would get no image.
    """
    check_shares(min(config.batch_size, len(images)), world)
    steps_per_epoch = len(weight_batches(images, config, world)(epoch=1))
    total = config.epochs * steps_per_epoch
    before = round(config.arch_warmup * total)
    if config.tango:
        before = tango.warmup_steps(config.epochs, steps_per_epoch)
    if config.supernet == "merge" and mixing_epochs(config.epochs) < 1:
        raise Fault(
            f"--epochs {config.epochs}: a merging supernet has mixtures in all but the last fifth of its epochs, which "
            f"here is all of them; --epochs 2 or more would be right"
        )
    steps = max(0, total - 1 - before) // config.arch_every
    if steps < 1:
        raise Fault(
            f"--epochs {config.epochs}: {total} steps leave none for the architecture parameters, which move "
            f"every {config.arch_every} steps after {before}; more epochs or a smaller batch would be right"
        )
    return total, before, steps


def mixed_gates(
    supernet: Supernet, alphas: Iterable[Tensor], rng: np.random.Generator, progress: float
) -> dict[str, Tensor]:
    """The gates of a mixture by these alphas, functions of them, after a part of the steps that have mixtures."""
    return relaxed(supernet.decisions, alphas, gumbel_noise(supernet.decisions, rng), temperature(progress))


def reopen(config: SearchConfig) -> tuple[SearchConfig, Path, Checkpoint]:
    """The config, folder and last checkpoint of the search that ``config.resume`` names. A Fault if it cannot go on.

    A search whose supernet is trained goes on with what comes after that.
    """
    assert config.resume is not None
    movable = options.MOVABLE | {"storage", "trials", "timeout", "export"}
    return options.reopen(config, config.resume, "search.py", movable)


def check_supernet(config: SearchConfig) -> None:
    """Raises a Fault for options that mean nothing to the kind of supernet."""
    if config.sandwich and config.supernet != "shared":
        raise Fault(f"--supernet {config.supernet}: --sandwich is for --supernet shared; leave one of the two out")
    if config.supernet == "merge" and config.gates == "two":
        raise Fault("--gates two: a mixture has all options; leave it out, or --supernet shared would be right")


def costs_hash(tables: Mapping[str, CostTable]) -> str:
    """A short name for exactly these tables: a search that goes on must pay the prices that it began with."""
    found = hashlib.sha256()
    for metric, table in sorted(tables.items()):
        found.update(f"{metric} {table.fixed!r}".encode())
        for choices, values in table.rows:
            found.update(repr([(choice.name, choice.options) for choice in choices]).encode())
            found.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
    return found.hexdigest()[:12]


def check_unchanged(last: Path, state: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Raises a Fault with a line for whatever a search began with and does not find again."""
    meant = {
        "space": "the space of subnets is another one",
        "costs": "the cost tables are others, as on another device or with another --latency-table",
        "weight_images": "the images that train the weights, or their labels, are others",
        "judge_images": "the images that move alphas and judge, or their labels, are others",
        "teacher": "the teacher is another one",
    }
    faults = [
        f"{last}: {meant[name]} ({value}) than this search began with ({state.get(name)}); give it those, or start anew"
        for name, value in now.items()
        if state.get(name, "") != value
    ]
    if faults:
        raise Fault(*faults)


def lambdas(priced: Sequence[Budget], prices: Prices) -> dict[str, float]:
    """The columns of results.csv that say what exceeding each budget costs."""
    return {f"lambda_{budget.metric}": weight for budget, weight in zip(priced, prices.lambdas, strict=True)}


def alpha_rows(supernet: Supernet, step: int) -> list[dict[str, Any]]:
    """A row for every option of every decision: its alpha and probability after `step` steps."""
    return [
        {"step": step, "choice": decision.name, "option": option, "alpha": float(alpha), "probability": float(p)}
        for decision, alphas in zip(supernet.decisions, supernet.alphas, strict=True)
        for option, alpha, p in zip(decision.options, alphas.detach(), alphas.detach().softmax(dim=0), strict=True)
    ]
