"""Second forecasts come from a real thread, in batches, and only for calls that are still there."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import AlertRaised, Message
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText, cut
from swarmx.runtime.clock import WallClock
from swarmx.runtime.refining import Outcome, Refiner
from tests.agents.worlds import a_call


class ScriptedEncoder:
    """Waits in its thread until the test lets it go on, then answers or does what `spoil` says."""

    name, version, dimension, slow = "scripted", "scripted-1", 2, True

    def __init__(self) -> None:
        self.batches: list[list[bytes]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.spoil: Callable[[NDArray[np.float32]], Any] = lambda vectors: vectors

    def encode(self, prompts: Sequence[PromptText]) -> NDArray[np.float32]:
        self.batches.append([prompt.text for prompt in prompts])
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(10.0)
        vectors = np.array([[len(prompt.text), 1.0] for prompt in prompts], dtype=np.float32)
        found: NDArray[np.float32] = self.spoil(vectors)
        return found


class ByVector:
    """Forecasts the first number of the vector."""

    def __init__(self) -> None:
        self.learned: list[float] = []

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        raise AssertionError("the encoder alone reads the prompt")

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        return point(float(encoding.vector[0]), unit="tokens", source="neural")

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        self.learned.append(work_done)


class Bench:
    def __init__(self, **limits: Any) -> None:
        self.encoder = ScriptedEncoder()
        self.forecaster = ByVector()
        self.refined: dict[str, float] = {}
        self.encoders: set[str] = set()
        self.outcomes: list[Outcome] = []
        self.posted: list[Message] = []
        self.refiner = Refiner(
            self.encoder,
            self.forecaster,
            clock=WallClock(),
            post=self.posted.append,
            on_refined=self._on_refined,
            on_outcome=self.outcomes.append,
            **limits,
        )

    def _on_refined(self, call_id: str, encoding: Encoding, forecast: Forecast) -> None:
        self.refined[call_id] = forecast.mean
        self.encoders.add(encoding.encoder)

    def ask(self, call_id: str, size: int = 5) -> None:
        self.refiner.ask(a_call(call_id), cut(b"x" * size))

    async def until_encoding(self) -> None:
        """The thread is in the encoder with its next batch."""
        assert await asyncio.to_thread(self.encoder.entered.acquire, timeout=60.0)

    async def until_outcomes(self, count: int) -> None:
        async with asyncio.timeout(60.0):
            while len(self.outcomes) < count:
                await asyncio.sleep(0)


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.refiner.run())
    try:
        yield bench
    finally:
        bench.encoder.gate.set()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_a_prompt_is_encoded_off_the_loop_and_its_forecast_comes_back_on_it() -> None:
    async with running(Bench()) as bench:
        bench.ask("a", 7)
        bench.encoder.gate.set()
        await bench.until_outcomes(1)
    assert bench.refined == {"a": 7.0}
    assert bench.encoders == {"scripted-1"}
    assert threading.get_ident() not in bench.encoder.threads


async def test_what_gathers_while_a_batch_is_encoded_is_the_next_batch() -> None:
    async with running(Bench()) as bench:
        bench.ask("first", 1)
        await bench.until_encoding()
        for number in range(5):
            bench.ask(f"c{number}", 10 + number)
        bench.encoder.gate.set()
        await bench.until_outcomes(6)
    assert [len(batch) for batch in bench.encoder.batches] == [1, 5]
    assert bench.refined == {"first": 1.0} | {f"c{number}": 10.0 + number for number in range(5)}
    assert len(bench.encoder.threads) == 1


async def test_no_batch_is_larger_than_its_limit() -> None:
    async with running(Bench(batch=4)) as bench:
        bench.ask("first")
        await bench.until_encoding()
        for number in range(9):
            bench.ask(f"c{number}")
        bench.encoder.gate.set()
        await bench.until_outcomes(10)
    assert [len(batch) for batch in bench.encoder.batches] == [1, 4, 4, 1]


async def test_the_oldest_makes_room_when_too_many_wait() -> None:
    async with running(Bench(limit=2)) as bench:
        bench.ask("first")
        await bench.until_encoding()
        for name in ("a", "b", "c"):
            bench.ask(name)
        assert len(bench.refiner) == 2
        bench.encoder.gate.set()
        await bench.until_outcomes(4)
    assert set(bench.refined) == {"first", "b", "c"}
    assert bench.outcomes.count("crowded_out") == 1


async def test_a_prompt_that_has_waited_for_too_long_is_not_encoded() -> None:
    bench = Bench(oldest_s=-1.0)
    bench.ask("a")
    async with running(bench):
        await bench.until_outcomes(1)
    assert bench.outcomes == ["late"]
    assert bench.encoder.batches == []


async def test_a_call_that_ended_meanwhile_gets_no_forecast() -> None:
    async with running(Bench()) as bench:
        bench.ask("gone", 1)
        bench.ask("there", 2)
        await bench.until_encoding()
        bench.ask("waiting", 3)
        bench.refiner.forget("gone")
        bench.refiner.forget("waiting")
        bench.encoder.gate.set()
        await bench.until_outcomes(1)
    assert bench.refined == {"there": 2.0}
    assert len(bench.encoder.batches) == 1


@pytest.mark.parametrize(
    "spoil",
    [lambda v: v[:, :1], lambda v: v * np.nan, lambda v: None, lambda v: v[1:], lambda v: 1 / 0],
    ids=["narrow", "not a number", "nothing", "one missing", "raises"],
)
async def test_an_encoder_that_fails_rests_and_is_named(spoil: Callable[[Any], Any]) -> None:
    async with running(Bench()) as bench:
        bench.encoder.spoil = spoil
        bench.encoder.gate.set()
        bench.ask("a")
        await bench.until_outcomes(1)
        bench.ask("b")
        assert len(bench.refiner) == 0
    assert bench.outcomes == ["failed"]
    assert bench.posted == [AlertRaised(kind="predictor_fallback", subject="scripted", value=30.0)]
    assert bench.refined == {}


async def test_an_encoder_that_has_rested_is_asked_again() -> None:
    async with running(Bench(rest_s=0.0)) as bench:
        bench.encoder.gate.set()
        bench.encoder.spoil = lambda vectors: None
        bench.ask("a")
        await bench.until_outcomes(1)
        bench.encoder.spoil = lambda vectors: vectors
        bench.ask("b", 9)
        await bench.until_outcomes(2)
    assert bench.refined == {"b": 9.0}


async def test_a_forecast_that_is_none_is_dropped() -> None:
    async with running(Bench()) as bench:
        bench.encoder.gate.set()
        bench.encoder.spoil = lambda vectors: -vectors
        bench.ask("a")
        await bench.until_outcomes(1)
    assert (bench.outcomes, bench.refined) == (["failed"], {})


@pytest.mark.parametrize(("learns", "learned"), [(True, [9.0]), (False, [])])
async def test_the_second_predictor_learns_unless_it_is_told_not_to(learns: bool, learned: list[float]) -> None:
    bench = Bench(learns=learns)
    bench.refiner.observe(a_call("a"), Encoding(encoder="e", vector=np.zeros(2, dtype=np.float32)), 9.0)
    assert bench.forecaster.learned == learned
