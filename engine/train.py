"""Training, from a config to ``best.pt``. `train` reads downwards and is the whole story.

A run is exact: whatever is drawn by chance comes from (seed, epoch) or (seed, batch), so a run that was killed and
resumed ends with the same weights as one that was not, on the same device with the same number of threads. Under
``torchrun`` it is the same story in every process: all hold the same weights, each sees its share of the images, and
the first one writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.dataset import ImageSet
from data.loader import Batches, batches
from data.structures import Fault, Sample
from engine.calibrate import calibrate_by
from engine.config import (
    MOVABLE,
    MOVABLE_IN_TRAINING,
    TrainConfig,
    add_options,
    read_options,
    reopen,
    restoring,
    save_config,
    train_config,
)
from engine.distributed import (
    broadcast,
    check_shares,
    gather_objects,
    moved,
    start,
    surroundings,
    together,
)
from engine.doors import check_imgsz, check_names, door, option_parser, parse_options, printable
from engine.evaluate import calibration_images
from engine.measure import amp_of, choose_amp, find_batch_size
from engine.metrics import Metrics
from engine.optim import NOMINAL_BATCH, averaged, lr_factor, make_optimizer, set_rates
from engine.plan import (
    Plan,
    agreed,
    check_processes,
    check_rectangles,
    check_single,
    evaluation_interval,
    extended,
    make_plan,
)
from engine.prepare import (
    augmentation,
    closing_epochs,
    describe,
    file_hash,
    freeze,
    images_hash,
    load_teacher,
    read_data,
    set_loss,
    train_mode,
)
from engine.record import draw_beginning, draw_end, open_dashboard, write_dashboard, write_environment
from engine.runs import append_csv, new_run, read_csv, remove_leftovers, write_csv, write_text
from engine.step import CHECKED_STEPS, Moment, Mover, add_gradients, drawn_size, move_weights, smallest_size
from engine.tasks import Task, check_data, check_options, evaluate, task_of
from engine.unfold import with_statistics
from models.checkpoint import Checkpoint, aligned, load_checkpoint, save_checkpoint, warm_start
from models.network import Network, build
from models.parse import dump

CALIBRATED_RUN = 5_000  # steps; in a shorter run the running averages of batch norm lag behind the weights
CALIBRATION_IMAGES = 256
PATIENCE = 100  # epochs without a better result, where --patience names none
PICTURES = ("results.png", "labels.png", "train_batch*.jpg", "*_curve.png", "confusion_matrix.png", "worst.jpg")


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, its checkpoints, and what `best` measured on the validation split.

    The metrics are those of the network's task: `Metrics` of a detector, `ClassMetrics` of a classifier, `SegMetrics`
    of a segmenter.
    """

    folder: Path
    best: Path
    last: Path
    metrics: Any


def train(
    config: TrainConfig, progress: bool = True, on_epoch: Callable[[int, Any], None] | None = None
) -> TrainResult:
    """Train as ``config`` says and return where everything lies. ``progress`` prints, and shows bars.

    ``on_epoch`` is called with the epoch and its metrics after each evaluation, when all of the epoch is saved; what it
    raises ends the run. Raises a Fault for input that cannot be trained on, and where the loss stops being a number.
    """
    resumed, folder = None, None
    if config.resume is not None:
        config, folder, resumed = reopen_training(config)
    config = agreed(config)
    world = start(config.device)
    device, progress = world.device, progress and world.is_first
    say: Callable[[str], None] = print if progress else lambda line: None

    with together(world):
        check_processes(config, world)
        # The data, the network's description, the network.
        data, train_split, val_split = read_data(config)
        say(f"{config.data}: {len(train_split.samples)} images to train on, {len(val_split.samples)} to validate on")
        for note in (*train_split.notes, *val_split.notes):
            say(f"note: {printable(note)}")
        origin = load_checkpoint(config.weights) if config.weights and not resumed else None
        spec = resumed.spec if resumed else describe(config, data, origin, train_split.samples, say)
        task = task_of(spec)
        config = config if resumed else check_options(task, config)
        torch.manual_seed(config.seed)  # first weights
        network = build(spec)
        check_imgsz(config.imgsz, network.max_stride)
        check_rectangles(config, network.max_stride)
        if origin:
            origin, line = with_statistics(origin, lambda: first_images(train_split.samples, config, task))
            if line:
                say(line)
            say(warm_start_line(network, origin))
        set_loss(network, config, train_split.samples)
        frozen = freeze(network, config.freeze)
        network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = sum(p.numel() for p in network.parameters())
        say(f"{spec.name}: {weights:,} parameters, on {world}, {torch.get_num_threads()} threads")
        if frozen:
            still = sum(p.numel() for p in network.parameters() if not p.requires_grad)
            say(f"--freeze: {len(frozen)} rows with {still:,} of them stay as they are")
        teacher, distill = load_teacher(config, network, data.names, device)

        # The images. The last epochs see neither mosaics nor blends: those are not what the network will meet.
        augment = augmentation(config)
        calm = replace(augment, mosaic=0.0, mixup=0.0)
        how = (config.seed, config.cache, config.rect, task.crops)
        images = ImageSet(train_split.samples, config.imgsz, augment, *how)
        val_images = ImageSet(val_split.samples, config.imgsz, None, *how)
        calm_from = config.epochs - closing_epochs(config) + 1
        if config.batch_size == -1:
            amp = config.amp if config.amp != "auto" else amp_of(device)
            found, reason = find_batch_size(network, images, device, amp)
            config = config.model_copy(update={"batch_size": found})
            say(reason)

        # How many steps, and how weights move in them.
        batch_size = min(config.batch_size, len(images))
        check_shares(batch_size, world)
        share = partial(
            batches, images, batch_size, seed=config.seed, shuffle=True, rank=world.rank, world_size=world.size
        )
        smallest = smallest_size(config.imgsz, network.max_stride) if config.multi_scale else config.imgsz
        check_single(network, config.imgsz, share(epoch=1).lists, smallest)
        state = resumed.training if resumed else None
        plan = make_plan(config, len(images), batch_size, len(share(epoch=1)), state)
        say(str(plan))
        optimizer = make_optimizer(
            network,
            plan.optimizer,
            lr=plan.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            biases_apart=config.warmup_bias_lr is not None,
        )
        ema = averaged(network, plan.total_steps)
        average = ema.module
        assert isinstance(average, Network)
        if config.sync_bn:  # after the average was copied, which is evaluated by one process alone
            nn.SyncBatchNorm.convert_sync_batchnorm(network)

        # A new run gets a folder; a resumed one goes on where its last.pt was written.
        begun_with = {
            "images": len(images),
            "labels": images_hash(train_split.samples),
            "teacher": file_hash(config.teacher),
        }
        epoch, best, amp = 0, Best(), ""
        if resumed and folder and state:
            check_data(spec, data)
            check_names(resumed.path, resumed.names, config.data or "", data.names)
            check_unchanged(state, begun_with, config)
            for note in (*moved(state, world), *extended(state, plan, config)):
                say(f"note: {note}")
            with restoring(resumed.path):
                network.load_state_dict(state["network"])
                average.load_state_dict(resumed.state)
                ema.n_averaged.fill_(state["updates"])
                optimizer.load_state_dict(state["optimizer"])
                epoch, best, amp = state["epoch"], Best.restore(state["best"], task.metrics), state["amp"]
            if world.is_first:
                tidy(folder, epoch)
                save_config(folder / "config.yaml", config)
            say(f"{folder}: goes on after epoch {epoch} of {config.epochs}")
        elif world.is_first:
            amp, reason = choose_amp(config.amp, network, next(iter(share(epoch=1))), device, plan.total_steps)
            say(reason)
            folder = new_run(config.project, config.name, config.exist_ok)
            empty(folder)
            save_config(folder / "config.yaml", config)
            write_text(folder / "model.yaml", dump(spec))
            if not config.noplots:
                draw_beginning(folder, task, share(epoch=1), images, data.names)
            say(f"results in {folder}")
        dashboard = None
        if world.is_first and folder:
            write_environment(folder / "environment.yaml", world, epoch)
            dashboard = open_dashboard(folder, epoch)
            if dashboard is None:
                say("no TensorBoard: pip install -e '.[dashboard]' brings it")

    # From here on all processes go in step, from the weights of the first.
    place, amp = gather_objects([str(folder), amp], world)[0]
    folder = Path(place)
    broadcast(network, world)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if state and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    best_path, last_path = folder / "best.pt", folder / "last.pt"
    gain = NOMINAL_BATCH if plan.optimizer == "SGD" else 1
    mover = Mover(network, optimizer, ema, scaler, world, amp, gain, last_path, teacher, distill)

    # The loop.
    interval = evaluation_interval(config, plan.total_steps)
    patience = PATIENCE if config.patience is None else config.patience
    stopped = False
    try:
        while epoch < config.epochs and not stopped:
            epoch += 1
            began = time.perf_counter()
            torch.manual_seed(config.seed + epoch)  # what a dropout draws
            train_mode(network, frozen)
            images.set_augment(augment if epoch < calm_from else calm)
            if hasattr(network.head, "calm"):
                network.head.calm = epoch >= calm_from
            loader = share(epoch=epoch, workers=config.workers)
            means, lr_now, step = train_epoch(mover, loader, plan, config, epoch, progress)

            # The first judges and writes; the others wait for it at the next gradients, or to hear whether it stops.
            judged = epoch % interval == 0 or epoch == config.epochs
            kept = config.save_period > 0 and epoch % config.save_period == 0
            metrics: Any = None
            if world.is_first:
                candidate = ready(average, images, plan, config, device) if judged or kept else average
                if judged:
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
                        reached = {name: getattr(metrics, name) for name in task.columns[:1]}
                        save_checkpoint(best_path, candidate, data.names, imgsz=config.imgsz, epoch=epoch, **reached)
                    stopped = epoch < config.epochs and 0 < patience <= epoch - best.epoch
                if kept:
                    save_checkpoint(folder / f"epoch{epoch}.pt", candidate, data.names, imgsz=config.imgsz, epoch=epoch)

                seconds = time.perf_counter() - began
                numbers = {**means, **scores(task, metrics)}
                row = {"epoch": epoch, "step": step + 1, "lr": lr_now, **numbers, "seconds": seconds}
                append_csv(folder / "results.csv", row)  # before last.pt: a resumed run drops rows that are ahead of it
                training = {
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "chosen": plan.optimizer,
                    "scaler": scaler.state_dict(),
                    "updates": int(ema.n_averaged),
                    "epoch": epoch,
                    "epochs": config.epochs,
                    "stopped": stopped,
                    "best": asdict(best),
                    "amp": amp,
                    **begun_with,
                    **surroundings(world),
                }
                save_checkpoint(last_path, average, data.names, imgsz=config.imgsz, training=training)
                say(epoch_line(row, config.epochs, heading=epoch == 1))
                if dashboard:
                    write_dashboard(dashboard, task, row, metrics)
                if on_epoch and metrics:
                    on_epoch(epoch, metrics)
            if judged and patience:
                stopped = gather_objects(stopped, world)[0]
    except KeyboardInterrupt:
        if not last_path.exists():
            raise
        raise KeyboardInterrupt(f"stopped; goes on with: python train.py --resume {folder}") from None
    finally:
        if dashboard:
            dashboard.close()

    # What came out.
    best = Best.restore(gather_objects(asdict(best), world)[0], task.metrics)
    assert best.metrics is not None  # the last epoch is always evaluated
    if stopped:
        say(
            f"stopped after epoch {epoch} of {config.epochs}: no better {task.best_by} for {epoch - best.epoch} epochs "
            "(--patience)"
        )
    if world.is_first and not config.noplots:
        draw_end(
            folder,
            task,
            data,
            val_images,
            device,
            parts=list(means),
            batch_size=batch_size,
            workers=config.workers,
            progress=progress,
        )
    say(f"\n{best.metrics.table()}\n\nbest (epoch {best.epoch}): {best_path}\nlast: {last_path}")
    return TrainResult(folder, best_path, last_path, best.metrics)


def train_epoch(
    mover: Mover, loader: Batches, plan: Plan, config: TrainConfig, epoch: int, progress: bool
) -> tuple[dict[str, float], float, int]:
    """One pass over the images: the mean of the loss and of its parts, the last learning rate, the last step."""
    sums: dict[str, float] = {}
    bar = tqdm(loader, f"epoch {epoch}/{config.epochs}", unit="batch", disable=not progress, leave=False)
    for number, batch in enumerate(bar, 1):
        at = Moment(epoch, (epoch - 1) * plan.steps_per_epoch + (number - 1) // plan.accumulate)
        lr_now = plan.lr * lr_factor(at.step, plan.total_steps, plan.warmup_steps, config.lrf, config.cos_lr)
        set_rates(mover.optimizer, lr_now, at.step, plan.warmup_steps, config)
        size = None
        if config.multi_scale:
            place = (epoch - 1) * plan.batches_per_epoch + number - 1
            size = drawn_size(config.imgsz, mover.network.max_stride, config.seed, place)
        # Of this loss among those of its step: the shares of the processes are averaged, not summed.
        part = len(batch.images) * mover.world.size / plan.batch_size / plan.accumulate
        values = add_gradients(mover, batch, at, part=part, imgsz=size)
        if number % plan.accumulate == 0 or number == plan.batches_per_epoch:
            move_weights(mover, at, values, check=at.step < CHECKED_STEPS)
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        means = {name: value / number for name, value in sums.items()}
        bar.set_postfix({**{k: f"{v:.3g}" for k, v in means.items()}, "lr": f"{lr_now:.2g}"}, refresh=False)
    return means, lr_now, at.step


# ---- what the story calls, in its order


@dataclass(frozen=True)
class Best:
    """The best evaluation so far."""

    fitness: float = -1.0
    epoch: int = 0
    metrics: Any = None

    @staticmethod
    def restore(state: Mapping[str, Any], kind: type = Metrics) -> Best:
        """The inverse of `dataclasses.asdict`; `kind` is that of the metrics."""
        metrics = state["metrics"]
        return Best(state["fitness"], state["epoch"], metrics and kind(**metrics))


def first_images(samples: Sequence[Sample], config: TrainConfig, task: Task) -> Iterator[Tensor]:
    """Images as the first epoch sees them, ``[N, 3, H, W]``, for norms without statistics."""
    images = ImageSet(samples, config.imgsz, None, config.seed, config.cache, config.rect, task.crops)
    return calibration_images(images, CALIBRATION_IMAGES, config.seed, "cpu", augmentation(config))


def warm_start_line(network: Network, origin: Checkpoint) -> str:
    """Takes from a checkpoint what fits, and says what did not."""
    loaded, missing = warm_start(network, aligned(origin.state, network))
    without = f", missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}" if missing else ""
    return f"{origin.path}: {len(loaded)} of {len(loaded) + len(missing)} tensors loaded{without}"


def reopen_training(config: TrainConfig) -> tuple[TrainConfig, Path, Checkpoint]:
    """`reopen`, and a Fault where the run has nothing left to do."""
    assert config.resume is not None
    stored, folder, checkpoint = reopen(config, config.resume, "train.py", MOVABLE | MOVABLE_IN_TRAINING)
    state = checkpoint.training
    assert state is not None
    with restoring(checkpoint.path):
        done, best = int(state["epoch"]), int(state["best"]["epoch"])
    if state.get("stopped") and 0 < (PATIENCE if stored.patience is None else stored.patience) <= done - best:
        raise Fault(
            f"{folder}: stopped after epoch {done}, since epoch {best} none was better; "
            f"--patience {2 * (done - best)}, or 0 for ever, would go on"
        )
    if done >= stored.epochs:
        raise Fault(f"{folder}: all {done} epochs are done; --epochs {2 * done} would train on")
    return stored, folder, checkpoint


def check_unchanged(state: Mapping[str, Any], now: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises a Fault where a run does not find again what it began with."""
    if state["images"] != now["images"]:
        raise Fault(
            f"{config.data}: {now['images']} images to train on, but the run began with {state['images']};"
            " give it those, or start anew with --weights"
        )
    if state.get("labels", now["labels"]) != now["labels"]:  # of runs before there was such a hash, it is not known
        raise Fault(
            f"{config.data}: the images to train on, or their labels, are others ({now['labels']}) than the run began "
            f"with ({state['labels']}); give it those, or start anew with --weights"
        )
    if state.get("teacher", "") != now["teacher"]:
        raise Fault(
            f"{config.teacher}: another teacher ({now['teacher'] or 'none'}) than the run began with"
            f" ({state['teacher'] or 'none'}); give it that one, or start anew with --weights"
        )


def tidy(folder: Path, epoch: int) -> None:
    """Removes what a run that was killed after `epoch` had begun: rows that are ahead of ``last.pt``, half files."""
    write_csv(folder / "results.csv", read_csv(folder / "results.csv")[:epoch])
    remove_leftovers(folder)


def empty(folder: Path) -> None:
    """Removes what the run before left, where --exist-ok took its folder, and this one may not write."""
    written = ("best.pt", "last.pt", "epoch*.pt", "results.csv", "environment.yaml", "events.out.tfevents.*")
    for pattern in (*written, *PICTURES):
        for file in folder.glob(pattern):
            file.unlink()


def ready(average: Network, images: ImageSet, plan: Plan, config: TrainConfig, device: torch.device) -> Network:
    """A copy of the averaged weights to be judged and used; after a short run with norms that are calibrated.

    On images as training sees them, mosaics and all: the weights have learned behind norms of such images, and with the
    statistics of plain ones they lose up to .06 AP.
    """
    candidate = deepcopy(average).eval()
    if plan.total_steps < CALIBRATED_RUN:
        shown = calibration_images(images, CALIBRATION_IMAGES, config.seed, device, augmentation(config))
        calibrate_by(unfrozen(candidate), candidate, shown)
    return candidate


def unfrozen(network: nn.Module) -> nn.Module:
    """The modules with a weight of their own that is trained, for a calibration that leaves frozen norms alone."""
    trained = [
        module
        for module in network.modules()
        if not list(module.children()) and all(parameter.requires_grad for parameter in module.parameters())
    ]
    return nn.ModuleList(trained)


def fitness(metrics: Any) -> float:
    """What ``best.pt`` is best in."""
    return float(metrics.fitness)


def scores(task: Task, metrics: Any) -> dict[str, float | None]:
    """The columns of results.csv that an evaluation fills; empty where `metrics` is None."""
    return {name: getattr(metrics, name, None) for name in task.columns}


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
    parser = option_parser(
        "Trains a detector, a classifier or a segmenter from its YAML, or from a checkpoint, on a labelled data set."
    )
    add_options(parser)
    parser.add_argument("--hyp", metavar="PATH", help="YAML of options; those on the command line win over it")
    given = vars(parse_options(parser, argv))
    file = given.pop("hyp")
    written = read_options(file) if file else {}
    if str(written.get("trust_ops") or "false").lower() not in ("false", "off", "no", "0"):
        raise Fault(f"{file}: trust_ops is not for a file to say, which may be a stranger's; --trust-ops says it here")
    config = train_config({**written, **given}, "--")
    if config.tune:
        from engine.tune import tune

        tune(config, config.tune)
    else:
        train(config)
    return 0
