"""What the model of an agent may call: the names on the wire, and what the model is told about each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from swarmx.core.toolbox import ToolSpec
from swarmx.workflows.functions import FUNCTIONS, Function
from swarmx.workflows.nodes import AgentNode, Definition
from swarmx.workflows.values import nearest

ANSWER = "answer"
"""The name under which a model gives an answer that follows the agent's schema."""

_WIRE_CHARS = 64
_ANY: dict[str, Any] = {}
_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "number": (int, float), "array": (list,), "object": (dict,)
}  # fmt: skip
_PARAMETERS: dict[str, dict[str, Any]] = {
    name: {"type": kind}
    for kind, names in {
        "string": ("by", "key", "new", "old", "separator", "text"),
        "array": ("items", "parts"),
        "integer": ("digits", "end", "start"),
        "boolean": ("descending",),
    }.items()
    for name in names
}
"""What the built-in functions take, by the names of their parameters; the others are any value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What stands behind a name: a tool that replicas have, a function, a sub-workflow, or the answer itself."""

    sort: Literal["tool", "function", "workflow", "answer"]
    name: str


def wire_name(name: str) -> str:
    """The name of a tool as models know it: they want letters, digits, `_` and `-`, so `server.tool` has `__`."""
    return re.sub(r"[^A-Za-z0-9_-]", "__", name)


def offers(agent: AgentNode) -> dict[str, Offer]:
    """What the agent may call, by the names on the wire."""
    found = {wire_name(name): Offer(sort="tool", name=name) for name in agent.tools}
    found |= {name: Offer(sort="function", name=name) for name in agent.functions}
    found |= {name: Offer(sort="workflow", name=name) for name in agent.workflows}
    if agent.json_schema is not None:
        found[ANSWER] = Offer(sort="answer", name=ANSWER)
    return found


def problems(agent: AgentNode, workflows: Collection[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with the names that the author listed, each with the field that it is in."""
    for name in agent.functions:
        if name not in FUNCTIONS:
            hint = nearest(name, set(FUNCTIONS))
            yield "functions", f"there is no function {name!r}{hint}; functions are {', '.join(sorted(FUNCTIONS))}"
    for name in agent.workflows:
        if name not in workflows:
            known = ", ".join(sorted(workflows)) or "none; define it under `workflows`"
            hint = nearest(name, set(workflows))
            yield "workflows", f"there is no workflow {name!r}{hint}; workflows are {known}"
    taken = {ANSWER: "the tool by which the agent answers"} if agent.json_schema is not None else {}
    for field in ("tools", "functions", "workflows"):
        for name in getattr(agent, field):
            wire = wire_name(name)
            if len(wire) > _WIRE_CHARS:
                yield field, f"{name!r} is longer than the {_WIRE_CHARS} characters that models take for a name"
            if wire in taken:
                yield field, f"{name!r} is {wire!r} for the model, and so is {taken[wire]}; list only one of them"
            taken[wire] = repr(name)


def told(agent: AgentNode, tools: Mapping[str, ToolSpec], workflows: Mapping[str, Definition]) -> list[dict[str, Any]]:
    """The `tools` of a request. A tool that is not there now is left out."""
    found: list[dict[str, Any]] = []
    for wire, offer in offers(agent).items():
        match offer.sort:
            case "tool" if offer.name in tools:
                spec = tools[offer.name]
                found.append(_told(wire, spec.description, spec.parameters))
            case "function":
                found.append(_told(wire, FUNCTIONS[offer.name].doc, _parameters(FUNCTIONS[offer.name])))
            case "workflow":
                definition = workflows[offer.name]
                description = definition.description or f"Runs the workflow {offer.name}."
                found.append(_told(wire, description, _inputs(definition)))
            case "answer":
                text = "Give the final answer. Call it once, when nothing else is to be done."
                found.append(_told(wire, text, agent.json_schema or {}))
            case _:
                pass
    return found


def _told(name: str, description: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _parameters(function: Function) -> dict[str, Any]:
    properties = {name: _PARAMETERS.get(name, _ANY) for name in (*function.required, *function.optional)}
    return {"type": "object", "properties": properties, "required": list(function.required)}


def _inputs(definition: Definition) -> dict[str, Any]:
    """The inputs of a workflow as parameters: one with a default takes what is of the same type."""
    properties: dict[str, Any] = {}
    for name, default in definition.inputs.items():
        kind = next((kind for kind, types in _KINDS.items() if type(default) in types), None)
        properties[name] = _ANY if kind is None else {"type": kind}
    required = [name for name, default in definition.inputs.items() if default is None]
    return {"type": "object", "properties": properties, "required": required}
