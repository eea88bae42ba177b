"""The sandwich rule: largest, random and smallest subnet in one step, and what they have in common once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gradients import a_batch, supernet
from test_resume import Task, a_task, assert_same, data
from test_train import Killed, kill_before
from torch import Tensor, nn

from data.structures import Fault
from engine.evaluate import pixels
from models.distill import distillation_loss
from models.graph import resolve
from models.parse import parse_text
from models.supernet import Supernet
from search import sandwich
from search import train as training
from search.config import SearchConfig
from search.costs import cost_tables
from search.sampling import sandwich_options
from search.sandwich import backward, sizes, teaching_note
from search.train import check_supernet

__all__ = ["data"]  # a fixture


def test_the_largest_and_the_smallest_are_those_of_the_table_and_activations_are_left_open() -> None:
    net = supernet("shared")
    table = cost_tables(resolve(net.spec), 64)["macs"]
    largest, smallest = sizes(table)
    assert set(largest) == set(smallest) == {"2.kernel", "2.number", "4.kernel", "4.number"}
    assert set(largest.values()) == {5, 3} and set(smallest.values()) == {3, 1}
    acts = {"2.act": "mish", "4.act": "relu"}
    found = [table.extreme(end)[0] for end in (True, False)]
    for cost, sized in zip(found, (largest, smallest), strict=True):
        assert table.of(type(table.extreme(True)[1])({**sized, **acts})) == cost


def test_where_no_choice_has_a_size_there_is_no_sandwich() -> None:
    rows = "[-1, 1, Conv, [8, 3, 4, {act: {choice: [relu, mish]}}]]"
    text = f"nc: 2\nanchors: 2\nbackbone:\n  - {rows}\nhead:\n  - [-1, 1, Detect, [nc, anchors]]\n"
    with pytest.raises(Fault, match=r"^--sandwich: no choice changes macs, so no subnet is larger than another; leave"):
        sizes(cost_tables(resolve(parse_text(text)), 64)["macs"])


def test_activations_are_those_of_the_random_one_which_is_strictly_fair() -> None:
    net = supernet("shared")
    largest, smallest = sizes(cost_tables(resolve(net.spec), 64)["macs"])
    for window in range(4):
        three = [sandwich_options(net.decisions, largest, smallest, 0, 6 * window + step) for step in range(6)]
        for first, drawn, last in three:
            assert first == {**drawn, **largest} and last == {**drawn, **smallest}
        for name in ("2.act", "4.act"):
            assert set(Counter(step[1][name] for step in three).values()) == {2}
        assert set(Counter(step[1]["2.kernel"] for step in three).values()) == {3}
        assert set(Counter(step[1]["4.number"] for step in three).values()) == {2}


def gradients(net: Supernet) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.network.named_parameters() if p.grad is not None}


BASE = {"2.kernel": 3, "2.act": "relu", "2.number": 2, "4.kernel": 3, "4.act": "relu", "4.number": 1}
FAMILIES = {  # subnets, and how often each row runs: the first choices are in row 2, the second ones in row 4
    "apart at once": ([{}, {"2.act": "mish"}, {"2.kernel": 5}], [1, 1, 3, 3, 3, 3]),
    "two go on": ([{}, {"4.kernel": 5}, {"2.number": 1}], [1, 1, 2, 2, 3, 3]),
    "first and last go on": ([{}, {"2.number": 1}, {"4.act": "mish"}], [1, 1, 2, 2, 3, 3]),
    "apart in row 4": ([{}, {"4.kernel": 5}, {"4.number": 2}], [1, 1, 1, 1, 3, 3]),
    "two are equal": ([{}, {}, {"4.kernel": 5}], [1, 1, 1, 1, 2, 2]),
    "all are equal": ([{}, {}, {}], [1, 1, 1, 1, 1, 1]),
    "one": ([{}], [1, 1, 1, 1, 1, 1]),
}


def assert_as_whole_passes(net: Supernet, subnets: list[dict[str, Any]], batch: tuple[Tensor, Any]) -> list[int]:
    """Gradients are those of whole passes, one a subnet. Returns how often each row runs."""
    images, targets = batch
    for picks in subnets:
        net.activate(picks)
        net.network.loss(images, targets)[0].backward()
    expected = gradients(net)
    net.zero_grad(set_to_none=True)
    ran: list[nn.Module] = []
    for layer in net.network.layers:
        layer.register_forward_hook(lambda layer, *_: ran.append(layer))
    asked: list[int] = []

    def loss_of(place: int, outputs: Any, aux: Any) -> Tensor:
        asked.append(place)
        return net.network.loss_from(outputs, targets, aux)[0]

    backward(net, subnets, images, net.network.run, loss_of)
    found = gradients(net)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    assert asked[0] == 0 and sorted(asked) == list(range(len(subnets)))
    return [ran.count(layer) for layer in net.network.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_whole_passes_and_what_is_common_runs_once(family: str) -> None:
    net = supernet("shared", torch.float64)
    different, times = FAMILIES[family]
    assert {choice.name for choice in net.spec.choices} == set(BASE)
    found = assert_as_whole_passes(net, [{**BASE, **one} for one in different], a_batch(torch.float64))
    assert found == times


def test_a_row_with_a_loss_of_its_own_runs_once_for_each() -> None:
    """Its loss is a part of each subnet's."""
    rows = ["Conv, [8, 3, 4]", "AttentionBranch, [nc, 1, {task: classes}]", "Conv, [12, {kernel: {choice: [1, 3]}}]"]
    text = "nc: 3\nbackbone:\n" + "".join(f"  - [-1, 1, {row}]\n" for row in rows)
    net = Supernet(parse_text(text + "head:\n  - [-1, 1, Classify, [nc]]\n"), "shared").double()
    images, targets = a_batch(torch.float64)
    targets = type(targets)(targets.boxes[:2], targets.labels[:2], torch.tensor([0, 1]))
    assert assert_as_whole_passes(net, [{"2.kernel": 1}, {"2.kernel": 3}], (images, targets)) == [1, 2, 2, 2]


def test_where_the_first_row_is_open_it_is_whole_passes_as_well() -> None:
    text = "nc: 3\nanchors: 2\nbackbone:\n  - [-1, 1, Conv, [8, {kernel: {choice: [1, 3]}, stride: 4}]]\n"
    net = Supernet(parse_text(text + "head:\n  - [-1, 1, Conv, [8]]\n  - [-1, 1, Classify, [nc]]\n"), "shared")
    images, targets = a_batch()
    targets = type(targets)(targets.boxes[:2], targets.labels[:2], torch.tensor([0, 1]))
    loss_of = lambda _, y, aux: net.network.loss_from(y, targets, aux)[0]  # noqa: E731
    backward(net, [{"0.kernel": 1}, {"0.kernel": 3}], images, net.network.run, loss_of)
    assert all(p.grad is not None for p in net.network.parameters())


def test_every_weight_gets_a_gradient_within_a_few_windows() -> None:
    """The norms of an activation in the last bottleneck of a row wait until the largest subnet has it."""
    net = supernet("shared")
    images, targets = a_batch()
    largest, smallest = sizes(cost_tables(resolve(net.spec), 64)["macs"])
    loss_of = lambda _, y, aux: net.network.loss_from(y, targets, aux)[0]  # noqa: E731
    for step in range(18):
        three = sandwich_options(net.decisions, largest, smallest, 0, step)
        backward(net, three, images, net.network.run, loss_of)
    without = [name for name, p in net.network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


# ---- a search


def test_the_step_s_loss_is_the_mean_of_the_three_and_the_largest_teaches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_the_largest_teaches(a_task(data, "shared", sandwich=True), tmp_path, monkeypatch)


def assert_the_largest_teaches(task: Task, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first step, against whole passes: ``(L + (L + D) / 2 + (L + D) / 2) / 3``, D against the largest."""
    seen: dict[str, Any] = {}
    taught = []

    def first(mover: Any, net: Supernet, three: Any, batch: Any, at: Any, **how: Any) -> dict[str, float]:
        if not seen:
            images, targets = pixels(batch, torch.device("cpu")), batch.targets
            states = {name: tensor.clone() for name, tensor in net.network.state_dict().items()}
            losses, outputs = [], []
            with torch.no_grad():
                for place, picks in enumerate(three):
                    net.activate(picks)
                    outputs.append(net.network(images)[0])
                    loss = float(net.network.loss_from(outputs[-1], targets)[0])
                    if place:
                        distance = float(distillation_loss(net.network, outputs[-1], net.network, outputs[0]))
                        taught.append(distance)
                        loss = (loss + distance) / 2
                    losses.append(loss)
            net.network.load_state_dict(states)
            seen["expected"] = sum(losses) / 3
            seen["found"] = real(mover, net, three, batch, at, **how)
            return seen["found"]
        return real(mover, net, three, batch, at, **how)

    real = sandwich.add_sandwich
    monkeypatch.setattr(training, "add_sandwich", first)
    said: list[str] = []
    task.run(folder, said.append)
    assert seen["found"]["loss"] == pytest.approx(seen["expected"], rel=1e-4)
    assert seen["found"]["distill"] == pytest.approx(sum(taught) / 3, rel=1e-4) and min(taught) > 0
    assert teaching_note(task.supernet.network) in said and "the largest teaches the others" in "".join(said)


def test_a_killed_search_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_task(data, "shared", sandwich=True).run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, "lr_factor", 8, training)
        a_task(data, "shared", sandwich=True).run(tmp_path / "killed")
    resumed = a_task(data, "shared", weights_seed=9, sandwich=True, resume=tmp_path / "killed")
    resumed.run(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_a_head_that_has_no_distillation_is_told() -> None:
    class Other(nn.Module):
        pass

    net = supernet("shared")
    net.network.layers[-1] = Other()
    assert teaching_note(net.network) == (
        "note: a step trains the largest subnet, a random one and the smallest, each by its labels alone: Other has no "
        "loss of distillation (Classify, DFLDetect, Detect have)"
    )


@pytest.mark.parametrize("kind", ["independent", "merge"])
def test_it_is_for_shared_weights(kind: str) -> None:
    with pytest.raises(Fault) as fault:
        check_supernet(SearchConfig(supernet=kind, sandwich=True))  # type: ignore[arg-type]
    assert str(fault.value) == f"--supernet {kind}: --sandwich is for --supernet shared; leave one of the two out"
