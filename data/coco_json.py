"""COCO's instances JSON as a file: its three lists, the names of its categories, and the line that each entry is in."""

from __future__ import annotations

import json
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any

from data.structures import Fault

SECTIONS = ("images", "annotations", "categories")
SPACE = " \t\n\r"


def read_json(path: Path) -> dict[str, list[Any]]:
    """The lists ``images``, ``annotations`` and ``categories``; what is in them is not checked here.

    Raises:
        Fault: when the file is missing, is no JSON, or has not these three lists.
    """
    try:
        root = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Fault(f"{path}: there is no such file; COCO's instances JSON is right") from None
    except json.JSONDecodeError as problem:
        raise Fault(f"{path}:{problem.lineno}: not JSON: {problem.msg}") from None
    except (ValueError, RecursionError):  # not in Unicode, a number of thousands of digits, lists in lists
        raise Fault(f"{path}: not JSON; COCO's instances JSON is right") from None
    for section in SECTIONS:
        if not isinstance(root, dict) or not isinstance(root.get(section), list):
            raise Fault(f"{path}: there is no list {section!r}; COCO's instances JSON has {', '.join(SECTIONS)}")
    return {section: root[section] for section in SECTIONS}


def category_names(path: Path) -> tuple[str, ...]:
    """The names of all categories in the order of their ids.

    Raises:
        Fault: when there is none, or one is without an id and a name of its own.
    """
    found: dict[int, str] = {}
    for number, category in enumerate(read_json(path)["categories"]):
        if not is_category(category):
            raise Fault(f"{path}:{line_of(path, 'categories', number)}: a category is {category}; {CATEGORY}")
        if category["id"] in found or category["name"] in found.values():
            raise Fault(
                f"{path}:{line_of(path, 'categories', number)}: category {category['name']!r}, id {category['id']}: "
                "the name or the id is given twice; list the names in the data YAML, or correct the file"
            )
        found[category["id"]] = category["name"]
    if not found:
        raise Fault(f"{path}: there is no category; list the classes in the data YAML: names: [circle, square]")
    return tuple(found[number] for number in sorted(found))


CATEGORY = 'as {"id": 1, "name": "circle"} is right'


def is_category(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and is_integer(entry.get("id"))
        and isinstance(entry.get("name"), str)
        and bool(entry["name"].strip())
    )


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def line_of(path: Path, section: str, number: int) -> int:
    """The line, from 1, in which entry `number` of a section starts."""
    return lines_of(path, section)[number]


def lines_of(path: Path, section: str) -> list[int]:
    """The line, from 1, in which each entry of a section starts. The file must be one that `read_json` read.

    A parser forgets where it read something, so this walks through the file again, entry by entry.
    """
    text = path.read_text(encoding=json.detect_encoding(path.read_bytes()[:4]))
    scan = JSONDecoder().raw_decode
    place = _skip(text, _skip(text, 0) + 1)  # behind the first brace
    lines: list[int] = []
    while text[place] != "}":
        key, place = scan(text, place)
        place = _skip(text, _skip(text, place) + 1)  # behind the colon
        if key == section and text[place] == "[":
            lines, line, counted = [], 1, 0  # a key given twice: the last counts, as it does for the parser
            place = _skip(text, place + 1)
            while text[place] != "]":
                line, counted = line + text.count("\n", counted, place), place
                lines.append(line)
                place = _skip(text, scan(text, place)[1])
                if text[place] == ",":
                    place = _skip(text, place + 1)
            place += 1
        else:
            place = scan(text, place)[1]
        place = _skip(text, place)
        if text[place] == ",":
            place = _skip(text, place + 1)
    return lines


def _skip(text: str, place: int) -> int:
    """The next place that holds no white space."""
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place
