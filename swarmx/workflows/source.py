"""The text of a definition to plain data: the safe, small part of YAML that JSON knows too."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import yaml

from swarmx.core.errors import WorkflowError
from swarmx.workflows.limits import SOURCE_BYTES, SOURCE_DEPTH

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_source(source: str | bytes | dict[str, Any]) -> dict[str, Any]:
    """Read YAML or JSON text, or take data as it is. Raises WorkflowError."""
    if isinstance(source, dict):
        data: Any = source
    else:
        data = _read_text(_decoded(source))
    if not isinstance(data, dict):
        raise WorkflowError(f"a workflow is a mapping with `name` and `nodes`, got {type(data).__name__}")
    _check_depth(data)
    return data


def _decoded(source: str | bytes) -> str:
    size = len(source if isinstance(source, bytes) else source.encode("utf-8", "replace"))
    if size > SOURCE_BYTES:
        raise WorkflowError(f"the definition has {size} bytes, at most {SOURCE_BYTES} are read; pass data as inputs")
    try:
        return source.decode() if isinstance(source, bytes) else source
    except UnicodeDecodeError as error:
        raise WorkflowError(f"the definition is not UTF-8: {error}") from error


def _read_text(text: str) -> Any:
    try:
        if text.lstrip().startswith("{"):
            try:
                return json.loads(text, object_pairs_hook=_pairs)
            except json.JSONDecodeError:
                pass  # YAML's flow style looks like JSON and is not
        depth = 0
        for event in yaml.parse(text, Loader=_SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise WorkflowError(
                    f"the alias *{event.anchor} is used; aliases are refused, "
                    "write the value out or put it into `inputs`"
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > SOURCE_DEPTH:
                raise WorkflowError(f"the definition nests deeper than {SOURCE_DEPTH} levels")
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a safe loader with fewer guesses
    except yaml.YAMLError as error:
        raise WorkflowError(f"the definition is neither YAML nor JSON: {error}") from error
    except (RecursionError, ValueError) as error:
        raise WorkflowError(f"the definition cannot be read: {error}") from error


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise WorkflowError(f"the key {key!r} stands twice in one mapping; rename one")
        found[key] = value
    return found


def _check_depth(data: Any) -> None:
    stack = [(data, 0)]
    visited = 0
    while stack:
        value, depth = stack.pop()
        visited += 1
        if depth > SOURCE_DEPTH or visited > SOURCE_BYTES:
            raise WorkflowError(f"the definition nests deeper than {SOURCE_DEPTH} levels or has too many values")
        if isinstance(value, dict):
            stack.extend((child, depth + 1) for child in value.values())
        elif isinstance(value, list):
            stack.extend((child, depth + 1) for child in value)


class _Loader(_SafeLoader):  # type: ignore[misc]  # the base is the C loader where PyYAML has it
    """YAML 1.2's core schema: `on`, `12:30` and dates stay text; a key that stands twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise WorkflowError(f"line {key_node.start_mark.line + 1} has a key that is not text")
        key = key_node.value
        if key in found:
            raise WorkflowError(f"the key {key!r} stands twice (line {key_node.start_mark.line + 1}); rename one")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _integer(loader: Any, node: yaml.ScalarNode) -> int:
    return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]{1,20}$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
):
    _firsts = [c if c != "\0" else "" for c in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _firsts)
