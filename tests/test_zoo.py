"""Our files of well-known detectors are these detectors: counts of the programs that published them.

``tests/golden/zoo.csv`` holds, for each file of ``cfg/models``, what the program's own code counted for its own file:
parameters, parameters with every batch norm folded into the convolution before it, multiply-adds (GMACs at 640 px) and
strides.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest
import torch

from models.cost import count_params, network_costs, totals
from models.fuse import fuse
from models.graph import resolve
from models.heads.dfl import V10Detect
from models.network import Network
from models.ops.conv import Conv
from models.ops.rep import RepConv
from models.parse import parse

ROOT = Path(__file__).resolve().parents[1]
CFG = ROOT / "cfg" / "models"
with (ROOT / "tests" / "golden" / "zoo.csv").open(newline="") as file:
    GOLDEN = {row["file"]: row for row in csv.DictReader(file)}


@cache
def network(file: str) -> Network:
    with torch.device("meta"):
        return Network(resolve(parse(CFG / file)))


def test_every_published_model_has_its_counts():
    """A file with another one's rows and some of its own (a branch, a search) is held against nothing."""
    ours = {path.name for path in CFG.glob("yolo*.yaml") if "# Held against the count of" in path.read_text()}
    assert ours == set(GOLDEN)


@pytest.mark.parametrize("file", GOLDEN)
def test_a_file_says_what_it_is_held_against(file):
    """The numbers in its first lines are those of the golden row."""
    text, row = (CFG / file).read_text(), GOLDEN[file]
    assert f"{int(row['params']):,} parameters and {float(row['gmacs_640']):.4g} GMACs at 640 px" in text
    assert f"strides {row['strides'].replace(' ', ', ')}" in text
    assert f"# Held against the count of {row['counted_from']}.\n" in text


@pytest.mark.parametrize("file", GOLDEN)
def test_parameters_and_strides_are_those_of_the_published_model(file):
    row = GOLDEN[file]
    assert count_params(network(file)) == int(row["params"])
    assert " ".join(map(str, network(file).head.strides)) == row["strides"]


@pytest.mark.parametrize("file", GOLDEN)
def test_fused_parameters_are_those_of_the_published_model(file):
    """Counted by hand as well: a norm's scale and shift go, its convolution gets a bias. Of a `RepConv` the smaller
    convolution goes, with its bias, and the norm of its input; of a v10Detect the head that only trains.
    """
    net, wanted = network(file), int(GOLDEN[file]["params_fused"])
    norms = sum(block.bn.num_features for block in net.modules() if isinstance(block, Conv))
    gone = 0
    for block in net.modules():
        if isinstance(block, RepConv):
            small = block.conv2.conv
            gone += count_params(small) + small.out_channels + (0 if block.bn is None else count_params(block.bn))
    if isinstance(net.head, V10Detect):
        trains = (net.head.cv2, net.head.cv3)
        gone += sum(count_params(part) for part in trains)
        gone -= sum(block.bn.num_features for part in trains for block in part.modules() if isinstance(block, Conv))
    assert count_params(net) - 2 * norms + norms - gone == wanted
    assert count_params(fuse(net)) == wanted


@pytest.mark.parametrize("file", GOLDEN)
def test_macs_are_those_of_the_published_model(file):
    params, macs = totals(network_costs(network(file).graph, 640))
    assert params == int(GOLDEN[file]["params"])
    assert macs / 1e9 == pytest.approx(float(GOLDEN[file]["gmacs_640"]), rel=1e-3)


@pytest.mark.parametrize("file", GOLDEN)
def test_a_published_model_reads_without_notes(file):
    assert resolve(parse(CFG / file)).notes == ()
