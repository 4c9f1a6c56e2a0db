"""JSON schemas in definitions: which ones there may be, and whether a value follows one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.exceptions import ValidationError as JsonSchemaError
from jsonschema.validators import extend
from pydantic import AfterValidator
from referencing import Registry

from swarmx.core.errors import WorkflowError
from swarmx.workflows.arguments import without_patterns
from swarmx.workflows.values import Json, checked

_SHOWN = 3
_SHOWN_CHARS = 200
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def check_value(value: Json, schema: dict[str, Any], at: str) -> None:
    """Whether the value follows the schema, by JSON Schema 2020-12 but for regular expressions, which are left out.

    Raises WorkflowError with what is wrong, at most three things; it calls the value `at`.
    """
    _check_shape(value, schema, at)
    validator = _validator(msgspec.json.encode(schema, order="sorted"))
    if validator is None:
        return
    try:
        errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    except RecursionError:
        raise WorkflowError(f"{at} is nested too deeply for its schema") from None
    if errors:
        found = [f"{at}{_place(error.absolute_path)}: {error.message[:_SHOWN_CHARS]}" for error in errors[:_SHOWN]]
        more = f"; and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise WorkflowError("; ".join(found) + more)


def _check_shape(value: Json, schema: dict[str, Any], at: str) -> None:
    """What decides whether later nodes find what they refer to: types, fields, enums. Raises WorkflowError."""
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
                _check_shape(value[name], child, f"{at}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, item in enumerate(value):
            _check_shape(item, schema["items"], f"{at}[{i}]")


@lru_cache(maxsize=256)
def _validator(schema: bytes) -> Any:
    """None for what is no schema by the standard: then its shape is all that counts."""
    plain = without_patterns(msgspec.json.decode(schema))
    try:
        Draft202012Validator.check_schema(plain)
    except (SchemaError, RecursionError):
        return None
    return _Checker(plain, registry=Registry())


def _unique(checker: Any, wanted: Any, value: Any, schema: Any) -> Iterator[JsonSchemaError]:
    """Each item is looked at once: the library compares every two of them, which takes minutes for some thousands."""
    if wanted is True and isinstance(value, list):
        seen: set[bytes] = set()
        for i, item in enumerate(value):
            text = msgspec.json.encode(_plain(item), order="sorted")
            if text in seen:
                yield JsonSchemaError(f"item {i} is there already, and items should be unique")
                return
            seen.add(text)


def _plain(value: Json) -> Json:
    """Equal values become the same: 1.0 is 1."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


_Checker = extend(Draft202012Validator, {"uniqueItems": _unique})  # type: ignore[no-untyped-call]


def _place(path: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


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


# pydantic turns ValueError into a problem at its place, and lets TypeError through
def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise ValueError("a JSON schema with `type: object` and `properties` was expected")
    return _of_any_value(schema)


def _of_any_value(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        checked(schema)
    except WorkflowError as error:
        raise ValueError(error.detail) from error
    _check_schema(schema, "")
    return schema


def _check_schema(schema: Any, at: str) -> None:
    if not isinstance(schema, dict):
        raise ValueError(f"the schema of {at or 'the answer'} is not a mapping")
    if "$ref" in schema or "$dynamicRef" in schema:
        raise ValueError(f"$ref is not supported (at {at or 'the top'}); write the schema out")
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise ValueError(f"{kind!r} is no JSON type (at {at or 'the top'}); types are {', '.join(sorted(_TYPES))}")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise ValueError(f"properties must be a mapping (at {at or 'the top'})")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        raise ValueError(f"required may list only names from properties (at {at or 'the top'})")
    for name, child in properties.items():
        _check_schema(child, f"{at}.{name}" if at else name)
    if "items" in schema:
        _check_schema(schema["items"], f"{at}[]")


ObjectSchema = Annotated[dict[str, Any], AfterValidator(_of_an_object)]
"""Of an object whose properties are known: what a model is to answer with."""

ValueSchema = Annotated[dict[str, Any], AfterValidator(_of_any_value)]
"""Of any value."""
