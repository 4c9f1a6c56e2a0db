"""Checks the arguments of a tool against its JSON Schema, which may be a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from referencing.exceptions import Unresolvable

from swarmx.core.errors import ConfigError, WorkflowError
from swarmx.workflows.json_schema import validator_of
from swarmx.workflows.patterns import bounded_work

_SHOWN_CHARACTERS = 300


class Arguments:
    """The schema of one tool's arguments. Raises ConfigError when it is none.

    References lead to places in the schema only: nothing is ever fetched.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        if schema.get("type") != "object":
            raise ConfigError(f"the arguments of a tool are an object, and its schema says {schema.get('type')!r}")
        try:
            self._validator = validator_of(schema)
        except SchemaError as error:
            raise ConfigError(f"not a JSON Schema: {error.message[:_SHOWN_CHARACTERS]}") from None

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """What is wrong with the arguments, or nothing."""
        try:
            with bounded_work():
                error = best_match(self._validator.iter_errors(arguments))
        except WorkflowError as bound:
            return bound.detail
        except Unresolvable as missing:
            return f"the schema of the tool refers to {missing.ref!r}, which it does not have"
        except RecursionError:
            return "the arguments, or the schema of the tool, are nested too deeply"
        except Exception as error:  # noqa: BLE001  # what a reference leads to need not be a schema
            return f"the schema of the tool cannot be followed ({type(error).__name__})"
        if error is None:
            return ""
        where = ".".join(map(str, error.absolute_path))
        return f"{where}: {error.message[:_SHOWN_CHARACTERS]}" if where else str(error.message[:_SHOWN_CHARACTERS])
