"""A server whose predictor has weights: what its calls show, and that its head can be trained again and swapped."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from swarmx.config import PredictorSection
from swarmx.core.actions import Retrain, UsePredictor
from swarmx.core.forecast import LEVELS
from swarmx.core.messages import Message, PredictorReady, RetrainEnded
from swarmx.core.prompts import Encoding
from swarmx.core.records import CallRecord
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.tracking import QuantileTracker
from swarmx.runtime.forecasting import GuardedForecaster
from swarmx.wiring.adaptation import adaptation, remember, trainable
from tests.agents.worlds import PROMPT, a_call
from tests.gateway.whole import MODEL, whole
from tests.neural.length_weights import write_weights
from tests.neural.test_latency import random_head
from tests.wiring.test_predictors import Bench, nobody

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 64}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    write_weights(tmp_path / "weights", models=(MODEL,))
    return tmp_path / "weights"


@pytest.mark.process
async def test_a_call_shows_which_weights_forecast_it(weights: Path, tmp_path: Path) -> None:
    predictor = {"engine": "neural", "weights": weights, "budget_ms": 1000.0}
    async with whole(tmp_path / "state", predictor=predictor) as world, world.client("admin") as client:
        reply = await client.post("/v1/chat/completions", json=CHAT)
        call_id = reply.headers["x-swarmx-call-id"]
        call = (await client.get(f"/api/v1/calls/{call_id}")).json()
        why = (await client.get(f"/api/v1/calls/{call_id}/why")).json()
        metrics = (await client.get("/metrics")).text
    version = NeuralForecaster.load(weights).version
    assert (call["forecast_source"], call["forecast_version"]) == ("neural", version)
    assert "hashed" in call["encoder"]
    assert why["decisions"][0]["explanation"][1].startswith(f"Forecast (neural {version}): ")
    assert len(why["decisions"][0]["decision"]["forecast"]["quantiles"]) == len(LEVELS)
    assert 'swarmx_predictor_scored_total{head="length"} 1.0' in metrics
    assert 'swarmx_predictor_forecasts_total{source="neural"} 1.0' in metrics


async def test_weights_that_are_there_are_guarded(weights: Path) -> None:
    found = await Bench().made(engine="neural", weights=weights)
    assert isinstance(found.first, GuardedForecaster)
    assert (found.first.name, found.missing) == ("neural", ())
    assert found.neural is not None
    assert isinstance(found.neural.correction, QuantileTracker)


async def test_a_predictor_that_is_not_to_adapt_forecasts_the_same_whatever_happens(weights: Path) -> None:
    found = await Bench().made(engine="neural", weights=weights, adapt=False, budget_ms=1000.0)
    call = a_call("c", model=MODEL)
    encoding = found.first.encode(call, PROMPT)
    before = found.first.forecast(call, encoding)
    for _ in range(50):
        found.first.observe(call, encoding, 3.0)
    assert found.first.forecast(call, encoding) == before


async def test_a_slow_encoder_that_cannot_be_had_leaves_the_first_forecasts(weights: Path) -> None:
    found = await Bench().made(engine="neural", weights=weights, encoder="isomorphic")
    assert isinstance(found.first, GuardedForecaster)
    assert (found.second, found.missing) == (None, ("isomorphic",))


async def test_the_learner_joins_with_those_who_do_what_it_says(weights: Path, tmp_path: Path) -> None:
    found = await Bench().made(engine="neural", weights=weights)
    async with AsyncExitStack() as stack:
        made = adaptation(PredictorSection(), found, stack, newest=nobody, folder=tmp_path / "p", post=print)
        off = adaptation(
            PredictorSection(retrain=False), found, stack, newest=nobody, folder=tmp_path / "p", post=print
        )
    assert [agent.name for agent in made.agents] == ["learner"]
    assert set(made.performers) == {Retrain, UsePredictor}
    assert off.agents == ()


def test_a_swap_puts_the_head_in_force_and_corrects_it_by_what_it_would_have_said(weights: Path) -> None:
    forecaster = NeuralForecaster.load(weights, QuantileTracker(LEVELS))
    call = a_call("c", model=MODEL)
    encoding = forecaster.encode(call, PROMPT)
    for _ in range(40):
        forecaster.observe(call, encoding, 5000.0)
    new = random_head(forecaster.head.spec, seed=9)
    old = forecaster.head
    lengths = trainable(forecaster)
    assert lengths.swap(new) is old
    assert lengths.head() is new
    swapped = forecaster.forecast(call, forecaster.encode(call, PROMPT))
    assert swapped.version == new.version
    assert swapped.quantile(0.5) == pytest.approx(min(5000.0, call.work_limit), rel=0.5)


@pytest.mark.process
async def test_drifted_calls_in_memory_train_the_head_again_and_the_next_life_begins_with_it(
    weights: Path, tmp_path: Path
) -> None:
    """The whole way, with a real child process: records, rows, training, swap, and the note for a restart."""
    found = await Bench().made(engine="neural", weights=weights)
    assert found.neural is not None
    call, rng, vector = a_call("c", model=MODEL), np.random.default_rng(0), found.neural.encode(a_call("c"), PROMPT)
    records = [
        a_record(vector, f"c{i}", work_done=float(rng.lognormal(6.0 if i % 2 else 3.0, 0.1)), role="ab"[i % 2])
        for i in range(600)
    ]
    told: asyncio.Queue[Message] = asyncio.Queue()

    async def newest(limit: int) -> list[CallRecord]:
        return records[-limit:]

    folder, shipped = tmp_path / "predictors", found.neural.head.version
    async with AsyncExitStack() as stack:
        made = adaptation(PredictorSection(), found, stack, newest=newest, folder=folder, post=told.put_nowait)
        made.performers[Retrain](Retrain(retrain_id="length-1", head="length", keys=(("k/r", ""),)))
        ended = await told.get()
        assert isinstance(ended, RetrainEnded)
        assert ended.outcome == "better"
        assert ended.loss_after < ended.loss_before
        made.performers[UsePredictor](UsePredictor(head="length", version=ended.version))
        ready = await told.get()
    assert ready == PredictorReady(head="length", version=ended.version, previous=shipped)
    assert found.neural.head.version == ended.version

    again = await Bench().made(engine="neural", weights=weights)
    await remember(PredictorSection(), again, newest=newest, folder=folder)
    assert again.neural is not None
    assert again.neural.head.version == ended.version
    assert again.first.forecast(call, again.first.encode(call, PROMPT)).version == ended.version


def a_record(encoding: Encoding, call_id: str, *, work_done: float, role: str = "r") -> CallRecord:
    return CallRecord(
        call_id=call_id, tenant="t", workflow_id="", workflow_kind="k", node="", role=role, kind="llm", model=MODEL,
        state="finished", attempts=1, replica_id="a", device="d", prompt_key="0", prompt_bytes=1, prompt_tokens=1,
        work_done=work_done, forecast_p50=1.0, forecast_p90=2.0, forecast_source="neural", ready_at_s=0.0,
        dispatched_at_s=0.0, first_token_at_s=0.0, ended_at_s=1.0, encoder=encoding.encoder,
        encoding=encoding.vector.astype("<f2").tobytes(), work_limit=4096.0,
    )  # fmt: skip


def test_records_of_a_server_make_rows_for_its_head(weights: Path) -> None:
    forecaster = NeuralForecaster.load(weights)
    encoding = forecaster.encode(a_call("c"), PROMPT)
    record = a_record(encoding, "c", work_done=30.0)
    table = trainable(forecaster).table_of([record, replace(record, encoder="")])
    assert len(table) == 1
    log_q = forecaster.head.log_quantiles(table.features, table.anchor, table.group.tolist())
    assert np.isfinite(log_q).all()
    assert math.isfinite(table.anchor[0])
