"""The page of results and the tables of the README say what bench/results says; how they are made."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from bench import report
from bench.report import CLAIMS, QUICK, Ratio, Table, made, parts
from engine.runs import table

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages() -> dict[Path, str]:
    return report.pages()


def test_writing_the_pages_again_changes_nothing(pages):
    stale = [path.name for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "python bench/report.py writes them"


def test_the_readme_has_the_table_of_speed(pages):
    assert str(report.speed()) in pages[ROOT / "README.md"]
    assert str(report.speed()) in pages[report.PAGE]


def test_every_claim_of_speed_has_its_result():
    assert [claim.file for claim in CLAIMS if report.read(claim.file) is None] == []
    assert {claim.bench for claim in CLAIMS} <= {quick.bench for quick in QUICK}


def test_every_bench_of_the_page_is_there():
    named = [name for names in report.SECTIONS.values() for name in names]
    assert [name for name in named if not (ROOT / "bench" / f"{name}.py").exists()] == []
    assert len(named) == len(set(named))


def test_a_ratio_is_theirs_by_ours_with_its_interval_turned():
    read = report.ours_by_theirs("wall")
    ratio = read({"wall": {"ratio": 0.5, "interval": [0.4, 0.8]}})
    assert (ratio.times, ratio.low, ratio.high) == (2.0, 1.25, 2.5)
    assert str(ratio) == "2.00 (1.25 to 2.50)"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Ratio(214.4, 196.7, 239.9), "214 (197 to 240)"),
        (Ratio(5.828), "5.8"),
        (Ratio(2.881, 2.66, 3.28), "2.88 (2.66 to 3.28)"),
    ],
)
def test_a_ratio_in_words(ratio, text):
    assert str(ratio) == text


def test_ratios_agree_where_their_intervals_meet():
    assert Ratio(1.0, 0.9, 1.1).agrees(Ratio(1.2, 1.05, 1.3))
    assert not Ratio(1.0, 0.9, 1.1).agrees(Ratio(1.3, 1.2, 1.4))
    assert Ratio(5.8).agrees(Ratio(5.0))
    assert not Ratio(5.8).agrees(Ratio(4.0))


def test_tables_are_read_back_as_they_were_shown():
    header, rows = ("", "AP", "one, two"), [("a, b", 0.5, "x"), ("c", None, "")]
    text = f"before\n\n{table(rows, header)}\nafter it\n"
    assert parts(text) == ["before", Table(header, (("a, b", "0.500", "x"), ("c", "-", ""))), "after it"]


def test_tables_that_follow_each_other_stay_two():
    text = f"{table([('a', 1)], ('n', 'm'))}\n{table([('b', 2)], ('long name', 'm'))}"
    assert parts(text) == [Table(("n", "m"), (("a", "1"),)), Table(("long name", "m"), (("b", "2"),))]


def test_a_table_turned():
    whole = Table(("m", "n", "v", "w"), (("r", "1", ".5", "-"), ("r", "2", ".6", "-"), ("e", "2", ".9", "-")))
    assert whole.pivoted("m", "n", "v") == Table(("", "1", "2"), (("r", ".5", ".6"), ("e", "", ".9")))


def test_markers_are_filled(monkeypatch):
    monkeypatch.setattr(report, "TABLES", {"one": lambda: Table(("a",), (("b",),))})
    page = "text\n\n<!-- bench: one -->\nold\n<!-- end -->\nrest"
    new = "text\n\n<!-- bench: one -->\n| a |\n| --- |\n| b |\n<!-- end -->\nrest"
    assert report.filled(page) == new
    assert report.filled(new) == new


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of bench/results, in a root of its own."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return folder


def test_what_was_kept_has_its_date_and_machine(results, tmp_path):
    now = tmp_path / "now"
    now.mkdir()
    (now / "nms-eval.json").write_text('{"new": true}')
    (results / "made.json").write_text('{"*": ["2026-01-01", "an old machine"]}')
    (results / "nms-eval.json").write_text('{"new": false}')
    assert report.keep(now) == 1
    assert json.loads((results / "nms-eval.json").read_text()) == {"new": True}
    assert made("nms-eval.json")[0] > "2026-01-01"
    assert made("nms-one-1000.json") == ("2026-01-01", "an old machine")
    assert not (now / "nms-eval.json").exists()


def test_a_peer_that_is_not_there_is_a_line(results, tmp_path, monkeypatch, capsys):
    (results / "made.json").write_text('{"*": ["2026-01-01", "an old machine"]}')
    missing = report.Quick("forward", (), needs=(tmp_path / "runs" / "peers" / "yolov5",))
    monkeypatch.setattr(report, "QUICK", (missing,))
    assert report.measure(["forward"], tmp_path / "now") == 0
    assert capsys.readouterr().out == (
        "forward: runs/peers/yolov5 is not there; what was measured stays: 2026-01-01 on an old machine\n"
    )


MISSING = "train: images\nval: images\nnames: [circle]\npath: {folder}\n"


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("import_ap", ["--weights", "gone.onnx", "--data", "{folder}/data.yaml"], "the folder {folder}/gone does not"),
        ("import_ap", ["--weights", "gone.onnx", "--data", "{folder}/none.yaml"], "none.yaml: there is no such file"),
        ("label_cache", ["--images", "499"], "--images 499: labels of fewer than 500 images are not cached"),
        ("label_cache", ["--repeats", "0"], "--repeats 0: must be at least 1"),
        ("label_cache", ["--show", "--out", "{folder}/none.json"], "{folder}/none.json: No such file or directory"),
    ],
)
def test_what_a_bench_cannot_measure_is_one_line(name, options, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.yaml").write_text(MISSING.format(folder=tmp_path / "gone"))
    monkeypatch.setattr(sys, "argv", [name, *(option.format(folder=tmp_path) for option in options)])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which the script adds to
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "bench" / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert left.value.code == 2 and told.format(folder=tmp_path) in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "label_cache --images 500 --repeats 1 --out {folder}/label_cache.json",
        "nms --cells objects-1000 --pairs 1 --out {folder}",
        "evaluate --images 20 --pairs 1 --out {folder}",
        "memory_format --models tiny --imgsz 64 --batch-size 1 --pairs 1 --threads 1 --out {folder}",
        "masked --low 0.9 --imgsz 128 --rounds 1 --threads 1 --out {folder}",
        "step_cost --models tiny-search --cells shared --imgsz 64 --batch-size 4 --pairs 1 --threads 1 --out {folder}",
    ],
)
def test_what_make_bench_runs_without_peers_runs_at_its_smallest(command, tmp_path, monkeypatch, capsys):
    name, *options = command.format(folder=tmp_path).split()
    assert name in {quick.bench for quick in QUICK}
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])  # as for a script, which adds to it, too
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "bench" / f"{name}.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    assert left.value.code in (0, 1), capsys.readouterr().err  # 1 where one run was not as fast as is asked
    assert list(tmp_path.glob("*.json")) and capsys.readouterr().out


def test_showing_what_benches_keep_leaves_the_process_as_it_was() -> None:
    before, surroundings = torch.get_num_threads(), dict(os.environ)
    try:
        torch.set_num_threads(3)
        report.shown.cache_clear()
        for name in ("tiny_masked", "faults"):
            report.shown(name)
        assert torch.get_num_threads() == 3
        changed = {name for name in surroundings | os.environ if surroundings.get(name) != os.environ.get(name)}
        assert changed <= {"PYTEST_CURRENT_TEST"}
    finally:
        torch.set_num_threads(before)
