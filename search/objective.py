"""What architecture parameters are moved by: the detection loss, the price of costs, early exploration.

With ``L`` the detection loss of a sampled subnet, ``E`` the expected cost under the probabilities p and ``c0`` the
budget, the forms are

- ``hinge``: ``L / mean(L) + sum_b lambda_b relu(E_b / c0_b - 1)``, any number of budgets. Each lambda climbs while its
  budget is exceeded and falls while it is kept (dual ascent), and below the budget there is no pressure at all;
- ``proxyless``: ``L a (log E / log c0)^b``, a .2, b .3 (ProxylessNAS, arXiv 1812.00332: its source's ``mul#log`` with
  the defaults of its command line);
- ``fbnet``: ``L a log(E)^b``, a .2, b .6 (FBNet, arXiv 1812.03443, equation 2).

The last two are for one budget, and go on pressing below it: that is their nature. A logarithm of a cost depends on its
unit and is negative under 1, where a root of it is no number, so here both read ``log(1 + E / c0)``, which is
positive and free of units; in ``proxyless`` over its value at the budget, so that the factor is a there.

L comes divided by its running mean in every form, so that nothing depends on the batch size or the loss's own scale.
To each form, ``- mu (1 - t) H(p)`` is added, which keeps options alive early in the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.structures import Fault, Targets
from models.supernet import Supernet, architecture_loss
from search.costs import Budget, CostTable
from search.sampling import drawn_pairs

LOSS_MEMORY = 0.9  # of the running mean of the loss
DUAL_RATE = 0.01  # of the ascent on lambda, per step and relative excess
ENTROPY = 1e-3  # weight of exploration at the start; it falls to 0 over the search
UNDECIDED = 0.05  # between the two largest probabilities of a decision
LARGEST_GAP = 6.9  # between two alphas of a decision: below log(999), so that no probability reaches .999


@dataclass(frozen=True)
class Prices:
    """What the objective remembers from step to step: the loss's running mean and a lambda for every budget."""

    mean_loss: float = 0.0
    lambdas: tuple[float, ...] = ()


def hinge(loss: Tensor, ratios: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    excess = [weight * (ratio - 1).relu() for ratio, weight in zip(ratios, lambdas, strict=True)]
    return sum(excess, start=loss)


def proxyless(loss: Tensor, ratios: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    (ratio,) = ratios
    return loss * 0.2 * (ratio.log1p() / math.log(2)) ** 0.3


def fbnet(loss: Tensor, ratios: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    (ratio,) = ratios
    return loss * 0.2 * ratio.log1p() ** 0.6


# The normalized loss and every E / c0 of a budget, in the order of the lambdas, make one number that is to be small.
FORMS: dict[str, Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]] = {
    "hinge": hinge,
    "proxyless": proxyless,
    "fbnet": fbnet,
}


def check_form(form: str, budgets: Sequence[Budget]) -> None:
    """Raises `Fault` where a form cannot work with these budgets, the ones that have a table."""
    if form != "hinge" and len(budgets) != 1:
        got = ", ".join(map(str, budgets)) or "none"
        raise Fault(
            f"--objective {form}: weighs one cost against one budget, got {got}; --objective hinge takes any number"
        )


def architecture_step(
    supernet: Supernet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Targets,
    decided: Mapping[str, Any],
    prices: Prices,
    *,
    budgets: Sequence[Budget] = (),
    tables: Mapping[str, CostTable] | None = None,
    progress: float = 1.0,
    entropy: float = ENTROPY,
    form: str = "hinge",
    paths: str = "full",
    rng: np.random.Generator | None = None,
    mixture: Mapping[str, Tensor] | None = None,
    reduce: Callable[[list[Tensor]], None] | None = None,
) -> tuple[float, Prices]:
    """One step of the architecture parameters at the sampled options `decided`; weights and norms stay as they are.

    `progress` is the part of the search that is done, 0 to 1. `paths` is ``full``, where every option of a decision is
    looked at, or ``two``: `rng` draws a second option beside the sampled one, one of the two runs, and these two alone
    move, their joint probability staying what it was (ProxylessNAS, section 3.2.1). With a `mixture`, gates that are
    functions of the alphas (`search.sampling.relaxed`), all subnets run as one in place of `decided`, and the loss goes
    back to the alphas through it; costs are those under the probabilities all the same. `reduce` averages tensors over
    processes in place. Returns the detection loss and the prices from here on, equal on all of them. A loss that is not
    a finite number moves nothing.
    """
    probabilities = {name: p.detach().requires_grad_() for name, p in supernet.probabilities().items()}
    among: Mapping[str, Sequence[Any]] = {decision.name: decision.options for decision in supernet.decisions}
    if paths == "two":
        assert rng is not None
        decided, among = drawn_pairs(supernet.decisions, probabilities, decided, rng)
    judged = architecture_loss(images, targets)
    if mixture is None:
        loss, gate_gradients = supernet.gate_gradients(supernet.picks(decided), judged, among, targets)
    else:
        loss, gate_gradients = supernet.mixture_gradients(mixture, judged)
    if reduce is not None:
        reduce([loss, *gate_gradients.values()])
    value = float(loss)
    if not math.isfinite(value):
        return value, prices
    mean = value if prices.mean_loss == 0 else LOSS_MEMORY * prices.mean_loss + (1 - LOSS_MEMORY) * value

    # The objective is a function of the loss and of the probabilities; its gradients for both meet at the gates.
    lambdas = prices.lambdas or (1.0,) * len(budgets)
    share = torch.tensor(value / mean, dtype=torch.float64, requires_grad=True)
    ratios = [(tables or {})[budget.metric].expected(probabilities) / budget.limit for budget in budgets]
    disorder = sum((-(p * p.clamp(min=1e-12).log()).sum().cpu() for p in probabilities.values()), torch.zeros(()))
    objective = FORMS[form](share, ratios, lambdas) - entropy * (1 - progress) * disorder
    slope, *direct = torch.autograd.grad(objective, [share, *probabilities.values()], materialize_grads=True)
    by_loss = {name: gate_gradients[name] * (float(slope) / mean) for name in probabilities}
    by_probability = {name: part.to(by_loss[name]) for name, part in zip(probabilities, direct, strict=True)}

    joint = joint_logits(supernet, among)
    optimizer.zero_grad(set_to_none=True)
    if mixture is None:
        supernet.set_alpha_gradients({name: by_loss[name] + by_probability[name] for name in by_loss}, among)
    else:
        supernet.set_alpha_gradients(by_probability)
        torch.autograd.backward(list(mixture.values()), [by_loss[name] for name in mixture])
    optimizer.step()
    settle(supernet, among, joint)
    if form == "hinge":
        climbed = (w + DUAL_RATE * (float(ratio.detach()) - 1) for w, ratio in zip(lambdas, ratios, strict=True))
        lambdas = tuple(max(0.0, weight) for weight in climbed)
    return value, Prices(mean, lambdas)


def joint_logits(supernet: Supernet, among: Mapping[str, Sequence[Any]]) -> list[Tensor]:
    """``log sum exp(alpha)`` over the named options of every decision."""
    return [
        alpha.detach()[[decision.index(option) for option in among[decision.name]]].logsumexp(dim=0)
        for decision, alpha in zip(supernet.decisions, supernet.alphas, strict=True)
    ]


@torch.no_grad()
def settle(supernet: Supernet, among: Mapping[str, Sequence[Any]], joint: Sequence[Tensor]) -> None:
    """After a step: the named options get back their joint logit, so that the others' probabilities are what they were
    (ProxylessNAS's rescaling); then no probability reaches .999, and alphas have the mean 0.
    """
    moved = joint_logits(supernet, among)
    for decision, alpha, then, now in zip(supernet.decisions, supernet.alphas, joint, moved, strict=True):
        alpha[[decision.index(option) for option in among[decision.name]]] += then - now
        alpha.clamp_(min=float(alpha.max()) - LARGEST_GAP)
        alpha -= alpha.mean()


def undecided(supernet: Supernet, margin: float = UNDECIDED) -> list[str]:
    """The decisions whose two most probable options differ by less than `margin`: their argmax says nothing."""
    tops = {name: p.detach().topk(2).values for name, p in supernet.probabilities().items()}
    return [name for name, (first, second) in tops.items() if float(first - second) < margin]
