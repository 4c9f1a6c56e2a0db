"""What a language model is shown of a tool is small, flat and strict, and whatever it allows is understood."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.control import ToolCall
from swarmx.tools.registry import make_registry
from swarmx.tools.schema import schema_of
from swarmx.tools.tool import Names
from tests.tools.worlds import CATALOGUE

REGISTRY = make_registry(CATALOGUE)
EVERY = pytest.mark.parametrize("name", REGISTRY.tools)
NAMES: dict[Names, list[str]] = {"model": ["m1", "m2"], "replica": ["r1"], "routing_policy": ["sticky"]}


def parameters(name: str, names: dict[Names, list[str]] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = schema_of(REGISTRY.tools[name], names)["function"]["parameters"]
    return found


@EVERY
def test_a_schema_is_strict_flat_and_small(name: str) -> None:
    shown = schema_of(REGISTRY.tools[name])
    function = shown["function"]
    assert (shown["type"], function["name"], function["strict"]) == ("function", name, True)
    assert function["description"] == REGISTRY.tools[name].help
    schema = function["parameters"]
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"])
    assert schema["properties"]["reason"]["maxLength"] == 160
    for part in schema["properties"].values():
        assert part["type"] in ("string", "integer", "number", "boolean")
        assert part["type"] != "string" or "enum" in part or part["maxLength"] <= 160
    assert len(json.dumps(shown)) < 800


def test_what_only_people_should_say_is_not_offered() -> None:
    offered = {name: set(parameters(name)["properties"]) - {"reason"} for name in REGISTRY.tools}
    assert offered["drain_replica"] == {"replica_id"}
    assert offered["cordon_replica"] == {"replica_id", "cordoned"}
    assert offered["scale_model"] == {"model", "replicas"}
    assert offered["set_routing_policy"] == {"policy"}
    assert offered["no_op"] == set()


def test_known_names_become_the_only_choices() -> None:
    assert parameters("scale_model", NAMES)["properties"]["model"] == {"type": "string", "enum": ["m1", "m2"]}
    assert parameters("drain_replica", NAMES)["properties"]["replica_id"]["enum"] == ["r1"]
    assert parameters("set_routing_policy", NAMES)["properties"]["policy"]["enum"] == ["sticky"]
    assert "enum" not in parameters("set_scaling_policy", NAMES)["properties"]["policy"]
    assert parameters("set_policy_parameter")["properties"]["kind"]["enum"] == ["routing", "scaling"]


@pytest.mark.parametrize("name", [name for name in REGISTRY.tools if name != "set_replica_bounds"])
@given(data=st.data())
def test_whatever_the_schema_allows_is_understood(name: str, data: st.DataObject) -> None:
    schema = parameters(name)
    arguments = data.draw(st.fixed_dictionaries({key: values(part) for key, part in schema["properties"].items()}))
    jsonschema.validate(arguments, schema)
    assert REGISTRY.understand(ToolCall(tool=name, arguments=arguments)).reason == arguments["reason"]


def values(part: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "enum" in part:
        return st.sampled_from(part["enum"])
    match part["type"]:
        case "string":
            return st.text(min_size=part.get("minLength", 0), max_size=part["maxLength"])
        case "integer":
            return st.integers(part["minimum"], part["maximum"])
        case "number":
            return st.floats(part.get("minimum"), part.get("maximum"), allow_nan=False, allow_infinity=False)
        case _:
            return st.booleans()
