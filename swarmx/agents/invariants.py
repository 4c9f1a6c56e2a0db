"""What always holds in a router's memory; tests check it after every step."""

from __future__ import annotations

from collections.abc import Mapping

from swarmx.agents.calls import CallState, WaitingCalls
from swarmx.agents.pool import Pool

_NOBODY: frozenset[str] = frozenset()


def check_memory(
    calls: Mapping[str, CallState],
    waiting: Mapping[str, WaitingCalls],
    pools: Mapping[str, Pool],
    pool_of: Mapping[str, Pool],
    *,
    policy_waits: bool,
) -> None:
    """Every call waits or is at a replica, every replica's count is right, nobody waits for nothing, or for ever.

    Raises AssertionError.
    """
    counts: dict[str, int] = {}
    waits = {state.call.call_id for line in waiting.values() for state in line}
    for call_id, state in calls.items():
        assert (call_id in waits) == (state.replica_id is None), f"{call_id} is neither here nor there"
        if state.replica_id is not None:
            counts[state.replica_id] = counts.get(state.replica_id, 0) + 1
    for replica_id, pool in pool_of.items():
        assert pool.in_flight(replica_id) == counts.get(replica_id, 0), f"{replica_id} counts its calls wrongly"
    for model, line in waiting.items():
        pool = pools[model]
        may_hold = policy_waits and any(pool.in_flight(r.replica_id) for r in pool.replicas)
        full = not any(len(pool.open(tried)) for tried in line.lines())
        assert may_hold or full, f"a call for {model} waits for nothing"
        assert not line.untimed or len(pool.eligible(_NOBODY)), f"a call for {model} waits for ever"
        assert abs(line.work - sum(state.work_left for state in line)) <= 1e-6 * max(1.0, line.work)
