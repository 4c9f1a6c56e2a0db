"""Just enough JSON Schema: whether a value satisfies it, and the smallest value that does."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def satisfies(value: Any, schema: Schema, root: Schema | None = None) -> bool:
    """Whether the value meets the schema. Keywords other than those of `minimal` and unknown ones are not checked."""
    root = schema if root is None else root
    schema = _resolve(schema, root)
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if not all(satisfies(value, part, root) for part in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(satisfies(value, part, root) for part in schema[keyword]):
            return False
    kinds = _kinds(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    if isinstance(value, dict):
        return _object_satisfies(value, schema, root)
    if isinstance(value, list):
        items = schema.get("items")
        return _within(len(value), schema, "minItems", "maxItems") and (
            not isinstance(items, dict) or all(satisfies(item, items, root) for item in value)
        )
    if isinstance(value, str):
        return _within(len(value), schema, "minLength", "maxLength")
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _within(value, schema, "minimum", "maximum")
    return True


def minimal(schema: Schema, root: Schema | None = None) -> Any:
    """The smallest value that meets the schema: required fields only, first choices, shortest strings."""
    root = schema if root is None else root
    schema = _resolve(schema, root)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            return minimal(schema[keyword][0], root)
    if schema.get("allOf"):
        merged: Schema = {}
        for part in schema["allOf"]:
            merged |= _resolve(part, root)
        return minimal({k: v for k, v in (schema | merged).items() if k != "allOf"}, root)
    kinds = _kinds(schema) or (("object",) if "properties" in schema else ("null",))
    match kinds[0]:
        case "object":
            properties = schema.get("properties", {})
            return {name: minimal(properties.get(name, {}), root) for name in schema.get("required", ())}
        case "array":
            return [minimal(schema.get("items", {}), root) for _ in range(schema.get("minItems", 0))]
        case "string":
            return "x" * schema.get("minLength", 0)
        case "integer" | "number":
            low, high = schema.get("minimum"), schema.get("maximum")
            return low if low is not None else min(0, high) if high is not None else 0
        case "boolean":
            return False
        case _:
            return None


def _object_satisfies(value: dict[str, Any], schema: Schema, root: Schema) -> bool:
    properties = schema.get("properties", {})
    extra = schema.get("additionalProperties", True)
    if any(name not in value for name in schema.get("required", ())):
        return False
    for name, item in value.items():
        if name in properties:
            if not satisfies(item, properties[name], root):
                return False
        elif extra is False or (isinstance(extra, dict) and not satisfies(item, extra, root)):
            return False
    return True


def _resolve(schema: Schema, root: Schema) -> Schema:
    """Follow `#/...` references."""
    while "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target[part]
        schema = target
    return schema


def _kinds(schema: Schema) -> tuple[str, ...]:
    kind = schema.get("type", ())
    return (kind,) if isinstance(kind, str) else tuple(kind)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _TYPES.get(kind, ()))


def _within(size: float, schema: Schema, low: str, high: str) -> bool:
    return bool(schema.get(low, size) <= size <= schema.get(high, size))
