"""A network as a user meets it: ``model = load("best.pt")``, ``model("street.jpg")``, and the command detect.py."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import structures
from data.augment import fit, letterbox_of, middle, paste
from data.structures import Fault, Letterbox, nearest
from engine.classify import ranking
from engine.doors import (
    check_imgsz,
    check_thresholds,
    door,
    option_parser,
    parse_device,
    parse_options,
    printable,
    told,
)
from engine.draw import draw_detections, draw_label_map, draw_ranking
from engine.evaluate import timed, to_original
from engine.exported import ExportedFile, is_exported, read_exported
from engine.metrics import times_line
from engine.nms import USUAL, Suppression, iou_for, nms
from engine.overlap import ahead, behind
from engine.results import DOCUMENT, FORMS, LABELS, TABLE, Wanted, check_windows, found_table, write_results
from engine.runs import new_run
from engine.segment import label_maps
from engine.sources import End, Frame, Source, check_codec, find_sources, read_picture, read_sources
from engine.tasks import TASKS, check_given, task_of
from models.checkpoint import load_checkpoint, restore
from models.fuse import fuse
from models.network import Network

AHEAD = 2  # batches read while the network is busy, and as many that wait to be written


# ---- in Python


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, best first.

    Attributes:
        boxes: ``[K, 4]`` float32, ``x1 y1 x2 y2`` in pixels of the image.
        scores: ``[K]`` float32 in 0 to 1.
        labels: ``[K]`` int64, places in ``names``.
        names: the classes of the network.
        image: the picture itself, uint8 RGB ``[H, W, 3]``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def classes(self) -> list[str]:
        """The name of each detection's class."""
        return [self.names[label] for label in self.labels]

    def draw(self, thickness: int = 0, *, labels: bool = True, scores: bool = True) -> np.ndarray:
        """A copy of the image with the boxes, and the names and scores unless told otherwise; RGB."""
        arrays = (torch.from_numpy(y) for y in (self.boxes, self.scores, self.labels))
        found = structures.Detections(*arrays)
        return draw_detections(self.image, found, self.names, thickness, show_labels=labels, show_scores=scores)


@dataclass(frozen=True, eq=False)
class Classes:
    """What an image may show as a whole: the five likeliest classes, best first.

    Attributes:
        scores: ``[K]`` float32 in 0 to 1; of all classes of the network they sum to 1.
        labels: ``[K]`` int64, places in ``names``.
        names: the classes of the network.
        image: the picture itself, uint8 RGB ``[H, W, 3]``.
    """

    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    image: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return [self.names[label] for label in self.labels]

    def draw(self, thickness: int = 0, *, scores: bool = True) -> np.ndarray:
        """A copy of the image with the classes in its corner, and the scores unless told otherwise; RGB."""
        found = structures.Ranking(torch.from_numpy(self.scores), torch.from_numpy(self.labels))
        return draw_ranking(self.image, found, self.names, thickness, show_scores=scores)


@dataclass(frozen=True, eq=False)
class Pixels:
    """What the pixels of an image are of.

    Attributes:
        labels: ``[H, W]`` uint8, the class of each pixel, places in ``names``.
        names: the classes of the network.
        image: the picture itself, uint8 RGB ``[H, W, 3]``.
    """

    labels: np.ndarray
    names: tuple[str, ...]
    image: np.ndarray

    @property
    def shares(self) -> dict[str, float]:
        """The share of the image that each class fills, 0 to 1; they sum to 1."""
        pixels = np.bincount(self.labels.reshape(-1), minlength=len(self.names))
        return dict(zip(self.names, (pixels / pixels.sum()).tolist(), strict=True))

    def draw(self, thickness: int = 0, *, labels: bool = True) -> np.ndarray:
        """A copy of the image under the colours of its classes, with their names unless told otherwise; RGB."""
        found = structures.LabelMap(torch.from_numpy(self.labels))
        return draw_label_map(self.image, found, self.names, thickness, show_labels=labels)


@dataclass(frozen=True, eq=False)
class Model:
    """A network that takes images as they are and answers in their own pixels. `load` makes it.

    An image is scaled so that its longer side is ``imgsz``, and padded with grey to the next multiple of the network's
    stride; to a square where an exported file takes nothing else, or without ``rect``. ``names`` are the classes. Of a
    classifier's image the middle fills a square of ``imgsz``.
    """

    network: Network | ExportedFile
    names: tuple[str, ...]
    imgsz: int
    device: torch.device = torch.device("cpu")
    half: bool = False
    rect: bool = True
    task: str = "detect"

    def __call__(
        self,
        images: np.ndarray | str | Path | Sequence[np.ndarray | str | Path],
        conf: float | None = None,
        iou: float | None = None,
        *,
        max_det: int | None = None,
        classes: Sequence[int | str] | None = None,
        agnostic: bool = False,
        batch_size: int = 1,
    ) -> Any:
        """The `Detections` in an image, a path or uint8 RGB ``[H, W, 3]``; for a list of them a list in the same order.

        Scores above ``conf`` (.25) count, boxes of a class that overlap by more than ``iou`` (.45) are one object, and
        ``max_det`` (300) are the most of an image; a file that suppresses by itself has values of its own in place of
        these. ``classes`` keeps these classes, by name or number. ``agnostic`` compares boxes of all classes. Images of
        a batch share the smallest rectangle that holds them all. Raises a Fault for what is no image.

        A classifier gives the `Classes` of an image, a segmenter its `Pixels`; they have none of these options.
        """
        if isinstance(images, np.ndarray | str | Path):
            return self([images], conf, iou, max_det=max_det, classes=classes, agnostic=agnostic)[0]
        if self.task != "detect":
            if (conf, iou, max_det, classes, agnostic) != (None, None, None, None, False):
                kind = TASKS[self.task].network
                raise Fault(f"conf, iou, max_det, classes and agnostic mean nothing to {kind}; leave them out")
            return (self.classified if self.task == "classify" else self.segmented)(images, batch_size)
        asked = asked_of(self, conf, iou, max_det, agnostic=agnostic)
        labels = class_labels(None if classes is None else [str(entry) for entry in classes], self.names)
        results: list[Detections] = []
        for start in range(0, len(images), batch_size):
            pictures = [picture_of(image) for image in images[start : start + batch_size]]
            found = self.find(*self.prepare(pictures), asked, classes=labels, agnostic=agnostic)
            for picture, one in zip(pictures, found, strict=True):
                boxes, scores, found_labels = one.boxes.numpy(), one.scores.numpy(), one.labels.numpy()
                results.append(Detections(boxes, scores, found_labels, self.names, picture))
        return results

    def classified(self, images: Sequence[np.ndarray | str | Path], batch_size: int = 1) -> list[Classes]:
        """What each of some images may show as a whole."""
        results = []
        for start in range(0, len(images), batch_size):
            pictures = [picture_of(image) for image in images[start : start + batch_size]]
            for picture, one in zip(pictures, self.rank(self.prepare(pictures)[0]), strict=True):
                results.append(Classes(one.scores.numpy(), one.labels.numpy(), self.names, picture))
        return results

    def segmented(self, images: Sequence[np.ndarray | str | Path], batch_size: int = 1) -> list[Pixels]:
        """What the pixels of each of some images are of."""
        results = []
        for start in range(0, len(images), batch_size):
            pictures = [picture_of(image) for image in images[start : start + batch_size]]
            for picture, one in zip(pictures, self.segment(*self.prepare(pictures)), strict=True):
                results.append(Pixels(one.labels.numpy(), self.names, picture))
        return results

    def prepare(self, pictures: Sequence[np.ndarray]) -> tuple[Tensor, list[Letterbox]]:
        """RGB pictures as one batch for `find`, and how each was scaled and padded.

        The batch is ``[N, 3, H, W]`` uint8, channels last in memory, in which a CPU convolves a fourth faster.
        """
        if TASKS[self.task].crops:
            squares, places = zip(*(middle(picture, self.imgsz) for picture in pictures), strict=True)
            return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), list(places)
        stride = self.network.max_stride
        fitted = [fit(picture, self.imgsz) for picture in pictures]
        shape = (self.imgsz, self.imgsz)
        if self.rect:
            height, width = (max(image.shape[axis] for image in fitted) for axis in (0, 1))
            shape = (math.ceil(height / stride) * stride, math.ceil(width / stride) * stride)
        boxes = [letterbox_of(picture.shape[1], picture.shape[0], self.imgsz, shape) for picture in pictures]
        batch = np.stack([paste(image, shape, box) for image, box in zip(fitted, boxes, strict=True)])
        return torch.from_numpy(batch).permute(0, 3, 1, 2), boxes

    @torch.inference_mode()
    def find(
        self,
        batch: Tensor,
        letterboxes: Sequence[Letterbox],
        asked: Suppression,
        *,
        classes: Sequence[int] | None = None,
        agnostic: bool = False,
        seconds: dict[str, float] | None = None,
    ) -> list[structures.Detections]:
        """What is in each picture of a batch, boxes in its own pixels, on the CPU. ``seconds`` collects the time."""
        seconds = defaultdict(float) if seconds is None else seconds
        with timed(seconds, "network", self.device):
            boxes, scores = self.network.predict(self._input(batch))
        found = []
        with timed(seconds, "nms", self.device):
            for index, letterbox in enumerate(letterboxes):
                likely = scores[index].amax(dim=1) > asked.conf  # few: all that follows is about these
                kept = nms(
                    boxes[index][likely],
                    scores[index][likely],
                    conf=asked.conf,
                    iou=iou_for(self.network, asked.iou),
                    max_det=asked.max_det,
                    agnostic=agnostic,
                    classes=classes,
                    multi_label=False,
                )
                found.append(to_original(kept, letterbox))
        return found

    @torch.inference_mode()
    def rank(self, batch: Tensor, seconds: dict[str, float] | None = None) -> list[structures.Ranking]:
        """The likeliest classes of each picture of a batch, on the CPU. ``seconds`` collects the time."""
        with timed(defaultdict(float) if seconds is None else seconds, "network", self.device):
            scores = cast(Any, self.network.predict(self._input(batch)))
            return [ranking(row) for row in scores]

    @torch.inference_mode()
    def segment(
        self, batch: Tensor, letterboxes: Sequence[Letterbox], seconds: dict[str, float] | None = None
    ) -> list[structures.LabelMap]:
        """The classes of the pixels of each picture of a batch, at its own size, on the CPU. ``seconds`` collects the
        time.
        """
        with timed(defaultdict(float) if seconds is None else seconds, "network", self.device):
            return label_maps(self.network, self._input(batch), letterboxes)

    def _input(self, batch: Tensor) -> Tensor:
        images = batch.to(self.device)
        return (images.half() if self.half else images.float()) / 255


def load(
    weights: str | Path,
    device: str | torch.device = "cpu",
    imgsz: int | None = None,
    *,
    half: bool = False,
    rect: bool = True,
) -> Model:
    """The network in a checkpoint (.pt), or in a file that export.py wrote (.onnx, .xml).

    ``imgsz`` is the one it was trained with unless given. ``half`` computes in float16, on a GPU. ``rect`` off pads
    images to squares. Raises a Fault.
    """
    device, path = torch.device(device), Path(weights)
    if is_exported(path):
        file = read_exported(path, device)
        if half:
            raise Fault(f"{path}: an exported file has the precision it was written with; leave --half out")
        if file.side and imgsz not in (None, file.side):
            raise Fault(f"{path}: takes images of {file.side} px only, not {imgsz}; export it with --imgsz {imgsz}")
        side = check_imgsz(file.imgsz if imgsz is None else imgsz, file.max_stride)
        return Model(file, file.names, side, device, rect=rect and file.side is None, task=file.task)
    if path.suffix == ".pt2":
        raise Fault(f"{path}: a program of torch.export; give the checkpoint (.pt), or export it as .onnx or .xml")
    if half and device.type == "cpu":
        raise Fault("--half: half precision needs a GPU, and this is a CPU; leave --half out")
    checkpoint = load_checkpoint(path)
    network = restore(checkpoint)
    side = check_imgsz(checkpoint.imgsz if imgsz is None else imgsz, network.max_stride)
    fused = fuse(network).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = task_of(checkpoint.spec).name
    return Model(fused.half() if half else fused, checkpoint.names, side, device, half, rect, task)


def picture_of(image: np.ndarray | str | Path) -> np.ndarray:
    """Pixels of a path, or those given. Raises a Fault for what is no image."""
    if not isinstance(image, np.ndarray):
        return read_picture(Path(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise Fault(f"an array {list(image.shape)} of {image.dtype} is no image; uint8 [height, width, 3] in RGB is")
    return image


def asked_of(
    model: Model, conf: float | None, iou: float | None, max_det: int | None, *, agnostic: bool = False
) -> Suppression:
    """The thresholds to go by, given or usual; a Fault where a file that suppresses by itself has left out more."""
    inside = model.network.suppression if isinstance(model.network, ExportedFile) else None
    own = inside or USUAL
    asked = Suppression(
        own.conf if conf is None else conf, own.iou if iou is None else iou, own.max_det if max_det is None else max_det
    )
    check_thresholds(asked.conf, asked.iou, asked.max_det)
    if inside:
        again = f"{model.network.path} suppresses by itself; export it again without --nms, or with"
        wrong = []
        if asked.conf < inside.conf:
            wrong.append(f"--conf-thres {asked.conf:g}: it left out all up to {inside.conf:g}: {again} this value")
        if asked.iou != inside.iou:
            wrong.append(f"--iou-thres {asked.iou:g}: it went by {inside.iou:g}: {again} this value")
        if asked.max_det > inside.max_det:
            wrong.append(f"--max-det {asked.max_det}: it gives {inside.max_det} at most: {again} this value")
        if agnostic:
            wrong.append(f"--agnostic-nms: it compared boxes of one class only: {again.removesuffix(', or with')}")
        if wrong:
            raise Fault(*wrong)
    return asked


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


# ---- detect.py


@dataclass(frozen=True)
class Prepared:
    """Pictures and ends of sources in the order of the sources; the pictures also as a batch, if there are any."""

    items: tuple[Frame | End, ...]
    batch: Tensor | None
    letterboxes: tuple[Letterbox, ...]


def prepared(
    items: Generator[Frame | End, None, None], model: Model, batch_size: int, seconds: dict[str, float]
) -> Generator[Prepared, None, None]:
    """Pictures gathered to batches, every item in its place. A batch ends with the video that its last frame is of."""
    gathered: list[Frame | End] = []
    with closing(items):
        while True:
            with timed(seconds, "read"):
                item = next(items, None)
                if item is not None:
                    gathered.append(item)
                frames = [entry for entry in gathered if isinstance(entry, Frame)]
                full = len(frames) == batch_size or (isinstance(item, End) and (item.source.moves or not frames))
                if item is not None and not full:
                    continue
                batch, letterboxes = model.prepare([frame.image for frame in frames]) if frames else (None, [])
            if gathered:
                yield Prepared(tuple(gathered), batch, tuple(letterboxes))
            if item is None:
                return
            gathered = []


def ranking_line(frame: Frame, found: structures.Ranking, names: Sequence[str]) -> str:
    """``beach.jpg: beach 0.912, harbor 0.041, ...``"""
    rows = zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    return f"{frame.source.shown}: " + ", ".join(f"{names[label]} {score:.3f}" for label, score in rows)


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser(
        "Finds objects, or classes of images or of pixels, in images, videos and streams, draws them, and writes them "
        "down."
    )
    parser.add_argument(
        "--weights", required=True, help="a checkpoint (.pt), or what export.py wrote of one (.onnx, .xml)"
    )
    parser.add_argument(
        "--source", required=True, help="image, video, folder, glob in quotes, .txt list, 0 (camera), rtsp://..., -"
    )
    parser.add_argument("--imgsz", type=int, help="longer side in pixels; default: what the network was trained with")
    parser.add_argument(
        "--square", action="store_true", help="pad images to squares, not to the next multiple of the network's stride"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images that go through the network together")
    parser.add_argument("--conf-thres", type=float, help="scores above this count; default .25, or an exported file's")
    parser.add_argument("--iou-thres", type=float, help="boxes that overlap more are one object; default .45 or its")
    parser.add_argument("--max-det", type=int, help="detections an image at most; default 300, or an exported file's")
    parser.add_argument("--classes", nargs="+", help="only these classes, by name or number")
    parser.add_argument("--agnostic-nms", action="store_true", help="boxes of different classes may be one object")
    parser.add_argument("--device", default="", help="cpu, 0, cuda:1, mps; default: the first GPU, or the CPU")
    parser.add_argument("--half", action="store_true", help="compute in float16; needs a GPU")
    parser.add_argument("--vid-stride", type=int, default=1, help="every n-th frame of a video, at 1/n of its fps")
    parser.add_argument("--view", action="store_true", help="show pictures in a window; q ends, a key shows the next")
    parser.add_argument("--nosave", action="store_true", help="write no pictures and no videos")
    parser.add_argument(
        "--save-txt", action="store_true", help="also write labels/*.txt: class cx cy w h; or labels/*.png"
    )
    parser.add_argument("--save-conf", action="store_true", help="with --save-txt: the score ends each line")
    parser.add_argument("--save-csv", action="store_true", help="also write predictions.csv: a row a detection")
    parser.add_argument("--save-json", action="store_true", help="also write predictions.json: an entry an image")
    parser.add_argument("--save-crop", action="store_true", help="also write crops/CLASS/*.jpg: a picture a detection")
    parser.add_argument("--project", default="runs/detect", help="folder of the runs")
    parser.add_argument("--name", default="exp", help="folder of this run; exp2, exp3, ... where it exists")
    parser.add_argument("--exist-ok", action="store_true", help="write into an existing run")
    parser.add_argument("--line-thickness", type=int, default=0, help="pixels; default: to suit the image")
    parser.add_argument("--hide-labels", action="store_true", help="draw boxes without words")
    parser.add_argument("--hide-conf", action="store_true", help="draw names without scores")
    parser.add_argument("--fourcc", default="mp4v", help="codec of written videos: mp4v, MJPG, VP90, ...")
    options = parse_options(parser, argv)
    for name in ("batch_size", "vid_stride"):
        if getattr(options, name) < 1:
            raise Fault(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.line_thickness < 0:
        raise Fault(f"--line-thickness {options.line_thickness}: must be at least 1, or 0 to suit the image")
    if options.save_conf and not options.save_txt:
        raise Fault("--save-conf adds scores to what --save-txt writes; give both")

    sources, notes = find_sources(options.source)
    for note in notes:
        print(printable(note))
    if not options.nosave and any(source.moves for source in sources):
        check_codec(options.fourcc)
    if options.view:
        check_windows()
    device = parse_device(options.device)
    model = load(options.weights, device, options.imgsz, half=options.half, rect=not options.square)
    check_given(TASKS[model.task], options, parser)
    asked = asked_of(model, options.conf_thres, options.iou_thres, options.max_det, agnostic=options.agnostic_nms)
    classes = class_labels(options.classes, model.names)
    wanted = Wanted(
        pictures=not options.nosave,
        txt=options.save_txt,
        conf=options.save_conf,
        json=options.save_json,
        csv=options.save_csv,
        crops=options.save_crop,
        line_thickness=options.line_thickness,
        hide_labels=options.hide_labels,
        hide_conf=options.hide_conf,
        fourcc=options.fourcc,
        vid_stride=options.vid_stride,
    )
    folder = new_run(options.project, options.name, options.exist_ok)
    if wanted.txt:
        (folder / LABELS).mkdir(exist_ok=True)

    seconds: dict[str, float] = defaultdict(float)
    form = FORMS[model.task]
    numbers_by_label: dict[int, list[float]] = defaultdict(list)
    troubled: set[Source] = set()
    images = 0
    closed = Event()
    stopped: KeyboardInterrupt | OSError | None = None

    def tell(source: Source, fault: Fault) -> None:
        troubled.add(source)
        for line in fault.lines:
            tqdm.write(line, file=sys.stderr)

    def view(source: Source, picture: np.ndarray) -> None:
        cv2.imshow(source.shown, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        if cv2.waitKey(1 if source.moves else 0) in (ord("q"), 27):
            closed.set()

    start = time.perf_counter()
    try:
        with ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=0, desc="detect", unit="image", leave=False))
            write = stack.enter_context(
                write_results(folder, model.names, wanted, tell, view if options.view else None, model.task)
            )

            def work(done: tuple[Prepared, list[Any]]) -> None:
                """Write down what was found in a batch; in a thread of its own."""
                nonlocal images
                turn, results = done[0], iter(done[1])
                with timed(seconds, "write"):
                    for item in turn.items:
                        if isinstance(item, End):
                            write(item, None)
                            continue
                        found = next(results)
                        write(item, found)
                        images += 1
                        if model.task == "classify" and not item.source.moves:
                            tqdm.write(printable(ranking_line(item, found, model.names)))
                        for label, number in form.counted(found):
                            numbers_by_label[label].append(number)

            # a window belongs to the main thread
            put = work if options.view else stack.enter_context(behind(work, AHEAD))
            items = read_sources(sources, options.vid_stride)
            batches = stack.enter_context(ahead(prepared(items, model, options.batch_size, seconds), AHEAD))
            for turn in batches:
                found: list[Any] = []
                if turn.batch is not None and model.task == "classify":
                    found = model.rank(turn.batch, seconds)
                elif turn.batch is not None and model.task == "segment":
                    found = model.segment(turn.batch, turn.letterboxes, seconds)
                elif turn.batch is not None:
                    found = model.find(
                        turn.batch,
                        turn.letterboxes,
                        asked,
                        classes=classes,
                        agnostic=options.agnostic_nms,
                        seconds=seconds,
                    )
                put((turn, found))
                if closed.is_set():
                    break
                for item in turn.items:
                    if isinstance(item, Frame) and item.number <= 1:
                        bar.total += max(1, math.ceil(item.frames / options.vid_stride))
                bar.update(len(turn.letterboxes))
    except (KeyboardInterrupt, OSError) as stop:
        stopped = stop

    if not images:
        for table_file in [TABLE] * wanted.csv + [DOCUMENT] * wanted.json:  # without a row
            (folder / table_file).unlink(missing_ok=True)
        for empty in (folder / LABELS, folder):
            with suppress(OSError):  # it was there before, and holds something
                empty.rmdir()
        if stopped:
            raise stopped
        if len(sources) == 1:  # its fault has been told
            return 2
        raise Fault(f"{options.source}: nothing in it could be read")
    print(found_table(form, numbers_by_label, model.names))
    each = {name: 1000 * total / images for name, total in seconds.items()}
    together = 1000 * (time.perf_counter() - start) / images
    print(f"{images} images, {times_line(each)}; side by side {together:.1f}")
    print(f"results are in {folder}")
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt("interrupted: what was finished before stays")
    if stopped is not None:
        print(*told(stopped), "stopped: what was finished before stays", sep="\n", file=sys.stderr)
    elif troubled:
        print(f"{len(troubled)} of {len(sources)} sources could not be read or written to their end", file=sys.stderr)
    return int(bool(stopped or troubled))
