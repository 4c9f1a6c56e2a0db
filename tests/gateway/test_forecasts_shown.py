"""Forecasts as operators see them: service curves, what workflows have before them, and who stands in for whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import unescape
from pathlib import Path

import pytest

from swarmx.core.forecast import Forecast, Unit
from swarmx.core.records import WorkflowRecord
from swarmx.neural.structure_live import Remaining
from tests.gateway.test_web import logged_in
from tests.gateway.whole import MODEL, Whole, whole
from tests.runtime.test_curves import a_curve

pytestmark = pytest.mark.process

ONE = f"{MODEL}-0"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    # Without weights nobody publishes curves but the test.
    async with whole(tmp_path / "state", predictor={"engine": "empirical"}) as found:
        yield found


def expected(median: float, unit: Unit) -> Forecast:
    spread = (median, 2.0 * median)
    return Forecast(levels=(0.5, 0.9), quantiles=spread, unit=unit, source="neural", version="remaining-1")


async def a_running_workflow(world: Whole) -> None:
    context = world.context
    calls = expected(3.0, "calls")
    left = Remaining(calls=calls, work=expected(700.0, "tokens"), path=expected(12.0, "s"), by_model={MODEL: calls})
    context.remaining = lambda workflow_id: left if workflow_id == "wf-1" else None
    record = WorkflowRecord(
        workflow_id="wf-1",
        tenant="default",
        mode="transparent",
        kind="k",
        name="n",
        state="running",
        created_at_s=context.clock.now_s(),
    )
    await context.store.accept(record, [])


async def test_a_replica_tells_in_short_what_a_call_would_take_there(world: Whole) -> None:
    world.context.book.observe(a_curve(ONE, at_s=world.context.clock.now_s()), 0.0)
    async with world.client("viewer") as client:
        rows = {row["replica_id"]: row for row in (await client.get("/api/v1/replicas")).json()["replicas"]}
    curve = rows[ONE]["service_curve"]
    assert (curve["version"], curve["p50_s"], curve["p90_s"]) == ("latency-1", 4.0, 5.0)
    assert 0.0 <= curve["age_s"] < 60.0
    assert rows[f"{MODEL}-1"]["service_curve"] is None


async def test_the_whole_curve_has_its_numbers_by_length_prompt_and_level(world: Whole) -> None:
    world.context.book.observe(a_curve(ONE), 0.0)
    async with world.client("viewer") as client:
        curve = (await client.get(f"/api/v1/replicas/{ONE}/service_curve")).json()
    assert (len(curve["work"]), len(curve["uncached"]), len(curve["levels"])) == (2, 3, 3)
    assert curve["completion_s"] == [
        [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]],
        [[9.0, 10.0, 11.0], [12.0, 13.0, 14.0], [15.0, 16.0, 17.0]],
    ]
    assert curve["ttft_s"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]


async def test_a_curve_is_for_those_who_may_see_the_fleet_and_where_it_is_not_it_is_not_found(world: Whole) -> None:
    async with world.client("viewer") as viewer, world.client("client") as client:
        for replica_id in (ONE, "nobody"):
            reply = await viewer.get(f"/api/v1/replicas/{replica_id}/service_curve")
            assert (reply.status_code, reply.headers["content-type"]) == (404, "application/problem+json")
        assert (await client.get(f"/api/v1/replicas/{ONE}/service_curve")).status_code == 403


async def test_a_running_workflow_tells_what_it_has_before_it(world: Whole) -> None:
    await a_running_workflow(world)
    async with world.client("client") as client:
        left = (await client.get("/api/v1/workflows/wf-1")).json()["remaining"]
    assert left["calls"]["quantiles"] == [3.0, 6.0]
    assert (left["path"]["unit"], left["work"]["source"], left["work"]["version"]) == ("s", "neural", "remaining-1")
    assert set(left["by_model"]) == {MODEL}


async def test_a_workflow_of_which_nobody_can_say_what_is_left_has_null(world: Whole) -> None:
    await a_running_workflow(world)
    world.context.remaining = lambda workflow_id: None
    async with world.client("client") as client:
        assert (await client.get("/api/v1/workflows/wf-1")).json()["remaining"] is None
    async with logged_in(world, "viewer") as client:
        assert "wf-1" in (await client.get("/")).text


async def test_the_page_shows_curves_and_what_is_to_come(world: Whole) -> None:
    await a_running_workflow(world)
    world.context.book.observe(a_curve(ONE, at_s=world.context.clock.now_s()), 0.0)
    async with logged_in(world, "viewer") as client:
        page = unescape((await client.get("/")).text)
    assert "P50 4 s, P90 5 s" in page
    assert "by latency-1" in page
    assert "3 to 6" in page
    assert "700 to 1400" in page
    assert "12 to 24</span> s" in page
    assert "neural remaining-1" in page


async def test_workflows_are_forecast_from_what_their_calls_did(world: Whole) -> None:
    headers = {"x-swarmx-workflow-id": "w-1", "x-swarmx-workflow-kind": "report"}
    async with world.client("client") as client:
        reply = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert reply.status_code == 200
        (row,) = (await client.get("/api/v1/workflows")).json()["workflows"]
        left = (await client.get(f"/api/v1/workflows/{row['workflow_id']}")).json()["remaining"]
    assert left["calls"]["unit"] == "calls"


async def test_a_record_shows_whose_forecast_it_had_and_not_its_encoding(world: Whole) -> None:
    async with world.client("client") as client:
        reply = await client.post("/v1/chat/completions", json=CHAT)
        call = (await client.get(f"/api/v1/calls/{reply.headers['x-swarmx-call-id']}")).json()
    assert call["forecast_source"] == "prior"
    assert {"encoder", "forecast_version", "cached_tokens"} <= set(call)
    assert "encoding" not in call


async def test_a_server_whose_weights_are_missing_runs_on_statistics_and_says_so(tmp_path: Path) -> None:
    predictor = {"engine": "neural", "weights": tmp_path / "nothing"}
    async with whole(tmp_path / "state", predictor=predictor) as world, world.client("admin") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        metrics = (await client.get("/metrics")).text
    assert 'swarmx_predictor_fallbacks_total{reason="missing"} 1.0' in metrics
    assert 'swarmx_alerts_total{kind="predictor_fallback"} 1.0' in metrics
    assert 'swarmx_predictor_forecasts_total{source="prior"} 1.0' in metrics
