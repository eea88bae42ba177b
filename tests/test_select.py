"""Which levels are weak, by hand; and from a trained plain classifier to one with branches that can be trained on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.structures import Fault
from engine.select import attend, attend_on, read_rule, weak_levels
from models.checkpoint import Checkpoint, load_checkpoint, restore, save_checkpoint, warm_start
from models.graph import resolve
from models.levels import levels
from models.network import build
from models.ops.branch import AttentionBranch
from models.parse import dump, parse, parse_text
from models.registry import OPS

PYRAMID = """
nc: 3
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, Conv, [8, 1, 1]]
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [1, 1, Conv, [8, 1, 1]]
  - [[-1, -2], 1, Concat, [1]]
  - [-1, 1, Conv, [8, 3, 1]]
  - [[7, 3], 1, Classify, [nc]]
"""


@dataclass(frozen=True)
class Level:
    ad: float
    iic: float


# The paper's case: IIC is 0 on Layers 1 and 2, and their average drop is much larger.
PAPER = [Level(80, 0), Level(70, 0), Level(30, 20), Level(20, 25)]


# ---- which levels


def test_the_levels_of_the_smallest_increase_are_weak() -> None:
    levels = [Level(10, 5), Level(10, 40), Level(10, 0), Level(10, 20)]
    assert [weak_levels(levels, count) for count in (1, 2, 3, 4)] == [[2], [0, 2], [0, 2, 3], [0, 1, 2, 3]]


def test_of_equal_increases_the_larger_drop_is_weaker_and_then_the_finer_level() -> None:
    assert [weak_levels(PAPER, count) for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]
    assert weak_levels([Level(20, 0), Level(30, 0), Level(30, 0)], 1) == [1]
    assert weak_levels([Level(20, 0), Level(30, 0), Level(30, 0)], 2) == [1, 2]


def test_the_threshold_is_half_a_standard_deviation_from_the_mean() -> None:
    # AD: mean 50, std 25.5, so over 62.7; IIC: mean 11.25, std 11.4, so under 5.5
    assert weak_levels(PAPER, "threshold") == [0, 1]
    # AD: mean 30, std 17.3: over 38.7 is level 3 alone; IIC: mean 10, std 0: none is under 10
    assert weak_levels([Level(20, 10), Level(20, 10), Level(20, 10), Level(60, 10)], "threshold") == [3]
    # AD alike; IIC: mean 7.5, std 4.3: under 5.3 is level 1 alone
    assert weak_levels([Level(9, 10), Level(9, 0), Level(9, 10), Level(9, 10)], "threshold") == [1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=6), st.data())
def test_no_other_level_is_weaker_than_a_chosen_one(numbers: list[tuple[int, int]], data: st.DataObject) -> None:
    metrics = [Level(float(ad), float(iic)) for ad, iic in numbers]
    count = data.draw(st.integers(1, len(metrics)))
    weak = weak_levels(metrics, count)
    assert len(weak) == count and weak == sorted(set(weak))
    others = [level for level in range(len(metrics)) if level not in weak]
    for level in weak:
        for other in others:
            assert (metrics[level].iic, -metrics[level].ad) <= (metrics[other].iic, -metrics[other].ad)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (0, "--select 0: there are 4 levels, so 1 to 4 can be chosen"),
        (5, "--select 5: there are 4 levels, so 1 to 4 can be chosen"),
        ("worst", "--select worst: how many levels, or threshold, would be right"),
    ],
)
def test_what_cannot_be_chosen_is_a_fault(rule: int | str, told: str) -> None:
    with pytest.raises(Fault) as found:
        weak_levels(PAPER, rule)
    assert str(found.value) == told


def test_levels_that_are_alike_or_were_not_measured_are_a_fault() -> None:
    with pytest.raises(Fault) as found:
        weak_levels([Level(10, 10)] * 4, "threshold")
    assert str(found.value) == (
        "--select threshold: no level is weaker than the others; --select K takes the K weakest"
    )
    with pytest.raises(Fault) as found:
        weak_levels([Level(10, 10), Level(math.nan, 0)], 1)
    assert str(found.value) == "level 1: AD nan and IIC 0 are no measurement; no level can be chosen"


def test_a_rule_is_a_number_or_its_name() -> None:
    assert (read_rule("2"), read_rule("threshold")) == (2, "threshold")
    for text in ("0", "-1", "1.5", "half", ""):
        with pytest.raises(Fault) as found:
            read_rule(text)
        assert str(found.value) == (
            f"--select {text}: how many levels get a branch, such as 2, or threshold, would be right"
        )


# ---- the network with branches


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of a small classifier with a pyramid, whose norms have seen images."""
    torch.manual_seed(0)
    network = build(parse_text(PYRAMID, name="pyramid")).train()
    with torch.no_grad():
        network(torch.rand(4, 3, 32, 32))
    path = tmp_path_factory.mktemp("plain") / "best.pt"
    save_checkpoint(path, network.eval(), ("a", "b", "c"), imgsz=32, epoch=3)
    return load_checkpoint(path)


def test_the_weak_level_gets_a_branch_and_all_weights_move(plain: Checkpoint, tmp_path: Path) -> None:
    assert [(level.name, level.row) for level in levels(resolve(plain.spec))] == [("P2", 7), ("P3", 3)]
    yaml, weights, weak = attend(plain, [Level(20, 30), Level(50, 0)], 1, tmp_path / "new")
    assert weak == [1] and (yaml, weights) == (tmp_path / "new" / "fal.yaml", tmp_path / "new" / "fal.pt")
    attended = load_checkpoint(weights)
    assert dump(parse(yaml)) == dump(attended.spec)
    assert (attended.names, attended.imgsz, attended.training) == (plain.names, plain.imgsz, None)
    assert attended.spec.name == "pyramid-fal"
    assert [layer.op for layer in attended.spec][3:6] == ["Conv", "AttentionBranch", "nn.Upsample"]
    assert attended.spec.layers[4].kwargs == {"task": "classes"} and attended.spec.layers[4].name == "attended_P3"
    assert attended.spec.layers[-1].sources == (8, "attended_P3")
    for name, tensor in plain.state.items():
        holder, row, rest = name.split(".", 2)
        moved = f"{holder}.{int(row) + (int(row) > 3)}.{rest}"
        assert torch.equal(attended.state[moved], tensor), name
    assert "with attention branches on P3" in yaml.read_text().splitlines()[0]


def test_training_takes_every_tensor_of_what_is_written(plain: Checkpoint, tmp_path: Path) -> None:
    _, weights, _ = attend(plain, [Level(50, 0), Level(20, 0)], 2, tmp_path)
    attended = load_checkpoint(weights)
    loaded, missing = warm_start(build(attended.spec), attended.state)
    assert not missing and len(loaded) == len(attended.state)
    assert sum(isinstance(layer, AttentionBranch) for layer in restore(attended).layers) == 2


def test_without_the_product_the_answers_are_those_of_the_network_before(plain: Checkpoint, tmp_path: Path) -> None:
    _, weights = attend_on(plain, [0, 1], tmp_path, product=False)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (before,), said = restore(plain)(x)
        (after,), aux = restore(load_checkpoint(weights))(x)
    assert torch.equal(before, after) and not said
    assert [set(one) for one in aux.values()] == [{"map", "logits"}] * 2


def test_branches_start_by_their_seed_and_leave_chance_alone(plain: Checkpoint, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = [
        load_checkpoint(attend_on(plain, [0], tmp_path / str(number), seed=seed)[1]).state
        for number, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(before, torch.get_rng_state())
    same, other = ([name for name in states[0] if torch.equal(states[0][name], states[n][name])] for n in (1, 2))
    assert len(same) == len(states[0]) and len(other) < len(states[0])


def test_a_level_that_has_its_branch_already_is_a_fault(plain: Checkpoint, tmp_path: Path) -> None:
    _, weights, _ = attend(plain, [Level(50, 0), Level(20, 30)], 1, tmp_path)
    with pytest.raises(Fault, match="level P2 has this attention branch already"):
        attend(load_checkpoint(weights), [Level(50, 0), Level(20, 30)], 1, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_page_names_every_argument_of_a_branch_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "fal.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (?:`(\w+)`|(\d*)) *\|", page, re.MULTILINE)
    told = {name: word or number for name, word, number in rows}
    parameters = OPS["AttentionBranch"].signature.parameters.values()
    assert told == {p.name: "" if p.default is p.empty else str(p.default) for p in parameters}
