"""The OpenAI front: any client of that API, streaming or not, with its calls routed by the agents."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from swarmx.core.errors import NotFound
from swarmx.core.nouns import PRIORITIES, Call, CallKind
from swarmx.core.prompts import PromptText
from swarmx.core.records import ModelRequest
from swarmx.gateway import shown
from swarmx.gateway.context import Context
from swarmx.gateway.identity import Identity, store_id
from swarmx.gateway.keys import Key
from swarmx.gateway.openapi import SERVER_EVENT, answers, header, refuses
from swarmx.gateway.transparent import NO_WORKFLOW, Visit
from swarmx.runtime.event_stream import stopped_event
from swarmx.runtime.requests import BadRequest, call_of, new_id

T = TypeVar("T")

_CHAT = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 40}
_IMAGE = {"model": "sdxl", "prompt": "A bee on a flower", "size": "512x512", "n": 1}
_PRIORITY = re.compile(r"[+-]?[0-9]{1,2}")
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{0,9})?")


def router(context: Context) -> APIRouter:
    """Routes under /v1."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], default_response_class=Response)

    @routes.post("/chat/completions", summary="Chat completion, streamed or not", **_described("messages", _CHAT))
    async def chat(request: Request) -> Response:
        return await _answer(context, request, "llm")

    @routes.post(
        "/images/generations", summary="Images from a prompt; `steps` is an extension", **_described("prompt", _IMAGE)
    )
    async def images(request: Request) -> Response:
        return await _answer(context, request, "image")

    @routes.get(
        "/models", summary="Models that some replica serves", responses=answers(shown.ModelList, "Their names.")
    )
    async def models(request: Request) -> Response:
        context.keys.check(request.headers.get("authorization")).require("read")
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "swarmx"} for name in _models(context)]
        return JSONResponse({"object": "list", "data": rows})

    return routes


def _models(context: Context) -> list[str]:
    return [name for name, kind in context.book.models().items() if kind != "tool"]


def _described(prompt: str, example: dict[str, Any]) -> dict[str, Any]:
    """A route for requests of OpenAI's form, of which only what SwarmX itself reads is described."""
    schema = {
        "type": "object",
        "required": ["model"],
        "properties": {"model": {"type": "string"}, prompt: {}, "stream": {"type": "boolean"}},
    }
    return {
        "openapi_extra": {
            "parameters": [
                header("x-swarmx-priority", "From -10 to 10; higher is more urgent."),
                header("x-swarmx-deadline-s", "Seconds from now by which the answer has to be there."),
            ],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "example": example}}},
        },
        "responses": {
            200: {
                "description": "The replica's own answer: JSON, or server-sent events with `stream`.",
                "content": {
                    "application/json": {"schema": {"type": "object"}},
                    "text/event-stream": {"schema": SERVER_EVENT},
                },
            }
        }
        | refuses(404, 429, 502, 504),
    }


async def _answer(context: Context, request: Request, kind: CallKind) -> Response:
    key = context.keys.check(request.headers.get("authorization"))
    key.require("submit")
    raw = await request.body()
    body = _decoded(raw)
    identity = context.transparent.identify(request.scope["headers"])
    if identity is None:
        return await _relayed(context, request, *_call(context, request, key, kind, body, None), raw, None)
    if identity.final and kind == "llm" and not body.get("messages"):
        await context.transparent.close(identity, key.tenant)
        return _nothing(body.get("model"))
    call, prompt = _call(context, request, key, kind, body, identity)
    visit = await context.transparent.touch(identity, key.tenant)
    if visit.workflow_id != call.workflow_id:  # the session was away for so long that it begins again
        session = visit.workflow_id if call.session else ""
        call = msgspec.structs.replace(call, workflow_id=visit.workflow_id, session=session)
    context.transparent.seen(visit, call, tools_offered=prompt.tools)
    return await _relayed(context, request, call, prompt, raw, visit)


async def _relayed(
    context: Context, request: Request, call: Call, prompt: PromptText, raw: bytes, visit: Visit | None
) -> Response:
    if call.stream:
        return await _streamed(context, request, call, prompt, raw, visit)
    try:
        task = asyncio.ensure_future(context.calls.answer(call, prompt, raw))
        if not await _guarded(visit, _done_before_disconnect(request, task)):
            return Response(status_code=499)
        answer = task.result()
        headers = {
            "x-swarmx-call-id": answer.call_id,
            "x-swarmx-replica": answer.replica_id,
            "x-swarmx-attempts": str(answer.attempts),
        }
        return Response(answer.body, 200, headers, media_type="application/json")
    finally:
        if visit is not None:
            await context.transparent.release(visit)


def _guarded(visit: Visit | None, step: Awaitable[T]) -> Awaitable[T]:
    """The step, which ends early when the call's workflow is cancelled."""
    return step if visit is None else visit.guard(step)


def _decoded(raw: bytes) -> dict[str, Any]:
    try:
        body: Any = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(body).__name__}.")
    return body


def _nothing(model: object) -> Response:
    """The answer to a request that has nothing to say but that its session is over."""
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    answer = {"id": new_id("chatcmpl"), "object": "chat.completion", "created": 0, "model": model, "choices": []}
    return JSONResponse({**answer, "usage": usage})


def _call(
    context: Context, request: Request, key: Key, kind: CallKind, body: dict[str, Any], identity: Identity | None
) -> tuple[Call, PromptText]:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("`model` must name the model to ask.", param="model")
    served = context.book.models().get(model, "tool")
    if served == "tool":  # pools of tools are for workflows
        raise NotFound(f"no replica serves the model {model!r}; there are: {', '.join(_models(context)) or 'none'}.")
    if served != kind:
        other = "/v1/images/generations" if served == "image" else "/v1/chat/completions"
        raise BadRequest(f"the model {model!r} is asked at {other}.", param="model")
    request_ = ModelRequest(
        tenant=key.tenant,
        workflow_id=store_id(identity.workflow_id, key.tenant) if identity else NO_WORKFLOW,
        workflow_kind=identity.kind if identity else "single",
        node=identity.node if identity else "",
        role=request.headers.get("x-swarmx-role", "assistant")[:64],
        kind=kind,
        model=model,
        body=body,
        deadline_at_s=_deadline(request, context.clock.now_s()),
        priority=_priority(request),
    )
    return call_of(request_)


def _priority(request: Request) -> int:
    """What `x-swarmx-priority` asks for; the body's own `priority` is the engine's. Raises BadRequest."""
    text = request.headers.get("x-swarmx-priority", "0")
    if not _PRIORITY.fullmatch(text) or int(text) not in PRIORITIES:
        raise BadRequest(
            f"x-swarmx-priority {text[:40]!r}: a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]} was expected; "
            "higher is more urgent."
        )
    return int(text)


def _deadline(request: Request, now_s: float) -> float | None:
    """When the answer has to be there by `x-swarmx-deadline-s`, which counts from now. Raises BadRequest."""
    text = request.headers.get("x-swarmx-deadline-s")
    if text is None:
        return None
    if not _SECONDS.fullmatch(text) or float(text) <= 0.0:
        raise BadRequest(
            f"x-swarmx-deadline-s {text[:40]!r}: seconds from now were expected, above 0 and below a million."
        )
    return now_s + float(text)


async def _streamed(
    context: Context, request: Request, call: Call, prompt: PromptText, raw: bytes, visit: Visit | None
) -> Response:
    stream = context.calls.stream(call, prompt, raw)

    async def leave() -> None:
        await stream.aclose()
        if visit is not None:
            await context.transparent.release(visit)

    first = asyncio.ensure_future(anext(stream))
    try:
        if not await _guarded(visit, _done_before_disconnect(request, first)):
            await leave()
            return Response(status_code=499)
        chunk = first.result()
    except BaseException:
        await leave()
        raise

    async def events() -> AsyncIterator[bytes]:
        yield chunk
        try:
            while more := await _guarded(visit, anext(stream, b"")):
                yield more
        except BadRequest as cancelled:
            yield stopped_event(str(cancelled))

    headers = {"x-swarmx-call-id": call.call_id, "cache-control": "no-cache"}
    return _Relay(events(), headers, leave)


class _Relay(StreamingResponse):
    """An event stream that calls `leave` however it ends, even when the client is gone before its first byte."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: dict[str, str], leave: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(events, 200, headers, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._leave())


async def _done_before_disconnect(request: Request, task: asyncio.Future[Any]) -> bool:
    """Wait for the task; cancel it and return False when the client hangs up first."""
    gone = asyncio.ensure_future(request.receive())
    try:
        while True:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return True
            if gone.result()["type"] == "http.disconnect":
                task.cancel()
                await asyncio.wait({task})
                return False
            gone = asyncio.ensure_future(request.receive())
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        gone.cancel()
