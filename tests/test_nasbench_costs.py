"""The latency regression and the unit check on measurements of others, where they lie beside the repository.

Accel-NASBench: 5,138 networks of seven blocks (expansion, kernel, layers, squeeze-and-excitation) with latencies of two
FPGAs and throughputs of two GPUs. YOLOBench: latencies of YOLOs on several devices, once in seconds, once in ms.
"""

from __future__ import annotations

import csv
import json
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from data.structures import Fault
from engine.timing import Timing
from models.spec import Choice
from search.additive import fit_additive
from search.latency import Check, Key, Validation
from search.space import Architecture, SearchSpace
from search.tabulate import confirmed

TABLES = Path(__file__).resolve().parents[2] / "shared" / "nasbench"
TARGETS = ("latency_zcu102", "latency_vck190", "throughput_a100", "throughput_3090")
OPTIONS = {"e": (1, 4, 6), "k": (3, 5), "l": (1, 2, 3), "se": (False, True)}
BLOCKS = tuple(
    tuple(Choice(f"block{b}_{name}", (1, 2, 3, 4) if (b, name) == (5, "l") else o) for name, o in OPTIONS.items())
    for b in range(7)
)
DEVICES = ("nano_gpu", "openvino", "vim3", "raspi4_tflite", "orange_pi", "a40_trt")


@pytest.fixture(scope="module")
def accel(request):
    """Subnets, their milliseconds ``[networks, targets]`` and their MACs ``[networks]``."""
    path = TABLES / "accel-nasbench.tar.gz"
    if not path.exists():
        pytest.skip(f"{request.node.nodeid}: no Accel-NASBench in ../shared/nasbench")
    subnets, times, macs = [], [], []
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.name.endswith(".json"):
                continue
            one = json.load(archive.extractfile(member))
            found = [one["platform_perf"][target][f"{target.partition('_')[0]}_mean"] for target in TARGETS]
            if None not in found:  # five networks failed on a device
                subnets.append(Architecture(one["architecture"]))
                times.append([*found[:2], *(1000 / rate for rate in found[2:])])
                macs.append(one["model_info"]["macs"])
    assert len(subnets) == 5_133
    return subnets, np.array(times), np.array(macs)


def against(predicted, measured):
    """A validation of predictions; there is no second measurement, so it is as if one had given the same."""
    rows = zip(predicted, measured, strict=True)
    return Validation(tuple(Check(number, float(p), float(m), float(m)) for number, (p, m) in enumerate(rows)))


@pytest.mark.parametrize(("target", "name"), list(enumerate(TARGETS)))
def test_the_regression_predicts_networks_of_another_benchmark(accel, target, name):
    """At most 1.5 % off after 1,000 measurements; MACs alone are no latency, and are told to be none."""
    subnets, times, macs = accel
    order = np.random.default_rng(0).permutation(len(subnets))
    seen, rest = order[:1000], order[1000:2500]
    y = times[:, target]
    fitted = fit_additive(BLOCKS, [subnets[i] for i in seen], y[seen])
    found = against([fitted.of(subnets[i]) for i in rest], y[rest])
    assert found.error <= 0.015 and found.fits, name

    slope, constant = np.polyfit(macs[seen], y[seen], 1)
    counted = against(slope * macs[rest] + constant, y[rest])
    assert counted.error > 0.15 and not counted.fits, name


@pytest.mark.parametrize("device", DEVICES)
def test_seconds_where_ms_are_declared_are_refused(tmp_path, request, device):
    folder = TABLES / "yolobench"
    if not folder.is_dir():
        pytest.skip(f"{request.node.nodeid}: no YOLOBench in ../shared/nasbench")
    column = f"{device}_latency"
    seconds, ms = (
        {row["model_name"]: float(row[column]) for row in csv.DictReader(file.read_text().splitlines())}
        for file in (folder / "YOLO_latency.csv", folder / "merged_results.csv")
    )
    models = tuple(name for name in seconds if name in ms and name.endswith("_320"))[:12]
    choice = Choice("0.model", models)
    space = SearchSpace((choice,))
    rows, key = ((0, (choice,)),), Key(device, "its own", 1, 1, "float32", 320, space.hash)

    def clock(rows_alone, subnets):
        return [], [Timing(ms[one.picks["0.model"]], 0.0, 10) for one in subnets]

    def table(numbers):
        path = tmp_path / "latency.json"
        entries = [{"row": 0, "picks": {"0.model": m}, "ms": numbers[m], "iqr": None, "count": 1} for m in models]
        check = asdict(Check(0, numbers[models[0]], numbers[models[0]], numbers[models[0]]))
        content = {"unit": "ms", "key": asdict(key), "kind": "table", "fixed_ms": 0.0, "entries": entries}
        path.write_text(json.dumps(content | {"validation": {"subnets": [check]}}))
        return path

    assert confirmed(table(ms), rows, key, clock).cost.extreme(largest=False)[0] == min(ms[m] for m in models)
    with pytest.raises(Fault, match=r"says ms, (but a subnet|and has subnets) of"):
        confirmed(table(seconds), rows, key, clock)
