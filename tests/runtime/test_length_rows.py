"""What the records of calls teach the length head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from swarmx.core.prompts import cut
from swarmx.core.records import CallRecord
from swarmx.neural.forecaster import NeuralForecaster, role_of
from swarmx.neural.table import Table
from swarmx.runtime.length_rows import length_table
from tests.agents.worlds import a_call
from tests.gateway.test_predictor_metrics import FINISHED
from tests.neural.length_weights import write_weights


@pytest.fixture
def forecaster(tmp_path: Path) -> NeuralForecaster:
    write_weights(tmp_path, models=("m",))
    return NeuralForecaster.load(tmp_path)


def a_record(forecaster: NeuralForecaster, text: bytes, work_done: float, limit: float = 500.0) -> CallRecord:
    call = a_call("c", work_limit=limit)
    encoding = forecaster.encode(call, cut(text))
    return replace(
        FINISHED,
        workflow_kind=call.workflow_kind,
        role=call.role,
        model=call.model,
        work_done=work_done,
        work_limit=limit,
        encoder=encoding.encoder,
        encoding=encoding.vector.astype("<f2").tobytes(),
    )


def table(forecaster: NeuralForecaster, *records: CallRecord) -> Table:
    return length_table(records, spec=forecaster.head.spec, encoder=forecaster.encoder, memory=forecaster.memory.copy())


def test_a_row_has_the_features_that_its_forecast_had(forecaster: NeuralForecaster) -> None:
    records = [a_record(forecaster, b"write %d poems" % i, 40.0 + 10.0 * i) for i in range(20)]
    made = table(forecaster, *records)
    for i in range(20):
        call = a_call("c", work_limit=500.0)
        encoding = forecaster.encode(call, cut(b"write %d poems" % i))
        features, anchor = forecaster.memory.features(forecaster.encoder, encoding.vector, call.model, role_of(call))
        assert made.features[i] == pytest.approx(features, abs=0.02, nan_ok=True)
        assert made.anchor[i] == pytest.approx(anchor, abs=0.02)
        forecaster.observe(call, encoding, 40.0 + 10.0 * i)
    assert made.target.tolist() == [40.0 + 10.0 * i for i in range(20)]
    assert made.features.dtype == np.float32


def test_an_answer_that_was_cut_off_is_censored(forecaster: NeuralForecaster) -> None:
    made = table(forecaster, a_record(forecaster, b"a", 500.0), a_record(forecaster, b"b", 499.0))
    assert made.censored.tolist() == [True, False]


def test_a_record_of_an_older_version_does_not_know_its_limit(forecaster: NeuralForecaster) -> None:
    made = table(forecaster, replace(a_record(forecaster, b"a", 500.0), work_limit=None))
    assert made.censored.tolist() == [False]


def test_what_the_head_cannot_learn_from_is_left_out(forecaster: NeuralForecaster) -> None:
    good = a_record(forecaster, b"a", 10.0)
    made = table(
        forecaster,
        replace(good, encoder="another"),
        replace(good, encoding=b""),
        replace(good, encoding=good.encoding[:-2]),
        replace(good, kind="image"),
        replace(good, state="failed"),
        replace(good, work_done=0.0),
        good,
    )
    assert len(made) == 1
    assert len(table(forecaster)) == 0


def test_the_memory_that_serves_is_left_alone(forecaster: NeuralForecaster) -> None:
    before = forecaster.memory.seen("m", "report/writer")
    length_table(
        [a_record(forecaster, b"a", 10.0)],
        spec=forecaster.head.spec,
        encoder=forecaster.encoder,
        memory=forecaster.memory,
    )
    assert forecaster.memory.seen("m", "report/writer") == before
