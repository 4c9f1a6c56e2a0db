"""Routers to test with, and what to read from their answers."""

from __future__ import annotations

from typing import Any

from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.actions import Dispatch
from tests.agents.worlds import a_profile, changed, ready


def a_router(*replica_ids: str, policy: str = "round_robin", **patience: Any) -> RouterAgent:
    """With the ready replicas; without any, one of their model is still starting. It reports no demand unless asked."""
    agent = RouterAgent(RouterSettings(**{"policy": policy, "demand_every_s": 0.0, **patience}))
    agent.handle(changed(replica_ids[0] if replica_ids else "r0", "starting"), 0.0)
    for replica_id in replica_ids:
        agent.handle(changed(replica_id), 0.0)
    return agent


def a_full_router(*replica_ids: str, **patience: Any) -> RouterAgent:
    """Each replica takes one call at a time and has one: c0 at the first, and so on."""
    agent = a_router(**patience)
    for number, replica_id in enumerate(replica_ids):
        agent.handle(changed(replica_id, profile=a_profile(max_batch=1)), 0.0)
        agent.handle(ready(f"c{number}"), 0.0)
        assert agent.in_flight(replica_id) == 1
    return agent


def placed(outputs: Any) -> list[tuple[str, str]]:
    return [(output.call_id, output.replica_id) for output in outputs if isinstance(output, Dispatch)]
