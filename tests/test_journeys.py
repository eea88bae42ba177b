"""What a user does, from a folder of images to boxes on a video, through the same doors."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from data.shapes import draw_shapes
from engine.evaluate import main as val
from engine.infer import main as detect
from engine.train import main as train
from models.parse import parse
from search.run import main as search

ROOT = Path(__file__).resolve().parents[1]
SEARCH = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
activation: relu
anchors: 2
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, {number}, MBottleneckCSP2, [16]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, MBottleneckCSP2, [16]]
  - [[3, 5], 1, Detect, [nc, anchors]]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"), train=40, val=8, size=96, seconds=0.4)


@pytest.fixture(scope="module")
def searched(data: Path) -> Path:
    """A finished search of a shared supernet: the run's folder."""
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "4", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "5", "--calibration", "8", "--project", folder / "runs", "--budget", "macs=3M"]
    assert search(list(map(str, options))) == 0
    return folder / "runs" / "exp"


def test_a_search_leaves_a_front_of_plain_networks(searched: Path):
    rows = list(csv.DictReader((searched / "front.csv").open()))
    assert 2 <= len(rows) <= 5 and any(row["front"] == "1" for row in rows)
    assert all(float(row["macs"]) <= 3e6 for row in rows)
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    for row in rows:
        if row["front"] == "1":
            spec = parse(searched / "subnets" / f"{row['subnet']}.yaml")
            assert spec.choices == () and not isinstance(spec.anchors, int) and spec.num_classes == 5
            assert (searched / "subnets" / f"{row['subnet']}.pt").is_file()
    picture = cv2.imread(str(searched / "front.png"))
    assert picture is not None and picture.std() > 5


def test_alphas_moved_and_are_written_down(searched: Path):
    rows = list(csv.DictReader((searched / "alphas.csv").open()))
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    assert {row["choice"] for row in last} == {"3.kernel", "3.act", "3.number", "5.kernel", "5.act"}
    assert any(abs(float(row["alpha"])) > 1e-3 for row in last)


def test_the_best_subnet_is_trained_measured_and_run_with_no_special_flag(searched: Path, data: Path, capsys):
    project = searched.parent / "train"
    options = ["--cfg", searched / "best.yaml", "--weights", searched / "best.pt", "--data", data, "--epochs", "2"]
    options += ["--batch-size", "8", "--imgsz", "64", "--project", project, "--device", "cpu"]
    assert train(list(map(str, options))) == 0
    assert "missing" not in capsys.readouterr().out  # every tensor was inherited
    best = project / "exp" / "best.pt"
    assert val(["--weights", str(best), "--data", str(data)]) == 0
    for source in (data.parent / "images" / "val", data.parent / "video.mp4"):
        found = ["--weights", best, "--source", source, "--project", searched.parent / "detect", "--conf-thres", "0.05"]
        assert detect(list(map(str, found))) == 0
    video = cv2.VideoCapture(str(searched.parent / "detect" / "exp2" / "video.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 10 and video.read()[0]
    assert len(list((searched.parent / "detect" / "exp").glob("*.jpg"))) == 8


def test_an_independent_supernet_takes_the_same_road(data: Path):
    folder = data.parent
    (folder / "six.yaml").write_text(SEARCH.replace("{number}", "1"))
    options = ["--cfg", folder / "six.yaml", "--data", data, "--epochs", "4", "--batch-size", "8", "--imgsz", "64"]
    options += ["--candidates", "2", "--calibration", "8", "--supernet", "independent", "--arch-every", "2"]
    options += ["--project", folder / "runs", "--name", "independent"]
    assert search(list(map(str, options))) == 0
    spec = parse(folder / "runs" / "independent" / "best.yaml")
    assert spec.choices == ()


def test_two_searches_with_one_seed_are_the_same(data: Path):
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "3", "--calibration", "8", "--project", folder / "twice", "--device", "cpu"]
    assert search(list(map(str, options))) == search(list(map(str, options))) == 0
    first, second = (list(csv.DictReader((folder / "twice" / name / "front.csv").open())) for name in ("exp", "exp2"))
    for one, other in zip(first, second, strict=True):
        one.pop("latency_ms"), other.pop("latency_ms")
    for rows in (first, second):
        for row in rows:
            row.pop("front")
    assert first == second
    assert (folder / "twice/exp/alphas.csv").read_text() == (folder / "twice/exp2/alphas.csv").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "macs=1k"], "--budget macs=0.001M: no subnet can meet it; the smallest has macs="),
        (["--budget", "latency_ms=0.001"], "no subnet can meet it on this device; the smallest latency"),
        (["--budget", "flops=3"], "--budget flops=3: write macs=900M, params=2.5M or latency_ms=12"),
        (["--epochs", "0"], "--epochs: "),
        (["--supernat", "shared"], "--supernat: there is no such option; did you mean '--supernet'?"),
        (["--batch-size", "40", "--epochs", "1"], "leave none for the architecture parameters"),
        (["--imgsz", "70"], "70"),
        (["--supernet", "independent", "--cfg", "cfg/models/tiny-search.yaml"], "--supernet shared holds any number"),
        (["--cfg", "cfg/models/tiny.yaml"], "nothing to search"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(data: Path, options, told, capsys):
    (data.parent / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    base = ["--cfg", data.parent / "search.yaml", "--data", data, "--imgsz", "64", "--project", data.parent / "none"]
    assert search([*map(str, base), "--epochs", "2", *options]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not list((data.parent / "none").glob("*/best.pt"))


@pytest.mark.parametrize("script", ["train.py", "search.py", "detect.py", "val.py"])
def test_every_door_opens_and_explains_itself(script: str):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--" in done.stdout
