"""Rows for the length head out of the records of finished calls."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from swarmx.core.nouns import Call
from swarmx.core.prompts import Encoding
from swarmx.core.records import CallRecord
from swarmx.neural.encoders.hashed import HashedEncoder
from swarmx.neural.head import HeadSpec
from swarmx.neural.heads.length import LengthMemory
from swarmx.neural.table import Table


def again(record: CallRecord) -> tuple[Call, Encoding]:
    """The call of a record as a forecaster knew it, and what it had read of the prompt."""
    call = Call(
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
    return call, Encoding(encoder=record.encoder, vector=np.frombuffer(record.encoding, dtype="<f2").astype(np.float32))


def length_table(
    records: Sequence[CallRecord], *, spec: HeadSpec, encoder: HashedEncoder, memory: LengthMemory
) -> Table:
    """One row for each finished text call that `encoder` read, oldest first.

    `memory` is that of the start, and is left alone: a copy of it learns from call to call, so that each row has the
    features that its forecast had, or nearly: calls that are not among the records are missing. An answer that was as
    long as the client allowed is censored.
    """
    known = memory.copy()
    rows: list[np.ndarray] = []
    anchors: list[float] = []
    kept: list[CallRecord] = []
    groups: list[str] = []
    for record in records:
        vector = np.frombuffer(record.encoding, dtype="<f2").astype(np.float32)
        is_ours = record.encoder == encoder.version and len(vector) == encoder.dimension
        if not is_ours or record.kind != "llm" or record.state != "finished" or record.work_done <= 0.0:
            continue
        role = f"{record.workflow_kind}/{record.role}"
        features, anchor = known.features(encoder, vector, record.model, role)
        known.learn(encoder, vector, record.model, role, record.work_done)
        rows.append(features)
        anchors.append(anchor)
        kept.append(record)
        groups.append(f"kind{encoder.kind_of(vector)}")
    count = len(kept)
    work = np.array([record.work_done for record in kept], dtype=np.float64)
    limits = np.array([np.inf if record.work_limit is None else record.work_limit for record in kept])
    return Table(
        features=np.array(rows, dtype=np.float32).reshape(count, len(spec.features)),
        anchor=np.array(anchors, dtype=np.float64),
        target=work,
        censored=work >= limits,
        weight=np.ones(count),
        group=np.array(groups, dtype=np.str_),
        split=np.full(count, "train"),  # whoever trains holds rows back itself
    )
