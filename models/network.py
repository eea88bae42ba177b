"""The network: modules in the order of the rows, and the one forward loop that plain networks and supernets share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from data.structures import Fault, Targets
from models.elastic import ElasticConv2d, ElasticSequential, IndependentRow, WithAux
from models.graph import Graph, Node, combinations, resolve
from models.ops.primitives import NORMS, keyed_norms, repeat, wide
from models.spec import Choice, ModelSpec, settled

SUPERNETS = ("shared", "independent")
MOST_WEIGHTS = 1_000_000_000  # of a network: 4 GB; the largest file in cfg/ has 290 million
MOST_CANDIDATES = 12  # whole blocks side by side in one row of an independent supernet
NO_AUX: Mapping[int, Any] = MappingProxyType({})


class Network(nn.Module):
    """A graph with weights. With `supernet`, rows that hold choices are built to hold every option.

    ``shared``: one set of weights serves all options; what an op's class lists as `side_by_side` has a block for each.
    ``independent``: a block for every combination. Without it, an open choice is a Fault.

    `norms` says what a ``shared`` supernet keeps batch norms apart for: every activation that they feed (``act``), no
    choice at all (``shared``), or every kernel that they follow and activation (``k_act``).
    """

    def __init__(self, graph: Graph, supernet: str | None = None, norms: str = "act") -> None:
        super().__init__()
        assert supernet is None or supernet in SUPERNETS, supernet
        assert norms in NORMS, norms
        self.graph = graph
        if torch.get_default_device().type != "meta":
            check_size(graph)
        with keyed_norms(norms):
            self.layers = nn.ModuleList(_build_row(node, supernet) for node in graph.nodes)
        self._last_use = graph.last_use()
        self._aux_names = sorted({one.aux_name for layer in self.layers for one in _judges(layer)})
        for layer in self.layers[:-1]:
            layer.apply(_initialize)

    @property
    def spec(self) -> ModelSpec:
        return self.graph.spec

    @property
    def num_classes(self) -> int:
        return self.graph.spec.num_classes

    @property
    def max_stride(self) -> int:
        return self.graph.max_stride

    @property
    def head(self) -> Any:
        """The last row: forward, loss and decode of the task."""
        return self.layers[-1]

    @property
    def suppresses(self) -> bool:
        """Whether boxes that it predicts need non-maximum suppression; a head of one box an object says no."""
        return bool(getattr(self.head, "suppresses", True))

    def forward(self, images: Tensor) -> tuple[Any, dict[int, Any]]:
        """Head outputs for images ``[N, 3, H, W]`` in [0, 1], H and W multiples of `max_stride`; auxiliary tensors."""
        outputs, aux = self.run(range(len(self.layers)), {-1: images})
        return outputs[len(self.layers) - 1], aux

    def run(self, rows: Iterable[int], outputs: Mapping[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Runs some rows on the outputs of earlier ones (-1: the images) and returns what later rows still need.

        A row's output is freed after its last use, so a shared trunk is ``run(range(k), ...)`` and any number of
        continuations of it. `outputs` itself is left as it is.
        """
        held, aux = dict(outputs), {}
        for index in rows:
            node = self.graph.nodes[index]
            sources = [held[source] for source in node.sources]
            y = self.layers[index](sources if node.op.many else sources[0])
            if isinstance(y, WithAux):
                y, aux[index] = y.output, y.aux
            held[index] = y
            for source in node.sources:
                if self._last_use[source] == index:
                    held.pop(source, None)
        return held, aux

    def loss(self, images: Tensor, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch and its detached parts."""
        outputs, aux = self(images)
        return self.loss_from(outputs, targets, aux)

    def loss_from(
        self, outputs: Any, targets: Targets, aux: Mapping[int, Any] = NO_AUX
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of head outputs and auxiliary tensors that are already there, in float32 or better.

        ``L = L_head + sum of the aux losses`` of all rows that have one. Those of a name are one part, which is 0 where
        no such row ran: a branch that a subnet of a supernet does without.
        """
        levels = [wide(y) for y in outputs]
        loss, parts = self.head.loss(levels, targets)
        parts = {**parts, **{name: loss.new_zeros(()) for name in self._aux_names}}
        for index, said in aux.items():
            layer = self.layers[index]
            judge: Any = layer.plain() if isinstance(layer, IndependentRow) else layer
            if hasattr(judge, "aux_loss"):
                own = judge.aux_loss(said, targets)
                loss = loss + own
                parts[judge.aux_name] = parts[judge.aux_name] + own.detach()
            if hasattr(judge, "aux_parts"):  # numbers for the log only
                parts.update(judge.aux_parts(said))
        return loss, parts

    def prices(self, aux: Mapping[int, Any]) -> dict[int, Any]:
        """Those auxiliary tensors whose loss says what a row costs (`is_price`), not what it is to learn."""
        rows = {index: self.layers[index] for index in aux}
        judges = {index: row.plain() if isinstance(row, IndependentRow) else row for index, row in rows.items()}
        return {index: said for index, said in aux.items() if getattr(judges[index], "is_price", False)}

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, M, 4]`` xyxy in pixels of the input and scores ``[N, M, classes]``, before suppression."""
        outputs, _ = self(images)
        return self.decode(outputs)

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """The same from head outputs that are already there."""
        return self.head.decode([wide(y) for y in outputs])


def _initialize(module: nn.Module) -> None:
    """He et al. (arXiv 1502.01852) by fan-out: with torch's own start, deep blocks with Mish learn much later.

    The fan-out of a group: by that of all together, depth-wise weights would start so small that the eps of the norm
    behind them counts.
    """
    if getattr(module, "own_start", False):
        return
    if isinstance(module, nn.Conv2d | ElasticConv2d) and not module.weight.is_meta:
        fan_out = module.weight[:, 0].numel() / module.groups
        nn.init.normal_(module.weight, std=nn.init.calculate_gain("relu") / math.sqrt(fan_out))


def _judges(layer: nn.Module) -> list[Any]:
    """The modules of a row that have a loss of their own for what the row says besides its output."""
    candidates = layer.candidates if isinstance(layer, IndependentRow) else [layer]
    return [module for module in candidates if hasattr(module, "aux_loss")]


def check_size(graph: Graph) -> None:
    """Raises a Fault for more weights than `MOST_WEIGHTS`, before any is made.

    By channels and kernels as of a plain convolution at first; only what that finds large is counted.
    """

    def largest(value: Any) -> int:
        values = value.options if isinstance(value, Choice) else [value]
        return max((one for one in values if isinstance(one, int)), default=3)

    def guess(node: Node) -> int:
        kernel = largest(node.arguments.get("kernel", 3))
        return sum(x.channels for x in node.inputs) * node.output.channels * kernel**2 * largest(node.repeats)

    if sum(map(guess, graph.nodes)) <= MOST_WEIGHTS:
        return
    count = 0
    with torch.device("meta"):
        for node in graph.nodes:
            if guess(node) > MOST_WEIGHTS / len(graph.nodes):
                choices = {choice.name: choice.options[0] for choice in node.choices}
                count += sum(weight.numel() for weight in build_plain(node, choices).parameters())
            if count > MOST_WEIGHTS:
                where = f"{node.layer.where} layer {node.index}"
                raise Fault(f"{where}: {count:,} weights up to here; a network has at most {MOST_WEIGHTS:,}")


def build(spec: ModelSpec, supernet: str | None = None, norms: str = "act") -> Network:
    """The network of a spec. Raises `Fault` where the spec does not fit together or leaves a choice open."""
    return Network(resolve(spec), supernet, norms)


def _build_row(node: Node, supernet: str | None) -> nn.Module:
    if not node.choices:
        return build_plain(node)
    where = f"{node.layer.where} layer {node.index}"
    names = ", ".join(f"{choice.name} {choice}" for choice in node.choices)
    if supernet is None:
        raise Fault(f"{where}: open choices {names}; search.py picks them, a network to train has none")
    if supernet == "shared" and (alone := _side_by_side(node)):
        return IndependentRow(alone, lambda option: build_plain(node, {alone.name: option}))
    if supernet == "shared":
        for name, value in node.arguments.items():
            if isinstance(value, Choice) and not node.op.may_choose(name):
                raise Fault(
                    f"{where}: {node.op.name} cannot share its weights over a choice in {name}; "
                    f"--supernet independent can hold it"
                )
        try:
            return _module(node, node.arguments, node.repeats)
        except ValueError as problem:
            raise Fault(f"{where}: {problem}") from None
    picks = combinations(node.choices)
    if len(picks) > MOST_CANDIDATES:
        raise Fault(
            f"{where}: {names} make {len(picks)} whole blocks, an independent supernet holds at most "
            f"{MOST_CANDIDATES} in a row; --supernet shared holds any number"
        )
    chosen = [choice.name for choice in node.choices]
    return IndependentRow(joint_choice(node), lambda option: build_plain(node, dict(zip(chosen, option, strict=True))))


def _side_by_side(node: Node) -> Choice | None:
    """The row's only choice, where it is in an argument whose options a shared supernet holds as whole blocks too."""
    whole = getattr(node.op.module, "side_by_side", ())
    if len(node.choices) != 1 or not any(isinstance(node.arguments.get(name), Choice) for name in whole):
        return None
    return node.choices[0]


def joint_choice(node: Node) -> Choice:
    """All choices of a row as one: an option is a tuple of picks, in the order of the row's choices."""
    label = node.layer.name or str(node.index)
    return Choice(label, tuple(tuple(picks.values()) for picks in combinations(node.choices)))


def build_plain(node: Node, picks: Mapping[str, Any] | None = None) -> nn.Module:
    """A row's module with its choices replaced by `picks`."""

    def final(value: Any) -> Any:
        return settled(value, lambda choice: picks[choice.name]) if picks is not None else value

    return _module(node, {name: final(value) for name, value in node.arguments.items()}, final(node.repeats))


def _module(node: Node, arguments: Mapping[str, Any], repeats: int | Choice) -> nn.Module:
    given = node.module_arguments() | dict(arguments)
    if "number" in node.op.parameters:
        return node.op.module(**given | {"number": repeats})
    if isinstance(repeats, Choice):
        return ElasticSequential(repeats, lambda _: node.op.module(**given), bare=True)
    if repeats == 1:
        return node.op.module(**given)
    return repeat(repeats, lambda _: node.op.module(**given))


def head_maximum(outputs: Sequence[Tensor]) -> float:
    """The largest logit of a head in size: what differences between two networks are measured by."""
    return max(float(y.abs().max()) for y in outputs)
