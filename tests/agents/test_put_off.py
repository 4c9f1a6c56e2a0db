"""A router that puts off what its decisions leave to be done decides as one that does not, and does all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.agents.put_off import PutOff
from swarmx.agents.router import RouterAgent
from swarmx.core.actions import Cancel, Dispatch, Refuse, StartTimer
from swarmx.core.messages import CallCancelled, DecisionMade, Message, SignalReported, TimerFired, WorkflowSubmitted
from swarmx.core.ports import Output
from tests.agents.routers import a_router, placed
from tests.agents.worlds import a_profile, changed, failed, finished, ready

SOON_S = 0.005
CALLS = [f"c{number}" for number in range(6)]
Step = tuple[str, str, int]


def message(kind: str, call_id: str, number: int, now_s: float) -> Message:
    replica_id = f"r{number}"
    match kind:
        case "arrives":
            return ready(call_id, prompt_tokens=100 * (1 + number), stream=bool(number % 2))
        case "ends":
            return finished(call_id, 1 + number // 2)
        case "fails":
            return failed(call_id, 1 + number // 2, reason="connect", retryable=True)
        case "is cancelled":
            return CallCancelled(call_id=call_id)
        case "goes":
            return changed(replica_id, "gone")
        case "comes":
            return changed(replica_id, profile=a_profile(max_batch=1 + number))
        case "tells":
            return SignalReported(
                replica_id=replica_id, running=number, waiting=0, kv_usage=0.0, measured_at_s=now_s - 0.1
            )
        case "begins":
            return WorkflowSubmitted(workflow_id="w", kind="k")
        case _:
            return TimerFired(key="demand")


KINDS = ["arrives", "arrives", "ends", "fails", "is cancelled", "goes", "comes", "tells", "begins", "reports"]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(CALLS), st.integers(0, 3)), max_size=40)


def without_its_timer(outputs: Sequence[Output]) -> list[Output]:
    return [o for o in outputs if not (isinstance(o, StartTimer) and o.key == "put_off")]


def acts(outputs: Sequence[Output]) -> list[Output]:
    return [o for o in outputs if isinstance(o, Dispatch | Cancel | Refuse)]


@pytest.mark.parametrize("policy", ["marginal", "round_robin"])
@given(steps=STEPS)
def test_the_same_is_done_in_the_same_order_and_calls_leave_with_the_same_message(
    policy: str, steps: list[Step]
) -> None:
    settings: dict[str, Any] = {"policy": policy, "demand_every_s": 2.0, "shared": True, "max_attempts": 2}
    prompt, late = a_router("r0", "r1", **settings), a_router("r0", "r1", put_off_s=SOON_S, **settings)
    said: list[list[Output]] = [[], []]
    for number, (kind, call_id, which) in enumerate(steps):
        heard = message(kind, call_id, which, now_s := 1.0 + number)
        outputs = [agent.handle(heard, now_s) for agent in (prompt, late)]
        assert acts(outputs[0]) == acts(outputs[1])
        for kept, given_ in zip(said, outputs, strict=True):
            kept += without_its_timer(given_)
        late.validate()
    said[1] += without_its_timer(late.handle(TimerFired(key="put_off"), 1.0 + len(steps)))
    assert said[0] == said[1]


def a_late_router() -> RouterAgent:
    return a_router("r0", put_off_s=SOON_S)


def test_a_timer_sees_to_what_was_put_off_if_nothing_else_happens() -> None:
    agent = a_late_router()
    outputs = agent.handle(ready("c0"), 1.0)
    assert placed(outputs) == [("c0", "r0")]
    assert StartTimer(key="put_off", at_s=1.0 + SOON_S) in outputs
    assert not any(isinstance(output, DecisionMade) for output in outputs)
    later = agent.handle(TimerFired(key="put_off"), 1.0 + SOON_S)
    assert [o.decision.at_s for o in later if isinstance(o, DecisionMade)] == [1.0]
    assert any(isinstance(output, StartTimer) and output.key == "answer:c0" for output in later)
    assert agent.handle(TimerFired(key="put_off"), 2.0) == ()


def test_whoever_asks_in_between_sees_the_call_where_it_is() -> None:
    agent = a_late_router()
    agent.handle(ready("c0"), 1.0)
    assert agent.in_flight("r0") == 1
    assert any(isinstance(output, DecisionMade) for output in agent.handle(TimerFired(key="put_off"), 1.0))


def test_a_step_that_raises_is_not_done_again_and_the_rest_is() -> None:
    put_off, done = PutOff(), list[int]()

    def step(number: int) -> Sequence[Output]:
        if number == 1:
            raise LookupError
        done.append(number)
        return ()

    for number in range(3):
        put_off.add(step, number)
    with pytest.raises(LookupError):
        put_off.do()
    put_off.do()
    assert done == [0, 2]
    assert not put_off
