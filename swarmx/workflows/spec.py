"""From the text of a declared workflow to a checked definition; every complaint names the place and the way out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from swarmx.core.errors import WorkflowError
from swarmx.workflows.building import build_graph
from swarmx.workflows.graph import Graph, Problem
from swarmx.workflows.limits import NESTING, OUTPUT_CHARS
from swarmx.workflows.nodes import KINDS, NAMED_MODELS, NODE_MODELS, PART_MODELS, Definition, WorkflowSpec, field_names
from swarmx.workflows.schemas import SUBMITTED
from swarmx.workflows.source import read_source
from swarmx.workflows.values import Json, checked, nearest

__all__ = ["WorkflowSpec", "bind_inputs", "graph_of", "parse_workflow"]

_SHOWN = 20


def parse_workflow(source: str | bytes | dict[str, Any]) -> WorkflowSpec:
    """Read and check a definition (YAML or JSON text, or its data).

    Raises WorkflowError: `where` is the place of the first problem, `detail` has one problem a line.
    """
    spec = _parsed(source, SUBMITTED)
    if len(spec.nodes) > spec.limits.nodes:
        message = f"{len(spec.nodes)} nodes are defined, a run may have no more than {spec.limits.nodes}"
        raise _refusal([Problem(where="limits.nodes", message=message)])
    return spec


def _parsed(source: str | bytes | dict[str, Any], context: dict[str, Any] | None) -> WorkflowSpec:
    data = read_source(source)
    _check_nesting(data)
    try:
        spec = WorkflowSpec.model_validate(data, context=context)
    except ValidationError as error:
        raise _refusal([_problem(detail, data) for detail in error.errors(include_url=False)]) from error
    problems = build_graph(spec)[1]
    if problems:
        raise _refusal(problems)
    return spec


@lru_cache(maxsize=256)
def graph_of(spec_json: str) -> Graph:
    """The compiled graph of a definition as `WorkflowSpec.to_json` wrote it. Raises WorkflowError."""
    graph, problems = build_graph(_parsed(spec_json, None))
    if problems:
        raise _refusal(problems)
    return graph


def bind_inputs(spec: Definition, given: dict[str, Json]) -> dict[str, Json]:
    """The inputs of a run, or of a sub-workflow: what was given over the declared defaults. Raises WorkflowError."""
    for name in given:
        if name not in spec.inputs:
            known = ", ".join(sorted(spec.inputs)) or "none"
            hint = nearest(name, set(spec.inputs))
            raise WorkflowError(f"the workflow declares no such input{hint}; inputs: {known}", where=f"inputs.{name}")
    bound = dict(spec.inputs) | given
    for name, value in bound.items():
        if value is None:
            raise WorkflowError("this input has no default and must be given", where=f"inputs.{name}")
        try:
            checked(value, limit=OUTPUT_CHARS)
        except WorkflowError as error:
            raise WorkflowError(error.detail, where=f"inputs.{name}") from error
    return bound


def _refusal(problems: list[Problem]) -> WorkflowError:
    first = problems[0]
    lines = [first.message, *(f"{p.where}: {p.message}" for p in problems[1:_SHOWN])]
    if len(problems) > _SHOWN:
        lines.append(f"and {len(problems) - _SHOWN} more")
    return WorkflowError("\n".join(lines), where=first.where)


def _check_nesting(data: dict[str, Any]) -> None:
    wholes = [(data, ""), *((inner, f"workflows.{name}.") for name, inner in _items(data.get("workflows")))]
    stack = [
        (node, f"{at}nodes.{id}", 1)
        for whole, at in wholes
        if isinstance(whole, dict)
        for id, node in _items(whole.get("nodes"))
    ]
    while stack:
        node, where, depth = stack.pop()
        inner = _inside(node) if isinstance(node, dict) else []
        if inner and depth > NESTING:
            raise WorkflowError(f"maps, loops and branches may nest {NESTING} deep, this is one more", where=where)
        stack.extend((child, f"{where}.{at}", depth + 1) for at, child in inner)


def _inside(node: dict[Any, Any]) -> list[tuple[str, Any]]:
    """What the node has in its bodies, with the places, in a definition that nobody has checked yet."""
    cases = node.get("cases")
    bodies = [("", node), ("else.", node.get("else"))]
    bodies += [(f"cases.{i}.", case) for i, case in enumerate(cases if isinstance(cases, list) else [])]
    return [
        (f"{at}do.{id}", child) for at, body in bodies if isinstance(body, dict) for id, child in _items(body.get("do"))
    ]


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _problem(detail: ErrorDetails, data: dict[str, Any]) -> Problem:
    path, kind = _located(detail["loc"], data)
    context = detail.get("ctx", {})
    kinds = f"kinds are {', '.join(KINDS)}"
    name = path[-1] if path else ""
    match detail["type"]:
        case "extra_forbidden":
            known = field_names(_form_around(path, kind))
            message = f"unknown field {name!r}{nearest(name, known)}; fields are {', '.join(sorted(known))}"
        case "missing":
            message = "this field is missing"
        case "union_tag_invalid":
            tag = str(context.get("tag", ""))
            message = f"unknown node kind {tag[:60]!r}{nearest(tag, KINDS)}; {kinds}"
        case "union_tag_not_found":
            message = f"the node says no `kind`; {kinds}"
        case "string_pattern_mismatch":
            message = f"{detail['input']!r:.80} was given, a text like {context.get('pattern')} was expected"
        case "value_error":
            message = str(context.get("error", detail["msg"])) + f", got {detail['input']!r:.60}"
        case _:
            message = f"{detail['msg']}, got {detail['input']!r:.60}"
    return Problem(where=".".join(path), message=message)


def _form_around(path: list[str], kind: str | None) -> type[BaseModel]:
    """The form that the last name of the path was to be a field of."""
    names = [part for part in path[:-1] if not part.isdecimal()]
    if len(names) == 2 and names[0] in NAMED_MODELS:
        return NAMED_MODELS[names[0]]
    is_field = names and (len(names) == 1 or names[-2] not in ("nodes", "do"))
    if is_field and names[-1] in PART_MODELS:
        return PART_MODELS[names[-1]]
    return NODE_MODELS[kind] if kind else WorkflowSpec


def _located(loc: tuple[int | str, ...], data: Any) -> tuple[list[str], str | None]:
    """The path as authors see it (without pydantic's tags), and the kind of the node it ends in."""
    path: list[str] = []
    kind: str | None = None
    at_node = False
    for i, part in enumerate(loc):
        if at_node and part in KINDS and isinstance(data, dict) and data.get("kind") == part:
            kind, at_node = str(part), False
            continue
        if part == "[key]":
            continue
        at_node = i > 0 and loc[i - 1] in ("nodes", "do")
        path.append(str(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return path, kind
