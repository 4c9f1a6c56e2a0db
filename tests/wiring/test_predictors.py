"""The predictor that the settings ask for, and what stands in where it cannot be had."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from swarmx.config import PredictorSection
from swarmx.core.messages import AlertRaised, Message, WorkflowEnded, WorkflowSubmitted
from swarmx.core.records import CallRecord
from swarmx.gateway.predictor_metrics import PredictorMetrics
from swarmx.neural.checkpoint import save_head
from swarmx.neural.empirical import EmpiricalForecaster
from swarmx.neural.heads.structure import SPECS
from swarmx.runtime.clock import WallClock
from swarmx.wiring.adaptation import Adaptation, adaptation
from swarmx.wiring.predictors import Forecasters, forecasters, refiner, workflow_forecasts
from tests.agents.worlds import PROMPT, a_call, finished, ready
from tests.neural.test_latency import random_head


class Bench:
    def __init__(self) -> None:
        self.posted: list[Message] = []
        self.registry = CollectorRegistry()
        self.metrics = PredictorMetrics(self.registry)

    async def made(self, **wanted: object) -> Forecasters:
        section = PredictorSection.model_validate(wanted)
        return await forecasters(section, clock=WallClock(), post=self.posted.append, metrics=self.metrics)


async def test_plain_statistics_need_no_weights_and_miss_nothing() -> None:
    bench = Bench()
    found = await bench.made(engine="empirical")
    assert isinstance(found.first, EmpiricalForecaster)
    assert (found.neural, found.second, found.missing) == (None, None, ())


async def test_weights_that_are_missing_are_told_by_log_metric_and_alert_and_nothing_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    with caplog.at_level(logging.WARNING):
        found = await bench.made(engine="neural", weights=tmp_path)
    assert found.first.forecast(a_call("c"), found.first.encode(a_call("c"), PROMPT)).source == "prior"
    assert any("plain statistics stand in" in record.getMessage() for record in caplog.records)
    assert bench.posted == []  # nobody listens yet
    found.announce(bench.posted.append, bench.metrics)
    assert bench.posted == [AlertRaised(kind="predictor_fallback", subject="neural")]
    assert bench.registry.get_sample_value("swarmx_predictor_fallbacks_total", {"reason": "missing"}) == 1.0


async def test_without_a_slow_encoder_there_are_no_second_forecasts() -> None:
    bench = Bench()
    found = await bench.made(engine="empirical")
    async with AsyncExitStack() as stack:
        assert (
            await refiner(
                found,
                PredictorSection(),
                stack,
                clock=WallClock(),
                post=bench.posted.append,
                metrics=bench.metrics,
                on_refined=lambda *refined: None,
            )
            is None
        )


def test_workflows_are_forecast_from_memory_where_there_are_no_heads(tmp_path: Path) -> None:
    made, reads = workflow_forecasts(PredictorSection(engine="neural", weights=tmp_path))
    assert (made.remaining("w", 0.0), reads) == (None, False)


def test_workflows_are_forecast_by_the_heads_that_are_there(tmp_path: Path) -> None:
    save_head(tmp_path, random_head(SPECS["calls"]), {"licence": "CC0-1.0"})
    made, reads = workflow_forecasts(PredictorSection(engine="neural", weights=tmp_path))
    for number in range(10):  # without any memory of workflows a head is not asked
        made.hear(WorkflowSubmitted(workflow_id="w", kind="report"), float(number))
        made.hear(ready(f"c{number}"), number + 0.1)
        if number < 9:
            made.hear(finished(f"c{number}"), number + 0.2)
            made.hear(WorkflowEnded(workflow_id="w", state="finished"), number + 0.3)
    remaining = made.remaining("w", 10.0)
    assert reads
    assert remaining is not None
    assert remaining.calls.version.startswith("remaining_calls-")
    assert not remaining.path.version.startswith("remaining_path-")


async def nobody(count: int) -> list[CallRecord]:
    return []


async def test_nothing_is_trained_where_no_weights_are_in_force(tmp_path: Path) -> None:
    found = await Bench().made(engine="empirical")
    async with AsyncExitStack() as stack:
        made = adaptation(PredictorSection(), found, stack, newest=nobody, folder=tmp_path, post=print)
    assert made == Adaptation()
