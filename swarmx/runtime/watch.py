"""Reads every replica's own counters once a second, and says when one stops answering or comes back."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping

import aiohttp

from swarmx.core.messages import Message, ReplicaChanged, SignalReported
from swarmx.core.nouns import Replica, ReplicaState
from swarmx.runtime.clock import Clock

_VALUE = rb"(?:\{[^}]*\})? ([0-9.eE+-]+)"
# vLLM's names (also SGLang's and the emulator's, up to the prefix); several engines in a server are summed.
_ENGINE = {
    "running": re.compile(rb"^(?:vllm|sglang):num_(?:requests_running|running_reqs)" + _VALUE, re.M),
    "waiting": re.compile(rb"^(?:vllm|sglang):num_(?:requests_waiting|queue_reqs)" + _VALUE, re.M),
    "kv_usage": re.compile(rb"^(?:vllm:kv_cache_usage_perc|sglang:token_usage)" + _VALUE, re.M),
}
_TOOLS = {
    "running": re.compile(rb"^swarmx_tools:num_requests_running" + _VALUE, re.M),
    "waiting": re.compile(rb"^swarmx_tools:num_requests_waiting" + _VALUE, re.M),
}


class Watch:
    """One task a replica. A replica is up from its first answer on, and gone after `failures` bad reads in a row.

    What is up is announced in the state that `state_when_up` says: ready, unless somebody keeps it out of rotation.
    """

    def __init__(
        self,
        post: Callable[[Message], None],
        clock: Clock,
        *,
        every_s: float,
        timeout_s: float,
        failures: int,
        state_when_up: Callable[[str], ReplicaState] = lambda replica_id: "ready",
    ) -> None:
        self._post = post
        self._clock = clock
        self._every_s = every_s
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._failures = failures
        self._state_when_up = state_when_up
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0))
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, replica: Replica) -> None:
        """Start to watch a replica, as `starting` until it answers."""
        self._post(ReplicaChanged(replica=replica, state="starting"))
        self._tasks[replica.replica_id] = asyncio.create_task(self._follow(replica), name=f"watch {replica.replica_id}")

    def remove(self, replica_id: str) -> None:
        """Say nothing more about the replica; one that is not watched is fine."""
        task = self._tasks.pop(replica_id, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._session.close()

    async def _follow(self, replica: Replica) -> None:
        up, missed = False, 0
        while True:
            alive, signal = await self._read(replica)
            if alive:
                missed = 0
                if not up:
                    up = True
                    self._post(ReplicaChanged(replica=replica, state=self._state_when_up(replica.replica_id)))
                if signal is not None:
                    self._post(signal)
            else:
                missed += 1
                if up and missed >= self._failures:
                    up = False
                    self._post(ReplicaChanged(replica=replica, state="gone"))
            await asyncio.sleep(self._every_s if up else min(self._every_s, 0.2))

    async def _read(self, replica: Replica) -> tuple[bool, SignalReported | None]:
        """Whether the replica answers, and its counters; a server that has none is alive, its load unknown."""
        measured_at_s = self._clock.now_s()
        try:
            async with self._session.get(f"{replica.url}/metrics", timeout=self._timeout) as response:
                if response.status >= 500:
                    return False, None
                text = await response.read() if response.status == 200 else b""
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            return False, None
        return True, read_signal(text, replica, measured_at_s)


def read_signal(text: bytes, replica: Replica, measured_at_s: float) -> SignalReported | None:
    """What the replica's own page of counters says; None unless it says all of it."""
    gauges = _gauges(text, _TOOLS if replica.kind == "tool" else _ENGINE)
    if gauges is None:
        return None
    return SignalReported(
        replica_id=replica.replica_id,
        running=int(gauges["running"]),
        waiting=int(gauges["waiting"]),
        kv_usage=gauges.get("kv_usage", 0.0),  # tools have no cache
        measured_at_s=measured_at_s,
    )


def _gauges(text: bytes, wanted: Mapping[str, re.Pattern[bytes]]) -> dict[str, float] | None:
    """The counters in a Prometheus page; None unless all are there: what a server does not say is unknown, not zero."""
    found = {name: pattern.findall(text) for name, pattern in wanted.items()}
    try:
        sums = {name: sum(float(value) for value in values) for name, values in found.items() if values}
    except ValueError:
        return None
    return sums if len(sums) == len(wanted) and all(map(math.isfinite, sums.values())) else None
