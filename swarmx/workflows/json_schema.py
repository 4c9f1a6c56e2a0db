"""JSON Schema 2020-12 as strangers may write it: nothing is fetched, no pattern and no list keeps a check busy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from referencing import Registry

from swarmx.workflows.patterns import matches, refused

_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else", "unevaluatedItems",
    "unevaluatedProperties", "contentSchema",
)  # fmt: skip


def validator_of(schema: Mapping[str, Any]) -> Any:
    """Finds the errors of values. Raises jsonschema's SchemaError for what is no schema.

    Patterns that cannot be used say nothing. Nor does `unevaluatedProperties` in a schema with `patternProperties`,
    for which the library would ask Python's own engine.
    """
    # The formats of the standard's own schema have Python's engine compile patterns.
    Draft202012Validator.check_schema(schema, format_checker=FormatChecker(()))
    named = b'"patternProperties"' in msgspec.json.encode(schema)
    return (_Named if named else _Plain)(dict(schema), registry=Registry())  # the default one fetches references


def unusable_patterns(schema: Any) -> Iterator[tuple[str, str]]:
    """Where in the schema there are patterns that cannot be used, and why."""
    for at, part in parts_of(schema):
        for pattern in _patterns(part):
            if why := refused(pattern):
                yield at, why


def without_unusable_patterns(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of somebody who cannot be asked for another one, without the patterns that cannot be used.

    Where names follow such a pattern, nothing is said any more of those that follow none.
    """
    if next(unusable_patterns(schema), None) is None:
        return schema
    copy: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    for _, part in parts_of(copy):
        bad = {pattern for pattern in _patterns(part) if refused(pattern)}
        if part.get("pattern") in bad:
            del part["pattern"]
        named = part.get("patternProperties")
        if isinstance(named, dict) and bad & named.keys():
            part["patternProperties"] = {key: value for key, value in named.items() if key not in bad}
            part.pop("additionalProperties", None)
            part.pop("unevaluatedProperties", None)
    return copy


def parts_of(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside the schema, itself too, with its place."""
    stack = [("", schema)]
    while stack:
        at, part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield at, part
        dot = f"{at}." if at else ""
        for key in _SINGLE:
            stack.append((f"{dot}{key}", part.get(key)))
        for key in _MAPPINGS:
            if isinstance(inner := part.get(key), dict):
                stack.extend((f"{dot}{key}.{name}", child) for name, child in inner.items())
        for key in _LISTS:
            if isinstance(several := part.get(key), list):
                stack.extend((f"{dot}{key}.{i}", child) for i, child in enumerate(several))


def _patterns(part: dict[str, Any]) -> Iterator[str]:
    if isinstance(pattern := part.get("pattern"), str):
        yield pattern
    if isinstance(named := part.get("patternProperties"), dict):
        yield from named


# Keywords: (the validator, what the schema says, the value, the schema) -> errors, in the words of the library.


def _pattern(checker: Any, pattern: str, value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, str) and not refused(pattern) and not matches(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _pattern_properties(checker: Any, named: dict[str, Any], value: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(value, dict):
        for pattern, child in named.items():
            for name, item in value.items():
                if not refused(pattern) and matches(pattern, name):
                    yield from checker.descend(item, child, path=name, schema_path=pattern)


def _additional_properties(checker: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(value, dict):
        return
    named = list(schema.get("patternProperties", {}))
    others = value.keys() - schema.get("properties", {}).keys()
    extras = sorted(name for name in others if not any(refused(p) or matches(p, name) for p in named))
    if isinstance(wanted, dict):
        for name in extras:
            yield from checker.descend(value[name], wanted, path=name)
    elif wanted is False and extras:
        shown = ", ".join(map(repr, extras))
        one = len(extras) == 1
        if named:
            patterns = ", ".join(map(repr, sorted(named)))
            yield ValidationError(f"{shown} {'does' if one else 'do'} not match any of the regexes: {patterns}")
        else:
            were = "was" if one else "were"
            yield ValidationError(f"Additional properties are not allowed ({shown} {were} unexpected)")


def _unique_items(checker: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """Each item is looked at once: the library compares every two of them, which takes minutes for some thousands."""
    if wanted is True and isinstance(value, list):
        seen: set[bytes] = set()
        for i, item in enumerate(value):
            text = msgspec.json.encode(_plain(item), order="sorted")
            if text in seen:
                yield ValidationError(f"item {i} is there already, and items should be unique")
                return
            seen.add(text)


def _plain(value: Any) -> Any:
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


def _silent(checker: Any, wanted: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    return iter(())


_Plain: Any = extend(  # type: ignore[no-untyped-call]
    Draft202012Validator,
    {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    },
)
_Named: Any = extend(_Plain, {"unevaluatedProperties": _silent})  # type: ignore[no-untyped-call]
