"""docs/architecture.md names every module, and no function that is not there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = ("data", "models", "engine", "search")
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(ROOMS)})(?:\.\w+)+)(?<!\.py)`", PAGE)))


def rows_of(room: str) -> str:
    """The lines of the table of rooms that are about one of them."""
    lines = PAGE[PAGE.index("| room |") :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"| `{room}/` |"))
    rest = next(number for number, line in enumerate(lines[first + 1 :], first + 1) if not line.startswith("| |"))
    return "\n".join(lines[first:rest])


@pytest.mark.parametrize("room", ROOMS)
def test_the_table_of_rooms_names_every_module_and_no_other(room):
    there = {path.name for path in (ROOT / room).glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.parent.name}/" for path in (ROOT / room).glob("*/__init__.py")}
    named = re.findall(r"`([\w/]+(?:\.py|/))`", rows_of(room).removeprefix(f"| `{room}/` |"))
    assert {name for name in named if "/" not in name[:-1]} == there
    assert all((ROOT / room / name).exists() for name in named)


def test_the_journeys_name_many_functions():
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_journeys_is_there(name):
    room, module, *inside = name.split(".")
    thing = importlib.import_module(f"{room}.{module}")
    for part in inside:
        assert hasattr(thing, part), name
        thing = getattr(thing, part)
