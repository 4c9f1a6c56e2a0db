"""JSON schemas in definitions: which ones there may be, and whether a value follows one."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from jsonschema.exceptions import SchemaError
from pydantic import AfterValidator, ValidationInfo
from referencing.exceptions import Unresolvable

from swarmx.core.errors import WorkflowError
from swarmx.workflows.json_schema import parts_of, unusable_patterns, validator_of
from swarmx.workflows.patterns import bounded_work
from swarmx.workflows.values import Json, checked

_SHOWN = 3
_SHOWN_CHARS = 200
_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def check_value(value: Json, schema: dict[str, Any], at: str) -> None:
    """Whether the value follows the schema, by JSON Schema 2020-12.

    Raises WorkflowError with what is wrong, at most three things; it calls the value `at`.
    """
    _check_shape(value, schema, at)
    validator = _validator(msgspec.json.encode(schema, order="sorted"))
    if validator is None:
        return
    try:
        with bounded_work():
            errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    except RecursionError:
        raise WorkflowError(f"{at} is nested too deeply for its schema") from None
    except Unresolvable as missing:
        raise WorkflowError(f"the schema of {at} refers to {missing.ref!r}, which it does not have") from None
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
    try:
        return validator_of(msgspec.json.decode(schema))
    except (SchemaError, RecursionError):
        return None


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


SUBMITTED = {"submitted": True}
"""The context of pydantic for a definition that is new. One that is stored was held to the rules of its day."""


def is_new(info: ValidationInfo) -> bool:
    """Whether somebody is there to be told what is wrong."""
    return info.context == SUBMITTED


# pydantic turns ValueError into a problem at its place, and lets TypeError through
def _of_an_object(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    if schema.get("type") != "object" or not isinstance(schema.get("properties"), dict):
        raise ValueError("a JSON schema with `type: object` and `properties` was expected")
    return _of_any_value(schema, info)


def _of_any_value(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    try:
        checked(schema)
    except WorkflowError as error:
        raise ValueError(error.detail) from error
    _check_schema(schema, "")
    if is_new(info):
        for at, part in parts_of(schema):
            _check_references(part, at)
        for at, why in unusable_patterns(schema):
            raise ValueError(f"{why} (at {at or 'the top'})")
    return schema


def _check_references(schema: dict[str, Any], at: str) -> None:
    if "$ref" in schema or "$dynamicRef" in schema:
        raise ValueError(f"$ref is not supported (at {at or 'the top'}); write the schema out")


def _check_schema(schema: Any, at: str) -> None:
    if not isinstance(schema, dict):
        raise ValueError(f"the schema of {at or 'the answer'} is not a mapping")
    _check_references(schema, at)
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
