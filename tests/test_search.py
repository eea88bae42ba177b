"""A search from its data to its page: how it splits images, and that classifiers take the same road as detectors."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.structures import Fault, Sample
from engine.config import checked, read_options
from engine.runs import read_csv
from engine.validate import main as val
from models.checkpoint import load_checkpoint
from models.parse import parse
from search import find
from search.config import SearchConfig
from search.parts import split_train
from search.report import write_report
from search.run import main
from search.space import SearchSpace
from search.storage import JOURNAL, Ticket, close, create, finished, open_storage, outcome_of, post, trials_of
from search.worker import ABOUT, reopened

COLOURS = {"blue": (40, 50, 210), "green": (30, 190, 40), "red": (200, 30, 30)}
CLASSIFIER = """\
nc: 9
activation: relu
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2, {act: {choice: [relu, mish]}}]]
head:
  - [-1, 1, MBottleneckCSP2, [8]]
  - [-1, 1, Classify, [nc]]
"""


def draw_classes(folder: Path, images: int = 4, side: int = 48) -> Path:
    """Noisy squares of one colour a class, as many to train on as to validate."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(images):
                picture = np.clip(rng.normal(colour, 60, (side, side, 3)), 0, 255).astype(np.uint8)
                assert cv2.imwrite(str(folder / split / name / f"{number}.png"), picture[..., ::-1])
    (folder / "data.yaml").write_text("train: train\nval: val\nformat: folders\n")
    return folder / "data.yaml"


# ---- the data


def test_weights_and_alphas_never_see_the_same_image(tmp_path):
    empty = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    samples = [Sample(tmp_path / f"{number}.jpg", *empty) for number in range(400)]
    weights, judging = split_train(samples)
    assert len(judging) == 80 and len(weights) == 320
    assert not {s.path for s in weights} & {s.path for s in judging}
    shuffled = random.Random(0).sample(samples, len(samples))
    assert {s.path for s in split_train(shuffled)[1]} == {s.path for s in judging}
    assert len(split_train(samples[:100])[1]) == 32 and len(split_train(samples[:20])[1]) == 10
    with pytest.raises(Fault, match="two or more training images"):
        split_train(samples[:1])


def test_every_class_gives_its_share_of_the_judging_images(tmp_path):
    counts = {0: 300, 1: 60, 2: 40}
    box = np.array([[0, 0, 9, 9]], np.float32)
    samples = [
        Sample(tmp_path / str(label) / f"{number}.jpg", box, np.array([label]))
        for label, count in counts.items()
        for number in range(count)
    ]
    weights, judging = split_train(samples, by_class=True)
    assert [sum(int(s.labels[0]) == label for s in judging) for label in counts] == [60, 12, 8]
    assert len(weights) == 320 and not {s.path for s in weights} & {s.path for s in judging}
    shuffled = random.Random(0).sample(samples, len(samples))
    assert sum(int(s.labels[0]) == 2 for s in split_train(shuffled, by_class=True)[1]) == 8


def test_an_image_alone_before_a_norm_of_one_cell_is_refused(tmp_path, capsys):
    """12 images, of which 6 train the weights: at 32 px the stride of 32 leaves one cell of each."""
    data = draw_classes(tmp_path)
    rows = "\n".join(f"  - [-1, 1, Conv, [8, 3, {stride}]]" for stride in (4, 4))
    searched = "  - [-1, 1, Conv, [8, 3, 2, {act: {choice: [relu, mish]}}]]"
    text = f"nc: 3\nactivation: relu\nbackbone:\n{rows}\n{searched}\nhead:\n  - [-1, 1, Classify, [nc]]\n"
    (tmp_path / "search.yaml").write_text(text)
    words = ["--cfg", tmp_path / "search.yaml", "--data", data, "--imgsz", 32, "--arch-every", 1, "--epochs", 2]
    words += ["--project", tmp_path / "runs", "--device", "cpu"]
    for size, told in ((5, "6 images in batches of 5 leave one alone"), (1, "a batch is one image")):
        assert main(list(map(str, [*words, "--batch-size", size]))) == 2
        assert capsys.readouterr().err == (
            f"--batch-size {size}: {told}, and at --imgsz 32 the coarsest map of it has one cell, from which no norm "
            "can learn; another batch size, or --imgsz 64, would be right\n"
        )
    assert not (tmp_path / "runs").exists()


# ---- a classifier


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """The folder of a finished search: one epoch of six steps, one of alphas, two subnets trained on."""
    folder = tmp_path_factory.mktemp("classes")
    data = draw_classes(folder)
    (folder / "search.yaml").write_text(CLASSIFIER)
    words = ["--cfg", folder / "search.yaml", "--data", data, "--imgsz", 32, "--epochs", 1, "--batch-size", 1]
    words += ["--arch-every", 2, "--candidates", 3, "--calibration", 6, "--budget", "params=3k", "--retrain", 1]
    words += ["--retrain-epochs", 1, "--project", folder / "runs", "--device", "cpu", "--amp", "off"]
    assert main(list(map(str, words))) == 0
    return folder / "runs" / "exp"


def test_a_classifier_is_searched_by_the_same_command(searched: Path, capsys):
    rows = list(csv.DictReader((searched / "front.csv").open()))
    measured = ["subnet", "front", "ties", "top1", "top1_error", "top5", "loss", "macs", "params", "latency_ms"]
    assert list(rows[0]) == [*measured, "1.act", "2.kernel", "2.act"] and 1 <= len(rows) <= 3
    assert all(0 <= float(row["top1"]) <= 1 and row["top5"] == "" and float(row["params"]) <= 3e3 for row in rows)
    assert all(float(row["top1_error"]) >= 0 and float(row["loss"]) > 0 for row in rows)
    assert len(read_csv(searched / "losses.csv")) == 2 * 6
    alphas = read_csv(searched / "alphas.csv")
    assert {row["choice"] for row in alphas} == {"1.act", "2.kernel", "2.act"}
    assert any(abs(float(row["alpha"])) > 1e-4 for row in alphas)
    spec, best = parse(searched / "best.yaml"), load_checkpoint(searched / "best.pt")
    assert spec.choices == () and spec.num_classes == 3 and best.names == tuple(COLOURS)
    assert re.match(r"# subnet \d+: .*\n# judged top-1 [01]\.\d{4}, macs ", (searched / "best.yaml").read_text())
    (row,) = read_csv(searched / "retrain.csv")
    states = ["inherited", "calibrated", "fine_tuned", "retrained"]
    assert list(row) == ["subnet", *states, *(f"{state}_top5" for state in states)]
    assert all(0 <= float(row[state]) <= 1 for state in states)
    assert val(["--weights", str(searched / "best.pt"), "--data", str(searched.parents[1] / "data.yaml"),
                "--project", str(searched.parent / "val"), "--noplots"]) == 0  # fmt: skip
    assert "top-1" in capsys.readouterr().out


def test_its_page_speaks_of_top_1(searched: Path):
    text = write_report(searched).read_text()
    words = re.sub(r"<(script|style).*?</\1>|<.*?>", " ", text, flags=re.DOTALL)
    assert "The front: top-1 against cost" in words and "The classification loss" in words
    assert "which makes a classifier of it" in words and "top-1 on the validation images" in words
    assert not re.search(r"\bAP\b|AP50|top-5|detector\b", words)


def test_a_search_of_a_classifier_goes_on(searched: Path, capsys):
    """All epochs are done: it judges once more, and reads that mosaics mean nothing here from its own options."""
    before = read_csv(searched / "front.csv")
    assert main(["--resume", str(searched), "--device", "cpu"]) == 0
    after = read_csv(searched / "front.csv")
    names = ("subnet", "top1", "loss", "macs")
    assert [[row[name] for name in names] for row in before] == [[row[name] for name in names] for row in after]
    assert "front over top-1 and params" in capsys.readouterr().out
    assert main(["--cfg", str(searched / "search.yaml"), "--data", str(searched.parents[1] / "data.yaml"),
                 "--mosaic", "0.5"]) == 2  # fmt: skip
    assert capsys.readouterr().err == "--mosaic 0.5: means nothing to a classifier; leave it out\n"


# ---- workers


def test_a_worker_judges_as_the_search_does(searched: Path, capsys):
    """Its study is closed by now; opened once more, and with a subnet wanted that was judged before."""
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    assert main(["--worker", str(searched), "--device", "cpu"]) == 0
    assert "0 subnets judged" in capsys.readouterr().out
    space = SearchSpace.of(parse(searched / "search.yaml"))
    name = json.loads((searched / ABOUT).read_text())["study"]
    queue = create(open_storage(str(searched / JOURNAL)), name, space, 2)
    one, (known, before) = next(iter(finished(queue).items()))
    post(queue, one, known)
    assert main(["--worker", str(searched), "--device", "cpu", "--trials", "1"]) == 0
    assert "1 subnets judged" in capsys.readouterr().out
    *_, last = trials_of(queue)
    assert last.user_attrs["by"] != queue.owner and outcome_of(last) == before
    close(queue)


def test_a_worker_of_another_search_is_refused(searched: Path, tmp_path: Path, capsys):
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    other = tmp_path / "exp"
    shutil.copytree(searched, other)
    about = json.loads((other / ABOUT).read_text())
    (other / ABOUT).write_text(json.dumps(about | {"study": "exp 0123456789ab"}))
    assert main(["--worker", str(other), "--device", "cpu"]) == 2
    assert "subnets would not be judged as the search judges them" in capsys.readouterr().err
    (other / ABOUT).unlink()
    assert main(["--worker", str(other), "--timeout", "0.01"]) == 2
    assert "and the search does not judge yet" in capsys.readouterr().err
    assert main(["--worker", str(tmp_path)]) == 2
    assert main(["--worker", str(other), "--imgsz", "64"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("it has no config.yaml; runs/search/exp is one")
    assert told[1] == "--imgsz: a worker does as its search was told; leave it out"


def test_a_subnet_that_is_surely_beaten_is_given_up(searched: Path, monkeypatch):
    monkeypatch.setattr(find, "FEWEST_FIRST", 4)
    options = read_options(searched / "config.yaml", SearchConfig) | {"prune": 0.5}
    trial = reopened(searched, checked(SearchConfig, options, "here"), False)
    strong, weak = ({"score": s, "without": [s, s], "costs": {"params": 0.0}} for s in (2.0, -1.0))
    known = {"costs": {"params": 1.0}, "loss": None}
    tickets = [Ticket(n, trial.space.at(n), {**known, "bar": [bar]}) for n, bar in enumerate((strong, weak))]
    told = {}
    find.evaluate_tickets(trial, tickets, lambda ticket, outcome: told.__setitem__(ticket.id, outcome))
    assert told[0].pruned and told[0].values == (told[0].facts["score"], 1.0)
    assert not told[1].pruned and len(told[1].facts["first"]["without"]) == 2 and len(told[1].facts["without"]) == 3


def test_importances_stand_in_the_folder(searched: Path):
    rows = read_csv(searched / "importances.csv")
    if rows:  # not where all of the few subnets score the same
        assert {row["choice"] for row in rows} == {"1.act", "2.kernel", "2.act"}
        assert sum(float(row["importance"]) for row in rows) == pytest.approx(1)
