"""Finished calls, forecast once more in their order: what a forecaster would have said before it knew each outcome."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from swarmx.core.forecast import Forecast
from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding
from swarmx.core.records import CallRecord
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.forecaster import NeuralForecaster
from swarmx.neural.net import Floats32


def vector_of(record: CallRecord, encoder: HashedEncoder) -> Floats32 | None:
    """The prompt of a text call as `encoder` read it, [dimension]; None where it did not."""
    if record.kind != "llm" or record.encoder != encoder.version:
        return None
    vector = np.frombuffer(record.encoding, dtype="<f2").astype(np.float32)
    return vector if len(vector) == encoder.dimension and np.isfinite(vector).all() else None


def call_of(record: CallRecord) -> Call:
    """The call as its forecast saw it."""
    return Call(
        call_id=record.call_id,
        tenant=record.tenant,
        kind=record.kind,
        model=record.model,
        role=record.role,
        workflow_id=record.workflow_id,
        workflow_kind=record.workflow_kind,
        node=record.node,
        prompt_key=record.prompt_key,
        prompt_bytes=record.prompt_bytes,
        prompt_tokens=record.prompt_tokens,
        work_limit=math.inf if record.work_limit is None else record.work_limit,
    )


def replay(forecaster: NeuralForecaster, records: Sequence[CallRecord]) -> Iterator[tuple[CallRecord, Forecast]]:
    """Forecast each finished text call when it became ready; the forecaster learns from each when it has ended.

    So no outcome is known to its own forecast, nor to that of a call that was already under way (prequential: Dawid,
    JRSS A 147, 1984). The forecaster has learnt from all of them afterwards. Calls that its encoder did not read are
    left out.
    """
    usable: list[_Usable] = []
    for record in records:
        vector = vector_of(record, forecaster.encoder)
        if vector is not None and record.state == "finished" and record.work_done > 0.0:
            usable.append((record, call_of(record), Encoding(encoder=record.encoder, vector=vector)))
    ended = deque(sorted(usable, key=lambda each: each[0].ended_at_s))
    for record, call, encoding in sorted(usable, key=lambda each: each[0].ready_at_s):
        while ended and ended[0][0].ended_at_s <= record.ready_at_s:
            _learn(forecaster, ended.popleft())
        yield record, forecaster.forecast(call, encoding)
    for each in ended:
        _learn(forecaster, each)


_Usable = tuple[CallRecord, Call, Encoding]


def _learn(forecaster: NeuralForecaster, ended: _Usable) -> None:
    record, call, encoding = ended
    forecaster.observe(call, encoding, record.work_done)
