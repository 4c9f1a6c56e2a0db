"""The state of a run: a fold over its events. Nothing in here decides; `plan` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.workflows import agent_state
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
    SignalAwaited,
    SignalReceived,
    Spent,
    Submitted,
    Terminal,
)
from swarmx.workflows.graph import Body, Graph, Step
from swarmx.workflows.ledger import Ledger
from swarmx.workflows.nodes import AgentNode, BranchNode, LoopNode, MapNode, SubNode, UseNode, WorkflowSpec
from swarmx.workflows.spec import bind_inputs, graph_of
from swarmx.workflows.values import Json

NodeState = Literal["waiting", "ready", "running", "finished", "failed"]


@dataclass(slots=True, kw_only=True)
class Scope:
    """One running body: the workflow's own ("" as prefix), a map's item, a loop's iteration, a branch's case, a
    sub-workflow.

    `owner` is the path of the node that it belongs to, `depth` the number of such bodies around it and itself (parts of
    an agent are none); `parent` is where names that it does not know are looked for. `waiting` counts, for each node,
    the needs that are not yet finished.
    """

    prefix: str
    body: Body = field(compare=False, repr=False)
    parent: Scope | None = field(compare=False, repr=False)
    owner: str | None
    variables: dict[str, Json]
    depth: int = 0
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
    unfinished. `attempt` is the one that is out, or comes next; it is given up at `timeout_at_s`, and is not made again
    if it is not `idempotent`. `error` is why a tool gave an agent nothing.
    """

    path: str
    step: Step = field(compare=False, repr=False)
    scope: Scope = field(compare=False, repr=False)
    state: NodeState = "waiting"
    scopes: list[Scope] = field(default_factory=list)
    open: int = 0
    attempt: int = 1
    timeout_at_s: float | None = None
    idempotent: bool = True
    error: str | None = None

    @property
    def turns(self) -> list[agent_state.Turn]:
        """Of an agent: its steps, as far as they are finished."""
        turns = (agent_state.finished_turn(scope.body, scope.outputs) for scope in self.scopes)
        return [turn for turn in turns if turn is not None]


@dataclass(slots=True, kw_only=True)
class Run:
    """A workflow on its way. Only `apply` changes it, so that the same events always give the same run; but for
    `set_back`, which moves no more than what it waits for.

    `due` are the nodes about which something is to be decided, in the order in which they became so; `in_flight` those
    whose model call is out, `timeouts` the times at which some of them are given up. `resting` are those that are
    attempted again, with the times (Unix seconds); `retries` counts them all. `signals` are those that have come, by
    name; `awaited` those that something waits for, with the times at which they are given up. `ledger` has what was
    used up. A failed node sets `failure`.
    """

    graph: Graph = field(compare=False, repr=False)
    root: Scope
    nodes: dict[str, NodeRun] = field(default_factory=dict)
    due: dict[str, None] = field(default_factory=dict)
    in_flight: dict[str, None] = field(default_factory=dict)
    timeouts: dict[str, float] = field(default_factory=dict)
    resting: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    signals: dict[str, Json] = field(default_factory=dict)
    awaited: dict[str, float | None] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    workflow_id: str = ""
    deadline_at_s: float | None = None
    cancelling: bool = False
    failure: NodeFailed | None = None
    end: Terminal | None = None

    @classmethod
    def start(
        cls,
        spec: WorkflowSpec,
        inputs: Mapping[str, Json],
        *,
        workflow_id: str = "",
        deadline_at_s: float | None = None,
    ) -> tuple[Run, Submitted]:
        """A new run and the event that it begins with. Raises WorkflowError when the inputs do not fit."""
        text = spec.to_json()
        event = Submitted(
            spec=text,
            inputs=bind_inputs(spec, dict(inputs)),
            workflow_id=workflow_id,
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
        signals: dict[str, Json] = {}
        variables = {"inputs": event.inputs, "signals": signals}
        run = cls(
            graph=graph,
            root=Scope(prefix="", body=graph.body, parent=None, owner=None, variables=variables),
            signals=signals,
            workflow_id=event.workflow_id,
            deadline_at_s=event.deadline_at_s,
        )
        root = run.root
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

    def set_back(self, by_s: float) -> None:
        """Let what waits for a time wait for an earlier one: the clock that wrote the times was ahead of ours."""
        for waiting in (self.timeouts, self.resting, self.awaited):
            for name, at_s in waiting.items():
                if at_s is not None:
                    waiting[name] = at_s - by_s

    def accounts(self, path: str) -> list[str]:
        """What a call of the node is charged to: the node, those around it from the inside out, and the run ("")."""
        found: list[str] = []
        around: str | None = path
        while around is not None:
            found.append(around)
            around = self.nodes[around].scope.owner
        return [*found, ""]

    def room_for(self, event: NodeExpanded) -> bool:
        """Whether the run may have the nodes that the event adds."""
        more = sum(len(body.steps) for _, body, _ in _bodies(self.nodes[event.path], event))
        return len(self.nodes) + more <= self.graph.spec.limits.nodes

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
                node.idempotent = event.idempotent
                if event.reserved is not None:
                    self.ledger.started(self.accounts(path), event.reserved)
                self.in_flight[path] = None
                if event.timeout_at_s is not None:
                    self.timeouts[path] = event.timeout_at_s
            case NodeRetried(path=path):
                node = self._node(path, "running")
                self._settle(path, event.spent)
                node.state, node.attempt, node.timeout_at_s = "ready", event.attempt + 1, None
                self.resting[path] = event.not_before_s
                self.retries += 1
            case NodeExpanded():
                self._expand(event)
            case NodeFinished(path=path, output=output):
                node = self._node(path, "ready", "running")
                node.state = "finished"
                self._settle(path, event.spent)
                self._leave(node, output)
            case NodeFailed(path=path):
                use = self._use_around(self._node(path, "ready", "running"))
                self._settle(path, event.spent)
                self._give_up(use or self.nodes[path])
                if use is None:
                    self.failure = self.failure or event
                else:
                    use.error = event.error
                    self._leave(use, None)
            case SignalAwaited(name=name):
                self._signal(name, self.awaited)
                self.awaited[name] = event.timeout_at_s
            case SignalReceived(name=name):
                self._signal(name, self.signals)
                self.signals[name] = event.value
                self.awaited.pop(name, None)
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

    def _signal(self, name: str, known: Mapping[str, object]) -> None:
        if name not in self.graph.spec.signals or name in self.signals or name in known:
            raise WorkflowError(f"the signal {name!r} is not declared, or the event came before")

    def survives(self, path: str) -> bool:
        """Whether the run goes on when this node fails: it is a tool of an agent, or inside one."""
        return self._use_around(self.nodes[path]) is not None

    def _use_around(self, node: NodeRun) -> NodeRun | None:
        """The tool of an agent, if the node is one or is inside one: its agent lives on without it."""
        while not isinstance(node.step.node, UseNode):
            if node.scope.owner is None:
                return None
            node = self.nodes[node.scope.owner]
        return node

    def _give_up(self, node: NodeRun) -> None:
        """The node is to be done no more, nor what is inside it."""
        if node.state != "finished":
            node.state = "failed"
        self._settle(node.path)
        for scope in node.scopes:
            for id in scope.body.steps:
                self._give_up(self.nodes[scope.prefix + id])

    def _settle(self, path: str, spent: Spent | None = None) -> None:
        if spent is not None or self.ledger.out(path) is not None:
            self.ledger.ended(self.accounts(path), spent)
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
        bodies = _bodies(node, event)
        if not bodies:
            raise WorkflowError(
                "a map expands by items, a loop by an iteration, a branch by a case, a sub-workflow by its inputs, "
                "an agent by a step or its uses",
                where=event.path,
            )
        again = event.iteration is not None or event.step is not None
        if node.open or (node.scopes and not again):
            raise WorkflowError("the node expands while its bodies are still open", where=event.path)
        node.state = "running"
        self.due.pop(event.path, None)
        whole = event.inputs is not None  # a sub-workflow sees nothing of what is around it, but for the signals
        for prefix, body, variables in bodies:
            scope = Scope(
                prefix=prefix,
                body=body,
                parent=None if whole else node.scope,
                owner=event.path,
                variables={**variables, "signals": self.signals} if whole else variables,
                depth=node.scope.depth + (event.step is None),
            )
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


def _bodies(node: NodeRun, event: NodeExpanded) -> list[tuple[str, Body, dict[str, Json]]]:
    """The bodies that the event opens, each with its prefix and its variables; none if it is not for such a node."""
    bodies = node.step.bodies
    match node.step.node:
        case MapNode(item=name) if event.items is not None:
            return [(f"{node.path}[{i}].", bodies[0], {name: item}) for i, item in enumerate(event.items)]
        case LoopNode() if event.iteration is not None:
            variables = {"iteration": event.iteration, "previous": event.previous}
            return [(f"{node.path}[{event.iteration}].", bodies[0], variables)]
        case BranchNode() if event.case is not None and 0 <= event.case < len(bodies):
            return [(f"{node.path}[{event.case}].", bodies[event.case], {})]
        case SubNode() | UseNode() if event.inputs is not None and bodies:
            return [(f"{node.path}.", bodies[0], {"inputs": event.inputs})]
        case AgentNode():
            opened = agent_state.opened(node.step, event, node.turns)
            return [] if opened is None else [(*opened, {})]
        case _:
            return []
