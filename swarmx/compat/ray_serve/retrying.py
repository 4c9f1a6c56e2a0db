"""Answers that are asked for again where their replica was lost, and the key that names a request over its attempts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaResult, RunningReplica

from swarmx.compat.ray_serve.answered import StreamedWork, work_of

_T = TypeVar("_T")
_WAIT_S = 0.05
_MOST_WAIT_S = 2.0
LOST = (ActorDiedError, ActorUnavailableError)


def idempotency_key() -> str:
    """Inside a replica: what names the request that is being served, the same for all attempts at it.

    Empty outside of a request. A deployment whose method must not have an effect twice looks this up first.
    """
    context = ray.serve.context._get_serve_request_context()
    return f"{context.request_id}:{context._internal_request_id}" if context.request_id else ""


async def retrying(call: Callable[[], Any], *, retries: int = 2) -> Any:
    """Await `call()`, a request of a deployment handle, and repeat it where its replica is lost under it.

    For callers whose deployment has another router, or methods that the router may not repeat. `call` has to make a
    new request each time: `await retrying(lambda: handle.remote(prompt))`.
    """
    for attempt in range(retries + 1):
        try:
            return await call()
        except LOST:
            if attempt == retries:
                raise
            await asyncio.sleep(min(_MOST_WAIT_S, _WAIT_S * 2.0**attempt))
    raise AssertionError("unreachable")


class WatchedReplica(RunningReplica):  # type: ignore[misc]  # Ray has no types
    """A replica whose answers are `WatchedResult`s; `router` is who sends again."""

    def __init__(self, replica_info: Any, router: Any) -> None:
        super().__init__(replica_info)
        self._swarmx_router = router

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        """As Serve does; a request that is sent again gets its plain result."""
        result = super().try_send_request(pr, with_rejection)
        if getattr(pr, "_swarmx_resent", False) or not with_rejection:
            return result
        options = self._swarmx_router._options
        left = options.retries if pr.metadata.call_method in options.retry_methods else 0
        return WatchedResult(result, pr, self, self._swarmx_router, left)


class WatchedResult(ReplicaResult):  # type: ignore[misc]
    """The answer of a request: its work is told to whoever watches, and a lost replica's request is sent again.

    Up to `left` times, and of a stream only while nothing of it has come. Where the answer is handed on as a reference,
    it is neither seen nor asked for again.
    """

    def __init__(self, result: ReplicaResult, pr: PendingRequest, replica: Any, router: Any, left: int) -> None:
        self._result = result
        self._pr = pr
        self._replica = replica
        self._router = router
        self._left = left
        self._stream = StreamedWork()
        self._tell: Callable[[float | None], None] | None = None
        self._is_cancelled = False
        self._sending: Future[tuple[ReplicaResult, Any]] | None = None  # while the request is sent again

    def watch(self, tell: Callable[[float | None], None]) -> None:
        """Have the work of the answer told, once it is known."""
        self._tell = tell

    async def get_rejection_response(self) -> Any:
        return await self._result.get_rejection_response()

    def get(self, timeout_s: float | None) -> Any:
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                return self._seen(self._result.get(_left_s(ends_s)))
            except LOST as error:
                if not self._may_repeat(error):
                    raise
                self._repeat_within(ends_s)

    async def get_async(self) -> Any:
        while True:
            try:
                return self._seen(await self._result.get_async())
            except LOST as error:
                if not self._may_repeat(error):
                    raise
                await self._repeat()

    def __next__(self) -> Any:
        while True:
            try:
                return self._item(self._result.__next__())
            except StopIteration:
                self._ended()
                raise
            except LOST as error:
                if self._stream.parts or not self._may_repeat(error):
                    raise
                self._repeat_within(None)

    async def __anext__(self) -> Any:
        while True:
            try:
                return self._item(await self._result.__anext__())
            except StopAsyncIteration:
                self._ended()
                raise
            except LOST as error:
                if self._stream.parts or not self._may_repeat(error):
                    raise
                await self._repeat()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def add_done_callback(self, callback: Callable[..., Any]) -> None:
        self._result.add_done_callback(callback)

    def cancel(self) -> None:
        self._left, self._is_cancelled = 0, True
        if (sending := self._sending) is not None:
            sending.cancel()
        self._result.cancel()

    def to_object_ref(self) -> Any:
        return self._result.to_object_ref()

    async def to_object_ref_async(self) -> Any:
        return await self._result.to_object_ref_async()

    def to_object_ref_gen(self) -> Any:
        return self._result.to_object_ref_gen()

    def _seen(self, answer: _T) -> _T:
        self._told(work_of(answer))
        return answer

    def _item(self, item: _T) -> _T:
        """A part of a stream. Whoever gets a whole answer as the first may never ask for the end."""
        self._stream.add(item)
        if self._stream.parts == 1 and self._stream.whole is not None and self._tell is not None:
            self._tell(self._stream.whole)
        return item

    def _ended(self) -> None:
        """A stream came to its end."""
        self._told(self._stream.total())

    def _told(self, work: float | None) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell(work)

    def _may_repeat(self, error: Exception) -> bool:
        """Whether it was this replica that was lost, and there is an attempt left."""
        lost = getattr(error, "actor_id", None)
        mine = self._replica.actor_id.hex()
        if self._left <= 0 or (isinstance(lost, str) and lost != mine):
            return False
        self._left -= 1
        self._tell = None
        return True

    def _repeat_within(self, ends_s: float | None) -> None:
        """Send again, on the loop of the router. Raises TimeoutError once it is `ends_s`: nobody waits for it then."""
        sending = self._begin_again()
        try:
            self._take(sending.result(_left_s(ends_s)))
        except TimeoutError:
            sending.cancel()
            raise TimeoutError("Timed out while the request was sent again.") from None

    async def _repeat(self) -> None:
        """The same, whichever loop the caller is on."""
        self._take(await asyncio.wrap_future(self._begin_again()))

    def _begin_again(self) -> Future[tuple[ReplicaResult, Any]]:
        self._sending = asyncio.run_coroutine_threadsafe(self._again(), self._router._event_loop)
        if self._is_cancelled:
            self._sending.cancel()
        return self._sending

    def _take(self, again: tuple[ReplicaResult, Any]) -> None:
        """From now on this is the answer that is waited for, unless nobody wants it any more."""
        (self._result, self._replica), self._sending = again, None
        if self._is_cancelled:
            self._result.cancel()

    async def _again(self) -> tuple[ReplicaResult, Any]:
        """The same request, with the same ids, at whichever replica the router chooses now."""
        router, pr = self._router, self._pr
        pr._swarmx_resent = True
        if isinstance(pr.args, tuple):
            pr.args = list(pr.args)
        while True:
            replica = await router._choose_replica_for_request(pr, is_retry=True)
            result = None
            try:
                result = replica.try_send_request(pr, with_rejection=True)
                router.on_send_request(replica.replica_id)
                reply = await result.get_rejection_response()
            except ActorDiedError:
                router.on_replica_actor_died(replica.replica_id)
                continue
            except ActorUnavailableError:
                router.on_replica_actor_unavailable(replica.replica_id)
                await asyncio.sleep(_WAIT_S)
                continue
            router.on_new_queue_len_info(replica.replica_id, reply.num_ongoing_requests)
            if not reply.accepted:
                result.cancel()
                continue
            router.on_request_routed(pr, replica.replica_id, result)
            result.add_done_callback(
                lambda _, name=replica.replica_id: router._event_loop.call_soon_threadsafe(
                    router.decrement_queue_len_cache, name
                )
            )
            return result, replica


def _left_s(ends_s: float | None) -> float | None:
    return None if ends_s is None else max(0.0, ends_s - time.monotonic())
