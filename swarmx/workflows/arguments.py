"""Checks the arguments of a tool against its JSON Schema, which may be a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, best_match
from referencing import Registry
from referencing.exceptions import Unresolvable

from swarmx.core.errors import ConfigError

_SHOWN_CHARACTERS = 300


class Arguments:
    """The schema of one tool's arguments. Raises ConfigError when it is none.

    References lead to places in the schema only: nothing is ever fetched.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        if schema.get("type") != "object":
            raise ConfigError(f"the arguments of a tool are an object, and its schema says {schema.get('type')!r}")
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ConfigError(f"not a JSON Schema: {error.message[:_SHOWN_CHARACTERS]}") from None
        registry: Registry[Any] = Registry()  # the default one fetches what a reference names
        self._validator = Draft202012Validator(dict(schema), registry=registry)

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """What is wrong with the arguments, or nothing."""
        try:
            error = best_match(self._validator.iter_errors(arguments))
        except Unresolvable as missing:
            return f"the schema of the tool refers to {missing.ref!r}, which it does not have"
        except RecursionError:
            return "the arguments, or the schema of the tool, are nested too deeply"
        if error is None:
            return ""
        where = ".".join(map(str, error.absolute_path))
        return f"{where}: {error.message[:_SHOWN_CHARACTERS]}" if where else str(error.message[:_SHOWN_CHARACTERS])


def without_patterns(schema: Any) -> Any:
    """A stranger's schema without regular expressions: a backtracking engine can be kept busy with one for years.

    Where names follow a pattern, nothing is said any more of those that follow none.
    """
    if isinstance(schema, dict):
        named = isinstance(schema.get("patternProperties"), dict)
        return {
            key: without_patterns(value)
            for key, value in schema.items()
            if not (_is_pattern(key, value) or (named and key in ("additionalProperties", "unevaluatedProperties")))
        }
    if isinstance(schema, list):
        return [without_patterns(value) for value in schema]
    return schema


def _is_pattern(key: str, value: Any) -> bool:
    """A property may be named `pattern`, too; its value is a schema then, and not a text."""
    return key == "patternProperties" or (key == "pattern" and isinstance(value, str))
