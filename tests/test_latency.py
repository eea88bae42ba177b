"""Timing on this device, the table made of it, and what a table of something else is told."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import engine.latency
import engine.timing
import search.device_timer
import search.tabulate
from data.structures import Fault
from engine.export import PACKAGES
from engine.latency import check_runtime, device_name, image_of, measure_ms, onnx_runs, threads_used
from engine.timing import Timing, interleaved
from models.graph import combinations, normalize, resolve
from models.network import Network
from models.parse import parse_text
from models.spec import Choice
from search.additive import fit_additive
from search.costs import CostTable, cost_tables
from search.device_timer import covering, device_timer
from search.latency import Check, Key, LatencyTable, Validation, parsed, write_table
from search.space import Architecture, SearchSpace
from search.tabulate import confirmed, drawn, key_of, latency_table, open_rows, read_table, tabulate

CPU = torch.device("cpu")
SMALL = """
nc: 2
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, {choice: [1, 2]}, Bottleneck, [8, {kernel: {choice: [3, 5]}, expansion: {choice: [0.5, 0.25]}}]]
head:
  - [[-1, 0], 1, Concat, [1]]
  - [-1, 1, Conv, [16, 3, 2, {act: {choice: [relu, mish]}}]]
  - [-1, 1, Detect, [nc, anchors]]
"""
SMALLEST = """
nc: 1
anchors: [[10, 13]]
backbone:
  - [-1, 1, Conv, [4, 3, 2, {act: {choice: [relu, mish]}}]]
head:
  - [-1, 1, Detect, [nc, anchors]]
"""
# three open rows of a device that is made up: 2 x 3, 4 and 3 options
ROWS = (
    (1, (Choice("1.kernel", (3, 5)), Choice("1.act", ("relu", "leaky", "mish")))),
    (4, (Choice("4.number", (1, 2, 3, 4)),)),
    (6, (Choice("6.kernel", (3, 5, 7)),)),
)
SPACE = SearchSpace(tuple(choice for _, choices in ROWS for choice in choices))
KEY = Key("made up", "torch", 2, 1, "float32", 320, SPACE.hash)
REST = 5.0
TRUTH = CostTable(
    "latency_ms",
    REST,
    (
        (ROWS[0][1], np.array([[1.0, 1.1, 1.6], [2.0, 2.1, 2.9]])),
        (ROWS[1][1], np.array([1.0, 2.0, 3.0, 4.0])),
        (ROWS[2][1], np.array([0.5, 1.5, 3.0])),
    ),
)


def made_up(whole, alone=None, noise=0.0, asked=None):
    """A device: milliseconds of a subnet by `whole`, of a row alone by `alone` (default: its part of the truth)."""
    rng = np.random.default_rng(0)

    def row_ms(index, picks):
        choices, table = next((c, t) for (i, c), (_, t) in zip(ROWS, TRUTH.rows, strict=True) if i == index)
        return float(table[tuple(c.index(picks[c.name]) for c in choices)])

    def timing(ms):
        return Timing(ms * (1 + noise * rng.standard_normal()), 0.01, 50)

    def timed(rows, subnets):
        if asked is not None:
            asked.append((len(rows), len(subnets)))
        of_rows = [timing((alone or (lambda _, ms: ms))(index, row_ms(index, picks))) for index, picks in rows]
        return of_rows, [timing(whole(one)) for one in subnets]

    return timed


@pytest.fixture(scope="module")
def small():
    return resolve(normalize(parse_text(SMALL)))


# ---- taking turns


class Clock:
    """`time.perf_counter` for things that say how long they take."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def run(self, takes):
        """Something that takes so many seconds: a number, or the next one of an iterator."""

        def runs():
            self.now += takes if isinstance(takes, float) else next(takes)

        return runs


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(engine.timing, "time", clock)
    return clock


def test_medians_and_quartiles_are_those_of_the_timed_rounds(clock):
    slow_start = iter([9.0, 9.0] + [0.001 * k for k in range(1, 12)])
    fast, slow = interleaved([clock.run(0.002), clock.run(slow_start)], rounds=11, warmup=2, progress=False)
    assert fast == Timing(pytest.approx(2.0), pytest.approx(0.0), 11)
    assert slow == Timing(pytest.approx(6.0), pytest.approx(5.0), 11)  # 1 to 11 ms: quartiles 3.5 and 8.5


def test_every_round_runs_each_once_in_an_order_of_its_own(clock):
    order = []
    runs = [lambda name=name: order.append(name) for name in range(5)]
    interleaved(runs, rounds=20, warmup=2, progress=False)
    rounds = [tuple(order[at : at + 5]) for at in range(0, len(order), 5)]
    assert len(rounds) == 22 and all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
    assert len(set(rounds)) > 15


def test_a_slow_network_is_timed_less_often_but_never_under_the_fewest(clock):
    (found,) = interleaved([clock.run(10.0)], seconds=60.0, progress=False)
    assert found.count == 10 and clock.now == (2 + 10) * 10.0
    (found,) = interleaved([clock.run(10.0)], seconds=60.0, fewest=3, progress=False)
    assert found.count == 5
    (found,) = interleaved([clock.run(1.0)], seconds=60.0, progress=False)
    assert 10 < found.count < 50
    (found,) = interleaved([clock.run(0.01)], seconds=60.0, progress=False)
    assert found.count == 50


# ---- this device


def test_the_device_has_a_name_that_is_no_path():
    name = device_name(CPU)
    assert name and "/" not in name and "\n" not in name
    assert threads_used(CPU) == torch.get_num_threads() >= 1


def test_an_absent_runtime_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(engine.latency, "find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(Fault) as problem:
        measure_ms([], 32, device=CPU, runtime="onnxruntime")
    assert str(problem.value) == (
        "--runtime onnxruntime needs onnx, onnxscript, onnxruntime, not installed here: pip install -e '.[export]'"
    )
    with pytest.raises(Fault, match="--runtime tflite: is none; torch or onnxruntime would be right"):
        check_runtime("tflite", CPU)


def test_networks_are_timed_as_they_are_deployed(small, monkeypatch):
    seen = []
    monkeypatch.setattr(
        engine.latency, "interleaved", lambda runs, **_: [seen.append(run) or Timing(1, 0, 1) for run in runs]
    )
    space = SearchSpace.of(small.spec)
    network = Network(resolve(small.spec.freeze(space.at(0).picks)))
    assert measure_ms([network, nn.Identity()], 32, device=CPU, progress=False) == [1, 1]
    deployed = seen[0].func.__self__
    assert seen[0].func.__name__ == "predict", "decoding counts"
    assert network.training and not deployed.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.layers[0].modules())
    assert deployed.layers[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_subnet_of_shared_rows_is_the_subnet(small, monkeypatch):
    """Counted: what the timer runs has the multiply-adds of the row, or of the whole subnet, that was asked for."""
    counted = []

    def count(runs, **_):
        for run in runs:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                run()
            counted.append(counter.get_total_flops() // 2)
        return [Timing(float(macs), 0.0, 1) for macs in counted[-len(runs) :]]

    monkeypatch.setattr(search.device_timer, "interleaved", count)
    space, macs = SearchSpace.of(small.spec), cost_tables(small, 32)["macs"]
    subnets = [space.at(number) for number in range(space.size)]
    blocks = [(node.index, picks) for node in small.nodes if node.choices for picks in combinations(node.choices)]
    of_rows, of_subnets = device_timer(small, 32, device=CPU, progress=False)(blocks, subnets)
    assert [t.ms for t in of_subnets] == [macs.of(one) for one in subnets]
    assert [t.ms for t in of_rows] == [float(v) for _, table in macs.rows for v in table.ravel()]


def test_few_subnets_hold_every_row_with_every_pick(small):
    blocks = [(node.index, picks) for node in small.nodes if node.choices for picks in combinations(node.choices)]
    found = covering(small, blocks)
    assert len(found) == 8
    assert all(any(picks.items() <= one.picks.items() for one in found) for _, picks in blocks)
    assert covering(small, []) == []


def test_a_table_is_measured_on_this_device_and_comes_back(small, tmp_path):
    table = latency_table(small, 32, device=CPU, progress=False, seconds=0.0)
    assert table.key == key_of(small, 32, CPU, "torch")
    assert len(table.entries) == 10 and table.kind in ("table", "regression")
    assert len(table.validation.subnets) == 8, "half of a space of 16"
    assert table.cost.metric == "latency_ms" and np.isfinite(table.cost.extreme(largest=True)[0])
    if table.fixed_ms > 0:  # rows of a few microseconds on a busy machine need not add up
        write_table(tmp_path / "latency.json", table)
        assert parsed(tmp_path / "latency.json", open_rows(small), table.key) == table


needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="the extra `export` is not installed"
)


@needs_onnx
def test_in_onnxruntime_a_network_of_joined_rows_is_the_network(small):
    torch.manual_seed(0)
    picks = {"1.kernel": 5, "1.expansion": 0.25, "1.number": 2, "3.act": "mish"}
    network = Network(resolve(small.spec.freeze(picks))).eval()
    (run,) = onnx_runs([network], 32, CPU, progress=False)
    with torch.no_grad():
        wanted = network.predict(image_of(32, CPU))
    for y, z in zip(run(), wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(y), z, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_a_table_in_onnxruntime():
    graph = resolve(normalize(parse_text(SMALLEST)))
    table = latency_table(graph, 32, device=CPU, runtime="onnxruntime", progress=False, seconds=0.0)
    assert table.key.runtime == "onnxruntime" and [entry.row for entry in table.entries] == [0, 0]
    assert np.isfinite(table.fixed_ms)


# ---- a table


def test_rows_alone_make_the_table_where_they_add_up():
    asked = []
    table = tabulate(SPACE, ROWS, made_up(TRUTH.of, asked=asked), KEY)
    assert table.kind == "table" and table.usable and table.separates
    assert asked == [(6 + 4 + 3, 8 + 2 * 24)]
    assert table.fixed_ms == pytest.approx(REST)
    assert [len(array.ravel()) for _, array in table.cost.rows] == [6, 4, 3]
    for number in range(SPACE.size):
        assert table.cost.of(SPACE.at(number)) == pytest.approx(TRUTH.of(SPACE.at(number)))
    assert table.validation.error == pytest.approx(0, abs=1e-9) and table.validation.tau == 1.0
    assert table.spread_ms == pytest.approx(1.9 + 3.0 + 2.5)
    assert table.entries[0].row == 1 and table.entries[0].picks == {"1.kernel": 3, "1.act": "relu"}
    assert (table.entries[0].ms, table.entries[0].iqr, table.entries[0].count) == (1.0, 0.01, 50)


def test_what_a_call_costs_beside_the_work_goes_into_the_rest():
    table = tabulate(SPACE, ROWS, made_up(TRUTH.of, alone=lambda index, ms: ms + 0.7), KEY)
    assert table.kind == "table" and table.fixed_ms == pytest.approx(REST - 3 * 0.7)
    assert table.cost.extreme(largest=False)[0] == pytest.approx(REST + 2.5)


def test_where_rows_alone_mislead_a_regression_takes_over():
    asked = []
    alone = lambda index, ms: ms * (0.1 if index == 1 else 6.0 if index == 6 else 1.0)  # noqa: E731
    table = tabulate(SPACE, ROWS, made_up(TRUTH.of, alone=alone, noise=0.005, asked=asked), KEY)
    assert table.kind == "regression" and table.usable
    assert asked[1] == (0, 48 + 2 * 24), "all 72 subnets that there are: 24 of them held out"
    for number in range(SPACE.size):
        assert table.cost.of(SPACE.at(number)) == pytest.approx(TRUTH.of(SPACE.at(number)), rel=0.03)
    assert all(entry.iqr is None and entry.count > 0 for entry in table.entries)
    assert min(entry.ms for entry in table.entries if entry.row == 4) == 0.0


def test_latencies_that_do_not_add_up_are_told():
    """A device that runs the rows side by side: what counts is the longest of them, and all of it if it is odd."""

    def longest(one):
        parts = [float(t[tuple(c.index(one.picks[c.name]) for c in cs)]) for cs, t in TRUTH.rows]
        odd = (one.picks["4.number"] + one.picks["6.kernel"] // 2 + (one.picks["1.kernel"] == 5)) % 2
        return 1.0 + (sum(parts) * 3 if odd else max(parts))

    table = tabulate(SPACE, ROWS, made_up(longest), KEY)
    assert not table.usable and table.validation.error > 0.05
    assert any("do not add up row by row" in line for line in table.lines())


def test_latencies_inside_the_noise_are_told():
    flat = lambda one: 20.0 + 0.01 * TRUTH.of(one)  # noqa: E731
    table = tabulate(SPACE, ROWS, made_up(flat, alone=lambda index, ms: 0.01 * ms, noise=0.01), KEY)
    assert not table.separates
    said = table.lines()[-1]
    assert said.startswith("note: latency cannot separate these: the space spreads over ")
    assert said.endswith("; --budget macs=... counts what is exact")
    quiet = tabulate(SPACE, ROWS, made_up(flat, alone=lambda index, ms: 0.01 * ms), KEY)
    assert quiet.separates and not any("note" in line for line in quiet.lines())


def test_what_a_search_prints_has_units_and_the_repetition_beside_it():
    checks = tuple(Check(n, 10.0 + n, 10.2 + n, 10.1 + n) for n in range(4))
    table = replace(tabulate(SPACE, ROWS, made_up(TRUTH.of), KEY), validation=Validation(checks))
    first, *rest = table.lines()
    assert first == "latency on made up, torch, 2 threads, 320 px: 7.5 to 14.9 ms, the sum of rows timed alone"
    assert rest == [
        "4 random subnets                    error    tau",
        "----------------------------------  -----  -----",
        "table against measurement           1.7%   1.000",
        "measurement against its repetition  0.9%   1.000",
    ]


def test_a_space_of_too_many_rows_starts_with_the_regression(monkeypatch):
    monkeypatch.setattr(search.tabulate, "MOST_ROWS", 12)
    asked = []
    table = tabulate(SPACE, ROWS, made_up(TRUTH.of, asked=asked), KEY)
    assert table.kind == "regression" and table.usable and asked == [(0, 48 + 2 * 24)]


def test_the_smallest_space_has_a_table():
    choice = Choice("4.number", (1, 2))
    space = SearchSpace((choice,))
    timed = lambda rows, subnets: (  # noqa: E731
        [Timing(float(picks["4.number"]), 0.0, 10) for _, picks in rows],
        [Timing(3.0 + one.picks["4.number"], 0.0, 10) for one in subnets],
    )
    table = tabulate(space, ((4, (choice,)),), timed, KEY)
    assert table.kind == "table" and table.fixed_ms == 3.0 and len(table.validation.subnets) == 1


def test_held_out_subnets_are_drawn_once_each_and_the_same_again():
    big = SearchSpace(tuple(Choice(f"{row}.kernel", (1, 3, 5, 7)) for row in range(40)))  # 4^40
    found = drawn(big, 100, random.Random(3))
    assert len(set(found)) == 100 and found == drawn(big, 100, random.Random(3))
    assert len(set(drawn(SPACE, 1000, random.Random(0)))) == SPACE.size


def test_validation_by_hand():
    check = Validation((Check(0, 11.0, 10.0, 10.5), Check(1, 18.0, 20.0, 19.0), Check(2, 33.0, 30.0, 30.0)))
    assert check.error == pytest.approx(0.1) and check.repeat_error == pytest.approx((0.05 + 0.05 + 0) / 3)
    assert check.noise_ms == pytest.approx(0.5) and check.tau == check.repeat_tau == 1.0
    assert not check.fits, "10 % is more than 5 %, and more than a repetition"
    loud = Validation(tuple(replace(one, again_ms=one.measured_ms * 1.2) for one in check.subnets))
    assert loud.fits, "a repetition is no nearer"
    assert not Validation(tuple(replace(one, predicted_ms=20.0 - one.number * 0.1) for one in loud.subnets)).fits


# ---- regression


def test_an_additive_truth_is_found_again():
    subnets = [SPACE.at(number) for number in random.Random(0).sample(range(SPACE.size), 45)]
    fitted = fit_additive([choices for _, choices in ROWS], subnets, [TRUTH.of(one) for one in subnets])
    for number in range(SPACE.size):
        assert fitted.of(SPACE.at(number)) == pytest.approx(TRUTH.of(SPACE.at(number)), rel=1e-3)
    assert all(array.min() == 0 for _, array in fitted.rows)


def test_a_prior_that_is_right_stays():
    subnets = [SPACE.at(number) for number in range(0, SPACE.size, 9)]
    fitted = fit_additive([choices for _, choices in ROWS], subnets, [TRUTH.of(one) + 2 for one in subnets], TRUTH)
    for number in range(SPACE.size):
        assert fitted.of(SPACE.at(number)) == pytest.approx(TRUTH.of(SPACE.at(number)) + 2)


def test_a_prior_is_stretched_row_by_row():
    factors = {1: 0.1, 4: 1.0, 6: 6.0}
    rows = tuple((choices, factors[index] * t) for (index, choices), (_, t) in zip(ROWS, TRUTH.rows, strict=True))
    subnets = [SPACE.at(number) for number in random.Random(0).sample(range(SPACE.size), 14)]
    values = [TRUTH.of(one) for one in subnets]
    alone, helped = (
        np.mean([abs(f.of(SPACE.at(k)) / TRUTH.of(SPACE.at(k)) - 1) for k in range(SPACE.size)])
        for f in (fit_additive([c for c, _ in rows], subnets, values, p) for p in (None, CostTable("", 0.0, rows)))
    )
    assert helped < 0.01 and helped < alone / 3, "fewer subnets than entries: what rows take alone tells the rest"


def test_rows_of_very_many_options_are_fitted_by_pairs():
    choices = tuple(Choice(f"3.kernel.{at}", (1, 3, 5)) for at in range(8))  # 6,561 combinations
    space, rng = SearchSpace(choices), random.Random(0)
    truth = lambda one: 5.0 + sum(kernel * (at + 1) for at, kernel in enumerate(one.picks.values()))  # noqa: E731
    subnets = drawn(space, 100, rng)
    fitted = fit_additive([choices], subnets, [truth(one) for one in subnets])
    others = drawn(space, 50, rng)
    assert np.mean([abs(fitted.of(one) / truth(one) - 1) for one in others]) < 0.05


def test_noise_is_averaged_over_many_subnets():
    rng = np.random.default_rng(0)
    subnets = [SPACE.at(number) for number in range(SPACE.size)]
    values = [TRUTH.of(one) * (1 + 0.03 * rng.standard_normal()) for one in subnets]
    fitted = fit_additive([choices for _, choices in ROWS], subnets, values)
    errors = [abs(fitted.of(one) / TRUTH.of(one) - 1) for one in subnets]
    assert np.mean(errors) < 0.015


# ---- the file


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "latency.json"
    write_table(path, tabulate(SPACE, ROWS, made_up(TRUTH.of), KEY))
    return path


def changed(path, **changes):
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = value(content[name]) if callable(value) else value
    path.write_text(json.dumps(content))
    return path


def test_a_table_comes_back_as_it_was(written):
    table = tabulate(SPACE, ROWS, made_up(TRUTH.of), KEY)
    assert confirmed(written, ROWS, KEY, made_up(TRUTH.of)) == table
    content = json.loads(written.read_text())
    assert list(content) == ["unit", "key", "kind", "fixed_ms", "entries", "validation", "spread_ms", "noise_ms"]
    assert content["unit"] == "ms" and content["key"]["device"] == "made up"
    assert content["entries"][0] == {
        **{"row": 1, "picks": {"1.kernel": 3, "1.act": "relu"}, "ms": 1.0, "iqr": 0.01, "count": 50}
    }
    assert list(content["validation"]) == ["subnets", "error", "repeat_error", "tau", "repeat_tau"]
    assert list(content["validation"]["subnets"][0]) == ["number", "predicted_ms", "measured_ms", "again_ms"]


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("device", "another", "was measured with device 'made up', wanted 'another'"),
        ("runtime", "onnxruntime", "was measured with runtime 'torch', wanted 'onnxruntime'"),
        ("threads", 8, "was measured with threads 2, wanted 8"),
        ("batch", 8, "was measured with batch 1, wanted 8"),
        ("precision", "float16", "was measured with precision 'float32', wanted 'float16'"),
        ("imgsz", 640, "was measured with imgsz 320, wanted 640"),
        ("space", "0123456789ab", f"was measured with space '{SPACE.hash}', wanted '0123456789ab'"),
    ],
)
def test_a_table_of_something_else_is_refused(written, name, other, said):
    with pytest.raises(Fault) as problem:
        parsed(written, ROWS, replace(KEY, **{name: other}))
    assert str(problem.value) == f"{written}: {said}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unit": "s"}, "its unit is 's', wanted 'ms'"),
        ({"kind": "guess"}, "its kind is 'guess', wanted 'table' or 'regression'"),
        ({"fixed_ms": float("nan")}, "fixed_ms is nan ms, wanted a number"),
        ({"fixed_ms": -1e3}, "says ms, and has subnets of -"),
        ({"entries": lambda e: [e[0] | {"ms": -1.0}, *e[1:]]}, "an entry of row 1 is -1.0 ms, wanted a number that is"),
        ({"entries": lambda e: e[:-1]}, "has no entry for row 6 with 6.kernel=7, and lacks 1 of 13"),
        ({"entries": lambda e: [{"row": 1}, *e]}, "is no whole latency table; 'picks' is missing"),
        ({"key": {}}, "is no latency table; "),
        ({"fixed_ms": 1e9}, "says ms, and has subnets of 1e+09 to 1e+09; 0.001 to 1e+06 ms can be believed"),
    ],
)
def test_a_table_that_cannot_be_true_is_refused(written, change, said):
    with pytest.raises(Fault) as problem:
        parsed(changed(written, **change), ROWS, KEY)
    assert str(problem.value).startswith(f"{written}: {said}")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", '{"unit": "ms", "key": 7}', '{"unit": "ms", "key": {"device": 1}}']
)
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(Fault, match="is no latency table"):
        parsed(path, ROWS, KEY)


def test_a_table_without_held_out_subnets_is_refused(written):
    with pytest.raises(Fault, match="is no whole latency table; it was held against no subnets"):
        parsed(changed(written, validation={"subnets": []}), ROWS, KEY)


def test_seconds_that_are_called_milliseconds_are_refused(written):
    seconds = lambda e: [one | {"ms": one["ms"] / 1000} for one in e]  # noqa: E731
    changed(written, entries=seconds, fixed_ms=lambda ms: ms / 1000)
    with pytest.raises(Fault) as problem:
        confirmed(written, ROWS, KEY, made_up(TRUTH.of))
    assert str(problem.value) == (
        f"{written}: says ms, but a subnet of 0.0075 ms by the table took 7.5 ms here just now; "
        f"it has another unit, or this device was busy when one of the two was measured"
    )


def test_the_table_of_this_device_is_checked_against_its_clock(small, tmp_path, monkeypatch):
    space, key = SearchSpace.of(small.spec), key_of(small, 32, CPU, "torch")
    timed = lambda rows, subnets: ([Timing(1.0, 0.0, 10)] * len(rows), [Timing(9.0, 0.0, 10)] * len(subnets))  # noqa: E731
    table = tabulate(space, open_rows(small), timed, key)
    write_table(tmp_path / "latency.json", table)
    monkeypatch.setattr(search.tabulate, "device_timer", lambda *_, **__: timed)
    assert read_table(tmp_path / "latency.json", small, 32, device=CPU) == table
    with pytest.raises(Fault, match="imgsz 32, wanted 64"):
        read_table(tmp_path / "latency.json", small, 64, device=CPU)
    assert isinstance(table, LatencyTable) and Architecture(table.entries[0].picks)
