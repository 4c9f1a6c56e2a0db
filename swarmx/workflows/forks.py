"""A fork: the beginning of a run, without one node and all that came of it, as the beginning of another run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import (
    Event,
    NodeExpanded,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    SignalReceived,
    Submitted,
)
from swarmx.workflows.nodes import AgentNode, LoopNode
from swarmx.workflows.spec import bind_inputs
from swarmx.workflows.state import NodeRun, Run, Scope
from swarmx.workflows.values import Json


def fork(
    events: Sequence[Event],
    path: str,
    *,
    forked_from: str,
    workflow_id: str = "",
    deadline_at_s: float | None = None,
    inputs: Mapping[str, Json] | None = None,
) -> list[Event]:
    """The events of a new run in which `path`, and whatever depends on it, is still to be done.

    What had finished before stays finished, and keeps what it made of the old inputs; what was out, had failed or was
    cancelled is done anew, with all its attempts before it. Signals that had come stay. What the old run used up does
    not count in the new one. The definition is that of the old run, and so are the inputs but for those that are
    given. Raises WorkflowError if the run has no such node, or the inputs do not fit.
    """
    run = Run.rebuild(events)
    first = events[0]
    if path not in run.nodes or not isinstance(first, Submitted):
        raise WorkflowError(f"the run has no node {path!r}; a fork begins at one of its nodes")
    undone = _Undone(run, path)
    finished = {event.path for event in events if isinstance(event, NodeFinished)} - undone.finishes
    survived = {event.path for event in events if isinstance(event, NodeFailed) and run.survives(event.path)}
    ended = finished | survived - undone.finishes  # an agent goes on after a failure of its tools
    bound = first.inputs if inputs is None else bind_inputs(run.graph.spec, first.inputs | dict(inputs))
    kept: list[Event] = [
        msgspec.structs.replace(
            first,
            inputs=bound,
            workflow_id=workflow_id,
            forked_from=forked_from,
            fork_path=path,
            deadline_at_s=deadline_at_s,
        )
    ]
    started: dict[str, NodeStarted] = {}
    for event in events:
        match event:
            case NodeStarted(path=node) if node in ended:
                started[node] = msgspec.structs.replace(event, attempt=1, reserved=None)  # of several, the last
            case NodeExpanded() if undone.keeps(event):
                kept.append(event)
            case NodeFinished(path=node) | NodeFailed(path=node) if node in ended:
                if node in started:
                    kept.append(started.pop(node))
                kept.append(msgspec.structs.replace(event, spent=None))
            case SignalReceived():
                kept.append(event)
            case _:
                pass
    return kept


class _Undone:
    """What a fork takes back: nodes as a whole, the ends of those around them, and what loops and agents did later."""

    def __init__(self, run: Run, path: str) -> None:
        self._run = run
        self._whole: set[str] = set()
        self._bodies: dict[str, int] = {}  # of a loop or an agent that is open again: how many of its bodies stay
        self._seen: Counter[str] = Counter()
        self.finishes: set[str] = set()
        todo = [run.nodes[path]]
        while todo:
            node = todo.pop()
            if node.path not in self._whole:
                self._whole.add(node.path)
                for scope in node.scopes:
                    todo += self._inside(scope)
                todo += self._reopened(node)

    def keeps(self, event: NodeExpanded) -> bool:
        """Whether the body was opened before everything that is taken back; events are asked about in their order."""
        self._seen[event.path] += 1
        return event.path not in self._whole and self._seen[event.path] <= self._bodies.get(event.path, math.inf)

    def _reopened(self, node: NodeRun) -> Iterator[NodeRun]:
        """Take back the end of the node and of all that is around it; give what came after those ends."""
        while True:
            self.finishes.add(node.path)
            for dependent in node.scope.body.dependents[node.step.id]:
                yield self._run.nodes[node.scope.prefix + dependent]
            if node.scope.owner is None:
                return
            owner = self._run.nodes[node.scope.owner]
            if owner.error is not None:  # a tool of an agent, which ended with what failed inside it
                yield from (inner for scope in owner.scopes for inner in self._inside(scope) if inner.state == "failed")
            if isinstance(owner.step.node, LoopNode | AgentNode):
                number = 1 + next(i for i, scope in enumerate(owner.scopes) if scope is node.scope)
                self._bodies[owner.path] = min(number, self._bodies.get(owner.path, number))
                for scope in owner.scopes[number:]:
                    yield from self._inside(scope)
            node = owner

    def _inside(self, scope: Scope) -> Iterator[NodeRun]:
        for id in scope.body.steps:
            yield self._run.nodes[scope.prefix + id]
