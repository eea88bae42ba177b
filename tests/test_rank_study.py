"""The rank study: which subnets it takes, what it says of rankings that are known, and that it goes on where it was."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_search import CLASSIFIER, draw_classes

from data.structures import Fault
from engine.config import RunConfig, TrainConfig, checked, read_options
from engine.runs import read_csv
from engine.train import train
from models.spec import Choice
from search import rank_study, retrain
from search.config import SearchConfig, training_of
from search.costs import CostTable
from search.rank import kendall_tau, tau_within
from search.rank_study import Planned, agreements, main, planned, rising, stratified
from search.report_data import ONLY_SEARCHED, changed
from search.retrain import continued, epochs_done, trained_once
from search.run import main as search
from search.space import SearchSpace
from search.worker import reopened

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


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """The folder of a finished search of 12 subnets: one epoch of three steps."""
    folder = tmp_path_factory.mktemp("study")
    data = draw_classes(folder)
    (folder / "search.yaml").write_text(CLASSIFIER)
    words = ["--cfg", folder / "search.yaml", "--data", data, "--imgsz", 32, "--epochs", 1, "--batch-size", 2]
    words += ["--arch-every", 1, "--candidates", 1, "--calibration", 6, "--amp", "off", "--device", "cpu"]
    words += ["--retrain", 1, "--retrain-epochs", 5]
    assert search(list(map(str, [*words, "--project", folder / "runs"]))) == 0
    return folder / "runs" / "exp"


@pytest.fixture
def folder(searched: Path, tmp_path: Path) -> Path:
    """A copy of it, for one test."""
    return Path(shutil.copytree(searched, tmp_path / "exp"))


@pytest.fixture
def trainings(monkeypatch) -> list[TrainConfig]:
    """The trainings that are begun, or go on, from here."""
    found: list[TrainConfig] = []
    monkeypatch.setattr(retrain, "train", lambda config, progress: found.append(config) or train(config, False))
    monkeypatch.setattr(rank_study, "RESAMPLES", 20)
    return found


def stop_after(epochs: int, monkeypatch) -> None:
    """Ctrl-C when so many epochs more are done and saved."""
    left = iter(range(epochs - 1))

    def pressed(*_, **__) -> str:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr("engine.train.epoch_line", pressed)


# ---- retraining


def losses_of(run: Path) -> list[str]:
    return [row["loss"] for row in read_csv(run / "results.csv")]


def test_a_retraining_that_was_stopped_goes_on_with_its_search(searched: Path, folder: Path, trainings, monkeypatch):
    """The fine-tuning is of one epoch and done, the retraining has two of five."""
    (whole,) = (searched / "retrain").glob("*-retrained")
    shutil.rmtree(folder / "retrain")
    (folder / "retrain.csv").unlink()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert search(["--resume", str(folder)]) == 130
    assert len(losses_of(folder / "retrain" / whole.name)) == 2 and len(trainings) == 2
    assert search(["--resume", str(folder)]) == 0
    assert [config.resume for config in trainings] == [None, None, folder / "retrain" / whole.name]
    assert read_csv(folder / "retrain.csv") == read_csv(searched / "retrain.csv")
    assert losses_of(folder / "retrain" / whole.name) == losses_of(whole)


def test_a_retraining_from_other_weights_does_not_go_on(folder: Path, trainings, monkeypatch):
    """As --exist-ok leaves it: the folder of a retraining that was stopped, of the search before."""
    wanted = continued(config_of(folder), folder / "best.pt", 3, folder / "retrain", "7")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(1, patch)
        trained_once(wanted, {"supernet": "before"}, False)
    trained_once(wanted, {"supernet": "now"}, False)
    trained_once(wanted, {"supernet": "now"}, False)
    assert trainings == [wanted, wanted] and epochs_done(folder / "retrain" / "7" / "last.pt") == 3


def config_of(folder: Path) -> SearchConfig:
    return checked(SearchConfig, read_options(folder / "config.yaml", SearchConfig))


# ---- the study


def test_a_study_of_a_search_goes_on_where_it_was(folder: Path, tmp_path: Path, trainings, capsys):
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


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "rank" / "plan.json").read_text())


def set_option(folder: Path, name: str, value: object) -> None:
    """Writes another value into a search's config.yaml."""
    text = (folder / "config.yaml").read_text()
    changed_text = re.sub(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
    assert changed_text != text
    (folder / "config.yaml").write_text(changed_text)


def test_other_weights_judge_the_same_subnets_anew_and_no_training_is_lost(folder: Path, trainings):
    ask = [str(folder), "--subnets", "3", "--epochs", "1", "--seeds", "1"]
    assert main(ask) == 0
    before = plan_of(folder)
    before["subnets"][0]["score"] = 7.0  # tells whether it was read, or judged anew
    (folder / "rank" / "plan.json").write_text(json.dumps(before))
    assert main(ask) == 0 and plan_of(folder) == before
    content = torch.load(folder / "last.pt", weights_only=True)
    for name, tensor in content["state"].items():
        if name.endswith(".weight"):
            tensor.mul_(-1)
    torch.save(content, folder / "last.pt")
    assert main(ask) == 0 and len(trainings) == 3
    after = plan_of(folder)
    assert after["supernet"] != before["supernet"] and after["subnets"][0]["score"] <= 1
    assert [(one["number"], one["level"]) for one in after["subnets"]] == [
        (one["number"], one["level"]) for one in before["subnets"]
    ]


def test_a_plan_without_trainings_may_change_and_one_of_a_small_space_is_found_again(folder: Path):
    trial = reopened(folder, config_of(folder), False)
    (folder / "rank").mkdir()
    path = folder / "rank" / "plan.json"
    assert len(planned(trial, path, 3)) == 3 and len(planned(trial, path, 4)) == 4
    every = planned(trial, path, 20)
    assert len(every) == trial.space.size == 12 and planned(trial, path, 20) == every
    (folder / "rank" / f"{every[0].number}-0.json").write_text("{}")
    assert planned(trial, path, 20) == every
    with pytest.raises(Fault, match="has 12 subnets of space '.*' for --subnets 20, wanted 12 of .*; --subnets 20"):
        planned(trial, path, 12)


def test_a_search_that_is_not_done_is_not_studied(folder: Path, capsys):
    set_option(folder, "epochs", 9)
    assert main([str(folder), "--epochs", "1"]) == 2
    assert capsys.readouterr().err == (
        f"{folder}: no folder of a finished search, 1 of its 9 epochs are done; "
        f"python search.py --resume {folder} does the others\n"
    )
    assert not (folder / "rank").exists()


def test_trainings_on_other_images_or_with_other_options_are_not_mixed(folder: Path, tmp_path: Path, trainings, capsys):
    ask = [str(folder), "--subnets", "2", "--epochs", "1", "--seeds"]
    assert main([*ask, "1"]) == 0
    other = draw_classes(tmp_path, images=5)
    assert main([*ask, "2", "--data", str(other)]) == 2
    told = capsys.readouterr().err
    assert "was trained with images ['" in told and told.endswith(f"; move {folder / 'rank'} away to begin anew\n")
    set_option(folder, "fliplr", 0.25)
    assert main([*ask, "2"]) == 2
    assert "was trained with fliplr 0.5, the others with 0.25; move " in capsys.readouterr().err
    assert len(trainings) == 2  # nothing was trained before it was told
    set_option(folder, "fliplr", 0.5)
    (file, *_) = (folder / "rank").glob("*-0.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: content[name] for name in ("epochs", "space", "imgsz", "curve", "score")}))
    assert main([*ask, "1"]) == 0 and len(trainings) == 2  # of an earlier version


def test_a_training_that_was_stopped_goes_on_with_the_same_epochs_only(folder: Path, trainings, monkeypatch, capsys):
    ask = [str(folder), "--subnets", "2", "--seeds", "1", "--epochs"]
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert main([*ask, "3"]) == 130
    (run,) = (folder / "rank" / "runs").iterdir()
    capsys.readouterr()
    assert main([*ask, "4"]) == 2
    assert "was trained with epochs 3, the others with 4; give the same --epochs" in capsys.readouterr().err
    assert main([*ask, "3"]) == 0
    assert [config.resume for config in trainings] == [None, run, None] and len(losses_of(run)) == 3
