"""Forecasts of a real server: what it has learnt outlives it, and bad weights keep it from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet import Http, all_ready, serving, up

pytestmark = pytest.mark.process

FLEET: dict[str, Any] = {
    "emulation": {"time_scale": 50.0},
    "emulated": [{"model": "qwen3-8b", "device": "h100", "count": 1}],
}


async def chat(http: Http, words: str) -> dict[str, Any]:
    """The record of one more call."""
    body = {"model": "qwen3-8b", "messages": [{"role": "user", "content": f"Write about {words}."}], "max_tokens": 4000}
    reply = await http.post("/v1/chat/completions", json=body, headers={"x-swarmx-role": "writer"})
    assert reply.status == 200, reply
    return await http.call(reply.headers["x-swarmx-call-id"])


async def test_a_server_that_was_killed_knows_after_its_restart_what_it_had_learnt(tmp_path: Path) -> None:
    server = up(FLEET, tmp_path)
    try:
        async with server.http() as http:
            await all_ready(http)
            first = await chat(http, "rivers")
            for topic in ("bridges", "letters", "gardens"):
                last = await chat(http, topic)
    finally:
        server.kill()
    assert (first["forecast_source"], last["forecast_source"]) == ("prior", "neural")
    assert last["forecast_version"].startswith("length-")
    with serving(FLEET, tmp_path) as again:
        async with again.http() as http:
            await all_ready(http)
            next_one = await chat(http, "engines")
    assert next_one["forecast_source"] == "neural"
    assert next_one["forecast_version"] == last["forecast_version"]


async def test_weights_that_are_missing_keep_no_server_from_starting(tmp_path: Path) -> None:
    with serving({**FLEET, "predictor": {"weights": str(tmp_path / "nowhere")}}, tmp_path) as server:
        async with server.http() as http:
            await all_ready(http)
            record = await chat(http, "rivers")
            metrics = (await http.get("/metrics")).body.decode()
    assert record["forecast_source"] in ("prior", "empirical")
    assert "plain statistics stand in" in server.log
    assert 'swarmx_predictor_fallbacks_total{reason="missing"} 1.0' in metrics
