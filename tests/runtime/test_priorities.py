"""The urgency of a dispatch reaches engines that order by it, and only those."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from swarmx.core.actions import Dispatch
from swarmx.core.engine import EngineProfile
from swarmx.core.messages import ReplicaChanged
from swarmx.core.nouns import EngineOrder, Replica
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.providers.emulated.provider import EmulatedProvider, EmulatedSpec
from swarmx.runtime.calls import CallService
from swarmx.runtime.clock import WallClock
from swarmx.runtime.fleet_book import FleetBook
from swarmx.runtime.priorities import prioritised, priority_of
from swarmx.runtime.upstream import Upstream
from tests.agents.worlds import PROMPT, a_call

UNIX_S = 1.8e9
TIMES = st.floats(UNIX_S, 2.0 * UNIX_S)
PROFILE = EngineProfile(model="m", device="d", step_base_s=4e-3, prefill_token_s=1e-6, max_batch=2)


@given(TIMES, TIMES)
def test_times_keep_their_order_to_a_few_microseconds(one: float, other: float) -> None:
    first, second = (priority_of(urgency, low_first=True) for urgency in (one, other))
    assert abs(first - second - 1e6 * (one - other)) <= 2.0
    assert abs(first) < 2**53


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_whatever_a_policy_calls_urgent_never_turns_round(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert priority_of(low, low_first=True) <= priority_of(high, low_first=True)
    assert priority_of(low, low_first=False) >= priority_of(high, low_first=False)


def test_indices_far_below_a_second_keep_their_order() -> None:
    assert priority_of(-0.0123, low_first=True) < priority_of(-0.0122, low_first=True)


@pytest.mark.parametrize("body", [b'{"model": "m"}', b' {"model":"m" } \n', b"{}", b" { } "])
def test_the_priority_is_added_to_the_body_and_the_rest_stays(body: bytes) -> None:
    assert json.loads(prioritised(body, 2.0, "low_first")) == {**json.loads(body), "priority": 2_000_000}
    assert json.loads(prioritised(body, 2.0, "high_first")) == {**json.loads(body), "priority": -2_000_000}


def test_a_client_cannot_push_in_by_a_priority_of_its_own() -> None:
    body = b'{"priority": -9, "temperature": 0.5, "messages": [{"role": "user", "content": "a \\"priority\\"?"}]}'
    told = prioritised(body, 1.0, "low_first")
    assert json.loads(told) == {**json.loads(body), "priority": 1_000_000}
    assert told.count(b'"priority":') == 1


def test_an_engine_that_ignores_priorities_gets_the_clients_own_bytes() -> None:
    body = b' {"priority": -9}'
    assert prioritised(body, 5.0, "ignored") is body


class Engines:
    """An emulated replica of each order, and calls whose decisions the test makes itself."""

    def __init__(self, replicas: dict[str, Replica], calls: CallService, session: aiohttp.ClientSession) -> None:
        self.replicas = replicas
        self.ended: list[str] = []
        self._calls = calls
        self._session = session

    async def call(self, name: str, replica_id: str, *, urgency: float, tokens: int) -> None:
        """Send a call that asks for so many tokens, and write down when it has them."""
        body = {"model": "m", "messages": [{"role": "user", "content": name}], "max_tokens": tokens, "ignore_eos": True}
        asking = asyncio.ensure_future(self._calls.answer(a_call(name), PROMPT, msgspec.json.encode(body)))
        await asyncio.sleep(0)
        self._calls.perform_dispatch(Dispatch(call_id=name, attempt=1, replica_id=replica_id, urgency=urgency))
        await asking
        self.ended.append(name)

    async def until(self, replica_id: str, *, running: int, waiting: int) -> None:
        """The engine has so many calls; the test's timeout ends a wait in vain."""
        wanted = {"vllm:num_requests_running": running, "vllm:num_requests_waiting": waiting}
        told: dict[str, float] = {}
        while not wanted.items() <= told.items():
            async with self._session.get(f"{self.replicas[replica_id].url}/metrics") as response:
                families = text_string_to_metric_families(await response.text())
            told = {sample.name: sample.value for family in families for sample in family.samples}


ORDERS: tuple[EngineOrder, ...] = ("arrival", "priority")


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    provider = EmulatedProvider(
        [
            EmulatedSpec(replica_id=order, model="m", kind="llm", device="d", profile=PROFILE, engine_order=order)
            for order in ORDERS
        ]
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(provider.stop)
        replicas = {replica.replica_id: replica for replica in await provider.start()}
        clock, upstream = WallClock(), Upstream()
        stack.push_async_callback(upstream.close)
        book = FleetBook(clock)
        calls = CallService(
            post=lambda message: None,
            clock=clock,
            forecaster=EmpiricalForecaster(),
            upstream=upstream,
            book=book,
            on_record=lambda record: None,
        )
        for replica in replicas.values():
            for observe in (book.observe, calls.observe):
                observe(ReplicaChanged(replica=replica, state="ready"), clock.now_s())
        yield Engines(replicas, calls, await stack.enter_async_context(aiohttp.ClientSession()))


@pytest.mark.process
@pytest.mark.parametrize(("order", "served"), [("arrival", ["late", "urgent"]), ("priority", ["urgent", "late"])])
async def test_of_two_calls_that_wait_in_the_engine_the_more_urgent_is_served_first(
    engines: Engines, order: EngineOrder, served: list[str]
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(engines.call("long", order, urgency=UNIX_S, tokens=1000))
        group.create_task(engines.call("short", order, urgency=UNIX_S, tokens=200))
        await engines.until(order, running=2, waiting=0)
        group.create_task(engines.call("late", order, urgency=UNIX_S + 60.0, tokens=50))
        await engines.until(order, running=2, waiting=1)
        group.create_task(engines.call("urgent", order, urgency=UNIX_S + 59.9, tokens=50))
        await engines.until(order, running=2, waiting=2)
    assert engines.ended == ["short", *served, "long"]


@pytest.mark.process
async def test_replicas_say_what_they_make_of_priorities(engines: Engines) -> None:
    told = {name: replica.priorities for name, replica in engines.replicas.items()}
    assert told == {"arrival": "ignored", "priority": "low_first"}
