"""What moves architecture parameters, against numbers worked out by hand. The networks are in test_gradients.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.structures import Fault, Targets
from models.spec import Choice
from models.supernet import Supernet
from search.costs import Budget, CostTable
from search.objective import FORMS, Prices, architecture_step, check_form, undecided

KERNEL = Choice("3.kernel", (3, 5))
SIX = Choice("4.act", ("relu", "leaky", "mish", "silu", "hardswish", "identity"))
START = Prices()
IMAGES, NOTHING = torch.zeros(1, 3, 32, 32), Targets(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0).long())


class Toy(Supernet):
    """Decisions without a network: what its loss and the gradients of its gates are is given."""

    def __init__(self, decisions: Sequence[Choice], loss: float, *gates: Sequence[float]) -> None:
        nn.Module.__init__(self)
        self.decisions, self._joint = tuple(decisions), {}
        self._all = {decision.name: decision.options for decision in decisions}
        self.alphas = nn.ParameterList(torch.zeros(len(decision.options)) for decision in decisions)
        self.loss, self.gates = loss, gates

    def gate_gradients(self, picks, loss, among=None, targets=None) -> tuple[Tensor, dict[str, Tensor]]:
        found = {}
        for decision, gates in zip(self.decisions, self.gates, strict=True):
            looked = [option in (among or self._all)[decision.name] for option in decision.options]
            found[decision.name] = torch.tensor(gates) * torch.tensor(looked)
        return torch.tensor(self.loss), found


def step(toy: Toy, prices: Prices = START, lr: float = 1.0, **options) -> tuple[float, Prices]:
    """A step of plain descent, so that alphas move by lr times the gradient."""
    decided = {decision.name: decision.options[0] for decision in toy.decisions}
    optimizer = torch.optim.SGD(toy.alphas, lr=lr)
    return architecture_step(toy, optimizer, IMAGES, NOTHING, decided, prices, **{"entropy": 0.0, **options})


def priced(limit: float) -> dict:
    """3x3 costs 100, 5x5 costs 200; both are as probable at the start, so 150 are expected."""
    table = CostTable("macs", 50.0, (((KERNEL,), np.array([50.0, 150.0])),))
    return {"budgets": [Budget("macs", limit)], "tables": {"macs": table}}


# ---- hinge


def test_the_loss_moves_alphas_by_its_gradient_over_its_mean():
    """p = .5, .5 and g = 3, 1: dL/dalpha = p (g - 2) = .5, -.5, of a loss that is its own mean 4."""
    toy = Toy([KERNEL], 4.0, (3.0, 1.0))
    value, prices = step(toy)
    assert value == 4.0 and prices == Prices(4.0, ())
    assert toy.alphas[0].tolist() == pytest.approx([-0.125, 0.125])
    _, prices = step(Toy([KERNEL], 5.0, (3.0, 1.0)), prices)
    assert prices.mean_loss == pytest.approx(0.9 * 4 + 0.1 * 5)


def test_a_loss_that_is_scaled_moves_alphas_as_before():
    """As a larger batch scales the loss of some detectors, and every gradient with it."""
    one, eight = Toy([KERNEL], 4.0, (3.0, 1.0)), Toy([KERNEL], 32.0, (24.0, 8.0))
    prices, scaled = Prices(lambdas=(1.0,)), Prices(lambdas=(1.0,))
    for _ in range(5):
        _, prices = step(one, prices, **priced(100.0))
        _, scaled = step(eight, scaled, **priced(100.0))
    assert torch.equal(one.alphas[0], eight.alphas[0])
    assert scaled == Prices(8 * prices.mean_loss, prices.lambdas)


def test_above_the_budget_the_price_is_lambda_times_the_excess():
    """E / c0 = 150 / 100. Of its two options' 50 and 150 over c0, dE/dalpha = p (g - 1) = -.25, .25; lambda is 2."""
    toy = Toy([KERNEL], 1.0, (0.0, 0.0))
    _, prices = step(toy, Prices(lambdas=(2.0,)), **priced(100.0))
    assert toy.alphas[0].tolist() == pytest.approx([0.5, -0.5])
    assert prices.lambdas == pytest.approx((2 + 0.01 * 0.5,))


@pytest.mark.parametrize("limit", [150.0, 151.0, 300.0])
def test_within_the_budget_there_is_no_price_and_lambda_falls(limit):
    toy = Toy([KERNEL], 1.0, (0.0, 0.0))
    _, prices = step(toy, Prices(lambdas=(1.0,)), **priced(limit))
    assert toy.alphas[0].tolist() == [0.0, 0.0]
    assert prices.lambdas == pytest.approx((1 + 0.01 * (150 / limit - 1),))


def test_lambda_climbs_while_the_budget_is_exceeded_and_never_falls_under_0():
    toy, prices = Toy([KERNEL], 1.0, (0.0, 0.0)), Prices(lambdas=(0.0,))
    for turn in range(1, 4):
        _, prices = step(toy, prices, lr=0.0, **priced(100.0))
        assert prices.lambdas == pytest.approx((0.005 * turn,))
    _, prices = step(toy, Prices(lambdas=(0.001,)), **priced(300.0))
    assert prices.lambdas == (0.0,)


def test_the_entropy_bonus_evens_probabilities_and_ends_with_the_search():
    """p = .75, .25: H = .56234, dH/dalpha_1 = .75 (.28768 - H) = -.20599."""
    for progress, expected in ((0.0, -0.20599), (0.5, -0.102995), (1.0, 0.0)):
        toy = Toy([KERNEL], 1.0, (0.0, 0.0))
        with torch.no_grad():
            toy.alphas[0].copy_(torch.tensor([0.5, -0.5]) * math.log(3))
        before = toy.alphas[0].detach().clone()
        step(toy, entropy=1.0, progress=progress)
        assert (toy.alphas[0] - before).tolist() == pytest.approx([expected, -expected], abs=1e-5)


def test_a_loss_that_is_no_number_moves_nothing():
    for loss in (math.nan, math.inf):
        toy = Toy([KERNEL], loss, (3.0, math.nan))
        value, prices = step(toy, Prices(2.0, (1.0,)), **priced(100.0))
        assert not math.isfinite(value) and prices == Prices(2.0, (1.0,))
        assert toy.alphas[0].tolist() == [0.0, 0.0]


# ---- the other forms


@pytest.mark.parametrize(
    ("form", "value", "slope"),
    [
        # E = c0: .2 (log 2 / log 2)^.3, and .2 .3 / (2 log 2); .2 (log 2)^.6, and .2 .6 (log 2)^-.4 / 2
        ("proxyless", 0.2, 0.0432809),
        ("fbnet", 0.1605186, 0.0694738),
        ("hinge", 1.0, 0.0),
    ],
)
def test_a_form_at_its_budget_has_the_value_and_slope_worked_out_by_hand(form, value, slope):
    ratio = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    found = FORMS[form](torch.tensor(1.0, dtype=torch.float64), [ratio], (1.0,))
    assert float(found.detach()) == pytest.approx(value, rel=1e-5)
    assert float(torch.autograd.grad(found, ratio)[0]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("form", ["proxyless", "fbnet"])
def test_the_logarithm_of_a_small_cost_is_no_trap(form):
    """A latency under 1 ms, or one in seconds where log(E) is negative, and its root is no number."""
    values = []
    for ratio in (1e-6, 1e-3, 0.5, 1.0, 2.0, 1e3):
        at = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        value = FORMS[form](torch.tensor(1.0, dtype=torch.float64), [at], (1.0,))
        values.append(float(value.detach()))
        assert float(torch.autograd.grad(value, at)[0]) > 0
    assert 0 < values[0] and values == sorted(values)


@pytest.mark.parametrize("form", ["proxyless", "fbnet"])
def test_the_other_forms_go_on_pressing_below_the_budget_and_do_not_depend_on_the_unit(form):
    moved = []
    for unit in (1.0, 1e-3, 1e6):
        toy = Toy([KERNEL], 4.0, (0.0, 0.0))
        table = CostTable("macs", 50.0 * unit, (((KERNEL,), np.array([50.0, 150.0]) * unit),))
        _, prices = step(toy, form=form, budgets=[Budget("macs", 300.0 * unit)], tables={"macs": table})
        moved.append(toy.alphas[0].tolist())
        assert prices.lambdas == (1.0,)
    assert moved[0][0] > 0
    assert moved[1] == pytest.approx(moved[0]) and moved[2] == pytest.approx(moved[0])


def test_proxyless_weighs_the_loss_and_the_cost_of_an_option_as_its_product_says():
    """At E = c0 = 150: .2 g / mean + .0432809 dE/dp / c0, with g = 3, 1 over 4 and dE/dp = 50, 150 over 150."""
    toy = Toy([KERNEL], 4.0, (3.0, 1.0))
    step(toy, form="proxyless", **priced(150.0))
    gates = [0.2 * g / 4 + 0.0432809 * c / 150 for g, c in ((3, 50), (1, 150))]
    expected = 0.25 * (gates[0] - gates[1])
    assert toy.alphas[0].tolist() == pytest.approx([-expected, expected], rel=1e-5)


def test_the_other_forms_need_one_budget():
    two = [Budget("macs", 9e8), Budget("params", 2.5e6)]
    check_form("hinge", [])
    check_form("hinge", two)
    check_form("fbnet", two[:1])
    for form, budgets, got in (
        ("proxyless", [], "none"),
        ("fbnet", two, "macs=900.000M, params=2.500M"),
    ):
        with pytest.raises(Fault) as problem:
            check_form(form, budgets)
        assert problem.value.lines == (
            f"--objective {form}: weighs one cost against one budget, got {got}; --objective hinge takes any number",
        )


# ---- paths, processes, bounds


def test_two_paths_move_two_options_and_leave_the_others_their_probabilities():
    toy = Toy([SIX, KERNEL], 2.0, (3.0, 1.0, -1.0, 0.5, 2.0, -3.0), (1.0, -1.0))
    with torch.no_grad():
        toy.alphas[0].copy_(torch.linspace(-0.5, 0.5, 6))
    for seed in range(10):
        before = {name: p.detach() for name, p in toy.probabilities().items()}
        step(toy, lr=0.5, paths="two", rng=np.random.default_rng(seed))
        after = {name: p.detach() for name, p in toy.probabilities().items()}
        change = after[SIX.name] - before[SIX.name]
        moved = change.abs() > 1e-6
        assert moved.sum() == 2 and change.sum().abs() < 1e-6
        assert moved[0]  # the sampled option is one of the pair
        assert after[KERNEL.name][1] > before[KERNEL.name][1]


def test_of_two_options_two_paths_are_all_of_them():
    for seed in range(3):
        full, two = Toy([KERNEL], 4.0, (3.0, 1.0)), Toy([KERNEL], 4.0, (3.0, 1.0))
        step(full, **priced(100.0))
        step(two, paths="two", rng=np.random.default_rng(seed), **priced(100.0))
        torch.testing.assert_close(full.alphas[0], two.alphas[0])


def test_processes_end_with_the_alphas_of_one_that_saw_their_mean():
    losses, gates = (2.0, 4.0), ((3.0, 1.0), (0.0, -2.0))
    one = Toy([KERNEL], 3.0, (1.5, -0.5))
    _, expected = step(one, Prices(lambdas=(1.0,)), **priced(100.0))
    means = [torch.tensor(3.0), torch.tensor([1.5, -0.5])]
    for loss, gate in zip(losses, gates, strict=True):
        toy, seen = Toy([KERNEL], loss, gate), []

        def average(tensors: list[Tensor], seen=seen) -> None:
            seen.append([tensor.tolist() for tensor in tensors])
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean)

        value, prices = step(toy, Prices(lambdas=(1.0,)), reduce=average, **priced(100.0))
        assert seen == [[loss, list(gate)]]  # all of it in one call
        assert value == 3.0 and prices == expected
        assert torch.equal(toy.alphas[0], one.alphas[0])


@settings(max_examples=20)
@given(
    gates=st.lists(st.floats(-100, 100), min_size=6, max_size=6),
    lr=st.floats(0.01, 5),
    paths=st.sampled_from(["full", "two"]),
)
def test_alphas_are_centred_and_no_probability_reaches_999(gates, lr, paths):
    toy = Toy([SIX, KERNEL], 1.0, gates, gates[:2])
    optimizer = torch.optim.Adam(toy.alphas, lr=lr, betas=(0.0, 0.999))
    decided = {decision.name: decision.options[0] for decision in toy.decisions}
    prices = Prices()
    for turn in range(12):
        rng = np.random.default_rng(turn)
        _, prices = architecture_step(toy, optimizer, IMAGES, NOTHING, decided, prices, paths=paths, rng=rng)
        for alpha, p in zip(toy.alphas, toy.probabilities().values(), strict=True):
            assert abs(float(alpha.detach().mean())) < 1e-5
            assert float(p.detach().max()) < 0.999 and float(p.detach().min()) > 1e-5


def test_a_decision_is_undecided_while_its_two_best_options_are_close():
    toy = Toy([KERNEL, SIX], 1.0, (0.0, 0.0), (0.0,) * 6)
    assert undecided(toy) == ["3.kernel", "4.act"]
    with torch.no_grad():
        toy.alphas[0].copy_(torch.tensor([0.53, 0.47]).log())  # .06 apart
        toy.alphas[1].copy_(torch.tensor([0.32, 0.36, 0.08, 0.08, 0.08, 0.08]).log())  # .04 apart
    assert undecided(toy) == ["4.act"]
    assert undecided(toy, margin=0.1) == ["3.kernel", "4.act"]
    assert undecided(toy, margin=0.01) == []
