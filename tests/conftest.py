"""What every test stands on: one thread a process, drawn examples that repeat, and real data where it is at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from hypothesis import settings

from models.registry import OPS

# The tests run in parallel processes; threads inside them would only get in each other's way. One thread also keeps
# the order of every sum. Programs that a test starts inherit the environment.
torch.set_num_threads(1)
cv2.setNumThreads(0)
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="Agg")
CACHE = tempfile.TemporaryDirectory(prefix="oneshot-yolo-tests-")  # instead of the user's own; gone at the end
os.environ["XDG_CACHE_HOME"] = CACHE.name

# No deadline: a busy machine is no bug. Derandomized: the same examples on every run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def ops_of_the_program() -> Iterator[None]:
    """Ops that a test brings are gone after it."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


@pytest.fixture
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real data beside the repository; where it is absent, the test that asks is skipped by name."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"{request.node.nodeid}: no real data in ../shared/data")
    return REAL_DATA
