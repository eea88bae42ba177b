"""Detection as a user meets it: ``model = load("best.pt")``, ``model("street.jpg")``, and the command detect.py."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.augment import letterbox
from data.images import read_image
from data.structures import Detections, Fault, nearest
from engine.doors import door, option_parser, parse_device, parse_options
from engine.draw import draw_detections, write_image
from engine.evaluate import check_imgsz, check_thresholds, timed, times_line, to_original
from engine.nms import nms
from engine.runs import atomically, new_run, table
from engine.sources import (
    check_codec,
    container,
    find_files,
    is_video,
    open_video,
    output_names,
    read_frames,
    write_video,
)
from models.checkpoint import load_checkpoint, restore
from models.network import Network


class Model(nn.Module):
    """A trained network that takes images as they are and answers in their own pixels.

    ``names`` are its classes; ``imgsz`` is the side of the square that images are scaled into.
    """

    def __init__(self, network: Network, names: Sequence[str], imgsz: int) -> None:
        super().__init__()
        self.network = network.eval()
        self.names = tuple(names)
        self.imgsz = imgsz

    @torch.no_grad()
    def forward(
        self,
        image: np.ndarray | str | Path,
        conf: float = 0.25,
        iou: float = 0.45,
        *,
        max_det: int = 300,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        seconds: dict[str, float] | None = None,
    ) -> Detections:
        """What is in ``image``, a path or uint8 RGB ``[H, W, 3]``; boxes are xyxy in pixels of it, on the CPU.

        Scores above ``conf`` count, boxes that overlap by more than ``iou`` are one object; ``classes`` keeps these
        labels only. ``seconds`` collects the time of read, network and nms. Raises a Fault for an unreadable path.
        """
        seconds = defaultdict(float) if seconds is None else seconds
        device = next(self.network.parameters()).device
        with timed(seconds, "read"):
            pixels = image if isinstance(image, np.ndarray) else read_image(image)
            square, box = letterbox(pixels, self.imgsz)
        with timed(seconds, "network", device):
            x = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1))).to(device)
            boxes, scores = self.network.predict(x[None].float() / 255)
        with timed(seconds, "nms", device):
            found = nms(
                boxes[0],
                scores[0],
                conf=conf,
                iou=iou,
                max_det=max_det,
                agnostic=agnostic,
                classes=classes,
                multi_label=False,
            )
            return to_original(found, box)


def load(weights: str | Path, device: str | torch.device = "cpu", imgsz: int | None = None) -> Model:
    """The detector in a checkpoint; ``imgsz`` is the one it was trained with unless given. Raises a Fault."""
    checkpoint = load_checkpoint(weights)
    network = restore(checkpoint)
    side = check_imgsz(imgsz or checkpoint.imgsz, network.max_stride)
    return Model(network, checkpoint.names, side).to(device)


def yolo_lines(found: Detections, height: int, width: int, *, scores: bool = False) -> str:
    """One line a detection: ``class cx cy w h [score]``, the four in 0 to 1 of the image's width and height."""
    lines = []
    for (x1, y1, x2, y2), score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join([str(label), *(f"{v:.6f}" for v in (*shares, *([score] if scores else [])))]))
    return "".join(line + "\n" for line in lines)


def class_labels(asked: Sequence[str] | None, names: Sequence[str]) -> list[int] | None:
    """``--classes``, given as numbers or names, as labels; a Fault for one that the network does not know."""
    if asked is None:
        return None
    labels = []
    for entry in asked:
        if entry in names:
            labels.append(names.index(entry))
        elif entry.isdecimal() and int(entry) < len(names):
            labels.append(int(entry))
        else:
            raise Fault(f"--classes {entry}: no such class{nearest(entry, names)}; there are: {', '.join(names)}")
    return labels


def detections_table(scores_by_label: dict[int, list[float]], names: Sequence[str]) -> str:
    rows = [(names[label], len(found), sum(found) / len(found)) for label, found in sorted(scores_by_label.items())]
    return table(rows, ("class", "count", "mean score")) if rows else "nothing found"


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Finds objects in images and videos, draws them, and writes them down.")
    parser.add_argument("--weights", required=True, help="a checkpoint (.pt) that train.py wrote")
    parser.add_argument("--source", required=True, help="an image, a video, a folder, or a glob in quotes")
    parser.add_argument("--imgsz", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--conf-thres", type=float, default=0.25, help="scores above this count")
    parser.add_argument("--iou-thres", type=float, default=0.45, help="NMS: boxes that overlap more are one object")
    parser.add_argument("--max-det", type=int, default=300, help="detections an image at most")
    parser.add_argument("--classes", nargs="+", help="only these classes, by name or number")
    parser.add_argument("--agnostic-nms", action="store_true", help="boxes of different classes may be one object")
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1; default: the first GPU, or the CPU")
    parser.add_argument("--save-txt", action="store_true", help="also write labels/*.txt: class cx cy w h")
    parser.add_argument("--save-conf", action="store_true", help="with --save-txt: the score ends each line")
    parser.add_argument("--project", default="runs/detect", help="folder of the runs")
    parser.add_argument("--name", default="exp", help="folder of this run; exp2, exp3, ... where it exists")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing run")
    parser.add_argument("--line-thickness", type=int, default=0, help="pixels; default: to suit the image")
    parser.add_argument("--vid-stride", type=int, default=1, help="every n-th frame of a video, at 1/n of its fps")
    parser.add_argument("--fourcc", default="mp4v", help="codec of written videos: mp4v, MJPG, VP90, ...")
    options = parse_options(parser, argv)
    check_thresholds(options.conf_thres, options.iou_thres, options.max_det)
    if options.vid_stride < 1:
        raise Fault(f"--vid-stride {options.vid_stride}: must be at least 1")
    if options.line_thickness < 0:
        raise Fault(f"--line-thickness {options.line_thickness}: must be at least 1, or 0 to suit the image")
    if options.save_conf and not options.save_txt:
        raise Fault("--save-conf adds scores to what --save-txt writes; give both")

    files, notes = find_files(options.source)
    for note in notes:
        print(note)
    if any(map(is_video, files)):
        check_codec(options.fourcc)
    model = load(options.weights, parse_device(options.device), options.imgsz)
    classes = class_labels(options.classes, model.names)
    folder = new_run(options.project, options.name, options.exist_ok)
    if options.save_txt:
        (folder / "labels").mkdir(exist_ok=True)

    seconds: dict[str, float] = defaultdict(float)
    scores_by_label: dict[int, list[float]] = defaultdict(list)
    images = 0

    def detect(image: np.ndarray, stem: str) -> np.ndarray:
        """Find, count and write down what is in one image; the image with its boxes comes back."""
        nonlocal images
        found = model(
            image,
            options.conf_thres,
            options.iou_thres,
            max_det=options.max_det,
            classes=classes,
            agnostic=options.agnostic_nms,
            seconds=seconds,
        )
        images += 1
        for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True):
            scores_by_label[label].append(score)
        if options.save_txt:  # a file for every image: an empty one says that nothing was found
            with atomically(folder / "labels" / f"{stem}.txt") as temporary:
                temporary.write_text(yolo_lines(found, *image.shape[:2], scores=options.save_conf))
        return draw_detections(image, found, model.names, options.line_thickness)

    def detect_video(path: Path, stem: str) -> None:
        video = open_video(path)
        target = target_for(path, stem + container(options.fourcc))
        read = 0
        with ExitStack() as stack:
            write = stack.enter_context(write_video(target, options.fourcc, video.fps / options.vid_stride))
            frames = read_frames(video, options.vid_stride)
            total = math.ceil(video.frames / options.vid_stride) or None
            bar = stack.enter_context(tqdm(total=total, desc=path.name, unit="frame", leave=False))
            while True:
                with timed(seconds, "read"):
                    number, frame = next(frames, (0, None))
                if frame is None:
                    break
                write(detect(frame, f"{stem}_{number}"))
                read = number
                bar.update()
        if read + options.vid_stride <= 0.95 * video.frames:
            raise Fault(f"{path}: damaged, only {read} of its {video.frames} frames can be read; kept in {target}")

    def target_for(path: Path, name: str) -> Path:
        target = folder / name
        if target.resolve() == path.resolve():
            raise Fault(f"{path}: the result would replace it; give another --project or --name")
        return target

    problems = []
    interrupted = False
    try:
        for path, stem in tqdm(list(zip(files, output_names(files), strict=True)), desc="detect", unit="file"):
            try:
                if is_video(path):
                    detect_video(path, stem)
                else:
                    with timed(seconds, "read"):
                        image = read_image(path)
                    write_image(target_for(path, stem + path.suffix), detect(image, stem))
            except Fault as fault:
                problems.append(path)
                for line in fault.lines:
                    tqdm.write(line, file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True

    if not images and not interrupted:
        for empty in (folder / "labels", folder):
            with suppress(OSError):  # it was there before, and holds something
                empty.rmdir()
        raise Fault(f"{options.source}: nothing in it could be read")
    print(detections_table(scores_by_label, model.names))
    print(f"{images} images, {times_line({name: 1000 * total / max(images, 1) for name, total in seconds.items()})}")
    print(f"results are in {folder}")
    if interrupted:
        raise KeyboardInterrupt("interrupted: what was finished before stays")
    if problems:
        print(f"{len(problems)} of {len(files)} files could not be read to their end", file=sys.stderr)
    return 1 if problems else 0
