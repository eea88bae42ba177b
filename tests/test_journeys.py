"""What a user does, from a folder of images to boxes on a video, through the same doors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest
from test_distributed import in_two_processes
from test_train import MODEL

from data.config import read_data_spec
from data.readers import read_split
from data.shapes import draw_shapes
from engine.export import ENDINGS, NEEDED, PACKAGES
from engine.infer import main as detect
from engine.train import main as train
from engine.validate import main as val
from models.checkpoint import load_checkpoint, restore
from models.parse import parse
from search.judge import judge
from search.parts import split_train
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
    options += ["--candidates", "5", "--calibration", "8", "--project", folder / "runs", "--budget", "macs=1.6M"]
    assert search(list(map(str, options))) == 0
    return folder / "runs" / "exp"


def test_a_search_leaves_a_front_of_plain_networks(searched: Path):
    rows = list(csv.DictReader((searched / "front.csv").open()))
    assert 2 <= len(rows) <= 5 and any(row["front"] == "1" for row in rows)
    assert all(float(row["macs"]) <= 1.6e6 for row in rows)
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
    assert val(["--weights", str(best), "--data", str(data), "--project", str(searched.parent / "val")]) == 0
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


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_a_small_space_is_walked_through_and_the_best_losses_are_judged(searched: Path):
    losses, judged = rows_of(searched / "losses.csv"), rows_of(searched / "front.csv")
    assert len(losses) == 72 and [int(row["subnet"]) for row in losses] == list(range(72))
    assert {row["subnet"]: row["loss"] for row in losses}.items() >= {
        row["subnet"]: row["loss"] for row in judged
    }.items()
    allowed = [row for row in losses if float(row["macs"]) <= 1.6e6]
    assert min(allowed, key=lambda row: float(row["loss"]))["subnet"] in {row["subnet"] for row in judged}
    assert "Search report" in (searched / "report.html").read_text()


def test_many_candidates_of_a_larger_space_are_evolved(searched: Path, data: Path, monkeypatch):
    monkeypatch.setattr("search.find.EXHAUSTIVE", 10)
    monkeypatch.setattr("search.find.EVOLUTION", 5)
    options = ["--cfg", searched.parent.parent / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4"]
    options += ["--imgsz", "64", "--candidates", "8", "--calibration", "8", "--budget", "macs=1.5M"]
    options += ["--project", data.parent / "evolved"]
    assert search(list(map(str, options))) == 0
    judged = rows_of(data.parent / "evolved" / "exp" / "front.csv")
    assert len(judged) == len({row["subnet"] for row in judged}) == 8
    assert all(float(row["macs"]) <= 1.5e6 for row in judged)


def test_ctrl_c_keeps_the_front_that_was_reached_and_the_search_goes_on(data: Path, monkeypatch, capsys):
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "4", "--calibration", "8", "--project", folder / "stopped"]
    run = folder / "stopped" / "exp"

    def interrupted(networks, *arguments, done, **named):
        judge(networks[:2], *arguments, done=done, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr("search.find.judge", interrupted)
    assert search(list(map(str, options))) == 130
    assert f"--resume {run}" in capsys.readouterr().err
    assert len(rows_of(run / "front.csv")) == 2 and (run / "report.html").is_file()
    monkeypatch.undo()
    assert search(["--resume", str(run)]) == 0
    assert len(rows_of(run / "front.csv")) == 4 and (run / "best.pt").is_file()


def test_the_best_of_a_front_are_retrained_and_the_first_of_them_leaves_as_a_file(data: Path, capsys, monkeypatch):
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "4", "--calibration", "8", "--retrain", "1", "--retrain-epochs", "2"]
    options += ["--project", folder / "retrained"]
    assert search(list(map(str, options))) == 0
    run = folder / "retrained" / "exp"
    (row,) = rows_of(run / "retrain.csv")
    assert all(0 <= float(row[name]) <= 1 for name in ("inherited", "calibrated", "fine_tuned", "retrained"))
    assert len(rows_of(run / "retrain" / f"{row['subnet']}-retrained" / "results.csv")) == 2
    assert len(rows_of(run / "retrain" / f"{row['subnet']}-fine-tuned" / "results.csv")) == 1
    capsys.readouterr()
    kind = "torch" if any(find_spec(name) is None for name in PACKAGES) else "onnx"
    assert search(["--resume", str(run), "--export", kind]) == 0  # what is trained is not trained again
    told = capsys.readouterr().out
    assert "fine-tuned:" not in told and len(rows_of(run / "retrain.csv")) == 1
    file = run / f"best{ENDINGS[kind]}"
    assert f"{kind} of {run / 'retrain' / row['subnet']}-retrained/best.pt" in told and "parity: boxes" in told
    assert f'href="{file.name}"' in (run / "report.html").read_text()
    found = ["--weights", file, "--source", data.parent / "images" / "val", "--project", folder / "of-a-file"]
    assert detect(list(map(str, found))) == 0
    capsys.readouterr()
    monkeypatch.setitem(NEEDED, "onnx", ("gone",))
    assert search([*map(str, options), "--export", "onnx"]) == 2
    assert capsys.readouterr().err == "--export onnx needs gone, not installed here: pip install -e '.[export]'\n"


def test_a_latency_budget_is_priced_by_a_table_and_kept_by_measurement(data: Path, capsys, monkeypatch):
    monkeypatch.setattr("search.run.SECONDS", 3.0)
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "3", "--calibration", "8", "--budget", "latency_ms=500", "--project", folder / "timed"]
    assert search(list(map(str, options))) == 0
    run = folder / "timed" / "exp"
    assert "24 random subnets" in capsys.readouterr().out
    assert all(0 < float(row["latency_table_ms"]) < 500 for row in rows_of(run / "front.csv"))
    assert "lambda_latency_ms" in rows_of(run / "results.csv")[0]
    table = str(run / "latency.json")
    other = [*map(str, options), "--runtime", "onnxruntime", "--latency-table", table]
    assert search(other) == 2 and "runtime 'torch', wanted 'onnxruntime'" in capsys.readouterr().err


def test_the_reference_system_s_settings_leave_its_files(data: Path, monkeypatch):
    monkeypatch.setattr("search.tango.WARMUP_STEPS", 4)
    folder = data.parent
    (folder / "six.yaml").write_text(SEARCH.replace("{number}", "1"))
    options = ["--cfg", folder / "six.yaml", "--data", data, "--epochs", "5", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "2", "--calibration", "8", "--supernet", "independent", "--tango"]
    options += ["--project", folder / "tango"]
    assert search(list(map(str, options))) == 0
    run = folder / "tango" / "exp"
    assert set(json.loads((run / "final_arch.json").read_text())) == {"m_3", "m_5"}
    assert all((run / f"{name}_history.txt").is_file() for name in ("probs", "export"))


def test_two_processes_search_as_one(data: Path):
    folder = data.parent
    (folder / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", folder / "search.yaml", "--data", data, "--epochs", "2", "--batch-size", "4", "--imgsz", "64"]
    options += ["--candidates", "2", "--calibration", "8", "--project", folder / "two", "--retrain", "1"]
    options += ["--supernet", "merge"]  # an epoch of mixtures, and one of subnets
    printed = in_two_processes(ROOT / "search.py", *options)
    assert printed.count("results in") >= 1 and (folder / "two" / "exp" / "report.html").is_file()
    assert len(rows_of(folder / "two" / "exp" / "retrain.csv")) == 1
    assert not (folder / "two" / "exp2").exists()


def test_two_processes_train_as_one_and_one_alone_goes_on(data: Path, capsys):
    folder = data.parent
    (folder / "model.yaml").write_text(MODEL)
    options = ["--cfg", folder / "model.yaml", "--data", data, "--epochs", "2", "--batch-size", "8", "--imgsz", "64"]
    options += ["--workers", "0", "--device", "cpu", "--noplots", "--project", folder / "trained-by-two"]
    printed = in_two_processes(ROOT / "train.py", *options)
    run = folder / "trained-by-two" / "exp"
    assert "on cpu, 2 processes" in printed and printed.count(f"results in {run}") == printed.count("last: ") == 1
    assert [path.name for path in run.parent.iterdir()] == ["exp"], "only the first makes a folder"
    assert (run / "results.csv").read_text().count("epoch") == 1
    assert [row["epoch"] for row in rows_of(run / "results.csv")] == ["1", "2"]
    assert len(list(run.glob("events.out.tfevents.*"))) <= 1  # 0 without TensorBoard
    best, last = (load_checkpoint(run / name) for name in ("best.pt", "last.pt"))
    assert best.names == last.names and best.training is None and restore(best).num_classes == 5
    assert last.training is not None and (last.training["epoch"], last.training["processes"]) == (2, 2)

    assert train(["--resume", str(run), "--epochs", "3"]) == 0
    told = capsys.readouterr().out
    assert "1 processes, it began with 2" in told and "goes on after epoch 2 of 3" in told
    assert [row["epoch"] for row in rows_of(run / "results.csv")] == ["1", "2", "3"]
    last = load_checkpoint(run / "last.pt")
    assert last.training is not None and (last.training["epoch"], last.training["processes"]) == (3, 1)


def test_judging_images_without_a_label_are_told_before_anything_is_trained(tmp_path, capsys):
    data = draw_shapes(tmp_path, train=40, val=4, size=64, seconds=0.2)
    samples = read_split(read_data_spec(data), "train").samples
    for sample in split_train(samples)[1]:
        (tmp_path / "labels" / "train" / f"{sample.path.stem}.txt").write_text("")
    (tmp_path / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    options = ["--cfg", tmp_path / "search.yaml", "--data", data, "--imgsz", "64", "--project", tmp_path / "none"]
    assert search(list(map(str, options))) == 2
    assert "images that move alphas and judge has a label; label more of them" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "macs=1k"], "--budget macs=0.001M: no subnet can meet it; the smallest has macs="),
        (["--budget", "latency_ms=0.001"], "no subnet can meet it on this device; the smallest latency is latency_ms="),
        (["--budget", "flops=3"], "--budget flops=3: write macs=900M, params=2.5M or latency_ms=12"),
        (["--epochs", "0"], "--epochs: "),
        (["--supernat", "shared"], "--supernat: there is no such option; did you mean '--supernet'?"),
        (["--batch-size", "40", "--epochs", "1"], "leave none for the architecture parameters"),
        (["--imgsz", "70"], "70"),
        (["--supernet", "independent", "--cfg", "cfg/models/tiny-search.yaml"], "--supernet shared holds any number"),
        (["--cfg", "cfg/models/tiny.yaml"], "nothing to search"),
    ],
)
def test_what_cannot_be_searched_is_told_in_one_line(data: Path, options, told, capsys, monkeypatch):
    monkeypatch.setattr("search.run.SECONDS", 1.0)
    (data.parent / "search.yaml").write_text(SEARCH.replace("{number}", "{choice: [1, 2]}"))
    base = ["--cfg", data.parent / "search.yaml", "--data", data, "--imgsz", "64", "--project", data.parent / "none"]
    assert search([*map(str, base), "--epochs", "8", *options]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not (data.parent / "none").exists(), "nothing is left behind"


@pytest.mark.parametrize("script", ["train.py", "search.py", "detect.py", "val.py"])
def test_every_door_opens_and_explains_itself(script: str):
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--" in done.stdout
