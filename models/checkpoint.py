"""The one checkpoint format: tensors, the model's YAML text and plain values. Nothing in it can run code.

A file loads with ``weights_only=True`` and survives any rename of our classes, since it names none of them.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.files import atomically
from data.structures import Fault
from models.elastic import Cut, ElasticSequential, elastic_leaves
from models.network import Network, build
from models.ops.dense import DenseReader
from models.parse import dump, parse_text
from models.spec import ModelSpec

FORMAT = "oneshot-yolo 1"
LARGEST_IMGSZ = 16_384  # pixels; what a file asks for is made room for
TRANSFORM = re.compile(r"\.transforms\.\d+$")  # of `models.elastic.ElasticConv2d`
CONTENT = {"yaml": str, "names": list, "imgsz": int, "state": dict, "training": dict | None, "plain": dict}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file, read and checked. `training` is what a resume needs, None in weights made for use."""

    path: Path
    spec: ModelSpec
    yaml: str
    names: tuple[str, ...]
    imgsz: int
    state: dict[str, Tensor]
    training: dict[str, Any] | None
    plain: dict[str, Any]


def save_checkpoint(
    path: str | os.PathLike[str],
    network: Network,
    names: Sequence[str],
    *,
    imgsz: int,
    training: Mapping[str, Any] | None = None,
    **plain: Any,
) -> None:
    """Writes `network` with its YAML to a temporary file and moves it into place."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    content = {
        "format": FORMAT,
        "yaml": dump(network.spec),
        "names": list(names),
        "imgsz": imgsz,
        "state": state,
        "training": dict(training) if training is not None else None,
        "plain": plain,
    }
    with atomically(path) as temporary, _Sink(temporary, "wb") as file:
        torch.save(content, file)
        if file.problem is not None:
            raise OSError(file.problem.errno, file.problem.strerror, str(path)) from None


class _Sink(io.FileIO):
    """A file for torch, which has many words for a full disk: what went wrong is kept, and the rest not written."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        try:
            while len(left) and self.problem is None:
                left = left[super().write(left) :]
        except OSError as problem:
            self.problem = problem
        return len(data)


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors holds, ours or another's, on the CPU. Raises `Fault`, and never runs what is in it."""
    path = Path(path)
    if not path.is_file():
        raise Fault(f"{path}: no such checkpoint")
    check_stored(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # what a truncated or foreign file raises is not documented
        if type(problem).__name__ == "UnpicklingError":
            raise Fault(f"{path}: holds Python objects or is no checkpoint at all; it was not opened") from None
        raise Fault(f"{path}: not a whole checkpoint ({str(problem).partition(chr(10))[0][:120]})") from None


def check_stored(path: Path) -> None:
    """Raises a Fault for a zip file whose parts take more room than it has itself: torch stores them as they are."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as parts:
            room = sum(part.file_size for part in parts.infolist())
    except Exception:  # damaged; whoever reads it will tell
        return
    if room > path.stat().st_size:
        raise Fault(f"{path}: would unpack to {room:,} bytes; a checkpoint holds its tensors as they are")


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of ours onto the CPU. Raises `Fault` for anything else, and never runs what is in it."""
    path = Path(path)
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Fault(f"{path}: not a checkpoint of this program (format {FORMAT!r})")
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise Fault(f"{path}: a checkpoint without a usable {key!r}; it is damaged or not of this program")
    if not all(isinstance(name, str) for name in content["names"]):
        raise Fault(f"{path}: a checkpoint whose 'names' are not all texts")
    if not 1 <= content["imgsz"] <= LARGEST_IMGSZ:
        raise Fault(f"{path}: a checkpoint for images of {content['imgsz']} pixels; 1 to {LARGEST_IMGSZ:,} are right")
    if not all(isinstance(tensor, Tensor) for tensor in content["state"].values()):
        raise Fault(f"{path}: a checkpoint whose 'state' holds other things than tensors")
    spec = parse_text(content["yaml"], f"{path}[yaml]")
    if len(content["names"]) not in (0, spec.num_classes):
        raise Fault(f"{path}: {len(content['names'])} names for {spec.num_classes} classes")
    return Checkpoint(
        path,
        spec,
        content["yaml"],
        tuple(content["names"]),
        content["imgsz"],
        content["state"],
        content["training"],
        content["plain"],
    )


def restore(checkpoint: Checkpoint) -> Network:
    """The network of a checkpoint with its weights, in eval mode."""
    network = build(checkpoint.spec)
    wanted = network.state_dict()
    wrong = [
        key
        for key in wanted.keys() | checkpoint.state.keys()
        if key not in wanted or key not in checkpoint.state or wanted[key].shape != checkpoint.state[key].shape
    ]
    if wrong:
        raise Fault(f"{checkpoint.path}: {len(wrong)} of its tensors do not fit its YAML, such as {sorted(wrong)[0]!r}")
    network.load_state_dict(checkpoint.state)
    return network.eval()


def aligned(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """`state` under the row numbers of `network`, where that has more or fewer rows with weights.

    Rows are taken for each other in their order where their tensors have the same names and shapes: a row that was put
    in shifts all behind it, and those of a `SelStage` are a `ResStage`'s. A row without a partner keeps its number
    where that is free, for a part of it may fit.
    """
    theirs, ours = _rows(state), _rows(network.state_dict())
    if len(theirs) == len(ours):
        return state
    from_, to = list(theirs), list(ours)
    alike = difflib.SequenceMatcher(None, list(theirs.values()), list(ours.values()), autojunk=False)
    place = {
        from_[match.a + step]: to[match.b + step] for match in alike.get_matching_blocks() for step in range(match.size)
    }
    taken = set(place.values())
    place |= {row: row for row in theirs if row not in place and row not in taken}
    moved = {}
    for name, tensor in state.items():
        _, row, rest = name.split(".", 2)
        if int(row) in place:
            moved[f"layers.{place[int(row)]}.{rest}"] = tensor
    return moved


def _rows(state: Mapping[str, Tensor]) -> dict[int, tuple[tuple[str, torch.Size], ...]]:
    """The names and shapes of the tensors of every row that has some, in the order of the rows."""
    found: dict[int, list[tuple[str, torch.Size]]] = {}
    for name, tensor in state.items():
        _, row, rest = name.split(".", 2)
        found.setdefault(int(row), []).append((rest, tensor.shape))
    return {row: tuple(sorted(found[row])) for row in sorted(found)}


def warm_start(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copies what fits by name and shape; returns the names of `network` that were loaded, and those that were not.

    A supernet takes the tensors of a plain network: every option of a norm and every candidate block gets a copy, and
    a kernel that is too small goes into the centre of the larger one, with zeros around it, and what leads to smaller
    kernels is the identity; a block that is too narrow inside becomes the first channels of the wider one (`_inside`).
    With any kernel and width that is not smaller than its own the function stays the plain network's.
    """
    loaded, missing = [], []
    bare = [f"{name}.0." for name, leaf in elastic_leaves(network) if isinstance(leaf, ElasticSequential) and leaf.bare]
    for name, tensor in network.state_dict().items():
        plain = re.sub(r"\.(norms|candidates)\.\d+(?=\.)", "", name)
        single = next((plain.replace(start, start[:-2], 1) for start in bare if plain.startswith(start)), plain)
        source = next((state[key] for key in (name, plain, single) if key in state), None)
        if source is None and TRANSFORM.search(name):
            source = torch.eye(len(tensor))
        if source is None:
            missing.append(name)
            continue
        if source.shape != tensor.shape and source.dim() == tensor.dim() == 4:
            margin = (tensor.shape[-1] - source.shape[-1]) // 2
            if margin > 0:
                source = F.pad(source, [margin] * 4)
        if source.shape != tensor.shape:
            beside = f"{plain.rsplit('.', 3)[0]}.m."  # where the blocks are that a reader of several reads
            blocks = {key.removeprefix(beside).partition(".")[0] for key in state if key.startswith(beside)}
            source = _inside(tensor, source, network.get_submodule(name.rpartition(".")[0]), len(blocks))
        if source.shape != tensor.shape:
            missing.append(name)
            continue
        with torch.no_grad():
            tensor.copy_(source)
        loaded.append(name)
    return loaded, missing


def _inside(tensor: Tensor, source: Tensor, owner: nn.Module, blocks: int) -> Tensor:
    """`tensor`, weights of `owner` for blocks that are wide inside, with the `source` of a narrower one in it: as the
    first channels of each segment. Those do not read the others, which start as they are in `tensor`.

    What reads several blocks side by side was made for as many `blocks`. Where it does not fit in, `source` comes back.
    """
    reads, writes = getattr(owner, "reads", None), getattr(owner, "writes", getattr(owner, "cut", None))
    opens = (isinstance(writes, Cut), isinstance(reads, Cut) or isinstance(owner, DenseReader))
    fixed = (a != b and not wide for a, b, wide in zip(source.shape, tensor.shape, opens, strict=False))
    if source.dim() != tensor.dim() or source.shape[2:] != tensor.shape[2:] or any(fixed):
        return source  # outside of blocks a width is what it is
    rows, columns = (cut.channels.segments if isinstance(cut, Cut) else 1 for cut in (writes, reads))
    theirs = columns
    if isinstance(owner, DenseReader):
        columns, theirs = owner.parts + max(owner.choice.options), owner.parts + blocks
    inputs, outputs = math.prod(source.shape[1:2]), len(source)  # a vector has one input
    if outputs % rows or inputs % theirs:
        return source
    cells = math.prod(tensor.shape[2:])
    new = tensor.clone(memory_format=torch.contiguous_format)
    ours = new.view(rows, -1, columns, math.prod(tensor.shape[1:2]) // columns, cells)
    given = source.reshape(rows, -1, theirs, inputs // theirs, cells)
    if any(small > large for small, large in zip(given.shape, ours.shape, strict=True)):
        return source
    _, c_out, _, c_in, _ = given.shape
    ours[:, :c_out] = 0
    ours[:, :c_out, :theirs, :c_in] = given
    return new
