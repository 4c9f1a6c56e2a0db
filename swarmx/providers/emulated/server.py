"""The emulated language model server: vLLM's OpenAI routes over a paced engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from swarmx.core.batching import BLOCK_TOKENS
from swarmx.providers.emulated.pacing import PacedEngine, Run
from swarmx.providers.emulated.schema import Schema
from swarmx.providers.emulated.tool_calls import Choice, Tool, tool_call
from swarmx.providers.emulated.truth import Answer, Prompt, Truth, prefix_hashes, prompt_tokens
from swarmx.providers.emulated.wire import (
    ApiError,
    Endpoint,
    hang_up,
    json_response,
    or_gone,
    read,
    start_events,
    unknown_model,
    write,
)

FLUSH_S = 0.02


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None
    tool_calls: list[Any] | None = None

    def text(self) -> str:
        """The text of the message, its parts joined; calls of tools as JSON behind it."""
        said = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return said + msgspec.json.encode(self.tool_calls).decode() if self.tool_calls else said


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _JsonSchema(msgspec.Struct):
    schema: Schema = msgspec.field(default_factory=dict)


class _ResponseFormat(msgspec.Struct):
    type: str
    json_schema: _JsonSchema | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both routes take. Sampling fields such as temperature, seed and stop are accepted and change nothing."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None
    ignore_eos: bool = False
    priority: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] = 0


class _ChatBody(_Body, kw_only=True):
    messages: list[_Message]
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How a route words its answers."""

    object: str
    chunk_object: str
    prefix: str

    def whole(self, answer: Answer, tool_id: str) -> dict[str, Any]:
        """The only choice of an answer that is not streamed."""
        text = "".join(answer.pieces)
        said: dict[str, Any] = {"text": text}
        if answer.tool is not None:
            called = {"id": tool_id, "type": "function", "function": {"name": answer.tool, "arguments": text}}
            said = {"message": {"role": "assistant", "content": None, "tool_calls": [called]}}
        elif self.prefix == "chatcmpl":
            said = {"message": {"role": "assistant", "content": text}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}

    def delta(self, answer: Answer, i: int, tool_id: str) -> dict[str, Any]:
        """The only choice of the chunk that brings token `i`; the first one of a call names the tool."""
        text = answer.pieces[i]
        said: dict[str, Any] = {"text": text}
        if answer.tool is not None:
            first = {"id": tool_id, "type": "function"} if i == 0 else {}
            function = {"name": answer.tool, "arguments": text} if i == 0 else {"arguments": text}
            said = {"delta": {"tool_calls": [{"index": 0, **first, "function": function}]}}
        elif self.prefix == "chatcmpl":
            said = {"delta": {"content": text}}
        reason = answer.finish_reason if i == len(answer.pieces) - 1 else None
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


_CHAT = _Shape(object="chat.completion", chunk_object="chat.completion.chunk", prefix="chatcmpl")
_TEXT = _Shape(object="text_completion", chunk_object="text_completion", prefix="cmpl")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A checked request and its true answer, in the engine."""

    shape: _Shape
    run: Run
    answer: Answer
    id: str
    created: int
    include_usage: bool

    @property
    def tool_id(self) -> str:
        """The id of the tool call, if it is one."""
        return f"call_emulated_{self.run.request.request_id}"

    def usage(self) -> dict[str, int]:
        prompt, output = self.run.request.prompt_tokens, len(self.answer.pieces)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextServer:
    """Answers completions from `truth`, when `paced` says that the tokens are due."""

    model: str
    paced: PacedEngine
    truth: Truth

    def routes(self) -> list[Route]:
        """The routes that only a language model has."""
        return [
            Route("/v1/chat/completions", Endpoint(self.chat), methods=["POST"]),
            Route("/v1/completions", Endpoint(self.completion), methods=["POST"]),
        ]

    async def chat(self, request: Request, send: Send) -> Response | None:
        """POST /v1/chat/completions."""
        body = await read(request, _ChatBody)
        if not body.messages:
            raise ApiError(400, "messages is empty, expected at least one message.", param="messages")
        system = next((m.text() for m in body.messages if m.role == "system"), "")
        user = next((m.text() for m in reversed(body.messages) if m.role == "user"), "")
        offered = f"<|tools|>\n{msgspec.json.encode(body.tools).decode()}\n" if body.tools else ""
        text = offered + "".join(f"<|{m.role}|>\n{m.text()}\n" for m in body.messages)
        return await self._answer(body, _CHAT, system, user, text, request, send)

    async def completion(self, request: Request, send: Send) -> Response | None:
        """POST /v1/completions."""
        body = await read(request, _CompletionBody)
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if len(prompts) != 1:
            raise ApiError(400, f"prompt has {len(prompts)} texts, the emulator takes exactly one.", param="prompt")
        return await self._answer(body, _TEXT, "", prompts[0], prompts[0], request, send)

    async def _answer(
        self, body: _Body, shape: _Shape, system: str, user: str, text: str, request: Request, send: Send
    ) -> Response | None:
        job = self._submit(body, shape, system, user, text)
        try:
            if body.stream:
                await self._stream(job, request, send)
                return None
            if not await or_gone(job.run.finished, request.receive):
                return None
            return json_response(
                {
                    "id": job.id,
                    "object": shape.object,
                    "created": job.created,
                    "model": self.model,
                    "choices": [shape.whole(job.answer, job.tool_id)],
                    "usage": job.usage(),
                }
            )
        finally:
            self.paced.abort(job.run)

    def _submit(self, body: _Body, shape: _Shape, system: str, user: str, text: str) -> _Job:
        """Check the request, look its answer up and hand it to the engine. Raises ApiError."""
        if body.model != self.model:
            raise unknown_model(body.model, self.model)
        if body.n not in (None, 1):
            raise ApiError(400, f"n is {body.n}, the emulator gives exactly one answer.", param="n")
        prompt, context = prompt_tokens(text), self.paced.profile.kv_capacity_tokens
        if prompt >= context:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, but the prompt has {prompt} tokens: "
                "shorten the prompt.",
                param="messages" if shape is _CHAT else "prompt",
            )
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        if asked is not None and asked < 1:
            raise ApiError(400, f"max_tokens is {asked}, expected at least 1.", param="max_tokens")
        limit = context - prompt if asked is None else min(asked, context - prompt)
        answer = self._called(body, text, limit) or self.truth.answer(
            Prompt(
                system=system,
                user=user,
                text=text,
                max_tokens=limit,
                schema=_schema(body.response_format),
                ignore_eos=body.ignore_eos,
            )
        )
        run = self.paced.submit(
            prompt_tokens=prompt,
            output_tokens=len(answer.pieces),
            reason="length" if answer.finish_reason == "length" else "stop",
            prefix=prefix_hashes(text, BLOCK_TOKENS),
            priority=body.priority,
        )
        if run is None:
            raise ApiError(400, f"This model's maximum context length is {context} tokens: ask for fewer tokens.")
        return _Job(
            shape=shape,
            run=run,
            answer=answer,
            id=f"{shape.prefix}-emulated-{run.request.request_id}",
            created=int(time.time()),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )

    def _called(self, body: _Body, text: str, limit: int) -> Answer | None:
        """The tool call that answers, if it is one."""
        if not isinstance(body, _ChatBody) or not body.tools or body.ignore_eos:
            return None
        return tool_call(
            body.tools,
            body.tool_choice,
            text=text,
            model=self.truth.model,
            seed=self.truth.seed,
            max_tokens=limit,
        )

    async def _stream(self, job: _Job, request: Request, send: Send) -> None:
        """One server-sent event a token, written together with all that came due within `FLUSH_S`."""
        gone = asyncio.ensure_future(hang_up(request.receive))
        try:
            await start_events(send)
            await asyncio.wait((job.run.started, gone), return_when=asyncio.FIRST_COMPLETED)
            sent, total = 0, len(job.answer.pieces)
            while sent < total and not gone.done():
                due = self.paced.produced(job.run)
                if due > sent:
                    await write(send, b"".join(self._chunks(job, sent, due)))
                    sent = due
                if sent < total:
                    await asyncio.wait((job.run.finished, gone), timeout=FLUSH_S, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                await write(send, self._usage_chunk(job) + b"data: [DONE]\n\n", more=False)
        finally:
            gone.cancel()

    def _chunks(self, job: _Job, sent: int, due: int) -> Iterable[bytes]:
        if sent == 0 and job.shape is _CHAT:
            role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            yield self._event(job, [role])
        for i in range(sent, due):
            yield self._event(job, [job.shape.delta(job.answer, i, job.tool_id)])

    def _usage_chunk(self, job: _Job) -> bytes:
        return self._event(job, [], usage=job.usage()) if job.include_usage else b""

    def _event(self, job: _Job, choices: list[dict[str, Any]], **more: Any) -> bytes:
        chunk = {
            "id": job.id,
            "object": job.shape.chunk_object,
            "created": job.created,
            "model": self.model,
            "choices": choices,
            **more,
        }
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def _schema(wanted: _ResponseFormat | None) -> Schema | None:
    """The JSON schema that the answer has to meet; None for free text."""
    match wanted:
        case None | _ResponseFormat(type="text"):
            return None
        case _ResponseFormat(type="json_object"):
            return {"type": "object"}
        case _ResponseFormat(type="json_schema", json_schema=_JsonSchema(schema=schema)):
            return schema
        case _:
            raise ApiError(
                400,
                f"response_format {wanted.type!r} is not supported, expected text, json_object or json_schema with its "
                "json_schema.",
                param="response_format",
            )
