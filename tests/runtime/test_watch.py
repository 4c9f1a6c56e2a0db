"""The watch against real servers on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from swarmx.core.messages import Message, ReplicaChanged, SignalReported
from swarmx.core.nouns import ReplicaState
from swarmx.providers.tool_replicas import tool_replica
from swarmx.runtime.clock import WallClock
from swarmx.runtime.watch import Watch
from tests.agents.worlds import a_replica

VLLM = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
"""
SGLANG = """sglang:num_running_reqs{model_name="m"} 3
sglang:num_queue_reqs{model_name="m"} 4
sglang:token_usage{model_name="m"} 0.25
"""


class Server:
    """Answers /metrics with `status` and `text`, which a test may change; `hangs` keeps the question open."""

    def __init__(self) -> None:
        self.status, self.text, self.hangs = 200, VLLM, False
        self.url = ""

    async def metrics(self, request: web.Request) -> web.Response:
        if self.hangs:
            await asyncio.Event().wait()
        return web.Response(status=self.status, text=self.text)


class Heard:
    """What the watch posts; `until` waits for a state."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.signals: list[SignalReported] = []

    async def state(self) -> str:
        """The next state that is told."""
        while True:
            message = await asyncio.wait_for(self.messages.get(), 60.0)
            if isinstance(message, ReplicaChanged):
                return message.state
            assert isinstance(message, SignalReported)
            self.signals.append(message)

    async def signal(self) -> SignalReported:
        while True:
            message = await asyncio.wait_for(self.messages.get(), 60.0)
            if isinstance(message, SignalReported):
                return message


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    served = Server()
    app = web.Application()
    app.router.add_get("/metrics", served.metrics)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield served
    await runner.cleanup()


@pytest.fixture
async def heard(server: Server) -> AsyncIterator[Heard]:
    told = Heard()
    watch = Watch(told.messages.put_nowait, WallClock(), every_s=0.02, timeout_s=0.3, failures=3)
    watch.add(a_replica("a", url=server.url))
    yield told
    await watch.close()


async def test_a_replica_is_ready_from_its_first_answer_on(server: Server, heard: Heard) -> None:
    assert [await heard.state(), await heard.state()] == ["starting", "ready"]


async def test_the_counters_of_all_engines_of_a_server_are_added_up(server: Server, heard: Heard) -> None:
    signal = await heard.signal()
    assert (signal.replica_id, signal.running, signal.waiting, signal.kv_usage) == ("a", 5, 4, 0.25)


async def test_the_counters_of_sglang_are_read_as_well(server: Server, heard: Heard) -> None:
    server.text = SGLANG
    signal = await heard.signal()
    while signal.running != 3:
        signal = await heard.signal()
    assert (signal.waiting, signal.kv_usage) == (4, 0.25)


@pytest.mark.parametrize("way", ["error", "hang"])
async def test_a_replica_that_stops_answering_is_gone_and_may_come_back(server: Server, heard: Heard, way: str) -> None:
    assert [await heard.state(), await heard.state()] == ["starting", "ready"]
    server.status, server.hangs = (500, False) if way == "error" else (200, True)
    assert await heard.state() == "gone"
    server.status, server.hangs = 200, False
    assert await heard.state() == "ready"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing 1\n",
        VLLM.replace("waiting", "w"),
        VLLM.replace("3.0", "NaN").replace("2.0", "NaN"),
        VLLM.replace("3.0", "1e999"),
        VLLM.replace("3.0", "--"),
    ],
    ids=["empty", "other", "half", "NaN", "infinite", "garbage"],
)
async def test_a_server_that_does_not_say_all_its_counters_is_ready_and_its_load_unknown(
    server: Server, heard: Heard, text: str
) -> None:
    server.text = text
    assert [await heard.state(), await heard.state()] == ["starting", "ready"]
    server.status = 500
    assert await heard.state() == "gone"
    assert heard.signals == []


async def test_a_server_without_metrics_is_ready_and_its_load_unknown(server: Server, heard: Heard) -> None:
    server.status, server.text = 404, VLLM
    assert [await heard.state(), await heard.state()] == ["starting", "ready"]
    server.status = 500
    assert await heard.state() == "gone"
    assert heard.signals == []


async def test_a_replica_that_is_removed_is_not_spoken_of_any_more(server: Server) -> None:
    told = Heard()
    watch = Watch(told.messages.put_nowait, WallClock(), every_s=0.01, timeout_s=0.3, failures=1)
    for name in ("a", "b"):
        watch.add(a_replica(name, url=server.url))
    while told.messages.qsize() < 20:
        await asyncio.sleep(0.005)
    watch.remove("a")
    watch.remove("a")
    watch.remove("never seen")
    while not told.messages.empty():
        told.messages.get_nowait()
    server.status = 500
    assert await told.state() == "gone"
    server.status = 200
    assert await told.state() == "ready"
    await watch.close()
    heard = [told.messages.get_nowait() for _ in range(told.messages.qsize())]
    assert {signal.replica_id for signal in told.signals} <= {"b"}
    assert all(isinstance(message, SignalReported) and message.replica_id == "b" for message in heard)


async def test_a_replica_that_is_removed_while_it_hangs_is_let_go(server: Server) -> None:
    told = Heard()
    watch = Watch(told.messages.put_nowait, WallClock(), every_s=0.01, timeout_s=600.0, failures=1)
    server.hangs = True
    watch.add(a_replica("a", url=server.url))
    assert await told.state() == "starting"
    watch.remove("a")
    await watch.close()
    assert told.messages.empty()


async def test_a_replica_that_was_removed_can_be_watched_again(server: Server) -> None:
    told = Heard()
    watch = Watch(told.messages.put_nowait, WallClock(), every_s=0.02, timeout_s=0.3, failures=3)
    for _ in range(2):
        watch.add(a_replica("a", url=server.url))
        assert [await told.state(), await told.state()] == ["starting", "ready"]
        watch.remove("a")
    await watch.close()


async def test_what_answers_is_announced_in_the_state_that_it_should_have(server: Server) -> None:
    told = Heard()
    states: dict[str, ReplicaState] = {"a": "cordoned"}
    watch = Watch(
        told.messages.put_nowait,
        WallClock(),
        every_s=0.02,
        timeout_s=0.3,
        failures=2,
        state_when_up=lambda replica_id: states[replica_id],
    )
    watch.add(a_replica("a", url=server.url))
    assert [await told.state(), await told.state()] == ["starting", "cordoned"]
    server.status = 500
    assert await told.state() == "gone"
    states["a"] = "draining"
    server.status = 200
    assert await told.state() == "draining"
    await watch.close()


TOOLS = """# HELP swarmx_tools:num_requests_running Calls that have a slot.
swarmx_tools:num_requests_running{pool="tools"} 2.0
swarmx_tools:num_requests_waiting{pool="tools"} 5.0
swarmx_tools:slots{pool="tools"} 2.0
"""


async def test_the_counters_of_tools_are_read_from_replicas_of_tools_only(server: Server) -> None:
    told = Heard()
    watch = Watch(told.messages.put_nowait, WallClock(), every_s=0.02, timeout_s=0.3, failures=3)
    try:
        server.text = TOOLS
        watch.add(a_replica("engine", url=server.url))
        assert [await told.state(), await told.state()] == ["starting", "ready"]
        watch.add(tool_replica("tools", pool="tools", url=server.url, slots=2, provider="test"))
        signal = await told.signal()
        assert (signal.replica_id, signal.running, signal.waiting, signal.kv_usage) == ("tools", 2, 5, 0.0)
    finally:
        await watch.close()
