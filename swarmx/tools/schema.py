"""A tool as a language model is shown it: OpenAI's function schema, small, flat and strict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swarmx.tools.tool import Names, Tool

_KEPT = frozenset({"type", "enum", "minimum", "maximum", "minLength", "maxLength"})
_REASON = {"type": "string", "maxLength": 160, "description": "Why, in one sentence."}


def schema_of(tool: Tool, names: Mapping[Names, Sequence[str]] | None = None) -> dict[str, Any]:
    """The function schema of the tool. Arguments that have a default are not offered: they are for people.

    `names` lists what may be named, by kind (models, replicas, policies, ...), and turns strings into enums. The
    `reason` that every tool takes is not an argument: `Registry.understand` sets it apart.
    """
    arguments = tool.arguments.model_json_schema()["properties"]
    properties: dict[str, Any] = {}
    for name, field in tool.arguments.model_fields.items():
        if field.is_required():
            properties[name] = _property(arguments[name], names or {})
    properties["reason"] = _REASON
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.help,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
                "additionalProperties": False,
            },
        },
    }


def _property(schema: Mapping[str, Any], names: Mapping[Names, Sequence[str]]) -> dict[str, Any]:
    known = names.get(schema.get("names", ""))
    if known:
        return {"type": "string", "enum": list(known)}
    return {key: value for key, value in schema.items() if key in _KEPT}
