"""The page and the endpoint of the predictors: what they show, and to whom."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import unescape
from pathlib import Path

import pytest

from swarmx.core.messages import AlertRaised, ForecastScored, PredictorReady, RetrainEnded
from tests.gateway.test_forecasts_shown import CHAT
from tests.gateway.test_web import logged_in
from tests.gateway.whole import Whole, whole

pytestmark = pytest.mark.process


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    async with whole(tmp_path / "state") as found:
        yield found


def adapted(world: Whole) -> None:
    """A drift, a retraining that helped, and scores of a class whose name is not a nice one."""
    now_s = world.context.clock.now_s()
    for message in (
        ForecastScored(head="length", version="v", prompt_class="<b>/r", device="", loss=0.5, covered=True),
        AlertRaised(kind="forecast_drift", subject="k/r"),
        RetrainEnded(
            retrain_id="r", head="length", outcome="better", version="length-2", loss_before=0.25, loss_after=0.125
        ),
        PredictorReady(head="length", version="length-2", previous="length-1"),
    ):
        world.context.forecasts.observe(message, now_s)


async def test_the_endpoint_tells_heads_and_how_forecasts_did(world: Whole) -> None:
    async with world.client("client") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    async with world.client("viewer") as client:
        found = (await client.get("/api/v1/predictor")).json()
    assert (found["engine"], found["resting"], found["missing"]) == ("neural", False, [])
    head = next(head for head in found["heads"] if head["name"] == "length")
    assert head["version"] == head["card_version"]
    assert set(head["metrics"]) >= {"pinball", "kendall_tau"}
    assert [(row["source"], row["calls"]) for row in found["observed"]] == [("prior", 1)]


async def test_the_endpoint_is_for_those_who_may_see_the_fleet(world: Whole) -> None:
    async with world.client("client") as client, world.client() as stranger:
        assert (await client.get("/api/v1/predictor")).status_code == 403
        assert (await stranger.get("/api/v1/predictor")).status_code == 401
        reply = await stranger.get("/predictor")
        assert (reply.status_code, reply.headers["location"]) == (303, "/login")


async def test_the_page_is_linked_and_has_its_sections_while_nothing_happened_yet(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        assert 'href="/predictor"' in (await client.get("/")).text
        page = (await client.get("/predictor")).text
    for name in ("predictor", "heads", "calibration", "classes", "adaptation"):
        assert f'<section id="{name}" aria-labelledby="{name}-title">' in page
    assert "The neural predictor forecasts." in page
    assert "No forecast has met its outcome yet." in page
    assert "Nothing of the kind happened since the start." in page
    assert "<script" not in page


async def test_the_page_shows_drift_retraining_and_weights(world: Whole) -> None:
    adapted(world)
    async with logged_in(world, "viewer") as client:
        page = (await client.get("/predictor")).text
    assert "<b>/r" not in page
    text = unescape(page)
    for words in ("drift was called", "trained again", "better", "0.25 → 0.125", "put in force", "<b>/r", "length-2"):
        assert words in text


async def test_the_page_says_what_is_missing(tmp_path: Path) -> None:
    predictor = {"engine": "neural", "weights": tmp_path / "nothing"}
    async with whole(tmp_path / "state", predictor=predictor) as world, logged_in(world, "viewer") as client:
        page = (await client.get("/predictor")).text
    assert "Missing: neural." in page
    assert "There are none: plain statistics forecast." in page


async def test_plain_statistics_that_were_asked_for_are_no_alarm(tmp_path: Path) -> None:
    async with whole(tmp_path / "state", predictor={"engine": "empirical"}) as world:
        async with logged_in(world, "viewer") as client:
            page = (await client.get("/predictor")).text
        async with world.client("viewer") as client:
            assert (await client.get("/api/v1/predictor")).json()["heads"] == []
    assert "as <code>predictor.engine</code> asks for" in page
    assert 'role="alert"' not in page
