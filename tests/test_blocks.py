"""Latency on another device: this machine plays it, with the script alone; and what comes back damaged is refused."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

from data.structures import Fault
from models.cost import row_cost
from models.graph import normalize, resolve
from models.parse import parse_text
from search import blocks, latency
from search.blocks import BLOCKS, SCRIPT, TIMINGS, WEIGHTS, check_device, export_blocks, foreign_table
from search.costs import cost_tables
from search.device_timer import row_names
from search.space import Architecture, SearchSpace

TEXT = """
nc: 2
activation: relu
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Bottleneck, [32, {expansion: {choice: [0.5, 0.25]}}]]
  - [-1, 1, Conv, [16, {kernel: {choice: [1, 3, 5]}, act: {choice: [relu, mish]}}]]
head:
  - [-1, 1, Classify, [nc]]
"""
DEVICE = "Another device"


@pytest.fixture(scope="module")
def graph():
    return resolve(normalize(parse_text(TEXT)))


@pytest.fixture(scope="module")
def timings(graph, tmp_path_factory) -> Path:
    """What the script wrote, run where nothing of ours can be imported."""
    folder = tmp_path_factory.mktemp("other") / "blocks"
    export_blocks(graph, 64, folder, progress=False)
    words = [sys.executable, "-E", SCRIPT, "--device", DEVICE, "--threads", "1", "--seconds", "0.5"]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout == f"{TIMINGS}: device {DEVICE!r}, 1 threads\n"
    return folder / TIMINGS


def read(path: Path, graph, imgsz: int = 64, named: str = DEVICE, runtime: str = "onnxruntime"):
    return foreign_table(path, graph, imgsz, named=named, runtime=runtime)


def changed(path: Path, folder: Path, **what) -> Path:
    content = json.loads(path.read_text())
    content["key"] |= what.pop("key", {})
    other = folder / "changed.json"
    other.write_text(json.dumps(content | what))
    return other


def test_the_script_needs_nothing_of_ours() -> None:
    tree = ast.parse(Path(blocks.__file__).with_name(SCRIPT).read_text(), feature_version=(3, 8))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert found - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}
    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert froms == {"__future__", "typing"}


def test_the_whole_road_to_another_device_and_back(graph, timings: Path, tmp_path: Path) -> None:
    table = read(timings, graph)
    key = table.key
    assert (key.device, key.runtime, key.threads, key.imgsz) == (DEVICE, "onnxruntime", 1, 64)
    assert len(table.entries) == 2 + 6 and len(table.validation.subnets) == 6 and table.spread_ms >= 0
    content = json.loads(timings.read_text())
    assert {f"row3-{n}.onnx" for n in range(6)} <= set(content["timings"]) and len(content["again"]) == 6
    assert table.lines()[0].startswith(f"latency on {DEVICE}, onnxruntime, 1 threads, 64 px: ")
    for number in range(12):
        measured = content["timings"][f"subnet{number}.onnx"]["ms"]
        assert table.cost.of(SearchSpace.of(graph.spec).at(number)) == pytest.approx(measured, rel=5)
    latency.write_table(tmp_path / "latency.json", table)  # as a run keeps it, and goes on with it
    assert read(tmp_path / "latency.json", graph) == table
    assert read(timings, graph, named=f"{DEVICE}, 1 threads").key == key


def test_all_files_share_their_weights(timings: Path) -> None:
    folder = timings.parent
    content = json.loads((folder / BLOCKS).read_text())
    files = [one["file"] for one in content["rows"] + content["subnets"]]
    assert len(files) == 8 + 12 and all((folder / name).stat().st_size < 40_000 for name in files)
    open_weights = 4 * 2 * 16 * 32 * (1 + 9 + 25)  # of three kernels, with each of two activations
    assert (folder / WEIGHTS).stat().st_size > open_weights
    assert (folder / SCRIPT).read_text() == Path(blocks.__file__).with_name(SCRIPT).read_text()


def test_rows_and_subnets_are_as_wide_as_they_say(graph, timings: Path) -> None:
    """Counted in the files: kernels times the cells of their maps are the multiply-adds of the tables."""
    import onnx

    folder = timings.parent
    content = json.loads((folder / BLOCKS).read_text())
    cells = {node.index: 1 if node.op.is_head else (64 // node.output.stride) ** 2 for node in graph.nodes}

    def macs(name: str, row: int | None = None) -> int:
        """Initializers of a subnet are called by their rows."""
        values = onnx.load(folder / name, load_external_data=False).graph.initializer
        rows = [int(value.name.partition("/")[0]) if row is None else row for value in values]
        return sum(math.prod(v.dims) * cells[at] for v, at in zip(values, rows, strict=True) if len(v.dims) in (2, 4))

    counted = {}
    for one in content["rows"]:
        counted[one["row"], Architecture(one["picks"])] = found = macs(one["file"], one["row"])
        assert found == row_cost(graph.nodes[one["row"]], one["picks"], 64).macs > 0
    space, fixed, table = SearchSpace.of(graph.spec), set(), cost_tables(graph, 64)["macs"]
    for one in content["subnets"]:
        subnet = space.at(one["number"])
        of_rows = sum(counted[name] for name in row_names(graph, subnet) if name in counted)
        assert macs(one["file"]) == table.of(subnet)
        fixed.add(table.of(subnet) - of_rows)
    assert fixed == {table.fixed} and len(set(counted.values())) == 2 + 3


def test_a_folder_that_holds_something_is_left_alone(graph, timings: Path) -> None:
    with pytest.raises(Fault, match="is not empty; give a new folder"):
        export_blocks(graph, 64, timings.parent)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"named": "Pi"}, f"was measured with device '{DEVICE}, 1 threads', wanted 'Pi'"),
        ({"named": f"{DEVICE}, 4 threads"}, f"device '{DEVICE}, 1 threads', wanted '{DEVICE}, 4 threads'"),
        ({"runtime": "torch"}, "was measured with runtime 'onnxruntime', wanted 'torch'"),
        ({"imgsz": 96}, "was measured with imgsz 64, wanted 96"),
    ],
)
def test_another_device_runtime_or_size_is_refused(graph, timings: Path, how, said: str) -> None:
    with pytest.raises(Fault) as problem:
        read(timings, graph, **how)
    assert problem.value.lines == (f"{timings}: {said}",) or said in problem.value.lines[0]


def test_another_unit_or_space_is_refused(graph, timings: Path, tmp_path: Path) -> None:
    content = json.loads(timings.read_text())
    seconds = {n: {**one, "ms": one["ms"] / 1000} for n, one in content["timings"].items()}
    again = {n: {**one, "ms": one["ms"] / 1000} for n, one in content["again"].items()}
    for what, said in (
        ({"unit": "s"}, "its unit is 's', wanted 'ms'"),
        ({"key": {"space": "0123"}}, "was measured with space '0123'"),
        ({"timings": seconds, "again": again}, "the numbers are in another unit"),
        ({"timings": {}}, "is no whole timings.json|the numbers are in another unit|has no time of"),
        ({"timings": seconds | {"row3-0.onnx": {"ms": -1, "iqr": 0, "count": 1}}}, "wanted a number over 0"),
        ({"key": {"threads": "four"}}, "its number of threads is 'four'"),
    ):
        with pytest.raises(Fault, match=said):
            read(changed(timings, tmp_path, **what), graph)
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(Fault, match="neither timings.json of time_blocks.py nor latency.json of a search"):
        read(tmp_path / "none.json", graph)


def test_no_device_passes_for_another_unsaid(timings: Path) -> None:
    with pytest.raises(Fault) as problem:
        check_device(timings, "", torch.device("cpu"))
    assert problem.value.lines == (
        f"{timings}: was measured on {DEVICE!r}; --latency-device {DEVICE!r} takes it for networks that will run there",
    )
    check_device(timings, DEVICE, torch.device("cpu"))
