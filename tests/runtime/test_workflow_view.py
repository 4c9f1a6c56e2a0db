"""What people see of a workflow, whatever state its nodes are in."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random  # noqa: TID251  # the type of what hypothesis hands in
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarmx.core.records import StoredEvent
from swarmx.runtime.workflow_view import describe_run
from swarmx.workflows.events import Event, NodeFailed, encode_event
from swarmx.workflows.plan import advance, wake_at_s
from swarmx.workflows.spec import parse_workflow
from swarmx.workflows.state import Run
from tests.contract.test_store import workflow
from tests.workflows.agents import CATALOGUE, Agent, called
from tests.workflows.any_runs import PRICES, definition, happening

STEPS = {f"n{i}": {"kind": "llm", "model": "m", "prompt": f"after {{{{ n{i - 1}.text }}}}"} for i in (1, 2)}
CHAIN = {"nodes": {"n0": {"kind": "llm", "model": "m", "prompt": "begin"}, **STEPS}}


def shown(events: Sequence[Event]) -> dict[str, dict[str, Any]]:
    """The nodes by their paths, of a workflow whose events came a second apart."""
    stored = [StoredEvent(seq=i, at_s=float(i), body=encode_event(event)) for i, event in enumerate(events, 1)]
    return {node["path"]: node for node in describe_run(workflow(seq=len(stored)), stored)["nodes"]}


def test_what_was_given_up_with_a_tool_of_an_agent_is_shown_as_failed() -> None:
    agent = Agent(tools=[], workflows=["chain"], whole={"workflows": {"chain": CHAIN}})
    agent.model("a.1", called(("chain", {})))
    agent.take(NodeFailed(path="a.1.1.n0", error="broke"))
    nodes = shown(agent.events)
    assert [nodes[f"a.1.1.n{i}"]["state"] for i in range(3)] == ["failed"] * 3
    assert [nodes[f"a.1.1.n{i}"]["ready_at_s"] is None for i in range(3)] == [False, True, True]
    assert nodes["a"]["state"] == "running"


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(rng=st.randoms(use_true_random=False))
def test_any_workflow_can_be_shown_at_any_time(rng: Random) -> None:
    run, submitted = Run.start(parse_workflow(definition(rng)), {}, workflow_id="wf-any")
    events: list[Event] = [submitted, *advance(run, now_s=0.0, tools=CATALOGUE, prices=PRICES)[0]]
    now_s = 0.0
    while not run.ended:
        if rng.random() < 0.3:
            assert shown(events).keys() == run.nodes.keys()
        event = happening(rng, run, now_s, trouble=True)
        now_s = max(now_s, wake_at_s(run) or now_s) if event is None else now_s
        happened = [] if event is None else [event]
        events += advance(run, happened, now_s=now_s, tools=CATALOGUE, prices=PRICES)[0]
    assert shown(events).keys() == run.nodes.keys()
