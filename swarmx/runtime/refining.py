"""Second forecasts: a slow encoder reads prompts again in a thread, while their calls wait or run already."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import Forecast
from swarmx.core.messages import AlertRaised, Message
from swarmx.core.nouns import Call
from swarmx.core.ports import Encoder, Forecaster
from swarmx.core.prompts import Encoding, PromptText
from swarmx.runtime.clock import Clock
from swarmx.runtime.forecasting import is_sound

log = logging.getLogger(__name__)

Outcome = Literal["refined", "late", "crowded_out", "failed"]

_HANGS_S = 60.0  # a batch of 32 long prompts takes seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    call: Call
    prompt: PromptText
    at_s: float


class Refiner:
    """Encodes with `encoder`, forecasts with `forecaster`, and hands both to `on_refined` on the event loop.

    What has gathered while the last batch was encoded is the next one, `batch` prompts at most, oldest first. At most
    `limit` wait: the oldest makes room, and one that has waited for `oldest_s` is late. Whoever asked says with
    `forget` that it no longer needs an answer. An encoder that fails rests for `rest_s`; nobody depends on it.
    `on_outcome` hears what became of each prompt.
    """

    def __init__(
        self,
        encoder: Encoder,
        forecaster: Forecaster,
        *,
        clock: Clock,
        post: Callable[[Message], None],
        on_refined: Callable[[str, Encoding, Forecast], None],
        on_outcome: Callable[[Outcome], None] = lambda outcome: None,
        batch: int = 32,
        limit: int = 256,
        oldest_s: float = 5.0,
        rest_s: float = 30.0,
        learns: bool = True,
    ) -> None:
        self._encoder = encoder
        self._forecaster = forecaster
        self._clock = clock
        self._post = post
        self._on_refined = on_refined
        self._on_outcome = on_outcome
        self._batch = batch
        self._limit = limit
        self._oldest_s = oldest_s
        self._rest_s = rest_s
        self._learns = learns
        self._rests_until_s = -math.inf
        self._waiting: OrderedDict[str, _Asked] = OrderedDict()
        self._encoding: set[str] = set()
        self._wake = asyncio.Event()
        self._thread = _new_thread()

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(self, call: Call, prompt: PromptText) -> None:
        """Read this prompt when there is time; the answer may never come."""
        now_s = self._clock.now_s()
        if now_s < self._rests_until_s:
            return
        if len(self._waiting) >= self._limit:
            self._waiting.popitem(last=False)
            self._on_outcome("crowded_out")
        self._waiting[call.call_id] = _Asked(call=call, prompt=prompt, at_s=now_s)
        self._wake.set()

    def forget(self, call_id: str) -> None:
        """The call has ended."""
        self._waiting.pop(call_id, None)
        self._encoding.discard(call_id)

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        """What a call came to whose forecast was refined."""
        if not self._learns:
            return
        try:
            self._forecaster.observe(call, encoding, work_done)
        except Exception:
            log.exception("the second predictor failed to learn")

    async def run(self) -> None:
        """Work until cancelled. A batch that is in the thread by then is left to itself."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while batch := self._next():
                    await self._work(batch)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> list[_Asked]:
        oldest_s = self._clock.now_s() - self._oldest_s
        batch: list[_Asked] = []
        while self._waiting and len(batch) < self._batch:
            _, asked = self._waiting.popitem(last=False)
            if asked.at_s < oldest_s:
                self._on_outcome("late")
            else:
                batch.append(asked)
        return batch

    async def _work(self, batch: list[_Asked]) -> None:
        self._encoding = {asked.call.call_id for asked in batch}
        prompts = [asked.prompt for asked in batch]
        try:
            async with asyncio.timeout(_HANGS_S):
                vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._encoder.encode, prompts)
            rows = _rows(vectors, len(batch), self._encoder.dimension)
        except TimeoutError as error:  # the thread is lost; it cannot be ended from here
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = _new_thread()
            self._failed(batch, error)
            return
        except Exception as error:  # noqa: BLE001  # a model of somebody else's: whatever it raises stays here
            self._failed(batch, error)
            return
        for asked, row in zip(batch, rows, strict=True):
            if asked.call.call_id in self._encoding:  # else it has ended meanwhile
                self._answer(asked.call, Encoding(encoder=self._encoder.version, vector=row))
        self._encoding = set()

    def _answer(self, call: Call, encoding: Encoding) -> None:
        try:
            forecast = self._forecaster.forecast(call, encoding)
        except Exception:
            log.exception("the second predictor failed to forecast")
            self._on_outcome("failed")
            return
        if not is_sound(forecast, call):
            self._on_outcome("failed")
            return
        self._on_refined(call.call_id, encoding, forecast)
        self._on_outcome("refined")

    def _failed(self, batch: list[_Asked], error: Exception) -> None:
        self._rests_until_s = self._clock.now_s() + self._rest_s
        log.warning("the encoder %s failed and rests for %g s", self._encoder.name, self._rest_s, exc_info=error)
        for _ in range(len(batch) + len(self._waiting)):
            self._on_outcome("failed")
        self._waiting.clear()
        self._encoding = set()
        self._post(AlertRaised(kind="predictor_fallback", subject=self._encoder.name, value=self._rest_s))


def _new_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")


def _rows(vectors: NDArray[np.float32], count: int, dimension: int) -> NDArray[np.float32]:
    """[count, dimension] finite float32. Raises ValueError."""
    rows = np.asarray(vectors, dtype=np.float32)
    if rows.shape != (count, dimension) or not np.isfinite(rows).all():
        raise ValueError(f"expected {count} finite vectors of {dimension} numbers, got shape {rows.shape}")
    return rows
