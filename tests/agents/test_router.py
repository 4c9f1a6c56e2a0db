"""The router: which replica a call goes to, by which policy, and what its settings and records say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from swarmx.agents.objective import FALLBACK_POLICY
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Cancel, Dispatch, Refuse, StartTimer, StopTimer
from swarmx.core.fleet import CallView, Choice, FleetView, Order
from swarmx.core.messages import AlertRaised, CallCancelled, DecisionMade, PolicyChanged, TokensProgressed
from tests.agents.routers import a_router
from tests.agents.worlds import changed, dispatches, finished, ready


def test_a_call_for_a_model_that_nobody_serves_is_refused_at_once() -> None:
    (refusal,) = a_router("r0").handle(ready("c", model="nope"), 0.0)
    assert isinstance(refusal, Refuse)
    assert (refusal.reason, refusal.attempts) == ("no_replica", 0)
    assert "'nope'" in refusal.detail


def test_a_call_goes_to_a_ready_replica_and_the_decision_says_why() -> None:
    outputs = a_router("r0", "r1", policy="least_work").handle(ready("c"), 1.0)
    assert [type(output) for output in outputs] == [Dispatch, StartTimer, DecisionMade]
    decision = outputs[2].decision  # type: ignore[union-attr]
    assert decision.replica_id == outputs[0].replica_id  # type: ignore[union-attr]
    assert {decision.replica_id, decision.runner_up} == {"r0", "r1"}
    assert decision.policy == "least_work"


@pytest.mark.parametrize("state", ["starting", "cordoned", "draining"])
def test_a_replica_that_is_not_ready_gets_no_new_calls_but_may_end_its_own(state: Any) -> None:
    agent = a_router("r0")
    agent.handle(ready("old"), 0.0)
    agent.handle(changed("r0", state), 1.0)
    assert dispatches(agent.handle(ready("new"), 2.0)) == []
    assert agent.in_flight("r0") == 1
    agent.handle(finished("old"), 3.0)
    assert agent.in_flight("r0") == 0


def test_a_cancelled_call_is_stopped_where_it_runs() -> None:
    agent = a_router("r0")
    agent.handle(ready("c"), 0.0)
    outputs = agent.handle(CallCancelled(call_id="c"), 1.0)
    assert outputs == (Cancel(call_id="c", attempt=1, replica_id="r0"), StopTimer(key="answer:c"))
    assert agent.handle(finished("c"), 2.0) == ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A policy that does what `answer` says."""

    answer: Callable[[FleetView], Choice]
    name: ClassVar[str] = "broken"
    order: ClassVar[Order] = "arrival"
    waits: ClassVar[bool] = False

    def choose(self, call: CallView, fleet: FleetView, rng: np.random.Generator) -> Choice:
        return self.answer(fleet)


def _raises(fleet: FleetView) -> Choice:
    raise RuntimeError("out of ideas")


@pytest.mark.parametrize(
    "answer",
    [
        _raises,
        lambda fleet: Choice(index=len(fleet)),
        lambda fleet: Choice(index=-1),
        lambda fleet: Choice(index=0.5),  # type: ignore[arg-type]
        lambda fleet: None,
        lambda fleet: Choice(index=0, cost_s=np.zeros(len(fleet) + 1)),
        lambda fleet: Choice(index=0, terms_s={"wait_s": np.zeros(0)}),
        lambda fleet: Choice(index=0, weight=0.0),
        lambda fleet: Choice(index=0, weight=np.inf),
        lambda fleet: Choice(index=0, weight=np.nan),
    ],
    ids=[
        *("raises", "beyond", "before", "between", "nothing", "other costs", "other terms"),
        *("worthless", "priceless", "of no known worth"),
    ],
)
def test_a_policy_that_fails_is_overruled_by_name(answer: Callable[[FleetView], Choice]) -> None:
    agent = a_router("r0", "r1")
    agent.objective.policy = Broken(answer=answer)
    outputs = agent.handle(ready("c"), 0.0)
    assert len(dispatches(outputs)) == 1
    assert outputs[-1] == AlertRaised(kind="policy_failed", subject="broken")
    assert [o.decision.policy for o in outputs if isinstance(o, DecisionMade)] == [FALLBACK_POLICY]


def test_an_unknown_policy_leaves_the_one_in_force() -> None:
    agent = a_router("r0", policy="power_of_two")
    outputs = agent.handle(PolicyChanged(policy="psychic", parameters={}), 0.0)
    assert outputs == (AlertRaised(kind="policy_failed", subject="psychic"),)
    assert agent.policy.name == "power_of_two"


def test_a_policy_change_takes_effect_with_the_next_call() -> None:
    agent = a_router("r0")
    agent.handle(PolicyChanged(policy="random", parameters={}), 0.0)
    (decision,) = [o.decision for o in agent.handle(ready("c"), 1.0) if isinstance(o, DecisionMade)]
    assert decision.policy == "random"


def test_the_same_messages_give_the_same_answers() -> None:
    def run() -> list[Any]:
        agent = a_router("r0", "r1", "r2", policy="power_of_two", seed=7)
        return [agent.handle(ready(f"c{i}"), float(i)) for i in range(50)]

    assert run() == run()


def test_a_call_is_lighter_the_further_it_has_come() -> None:
    agent = a_router("r0", "r1", policy="least_work")
    agent.handle(ready("c0"), 0.0)
    agent.handle(ready("c1"), 0.0)
    agent.handle(TokensProgressed(call_id="c0", attempt=1, work_done=90.0), 1.0)
    (decision,) = [o.decision for o in agent.handle(ready("c2"), 1.0) if isinstance(o, DecisionMade)]
    left = dict(zip(decision.candidates.replica_ids, decision.candidates.remaining_work, strict=True))
    assert left["r0"] != left["r1"]


def test_the_settings_of_a_journal_rebuild_the_agent() -> None:
    agent = RouterAgent.from_config({"policy": "random", "seed": 3})
    assert agent.settings == RouterSettings(policy="random", seed=3)
