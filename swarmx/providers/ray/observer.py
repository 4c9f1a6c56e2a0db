"""The observer beside a replica: reads its engine over loopback, and forecasts what a call would take there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import aiohttp

from swarmx.core.messages import ServiceCurvePublished, SignalReported
from swarmx.core.nouns import Replica
from swarmx.neural.forecaster import shipped_weights
from swarmx.providers.ray.wire import Curve, Load, News
from swarmx.runtime.latency_heads import latency_heads
from swarmx.runtime.watch import read_signal

_LOOK_S = 0.1
_CURVE_EVERY_S = 1.0
_SAME_KV_USAGE = 0.01

CurveOf = Callable[[Replica, SignalReported | None, float], ServiceCurvePublished | None]


class Observer:
    """Looks ten times a second and tells what changed; a gateway that asks over the network does so once.

    `tell` passes it on. The curve is that of the weights that ship, without the corrections that a gateway learns.
    """

    def __init__(self, replica: Replica, engine_url: str, *, tell: Callable[[News], Awaitable[None]]) -> None:
        self._replica = replica
        self._url = f"{engine_url}/metrics"
        self._tell = tell
        self._told: SignalReported | None = None
        self._drawn: SignalReported | None = None
        self._drawn_at_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        curve_of = await asyncio.to_thread(_curves, self._replica)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(self._url) as response:
                        page = await response.read()
                    if (signal := read_signal(page, self._replica, time.monotonic())) is not None:
                        await self._look(signal, curve_of)
                await asyncio.sleep(_LOOK_S)

    async def _look(self, signal: SignalReported, curve_of: CurveOf | None) -> None:
        if _differs(signal, self._told):
            self._told = signal
            await self._tell(
                Load(
                    replica_id=signal.replica_id,
                    running=signal.running,
                    waiting=signal.waiting,
                    kv_usage=signal.kv_usage,
                )
            )
        now_s = signal.measured_at_s
        if curve_of is None or now_s < self._drawn_at_s + _CURVE_EVERY_S or not _differs(signal, self._drawn):
            return
        self._drawn, self._drawn_at_s = signal, now_s
        if (curve := curve_of(self._replica, signal, now_s)) is not None:
            await self._tell(Curve(curve=curve))


def _curves(replica: Replica) -> CurveOf | None:
    if replica.kind != "llm":
        return None
    heads = latency_heads(shipped_weights())
    return None if heads is None else heads.curve


def _differs(signal: SignalReported, other: SignalReported | None) -> bool:
    return (
        other is None
        or (signal.running, signal.waiting) != (other.running, other.waiting)
        or abs(signal.kv_usage - other.kv_usage) >= _SAME_KV_USAGE
    )
