"""The toolbox itself: who may call what, what is checked, and what a broken provider does to the others."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolCall, ToolResult, ToolSpec
from swarmx.providers.tools.toolbox import Toolbox
from swarmx.workflows.arguments import Arguments
from tests.providers.tools.workshop import a_call


class Inline:
    """A provider of one tool, which answers what it is told to."""

    def __init__(self, name: str, answer: Any, **more: Any) -> None:
        self.name = name
        self.answer = answer
        self.opened = 0
        self._spec = ToolSpec(
            **{
                "name": f"{name}-tool",
                "description": "",
                "parameters": {"type": "object"},
                "pool": "tools",
                "timeout_s": 5.0,
                "idempotent": True,
                **more,
            }
        )

    async def open(self) -> None:
        self.opened += 1
        if self.answer == "broken":
            raise ConfigError(f"{self.name} has no power")

    async def close(self) -> None: ...

    def tools(self) -> Sequence[ToolSpec]:
        return (self._spec,)

    async def call(self, call: ToolCall) -> ToolResult:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return ToolResult(output=self.answer, wall_s=77.0)


async def opened(*providers: Inline) -> Toolbox:
    toolbox = Toolbox(providers)
    await toolbox.open()
    return toolbox


async def test_a_provider_that_does_not_open_does_not_stop_the_others() -> None:
    toolbox = await opened(Inline("a", "broken"), Inline("b", 1))
    assert toolbox.refused == {"a": "a has no power"}
    assert [spec.name for spec in toolbox.tools()] == ["b-tool"]
    assert (await toolbox.call(a_call("b-tool"))).output == 1
    refused = await toolbox.call(a_call("a-tool"))
    assert (refused.cause, refused.error) == ("refused", "a-tool is not offered here: a has no power")


async def test_a_provider_that_did_not_open_may_later_and_those_that_did_are_left_alone() -> None:
    broken, fine = Inline("a", "broken"), Inline("b", 1)
    toolbox = await opened(broken, fine)
    await toolbox.open()
    assert toolbox.refused == {"a": "a has no power"}
    broken.answer = 2
    await toolbox.open()
    assert (toolbox.refused, fine.opened) == ({}, 1)
    assert (await toolbox.call(a_call("a-tool"))).output == 2


async def test_a_provider_that_raises_is_a_result_too(caplog: pytest.LogCaptureFixture) -> None:
    toolbox = await opened(Inline("a", RuntimeError("secret detail")))
    result = await toolbox.call(a_call("a-tool"))
    assert result.cause == "unavailable"
    assert "secret detail" not in result.error


@pytest.mark.parametrize("output", [object(), "\ud800"])
async def test_an_output_that_is_no_json_is_the_tools_failure(output: Any) -> None:
    assert (await (await opened(Inline("a", output))).call(a_call("a-tool"))).cause == "tool"


async def test_the_size_of_an_output_is_bounded_whoever_made_it() -> None:
    toolbox = await opened(Inline("a", "x" * 100, result_limit_bytes=100))
    assert (await toolbox.call(a_call("a-tool"))).cause == "limit"


async def test_a_tool_of_other_tenants_looks_as_if_it_did_not_exist() -> None:
    toolbox = await opened(Inline("a", 1, tenants=("acme",)))
    assert (await toolbox.call(a_call("a-tool", tenant="acme"))).output == 1
    other = await toolbox.call(a_call("a-tool", tenant="evil"))
    unknown = await toolbox.call(a_call("b-tool", tenant="evil"))
    assert other.error == unknown.error.replace("b-tool", "a-tool")


async def test_cancelling_is_not_swallowed() -> None:
    toolbox = await opened(Inline("a", asyncio.CancelledError()))
    with pytest.raises(asyncio.CancelledError):
        await toolbox.call(a_call("a-tool"))


def test_two_providers_of_one_name_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="one name"):
        Toolbox([Inline("a", 1), Inline("a", 2)])


def test_references_are_never_fetched_and_bad_schemas_are_told() -> None:
    remote = Arguments({"type": "object", "$ref": "http://127.0.0.1:9/x"})
    assert "refers to" in remote.problem({})
    inner = Arguments(
        {"type": "object", "$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    )
    assert inner.problem({"a": 1}) == ""
    assert inner.problem({"a": "x"}).startswith("a: ")
    for schema in ({"type": "array"}, {}, {"type": "object", "properties": 3}):
        with pytest.raises(ConfigError):
            Arguments(schema)


def test_a_schema_without_end_is_a_problem_and_not_a_crash() -> None:
    assert "nested" in Arguments({"type": "object", "$ref": "#"}).problem({})


@pytest.mark.parametrize("odd", [5, {"patternProperties": []}, {"type": 5}, {"properties": {"a": 5}}])
def test_a_reference_to_what_is_no_schema_is_a_problem_and_not_a_crash(odd: Any) -> None:
    arguments = Arguments({"type": "object", "properties": {"a": {"$ref": "#/odd"}}, "odd": odd})
    assert "cannot be followed" in arguments.problem({"a": {"a": "text"}})


def test_arguments_are_held_to_the_patterns_of_their_schema() -> None:
    arguments = Arguments({"type": "object", "properties": {"pattern": {"type": "string", "pattern": "^(a+)+$"}}})
    assert arguments.problem({"pattern": "aaa"}) == ""
    assert arguments.problem({"pattern": "a" * 40 + "!"}).startswith("pattern: 'aaa")
