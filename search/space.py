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


@dataclass(frozen=True)
class Architecture:
    """One subnet: the option picked for every choice, by the choice's name."""

    picks: Mapping[str, Any]

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.picks.items(), key=lambda item: item[0])))

    def __str__(self) -> str:
        return " ".join(f"{name}={option}" for name, option in self.picks.items())


@dataclass(frozen=True)
class SearchSpace:
    """All choices of a normalized spec, in the order of its rows."""

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
            elif architecture.picks[choice.name] not in choice.options:
                pick = architecture.picks[choice.name]
                faults.append(f"choice {choice.name!r} has no option {pick!r}; options are {list(choice.options)}")
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
            number = number * len(choice.options) + choice.options.index(architecture.picks[choice.name])
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

    def to_json(self, architecture: Architecture) -> str:
        """Canonical text, with the hash of the space it belongs to."""
        picks = {choice.name: architecture.picks[choice.name] for choice in self.choices}
        return json.dumps({"space": self.hash, "picks": picks}, separators=(",", ":"))

    def from_json(self, text: str) -> Architecture:
        """Raises `Fault` for an architecture of another space."""
        content = json.loads(text)
        if content.get("space") != self.hash:
            raise Fault(f"this architecture belongs to space {content.get('space')!r}, this one is {self.hash!r}")
        lists = {name: tuple(pick) if isinstance(pick, list) else pick for name, pick in content["picks"].items()}
        architecture = Architecture(lists)
        self.check(architecture)
        return architecture
