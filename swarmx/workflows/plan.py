"""What to do next in a run: pure decisions, as commands. The same run always gives the same commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows import agent, signals
from swarmx.workflows.answers import Unusable, Usable, output_of, turn_of
from swarmx.workflows.commands import (
    Command,
    Record,
    begin_workflow,
    check_room,
    finish,
    model_call,
    outputs_of,
    rendered,
    tool_call,
)
from swarmx.workflows.events import (
    Cancelled,
    Event,
    Failed,
    Finished,
    NodeExpanded,
    NodeFailed,
    NodeStarted,
)
from swarmx.workflows.functions import call_function
from swarmx.workflows.nodes import (
    SIDE,
    STEPS,
    AgentNode,
    BranchNode,
    ImageNode,
    JoinNode,
    LlmNode,
    LoopNode,
    MapNode,
    SubNode,
    ToolNode,
    TurnNode,
    UseNode,
)
from swarmx.workflows.retries import after_failure
from swarmx.workflows.spending import NO_PRICES, Prices, admission
from swarmx.workflows.state import NodeRun, Run, Scope
from swarmx.workflows.templates import Template
from swarmx.workflows.values import Json
from swarmx.workflows.work import NO_TOOLS, Start, StartModelCall, StartToolCall


def plan(run: Run, now_s: float, tools: Mapping[str, ToolSpec] = NO_TOOLS) -> list[Command]:
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
    late = next((path for path, at_s in run.timeouts.items() if at_s <= now_s), None) if run.timeouts else None
    if late is not None:
        return [Record(event=_too_late(run, late, now_s))]  # one at a time: each counts against what retries there are
    if run.awaited and (overdue := signals.overdue(run, now_s)) is not None:
        return [Record(event=overdue)]
    if run.root.complete:
        wanted = sorted(run.root.body.closing - run.signals.keys())
        return [Record(event=event) for event in signals.await_signals(run, wanted, now_s)] if wanted else [_end(run)]
    if not (run.due or run.resting):
        return []
    decided: list[Command] = []
    wanted = []
    rested = [path for path, at_s in run.resting.items() if at_s <= now_s]
    for path in agent.admitted(run, (*run.due, *rested)):
        if missing := signals.missing(run, run.nodes[path]):
            wanted += missing
        else:
            decided.append(_decide(run, run.nodes[path], now_s, tools))
    if wanted:
        decided[:0] = [Record(event=event) for event in signals.await_signals(run, wanted, now_s)]
    return decided


def wake_at_s(run: Run) -> float | None:
    """When there is something to plan even if nothing happens, Unix seconds."""
    if run.ended or not (run.timeouts or run.resting or run.awaited):
        return None
    times = (*run.timeouts.values(), *run.resting.values(), *run.awaited.values())
    return min((at_s for at_s in times if at_s is not None), default=None)


def advance(
    run: Run,
    events: Iterable[Event] = (),
    *,
    now_s: float,
    tools: Mapping[str, ToolSpec] = NO_TOOLS,
    prices: Prices = NO_PRICES,
) -> tuple[list[Event], list[Start]]:
    """Apply the events and whatever follows from them; return all of them, to be recorded, and the calls to make.

    Events that come after the end are dropped. The prices are what budgets of money go by.
    """
    recorded: list[Event] = []
    calls: list[Start] = []

    def record(event: Event) -> None:
        if not run.ended:
            run.apply(event)
            recorded.append(event)

    for event in events:
        record(event)
    while commands := plan(run, now_s, tools):
        for command in commands:
            if _void(run, command):
                continue
            match command:
                case Record(event=event):
                    record(event)
                case StartModelCall() | StartToolCall():
                    begun = admission(run, command, prices)
                    record(begun)
                    if isinstance(begun, NodeStarted):
                        calls.append(command)
                case _:
                    assert_never(command)
    return recorded, [call for call in calls if call.path in run.in_flight] if not run.ended else []


def _void(run: Run, command: Command) -> bool:
    """Whether what was recorded meanwhile took the command's node with it, or the room: that is decided anew then."""
    what = command.event if isinstance(command, Record) else command
    if isinstance(what, Finished | Failed | Cancelled):
        return False
    if isinstance(what, NodeExpanded) and not run.room_for(what):
        return True
    node = run.nodes.get(getattr(what, "path", ""))
    return node is not None and node.state == "failed"


def calls_in_flight(run: Run, tools: Mapping[str, ToolSpec] = NO_TOOLS) -> list[Start]:
    """The calls that were out when the events end: a run that is picked up again makes them again."""
    commands = [_decide(run, run.nodes[path], 0.0, tools) for path in run.in_flight]
    return [command for command in commands if not isinstance(command, Record)]


def read_answer(run: Run, path: str, answer: Any) -> Usable | Unusable:
    """What the answer to the node's model call means to the node."""
    node = run.nodes[path].step.node
    if isinstance(node, TurnNode):
        return turn_of(answer)
    if isinstance(node, LlmNode):
        return output_of("llm", answer, node.json_schema)
    return output_of("image", answer)


def _end(run: Run) -> Record:
    try:
        return Record(event=Finished(outputs=outputs_of(run.root)))
    except WorkflowError as error:
        return Record(event=Failed(error=str(error)))


def _too_late(run: Run, path: str, now_s: float) -> Event:
    timeout_s = getattr(run.nodes[path].step.node, "timeout_s", None)
    failure = Failure(cause="timeout", error=f"the attempt took longer than timeout_s, {timeout_s:g} s", begun=True)
    return after_failure(run, path, failure, now_s)


def _decide(run: Run, run_node: NodeRun, now_s: float, tools: Mapping[str, ToolSpec]) -> Command:
    path, step, scope = run_node.path, run_node.step, run_node.scope
    try:
        match step.node:
            case TurnNode() as node:
                return agent.ask(run, run_node, node, tools, now_s)
            case LlmNode() as node:
                return _llm_call(run_node, node, now_s)
            case ImageNode() as node:
                return _image_call(run_node, node, now_s)
            case ToolNode() as node:
                arguments = {name: _literal(scope, value, f"args.{name}") for name, value in step.args.items()}
                if node.tool is not None:
                    return tool_call(run_node, node, node.tool, arguments, tools, now_s)
                return finish(path, call_function(node.function or "", arguments))
            case UseNode() as node:
                return agent.use(run, run_node, node, tools, now_s)
            case AgentNode() as node:
                return agent.go_on(run, run_node, node, tools)
            case JoinNode() as node:
                values = scope.context(node.of)
                return finish(path, [values[name] for name in node.of])
            case MapNode() as node:
                return _map(run, run_node, node)
            case LoopNode() as node:
                return _loop(run, run_node, node)
            case BranchNode() as node:
                return _branch(run, run_node, node)
            case SubNode() as node:
                return _sub(run, run_node, node)
            case _:
                assert_never(step.node)
    except WorkflowError as error:
        return Record(event=NodeFailed(path=path, error=str(error)))


def _llm_call(run_node: NodeRun, node: LlmNode, now_s: float) -> StartModelCall:
    messages = [{"role": "user", "content": rendered(run_node, "prompt")}]
    if "system" in run_node.step.templates:
        messages.insert(0, {"role": "system", "content": rendered(run_node, "system")})
    body: dict[str, Any] = {
        "model": node.model,
        "messages": messages,
        "max_tokens": node.max_tokens,
        "temperature": node.temperature,
    }
    if node.json_schema is not None:
        named = {"name": run_node.step.id, "schema": node.json_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return model_call(run_node, node, "llm", body, now_s)


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
        "prompt": rendered(run_node, "prompt"),
        "n": node.n,
        "size": size,
        "steps": whole("steps", node.steps, STEPS),
    }
    return model_call(run_node, node, "image", body, now_s)


def _map(run: Run, run_node: NodeRun, node: MapNode) -> Record:
    if run_node.state == "running":
        results = [_result(run_node, scope) for scope in run_node.scopes]
        return finish(run_node.path, results)
    over = run_node.step.templates["over"]
    items = over.value(run_node.scope.context(over.names), where="over")
    if not isinstance(items, list):
        raise WorkflowError(f"a list was expected, got {items!r:.60}", where="over")
    if len(items) > node.max_items:
        message = f"{len(items)} items were given, max_items allows {node.max_items}; raise it or shorten the list"
        raise WorkflowError(message, where="over")
    if not items:
        return finish(run_node.path, [])
    fan_out = run.graph.spec.limits.fan_out
    if len(items) > fan_out:
        raise WorkflowError(f"{len(items)} items were given, limits.fan_out allows {fan_out}", where="over")
    check_room(run, run_node, len(items) * len(node.do))
    return Record(event=NodeExpanded(path=run_node.path, items=items))


def _loop(run: Run, run_node: NodeRun, node: LoopNode) -> Record:
    if not run_node.scopes:
        check_room(run, run_node, len(node.do))
        return Record(event=NodeExpanded(path=run_node.path, iteration=1))
    scope = run_node.scopes[-1]
    result = _result(run_node, scope)
    done = len(run_node.scopes) >= node.max_iterations
    until = run_node.step.templates.get("until")
    if done or (until is not None and bool(until.value(scope.context(until.names), where="until"))):
        return finish(run_node.path, result)
    check_room(run, run_node, len(node.do))
    event = NodeExpanded(path=run_node.path, iteration=len(run_node.scopes) + 1, previous=result)
    return Record(event=event)


def _branch(run: Run, run_node: NodeRun, node: BranchNode) -> Record:
    if run_node.scopes:
        taken = run_node.step.bodies.index(run_node.scopes[0].body)
        return finish(run_node.path, _result(run_node, run_node.scopes[0], f"[{taken}]"))
    for number, body in enumerate(node.bodies):
        when = run_node.step.templates.get(f"when[{number}]")  # the else has none
        if when is None or bool(when.value(run_node.scope.context(when.names), where=f"cases.{number}.when")):
            check_room(run, run_node, len(body.do))
            return Record(event=NodeExpanded(path=run_node.path, case=number))
    return finish(run_node.path, None)


def _sub(run: Run, run_node: NodeRun, node: SubNode) -> Record:
    if run_node.scopes:
        return finish(run_node.path, outputs_of(run_node.scopes[0]))
    given = {name: _literal(run_node.scope, value, f"inputs.{name}") for name, value in run_node.step.args.items()}
    return begin_workflow(run, run_node, node.use, given)


def _result(run_node: NodeRun, scope: Scope, suffix: str = "") -> Json:
    template = run_node.step.templates.get(f"result{suffix}")
    if template is None:
        return scope.outputs[scope.body.last]
    return template.value(scope.context(template.names), where="result")


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
