"""Supernets: what is shared, what gets a gradient, and that a derived network is the subnet."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from data.structures import Targets
from engine.calibrate import calibrate
from models.cost import count_params
from models.elastic import ElasticConv2d, elastic_leaves, mixing
from models.network import build, head_maximum
from models.parse import dump, parse_text
from models.spec import Choice
from models.supernet import Supernet
from search.space import SearchSpace

TINY = """
nc: 3
activation: mish
anchors: [[10, 13, 16, 30], [30, 61, 62, 45]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, {number}, BottleneckCSP, [16, {{kernel: {{choice: [3, 5]}}, act: {{choice: [relu, leaky, mish]}}}}]]
head:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, {number}, MBottleneckCSP2, [16]]
  - [[2, 4], 1, Detect, [nc, anchors]]
"""
SPECS = {
    "shared": TINY.format(number="{choice: [1, 2, 3]}"),
    "independent": TINY.format(number=2),
}
KINDS = ["shared", "independent"]


def supernet(kind: str, dtype: torch.dtype = torch.float32) -> Supernet:
    torch.manual_seed(0)
    return Supernet(parse_text(SPECS[kind]), kind).to(dtype)


def a_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 64, 64, generator=generator, dtype=dtype)
    boxes = torch.tensor([[5.0, 6, 20, 30], [10, 10, 50, 60], [30, 2, 60, 20], [20, 20, 33, 37]])
    return images, Targets(boxes, torch.tensor([0, 1, 2, 0]), torch.arange(4))


def architectures(net: Supernet, count: int) -> list[dict]:
    space = SearchSpace.of(net.spec)
    rng = random.Random(3)
    return [dict(space.sample(rng).picks) for _ in range(count)]


def homogeneous(net: Supernet) -> list[dict]:
    """The same kernel and activation everywhere, at the largest and smallest depth."""
    found = []
    for kernel in (3, 5):
        for act in ("relu", "leaky", "mish"):
            for depth in (min, max):
                wanted = {"kernel": kernel, "act": act}
                found.append(
                    {c.name: wanted.get(c.name.rpartition(".")[2], depth(c.options, key=str)) for c in net.spec.choices}
                )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_candidate_weight_gets_a_gradient(kind):
    """Independent: within one fair window. Shared: a norm of one activation in the last bottleneck of a row waits until
    activation and depth meet, which the independent queues do within a few windows.
    """
    from search.sampling import fair_options

    net = supernet(kind).train()
    images, targets = a_batch()
    for step in range(6 if kind == "independent" else 48):
        net.activate(net.picks(fair_options(net.decisions, seed=0, step=step)))
        net.network.loss(images, targets)[0].backward()
    without = [name for name, p in net.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_sampled_options_get_a_gradient_from_one_step(kind):
    net = supernet(kind).train()
    images, targets = a_batch()
    picks = homogeneous(net)[0]  # 3x3, relu, depth 1
    net.activate(picks)
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
def test_gate_gradients_equal_central_differences_in_float64(kind):
    """y = sum_k g_k o_k at the sampled point, chained through the softmax, for every alpha of the network.

    The loss is smooth in the head's logits: the detection loss holds its own objectness target constant.
    """
    net = supernet(kind, torch.float64).train()
    images, _ = a_batch(torch.float64)
    goals = [torch.randn(y.shape, dtype=y.dtype) for y in net.network(images)[0]]

    def loss(network: nn.Module) -> Tensor:
        return sum(((y - goal) ** 2).mean() for y, goal in zip(network(images)[0], goals, strict=True))

    for picks in architectures(net, 2):
        _, gradients = net.gate_gradients(picks, loss)
        gates = {name: gate.detach() for name, gate in net.one_hot(picks).items()}
        step = 1e-6
        for decision, alpha in zip(net.decisions, net.alphas, strict=True):
            numeric = torch.zeros_like(gates[decision.name])
            for k in range(len(decision.options)):
                values = []
                for sign in (1, -1):
                    moved = {name: gate.clone() for name, gate in gates.items()}
                    moved[decision.name][k] += sign * step
                    with torch.no_grad(), mixing(net.network, moved):
                        values.append(float(loss(net.network)))
                numeric[k] = (values[0] - values[1]) / (2 * step)
            torch.testing.assert_close(gradients[decision.name], numeric, rtol=1e-3, atol=1e-8)
            p = alpha.detach().softmax(0)
            jacobian = torch.diag(p) - torch.outer(p, p)
            alpha.grad = None
            net.set_alpha_gradients(gradients)
            torch.testing.assert_close(alpha.grad, jacobian @ numeric, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_step_leaves_weights_and_norms_as_they_are_and_moves_alphas(kind):
    from search.objective import Prices, architecture_step

    net = supernet(kind).train()
    images, targets = a_batch()
    before = deepcopy(net.network.state_dict())
    optimizer = torch.optim.Adam(net.alphas, lr=0.01, betas=(0.0, 0.999))
    decided = {d.name: d.options[0] for d in net.decisions}
    architecture_step(net, optimizer, images, targets, decided, Prices())
    for name, tensor in net.network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
    assert all(alpha.abs().sum() > 0 for alpha in net.alphas)
    assert all(p.grad is None for p in net.network.parameters())
    assert all(p.requires_grad for p in net.network.parameters())
    assert all(leaf.gates is None for _, leaf in elastic_leaves(net.network))


@pytest.mark.parametrize("kind", KINDS)
def test_a_derived_network_is_the_activated_subnet_after_calibration(kind):
    net = supernet(kind)
    images, targets = a_batch()
    for picks in [*homogeneous(net), *architectures(net, 8)]:
        net.activate(picks)
        calibrate(net.network, [images])
        net.eval()
        with torch.no_grad():
            expected, _ = net.network(images)
            plain = net.derive(picks).eval()
            found, _ = plain(images)
        limit = 1e-5 * head_maximum(expected)
        for a, b in zip(expected, found, strict=True):
            assert (a - b).abs().max() <= limit
        rebuilt = build(parse_text(dump(plain.spec)))  # from its own YAML, without any trace of the search
        assert rebuilt.state_dict().keys() == plain.state_dict().keys()
        assert count_params(plain) == count_params(rebuilt) < count_params(net.network)
        assert not list(elastic_leaves(plain))


def test_the_3x3_kernel_is_the_centre_of_the_5x5():
    conv = ElasticConv2d(4, 6, Choice("k", (3, 5)))
    x = torch.randn(2, 4, 9, 9)
    ring = torch.zeros_like(conv.weight)
    ring[:, :, 1:4, 1:4] = conv.kernel(3).detach()
    small = conv.option(3, x)
    with torch.no_grad():
        conv.weight.copy_(ring)
    torch.testing.assert_close(conv.option(5, x), small)


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_do_not_move_while_a_supernet_trains(kind):
    net = supernet(kind).train()
    images, targets = a_batch()
    net.network.loss(images, targets)
    for module in net.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.abs().sum() == 0 and (module.running_var == 1).all()


def test_calibration_pools_moments_exactly_over_unequal_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)).eval()
    batches = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8) * 3 + 1]
    calibrate(network, batches)
    y = torch.cat([network[0](batch) for batch in batches])
    torch.testing.assert_close(network[1].running_mean, y.mean((0, 2, 3)))
    torch.testing.assert_close(network[1].running_var, y.var((0, 2, 3)))
    assert not network.training and network[1].momentum == 0.1


def test_a_planted_best_option_is_found_and_under_a_heavy_price_the_cheapest():
    """The weights are trained with 5x5 only, so that 3x3 is worse by construction; then only alphas move."""
    import numpy as np

    from models.graph import resolve
    from search.costs import Budget, cost_tables
    from search.objective import Prices, architecture_step
    from search.sampling import drawn_options

    torch.manual_seed(0)
    text = SPECS["shared"].replace("{choice: [relu, leaky, mish]}", "mish").replace("{choice: [1, 2, 3]}", "1")
    text = text.replace("MBottleneckCSP2, [16]", "BottleneckCSP2, [16]")
    net = Supernet(parse_text(text), "shared").train()
    (choice,) = net.decisions
    images, targets = a_batch()
    net.activate({choice.name: 5})
    optimizer = torch.optim.AdamW(net.network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        net.network.loss(images, targets)[0].backward()
        optimizer.step()
    tables = cost_tables(resolve(net.spec), 64)
    least = tables["macs"].extreme(largest=False)[0]

    def searched(price: float) -> int:
        with torch.no_grad():
            for alpha in net.alphas:
                alpha.zero_()
        alphas = torch.optim.Adam(net.alphas, lr=0.02, betas=(0.0, 0.999))
        prices = Prices(lambdas=(price,))
        budgets = [Budget("macs", least)]
        for step in range(200):
            drawn = drawn_options(net.decisions, net.probabilities(), np.random.default_rng((0, step)))
            _, prices = architecture_step(
                net, alphas, images, targets, drawn, prices, budgets=budgets, tables=tables, progress=step / 200
            )
            if not price:
                prices = Prices(prices.mean_loss, (0.0,))
        return choice.options[int(net.alphas[0].argmax())]

    assert searched(price=0.0) == 5
    assert searched(price=1e4) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_judging_together_equals_calibrating_and_measuring_one_by_one(kind, tmp_path):
    from data.config import read_data_spec
    from data.dataset import DetectionSet
    from data.readers import read_split
    from data.shapes import draw_shapes
    from engine.evaluate import evaluate
    from search.judge import first_choice, judge

    data = read_data_spec(draw_shapes(tmp_path, train=6, val=2, size=64, seconds=0))
    images = DetectionSet(read_split(data, "train").samples, 64)
    calibration = [torch.rand(4, 3, 64, 64), torch.rand(2, 3, 64, 64)]
    net = supernet(kind).eval()
    picked = architectures(net, 4)
    start = first_choice(net.network, [choice.name for choice in net.spec.choices])
    assert start == 2
    device = torch.device("cpu")
    together = [net.derive(picks) for picks in picked]
    names = ["a", "b", "c"]
    found = judge(together, start, calibration, images, names=names, batch_size=4, device=device, progress=False)
    for picks, network, metrics in zip(picked, together, found, strict=True):
        alone = net.derive(picks)
        calibrate(alone, calibration)
        expected = evaluate(alone, images, names=names, batch_size=4, progress=False)
        assert alone.state_dict().keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert metrics.ap == pytest.approx(expected.ap, abs=1e-6)


def test_calibration_comes_in_batches_of_32_without_augmentation(tmp_path):
    from data.augment import Augment
    from data.config import read_data_spec
    from data.dataset import DetectionSet
    from data.readers import read_split
    from data.shapes import draw_shapes
    from engine.evaluate import calibration_images

    data = read_data_spec(draw_shapes(tmp_path, train=70, val=1, size=32, seconds=0))
    images = DetectionSet(read_split(data, "train").samples, 32, Augment(), seed=3)
    found = list(calibration_images(images, 40, 0, "cpu"))
    assert [len(batch) for batch in found] == [32, 32]
    again = list(calibration_images(images.at_epoch(5), 40, 0, "cpu"))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert images.augment is not None  # the set itself is left as it was
