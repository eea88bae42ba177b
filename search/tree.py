"""Every subnet of a small space judged by its loss, each with batch norms calibrated for it, and nothing run twice.

Subnets come in the order of their numbers, in which the last choice moves fastest. What lies before the first row that
changed is still there from the subnet before; what inside that row does not depend on the choice that changed is
remembered. So all subnets together cost what the nodes of a tree of prefixes cost, not what its leaves would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from data.dataset import ImageSet
from data.loader import batches
from engine.calibrate import calibrate_by
from engine.evaluate import pixels
from models.elastic import Elastic, ElasticSequential, WithAux, elastic_leaves
from models.network import Network
from models.supernet import Supernet
from search.space import Architecture, SearchSpace


@torch.no_grad()
def losses(
    supernet: Supernet,
    space: SearchSpace,
    calibration: Sequence[Tensor],
    images: ImageSet,
    *,
    batch_size: int,
    device: torch.device,
    progress: bool = True,
    numbers: Iterable[int] | None = None,
) -> np.ndarray:
    """The head's loss of every subnet on `images`, in eval mode with batch norms calibrated for it; float64 ``[size]``.

    Equal to ``derive``, `engine.calibrate.calibrate` on the `calibration` batches, and the mean over `images` of the
    loss in batches of `batch_size`, one subnet after the other. Place n belongs to ``space.at(n)``. With `numbers`,
    only those subnets, in their order. `space` is that of `supernet`, which is on `device` and comes back as it was,
    also after Ctrl-C.

    In memory: for each row with choices, what the rows behind it read of the current subnet (all calibration and
    judging images, as a forward would hold them there), and of each output inside such a row that depends on fewer
    choices than the row, one for each combination of those, while subnets to come can still ask for it.
    """
    wanted = list(range(space.size) if numbers is None else numbers)
    network = supernet.network
    judging = [(pixels(batch, device), batch.targets.to(device)) for batch in batches(images, batch_size)]
    openings = [node.index for node in network.graph.nodes if node.choices]
    names = [[choice.name for choice in network.graph.nodes[row].choices] for row in openings]
    stages = [range(*ends) for ends in zip(openings, [*openings[1:], len(network.layers)], strict=True)]
    found: dict[int, float] = {}
    with _left_as_it_was(supernet), remembering(network, space) as turn_to:
        network.eval()
        start = [{-1: batch} for batch in calibration], [Passed({-1: batch}, {}) for batch, _ in judging]
        held = [_advance(network, range(openings[0]), *start)]  # before each stage
        previous: Mapping[str, Any] | None = None
        for number in tqdm(sorted(set(wanted)), "loss of subnets", unit="subnet", disable=not progress, leave=False):
            picks = space.at(number).picks
            supernet.activate(picks)
            turn_to(number)
            changed = [previous is None or any(picks[name] != previous[name] for name in row) for row in names]
            level = changed.index(True)
            del held[level + 1 :]
            for rows in stages[level:]:
                held.append(_advance(network, rows, *held[-1]))
            total = 0.0
            for passed, (batch, targets) in zip(held[-1][1], judging, strict=True):
                head = passed.outputs[stages[-1][-1]]
                total += len(batch) * float(network.loss_from(head, targets, network.prices(passed.aux))[0])
            found[number] = total / len(images)
            previous = picks
    return np.array([found[number] for number in wanted], dtype=np.float64)


Outputs = dict[int, Any]  # of rows, for one batch: as `Network.run` takes and gives them


@dataclass(frozen=True)
class Passed:
    """Where a judging batch stands: what later rows still need, and the auxiliary tensors of all rows behind it."""

    outputs: Outputs
    aux: Mapping[int, Any]


def _advance(
    network: Network, rows: range, calibration: Sequence[Outputs], judging: Sequence[Passed]
) -> tuple[list[Outputs], list[Passed]]:
    """Runs `rows` on the calibration batches, as training would, then on the judging ones with the statistics found."""
    calibrated: list[Outputs] = []
    calibrate_by(
        network.layers[rows.start : rows.stop],
        lambda outputs: calibrated.append(network.run(rows, outputs)[0]),
        calibration,
    )
    judged = []
    for passed in judging:
        outputs, aux = network.run(rows, passed.outputs)
        judged.append(Passed(outputs, {**passed.aux, **aux}))
    return calibrated, judged


@contextmanager
def _left_as_it_was(supernet: Supernet) -> Iterator[None]:
    """Whatever happens inside, statistics, modes and the active options are those from before."""
    network = supernet.network
    buffers = {buffer: buffer.clone() for buffer in network.buffers()}
    modes = [(module, module.training) for module in network.modules()]
    active = [(leaf, leaf.active) for _, leaf in elastic_leaves(network)]
    try:
        yield
    finally:
        for buffer, before in buffers.items():
            buffer.copy_(before)
        for module, training in modes:
            module.training = training
        for leaf, option in active:
            leaf.active = option


# ---- what is remembered


@dataclass(frozen=True)
class Kept:
    """An output that subnets up to number `last` can ask for again, and the inputs, which are known by identity."""

    tensors: tuple[Tensor, ...]  # inputs and output
    versions: tuple[int, ...]  # of each: what an op changed in place is not what it was
    output: Any
    last: int


@contextmanager
def remembering(network: Network, space: SearchSpace) -> Iterator[Callable[[int], None]]:
    """Inside, a module that meets the very same tensors under the same options answers with the output that it gave
    before, without running; so its norms are not calibrated again either.

    An output is kept if it depends on fewer choices than the module does that its own is a part of: whatever else comes
    again is answered further outside. Gives the function to call with a subnet's number before it runs. Numbers only
    grow, and an output is forgotten once none of those to come can ask for it.
    """
    depends: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()  # names of choices
    memory: dict[tuple[Any, ...], Kept] = {}
    running: list[frozenset[str]] = []  # what the modules depend on that are running now, outermost first
    picks: dict[str, Any] = {}

    def turn_to(number: int) -> None:
        picks.update(space.at(number).picks)
        for key in [key for key, kept in memory.items() if kept.last < number]:
            del memory[key]

    def last_like_this(choices: frozenset[str]) -> int:
        """The last subnet that has this one's picks for `choices`."""
        last = {c.name: picks[c.name] if c.name in choices else c.options[-1] for c in space.choices}
        return space.index(Architecture(last))

    def remembered(module: nn.Module, own: frozenset[str], of_rows: frozenset[str]) -> Callable[..., Any]:
        """The forward of a module that holds the choices `own`, in a row that can depend on those `of_rows`."""
        forward = module.forward

        def call(*inputs: Any, **named: Any) -> Any:
            tensors = tuple(_leaves(inputs))
            if named or not all(isinstance(x, Tensor) for x in tensors):
                return forward(*inputs, **named)
            around = running[-1] if running else of_rows
            # what arithmetic between modules gave can depend on all that the module around it depends on
            choices = own.union(*(depends.get(x, around) for x in tensors))
            key = (module, *map(id, tensors), *(picks[name] for name in sorted(own)))
            kept = memory.get(key)
            if kept and kept.versions == tuple(x._version for x in kept.tensors):
                return kept.output
            running.append(choices)
            try:
                output = forward(*inputs)
            finally:
                running.pop()
            made = tuple(y for y in _leaves(output) if isinstance(y, Tensor))
            depends.update({y: choices for y in made})
            if choices != around:
                held = tensors + made
                memory[key] = Kept(held, tuple(x._version for x in held), output, last_like_this(choices))
            return output

        return call

    changed = []
    try:
        for node, layer in zip(network.graph.nodes, network.layers, strict=True):
            of_rows = frozenset(c.name for other in network.graph.nodes[: node.index + 1] for c in other.choices)
            of_row = frozenset(choice.name for choice in node.choices)
            for module in _parts(layer):
                module.forward = remembered(module, _choices(module, of_row), of_rows)
                changed.append(module)
        yield turn_to
    finally:
        for module in changed:
            del module.forward  # the class's own is back


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose outputs can be of use again. Norms run always: they cost little, and calibration watches them.

    The options of an elastic leaf share nothing with each other, but for prefixes of a sequence.
    """
    if isinstance(module, _BatchNorm):
        return
    yield module
    if isinstance(module, ElasticSequential) or not isinstance(module, Elastic):
        for child in module.children():
            yield from _parts(child)


def _choices(module: nn.Module, of_row: frozenset[str]) -> frozenset[str]:
    """The row's choices that `module` holds. A leaf that decides several together, or none by its name, holds all."""
    names = {leaf.choice.name for _, leaf in elastic_leaves(module)}
    return frozenset(names) if names <= of_row else of_row


def _leaves(value: Any) -> Iterator[Any]:
    """What is in a module's inputs or output, below lists and tuples."""
    if isinstance(value, WithAux):
        yield from _leaves(value.output)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value
