"""What bench/faults.py takes for a clear end, and for a loss."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from bench.faults import Ended, Place, Strike, Whole, cpu_seconds, lost

BARS = (
    "\r                                          \r",
    "detect: 0image [00:00, ?image/s]",
    "supernet:  50%|#####     | 6/12 [00:01<00:01,  5.02step/s, epoch=2, loss=.3]",
)


@pytest.mark.parametrize("bar", BARS)
def test_a_bar_of_progress_is_no_line(bar):
    ended = Ended("train", 2, "", f"{bar}\r{bar}last.pt: is cut off\n", 1.0)
    assert ended.clear and ended.lines == ["last.pt: is cut off"]


def test_an_end_is_clear_by_its_code_and_its_lines():
    assert not Ended("train", 1, "", "a line\n", 1.0).clear
    assert Ended("detect", 1, "", "a line\n", 1.0).clear
    assert not Ended("train", 2, "", "", 1.0).clear
    assert not Ended("train", 2, "", "Traceback (most recent call last):\n", 1.0).clear
    assert not Ended("train", 2, "", "one\ntwo\nthree\n", 1.0).clear


@pytest.fixture
def struck(tmp_path: Path) -> Strike:
    """A strike at detect.py, whose undisturbed run has a table of three rows and two files of labels."""
    whole = tmp_path / "whole"
    whole.mkdir()
    left = {"predictions.csv": b"a\n1\n2\n3\n", "predictions.json": b"[1, 2, 3]", "0.txt": b"x", "1.txt": b"y"}
    (tmp_path / "exp").mkdir()
    return Strike(Place(tmp_path), "detect", Whole(whole, 1.0, left, 9), tmp_path, random.Random(0))


def test_the_beginning_of_what_an_undisturbed_run_leaves_is_no_loss(struck):
    for name, content in {"predictions.csv": "a\n1\n", "predictions.json": "[1, 2]", "1.txt": "y"}.items():
        (struck.folder / name).write_text(content)
    assert lost(struck, Ended("detect", -9, "", "", 1.0)) == ""


@pytest.mark.parametrize(
    ("name", "content"), [("predictions.csv", "a\n2\n"), ("predictions.json", "[2]"), ("1.txt", ""), ("2.txt", "z")]
)
def test_anything_else_is(struck, name, content):
    (struck.folder / name).write_text(content)
    assert lost(struck, Ended("detect", -9, "", "", 1.0)) == f"{name} is another one"


def test_cpu_seconds_are_those_of_the_process():
    used = cpu_seconds(os.getpid())
    assert 0 <= time.process_time() - used < 5 or not Path("/proc/self/stat").exists()
