"""Puts `Beside` into the replicas of an unchanged Serve app, by the app's runtime environment in the config file.

    runtime_env: {env_vars: {__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR: swarmx.compat.ray_serve.replica_hook.install}}

Ray runs the hook in each worker process before any actor of it. The two methods of Serve through which all calls of
handles go are wrapped; if this Ray has others, nothing is pushed, and routers go by their own counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from swarmx.compat.ray_serve.answered import StreamedWork, work_of
from swarmx.compat.ray_serve.asked import size_of
from swarmx.compat.ray_serve.beside import Beside
from swarmx.compat.ray_serve.signals import packed

log = logging.getLogger("ray.serve")

_PUSH_S = 0.01  # after which news go out: what follows within it goes along
_APART_S = 0.1  # of one push from the next: on a busy replica they would cost more than they tell
_AGAIN_S = 5.0
_BYTES_PER_TOKEN = 4.0


def install() -> None:
    """Wrap Serve's replica in this process. Never raises: Ray would end the worker."""
    try:
        from ray.serve._private.replica import UserCallableWrapper

        _wrap(UserCallableWrapper)
    except Exception as error:  # noqa: BLE001
        log.warning("replicas of this process push no signals to SwarmX: %r", error)


def _wrap(serve_wrapper: Any) -> None:
    if getattr(serve_wrapper, "_swarmx_pusher", None) is not None:
        return
    call_method, call_generator = serve_wrapper.call_user_method, serve_wrapper.call_user_generator
    pusher = Pusher()

    async def call_user_method(self: Any, request_metadata: Any, request_args: Any, request_kwargs: Any) -> Any:
        served, work = pusher.begin(request_args, request_kwargs), None
        try:
            answer = await call_method(self, request_metadata, request_args, request_kwargs)
            work = work_of(answer)
            return answer
        finally:
            pusher.end(served, work)

    async def call_user_generator(
        self: Any, request_metadata: Any, request_args: Any, request_kwargs: Any
    ) -> AsyncIterator[Any]:
        served, stream, ended = pusher.begin(request_args, request_kwargs), StreamedWork(), False
        try:
            async for item in call_generator(self, request_metadata, request_args, request_kwargs):
                stream.add(item)
                yield item
            ended = True
        finally:
            pusher.end(served, stream.total() if ended else None)

    serve_wrapper.call_user_method = call_user_method
    serve_wrapper.call_user_generator = call_user_generator
    serve_wrapper._swarmx_pusher = pusher


class Pusher:
    """Counts the calls of this process's replica, and tells the board what has changed: `_PUSH_S` after it has, and no
    more often than every `_APART_S`."""

    def __init__(self) -> None:
        self._beside: Beside | None = None
        self._board: Any = None
        self._looks_again_s = 0.0
        self._due = False
        self._pushed_s = -_APART_S

    def begin(self, args: Any, kwargs: Any) -> Any:
        """A call begins; returns what `end` wants. None where this is no replica."""
        try:
            if self._beside is None:
                self._beside = _beside()
            served = self._beside.begin(size_of(args, kwargs) / _BYTES_PER_TOKEN)
            self._tell()
            return served
        except Exception as error:  # noqa: BLE001  # a count is not worth a call
            log.debug("SwarmX could not count a call: %r", error)
            return None

    def end(self, served: Any, work: float | None) -> None:
        """The call is over."""
        if served is None or self._beside is None:
            return
        try:
            self._beside.end(served, work)
            self._tell()
        except Exception as error:  # noqa: BLE001  # nor is it worth an answer
            log.debug("SwarmX could not count the end of a call: %r", error)

    def _tell(self) -> None:
        if not self._due:
            self._due = True
            within_s = max(_PUSH_S, self._pushed_s + _APART_S - time.monotonic())
            asyncio.get_running_loop().call_later(within_s, self._push)

    def _push(self) -> None:
        self._due, self._pushed_s = False, time.monotonic()
        if self._board is None:
            if time.monotonic() >= self._looks_again_s:
                self._looks_again_s = time.monotonic() + _AGAIN_S
                asyncio.get_running_loop().run_in_executor(None, self._find)
            return
        if self._beside is None:
            return
        try:
            self._board.push.remote(packed(self._beside.signal(time.time())))
        except Exception as error:  # noqa: BLE001
            self._board = None
            log.info("SwarmX's board cannot be reached: %r", error)

    def _find(self) -> None:
        from swarmx.compat.ray_serve.board import find_board

        try:
            self._board = find_board()
        except Exception as error:  # noqa: BLE001
            log.info("SwarmX's board cannot be found: %r", error)


def _beside() -> Beside:
    from ray import serve

    context = serve.get_replica_context()
    name = f"{context.app_name}/{context.deployment}" if context.app_name else context.deployment
    return Beside(name, context.replica_id.unique_id)
