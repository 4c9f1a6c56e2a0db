"""A forecaster that is wrong, slow or broken costs nobody a call: the plain one stands in, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.forecast import LEVELS, Forecast, point
from swarmx.core.messages import AlertRaised, Message
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding, PromptText
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.runtime.forecasting import GuardedForecaster
from tests.agents.worlds import PROMPT, UNREAD, a_call

READ = Encoding(encoder="e-1", vector=np.ones(4, dtype=np.float32))
GOOD = Forecast(levels=LEVELS, quantiles=tuple(range(1, 9)), unit="tokens", source="neural", version="v")
BUDGET_S, REST_S = 0.002, 30.0


class HandClock:
    """Time that passes when the test says so; `waited_s` of it while the thread had nothing to do."""

    def __init__(self) -> None:
        self.at_s = 100.0
        self.waited_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def busy_s(self) -> float:
        return self.at_s - self.waited_s


class Scripted:
    """A forecaster that does what the test says, and takes as long."""

    def __init__(self, clock: HandClock) -> None:
        self._clock = clock
        self.encoding: Any = READ
        self.answer: Any = GOOD
        self.takes_s = self.waits_s = 0.0
        self.asked = 0
        self.learned: list[float] = []

    def encode(self, call: Call, prompt: PromptText) -> Encoding:
        return self._do(self.encoding)

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        self.asked += 1
        return self._do(self.answer)

    def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
        self.learned.append(work_done)
        self._do(None)

    def _do(self, answer: Any) -> Any:
        self._clock.at_s += (self.takes_s + self.waits_s) / 2.0
        self._clock.waited_s += self.waits_s / 2.0
        if isinstance(answer, Exception):
            raise answer
        return answer


class Bench:
    """A guarded forecaster between a scripted primary and an empirical fallback."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.primary = Scripted(self.clock)
        self.fallback = EmpiricalForecaster()
        self.posted: list[Message] = []
        self.sources: list[str] = []
        self.faults: list[str] = []
        self.guarded = GuardedForecaster(
            self.primary,
            self.fallback,
            name="neural",
            budget_s=BUDGET_S,
            clock=self.clock,
            post=self.posted.append,
            rest_s=REST_S,
            busy_s=self.clock.busy_s,
            on_forecast=lambda source, seconds: self.sources.append(source),
            on_rest=self.faults.append,
        )

    def ask(self, call: Call | None = None) -> Forecast:
        call = call or a_call("c")
        return self.guarded.forecast(call, self.guarded.encode(call, PROMPT))


def test_a_primary_that_does_its_work_is_the_forecaster() -> None:
    bench = Bench()
    assert [bench.ask() for _ in range(50)] == [GOOD] * 50
    assert bench.guarded.encode(a_call("c"), PROMPT) is READ
    assert (bench.posted, bench.faults, set(bench.sources)) == ([], [], {"neural"})


NONSENSE = [None, 3.0, point(1.0, unit="s"), point(5.0, unit="work"), RuntimeError("no"), point(1e308, unit="tokens")]


@pytest.mark.parametrize("answer", NONSENSE[:-1], ids=repr)
def test_a_call_never_sees_what_is_no_forecast_of_its_work(answer: Any) -> None:
    bench = Bench()
    bench.primary.answer = answer
    assert bench.ask().source == "prior"


@pytest.mark.parametrize("encoding", [None, "text", RuntimeError("no")], ids=repr)
def test_a_primary_that_cannot_read_a_prompt_is_not_asked_about_it(encoding: Any) -> None:
    bench = Bench()
    bench.primary.encoding = encoding
    assert bench.ask().source == "prior"
    assert bench.primary.asked == 0


@pytest.mark.parametrize(
    ("fail", "fault"),
    [
        (lambda primary: setattr(primary, "answer", RuntimeError("no")), "raised"),
        (lambda primary: setattr(primary, "encoding", RuntimeError("no")), "raised"),
        (lambda primary: setattr(primary, "answer", None), "unsound"),
        (lambda primary: setattr(primary, "takes_s", BUDGET_S * 1.5), "slow"),
    ],
    ids=["forecast raises", "encode raises", "unsound", "slow"],
)
def test_a_primary_that_fails_for_eight_calls_rests_and_is_named(fail: Callable[[Scripted], None], fault: str) -> None:
    bench = Bench()
    fail(bench.primary)
    for _ in range(7):
        bench.ask()
    assert not bench.guarded.resting
    bench.ask()
    assert bench.guarded.resting
    assert bench.posted == [AlertRaised(kind="predictor_fallback", subject="neural", value=REST_S)]
    assert bench.faults == [fault]


def test_a_primary_that_rests_is_not_asked_and_comes_back() -> None:
    bench = Bench()
    bench.primary.answer = None
    for _ in range(8):
        bench.ask()
    asked, bench.primary.answer = bench.primary.asked, GOOD
    assert {bench.ask().source for _ in range(20)} == {"prior"}
    assert bench.primary.asked == asked
    bench.clock.at_s += REST_S
    assert bench.ask() == GOOD


def test_a_forecast_that_was_late_still_counts_for_its_call() -> None:
    bench = Bench()
    bench.primary.takes_s = 10.0 * BUDGET_S
    assert bench.ask() == GOOD


def test_seven_faults_in_thirty_two_calls_are_forgiven() -> None:
    bench = Bench()
    for number in range(320):
        bench.primary.answer = None if number % 32 < 7 else GOOD
        bench.ask()
    assert bench.posted == []


@pytest.mark.parametrize("how", ["takes_s", "waits_s"])
def test_one_call_that_blocks_for_more_than_a_second_is_enough(how: str) -> None:
    bench = Bench()
    setattr(bench.primary, how, 1.1)
    bench.ask()
    assert bench.faults == ["slow"]


def test_that_the_machine_is_busy_is_not_the_predictors_fault() -> None:
    bench = Bench()
    bench.primary.waits_s = 5.0 * BUDGET_S
    assert [bench.ask() for _ in range(100)] == [GOOD] * 100
    assert bench.posted == []


def test_a_call_that_was_read_by_nobody_is_forecast_by_the_fallback_when_the_primary_is_back() -> None:
    bench = Bench()
    bench.primary.encoding = None
    encoding = bench.guarded.encode(a_call("c"), PROMPT)
    assert bench.guarded.forecast(a_call("c"), encoding).source == "prior"
    assert bench.primary.asked == 0


def test_both_learn_even_while_the_primary_rests_or_fails() -> None:
    bench = Bench()
    bench.primary.answer = None
    for _ in range(8):
        bench.ask()
    assert bench.guarded.resting
    for _ in range(10):
        bench.guarded.observe(a_call("c"), UNREAD, 70.0)
    assert bench.primary.learned == [70.0] * 10
    assert bench.ask().mean == pytest.approx(70.0)


def test_a_primary_that_is_not_to_learn_hears_of_no_outcome_and_the_fallback_does() -> None:
    bench = Bench()
    guarded = GuardedForecaster(
        bench.primary, bench.fallback, name="n", budget_s=1.0, clock=bench.clock, post=print, learns=False
    )
    for _ in range(8):
        guarded.observe(a_call("c"), READ, 70.0)
    assert bench.primary.learned == []
    assert bench.fallback.forecast(a_call("c"), UNREAD).mean == pytest.approx(70.0)


def test_an_observation_that_the_primary_chokes_on_is_still_learned_by_the_fallback() -> None:
    class Choking(Scripted):
        def observe(self, call: Call, encoding: Encoding, work_done: float) -> None:
            raise RuntimeError("no")

    bench = Bench()
    guarded = GuardedForecaster(
        Choking(bench.clock), bench.fallback, name="n", budget_s=1.0, clock=bench.clock, post=bench.posted.append
    )
    for _ in range(8):
        guarded.observe(a_call("c"), READ, 70.0)
    assert bench.fallback.forecast(a_call("c"), UNREAD).mean == pytest.approx(70.0)


@given(script=st.lists(st.tuples(st.sampled_from(range(8)), st.floats(0.0, 0.01)), max_size=80))
def test_whatever_the_primary_does_every_call_has_a_finite_forecast_in_its_unit(
    script: list[tuple[int, float]],
) -> None:
    bench = Bench()
    for answer, takes_s in script:
        bench.primary.answer = [*NONSENSE, GOOD, GOOD][answer]
        bench.primary.takes_s = takes_s
        forecast = bench.ask()
        assert forecast.unit == "tokens"
        assert math.isfinite(forecast.mean)
    assert bench.sources == [] or len(bench.sources) == len(script)


def test_tools_are_the_fallbacks_business_and_no_fault_of_the_primary() -> None:
    bench = Bench()
    use = a_call("c", kind="tool", work_limit=30.0)
    for _ in range(40):
        assert bench.ask(use).unit == "s"
    assert (bench.primary.asked, bench.faults, bench.guarded.resting) == (0, [], False)
