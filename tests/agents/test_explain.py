from __future__ import annotations

import pytest
from msgspec.structs import replace

from swarmx.agents.explain import explain
from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.agents.router_settings import RouterSettings
from swarmx.core.forecast import LEVELS, Forecast
from swarmx.core.messages import DecisionMade, SignalReported
from swarmx.core.nouns import Decision
from tests.agents.worlds import changed, failed, ready


def decide(policy: str, replicas: int, *, retry: bool = False) -> Decision:
    agent = RouterAgent(RouterSettings(policy=policy))
    for i in range(replicas):
        agent.handle(changed(f"r{i}"), 0.0)
    agent.handle(SignalReported(replica_id="r0", running=1, waiting=0, kv_usage=0.1, measured_at_s=0.5), 0.5)
    outputs = agent.handle(ready("c"), 1.0)
    if retry:
        outputs = agent.handle(failed("c"), 2.0)
    (made,) = [output for output in outputs if isinstance(output, DecisionMade)]
    return made.decision


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("replicas", [1, 2, 33, 100])
def test_every_decision_can_be_told(policy: str, replicas: int) -> None:
    lines = explain(decide(policy, replicas))
    assert lines[0].endswith(f"by {policy}, one of {replicas} ready replicas.")
    assert all(line.endswith(".") for line in lines)


def test_a_decision_by_cost_names_its_terms_and_its_runner_up() -> None:
    text = " ".join(explain(decide("least_work", 2)))
    for part in ("wait", "prefill", "decode", "Runner-up: r"):
        assert part in text


def test_a_decision_tells_whose_forecast_it_had_and_its_quantiles() -> None:
    forecast = Forecast(
        levels=LEVELS,
        quantiles=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
        unit="tokens",
        source="neural",
        version="length-5f0c",
    )
    line = explain(replace(decide("round_robin", 2), forecast=forecast))[1]
    assert line.startswith("Forecast (neural length-5f0c): 4 output tokens at the median, 6 at P90, 8 at P99;")


def test_a_decision_without_costs_says_so() -> None:
    assert any("does not estimate times" in line for line in explain(decide("round_robin", 2)))


def test_a_replica_that_never_reported_is_said_to_be_silent() -> None:
    decision = decide("round_robin", 2, retry=True)
    assert decision.replica_id == "r1"
    assert "The replica had not reported its own counters yet." in explain(decision)
    assert explain(decision)[-1] == "Note: retry."
