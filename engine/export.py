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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Fault
from engine.doors import check_imgsz, check_thresholds, door, option_parser, parse_options
from engine.exported import ABOUT, CANDIDATES, EXTRAS, RUNTIMES, Run, read_file
from engine.nms import USUAL, Suppression, iou_for
from engine.parity import Parity, ScoreParity, check_images, check_parity, check_scores, suppressed
from engine.runs import atomically
from engine.tasks import check_given, task_of
from engine.timing import interleaved
from models.checkpoint import Checkpoint, load_checkpoint, restore
from models.cost import count_params
from models.fuse import fuse
from models.network import Network

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # of the extra `export`
NEEDED: Mapping[str, tuple[str, ...]] = {"onnx": PACKAGES, "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
ANY_SIZE = ("onnx", "openvino")  # files that take images of any size
OPSET = 18  # the version that torch's exporter is written for
LETTERBOXED = "scaled to fit imgsz and centred on grey 114 / 255"
MOST_SECONDS = 20.0  # of measuring how long an image takes


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


# ---- writing a file


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


# ---- how long does it take?


def latency_line(networks: Mapping[str, Network], run: Run, name: str, imgsz: int, inside: Suppression | None) -> str:
    """``latency: torch 45.1, torch fused 41.0, onnxruntime 30.2 ms``; suppression counts where the file has it."""
    image = torch.zeros(1, 3, imgsz, imgsz)

    def detect(network: Network) -> None:
        found = network.predict(image)
        if inside:
            suppressed(found[0][0], found[1][0], inside, inside.conf)

    runs: dict[str, Callable[[], object]] = {label: partial(detect, network) for label, network in networks.items()}
    runs[name] = partial(run, image)
    times = interleaved(list(runs.values()), rounds=15, warmup=2, seconds=MOST_SECONDS, fewest=3)
    shown = ", ".join(f"{label} {time.ms:.1f}" for label, time in zip(runs, times, strict=True))
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
    side = check_imgsz(checkpoint.imgsz if imgsz is None else imgsz, network.max_stride)
    images = check_images(source, side, task.crops)
    asked = replace(asked, iou=iou_for(network, asked.iou))
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
    parser.add_argument("--conf-thres", type=float, default=USUAL.conf, help="NMS: scores above this count")
    parser.add_argument("--iou-thres", type=float, default=USUAL.iou, help="NMS: boxes that overlap more are one")
    parser.add_argument("--max-det", type=int, default=USUAL.max_det, help="NMS: detections an image at most")
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
