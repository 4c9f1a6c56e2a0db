"""What an operator's sentence can want: the closed union of questions and orders, and examples of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from swarmx.core.control import ControlView, ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class WhySlow:
    """Why is the model slow? None: any of them."""

    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyCall:
    """Why did the call go where it went (and not, or indeed, to the replica)?"""

    call_id: str
    replica_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatChanged:
    """Which control actions were taken in the last `window_s`?"""

    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WhoScaled:
    """Who or what changed the number of the model's replicas?"""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HowIsTheModel:
    """The model's figures."""

    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question that needs no more words."""

    about: Literal["cluster", "running", "proposals", "audit", "help"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A tool call that becomes a proposal."""

    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Decide:
    """Approve or deny: answered with how to do it, for a sentence decides nothing."""

    decision: Literal["approve", "deny"]
    proposal_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unclear:
    """Understood, but for one thing; `choices` are what could be meant."""

    problem: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """Not understood; `examples` are the nearest sentences that would be."""

    examples: tuple[str, ...]


Intent = WhySlow | WhyCall | WhatChanged | WhoScaled | HowIsTheModel | Ask | Order | Decide | Unclear | Unknown


def examples(view: ControlView) -> tuple[str, ...]:
    """What can be asked and ordered, with names that exist."""
    model = next(iter(view.models), "MODEL")
    replica = next(iter(view.replicas), "REPLICA")
    return (
        f"why is {model} slow?",
        "why did call CALL_ID go to REPLICA?",
        "what changed in the last ten minutes?",
        "how is the cluster?",
        f"status of {model}",
        "what is running?",
        "show proposals",
        "is the audit intact?",
        f"who scaled {model}?",
        f"scale {model} to 2",
        f"set bounds of {model} to 1..4",
        f"drain {replica}",
        f"cordon {replica}",
        f"uncordon {replica}",
        "route by least_work",
        "scale by target_tracking",
        "undo the last change",
    )
