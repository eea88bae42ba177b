"""Hyper-parameters by trial: the user's own come first, a killed search goes on as if it had not been, none is lost."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("optuna", reason="the extra `search` is not installed")

from data.structures import Fault
from engine import tune as tuning
from engine.config import TrainConfig, read_options, train_config
from engine.distributed import SET_BY_TORCHRUN
from engine.metrics import NUMBERS, Metrics
from engine.runs import read_csv
from engine.train import TrainResult, main
from engine.tune import RANGES, Range, tune

ROOT = Path(__file__).resolve().parents[1]
OnEpoch = Callable[[int, Metrics], None]

MODEL = """
nc: 2
activation: relu
anchors: [[12, 12, 24, 24], [24, 24, 40, 40]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [[2, 3], 1, Detect, [nc, anchors]]
"""


def metrics(ap: float) -> Metrics:
    return Metrics(**{name: ap for name in NUMBERS}, per_class=(), images=1)


def stand_in(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
    """A training that takes no time: its AP is best at lr0 .02 and mosaic .3, and grows over the epochs."""
    folder = config.project / config.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "best.pt").write_text(config.name)
    (folder / "last.pt").write_text(config.name)
    assert config.lr0 is not None
    ap = 0.8 * math.exp(-abs(math.log(config.lr0 / 0.02)) / 4 - abs(config.mosaic - 0.3))
    for epoch in range(1, config.epochs + 1):
        on_epoch(epoch, metrics(ap * epoch / config.epochs))
    return TrainResult(folder, folder / "best.pt", folder / "last.pt", metrics(ap))


def config_in(folder: Path, **options: Any) -> TrainConfig:
    """A config that needs no data, since the optimizer and its rate are given, and draws no pictures."""
    given = {"optimizer": "SGD", "lr0": 0.001, "epochs": 5, "project": folder, "name": "t", "noplots": True, **options}
    return TrainConfig(**given)


def tried(folder: Path) -> list[dict[str, float]]:
    """The settings of each trial, from tune.csv."""
    names = [r.name for r in RANGES]
    return [{name: float(row[name]) for name in names if name in row} for row in read_csv(folder / "tune.csv")]


def test_the_first_trial_is_the_users_own_and_the_best_is_kept(tmp_path: Path, capsys) -> None:
    own = config_in(tmp_path, degrees=3.0, hsv_s=0.123456789, warmup_epochs=9.0, fliplr=0.8)
    file = tune(own, 12, progress=False, run=stand_in)
    assert capsys.readouterr() == ("", "")
    rows, settings = read_csv(tmp_path / "t" / "tune.csv"), tried(tmp_path / "t")
    assert settings[0] == {r.name: getattr(own, r.name) for r in RANGES}
    assert len(rows) == 12 and len({tuple(one.values()) for one in settings}) == 12
    fitness = [float(row["fitness"]) if row["state"] == "done" else -1.0 for row in rows]
    best = int(np.argmax(fitness))
    assert fitness[best] > fitness[0] > 0
    kept = yaml.safe_load(file.read_text())
    assert kept == {"optimizer": "SGD", **settings[best]}
    # What is kept is exactly what --hyp takes, and makes the config of that trial.
    taken = train_config(read_options(file))
    assert {r.name: getattr(taken, r.name) for r in RANGES} == settings[best]
    assert sorted(path.parent.name for path in tmp_path.glob("t/trials/*/*.pt")) == [str(best)]
    assert not list(tmp_path.glob("t/.*"))


def test_nothing_leaves_its_range(tmp_path: Path) -> None:
    file = tune(config_in(tmp_path, warmup_epochs=9.0), 12, progress=False, run=stand_in)
    for one in tried(file.parent):
        for r in RANGES:
            assert r.low <= one[r.name] <= (9.0 if r.name == "warmup_epochs" else r.high), (r, one)


def test_every_bound_is_a_value_that_train_takes() -> None:
    for r in RANGES:
        train_config({r.name: r.low})
        train_config({r.name: r.high})
        assert 0 < r.low < r.high if r.log else 0 <= r.low < r.high


@given(
    st.sampled_from(RANGES), st.floats(0, 1), st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 0.97]), st.booleans()
)
def test_what_is_drawn_near_a_value_stays_in_the_range(r: Range, where: float, seed: int, own: float, near: bool):
    wide = r.around(own)
    value = wide.low + where * (wide.high - wide.low) if near else own
    drawn = wide.near(value, np.random.default_rng(seed))
    assert wide.low <= drawn <= wide.high
    assert wide.low <= tuning.rounded(drawn, wide, own) <= wide.high
    assert wide.low <= min(own, r.low) and wide.high >= max(own, r.high)


def test_near_is_a_tenth_of_the_range_in_logarithms_where_these_count() -> None:
    rng = np.random.default_rng(0)
    rates = np.log10([RANGES[0].near(1e-3, rng) for _ in range(2000)])
    assert RANGES[0].name == "lr0" and abs(rates.mean() + 3) < 0.03 and abs(rates.std() - 0.4) < 0.03
    assert Range("lrf", 0.01, 1.0, log=True).around(0.0) == Range("lrf", 0.0, 1.0, log=False)


def test_a_flip_that_the_user_turned_off_stays_off(tmp_path: Path) -> None:
    plain = tune(config_in(tmp_path, name="a"), 2, progress=False, run=stand_in)
    fixed = tune(config_in(tmp_path, name="b", fliplr=0, flipud=0.0), 2, progress=False, run=stand_in)
    assert {"fliplr", "flipud"} <= set(tried(plain.parent)[0])
    assert set(tried(plain.parent)[0]) - set(tried(fixed.parent)[0]) == {"fliplr", "flipud"}


def test_rectangles_leave_mosaic_out(tmp_path: Path) -> None:
    seen: list[TrainConfig] = []

    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        seen.append(config)
        return stand_in(config, progress, on_epoch)

    file = tune(config_in(tmp_path, rect=True), 3, progress=False, run=run)
    assert "mosaic" not in tried(file.parent)[0] and [config.mosaic for config in seen] == [0, 0, 0]
    assert all(config.noplots and config.tune == 0 and config.resume is None for config in seen)


def test_a_search_that_was_interrupted_makes_the_same_trials_as_one_that_was_not(tmp_path: Path) -> None:
    whole = tune(config_in(tmp_path, name="whole"), 9, progress=False, run=stand_in)
    calls: list[str] = []

    def interrupted(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        calls.append(config.name)
        if len(calls) in (1, 4, 9, 10):  # the user's own, one near it, and twice the same one of TPE's
            on_epoch(1, metrics(0.9))
            raise KeyboardInterrupt
        return stand_in(config, progress, on_epoch)

    config = config_in(tmp_path, name="parts")
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt) as stop:
            tune(config, 9, progress=False, run=interrupted)
        assert str(stop.value) == f"stopped; goes on with: python train.py --tune 9 --resume {tmp_path / 'parts'}"
        config = TrainConfig(resume=tmp_path / "parts", tune=9)
    parts = tune(config, 9, progress=False, run=interrupted)
    assert calls == ["0", "0", "1", "2", "2", "3", "4", "5", "6", "6", "6", "7", "8"]
    without = ("seconds",)
    left, right = (
        [{k: v for k, v in row.items() if k not in without} for row in read_csv(file.parent / "tune.csv")]
        for file in (whole, parts)
    )
    assert left == right and len(left) == 9
    assert yaml.safe_load(whole.read_text()) == yaml.safe_load(parts.read_text())


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from pathlib import Path
import test_tune
from engine.tune import tune

def run(config, progress, on_epoch):
    if config.name == "2":
        on_epoch(1, test_tune.metrics(0.1))
        os.kill(os.getpid(), signal.SIGKILL)
    return test_tune.stand_in(config, progress, on_epoch)

tune(test_tune.config_in(Path(sys.argv[3])), 5, progress=False, run=run)
"""


def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    killed = subprocess.run(arguments, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "t"
    with open(folder / "journal.log", "ab") as journal:  # as a kill while it was being written leaves it
        journal.write(b'{"op_code":')
    (folder / "journal.log.lock").symlink_to(folder / "journal.log")
    resumed = tune(TrainConfig(resume=folder, tune=6), 6, progress=False, run=stand_in)
    whole = tune(config_in(tmp_path, name="whole"), 6, progress=False, run=stand_in)
    assert tried(resumed.parent) == tried(whole.parent)
    assert [row["trial"] for row in read_csv(folder / "tune.csv")] == list("012345")
    # Nothing is left to do: the same result again, without a trial.
    assert tune(TrainConfig(resume=folder), 6, progress=False, run=None) == folder / "hyp.yaml"  # type: ignore[arg-type]


def test_a_hopeless_trial_ends_early(tmp_path: Path) -> None:
    ended: list[int] = []

    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        if int(config.name) < 6:
            return stand_in(config.model_copy(update={"lr0": 0.02, "mosaic": 0.3}), progress, on_epoch)
        for epoch in range(1, 6):
            ended.append(epoch)
            on_epoch(epoch, metrics(0.01 * epoch))
        raise AssertionError("was not ended")

    file = tune(config_in(tmp_path), 7, progress=False, run=run)
    rows = read_csv(file.parent / "tune.csv")
    assert [row["state"] for row in rows] == ["done"] * 6 + ["ended early"]
    assert rows[6]["ap"] == "0.02" and rows[6]["epochs"] == "2" and rows[6]["fitness"] == ""
    assert ended == [1, 2], "the first three tenths of 5 epochs are over after one"


def test_a_trial_that_breaks_down_is_not_the_end(tmp_path: Path, capsys) -> None:
    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        result = stand_in(config, progress, on_epoch)
        if config.name in "02":
            raise Fault("epoch 1, step 3: the loss is not a finite number (loss nan)", "a second line")
        return TrainResult(result.folder, result.best, result.last, metrics(math.nan)) if config.name == "3" else result

    file = tune(config_in(tmp_path), 6, progress=True, run=run)
    rows = read_csv(file.parent / "tune.csv")
    assert [row["state"] for row in rows] == ["failed", "done", "failed", "failed", "done", "done"]
    assert rows[2]["problem"] == "epoch 1, step 3: the loss is not a finite number (loss nan)"
    assert rows[3]["problem"] == "AP is nan"
    shown = capsys.readouterr().out
    assert "6 trials: 3 done, 3 failed" in shown and "Your own settings failed." in shown
    assert "trial 2 (3 of 6): failed: epoch 1, step 3: the loss is not a finite number (loss nan)" in shown


def test_a_search_in_which_everything_fails_says_so(tmp_path: Path) -> None:
    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        stand_in(config, progress, on_epoch)
        raise Fault("the loss is not a finite number")

    with pytest.raises(Fault) as problem:
        tune(config_in(tmp_path), 3, progress=False, run=run)
    assert problem.value.lines == (f"{tmp_path / 't'}: no trial of 3 came to its end; see tune.csv there",)


def test_what_no_setting_can_help_is_told_at_once(tmp_path: Path) -> None:
    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        raise Fault("--cfg is missing")

    with pytest.raises(Fault, match="--cfg is missing"):
        tune(config_in(tmp_path), 3, progress=False, run=run)


def test_the_end_says_what_was_gained_and_how_far_to_trust_it(tmp_path: Path, capsys) -> None:
    tune(config_in(tmp_path), 8, run=stand_in)
    shown = capsys.readouterr().out
    rows = read_csv(tmp_path / "t" / "tune.csv")
    best = max((row for row in rows if row["fitness"]), key=lambda row: float(row["fitness"]))
    assert f"Fitness {float(best['fitness']):.4f} instead of {float(rows[0]['fitness']):.4f}." in shown
    assert "This is the best of 8 trials on one validation set, with one seed: a part of it is luck." in shown
    assert f"python train.py --hyp {tmp_path / 't' / 'hyp.yaml'} ..." in shown

    tune(config_in(tmp_path, name="good", lr0=0.02, mosaic=0.3), 3, run=stand_in)
    assert "No trial was better than your own settings." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_size": -1}, "--batch-size -1: every trial would find its own; give a number with --tune"),
        (
            {"exist_ok": True},
            "--exist-ok: {folder} holds a search already; --tune N --resume {folder} goes on with it",
        ),
        (
            {"optimizer": "auto"},
            "--data is missing: the YAML of a data set, such as cfg/data/shapes.yaml, would be right",
        ),
    ],
)
def test_options_that_cannot_be_tuned_are_told(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "journal.log").touch()
    with pytest.raises(Fault) as problem:
        tune(config_in(tmp_path, **options), 3, progress=False, run=stand_in)
    assert problem.value.lines == (line.format(folder=folder),)


def test_a_search_that_goes_on_takes_no_other_options(tmp_path: Path) -> None:
    with pytest.raises(Fault) as problem:
        tune(TrainConfig(resume=tmp_path, tune=3), 3, progress=False, run=stand_in)
    assert problem.value.lines == (
        f"--resume {tmp_path}: no {tmp_path / 'journal.log'}; without --tune a training goes on",
    )
    tune(config_in(tmp_path), 1, progress=False, run=stand_in)
    with pytest.raises(Fault) as problem:
        tune(TrainConfig(resume=tmp_path / "t", tune=3, lr0=1, epochs=9), 3, progress=False, run=stand_in)
    assert problem.value.lines == (
        "--epochs, --lr0: cannot change in a search that goes on; leave it out, or start anew",
    )


def test_the_picture_shows_every_trial(tmp_path: Path) -> None:
    def run(config: TrainConfig, progress: bool, on_epoch: OnEpoch) -> TrainResult:
        if config.name == "1":
            (config.project / config.name).mkdir(parents=True)
            (config.project / config.name / "config.yaml").write_text("")
            raise Fault("the loss is not a finite number")
        return stand_in(config, progress, on_epoch)

    tune(config_in(tmp_path, noplots=False), 2, progress=False, run=run)
    image = cv2.imread(str(tmp_path / "t" / "tune.png"))
    assert image is not None and image.shape[1] == 1500 and image.std() > 10
    assert not list(tmp_path.glob("t/trials/*/*.png"))


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SET_BY_TORCHRUN:
        monkeypatch.setenv(name, "2")
    for config in (config_in(tmp_path), TrainConfig(resume=tmp_path)):
        with pytest.raises(Fault, match="start it without torchrun"):
            tune(config, 3, progress=False, run=stand_in)


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Fault) as problem:
        tune(config_in(tmp_path), 3)
    assert problem.value.lines == ("--tune: needs Optuna; pip install -e '.[search]'",)
    assert not list(tmp_path.iterdir())


def test_a_classifier_is_tuned_by_top_1_and_what_means_something_to_it(tmp_path: Path, capsys) -> None:
    from test_search import draw_classes

    data = draw_classes(tmp_path, images=2)
    (tmp_path / "model.yaml").write_text(
        "nc: 3\nactivation: relu\nbackbone:\n  - [-1, 1, Conv, [8, 3, 2]]\nhead:\n  - [-1, 1, Classify, [nc]]\n"
    )
    options = {"cfg": tmp_path / "model.yaml", "data": data, "imgsz": 32, "epochs": 1, "batch-size": 6, "device": "cpu"}
    arguments = ["--noplots", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    assert main([*arguments, "--tune", "2", "--project", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    shown, folder = capsys.readouterr().out, tmp_path / "runs" / "exp"
    assert f"tuning 13 hyper-parameters in {folder}, 0 of 2 trials are done" in shown
    assert re.search(r"trial 0 \(1 of 2\): fitness 0\.\d{4}, top-1 0\.\d{4}\n", shown) and "AP" not in shown
    rows = read_csv(folder / "tune.csv")
    assert [row["state"] for row in rows] == ["done", "done"] and {"mosaic", "translate"}.isdisjoint(rows[0])
    assert all(row["fitness"] == row["top1"] and row["top5"] in ("", "nan") for row in rows)
    assert main([*arguments, "--hyp", str(folder / "hyp.yaml"), "--project", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--tune", "2", "--mosaic", "0.5"]) == 2
    assert capsys.readouterr().err == "--mosaic 0.5: means nothing to a classifier; leave it out\n"


def test_two_real_trials_from_the_command_line(tmp_path: Path, capsys) -> None:
    from test_train import draw_data

    data = draw_data(tmp_path, train=4, val=2)
    (tmp_path / "model.yaml").write_text(MODEL)
    options = {"cfg": tmp_path / "model.yaml", "data": data, "imgsz": 64, "epochs": 2, "batch-size": 4, "device": "cpu"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert main([*arguments, "--tune", "2", "--project", str(tmp_path / "runs")]) == 0, capsys.readouterr().err
    folder = tmp_path / "runs" / "exp"
    assert f"tuning 15 hyper-parameters in {folder}, 0 of 2 trials are done" in capsys.readouterr().out
    rows = read_csv(folder / "tune.csv")
    assert [row["state"] for row in rows] == ["done", "done"]
    own = TrainConfig(optimizer="AdamW", lr0=0.002)  # what `auto` is in a run of two steps
    assert tried(folder)[0] == {r.name: getattr(own, r.name) for r in RANGES}
    trained = read_options(folder / "trials" / "1" / "config.yaml")
    assert {name: float(trained[name]) for name in tried(folder)[1]} == tried(folder)[1]
    # The result is what --hyp takes; a search that is done can be made longer.
    hyp = str(folder / "hyp.yaml")
    assert main([*arguments, "--hyp", hyp, "--epochs", "1", "--project", str(tmp_path / "again")]) == 0
    assert main(["--tune", "3", "--resume", str(folder)]) == 0
    assert len(read_csv(folder / "tune.csv")) == 3
