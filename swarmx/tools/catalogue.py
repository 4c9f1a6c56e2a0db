"""What tools must know of the policies that exist; handed in, because tools and agents do not know each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from swarmx.core.nouns import Decision

PolicyKind = Literal["routing", "scaling"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """A parameter of a policy: what it is without further words, and the range that is legal, ends included."""

    default: float
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInfo:
    """One policy of a catalogue."""

    help: str
    parameters: Mapping[str, ParameterInfo] = field(default_factory=dict)

    def full(self, parameters: Mapping[str, float]) -> dict[str, float]:
        """All parameters: those given, the others at their defaults."""
        return {name: info.default for name, info in self.parameters.items()} | dict(parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """The policies by kind and name. `validate_policy(kind, name, parameters)` raises ConfigError for a combination
    that its agent would not accept; `explain` puts a routing decision into sentences."""

    policies: Mapping[PolicyKind, Mapping[str, PolicyInfo]]
    validate_policy: Callable[[PolicyKind, str, Mapping[str, float]], None]
    explain: Callable[[Decision], list[str]]
