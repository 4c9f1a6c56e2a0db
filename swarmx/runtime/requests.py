"""From an OpenAI request body to the call that the scheduler sees."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from swarmx.core.nouns import Call, CallKind
from swarmx.core.prefixes import names_of
from swarmx.core.prompt_key import prompt_key
from swarmx.core.prompts import HEAD_BYTES, TAIL_BYTES, PromptText
from swarmx.core.records import ModelRequest

ENDPOINTS: dict[CallKind, str] = {
    "llm": "/v1/chat/completions",
    "image": "/v1/images/generations",
    "tool": "/v1/tools/call",
}
DEFAULT_IMAGE_STEPS = 30
_BYTES_PER_TOKEN = 4.0
_DEFAULT_WORK_LIMIT_TOKENS = 131_072.0  # no limit was named: a long context's worth
MOST_WHOLE = 10_000_000
_NAMES_KEY = secrets.token_bytes(16)  # of this process: nobody else needs to know its names
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class BadRequest(Exception):
    """The body is not a request that this endpoint takes. `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Said(NamedTuple):
    """What a request says, message by message, and of it the first words of the system and of a user."""

    system: str
    user: str
    roles: Sequence[str]
    texts: Sequence[str]


def call_of(request: ModelRequest) -> tuple[Call, PromptText]:
    """The call of a model, and its prompt for the predictor. Raises BadRequest for what no engine would take."""
    return call_saying(request, _said(request.kind, request.body))


def call_saying(request: ModelRequest, said: Said) -> tuple[Call, PromptText]:
    """The same for a request whose messages were read already: its body needs none.

    `prompt_bytes` counts the texts alone, without the line ends between them; `prompt_tokens` the tools, too.
    """
    kind, body = request.kind, request.body
    tools = body.get("tools")
    told = msgspec.json.encode(tools) if tools else b""
    texts = [text.encode() for text in said.texts]
    size = sum(map(len, texts))
    call = Call(
        call_id=new_id("call"),
        tenant=request.tenant,
        kind=kind,
        model=request.model,
        role=request.role,
        workflow_id=request.workflow_id,
        workflow_kind=request.workflow_kind,
        node=request.node,
        prompt_key=prompt_key(said.system, said.user),
        prompt_bytes=size,
        prompt_tokens=max(1, int((size + len(told)) / _BYTES_PER_TOKEN)),
        work_limit=_work_limit(kind, body),
        stream=kind == "llm" and bool(body.get("stream", False)),
        deadline_at_s=request.deadline_at_s,
        priority=request.priority,
        session=request.workflow_id if kind == "llm" else "",
        prefix=_prefix(said.roles, texts, told) if kind == "llm" else (),
    )
    offered = len(tools) if isinstance(tools, list) else 0
    returns_tools = kind == "llm" and said.roles[-1] == "tool"
    return call, _prompt_text(texts, size + len(texts) - 1, tools=offered, returns_tools=returns_tools)


def new_id(kind: str) -> str:
    """A fresh opaque id such as "call_5f0c…"; 96 random bits."""
    return f"{kind}_{os.urandom(12).hex()}"


def _prefix(roles: Sequence[str], texts: Sequence[bytes], tools: bytes) -> tuple[int, ...]:
    """Names of the beginnings of what the engine will see: the tools, then each message behind its role."""
    parts = [tools]
    for role, text in zip(roles, texts, strict=True):
        parts += (f"\0{role}\0".encode(), text)
    return names_of(parts, _NAMES_KEY)


def _prompt_text(texts: Sequence[bytes], total_bytes: int, *, tools: int, returns_tools: bool) -> PromptText:
    """The same as `core.prompts.cut` of the texts joined by line ends, without joining them where they are long."""
    if total_bytes <= HEAD_BYTES + TAIL_BYTES:
        text = b"\n".join(texts)
    else:
        text = _first(texts, HEAD_BYTES) + _last(texts, TAIL_BYTES)
    return PromptText(text=text, total_bytes=total_bytes, messages=len(texts), tools=tools, returns_tools=returns_tools)


def _first(texts: Sequence[bytes], count: int) -> bytes:
    found = b""
    for text in texts:
        found += text[:count] + b"\n"
        if len(found) > count:
            break
    return found[:count]


def _last(texts: Sequence[bytes], count: int) -> bytes:
    found = b""
    for text in reversed(texts):
        found = b"\n" + text[-count:] + found
        if len(found) > count:
            break
    return found[-count:]


def _said(kind: CallKind, body: dict[str, Any]) -> Said:
    if kind == "image":
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise BadRequest("`prompt` must be a text that is not empty.", param="prompt")
        return Said("", prompt, [], [prompt])
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("`messages` must be a list with at least one message.", param="messages")
    roles, texts = list[str](), list[str]()
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
            raise BadRequest(f"`messages[{position}]` must be an object with a `role`.", param="messages")
        roles.append(role)
        texts.append(_text(message.get("content")))
    return said_by(roles, texts)


def said_by(roles: Sequence[str], texts: Sequence[str]) -> Said:
    """What these messages say, of which there is one at least."""
    system = user = ""
    for role, text in zip(roles, texts, strict=True):
        if role == "system":
            system = system or text
        elif role == "user":
            user = user or text
    return Said(system, user, roles, texts)


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content if isinstance(part, dict) and "text" in part)
    return ""


def _work_limit(kind: CallKind, body: dict[str, Any]) -> float:
    if kind == "llm":
        limit = body.get("max_completion_tokens")
        if limit is None:
            limit = body.get("max_tokens")
        return _DEFAULT_WORK_LIMIT_TOKENS if limit is None else float(_whole("max_tokens", limit))
    size = _SIZE.fullmatch(str(body.get("size", "1024x1024")))
    if size is None:
        raise BadRequest(f"`size` must look like 1024x1024, not {body['size']!r}.", param="size")
    steps, count = _whole("steps", body.get("steps", DEFAULT_IMAGE_STEPS)), _whole("n", body.get("n", 1))
    return steps * count * int(size[1]) * int(size[2]) / 1_048_576


def _whole(param: str, value: object) -> int:
    if type(value) is int and 1 <= value <= MOST_WHOLE:
        return value
    raise BadRequest(f"`{param}` must be a whole number from 1 to {MOST_WHOLE}, not {value!r}.", param=param)
