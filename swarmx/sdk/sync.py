"""The client for ordinary code: the asynchronous one on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from swarmx.sdk.client import PATIENCE_S, TIMEOUT_S, AsyncClient, Definition
from swarmx.sdk.models import Call, Page, State, Why, Workflow, WorkflowEvent, WorkflowSummary

T = TypeVar("T")


class Client:
    """Does what `AsyncClient` does, and blocks until it is done; that one says what each method raises.

    It can be used anywhere, also where a loop runs (a notebook, a web handler), and by several threads at once. Use it
    as a context manager, or `close` it.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        patience_s: float = PATIENCE_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._client = AsyncClient(url, token, patience_s=patience_s, timeout_s=timeout_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="swarmx-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; what other threads wait for is given up."""
        if self._loop.is_closed():
            return
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, workflow: Definition, inputs: Mapping[str, Any] | None = None, *, key: str | None = None) -> str:
        """Have a workflow run; returns its id once the server has it on disk."""
        return self._do(self._client.submit(workflow, inputs, key=key))

    def run(
        self,
        workflow: Definition,
        inputs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Submit and wait; returns the outputs."""
        return self._do(self._client.run(workflow, inputs, key=key, timeout_s=timeout_s))

    def get(self, workflow_id: str) -> Workflow:
        """A workflow as it is now, with its nodes and calls."""
        return self._do(self._client.get(workflow_id))

    def wait(self, workflow_id: str, *, timeout_s: float | None = None) -> Workflow:
        """The workflow once it has ended, however it has."""
        return self._do(self._client.wait(workflow_id, timeout_s=timeout_s))

    def events(self, workflow_id: str, *, after: int = 0) -> Generator[WorkflowEvent, None, None]:
        """What happened to a workflow behind event `after`, and what happens, to its end; no gap, nothing twice."""
        return self._each(self._client.events(workflow_id, after=after))

    def cancel(self, workflow_id: str, *, key: str | None = None) -> WorkflowSummary:
        """Ask a workflow to end: its calls are let go first."""
        return self._do(self._client.cancel(workflow_id, key=key))

    def kill(self, workflow_id: str, *, key: str | None = None) -> WorkflowSummary:
        """End a workflow at once, whatever its calls do."""
        return self._do(self._client.kill(workflow_id, key=key))

    def signal(self, workflow_id: str, name: str, value: Any = None, *, key: str | None = None) -> None:
        """Send a workflow a signal that its definition declares, with any JSON value."""
        self._do(self._client.signal(workflow_id, name, value, key=key))

    def retry(self, workflow_id: str, *, key: str | None = None) -> str:
        """Begin a new workflow that does a failed one's failed node anew, and what follows; returns its id."""
        return self._do(self._client.retry(workflow_id, key=key))

    def fork(
        self, workflow_id: str, from_node: str, inputs: Mapping[str, Any] | None = None, *, key: str | None = None
    ) -> str:
        """Begin a new workflow that shares another's beginning up to a node, which is done anew; returns its id."""
        return self._do(self._client.fork(workflow_id, from_node, inputs, key=key))

    def page(self, *, state: State | None = None, limit: int = 50, cursor: str | None = None) -> Page:
        """One page of workflows, newest first."""
        return self._do(self._client.page(state=state, limit=limit, cursor=cursor))

    def list(self, *, state: State | None = None) -> Iterator[WorkflowSummary]:
        """All workflows that the token may see, newest first, page by page."""
        return self._each(self._client.list(state=state))

    def call(self, call_id: str) -> Call:
        """What became of a call that has ended."""
        return self._do(self._client.call(call_id))

    def why(self, call_id: str, *, policy: str | None = None) -> Why:
        """Why a call went where it went; with `policy`, also what that one would have done instead."""
        return self._do(self._client.why(call_id, policy=policy))

    def blob(self, sha256: str) -> bytes:
        """The bytes of an image that a workflow made; outputs refer to it by this hash."""
        return self._do(self._client.blob(sha256))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:
            work.close()
            raise RuntimeError("this client is closed; make another") from None
        try:
            return future.result()
        except BaseException:  # Ctrl-C here must not leave the request going on there
            future.cancel()
            raise

    def _each(self, items: AsyncIterator[T]) -> Generator[T, None, None]:
        async def following() -> tuple[T] | None:  # StopAsyncIteration cannot go through a future
            try:
                return (await anext(items),)
            except StopAsyncIteration:
                return None

        try:
            while (found := self._do(following())) is not None:
                yield found[0]
        finally:  # without waiting: a generator that is dropped may end in any thread, also in the loop's own
            if isinstance(items, AsyncGenerator) and not self._loop.is_closed():
                asyncio.run_coroutine_threadsafe(_closed(items), self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._client.close()


async def _closed(items: AsyncGenerator[Any, None]) -> None:
    await items.aclose()
