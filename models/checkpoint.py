"""The one checkpoint format: tensors, the model's YAML text and plain values. Nothing in it can run code.

A file loads with ``weights_only=True`` and survives any rename of our classes, since it names none of them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.structures import Fault
from models.elastic import ElasticSequential, elastic_leaves
from models.network import Network, build
from models.parse import dump, parse_text
from models.spec import ModelSpec

FORMAT = "oneshot-yolo 1"
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
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors holds, ours or another's, on the CPU. Raises `Fault`, and never runs what is in it."""
    path = Path(path)
    if not path.is_file():
        raise Fault(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # what a truncated or foreign file raises is not documented
        if type(problem).__name__ == "UnpicklingError":
            raise Fault(f"{path}: holds Python objects or is no checkpoint at all; it was not opened") from None
        raise Fault(f"{path}: not a whole checkpoint ({str(problem).partition(chr(10))[0][:120]})") from None


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of ours onto the CPU. Raises `Fault` for anything else, and never runs what is in it."""
    path = Path(path)
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Fault(f"{path}: not a checkpoint of this program (format {FORMAT!r})")
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise Fault(f"{path}: a checkpoint without a usable {key!r}; it is damaged or not of this program")
    if not all(isinstance(tensor, Tensor) for tensor in content["state"].values()):
        raise Fault(f"{path}: a checkpoint whose 'state' holds other things than tensors")
    return Checkpoint(
        path,
        parse_text(content["yaml"], f"{path}[yaml]"),
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
    kernels is the identity: with any kernel that is not smaller than its own the function stays the plain network's.
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
        if source.shape != tensor.shape and source.shape[:2] == tensor.shape[:2] and source.dim() == tensor.dim() == 4:
            margin = (tensor.shape[-1] - source.shape[-1]) // 2
            if margin > 0:
                source = F.pad(source, [margin] * 4)
        if source.shape != tensor.shape:
            missing.append(name)
            continue
        with torch.no_grad():
            tensor.copy_(source)
        loaded.append(name)
    return loaded, missing
