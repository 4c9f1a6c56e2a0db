"""Events on their way to clients: whole, in order, however many come at once."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from swarmx.compat.comfyui.relay import Relay

pytestmark = pytest.mark.process


@pytest.mark.parametrize("size", [0, 60, 126, 200, 65_536, 70_000])
async def test_what_comes_at_once_arrives_whole_and_in_order(size: int) -> None:
    relay = Relay(status=lambda tenant: {}, current=lambda tenant, client: None, max_upload_bytes=1)
    app = web.Application()

    async def serve(request: web.Request) -> web.StreamResponse:
        return await relay.serve(request, "t")

    app.router.add_get("/ws", serve)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.make_url('/ws')}?clientId=c", max_msg_size=0) as socket:
            assert (await socket.receive_json())["type"] == "status"
            for number in range(20):
                relay.send("t", "c", "progress", {"n": number, "text": "ü" * (size // 2)})
                relay.preview("t", "c", b"\0\0\0\1" + bytes([number]) * size)
            events, frames = [], []
            while len(events) < 20:
                message = await socket.receive()
                if message.type is aiohttp.WSMsgType.BINARY:
                    frames.append(message.data)
                else:
                    events.append(message.json()["data"])
        await relay.close()
    assert [event["n"] for event in events] == list(range(20))
    assert {len(event["text"]) for event in events} == {size // 2}
    assert frames, "the first ones; others are left out where much waits"
    assert all(frame[4:] == bytes([number]) * size for number, frame in enumerate(frames))


async def test_a_client_that_is_slow_is_told_the_last_of_the_progress_that_it_missed() -> None:
    relay = Relay(status=lambda tenant: {}, current=lambda tenant, client: None, max_upload_bytes=1)
    app = web.Application()

    async def serve(request: web.Request) -> web.StreamResponse:
        return await relay.serve(request, "t")

    async def turns() -> None:
        """What was sent is written, as far as it can be."""
        for _ in range(3):
            await asyncio.sleep(0)

    def progress(job: str, number: int) -> None:
        text = json.dumps({"type": "progress", "data": {"job": job, "n": number}}).encode()
        relay.forward("t", "c", text, progress=f"progress {job}")

    app.router.add_get("/ws", serve)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{server.make_url('/ws')}?clientId=c", max_msg_size=0) as socket:
            assert (await socket.receive_json())["type"] == "status"
            for _ in range(32):  # more than any buffer on the way holds
                relay.send("t", "c", "executed", {"text": "x" * (1 << 20)})
            await turns()
            progress("a", -1)
            await turns()
            for number in range(100):
                progress("a", number)
                progress("b", number)
            relay.send("t", "c", "executing", {"node": "9"})
            progress("a", 100)
            events = []
            while len(events) < 36:
                event = await socket.receive_json()
                events.append((event["type"], event["data"].get("job"), event["data"].get("n")))
        await relay.close()
    assert events[32:] == [
        ("progress", "a", 99),
        ("progress", "b", 99),
        ("executing", None, None),
        ("progress", "a", 100),
    ]
