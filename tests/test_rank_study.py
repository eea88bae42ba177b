"""The rank study: which subnets it takes, what it says of rankings that are known, and that it goes on where it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_search import CLASSIFIER, draw_classes

from data.structures import Fault
from engine.config import RunConfig
from models.spec import Choice
from search import rank_study
from search.config import SearchConfig, training_of
from search.costs import CostTable
from search.rank import kendall_tau, tau_within
from search.rank_study import Planned, agreements, main, rising, stratified
from search.report_data import ONLY_SEARCHED, changed
from search.retrain import continued
from search.run import main as search
from search.space import SearchSpace

SPACE = SearchSpace(tuple(Choice(f"{row}.kernel", (1, 3)) for row in range(5)))
MACS = CostTable("macs", 0.0, tuple(((choice,), np.array([1.0, 2.0])) for choice in SPACE.choices))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 2)), min_size=1, max_size=9))
def test_one_stratum_is_plain_tau(points):
    x, y = zip(*points, strict=True)
    assert tau_within(x, y, [0] * len(x)) == pytest.approx(kendall_tau(x, y), nan_ok=True)


def test_tau_within_strata_sees_no_pair_across_them():
    x, y = [1, 2, 11, 12, 13], [20, 10, 1, 2, 3]
    assert tau_within(x, y, [0, 0, 1, 1, 1]) == pytest.approx((3 - 1) / 4)
    assert math.isnan(tau_within(x, y, [0, 1, 2, 3, 4]))


def test_levels_of_macs_give_evenly_and_no_level_is_split():
    chosen = stratified(SPACE, MACS, 12, np.random.default_rng(0))
    by_level = {level: {MACS.of(one) for one, at in chosen.items() if at == level} for level in chosen.values()}
    assert len(chosen) == 12 and sorted(by_level) == [0, 1, 2]
    assert not set.intersection(*by_level.values()) and sum(map(len, by_level.values())) <= 6
    assert len(stratified(SPACE, MACS, 99, np.random.default_rng(0))) == 32


def test_a_perfect_supernet_reaches_the_ceiling_and_noise_does_not(monkeypatch):
    monkeypatch.setattr(rank_study, "RESAMPLES", 100)
    rng = np.random.default_rng(0)
    truth = np.linspace(0.3, 0.6, 30)
    scores = truth[:, None] + rng.normal(scale=0.03, size=(30, 4))
    plan = [Planned(n, n % 5, float(rng.random()), float(rng.random()), t) for n, t in enumerate(truth)]
    found = agreements(plan, scores)
    ceiling, supernet = found["another seed"]["tau-b"], found["supernet"]["tau-b"]
    assert supernet[0] > ceiling[0] > 0.5 and supernet[1] < supernet[0] < supernet[2] <= 1
    assert abs(found["MACs"]["tau-b"][0]) < 0.4 and found["supernet"]["regret"][0] <= 0.06
    assert found["supernet"]["tau-b at equal MACs"][0] > 0.8
    assert "another seed" not in agreements(plan, scores[:, :1])


def test_a_curve_that_rises_at_its_end_is_told():
    assert rising([0.1] * 4 + [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) and not rising([0.5] * 10) and not rising([0.1, 0.9])


def test_the_size_of_the_searched_yaml_is_not_one_of_its_subnets(tmp_path: Path):
    """Of all options that both have, a training has those of the search but for the search's own."""
    config = SearchConfig(cfg=tmp_path / "sizes.yaml", scale="n", dialect="yolov8", weights=tmp_path / "a.pt", imgsz=64)
    assert config.cfg_scale == "n"
    alone = training_of(config, cfg=tmp_path / "7.yaml", epochs=3)
    on = continued(config, tmp_path / "7.pt", 3, tmp_path, "7")
    for training, cfg, weights in ((alone, tmp_path / "7.yaml", None), (on, None, tmp_path / "7.pt")):
        assert (training.cfg, training.weights, training.epochs, training.imgsz) == (cfg, weights, 3, 64)
        assert training.cfg_scale is training.dialect is None
    given = {name: str(value) for name, value in config.model_dump(mode="json").items() if value is not None}
    words = changed(given, RunConfig.model_fields, ONLY_SEARCHED)
    assert "--imgsz" in words and not {"--cfg-scale", "--dialect", "--cfg", "--weights"} & set(words)


def test_a_study_of_a_search_goes_on_where_it_was(tmp_path: Path, capsys, monkeypatch):
    data = draw_classes(tmp_path)
    (tmp_path / "search.yaml").write_text(CLASSIFIER)
    words = ["--cfg", tmp_path / "search.yaml", "--data", data, "--imgsz", 32, "--epochs", 1, "--batch-size", 2]
    words += ["--arch-every", 1, "--candidates", 1, "--calibration", 6, "--amp", "off", "--device", "cpu"]
    assert search(list(map(str, [*words, "--project", tmp_path / "runs"]))) == 0
    folder = tmp_path / "runs" / "exp"
    trainings = []
    one = rank_study.train
    monkeypatch.setattr(rank_study, "RESAMPLES", 20)
    monkeypatch.setattr(rank_study, "train", lambda config, progress: trainings.append(config) or one(config, False))
    ask = [str(folder), "--subnets", "3", "--epochs", "1", "--seeds"]
    assert main([*ask, "1"]) == 0
    assert "One seed has no ceiling" in capsys.readouterr().out and len(trainings) == 3
    assert main([*ask, "2"]) == 0
    assert len(trainings) == 6 and sorted({config.seed for config in trainings}) == [0, 1]
    page = (folder / "rank" / "rank.html").read_text()
    assert "another seed" in page and page.count("<title>subnet ") == 3 and "http" not in page
    assert "top-1 by the supernet" in page and "top-1 trained alone" in page
    assert 'href="rank/rank.html"' in (folder / "report.html").read_text()
    content = json.loads((folder / "rank" / "rank.json").read_text())
    assert np.array(content["scores"]).shape == (3, 2) and not list((folder / "rank").rglob("*.pt"))
    assert main([*ask, "2"]) == 0 and len(trainings) == 6
    assert main([str(folder), "--subnets", "4"]) == 2
    assert "has 3 subnets of space" in capsys.readouterr().err
    assert main([str(folder), "--subnets", "3", "--epochs", "2", "--seeds", "1"]) == 2
    assert "was trained with epochs 1, the others with 2; give the same --epochs" in capsys.readouterr().err
    with pytest.raises(Fault, match="no folder of a finished search"):
        rank_study.study(tmp_path, 3, 1, 1, {})
