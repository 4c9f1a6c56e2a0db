from __future__ import annotations

from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.agents.shares import Shares
from swarmx.core.actions import StartTimer, StopTimer
from tests.agents.worlds import FORECAST, a_call

FRESH: frozenset[str] = frozenset()
TRIED = frozenset({"r0"})
KEY = (0.0, 0.0)


def a_state(call_id: str, tried: frozenset[str] = FRESH, *, tenant: str = "t") -> CallState:
    return CallState(call=a_call(call_id, tenant=tenant), forecast=FORECAST, tried=tried)


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


def test_patience_begins_anew_where_there_was_a_replica_in_between() -> None:
    waiting, state = WaitingCalls(), a_state("c")
    waiting.add(state, KEY)
    waiting.start_timers(1.0, 30.0)
    waiting.add(a_state("untimed"), KEY)
    assert waiting.stop_timers() == [StopTimer(key="queue:c")]
    assert waiting.stop_timers() == []
    assert waiting.remove(state) == ()
    waiting.add(state, KEY)
    assert StartTimer(key="queue:c", at_s=50.0) in waiting.start_timers(20.0, 30.0)


def test_a_tenant_that_waited_all_the_time_is_not_lifted_when_its_last_call_is_served() -> None:
    waiting = WaitingCalls()
    mine, others = a_state("mine", tenant="a"), a_state("others", tenant="b")
    waiting.add(mine, KEY)
    waiting.add(others, KEY)
    waiting.shares.charge("b", 1000.0)
    waiting.remove(mine)
    waiting.serve(mine, 30.0)
    assert waiting.shares.counter("a") == 30.0


def test_who_is_displaced_is_the_last_and_least_urgent_call_of_whoever_has_most_above_its_share() -> None:
    waiting = WaitingCalls(Shares({"small": 2.0}))
    for number in range(6):
        state = a_state(f"f{number}", tenant="flood")
        state.priority, state.ready_at_s = -(number % 2), float(number)
        waiting.add(state, KEY)
    for number in range(3):
        waiting.add(a_state(f"s{number}", tenant="small"), KEY)
    last = waiting.displaced_by("small", 9)
    assert last is not None
    assert last.call.call_id == "f5"
    assert waiting.displaced_by("flood", 9) is None
    waiting.remove(last)
    for number in range(3, 6):
        waiting.add(a_state(f"s{number}", tenant="small"), KEY)
    assert waiting.displaced_by("small", 9) is None  # six of nine are its share


def test_a_lower_key_goes_first_and_a_new_order_moves_those_that_wait() -> None:
    waiting = WaitingCalls()
    for call_id, key in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        waiting.add(a_state(call_id), (key, 0.0))
    assert [state.call.call_id for state in waiting.first(FRESH, 2, 0.0)] == ["b", "c"]
    waiting.reorder(lambda state: KEY)
    assert [state.call.call_id for state in waiting] == ["a", "b", "c"]
    assert waiting.remove(waiting.first(FRESH, 1, 0.0)[0]) == ()
    assert len(waiting) == 2
