"""The state of a run: a fold over its events. Nothing in here decides; `plan` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
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
    NodeRetried,
    NodeStarted,
    Submitted,
    Terminal,
)
from swarmx.workflows.graph import Body, Graph, Step
from swarmx.workflows.nodes import BranchNode, LoopNode, MapNode, WorkflowSpec
from swarmx.workflows.spec import bind_inputs, graph_of
from swarmx.workflows.values import Json

NodeState = Literal["waiting", "ready", "running", "finished", "failed"]


@dataclass(slots=True, kw_only=True)
class Scope:
    """One running body: the workflow's own ("" as prefix), a map's item, a loop's iteration or a branch's case.

    `owner` is the path of the map, loop or branch node; `waiting` counts, for each node, the needs that are not yet
    finished.
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
    """One node of a run. `scopes` are the bodies of a map (all), a loop (so far) or a branch (one); `open` counts the
    unfinished. `attempt` is the one that is out, or comes next; it is given up at `timeout_at_s`.
    """

    path: str
    step: Step = field(compare=False, repr=False)
    scope: Scope = field(compare=False, repr=False)
    state: NodeState = "waiting"
    scopes: list[Scope] = field(default_factory=list)
    open: int = 0
    attempt: int = 1
    timeout_at_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """A workflow on its way. Only `apply` changes it, so that the same events always give the same run.

    `due` are the nodes about which something is to be decided, in the order in which they became so; `in_flight` those
    whose model call is out, `timeouts` the times at which some of them are given up. `resting` are those that are
    attempted again, with the times (Unix seconds); `retries` counts them all. A failed node sets `failure`.
    """

    graph: Graph = field(compare=False, repr=False)
    root: Scope
    nodes: dict[str, NodeRun] = field(default_factory=dict)
    due: dict[str, None] = field(default_factory=dict)
    in_flight: dict[str, None] = field(default_factory=dict)
    timeouts: dict[str, float] = field(default_factory=dict)
    resting: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    deadline_at_s: float | None = None
    cancelling: bool = False
    failure: NodeFailed | None = None
    end: Terminal | None = None

    @classmethod
    def start(
        cls, spec: WorkflowSpec, inputs: Mapping[str, Json], *, deadline_at_s: float | None = None
    ) -> tuple[Run, Submitted]:
        """A new run and the event that it begins with. Raises WorkflowError when the inputs do not fit."""
        text = spec.to_json()
        event = Submitted(
            spec=text,
            inputs=bind_inputs(spec, dict(inputs)),
            spec_sha256=sha256(text.encode()).hexdigest(),
            deadline_at_s=deadline_at_s,
        )
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
        if event.spec_sha256 and sha256(event.spec.encode()).hexdigest() != event.spec_sha256:
            raise WorkflowError("the definition is not the one that was submitted: its hash has changed")
        graph = graph_of(event.spec)
        root = Scope(prefix="", body=graph.body, parent=None, owner=None, variables={"inputs": event.inputs})
        run = cls(graph=graph, root=root, deadline_at_s=event.deadline_at_s)
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
                self._settle(path)
                node.state, node.attempt, node.timeout_at_s = "running", event.attempt, event.timeout_at_s
                self.in_flight[path] = None
                if event.timeout_at_s is not None:
                    self.timeouts[path] = event.timeout_at_s
            case NodeRetried(path=path):
                node = self._node(path, "running")
                self._settle(path)
                node.state, node.attempt, node.timeout_at_s = "ready", event.attempt + 1, None
                self.resting[path] = event.not_before_s
                self.retries += 1
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
        for waiting in (self.in_flight, self.due, self.timeouts, self.resting):
            waiting.pop(path, None)

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
        bodies = _bodies(node.step, event)
        if not bodies:
            raise WorkflowError("a map expands by items, a loop by an iteration, a branch by a case", where=event.path)
        if node.open or (event.iteration is None and node.scopes):
            raise WorkflowError("the node expands while its bodies are still open", where=event.path)
        node.state = "running"
        self.due.pop(event.path, None)
        for index, body, variables in bodies:
            prefix = f"{event.path}[{index}]."
            scope = Scope(prefix=prefix, body=body, parent=node.scope, owner=event.path, variables=variables)
            node.scopes.append(scope)
            self._open(scope)
        node.open = len(bodies)

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


def _bodies(step: Step, event: NodeExpanded) -> list[tuple[int, Body, dict[str, Json]]]:
    """The bodies that the event opens, each with its number and its variables; none if it is not for such a node."""
    match step.node:
        case MapNode(item=name) if event.items is not None:
            return [(i, step.bodies[0], {name: item}) for i, item in enumerate(event.items)]
        case LoopNode() if event.iteration is not None:
            variables = {"iteration": event.iteration, "previous": event.previous}
            return [(event.iteration, step.bodies[0], variables)]
        case BranchNode() if event.case is not None and 0 <= event.case < len(step.bodies):
            return [(event.case, step.bodies[event.case], {})]
        case _:
            return []
