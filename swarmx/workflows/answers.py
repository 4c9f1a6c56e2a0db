"""What a model answered, made into a node's output: replicas may answer anything, and this never raises."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from swarmx.core.errors import WorkflowError
from swarmx.core.nouns import CallKind
from swarmx.core.records import Blob
from swarmx.workflows.limits import IMAGE_BYTES, TEXT_CHARS
from swarmx.workflows.values import Json, parse_json

_MAX_IMAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """A node's output, and the blobs that it refers to."""

    output: Json
    blobs: tuple[Blob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """Why the answer gives no output."""

    error: str


def output_of(kind: CallKind, answer: Any, schema: dict[str, Any] | None = None) -> Usable | Unusable:
    """Read an answer in the OpenAI shape of its kind; with a schema, the text must be a JSON object that follows it."""
    try:
        return _chat(answer, schema) if kind == "llm" else _images(answer)
    except WorkflowError as error:
        return Unusable(error=error.detail)


def _chat(answer: Any, schema: dict[str, Any] | None) -> Usable:
    choice = _first(answer, "choices")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise WorkflowError(f"the model answered without text (message.content is {text!r:.40}); a text was expected")
    if len(text) > TEXT_CHARS:
        raise WorkflowError(
            f"the model answered {len(text)} characters, at most {TEXT_CHARS} are kept; lower max_tokens"
        )
    text = text.encode("utf-8", "replace").decode()
    value: Json = None
    if schema is not None:
        try:
            value = parse_json(text)
            _check(value, schema, "the answer")
        except WorkflowError as error:
            cut = choice.get("finish_reason") == "length"
            why = "; it was cut off at max_tokens, which should be higher" if cut else ""
            raise WorkflowError(f"the model did not keep to the schema: {error.detail}{why}") from error
    return Usable(output={"text": text, "json": value, "usage": _usage(answer.get("usage"))})


def _usage(usage: Any) -> dict[str, int]:
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


def _check(value: Json, schema: dict[str, Any], at: str) -> None:
    """The part of JSON Schema that decides whether later nodes find what they refer to: types, fields, enums."""
    kinds = schema.get("type")
    if kinds is not None and not any(_is(value, kind) for kind in (kinds if isinstance(kinds, list) else [kinds])):
        raise WorkflowError(f"{at} should be {kinds}, got {value!r:.60}")
    if "enum" in schema and value not in schema["enum"]:
        raise WorkflowError(f"{at} should be one of {schema['enum']!r:.120}, got {value!r:.60}")
    if isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                raise WorkflowError(f"{at} lacks the field {name!r}")
        for name, child in schema.get("properties", {}).items():
            if name in value:
                _check(value[name], child, f"{at}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, item in enumerate(value):
            _check(item, schema["items"], f"{at}[{i}]")


def _is(value: Json, kind: str) -> bool:
    match kind:
        case "object":
            return isinstance(value, dict)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return not isinstance(value, bool) and (
                isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            )
        case _:
            return isinstance(value, int | float) and not isinstance(value, bool)
