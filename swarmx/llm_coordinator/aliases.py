"""Opaque names: what a language model calls the models, replicas and changes that it is told about."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import msgspec

from swarmx.core.control import Scalar

Kind = Literal["model", "replica", "proposal"]

ELSEWHERE = "another"  # something that has no alias now
# Which kind of thing the argument of a tool names; every other text argument is a word of our own.
NAMED: Mapping[str, Kind] = {"model": "model", "replica_id": "replica", "proposal_id": "proposal"}

_IN_TEXT = re.compile(r"\b[mrc][1-9][0-9]?\b")


class Aliases(msgspec.Struct, frozen=True, kw_only=True):
    """Alias to real name, by kind: `m1` a model, `r1` a replica, `c1` a proposed change. Real names stay here."""

    model: dict[str, str] = {}
    replica: dict[str, str] = {}
    proposal: dict[str, str] = {}

    def names(self, kind: Kind) -> dict[str, str]:
        """Alias to real name."""
        match kind:
            case "model":
                return self.model
            case "replica":
                return self.replica
            case "proposal":
                return self.proposal

    def of(self, kind: Kind, name: object) -> str:
        """The alias of a real name, `another` when it has none."""
        return next((alias for alias, real in self.names(kind).items() if real == name), ELSEWHERE)

    def told(self, text: str) -> str:
        """The text with real names in place of aliases, for people."""
        real = {**self.model, **self.replica, **self.proposal}
        return _IN_TEXT.sub(lambda found: real.get(found[0], found[0]), text)

    def shown(self, arguments: Mapping[str, Any], words: Collection[str]) -> dict[str, Scalar]:
        """Arguments of a tool as a language model may see them: numbers, `words` of our own, and aliases."""
        seen: dict[str, Scalar] = {}
        for key, value in arguments.items():
            if key not in words:
                continue
            if key in NAMED:
                seen[key] = self.of(NAMED[key], value)
            elif isinstance(value, bool | int | float):
                seen[key] = value
            elif isinstance(value, str):
                seen[key] = value if value in words else ELSEWHERE
        return seen


def numbered(letter: str, names: Iterable[str]) -> dict[str, str]:
    """Aliases `letter`1, `letter`2, ... in the order of the names."""
    return {f"{letter}{number}": name for number, name in enumerate(names, 1)}
