"""The space of architectures that a search file spans."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.structures import Fault
from models.spec import Choice, ModelSpec


@dataclass(frozen=True, eq=False)
class Architecture:
    """One subnet: the option picked for every choice, by the choice's name."""

    picks: Mapping[str, Any]

    def _key(self) -> tuple[tuple[str, str], ...]:
        # by text: as dictionary keys 1, 1.0 and True are one option, in a YAML they are three
        return tuple(sorted((name, repr(option)) for name, option in self.picks.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Architecture) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        return " ".join(f"{name}={option}" for name, option in self.picks.items())


@dataclass(frozen=True)
class SearchSpace:
    """All choices of a normalized spec, in the order of its rows.

    Where a row has a choice for each bottleneck (``16.kernel.0``, ``16.kernel.1``, ...) and its `number` is open too,
    those behind the picked number decide nothing: architectures that differ in them alone are different numbers of this
    space, with equal costs, and one network: `canonical` gives the same for all of them.
    """

    choices: tuple[Choice, ...]

    @staticmethod
    def of(spec: ModelSpec) -> SearchSpace:
        if not spec.choices:
            raise Fault(f"{spec.path}: nothing to search, no argument is left open with {{choice: [...]}}")
        return SearchSpace(spec.choices)

    @property
    def size(self) -> int:
        """How many subnets there are."""
        return math.prod(len(choice.options) for choice in self.choices)

    @property
    def hash(self) -> str:
        """A short name for exactly these choices: an architecture of another space is not one of this."""
        text = json.dumps([[choice.name, choice.options] for choice in self.choices])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, architecture: Architecture) -> None:
        """Raises `Fault` unless every choice has one of its options, and nothing else is named."""
        faults = []
        for choice in self.choices:
            if choice.name not in architecture.picks:
                faults.append(f"architecture has no pick for choice {choice.name!r}")
            else:
                try:
                    choice.index(architecture.picks[choice.name])
                except ValueError as problem:
                    faults.append(str(problem))
        known = {choice.name for choice in self.choices}
        faults += [
            f"architecture picks for unknown choice {name!r}" for name in architecture.picks if name not in known
        ]
        if faults:
            raise Fault(*faults)

    def sample(self, rng: random.Random) -> Architecture:
        """A uniform pick for every choice."""
        return Architecture({choice.name: rng.choice(choice.options) for choice in self.choices})

    def index(self, architecture: Architecture) -> int:
        """The architecture's number, 0 to size - 1: mixed radix, the last choice moving fastest."""
        number = 0
        for choice in self.choices:
            number = number * len(choice.options) + choice.index(architecture.picks[choice.name])
        return number

    def at(self, number: int) -> Architecture:
        """The architecture of a number; the inverse of `index`."""
        if not 0 <= number < self.size:
            raise Fault(f"there is no subnet {number}; this space has 0 to {self.size - 1}")
        picks: dict[str, Any] = {}
        for choice in reversed(self.choices):
            number, place = divmod(number, len(choice.options))
            picks[choice.name] = choice.options[place]
        return Architecture({choice.name: picks[choice.name] for choice in self.choices})

    def canonical(self, architecture: Architecture) -> Architecture:
        """The same network with every choice that decides nothing at its first option: equal for equal networks.

        As a key, it spares judging a network twice. It has a number of its own; the others keep theirs.
        """
        picks = {choice.name: architecture.picks[choice.name] for choice in self.choices}
        for choice in self.choices:
            row, *rest = choice.name.split(".")
            if len(rest) == 2 and int(rest[1]) >= picks.get(f"{row}.number", math.inf):  # 16.kernel.2 of two
                picks[choice.name] = choice.options[0]
        return Architecture(picks)
