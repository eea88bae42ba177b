"""Open widths and depths in the steps of a search that runs several subnets at once: sandwich and mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import assert_mixtures_are_sums, random_gates
from test_resume import a_task
from test_sandwich import assert_the_largest_teaches
from test_train import draw_data
from test_width import drawn, fresh, images_of
from torch import Tensor

from data.structures import Targets
from models.cost import count_params
from models.elastic import Cut
from models.graph import resolve
from models.supernet import Supernet
from search.costs import cost_tables
from search.sampling import fair_options, sandwich_options
from search.sandwich import backward, sizes

SPACE = """
nc: 2
anchors: [[12, 12, 24, 24]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, {choice: [1, 2]}, C3, [8, {expansion: {choice: [0.5, 1.0]}, act: {choice: [relu, mish]}}]]
head:
  - [-1, 2, MBottleneckCSP2, [8, {expansion: {choice: [1.0, 0.5]}}]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Detect, [nc, anchors]]
"""
BLOCKS = ["BottleneckCSP", "C2f", "MBConv"]


def targets() -> Targets:
    return Targets(torch.tensor([[5.0, 6, 20, 30], [2, 3, 28, 20]]), torch.tensor([0, 1]), torch.tensor([0, 1]))


def gradients(net: Supernet) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in net.network.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


# ---- sandwich


@pytest.mark.parametrize("name", BLOCKS)
def test_the_three_of_a_sandwich_are_the_widest_and_deepest_a_random_one_and_the_smallest(name: str) -> None:
    net = fresh(name)
    largest, smallest = sizes(cost_tables(resolve(net.spec), 32)["macs"])
    widths = next(c for c in net.spec.choices if "expan" in c.name)
    assert largest["1.number"] == 2 and smallest["1.number"] == 1 and largest["1.kernel"] == 5
    assert largest[widths.name] == max(widths.options) and smallest[widths.name] == min(widths.options)
    three = [net.picks(one) for one in sandwich_options(net.decisions, largest, smallest, 0, 0)]
    counts = [count_params(net.derive(picks)) for picks in three]
    assert counts[0] >= counts[1] >= counts[2] and counts[0] > counts[2]


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_a_sandwich_are_those_of_three_whole_passes(name: str) -> None:
    """In float64; every channel of the widest block is reached by the largest subnet of each step."""
    net, images = fresh(name).double(), images_of(dtype=torch.float64)
    largest, smallest = sizes(cost_tables(resolve(net.spec), 32)["macs"])
    three = [net.picks(one) for one in sandwich_options(net.decisions, largest, smallest, 0, 1)]
    for picks in three:
        net.activate(picks)
        net.network.loss(images, targets())[0].backward()
    expected = gradients(net)
    backward(net, three, images, net.network.run, lambda _, y, aux: net.network.loss_from(y, targets(), aux)[0])
    found = gradients(net)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-10, msg=key)


def test_the_largest_teaches_the_narrow_and_shallow_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_resume.SPACE", SPACE)
    task = a_task(draw_data(tmp_path, train=12), "shared", sandwich=True, budget=())
    assert_the_largest_teaches(task, tmp_path / "run", monkeypatch)


# ---- mixture


@pytest.mark.parametrize("name", [*BLOCKS, "C3", "MBConv each"])
def test_a_mixture_of_widths_is_the_sum_of_what_leaves_give_under_every_option(name: str) -> None:
    assert_mixtures_are_sums(fresh(name, "merge", "k_act").double(), images_of(dtype=torch.float64))


def test_gates_of_a_mixture_of_widths_have_the_slopes_of_its_loss() -> None:
    net, images = fresh("C3", "merge").double(), images_of(dtype=torch.float64)
    gates = {name: gate.softmax(0) for name, gate in random_gates(net).items()}
    loss = lambda network: sum(y.square().mean() for y in network(images)[0])  # noqa: E731
    value, found = net.mixture_gradients(gates, loss)

    def at(name: str, place: int, step: float) -> float:
        moved = {**gates, name: gates[name] + step * torch.eye(len(gates[name]), dtype=torch.float64)[place]}
        with torch.no_grad(), net.mixed(moved):
            return float(loss(net.network))

    assert float(value) == pytest.approx(at("1.expansion", 0, 0.0), rel=1e-12)
    for name in ("1.expansion", "1.number"):
        slopes = [(at(name, k, 1e-6) - at(name, k, -1e-6)) / 2e-6 for k in range(len(gates[name]))]
        assert found[name].tolist() == pytest.approx(slopes, rel=1e-5) and max(map(abs, slopes)) > 1e-4
    assert not any(module.wide for module in net.network.modules() if isinstance(module, Cut))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_channel_learns_in_one_step_of_a_mixture(name: str) -> None:
    net = fresh(name, "merge", "k_act")
    with net.mixed({n: gate.softmax(0) for n, gate in random_gates(net).items()}):
        sum(y.square().mean() for y in net.network(images_of())[0]).backward()
    for key, gradient in gradients(net).items():
        reached = gradient.abs().flatten(1).sum(1) if gradient.dim() > 1 else gradient.abs()
        assert (reached > 0).all(), key


def test_a_search_of_widths_by_mixtures_ends_with_subnets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft and hard steps, and what a derived network gives is what the subnet gives."""
    monkeypatch.setattr("test_resume.SPACE", SPACE)
    net = a_task(draw_data(tmp_path, train=12), "merge", budget=()).run(tmp_path / "run").eval()
    assert all(alpha.abs().sum() > 0 for alpha in net.alphas)
    x: Any = images_of()
    for picks in (*drawn(net, 2), net.picks(fair_options(net.decisions, 0, 3))):
        net.activate(picks)
        with torch.no_grad():
            for a, b in zip(net.network(x)[0], net.derive(picks)(x)[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
