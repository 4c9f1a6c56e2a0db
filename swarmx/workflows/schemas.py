"""JSON schemas in definitions: the part of the standard that is known here, and whether a value follows it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator

from swarmx.core.errors import WorkflowError
from swarmx.workflows.values import Json, checked

_TYPES = frozenset({"object", "array", "string", "number", "integer", "boolean", "null"})


def check_value(value: Json, schema: dict[str, Any], at: str) -> None:
    """The part of JSON Schema that decides whether later nodes find what they refer to: types, fields, enums.

    Raises WorkflowError, which calls the value `at`.
    """
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
                check_value(value[name], child, f"{at}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, item in enumerate(value):
            check_value(item, schema["items"], f"{at}[{i}]")


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
