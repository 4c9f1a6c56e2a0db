from __future__ import annotations

from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.core.actions import StartTimer, StopTimer
from tests.agents.worlds import FORECAST, a_call

FRESH: frozenset[str] = frozenset()
TRIED = frozenset({"r0"})
KEY = (0.0, 0.0)


def a_state(call_id: str, tried: frozenset[str] = FRESH) -> CallState:
    return CallState(call=a_call(call_id), forecast=FORECAST, tried=tried)


def test_calls_that_were_tried_are_served_before_fresh_ones_and_each_line_in_order() -> None:
    waiting = WaitingCalls()
    states = [a_state("a"), a_state("b", TRIED), a_state("c"), a_state("d", TRIED)]
    for state in states:
        waiting.add(state, KEY)
    served = list[str]()
    for tried in waiting.lines():
        while first := waiting.first(tried, 1, 0.0):
            waiting.remove(first[0])
            served.append(first[0].call.call_id)
    assert served == ["b", "d", "a", "c"]
    assert list(waiting) == waiting.lines() == []


def test_a_timer_is_started_once_and_stopped_only_if_it_runs() -> None:
    waiting = WaitingCalls()
    early, late = a_state("early"), a_state("late")
    waiting.add(early, KEY)
    assert waiting.start_timers(1.0, 30.0) == [StartTimer(key="queue:early", at_s=31.0)]
    waiting.add(late, KEY)
    assert waiting.remove(late) == ()
    assert waiting.start_timers(2.0, 30.0) == []
    assert waiting.remove(early) == (StopTimer(key="queue:early"),)


def test_patience_is_not_renewed_for_a_call_that_waits_again() -> None:
    waiting, state = WaitingCalls(), a_state("c")
    waiting.add(state, KEY)
    waiting.start_timers(1.0, 30.0)
    waiting.remove(state)
    waiting.add(state, KEY)
    assert waiting.start_timers(20.0, 30.0) == [StartTimer(key="queue:c", at_s=31.0)]


def test_a_lower_key_goes_first_and_a_new_order_moves_those_that_wait() -> None:
    waiting = WaitingCalls()
    for call_id, key in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        waiting.add(a_state(call_id), (key, 0.0))
    assert [state.call.call_id for state in waiting.first(FRESH, 2, 0.0)] == ["b", "c"]
    waiting.reorder(lambda state: KEY)
    assert [state.call.call_id for state in waiting] == ["a", "b", "c"]
    assert waiting.remove(waiting.first(FRESH, 1, 0.0)[0]) == ()
    assert len(waiting) == 2
