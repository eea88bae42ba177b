"""How long networks and single rows of them take on this device, as they are deployed.

Deployed means: batch norms folded, evaluation mode, float32, one image, decoding included and suppression left out; in
``torch`` under inference mode in the channels_last format, in ``onnxruntime`` as the ONNX file of it. What is compared
takes turns in a fresh order every round, so that a slow spell hits all alike, and is told by its median.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.structures import Fault
from engine.export import OPSET, PACKAGES, exporter_silent, write_onnx
from engine.timing import CPU, Run, interleaved
from models.fuse import fuse
from models.graph import Graph, Node
from models.network import Network, WithAux

RUNTIMES = ("torch", "onnxruntime")
PRECISION = "float32"
AT_A_TIME = 16  # rows written as ONNX together


# ---- the device


def device_name(device: torch.device) -> str:
    """What the device calls itself: the model of a CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines() if known.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def threads_used(device: torch.device) -> int:
    """Threads that a forward may use; 0 on a GPU, where they do not count."""
    return 0 if device.type == "cuda" else torch.get_num_threads()


def check_runtime(runtime: str, device: torch.device) -> None:
    """Raises `Fault` where networks cannot be run that way here."""
    if runtime not in RUNTIMES:
        raise Fault(f"--runtime {runtime}: is none; {' or '.join(RUNTIMES)} would be right")
    if runtime == "torch":
        return
    absent = [package for package in PACKAGES if find_spec(package) is None]
    if absent:
        raise Fault(f"--runtime onnxruntime needs {', '.join(absent)}, not installed here: pip install -e '.[export]'")
    if provider(device) not in _onnxruntime().get_available_providers():
        raise Fault(
            f"--runtime onnxruntime: the installed one does not run on {device.type}; "
            f"--device cpu, or the package onnxruntime-gpu would be right"
        )


def measure_ms(
    networks: Sequence[nn.Module],
    imgsz: int,
    *,
    device: torch.device,
    runtime: str = "torch",
    rounds: int = 30,
    warmup: int = 5,
    seconds: float = 60.0,
    progress: bool = True,
) -> list[float]:
    """Median milliseconds of one image ``[1, 3, imgsz, imgsz]``, one number a network, each as it is deployed.

    Raises `Fault` where `runtime` is not there.
    """
    check_runtime(runtime, device)
    bar = tqdm(networks, "deploying", unit="network", leave=False, delay=2, disable=not progress)
    if runtime == "torch":
        runs = [torch_run(network, imgsz, device) for network in bar]
    else:
        runs = onnx_runs([_plain(network) for network in bar], imgsz, device, progress)
    timings = interleaved(runs, device=device, rounds=rounds, warmup=warmup, seconds=seconds, progress=progress)
    return [timing.ms for timing in timings]


def _plain(network: nn.Module) -> Network:
    assert isinstance(network, Network), "only a network of rows can be written as rows"
    return network


# ---- torch


def deployed(network: Network, device: torch.device) -> Network:
    """A fused copy on the device."""
    return fuse(network).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def torch_run(network: nn.Module, imgsz: int, device: torch.device) -> Run:
    image = image_of(imgsz, device)
    if not isinstance(network, Network):
        return partial(network.eval(), image)
    return partial(deployed(network, device).predict, image)


def image_of(imgsz: int, device: torch.device) -> Tensor:
    """Noise: an image of zeros is cheaper on some GPUs."""
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    return image.to(device).contiguous(memory_format=torch.channels_last)


def inputs_of(node: Node, imgsz: int, device: torch.device = CPU) -> list[Tensor]:
    """What the sources of a row hand it for one image: maps of noise, ``[1, channels, height, width]`` each.

    A mask is low in one piece, of the share that the row expects.
    """
    generator = torch.Generator().manual_seed(0)
    sides = [(shape.channels, imgsz // shape.stride + shape.margin) for shape in node.inputs]
    maps = [torch.rand(1, channels, side, side, generator=generator) for channels, side in sides]
    for shape, y in zip(node.inputs, maps, strict=True):
        if shape.kind == "mask":
            low = round(node.arguments.get("expected", 0.0) * y.numel())
            y.copy_((torch.arange(y.numel()) < low).view_as(y))
    return [y.to(device).contiguous(memory_format=torch.channels_last) for y in maps]


def torch_row_run(node: Node, layer: nn.Module, imgsz: int, device: torch.device) -> Run:
    """One row alone, its fused module at the size that it has in the network."""
    maps = inputs_of(node, imgsz, device)
    return partial(layer, maps if node.op.many else maps[0])


# ---- onnxruntime
#
# Writing a whole network as ONNX takes long, and the subnets of a search have nearly all rows in common. So each
# different row is written once, and a network is put together of them; onnxruntime then optimizes it as a whole.


class SideBySide(nn.Module):
    """Rows that do not know of each other, each of a list of maps; a head decodes as well."""

    def __init__(self, rows: Sequence[tuple[Node, nn.Module]]) -> None:
        super().__init__()
        self.nodes = [node for node, _ in rows]
        self.layers = nn.ModuleList(layer for _, layer in rows)

    def forward(self, maps: list[list[Tensor]]) -> list[list[Tensor]]:
        found = []
        for node, layer, given in zip(self.nodes, self.layers, maps, strict=True):
            y = layer(given if node.op.many else given[0])
            y = y.output if isinstance(y, WithAux) else y
            y = layer.decode(y) if node.op.is_head else y  # type: ignore[operator]
            found.append([y] if isinstance(y, Tensor) else list(y))
        return found


def onnx_rows(rows: Sequence[tuple[Node, nn.Module]], imgsz: int, progress: bool = True) -> list[Any]:
    """Fused rows on the CPU as ONNX models of one image. Some at a time: every call of the exporter costs a second."""
    found: list[Any] = []
    with tqdm(total=len(rows), desc="writing rows", unit="row", leave=False, delay=2, disable=not progress) as bar:
        for start in range(0, len(rows), AT_A_TIME):
            some = rows[start : start + AT_A_TIME]
            module = SideBySide(some).eval()
            maps = [[y.contiguous() for y in inputs_of(node, imgsz)] for node, _ in some]
            with torch.no_grad(), exporter_silent():
                counts = [len(y) for y in module(maps)]
                program = torch.export.export(module, (maps,))
                written = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
            assert written is not None
            model = written.model_proto
            inputs, outputs = iter(model.graph.input), iter(model.graph.output)
            for given, count in zip(maps, counts, strict=True):
                found.append(_part(model, list(islice(inputs, len(given))), list(islice(outputs, count))))
            bar.update(len(some))
    return found


def _part(model: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Of an ONNX model what leads to some of its outputs, as a model."""
    import onnx

    assert not model.functions, "a step that calls a function of its own file cannot be moved into another file"
    maker = {name: step for step in model.graph.node for name in step.output}
    needed: set[str] = set()
    asked = [one.name for one in outputs]
    while asked:
        name = asked.pop()
        if name not in needed:
            needed.add(name)
            asked += maker[name].input if name in maker else ()
    steps = [step for step in model.graph.node if needed.intersection(step.output)]
    values = [value for value in model.graph.initializer if value.name in needed]
    graph = onnx.helper.make_graph(steps, "row", inputs, outputs, values)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def joined(graph: Graph, rows: Sequence[Any], imgsz: int) -> Any:
    """The ONNX model of a network, put together of those of its rows."""
    import onnx

    helper = onnx.helper
    whole = onnx.GraphProto(name="network")
    whole.input.append(helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, imgsz, imgsz]))
    opsets: dict[str, int] = {}
    given: dict[int, list[str]] = {-1: ["images"]}  # what each row is called outside
    for node, model in zip(graph.nodes, rows, strict=True):
        opsets |= {one.domain: max(one.version, opsets.get(one.domain, 0)) for one in model.opset_import}
        sources = [name for source in node.sources for name in given[source]]
        names = dict(zip((one.name for one in model.graph.input), sources, strict=True))
        names[""] = ""  # an input that is left out
        for value in model.graph.initializer:
            whole.initializer.add().CopyFrom(value)
            whole.initializer[-1].name = _renamed(names, node.index, value.name)
        for step in model.graph.node:
            copy = whole.node.add()
            copy.CopyFrom(step)
            copy.name = f"{node.index}/{step.name}"
            copy.input[:] = [_renamed(names, node.index, name) for name in step.input]
            copy.output[:] = [_renamed(names, node.index, name) for name in step.output]
        given[node.index] = [_renamed(names, node.index, one.name) for one in model.graph.output]
    for output, name in zip(rows[-1].graph.output, given[graph.nodes[-1].index], strict=True):
        whole.output.add().CopyFrom(output)
        whole.output[-1].name = name
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    return helper.make_model(whole, opset_imports=imports, ir_version=rows[0].ir_version)


def _renamed(names: dict[str, str], index: int, name: str) -> str:
    """Every row has names of its own; what it reads is called as the row that gives it says."""
    return names.setdefault(name, f"{index}/{name}")


def onnx_run(model: Any, inputs: Sequence[Tensor], device: torch.device) -> Run:
    """An ONNX model as onnxruntime runs it, on the values of its inputs."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # the threads of a session that has just run would go on spinning while the next one is timed
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(path, model, {})  # as engine.export writes it
        session = runtime.InferenceSession(str(path), options, providers=[provider(device)])
    values = {one.name: y.contiguous().numpy() for one, y in zip(session.get_inputs(), inputs, strict=True)}
    return partial(session.run, None, values)


def onnx_runs(networks: Sequence[Network], imgsz: int, device: torch.device, progress: bool = True) -> list[Run]:
    """Networks in onnxruntime. Rows that are alike are written once: for time, weights do not matter."""
    names = [[f"{n.op.name} {n.arguments} {n.repeats} {n.inputs}" for n in network.graph.nodes] for network in networks]
    rows: dict[str, tuple[Node, nn.Module]] = {}
    for network, of_network in zip(networks, names, strict=True):
        if any(name not in rows for name in of_network):
            fused = fuse(network).cpu()
            for name, node, layer in zip(of_network, network.graph.nodes, fused.layers, strict=True):
                rows.setdefault(name, (node, layer))
    models = dict(zip(rows, onnx_rows(list(rows.values()), imgsz, progress), strict=True))
    image = image_of(imgsz, CPU)
    return [
        onnx_run(joined(network.graph, [models[name] for name in of_network], imgsz), [image], device)
        for network, of_network in zip(networks, names, strict=True)
    ]


def provider(device: torch.device) -> str:
    return "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"


def _onnxruntime() -> Any:
    import onnxruntime  # here because it belongs to an extra

    return onnxruntime
