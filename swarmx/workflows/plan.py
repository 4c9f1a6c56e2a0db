"""What to do next in a run: pure decisions, as commands. The same run always gives the same commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
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
from swarmx.workflows.limits import NODES_EXPANDED, OUTPUT_CHARS
from swarmx.workflows.nodes import SIDE, STEPS, ImageNode, JoinNode, LlmNode, LoopNode, MapNode, ToolNode
from swarmx.workflows.state import NodeRun, Run, Scope
from swarmx.workflows.templates import Template
from swarmx.workflows.values import Json, checked


@dataclass(frozen=True, slots=True, kw_only=True)
class StartModelCall:
    """Record NodeStarted, then have this call answered. `body` is the OpenAI request, ready for the wire."""

    path: str
    kind: CallKind
    role: str
    model: str
    body: dict[str, Any]

    @property
    def started(self) -> NodeStarted:
        return NodeStarted(path=self.path, kind=self.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Record this event: it follows from the others."""

    event: Event


Command = StartModelCall | Record


def plan(run: Run) -> list[Command]:
    """Everything that is to be done now, without changing the run.

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
    return [_decide(run, run.nodes[path]) for path in run.due]


def advance(run: Run, events: Iterable[Event] = ()) -> tuple[list[Event], list[StartModelCall]]:
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
    while commands := plan(run):
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
    commands = [_decide(run, run.nodes[path]) for path in run.in_flight]
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


def _decide(run: Run, run_node: NodeRun) -> Command:
    path, step, scope = run_node.path, run_node.step, run_node.scope
    try:
        match step.node:
            case LlmNode() as node:
                return _llm_call(run_node, node)
            case ImageNode() as node:
                return _image_call(run_node, node)
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
            case _:
                assert_never(step.node)
    except WorkflowError as error:
        return Record(event=NodeFailed(path=path, error=str(error)))


def _llm_call(run_node: NodeRun, node: LlmNode) -> StartModelCall:
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
    return StartModelCall(path=run_node.path, kind="llm", role=node.role, model=node.model, body=body)


def _image_call(run_node: NodeRun, node: ImageNode) -> StartModelCall:
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
    return StartModelCall(path=run_node.path, kind="image", role=node.role, model=node.model, body=body)


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
    _check_room(run, len(items) * len(node.do))
    return Record(event=NodeExpanded(path=run_node.path, items=items))


def _loop(run: Run, run_node: NodeRun, node: LoopNode) -> Record:
    if not run_node.scopes:
        _check_room(run, len(node.do))
        return Record(event=NodeExpanded(path=run_node.path, iteration=1))
    scope = run_node.scopes[-1]
    result = _result(run_node, scope)
    done = len(run_node.scopes) >= node.max_iterations
    until = run_node.step.templates.get("until")
    if done or (until is not None and bool(until.value(scope.context(until.names), where="until"))):
        return _finish(run_node.path, result)
    _check_room(run, len(node.do))
    event = NodeExpanded(path=run_node.path, iteration=len(run_node.scopes) + 1, previous=result)
    return Record(event=event)


def _result(run_node: NodeRun, scope: Scope) -> Json:
    template = run_node.step.templates.get("result")
    if template is None:
        return scope.outputs[scope.body.last]
    return template.value(scope.context(template.names), where="result")


def _finish(path: str, output: Json) -> Record:
    return Record(event=NodeFinished(path=path, output=checked(output, limit=OUTPUT_CHARS)))


def _check_room(run: Run, more: int) -> None:
    if len(run.nodes) + more > NODES_EXPANDED:
        raise WorkflowError(
            f"the run would come to {len(run.nodes) + more} nodes, at most {NODES_EXPANDED} may be expanded; "
            "lower max_items or max_iterations"
        )


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
