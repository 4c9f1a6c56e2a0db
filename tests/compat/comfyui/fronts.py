"""A front over fakes, and a client that does what ComfyUI's clients do."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from swarmx.compat.comfyui.app import listening, running
from swarmx.compat.comfyui.forecasts import JobForecaster
from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import FakeComfy

PATIENCE_S = 60.0  # the machine may be busy; only a test that fails waits this long
FAST = {"poll_s": 0.05, "refused_after_s": 0.1, "lost_after_s": 30.0, "timeout_s": 10.0, "refresh_s": 0.2}
IMPATIENT = {"lost_after_s": 2.0, "timeout_s": 1.0}  # where a server is to be given up that says nothing


class Client:
    """One client id at one front."""

    def __init__(self, url: str, session: aiohttp.ClientSession, token: str | None = None) -> None:
        self.url = url
        self.client_id = uuid.uuid4().hex
        self.session = session
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status, and the JSON of the answer, or its text."""
        async with self.session.request(method, self.url + path, json=body, headers=self.headers) as response:
            text = await response.text(errors="replace")
            return response.status, await response.json() if "json" in response.headers.get(
                "Content-Type", ""
            ) else text

    async def submit(self, prompt: Any, **more: Any) -> tuple[int, Any]:
        return await self.ask("POST", "/prompt", {"prompt": prompt, "client_id": self.client_id, **more})

    def socket(self) -> Any:
        return self.session.ws_connect(f"{self.url}/ws?clientId={self.client_id}", headers=self.headers)

    async def run(self, prompt: Any, **more: Any) -> tuple[str, list[tuple[str, dict[str, Any]]], dict[str, Any]]:
        """Submit, listen to the end, read the history: the id, the events, the entry."""
        async with self.socket() as socket:
            status, answer = await self.submit(prompt, **more)
            assert status == 200, answer
            events = await until_end(socket, answer["prompt_id"])
        return answer["prompt_id"], events, await self.history(answer["prompt_id"])

    async def history(self, prompt_id: str) -> dict[str, Any]:
        _, found = await self.ask("GET", f"/history/{prompt_id}")
        return found.get(prompt_id)  # type: ignore[no-any-return]

    async def ended(self, prompt_id: str) -> dict[str, Any]:
        """The history of a job, once there is one."""
        return await eventually(lambda: self.history(prompt_id))


async def until_end(socket: Any, prompt_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Events up to the one that says that the job has ended."""
    events: list[tuple[str, dict[str, Any]]] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await socket.receive()
            if message.type is aiohttp.WSMsgType.BINARY:
                events.append(("binary", {"frame": message.data}))
                continue
            assert message.type is aiohttp.WSMsgType.TEXT, message
            event = message.json()
            events.append((event["type"], event["data"]))
            kind, data = events[-1]
            if kind == "executing" and (data["node"], data.get("prompt_id")) == (None, prompt_id):
                return events


async def eventually(look: Callable[[], Any], *, within_s: float = PATIENCE_S) -> Any:
    """What the look gives, once that is something."""
    async with asyncio.timeout(within_s):
        while not (found := await look()):
            await asyncio.sleep(0.01)
    return found


@asynccontextmanager
async def front(
    folder: Path,
    *fakes: FakeComfy,
    keys: Keyring | None = None,
    wait: bool = True,
    forecaster: JobForecaster | None = None,
    **more: Any,
) -> AsyncIterator[Client]:
    """A front over the fakes that are up, and a client of it."""
    servers = [{"name": f"s{i + 1}", "url": fake.url} for i, fake in enumerate(fakes)]
    settings = FrontSettings.model_validate({"servers": servers, "auth": keys is not None, **FAST, **more})
    async with (
        running(settings, folder, keys=keys, forecaster=forecaster) as app,
        listening(app, "127.0.0.1", 0) as url,
        aiohttp.ClientSession() as session,
    ):
        client = Client(url, session)

        async def up() -> bool:
            _, answer = await client.ask("GET", "/healthz")
            return bool(answer["servers_up"] == len(fakes))

        if wait:
            await eventually(up)
        yield client
