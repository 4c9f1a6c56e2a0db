"""A definition made ready to run: compiled templates, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from swarmx.workflows.nodes import AnyNode, WorkflowSpec
from swarmx.workflows.templates import Template


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node, compiled. `needs` are the siblings that must be finished before it.

    `templates` holds the compiled fields by name, those of a branch's bodies with the body's number behind it
    ("when[0]"); in `args` of a tool or sub-workflow, every text is a Template. A map, loop or sub-workflow has one of
    `bodies`, a branch one a case. The signals that the node waits for are `opening` before anything of it is done, and
    `closing` after its bodies.
    """

    id: str
    node: AnyNode
    needs: tuple[str, ...]
    templates: dict[str, Template]
    args: dict[str, Any] = field(default_factory=dict)
    bodies: tuple[Body, ...] = ()
    opening: frozenset[str] = frozenset()
    closing: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The nodes of one scope, in the order of the definition; `dependents` inverts `needs`.

    `outputs` are those of a whole workflow, where it declares any, and `closing` the signals that they read.
    """

    steps: dict[str, Step]
    dependents: dict[str, tuple[str, ...]]
    outputs: dict[str, Template] = field(default_factory=dict)

    @property
    def closing(self) -> frozenset[str]:
        return signals_of(self.outputs.values())

    @property
    def last(self) -> str:
        """The node whose output is the scope's result where none is declared."""
        return next(reversed(self.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A whole definition, compiled."""

    spec: WorkflowSpec
    body: Body


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong in a definition; `where` is a path such as "nodes.plan.prompt"."""

    where: str
    message: str


def signals_of(templates: Iterable[Template]) -> frozenset[str]:
    """The signals that any of the templates names."""
    return frozenset().union(*(template.signals for template in templates if "signals" in template.names))
