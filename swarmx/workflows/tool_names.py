"""Which tools a definition names, and that they are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from swarmx.core.errors import WorkflowError
from swarmx.workflows.nodes import AgentNode, ToolNode, WorkflowSpec
from swarmx.workflows.values import nearest


def tool_names(spec: WorkflowSpec) -> list[str]:
    """The tools that its nodes call, and that its agents may, in bodies of nodes and sub-workflows too; sorted."""
    return sorted(set(_named(spec)))


def uses_tools(spec: WorkflowSpec) -> bool:
    """Whether any node calls a tool, or has an agent that may."""
    return next(_named(spec), None) is not None


def check_tools(spec: WorkflowSpec, known: Collection[str]) -> None:
    """Raises WorkflowError for a tool that is not among those that are known."""
    for name in tool_names(spec):
        if name not in known:
            there_are = ", ".join(sorted(known)) or "none"
            raise WorkflowError(f"there is no tool {name!r}{nearest(name, set(known))}; there are: {there_are}")


def _named(part: Any) -> Iterator[str]:
    match part:
        case ToolNode(tool=str() as name):
            yield name
        case AgentNode(tools=names):
            yield from names
        case BaseModel():
            for name in type(part).model_fields:
                yield from _named(getattr(part, name))
        case dict():
            for child in part.values():
                yield from _named(child)
        case list() | tuple():
            for child in part:
                yield from _named(child)
        case _:
            pass
