"""What is recorded of a call: its state, the decision for its last attempt, its place in the workflow."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import msgspec
import pytest
from aiohttp import web

from swarmx.core.messages import SignalReported, WorkflowEnded
from swarmx.core.records import CallRecord
from swarmx.runtime.call_ends import CallRefused
from tests.agents.worlds import PROMPT, a_call
from tests.runtime.calls.scenes import Hanging, Make, a_request, plain, with_status

OLD_RECORD = b"""{"call_id":"c","tenant":"t","workflow_id":"w","workflow_kind":"k","node":"n","role":"r","kind":"llm",
"model":"m","state":"finished","attempts":1,"replica_id":"a","device":"cpu","prompt_key":"00","prompt_bytes":9,
"prompt_tokens":3,"work_done":5.0,"forecast_p50":4.0,"forecast_p90":8.0,"forecast_source":"prior","ready_at_s":1.0,
"dispatched_at_s":1.5,"first_token_at_s":null,"ended_at_s":2.0,"error":null,"schema_version":1}"""


async def test_the_record_of_an_owned_call_comes_with_its_result_and_is_nobody_elses(scene: Make) -> None:
    kept: list[CallRecord] = []
    s = scene(keep=kept.append)
    await s.serve("a", plain, with_status(400), plain)
    answered = await s.calls.complete(a_request(owned=True))
    rejected = await s.calls.complete(a_request(owned=True))
    assert [answered.record, rejected.record] == s.records
    assert rejected.failure is not None
    assert rejected.failure.cause == "rejected"
    assert kept == []
    result = await s.calls.complete(a_request())
    assert result.record is None
    assert kept == s.records[2:]


async def test_an_owned_call_that_is_cancelled_leaves_its_record_to_the_server(scene: Make) -> None:
    kept: list[CallRecord] = []
    s = scene(keep=kept.append)
    begun = asyncio.Event()

    async def hangs(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    await s.serve("a", hangs)
    task = asyncio.create_task(s.calls.complete(a_request(owned=True)))
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [record.state for record in kept] == ["cancelled"]


async def test_a_record_tells_what_was_known_where_the_call_was_sent(scene: Make) -> None:
    s = scene(policy="least_work")
    await s.serve("a", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("a", stack)
        s.shell.post(SignalReported(replica_id="a", running=1, waiting=0, kv_usage=0.25, measured_at_s=1e12))
        await s.ask()
    (decision,) = s.decisions()
    assert decision.candidates.cost_s is not None
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.policy, record.ahead, record.kv_usage) == ("least_work", 1, 0.25)
    assert record.expected_s == decision.candidates.cost_s[0]
    assert isinstance(record.expected_s, float)


async def test_a_policy_that_weighs_no_costs_expects_nothing(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.ask()
    record = s.check_settled("finished")
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage) == ("round_robin", 0, None, None)


async def test_a_record_tells_of_the_decision_for_its_last_attempt(scene: Make) -> None:
    s = scene()
    await s.serve("a", with_status(503))
    await s.serve("b", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("b", stack)
        await s.ask()
    assert [decision.replica_id for decision in s.decisions()] == ["a", "b"]
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.replica_id, record.ahead) == ("b", 1)


async def test_a_decision_that_came_too_late_for_its_call_is_not_in_the_record(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    await s.serve("b", Hanging(), plain)
    async with AsyncExitStack() as stack:
        await s.occupy("b", stack)
        s.upstream.then = lambda: s.change("a", "gone")
        await s.ask()
    assert [decision.replica_id for decision in s.decisions()] == ["a", "b"]
    record = next(record for record in s.records if record.call_id == "c")
    assert (record.replica_id, record.ahead) == ("a", 0)


async def test_a_call_that_was_never_sent_has_no_decision_in_its_record(scene: Make) -> None:
    s = scene()
    with pytest.raises(CallRefused):
        await s.ask()
    record = s.check_settled("refused")
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage) == ("", None, None, None)


async def test_a_replica_that_comes_back_has_yet_to_say_how_full_it_is(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)
    for state in ("gone", "ready"):
        s.shell.post(SignalReported(replica_id="a", running=0, waiting=0, kv_usage=0.5, measured_at_s=1e12))
        s.change("a", state)
    await s.ask()
    assert s.check_settled("finished").kv_usage is None


async def test_the_calls_of_a_workflow_are_numbered_until_it_ends(scene: Make) -> None:
    s = scene()
    await s.serve("a", plain)

    async def ask(workflow_id: str) -> int:
        call = msgspec.structs.replace(a_call(f"c{len(s.records)}"), workflow_id=workflow_id)
        await s.calls.answer(call, PROMPT, b"{}")
        return s.records[-1].position

    assert [await ask(workflow_id) for workflow_id in ("w", "v", "w", "", "w", "")] == [1, 1, 2, 0, 3, 0]
    s.shell.post(WorkflowEnded(workflow_id="w", state="finished"))
    assert [await ask(workflow_id) for workflow_id in ("w", "v")] == [1, 2]


def test_a_record_that_an_older_version_stored_can_be_read() -> None:
    record = msgspec.json.decode(OLD_RECORD, type=CallRecord)
    assert (record.policy, record.ahead, record.expected_s, record.kv_usage, record.position) == (
        "",
        None,
        None,
        None,
        0,
    )
    assert (record.encoder, record.encoding, record.cached_tokens, record.forecast_version) == ("", b"", 0, "")
