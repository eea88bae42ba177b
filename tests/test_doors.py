"""Doors: what the user did wrong is told in lines, with an exit code; runs: what they leave on disk is whole."""

from __future__ import annotations

import _thread
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data.structures import Fault
from engine.config import TrainConfig, option_name, read_options, save_config, train_config
from engine.doors import door, option_parser, parse_device, parse_options
from engine.runs import append_csv, atomically, draw_curves, new_run, read_csv, table, write_csv

ROOT = Path(__file__).resolve().parents[1]


GPU_FULL = "the GPU's memory is full; a smaller --batch-size or --imgsz takes less\n"


def raising(problem: BaseException) -> int:
    @door
    def main(argv: Sequence[str] | None = None) -> int:
        raise problem

    return main([])


@pytest.mark.parametrize(
    ("problem", "code", "told"),
    [
        (Fault("a.yaml:3: wrong", "a.yaml:4: wrong too"), 2, "a.yaml:3: wrong\na.yaml:4: wrong too\n"),
        (FileNotFoundError(2, "No such file or directory", "gone.yaml"), 2, "gone.yaml: No such file or directory\n"),
        (OSError("the disk sulks"), 2, "the disk sulks\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), 2, GPU_FULL),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("stopped; goes on with: x"), 130, "stopped; goes on with: x\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_what_the_user_did_becomes_lines_and_a_code(
    problem: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(problem) == code
    assert capsys.readouterr().err == told


def test_a_thread_that_dies_as_it_starts_is_silent_and_any_other_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python's threads begin: where a worker's death is raised in `Thread.start`, they end by a KeyError."""
    names = []
    monkeypatch.setattr(sys, "unraisablehook", lambda problem: names.append(problem.object.__name__))

    def _bootstrap_inner() -> None:
        del {}["itself"]

    def another() -> None:
        del {}["itself"]

    def main(argv: Sequence[str] | None = None) -> None:
        for thread in (_bootstrap_inner, another, _bootstrap_inner):
            _thread.start_new_thread(thread, ())
        while not names:
            time.sleep(0.01)
        time.sleep(0.1)

    before = sys.unraisablehook
    assert door(main)([]) == 0 and sys.unraisablehook is before
    assert names == ["another"]


def test_our_own_mistake_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())


def test_a_door_without_a_result_leaves_with_zero() -> None:
    assert door(lambda argv: None)([]) == 0


def test_an_unknown_option_is_told_with_the_nearest_one() -> None:
    parser = option_parser("x")
    parser.add_argument("--epochs")
    parser.add_argument("--data")
    with pytest.raises(Fault) as caught:
        parse_options(parser, ["--epoch", "3", "--data", "d.yaml", "--zzz=1"])
    assert caught.value.lines == (
        "--epoch: there is no such option; did you mean '--epochs'?",
        "--zzz: there is no such option",
    )
    with pytest.raises(Fault, match="stray"):
        parse_options(parser, ["stray"])
    assert parse_options(parser, ["--epochs", "3"]).epochs == "3"


def test_a_device_that_is_absent_is_a_fault() -> None:
    assert parse_device("cpu").type == "cpu"
    assert parse_device("").type in ("cpu", "cuda")
    for absent in ("99", "cuda:99", "tpu", "0,99"):
        with pytest.raises(Fault, match="cpu"):
            parse_device(absent)


def test_every_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [new_run(tmp_path / "runs", "exp") for _ in range(3)]
    assert [folder.name for folder in folders] == ["exp", "exp2", "exp3"]
    assert new_run(tmp_path / "runs", "exp", exist_ok=True) == folders[0]
    (tmp_path / "runs" / "note").write_text("")
    with pytest.raises(Fault, match="not a folder"):
        new_run(tmp_path / "runs", "note", exist_ok=True)
    with pytest.raises(Fault, match="is a file"):
        new_run(tmp_path / "runs" / "note", "exp")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with atomically(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.suffix == ".txt"
    with pytest.raises(ZeroDivisionError), atomically(path) as temporary:
        temporary.write_text("half of the sec")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_rows_come_back_from_a_results_file_and_a_cut_off_row_does_not(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    assert read_csv(path) == []
    append_csv(path, {"epoch": 1, "ap": None})
    append_csv(path, {"epoch": 2, "ap": 0.5})
    assert read_csv(path) == [{"epoch": "1", "ap": ""}, {"epoch": "2", "ap": "0.5"}]
    with open(path, "a") as file:
        file.write("3")
    assert len(read_csv(path)) == 2
    write_csv(path, read_csv(path)[:1])
    append_csv(path, {"epoch": 2, "ap": 0.25})
    assert path.read_text().split() == ["epoch,ap", "1,", "2,0.25"]
    draw_curves(tmp_path / "results.png", read_csv(path), [["ap"], ["epoch", "missing"]])
    assert (tmp_path / "results.png").stat().st_size > 1000


def test_a_table_is_aligned_numbers_to_the_right() -> None:
    assert table([("circle", 0.5, 12), ("box", math.nan, 3)], ("class", "AP", "images")).splitlines() == [
        "class      AP  images",
        "------  -----  ------",
        "circle  0.500      12",
        "box         -       3",
    ]
    assert table([], ("class", "AP")) == "class  AP\n-----  --"


def test_every_wrong_option_is_told_in_one_go() -> None:
    with pytest.raises(Fault) as caught:
        train_config({"epochs": "ten", "momentun": 0.1, "batch_size": 0}, "--")
    assert [line.split(":")[0] for line in caught.value.lines] == ["--epochs", "--batch-size", "--momentun"]
    assert "did you mean 'momentum'?" in caught.value.lines[2]
    with pytest.raises(Fault, match="--epochs"):
        train_config({"epochs": 0}, "--")


def test_options_survive_their_file(tmp_path: Path) -> None:
    config = TrainConfig(data=Path("a.yaml"), lr0=1e-5, cache="off", name="no", close_mosaic=None)
    save_config(tmp_path / "config.yaml", config)
    assert train_config(read_options(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr0: 1e-3\nmossaic: 1", "hyp.yaml:2: there is no option 'mossaic'; did you mean 'mosaic'?"),
        ("lr0: 1\nlr0: 2", "hyp.yaml:2: lr0 is given twice"),
        ("lr0: [1]", "hyp.yaml:1: lr0 is one value"),
        ("- lr0", "hyp.yaml:1: options are lines"),
        ("lr0: [", "hyp.yaml: not YAML"),
    ],
)
def test_a_wrong_options_file_is_told_by_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text(text)
    with pytest.raises(Fault) as caught:
        read_options(path)
    assert told in str(caught.value)


def test_scientific_numbers_in_a_file_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "hyp.yaml"
    path.write_text("lr0: 1e-3\nname: no\ncache: false\n")
    config = train_config(read_options(path))
    assert (config.lr0, config.name, config.cache) == (0.001, "no", "off")


def test_every_option_says_what_it_is() -> None:
    for name, field in TrainConfig.model_fields.items():
        assert field.description, option_name(name)


PAGES = """
import resource, sys, torch
from engine.doors import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(8):
    if step == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(4 * 2**20) for _ in range(6)]  # 16 MiB each
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="what glibc does by itself")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    """Pages that the system had to clear in five steps of 96 MiB, 4 KiB each at most."""
    command = [sys.executable, "-c", PAGES, "keep"]  # 123,000 without
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000
