"""A network as a file that runs without this program: ONNX, OpenVINO, or a program of torch.export.

An ONNX or OpenVINO file takes images of any height and width that are multiples of the network's stride, so that
detect.py pads them as little for it as for a checkpoint, and finds the same.

What is written is loaded again, held against the network it was made from, and timed. A file that does not give the
same is not left behind. To run one needs torch, onnxruntime or openvino and nothing else::

    boxes, scores = torch.export.load("best.pt2").module()(images)
    boxes, scores = onnxruntime.InferenceSession("best.onnx").run(None, {"images": images})
    boxes, scores = openvino.compile_model("best.xml")(images).values()

OpenVINO's is two files, ``best.xml`` and the weights ``best.bin`` beside it. It is made of the ONNX file.

That of a classifier gives scores ``[N, C]`` alone, which sum to 1; that of a segmenter scores ``[N, C, H, W]``.

Shape letters: N images, M boxes before suppression, K candidates, D detections at most, C classes.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.augment import letterbox, middle
from data.images import SUFFIXES, read_image
from data.shapes import draw_image
from data.structures import Detections, Fault
from engine.doors import door, option_parser, parse_options
from engine.evaluate import check_imgsz, check_thresholds
from engine.nms import nms
from engine.runs import atomically
from engine.sources import find_files
from engine.tasks import check_given, task_of
from models.boxes import pairwise_iou
from models.checkpoint import Checkpoint, load_checkpoint, restore
from models.cost import count_params
from models.fuse import fuse
from models.network import Network
from models.parse import parse_text

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the extra `export`
NEEDED: Mapping[str, tuple[str, ...]] = {"onnx": PACKAGES, "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
EXTRAS = {"onnx": "export", "openvino": "openvino"}  # that bring these
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch.export"}
ANY_SIZE = ("onnx", "openvino")  # files that take images of any size
OPSET = 18  # the version that torch's exporter is written for
CANDIDATES = 1024  # boxes an image that suppression inside the file looks at
BATCHES = (1, 3)  # of the check; the file takes any
TOLERANCE = 1e-4  # largest difference of numbers, as a share of the largest number
SAME_IOU, SAME_SCORE = 0.99, 1e-3  # of two detections that are one
LOOKED_AT = (30, 200)  # boxes an image that the check compares, at least and at most
LEAST = 1e-12  # score whose logarithm is compared
LETTERBOXED = "scaled to fit imgsz and centred on grey 114 / 255"
MOST_SECONDS = 20.0  # of measuring how long an image takes
ABOUT = "oneshot_yolo"  # where what travels in an OpenVINO file stands in it

Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Suppression:
    """What NMS inside an exported file goes by."""

    conf: float
    iou: float
    max_det: int


class Exported(nn.Module):
    """What a file computes of images ``[N, 3, H, W]``: RGB in 0 to 1, letterboxed as everywhere in this program.

    Of a detector without suppression boxes ``[N, M, 4]`` xyxy in pixels of the input and scores ``[N, M, C]``. With it
    boxes ``[N, D, 4]``, scores ``[N, D]``, labels ``[N, D]`` and how many there are ``[N]``, best first, the rest
    zeros. Of any other network scores alone.
    """

    conf: Tensor
    iou: Tensor

    def __init__(self, network: Network, suppression: Suppression | None) -> None:
        super().__init__()
        self.network = network
        self.max_det = suppression.max_det if suppression else 0
        if suppression:  # buffers, so that the check can ask a loaded file for less certain boxes
            self.register_buffer("conf", torch.tensor(suppression.conf))
            self.register_buffer("iou", torch.tensor(suppression.iou))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.network.predict(images)
        if isinstance(found, Tensor):
            return (found,)
        return self.suppress(*found) if self.max_det else found

    def suppress(self, boxes_NM4: Tensor, scores_NMC: Tensor) -> tuple[Tensor, ...]:
        """`engine.nms` with one class a box, in steps whose sizes do not depend on what is in the images.

        A box stays if no box that stays, is better, and has its label overlaps it by more than ``iou``. That is asked
        of all boxes at once until nothing changes: the answer for the best n boxes is final after n rounds, in
        practice all are after a few.
        """
        scores_NM, labels_NM = scores_NMC.max(dim=-1)
        # Boxes of nothing behind the others: K is the same however many boxes an image of that size has.
        boxes_NM4 = F.pad(boxes_NM4, (0, 0, 0, CANDIDATES))
        scores_NM, labels_NM = F.pad(scores_NM, (0, CANDIDATES)), F.pad(labels_NM, (0, CANDIDATES))
        has_area_NM = (boxes_NM4[..., 2:] > boxes_NM4[..., :2]).all(dim=-1)
        scores_NK, chosen_NK = torch.where(has_area_NM, scores_NM, 0.0).topk(CANDIDATES)
        boxes_NK4, labels_NK = _take(boxes_NM4, chosen_NK), labels_NM.gather(1, chosen_NK)

        alike_NKK = (labels_NK[:, :, None] == labels_NK[:, None]).triu(diagonal=1)
        pushes_NKK = (alike_NKK & _overlapping(boxes_NK4, self.iou)).float()
        asked_NK = scores_NK > self.conf

        def changes(keep_NK: Tensor, before_NK: Tensor) -> Tensor:
            return (keep_NK != before_NK).any()

        def settle(keep_NK: Tensor, before_NK: Tensor) -> tuple[Tensor, Tensor]:
            pushed_NK = torch.einsum("nk,nkj->nj", keep_NK.float(), pushes_NKK) > 0
            return asked_NK & ~pushed_NK, keep_NK.clone()

        keep_NK, _ = torch.while_loop(changes, settle, (asked_NK.clone(), torch.zeros_like(asked_NK)))
        detections = min(self.max_det, CANDIDATES)
        scores_ND, best_ND = torch.where(keep_NK, scores_NK, 0.0).topk(detections)
        there_ND = scores_ND > 0
        boxes_ND4 = torch.where(there_ND[..., None], _take(boxes_NK4, best_ND), 0.0)
        labels_ND = torch.where(there_ND, labels_NK.gather(1, best_ND), 0)
        return boxes_ND4, scores_ND, labels_ND, there_ND.sum(dim=1)


def _overlapping(boxes_NK4: Tensor, iou: Tensor) -> Tensor:
    """``[N, K, K]``: whether two boxes of an image overlap by more than ``iou``."""
    x1, y1, x2, y2 = boxes_NK4.unbind(dim=-1)
    width = torch.minimum(x2[:, :, None], x2[:, None]) - torch.maximum(x1[:, :, None], x1[:, None])
    height = torch.minimum(y2[:, :, None], y2[:, None]) - torch.maximum(y1[:, :, None], y1[:, None])
    both = width.clamp(min=0) * height.clamp(min=0)
    share = (x2 - x1) * (y2 - y1) * (iou / (1 + iou))  # both / (a + b - both) > iou, solved for both
    return both > share[:, :, None] + share[:, None]


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


OUTPUTS = {False: ("boxes", "scores"), True: ("boxes", "scores", "labels", "count")}  # without and with suppression
SCORES = ("scores",)  # of what is no detector


# ---- writing and running a file


def write_file(
    path: Path,
    kind: str,
    exported: nn.Module,
    example: Tensor,
    about: Mapping[str, str],
    outputs: Sequence[str] = OUTPUTS[False],
    stride: int | None = None,
) -> None:
    """The module as a file of that kind for any number of images like the example; ``about`` travels in it by name.

    An ONNX or OpenVINO file gives what the module does under the names `outputs`. With ``stride`` it takes images of
    any size that is a multiple of it, and the example only says how many channels.
    """
    assert len(example) > 1, "a batch of 1 would be taken for the only one"
    free: dict[int, Any] = {0: torch.export.Dim("batch")}
    if stride:
        free |= {2: stride * torch.export.Dim("height"), 3: stride * torch.export.Dim("width")}
        example = example.new_zeros(*example.shape[:2], 4 * stride, 6 * stride)  # a 1 would be taken for the only one
    with torch.no_grad(), exporter_silent():
        program = torch.export.export(exported, (example,), dynamic_shapes=(free,))
        program.example_inputs = None  # it would be stored, and it says nothing
        if kind == "torch":
            torch.export.save(program, path, extra_files=dict(about))
            return
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=list(outputs),
            dynamic_shapes=(free,),
            verbose=False,
        )
        assert onnx_program is not None
        if kind == "onnx":
            write_onnx(path, onnx_program.model_proto, about)
            return
        with TemporaryDirectory() as folder:
            between = Path(folder) / "network.onnx"
            write_onnx(between, onnx_program.model_proto, {})
            write_openvino(path, between, about)


def write_onnx(path: Path, model: Any, about: Mapping[str, str]) -> None:
    """Write what the exporter made, with the properties ``about`` it, so that onnxruntime computes what torch does."""
    import onnx

    # onnxruntime makes one step of a Pad with zeros and the MaxPool behind it, which pads with minus infinity: wrong
    # where a map is negative at its edge. It leaves a Pad alone that is not zero.
    pooled = {node.input[0] for node in model.graph.node if node.op_type == "MaxPool"}
    for node in model.graph.node:
        if node.op_type == "Pad" and node.output[0] in pooled:
            node.input[2:] = ["almost_zero"]
    if any("almost_zero" in node.input for node in model.graph.node):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1e-30, np.float32), "almost_zero"))
    onnx.helper.set_model_props(model, dict(about))
    onnx.save(model, path)


def write_openvino(path: Path, onnx_file: Path, about: Mapping[str, str]) -> None:
    """An ONNX file as OpenVINO's ``path`` and its weights beside it, with the properties ``about`` it."""
    import openvino

    model = openvino.Core().read_model(onnx_file)
    for step in model.get_ops():
        if "stable" in step.get_attributes():  # of boxes that score alike the first one first, as everywhere else
            step.set_attribute("stable", True)
    for name, value in about.items():
        model.set_rt_info(value, [ABOUT, name])
    openvino.serialize(model, path, path.with_suffix(".bin"))  # in float32, which its `save_model` would halve


@contextmanager
def appearing(out: Path, kind: str) -> Iterator[Path]:
    """As `atomically`, where a kind of file has its weights in a second one too.

    While the two of OpenVINO take their places there is no ``.xml``, so that none stands beside the weights of another.
    """
    if kind != "openvino":
        with atomically(out) as temporary:
            yield temporary
        return
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
        temporary = Path(folder) / out.name
        yield temporary
        assert temporary.is_file() and temporary.with_suffix(".bin").is_file()
        out.unlink(missing_ok=True)
        for ending in (".bin", ".xml"):
            temporary.with_suffix(ending).replace(out.with_suffix(ending))


def read_file(path: Path, kind: str, conf: float | None = None) -> Run:
    """The written file as a function of images. ``conf`` replaces the threshold of its suppression, in memory only."""
    if kind == "torch":
        module = torch.export.load(path).module()
        if conf is not None:
            dict(module.named_buffers())["conf"].fill_(conf)
        return lambda images: tuple(module(images))

    if kind == "openvino":
        return _openvino_run(_openvino_model(path, conf))

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = str(path) if conf is None else _with_threshold(path, conf)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()}))


@dataclass(frozen=True, eq=False)
class ExportedFile:
    """An ONNX or OpenVINO file of this program, to be used like the `Network` it was made from.

    ``run`` computes its outputs; ``side`` is that of its square input, or None where it takes any multiple of
    ``max_stride``; ``suppression`` is what it has done by itself, or None; ``task`` is that of the network's head,
    ``yaml`` its model file; ``suppresses`` is `Network.suppresses`.
    """

    path: Path
    run: Run
    names: tuple[str, ...]
    imgsz: int
    max_stride: int
    side: int | None
    suppression: Suppression | None
    task: str = "detect"
    yaml: str = ""
    suppresses: bool = True

    def predict(self, images: Tensor) -> Any:
        """As `Network.predict`: boxes ``[N, M, 4]`` and scores ``[N, M, C]``; of a file that suppresses, what is left.

        Suppressed detections have the score of their class and 0 for all others, so that suppression as before, done
        once more, changes nothing. What is no detector gives scores alone.
        """
        outputs = self.run(images.cpu().contiguous())
        if len(outputs) == 1:
            return outputs[0]
        if self.suppression is None:
            return outputs[0], outputs[1]
        boxes_ND4, scores_ND, labels_ND, _ = outputs
        scores_NDC = scores_ND.new_zeros(*scores_ND.shape, len(self.names))
        return boxes_ND4, scores_NDC.scatter_(2, labels_ND[..., None], scores_ND[..., None])


def is_exported(path: str | Path) -> bool:
    """Whether `read_exported` is who reads a path: ONNX, OpenVINO, or a folder, which may hold the latter."""
    path = Path(path)
    return path.suffix in (".onnx", ".xml", ".bin") or path.is_dir()


def read_exported(path: Path, device: torch.device | str = "cpu") -> ExportedFile:
    """A file that `write_file` wrote, ready to run; OpenVINO's also by its folder or the file of its weights.

    Raises a `Fault` for any other, and without the package that runs it.
    """
    path = _of_folder(path) if path.is_dir() else path.with_suffix(".xml") if path.suffix == ".bin" else path
    kind = "onnx" if path.suffix == ".onnx" else "openvino"
    if find_spec(RUNTIMES[kind]) is None:
        raise Fault(f"{path}: needs {RUNTIMES[kind]}; pip install 'oneshot-yolo[{EXTRAS[kind]}]'")
    if not path.is_file():
        raise Fault(f"{path}: no such file")
    run, about, side = (_open_onnx if kind == "onnx" else _open_openvino)(path, torch.device(device))
    try:
        names, strides = json.loads(about["names"]), json.loads(about["strides"])
        inside = json.loads(about["nms"]) if "nms" in about else None
        suppression = Suppression(inside["conf"], inside["iou"], inside["max_det"]) if inside else None
        imgsz, stride = int(about["imgsz"]), int(about.get("stride") or max(strides))
        task, suppresses = about.get("task", "detect"), json.loads(about.get("suppresses", "true"))
    except (KeyError, ValueError, TypeError):
        family = "ONNX" if kind == "onnx" else "OpenVINO"
        raise Fault(f"{path}: does not say which classes it finds; export.py writes {family} files that do") from None
    text = about.get("yaml", "")
    return ExportedFile(path, run, tuple(names), imgsz, stride, side, suppression, task, text, bool(suppresses))


Opened = tuple[Run, Mapping[str, str], int | None]  # how it computes, what it says of itself, `ExportedFile.side`


def _open_onnx(path: Path, device: torch.device) -> Opened:
    import onnxruntime

    wanted = "CPUExecutionProvider" if device.type == "cpu" else "CUDAExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise Fault(f"{path}: this onnxruntime does not run on a GPU; --device cpu, or the package onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a waiting thread leaves the CPU free
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
    except Exception:  # what a damaged file raises is not documented
        raise Fault(f"{path}: not a whole ONNX file; export it again") from None
    shape = session.get_inputs()[0].shape
    side = shape[2] if len(shape) == 4 and isinstance(shape[2], int) else None
    about = session.get_modelmeta().custom_metadata_map
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()}))), about, side


def _open_openvino(path: Path, device: torch.device) -> Opened:
    if device.type != "cpu":
        raise Fault(f"{path}: OpenVINO runs on the CPU here; --device cpu")
    # asked before OpenVINO: what is no model at all it takes for one of several programs, and says so on stderr
    if not path.read_bytes().rstrip().endswith(b"</net>"):
        raise Fault(f"{path}: not a whole OpenVINO file; export it again")
    try:
        model = _openvino_model(path)
        run = _openvino_run(model)
    except RuntimeError:
        weights = path.with_suffix(".bin")
        raise Fault(f"{path}: not a whole OpenVINO file with its weights {weights}; export it again") from None
    about = dict(model.get_rt_info([ABOUT]).value) if model.has_rt_info([ABOUT]) else {}
    size = model.input(0).partial_shape[2]
    return run, about, size.get_length() if size.is_static else None


def _openvino_model(path: Path, conf: float | None = None) -> Any:
    import openvino

    model = openvino.Core().read_model(path)
    if conf is not None:
        (old,) = (step for step in model.get_ops() if step.get_friendly_name() == "conf")
        new = openvino.op.Constant(np.array(conf, np.float32))
        for reader in old.output(0).get_target_inputs():
            reader.replace_source_output(new.output(0))
    return model


def _openvino_run(model: Any) -> Run:
    import openvino

    # float32 by name: OpenVINO computes in bfloat16 by itself where a CPU can
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", config)
    return lambda images: tuple(map(torch.from_numpy, compiled([images.numpy()]).values()))


def _of_folder(folder: Path) -> Path:
    files = sorted(folder.glob("*.xml"))
    if len(files) != 1:
        raise Fault(f"{folder}: a folder with {len(files)} .xml files; name a checkpoint (.pt) or an exported file")
    return files[0]


class FileNetwork(nn.Module):
    """An exported file in the place of the `Network` that it was made from, to be measured.

    It has no weights: its one parameter says where, and in which precision, it takes images.
    """

    def __init__(self, file: ExportedFile) -> None:
        super().__init__()
        self.file, self.num_classes, self.max_stride = file, len(file.names), file.max_stride
        self.suppresses = file.suppresses
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)

    def predict(self, images: Tensor) -> Any:
        return self.file.predict(images)


def file_to_measure(
    path: Path, device: torch.device, *, imgsz: int | None, half: bool, rect: bool
) -> tuple[Checkpoint, FileNetwork]:
    """What val.py needs of an exported file, without weights. Raises a `Fault` for one that does not tell all."""
    if half:
        raise Fault(f"{path}: an exported file has the precision it was written with; leave --half out")
    file = read_exported(path, device)
    if file.suppression:
        raise Fault(f"{path}: suppresses by itself, and leaves out what AP counts; export it again without --nms")
    if file.task == "segment":
        raise Fault(
            f"{path}: a segmenter is measured by its checkpoint (.pt), whose logits are enlarged, not its scores"
        )
    if file.side and (rect or imgsz not in (None, file.side)):
        asked = "rectangles" if rect else imgsz
        raise Fault(f"{path}: takes images of {file.side} px only, not {asked}; export it without --static")
    spec = parse_text(file.yaml, f"{path}[yaml]")
    return Checkpoint(path, spec, file.yaml, file.names, file.imgsz, {}, None, {}), FileNetwork(file)


def _with_threshold(path: Path, conf: float) -> bytes:
    import onnx

    model = onnx.load(path)
    for constant in model.graph.initializer:
        if constant.name == "conf":
            constant.CopyFrom(onnx.numpy_helper.from_array(np.array(conf, np.float32), "conf"))
    return model.SerializeToString()


@contextmanager
def exporter_silent() -> Iterator[None]:
    """The exporters warn of packages that are absent and of their own old parts: nothing a user could change."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---- is it the same network?


@dataclass(frozen=True)
class Parity:
    """How near a file is to its network: worst differences as a share of the largest number, and matched detections."""

    boxes: float
    scores: float
    detections: int

    def line(self) -> str:
        compared = f"{self.detections} detections matched one to one"
        return f"parity: boxes {self.boxes:.1e}, scores {self.scores:.1e} of their largest; {compared}"


@dataclass(frozen=True)
class ScoreParity:
    """The same for a network that gives scores alone: worst differences of these and of their logarithms."""

    scores: float
    logarithms: float
    images: int

    def line(self) -> str:
        return (
            f"parity: scores {self.scores:.1e}, their logarithms {self.logarithms:.1e} of the largest, "
            f"{self.images} images"
        )


def check_scores(network: Network, run: Run, images: Tensor) -> ScoreParity:
    """Hold a written file that gives scores against the network, in batches of 1 and 3. Raises a `Fault` where they
    differ.

    Their logarithms are compared as well: a network that is sure of itself has scores of 0 and 1 whatever its last
    digits are.
    """
    scores, logarithms = 0.0, 0.0
    for batch in BATCHES:
        with torch.no_grad():
            wanted, (found,) = network.predict(images[:batch]), run(images[:batch])
        assert isinstance(wanted, Tensor)
        scores = max(scores, _difference("scores", wanted, found))
        pair = (y.clamp(min=LEAST).log() for y in (wanted, found))
        logarithms = max(logarithms, _difference("logarithms of scores", *pair))
    return ScoreParity(scores, logarithms, sum(BATCHES))


def check_parity(
    network: Network, read: Callable[[float | None], Run], images: Tensor, asked: Suppression, *, inside: bool
) -> Parity:
    """Hold a written file against the network, in batches of 1 and 3. Raises a `Fault` where they differ.

    ``read(conf)`` gives the file as a function, with another threshold where one is given; ``inside`` says that it
    suppresses by itself, as ``asked``. Detections of both are compared twice: those asked for, and, where these are
    few, the best of each image at a threshold low enough to find some.
    """
    low = _threshold(network, images)
    boxes, scores, matched = 0.0, 0.0, 0
    for conf in sorted({asked.conf, min(asked.conf, low)}):
        run = read(conf if inside and conf != asked.conf else None)
        for batch in BATCHES:
            with torch.no_grad():
                wanted, found = network.predict(images[:batch]), run(images[:batch])
            if not inside:
                boxes = max(boxes, _difference("boxes", wanted[0], found[0]))
                scores = max(scores, _difference("scores", wanted[1], found[1]))
            for index in range(batch):
                mine = _suppressed(wanted[0][index], wanted[1][index], asked, conf)
                if inside:
                    count = int(found[3][index])
                    other = Detections(*(y[index, :count] for y in found[:3]))
                else:
                    other = _suppressed(found[0][index], found[1][index], asked, conf)
                here, there = _matched(mine, other, max(conf, low), asked.max_det)
                boxes = max(boxes, _difference("boxes", mine.boxes[here], other.boxes[there]))
                scores = max(scores, _difference("scores", mine.scores[here], other.scores[there]))
                matched += len(here)
    return Parity(boxes, scores, matched)


def _difference(what: str, wanted: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest number; of scores as a share of .01 at least: smaller ones are
    those of a network that has learned nothing yet. Raises a `Fault` where that is more than allowed.
    """
    if wanted.shape != found.shape:
        raise Fault(f"not the same: {what} are {list(found.shape)}, not {list(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    least = 0.01 if what == "scores" else 1e-12
    difference = float((wanted - found).abs().max() / wanted.abs().max().clamp(min=least))
    if not difference < TOLERANCE:  # also where it is nan
        raise Fault(f"not the same: {what} differ by {difference:.1e} of the largest, {TOLERANCE:.0e} is allowed")
    return difference


def _threshold(network: Network, images: Tensor) -> float:
    """A score that no box is near to, with a few dozen boxes an image above it."""
    with torch.no_grad():
        _, scores = network.predict(images)
    best = scores.amax(dim=-1).flatten().sort(descending=True).values
    first, last = (min(count * len(images), len(best) - 1) for count in LOOKED_AT)
    ranked = best[first : last + 1]
    if len(ranked) < 2:
        return 0.0
    widest = int((ranked[:-1] - ranked[1:]).argmax())
    return float((ranked[widest] + ranked[widest + 1]) / 2)


def _suppressed(boxes: Tensor, scores: Tensor, asked: Suppression, conf: float) -> Detections:
    return nms(boxes, scores, conf=conf, iou=asked.iou, max_det=asked.max_det, multi_label=False, top_k=CANDIDATES)


def _matched(wanted: Detections, found: Detections, above: float, max_det: int) -> tuple[list[int], list[int]]:
    """Indices of detections that are one, of both in the same order. Raises a `Fault` for any without a partner.

    Scores at the threshold, or at the last place of a full list, may fall to either side: they need no partner.
    """
    if len(wanted) == max_det:
        above = max(above, float(wanted.scores[-1]))
    same = pairwise_iou(wanted.boxes, found.boxes) > SAME_IOU
    same &= wanted.labels[:, None] == found.labels
    same &= (wanted.scores[:, None] - found.scores).abs() < SAME_SCORE
    here: list[int] = []
    there: list[int] = []
    left, alone = list(range(len(found))), []
    for index in range(len(wanted)):
        partner = next((other for other in left if same[index, other]), None)
        if partner is not None:
            here.append(index)
            there.append(partner)
            left.remove(partner)
        elif wanted.scores[index] > above + TOLERANCE:
            alone.append(index)
    surplus = [index for index in left if found.scores[index] > above + TOLERANCE]
    if alone or surplus:
        raise Fault(
            f"not the same: {len(alone)} of {len(wanted)} detections are missing, {len(surplus)} of {len(found)} new"
        )
    return here, there


def check_images(source: str | None, imgsz: int, crops: bool = False) -> Tensor:
    """The images of the check ``[3, 3, imgsz, imgsz]`` in 0 to 1, of ``source`` or drawn ones: whole, with grey around
    them, or with `crops` their middles.
    """
    if source is None:
        pictures = [draw_image(imgsz, np.random.default_rng(seed))[0] for seed in range(max(BATCHES))]
    else:
        files = [path for path in find_files(source)[0] if path.suffix.lower() in SUFFIXES]
        if not files:
            raise Fault(f"--source {source}: no image in it")
        pictures = [read_image(files[index % len(files)]) for index in range(max(BATCHES))]
    squares = np.stack([(middle if crops else letterbox)(picture, imgsz)[0] for picture in pictures])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().float() / 255


# ---- how long does it take?


@torch.no_grad()
def interleaved_ms(runs: Mapping[str, Callable[[], object]], rounds: int = 15, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each run. They take turns in a fresh order, so that a slow spell hits all alike.

    After 20 seconds and three rounds it is enough.
    """
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in tqdm(range(warmup + rounds), "latency", unit="round", leave=False, delay=2):
        for name in rng.permutation(list(runs)):
            began = time.perf_counter()
            runs[name]()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - began))
        if turn >= warmup + 2 and time.perf_counter() - start > MOST_SECONDS:
            break
    return {name: float(np.median(found)) for name, found in times.items()}


def latency_line(networks: Mapping[str, Network], run: Run, name: str, imgsz: int, inside: Suppression | None) -> str:
    """``latency: torch 45.1, torch fused 41.0, onnxruntime 30.2 ms``; suppression counts where the file has it."""
    image = torch.zeros(1, 3, imgsz, imgsz)

    def detect(network: Network) -> None:
        found = network.predict(image)
        if inside:
            _suppressed(found[0][0], found[1][0], inside, inside.conf)

    runs: dict[str, Callable[[], object]] = {label: partial(detect, network) for label, network in networks.items()}
    times = interleaved_ms(runs | {name: lambda: run(image)})
    shown = ", ".join(f"{label} {ms:.1f}" for label, ms in times.items())
    return f"latency: {shown} ms (one image of {imgsz} px, medians, {torch.get_num_threads()} threads)"


# ---- export.py


def check_packages(kind: str, option: str = "--format") -> None:
    """Raises a Fault where a file of this kind cannot be written here; `option` is how the user asked for it."""
    absent = [package for package in NEEDED[kind] if find_spec(package) is None]
    if absent:
        raise Fault(
            f"{option} {kind} needs {', '.join(absent)}, not installed here: pip install -e '.[{EXTRAS[kind]}]'"
        )


def described(
    checkpoint: Checkpoint, imgsz: int, network: Network, suppression: Suppression | None, shape: str
) -> dict[str, str]:
    """What a user of the file needs to know beside the tensors, each as text (JSON where it is more than a word)."""
    task = task_of(checkpoint.spec)
    seen = "its middle, a square of 7/8 of its shorter side, scaled to imgsz" if task.crops else LETTERBOXED
    about = {
        "task": task.name,
        "names": json.dumps(list(checkpoint.names)),
        "imgsz": str(imgsz),
        "strides": json.dumps(list(getattr(network.head, "strides", ()))),
        "stride": str(network.max_stride),  # height and width are multiples of it
        "input": f"images {shape}, RGB from 0 to 1, {seen}",
        "yaml": checkpoint.yaml,
    }
    if task.name == "detect":
        about["boxes"] = "x1 y1 x2 y2 in pixels of the input"
        about["suppresses"] = json.dumps(network.suppresses)
    if suppression:
        about["nms"] = json.dumps({**vars(suppression), "candidates": CANDIDATES})
    return about


def export(
    checkpoint: Checkpoint,
    kind: str,
    out: Path,
    *,
    imgsz: int | None,
    asked: Suppression,
    inside: bool,
    source: str | None,
    any_size: bool = False,
) -> Iterator[str]:
    """Write, check and time a file; yields a line for each. Raises a `Fault`, and leaves no file, where it differs."""
    task = task_of(checkpoint.spec)
    network = restore(checkpoint)
    side = check_imgsz(imgsz or checkpoint.imgsz, network.max_stride)
    images = check_images(source, side, task.crops)
    asked = asked if network.suppresses else replace(asked, iou=1.0)
    suppression = asked if inside else None
    fused = fuse(network)
    stride = network.max_stride
    shape = f"[batch, 3, {side}, {side}]"
    if any_size:
        shape = f"[batch, 3, height, width], multiples of {stride}"
    about = described(checkpoint, side, network, suppression, shape)
    outputs = OUTPUTS[inside] if task.name == "detect" else SCORES
    out.parent.mkdir(parents=True, exist_ok=True)
    with appearing(out, kind) as temporary:
        exported = Exported(fused, suppression)
        write_file(temporary, kind, exported, images, about, outputs, stride if any_size else None)
        read = cache(partial(read_file, temporary, kind))

        def held_against(images: Tensor) -> Parity | ScoreParity:
            if task.name == "detect":
                return check_parity(network, read, images, asked, inside=inside)
            return check_scores(network, read(None), images)

        try:
            parity = held_against(images)
            if any_size:
                held_against(images[:, :, : max(side // 2 // stride, 1) * stride])
        except Fault as fault:
            raise Fault(*(f"{out}: was not written: {line}" for line in fault.lines)) from None
        run = read(None)
    parameters = f"{count_params(fused):,} of {count_params(network):,} parameters, the rest is folded"
    yield f"{out}: {shape} -> {', '.join(outputs)}; {parameters}"
    yield parity.line()
    timed = {"torch": network, "torch fused": fused}
    yield latency_line(timed, run, RUNTIMES[kind], side, suppression)


@door
def main(argv: Sequence[str] | None = None) -> int:
    parser = option_parser("Writes a trained network as a file that runs without this program, and checks it.")
    parser.add_argument("--weights", required=True, help="a checkpoint (.pt) that train.py wrote")
    parser.add_argument(
        "--format",
        required=True,
        choices=list(ENDINGS),
        help="onnx, openvino (.xml and .bin), or torch for torch.export (.pt2)",
    )
    parser.add_argument("-o", "--out", help="the file to write; default: beside the weights, with the format's ending")
    parser.add_argument("--imgsz", type=int, help="pixels; default: what the network was trained with")
    parser.add_argument("--nms", action="store_true", help="the file suppresses by itself and gives detections")
    parser.add_argument("--conf-thres", type=float, default=0.25, help="NMS: scores above this count")
    parser.add_argument("--iou-thres", type=float, default=0.45, help="NMS: boxes that overlap more are one object")
    parser.add_argument("--max-det", type=int, default=300, help="NMS: detections an image at most")
    parser.add_argument("--static", action="store_true", help="not torch: squares of --imgsz only, not any size")
    parser.add_argument("--source", help="images for the check, a folder or a glob in quotes; default: drawn ones")
    options = parse_options(parser, argv)
    check_thresholds(options.conf_thres, options.iou_thres, options.max_det)
    weights, ending = Path(options.weights), ENDINGS[options.format]
    out = Path(options.out) if options.out else weights.with_suffix(ending)
    if out.suffix != ending:
        raise Fault(f"-o {out}: a file of --format {options.format} ends in {ending}: {out.with_suffix(ending)}")
    check_packages(options.format)
    asked = Suppression(options.conf_thres, options.iou_thres, options.max_det)
    checkpoint = load_checkpoint(weights)
    check_given(task_of(checkpoint.spec), options, parser)
    for line in export(
        checkpoint,
        options.format,
        out,
        imgsz=options.imgsz,
        asked=asked,
        inside=options.nms,
        source=options.source,
        any_size=options.format in ANY_SIZE and not options.static,
    ):
        print(line)
    return 0
