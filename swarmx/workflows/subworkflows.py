"""Workflows inside a workflow: which uses which, and that none comes to use itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from swarmx.workflows.nodes import AgentNode, BranchNode, Definition, LoopNode, MapNode, Node, SubNode


def in_order(workflows: Mapping[str, Definition]) -> tuple[list[str], list[str]]:
    """The names, each after those that it uses; and a circle of some that use each other, first and last the same.

    What is in a circle, or uses something that is, is not in the order.
    """
    order: list[str] = []
    circle: list[str] = []
    closed: set[str] = set()  # looked at, whatever came of it

    def look(name: str, path: tuple[str, ...]) -> None:
        nonlocal circle
        if name in path:
            circle = circle or [*path[path.index(name) :], name]
            return
        if name in closed:
            return
        used = [use for use in _uses(workflows[name].nodes) if use in workflows]
        for use in used:
            look(use, (*path, name))
        closed.add(name)
        if all(use in order for use in used):
            order.append(name)

    for name in workflows:
        look(name, ())
    return order, circle


def _uses(nodes: Mapping[str, Node]) -> Iterator[str]:
    for node in nodes.values():
        match node:
            case SubNode(use=name):
                yield name
            case AgentNode(workflows=names):
                yield from names
            case MapNode() | LoopNode():
                yield from _uses(node.do)
            case BranchNode():
                for body in node.bodies:
                    yield from _uses(body.do)
            case _:
                pass
