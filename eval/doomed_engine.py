"""An engine of texts and images, and a replica of tools, that note every call outside of whoever makes it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from eval.promises import ONCE, Ledger, answer_to, picture_of
from swarmx.core.toolbox import Offer, ToolCall, ToolResult, ToolSpec

_UNAVAILABLE, _GARBAGE, _SLOW = 0.06, 0.03, 0.05  # of the answers
_ANY = {"type": "object"}
TOOLS = Offer(
    pool="shop",
    slots=16,
    tools=[
        ToolSpec(name=name, description="", parameters=_ANY, pool="shop", timeout_s=20.0, idempotent=name != ONCE)
        for name in ("look", ONCE)
    ],
    refused={},
)


class Engine:
    """A key that comes again gets the answer of the first time. Now and then it refuses, answers garbage or is slow.

    A model that is offered tools asks for two of the shop, then for a sub-workflow and a function, and then answers.
    """

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self._ledger = Ledger(folder)
        self._rng = rng
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/images/generations", self._image)
        app.router.add_post("/v1/tools/call", self._tool)
        app.router.add_get("/v1/tools", self._offer)
        runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()
            self._ledger.close()

    async def _chat(self, request: web.Request) -> web.Response:
        asked = await request.json()
        key = request.headers["idempotency-key"]
        self._ledger.note(key, request.headers["x-request-id"], "text", asked["messages"])
        if (trouble := await self._trouble()) is not None:
            return trouble
        message: dict[str, Any] = {"role": "assistant", "content": answer_to(key)}
        if "tools" in asked:
            message["tool_calls"] = _uses(answer_to(key), asked["messages"])
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return web.json_response({"id": "c", "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _image(self, request: web.Request) -> web.Response:
        key = request.headers["idempotency-key"]
        self._ledger.note(key, request.headers["x-request-id"], "image", (await request.json())["prompt"])
        if (trouble := await self._trouble()) is not None:
            return trouble
        return web.json_response({"created": 0, "data": [{"b64_json": base64.b64encode(picture_of(key)).decode()}]})

    async def _tool(self, request: web.Request) -> web.Response:
        call = msgspec.json.decode(await request.read(), type=ToolCall)
        if self._rng.random() < _UNAVAILABLE:
            return web.json_response({"error": "too many calls wait"}, status=503)  # this one was not begun
        self._ledger.note(call.key, call.request_id, call.tool, call.arguments)
        await self._think()
        return web.json_response(msgspec.to_builtins(ToolResult(output={"text": answer_to(call.key)})))

    async def _offer(self, request: web.Request) -> web.Response:
        return web.json_response(msgspec.to_builtins(TOOLS))

    async def _trouble(self) -> web.Response | None:
        """Think, and perhaps answer with nothing of use."""
        await self._think()
        mood = self._rng.random()
        if mood < _UNAVAILABLE:
            return web.json_response({"error": {"message": "overloaded"}}, status=503)
        return web.json_response({"choices": [], "data": []}) if mood < _UNAVAILABLE + _GARBAGE else None

    async def _think(self) -> None:
        slow = self._rng.random() < _SLOW
        await asyncio.sleep(float(self._rng.uniform(0.0, 1.0 if slow else 0.01)))


def _uses(word: str, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What an agent's model asks for, by the steps that it has taken."""
    steps: list[dict[str, Mapping[str, str]]] = [
        {"look": {"at": word}, ONCE: {"what": word}},
        {"part": {"of": word}, "upper": {"text": word}},
        {"answer": {"said": word}},
    ]
    taken = sum(message["role"] == "assistant" for message in messages)
    return [
        {"id": f"use{number}", "type": "function", "function": {"name": name, "arguments": _json(arguments)}}
        for number, (name, arguments) in enumerate(steps[min(taken, 2)].items())
    ]


def _json(arguments: Mapping[str, str]) -> str:
    return msgspec.json.encode(arguments).decode()
