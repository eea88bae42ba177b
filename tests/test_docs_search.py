"""``docs/search.md`` is true: its options, files, commands and example are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from engine.config import add_options, checked, option_name
from engine.doors import option_parser, parse_options
from engine.jackknife import JACKKNIFE_GROUPS
from models.graph import normalize
from models.parse import parse_text
from search.blocks import SCRIPT
from search.config import SearchConfig
from search.find import EVOLUTION, EXHAUSTIVE
from search.front import SURE
from search.latency import ALLOWED_ERROR, SEPARABLE
from search.objective import DUAL_RATE, ENTROPY, UNDECIDED
from search.report import FILES
from search.space import SearchSpace
from search.tabulate import HELD_OUT

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "search.md").read_text()
HOST = "nc: 3\nbackbone:\n  - [-1, 1, Conv, [64, 3, 2]]\n{row}head:\n  - [-1, 1, Detect, [nc, anchors]]\n"


def rows(title: str) -> list[list[str]]:
    """The cells of the table under a title."""
    part = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def default(name: str) -> str:
    """As the table writes it: nothing for none."""
    value = SearchConfig.model_fields[name].default
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in (None, (), "") else f"`{value}`"


def test_every_option_stands_there_once_with_its_default() -> None:
    found = {cells[0]: cells[1] for cells in rows("Options")}
    assert found == {f"`{option_name(name)}`": default(name) for name in SearchConfig.model_fields}
    assert len(rows("Options")) == len(found)


def test_an_option_is_told_in_the_words_of_its_help() -> None:
    told = {cells[0]: cells[2] for cells in rows("Options")}
    for name, field in SearchConfig.model_fields.items():
        assert told[f"`{option_name(name)}`"] == (field.description or "").replace("|", "/")


def test_every_file_of_a_run_stands_there() -> None:
    assert [cells[0] for cells in rows("Files of a run")] == [f"`{name}`" for name in (*FILES, "report.html")]


def test_the_commands_are_commands() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", "").splitlines()]
    assert len(lines) == 10
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "python"
        if words[0] == "search.py":
            parser = option_parser("")
            add_options(parser, SearchConfig)
            config = checked(SearchConfig, vars(parse_options(parser, words[1:])), "--")
            assert config.cfg is None or (ROOT / config.cfg).is_file()
        else:
            assert words[:2] in (["-m", "search.report"], ["-m", "search.rank"]) or words[0] == f"blocks/{SCRIPT}"


def test_the_row_spans_what_the_page_says() -> None:
    (row,) = re.findall(r"```yaml fragment\n(.*?)\s*```", TEXT, re.DOTALL)
    space = SearchSpace.of(normalize(parse_text(HOST.format(row=f"  {row.strip()}\n"))))
    assert f"This row alone spans {space.size} subnets" in TEXT and space.size**4 == 104_976 and "104,976" in TEXT


def test_the_numbers_are_those_of_the_source() -> None:
    said = " ".join(TEXT.split())
    assert f"up to {EXHAUSTIVE:,} subnets" in said and f"`--candidates` up to {EVOLUTION}" in said
    assert f"within {SURE:g} of these errors" in said and JACKKNIFE_GROUPS == 10 and "measured ten more times" in said
    assert f"less than {UNDECIDED:g} apart".replace("0.", ".") in said
    assert f"rate {DUAL_RATE:g}".replace("0.", ".") in said and f"mu = {ENTROPY:g}".replace("0.", ".") in said
    assert f"against {HELD_OUT} random subnets" in said and f"more than {ALLOWED_ERROR:.0%}".replace("%", " %") in said
    assert SEPARABLE == 3 and "less than three times" in said


def test_links_lead_somewhere() -> None:
    for page, _, place in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", TEXT)):
        text = (ROOT / "docs" / page).read_text()
        titles = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert not place or place in titles
