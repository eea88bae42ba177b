"""A network that holds every option of every choice, with the architecture parameters that weigh them.

A *decision* is what one vector of architecture parameters decides: in a ``shared`` supernet each choice (kernel, act,
number of a row), in an ``independent`` one all choices of a row together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data.structures import Targets
from models.elastic import elastic_leaves, mixing, plain_state
from models.graph import Graph, normalize, resolve
from models.network import Network, build, joint_choice
from models.spec import Choice, ModelSpec


class Supernet(nn.Module):
    """Every subnet of a search file behind one `Network`; `activate` says which of them runs.

    Its batch norms keep no running statistics (momentum 0): those would be a mixture of subnets and fit none. A subnet
    is calibrated (`engine.calibrate`) before it is judged.
    """

    def __init__(self, spec: ModelSpec, kind: str) -> None:
        super().__init__()
        graph: Graph = resolve(normalize(spec))
        self.kind = kind
        self.network = Network(graph, kind)
        joint = (
            {node.index: joint_choice(node) for node in graph.nodes if node.choices} if kind == "independent" else {}
        )
        self.decisions: tuple[Choice, ...] = tuple(joint.values()) if joint else graph.spec.choices
        self._joint = {choice.name: graph.nodes[index].choices for index, choice in joint.items()}
        self.alphas = nn.ParameterList(torch.zeros(len(decision.options)) for decision in self.decisions)
        self._leaves = tuple(leaf for _, leaf in elastic_leaves(self.network))  # found once: every step asks for them
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0

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

    def probabilities(self) -> dict[str, Tensor]:
        """softmax(alpha) of every decision, ``[options]``; differentiable."""
        return {d.name: alpha.softmax(dim=0) for d, alpha in zip(self.decisions, self.alphas, strict=True)}

    def one_hot(self, picks: Mapping[str, Any]) -> dict[str, Tensor]:
        """The gates of an architecture, leaves of autograd: 1 at its option, 0 elsewhere."""
        decided = self.decide(picks)
        like = next(self.network.parameters())
        gates = {}
        for decision in self.decisions:
            gate = torch.zeros(len(decision.options), dtype=like.dtype, device=like.device)
            gate[decision.options.index(decided[decision.name])] = 1
            gates[decision.name] = gate.requires_grad_()
        return gates

    def gate_gradients(
        self, picks: Mapping[str, Any], loss: Callable[[Network], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of an architecture, and ``dL/dg`` for the gates of every decision at that architecture.

        ``y = sum_k g_k o_k`` in every leaf of a decision, g one-hot (ProxylessNAS, arXiv 1812.00332, section 3.2.1).
        The weights get no gradient here, and what lies before the first choice is not differentiated at all.
        """
        self.activate(picks)
        gates = self.one_hot(picks)
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            with mixing(self.network, gates):
                value = loss(self.network)
            gradients = torch.autograd.grad(value, list(gates.values()))
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
        return value.detach(), dict(zip(gates, gradients, strict=True))

    def set_alpha_gradients(self, gate_gradients: Mapping[str, Tensor]) -> None:
        """``dL/dalpha = p * (g - p . g)``: the gates' gradient through the softmax, added to what is there."""
        for decision, alpha in zip(self.decisions, self.alphas, strict=True):
            g = gate_gradients[decision.name].to(alpha)
            p = alpha.detach().softmax(dim=0)
            gradient = p * (g - (p * g).sum())
            alpha.grad = gradient if alpha.grad is None else alpha.grad + gradient

    def derive(self, picks: Mapping[str, Any]) -> Network:
        """A plain network built from the architecture's own frozen YAML, with the weights it had in here."""
        self.activate(picks)
        network = build(self.spec.freeze(picks))
        network.load_state_dict(plain_state(self.network))
        reference = next(self.network.parameters())
        return network.to(reference.device, reference.dtype).train(self.training)


def detection_loss(images: Tensor, targets: Targets) -> Callable[[Network], Tensor]:
    """The loss of a batch as a function of the network."""
    return lambda network: network.loss(images, targets)[0]
