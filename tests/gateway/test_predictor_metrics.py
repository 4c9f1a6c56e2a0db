"""What Prometheus is told of the predictors."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from swarmx.core.messages import ForecastScored, PredictorReady, RetrainEnded
from swarmx.core.records import CallRecord
from swarmx.gateway.predictor_metrics import PredictorMetrics
from tests.agents.worlds import ready

FINISHED = CallRecord(
    call_id="c",
    tenant="t",
    workflow_id="w",
    workflow_kind="k",
    node="n",
    role="r",
    kind="llm",
    model="m",
    state="finished",
    attempts=1,
    replica_id="a",
    device="cpu",
    prompt_key="0",
    prompt_bytes=1,
    prompt_tokens=1,
    work_done=80.0,
    forecast_p50=40.0,
    forecast_p90=80.0,
    forecast_source="neural",
    ready_at_s=0.0,
    dispatched_at_s=0.0,
    first_token_at_s=0.0,
    ended_at_s=1.0,
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> PredictorMetrics:
    return PredictorMetrics(registry)


def test_forecasts_are_counted_by_who_made_them(metrics: PredictorMetrics, registry: CollectorRegistry) -> None:
    metrics.observe(ready("c"))
    metrics.took("neural", 0.0001)
    assert registry.get_sample_value("swarmx_predictor_forecasts_total", {"source": "empirical"}) == 1.0
    assert registry.get_sample_value("swarmx_predictor_seconds_count", {"source": "neural"}) == 1.0


def test_outcomes_are_counted_by_whether_the_quantile_covered_them(
    metrics: PredictorMetrics, registry: CollectorRegistry
) -> None:
    metrics.call_ended(FINISHED)
    metrics.call_ended(replace(FINISHED, work_done=81.0))
    for covered in ("yes", "no"):
        labels = {"source": "neural", "covered": covered}
        assert registry.get_sample_value("swarmx_predictor_outcomes_total", labels) == 1.0


@pytest.mark.parametrize(
    "record", [replace(FINISHED, state="failed"), replace(FINISHED, kind="image"), replace(FINISHED, work_done=0.0)]
)
def test_a_call_without_an_outcome_says_nothing_of_its_forecast(
    metrics: PredictorMetrics, registry: CollectorRegistry, record: CallRecord
) -> None:
    metrics.call_ended(record)
    assert not [sample for family in registry.collect() for sample in family.samples if "outcomes_total" in sample.name]


def test_a_predictor_that_rests_is_seen(metrics: PredictorMetrics, registry: CollectorRegistry) -> None:
    assert registry.get_sample_value("swarmx_predictor_resting") == 0.0
    metrics.watch_resting(lambda: True)
    metrics.replaced("slow")
    assert registry.get_sample_value("swarmx_predictor_resting") == 1.0
    assert registry.get_sample_value("swarmx_predictor_fallbacks_total", {"reason": "slow"}) == 1.0


def test_losses_add_up_by_head_and_never_by_the_words_of_clients(
    metrics: PredictorMetrics, registry: CollectorRegistry
) -> None:
    for number in range(3):
        metrics.observe(
            ForecastScored(
                head="length", version="v", prompt_class=f"kind-{number}/r", device="", loss=0.5, covered=True
            )
        )
    metrics.observe(
        RetrainEnded(retrain_id="r", head="length", outcome="better", version="w", loss_before=2.0, loss_after=1.0)
    )
    metrics.observe(PredictorReady(head="length", version="w", previous="v"))
    metrics.refined("late")
    assert registry.get_sample_value("swarmx_predictor_loss_total", {"head": "length"}) == 1.5
    assert registry.get_sample_value("swarmx_predictor_scored_total", {"head": "length"}) == 3.0
    labels = {"head": "length", "outcome": "better"}
    assert registry.get_sample_value("swarmx_predictor_retrained_total", labels) == 1.0
    assert registry.get_sample_value("swarmx_predictor_swapped_total", {"head": "length"}) == 1.0
    assert registry.get_sample_value("swarmx_predictor_refined_total", {"outcome": "late"}) == 1.0
