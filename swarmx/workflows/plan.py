"""What to do next in a run: pure decisions, as commands. The same run always gives the same commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.core.nouns import CallKind
from swarmx.workflows.answers import Unusable, Usable, output_of
from swarmx.workflows.events import (
    Cancelled,
    Event,
    Failed,
    Finished,
    NodeExpanded,
    NodeFailed,
    NodeFinished,
    NodeStarted,
)
from swarmx.workflows.functions import call_function
from swarmx.workflows.limits import OUTPUT_CHARS
from swarmx.workflows.nodes import SIDE, STEPS, BranchNode, ImageNode, JoinNode, LlmNode, LoopNode, MapNode, ToolNode
from swarmx.workflows.retries import after_failure
from swarmx.workflows.state import NodeRun, Run, Scope
from swarmx.workflows.templates import Template
from swarmx.workflows.values import Json, checked


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModelCall:
    """Record NodeStarted, then have this call answered. `body` is the OpenAI request, ready for the wire.

    What has not answered by `timeout_at_s` (Unix seconds) is given up.
    """

    path: str
    kind: CallKind
    role: str
    model: str
    body: dict[str, Any]
    attempt: int = 1
    timeout_at_s: float | None = None

    @property
    def started(self) -> NodeStarted:
        return NodeStarted(path=self.path, kind=self.kind, attempt=self.attempt, timeout_at_s=self.timeout_at_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Record this event: it follows from the others."""

    event: Event


Command = StartModelCall | Record


def plan(run: Run, now_s: float) -> list[Command]:
    """Everything that is to be done now (Unix seconds), without changing the run.

    Nothing once the run has ended. A run that is cancelled or has a failed node ends, whatever is still out: release
    its calls first.
    """
    if run.ended:
        return []
    if run.cancelling:
        return [Record(event=Cancelled())]
    if run.failure is not None:
        return [Record(event=Failed(error=run.failure.error, path=run.failure.path))]
    if run.root.complete:
        return [Record(event=_end(run))]
    late = next((path for path, at_s in run.timeouts.items() if at_s <= now_s), None)
    if late is not None:
        return [Record(event=_too_late(run, late, now_s))]  # one at a time: each counts against what retries there are
    rested = [path for path, at_s in run.resting.items() if at_s <= now_s]
    return [_decide(run, run.nodes[path], now_s) for path in (*run.due, *rested)]


def wake_at_s(run: Run) -> float | None:
    """When there is something to plan even if nothing happens, Unix seconds."""
    return None if run.ended else min((*run.timeouts.values(), *run.resting.values()), default=None)


def advance(run: Run, events: Iterable[Event] = (), *, now_s: float) -> tuple[list[Event], list[StartModelCall]]:
    """Apply the events and whatever follows from them; return all of them, to be recorded, and the calls to make.

    Events that come after the end are dropped.
    """
    recorded: list[Event] = []
    calls: list[StartModelCall] = []

    def record(event: Event) -> None:
        if not run.ended:
            run.apply(event)
            recorded.append(event)

    for event in events:
        record(event)
    while commands := plan(run, now_s):
        for command in commands:
            match command:
                case Record(event=event):
                    record(event)
                case StartModelCall():
                    record(command.started)
                    calls.append(command)
                case _:
                    assert_never(command)
    return recorded, [call for call in calls if call.path in run.in_flight] if not run.ended else []


def calls_in_flight(run: Run) -> list[StartModelCall]:
    """The calls that were out when the events end: a run that is picked up again makes them again."""
    commands = [_decide(run, run.nodes[path], 0.0) for path in run.in_flight]
    return [command for command in commands if isinstance(command, StartModelCall)]


def read_answer(run: Run, path: str, answer: Any) -> Usable | Unusable:
    """What the answer to the node's model call means to the node."""
    node = run.nodes[path].step.node
    if isinstance(node, LlmNode):
        return output_of("llm", answer, node.json_schema)
    return output_of("image", answer)


def _end(run: Run) -> Finished | Failed:
    if not run.graph.outputs:
        last = run.graph.body.last
        return Finished(outputs={last: run.root.outputs[last]})
    outputs: dict[str, Json] = {}
    try:
        for name, template in run.graph.outputs.items():
            outputs[name] = template.value(run.root.context(template.names), where=f"outputs.{name}")
        return Finished(outputs=checked(outputs, limit=OUTPUT_CHARS))
    except WorkflowError as error:
        return Failed(error=str(error))


def _too_late(run: Run, path: str, now_s: float) -> Event:
    timeout_s = getattr(run.nodes[path].step.node, "timeout_s", None)
    failure = Failure(cause="timeout", error=f"the attempt took longer than timeout_s, {timeout_s:g} s")
    return after_failure(run, path, failure, now_s)


def _decide(run: Run, run_node: NodeRun, now_s: float) -> Command:
    path, step, scope = run_node.path, run_node.step, run_node.scope
    try:
        match step.node:
            case LlmNode() as node:
                return _llm_call(run_node, node, now_s)
            case ImageNode() as node:
                return _image_call(run_node, node, now_s)
            case ToolNode() as node:
                arguments = {name: _literal(scope, value, f"args.{name}") for name, value in step.args.items()}
                return _finish(path, call_function(node.function, arguments))
            case JoinNode() as node:
                values = scope.context(node.of)
                return _finish(path, [values[name] for name in node.of])
            case MapNode() as node:
                return _map(run, run_node, node)
            case LoopNode() as node:
                return _loop(run, run_node, node)
            case BranchNode() as node:
                return _branch(run, run_node, node)
            case _:
                assert_never(step.node)
    except WorkflowError as error:
        return Record(event=NodeFailed(path=path, error=str(error)))


def _llm_call(run_node: NodeRun, node: LlmNode, now_s: float) -> StartModelCall:
    messages = [{"role": "user", "content": _text(run_node, "prompt")}]
    if "system" in run_node.step.templates:
        messages.insert(0, {"role": "system", "content": _text(run_node, "system")})
    body: dict[str, Any] = {
        "model": node.model,
        "messages": messages,
        "max_tokens": node.max_tokens,
        "temperature": node.temperature,
    }
    if node.json_schema is not None:
        named = {"name": run_node.step.id, "schema": node.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return _call(run_node, node, "llm", body, now_s)


def _image_call(run_node: NodeRun, node: ImageNode, now_s: float) -> StartModelCall:
    def whole(name: str, declared: int | str, bounds: tuple[int, int]) -> int:
        template = run_node.step.templates.get(name)
        value = declared if template is None else template.value(run_node.scope.context(template.names), where=name)
        if not isinstance(value, int) or isinstance(value, bool) or not bounds[0] <= value <= bounds[1]:
            raise WorkflowError(
                f"a whole number from {bounds[0]} to {bounds[1]} was expected, got {value!r:.60}", where=name
            )
        return value

    size = f"{whole('width', node.width, SIDE)}x{whole('height', node.height, SIDE)}"
    body = {
        "model": node.model,
        "prompt": _text(run_node, "prompt"),
        "n": node.n,
        "size": size,
        "steps": whole("steps", node.steps, STEPS),
    }
    return _call(run_node, node, "image", body, now_s)


def _call(
    run_node: NodeRun, node: LlmNode | ImageNode, kind: CallKind, body: dict[str, Any], now_s: float
) -> StartModelCall:
    """One that is out already, and is made again after a restart, keeps the time at which it is given up."""
    timeout_at_s = run_node.timeout_at_s
    if run_node.state != "running" and node.timeout_s is not None:
        timeout_at_s = now_s + node.timeout_s
    return StartModelCall(
        path=run_node.path,
        kind=kind,
        role=node.role,
        model=node.model,
        body=body,
        attempt=run_node.attempt,
        timeout_at_s=timeout_at_s,
    )


def _map(run: Run, run_node: NodeRun, node: MapNode) -> Record:
    if run_node.state == "running":
        results = [_result(run_node, scope) for scope in run_node.scopes]
        return _finish(run_node.path, results)
    over = run_node.step.templates["over"]
    items = over.value(run_node.scope.context(over.names), where="over")
    if not isinstance(items, list):
        raise WorkflowError(f"a list was expected, got {items!r:.60}", where="over")
    if len(items) > node.max_items:
        message = f"{len(items)} items were given, max_items allows {node.max_items}; raise it or shorten the list"
        raise WorkflowError(message, where="over")
    if not items:
        return _finish(run_node.path, [])
    fan_out = run.graph.spec.limits.fan_out
    if len(items) > fan_out:
        raise WorkflowError(f"{len(items)} items were given, limits.fan_out allows {fan_out}", where="over")
    _check_room(run, run_node, len(items) * len(node.do))
    return Record(event=NodeExpanded(path=run_node.path, items=items))


def _loop(run: Run, run_node: NodeRun, node: LoopNode) -> Record:
    if not run_node.scopes:
        _check_room(run, run_node, len(node.do))
        return Record(event=NodeExpanded(path=run_node.path, iteration=1))
    scope = run_node.scopes[-1]
    result = _result(run_node, scope)
    done = len(run_node.scopes) >= node.max_iterations
    until = run_node.step.templates.get("until")
    if done or (until is not None and bool(until.value(scope.context(until.names), where="until"))):
        return _finish(run_node.path, result)
    _check_room(run, run_node, len(node.do))
    event = NodeExpanded(path=run_node.path, iteration=len(run_node.scopes) + 1, previous=result)
    return Record(event=event)


def _branch(run: Run, run_node: NodeRun, node: BranchNode) -> Record:
    if run_node.scopes:
        taken = run_node.step.bodies.index(run_node.scopes[0].body)
        return _finish(run_node.path, _result(run_node, run_node.scopes[0], f"[{taken}]"))
    for number, body in enumerate(node.bodies):
        when = run_node.step.templates.get(f"when[{number}]")  # the else has none
        if when is None or bool(when.value(run_node.scope.context(when.names), where=f"cases.{number}.when")):
            _check_room(run, run_node, len(body.do))
            return Record(event=NodeExpanded(path=run_node.path, case=number))
    return _finish(run_node.path, None)


def _result(run_node: NodeRun, scope: Scope, suffix: str = "") -> Json:
    template = run_node.step.templates.get(f"result{suffix}")
    if template is None:
        return scope.outputs[scope.body.last]
    return template.value(scope.context(template.names), where="result")


def _finish(path: str, output: Json) -> Record:
    return Record(event=NodeFinished(path=path, output=checked(output, limit=OUTPUT_CHARS)))


def _check_room(run: Run, run_node: NodeRun, more: int) -> None:
    limits = run.graph.spec.limits
    if len(run.nodes) + more > limits.nodes:
        raise WorkflowError(
            f"the run would come to {len(run.nodes) + more} nodes, at most {limits.nodes} may be expanded; "
            "lower max_items or max_iterations"
        )
    if run_node.path.count("[") >= limits.depth:
        raise WorkflowError(f"the run would open a body inside {limits.depth} others, limits.depth allows no more")


def _text(run_node: NodeRun, name: str) -> str:
    template = run_node.step.templates[name]
    return template.text(run_node.scope.context(template.names), where=name)


def _literal(scope: Scope, value: Any, where: str) -> Json:
    match value:
        case Template():
            return value.value(scope.context(value.names), where=where)
        case list():
            return [_literal(scope, child, where) for child in value]
        case dict():
            return {key: _literal(scope, child, where) for key, child in value.items()}
        case _:
            return value
