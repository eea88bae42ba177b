"""Every example of ``docs/yaml.md`` runs, in the order in which a reader meets it, and prints what the page says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from models import graph, parse
from models.__main__ import COMMANDS, main
from models.dialects import DIALECTS
from models.graph import load_graph, resolve
from models.ops.primitives import ACTIVATIONS
from models.parse import TOP_KEYS, parse_text
from models.registry import OPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "yaml.md"
TEXT = PAGE.read_text()
HOST = "nc: 3\nbackbone:\n  - [-1, 1, Conv, [64, 3, 2]]\n{rows}head:\n  - [-1, 1, Detect, [nc, anchors]]\n"


@dataclass(frozen=True)
class Block:
    """A fenced piece of the page. A first line such as ``# first.yaml`` names the file that it is."""

    line: int
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        named = re.match(r"# (\w+\.\w+)\n", self.text)
        return named[1] if named else None


def blocks() -> Iterator[Block]:
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", TEXT, re.MULTILINE):
        yield Block(TEXT[: found.start()].count("\n") + 1, found[1], found[2])


BLOCKS = list(blocks())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every file that the page shows, without the line that names it, so that places are the page's."""
    monkeypatch.chdir(tmp_path)
    for block in BLOCKS:
        if block.file:
            Path(block.file).write_text(block.text.partition("\n")[2])
    return tmp_path


def alike(shown: str, printed: str) -> bool:
    """Line for line; ``...`` at the end of a line of the page stands for any rest of it."""
    wanted, lines = shown.splitlines(), printed.splitlines()
    return len(wanted) == len(lines) and all(
        line.startswith(want.removesuffix("...")) if want.endswith("...") else line == want
        for want, line in zip(wanted, lines, strict=True)
    )


def test_every_block_is_of_a_kind_that_is_run():
    assert {block.kind for block in BLOCKS} == {"yaml", "yaml fragment", "yaml wrong", "python", "console", ""}
    assert [block.line for block in BLOCKS if block.kind in ("yaml", "yaml wrong", "python") and not block.file] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "yaml"], ids=lambda block: block.file)
def test_a_model_of_the_page_is_a_model(block, folder):
    assert load_graph(block.file, trust_ops=True).notes == ()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "yaml fragment"], ids=lambda block: str(block.line))
def test_rows_of_the_page_are_rows(block):
    resolve(parse_text(HOST.format(rows=block.text)))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "console"], ids=lambda block: str(block.line))
def test_a_command_of_the_page_prints_what_stands_there(block, folder, capsys):
    for command in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, shown = command.partition("\n")
        *program, _, _ = words = shlex.split(line)[:3] + [""] * 2
        assert words[:3] == ["python", "-m", "models"], program
        main(shlex.split(line)[3:])
        captured = capsys.readouterr()
        assert alike(shown, captured.out + captured.err), captured.out + captured.err


def test_an_op_of_this_program_that_the_page_shows_is_that_op():
    (shown,) = [block.text.partition("\n")[2] for block in BLOCKS if block.file == "cib.py"]
    imports, _, written = shown.partition("\n\n\n")
    ours = (Path(parse.__file__).parent / "ops" / "cib.py").read_text()
    assert written and written in ours
    wanted = {name for line in imports.splitlines() for name in re.findall(r"\w+", line.partition(" import ")[2])}
    assert wanted and wanted <= set(re.findall(r"\w+", ours[: ours.index("@register_op")]))


def test_the_two_rows_that_are_said_to_be_the_same_are_the_same():
    (fragment,) = [block for block in BLOCKS if block.kind == "yaml fragment"]
    _, one, two, _ = resolve(parse_text(HOST.format(rows=fragment.text))).nodes
    assert dict(one.arguments) == dict(two.arguments)


def test_the_page_names_every_key_op_activation_dialect_and_command():
    words = set(re.findall(r"[\w.-]+", TEXT))
    assert words >= set(OPS) | set(ACTIVATIONS) | set(DIALECTS) | set(COMMANDS) | set(TOP_KEYS)


def test_the_page_shows_the_signature_of_conv():
    assert [block.text for block in BLOCKS if not block.kind] == [f"{OPS['Conv']}\n"]


def test_the_page_states_the_limits():
    limits = TEXT[TEXT.index("Nothing in a file is ever executed") : TEXT.index("## Commands")]
    assert [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\d", limits)] == [
        parse.LARGEST_FILE,
        parse.LARGEST_TREE,
        parse.DEEPEST_TREE,
        parse.MOST_ROWS,
        parse.MOST_SOURCES,
        graph.MOST_BLOCKS,
        graph.MOST_CHANNELS,
        graph.LARGEST_STRIDE,
        graph.MOST_COMBINATIONS,
        graph.MOST_COMBINATIONS_IN_ALL,
    ]
    assert f"up to {parse.MOST_FAULTS} of them" in TEXT


def test_links_inside_the_page_lead_somewhere():
    titles = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    places = {title.lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= places
