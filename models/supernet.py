"""A network that holds every option of every choice, with the architecture parameters that weigh them.

A *decision* is what one vector of architecture parameters decides: in a ``shared`` supernet each choice (kernel, act,
number, width of a row), in an ``independent`` one all choices of a row together. A ``merge`` supernet has the weights
and decisions of a ``shared`` one, and can also run as a mixture of all its subnets at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.structures import Fault, Targets
from models.elastic import Elastic, IndependentRow, WithAux, blended, elastic_leaves, plain_state, wide
from models.graph import Graph, normalize, resolve
from models.network import Network, build, joint_choice
from models.spec import Choice, ModelSpec


class Supernet(nn.Module):
    """Every subnet of a search file behind one `Network`; `activate` says which of them runs.

    Weight steps move the running statistics of the norms that they run through, as in any training; those are a mixture
    of subnets and fit none, so a subnet is calibrated (`engine.calibrate`) before it is judged. What is only looked at
    for the architecture parameters moves nothing.

    `norms` says what the batch norms of a ``shared`` or ``merge`` supernet are kept for, see `Network`. Raises `Fault`
    where a row cannot be held in this way.
    """

    def __init__(self, spec: ModelSpec, kind: str, norms: str = "act") -> None:
        super().__init__()
        graph: Graph = resolve(normalize(spec))
        self.kind = kind
        self.network = Network(graph, "shared" if kind == "merge" else kind, norms)
        joint = (
            {node.index: joint_choice(node) for node in graph.nodes if node.choices} if kind == "independent" else {}
        )
        self.decisions: tuple[Choice, ...] = tuple(joint.values()) if joint else graph.spec.choices
        self._joint = {choice.name: graph.nodes[index].choices for index, choice in joint.items()}
        self._all = {decision.name: decision.options for decision in self.decisions}
        self.alphas = nn.ParameterList(torch.zeros(len(decision.options)) for decision in self.decisions)
        self._leaves = tuple(leaf for _, leaf in elastic_leaves(self.network))  # found once: every step asks for them
        if kind == "merge":
            check_merges(self.network)

    @property
    def spec(self) -> ModelSpec:
        """The normalized search file: every choice named, depth and width multiplied out."""
        return self.network.spec

    def decide(self, picks: Mapping[str, Any]) -> dict[str, Any]:
        """The option of every decision that makes up an architecture's picks."""
        if not self._joint:
            return {decision.name: picks[decision.name] for decision in self.decisions}
        return {name: tuple(picks[choice.name] for choice in choices) for name, choices in self._joint.items()}

    def picks(self, decided: Mapping[str, Any]) -> dict[str, Any]:
        """The other way round: the pick of every choice from the option of every decision."""
        if not self._joint:
            return dict(decided)
        return {
            choice.name: option
            for name, choices in self._joint.items()
            for choice, option in zip(choices, decided[name], strict=True)
        }

    def activate(self, picks: Mapping[str, Any]) -> None:
        """From now on the forward is that of the architecture."""
        decided = self.decide(picks)
        for leaf in self._leaves:
            leaf.active = decided[leaf.choice.name]

    def mixed(self, gates: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the forward is that of the mixture of all subnets by these gates ``[options]`` of every decision:
        kernels are one kernel, activations and numbers of blocks are sums of what each of them gives.

        Gates are differentiable. A derived network has none of it.
        """
        return blended(self._leaves, gates)

    def probabilities(self) -> dict[str, Tensor]:
        """softmax(alpha) of every decision, ``[options]``; differentiable."""
        return {d.name: alpha.softmax(dim=0) for d, alpha in zip(self.decisions, self.alphas, strict=True)}

    def gate_gradients(
        self,
        picks: Mapping[str, Any],
        loss: Callable[[Network], Tensor],
        among: Mapping[str, Sequence[Any]] | None = None,
        targets: Targets | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an architecture, and ``dL/dg`` ``[options]`` for the gates of every decision there.

        In every leaf of a decision ``y = sum_k g_k o_k(x)``, with g one-hot at the architecture's option, so that
        ``dL/dg_k = <o_k(x), dL/dy>`` (ProxylessNAS, arXiv 1812.00332, section 3.2.1). `among` names the options of each
        decision that are looked at (default: all); the others are not run and get 0.

        With `targets`, whole blocks may have a price ``a_k`` (`Network.prices`) for them. The gates weigh these too,
        ``L = L_head(y) + sum_k g_k a_k``, which adds ``a_k`` to ``dL/dg_k``. A loss that only helps a block to learn is
        no price: a search would leave out the block that has it, since an absent one pays nothing.

        The forward is the plain one of the subnet, `wide` where widths are open; the other options run after it,
        without a backward of their own. The weights get no gradient, what lies before the first choice is not
        differentiated, and no statistics move.
        """
        self.activate(picks)
        with _weights_held(self.network), _statistics_held(self.network), wide(self._leaves):
            with _watched(self._leaves) as seen:
                value = loss(self.network)
            towards = torch.autograd.grad(value, [_output(y) for _, _, y in seen], materialize_grads=True)
            gradients = self._gate_products(seen, towards, among or self._all, targets)
        return value.detach(), gradients

    def mixture_gradients(
        self, gates: Mapping[str, Tensor], loss: Callable[[Network], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a mixture and ``dL/dg`` ``[options]`` for its gates, by ordinary backpropagation.

        The weights get no gradient, what lies before the first choice is not differentiated, and no statistics move.
        """
        own = {name: gate.detach().requires_grad_() for name, gate in gates.items()}
        with _weights_held(self.network), _statistics_held(self.network), self.mixed(own):
            value = loss(self.network)
            gradients = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
        return value.detach(), dict(zip(own, gradients, strict=True))

    @torch.no_grad()
    def _gate_products(
        self,
        seen: Sequence[tuple[Elastic, Any, Any]],
        towards: Sequence[Tensor],
        among: Mapping[str, Sequence[Any]],
        targets: Targets | None,
    ) -> dict[str, Tensor]:
        """``<o_k(x), dL/dy> + a_k`` of every named option, summed over the leaves of its decision."""
        like = next(self.network.parameters())
        gradients = {d.name: like.new_zeros(len(d.options)) for d in self.decisions}
        for (leaf, x, y), dy in zip(seen, towards, strict=True):
            wide = torch.promote_types(dy.dtype, torch.float32)  # half precision is for the layers, not for their sums
            for option in among[leaf.choice.name]:
                o = y if option == leaf.active else leaf.option(option, x)
                gradient = (_output(o).to(wide) * dy.to(wide)).sum()
                if isinstance(o, WithAux) and targets is not None:
                    gradient = gradient + _own_loss(leaf, option, o.aux, targets)
                gradients[leaf.choice.name][leaf.choice.index(option)] += gradient
        return gradients

    def set_alpha_gradients(
        self, gate_gradients: Mapping[str, Tensor], among: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        """``dL/dalpha = p * (g - p . g)``: the gates' gradient through the softmax, added to what is there.

        With `among`, the softmax is that of the named options alone, and the others get 0.
        """
        for decision, alpha in zip(self.decisions, self.alphas, strict=True):
            places = [decision.index(option) for option in (among or self._all)[decision.name]]
            g = gate_gradients[decision.name].to(alpha)[places]
            p = alpha.detach()[places].softmax(dim=0)
            gradient = torch.zeros_like(alpha)
            gradient[places] = p * (g - (p * g).sum())
            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient

    def derive(self, picks: Mapping[str, Any]) -> Network:
        """A plain network built from the architecture's own frozen YAML, with the weights it had in here."""
        self.activate(picks)
        network = build(self.spec.freeze(picks))
        network.load_state_dict(plain_state(self.network))
        reference = next(self.network.parameters())
        return network.to(reference.device, reference.dtype).train(self.training)


def check_merges(network: Network) -> None:
    """Raises `Fault` with a line for each row that holds whole blocks side by side: their weights do not add up."""
    faults = []
    for node, layer in zip(network.graph.nodes, network.layers, strict=True):
        if isinstance(layer, IndependentRow):
            faults.append(
                f"{node.layer.where} layer {node.index}: {node.op.name} holds a block for each option of "
                f"{layer.choice.name}, which cannot be merged into one; --supernet shared can hold it"
            )
    if faults:
        raise Fault(*faults)


def architecture_loss(images: Tensor, targets: Targets) -> Callable[[Network], Tensor]:
    """What architectures are compared by, as a function of the network: the head's loss of a batch, and the prices."""

    def loss(network: Network) -> Tensor:
        outputs, aux = network(images)
        return network.loss_from(outputs, targets, network.prices(aux))[0]

    return loss


def _output(y: Any) -> Tensor:
    return cast(Tensor, y.output if isinstance(y, WithAux) else y)


def _own_loss(leaf: Elastic, option: Any, aux: Any, targets: Targets) -> Tensor | float:
    """The price that a whole block has for what it said; 0 where it has none."""
    assert isinstance(leaf, IndependentRow), "no other leaf says anything besides its output"
    candidate: Any = leaf.candidate(option)
    return candidate.aux_loss(aux, targets) if getattr(candidate, "is_price", False) else 0.0


@contextlib.contextmanager
def _watched(leaves: Sequence[Elastic]) -> Iterator[list[tuple[Elastic, Any, Any]]]:
    """Inside, every leaf that runs is noted: itself, its input, and its output as a place to differentiate at."""
    seen: list[tuple[Elastic, Any, Any]] = []

    def note(leaf: nn.Module, inputs: tuple[Any, ...], y: Any) -> Any:
        # A tensor of its own: an identity hands its input on, which others may read as well.
        place = _output(y)
        place = place.view_as(place) if place.requires_grad else place.detach().requires_grad_()
        y = WithAux(place, y.aux) if isinstance(y, WithAux) else place
        x = inputs[0]  # a list where a whole row of several sources is one leaf
        held = [source.detach() for source in x] if isinstance(x, list) else x.detach()
        seen.append((cast(Elastic, leaf), held, y))
        return y

    hooks = [cast(nn.Module, leaf).register_forward_hook(note) for leaf in leaves]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _weights_held(network: nn.Module) -> Iterator[None]:
    """Inside, no weight asks for a gradient."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _statistics_held(network: nn.Module) -> Iterator[None]:
    """Inside, norms in training mode use the batch's statistics and remember nothing of them, not even its count."""
    norms = [child for child in network.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    try:
        for norm in norms:
            norm.track_running_stats = not norm.training  # an evaluating norm needs what it remembers
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
