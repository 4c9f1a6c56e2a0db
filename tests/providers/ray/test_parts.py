"""What of Ray as the engine needs no Ray: places, notices, the link's requests, engines and their doors."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest

from swarmx.core.engine import EngineProfile
from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.nouns import Replica
from swarmx.providers.ray.door import Door
from swarmx.providers.ray.engine import EngineProcess
from swarmx.providers.ray.link import Link
from swarmx.providers.ray.lookout import Notices
from swarmx.providers.ray.observer import Observer
from swarmx.providers.ray.placing import Node, actor_options, address_of, misfit
from swarmx.providers.ray.wire import (
    Curve,
    Deploy,
    Ended,
    Engine,
    Failed,
    Find,
    Found,
    Leaving,
    Load,
    Lost,
    News,
    Noticed,
    Place,
    Retire,
    Standing,
    Up,
    Wanted,
)

REPLICA = Replica(
    replica_id="m-0",
    model="m",
    kind="llm",
    device="l40s",
    url="",
    profile=EngineProfile(model="m", device="l40s", step_base_s=0.01),
    provider="emulated",
    emulated=True,
)
WANTED = Wanted(
    replica=REPLICA,
    group_id="m",
    engine=Engine(argv=("{python}", "-c", "pass"), start_s=10.0),
    place=Place(resources={"CPU": 1.0}),
    token="t" * 16,
    orphan_s=60.0,
)
STANDING = Standing(wanted=WANTED, url="http://10.0.0.1:1", node_id="n1")


@pytest.mark.parametrize(
    ("on", "address"),
    [
        ("auto", "auto"),
        ("ray://auto", "auto"),
        ("10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", "ray://head:10001"),
    ],
)
def test_an_address_is_read_as_ray_takes_it(on: str, address: str) -> None:
    assert address_of(on) == address


@pytest.mark.parametrize("on", ["", "ray://", "head", "head:", "http://head", "ray://head:port"])
def test_what_is_no_address_is_refused(on: str) -> None:
    with pytest.raises(ConfigError, match="ray://auto"):
        address_of(on)


def test_a_place_is_said_in_rays_words() -> None:
    place = Place(resources={"CPU": 2.0, "GPU": 0.5, "memory": 1e9, "slots": 1.0}, labels={"gpu": "a10"})
    assert actor_options(place) == {
        "num_cpus": 2.0,
        "num_gpus": 0.5,
        "memory": 1e9,
        "resources": {"slots": 1.0},
        "label_selector": {"gpu": "a10"},
    }
    assert actor_options(Place()) == {"num_cpus": 0.0, "num_gpus": 0.0}


NODES = [
    Node(node_id="a", resources={"CPU": 2.0, "GPU": 1.0}, labels={"gpu": "a10"}),
    Node(node_id="b", resources={"CPU": 8.0}, labels={}),
    Node(node_id="c", resources={"CPU": 64.0, "GPU": 8.0}, labels={"gpu": "h100"}, is_leaving=True),
]


def test_a_replica_that_some_node_can_take_fits() -> None:
    assert misfit(Place(resources={"CPU": 8.0}), NODES) is None
    assert misfit(Place(resources={"GPU": 1.0}, labels={"gpu": "a10"}), NODES) is None
    assert misfit(Place(), NODES) is None


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (Place(resources={"CPU": 9.0}), r"takes {'CPU': 9.0}, and the most that a node has is {'CPU': 8.0}"),
        (Place(resources={"CPU": 4.0, "GPU": 1.0}), "the most that a node has"),
        (Place(resources={"tpu": 1.0}), r"{'tpu': 0.0}"),
        (Place(labels={"gpu": "h100"}), "none of the 2 nodes has the labels"),
    ],
)
def test_one_that_no_node_could_ever_take_is_told_why(place: Place, words: str) -> None:
    why = misfit(place, NODES)
    assert why is not None
    assert words in why


def test_a_notice_is_told_once_and_again_when_its_time_changes() -> None:
    notices = Notices()
    assert notices.fresh({"a": 30_000}, 10.0) == [Leaving(node_id="a", left_s=20.0)]
    assert notices.fresh({"a": 30_000}, 11.0) == []
    assert notices.fresh({"a": 20_000, "b": 0}, 12.0) == [
        Leaving(node_id="a", left_s=8.0),
        Leaving(node_id="b", left_s=None),
    ]
    assert notices.fresh({}, 13.0) == []
    assert notices.fresh({"a": 5_000}, 13.0) == [Leaving(node_id="a", left_s=0.0)]


class PaperCluster:
    """A cluster of the test's own: starts end when they are told to."""

    def __init__(self) -> None:
        self.may_start = asyncio.Event()
        self.over: dict[str, asyncio.Event] = {}
        self.removed: list[str] = []
        self.there: list[Standing] = []

    async def place(self, wanted: Wanted) -> Standing:
        if wanted.engine.start_s < 0.0:
            raise ReplicaError("no place")
        await self.may_start.wait()
        return msgspec.structs.replace(STANDING, wanted=wanted)

    async def remove(self, replica_id: str) -> None:
        self.removed.append(replica_id)

    async def standing(self) -> list[Standing]:
        return self.there

    async def end_of(self, replica_id: str) -> str:
        await self.over.setdefault(replica_id, asyncio.Event()).wait()
        return "its node is gone"


class Talk:
    """A link over a paper cluster, and what it has answered."""

    def __init__(self) -> None:
        self.cluster = PaperCluster()
        self.said: list[Any] = []
        self.link = Link(self.cluster, answer=self.said.append)

    async def ask(self, *requests: Any) -> list[Any]:
        for request in requests:
            self.link.take(msgspec.json.encode(request))
        return await self.heard()

    async def heard(self) -> list[Any]:
        for _ in range(20):
            await asyncio.sleep(0)
        said, self.said[:] = list(self.said), []
        return said


async def test_a_replica_is_placed_followed_and_its_loss_told() -> None:
    talk = Talk()
    talk.cluster.may_start.set()
    assert await talk.ask(Deploy(number=1, wanted=WANTED)) == [Up(number=1, standing=STANDING)]
    talk.cluster.over["m-0"].set()
    assert await talk.heard() == [Lost(replica_id="m-0", problem="its node is gone")]


async def test_a_replica_that_is_retired_is_not_lost() -> None:
    talk = Talk()
    talk.cluster.may_start.set()
    await talk.ask(Deploy(number=1, wanted=WANTED))
    assert await talk.ask(Retire(number=2, replica_id="m-0")) == [Ended(number=2)]
    talk.cluster.over["m-0"].set()
    assert await talk.heard() == []
    assert talk.cluster.removed == ["m-0"]


async def test_to_retire_one_that_is_starting_calls_its_start_off() -> None:
    talk = Talk()
    assert await talk.ask(Deploy(number=1, wanted=WANTED)) == []
    said = await talk.ask(Retire(number=2, replica_id="m-0"))
    assert said == [Failed(number=1, problem="its start was called off"), Ended(number=2)]


async def test_what_fails_is_an_answer_and_the_link_goes_on() -> None:
    talk = Talk()
    engine = msgspec.structs.replace(WANTED.engine, start_s=-1.0)
    bad = msgspec.structs.replace(WANTED, engine=engine)
    assert await talk.ask(Deploy(number=1, wanted=bad)) == [Failed(number=1, problem="no place")]
    assert await talk.ask(Find(number=2)) == [Found(number=2, standing=[])]


async def test_the_notice_of_a_node_is_told_for_each_of_its_replicas_also_for_those_found_later() -> None:
    talk = Talk()
    talk.cluster.there = [STANDING]
    talk.link.hear(Leaving(node_id="n1", left_s=30.0))
    assert await talk.heard() == []
    assert await talk.ask(Find(number=1)) == [
        Found(number=1, standing=[STANDING]),
        Noticed(replica_id="m-0", left_s=30.0),
    ]
    talk.link.hear(Leaving(node_id="n2", left_s=1.0))
    talk.link.hear(Leaving(node_id="n1", left_s=None))
    assert await talk.heard() == [Noticed(replica_id="m-0", left_s=None)]


# One engine in a few lines: counts what it is asked, and streams until its caller hangs up.
PROGRAM = """
import asyncio, json, os, sys
from aiohttp import web
hung_up = []
async def stream(request):
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        while True:
            await response.write(b"x" * 10)
            await asyncio.sleep(0.01)
    except (asyncio.CancelledError, ConnectionError):
        hung_up.append(1)
        raise
async def echo(request):
    return web.json_response({"body": (await request.read()).decode(), "token": os.environ.get("TOKEN"),
                              "ray": [n for n in os.environ if n.startswith("RAY_")], "x": request.headers.get("x-a")},
                             status=418, headers={"x-b": "2"})
async def health(request):
    return web.Response()
async def metrics(request):
    names = {"num_requests_running": 3, "num_requests_waiting": 1, "kv_cache_usage_perc": 0.5}
    return web.Response(text="".join(f"vllm:{name} {value}\\n" for name, value in names.items()))
async def ended(request):
    return web.json_response(len(hung_up))
async def main():
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/echo", echo)
    app.router.add_get("/stream", stream)
    app.router.add_get("/ended", ended)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
ENGINE = Engine(argv=("{python}", "-c", PROGRAM), start_s=60.0, token_variable="TOKEN", env={"A": "1"})
TOKEN = "s" * 20


@asynccontextmanager
async def started(engine: Engine = ENGINE) -> AsyncIterator[str]:
    process = EngineProcess(engine, token=TOKEN)
    try:
        yield await process.start()
    finally:
        await process.stop()


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Door, str, aiohttp.ClientSession]]:
    async with started() as url, aiohttp.ClientSession() as session:
        door = Door(url, TOKEN)
        port = await door.open("127.0.0.1")
        try:
            yield door, f"http://127.0.0.1:{port}", session
        finally:
            await door.close()


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(60.0):
        while not await holds():
            await asyncio.sleep(0.02)


@pytest.mark.process
async def test_a_door_relays_what_has_the_token_and_only_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    async with opened() as (_, url, session):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
            async with session.post(f"{url}/echo", headers=headers) as answer:
                assert answer.status == 401
        headers = {"authorization": f"Bearer {TOKEN}", "x-a": "1"}
        async with session.post(f"{url}/echo?q=1", data="hello", headers=headers) as answer:
            assert (answer.status, answer.headers["x-b"]) == (418, "2")
            assert await answer.json() == {"body": "hello", "token": TOKEN, "ray": [], "x": "1"}
        for path in ("/health", "/metrics"):
            async with session.get(url + path) as answer:
                assert answer.status == 200


@pytest.mark.process
async def test_a_caller_that_hangs_up_ends_its_request_at_the_engine() -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with opened() as (_, url, session):
        async with session.get(f"{url}/stream", headers=headers) as answer:
            assert await answer.content.readexactly(30) == b"x" * 30

        async def ended() -> bool:
            async with session.get(f"{url}/ended", headers=headers) as answer:
                return bool(await answer.json() == 1)

        await until(ended)


@pytest.mark.process
async def test_an_engine_that_is_killed_breaks_what_streams_and_answers_502_from_then_on() -> None:
    process = EngineProcess(ENGINE, token=TOKEN)
    door = Door(await process.start(), TOKEN)
    url = f"http://127.0.0.1:{await door.open('127.0.0.1')}"
    headers = {"authorization": f"Bearer {TOKEN}"}
    try:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/stream", headers=headers) as answer:
                await answer.content.readexactly(30)
                await process.stop()
                with pytest.raises(aiohttp.ClientError):
                    await answer.content.read()
            async with session.get(f"{url}/health") as answer:
                assert answer.status == 502
    finally:
        await door.close()
        await process.stop()


@pytest.mark.process
async def test_a_door_to_which_nobody_comes_is_deserted() -> None:
    async with opened() as (door, _, _), asyncio.timeout(60.0):
        await door.deserted(0.05)


@pytest.mark.process
async def test_an_engine_may_be_told_its_port_and_its_end_is_seen() -> None:
    engine = msgspec.structs.replace(ENGINE, argv=("{python}", "-c", PROGRAM, "{port}"))
    process = EngineProcess(engine, token=TOKEN)
    await process.start()
    await process.stop()
    assert await process.wait() != 0


@pytest.mark.process
@pytest.mark.parametrize(
    ("argv", "start_s", "words"),
    [
        (("{python}", "-c", "import sys; sys.exit('no weights')"), 60.0, r"exit status 1: no weights"),
        (("{python}", "-c", "print('hello', flush=True); import time; time.sleep(60)"), 60.0, "did not start"),
        (("{python}", "-c", "import time; time.sleep(60)"), 0.5, "was not up within"),
    ],
)
async def test_an_engine_that_does_not_come_up_says_why_and_leaves_nothing(
    argv: tuple[str, ...], start_s: float, words: str
) -> None:
    process = EngineProcess(Engine(argv=argv, start_s=start_s), token=TOKEN)
    with pytest.raises(ReplicaError, match=words):
        await process.start()
    assert process._process is not None
    assert process._process.returncode is not None


async def test_a_program_that_is_not_there_is_an_error_with_its_name() -> None:
    argv = ("no-such-program-anywhere",)
    if sys.platform != "linux" or not os.access("/usr/bin/setpriv", os.X_OK):
        pytest.skip("without setpriv the error is another one")
    with pytest.raises(ReplicaError, match="no-such-program-anywhere"):
        await EngineProcess(Engine(argv=argv, start_s=30.0), token=TOKEN).start()


@pytest.mark.process
async def test_an_observer_tells_the_load_when_it_changes_and_a_curve() -> None:
    told: list[News] = []

    async def tell(news: News) -> None:
        told.append(news)

    async with started() as url:
        watching = asyncio.create_task(Observer(REPLICA, url, tell=tell).run())

        async def has_both() -> bool:
            return len(told) >= 2

        await until(has_both)
        watching.cancel()
    assert told[0] == Load(replica_id="m-0", running=3, waiting=1, kv_usage=0.5)
    assert isinstance(told[1], Curve)
