"""Files that `engine.export` wrote, read back: ready to run, in the place of the network they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.structures import Fault
from engine.nms import Suppression
from models.checkpoint import Checkpoint
from models.parse import parse_text

EXTRAS = {"onnx": "export", "openvino": "openvino"}  # that bring these
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch.export"}
CANDIDATES = 1024  # boxes an image that suppression inside the file looks at
ABOUT = "oneshot_yolo"  # where what travels in an OpenVINO file stands in it

Run = Callable[[Tensor], tuple[Tensor, ...]]
Opened = tuple[Run, Mapping[str, str], int | None]  # how it computes, what it says of itself, `ExportedFile.side`


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
        raise Fault(f"{path}: needs {RUNTIMES[kind]}; pip install -e '.[{EXTRAS[kind]}]'")
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
    shape = model.input(0).partial_shape
    size = shape[2] if shape.rank.is_static and len(shape) == 4 else None
    return run, about, size.get_length() if size is not None and size.is_static else None


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
