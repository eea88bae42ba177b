"""Gradients of a supernet: of its weights, of its gates, and what they lead to."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator, Mapping
from copy import deepcopy

import numpy as np
import pytest
import torch
from small import KINDS, SPECS
from torch import Tensor, nn

from data.structures import Targets
from models.elastic import ElasticConv2d, IndependentRow, elastic_leaves, wide
from models.graph import resolve
from models.parse import parse_text
from models.supernet import Supernet
from search.costs import Budget, cost_tables
from search.objective import Prices, architecture_step
from search.sampling import drawn_options, drawn_pairs, fair_options
from search.space import SearchSpace


def supernet(file: str, dtype: torch.dtype = torch.float32, norms: str = "act", kind: str | None = None) -> Supernet:
    """With norms as some steps of training leave them: at the start, residual branches have a scale of 0."""
    torch.manual_seed(0)
    net = Supernet(parse_text(SPECS[file]), kind or file, norms)
    for module in net.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net.to(dtype).train()


def a_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 32, generator=generator, dtype=dtype)
    boxes = torch.tensor([[5.0, 6, 20, 30], [10, 10, 26, 30], [15, 2, 30, 12]])
    return images, Targets(boxes, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))


def architectures(net: Supernet, count: int) -> list[dict]:
    space = SearchSpace.of(net.spec)
    rng = random.Random(3)
    return [dict(space.sample(rng).picks) for _ in range(count)]


def smooth_loss(net: Supernet, images: Tensor):
    """Of the head's logits. The detection loss is none: it holds its own objectness target constant."""
    generator = torch.Generator().manual_seed(2)
    goals = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in net.network(images)[0]]
    return lambda network: sum(((y - goal) ** 2).mean() for y, goal in zip(network(images)[0], goals, strict=True))


@contextlib.contextmanager
def mixture(net: Supernet, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every leaf is ``sum_k g_k o_k(x)`` with any numbers as gates."""

    def mixed(leaf, inputs, _):
        terms = zip(gates[leaf.choice.name], leaf.choice.options, strict=True)
        return sum(gate * leaf.option(option, *inputs) for gate, option in terms if gate or gate.requires_grad)

    leaves = [leaf for _, leaf in elastic_leaves(net.network)]
    hooks = [leaf.register_forward_hook(mixed) for leaf in leaves]
    with wide(leaves):
        yield
    for hook in hooks:
        hook.remove()


def one_hot(net: Supernet, picks: Mapping) -> dict[str, Tensor]:
    decided = net.decide(picks)
    return {
        d.name: torch.tensor([float(option == decided[d.name]) for option in d.options], dtype=torch.float64)
        for d in net.decisions
    }


# ---- weights


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_weight_gets_a_gradient(kind):
    """Independent: within one fair window. Shared: a norm of one activation in the last bottleneck of a row waits until
    activation and depth meet, which the independent queues do within a few windows.
    """
    net = supernet(kind)
    images, targets = a_batch()
    for step in range(6 if kind == "independent" else 48):
        net.activate(net.picks(fair_options(net.decisions, seed=0, step=step)))
        net.network.loss(images, targets)[0].backward()
    without = [name for name, p in net.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_sampled_options_get_a_gradient_from_one_step(kind):
    net = supernet(kind)
    images, targets = a_batch()
    wanted = {"kernel": 3, "act": "relu", "number": 1}
    net.activate({c.name: wanted[c.name.rpartition(".")[2]] for c in net.spec.choices})
    net.network.loss(images, targets)[0].backward()
    if kind == "shared":
        convs = [m for m in net.network.modules() if isinstance(m, ElasticConv2d)]
        ring = torch.ones(5, 5, dtype=torch.bool)
        ring[1:4, 1:4] = False
        used = [conv for conv in convs if conv.weight.grad is not None]
        assert used and len(used) < len(convs)  # the deeper bottlenecks were not run
        for conv in used:
            assert conv.weight.grad[:, :, 1:4, 1:4].abs().sum() > 0
            assert conv.weight.grad[:, :, ring].abs().sum() == 0
    else:
        for _, row in elastic_leaves(net.network):
            for option, candidate in zip(row.choice.options, row.candidates, strict=True):
                grads = [p.grad for p in candidate.parameters()]
                assert all((g is not None) == (option == row.active) for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_step_moves_the_statistics_of_what_it_runs_and_of_nothing_else(kind):
    net = supernet(kind)
    images, targets = a_batch()
    norms = [(name, m) for name, m in net.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    ran = set()
    hooks = [m.register_forward_hook(lambda norm, *_: ran.add(norm)) for _, m in norms]
    net.activate(architectures(net, 1)[0])
    before = deepcopy({name: dict(m.named_buffers()) for name, m in norms})
    net.network.loss(images, targets)[0].backward()
    assert 0 < len(ran) < len(norms)
    for name, norm in norms:
        for key, buffer in norm.named_buffers():
            assert torch.equal(buffer, before[name][key]) == (norm not in ran), f"{name}.{key}"
    for hook in hooks:
        hook.remove()


# ---- gates


@pytest.mark.parametrize(("kind", "norms"), [("shared", "act"), ("shared", "k_act"), ("independent", "act")])
def test_alpha_gradients_equal_central_differences_in_float64(kind, norms):
    """The gates are one-hot at the sampled options plus what the probabilities move by when one alpha does."""
    net = supernet(kind, torch.float64, norms)
    images, _ = a_batch(torch.float64)
    loss = smooth_loss(net, images)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.normal_(generator=generator)
    for picks in architectures(net, 1 if kind == "shared" else 2):
        value, gradients = net.gate_gradients(picks, loss)
        assert value == loss(net.network).detach()  # the forward is the plain one
        net.zero_grad()
        net.set_alpha_gradients(gradients)
        assert_slopes_are_differences(net, picks, loss)


def assert_slopes_are_differences(net, picks, loss, least=1e-6):
    """The gradient that each alpha holds is the central difference of the mixture's loss around `picks`."""
    active, step = one_hot(net, picks), 1e-6  # small, for relu has a kink
    for decision, alpha in zip(net.decisions, net.alphas, strict=True):
        numeric = torch.zeros_like(alpha)
        for k in range(len(alpha)):
            values = []
            for sign in (1, -1):
                moved = alpha.detach().clone()
                moved[k] += sign * step
                gate = active[decision.name] + moved.softmax(0) - alpha.detach().softmax(0)
                with torch.no_grad(), mixture(net, {**active, decision.name: gate}):
                    values.append(float(loss(net.network)))
            numeric[k] = (values[0] - values[1]) / (2 * step)
        assert numeric.abs().max() > least
        torch.testing.assert_close(alpha.grad, numeric, rtol=1e-3, atol=1e-3 * float(numeric.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paths", ["full", "two"])
def test_an_architecture_step_moves_alphas_and_nothing_else_bit_for_bit(kind, paths):
    net = supernet(kind)
    images, targets = a_batch()
    before = deepcopy(net.network.state_dict())  # with the norms' counters
    optimizer = torch.optim.Adam(net.alphas, lr=0.01, betas=(0.0, 0.999))
    decided = {d.name: d.options[0] for d in net.decisions}
    rng = np.random.default_rng(0)
    architecture_step(net, optimizer, images, targets, decided, Prices(), paths=paths, rng=rng)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.network.state_dict().items())
    assert all(alpha.abs().sum() > 0 for alpha in net.alphas)
    assert all(p.grad is None and p.requires_grad for p in net.network.parameters())
    assert not any(module._forward_hooks for module in net.network.modules())
    assert all(m.track_running_stats for m in net.network.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_failed_loss_leaves_the_supernet_as_it_was():
    net = supernet("shared")

    def broken(network):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        net.gate_gradients(architectures(net, 1)[0], broken)
    assert all(p.requires_grad for p in net.network.parameters())
    assert not any(module._forward_hooks for module in net.network.modules())
    assert all(m.track_running_stats for m in net.network.modules() if isinstance(m, nn.BatchNorm2d))


def test_what_an_identity_hands_on_is_not_counted_at_its_other_readers():
    """The first leaf is an activation whose options are identity and relu, on a map that another row reads too."""
    text = """
nc: 3
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 2, {act: relu}]]
  - [-1, 1, BottleneckCSP, [8, {act: {choice: [identity, mish]}}]]
head:
  - [[-1, 0], 1, Concat, [1]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [[2, 3], 1, Detect, [nc, anchors]]
"""
    torch.manual_seed(0)
    net = Supernet(parse_text(text), "shared").double().train()
    loss = smooth_loss(net, a_batch(torch.float64)[0])
    picks = {net.decisions[0].name: "identity"}
    _, found = net.gate_gradients(picks, loss)
    gates = {name: gate.requires_grad_() for name, gate in one_hot(net, picks).items()}
    with mixture(net, gates):
        expected = torch.autograd.grad(loss(net.network), list(gates.values()))
    torch.testing.assert_close(list(found.values()), list(expected))


# ---- two paths


@pytest.mark.parametrize("kind", KINDS)
def test_two_paths_look_at_two_options_of_a_decision_only(kind):
    net = supernet(kind)
    images, targets = a_batch()
    rng = np.random.default_rng(0)
    decided, pairs = drawn_pairs(net.decisions, net.probabilities(), fair_options(net.decisions, 0, 0), rng)
    ran = set()
    rows = [m for m in net.network.modules() if isinstance(m, IndependentRow)]
    for row in rows:
        for option, candidate in zip(row.choice.options, row.candidates, strict=True):
            candidate.register_forward_hook(lambda *_, at=(row.choice.name, option): ran.add(at))

    def loss(network):
        return network.loss(images, targets)[0]

    value, gradients = net.gate_gradients(net.picks(decided), loss, pairs)
    assert ran == {(row.choice.name, option) for row in rows for option in pairs[row.choice.name]}
    same, every = net.gate_gradients(net.picks(decided), loss)
    assert value == same
    for decision in net.decisions:
        among = torch.tensor([option in pairs[decision.name] for option in decision.options])
        assert among.sum() == 2 and decided[decision.name] in pairs[decision.name]
        assert torch.equal(gradients[decision.name], every[decision.name] * among)


def two_path_gradient(net: Supernet, g: Tensor, pair: tuple[int, int]) -> Tensor:
    """What `set_alpha_gradients` gives the first decision for a pair of places."""
    net.zero_grad()
    first = net.decisions[0]
    among = {d.name: d.options for d in net.decisions} | {first.name: [first.options[k] for k in pair]}
    zeros = {d.name: torch.zeros(len(d.options), dtype=g.dtype) for d in net.decisions}
    net.set_alpha_gradients(zeros | {first.name: g}, among)
    return net.alphas[0].grad


def test_a_two_path_gradient_weighs_the_comparison_of_its_pair():
    """Full: ``dL/da_i = sum_j p_i p_j (g_i - g_j)``, all comparisons at once. A pair {i, j} gives the one comparison
    ``q_i q_j (g_i - g_j)``, with q the pair's own softmax. Divided by ``q_i q_j / (p_i p_j)`` and summed over all
    pairs, it is the full gradient; and with two options it is the full gradient as it stands.
    """
    net = supernet("independent", torch.float64)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(6, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        net.alphas[0].copy_(torch.randn(6, dtype=torch.float64, generator=generator))
    p = net.alphas[0].detach().softmax(0)
    total = torch.zeros_like(p)
    for i, j in itertools.combinations(range(6), 2):
        gradient = two_path_gradient(net, g, (i, j))
        weight = p[i] * p[j] / (p[i] + p[j]) ** 2
        assert gradient[i] == pytest.approx(float(weight * (g[i] - g[j])), rel=1e-9)
        assert gradient[j] == pytest.approx(-float(gradient[i]), rel=1e-9)
        assert gradient.count_nonzero() == 2
        total += gradient * (p[i] + p[j]) ** 2
    net.zero_grad()
    zeros = {d.name: torch.zeros(len(d.options), dtype=g.dtype) for d in net.decisions}
    net.set_alpha_gradients(zeros | {net.decisions[0].name: g})
    torch.testing.assert_close(total, net.alphas[0].grad)
    torch.testing.assert_close(net.alphas[0].grad, p * (g - p @ g))


def test_the_mean_two_path_gradient_over_drawn_pairs_is_that_of_its_own_formula():
    """``E = sum_j P(i, j) q_i q_j (g_i - g_j)``, where ``P = p_i p_j (1 / (1 - p_i) + 1 / (1 - p_j))``: every
    comparison with a positive weight, so that on average the best option rises and the worst falls.
    """
    net = supernet("independent", torch.float64)
    decision = net.decisions[0]
    g = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3, -0.2], dtype=torch.float64)
    with torch.no_grad():
        net.alphas[0].copy_(torch.tensor([0.0, -0.5, 0.7, 0.2, 0.1, -0.5]))
    p = net.alphas[0].detach().softmax(0)
    share = p[:, None] / (p[:, None] + p)
    chance = torch.outer(p, p) * (1 / (1 - p[:, None]) + 1 / (1 - p))
    expected = (chance * share * share.T * (g[:, None] - g)).sum(1)
    assert expected.sum().abs() < 1e-12 and expected[g.argmax()] > 0 > expected[g.argmin()]
    gradients = {pair: two_path_gradient(net, g, pair) for pair in itertools.permutations(range(6), 2)}
    rng, drawn, probabilities = np.random.default_rng(0), [], {decision.name: p}
    for _ in range(4_000):
        first = drawn_options([decision], probabilities, rng)
        _, pairs = drawn_pairs([decision], probabilities, first, rng)
        drawn.append(gradients[tuple(decision.index(option) for option in pairs[decision.name])])
    drawn = torch.stack(drawn)
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()


# ---- what they lead to

PLANTED = {"kernel": 5, "act": "leaky", "number": 2}
STEPS = {"full": 60, "two": 200}  # two options a step say less each
PLANT = """
nc: 3
activation: mish
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 4]]
  - [-1, {number}, MBottleneckCSP2, [8]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""


@pytest.fixture(scope="module", params=KINDS)
def planted(request) -> tuple[Supernet, dict]:
    """A supernet whose weights were trained with one architecture only, so that it is the best by construction."""
    torch.manual_seed(0)
    number = "{choice: [1, 2, 3]}" if request.param == "shared" else 2
    net = Supernet(parse_text(PLANT.format(number=number)), request.param).train()
    images, targets = a_batch()
    picks = {c.name: PLANTED[c.name.rpartition(".")[2]] for c in net.spec.choices}
    net.activate(picks)
    optimizer = torch.optim.AdamW(net.network.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad(set_to_none=True)
        net.network.loss(images, targets)[0].backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses = {}
    space = SearchSpace.of(net.spec)
    with torch.no_grad():
        for number in range(space.size):
            net.activate(space.at(number).picks)
            losses[number] = float(net.network.loss(images, targets)[0])
    assert space.at(min(losses, key=losses.__getitem__)).picks == picks
    return net, picks


@pytest.mark.parametrize("paths", ["full", "two"])
@pytest.mark.parametrize("price", [0.0, 1e4])
def test_a_planted_best_option_is_found_in_200_steps_and_under_a_heavy_price_the_cheapest(planted, paths, price):
    net, picks = planted
    images, targets = a_batch()
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.zero_()
    tables = cost_tables(resolve(net.spec), 64)
    least, cheapest = tables["macs"].extreme(largest=False)
    budgets = [Budget("macs", least)] if price else []
    optimizer = torch.optim.Adam(net.alphas, lr=0.08, betas=(0.0, 0.999))
    prices = Prices(lambdas=(price,) * len(budgets))
    for step in range(STEPS[paths]):
        rng = np.random.default_rng((0, step))
        decided = drawn_options(net.decisions, net.probabilities(), rng)
        _, prices = architecture_step(
            net,
            optimizer,
            images,
            targets,
            decided,
            prices,
            budgets=budgets,
            tables=tables,
            progress=step / STEPS[paths],
            paths=paths,
            rng=rng,
        )
    found = net.picks({d.name: d.options[int(a.argmax())] for d, a in zip(net.decisions, net.alphas, strict=True)})
    if price:  # activations cost no MACs
        priced = [name for name in picks if not name.endswith("act")]
        assert {name: found[name] for name in priced} == {name: cheapest.picks[name] for name in priced}
    else:
        assert found == picks
