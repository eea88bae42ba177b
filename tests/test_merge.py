"""The merging supernet: a mixture of all subnets in one network, its gates, and what they lead to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_derive import open_row
from test_derive import supernet as a_supernet
from test_gradients import PLANT, PLANTED, a_batch, architectures, mixture, smooth_loss, supernet
from test_resume import a_task, assert_same, data
from test_train import Killed, kill_before
from torch import Tensor, nn

from data.structures import Fault
from engine.runs import read_csv
from models.elastic import ElasticActivation, ElasticConv2d, SwitchableNorm
from models.graph import resolve
from models.ops.primitives import ACTIVATIONS, activation
from models.parse import parse_text
from models.spec import Choice
from models.supernet import Supernet
from search import train as training
from search.config import SearchConfig
from search.costs import Budget, cost_tables
from search.objective import Prices, architecture_step
from search.run import main
from search.sampling import gumbel_noise, mixing_epochs, relaxed, temperature
from search.train import check_supernet, mixed_gates

__all__ = ["data"]  # a fixture


def random_gates(net: Supernet, seed: int = 0) -> dict[str, Tensor]:
    """Any numbers, so that nothing rests on a sum of 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    return {d.name: torch.randn(len(d.options), generator=generator, dtype=dtype) for d in net.decisions}


def merging(dtype: torch.dtype = torch.float32, norms: str = "act") -> Supernet:
    return supernet("shared", dtype, norms, kind="merge")


# ---- the mixture


LEAVES = ("Conv", "BottleneckCSP2", "C2f", "CABlock", "RepConv", "MBConv")  # every kind of leaf is in one of them


def assert_mixtures_are_sums(net: Supernet, images: Tensor) -> None:
    """In float64, by any gates: a mixture's outputs, and its gradients for gates and weights, are those of the sum of
    what leaves give under every option.
    """
    found = []
    for around in (net.mixed, lambda gates: mixture(net, gates)):
        gates = {name: gate.requires_grad_() for name, gate in random_gates(net).items()}
        with around(gates):
            outputs, _ = net.network(images)
            sum(y.square().mean() for y in outputs).backward()
        weights = {name: p.grad for name, p in net.network.named_parameters() if p.grad is not None}
        found.append({**dict(enumerate(outputs)), **{n: g.grad for n, g in gates.items()}, **weights})
        net.zero_grad(set_to_none=True)
    merged, summed = found
    assert merged.keys() == summed.keys()
    for key, value in summed.items():
        limit = 1e-9 * float(value.detach().abs().max() + 1)
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=limit, msg=str(key))


@pytest.mark.parametrize("name", LEAVES)
def test_the_mixture_of_an_op_is_the_sum_of_what_its_leaves_give_under_every_option(name: str) -> None:
    """In float64, by any gates, outputs and the gradients for gates and weights; by hooks that run all options."""
    rows = {"body": open_row(name, 16), "neck": "[-1, 1, Conv, [16]]"}
    net = a_supernet("merge", "k_act", rows).double().train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_mixtures_are_sums(net, images)


def test_a_mixture_that_is_certain_is_the_active_subnet() -> None:
    net = merging(torch.float64)
    images, _ = a_batch(torch.float64)
    for picks in architectures(net, 4):
        net.activate(picks)
        one_hot = {
            d.name: torch.tensor([float(o == picks[d.name]) for o in d.options], dtype=torch.float64)
            for d in net.decisions
        }
        expected = net.network(images)[0]
        with net.mixed(one_hot):
            found = net.network(images)[0]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_mixed_kernel_is_one_convolution_with_the_kernels_added_up() -> None:
    """``W = p3 pad(W3) + p5 W5``, cell by cell."""
    conv = ElasticConv2d(2, 3, Choice("k", (3, 5)))
    with torch.no_grad():
        conv.transforms["3"].mul_(2)
    gates, x = torch.tensor([0.25, 0.75]), torch.randn(1, 2, 7, 7)
    weight = 0.75 * conv.weight.detach().clone()
    weight[:, :, 1:4, 1:4] += 0.25 * 2 * conv.weight.detach()[:, :, 1:4, 1:4]
    expected = nn.functional.conv2d(x, weight, conv.bias, padding=2)
    ran = []
    convolve = nn.functional.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.elastic.F.conv2d", lambda *a, **k: ran.append(a[1].shape) or convolve(*a, **k))
        torch.testing.assert_close(conv.mixture(gates, x), expected)
    assert ran == [(3, 2, 5, 5)]


def test_mixed_activations_have_the_derivatives_of_their_sum_and_remember_their_input_alone() -> None:
    act = ElasticActivation(Choice("a", tuple(ACTIVATIONS)), activation)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(len(ACTIVATIONS), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, gates: act.mixture(gates, x), (x, gates), eps=1e-7)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        act.mixture(gates, x)
    assert [t.shape for t in kept] == [x.shape, gates.shape]


def test_a_mixture_moves_no_statistics_of_the_norms_that_follow_a_choice() -> None:
    net = merging()
    norms = [n for leaf in net.modules() if isinstance(leaf, SwitchableNorm) for n in leaf.norms]
    before = [{k: b.clone() for k, b in n.named_buffers()} for n in norms]
    with net.mixed(random_gates(net)):
        net.network(a_batch()[0])
    for norm, was in zip(norms, before, strict=True):
        assert all(torch.equal(buffer, was[name]) for name, buffer in norm.named_buffers())


def test_afterwards_nothing_of_a_mixture_is_left_also_when_it_fails() -> None:
    net = merging()
    with pytest.raises(ZeroDivisionError), net.mixed(random_gates(net)):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in net.modules())


def test_whole_blocks_side_by_side_cannot_be_merged() -> None:
    row = "[-1, 1, AttentionBranch, [nc, {blocks: {choice: [light, none]}}]]"
    text = PLANT.format(number=1).replace("[-1, 1, MBottleneckCSP2, [8]]", row)
    Supernet(parse_text(text), "shared")
    with pytest.raises(Fault) as fault:
        Supernet(parse_text(text), "merge")
    assert str(fault.value).endswith(
        "layer 1: AttentionBranch holds a block for each option of 1.blocks, which cannot be merged into one; "
        "--supernet shared can hold it"
    )


# ---- gradients


def test_every_candidate_weight_gets_a_gradient_in_one_step() -> None:
    net = merging(norms="k_act")
    images, targets = a_batch()
    with net.mixed({name: gate.softmax(0) for name, gate in random_gates(net).items()}):
        net.network.loss(images, targets)[0].backward()
    without = [name for name, p in net.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("norms", ["act", "k_act", "shared"])
def test_alpha_gradients_equal_central_differences_in_float64(norms: str) -> None:
    """Through the relaxed draw, at a temperature, with noise that stays."""
    net = merging(torch.float64, norms)
    images, _ = a_batch(torch.float64)
    loss = smooth_loss(net, images)
    noise = gumbel_noise(net.decisions, np.random.default_rng(3))
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.normal_(generator=torch.Generator().manual_seed(4))

    def value() -> float:
        with torch.no_grad(), net.mixed(relaxed(net.decisions, net.alphas, noise, 0.8)):
            return float(loss(net.network))

    gates = relaxed(net.decisions, net.alphas, noise, 0.8)
    mean, gradients = net.mixture_gradients(gates, loss)
    assert float(mean) == value()
    torch.autograd.backward(list(gates.values()), [gradients[name] for name in gates])
    step = 1e-6
    for alpha in net.alphas:
        numeric = torch.zeros_like(alpha)
        for k in range(len(alpha)):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    alpha[k] += sign * step
                    ends.append(value())
                    alpha[k] -= sign * step
            numeric[k] = (ends[0] - ends[1]) / (2 * step)
        assert numeric.abs().max() > 1e-6
        torch.testing.assert_close(alpha.grad, numeric, rtol=1e-3, atol=1e-3 * float(numeric.abs().max()))


def test_an_architecture_step_of_a_mixture_moves_alphas_and_nothing_else_bit_for_bit() -> None:
    net = merging()
    images, targets = a_batch()
    before = {name: tensor.clone() for name, tensor in net.network.state_dict().items()}
    optimizer = torch.optim.Adam(net.alphas, lr=0.01, betas=(0.0, 0.999))
    gates = mixed_gates(net, net.alphas, np.random.default_rng(0), 0.5)
    architecture_step(net, optimizer, images, targets, {}, Prices(), mixture=gates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.network.state_dict().items())
    assert all(alpha.abs().sum() > 0 for alpha in net.alphas)
    assert all(p.grad is None and p.requires_grad for p in net.network.parameters())
    assert all(m.track_running_stats for m in net.network.modules() if isinstance(m, nn.BatchNorm2d))


# ---- gates


def test_gates_get_colder_from_5_to_a_tenth_by_the_same_factor() -> None:
    assert temperature(0) == 5 and temperature(1) == pytest.approx(0.1) and temperature(2) == temperature(1)
    assert temperature(0.5) == pytest.approx(math.sqrt(5 * 0.1))
    assert [mixing_epochs(epochs) for epochs in (1, 2, 4, 5, 6, 10, 35, 100)] == [0, 1, 3, 4, 4, 8, 28, 80]


def test_relaxed_gates_are_the_paper_s() -> None:
    """alpha (0, 1), noise (.5, 0), temperature .5: softmax(1, 2). Their largest is drawn by softmax(alpha)."""
    decision, alpha = Choice("a", ("x", "y")), torch.tensor([0.0, 1.0], dtype=torch.float64)
    gates = relaxed([decision], [alpha], {"a": torch.tensor([0.5, 0.0], dtype=torch.float64)}, 0.5)
    assert gates["a"].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    rng = np.random.default_rng(0)
    drawn = [relaxed([decision], [alpha], gumbel_noise([decision], rng), 0.1)["a"].argmax() for _ in range(4_000)]
    p = float(alpha.softmax(0)[1])
    assert np.mean(drawn) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4_000))


# ---- what it leads to


@pytest.fixture(scope="module")
def planted() -> tuple[Supernet, dict[str, Any]]:
    """A supernet whose weights were trained with one architecture only."""
    torch.manual_seed(0)
    net = Supernet(parse_text(PLANT.format(number="{choice: [1, 2, 3]}")), "merge").train()
    images, targets = a_batch()
    picks = {c.name: PLANTED[c.name.rpartition(".")[2]] for c in net.spec.choices}
    net.activate(picks)
    optimizer = torch.optim.AdamW(net.network.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad(set_to_none=True)
        net.network.loss(images, targets)[0].backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net, picks


def found_in(net: Supernet, steps: int, price: float) -> Mapping[str, Any]:
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.zero_()
    images, targets = a_batch()
    tables = cost_tables(resolve(net.spec), 64)
    budgets = [Budget("macs", tables["macs"].extreme(largest=False)[0])] if price else []
    optimizer = torch.optim.Adam(net.alphas, lr=0.08, betas=(0.0, 0.999))
    prices = Prices(lambdas=(price,) * len(budgets))
    for step in range(steps):
        gates = mixed_gates(net, net.alphas, np.random.default_rng((0, step)), step / steps)
        how: dict[str, Any] = {"budgets": budgets, "tables": tables, "progress": step / steps, "mixture": gates}
        _, prices = architecture_step(net, optimizer, images, targets, {}, prices, **how)
    return {d.name: d.options[int(a.argmax())] for d, a in zip(net.decisions, net.alphas, strict=True)}


def test_a_planted_best_option_is_found_in_60_steps(planted: tuple[Supernet, dict[str, Any]]) -> None:
    net, picks = planted
    assert found_in(net, 60, 0.0) == picks


def test_under_a_heavy_price_the_cheapest_is_found(planted: tuple[Supernet, dict[str, Any]]) -> None:
    net, picks = planted
    cheapest = cost_tables(resolve(net.spec), 64)["macs"].extreme(largest=False)[1].picks
    found = found_in(net, 60, 1e4)
    assert {name: found[name] for name in picks if not name.endswith("act")} == {
        name: cheapest[name] for name in picks if not name.endswith("act")
    }


# ---- a search


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    a_task(data, "merge").run(folder)
    return folder


def test_a_search_has_mixtures_up_to_its_last_epoch_of_four(data: Path, tmp_path: Path) -> None:
    ran: list[str] = []
    task = a_task(data, "merge")
    for name in ("mixed", "activate"):
        method = getattr(task.supernet, name)
        setattr(task.supernet, name, lambda *a, n=name, m=method: ran.append(n) or m(*a))
    said: list[str] = []
    task.run(tmp_path, said.append)
    assert "mixtures in the first 3 of 4 epochs, one subnet a step in the others" in said
    before, weights, alphas = ["activate"], ["mixed"], ["mixed"]
    soft = 9 * weights + 2 * alphas  # alphas move before the steps 7, 9 and 11, of which 9 weight steps are soft
    assert ran == [*before, *soft, *(["activate"] * (3 + 1))]
    rows = read_csv(tmp_path / "alphas.csv")
    assert any(float(row["alpha"]) for row in rows if row["step"] == "9")


@pytest.mark.parametrize(("name", "call"), [("lr_factor", 8), ("save_checkpoint", 4)])
def test_a_killed_search_ends_as_if_it_had_not_been(
    name: str, call: int, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed among mixtures, and among the hard steps behind them."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, name, call, training)
        a_task(data, "merge").run(tmp_path)
    a_task(data, "merge", weights_seed=9, resume=tmp_path).run(tmp_path)
    assert_same(whole, tmp_path)


def test_options_that_mean_nothing_to_it_are_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Fault, match=r"^--gates two: a mixture has all options; leave it out, or --supernet shared "):
        check_supernet(SearchConfig(supernet="merge", gates="two"))
    with pytest.raises(Fault, match=r"^--epochs 1: a merging supernet has mixtures in all but the last fifth of its "):
        a_task(data, "merge", epochs=1, arch_every=1, arch_warmup=0).run(tmp_path)
    assert main(["--supernet", "merge", "--tango", "--cfg", "x.yaml", "--data", "x.yaml"]) == 2
    assert "--supernet merge: --tango holds whole blocks" in capsys.readouterr().err
