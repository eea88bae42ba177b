"""The space of architectures: its size, its numbers, and what it refuses."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.structures import Fault
from models.graph import normalize, resolve
from models.parse import dump, parse, parse_text
from models.spec import Choice
from search.costs import cost_tables
from search.space import Architecture, SearchSpace

EACH = """
nc: 2
anchors: [[10, 13, 16, 30]]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - {{name: deep, from: -1, number: {number}, op: C3, args: [8, {{kernel: {{choice: [3, 5]}}, per_bottleneck: true}}]}}
head:
  - [-1, 1, Detect, [nc, anchors]]
"""
SPACE = SearchSpace((Choice("a", (3, 5)), Choice("b", ("relu", "mish", "leaky")), Choice("c", (1, 2, 3, 4))))

# what a YAML can hold in a list of options; 1, 1.0 and True are three options
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, 1.0, 0.5, 1e-3]), st.text(max_size=3)
)
OPTIONS = st.one_of(SCALARS, st.lists(SCALARS, max_size=3).map(tuple))


def distinct(values: list[Any]) -> list[Any]:
    """What a Choice takes for different."""
    found: list[Any] = []
    for value in values:
        if not any(value == other and type(value) is type(other) for other in found):
            found.append(value)
    return found


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    lists = draw(st.lists(st.lists(OPTIONS, min_size=2, max_size=4).map(distinct), min_size=1, max_size=4))
    choices = [Choice(f"{row}.argument", tuple(options)) for row, options in enumerate(lists) if len(options) > 1]
    return SearchSpace((*choices, Choice("last.act", ("relu", "mish"))))


def each(number: str = "{choice: [1, 3, 2]}") -> SearchSpace:
    return SearchSpace.of(normalize(parse_text(EACH.format(number=number))))


def test_the_tiny_spaces_have_the_sizes_that_their_files_say():
    assert SearchSpace.of(normalize(parse("cfg/models/tiny-seed-search.yaml"))).size == 1_296
    assert SearchSpace.of(normalize(parse("cfg/models/tiny-search.yaml"))).size == 104_976
    assert each().size == 2**3 * 3


@given(spaces())
def test_architectures_and_numbers_are_one_to_one(space):
    every = [space.at(number) for number in range(space.size)]
    assert len(set(every)) == space.size
    assert [space.index(architecture) for architecture in every] == list(range(space.size))


@given(spaces(), spaces())
def test_spaces_with_other_choices_have_another_hash(one, other):
    same = [(c.name, repr(c.options)) for c in one.choices] == [(c.name, repr(c.options)) for c in other.choices]
    assert (one.hash == other.hash) == same


def test_the_last_choice_moves_fastest():
    assert [str(SPACE.at(number)) for number in (0, 1, 4, 12)] == [
        "a=3 b=relu c=1",
        "a=3 b=relu c=2",
        "a=3 b=mish c=1",
        "a=5 b=relu c=1",
    ]


def test_the_order_of_picks_does_not_matter():
    one, other = Architecture({"a": 3, "b": "relu", "c": 2}), Architecture({"c": 2, "b": "relu", "a": 3})
    assert one == other and hash(one) == hash(other)
    assert one != Architecture({"a": 3, "b": "relu", "c": 2.0}) and one != "a=3 b=relu c=2"


def test_an_architecture_of_another_space_is_refused():
    other = SearchSpace((Choice("a", (3, 7)), *SPACE.choices[1:]))
    with pytest.raises(Fault, match="has no option 7"):
        SPACE.check(other.at(2 * 3 * 4 - 1))
    with pytest.raises(Fault) as problem:
        SPACE.check(Architecture({"a": 7, "b": "relu", "d": 1}))
    assert problem.value.lines == (
        "choice 'a' has no option 7; options are [3, 5]",
        "architecture has no pick for choice 'c'",
        "architecture picks for unknown choice 'd'",
    )
    with pytest.raises(Fault, match=r"^choice 'a' has no option 3\.0; options are \[3, 5\]$"):
        SPACE.check(Architecture({"a": 3.0, "b": "relu", "c": 1}))


def test_there_are_no_numbers_beyond_the_space():
    for number in (-1, 24):
        with pytest.raises(Fault, match=f"^there is no subnet {number}; this space has 0 to 23$"):
            SPACE.at(number)


def test_a_file_without_choices_has_nothing_to_search():
    with pytest.raises(Fault, match="nothing to search"):
        SearchSpace.of(normalize(parse("cfg/models/tiny.yaml")))


def test_a_sample_is_an_architecture_of_the_space():
    rng = random.Random(0)
    found = {SPACE.index(SPACE.sample(rng)) for _ in range(400)}
    assert found == set(range(24))


# ---- a choice a bottleneck


def test_choices_of_bottlenecks_that_are_not_there_decide_nothing():
    """Kernels of three bottlenecks, of which 1, 3 or 2 are there: 2 + 8 + 4 networks among 24 architectures."""
    space = each()
    assert [choice.name for choice in space.choices] == [
        "deep.kernel.0",
        "deep.kernel.1",
        "deep.kernel.2",
        "deep.number",
    ]
    spec = normalize(parse_text(EACH.format(number="{choice: [1, 3, 2]}")))
    files: dict[str, set[Architecture]] = {}
    for number in range(space.size):
        architecture = space.at(number)
        canonical = space.canonical(architecture)
        space.check(canonical)
        assert space.canonical(canonical) == canonical
        files.setdefault(dump(spec.freeze(architecture.picks)), set()).add(canonical)
    assert len(files) == 14 and all(len(same) == 1 for same in files.values())
    assert len(set.union(*files.values())) == 14


def test_all_choices_count_where_the_number_is_fixed():
    space = each("3")
    assert space.size == 8
    assert all(space.canonical(space.at(number)) == space.at(number) for number in range(8))
    assert all(SPACE.canonical(SPACE.at(number)) == SPACE.at(number) for number in range(24))


def test_equal_networks_cost_the_same():
    space = each()
    tables = cost_tables(resolve(normalize(parse_text(EACH.format(number="{choice: [1, 3, 2]}")))), 32)
    for architecture in map(space.at, range(space.size)):
        for table in tables.values():
            assert table.of(architecture) == table.of(space.canonical(architecture))
