"""A language model behind any OpenAI-compatible server: one prompt, one tool call, every failure a value."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
from msgspec.structs import replace

from swarmx.core.control import Prompt, Reply
from swarmx.core.errors import ConfigError
from swarmx.runtime.upstream import NOT_JSON, usage_of

_MOST_BYTES = 256 * 1024
_MOST_DETAIL = 200  # characters


class OpenAiModel:
    """Implements `core.ports.LanguageModel` over POST {url}/v1/chat/completions.

    `url` gives the base URL of the server, or None while there is none; `key_variable` names the environment variable
    that holds its API key. Answers are constrained to the schemas of the tools where the server can do that. Raises
    ConfigError when the variable is not set.
    """

    def __init__(self, *, url: Callable[[], str | None], name: str, key_variable: str | None = None) -> None:
        self._url = url
        self._name = name
        self._headers: dict[str, str] = {}
        if key_variable is not None:
            key = os.environ.get(key_variable)
            if not key:
                raise ConfigError(f"coordinator: the environment variable {key_variable} holds no key; set it.")
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    @property
    def name(self) -> str:
        return self._name

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def reply(self, prompt: Prompt, *, deadline_s: float) -> Reply:
        """Ask once. A server that cannot be reached, is too busy or breaks down is `unreachable`."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                reply = await self._ask(prompt)
        except TimeoutError:
            reply = Reply(error="late", detail=f"no answer within {deadline_s:.3g} s")
        except (aiohttp.ClientError, OSError) as error:
            reply = Reply(error="unreachable", detail=repr(error)[:_MOST_DETAIL])
        return replace(reply, seconds=time.monotonic() - began_s)

    async def _ask(self, prompt: Prompt) -> Reply:
        url = self._url()
        if url is None:
            return Reply(error="unreachable", detail="its server is not running")
        if self._session is None:
            # Made here, on the loop that uses it. Engines run uvicorn, which drops idle connections after 5 s.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(keepalive_timeout=3.0), timeout=aiohttp.ClientTimeout(total=None)
            )
        endpoint = f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        body = msgspec.json.encode(_request(self._name, prompt))
        headers = {**self._headers, "content-type": "application/json"}
        # A redirect is not followed: it could carry the key elsewhere.
        async with self._session.post(endpoint, data=body, headers=headers, allow_redirects=False) as response:
            answer = bytearray()
            async for chunk in response.content.iter_any():
                answer += chunk
                if len(answer) > _MOST_BYTES:
                    response.close()
                    return Reply(error="too_long", detail=f"more than {_MOST_BYTES} bytes")
            if response.status == 429 or response.status >= 500:
                return Reply(error="unreachable", detail=f"status {response.status}")
            if response.status != 200:
                detail = f"status {response.status}: {answer[:_MOST_DETAIL].decode(errors='replace')}"
                return Reply(error="refused", detail=detail)
        return read_answer(bytes(answer))


def _request(name: str, prompt: Prompt) -> dict[str, Any]:
    """No `seed`: it is not needed at temperature 0, and vLLM on a CPU dies of one when it prefills in chunks."""
    request: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}],
        "temperature": 0,
        "max_tokens": prompt.max_tokens,
    }
    if prompt.tools:
        request |= {"tools": list(prompt.tools), "tool_choice": "required", "parallel_tool_calls": False}
    return request


def read_answer(answer: bytes) -> Reply:
    """The one choice of a chat completion; several tool calls, or none and no text, are no reply."""
    try:
        completion = msgspec.json.decode(answer, type=_Completion)
    except NOT_JSON as error:
        return Reply(error="not_a_reply", detail=str(error)[:_MOST_DETAIL])
    usage = usage_of(completion.usage)
    reply = Reply(prompt_tokens=usage.prompt_tokens, output_tokens=int(usage.work_done or 0))
    if len(completion.choices) != 1:
        return replace(reply, error="not_a_reply", detail=f"{len(completion.choices)} choices, expected one")
    (choice,) = completion.choices
    calls = choice.message.tool_calls or []
    reply = replace(reply, text=choice.message.content or "")
    if choice.finish_reason == "length":
        return replace(reply, error="too_long", detail="cut off at max_tokens")
    if len(calls) > 1:
        return replace(reply, error="not_a_reply", detail=f"{len(calls)} tool calls, expected one")
    if calls:
        return replace(reply, tool=calls[0].function.name, arguments=calls[0].function.arguments)
    return reply


class _Function(msgspec.Struct):
    name: str
    arguments: str = ""


class _ToolCall(msgspec.Struct):
    function: _Function


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: Any = None
