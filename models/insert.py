"""New rows in a model: what read the row in front of one reads the new one, and trained weights move with their rows.

Rows are counted, so a row that is put in shifts all behind it. `insert_after` writes every ``from`` anew; `moved_state`
does the same to the names of weights. `branches_on` makes the rows of FAL: an attention branch behind each of some
levels of a pyramid (docs/fal.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from data.structures import Fault
from models.graph import Graph, Node
from models.levels import BRANCHES
from models.parse import dump, parse_text
from models.spec import LayerSpec, ModelSpec, row_place

ASKS = {"classify": "classes", "detect": "presence"}  # what a branch learns, by the task of the head behind it


def insert_after(spec: ModelSpec, new: Mapping[int, LayerSpec]) -> ModelSpec:
    """The model with a row behind each of some rows: ``new[row]`` reads `row`, and who read `row` reads ``new[row]``.

    A new row stands in the section of the row that it reads; its own ``sources`` and ``where`` mean nothing. Where it
    has a name, rows further down read it by that name. The model comes back as it reads from its text, so its places
    are those of `models.parse.dump`, and its choices are called after the new row numbers. Raises `Fault` for a row
    that does not exist or is the head, behind which nothing may stand, and for names that are taken.
    """
    last = len(spec.layers) - 1
    wrong = [row for row in new if not 0 <= row < last]
    if wrong:
        raise Fault(f"{spec.path}: a row can be put behind rows 0 to {last - 1}; got {wrong[0]}")
    names = {layer.name: index for index, layer in enumerate(spec) if layer.name}
    place = moved_rows(len(spec.layers), new)

    def source(reader: int, written: int | str) -> int | str:
        """What row `reader` writes, from now on, for what it wrote before."""
        if reader == 0 and written == -1:
            return -1  # the image
        if isinstance(written, str):
            target = names[written]
        else:
            target = written if written >= 0 else reader + written
        row = new.get(target)
        if row is None and isinstance(written, str):
            return written
        to = place[target] + (row is not None)
        if row is not None and row.name and written != -1:
            return row.name
        return to - place[reader] if isinstance(written, int) and written < 0 else to

    layers: list[LayerSpec] = []
    for index, layer in enumerate(spec):
        layers.append(replace(layer, sources=tuple(source(index, written) for written in layer.sources)))
        if index in new:
            layers.append(replace(new[index], sources=(-1,), section=layer.section, where=layer.where))
    return parse_text(dump(replace(spec, layers=tuple(layers))), spec.path)


def moved_rows(count: int, new: Iterable[int]) -> list[int]:
    """Where each of `count` rows stands once a row is put in behind each of the rows `new`."""
    before = sorted(new)
    return [row + sum(other < row for other in before) for row in range(count)]


def moved_state(state: Mapping[str, Tensor], count: int, new: Iterable[int]) -> dict[str, Tensor]:
    """The weights of a network of `count` rows under the names that they have once the rows are put in."""
    place = moved_rows(count, new)
    moved = {}
    for name, tensor in state.items():
        holder, row, rest = name.split(".", 2)
        assert holder == "layers", name
        moved[f"layers.{place[int(row)]}.{rest}"] = tensor
    return moved


# ---- attention branches


def branches_on(graph: Graph, levels: Mapping[str, int], **arguments: Any) -> dict[int, LayerSpec]:
    """For `insert_after`: a row AttentionBranch behind each of some levels, which are rows by their names.

    The row is called ``attended_`` and the level's name. It learns the class of whole images before a classifier, and
    which classes an image shows before a detector. `arguments` are more of the op's. Raises `Fault` for a level that
    has a branch already, and where the head is of another task.
    """
    head = graph.nodes[-1]
    task = getattr(head.op.module, "task", "detect")
    if task not in ASKS:
        place = row_place(head.index, head.layer)
        raise Fault(
            f"{place}: an attention branch learns with a classifier or a detector, but this head's task is {task}"
        )
    taken = {node.layer.name for node in graph.nodes if node.layer.name}
    new: dict[int, LayerSpec] = {}
    for level, row in levels.items():
        node = graph.nodes[row]
        branch = branch_of(graph, node)
        if branch is not None:
            raise Fault(f"{row_place(branch.index, branch.layer)}: level {level} has this attention branch already")
        name = f"attended_{level}"
        while name in taken:
            name += "_"
        taken.add(name)
        new[row] = LayerSpec(node.layer.where, (-1,), 1, BRANCHES[0], ("nc",), {"task": ASKS[task], **arguments}, name)
    return new


def branch_of(graph: Graph, node: Node) -> Node | None:
    """The attention branch that a row is or feeds; None where there is none, or one that a search left empty."""
    beside = [node, *(other for other in graph.nodes if node.index in other.sources)]
    found = (other for other in beside if other.op.name in BRANCHES and other.arguments["blocks"] != "none")
    return next(found, None)
