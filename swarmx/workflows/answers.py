"""What a model answered, made into a node's output: replicas may answer anything, and this never raises."""

from __future__ import annotations

import base64
import binascii
import re
from hashlib import sha256
from typing import Any

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.core.nouns import CallKind
from swarmx.core.records import Blob
from swarmx.workflows.limits import IMAGE_BYTES, TEXT_CHARS
from swarmx.workflows.schemas import check_value
from swarmx.workflows.values import Json, checked, parse_json

_MAX_IMAGES = 16
_MAX_USES = 32  # tools of one step of an agent
_NAME_CHARS = 64
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]")


class Usable(msgspec.Struct, frozen=True, kw_only=True):
    """A node's output, and the blobs that it refers to."""

    output: Json
    blobs: tuple[Blob, ...] = ()


class Unusable(msgspec.Struct, frozen=True, kw_only=True):
    """Why the answer gives no output."""

    error: str


def output_of(kind: CallKind, answer: Any, schema: dict[str, Any] | None = None) -> Usable | Unusable:
    """Read an answer in the OpenAI shape of its kind; with a schema, the text must be a JSON object that follows it."""
    try:
        return _chat(answer, schema) if kind == "llm" else _images(answer)
    except WorkflowError as error:
        return Unusable(error=error.detail)


def turn_of(answer: Any) -> Usable | Unusable:
    """Read the answer of an agent's model: {"text", "uses", "usage"}, with the tools that it asks for in `uses`.

    What the tools are called with is left as the model wrote it: to be wrong there costs a step, not the agent.
    """
    try:
        choice = _first(answer, "choices")
        message = choice.get("message")
        if not isinstance(message, dict):
            raise WorkflowError(f"the model answered without a message ({message!r:.40})")
        text = message.get("content")
        text = _kept(text) if isinstance(text, str) else ""
        uses = _uses(message.get("tool_calls"))
    except WorkflowError as error:
        return Unusable(error=error.detail)
    if not text.strip() and not uses:
        cut = (
            "; it was cut off at max_tokens, which should be higher" if choice.get("finish_reason") == "length" else ""
        )
        return Unusable(error=f"the model answered neither with text nor with a tool to call{cut}")
    return Usable(output={"text": text, "uses": uses, "usage": usage_of(answer.get("usage"))})


def _uses(calls: Any) -> list[dict[str, str]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise WorkflowError(f"the model's tool_calls are no list, but {calls!r:.40}")
    if len(calls) > _MAX_USES:
        raise WorkflowError(f"the model asked for {len(calls)} tools at once, at most {_MAX_USES} are called")
    found: list[dict[str, str]] = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise WorkflowError(f"the model asked for a tool without a name: {call!r:.80}")
        arguments = function.get("arguments")
        if isinstance(arguments, dict):  # some engines do not encode them
            arguments = msgspec.json.encode(checked(arguments)).decode()
        given = call.get("id")
        known = {use["id"] for use in found}
        fits = isinstance(given, str) and _ID.fullmatch(given) is not None and given not in known
        found.append(
            {
                "id": given
                if fits
                else f"call{len(found) + 1:05}",  # nine letters and digits: some templates want that
                "name": _NOT_IN_NAMES.sub("_", name)[:_NAME_CHARS],
                "arguments": _kept(arguments) if isinstance(arguments, str) else "",
            }
        )
    return found


def _kept(text: str) -> str:
    """Valid Unicode of bounded length."""
    if len(text) > TEXT_CHARS:
        raise WorkflowError(
            f"the model answered {len(text)} characters, at most {TEXT_CHARS} are kept; lower max_tokens"
        )
    return text.encode("utf-8", "replace").decode()


def _chat(answer: Any, schema: dict[str, Any] | None) -> Usable:
    choice = _first(answer, "choices")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise WorkflowError(f"the model answered without text (message.content is {text!r:.40}); a text was expected")
    text = _kept(text)
    value: Json = None
    if schema is not None:
        try:
            value = parse_json(text)
            check_value(value, schema, "the answer")
        except WorkflowError as error:
            raise WorkflowError(f"the model did not keep to the schema: {error.detail}{_cut_off(choice)}") from error
    return Usable(output={"text": text, "json": value, "usage": usage_of(answer.get("usage"))})


def _cut_off(choice: dict[str, Any]) -> str:
    cut = choice.get("finish_reason") == "length"
    return "; it was cut off at max_tokens, which should be higher" if cut else ""


def usage_of(usage: Any) -> dict[str, int]:
    """The token counts of an answer's `usage`, as far as they make sense."""
    counts = usage if isinstance(usage, dict) else {}
    found: dict[str, int] = {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = counts.get(name)
        if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**53:
            found[name] = count
    return found


def _images(answer: Any) -> Usable:
    _first(answer, "data")
    if len(answer["data"]) > _MAX_IMAGES:
        raise WorkflowError(f"the model answered {len(answer['data'])} images, at most {_MAX_IMAGES} are kept")
    blobs: list[Blob] = []
    for item in answer["data"]:
        encoded = item.get("b64_json") if isinstance(item, dict) else None
        if not isinstance(encoded, str):
            raise WorkflowError("the model answered an image without b64_json; only images inside the answer are read")
        if len(encoded) > IMAGE_BYTES * 4 // 3 + 4:
            raise WorkflowError(f"the model answered an image of more than {IMAGE_BYTES} bytes")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise WorkflowError(f"the model answered an image that is not base64: {error}") from error
        blobs.append(Blob(sha256=sha256(data).hexdigest(), media_type=_media_type(data), data=data))
    output = [{"sha256": b.sha256, "media_type": b.media_type, "bytes": len(b.data)} for b in blobs]
    return Usable(output={"images": output}, blobs=tuple(blobs))


def _media_type(data: bytes) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    raise WorkflowError(f"the model answered {len(data)} bytes that are neither PNG, JPEG nor WebP")


def _first(answer: Any, key: str) -> dict[str, Any]:
    items = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(items, list) or not items or not isinstance(items[0], dict):
        raise WorkflowError(f"the model's answer has no {key!r} list with an object in it")
    return items[0]
