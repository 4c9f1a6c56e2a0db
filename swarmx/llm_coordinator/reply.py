"""From what a language model sent back to one valid tool call, or to the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import pydantic

from swarmx.core.control import Reply, ToolCall
from swarmx.llm_coordinator.aliases import NAMED, Aliases
from swarmx.llm_coordinator.prompt import REASON
from swarmx.tools.tool import Tool

# Nesting that is too deep and bytes that are no text come with exceptions of their own.
_NOT_JSON = (msgspec.MsgspecError, RecursionError, UnicodeError)
_MOST_REASON = 160  # characters
_FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """A call that its tool accepts, with real names, and the reason in the chooser's words (at most 160 characters)."""

    call: ToolCall
    reason: str


class Unusable(msgspec.Struct, frozen=True, kw_only=True):
    """Why a reply is none, in words of our own: it is told to the model when it is asked again."""

    why: str


def read_reply(
    reply: Reply, tools: Mapping[str, Tool], aliases: Aliases, schemas: Iterable[Mapping[str, Any]]
) -> Parsed | Unusable:
    """The call in the reply, within the `schemas` that were in the prompt.

    A server that ignores `tool_choice` may write the call as JSON into its text: that counts too.
    """
    if reply.error is not None:
        return Unusable(why=_ERRORS[reply.error])
    sent = _sent(reply)
    if isinstance(sent, Unusable):
        return sent
    name, arguments = sent
    properties = {s["function"]["name"]: s["function"]["parameters"]["properties"] for s in schemas}.get(name)
    if properties is None:
        return Unusable(why="there is no such tool; use one of those that you are given.")
    if not arguments.keys() <= properties.keys():
        return Unusable(why=f"{name} takes these arguments only: {', '.join(properties)}.")
    reason = arguments.pop(REASON, "")
    for key, value in arguments.items():
        if "enum" in properties[key] and value not in properties[key]["enum"]:
            return Unusable(why=f"{name}: {key} must be one of {', '.join(properties[key]['enum'])}.")
    real = {key: aliases.names(NAMED[key])[value] if key in NAMED else value for key, value in arguments.items()}
    try:
        valid = tools[name].arguments.model_validate(real)
    except pydantic.ValidationError as error:
        return Unusable(why=_wrong(name, error))
    return Parsed(
        call=ToolCall(tool=name, arguments=valid.model_dump()),
        reason=cleaned(aliases.told(cleaned(reason))) if isinstance(reason, str) else "",
    )


def cleaned(text: str) -> str:
    """The text for people to read: one line, printable, cut to 160 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _MOST_REASON]).split())
    return line if len(line) <= _MOST_REASON else line[: _MOST_REASON - 1] + "…"


_ERRORS = {
    "unreachable": "the model cannot be reached.",
    "late": "the answer took too long.",
    "refused": "the model's server refused the request.",
    "too_long": "the answer was too long.",
    "not_a_reply": "the answer was not one call of one tool.",
}


def _sent(reply: Reply) -> tuple[str, dict[str, Any]] | Unusable:
    if reply.tool is not None:
        return _arguments(reply.tool, reply.arguments)
    if not reply.text.strip():
        return Unusable(why="the answer was empty; call one tool.")
    fenced = _FENCED.search(reply.text)
    written = _decoded(fenced[1] if fenced else reply.text)
    if isinstance(written, list):
        if len(written) != 1:
            return Unusable(why="the answer had several calls; call one tool.")
        (written,) = written
    if not isinstance(written, dict) or not isinstance(written.get("name"), str):
        return Unusable(why="the answer was text; call one tool.")
    return _arguments(written["name"], written.get("arguments", written.get("parameters", {})))


def _arguments(name: str, raw: object) -> tuple[str, dict[str, Any]] | Unusable:
    arguments = _decoded(raw or "{}") if isinstance(raw, str) else raw
    if not isinstance(arguments, dict):
        return Unusable(why="the arguments were not a JSON object.")
    return name, dict(arguments)


def _decoded(text: str) -> object:
    """The value of the JSON text; None when it is no JSON."""
    try:
        return msgspec.json.decode(text.strip())
    except _NOT_JSON:
        return None


def _wrong(name: str, error: pydantic.ValidationError) -> str:
    """Names the arguments at fault; what was sent is not repeated."""
    fields = sorted({str(problem["loc"][0]) for problem in error.errors(include_input=False) if problem["loc"]})
    return f"{name}: {', '.join(fields)} missing or out of range." if fields else f"{name}: the arguments contradict."
