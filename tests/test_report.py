"""The report of a search: made from what its folder holds, true to its files, and nothing in them becomes markup."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.structures import Fault
from engine.runs import write_csv
from models.graph import normalize, resolve
from models.parse import dump, parse
from search.config import SearchConfig
from search.costs import format_cost
from search.plots import Frame, curves, escaped, row_picks, spanned, spread, tick_texts, ticks
from search.report import UNDECIDED, kept_order, main, write_report
from search.report_data import changed, decision_text, listed, read_run
from search.report_latency import separation
from search.space import SearchSpace

ROOT = Path(__file__).resolve().parents[1]
SEARCH_FILE = ROOT / "cfg" / "models" / "tiny-seed-search.yaml"
EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "link", "input", "img", "hr"}


# ---- a folder as a search leaves it


def sample(folder: Path, supernet: str = "shared", space_file: Path = SEARCH_FILE) -> Path:
    """A search of 1,296 subnets whose numbers are invented, but hang together as real ones do."""
    (folder / "subnets").mkdir(parents=True)
    spec = resolve(normalize(parse(space_file))).spec
    space = SearchSpace.of(spec)
    rng = np.random.default_rng(3)
    config = SearchConfig(
        cfg=Path("cfg/models/tiny-seed-search.yaml"),
        data=Path("datasets/shapes/data.yaml"),
        epochs=30,
        batch_size=8,
        imgsz=160,
        budget=("macs=205M", "latency_ms=31"),
        mosaic=0.0,
        cache=False,
        supernet=supernet,
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (folder / "search.yaml").write_text(dump(spec))
    choices = [{"name": choice.name, "options": list(choice.options)} for choice in space.choices]
    images = {"weights": 720, "judging": 180, "validation": 100}
    (folder / "space.json").write_text(
        json.dumps({"hash": space.hash, "size": space.size, "choices": choices, "images": images})
    )

    # Every option has a worth and a price, so every subnet has a loss and costs.
    worth = {choice.name: rng.uniform(0, 0.05, len(choice.options)) for choice in space.choices}
    rows = []
    for number in range(space.size):
        picks = space.at(number).picks
        large = sum(picks[name] == 5 for name in picks)
        slow = sum({"relu": 0, "leaky": 0.3, "mish": 1.1}.get(pick, 0) for pick in picks.values())
        loss = 1.3 - sum(worth[c.name][c.options.index(picks[c.name])] for c in space.choices) - 0.02 * large
        rows.append(
            {
                "subnet": number,
                "loss": loss + rng.normal(0, 0.008),
                "macs": 184_268_800.0 + 9_830_400 * large,
                "params": 2_566_928.0 + 147_456 * large + 32 * (number % 3),
                "latency_table_ms": 24 + 1.4 * large + slow,
            }
        )
    write_csv(folder / "losses.csv", rows)

    # The best at every level of cost got an AP.
    kept = [row for row in rows if row["macs"] <= 205e6 and row["latency_table_ms"] <= 31]
    judged = sorted(kept, key=lambda row: row["loss"])[:28] + kept[:2]
    judged = list({row["subnet"]: row for row in judged}.values())
    for row in judged:
        row["ap"] = 0.9 - 0.4 * row["loss"] + rng.normal(0, 0.006)
    shown = []
    for row in sorted(judged, key=lambda row: row["macs"]):
        measured = row["latency_table_ms"] + rng.normal(0, 0.3)
        costs = [row["macs"], measured]
        row["latency_ms"], row["front"] = measured, 0
        shown.append((row, costs))
    for row, costs in shown:
        row["front"] = int(
            not any(o["ap"] > row["ap"] and all(a <= b for a, b in zip(c, costs, strict=True)) for o, c in shown)
        )
    front = sorted((row for row, _ in shown if row["front"]), key=lambda row: row["ap"])
    table = []
    for row, _ in shown:
        tied = [o["subnet"] for o in front if row["front"] and o["ap"] < row["ap"] < o["ap"] + 0.004]
        picks = space.at(row["subnet"]).picks
        table.append(
            {
                "subnet": row["subnet"],
                "front": row["front"],
                "ties": " ".join(map(str, tied)),
                "ap": row["ap"],
                "ap_error": round(float(rng.uniform(0.008, 0.014)), 6),
                "ap50": min(1.0, row["ap"] * 1.7),
                "loss": row["loss"],
                **{name: round(row[name], 3) for name in ("macs", "params", "latency_ms", "latency_table_ms")},
                **picks,
            }
        )
    write_csv(folder / "front.csv", table)
    best = front[-1]["subnet"]
    for row in front:
        picks = space.at(row["subnet"]).picks
        text = dump(spec.freeze(picks), f"subnet {row['subnet']}: {space.at(row['subnet'])}\njudged AP {row['ap']:.4f}")
        (folder / "subnets" / f"{row['subnet']}.yaml").write_text(text)
        (folder / "subnets" / f"{row['subnet']}.pt").write_bytes(b"weights")
        if row["subnet"] == best:
            (folder / "best.yaml").write_text(text)
            (folder / "best.pt").write_bytes(b"weights")

    # Alphas: even for the warm-up, then drifting towards what is worth more; one decision stays undecided.
    decisions = {choice.name: (choice.options, worth[choice.name]) for choice in space.choices}
    if supernet == "independent":
        decisions = {}
        for row in dict.fromkeys(choice.name.partition(".")[0] for choice in space.choices):
            kernel, act = (choice for choice in space.choices if choice.name.startswith(f"{row}."))
            options = tuple((k, a) for k in kernel.options for a in act.options)
            decisions[row] = (options, np.add.outer(worth[kernel.name], worth[act.name]).ravel())
    alphas = []
    for epoch in range(1, 31):
        for place, (name, (options, worths)) in enumerate(decisions.items()):
            moved = max(0, epoch - 9) * (0.0 if place == 0 else 1.0) * 2.2 * (np.array(worths) - np.mean(worths))
            moved = moved + (rng.normal(0, 0.01, len(options)) if epoch > 9 else 0)
            p = np.exp(moved) / np.exp(moved).sum()
            alphas += [
                {"step": 90 * epoch, "choice": name, "option": option, "alpha": float(a), "probability": float(q)}
                for option, a, q in zip(options, moved, p, strict=True)
            ]
    write_csv(folder / "alphas.csv", alphas)
    results = []
    for epoch in range(1, 31):
        fall = math.exp(-epoch / 9) + 0.02 * rng.normal()
        results.append(
            {"epoch": epoch, "step": 90 * epoch, "loss": 0.9 + 2.4 * fall, "box": 0.4 + 0.9 * fall, "obj": 0.3 + fall,
             "cls": 0.2 + 0.5 * fall, "held_out": 1.1 + 2.2 * fall if epoch > 9 else None,
             "lr": 0.004 * (1 + math.cos(math.pi * epoch / 30)) / 2, "seconds": 21.0 + rng.normal(),
             "lambda_macs": max(0.0, 1 - 0.02 * max(0, epoch - 9))}
        )  # fmt: skip
    write_csv(folder / "results.csv", results)

    entries = [
        {"row": "16", "picks": {"16.kernel": k, "16.act": a}, "ms": 1.0 + k / 5, "iqr": 0.05, "count": 50}
        for k in (3, 5) for a in ("relu", "leaky", "mish")
    ]  # fmt: skip
    tried = []
    for row in rows[::54]:
        measured = row["latency_table_ms"] * (1 + rng.normal(0, 0.02))
        tried.append(
            {"number": row["subnet"], "predicted_ms": row["latency_table_ms"], "measured_ms": measured,
             "again_ms": measured * (1 + rng.normal(0, 0.015))}
        )  # fmt: skip
    key = {"device": "a CPU", "runtime": "torch", "threads": 2, "batch": 1, "precision": "fp32", "imgsz": 160}
    latency = {
        "unit": "ms", "key": key | {"space": space.hash}, "kind": "table", "fixed_ms": 20.1, "entries": entries,
        "validation": {"subnets": tried, "error": 0.0182, "repeat_error": 0.0151, "tau": 0.912, "repeat_tau": 0.934},
        "spread_ms": 9.8, "noise_ms": 0.4,
    }  # fmt: skip
    (folder / "latency.json").write_text(json.dumps(latency))
    retrained = []
    for row in [front[-1], front[0], front[len(front) // 2]]:
        steps = [0.02, row["ap"] - 0.02, row["ap"] + 0.03 + rng.normal(0, 0.01), row["ap"] + 0.1 + rng.normal(0, 0.01)]
        states = dict(zip(("inherited", "calibrated", "fine_tuned", "retrained"), steps, strict=True))
        retrained.append({"subnet": row["subnet"], **states, **{f"{k}_ap50": 1.6 * v for k, v in states.items()}})
    write_csv(folder / "retrain.csv", retrained)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(tmp_path_factory.mktemp("runs") / "exp")


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).read_text()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The sample without some of its files."""

    def without(*names: str) -> Path:
        for path in folder.rglob("*"):
            if path.is_file() and path.name not in names and path.name != "report.html":
                target = tmp_path / "exp" / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return tmp_path / "exp"

    return without


class Reader(HTMLParser):
    """Checks that every tag is closed in its turn; collects tags, the numbers of tables, links and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.numbers: list[list[float]] = []  # of tables' rows
        self.faults: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.numbers.append([])
        if tag == "data":
            self.numbers[-1].append(float(dict(attrs)["value"] or "nan"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]


def sections(text: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def hold(text: str) -> Reader:
    """What every page has to keep: it is well formed, stands alone, and leads nowhere else."""
    reader = Reader(text)
    assert reader.faults == [] and reader.open == []
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    ids = reader.ids()
    assert len(ids) == len(set(ids))
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
    inside = [str(a["href"])[1:] for a in reader.of("a") + reader.of("use") if str(a["href"]).startswith("#")]
    assert set(inside) <= set(ids)
    facts, script = reader.scripts
    json.loads(facts)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in str(reader.of("meta")[1]["content"])
    return reader


# ---- the page


def test_the_page_is_well_formed_and_stands_alone(text: str) -> None:
    hold(text)
    assert len(text) < 1_000_000


def test_links_lead_to_files_of_the_folder(folder: Path, text: str) -> None:
    files = [str(a["href"]) for a in Reader(text).of("a") if not str(a["href"]).startswith("#")]
    assert files and all((folder / file).exists() for file in files)


def test_every_subnet_of_the_front_has_a_card_with_its_yaml_picks_and_command(folder: Path, text: str) -> None:
    cards = re.findall(r'<article class="card" id="subnet-(\d+)">(.*?)</article>', text, re.DOTALL)
    front = [row for row in rows_of(folder / "front.csv") if row["front"] == "1"]
    assert sorted(int(number) for number, _ in cards) == sorted(int(row["subnet"]) for row in front)
    for number, inside in cards:
        row = next(row for row in front if row["subnet"] == number)
        model = (folder / "subnets" / f"{number}.yaml").read_text()
        assert escaped(model) in inside
        words = re.sub("<.*?>", "", inside)
        weights = folder / "subnets" / f"{number}.pt"
        assert f"python train.py --weights {weights} --epochs 30 --name subnet-{number} --data" in words
        picked = f"{row['16.kernel']}×{row['16.kernel']} {row['16.act']}"
        assert f">{picked}</text>" in inside


def test_the_tables_hold_the_numbers_of_the_files(folder: Path, text: str) -> None:
    reader = Reader(sections(text)["front"])
    measured = ("subnet", "ap", "ap_error", "ap50", "loss", "macs", "params", "latency_ms", "latency_table_ms")
    for row in rows_of(folder / "front.csv"):
        numbers = [float(row[name]) for name in measured]
        assert reader.numbers.count(numbers) == 1 + int(row["front"])  # all judged, and the front
    reader = Reader(sections(text)["retraining"])
    for row in rows_of(folder / "retrain.csv"):
        assert [float(value) for value in row.values()] in reader.numbers


def test_costs_are_shown_as_the_search_prints_them(folder: Path, text: str) -> None:
    for row in rows_of(folder / "front.csv"):
        for metric in ("macs", "params", "latency_ms"):
            value = float(row[metric])
            assert f'<data value="{value!r}">{format_cost(metric, value)}</data>' in text
        assert f'<data value="{float(row["ap"])!r}">{float(row["ap"]):.3f}</data>' in text


def test_every_picture_has_every_judged_subnet_and_links_those_of_the_front(folder: Path, text: str) -> None:
    rows = rows_of(folder / "front.csv")
    for name, pictures in (("front", 3), ("all", 3)):
        marks = [a for _, a in Reader(sections(text)[name]).tags if "data-subnet" in a]
        assert len(marks) == pictures * len(rows)
        on = [a for a in marks if "front" in str(a["class"]).split()]
        assert len(on) == pictures * sum(row["front"] == "1" for row in rows)
        assert len([a for a in marks if "best" in str(a["class"]).split()]) == pictures


def test_a_tie_is_marked_in_pictures_tables_and_cards(folder: Path, text: str) -> None:
    tied = [row for row in rows_of(folder / "front.csv") if row["ties"]]
    assert tied
    marks = [a for _, a in Reader(sections(text)["front"]).tags if "data-subnet" in a]
    hollow = {a["data-subnet"] for a in marks if "tied" in str(a["class"]).split()}
    assert hollow == {row["subnet"] for row in tied}
    for row in tied:
        assert "ties with " in re.findall(f'id="subnet-{row["subnet"]}">(.*?)</header>', text, re.DOTALL)[0]


def test_the_headline_says_what_was_searched_and_what_came_out(folder: Path, text: str) -> None:
    words = re.sub(r"<.*?>", "", sections(text)["short"])
    front = [row for row in rows_of(folder / "front.csv") if row["front"] == "1"]
    best = max(front, key=lambda row: float(row["ap"]))
    assert "1,296 subnets, all that 8 choices in 4 rows of the network allow, were searched" in words
    assert "MACs at most 205.000M and latency at most 31 ms" in words
    judged = len(rows_of(folder / "front.csv"))
    assert f"{judged} subnets were judged, and {len(front)} of them are on the front" in words
    assert f"The best is subnet {best['subnet']}." in words
    assert "One run is an anecdote" in words and "180 judging images" in words


@pytest.mark.parametrize(
    ("file", "section", "sign"),
    [
        ("losses.csv", "all", "keeps the loss of every subnet in losses.csv"),
        ("alphas.csv", "choices", "alphas.csv is not there"),
        ("results.csv", "training", "results.csv is not there"),
        ("latency.json", "latency", "--budget latency_ms="),
        ("retrain.csv", "retraining", "--retrain 3"),
        ("config.yaml", "options", "config.yaml is not there"),
    ],
)
def test_a_missing_file_leaves_a_sentence_in_its_section(
    file: str, section: str, sign: str, text: str, copy: Callable[..., Path]
) -> None:
    found = write_report(copy(file)).read_text()
    hold(found)
    assert sign not in text and sign in sections(found)[section]
    assert "<svg" not in sections(found)[section]
    assert sections(text).keys() == sections(found).keys()


def test_without_a_front_there_is_no_result_yet(copy: Callable[..., Path]) -> None:
    found = write_report(copy("front.csv", "losses.csv", "latency.json", "retrain.csv")).read_text()
    hold(found)
    assert list(sections(found)) == ["short", "choices", "training", "options"]
    assert "No subnet has been judged yet" in found


def test_an_older_folder_without_errors_ties_and_space_still_makes_a_page(copy: Callable[..., Path]) -> None:
    folder = copy("space.json", "losses.csv", "results.csv", "latency.json", "retrain.csv")
    rows = rows_of(folder / "front.csv")
    for row in rows:
        for name in ("ties", "ap_error", "loss", "latency_table_ms"):
            del row[name]
    write_csv(folder / "front.csv", rows)
    found = write_report(folder).read_text()
    hold(found)
    assert "1,296 subnets" in found and "kept no standard errors" in found
    assert "badge tied" not in found and 'class="error"' not in found and "±" not in sections(found)["front"]


def test_a_model_file_that_cannot_be_drawn_leaves_a_list_of_rows(copy: Callable[..., Path]) -> None:
    folder = copy()
    model = (folder / "search.yaml").read_text()
    (folder / "search.yaml").write_text(model.replace("BottleneckCSP2", "AnOpOfMyOwn"))
    found = write_report(folder).read_text()
    hold(found)
    assert 'class="strip"' in found and 'id="detector"' not in found
    assert "1,296 subnets" in found  # from space.json


def test_joint_decisions_of_an_independent_supernet_are_shown(tmp_path: Path) -> None:
    folder = sample(tmp_path / "exp", supernet="independent")
    found = write_report(folder).read_text()
    hold(found)
    panels = re.findall(r"<figcaption><b>(.*?)</b>", sections(found)["choices"])
    assert panels == ["16", "21", "25", "29"]
    best = max((row for row in rows_of(folder / "front.csv") if row["front"] == "1"), key=lambda row: float(row["ap"]))
    assert f"★ {best['16.kernel']} {best['16.act']} " in found


def test_a_decision_is_called_undecided_where_its_two_likeliest_options_are_close(folder: Path, text: str) -> None:
    last: dict[str, list[float]] = {}
    for row in rows_of(folder / "alphas.csv"):
        if row["step"] == "2700":
            last.setdefault(row["choice"], []).append(float(row["probability"]))
    ranked = {name: sorted(values)[-2:] for name, values in last.items()}
    expected = [name for name, (second, first) in ranked.items() if first - second < UNDECIDED]
    captions = re.findall(r"<figcaption><b>(.*?)</b>(.*?)</figcaption>", sections(text)["choices"], re.DOTALL)
    assert [name for name, rest in captions if "undecided" in rest] == expected and "16.kernel" in expected


def test_latency_that_cannot_separate_subnets_says_so() -> None:
    assert "Latency cannot separate these" in separation(1.4, 0.5)
    assert "Latency cannot separate these" not in separation(1.5, 0.5)
    assert "3.0 times less" in separation(1.5, 0.5)


def test_a_front_of_untrained_subnets_is_called_noise(copy: Callable[..., Path]) -> None:
    folder = copy()
    rows = rows_of(folder / "front.csv")
    write_csv(folder / "front.csv", [row | {"ap": float(row["ap"]) / 100} for row in rows])
    assert "This front is noise" in write_report(folder).read_text()


def test_the_order_of_pairs_is_counted() -> None:
    values = [{"calibrated": c, "retrained": r} for c, r in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.55))]
    assert "In 2 of 3 pairs" in kept_order(list(enumerate(values)))
    assert kept_order([(0, values[0])]) == ""


# ---- nothing of a file becomes markup


def test_what_files_say_is_text_and_never_markup(copy: Callable[..., Path]) -> None:
    folder = copy()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"data": EVIL, "cfg": f'"{EVIL}', "name": f"'{EVIL}", EVIL: EVIL}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    model = (folder / "search.yaml").read_text()
    (folder / "search.yaml").write_text(model.replace("name: tiny-seed-search", f"name: '{EVIL}'"))
    for name in ("front.csv", "alphas.csv", "results.csv"):
        old = (folder / name).read_text()
        (folder / name).write_text(old.replace("mish", EVIL).replace("16.act", f"16.{EVIL}").replace("box", EVIL))
    space = (folder / "space.json").read_text().replace("mish", EVIL).replace("16.act", f"16.{EVIL}")
    (folder / "space.json").write_text(space)
    latency = json.loads((folder / "latency.json").read_text())
    latency["key"] |= {"device": EVIL, EVIL: 1}
    latency["entries"][0] |= {"row": EVIL, "picks": {EVIL: EVIL}}
    latency["validation"]["subnets"][0]["number"] = EVIL
    (folder / "latency.json").write_text(json.dumps(latency))
    best = read_run(folder).best
    for file in (folder / "best.yaml", folder / "subnets" / f"{best}.yaml"):
        file.write_text(file.read_text() + f"# </pre></details>{EVIL}\n")
    found = write_report(folder).read_text()
    reader = hold(found)
    assert len(reader.of("script")) == 2 and "alert(1)" in found
    assert "<script>alert" not in found and EVIL not in found


@given(st.text())
def test_any_text_is_escaped_to_itself(text: str) -> None:
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.handle_starttag = lambda *_: pytest.fail("a tag")  # type: ignore[method-assign]
    parser.feed(escaped(text))
    parser.close()
    assert "".join(parts) == re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


# ---- faults and the door


def test_the_door_writes_the_page_and_tells_faults(
    tmp_path: Path, copy: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: no folder of a search, it has neither config.yaml nor front.csv; runs/search/exp is one\n"
    )
    folder = copy()
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_file_that_is_not_what_its_name_says_is_a_fault(copy: Callable[..., Path]) -> None:
    folder = copy()
    for name, wrong, message in (
        ("latency.json", "{", "latency.json: not JSON: Expecting property name"),
        ("latency.json", "[1]", "latency.json: a mapping is expected here, got list"),
        ("config.yaml", "a: [", "config.yaml: not YAML: "),
        ("config.yaml", "a: !!int ''", "config.yaml: not YAML: "),
        ("results.csv", "epoch,loss\n1,much\n", "results.csv:2: loss is a number, got 'much'"),
        ("front.csv", "subnet,front,ap\n1,1,\n", "front.csv:2: a row of front.csv has a subnet and its ap"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(wrong)
        with pytest.raises(Fault) as caught:
            read_run(folder)
        assert str(caught.value).startswith(f"{folder}/{message}")
        (folder / name).write_text(before)


# ---- words, numbers, commands


def test_the_command_of_a_search_sets_what_is_not_at_its_default(folder: Path) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert " ".join(changed(config, SearchConfig.model_fields, ("exist_ok",))) == (
        "--cfg cfg/models/tiny-seed-search.yaml --data datasets/shapes/data.yaml --epochs 30 --batch-size 8 "
        "--imgsz 160 --cache off --mosaic 0.0 --budget macs=205M --budget latency_ms=31"
    )


def test_defaults_as_a_config_file_writes_them_are_defaults() -> None:
    assert changed(SearchConfig().model_dump(mode="json"), SearchConfig.model_fields, ()) == []


def test_words() -> None:
    assert [listed(parts) for parts in ([], ["a"], ["a", "b"], [1, 2, 3])] == ["", "a", "a and b", "1, 2 and 3"]
    assert decision_text("(3, 'relu', 1)") == "3 relu 1" and decision_text("mish") == "mish"
    picks = {"16.kernel": "5", "16.act": "mish", "16.number": "2"}
    assert row_picks(list(picks), picks) == "5×5 mish ×2"
    each = {"7.kernel.0": "3", "7.kernel.1": "5", "7.kernel.2": "5", "7.act": "mish", "7.number": "2"}
    assert row_picks(list(each), each) == "3·5 mish ×2"


# ---- geometry


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 9))
def test_ticks_are_round_few_and_inside(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert 1 <= len(found) <= most
    assert all(low - 1e-6 * width <= value <= low + width + 1e-6 * width for value in found)
    assert len(set(tick_texts(found))) == len(found)


def test_ticks_by_hand() -> None:
    assert ticks(0, 1) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert tick_texts(ticks(0.4, 0.45, 3)) == ["0.400", "0.425", "0.450"]
    assert tick_texts(ticks(180, 1000, 5)) == ["250", "500", "750", "1000"]


@given(st.lists(st.floats(0, 200), min_size=1, max_size=12))
def test_labels_are_spread_in_their_order(heights: list[float]) -> None:
    moved = spread(heights, 12, 0, 150)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    assert all(moved[b] - moved[a] >= 12 - 1e-9 for a, b in zip(order, order[1:], strict=False))
    assert min(moved) >= -1e-9 and max(moved) <= max(150, 12 * (len(heights) - 1)) + 1e-9


def test_a_frame_places_its_corners() -> None:
    frame = Frame(10, 20, 110, 220, (0, 5), (-1, 1))
    assert [frame.at(0, -1), frame.at(5, 1), frame.at(2.5, 0)] == [(10, 220), (110, 20), (60, 120)]
    assert spanned([3.0]) == (3.0 - 0.24, 3.0 + 0.24) and spanned([0.0]) == (-1.0, 1.0)


def test_curves_of_one_point_and_of_one_height_can_be_drawn() -> None:
    from search.plots import Series

    for points in (((1.0, 0.5),), ((1.0, 0.0), (2.0, 0.0))):
        assert "nan" not in curves([Series("a", points)], "label", "step", y=(0.0, 1.0))


def test_what_is_read_of_a_folder(folder: Path) -> None:
    run: Any = read_run(folder)
    assert run.size == 1296 and run.metrics == ("macs", "latency_ms") and run.images["judging"] == 180
    assert [one.costs["macs"] for one in run.front] == sorted(one.costs["macs"] for one in run.front)
