"""Calls of a tenant over its budget: a client is sent away, a workflow waits."""

from __future__ import annotations

import asyncio

import pytest

from swarmx.agents.router_settings import TenantSettings
from swarmx.core.forecast import Forecast, point
from swarmx.core.messages import CallReady
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.runtime.call_ends import CallRefused
from swarmx.runtime.clock import WallClock
from tests.agents.worlds import a_call
from tests.runtime.calls.scenes import Make, Scene, a_request, plain


class Sure(EmpiricalForecaster):
    """Expects every answer to have so many tokens."""

    def __init__(self, tokens: float) -> None:
        super().__init__()
        self._tokens = tokens

    def forecast(self, call: Call, encoding: Encoding) -> Forecast:
        return point(self._tokens, unit="tokens")


POOR = {"t": TenantSettings(tokens_per_minute=60_000.0)}  # a thousand tokens a second


def spend(s: Scene, tokens: int) -> None:
    """Another call of the tenant has taken so many tokens; nobody waits for it."""
    s.shell.post(CallReady(call=a_call("other", prompt_tokens=tokens), forecast=point(0.0, unit="tokens")))


async def test_a_client_over_its_budget_is_refused_with_the_time_to_come_back(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 60_000)
    with pytest.raises(CallRefused, match="budget: this tenant may use 60000 tokens a minute") as refused:
        await s.ask()
    assert (refused.value.status, refused.value.reason) == (429, "budget")
    assert refused.value.retry_after_s == pytest.approx(0.4, abs=0.2)
    assert s.records[0].state == "refused"


async def test_a_call_of_a_workflow_over_its_budget_waits_for_it(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 60_000)
    result = await s.calls.complete(a_request())
    assert result.answer is not None
    assert [record.state for record in s.records] == ["finished"]


async def test_a_call_of_a_workflow_does_not_wait_past_its_deadline(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 120_000)
    result = await s.calls.complete(a_request(deadline_at_s=WallClock().now_s() + 30.0))
    assert result.answer is None
    assert result.failure is not None
    assert result.failure.cause == "refused"
    assert "refused after 0 attempts: budget" in result.failure.error
    assert s.records[0].state == "refused"


async def test_a_call_that_is_cancelled_while_it_waits_for_its_budget_leaves_nothing(scene: Make) -> None:
    s = scene(tenants=POOR, forecaster=Sure(300.0))
    await s.serve("a", plain)
    spend(s, 120_000)
    task = asyncio.create_task(s.calls.complete(a_request()))
    while not s.calls.in_flight:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait({task})
    assert [record.state for record in s.records] == ["cancelled"]
    assert s.calls.in_flight == 0
