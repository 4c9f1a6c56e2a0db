"""Finished calls that are forecast once more: from what was known then, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from swarmx.core.prompts import cut
from swarmx.core.records import CallRecord
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.replayed import call_of, replay, vector_of
from tests.gateway.test_predictor_metrics import FINISHED
from tests.neural.length_weights import write_weights


@pytest.fixture
def forecaster(tmp_path: Path) -> NeuralForecaster:
    write_weights(tmp_path)
    return NeuralForecaster.load(tmp_path)


def a_record(forecaster: NeuralForecaster, call_id: str, ready_at_s: float, ended_at_s: float) -> CallRecord:
    vector = forecaster.encoder.encode_one(cut(b"Write it."))
    return replace(
        FINISHED,
        call_id=call_id,
        ready_at_s=ready_at_s,
        ended_at_s=ended_at_s,
        encoder=forecaster.encoder.version,
        encoding=vector.astype("<f2").tobytes(),
    )


def test_a_call_is_forecast_from_those_that_had_ended_when_it_became_ready(forecaster: NeuralForecaster) -> None:
    records = [
        a_record(forecaster, "long", 0.0, 9.0),
        a_record(forecaster, "first", 1.0, 2.0),
        a_record(forecaster, "beside", 1.5, 3.0),
        a_record(forecaster, "after", 2.0, 4.0),
    ]
    said = [(record.call_id, forecast) for record, forecast in replay(forecaster, records[::-1])]
    assert [call_id for call_id, _ in said] == ["long", "first", "beside", "after"]
    assert [forecast.source for _, forecast in said] == ["prior", "prior", "prior", "neural"]
    assert said[0][1] == said[2][1]
    assert forecaster.memory.seen("m", "k/r") == (4, 4), "all of them are known afterwards"


def test_calls_that_teach_nothing_are_left_out(forecaster: NeuralForecaster) -> None:
    good = a_record(forecaster, "c", 0.0, 1.0)
    bad = np.full(forecaster.encoder.dimension, np.inf, dtype="<f2").tobytes()
    others = [
        replace(good, state="failed"),
        replace(good, kind="image"),
        replace(good, work_done=0.0),
        replace(good, encoder="another"),
        replace(good, encoding=b""),
        replace(good, encoding=bad),
    ]
    assert list(replay(forecaster, others)) == []
    assert vector_of(good, forecaster.encoder) is not None


def test_a_record_of_an_older_version_has_no_limit() -> None:
    assert call_of(replace(FINISHED, work_limit=None)).work_limit == float("inf")
    assert call_of(replace(FINISHED, work_limit=64.0)).work_limit == 64.0
