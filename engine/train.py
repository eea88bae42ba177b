"""Training, from a config to ``best.pt``. `train` reads downwards and is the whole story.

A run is exact: whatever is drawn by chance comes from (seed, epoch), so a run that was killed and resumed ends with
the same weights as one that was not, on the same device with the same number of threads. Under ``torchrun`` it is the
same story in every process: all hold the same weights, each sees its share of the images, and the first one writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.augment import Augment
from data.config import DataSpec, read_data_spec
from data.dataset import DetectionSet
from data.images import image_size
from data.loader import batches
from data.readers import Split, read_split
from data.structures import Batch, Fault, Sample
from engine.calibrate import calibrate
from engine.config import RunConfig, TrainConfig, add_options, read_options, reopen, save_config, train_config
from engine.distributed import (
    average_gradients,
    average_numbers,
    broadcast,
    check_shares,
    finish,
    gather_objects,
    moved,
    start,
    surroundings,
    together,
)
from engine.doors import door, option_parser, parse_options
from engine.draw import grid, write_image
from engine.evaluate import Metrics, calibration_images, check_imgsz, check_names, evaluate, pixels
from engine.optim import (
    LEARNING_RATES,
    SHORT_RUN,
    averaged,
    choose_optimizer,
    lr_factor,
    make_optimizer,
    warmup_length,
)
from engine.runs import append_csv, draw_curves, new_run, read_csv, remove_leftovers, write_csv, write_text
from models.anchors import best_possible_recall, fit_anchors, needs_anchors, with_anchors
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, warm_start
from models.graph import load_graph
from models.network import Network, build
from models.parse import dump
from models.spec import ModelSpec

CALIBRATED_RUN = 5_000  # steps; in a shorter run the running averages of batch norm lag behind the weights
CALIBRATION_IMAGES = 256
NOMINAL_BATCH = 64  # images whose summed loss SGD's learning rates are made for, as in yolov5; AdamW has no scale
LARGE_SET = 2_000  # training images; smaller sets step after every batch
MEASURED_RUN = 200  # steps; under that, measuring costs more than bf16 could save
WORTH_IT = 1.2  # how much faster bf16 must be on a CPU
ANCHORS = 3  # purpose of a random stream, beside those of data.dataset
EVALUATIONS = 10  # of a short run, at most
CHECKED_STEPS = 3  # in which several processes compare which weights have gradients
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, its checkpoints, and what `best` measured on the validation split."""

    folder: Path
    best: Path
    last: Path
    metrics: Metrics


def train(config: TrainConfig, progress: bool = True) -> TrainResult:
    """Train as ``config`` says and return where everything lies. ``progress`` prints, and shows bars.

    Raises a Fault for input that cannot be trained on, and where the loss stops being a number.
    """
    resumed, folder = None, None
    if config.resume is not None:
        config, folder, resumed = reopen_training(config)
    world = start(config.device)
    device, progress = world.device, progress and world.is_first
    say: Callable[[str], None] = print if progress else lambda line: None

    with together(world):
        # The data, the network's description, the network.
        if config.data is None:
            raise Fault("--data is missing: the YAML of a data set, such as cfg/data/shapes.yaml, would be right")
        data = read_data_spec(config.data)
        train_split, val_split = read_labelled(data, "train"), read_labelled(data, "val")
        say(f"{config.data}: {len(train_split.samples)} images to train on, {len(val_split.samples)} to validate on")
        for note in (*train_split.notes, *val_split.notes):
            say(f"note: {note}")
        origin = load_checkpoint(config.weights) if config.weights and not resumed else None
        spec = resumed.spec if resumed else describe(config, data, origin, train_split.samples, say)
        torch.manual_seed(config.seed)  # first weights
        network = build(spec)
        check_imgsz(config.imgsz, network.max_stride)
        if origin:
            loaded, missing = warm_start(network, origin.state)
            without = f", missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}" if missing else ""
            say(f"{config.weights}: {len(loaded)} of {len(loaded) + len(missing)} tensors loaded{without}")
        network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        say(f"{spec.name}: {sum(p.numel() for p in network.parameters()):,} parameters, on {world}")

        # The images. The last epochs see no mosaics: those are not what the network will meet.
        augment = augmentation(config)
        calm = replace(augment, mosaic=0.0)
        images = DetectionSet(train_split.samples, config.imgsz, augment, config.seed, config.cache)
        val_images = DetectionSet(val_split.samples, config.imgsz, None, config.seed, config.cache)
        calm_from = config.epochs - closing_epochs(config) + 1

        # How many steps, and how weights move in them.
        batch_size = min(config.batch_size, len(images))
        check_shares(batch_size, world)
        share = partial(
            batches, images, batch_size, seed=config.seed, shuffle=True, rank=world.rank, world_size=world.size
        )
        batches_per_epoch = len(share(epoch=1))
        accumulate = max(1, round(NOMINAL_BATCH / batch_size)) if len(images) >= LARGE_SET else 1
        steps_per_epoch = math.ceil(batches_per_epoch / accumulate)
        total_steps = config.epochs * steps_per_epoch
        warmup_steps = warmup_length(config.warmup_epochs, steps_per_epoch, total_steps)
        chosen = choose_optimizer(config.optimizer, total_steps)
        lr = config.lr0 or LEARNING_RATES[chosen]
        say(
            f"{chosen}, lr {lr:g}, {total_steps} steps of {batch_size * accumulate} images"
            f" ({warmup_steps} to warm up), {config.epochs} epochs"
        )
        optimizer = make_optimizer(network, chosen, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay)
        ema = averaged(network, total_steps)
        average = ema.module
        assert isinstance(average, Network)

        # A new run gets a folder; a resumed one goes on where its last.pt was written.
        epoch, best, state, amp = 0, Best(), None, ""
        if resumed and folder:
            state = resumed.training
            assert state is not None  # reopen() saw to it
            check_names(resumed.path, resumed.names, config.data, data.names)
            check_same_data(state, len(images), config)
            for note in moved(state, world):
                say(f"note: {note}")
            network.load_state_dict(state["network"])
            average.load_state_dict(resumed.state)
            ema.n_averaged.fill_(state["updates"])
            optimizer.load_state_dict(state["optimizer"])
            epoch, best, amp = state["epoch"], Best.restore(state["best"]), state["amp"]
            if world.is_first:
                write_csv(folder / "results.csv", read_csv(folder / "results.csv")[:epoch])  # a killed run may be ahead
                remove_leftovers(folder)
            say(f"{folder}: goes on after epoch {epoch} of {config.epochs}")
        elif world.is_first:
            first = next(iter(share(epoch=1)))
            amp, reason = choose_amp(config.amp, network, first, device, total_steps)
            say(reason)
            folder = new_run(config.project, config.name, config.exist_ok)
            for name in ("best.pt", "last.pt", "results.csv"):  # of the run before, where --exist-ok took its folder
                (folder / name).unlink(missing_ok=True)
            save_config(folder / "config.yaml", config)
            write_text(folder / "model.yaml", dump(spec))
            write_image(folder / "train_batch0.jpg", grid(first.images, first.targets, data.names))
            say(f"results in {folder}")

    # From here on all processes go in step, from the weights of the first.
    place, amp = gather_objects([str(folder), amp], world)[0]
    folder = Path(place)
    broadcast(network, world)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if state and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    best_path, last_path = folder / "best.pt", folder / "last.pt"

    # The loop.
    interval = evaluation_interval(config, total_steps)
    try:
        while epoch < config.epochs:
            epoch += 1
            began = time.perf_counter()
            torch.manual_seed(config.seed + epoch)  # what a dropout draws
            network.train()
            images.set_augment(augment if epoch < calm_from else calm)
            loader = share(epoch=epoch, workers=config.workers)
            bar = tqdm(loader, f"epoch {epoch}/{config.epochs}", unit="batch", disable=not progress, leave=False)
            sums: dict[str, float] = {}
            for number, batch in enumerate(bar, 1):
                step = (epoch - 1) * steps_per_epoch + (number - 1) // accumulate
                lr_now = lr * lr_factor(step, total_steps, warmup_steps, config.lrf)
                for group in optimizer.param_groups:
                    group["lr"] = lr_now
                with autocast(device, amp):
                    outputs, _ = network(pixels(batch, device))
                loss, parts = network.loss_from(outputs, batch.targets.to(device))
                values = {name: float(value) for name, value in {"loss": loss.detach(), **parts}.items()}
                for name, value in average_numbers(values, world).items():
                    sums[name] = sums.get(name, 0.0) + value
                means = {name: value / number for name, value in sums.items()}
                if not math.isfinite(sums["loss"]):
                    with together(world):
                        raise no_number("loss", values, epoch, step, last_path)
                # Of this loss among those of its step: the shares of the processes are averaged, not summed.
                weight = len(batch.images) * world.size / batch_size / accumulate
                scaler.scale(loss * weight * (NOMINAL_BATCH if chosen == "SGD" else 1)).backward()
                if number % accumulate == 0 or number == batches_per_epoch:
                    average_gradients(network, world, check=step < CHECKED_STEPS)
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(network.parameters(), 10.0)
                    if not scaler.is_enabled() and not torch.isfinite(norm):  # a scaler skips such a step by itself
                        with together(world):
                            raise no_number("gradient", {"norm": float(norm), **values}, epoch, step, last_path)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    ema.update_parameters(network)
                bar.set_postfix({**{k: f"{v:.3g}" for k, v in means.items()}, "lr": f"{lr_now:.2g}"}, refresh=False)

            if not world.is_first:
                continue  # the first judges and writes; the others wait for it at the next gradients
            metrics: Metrics | None = None
            if epoch % interval == 0 or epoch == config.epochs:
                candidate = deepcopy(average).eval()
                if total_steps < CALIBRATED_RUN:
                    calibrate(candidate, calibration_images(images, CALIBRATION_IMAGES, config.seed, device))
                metrics = evaluate(
                    candidate,
                    val_images,
                    names=data.names,
                    batch_size=batch_size,
                    device=device,
                    workers=config.workers,
                    progress=progress,
                )
                if fitness(metrics) >= best.fitness:
                    best = Best(fitness(metrics), epoch, metrics)
                    save_checkpoint(best_path, candidate, data.names, imgsz=config.imgsz, epoch=epoch, ap=metrics.ap)

            seconds = time.perf_counter() - began
            row = {"epoch": epoch, "step": step + 1, "lr": lr_now, **means, **scores(metrics), "seconds": seconds}
            append_csv(folder / "results.csv", row)  # before last.pt: a resumed run drops rows that are ahead of it
            training = {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "updates": int(ema.n_averaged),
                "epoch": epoch,
                "best": asdict(best),
                "amp": amp,
                "images": len(images),
                **surroundings(world),
            }
            save_checkpoint(last_path, average, data.names, imgsz=config.imgsz, training=training)
            say(epoch_line(row, config.epochs, heading=epoch == 1))
    except KeyboardInterrupt:
        if not last_path.exists():
            raise
        raise KeyboardInterrupt(f"stopped; goes on with: python train.py --resume {folder}") from None

    best = Best.restore(gather_objects(asdict(best), world)[0])
    assert best.metrics is not None  # the last epoch is always evaluated
    if world.is_first:
        rows = read_csv(folder / "results.csv")
        draw_curves(folder / "results.png", rows, [["loss", *parts], ["ap", "ap50", "ar100"], ["lr"]])
    say(f"\n{best.metrics.table()}\n\nbest (epoch {best.epoch}): {best_path}\nlast: {last_path}")
    return TrainResult(folder, best_path, last_path, best.metrics)


# ---- what the story calls, in its order ----


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    fitness: float = -1.0
    epoch: int = 0
    metrics: Metrics | None = None

    @staticmethod
    def restore(state: Mapping[str, Any]) -> Best:
        """The inverse of `dataclasses.asdict`."""
        metrics = state["metrics"]
        return Best(state["fitness"], state["epoch"], metrics and Metrics(**metrics))


def reopen_training(config: TrainConfig) -> tuple[TrainConfig, Path, Checkpoint]:
    """`reopen`, and a Fault where the run has nothing left to do."""
    assert config.resume is not None
    stored, folder, checkpoint = reopen(config, config.resume, "train.py")
    assert checkpoint.training is not None
    if checkpoint.training["epoch"] >= stored.epochs:
        last = folder / "last.pt"
        raise Fault(f"{folder}: all {stored.epochs} epochs are done; to train on, start anew with --weights {last}")
    return stored, folder, checkpoint


def read_labelled(data: DataSpec, split: str) -> Split:
    """The split; a Fault where it has no image or no box, which nothing can be learned or measured on."""
    found = read_split(data, split)
    if not any(len(sample.labels) for sample in found.samples):
        raise Fault(f"{data.path}: {split} has {len(found.samples)} images and no box in them")
    return found


def describe(
    config: RunConfig,
    data: DataSpec,
    start: Checkpoint | None,
    samples: Sequence[Sample],
    say: Callable[[str], None],
) -> ModelSpec:
    """The model to train: of ``--cfg``, else of the checkpoint; with the data set's classes and fitted anchors."""
    if config.cfg is None and start is None:
        raise Fault("--cfg is missing: a model YAML, or --weights with a checkpoint, would be right")
    if config.cfg:
        graph = load_graph(config.cfg, config.dialect, config.trust_ops)
        spec = graph.spec
        for note in graph.notes:
            say(f"note: {note}")
    else:
        spec = start.spec  # type: ignore[union-attr]
    if spec.num_classes != len(data.names):
        say(f"{spec.path}: nc {spec.num_classes} becomes {len(data.names)}, the classes of {data.path}")
        spec = replace(spec, num_classes=len(data.names))
    if needs_anchors(spec):
        levels, per_level = len(spec.layers[-1].sources), spec.anchors
        assert isinstance(per_level, int)
        sizes = box_sizes(samples, config.imgsz)
        anchors = fit_anchors(sizes, levels, per_level, np.random.default_rng((config.seed, ANCHORS)))
        reached = best_possible_recall(sizes, anchors)
        shown = " | ".join(" ".join(f"{value:g}" for value in level) for level in anchors)
        say(f"anchors fitted to {len(sizes)} boxes, {reached:.1%} within reach: {shown}")
        spec = with_anchors(spec, anchors)
    return spec


def box_sizes(samples: Sequence[Sample], imgsz: int) -> np.ndarray:
    """Width and height ``[M, 2]`` of every box, in pixels of the network's input."""
    scaled = [
        (sample.boxes[:, 2:] - sample.boxes[:, :2]) * (imgsz / max(image_size(sample.path)))
        for sample in tqdm(samples, "measuring boxes", unit="image", delay=2, leave=False)
        if len(sample.boxes)
    ]
    return np.concatenate(scaled)


def closing_epochs(config: RunConfig) -> int:
    """The last epochs without mosaic: as asked, or a tenth of the run, 1 to 10; none where one epoch is all."""
    if config.close_mosaic is not None:
        return config.close_mosaic
    return min(max(config.epochs // 10, 1), 10, config.epochs - 1)


def augmentation(config: RunConfig) -> Augment:
    hsv = (config.hsv_h, config.hsv_s, config.hsv_v)
    return Augment(
        mosaic=config.mosaic,
        scale=config.scale,
        translate=config.translate,
        degrees=config.degrees,
        hsv=hsv,
        flip_lr=config.fliplr,
        flip_ud=config.flipud,
    )


def check_same_data(state: Mapping[str, Any], images: int, config: TrainConfig) -> None:
    if state["images"] != images:
        raise Fault(
            f"{config.data}: {images} images to train on, but the run began with {state['images']};"
            " give it those, or start anew with --weights"
        )


def choose_amp(wanted: str, network: Network, batch: Batch, device: torch.device, total_steps: int) -> tuple[str, str]:
    """``off``, ``bf16`` or ``fp16``, and the reason in one line.

    ``auto`` takes bf16 on a GPU that has it, fp16 on another. On a CPU it measures three steps of each on a copy and
    takes bf16 where that is 1.2 times faster; a run under 200 steps is not measured.
    """
    if wanted != "auto":
        return wanted, f"amp {wanted}, as asked"
    if device.type == "cuda":
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return chosen, f"amp {chosen}, the best of this GPU"
    if total_steps < MEASURED_RUN:
        return "off", "amp off: the run is too short to measure whether bf16 pays"
    plain = seconds_a_step(network, batch, device, "off", math.inf)
    mixed = seconds_a_step(network, batch, device, "bf16", plain)
    chosen = "bf16" if plain >= WORTH_IT * mixed else "off"
    return chosen, f"amp {chosen}: a step takes {plain:.3f} s in float32, {mixed:.3f} s in bf16"


def seconds_a_step(network: Network, batch: Batch, device: torch.device, amp: str, rival: float) -> float:
    """The fastest of three steps on a copy of the network; of one, where it takes three times the rival's."""
    copy, fastest = deepcopy(network).train(), math.inf
    for _ in range(3):
        began = time.perf_counter()
        with autocast(device, amp):
            outputs, _aux = copy(pixels(batch, device))
        copy.loss_from(outputs, batch.targets.to(device))[0].backward()
        fastest = min(fastest, time.perf_counter() - began)
        if fastest > 3 * rival:
            break
    return fastest


def evaluation_interval(config: TrainConfig, total_steps: int) -> int:
    """Epochs between evaluations. The last epoch is evaluated in any case."""
    if config.noval:
        return config.epochs
    fewest = math.ceil(config.epochs / EVALUATIONS) if total_steps < SHORT_RUN else 1
    return max(config.val_interval, fewest)


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES.get(amp), enabled=amp in DTYPES)


def no_number(what: str, values: Mapping[str, float], epoch: int, step: int, last: Path) -> Fault:
    """The fault of a training that broke down: where it was, and what remains of it."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    kept = f"{last} holds epoch {epoch - 1}" if last.exists() else "nothing is saved"
    return Fault(
        f"epoch {epoch}, step {step + 1}: the {what} is not a finite number ({shown}); {kept};"
        " a smaller --lr0 or --amp off may be right"
    )


def fitness(metrics: Metrics) -> float:
    """What ``best.pt`` is best in: ``0.9 AP + 0.1 AP50``, as in yolov5."""
    return 0.9 * metrics.ap + 0.1 * metrics.ap50


def scores(metrics: Metrics | None) -> dict[str, float | None]:
    """The columns of results.csv that an evaluation fills."""
    return {name: getattr(metrics, name, None) for name in ("ap", "ap50", "ap75", "ar100")}


def epoch_line(row: Mapping[str, Any], epochs: int, heading: bool) -> str:
    """A line of the table that grows on the screen; with its header before the first."""
    shown = {"epoch": f"{row['epoch']}/{epochs}"}
    for name, value in row.items():
        if name not in ("epoch", "step"):
            shown[name] = "-" if value is None else f"{value:.2e}" if name == "lr" else f"{value:.4g}"
    line = " ".join(f"{value:>9}" for value in shown.values())
    return " ".join(f"{name:>9}" for name in shown) + "\n" + line if heading else line


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Trains a detector from its YAML, or from a checkpoint, on a labelled data set.")
    add_options(parser)
    parser.add_argument("--hyp", metavar="PATH", help="YAML of options; those on the command line win over it")
    given = vars(parse_options(parser, argv))
    file = given.pop("hyp")
    train(train_config({**(read_options(file) if file else {}), **given}, "--"))
    finish()
    return 0
