"""Decisions of a router, for tests of those who only listen."""

from __future__ import annotations

from swarmx.core.forecast import point
from swarmx.core.messages import DecisionMade
from swarmx.core.nouns import Candidates, Decision
from tests.agents.worlds import a_call


def decided(call_id: str, *, replica_id: str) -> DecisionMade:
    """The first attempt of the call goes to the replica, the only one that there is."""
    candidates = Candidates(
        total=1,
        replica_ids=(replica_id,),
        in_flight=(0,),
        remaining_work=(0.0,),
        context_tokens=(0.0,),
        signal_age_s=(None,),
        cost_s=None,
        terms_s={},
    )
    return DecisionMade(
        decision=Decision(
            call=a_call(call_id),
            attempt=1,
            at_s=0.0,
            policy="round_robin",
            parameters={},
            replica_id=replica_id,
            runner_up=None,
            forecast=point(10.0, unit="tokens"),
            candidates=candidates,
        )
    )
