"""Workflows whose nodes call tools: who is asked for what, which failures are tried again, and what a crash leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from swarmx.core.errors import WorkflowError
from swarmx.core.failures import Failure
from swarmx.core.records import ModelRequest, ModelResult
from swarmx.core.toolbox import ToolResult
from swarmx.runtime.tool_catalogue import ToolCatalogue
from swarmx.workflows.spec import parse_workflow
from tests.runtime.runners import EchoModel, Start
from tests.runtime.toolsheds import a_spec, an_offer, asking, catalogue_of, shops

USE = """
name: one
nodes:
  use: {kind: tool, tool: NAME, args: {word: "{{ 1 + 1 }}"}, retry: {attempts: 3, backoff_s: 0}}
"""
AGAIN, ONCE = a_spec("again", idempotent=True), a_spec("once")


def using(name: str) -> Any:
    return parse_workflow(USE.replace("NAME", name))


def answering(*results: ToolResult | Failure) -> Callable[[ModelRequest], ModelResult]:
    """What comes of the calls, one after the other."""
    left = list(results)

    def answer(request: ModelRequest) -> ModelResult:
        result = left.pop(0)
        if isinstance(result, Failure):
            return ModelResult(call_id="c", replica_id=None, attempts=1, failure=result)
        return ModelResult(call_id="c", replica_id="a", attempts=1, answer=msgspec.to_builtins(result))

    return answer


async def ended(start: Start, model: EchoModel, name: str) -> dict[str, Any]:
    async with catalogue_of(AGAIN, ONCE) as catalogue:
        runner = start(model, tools=catalogue)
        workflow_id = await runner.submit(using(name), {}, "acme")
        await runner.wait(workflow_id, "acme")
        return await runner.describe(workflow_id, "acme")


async def test_a_node_asks_the_pool_of_its_tool_and_leaves_what_it_answers(start: Start) -> None:
    model = EchoModel(answers={"use": answering(ToolResult(output={"found": 3}))})
    row = await ended(start, model, "again")
    assert row["outputs"] == {"use": {"found": 3}}
    (request,) = model.asked
    assert (request.kind, request.model, request.role, request.owned) == ("tool", "tools", "again", True)
    assert request.body["arguments"] == {"word": 2}
    assert request.body["key"] == request.idempotency_key == f"{row['workflow_id']}/use"


@pytest.mark.parametrize(
    ("name", "first", "state", "calls"),
    [
        ("again", ToolResult(error="down", cause="unavailable"), "finished", 2),
        ("again", ToolResult(error="late", cause="timeout"), "finished", 2),
        ("again", ToolResult(error="no", cause="tool"), "failed", 1),
        ("again", ToolResult(error="so not", cause="refused"), "failed", 1),
        ("once", ToolResult(error="down", cause="unavailable"), "failed", 1),
        ("once", ToolResult(error="late", cause="timeout"), "failed", 1),
        ("once", Failure(cause="replica", error="lost", begun=True), "failed", 1),
        ("once", Failure(cause="refused", error="overload"), "finished", 2),
        ("once", Failure(cause="replica", error="nobody answers"), "finished", 2),
    ],
)
async def test_a_failure_is_tried_again_if_it_may_pass_and_nothing_happens_twice(
    start: Start, name: str, first: ToolResult | Failure, state: str, calls: int
) -> None:
    model = EchoModel(answers={"use": answering(first, ToolResult(output=1))})
    row = await ended(start, model, name)
    assert (row["state"], len(model.asked)) == (state, calls), row["error"]


async def test_what_a_program_says_in_its_error_commands_no_terminal(start: Start) -> None:
    said = ToolResult(error="no\x1b[2J \u202eway\nat all", cause="tool")
    row = await ended(start, EchoModel(answers={"use": answering(said)}), "again")
    assert row["error"] == "no\ufffd[2J \ufffdway\nat all"


async def test_a_tool_that_is_not_there_is_refused_at_submission(start: Start) -> None:
    async with catalogue_of(a_spec("grep"), a_spec("private", tenants=("acme",))) as catalogue:
        runner = start(EchoModel(), tools=catalogue)
        with pytest.raises(
            WorkflowError, match=r"there is no tool 'grepp' .did you mean 'grep'\?.; there are: grep, private"
        ):
            await runner.submit(using("grepp"), {}, "acme")
        with pytest.raises(WorkflowError, match=r"there is no tool 'private'; there are: grep$"):
            await runner.submit(using("private"), {}, "other")


async def test_while_a_pool_has_not_spoken_a_workflow_waits_for_what_it_says(start: Start) -> None:
    model = EchoModel(answers={"use": answering(ToolResult(output=1))})
    async with shops(an_offer(AGAIN)) as (shop,), asking(ToolCatalogue(["tools"])) as catalogue:
        runner = start(model, tools=catalogue)
        workflow_id = await runner.submit(using("again"), {}, "acme")
        assert model.asked == []
        catalogue.observe(shop.changed("a"), 0.0)
        assert (await runner.wait(workflow_id, "acme")).state == "finished"


async def test_a_workflow_that_waits_for_a_pool_can_be_cancelled(start: Start) -> None:
    runner = start(EchoModel(), tools=ToolCatalogue(["tools"]))
    workflow_id = await runner.submit(using("again"), {}, "acme")
    async with asyncio.timeout(30.0):
        assert (await runner.cancel(workflow_id, "acme")).state == "cancelled"


@pytest.mark.parametrize(("name", "state", "calls"), [("again", "finished", 2), ("once", "failed", 1)])
async def test_what_was_out_at_a_crash_is_called_again_only_if_it_may_be(
    start: Start, name: str, state: str, calls: int
) -> None:
    first = EchoModel(hung=frozenset({"use"}))
    async with catalogue_of(AGAIN, ONCE) as catalogue:
        runner = start(first, tools=catalogue)
        workflow_id = await runner.submit(using(name), {}, "acme")
        await first.hanging.wait()
        await runner.close()  # nothing of it is written: the next life finds what a crash leaves
        second = EchoModel(answers={"use": answering(ToolResult(output=1))})
        later = start(second, tools=catalogue)
        await later.recover()
        async with asyncio.timeout(30.0):
            row = await later.wait(workflow_id, "acme")
        assert (row.state, len(first.asked) + len(second.asked)) == (state, calls)
        assert {request.idempotency_key for request in (*first.asked, *second.asked)} == {f"{workflow_id}/use"}
        described = await later.describe(workflow_id, "acme")
    if state == "failed":
        assert "the server stopped while once was called" in described["error"]


async def test_a_tool_that_must_not_be_called_twice_is_not_although_it_is_gone_after_the_crash(start: Start) -> None:
    first = EchoModel(hung=frozenset({"use"}))
    async with catalogue_of(ONCE) as catalogue:
        runner = start(first, tools=catalogue)
        workflow_id = await runner.submit(using("once"), {}, "acme")
        await first.hanging.wait()
        await runner.close()
    later = start(EchoModel(), tools=ToolCatalogue())
    await later.recover()
    async with asyncio.timeout(30.0):
        assert (await later.wait(workflow_id, "acme")).state == "failed"
