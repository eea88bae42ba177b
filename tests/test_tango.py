"""The reference system's settings, order and files."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from data.structures import Fault
from engine.config import checked
from models.parse import parse
from models.supernet import Supernet
from search import tango
from search.config import SearchConfig


@pytest.fixture(scope="module")
def net() -> Supernet:
    """The reference's space: four neck blocks with six candidates each."""
    with torch.device("meta"):
        supernet = Supernet(parse("cfg/models/tiny-seed-search.yaml"), "independent")
    supernet.alphas = torch.nn.ParameterList(torch.zeros(6) for _ in supernet.decisions)
    return supernet


def alphas(supernet: Supernet) -> torch.Tensor:
    return torch.stack([alpha.detach().clone() for alpha in supernet.alphas])


def test_candidates_stand_in_the_reference_s_order_under_its_labels(net):
    order = ((3, "relu"), (3, "leaky"), (3, "mish"), (5, "relu"), (5, "leaky"), (5, "mish"))
    assert [decision.options for decision in net.decisions] == [order] * 4
    assert tango.labels(net) == ["m_16", "m_21", "m_25", "m_29"]


# ---- settings


def test_its_settings_replace_defaults_only():
    config = SearchConfig(tango=True, supernet="independent", epochs=70, imgsz=512, batch_size=8)
    found = tango.settings(config)
    changed = {name for name in SearchConfig.model_fields if getattr(found, name) != getattr(config, name)}
    assert changed == {"arch_every", "arch_lr", "optimizer", "lrf"}
    assert (found.arch_every, found.arch_lr, found.gates, found.optimizer, found.lrf) == (1, 1e-4, "full", "SGD", 0.2)
    assert tango.settings(found) == found  # as a resumed search reads them
    assert tango.settings(SearchConfig(supernet="independent", arch_lr=1e-4)).arch_lr == 1e-4


def test_what_was_asked_for_beside_it_is_a_fault():
    given = {"supernet": "shared", "arch_lr": "0.01", "gates": "two", "objective": "fbnet", "lrf": "0.2"}
    with pytest.raises(Fault) as problem:
        tango.settings(checked(SearchConfig, given, "--"))
    assert problem.value.lines == (
        "--supernet shared: --tango holds whole blocks; --supernet independent would be right",
        "--gates two: --tango sets full; leave one of the two out",
        "--objective fbnet: --tango sets hinge; leave one of the two out",
        "--arch-lr 0.01: --tango sets 0.0001; leave one of the two out",
    )


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "warmup"),
    [
        (16, 63, 1_000),  # coco128 in batches of 8; steps run to 1,007, the first alphas move before step 1,001
        (1, 1_002, 1_000),
        (400, 4, 1_200),
        (1_002, 4, 3_006),
    ],
)
def test_alphas_wait_for_three_epochs_or_1000_steps_and_a_run_too_short_for_that_is_a_fault(
    steps_per_epoch, epochs, warmup
):
    assert tango.warmup_steps(epochs, steps_per_epoch) == warmup
    assert epochs * steps_per_epoch - 1 > warmup  # the last step has alphas move before it
    with pytest.raises(Fault, match=f"{epochs} epochs are needed"):
        tango.warmup_steps(epochs - 1, steps_per_epoch)
    assert (epochs - 1) * steps_per_epoch - 1 <= warmup


def test_the_reference_s_own_default_run_is_told_that_it_moves_no_alpha():
    with pytest.raises(Fault) as problem:
        tango.warmup_steps(1, 16)
    assert problem.value.lines == (
        "--epochs 1: --tango moves alphas after the larger of 3 epochs and 1,000 steps, which with 16 steps an epoch "
        "is never; 63 epochs are needed",
    )


# ---- alphas and samples


def test_first_alphas_are_small_normal_numbers_that_the_seed_gives(net):
    drawn = []
    for seed in range(60):
        tango.initial_alphas(net, seed)
        drawn.append(alphas(net))
    together = torch.stack(drawn)
    assert together.mean().abs() < 1e-4 and together.std() == pytest.approx(1e-3, rel=0.05)
    assert len(set(together.flatten().tolist())) == together.numel()
    tango.initial_alphas(net, 7)
    assert torch.equal(alphas(net), drawn[7])


def test_a_weight_step_draws_by_softmax_and_the_same_again(net):
    with torch.no_grad():
        for alpha in net.alphas:
            alpha.copy_(torch.tensor([0.6, 0.1, 0.1, 0.1, 0.05, 0.05]).log())
    drawn = [tango.sample(net, 0, step) for step in range(1_500)]
    for decision in net.decisions:
        count = Counter(decision.index(options[decision.name]) for options in drawn)
        assert count[0] / 1_500 == pytest.approx(0.6, abs=0.05) and count[5] / 1_500 == pytest.approx(0.05, abs=0.03)
    assert tango.sample(net, 0, 700) == drawn[700]
    assert len({tuple(options.values()) for options in drawn}) > 50  # rows are drawn apart from each other


# ---- files


def test_its_files(net, tmp_path):
    with torch.no_grad():
        for row, alpha in enumerate(net.alphas):
            alpha.zero_()
            alpha[row + 1] = 50.0  # certain
    tango.write_epoch(tmp_path, net, 0)
    with torch.no_grad():
        net.alphas[0][1] = 0.0
        net.alphas[0][5] = 50.0
    tango.write_epoch(tmp_path, net, 1)
    tango.write_epoch(tmp_path, net, 2)
    tango.write_final(tmp_path, net)
    assert (tmp_path / "export_history.txt").read_text() == (
        "{'0': {'m_16': 1, 'm_21': 2, 'm_25': 3, 'm_29': 4}}\n"
        "{'1': {'m_16': 5, 'm_21': 2, 'm_25': 3, 'm_29': 4}}\n"
        "{'2': {'m_16': 5, 'm_21': 2, 'm_25': 3, 'm_29': 4}}\n"
    )
    first, *rest = (tmp_path / "probs_history.txt").read_text().splitlines()
    content = json.loads(first.replace("'", '"'))
    assert list(content["0"]) == ["m_16", "m_21", "m_25", "m_29"] and len(rest) == 2
    assert content["0"]["m_21"] == pytest.approx([0, 0, 1, 0, 0, 0])
    assert json.loads((tmp_path / "final_arch.json").read_text()) == {"m_16": 5, "m_21": 2, "m_25": 3, "m_29": 4}
    assert (tmp_path / "final_arch.json").read_text() == '{"m_16": 5, "m_21": 2, "m_25": 3, "m_29": 4}'


def test_a_resumed_search_writes_no_epoch_twice(net, tmp_path):
    for epoch in (0, 1, 2, 3):
        tango.write_epoch(tmp_path, net, epoch)
    tango.write_epoch(tmp_path, net, 2)
    for name in ("probs_history.txt", "export_history.txt"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [line.split("'")[1] for line in lines] == ["0", "1", "2"]
