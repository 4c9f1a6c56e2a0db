"""What an agent does next: asks its model, has the tools called that the model asks for, and ends with its answer.

The loop is that of ReAct (Yao et al., 2023): a step is one answer of the model; what its tools leave, or why they do
not, is what the model reads before the next step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, assert_never

from swarmx.core.errors import WorkflowError
from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.agent_context import Message, Round, shown
from swarmx.workflows.agent_state import Turn, Use
from swarmx.workflows.agent_tools import ANSWER, offers, told
from swarmx.workflows.commands import (
    Command,
    Record,
    begin_workflow,
    check_count,
    finish,
    model_call,
    outputs_of,
    rendered,
    tool_call,
)
from swarmx.workflows.events import NodeExpanded, NodeFailed, Spent
from swarmx.workflows.functions import call_function
from swarmx.workflows.limits import OUTPUT_CHARS
from swarmx.workflows.nodes import AgentNode, TurnNode, UseNode
from swarmx.workflows.schemas import check_value
from swarmx.workflows.spending import bounded, prompt_estimate, refusal
from swarmx.workflows.state import NodeRun, Run
from swarmx.workflows.values import Json, as_text, nearest, parse_json
from swarmx.workflows.work import StartModelCall

_REMINDER = f"Give your answer by calling the tool `{ANSWER}`."
_SHOWN_CHARS = 200


class _NoAnswer(Exception):  # control flow within this module, not an error
    """Why a step did not end the agent."""


def go_on(run: Run, run_node: NodeRun, agent: AgentNode, tools: Mapping[str, ToolSpec]) -> Record:
    """What follows once nothing of the agent is out. Raises WorkflowError when it cannot begin, or go on."""
    if not run_node.scopes:
        _check_known(agent, tools)
        return _begin(run, run_node, agent, 1, tools)
    turns = run_node.turns
    step, turn = len(turns), turns[-1]
    try:
        if run_node.scopes[-1].prefix != f"{run_node.path}.":  # the tools of the step were out, not its model
            return _end(run_node, turn.text, _given(run, run_node, agent, step))
        if turn.uses and (not turn.last or _gives_answer(agent, turn)):
            check_count(run, len(turn.uses))
            return Record(event=NodeExpanded(path=run_node.path, step=step, uses=len(turn.uses)))
        return _end(run_node, turn.text, _said_answer(agent, turn))
    except _NoAnswer as problem:
        if not turn.last:
            return _begin(run, run_node, agent, step + 1, tools)
        if step < agent.max_steps:
            error = f"the budget is used up but for this step, and it gave no answer: {problem}"
            return Record(event=NodeFailed(path=run_node.path, error=error, reason="budget"))
        error = f"the agent has used up its {agent.max_steps} steps (max_steps) without an answer: {problem}"
        return Record(event=NodeFailed(path=run_node.path, error=error, reason="steps"))


def ask(run: Run, run_node: NodeRun, turn: TurnNode, tools: Mapping[str, ToolSpec], now_s: float) -> StartModelCall:
    """The call of the model for one step, with what came before as far as it fits. Raises WorkflowError."""
    agent, owner = turn.agent, run.nodes[run_node.path.rpartition(".")[0]]
    body = _body(run, owner, agent, int(run_node.step.id), tools)
    if run_node.state != "running":  # what is out did fit, whatever has become of the catalogue
        _check_fits(agent, body)
    if "tools" in body:
        if agent.json_schema is not None and (turn.last or len(offers(agent)) == 1):
            body["tool_choice"] = {"type": "function", "function": {"name": ANSWER}}
        elif turn.last:
            body["tool_choice"] = "none"
    return model_call(run_node, turn, "llm", body, now_s)


def use(run: Run, run_node: NodeRun, node: UseNode, tools: Mapping[str, ToolSpec], now_s: float) -> Command:
    """What becomes of a tool that the model asked for. What cannot be done is told to the model, as a failed node."""
    known = offers(node.agent)
    offer = known.get(node.name)
    try:
        if offer is None:
            names = ", ".join(sorted(known)) or "none"
            raise WorkflowError(f"there is no tool {node.name!r}{nearest(node.name, set(known))}; tools are {names}")
        arguments = _arguments(node.arguments)
        match offer.sort:
            case "tool":
                return tool_call(run_node, node, offer.name, arguments, tools, now_s)
            case "function":
                return finish(run_node.path, call_function(offer.name, arguments))
            case "workflow" if run_node.scopes:
                return finish(run_node.path, outputs_of(run_node.scopes[0]))
            case "workflow":
                return begin_workflow(run, run_node, offer.name, arguments)
            case "answer":
                check_value(arguments, node.agent.json_schema or {}, "the answer")
                return finish(run_node.path, arguments)
            case _:
                assert_never(offer.sort)
    except WorkflowError as error:
        return Record(event=NodeFailed(path=run_node.path, error=str(error), reason="invalid"))


def admitted(run: Run, paths: Iterable[str]) -> list[str]:
    """Those of the nodes that may go on now: of the tools of one step, no more than `parallel_tools` are out at a time.

    One that rests before another attempt keeps its place.
    """
    out: dict[str, int] = {}
    found: list[str] = []
    for path in paths:
        run_node = run.nodes[path]
        node, prefix = run_node.step.node, run_node.scope.prefix
        if type(node) is UseNode and run_node.state == "ready" and path not in run.resting:
            if prefix not in out:
                out[prefix] = sum(_out(run, prefix + id) for id in run_node.scope.body.steps)
            if out[prefix] >= node.agent.parallel_tools:
                continue
            out[prefix] += 1
        found.append(path)
    return found


def _out(run: Run, path: str) -> bool:
    return run.nodes[path].state == "running" or path in run.resting


def _check_known(agent: AgentNode, tools: Mapping[str, ToolSpec]) -> None:
    for name in agent.tools:
        if name not in tools:
            known = ", ".join(sorted(tools)) or "none"
            raise WorkflowError(f"there is no tool {name!r}{nearest(name, set(tools))}; tools are {known}")


def _begin(run: Run, run_node: NodeRun, agent: AgentNode, step: int, tools: Mapping[str, ToolSpec]) -> Record:
    check_count(run, 1)
    last = step >= agent.max_steps or _nearly_spent(run, run_node, agent, step, tools)
    return Record(event=NodeExpanded(path=run_node.path, step=step, last=last))


def _nearly_spent(run: Run, run_node: NodeRun, agent: AgentNode, step: int, tools: Mapping[str, ToolSpec]) -> bool:
    """Whether some budget has too little left for this step, a tool, and a step like it after that.

    Money and time are foreseen by what the agent's calls came to so far: nobody else knows them here.
    """
    if not bounded(run, run_node.path):
        return False
    so_far = run.ledger.spent_by(run_node.path)
    prompt_tokens = prompt_estimate(_body(run, run_node, agent, step, tools))
    most = Spent(
        steps=3,
        prompt_tokens=2 * prompt_tokens,
        output_tokens=2 * agent.max_tokens,
        money=so_far.money * 2 * (prompt_tokens + agent.max_tokens) / max(1, so_far.tokens),
        replica_s=2 * so_far.replica_s / max(1, len(run_node.turns)),
    )
    return refusal(run, run_node.path, most) is not None


def _gives_answer(agent: AgentNode, turn: Turn) -> bool:
    return agent.json_schema is not None and any(item.name == ANSWER for item in turn.uses)


def _given(run: Run, run_node: NodeRun, agent: AgentNode, step: int) -> Json:
    """The answer that the model gave by the tool for it. Raises _NoAnswer."""
    turn, left = run_node.turns[-1], run_node.scopes[-1].outputs
    problem = "it asked for tools only"
    if _gives_answer(agent, turn):
        for number, item in enumerate(turn.uses, 1):
            if item.name == ANSWER:
                error = run.nodes[f"{run_node.path}.{step}.{number}"].error
                if error is None:
                    return left[str(number)]
                problem = error
    raise _NoAnswer(problem)


def _said_answer(agent: AgentNode, turn: Turn) -> Json:
    """The answer that the model wrote instead of calling the tool for it; None where text is all that was wanted.

    Raises _NoAnswer.
    """
    if not turn.text:
        raise _NoAnswer("it asked for tools only")
    if agent.json_schema is None:
        return None
    try:
        value = parse_json(turn.text)
        check_value(value, agent.json_schema, "the answer")
    except WorkflowError as error:
        raise _NoAnswer(error.detail) from error
    return value


def _end(run_node: NodeRun, text: str, json: Json) -> Record:
    usage: Counter[str] = Counter()
    for turn in run_node.turns:
        usage.update(turn.usage)
    output = {"text": text, "json": json, "steps": len(run_node.turns), "usage": dict(usage)}
    return finish(run_node.path, output)


def _body(run: Run, run_node: NodeRun, agent: AgentNode, step: int, tools: Mapping[str, ToolSpec]) -> dict[str, Any]:
    """The request for a step of this agent, where the model is free to choose."""
    first: list[Message] = [{"role": "user", "content": rendered(run_node, "prompt")}]
    if "system" in run_node.step.templates:
        first.insert(0, {"role": "system", "content": rendered(run_node, "system")})
    rounds = [_round(run, run_node, agent, step, turn) for step, turn in enumerate(run_node.turns[: step - 1], 1)]
    offered = told(agent, tools, run.graph.spec.workflows)
    body: dict[str, Any] = {
        "model": agent.model,
        "messages": shown(first, rounds, offered, _most_tokens(agent)),
        "max_tokens": agent.max_tokens,
        "temperature": agent.temperature,
    }
    return body | {"tools": offered} if offered else body


def _round(run: Run, run_node: NodeRun, agent: AgentNode, step: int, turn: Turn) -> Round:
    said: Message = {"role": "assistant", "content": turn.text or None}
    counted = turn.usage.get("prompt_tokens")
    if not turn.uses:
        return Round(said=said, followed=({"role": "user", "content": _REMINDER},), prompt_tokens=counted)
    said["tool_calls"] = [_said(item) for item in turn.uses]
    followed: list[Message] = []
    for number, item in enumerate(turn.uses, 1):
        used = run.nodes[f"{run_node.path}.{step}.{number}"]
        left = used.scope.outputs[str(number)]
        text = f"Error: {used.error}" if used.error is not None else as_text(left, limit=OUTPUT_CHARS)
        followed.append({"role": "tool", "tool_call_id": item.id, "content": _cut(text, agent.result_chars)})
    return Round(said=said, followed=tuple(followed), prompt_tokens=counted)


def _most_tokens(agent: AgentNode) -> int | None:
    """What a prompt may have for the answer to have room behind it; None if nobody knows the model's context."""
    return None if agent.context_tokens is None else agent.context_tokens - agent.max_tokens


def _check_fits(agent: AgentNode, body: dict[str, Any]) -> None:
    most, tokens = _most_tokens(agent), prompt_estimate(body)
    if most is not None and tokens > most:
        raise WorkflowError(
            f"the prompt would have about {tokens} tokens, with no more than the task, the tools and the last step; "
            f"context_tokens allows {most} beside the {agent.max_tokens} of the answer (max_tokens). Raise "
            "context_tokens if the model takes more, or lower max_tokens, result_chars or the number of tools"
        )


def _said(item: Use) -> dict[str, Any]:
    """The use as the model asked for it; engines refuse a conversation with arguments that are no JSON object."""
    try:
        _arguments(item.arguments)
        arguments = item.arguments or "{}"
    except WorkflowError:
        arguments = "{}"
    return {"id": item.id, "type": "function", "function": {"name": item.name, "arguments": arguments}}


def _arguments(text: str) -> dict[str, Json]:
    """The arguments as the model wrote them; it may write nothing where there are none."""
    if not text.strip():
        return {}
    try:
        arguments = parse_json(text)
    except WorkflowError as error:
        raise WorkflowError(f"the arguments are not JSON, or were cut off at max_tokens: {error.detail}") from error
    if not isinstance(arguments, dict):
        raise WorkflowError(f"the arguments should be a JSON object, they were {text[:_SHOWN_CHARS]!r}")
    return arguments


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}\n[Cut: {most} of {len(text)} characters are shown.]"
