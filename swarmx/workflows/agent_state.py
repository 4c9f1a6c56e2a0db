"""The parts of an agent in a run: its steps, `a.1`, `a.2`, and the tools that a step asked for, `a.1.1`, `a.1.2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarmx.workflows.events import NodeExpanded
from swarmx.workflows.graph import Body, Step
from swarmx.workflows.nodes import AgentNode, AnyNode, TurnNode, UseNode
from swarmx.workflows.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A tool that the model asked for: an id of the model's, a name and the arguments as it wrote them."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A finished step: what the model said and asked for. After a `last` one it is not asked again."""

    last: bool
    text: str
    uses: tuple[Use, ...]
    usage: dict[str, int]


def finished_turn(body: Body, outputs: Mapping[str, Json]) -> Turn | None:
    """The finished step that this body of an agent is, if it is one; `answers.turn_of` made its output."""
    node = body.steps[body.last].node
    left = outputs.get(body.last)
    if not isinstance(node, TurnNode) or left is None:
        return None
    uses = tuple(Use(id=use["id"], name=use["name"], arguments=use["arguments"]) for use in left["uses"])
    return Turn(last=node.last, text=left["text"], uses=uses, usage=left["usage"])


def opened(step: Step, event: NodeExpanded, turns: Sequence[Turn]) -> tuple[str, Body] | None:
    """The prefix and the body that the event opens in this agent, after these steps; None if it does not fit."""
    agent = step.node
    if not isinstance(agent, AgentNode):
        return None
    if event.step is None:
        return None
    if event.uses is None:
        if event.step != len(turns) + 1:
            return None
        return f"{event.path}.", _body({str(event.step): _turn(agent, last=event.last)}, {})
    if event.step != len(turns) or not turns:
        return None
    uses = turns[-1].uses
    if not uses or event.uses != len(uses):
        return None
    bodies = dict(zip(agent.workflows, step.bodies, strict=True))
    inner = {str(number): bodies[use.name] for number, use in enumerate(uses, 1) if use.name in bodies}
    nodes = {str(number): _use(agent, use) for number, use in enumerate(uses, 1)}
    return f"{event.path}.{event.step}.", _body(nodes, inner)


def _turn(agent: AgentNode, *, last: bool) -> TurnNode:
    return TurnNode(
        kind="llm",
        model=agent.model,
        role=agent.role,
        prompt=agent.prompt,
        max_tokens=agent.max_tokens,
        temperature=agent.temperature,
        retry=agent.retry,
        timeout_s=agent.timeout_s,
        agent=agent,
        last=last,
    )


def _use(agent: AgentNode, use: Use) -> UseNode:
    return UseNode(
        kind="tool",
        agent=agent,
        name=use.name,
        arguments=use.arguments,
        retry=agent.retry,
        timeout_s=agent.timeout_s,
    )


def _body(nodes: Mapping[str, AnyNode], inner: Mapping[str, Body]) -> Body:
    """A body of nodes that do not wait for each other, some with a sub-workflow inside."""
    steps: dict[str, Step] = {}
    for id, node in nodes.items():
        bodies = (inner[id],) if id in inner else ()
        closing = inner[id].closing if id in inner else frozenset()
        steps[id] = Step(id=id, node=node, needs=(), templates={}, bodies=bodies, closing=closing)
    return Body(steps=steps, dependents=dict.fromkeys(nodes, ()))
