"""Which tools a definition names, and that they are there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from swarmx.core.errors import WorkflowError
from swarmx.workflows.nodes import AgentNode, BranchNode, LoopNode, MapNode, Node, ToolNode, WorkflowSpec
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


def _named(spec: WorkflowSpec) -> Iterator[str]:
    for nodes in (spec.nodes, *(inner.nodes for inner in spec.workflows.values())):
        yield from _within(nodes)


def _within(nodes: Mapping[str, Node]) -> Iterator[str]:
    for node in nodes.values():
        match node:
            case ToolNode(tool=str() as name):
                yield name
            case AgentNode(tools=names):
                yield from names
            case MapNode() | LoopNode():
                yield from _within(node.do)
            case BranchNode():
                for body in node.bodies:
                    yield from _within(body.do)
            case _:
                pass
