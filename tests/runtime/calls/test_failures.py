"""Calls against servers that fail: another replica takes over, or the call is refused with its reason."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.core.messages import AlertRaised
from swarmx.runtime.call_ends import CallRefused
from tests.agents.worlds import PROMPT, a_call
from tests.runtime.calls.scenes import ANSWER, STREAM, Make, Serve, closing, plain, saying, streaming, with_status

FAILURES: dict[str, Serve] = {
    "503": with_status(503),
    "429": with_status(429),
    "a token of ours that it does not take": with_status(401),
    "a redirect": with_status(307),
    "nested too deeply": saying(b"[" * 100_000),
    "no text": saying(b'{"a": "\xff"}'),
    "no JSON": saying(b"<html>"),
    "other JSON": saying(b'{"hello": 1}'),
    "a number": saying(b"42"),
    "closed before the first byte": closing,
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_replica_that_fails_is_replaced_by_another(scene: Make, name: str) -> None:
    s = scene()
    await s.serve("a", FAILURES[name])
    await s.serve("b", plain)
    assert await s.ask() == ANSWER
    record = s.check_settled("finished")
    assert (record.attempts, record.replica_id) == (2, "b")


@pytest.mark.parametrize("name", FAILURES)
async def test_a_replica_that_fails_before_the_first_token_of_a_stream_is_replaced(scene: Make, name: str) -> None:
    s = scene()
    await s.serve("a", FAILURES[name])
    await s.serve("b", streaming(*STREAM))
    assert b"".join(await s.ask_stream()) == b"".join(STREAM)
    assert s.check_settled("finished").attempts == 2


async def test_a_replica_that_refuses_connections_is_replaced_by_another(scene: Make) -> None:
    s = scene()
    s.add("a", 1)
    await s.serve("b", plain)
    assert await s.ask() == ANSWER
    assert s.check_settled("finished").attempts == 2


async def test_a_request_that_the_replica_rejects_is_not_retried_and_keeps_its_answer(scene: Make) -> None:
    s = scene()
    await s.serve("a", with_status(400, b'{"error":"too long"}'))
    await s.serve("b", plain)
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert (refused.value.status, refused.value.body, refused.value.attempts) == (400, b'{"error":"too long"}', 1)
    assert s.check_settled("refused").error == "failed: rejected"


async def test_replicas_that_are_busy_are_not_taken_for_broken(scene: Make) -> None:
    s = scene(max_attempts=2, breaker_failures=1)
    await s.serve("a", with_status(429))
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert refused.value.status == 429
    assert not any(isinstance(message, AlertRaised) for message in s.heard)


async def test_a_call_that_every_replica_fails_is_refused_with_the_last_reason(scene: Make) -> None:
    s = scene(max_attempts=2)
    await s.serve("a", with_status(503))
    with pytest.raises(CallRefused, match="retries_exhausted: status 503") as refused:
        await s.ask()
    assert refused.value.status == 502
    assert s.check_settled("refused").attempts == 2


async def test_a_call_that_no_replica_takes_in_time_is_refused(scene: Make) -> None:
    s = scene(queue_timeout_s=0.05)
    s.announce()
    with pytest.raises(CallRefused) as refused:
        await s.ask()
    assert (refused.value.status, refused.value.reason) == (503, "no_replica")
    assert s.check_settled("refused").replica_id is None


async def test_many_calls_over_good_and_bad_replicas_are_all_recorded_once(scene: Make) -> None:
    s = scene(max_attempts=5, breaker_open_s=0.05)
    await s.serve("a", plain)
    await s.serve("b", with_status(500), plain, closing, saying(b"?"), plain)
    await s.serve("c", streaming(*STREAM), plain)
    outcomes = await asyncio.gather(
        *(s.calls.answer(a_call(f"c{i}"), PROMPT, b"{}") for i in range(60)), return_exceptions=True
    )
    assert [outcome for outcome in outcomes if isinstance(outcome, BaseException)] == []
    assert sorted(record.call_id for record in s.records) == sorted(f"c{i}" for i in range(60))
    assert s.attempts_in_flight() == s.calls.in_flight == 0
