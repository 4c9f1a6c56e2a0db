"""What a server says is read as Python writes it: with numbers that are none, and with names that are no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from swarmx.compat.comfyui.server import ComfyServer, ServerAway, decoded
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import front

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("said", "read"),
    [
        (b'{"max": Infinity, "min": -Infinity, "step": NaN}', {"max": None, "min": None, "step": None}),
        (rb'["caf\udce9.png", "a\ud83d\ude00"]', ["caf?.png", "a\N{GRINNING FACE}"]),
        (b'["caf\xe9.png"]', ["caf\N{REPLACEMENT CHARACTER}.png"]),
    ],
)
def test_what_is_no_strict_json_is_read_for_what_it_says(said: bytes, read: Any) -> None:
    assert decoded(said) == read


@pytest.mark.parametrize("said", [b"", b"<html>", b"[" * 100_000, b"{]", b"[1e400]"])
async def test_a_server_that_answers_with_no_json_at_all_is_away(said: bytes) -> None:
    async def answered(request: web.Request) -> web.Response:
        return web.Response(body=said)

    app = web.Application()
    app.router.add_get("/object_info", answered)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        comfy = ComfyServer("s", str(server.make_url("")), session, timeout_s=10.0)
        with pytest.raises(ServerAway):
            await comfy.object_info()


class _Scoring(FakeComfy):
    """Its pictures have a score, which is no number, and its folder a file whose name is no text."""

    def __init__(self) -> None:
        super().__init__(custom=True)
        self.info["Picky"]["input"]["required"]["value"][1]["max"] = float("inf")
        self.files["input", "caf\udce9.png"] = b"cafe"

    def _output(self, node: str, row: dict[str, Any]) -> Any:
        output = super()._output(node, row)
        return output and output | {"score": [float("nan")]}


async def test_a_server_that_writes_no_strict_json_is_up_and_its_jobs_run_once(tmp_path: Path) -> None:
    fake = _Scoring()
    async with serving(fake), front(tmp_path, fake) as client:
        _, events, entry = await client.run(graph())
        _, info = await client.ask("GET", "/object_info/LoadImage")
    assert entry["outputs"]["9"]["score"] == [None]
    assert [data["output"]["score"] for kind, data in events if kind == "executed"] == [[None]]
    assert entry["swarmx"]["attempts"] == len(fake.received) == 1
    assert info["LoadImage"]["input"]["required"]["image"][0] == ["caf?.png"]
