"""What a network looks at: explain.py. Heat maps as pictures, numbers over a data set, and which levels are weak."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.config import DataSpec, read_data_spec
from data.dataset import ImageSet
from data.loader import batches
from data.readers import read_split
from data.structures import Batch, Detections, Fault, Letterbox, Sample, nearest
from engine.doors import check_names, check_thresholds, door, option_parser, parse_device, parse_options, printable
from engine.draw import write_image
from engine.evaluate import pixels
from engine.explain_metrics import (
    CONTROLS,
    SPACES,
    Explained,
    against_chance,
    compare,
    intervals,
    judge,
    legend,
    level_metrics,
    metrics_table,
    numbers_of,
    seen_through,
    sure,
    write_metrics,
)
from engine.explain_page import Shown, draw_metrics, explanation
from engine.heatmaps import (
    Decisions,
    answers,
    branch_maps,
    centre_map,
    class_decisions,
    grad_cam,
    object_decisions,
    random_map,
    run_to_maps,
    spread,
)
from engine.infer import Model, class_labels, load
from engine.nms import USUAL, iou_for, nms
from engine.runs import new_run
from engine.select import attend, read_rule
from engine.sources import find_files, is_video, output_names, read_picture
from engine.tasks import TASKS, check_data, task_of
from models.checkpoint import load_checkpoint
from models.graph import Graph
from models.levels import Level, branches, levels
from models.network import Network

METHODS = {"gradcam": "Grad-CAM", "layercam": "LayerCAM", "branch": "map of the attention branch"}
TARGETS = ("predicted", "true")
EXAMPLES = 8  # pictures that are drawn beside the numbers


@dataclass(frozen=True)
class Question:
    """What is to be explained, and how.

    Attributes:
        method: a key of `METHODS`.
        target: ``predicted``: what the network says, or ``true``: what the labels say.
        space: what a map of 0 leaves of a pixel: ``pixel``: black, ``norm``: ImageNet's mean colour.
        steps: of insertion and deletion; 0: not measured.
        label: the class that is explained, whatever the network says; None: see `target`.
        classes: the classes that count; None: all.
        conf: detections above it are explained, and objects that the network is surer of.
        top: decisions an image at most.
    """

    method: str = "gradcam"
    target: str = "predicted"
    space: str = "pixel"
    steps: int = 0
    label: int | None = None
    classes: tuple[int, ...] | None = None
    conf: float = USUAL.conf
    top: int = 1


def levels_of(graph: Graph, method: str, asked: Sequence[str] = ("all",)) -> tuple[Level, ...]:
    """The levels that `asked` names, by name or number from 0; Faults for those that the network does not have."""
    there = branches(graph) if method == "branch" else levels(graph)
    if not there:
        raise Fault(
            f"--method branch: {graph.spec.path} has no attention branch; --method gradcam explains any network, and "
            f"--select adds branches"
        )
    if list(asked) == ["all"]:
        return there
    found = {**{str(place): level for place, level in enumerate(there)}, **{level.name: level for level in there}}
    for name in asked:
        if name not in found:
            here = ", ".join(f"{place} {level.name}" for place, level in enumerate(there))
            raise Fault(f"--level {name}: the levels are {here}, or all{nearest(name, found)}")
    return tuple(dict.fromkeys(found[name] for name in asked))


# ---- decisions and their maps


def decided(
    network: Network, boxes: Tensor, scores: Tensor, question: Question, batch: Batch | None = None
) -> tuple[Decisions, Tensor]:
    """What to explain of a batch, at most `top` decisions an image, and how sure the network is of each.

    `batch` has the truths, where they are asked for. Objects that the network does not find are left out.
    """
    if boxes.shape[1] == 1 and task_of(network.spec).name == "classify":
        labels = None
        if question.label is not None:
            labels = torch.full((len(scores),), question.label)
        elif question.target == "true":
            assert batch is not None
            labels = batch.targets.labels
        asked = class_decisions(scores[:, 0], boxes, labels, question.top)
        return asked, scores[asked.images, 0, asked.labels]
    objects = []
    for image in range(len(boxes)):
        if question.target == "true":
            assert batch is not None
            here = batch.targets.image_index == image
            wanted, labels = batch.targets.boxes[here], batch.targets.labels[here]
            if question.classes is not None:
                kept = torch.isin(labels, torch.tensor(question.classes))
                wanted, labels = wanted[kept], labels[kept]
            objects.append(Detections(wanted, torch.ones(len(labels)), labels))
        else:
            objects.append(
                nms(
                    boxes[image],
                    scores[image],
                    conf=question.conf,
                    iou=iou_for(network, USUAL.iou),
                    max_det=question.top,
                    classes=question.classes,
                    multi_label=False,
                )
            )
    asked, confidence = object_decisions(boxes, scores, objects)
    kept = confidence > question.conf
    for image in asked.images.unique().tolist():  # the surest ones of each
        of_image = (asked.images == image).nonzero()[:, 0]
        kept[of_image[confidence[of_image].argsort(descending=True, stable=True)[question.top :]]] = False
    return asked[kept], confidence[kept]


def heat_of(
    network: Network, images: Tensor, question: Question, there: Sequence[Level], batch: Batch | None = None
) -> tuple[Decisions, Tensor, dict[str, Tensor]]:
    """The decisions about a batch of images, how sure each is, and by level's name the maps ``[K, h, w]``."""
    rows = [level.row for level in there]
    outputs, aux, maps = run_to_maps(network, images, rows)
    with torch.no_grad():
        boxes, scores = answers(network, outputs, images.shape[2:])
        asked, confidence = decided(network, boxes, scores, question, batch)
    if question.method == "branch":
        heat = branch_maps(aux, rows, asked)
    else:
        heat = grad_cam(network, outputs, maps, asked, local=question.method == "layercam")
    return asked, confidence.detach(), {level.name: heat[level.row] for level in there}


# ---- numbers over a data set


def measure(
    network: Network,
    samples: Sequence[Sample],
    names: Sequence[str],
    imgsz: int,
    question: Question,
    there: Sequence[Level],
    *,
    root: Path = Path(),
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Explained:
    """The `engine.explain_metrics.NUMBERS` of every level and of the controls, decision by decision.

    `network` is on `device`, in eval mode, and its parameters need no gradients. `about` is stored beside the numbers.
    Raises a Fault where nothing is left to be explained.
    """
    crops = task_of(network.spec).crops
    dataset = ImageSet(samples, imgsz, None, seed=0, cache=False, crop=crops)
    loader = batches(dataset, batch_size, workers=workers)
    maps: dict[str, dict[str, list[np.ndarray]]] = {}
    images: list[str] = []
    classes: list[str] = []
    confidences: list[np.ndarray] = []
    for batch in tqdm(loader, "explain", len(loader), unit="batch", disable=not progress, leave=False):
        pixels_NCHW = pixels(batch, device)
        size = pixels_NCHW.shape[2:]
        asked, _, heat = heat_of(network, pixels_NCHW, question, there, batch)
        if not len(asked):
            continue
        shown = pixels_NCHW[asked.images]
        before = sure(network, shown, asked, batch_size)
        index = [batch.indices[image] for image in asked.images.tolist()]
        looks = {name: spread(low, size) for name, low in heat.items()}
        looks["random"] = random_map(index, size, device)
        looks["ones"] = torch.ones_like(looks["random"])
        looks["centre"] = centre_map(size, device).expand_as(looks["random"])
        for name, look in looks.items():
            steps = 0 if name == "ones" else question.steps  # ones have no order
            options: dict[str, Any] = {"space": question.space, "boxes": not crops, "batch_size": batch_size}
            for number, y in judge(network, shown, asked, look, before, steps=steps, **options).items():
                maps.setdefault(name, {}).setdefault(number, []).append(y.cpu().numpy().astype(np.float64))
        images += [Path(os.path.relpath(samples[at].path, root)).as_posix() for at in index]
        classes += [names[label] for label in asked.labels.tolist()]
        confidences.append(before.cpu().numpy().astype(np.float64))
    if not images:
        raise Fault(f"nothing to explain: no object is found with a confidence over {question.conf:g}")
    whole = {name: {number: np.concatenate(y) for number, y in numbers.items()} for name, numbers in maps.items()}
    return Explained(
        about or {},
        images,
        classes,
        np.concatenate(confidences),
        {level.name: whole[level.name] for level in there},
        {name: whole[name] for name in CONTROLS},
        {level.name: level.stride for level in there},
    )


# ---- pictures


def seen_part(letterbox: Letterbox, size: Sequence[int]) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """What of a picture an input of `size` (H, W) shows: xyxy in pixels of the picture, and the same of the input."""
    whole = np.array([0, 0, letterbox.width, letterbox.height], dtype=np.float32)
    inside = letterbox.to_network(whole).clip(0, [size[1], size[0]] * 2)
    x1, y1, x2, y2 = letterbox.to_original(inside[None])[0].round().astype(int).tolist()
    inside = inside.round().astype(int)
    inside[2:] = np.maximum(inside[2:], inside[:2] + 1)
    return (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)), inside


def explain_picture(
    model: Model, picture: np.ndarray, question: Question, there: Sequence[Level]
) -> tuple[np.ndarray, list[Shown]]:
    """The part of a picture that the network sees, and its decisions about it with their maps, best first."""
    assert isinstance(model.network, Network)
    batch, (letterbox,) = model.prepare([picture])
    images = batch.to(model.device).float() / 255
    size = images.shape[2:]
    asked, confidence, heat = heat_of(model.network, images, question, there)
    (x1, y1, x2, y2), inside = seen_part(letterbox, size)
    looks = {name: spread(low, size) for name, low in heat.items()}
    fill = SPACES[question.space]
    shown = images[asked.images]
    left = {name: sure(model.network, seen_through(shown, look, fill), asked, 8) for name, look in looks.items()}
    rows = []
    for k in range(len(asked)):
        box = letterbox.to_original(asked.boxes[k : k + 1].cpu().numpy())[0] - [x1, y1, x1, y1]
        label = int(asked.labels[k])
        rows.append(
            Shown(
                model.names[label],
                label,
                float(confidence[k]),
                None if model.task == "classify" else box.tolist(),
                [look[k].cpu().numpy()[inside[1] : inside[3], inside[0] : inside[2]] for look in looks.values()],
                [float(one[k]) for one in left.values()],
            )
        )
    return picture[y1:y2, x1:x2], rows


def draw_pictures(
    model: Model, files: Sequence[Path], folder: Path, question: Question, there: Sequence[Level], truths: Sequence[str]
) -> Iterator[str]:
    """Writes ``NAME.png`` for every file and says what was found, a line each. `truths` are true classes, or empty."""
    titles = [f"{level.name}, stride {level.stride}" for level in there]
    bar = tqdm(list(zip(files, output_names(files), truths, strict=True)), "draw", unit="image", delay=2, leave=False)
    for file, name, truth in bar:
        part, rows = explain_picture(model, read_picture(file), question, there)
        if not rows:
            yield f"{file}: nothing found with a confidence over {question.conf:g}; no picture"
            continue
        title = f"{file.name}" + (f", truly {truth}" if truth else "")
        write_image(folder / f"{name}.png", explanation(part, rows, titles, title, METHODS[question.method]))
        for row in rows:
            kept = ", ".join(f"{level.name} {left:.2f}" for level, left in zip(there, row.left, strict=True))
            yield f"{file.name}: {row.name} {row.confidence:.2f}; from what is hot alone: {kept}"


# ---- explain.py


def chosen_samples(data: DataSpec, split: str, classes: Sequence[int] | None, limit: int) -> list[Sample]:
    """The images of a split that show one of some classes; of more than `limit` so many, evenly taken."""
    found = read_split(data, split)
    for note in found.notes:
        print(printable(note))
    samples = [one for one in found.samples if classes is None or np.isin(one.labels, classes).any()]
    if not samples:
        raise Fault(f"{data.path}: no image of the split {split} shows one of the asked classes")
    return evenly(samples, limit) if limit else samples


def evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """All samples, or `most` of them from the whole length."""
    count = min(most, len(samples))
    return [samples[at * len(samples) // count] for at in range(count)]


def check_options(options: Namespace) -> None:
    if (options.source is None) == (options.data is None):
        raise Fault("give --source (images) or --data (a data set's YAML), one of them")
    if options.source is not None:
        for name in ("metrics", "select", "limit"):
            if getattr(options, name):
                raise Fault(f"--{name}: needs a data set; give --data in place of --source")
        if options.target == "true":
            raise Fault("--target true: the truth is known of a data set; give --data in place of --source")
    elif options.target == "true" and not options.metrics and options.select is None:
        raise Fault("--target true: is for --metrics and --select; pictures show what the network says")
    if options.select is not None and options.level != ["all"]:
        raise Fault("--select chooses among all levels; leave --level out")
    if options.select is not None and options.method == "branch":
        raise Fault("--select: goes by what every level has, so not by --method branch; gradcam or layercam would do")
    for name in ("batch_size", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise Fault(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    for name in ("steps", "limit", "workers"):
        if (getattr(options, name) or 0) < 0:
            raise Fault(f"--{name} {getattr(options, name)}: must be at least 0")
    if options.steps == 1:
        raise Fault("--steps 1: a curve has at least 2 steps; 0 measures none")
    check_thresholds(options.conf_thres, USUAL.iou, USUAL.max_det)


def question_of(options: Namespace, model: Model) -> Question:
    """The options as a `Question`. Raises a Fault for what means nothing to the network's task."""
    classifies = model.task == "classify"
    label = None if options.label is None else (class_labels([options.label], model.names) or [0])[0]
    classes = class_labels(options.classes, model.names)
    if label is not None and not classifies:  # a detector's classes are told apart by what it finds
        classes, label = [label], None
    measuring = options.metrics or options.select is not None
    target = options.target or ("true" if measuring and not classifies else "predicted")
    if options.source is not None and classes is not None and classifies:
        raise Fault("--classes: of a classifier's images the classes are known in a data set; --class explains one")
    if label is not None and options.target is not None:
        raise Fault(f"--target {options.target}: --class says already what is explained; leave one of them out")
    if target == "true" and classifies and (options.top or 1) > 1:
        raise Fault(f"--top {options.top}: an image has one true class; leave --top or --target true out")
    top = options.top or (1 if classifies else 3)
    if classifies and top > len(model.names):
        raise Fault(f"--top {top}: there are {len(model.names)} classes")
    return Question(
        options.method or ("gradcam" if classifies or measuring else "layercam"),
        target,
        options.space,
        options.steps if options.steps is not None else 5 if options.metrics else 0,
        label,
        None if classes is None else tuple(classes),
        options.conf_thres,
        top,
    )


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser(
        "Shows what a network looks at, a heat map a level, and measures how well that explains its decisions.\n"
        "Or compares two such measurements: explain.py --compare A/metrics.json B/metrics.json"
    )
    parser.add_argument("--weights", help="a checkpoint (.pt) that train.py or search.py wrote")
    parser.add_argument("--source", help="image, folder, or glob in quotes")
    parser.add_argument("--data", help="a data set's YAML, in place of --source")
    parser.add_argument("--split", default="val", choices=["train", "val", "test"], help="of --data; default: val")
    parser.add_argument("--limit", type=int, default=0, help="of --data: so many images, evenly taken; default: all")
    parser.add_argument("--level", nargs="+", default=["all"], help="names (P3) or numbers from 0, fine first; or all")
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        help="default: gradcam, for pictures of a detector layercam; branch: the maps of attention branches",
    )
    parser.add_argument("--class", dest="label", metavar="CLASS", help="explain this class, whatever the network says")
    parser.add_argument(
        "--classes",
        nargs="+",
        help="only images or objects of these classes, by name or number; --compare: by name",
    )
    parser.add_argument(
        "--target", choices=TARGETS, help="default: predicted; a detector is measured on the true boxes"
    )
    parser.add_argument("--top", type=int, help="decisions an image at most; default: 1 of a classifier, else 3")
    parser.add_argument(
        "--conf-thres", type=float, default=USUAL.conf, help="of a detector: what it is surer of is explained"
    )
    parser.add_argument("--metrics", action="store_true", help="measure --data: average drop, insertion, ..., controls")
    parser.add_argument("--steps", type=int, help="of insertion and deletion; 0: without; default: 5 of --metrics")
    parser.add_argument(
        "--space", default="pixel", choices=list(SPACES), help="what is masked is black, or mean colour"
    )
    parser.add_argument("--select", metavar="K", help="measure, then put attention branches on the K weakest levels")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two metrics.json: B against A, in pairs")
    parser.add_argument("--imgsz", "--img", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1, mps; default: the first GPU, or the CPU")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--project", default="runs/explain", help="folder of the runs")
    parser.add_argument("--name", default="exp", help="folder of this run; exp2, exp3, ... where it exists")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing run")
    options = parse_options(parser, argv)
    if options.compare:
        print(compare(Path(options.compare[0]), Path(options.compare[1]), options.classes))
        return 0
    if options.weights is None:
        raise Fault("--weights: a checkpoint is needed, or --compare with two metrics.json")
    check_options(options)
    rule = None if options.select is None else read_rule(options.select)
    device = parse_device(options.device)
    model = load(options.weights, device, options.imgsz)
    network = model.network
    if not isinstance(network, Network):
        raise Fault(f"{options.weights}: an exported file has no levels to look into; give the checkpoint (.pt)")
    if model.task not in ("classify", "detect"):
        raise Fault(f"{options.weights}: is {TASKS[model.task].network}; classifiers and detectors can be explained")
    network.requires_grad_(False)
    question = question_of(options, model)
    there = levels_of(network.graph, question.method, options.level)
    truths: list[str] = []
    if options.source is not None:
        files, notes = find_files(options.source)
        for note in notes:
            print(printable(note))
        moving = [file for file in files if is_video(file)]
        if moving:
            raise Fault(f"{moving[0]}: is a video; images can be explained")
    else:
        data = read_data_spec(options.data)
        check_data(network.spec, data)
        check_names(options.weights, model.names, options.data, data.names)
        samples = chosen_samples(data, options.split, question.classes, options.limit)

    print("levels: " + ", ".join(map(str, there)))
    print(f"on {device}, {torch.get_num_threads()} threads")
    folder = new_run(options.project, options.name, options.exist_ok)
    if options.data is not None and (options.metrics or rule is not None):
        explained = measure(
            network,
            samples,
            model.names,
            model.imgsz,
            question,
            there,
            root=data.root,
            batch_size=options.batch_size,
            device=device,
            workers=options.workers,
            about={
                "weights": str(options.weights),
                "data": Path(options.data).name,
                "split": options.split,
                "method": question.method,
                "space": question.space,
                "target": question.target,
                "class": None if question.label is None else model.names[question.label],
                "steps": question.steps,
                "top": question.top,
                "conf_thres": question.conf,
                "imgsz": model.imgsz,
            },
        )
        images = len(set(explained.images))
        print(f"{len(explained.images)} decisions about {images} of {len(samples)} images\n")
        found = intervals(explained)
        print(metrics_table(found, explained.strides), against_chance(explained), sep="\n\n", end="\n\n")
        print(legend(numbers_of(found)), "*: 0 is not in the 95 % interval", sep="\n")
        write_metrics(folder / "metrics.json", explained, found)
        title = f"{options.weights}, {METHODS[question.method]}, {len(explained.images)} decisions"
        draw_metrics(folder / "metrics.png", found, explained.levels.keys(), title)
        if rule is not None:
            yaml, weights, weak = attend(load_checkpoint(options.weights), level_metrics(explained), rule, folder)
            chosen = ", ".join(there[level].name for level in weak)
            print(
                f"\nweak levels: {chosen}; {yaml} has an attention branch on each, {weights} the weights to start from"
            )
            print(f"python train.py --cfg {yaml} --weights {weights} --data {options.data} --imgsz {model.imgsz}")
        samples = evenly(samples, EXAMPLES)
    if options.data is not None:
        files = [sample.path for sample in samples]
        truths = [model.names[sample.labels[0]] if model.task == "classify" else "" for sample in samples]
    measured_only = options.metrics or rule is not None
    looked_at = Question(**{**vars(question), "target": "predicted"}) if question.target == "true" else question
    for line in draw_pictures(model, files, folder, looked_at, there, truths or [""] * len(files)):
        if not measured_only:
            tqdm.write(line)
    print(f"results in {folder}")
    return 0
