"""The state of a run: a fold over its events. Nothing in here decides; `plan` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.workflows.events import (
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Finished,
    NodeExpanded,
    NodeFailed,
    NodeFinished,
    NodeStarted,
    Submitted,
    Terminal,
)
from swarmx.workflows.graph import Body, Graph, Step
from swarmx.workflows.nodes import MapNode, WorkflowSpec
from swarmx.workflows.spec import bind_inputs, graph_of
from swarmx.workflows.values import Json

NodeState = Literal["waiting", "ready", "running", "finished", "failed"]


@dataclass(slots=True, kw_only=True)
class Scope:
    """One running body: the workflow's own ("" as prefix), a map's item or a loop's iteration.

    `owner` is the path of the map or loop node; `waiting` counts, for each node, the needs that are not yet finished.
    """

    prefix: str
    body: Body = field(compare=False)
    parent: Scope | None = field(compare=False, repr=False)
    owner: str | None
    variables: dict[str, Json]
    outputs: dict[str, Json] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.outputs) == len(self.body.steps)

    def context(self, names: Iterable[str]) -> dict[str, Json]:
        """The values of those names that are visible from here, the innermost first."""
        found: dict[str, Json] = {}
        for name in names:
            scope: Scope | None = self
            while scope is not None:
                if name in scope.outputs:
                    found[name] = scope.outputs[name]
                    break
                if name in scope.variables:
                    found[name] = scope.variables[name]
                    break
                scope = scope.parent
        return found


@dataclass(slots=True, kw_only=True)
class NodeRun:
    """One node of a run. `scopes` are the bodies of a map (all) or a loop (so far); `open` counts the unfinished."""

    path: str
    step: Step = field(compare=False, repr=False)
    scope: Scope = field(compare=False, repr=False)
    state: NodeState = "waiting"
    scopes: list[Scope] = field(default_factory=list)
    open: int = 0


@dataclass(slots=True, kw_only=True)
class Run:
    """A workflow on its way. Only `apply` changes it, so that the same events always give the same run.

    `due` are the nodes about which something is to be decided, in the order in which they became so; `in_flight` those
    whose model call is out. A failed node sets `failure`.
    """

    graph: Graph = field(compare=False, repr=False)
    root: Scope
    nodes: dict[str, NodeRun] = field(default_factory=dict)
    due: dict[str, None] = field(default_factory=dict)
    in_flight: dict[str, None] = field(default_factory=dict)
    cancelling: bool = False
    failure: NodeFailed | None = None
    end: Terminal | None = None

    @classmethod
    def start(cls, spec: WorkflowSpec, inputs: Mapping[str, Json]) -> tuple[Run, Submitted]:
        """A new run and the event that it begins with. Raises WorkflowError when the inputs do not fit."""
        event = Submitted(spec=spec.to_json(), inputs=bind_inputs(spec, dict(inputs)))
        return cls._submitted(event), event

    @classmethod
    def rebuild(cls, events: Iterable[Event]) -> Run:
        """The run that these events describe. Raises WorkflowError when they do not fit together."""
        remaining = iter(events)
        first = next(remaining, None)
        if not isinstance(first, Submitted):
            raise WorkflowError(f"a run begins with Submitted, got {type(first).__name__}")
        run = cls._submitted(first)
        for event in remaining:
            run.apply(event)
        return run

    @classmethod
    def _submitted(cls, event: Submitted) -> Run:
        graph = graph_of(event.spec)
        root = Scope(prefix="", body=graph.body, parent=None, owner=None, variables={"inputs": event.inputs})
        run = cls(graph=graph, root=root)
        run._open(root)
        return run

    @property
    def ended(self) -> bool:
        """A terminal event was applied."""
        return self.end is not None

    @property
    def stopping(self) -> bool:
        """The run will not finish any more; calls that are still out are of no use."""
        return not self.ended and (self.cancelling or self.failure is not None)

    def apply(self, event: Event) -> None:
        """Take one event in. Raises WorkflowError when it does not fit the state (nothing has changed then)."""
        if self.ended:
            raise WorkflowError(
                f"the run has ended with {type(self.end).__name__}, {type(event).__name__} came after it"
            )
        match event:
            case NodeStarted(path=path):
                node = self._node(path, "ready")
                node.state = "running"
                self.in_flight[path] = None
                self.due.pop(path, None)
            case NodeExpanded():
                self._expand(event)
            case NodeFinished(path=path, output=output):
                node = self._node(path, "ready", "running")
                node.state = "finished"
                self._settle(path)
                self._leave(node, output)
            case NodeFailed(path=path):
                node = self._node(path, "ready", "running")
                node.state = "failed"
                self._settle(path)
                self.failure = self.failure or event
            case CancelRequested():
                self.cancelling = True
            case Finished() | Failed() | Cancelled():
                self.end = event
            case Submitted():
                raise WorkflowError("a run is submitted once, a second Submitted came")
            case _:
                assert_never(event)

    def _node(self, path: str, *states: NodeState) -> NodeRun:
        node = self.nodes.get(path)
        if node is None or node.state not in states:
            state = "unknown" if node is None else node.state
            raise WorkflowError(f"the node is {state}, the event expects it to be {' or '.join(states)}", where=path)
        return node

    def _settle(self, path: str) -> None:
        self.in_flight.pop(path, None)
        self.due.pop(path, None)

    def _open(self, scope: Scope) -> None:
        for step in scope.body.steps.values():
            node = NodeRun(path=scope.prefix + step.id, step=step, scope=scope)
            self.nodes[node.path] = node
            scope.waiting[step.id] = len(step.needs)
            if not step.needs:
                node.state = "ready"
                self.due[node.path] = None

    def _expand(self, event: NodeExpanded) -> None:
        node = self._node(event.path, "ready", "running")
        body = node.step.body
        if body is None or (event.items is None) == (event.iteration is None):
            raise WorkflowError("only a map or a loop expands, by items or by an iteration", where=event.path)
        if node.open or (event.items is not None and node.scopes):
            raise WorkflowError("the node expands while its bodies are still open", where=event.path)
        variables: list[tuple[int, dict[str, Json]]]
        if event.items is not None:
            name = node.step.node.item if isinstance(node.step.node, MapNode) else "item"
            variables = [(i, {name: item}) for i, item in enumerate(event.items)]
        else:
            iteration = event.iteration or 0
            variables = [(iteration, {"iteration": iteration, "previous": event.previous})]
        node.state = "running"
        self.due.pop(event.path, None)
        for index, values in variables:
            prefix = f"{event.path}[{index}]."
            scope = Scope(prefix=prefix, body=body, parent=node.scope, owner=event.path, variables=values)
            node.scopes.append(scope)
            self._open(scope)
        node.open = len(variables)

    def _leave(self, node: NodeRun, output: Json) -> None:
        scope = node.scope
        scope.outputs[node.step.id] = output
        for dependent in scope.body.dependents[node.step.id]:
            scope.waiting[dependent] -= 1
            if scope.waiting[dependent] == 0:
                path = scope.prefix + dependent
                self.nodes[path].state = "ready"
                self.due[path] = None
        if scope.complete and scope.owner is not None:
            owner = self.nodes[scope.owner]
            owner.open -= 1
            if owner.open == 0:
                self.due[owner.path] = None
