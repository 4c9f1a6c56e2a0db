"""Tenants, priorities, deadlines and refusals as a client of the gateway meets them, and `why` by another policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from swarmx.core.actions import Refuse
from swarmx.gateway.problems import refusal
from swarmx.runtime.call_ends import CallRefused
from tests.gateway.test_forecasts_shown import CHAT
from tests.gateway.whole import MODEL, Whole, whole

pytestmark = pytest.mark.process

URL = "/v1/chat/completions"
NODE = f"""
name: one
deadline_s: 60
nodes:
  ask: {{kind: llm, model: {MODEL}, prompt: "Why?", max_tokens: 8}}
"""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    predictor = {"engine": "empirical"}
    async with whole(tmp_path / "state", predictor=predictor, tenants={"default": {"priority": 3}}) as found:
        yield found


async def test_a_tenant_over_its_budget_gets_429_and_the_time_to_come_back(tmp_path: Path) -> None:
    tenants = {"default": {"tokens_per_minute": 30.0}}
    async with (
        whole(tmp_path / "state", predictor={"engine": "empirical"}, tenants=tenants) as world,
        world.client("client") as client,
        world.client("viewer") as viewer,
    ):
        body = {**CHAT, "max_tokens": 10_000}
        replies = [await client.post(URL, json=body) for _ in range(4)]
        over = next(reply for reply in replies if reply.status_code != 200)
        metrics = (await viewer.get("/metrics")).text
    assert over.status_code == 429
    assert 1 <= int(over.headers["retry-after"]) <= 120
    error = over.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "budget", None)
    assert error["message"].startswith("budget: this tenant may use 30 tokens a minute, ")
    assert "of them are used; come back in " in error["message"]
    assert over.headers["x-swarmx-call-id"].startswith("call_")
    assert f'swarmx_refusals_total{{model="{MODEL}",reason="budget"}}' in metrics


async def test_a_workflow_over_its_budget_waits_for_it(tmp_path: Path) -> None:
    tenants = {"default": {"tokens_per_minute": 6000.0}}  # 100 a second
    async with (
        whole(tmp_path / "state", predictor={"engine": "empirical"}, tenants=tenants) as world,
        world.client("client") as client,
    ):
        while (await client.post(URL, json={**CHAT, "max_tokens": 10_000})).status_code == 200:
            pass  # until the bucket is empty
        submitted = (await client.post("/api/v1/workflows", content=NODE)).json()["workflow_id"]
        record = await asyncio.wait_for(world.context.workflows.wait(submitted, "default"), 60.0)
        calls = (await client.get(f"/api/v1/workflows/{submitted}")).json()["calls"]
    assert record.state == "finished"
    assert [call["state"] for call in calls] == ["finished"]


async def test_a_call_that_cannot_be_in_time_gets_503_and_no_advice_to_repeat_it(world: Whole) -> None:
    async with world.client("client") as client:
        reply = await client.post(URL, json=CHAT, headers={"x-swarmx-deadline-s": "0.000001"})
        assert (await client.post(URL, json=CHAT, headers={"x-swarmx-deadline-s": "3600"})).status_code == 200
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "deadline"
    assert reply.headers["retry-after"] == "5"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_priority_is_taken_from_its_header_and_the_bodys_own_is_the_engines(world: Whole, stream: bool) -> None:
    body = {**CHAT, "priority": 7, "stream": stream}
    async with world.client("admin") as client:
        reply = await client.post(URL, json=body, headers={"x-swarmx-priority": "-4"})
        assert reply.status_code == 200
        decision = await why(client, reply.headers["x-swarmx-call-id"])
    assert decision["decision"]["call"]["priority"] == -4


@pytest.mark.parametrize("priority", ["11", "-11", "1.5", "high", "", "--1", "999999999999", "\u0663"])
async def test_a_priority_that_is_none_is_refused(world: Whole, priority: str) -> None:
    async with world.client("client") as client:
        reply = await client.post(URL, json=CHAT, headers={"x-swarmx-priority": priority.encode()})
    assert reply.status_code == 400
    assert "a whole number from -10 to 10 was expected" in reply.json()["error"]["message"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e3", "soon", "", "1000000"])
async def test_a_deadline_that_is_none_is_refused(world: Whole, seconds: str) -> None:
    async with world.client("client") as client:
        reply = await client.post(URL, json=CHAT, headers={"x-swarmx-deadline-s": seconds})
    assert reply.status_code == 400
    assert "seconds from now were expected" in reply.json()["error"]["message"]


async def test_why_tells_what_another_policy_would_have_done(world: Whole) -> None:
    async with world.client("client") as client:
        call_id = (await client.post(URL, json=CHAT)).headers["x-swarmx-call-id"]
        told = await why(client, call_id, policy="round_robin")
        unknown = await client.get(f"/api/v1/calls/{call_id}/why", params={"policy": "round_robbin"})
        plain = await why(client, call_id)
    other = told["instead"]
    assert other["policy"] == "round_robin"
    assert other["replica_id"] in (f"{MODEL}-0", f"{MODEL}-1")
    assert other["explanation"][0].startswith("round_robin would have sent it to ")
    assert unknown.status_code == 400
    assert "Did you mean 'round_robin'?" in unknown.json()["detail"]
    assert "instead" not in plain


@pytest.mark.parametrize(
    ("reason", "retry_after_s", "status", "told"),
    [
        ("budget", 0.2, 429, "1"),
        ("budget", 12.01, 429, "13"),
        ("overload", 7.0, 503, "7"),
        ("overload", None, 503, "5"),
        ("deadline", 0.0, 503, "1"),
        ("no_replica", None, 503, "5"),
        ("failed", None, 502, None),
    ],
)
def test_a_refusal_tells_whole_seconds_and_at_least_one(
    reason: Any, retry_after_s: float | None, status: int, told: str | None
) -> None:
    said = Refuse(call_id="c", reason=reason, attempts=0, detail="x", retry_after_s=retry_after_s)
    reply = refusal(CallRefused(said, None))
    assert (reply.status_code, reply.headers.get("retry-after")) == (status, told)


async def why(client: httpx.AsyncClient, call_id: str, **params: str) -> dict[str, Any]:
    reply = await client.get(f"/api/v1/calls/{call_id}/why", params=params)
    assert reply.status_code == 200
    (decision,) = reply.json()["decisions"]
    found: dict[str, Any] = decision
    return found
