from __future__ import annotations

from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.core.actions import StartTimer, StopTimer
from tests.agents.worlds import FORECAST, a_call

FRESH: frozenset[str] = frozenset()
TRIED = frozenset({"r0"})


def a_state(call_id: str, tried: frozenset[str] = FRESH) -> CallState:
    return CallState(call=a_call(call_id), forecast=FORECAST, tried=tried)


def test_calls_that_were_tried_are_served_before_fresh_ones_and_each_line_in_order() -> None:
    waiting = WaitingCalls()
    states = [a_state("a"), a_state("b", TRIED), a_state("c"), a_state("d", TRIED)]
    for state in states:
        waiting.add(state)
    served = list[str]()
    for tried in waiting.lines():
        while (first := waiting.first(tried)) is not None:
            waiting.remove(first)
            served.append(first.call.call_id)
    assert served == ["b", "d", "a", "c"]
    assert list(waiting) == waiting.lines() == []


def test_a_timer_is_started_once_and_stopped_only_if_it_runs() -> None:
    waiting = WaitingCalls()
    early, late = a_state("early"), a_state("late")
    waiting.add(early)
    assert waiting.start_timers(1.0, 30.0) == [StartTimer(key="queue:early", at_s=31.0)]
    waiting.add(late)
    assert waiting.remove(late) == ()
    assert waiting.start_timers(2.0, 30.0) == []
    assert waiting.remove(early) == (StopTimer(key="queue:early"),)


def test_patience_is_not_renewed_for_a_call_that_waits_again() -> None:
    waiting, state = WaitingCalls(), a_state("c")
    waiting.add(state)
    waiting.start_timers(1.0, 30.0)
    waiting.remove(state)
    waiting.add(state)
    assert waiting.start_timers(20.0, 30.0) == [StartTimer(key="queue:c", at_s=31.0)]
