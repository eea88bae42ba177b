"""Which subnets are given up after the first images, and what the choices are said to matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_search import CLASSIFIER, draw_classes

from data.config import read_data_spec
from data.dataset import ImageSet
from data.readers import read_split
from data.structures import Sample
from models.parse import parse
from models.spec import Choice
from models.supernet import Supernet
from search.config import SearchConfig
from search.find import Found, Trial, beats, first_places, judge_subnets, some_images, study_name
from search.front import Judged
from search.optimise import fitted, importances
from search.space import Architecture, SearchSpace
from search.storage import Limits, Outcome

SPACE = SearchSpace(tuple(Choice(f"{row}.kernel", (1, 3, 5)) for row in range(3)))
EVERY = [SPACE.at(number) for number in range(SPACE.size)]


def planted(one: Architecture) -> float:
    return 0.3 + 0.04 * one.picks["0.kernel"] - 0.01 * one.picks["2.kernel"]


def of(score: float, macs: float, params: float = 1.0, noise: float = 0.0) -> Judged:
    without = tuple(score + noise * sign for sign in (1, -1, 1, -1))
    return Judged(0, EVERY[0], score, 0.0, {"macs": macs, "params": params}, without)


def test_the_first_images_are_spread_and_never_few():
    assert first_places(100, 0.25) == list(range(0, 100, 4))
    assert len(first_places(40, 0.1)) == 16 and first_places(40, 0.1)[-1] == 37
    assert first_places(16, 0.25) == [] == first_places(1_000, 0.0)


def test_only_a_cheaper_and_surely_better_one_ends_a_subnet():
    one = of(0.5, macs=2.0)
    assert beats(of(0.6, macs=2.0), one, ["macs"]) and not beats(of(0.6, macs=2.1), one, ["macs"])
    assert not beats(of(0.6, macs=1.0, params=2.0), one, ["macs", "params"])
    assert not beats(of(0.5, macs=1.0), one, ["macs"]) and not beats(of(0.6, macs=1.0, noise=0.1), one, ["macs"])
    nothing_left_out = Judged(0, EVERY[0], 0.1, 0.0, {"macs": 2.0})
    assert not beats(of(0.6, macs=1.0), nothing_left_out, ["macs"])


def test_importances_find_what_was_planted():
    rows = importances(SPACE, {one: planted(one) for one in EVERY})
    assert [row["choice"] for row in rows] == ["0.kernel", "2.kernel", "1.kernel"]
    assert (rows[0]["best"], rows[0]["worst"], rows[1]["best"]) == (5, 1, 1)
    assert rows[0]["importance"] == pytest.approx(16 / 17) and rows[2]["importance"] == pytest.approx(0, abs=1e-12)
    assert rows[0]["explained"] > 0.9 and 0.1 < rows[0]["difference"] <= 0.16


def test_importances_of_noise_explain_nothing():
    rng = np.random.default_rng(0)
    rows = importances(SPACE, {one: float(rng.random()) for one in EVERY})
    assert rows[0]["explained"] < 0.1
    assert importances(SPACE, dict.fromkeys(EVERY, 0.5)) == [] == importances(SPACE, {EVERY[0]: 0.1, EVERY[1]: 0.2})


def test_what_only_pairs_decide_is_no_choices_own():
    space = SearchSpace((Choice("0.kernel", (1, 3)), Choice("1.kernel", (1, 3))))
    every = [space.at(number) for number in range(4)]
    assert importances(space, dict(zip(every, (0.75, 0.78125, 0.78125, 0.75), strict=True))) == []


def test_images_of_losses_are_spread_and_fit(monkeypatch):
    images = ImageSet([Sample(Path(str(n)), np.zeros((0, 4)), np.zeros(0)) for n in range(10)], 32, None, cache=False)
    assert some_images(images) is images
    monkeypatch.setattr("search.find.LOSS_FLOATS", 3 * 32 * 32 * 4)
    assert [one.path.name for one in some_images(images).samples] == ["0", "2", "5", "7"]


def test_left_out_predictions_are_those_of_fits_without_the_subnet():
    rng = np.random.default_rng(1)
    some = {one: planted(one) + 0.02 * float(rng.random()) for one in EVERY[::2]}
    _, explained = fitted(SPACE, some)
    mean = np.mean(list(some.values()))
    errors = []
    for one, value in some.items():
        others = {other: of_it for other, of_it in some.items() if other != one}
        effects, _ = fitted(SPACE, others)
        x = np.concatenate([np.eye(3)[(1, 3, 5).index(one.picks[choice.name])] for choice in SPACE.choices])
        errors.append(value - np.mean(list(others.values())) - x @ effects)
    truth = 1 - np.sum(np.square(errors)) / np.sum(np.square(np.array(list(some.values())) - mean))
    assert explained == pytest.approx(truth, abs=0.05)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    """A search whose supernet is as it was drawn, and which keeps nothing."""
    data = read_data_spec(draw_classes(tmp_path))
    (tmp_path / "search.yaml").write_text(CLASSIFIER.replace("nc: 9", "nc: 3"))
    supernet = Supernet(parse(tmp_path / "search.yaml"), "shared")
    images = ImageSet(read_split(data, "val").samples, 32, None, 0)
    calibration = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    config = SearchConfig(imgsz=32, batch_size=2)
    space, cpu = SearchSpace.of(supernet.spec), torch.device("cpu")
    return Trial(supernet, space, {}, (), config, calibration, images, data.names, cpu, False, timed_here=False)


@pytest.mark.parametrize(("limits", "handfuls"), [(Limits(trials=1), [1]), (Limits(trials=9), [8, 1])])
def test_a_process_alone_judges_no_more_than_its_trials(trial: Trial, monkeypatch, limits: Limits, handfuls: list[int]):
    taken = []

    def looked_up(_, tickets, tell):
        taken.append(len(tickets))
        for ticket in tickets:
            tell(ticket, Outcome((0.5,), {"score": 0.5, "second": None, "without": []}))

    monkeypatch.setattr("search.find.evaluate_tickets", looked_up)
    found = Found()
    with pytest.raises(TimeoutError, match=f"--trials {limits.trials} are done"):
        judge_subnets(replace(trial, limits=limits), {trial.space.at(n): None for n in range(12)}, found)
    assert taken == handfuls and len(found.judged) == limits.trials


def test_scores_with_other_calibration_images_have_another_name(trial: Trial, tmp_path: Path):
    """A copy of the data with one more training image judges the same images, but not by the same statistics."""
    assert study_name(replace(trial, weight_images="other"), tmp_path) != study_name(trial, tmp_path)
