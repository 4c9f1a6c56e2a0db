"""Service curves of a running server, by latency heads that are there or are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from swarmx.core.messages import SignalReported
from swarmx.neural.checkpoint import save_head
from swarmx.neural.heads.latency import COMPLETION, TTFT
from swarmx.runtime.latency_heads import LatencyHeads, latency_heads
from tests.agents.worlds import a_replica
from tests.e2e.fleet import until
from tests.gateway.whole import MODEL, whole
from tests.neural.test_latency import random_head

HEADS = LatencyHeads(ttft=random_head(TTFT), completion=random_head(COMPLETION))


def signal(*, running: int) -> SignalReported:
    return SignalReported(replica_id="a", running=running, waiting=0, kv_usage=0.5, measured_at_s=10.0)


@pytest.mark.parametrize("last", [None, signal(running=0), signal(running=10_000)])
def test_a_replica_of_which_nothing_but_its_profile_is_known_has_a_finite_curve(last: SignalReported | None) -> None:
    curve = HEADS.curve(a_replica("a"), last, 12.0)
    assert curve is not None
    assert (curve.replica_id, curve.measured_at_s) == ("a", 12.0)
    assert len(curve.completion_s) == len(curve.work) * len(curve.uncached) * len(curve.levels)
    assert len(curve.ttft_s) == len(curve.uncached) * len(curve.levels)
    assert all(math.isfinite(value) and value >= 0.0 for value in (*curve.completion_s, *curve.ttft_s))


def test_an_image_replica_has_no_curve() -> None:
    assert HEADS.curve(replace(a_replica("a"), kind="image"), None, 0.0) is None


def test_without_weights_there_are_no_curves(tmp_path: Path) -> None:
    assert latency_heads(tmp_path) is None


@pytest.mark.process
async def test_a_server_with_latency_heads_shows_the_curve_of_every_replica(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    for head in (HEADS.ttft, HEADS.completion):
        save_head(weights, head, {"licence": "CC0-1.0"})
    predictor = {"engine": "neural", "weights": weights}
    async with whole(tmp_path / "state", predictor=predictor) as world, world.client("viewer") as client:

        async def shown() -> list[dict[str, object] | None]:
            return [row["service_curve"] for row in (await client.get("/api/v1/replicas")).json()["replicas"]]

        curves = await until(shown, lambda found: all(found) and len(found) == 2)
        whole_curve = (await client.get(f"/api/v1/replicas/{MODEL}-0/service_curve")).json()
    assert all(curve is not None and curve["work"] == 256.0 for curve in curves)
    assert len(whole_curve["completion_s"]) == len(whole_curve["work"])
