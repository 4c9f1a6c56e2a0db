"""What a request of a Serve deployment asks for: its prompt, read from arguments of many shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from msgspec.structs import replace

from swarmx.core.nouns import Call
from swarmx.core.prompts import PromptText
from swarmx.core.records import ModelRequest
from swarmx.runtime.requests import MOST_WHOLE, Said, call_saying, said_by

_TEXTS = ("prompt", "input", "inputs", "text", "query", "question", "message", "content", "body")
_LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens")
_MOST_TEXT = 1 << 20
_MOST_DEPTH = 3
_MAPPINGS, _SEQUENCES = (dict, Mapping), (list, Sequence)  # what is a dict is known for a mapping at once
_NOTHING: Mapping[str, Any] = {}


def call_from(
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    deployment: str,
    method: str,
    workflow_id: str,
    workflow_kind: str,
    session: str,
) -> tuple[Call, PromptText]:
    """The call and its prompt. Whatever the arguments are, there is one: without any text its prompt is empty.

    A text, bytes, a mapping or an object with an OpenAI body's fields (Ray Serve LLM's requests are such), and lists of
    these are read; of other mappings, the texts in them.
    """
    asked = [*args, *kwargs.values()]
    for value in asked:
        if (found := _openai(value)) is not None:
            said, body = found
            break
    else:
        text = "\n".join(part for value in asked if (part := _text(value, 0)))
        said, body = Said("", text[:_MOST_TEXT], ("user",), (text[:_MOST_TEXT],)), _limit(map(_fields, asked))
    role = method
    if said.system:
        role = f"{method}-{blake2b(said.system.encode(), digest_size=4).hexdigest()}"
    request = ModelRequest(
        tenant="ray",
        workflow_id=workflow_id,
        workflow_kind=workflow_kind,
        node=method,
        role=role,
        kind="llm",
        model=deployment,
        body=body,
    )
    call, prompt = call_saying(request, said)
    return (replace(call, session=session) if session not in ("", call.session) else call), prompt


def size_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """About how many bytes of prompt the arguments carry."""
    size = 0
    for value in [*args, *kwargs.values()]:
        messages = _field(value, "messages")
        if _is_sequence(messages):
            size += sum(len(_text(_field(message, "content"), 0)) for message in messages)
        else:
            size += len(_text(value, 0))
    return size


def _openai(value: Any) -> tuple[Said, dict[str, Any]] | None:
    """What a mapping or an object with messages says, and those fields of an OpenAI body besides that matter here."""
    fields = _fields(value)
    messages = fields.get("messages")
    if not (_is_sequence(messages) and messages):
        return None
    roles, texts = list[str](), list[str]()
    for message in messages:
        said = _fields(message)
        roles.append(str(said.get("role") or "user"))
        texts.append(_text(said.get("content"), 0))
    body = _limit((fields,))
    tools = fields.get("tools")
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
        body["tools"] = tools
    if fields.get("stream") is True:
        body["stream"] = True
    return said_by(roles, texts), body


def _is_sequence(value: Any) -> bool:
    return isinstance(value, _SEQUENCES) and not isinstance(value, str | bytes)


def _limit(asked: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The first limit that is named, but for one that no engine would take: the deployment will say so itself."""
    for fields in asked:
        for name in _LIMITS:
            limit = fields.get(name)
            if type(limit) is int:
                return {"max_tokens": limit} if 1 <= limit <= MOST_WHOLE else {}
    return {}


def _fields(value: Any) -> Mapping[str, Any]:
    """What a mapping has, or an object as plain attributes: a property could do anything."""
    if isinstance(value, _MAPPINGS):
        return value
    return getattr(value, "__dict__", _NOTHING)


def _field(value: Any, name: str) -> Any:
    return _fields(value).get(name)


def _text(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        try:
            return bytes(value[:_MOST_TEXT]).decode()
        except UnicodeDecodeError:
            return ""
    if depth >= _MOST_DEPTH:
        return ""
    for name in _TEXTS:
        if (found := _field(value, name)) is not None:
            return _text(found, depth + 1)
    if isinstance(value, Mapping):
        return "\n".join(found for part in list(value.values())[:64] if (found := _text(part, depth + 1)))
    if isinstance(value, list | tuple):
        return "\n".join(found for part in value[:64] if (found := _text(part, depth + 1)))
    return ""
