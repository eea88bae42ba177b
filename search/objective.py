"""What architecture parameters are moved by: the detection loss, a price on costs over the budget, early exploration.

``L = L_det / mean(L_det) + sum_b lambda_b relu(E[c_b] / limit_b - 1) - mu (1 - t) H(p)``. The detection loss is divided
by its running mean, so that lambda does not depend on batch size; the price is a hinge, since one that goes on below
the budget drives every choice to its cheapest option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.structures import Targets
from models.supernet import Supernet, detection_loss
from search.costs import Budget, CostTable

LOSS_MEMORY = 0.9  # of the running mean of the loss
DUAL_RATE = 0.01  # of the ascent on lambda, per step and relative excess
ENTROPY = 1e-3  # weight of exploration at the start; it falls to 0 over the search
LARGEST_LOGIT = 7.0  # of a centred alpha: no probability is driven to where a softmax has no gradient left


@dataclass(frozen=True)
class Prices:
    """What the objective remembers from step to step: the loss's running mean and a lambda for every budget."""

    mean_loss: float = 0.0
    lambdas: tuple[float, ...] = ()


def architecture_step(
    supernet: Supernet,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Targets,
    decided: Mapping[str, object],
    prices: Prices,
    *,
    budgets: Sequence[Budget] = (),
    tables: Mapping[str, CostTable] | None = None,
    progress: float = 1.0,
    entropy: float = ENTROPY,
) -> tuple[float, Prices]:
    """One step of the architecture parameters at the sampled options `decided`; weights stay as they are.

    `progress` is the part of the search that is done, 0 to 1. Returns the detection loss and the prices from here on.
    """
    loss, gate_gradients = supernet.gate_gradients(supernet.picks(decided), detection_loss(images, targets))
    value = float(loss)
    mean = value if prices.mean_loss == 0 else LOSS_MEMORY * prices.mean_loss + (1 - LOSS_MEMORY) * value
    optimizer.zero_grad(set_to_none=True)
    probabilities = supernet.probabilities()
    penalty = torch.zeros(())
    lambdas = []
    for budget, weight in zip(budgets, prices.lambdas or (1.0,) * len(budgets), strict=True):
        excess = (tables or {})[budget.metric].expected(probabilities) / budget.limit - 1
        penalty = penalty + weight * excess.clamp(min=0)
        lambdas.append(max(0.0, weight + DUAL_RATE * float(excess.detach())))
    disorder = sum(-(p * p.clamp(min=1e-12).log()).sum() for p in probabilities.values())
    (penalty - entropy * (1 - progress) * disorder).backward()
    supernet.set_alpha_gradients({name: gradient / mean for name, gradient in gate_gradients.items()})
    optimizer.step()
    with torch.no_grad():
        for alpha in supernet.alphas:
            alpha -= alpha.mean()
            alpha.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)
    return value, Prices(mean, tuple(lambdas))
