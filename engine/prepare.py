"""What a training begins with: the data, the model with its anchors, what of it is frozen, and the teacher."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.augment import Augment, letterbox_of
from data.config import BOXES, DataSpec, read_data_spec
from data.images import image_size
from data.readers import Split, read_split
from data.structures import Fault, Sample, nearest
from engine.config import RunConfig, TrainConfig, option_name
from engine.doors import check_names
from engine.evaluate import ONE_CLASS, as_one_class
from engine.segment import ALL_ALIKE, class_weights
from engine.tasks import check_data
from models.anchors import best_possible_recall, fit_anchors, needs_anchors, with_anchors
from models.checkpoint import Checkpoint, load_checkpoint, restore
from models.distill import check_teacher
from models.graph import load_graph, resolve
from models.heads.ssd import MOST_MEASURED, SSDHead
from models.network import Network, build_plain
from models.registry import OPS
from models.spec import ModelSpec

Say = Callable[[str], None]

ANCHORS = 3  # purpose of a random stream, beside those of data.dataset
ENOUGH_REACH = 0.98  # of all boxes; anchors of a file that reach fewer are fitted anew, as in yolov5
HEAD_OPTIONS = ("box", "obj", "cls", "dfl", "anchor_t", "label_smoothing")  # that a head's loss may know


# ---- data


def read_data(config: TrainConfig) -> tuple[DataSpec, Split, Split]:
    """The data set with its training and validation split, all classes as one where that is asked for."""
    if config.data is None:
        raise Fault("--data is missing: the YAML of a data set, such as cfg/data/shapes.yaml, would be right")
    data = read_data_spec(config.data)
    train_split, val_split = read_labelled(data, "train"), read_labelled(data, "val")
    if config.single_cls and data.format not in BOXES:
        what = "whole images" if data.format == "folders" else "pixels"
        raise Fault(f"--single-cls: {data.path} has nothing but the classes of {what}; leave it out")
    if config.single_cls and len(data.names) > 1:
        data = replace(data, names=ONE_CLASS)
        train_split, val_split = (
            replace(split, samples=as_one_class(split.samples)) for split in (train_split, val_split)
        )
    return data, train_split, val_split


def read_labelled(data: DataSpec, split: str) -> Split:
    """The split; a Fault where it has no image or no box, which nothing can be learned or measured on."""
    found = read_split(data, split)
    if not any(len(sample.labels) for sample in found.samples):
        what = "no box" if data.format in BOXES else "no pixel of a class"
        raise Fault(f"{data.path}: {split} has {len(found.samples)} images and {what} in them")
    return found


def augmentation(config: RunConfig) -> Augment:
    return Augment(
        mosaic=config.mosaic,
        mixup=config.mixup,
        copy_small=config.copy_small,
        scale=config.scale,
        translate=config.translate,
        degrees=config.degrees,
        hsv=(config.hsv_h, config.hsv_s, config.hsv_v),
        flip_lr=config.fliplr,
        flip_ud=config.flipud,
    )


def closing_epochs(config: RunConfig) -> int:
    """The last epochs without mosaic: as asked, or a tenth of the run, 1 to 10; none where one epoch is all."""
    if config.close_mosaic is not None:
        return config.close_mosaic
    return min(max(config.epochs // 10, 1), 10, config.epochs - 1)


# ---- the model


def describe(
    config: RunConfig,
    data: DataSpec,
    start: Checkpoint | None,
    samples: Sequence[Sample],
    say: Say,
) -> ModelSpec:
    """The model to train: of ``--cfg``, else of the checkpoint; with the data set's classes and anchors that fit."""
    if config.cfg is None and start is None:
        raise Fault("--cfg is missing: a model YAML, or --weights with a checkpoint, would be right")
    if config.cfg_scale and config.cfg is None:
        raise Fault(f"--scale {config.cfg_scale}: says which size of a model YAML; give that as --cfg, or a number")
    if config.cfg:
        graph = load_graph(config.cfg, config.dialect, config.trust_ops, config.cfg_scale)
        spec = graph.spec
        for note in graph.notes:
            say(f"note: {note}")
    else:
        spec = start.spec  # type: ignore[union-attr]
    check_data(spec, data)
    if spec.num_classes != len(data.names):
        say(f"{spec.path}: nc {spec.num_classes} becomes {len(data.names)}, the classes of {data.path}")
        spec = replace(spec, num_classes=len(data.names))
    if has_anchors(spec) and config.teacher:
        spec = with_anchors_of(config.teacher, spec, say)
    elif has_anchors(spec) and (needs_anchors(spec) or not config.noautoanchor):
        spec = anchored(spec, samples, config, say)
    recall = prior_line(spec, samples, config.imgsz)
    if recall:
        say(recall)
    return spec


def has_anchors(spec: ModelSpec) -> bool:
    """Whether the head reads any."""
    return resolve(spec).nodes[-1].arguments.get("anchors") is not None


def with_anchors_of(teacher: Path, spec: ModelSpec, say: Say) -> ModelSpec:
    """The model with the anchors of its teacher, which is compared with it anchor by anchor."""
    theirs = load_checkpoint(teacher).spec
    if not has_anchors(theirs) or theirs.anchors == spec.anchors:
        return spec
    assert isinstance(theirs.anchors, tuple)  # a checkpoint's are fitted
    say(f"anchors of the teacher, {teacher}, in place of those of {spec.path}")
    return with_anchors(spec, theirs.anchors)


def anchored(spec: ModelSpec, samples: Sequence[Sample], config: RunConfig, say: Say) -> ModelSpec:
    """The model with anchors: its own where they reach `ENOUGH_REACH` of the boxes, else such as are fitted to them.

    Those of a file stay as well where fitted ones would reach no more.
    """
    sizes = box_sizes(samples, config.imgsz)
    reach = {} if config.anchor_t is None else {"largest_ratio": config.anchor_t}
    own = spec.anchors
    if isinstance(own, int):
        head = spec.layers[-1]
        levels = len(head.sources) // getattr(OPS[head.op].module, "sets", 1)  # it may read a level more than once
        per_level, before = own, None
    else:
        levels, per_level = len(own), len(own[0]) // 2
        before = best_possible_recall(sizes, own, **reach)
        if before >= ENOUGH_REACH:
            say(f"anchors of {spec.path}: {before:.1%} of {len(sizes)} boxes within reach")
            return spec
    anchors = fit_anchors(sizes, levels, per_level, np.random.default_rng((config.seed, ANCHORS)))
    reached = best_possible_recall(sizes, anchors, **reach)
    shown = " | ".join(" ".join(f"{value:g}" for value in level) for level in anchors)
    if before is None:
        say(f"anchors fitted to {len(sizes)} boxes, {reached:.1%} within reach: {shown}")
    elif reached > before:
        say(
            f"anchors of {spec.path}: {before:.1%} of {len(sizes)} boxes within reach; fitted anew, {reached:.1%}: "
            f"{shown}; --noautoanchor would keep those of the file"
        )
    else:
        say(f"anchors of {spec.path}: {before:.1%} of {len(sizes)} boxes within reach; fitted ones reach no more")
        return spec
    return with_anchors(spec, anchors)


def prior_line(spec: ModelSpec, samples: Sequence[Sample], imgsz: int) -> str | None:
    """The best possible recall of a head whose priors answer by their overlap; None for any other head."""
    node = resolve(spec).nodes[-1]
    if node.op.module is not SSDHead:
        return None
    head = build_plain(node)
    assert isinstance(head, SSDHead)
    labelled = [sample for sample in samples if len(sample.boxes)]
    some = labelled[:: math.ceil(len(labelled) / MOST_MEASURED)]
    boxes = np.concatenate([letterbox_of(*image_size(one.path), imgsz).to_network(one.boxes) for one in some])
    recall = head.best_possible_recall(torch.from_numpy(boxes), imgsz)
    return f"best possible recall of the priors: {recall:.1%} of the boxes overlap one by {head.match:g} or more"


def box_sizes(samples: Sequence[Sample], imgsz: int) -> np.ndarray:
    """Width and height ``[M, 2]`` of every box, in pixels of the network's input."""
    scaled = [
        (sample.boxes[:, 2:] - sample.boxes[:, :2]) * (imgsz / max(image_size(sample.path)))
        for sample in tqdm(samples, "measuring boxes", unit="image", delay=2, leave=False)
        if len(sample.boxes)
    ]
    return np.concatenate(scaled)


def set_loss(network: Network, config: RunConfig, samples: Sequence[Sample] = ()) -> None:
    """Tells the head's loss what was asked for. Raises a Fault for what this head's loss does not have.

    `samples` are those to learn from: how often a class occurs there says what its pixels count.
    """
    known = network.head.options
    for name in HEAD_OPTIONS:
        value = getattr(config, name)
        if value is None or (name == "label_smoothing" and value == 0):
            continue
        if name not in known:
            kind, words = type(network.head).__name__, ", ".join(map(option_name, sorted(known)))
            raise Fault(f"{option_name(name)} {value:g}: the loss of {kind} has no such option; it has {words}")
        known[name] = value
    if config.class_weights == ALL_ALIKE:
        return
    if "class_weights" not in known:
        raise Fault(f"--class-weights {config.class_weights}: is for the pixels of a segmenter; leave it out")
    known["class_weights"] = class_weights(samples, network.num_classes)


def freeze(network: Network, rows: Sequence[str]) -> tuple[nn.Module, ...]:
    """Takes rows out of training, for good: their weights have no gradients. Returns them for `train_mode`.

    One number N means the first N rows, several numbers or names mean these. Raises a Fault for rows that do not exist
    and where nothing is left to train.
    """
    names = [layer.name for layer in network.spec.layers]
    numbers = {str(index): index for index in range(len(names))}
    if len(rows) == 1 and rows[0].isdecimal():
        chosen = set(range(min(int(rows[0]), len(names))))
        wrong = list(rows) if int(rows[0]) > len(names) else []
    else:
        known = {**numbers, **{name: index for index, name in enumerate(names) if name}}
        chosen = {known[row] for row in rows if row in known}
        wrong = [row for row in rows if row not in known]
    if wrong:
        near = nearest(wrong[0], [name for name in names if name])
        raise Fault(f"--freeze {wrong[0]}: the model has rows 0 to {len(names) - 1}{near}")
    frozen = tuple(network.layers[index] for index in sorted(chosen))
    for layer in frozen:
        layer.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise Fault(f"--freeze {' '.join(rows)}: nothing is left to train")
    return frozen


def train_mode(network: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Training mode, but for frozen rows: their norms use the statistics that they have, and keep them."""
    network.train()
    for layer in frozen:
        layer.eval()


def load_teacher(
    config: RunConfig, network: Network, names: Sequence[str], device: torch.device
) -> tuple[Network | None, float]:
    """The network of ``--teacher``, to be learned from, and the gain of the loss against it; (None, 0) without one.

    Raises a Fault for a teacher that knows other classes than `names`, or whose head cannot be compared.
    """
    if config.teacher is None:
        if config.distill is not None:
            raise Fault(f"--distill {config.distill:g}: there is no --teacher to learn from")
        return None, 0.0
    checkpoint = load_checkpoint(config.teacher)
    check_names(config.teacher, checkpoint.names, config.data or "", names)
    teacher = restore(checkpoint).requires_grad_(False)
    check_teacher(network, teacher, config.teacher)
    teacher.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return teacher, 1.0 if config.distill is None else config.distill


def file_hash(path: Path | None) -> str:
    """A short name for exactly this file's content; empty for none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else ""


def images_hash(samples: Sequence[Sample]) -> str:
    """A short name for images of these names with these labels in this order, wherever they lie; of masks count the
    classes and how many pixels each has.
    """
    found = hashlib.sha256()
    for sample in samples:
        found.update(f"{sample.path.name} {len(sample.labels)} ".encode())
        found.update(sample.boxes.tobytes() + sample.labels.tobytes())
        if sample.mask is not None and sample.areas is not None:
            found.update(sample.areas.tobytes())
    return found.hexdigest()[:12]
