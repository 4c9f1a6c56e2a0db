"""Records of decisions that are written after the call is on its way."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from swarmx.agents.answers import Answers, Unwritten
from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.core.actions import Dispatch, StartTimer
from swarmx.core.forecast import point
from swarmx.core.messages import (
    CallFinished,
    CallReady,
    DecisionMade,
    ForecastRefined,
    PolicyChanged,
    SignalReported,
    TokensProgressed,
)
from swarmx.core.ports import Output
from tests.agents.routers import a_router
from tests.agents.worlds import FORECAST, a_call, a_profile, changed, ready


def a_decision(router: RouterAgent) -> Answers:
    """The answers of a router with some history to one more call, the records among them not written yet."""
    for number in range(6):
        router.handle(ready(f"c{number}"), 0.1 * number)
    call = a_call("c", session="s", prefix=(1, 2, 3), prompt_tokens=700)
    answers = router.handle(CallReady(call=call, forecast=FORECAST), 1.0)
    assert isinstance(answers, Answers)
    return answers


def records(answers: Sequence[Output]) -> list[DecisionMade]:
    return [output for output in answers if isinstance(output, DecisionMade)]


def go_on(router: RouterAgent) -> None:
    """Change everything that a record rests on: calls, replicas, signals, forecasts, the policy."""
    router.handle(ForecastRefined(call_id="c", forecast=point(7.0, unit="tokens")), 1.1)
    router.handle(TokensProgressed(call_id="c0", attempt=1, work_done=5.0), 1.2)
    router.handle(SignalReported(replica_id="b", running=9, waiting=9, kv_usage=0.9, measured_at_s=1.2), 1.2)
    done = CallFinished(call_id="c1", attempt=1, prompt_tokens=100, cached_tokens=0, work_done=50.0)
    router.handle(done, 1.3)
    router.handle(changed("a", "gone"), 1.4)
    router.handle(changed("c", profile=a_profile(speed=2.0)), 1.4)
    router.handle(PolicyChanged(policy="random", parameters={}), 1.5)
    for number in range(6, 12):
        router.handle(ready(f"c{number}"), 1.6)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_record_that_is_read_late_says_what_it_would_have_said_at_once(policy: str) -> None:
    prompt, late = (a_router("a", "b", "c", policy=policy) for _ in range(2))
    said, unread = records(a_decision(prompt)), a_decision(late)
    go_on(late)
    assert len(said) == 1
    assert msgspec.json.encode(records(unread)) == msgspec.json.encode(said)


def test_a_call_can_be_on_its_way_before_its_decision_is_written() -> None:
    answers = a_decision(a_router("a", "b", policy="marginal"))
    assert [type(output) for output in answers.at_once] == [Dispatch, StartTimer]
    assert [type(output) for output in answers] == [Dispatch, StartTimer, DecisionMade]
    assert len(answers) == 3


def test_an_output_is_written_once_however_often_the_answers_are_read() -> None:
    numbers = iter(range(100))
    answers = Answers([Unwritten(lambda: StartTimer(key="k", at_s=float(next(numbers))))])
    assert list(answers) == list(answers) == answers[:] == [answers[-1]] == [StartTimer(key="k", at_s=0.0)]


def test_answers_are_equal_to_what_they_come_to() -> None:
    start = StartTimer(key="k", at_s=1.0)
    answers = Answers([Unwritten(lambda: start), start])
    assert answers == [start, start]
    assert answers == Answers([start, start])
    assert answers != [start]
    assert answers != 2
