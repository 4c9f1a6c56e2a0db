"""A fork: the beginning of a run, without one node and all that came of it, as the beginning of another run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import Event, NodeExpanded, NodeFinished, NodeStarted, Submitted
from swarmx.workflows.nodes import LoopNode
from swarmx.workflows.state import NodeRun, Run, Scope


def fork(events: Sequence[Event], path: str, *, forked_from: str, deadline_at_s: float | None = None) -> list[Event]:
    """The events of a new run in which `path`, and whatever depends on it, is still to be done.

    What had finished before stays finished; what was out, had failed or was cancelled is done anew, with all its
    attempts before it. The definition and the inputs are those of the old run. Raises WorkflowError if the run has no
    such node.
    """
    run = Run.rebuild(events)
    first = events[0]
    if path not in run.nodes or not isinstance(first, Submitted):
        raise WorkflowError(f"the run has no node {path!r}; a fork begins at one of its nodes")
    undone = _Undone(run, path)
    finished = {event.path for event in events if isinstance(event, NodeFinished)} - undone.finishes
    kept: list[Event] = [
        msgspec.structs.replace(first, forked_from=forked_from, fork_path=path, deadline_at_s=deadline_at_s)
    ]
    started: dict[str, NodeStarted] = {}
    for event in events:
        match event:
            case NodeStarted(path=node) if node in finished:
                started[node] = msgspec.structs.replace(event, attempt=1)  # of several attempts, the last
            case NodeExpanded() if undone.keeps(event):
                kept.append(event)
            case NodeFinished(path=node) if node in finished:
                if node in started:
                    kept.append(started.pop(node))
                kept.append(event)
            case _:
                pass
    return kept


class _Undone:
    """What a fork takes back: nodes as a whole, the ends of those around them, and later iterations of loops."""

    def __init__(self, run: Run, path: str) -> None:
        self._run = run
        self._whole: set[str] = set()
        self._iterations: dict[str, int] = {}  # of a loop that is open again: the last one that stays
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
        """Whether the body was opened before everything that is taken back."""
        last = self._iterations.get(event.path)
        later = last is not None and event.iteration is not None and event.iteration > last
        return event.path not in self._whole and not later

    def _reopened(self, node: NodeRun) -> Iterator[NodeRun]:
        """Take back the end of the node and of all that is around it; give what came after those ends."""
        while True:
            self.finishes.add(node.path)
            for dependent in node.scope.body.dependents[node.step.id]:
                yield self._run.nodes[node.scope.prefix + dependent]
            if node.scope.owner is None:
                return
            owner = self._run.nodes[node.scope.owner]
            if isinstance(owner.step.node, LoopNode):
                number = 1 + next(i for i, scope in enumerate(owner.scopes) if scope is node.scope)
                self._iterations[owner.path] = min(number, self._iterations.get(owner.path, number))
                for scope in owner.scopes[number:]:
                    yield from self._inside(scope)
            node = owner

    def _inside(self, scope: Scope) -> Iterator[NodeRun]:
        for id in scope.body.steps:
            yield self._run.nodes[scope.prefix + id]
